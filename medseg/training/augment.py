"""Training patches with random shape and contrast, cut from whole cases in one interpolation.

A patch is looked up in its case through one transform in millimetres (turned, scaled, bent,
mirrored), so nothing is interpolated twice and no corner is empty where the case has voxels; a
patch without a transform is a plain copy. Outside of the case the image has a background value and
the labels are 0, as in inference. Contrast is then changed as nnU-Net does it (Isensee et al. 2021,
Nature Methods 18:203, supplementary note 4).

Every sample has a seed of its own, drawn from the generator handed in (on the CPU whatever the
device of the images): what happens to it does not depend on the others in its batch, on the number
of threads or on the device, where only the values of noise differ. All is done without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from medseg.config import AugmentConfig
from medseg.kernels.interpolation import linear_patch, multiply_rows
from medseg.kernels.threads import in_slabs
from medseg.training.prepared.formats import Stored

_TINY = 1e-6


@torch.no_grad()
def draw_patches(
    images: Sequence[Tensor | Stored],
    labels: Sequence[Tensor | Stored],
    centres: Tensor,
    patch: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    settings: AugmentConfig,
    generator: Generator,
    *,
    lateral_swap: Tensor | None = None,
    background: Sequence[Tensor] | None = None,
    device: torch.device | None = None,
    send: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """Random patches (B, C, *patch) float32 and their labels (B, *patch), one of each case handed
    in.

    images: whole cases (C, X, Y, Z) float32, normalised, of `spacing_mm`; labels: (X, Y, Z)
    integer; of those on a disk the part is read that a patch shows. device: where patches are made,
    that of the cases by default. send: takes there the part of a case that a patch shows. centres:
    (B, 3), the voxel that becomes voxel patch // 2, also near or beyond the border. lateral_swap:
    (N,) the class on the other side, for labels of patches mirrored along axis 0; labels beyond it
    stay. background: (C,) values outside of each case, the smallest of the case if not given. The
    label of an interpolated voxel is the class with the largest share in its trilinear weights.
    """
    device = device or images[0].device
    out = torch.empty((len(images), images[0].shape[0], *patch), device=device)
    classes = torch.empty((len(images), *patch), dtype=labels[0].dtype, device=device)
    starts = centres.round().long() - torch.tensor(patch) // 2
    for b, draw in enumerate(_draws(len(images), generator)):
        outside = images[b][...].amin((1, 2, 3)) if background is None else background[b]
        matrix = _matrix(settings, draw)
        shift = _bend(patch, spacing_mm, settings=settings, draw=draw, device=device)
        mirror_axes = [axis for axis in settings.mirror if draw.chance(0.5)]
        if matrix is None and shift is None:
            _copy(
                images[b],
                labels[b],
                start=starts[b].tolist(),
                outside=outside,
                out=out[b],
                classes=classes[b],
                send=send,
            )
        else:
            rows = _rows(
                torch.eye(3) if matrix is None else matrix,
                starts[b],
                patch=patch,
                spacing_mm=spacing_mm,
            )
            if shift is None:
                shift = torch.empty((3, 0, 0, 0), device=device)
            _look_up(images[b], labels[b], rows, shift, outside, out[b], classes[b], send)
        _mirror(out[b], classes[b], mirror_axes, lateral_swap)
        _change_intensity(out[b], settings, draw)
    return out, classes


def _mirror(
    image: Tensor, classes: Tensor, axes: Sequence[int], lateral_swap: Tensor | None
) -> None:
    """A patch (C, X, Y, Z) and its classes (X, Y, Z) flipped along axes, in place; sides change
    places along axis 0.
    """
    if axes:
        image.copy_(image.flip([axis + 1 for axis in axes]))
        classes.copy_(classes.flip(list(axes)))
    if 0 in axes and lateral_swap is not None:
        classes.copy_(_swapped(classes, lateral_swap.to(classes.device)))


@torch.no_grad()
def augment_intensity(images: Tensor, settings: AugmentConfig, generator: Generator) -> Tensor:
    """Images (B, C, X, Y, Z) float32 with noise, blur, brightness, contrast, resolution and gamma
    changed at random.

    Noise is the same share of the variance in all channels; the rest is drawn for each channel,
    blur and resolution for half of them. Changes the images in place and returns them.
    """
    for image, draw in zip(images, _draws(len(images), generator)):
        _change_intensity(image, settings, draw)
    return images


class _Draw:
    """Random numbers of one sample."""

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def on(self, device: torch.device) -> Generator:
        """A generator for the device: this one, or one whose seed is drawn from it."""
        if device.type == "cpu":
            return self.generator
        return Generator(device).manual_seed(
            int(torch.randint(2**62, (), generator=self.generator))
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def between(self, ends: tuple[float, float]) -> float:
        return ends[0] + (ends[1] - ends[0]) * float(
            torch.rand((), generator=self.generator, dtype=torch.float64)
        )

    def factor(self, ends: tuple[float, float]) -> float:
        return math.exp(self.between((math.log(ends[0]), math.log(ends[1]))))

    def chance(self, probability: float) -> bool:
        return self.between((0.0, 1.0)) < probability


def _draws(count: int, generator: Generator) -> list[_Draw]:
    return [_Draw(seed) for seed in torch.randint(2**62, (count,), generator=generator).tolist()]


def _matrix(settings: AugmentConfig, draw: _Draw) -> Tensor | None:
    """(3, 3) from mm around the middle of the patch to mm around its centre in the case; None for
    the identity.
    """
    turned, scaled = draw.chance(settings.rotation_share), draw.chance(settings.scaling_share)
    if not turned and not scaled:
        return None
    matrix = torch.eye(3, dtype=torch.float64)
    if turned:
        for axis, largest in enumerate(settings.rotation_degrees):
            matrix = matrix @ _rotation(axis, math.radians(draw.between((-largest, largest))))
    if scaled:
        apart = draw.chance(settings.anisotropic_share)
        scale = [draw.factor(settings.scaling) for _ in range(3 if apart else 1)] * (
            1 if apart else 3
        )
        matrix = matrix @ torch.diag(1 / torch.tensor(scale, dtype=torch.float64))
    return matrix


def _rotation(axis: int, angle: float) -> Tensor:
    a, b = (n for n in range(3) if n != axis)
    turn = torch.eye(3, dtype=torch.float64)
    turn[a, a] = turn[b, b] = math.cos(angle)
    turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
    return turn


def _rows(
    matrix: Tensor, start: Tensor, patch: Sequence[int], spacing_mm: Sequence[float]
) -> Tensor:
    """(3, 4) from voxels of the patch to voxels of the case, of a matrix in mm about the middle of
    the patch.
    """
    spacing = torch.tensor(spacing_mm, dtype=torch.float64)
    in_voxels = matrix.double() * spacing / spacing[:, None]
    middle = (torch.tensor(patch, dtype=torch.float64) - 1) / 2
    return torch.cat((in_voxels, (start + middle - in_voxels @ middle)[:, None]), 1)


def _bend(
    patch: tuple[int, int, int],
    spacing_mm: Sequence[float],
    settings: AugmentConfig,
    draw: _Draw,
    device: torch.device,
) -> Tensor | None:
    """(3, *patch) random displacement in voxels, smooth at `elastic_spacing_mm`; None for none."""
    if not draw.chance(settings.elastic_share):
        return None
    points = [
        max(2, round(n * mm / settings.elastic_spacing_mm) + 1) for n, mm in zip(patch, spacing_mm)
    ]
    field = draw.normal(1, 3, *points) * draw.between(settings.elastic_mm)
    field /= torch.tensor(spacing_mm).view(1, 3, 1, 1, 1)
    return F.interpolate(field.to(device), size=patch, mode="trilinear", align_corners=True)[0]


def _uses_kernels(device: torch.device) -> bool:
    """Whether patches on a device are looked up by compiled loops; elsewhere torch does it."""
    return device.type == "cpu"


def _look_up(
    image: Tensor | Stored, labels: Tensor | Stored, rows: Tensor, shift: Tensor, outside: Tensor,
    out: Tensor, classes: Tensor, send: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """Image and labels of a case at rows (3, 4) @ patch voxel + shift, where `out` lies."""
    if _uses_kernels(out.device) and isinstance(image, Tensor) and isinstance(labels, Tensor):
        _sample_on_cpu(image, labels, rows, shift, outside, out, classes)
        return
    box = _reach(rows, shift, classes.shape, labels.shape)
    if _uses_kernels(out.device):
        whole = _read(image, (slice(None), *box)), _read(labels, box)
        _sample_on_cpu(*whole, rows, shift, outside, out, classes)
        return
    rows[:, 3] -= torch.tensor([side.start for side in box], dtype=rows.dtype)
    _sample(send(image[:, *box]), send(labels[box]), rows, shift, outside, out, classes)


def _read(stored: Tensor | Stored, box: tuple[slice, ...]) -> Tensor:
    """An array in memory of which only a part is read; the rest, whose values are any, is not
    touched and takes no memory. So voxels keep their numbers, and what is computed of those its
    last bits.
    """
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    whole[box] = stored[box]
    return whole


def _reach(
    rows: Tensor, shift: Tensor, patch: Sequence[int], shape: Sequence[int]
) -> tuple[slice, slice, slice]:
    """The part of a case of this shape that a patch shows: a card is sent no more.

    Of a patch that lies outside of the case one voxel at its border.
    """
    ends = torch.tensor([[0.0, n - 1.0] for n in patch], dtype=rows.dtype)
    corners = torch.cartesian_prod(*ends) @ rows[:, :3].T + rows[:, 3]
    moved = shift.abs().amax((1, 2, 3)).cpu() if shift.numel() else torch.zeros(3)
    # One more on each side, for what rounds differently here and there.
    low = (corners.amin(0) - moved).floor().long() - 1
    high = (corners.amax(0) + moved).ceil().long() + 2
    box = []
    for first, past, size in zip(low.tolist(), high.tolist(), shape):
        begin = min(max(0, first), size - 1)
        box.append(slice(begin, max(begin + 1, min(size, past))))
    return box[0], box[1], box[2]


def _copy(
    image: Tensor | Stored, labels: Tensor | Stored, start: list[int], outside: Tensor, out: Tensor,
    classes: Tensor, send: Callable[[Tensor], Tensor]
) -> None:  # fmt: skip
    """The voxels of a case from `start` on."""
    source, target = [], []
    for first, count, size in zip(start, classes.shape, labels.shape):
        low, high = max(0, first), min(size, first + count)
        source.append(slice(low, max(low, high)))
        target.append(slice(low - first, max(low, high) - first))
    if any(part.stop - part.start < n for part, n in zip(target, classes.shape)):
        out.copy_(outside.view(-1, 1, 1, 1).expand_as(out))
        classes.zero_()
    if all(part.stop > part.start for part in source):
        out[(slice(None), *target)] = send(image[(slice(None), *source)])
        classes[tuple(target)] = send(labels[tuple(source)])


def _sample_on_cpu(
    image: Tensor,
    labels: Tensor,
    rows: Tensor,
    shift: Tensor,
    outside: Tensor,
    out: Tensor,
    classes: Tensor,
) -> None:
    """Image and labels of a case at rows (3, 4) @ patch voxel + shift (3, *patch or empty):
    compiled, on threads.
    """
    arrays = [tensor.numpy() for tensor in (image, labels, rows, shift, outside.float())]
    results = out.numpy(), classes.numpy()
    in_slabs(
        lambda first, last: linear_patch(*arrays, first, last, *results),
        classes.shape[0],
        workers=torch.get_num_threads(),
    )


def _sample(
    image: Tensor,
    labels: Tensor,
    rows: Tensor,
    shift: Tensor,
    outside: Tensor,
    out: Tensor,
    classes: Tensor,
) -> None:
    """The same as `_sample_on_cpu` in operations of torch, for every device."""
    axes = [torch.arange(n, dtype=torch.float32, device=out.device) for n in classes.shape]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    rows = rows.float().to(out.device)
    at = voxels @ rows[:, :3].T + rows[:, 3]
    if shift.numel():
        at += shift.permute(1, 2, 3, 0)
    size = torch.tensor(labels.shape, device=out.device)
    inside = ((at >= -0.5) & (at <= size - 0.5)).all(-1)
    at = torch.minimum(at.clamp_(min=0), size - 1.0)
    grid = 2 * at / (size - 1).clamp(min=1) - 1
    values = F.grid_sample(
        image[None], grid.flip(-1)[None], "bilinear", "border", align_corners=True
    )[0]
    out.copy_(torch.where(inside, values, outside.view(-1, 1, 1, 1)))

    base = at.long()
    part = at - base
    corners, weights = [], []
    for corner in range(8):
        bits = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=out.device)
        x, y, z = torch.minimum(base + bits, size - 1).unbind(-1)
        corners.append(labels[x, y, z])
        weights.append(torch.where(bits == 1, part, 1 - part).prod(-1))
    there, weight = torch.stack(corners), torch.stack(weights)
    totals = torch.stack([(weight * (there == one)).sum(0) for one in corners])
    best = there.gather(0, totals.argmax(0, keepdim=True))[0]
    classes.copy_(torch.where(inside, best, torch.zeros_like(best)))


def _swapped(classes: Tensor, lateral_swap: Tensor) -> Tensor:
    known = (classes >= 0) & (classes < len(lateral_swap))
    other = lateral_swap[classes.long().clamp(0, len(lateral_swap) - 1)].to(classes.dtype)
    return torch.where(known, other, classes)


def _change_intensity(image: Tensor, settings: AugmentConfig, draw: _Draw) -> None:
    """The changes of `augment_intensity` to one image (C, X, Y, Z), in place."""
    noise = draw.between(settings.noise_variance) if draw.chance(settings.noise_share) else 0.0
    blurred = draw.chance(settings.blur_share)
    brighter = draw.chance(settings.brightness_share)
    contrasted = draw.chance(settings.contrast_share)
    coarser = draw.chance(settings.low_resolution_share)
    gammas = (draw.chance(settings.inverted_gamma_share), draw.chance(settings.gamma_share))
    inverted = draw.chance(settings.inversion_share)
    for channel in image:
        if noise:
            _add_noise(channel, noise, draw)
        if blurred:
            _blur_half(channel, settings, draw)
        if brighter:
            channel.mul_(draw.factor(settings.brightness))
        if contrasted:
            _change_contrast(channel, draw.factor(settings.contrast))
        if coarser:
            _coarsen_half(channel, settings, draw)
        for wanted, sign in zip(gammas, (-1, 1)):
            if wanted:
                _apply_gamma(channel, draw.factor(settings.gamma), sign)
        if inverted:
            low, high = channel.aminmax()
            channel.neg_().add_(low + high)


def _add_noise(channel: Tensor, variance: float, draw: _Draw) -> None:
    """Gaussian noise of so many times the variance of (X, Y, Z); in place."""
    noises = torch.randn(channel.shape, generator=draw.on(channel.device), device=channel.device)
    channel.add_(noises.mul_(_moments(channel)[1] * math.sqrt(variance)))


def _blur_half(channel: Tensor, settings: AugmentConfig, draw: _Draw) -> None:
    """Half of all channels blurred, by another width along each axis; in place."""
    if draw.chance(0.5):
        sigmas = [draw.between(settings.blur_voxels) for _ in range(3)]
        channel.copy_(
            _along_axes(channel, [_blurring(n, s) for n, s in zip(channel.shape, sigmas)])
        )


def _coarsen_half(channel: Tensor, settings: AugmentConfig, draw: _Draw) -> None:
    """Half of all channels as if they had been sampled at a lower resolution; in place."""
    if draw.chance(0.5):
        zoom = draw.factor(settings.low_resolution)
        channel.copy_(_along_axes(channel, [_coarsening(n, zoom) for n in channel.shape]))


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (X, Y, Z), in an order of sums that does not depend on the
    number of threads.
    """

    def mean(values: Tensor) -> Tensor:
        return values.sum(2).sum(1).sum() / values.numel()

    middle = mean(image)
    return middle, mean((image - middle).square_()).sqrt()


