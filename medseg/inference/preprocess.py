"""From scans to what a network sees: onto the model's grid, intensities scaled. Training and
inference both call this.

`prepare` makes the network's input of the scans of one case, `labels_on_grid` puts a label map on
the same grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.models import FixedScale, GridKind, PercentileScale, ZScore
from medseg.volume import (
    Volume,
    computable,
    reorient,
    resample,
    same_grid,
    tolerance_mm,
    turned_onto,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Spacings that differ by less than this share count as equal: headers round.
SAME_SPACING = 1e-3
#: Planes of the model's grid that are made at a time.
_PLANES = 64


@dataclass(frozen=True)
class ModelGrid:
    """The grid a model sees: boxes around the whole scan whichever way it is stored.

    It depends on where the scan lies in space alone, so every way of storing the same scan gives
    the same result. Indices run along RAS ('world'), or along the scan's own axes turned to the
    nearest RAS ('scan'). For the latter `step` leads from indices of this grid to those of the
    turned scan; it is exactly 1 along axes of equal spacing.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    # Points averaged along each axis for one voxel, where the scan is finer than the grid.
    fine: tuple[int, int, int]
    step: NDArray[np.float64] | None = None  # (4, 4)
    scan_shape: tuple[int, int, int] | None = None  # of the turned scan


def model_grid(
    volume: Volume, spacing_mm: float | Sequence[float], kind: GridKind = "world"
) -> ModelGrid:
    """The grid of `spacing_mm` along (R, A, S) that covers every voxel of the scan."""
    spacing = np.array(spacing_mm, float) * np.ones(3)
    if kind == "scan":
        return _grid_of_scan(volume, spacing)
    corners = np.array([(*c, 1.0) for c in product(*((-0.5, n - 0.5) for n in volume.shape))])
    world = (volume.affine @ corners.T)[:3]
    low, high = world.min(axis=1), world.max(axis=1)
    shape = np.maximum(1, np.ceil((high - low) / spacing - 1e-3)).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (low + high) / 2 - (shape - 1) / 2 * spacing
    # Along each world axis, the spacing of the voxel axis that runs closest to it says how fine the
    # scan is there.
    directions = np.abs(volume.affine[:3, :3]) / volume.spacing_mm
    spacing_along = np.array(volume.spacing_mm)[directions.argmax(axis=1)]
    fine = np.clip(np.round(spacing / spacing_along), 1, 8).astype(int)
    return ModelGrid(affine, tuple(shape.tolist()), tuple(fine.tolist()))


def _grid_of_scan(volume: Volume, spacing: NDArray[np.float64]) -> ModelGrid:
    canonical = reorient(volume)
    ratio = spacing / canonical.spacing_mm
    ratio[np.abs(ratio - 1) < SAME_SPACING] = 1.0
    size = np.array(canonical.shape)
    shape = np.maximum(1, np.ceil(size / ratio - 1e-3)).astype(int)
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (size - 1) / 2 - ratio * ((shape - 1) / 2)
    fine = np.clip(np.round(ratio), 1, 8).astype(int)
    return ModelGrid(
        canonical.affine @ step,
        tuple(shape.tolist()),
        tuple(fine.tolist()),
        step=step,
        scan_shape=canonical.shape,
    )


