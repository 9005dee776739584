"""Interpolation of arrays on other grids: nearest, linear and cubic, in float32 and on all threads.

Where the axes of the two grids are parallel, interpolation is one small operator for each axis,
applied a few planes at a time; else every point looks up its neighbours. Values equal scipy's
(`scipy.ndimage.affine_transform` with mode='constant'): points beyond the centres of the outermost
voxels are outside, and cubic splines mirror there (Unser 1999, https://doi.org/10.1109/79.799930).
Everything here knows indices only, no millimetres.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import permutations
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.kernels.interpolation import (
    ROUNDING,
    apply_operators,
    cubic_points,
    filter_columns,
    filter_rows,
    linear_points,
)
from medseg.kernels.threads import in_slabs, threads

#: Grids are parallel if their axes run apart by less than this, in voxels over the whole grid.
_PARALLEL = 1e-6


#: Voxels that a thread works on at a time, and lines that are filtered together.
_BLOCK = 1 << 22


_LINES = 512


#: What the kernels read as it is; other dtypes become float32.
_READ = (np.uint8, np.int16, np.uint16, np.float32)


class AxisOperator(NamedTuple):
    """Interpolation along one axis: output o is the sum of weights[o, t] * input[first[o] + t]."""

    first: NDArray[np.int64]  # (outputs,)
    weights: NDArray[np.float32]  # (outputs, taps)
    inside: NDArray[np.float32]  # (outputs,) share of the points that are not outside


class Elsewhere(Protocol):
    """What applies an operator to each axis in the place of this process's loops."""

    def __call__(
        self, data: NDArray, operators: Sequence[AxisOperator], *, order: int, outside: float
    ) -> NDArray[np.float32] | None:
        """`data` (A, B, C) on the grid of the operators, for order 3 applied to its spline
        coefficients; points outside of it are `outside`. None: not possible there.
        """


_ELSEWHERE: ContextVar[Elsewhere | None] = ContextVar("_ELSEWHERE", default=None)


@contextmanager
def interpolated(elsewhere: Elsewhere | None) -> Iterator[None]:
    """Within this block linear and cubic interpolation between parallel grids is done elsewhere, as
    on a card; None: here.
    """
    token = _ELSEWHERE.set(elsewhere)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def interpolate(
    data: NDArray,
    step: NDArray[np.float64],
    shape: tuple[int, int, int],
    *,
    order: int,
    outside: float | None = 0,
    points: tuple[int, int, int] = (1, 1, 1),
) -> NDArray:
    """`data` (I, J, K) at the places that `step` (4, 4) gives for the indices of an output of
    `shape`.

    order: 0 (nearest; keeps the dtype), 1 (linear) or 3 (cubic B-spline through the samples);
    float32. points: every output is the mean of this many points, spread evenly over its voxel
    along each axis. outside: the value of points outside; None, for parallel grids: that of the
    nearest voxel. The output lies in memory as the input does: what is read quickly from one is
    written quickly to the other.
    """
    if order not in (0, 1, 3):
        raise ValueError(f"order {order} is not 0, 1 or 3")
    axes = _matching_axes(step[:3, :3])
    rest = step[:3, :3].copy()
    rest[range(3), axes] = 0
    if np.abs(rest).max() * max(shape) >= _PARALLEL:
        if outside is None:
            raise ValueError("between grids that are not parallel, points outside need a value")
        if order == 0:
            return _nearest_oblique(data, step, shape, outside=outside)
        return _oblique(data, step, shape=shape, order=order, outside=outside, points=points)
    sources = np.argsort(axes)  # for each output axis, the input axis along which it runs
    scales, offsets = step[sources, range(3)], step[sources, 3]
    data = data.transpose(sources)
    if order == 0:
        return _nearest(data, scales, offsets, shape, outside)
    return _separable(
        data, scales, offsets=offsets, shape=shape, order=order, outside=outside, points=points
    )


def _matching_axes(matrix: NDArray[np.float64]) -> tuple[int, ...]:
    """For each input axis, the output axis that runs along it most closely, each used once."""
    size = np.abs(matrix)
    return max(permutations(range(3)), key=lambda order: float(size[range(3), order].sum()))