def _change_contrast(image: Tensor, factor: float) -> None:
    """Distances from the mean times `factor`, kept within the range the image had; in place."""
    low, high = image.aminmax()
    middle = _moments(image)[0]
    image.sub_(middle).mul_(factor).add_(middle).clamp_(low, high)


def _apply_gamma(image: Tensor, gamma: float, sign: int) -> None:
    """The image between its ends to the power of `gamma`, from below (1) or above (-1), mean and sd
    kept; in place.
    """
    middle, spread = _moments(image)
    image.mul_(sign)
    low, high = image.aminmax()
    extent = (high - low).clamp(min=_TINY)
    # By the logarithm, because `pow` rounds in two ways, depending on how the threads share the
    # image.
    image.sub_(low).div_(extent).clamp_(0, 1).log_().mul_(gamma).exp_().mul_(sign)
    new_middle, new_spread = _moments(image)
    image.sub_(new_middle).mul_(spread / new_spread.clamp(min=_TINY)).add_(middle)


def _along_axes(image: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """One linear operator (n, n) along each axis of (X, Y, Z)."""
    x, y, z = (matrix.to(image.device) for matrix in matrices)
    image = _product(x, image.reshape(image.shape[0], -1)).reshape(image.shape)
    image = _product(y, image)
    return _product(image.reshape(-1, image.shape[2]), z.T).reshape(image.shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) or (X, N, K) @ b (K, M) or (X, K, M) float32; on a CPU with the same bits on any
    number of threads.

    Those of PyTorch's product change with the threads on some processors, by how its library shares
    out the rows.
    """
    if a.device.type != "cpu":
        return a @ b
    out = torch.empty((*b.shape[:-2], a.shape[-2], b.shape[-1]))
    left, right, result = a.contiguous().numpy(), b.contiguous().numpy(), out.numpy()
    workers = torch.get_num_threads()
    if b.ndim == 3:
        in_slabs(
            lambda i, j: [
                multiply_rows(0, len(left), left, right[n], result[n]) for n in range(i, j)
            ],
            len(right),
            workers=workers,
        )
    else:
        in_slabs(lambda i, j: multiply_rows(i, j, left, right, result), len(left), workers=workers)
    return out


def _blurring(size: int, sigma: float) -> Tensor:
    """(size, size) operator of a Gaussian of `sigma` voxels, whose weights sum to 1 also at the
    ends.
    """
    at = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((at[:, None] - at) / max(sigma, 1e-3)) ** 2)
    weights[weights < 1e-7] = 0  # numbers near the smallest of float32 are slow
    return (weights / weights.sum(1, keepdim=True)).float()


def _coarsening(size: int, zoom: float) -> Tensor:
    """(size, size) operator that keeps the nearest of every 1 / zoom samples and interpolates
    linearly between them.
    """
    few = max(1, round(size * zoom))
    samples = ((np.arange(few) + 0.5) * size / few).astype(int)
    at = np.clip((np.arange(size) + 0.5) * few / size - 0.5, 0, few - 1)
    base = np.minimum(at.astype(int), max(few - 2, 0))
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), samples[base]), 1 - (at - base))
    np.add.at(matrix, (np.arange(size), samples[np.minimum(base + 1, few - 1)]), at - base)
    return torch.from_numpy(matrix.astype(np.float32))
