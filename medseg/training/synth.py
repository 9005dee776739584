"""Label maps to images of random contrast, resolution, shape and quality: training without images.

After SynthSeg (Billot et al. 2023, Medical Image Analysis 86:102789, section 3): a label map is
deformed, every structure gets a random intensity, and the image is blurred, biased, coarsened and
corrupted at random. Everything is drawn on the model's grid, so a sample costs tens of
milliseconds: partial volume comes from averaging the intensities found at four points inside each
voxel instead of rendering a finer image. Labels made from surfaces leave voxels that are mostly,
but not only, of one tissue to what is beside it: FreeSurfer (mris_place_surface) seeks the border
of cortex to fluid between one and three standard deviations below its mean. `border` renders such
voxels as the mixtures they are. All of it is plain torch and a function of the generator handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional as F

from medseg.config import SynthConfig
from medseg.errors import BadConfig
from medseg.inference import scale_to_percentiles
from medseg.volume import Volume, reorient

CPU = torch.device("cpu")
#: Four points of a voxel (corners of a tetrahedron, in voxel units) where its intensity is looked
#: up.
_INSIDE = 0.25 * torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@dataclass(frozen=True)
class Heads:
    """Label maps ready for rendering.

    maps: uint8 index arrays (X, Y, Z) running to RAS, cut to their content with a border of one
    empty voxel; spacings_mm: one (3,) tensor each; values: the label value behind each index;
    centres: (3,) voxel position of the middle of the target structures. tissue, sides: (N,) the
    index that voxels of an index are partly made of, because they touch it, and on how many sides;
    itself and 0 for most.
    """

    maps: tuple[Tensor, ...]
    spacings_mm: tuple[Tensor, ...]
    centres: tuple[Tensor, ...]
    values: tuple[int, ...]
    tissue: Tensor
    sides: Tensor


@dataclass(frozen=True)
class Lookup:
    """What rendering needs to know of each label index, as (N,) tensors; made once by `lookup`.

    target: class trained for; mirrored: that class after a left-right flip; group: labels that
    share an intensity; inside: whether a skull-stripped image keeps it; prior: (N, 2) mean and sd
    when T1-like, mean < 0 if unknown.
    """

    target: Tensor
    mirrored: Tensor
    group: Tensor
    inside: Tensor
    prior: Tensor


def load_heads(
    volumes: Sequence[Volume],
    targets: Sequence[int],
    border: Mapping[int, Sequence[int]] | None = None,
) -> Heads:
    """Label volumes as `Heads`; voxels of a label that touch a tissue `border` names for it get an
    index of their own.

    Raises `BadConfig` if a volume holds no target or all need more than 255 indices.
    """
    values = sorted({int(v) for volume in volumes for v in np.unique(volume.data)})
    touching = _touching(values, border or {})
    count = len(values) + len(touching)
    if count > 255:
        raise BadConfig(
            f"the label maps hold {count} different values, borders counted; at most 255 can be"
            " rendered"
        )
    index = np.zeros(max(values) + 1, np.uint8)
    index[values] = np.arange(len(values))
    maps, spacings, centres = [], [], []
    for number, volume in enumerate(volumes, 1):
        ras = reorient(volume, "RAS")
        if not np.isin(ras.data, list(targets)).any():
            raise BadConfig(
                f"label map {number} of {len(volumes)} holds none of the structures to predict"
            )
        data = _cut_to_content(ras.data)
        centres.append(_middle(np.isin(data, list(targets))))
        head = _with_borders(np.pad(index[data], 1), touching, len(values))
        maps.append(torch.from_numpy(head))
        spacings.append(torch.tensor(ras.spacing_mm))
    return Heads(
        tuple(maps),
        tuple(spacings),
        centres=tuple(centres),
        values=(*values, *(values[own] for own, _, _ in touching)),
        tissue=torch.tensor([*range(len(values)), *(tissue for _, tissue, _ in touching)]),
        sides=torch.tensor([0.0] * len(values) + [float(sides) for _, _, sides in touching]),
    )


def _touching(
    values: Sequence[int], border: Mapping[int, Sequence[int]]
) -> list[tuple[int, int, int]]:
    """(index of a value, index of a tissue it may touch, on how many sides) for the values that
    there are.
    """
    pairs = [(value, tissue) for value, tissues in border.items() for tissue in tissues]
    return [
        (values.index(value), values.index(tissue), sides)
        for value, tissue in pairs
        for sides in (1, 2)
        if value in values and tissue in values
    ]


def _planes(mask: NDArray[np.bool_], axis: int) -> NDArray[np.intp]:
    """The planes across an axis of (X, Y, Z) in which anything is true."""
    return np.nonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))[0]


def _cut_to_content(data: NDArray) -> NDArray:
    extents = [_planes(data != 0, axis) for axis in range(3)]
    return data[tuple(slice(planes[0], planes[-1] + 1) for planes in extents)]


def _middle(mask: NDArray[np.bool_]) -> Tensor:
    """(3,) the mean of the planes that a mask fills along each axis, in voxels."""
    return torch.tensor([_planes(mask, axis).mean() for axis in range(3)]).float()


def _with_borders(
    head: NDArray[np.uint8], touching: Sequence[tuple[int, int, int]], first: int
) -> NDArray[np.uint8]:
    """`head` with the indices `first` and on where an index shares faces with another: (own, other,
    on how many sides).

    2 sides are opposite ones. Where there are several others, the last one counts.
    """
    from scipy import ndimage  # here: inference uses this module, too, and must not wait for it

    out = head.copy()
    for number, (own, other, sides) in enumerate(touching, first):
        there = head == other
        if sides == 1:
            near = ndimage.binary_dilation(there)
        else:
            near = np.zeros_like(there)
            for axis in range(3):
                near |= np.roll(there, 1, axis) & np.roll(there, -1, axis)
        out[near & (head == own)] = number
    return out


def lookup(
    values: Sequence[int], classes: Sequence[int], mirror: Mapping[int, int], config: SynthConfig
) -> Lookup:
    """The `Lookup` of label `values` for a model that predicts `classes` (label values; class 0 is
    background).
    """
    class_of = {value: n for n, value in enumerate(classes)}
    mirror = {**mirror, **{b: a for a, b in mirror.items()}}
    target, mirrored, group, inside, prior = [], [], [], [], []
    for value in values:
        structure = config.merge.get(value, value)
        target.append(class_of.get(structure, 0))
        mirrored.append(class_of.get(mirror.get(structure, structure), 0))
        group.append(min(value, mirror.get(value, value)))
        inside.append(value not in config.outside and value != 0)
        prior.append(
            config.t1_like.get(value, config.t1_like.get(mirror.get(value, value), (-1.0, 0.0)))
        )
    number_of = {g: n for n, g in enumerate(sorted(set(group)))}
    return Lookup(
        torch.tensor(target, dtype=torch.uint8),
        torch.tensor(mirrored, dtype=torch.uint8),
        group=torch.tensor([number_of[g] for g in group]),
        inside=torch.tensor(inside),
        prior=torch.tensor(prior, dtype=torch.float32),
    )


def render(
    heads: Heads,
    table: Lookup,
    shape: tuple[int, int, int],
    spacing_mm: float,
    config: SynthConfig,
    generator: Generator,
    *,
    which: int | None = None,
    t1_like: float = 0.0,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """One random image (X, Y, Z) float32 in 0..1 and its classes (X, Y, Z) uint8, on a grid of
    `spacing_mm` in RAS.

    `which` picks the head (random if None); `t1_like` is the probability of T1-like rather than
    random intensities. The image is made on `device`, of the same random numbers as on a CPU.
    """
    rng = _Random(generator, device)
    which = rng.integer(len(heads.maps)) if which is None else which
    matrix, centre, flipped = _pose(
        heads, which, shape=shape, spacing_mm=spacing_mm, config=config, rng=rng
    )

    displacement = _deformation(shape, spacing_mm, config=config, rng=rng)  # (3, X, Y, Z) mm
    means, deviations = _contrast(table, config, rng=rng, t1_like=t1_like)
    classes = table.mirrored if flipped else table.target
    if rng.chance(config.skull_stripped):
        means, deviations, classes = _strip(
            table, heads.values, means=means, deviations=deviations, classes=classes, rng=rng
        )
    if len(heads.sides.nonzero()):
        low, high = config.border_share
        share = low + rng.rand(len(means))[table.group] * (high - low)
        means = means.lerp(means[heads.tissue], (share * heads.sides).clamp(max=1))
    to_head = matrix / heads.spacings_mm[which].view(3, 1)
    image, indices, labels = _look_up(
        heads.maps[which],
        to_head,
        centre=centre,
        spacing_mm=spacing_mm,
        moved=displacement,
        means=means,
        deviations=deviations,
        classes=classes,
        rng=rng,
    )
    if rng.chance(config.mixed):
        second = (rng.rand(len(means)) * ~table.inside * (means > 0)).to(device)[indices.long()]
        there = (_smooth_field(1, 8, shape=shape, rng=rng)[0] > rng.uniform(-1, 1)) & (second > 0)
        image = torch.where(there, second, image)
    image = _corrupt(image, spacing_mm, config=config, rng=rng)
    if rng.chance(config.cut):
        axis = rng.integer(3)
        length = int(rng.uniform(0, 0.25) * shape[axis])
        start = 0 if rng.chance(0.5) else shape[axis] - length
        for part in (image, labels):  # beyond the field of view there is nothing to label
            part.narrow(axis, start, length).zero_()
    image = scale_to_percentiles(image.clamp_(min=0))
    return image ** float(np.exp(rng.uniform(-config.gamma, config.gamma))), labels


class _Random:
    """Scalars and tensors from one torch generator on the CPU; what is as large as an image goes
    to a device.
    """

    def __init__(self, generator: Generator, device: torch.device = CPU) -> None:
        self.generator, self.device = generator, device

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return float(torch.empty(()).uniform_(low, high, generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def integer(self, stop: int) -> int:
        return int(torch.randint(stop, (), generator=self.generator))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def noise(self, shape: Sequence[int]) -> Tensor:
        return self.normal(shape).to(self.device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


def _pose(
    heads: Heads,
    which: int,
    shape: tuple[int, int, int],
    spacing_mm: float,
    config: SynthConfig,
    rng: _Random,
) -> tuple[Tensor, Tensor, bool]:
    """A random affine (3, 3) from mm around the window's middle to mm in the head, where that
    middle is, and a flip.
    """
    angles = (rng.rand(3) * 2 - 1) * np.deg2rad(config.rotation_degrees)
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles.tolist()):
        a, b = [n for n in range(3) if n != axis]
        turn = torch.eye(3)
        turn[a, a] = turn[b, b] = float(np.cos(angle))
        turn[a, b], turn[b, a] = float(-np.sin(angle)), float(np.sin(angle))
        matrix = matrix @ turn
    low, high = config.scaling
    overall = rng.uniform(low, high)
    scale = overall * (1 + (rng.rand(3) * 2 - 1) * config.anisotropic_scaling)
    shear = torch.eye(3) + (rng.rand(3, 3) * 2 - 1) * config.shearing * (1 - torch.eye(3))
    flipped = rng.chance(config.flip)
    matrix = (
        matrix
        @ shear
        @ torch.diag(1 / scale)
        @ torch.diag(torch.tensor([-1.0 if flipped else 1.0, 1, 1]))
    )

    head, spacing = heads.maps[which], heads.spacings_mm[which]
    if rng.chance(config.anywhere):
        centre = rng.rand(3) * (torch.tensor(head.shape) - 2)
    else:
        centre = heads.centres[which] + rng.normal((3,)) * config.offset_mm / spacing
    return matrix, centre, flipped


def _smooth_field(channels: int, points: int, shape: tuple[int, int, int], rng: _Random) -> Tensor:
    """(channels, X, Y, Z) trilinear interpolation of standard normal values on a coarse grid of
    points³.
    """
    field = rng.noise((channels, points, points, points))
    # An axis at a time: several times faster than `interpolate`.
    weights = (_between(size, points).to(rng.device) for size in shape)
    return torch.einsum("cijk,xi,yj,zk->cxyz", field, *weights)


def _between(size: int, points: int) -> Tensor:
    """Linear interpolation of `points` values, the outer ones at the outer voxels: weights (size,
    points).
    """
    distance = torch.linspace(0, points - 1, size)[:, None] - torch.arange(points)
    return (1 - distance.abs()).clamp_(min=0)


def _deformation(
    shape: tuple[int, int, int], spacing_mm: float, config: SynthConfig, rng: _Random
) -> Tensor:
    """(3, X, Y, Z) random displacement in mm: the sum of a coarse and a finer smooth field."""
    field = torch.zeros(3, *shape, device=rng.device)
    for spacing_of_points_mm, largest_mm in config.deformation_mm:
        points = max(2, round(max(shape) * spacing_mm / spacing_of_points_mm))
        field += rng.uniform(0, largest_mm) * _smooth_field(3, points, shape=shape, rng=rng)
    return field


def _look_up(
    head: Tensor, matrix: Tensor, centre: Tensor, spacing_mm: float, moved: Tensor, means: Tensor,
    deviations: Tensor,
    classes: Tensor, rng: _Random
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The image (X, Y, Z), the label index of every voxel, and its class; see
    `kernels.rendering.look_up`.
    """
    from medseg.kernels.rendering import look_up
    from medseg.kernels.threads import in_slabs

    shape = tuple(moved.shape[1:])
    inputs = (head, matrix, centre, moved, _INSIDE, means, deviations, rng.noise(shape), classes)
    if not _uses_kernels(rng.device):
        return _look_up_in_torch(*(part.to(rng.device) for part in inputs), spacing_mm=spacing_mm)
    image = torch.empty(shape)
    indices, labels = (torch.empty(shape, dtype=torch.uint8) for _ in range(2))
    arrays = [part.contiguous().numpy() for part in (*inputs, image, indices, labels)]
    spacing = np.float32(spacing_mm)
    in_slabs(
        lambda low, high: look_up(low, high, spacing, *arrays),
        shape[0],
        workers=torch.get_num_threads(),
    )
    return image, indices, labels