def to_model_grid(
    volume: Volume, grid: ModelGrid, *, outside: float = 0.0, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The scan on the model's grid, float32: trilinear at the grid's points, averaged where the
    scan is finer.

    Some planes at a time: they come as the scan lies in memory, and the windows want them the other
    way round. Points outside the scan become `outside`; on the scan's own axes ('scan') they take
    the nearest voxel's value, and with equal spacing every voxel keeps its value to the bit.
    """
    out = np.empty(grid.shape, np.float32) if out is None else out
    for x in range(0, grid.shape[0], _PLANES):
        shape = (min(_PLANES, grid.shape[0] - x), *grid.shape[1:])
        if grid.step is not None:
            out[x : x + shape[0]] = _on_own_axes(
                volume, grid.step, first=x, shape=shape, order=1, points=grid.fine
            )
            continue
        affine = grid.affine.copy()
        affine[:3, 3] += grid.affine[:3, 0] * x
        out[x : x + shape[0]] = resample(
            volume, affine, shape, order=1, outside=outside, points=grid.fine
        ).data
    return out


def _on_own_axes(
    volume: Volume,
    step: NDArray[np.float64],
    first: int,
    shape: tuple[int, int, int],
    order: int,
    points: tuple[int, int, int] = (1, 1, 1),
) -> NDArray:
    """Planes `first` and on of a 'scan' grid."""
    from medseg.resampling import interpolate  # here, because it compiles

    step = step.copy()
    step[:3, 3] += step[:3, 0] * first
    return interpolate(reorient(volume).data, step, shape, order=order, outside=None, points=points)


def labels_on_grid(labels: Volume, grid: ModelGrid) -> NDArray:
    """A label map on a model's grid, its dtype kept: the nearest voxel, 0 outside; a copy where
    grids are equal.
    """
    canonical = reorient(labels)
    if grid.step is not None and canonical.shape == grid.scan_shape:
        scan = Volume(canonical.data, grid.affine @ np.linalg.inv(grid.step))
        if same_grid(scan, canonical, tolerance_mm(canonical)):
            return _on_own_axes(labels, grid.step, 0, shape=grid.shape, order=0)
    return resample(labels, grid.affine, grid.shape, order=0).data


def scan_to_grid(
    volume: Volume, grid: ModelGrid, start: Sequence[int] = (0, 0, 0)
) -> NDArray[np.float64]:
    """(4, 4) from the scan's voxel indices to those of its model grid, counted from the grid's
    voxel `start`.
    """
    shift = np.eye(4)
    shift[:3, 3] = [-n for n in start]
    if grid.step is None:
        matrix: NDArray[np.float64] = shift @ np.linalg.inv(grid.affine) @ volume.affine
        return matrix
    # Permutes and flips: whole numbers.
    turn = np.round(np.linalg.inv(reorient(volume).affine) @ volume.affine)
    own: NDArray[np.float64] = shift @ np.linalg.inv(grid.step) @ turn
    return own


def on_one_grid(volumes: Sequence[Volume], names: Sequence[str] = ()) -> list[Volume]:
    """The scans of one case on the first one's grid: those that store it in another orientation are
    turned.

    Raises `BadFile` if one lies on another grid; `names` say which is which.
    """
    first = volumes[0]
    turned_volumes = [first]
    for n, volume in enumerate(volumes[1:], 1):
        turned_volume = turned_onto(volume, first)
        if turned_volume is None:
            what, other = (names[i] if names else f"channel {i + 1}" for i in (n, 0))
            raise BadFile(
                f"{what} lies on another grid than {other}; register and resample the scans to one"
                " grid"
            )
        turned_volumes.append(first.with_data(turned_volume.data))
    return turned_volumes


def normalise(image: NDArray[np.float32]) -> Tensor:
    """Model input (1, X, Y, Z) in 0..1, made in place: the darkest voxels become 0, then training's
    percentiles rule.

    The darkest are those below the 1/2000 quantile, found a plane at a time.
    """
    import torch

    pass

    count = image.size // 2000 + 1
    darkest = np.empty(0, np.float32)
    for plane in image:
        darkest = np.concatenate((darkest, plane.ravel()))
        if len(darkest) > count:
            darkest = np.partition(darkest, count - 1)[:count]
    image -= darkest.max()
    np.maximum(image, 0, out=image)
    return scale_to_percentiles(torch.from_numpy(image))[None]


def scale_intensity(
    image: NDArray[np.float32],
    scheme: PercentileScale | ZScore | FixedScale,
    name: str = "the scan",
) -> None:
    """Scale one channel (X, Y, Z) on the model's grid in place. Raises `BadFile` where that gives
    no numbers.
    """
    if isinstance(scheme, PercentileScale):
        normalise(image)
        return
    if isinstance(scheme, FixedScale):
        np.clip(image, scheme.low, scheme.high, out=image)
        mean, sd = scheme.mean, scheme.sd
    else:
        mean, sd = mean_and_sd(image, nonzero=scheme.nonzero)
        if sd <= 1e-6 * abs(mean):
            raise BadFile(
                f"{name} has one intensity everywhere on the model's grid; check the scan"
            )
    keep = isinstance(scheme, ZScore) and scheme.nonzero
    for plane in image:
        np.divide(
            plane - np.float32(mean), np.float32(sd), out=plane, where=plane != 0 if keep else True
        )
    if not np.isfinite(image.sum(dtype=np.float64)):
        raise BadFile(f"{name} holds voxels that are not finite numbers; check the scan")


def _computable(volume: Volume, name: str) -> Volume:
    try:
        return computable(volume)
    except BadFile as error:
        raise BadFile(f"{name} cannot be used: {error}") from None


def mean_and_sd(image: NDArray[np.float32], *, nonzero: bool = False) -> tuple[float, float]:
    """Mean and standard deviation of the voxels, or of those that are not 0, in float64, a plane at
    a time.
    """

    def planes() -> Iterator[NDArray[np.float32]]:
        return (plane[plane != 0] if nonzero else plane for plane in image)

    count = sum(plane.size for plane in planes())
    if not count:
        return 0.0, 0.0
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in planes()) / count
    squares = sum(float(((plane - mean) ** 2).sum(dtype=np.float64)) for plane in planes())
    return mean, float(np.sqrt(squares / count))


def prepare(
    volumes: Sequence[Volume],
    spacing_mm: float | Sequence[float],
    grid: GridKind = "world",
    intensity: (
        Literal["percentiles"] | Sequence[PercentileScale | ZScore | FixedScale]
    ) = "percentiles",
    *,
    names: Sequence[str] = (),
) -> tuple[Tensor, ModelGrid]:
    """The network's input (C, X, Y, Z) float32 of the scans of one case, one for each channel, and
    the grid it lies on.

    The arguments are those of `ModelSpec`: `spacing`, `grid`, `intensity` (or `intensities`),
    `channel_names`. Raises `BadFile` where the scans lie on different grids, or have one intensity
    everywhere.
    """
    import torch

    schemes = (
        (PercentileScale(),) * len(volumes) if isinstance(intensity, str) else tuple(intensity)
    )
    if len(schemes) != len(volumes):
        raise BadFile(f"{len(volumes)} scans are given where {len(schemes)} are wanted")
    volumes = on_one_grid(volumes, names)
    target_grid = model_grid(volumes[0], spacing_mm, grid)
    image = np.empty((len(volumes), *target_grid.shape), np.float32)
    for n, (volume, scheme, channel) in enumerate(zip(volumes, schemes, image)):
        if not isinstance(scheme, FixedScale):  # which is for one unit
            volume = _computable(volume, names[n] if names else "the scan")
        # Where air is not 0, what lies around a slanted scan is as dark as its darkest voxel.
        dark = isinstance(scheme, PercentileScale) or (
            isinstance(scheme, ZScore) and scheme.nonzero
        )
        outside = 0.0 if dark or target_grid.step is not None else float(volume.data.min())
        to_model_grid(volume, target_grid, outside=outside, out=channel)
        scale_intensity(channel, scheme, names[n] if names else "the scan")
    return torch.from_numpy(image), target_grid


def percentile_range(
    image: Tensor, low: float = 0.5, high: float = 99.5
) -> tuple[float, float] | None:
    """Two percentiles of the non-zero voxels of (X, Y, Z) or (1, X, Y, Z), None where there are
    next to none.

    Of large images they are those of about 50,000 voxels, taken evenly in the order of the array.
    """
    sample = _sample_of_filled(image)
    if sample is None:
        return None
    bottom, top = (float(sample[round(p / 100 * (len(sample) - 1))]) for p in (low, high))
    return bottom, top


def _sample_of_filled(image: Tensor) -> NDArray[np.float32] | None:
    """About 50,000 of the voxels above 0, sorted; None where there are next to none."""
    from medseg.kernels.rendering import filled

    if image.device.type != "cpu":
        return _sample_in_torch(image)
    flat = image.contiguous().view(-1).numpy()
    count = filled(flat, 0, flat)
    if count < 10:
        return None
    step = max(1, count // 50_000)
    sample = np.empty(-(-count // step), np.float32)
    filled(flat, step, sample)
    sample.sort()
    return sample


def _sample_in_torch(image: Tensor) -> NDArray[np.float32] | None:
    """The same in operations of torch, for every device."""
    above = image[image > 0]
    sample = above[:: max(1, len(above) // 50_000)].sort().values
    return None if len(above) < 10 else sample.cpu().numpy()


def scale_to_percentiles(image: Tensor) -> Tensor:
    """The image scaled in place so that its `percentile_range` becomes 0 and 1, then clamped there.

    The same rule is applied to a real scan before inference ("percentiles" in the model's JSON).
    """
    ends = percentile_range(image)
    if ends is None:
        return image.zero_()
    # Nothing else than 0 is too narrow a range: a scan in small units has the same labels.
    return (
        image.sub_(ends[0])
        .div_(max(ends[1] - ends[0], float(np.finfo(np.float32).tiny)))
        .clamp_(0, 1)
    )