def _separable(
    data: NDArray,
    scales: NDArray,
    offsets: NDArray,
    shape: tuple[int, int, int],
    order: int,
    outside: float | None,
    points: tuple[int, int, int],
) -> NDArray[np.float32]:
    """Linear or cubic; output o along axis n looks at place scales[n] * o + offsets[n] of axis n of
    `data`.
    """
    edge = outside is None
    operators = [
        axis_operator(
            data.shape[n],
            shape[n],
            scale=scales[n],
            offset=offsets[n],
            order=order,
            points=points[n],
            edge=edge,
        )
        for n in range(3)
    ]
    # The axis that is contiguous comes last.
    memory = sorted(range(3), key=lambda n: -abs(data.strides[n]))
    data = data.transpose(memory)
    a, b, c = (operators[n] for n in memory)
    first = tuple(int(operator.first.min()) for operator in (a, b, c))
    last = tuple(int(operator.first.max()) + operator.weights.shape[1] for operator in (a, b, c))
    if order == 3:
        first = (0, 0, 0)
    else:  # what no output looks at is not read
        data = data[tuple(slice(low, high) for low, high in zip(first, last))]
    a, b, c = (
        operator._replace(first=operator.first - low) for operator, low in zip((a, b, c), first)
    )
    elsewhere = _ELSEWHERE.get()
    out = None
    if elsewhere is not None:
        out = elsewhere(data, (a, b, c), order=order, outside=outside or 0.0)
    if out is None:
        out = _applied(data, a, b, c, order=order, outside=outside)
    return out.transpose(np.argsort(memory))


def _applied(
    data: NDArray,
    a: AxisOperator,
    b: AxisOperator,
    c: AxisOperator,
    *,
    order: int,
    outside: float | None,
) -> NDArray[np.float32]:
    """An operator for each axis of `data` (A, B, C), a few planes at a time."""
    data = spline_coefficients(data) if order == 3 else data
    out = np.empty((len(a.first), len(b.first), len(c.first)), np.float32)
    taps = a.weights.shape[1]

    def work(start: int, stop: int) -> None:
        low, high = int(a.first[start:stop].min()), int(a.first[start:stop].max()) + taps
        block = np.ascontiguousarray(data[low:high], np.float32)
        apply_operators(
            block, a.first[start:stop] - low, a.weights[start:stop], *b[:2], *c[:2], out[start:stop]
        )
        if outside:
            coverage = a.inside[start:stop, None, None] * b.inside[:, None] * c.inside
            out[start:stop] += np.float32(outside) * (1 - coverage)

    ratio = max(1.0, len(data) / len(out))
    in_slabs(work, len(out), _slabs_per_thread(len(out) * ratio * data[0].size, len(out)))
    return out


