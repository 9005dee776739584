"""The compiled loops around residual blocks of channels-last float32 maps: the last norms, the sum
and the activation in one pass, and 1x1x1 convolutions of joined maps, which may be overwritten.

Maps are flat arrays (batch, voxels, channels), channels in blocks of 16. Each call takes a run of
voxels, counted through all samples, so that callers can share a map out over threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from medseg.kernels.compiled import njit
from medseg.kernels.vectors import LANES, VECTOR, Lanes, Memory, broadcast, emitted, loop
from medseg.kernels.winograd import ROWS

#: Voxels that are gone through for one block of channels: few enough to stay in the nearest cache.
_NEAR = 64
#: Voxels of a 1x1x1 convolution that are finished before they are written.
POINT_VOXELS = 4 * ROWS[0]


@emitted
def _add(
    builder: Any, y: Memory, column: Any, count: Any, scale: Memory, shift: Memory, other: Memory,
    factor: Memory,
    slope: Any
) -> None:  # fmt: skip
    """16 channels of y · scale + other · factor + shift, activated, in the place of y."""
    rate, offset, weight = scale.load(), shift.load(), factor.load()
    leak = broadcast(builder, slope)
    with loop(builder, count) as n:
        at = builder.mul(n.index, column)
        total = offset.plus(rate, y.load(at)).plus(weight, other.load(at))
        y.store(total.activated(leak), at)


@emitted
def _add_few(
    builder: Any, y: Memory, column: Any, count: Any, scale: Memory, shift: Memory, few: Memory,
    channels: Any,
    weights: Memory,
    slope: Any
) -> None:  # fmt: skip
    """The same with a 1x1x1 convolution of a few channels, whose weights are `column` apart."""
    rate, offset, leak = scale.load(), shift.load(), broadcast(builder, slope)
    place = cgutils.alloca_once(builder, VECTOR)
    with loop(builder, count) as n:
        at, here = builder.mul(n.index, column), builder.mul(n.index, channels)
        builder.store(offset.plus(rate, y.load(at)).value, place)
        with loop(builder, channels) as c:
            weight = weights.load(builder.mul(c.index, column))
            voxel = few.at(here).at(c.index).broadcast()
            builder.store(Lanes(builder, builder.load(place)).plus(voxel, weight).value, place)
        y.store(Lanes(builder, builder.load(place)).activated(leak), at)


def _multiply(rows: int) -> Any:
    """Rows of channels, `step` numbers apart, times weights (channels, 16), added to rows `column`
    apart; every sum in a register.
    """

    def multiply(
        builder: Any, x: Memory, step: Any, channels: Any, weights: Memory, y: Memory, column: Any
    ) -> None:
        sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(rows)]
        places = [builder.mul(step, ir.Constant(step.type, r)) for r in range(rows)]
        for r, total in enumerate(sums):
            builder.store(y.at(column, r).load().value, total)
        with loop(builder, channels) as k:
            line = weights.load(builder.mul(k.index, ir.Constant(k.index.type, LANES)))
            for place, total in zip(places, sums):
                voxel = x.at(k.index).at(place).broadcast()
                value = Lanes(builder, builder.load(total)).plus(voxel, line).value
                builder.store(value, total)
        for r, total in enumerate(sums):
            y.at(column, r).store(Lanes(builder, builder.load(total)))

    return emitted(multiply)


_multiply_rows, _multiply_row = _multiply(ROWS[0]), _multiply(1)


@njit(nogil=True, cache=True)
def add_voxels(y, first, count, blocks, scale, shift, other, factor, sample, slope):  # type: ignore[no-untyped-def]
    """`count` voxels of y from `first` on: y · scale + other · factor + shift, then leaky ReLU."""
    for start in range(first, first + count, _NEAR):
        near = min(_NEAR, first + count - start)
        for block in range(blocks):
            at, of = (start * blocks + block) * LANES, (sample * blocks + block) * LANES
            _add(y, at, blocks * LANES, near, scale, of, shift, of, other, at, factor, of, slope)


@njit(nogil=True, cache=True)
def add_few(y, first, count, blocks, scale, shift, few, channels, weights, sample, slope):  # type: ignore[no-untyped-def]
    """`count` voxels of y from `first` on: y · scale + (weights · few) + shift, then leaky ReLU.

    few: a map of `channels`; weights (batch, channels, 16 · blocks).
    """
    for start in range(first, first + count, _NEAR):
        near = min(_NEAR, first + count - start)
        for block in range(blocks):
            at, of = (start * blocks + block) * LANES, (sample * blocks + block) * LANES
            _add_few(
                y, at, blocks * LANES, near, scale, of, shift, of, few, start * channels, channels,
                weights, (sample * channels * blocks + block) * LANES, slope,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _accumulate(x, at, channels, count, weights, row, outputs, blocks, inputs, rows):  # type: ignore[no-untyped-def]
    """Rows of one source times its share of the weights, added to `rows`."""
    whole = count // ROWS[0] * ROWS[0]
    for block in range(blocks):
        part = (block * inputs + row) * LANES
        for n in range(0, whole, ROWS[0]):
            _multiply_rows(
                x, at + n * channels, channels, channels, weights, part,
                rows, n * outputs + block * LANES, outputs,
            )  # fmt: skip
        for n in range(whole, count):
            _multiply_row(
                x, at + n * channels, channels, channels, weights, part,
                rows, n * outputs + block * LANES, outputs,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def point_voxels(one, two, first, count, weights, bias, y, rows):  # type: ignore[no-untyped-def]
    """`count` voxels from `first` on of the 1x1x1 convolution of two maps (map, channels), joined.

    y may be one of them. weights are packed by `pack_points`; rows: POINT_VOXELS voxels of y.
    """
    outputs, inputs = bias.size, one[1] + two[1]
    blocks = outputs // LANES
    for start in range(first, first + count, POINT_VOXELS):
        some = min(POINT_VOXELS, first + count - start)
        for n in range(some):
            rows[n * outputs : (n + 1) * outputs] = bias
        _accumulate(one[0], start * one[1], one[1], some, weights, 0, outputs, blocks, inputs, rows)
        _accumulate(
            two[0], start * two[1], two[1], some, weights, one[1], outputs, blocks, inputs, rows
        )
        y[start * outputs : (start + some) * outputs] = rows[: some * outputs]


def pack_points(weight: Any) -> Any:
    """Weights (outputs, inputs) as `point_voxels` reads them: (blocks of outputs, inputs, 16)."""
    return weight.reshape(-1, LANES, weight.shape[1]).transpose(0, 2, 1).ravel()
