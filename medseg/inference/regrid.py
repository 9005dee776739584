"""Arrays on finer and coarser grids of the same extent, by the rules of scikit-image and PyTorch,
which nnU-Net uses.

Voxels are cells: output o lies at (o + 0.5) * old / new - 0.5 of the input. With `exact` splines
are computed in float64 by scipy, as scikit-image's `resize` does; otherwise in float32 on all
threads, equal to about six digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medseg.models import Resampling

#: Voxels by which scipy repeats the edges before its spline filter.
_PAD = 12
#: One spacing is more than this many times another: planes are resampled on their own.
_SEPARATE_ABOVE = 3
#: Data, shape and order of a spline to the data on that shape, in two or three dimensions.
_Resample = Callable[[NDArray, Sequence[int], int], NDArray[np.float32]]


def separate_axis(
    current: Sequence[float], new: Sequence[float], separate: bool | None
) -> int | None:
    """The axis along which planes are resampled on their own, if there is one.

    The first of the two spacings (mm) whose largest is more than 3 times its smallest decides; if
    two axes share the largest, none is separate. `separate` true: the current spacing decides;
    false: none.
    """
    if separate is False:
        return None
    for spacing in [current] if separate else (current, new):
        numbers = np.array(spacing, float)
        if separate or numbers.max() / numbers.min() > _SEPARATE_ABOVE:
            axes = np.flatnonzero(numbers == numbers.max())
            return int(axes[0]) if len(axes) == 1 else None
    return None


def nearest_places(old: int, new: int) -> NDArray[np.int64]:
    """(new,) for each output the nearest input along an axis, halves up, edges repeated."""
    at = old / new * (np.arange(new) + 0.5) - 0.5
    return np.clip(np.floor(at + 0.5), 0, old - 1).astype(np.int64)


def regrid(
    data: NDArray[np.float32],
    shape: Sequence[int],
    resampling: Resampling,
    current: Sequence[float],
    new: Sequence[float],
    *,
    exact: bool,
    labels: bool = False,
) -> NDArray[np.float32]:
    """`data` (A, B, C) float32 on a grid of `shape`; current, new: spacings in mm. The same array
    if nothing changes.

    labels: each value present is interpolated on its own and the highest wins; of equal ones the
    nearest voxel's.
    """
    shape = tuple(int(n) for n in shape)
    if data.shape == shape or resampling.scheme == "none":
        return data
    axis = separate_axis(current, new, resampling.separate)
    if resampling.scheme == "linear":
        return _linear(data, shape, axis, labels=labels)
    one: _Resample = _labels if labels else partial(_spline, exact=exact)
    if axis is None:
        return one(data, shape, resampling.order)
    return _by_planes(one, data, shape, resampling=resampling, axis=axis)


def _by_planes(
    one: _Resample,
    data: NDArray[np.float32],
    shape: Sequence[int],
    resampling: Resampling,
    *,
    axis: int,
) -> NDArray[np.float32]:
    """Each plane across `axis` resampled by `one`, and then what lies between planes."""
    old, new = data.shape[axis], shape[axis]
    plane = (*shape[:axis], *shape[axis + 1 :])
    across = _across(old, new, resampling.order_across)
    indices = range(old) if across is None else sorted(set(across.tolist()))
    slices = np.moveaxis(data, axis, 0)
    planes = {n: one(np.ascontiguousarray(slices[n]), plane, resampling.order) for n in indices}
    if across is not None:
        return np.stack([planes[n] for n in across.tolist()], axis)
    from scipy import ndimage

    at = old / new * (np.arange(new) + 0.5) - 0.5
    grid = np.meshgrid(at, *(np.arange(n) for n in plane), indexing="ij")
    stack = np.stack([planes[n] for n in indices]).astype(np.float64)
    values = ndimage.map_coordinates(stack, grid, order=resampling.order_across, mode="nearest")
    return np.moveaxis(values, 0, axis).astype(np.float32)


def _across(old: int, new: int, order: int) -> NDArray[np.int64] | None:
    """Which plane is taken for each, or None where planes are interpolated."""
    if old == new:
        return np.arange(new)
    return nearest_places(old, new) if order == 0 else None


def _spline(data: NDArray, shape: Sequence[int], order: int, *, exact: bool) -> NDArray[np.float32]:
    """A spline of the order in two or three dimensions, clipped to the range of what went in."""
    if data.shape == tuple(shape):  # scipy would filter and evaluate at the samples
        return data.astype(np.float32)
    fast = not exact and order in (1, 3)
    values = _fast(data, shape, order) if fast else _zoom(data.astype(np.float64), shape, order)
    return np.clip(values, data.min(), data.max(), out=values).astype(np.float32, copy=False)


def _zoom(data: NDArray[np.float64], shape: Sequence[int], order: int) -> NDArray[np.float64]:
    from scipy import ndimage

    factors = [1 / (old / new) for old, new in zip(data.shape, shape)]
    values: NDArray[np.float64] = ndimage.zoom(
        data, factors, order=order, mode="nearest", grid_mode=True
    )
    return values


def _fast(data: NDArray, shape: Sequence[int], order: int) -> NDArray[np.float32]:
    from medseg.resampling import interpolate  # here, because it compiles

    pad = _PAD if order == 3 else 0
    flat = data.ndim == 2
    data = data[None] if flat else data
    array = np.pad(data, [(0, 0) if flat and n == 0 else (pad, pad) for n in range(3)], mode="edge")
    step = np.eye(4)
    size = (1, *shape) if flat else tuple(shape)
    for n in range(3):
        zoom = data.shape[n] / size[n]
        step[n, n] = zoom
        step[n, 3] = 0.5 * zoom - 0.5 + (0 if flat and n == 0 else pad)
    values = interpolate(array, step, (size[0], size[1], size[2]), order=order, outside=None)
    return values[0] if flat else values


def _labels(data: NDArray, shape: Sequence[int], order: int) -> NDArray[np.float32]:
    """The value whose mask interpolates highest (batchgenerators from 0.25.5 on).

    Of equal ones that of the nearest voxel if it is among them, else the lowest.
    """
    nearest = _zoom(data.astype(np.float64), shape, 0)
    if order == 0:
        return nearest.astype(np.float32)
    labels, best = np.zeros(shape), np.full(shape, -np.inf)
    agrees = np.zeros(shape, bool)
    for value in np.unique(data):
        score = np.clip(_zoom((data == value).astype(np.float64), shape, order), 0, 1)
        tie = agrees | ((score == best) & (nearest == value))
        agrees = np.where(score > best, nearest == value, tie)
        labels[score > best] = value
        best = np.maximum(best, score)
    return np.where(agrees, nearest, labels).astype(np.float32)


def _linear(
    data: NDArray, shape: Sequence[int], axis: int | None, *, labels: bool
) -> NDArray[np.float32]:
    """PyTorch's `interpolate` in float32: trilinear, or bilinear planes and then the nearest
    one."""
    if labels:
        values = np.unique(data)
        # In thousandths and half precision, as nnU-Net compares them: of nearly equal ones the
        # lowest value wins.
        scores = [
            _linear((data == value) * np.float32(1000), shape, axis, labels=False).astype("f2")
            for value in values
        ]
        return values[np.argmax(scores, 0)].astype(np.float32)
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(np.ascontiguousarray(data, np.float32))[None, None]
    if axis is None:
        return F.interpolate(x, tuple(shape), mode="trilinear", align_corners=False)[0, 0].numpy()
    planes = x[0].movedim(axis + 1, 1).transpose(0, 1)
    plane = [n for i, n in enumerate(shape) if i != axis]
    planes = F.interpolate(planes, plane, mode="bilinear", align_corners=False)
    stack = planes[:, 0].movedim(0, axis)
    return F.interpolate(stack[None, None], tuple(shape), mode="nearest-exact")[0, 0].numpy()