def _slabs_per_thread(voxels: float, length: int) -> int:
    return int(min(max(4, voxels / _BLOCK / threads()), max(1, length // threads())))


def axis_operator(
    size: int,
    outputs: int,
    scale: float,
    offset: float,
    order: int,
    points: int = 1,
    *,
    edge: bool = False,
) -> AxisOperator:
    """Linear (order 1) or cubic (order 3, on spline coefficients) interpolation of `size` voxels
    along one axis.

    Output o is the mean over `points` points around scale * o + offset; those outside count as 0,
    or with `edge` as the nearest voxel.
    """
    spread = (np.arange(points) + 0.5) / points - 0.5
    at = scale * (np.arange(outputs)[:, None] + spread) + offset  # (outputs, points)
    inside = edge | (at >= -ROUNDING) & (at <= size - 1 + ROUNDING)
    at = np.clip(at, 0, size - 1)
    base = np.floor(at).astype(np.int64)
    t = (at - base)[..., None]
    if order == 1:
        places, weights = base[..., None] + (0, 1), np.concatenate((1 - t, t), -1)
    else:
        places = base[..., None] + (-1, 0, 1, 2)
        weights = np.concatenate(
            (
                (1 - t) ** 3 / 6,
                2 / 3 - t**2 + t**3 / 2,
                2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2,
                t**3 / 6,
            ),
            -1,
        )
    period = max(1, 2 * size - 2)
    places = np.abs(places) % period
    places = np.where(places >= size, period - places, places)  # mirrored at the outermost centres
    weights = np.where(inside[..., None], weights, 0) / points
    nonzero = weights != 0
    # An output that is outside looks where its neighbours do.
    looked_at = nonzero | ~nonzero.any((1, 2), keepdims=True)
    lowest = np.where(looked_at, places, size - 1).min((1, 2))
    highest = np.where(looked_at, places, 0).max((1, 2))
    taps = int((highest - lowest).max()) + 1
    first = np.clip(lowest, 0, size - taps)
    dense = np.zeros((outputs, taps))
    row = np.broadcast_to(np.arange(outputs)[:, None, None], places.shape)
    np.add.at(dense, (row[nonzero], (places - first[:, None, None])[nonzero]), weights[nonzero])
    return AxisOperator(first, dense.astype(np.float32), inside.mean(1).astype(np.float32))


def spline_coefficients(data: NDArray) -> NDArray[np.float32]:
    """Coefficients of the cubic B-spline through `data` (A, B, C), mirrored at its ends;
    C-contiguous float32.
    """
    depth, height, width = data.shape
    out: NDArray[np.float32] = np.empty((depth, height, width), np.float32)

    def planes(start: int, stop: int) -> None:
        for n in range(start, stop):
            out[n] = data[n]
            if height > 1:
                filter_columns(out[n], 0, width)
            if width > 1:
                filter_rows(out[n])

    in_slabs(planes, depth)
    if depth > 1:
        columns = out.reshape(depth, height * width)

        def along_first(start: int, stop: int) -> None:
            for n in range(start, stop):
                filter_columns(columns, n * _LINES, min((n + 1) * _LINES, height * width))

        in_slabs(along_first, -(-height * width // _LINES))
    return out


def _oblique(
    data: NDArray,
    step: NDArray[np.float64],
    shape: tuple[int, int, int],
    order: int,
    outside: float,
    points: tuple[int, int, int],
) -> NDArray[np.float32]:
    memory = sorted(range(3), key=lambda n: -abs(data.strides[n]))
    data = data.transpose(memory)
    rows = step[:3][memory].copy()
    for axis in range(3):  # the kernels read memory forwards
        if data.strides[axis] < 0:
            data = np.flip(data, axis)
            rows[axis] *= -1
            rows[axis, 3] += data.shape[axis] - 1
    axes = list(_matching_axes(rows[:, :3]))
    rows = np.ascontiguousarray(rows[:, [*axes, 3]])
    count = np.array([points[axis] for axis in axes])
    out = np.empty([shape[axis] for axis in axes], np.float32)
    if order == 3:
        data, kernel = spline_coefficients(data), cubic_points
    else:
        data, kernel = (
            np.ascontiguousarray(data, data.dtype if data.dtype in _READ else np.float32),
            linear_points,
        )
    in_slabs(
        lambda start, stop: kernel(data, rows, count, np.float32(outside), start, stop, out),
        len(out),
    )
    return out.transpose(np.argsort(axes))


def _nearest(
    data: NDArray,
    scales: NDArray,
    offsets: NDArray,
    shape: tuple[int, int, int],
    outside: float | None,
) -> NDArray:
    """The voxels of `data`, whose axes are those of the output, at places scales[n] * o +
    offsets[n].
    """
    places = [scale * np.arange(n) + offset for scale, offset, n in zip(scales, offsets, shape)]
    edge = outside is None
    inside = [
        edge | (at >= -ROUNDING) & (at <= n - 1 + ROUNDING) for at, n in zip(places, data.shape)
    ]
    voxels = [
        np.clip(np.floor(at[within] + 0.5).astype(np.intp), 0, n - 1)
        for at, within, n in zip(places, inside, data.shape)
    ]
    out = np.full(shape, outside or 0, data.dtype)
    rows, columns = np.ix_(*inside[1:])
    planes = np.flatnonzero(inside[0])

    def work(start: int, stop: int) -> None:
        for n in range(start, stop):
            out[planes[n]][rows, columns] = data[voxels[0][n]][np.ix_(*voxels[1:])]

    in_slabs(work, len(planes))
    return out


def _nearest_oblique(
    data: NDArray, step: NDArray[np.float64], shape: tuple[int, int, int], outside: float
) -> NDArray:
    out = np.full(shape, outside, data.dtype)
    j, k = np.arange(shape[1])[:, None], np.arange(shape[2])

    def work(start: int, stop: int) -> None:
        for i in range(start, stop):
            at = [row[0] * i + row[1] * j + row[2] * k + row[3] for row in step[:3]]
            inside = np.logical_and.reduce(
                [(x >= -ROUNDING) & (x <= n - 1 + ROUNDING) for x, n in zip(at, data.shape)]
            )
            if inside.any():
                voxels = [
                    np.clip(np.floor(x[inside] + 0.5).astype(np.intp), 0, n - 1)
                    for x, n in zip(at, data.shape)
                ]
                out[i][inside] = data[tuple(voxels)]

    in_slabs(work, shape[0])
    return out