def _uses_kernels(device: torch.device) -> bool:
    """Whether images on a device are looked up by compiled loops; elsewhere torch does it."""
    return device.type == "cpu"


def _look_up_in_torch(
    head: Tensor, matrix: Tensor, centre: Tensor, moved: Tensor, inside: Tensor, means: Tensor,
    deviations: Tensor, noise: Tensor, classes: Tensor, *, spacing_mm: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same as `kernels.rendering.look_up` in operations of torch, for every device."""
    from_middle = [
        (torch.arange(n, device=moved.device) - (n - 1) * 0.5) * spacing_mm for n in moved.shape[1:]
    ]
    mm = moved + torch.stack(torch.meshgrid(*from_middle, indexing="ij"))
    at = torch.einsum("rc,cxyz->rxyz", matrix, mm)
    last = torch.tensor(head.shape, device=moved.device).view(3, 1, 1, 1) - 1
    flat, total = head.reshape(-1), torch.zeros_like(noise)

    def index_at(offset: Tensor) -> Tensor:
        # + 1 for the border, + 0.5 because the cut to an integer rounds down.
        place = at + (centre + 1.5 + offset).view(3, 1, 1, 1)
        x, y, z = torch.minimum(place.clamp_(min=0).long(), last)
        return flat[(x * head.shape[1] + y) * head.shape[2] + z]

    for point in inside:
        total += means[index_at(matrix @ (spacing_mm * point)).long()]
    indices = index_at(torch.zeros_like(centre))
    own = indices.long()
    return total / len(inside) + deviations[own] * noise, indices, classes[own]


def _contrast(
    table: Lookup, config: SynthConfig, rng: _Random, t1_like: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the intensity of every label index, (N,) each."""
    groups = int(table.group.max()) + 1
    means = rng.rand(groups)[table.group]
    deviations = (rng.rand(groups) * config.noise_within)[table.group]
    if rng.chance(t1_like):
        known = table.prior[:, 0] >= 0
        wobble = rng.normal((groups,))[table.group]
        # Stretches contrast between tissues as echo and inversion times do.
        overall = rng.uniform(0.6, 1.4)
        prior = 1 - (1 - table.prior[:, 0]) * overall + wobble * table.prior[:, 1]
        means = torch.where(known, prior.clamp(0, 1.5), means)
        deviations = torch.where(known, deviations * 0.5, deviations)
    elif rng.chance(config.curved):
        known = table.prior[:, 0] >= 0
        t1 = table.prior[:, 0] + 1.5 * rng.normal((groups,))[table.group] * table.prior[:, 1]
        curve = rng.rand(6).numpy()
        means = torch.where(
            known, torch.from_numpy(np.interp(t1, np.linspace(0, 1, 6), curve)).float(), means
        )
        deviations = torch.where(known, deviations * 0.5, deviations)
    if rng.chance(config.dark_background):
        means, deviations = means.clone(), deviations.clone()
        means[0], deviations[0] = 0.0, deviations[0] * 0.1
    return means, deviations


def _strip(
    table: Lookup,
    values: tuple[int, ...],
    means: Tensor,
    deviations: Tensor,
    classes: Tensor,
    rng: _Random,
) -> tuple[Tensor, Tensor, Tensor]:
    """For a skull-stripped image: what lies outside becomes 0; half of the time the fluid around
    the brain goes too.
    """
    inside = table.inside.clone()
    if rng.chance(0.5) and 24 in values:
        fluid = table.group == table.group[values.index(24)]
        inside[fluid] = False
        classes = classes.clone()
        classes[fluid] = 0
    keep = inside.float()
    return means * keep, deviations * keep, classes


def _corrupt(image: Tensor, spacing_mm: float, config: SynthConfig, rng: _Random) -> Tensor:
    """Ghosts, bias field, blur, thick slices and noise, each at random."""
    shape = (image.shape[0], image.shape[1], image.shape[2])
    if rng.chance(config.ghosts):
        # Far away it is a ghost or what wrapped around; a voxel or two away it is a head that
        # moved.
        axis, far = rng.integer(3), rng.chance(0.5)
        shift = (
            round(rng.uniform(0.2, 0.8) * shape[axis])
            if far
            else 1 + rng.integer(max(1, round(4 / spacing_mm)))
        )
        strength = rng.uniform(0, 0.15 if far else 0.5)
        image = (1 - strength) * image + strength * image.roll(shift, axis)
    if rng.chance(0.8):
        image = image * torch.exp(
            rng.uniform(0, config.bias) * _smooth_field(1, 4, shape=shape, rng=rng)[0]
        )
    if rng.chance(config.blurred):
        image = _blur(image, rng.uniform(0.3, 1.0) * config.blur_mm / spacing_mm)
    if rng.chance(config.coarse):
        axis = rng.integer(3)
        thickness = [rng.uniform(1.0, 1.5) for _ in range(3)]
        thickness[axis] = rng.uniform(1.0, config.thickest_mm / spacing_mm)
        small = [max(4, round(n / t)) for n, t in zip(shape, thickness)]
        image = F.interpolate(image[None, None], size=small, mode="area")
        image += rng.uniform(0, config.noise) * rng.noise(image.shape)
        image = F.interpolate(image, size=shape, mode="trilinear", align_corners=False)[0, 0]
    else:
        image = image + rng.uniform(0, config.noise) * rng.noise(shape)
    return image


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with `sigma` in voxels."""
    radius = max(1, int(2.5 * sigma + 0.5))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (kernel / kernel.sum()).tolist()
    for axis in range(3):
        n = image.shape[axis]
        out = torch.zeros_like(image)
        for offset, weight in zip(range(-radius, radius + 1), weights):
            if abs(offset) < n:
                source = image.narrow(axis, max(0, offset), n - abs(offset))
                out.narrow(axis, max(0, -offset), n - abs(offset)).add_(source, alpha=weight)
        image = out
    return image
