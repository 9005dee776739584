"""What a MONAI model's transforms do to a scan, and the scan on its way through all of them.

The arithmetic is that of MONAI 1.6 (`monai.transforms`), in float32 and operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import BadFile
from medseg.inference.journey import Grid, Journey, ready
from medseg.inference.sampling import resampled
from medseg.models import Crop, Curve, Extent, Range, Space, Standard, Turn
from medseg.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor


def travel(volumes: Sequence[Volume], journey: Journey) -> tuple[Tensor, Journey]:
    """The network's input (C, X, Y, Z) float32, and the journey as it went.

    Raises `BadFile` where a scan holds values that are not finite, or nothing to crop to.
    """
    import torch

    scans = [np.ascontiguousarray(volume.data, dtype=np.float32) for volume in volumes]
    image = torch.from_numpy(np.stack(scans))
    if not bool(torch.isfinite(image.sum(dtype=torch.float64))):
        raise BadFile("holds voxels that are not finite numbers; check the scan")
    grid = Grid(journey.scan.affine, journey.scan.shape)
    for step in journey.steps:
        image = STEPS[type(step)](image, step, grid)
    if not bool(torch.isfinite(image.sum(dtype=torch.float64))):
        raise BadFile("does not become finite numbers by the model's scaling; check the scan")
    affine = grid.affine.numpy()
    return image, replace(journey, shape=grid.shape, moves=ready(grid), affine=affine)


def _turn(image: Tensor, step: Turn, grid: Grid) -> Tensor:
    move = grid.turn(step)
    axes = [axis + 1 for axis, flip in enumerate(move.flips) if flip]
    image = image.flip(axes) if axes else image
    return image.permute(0, *(axis + 1 for axis in move.order))


def _space(image: Tensor, step: Space, grid: Grid) -> Tensor:
    import torch

    move, theta = grid.space(step)
    if move.same:
        return image
    channels = [
        resampled(one.numpy(), theta, move.after, nearest=step.nearest, single=step.single)
        for one in image
    ]
    return torch.from_numpy(np.stack(channels))


def _crop(image: Tensor, step: Crop, grid: Grid) -> Tensor:
    from torch.nn import functional as F

    foreground = (image > 0).any(0)
    start, after = [], []
    for axis in range(3):
        planes = foreground.any(dim=tuple({0, 1, 2} - {axis})).nonzero()
        if not len(planes):
            raise BadFile("has no voxel above 0 to crop to; check the scan")
        low = int(planes[0]) - step.margin[axis]
        high = int(planes[-1]) + step.margin[axis] + 1
        if not step.beyond:
            low, high = max(low, 0), min(high, grid.shape[axis])
        start.append(low)
        after.append(high - low)
    move = grid.cut((start[0], start[1], start[2]), (after[0], after[1], after[2]))
    sides = [slice(max(0, a), min(n, a + count)) for a, count, n in zip(start, after, move.before)]
    cut = image[:, sides[0], sides[1], sides[2]]
    missing = [
        (max(0, -a), max(0, a + count - n)) for a, count, n in zip(start, after, move.before)
    ]
    pads = [n for pair in missing[::-1] for n in pair]
    return F.pad(cut, pads) if any(pads) else cut


def _on(image: Tensor, channels: Sequence[int] | None, work: Callable[[Tensor], Tensor]) -> Tensor:
    """The image with some channels changed, each (1, X, Y, Z) on its own; None: all together."""
    if channels is None:
        return work(image)
    for channel in channels:
        image[channel : channel + 1] = work(image[channel : channel + 1])
    return image


def _range(image: Tensor, step: Range, grid: Grid) -> Tensor:
    def work(part: Tensor) -> Tensor:
        part = (part - step.low) / (step.high - step.low)
        part = part * (step.to_high - step.to_low) + step.to_low
        return part.clamp(step.to_low, step.to_high) if step.clip else part

    return _on(image, step.channels, work)


def _standard(image: Tensor, step: Standard, grid: Grid) -> Tensor:
    import torch

    def work(part: Tensor) -> Tensor:
        inside = part[part != 0] if step.nonzero else part
        if not inside.numel():
            return part
        mean = torch.mean(inside.float()).item()
        deviation = torch.std(inside.float(), unbiased=False).item() or 1.0
        if not step.nonzero:
            return (part - mean) / deviation
        part = part.clone()
        part[part != 0] = (inside - mean) / deviation
        return part

    if step.each and step.channels is None:
        return torch.stack([work(one) for one in image])
    return _on(image, step.channels, work)


def _extent(image: Tensor, step: Extent, grid: Grid) -> Tensor:
    import torch

    def work(part: Tensor) -> Tensor:
        low, high = part.min(), part.max()
        if bool(low == high):
            return part * step.to_low
        return ((part - low) / (high - low)) * (step.to_high - step.to_low) + step.to_low

    return torch.stack([work(one) for one in image]) if step.each else work(image)


def _curve(image: Tensor, step: Curve, grid: Grid) -> Tensor:
    return _on(image, step.channels, CURVES[step.function])


def _logistic(part: Tensor) -> Tensor:
    return part.sigmoid()


def _tanh(part: Tensor) -> Tensor:
    return 3 * (part / 3).tanh()


def _counts(part: Tensor) -> Tensor:
    return ((part - part.min()) / part.std()).sigmoid()


#: Name in a recipe -> the function of a channel's values.
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": _logistic,
    "tanh": _tanh,
    "counts": _counts,
}
#: Step of a recipe -> what does it to the image (C, X, Y, Z) on its grid.
STEPS: dict[type, Callable[[Any, Any, Grid], Any]] = {
    Turn: _turn,
    Space: _space,
    Crop: _crop,
    Range: _range,
    Standard: _standard,
    Extent: _extent,
    Curve: _curve,
}
