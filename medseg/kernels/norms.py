"""The compiled loops of instance norm and (leaky) ReLU on channels-last maps, float32 or bfloat16,
and their gradient.

Maps are flat arrays (batch, voxels, channels), channels in blocks of 16; bfloat16 comes as uint16.
Each call takes a run of voxels of one sample, counted through all samples, so that callers can
share a map out over threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medseg.kernels.compiled import njit
from medseg.kernels.vectors import (
    LANES,
    ZERO,
    Lanes,
    Memory,
    Moments,
    Sum,
    broadcast,
    centre,
    emitted,
    loop,
    settle,
)

#: Voxels that are gone through for one block of channels: few enough to stay in the nearest cache.
_NEAR = 256


@emitted
def _measure(builder: Any, x: Memory, column: Any, count: Any, moments: Memory) -> None:
    """16 channels of `count` voxels into their moments."""
    sums = Moments(builder, moments)
    with loop(builder, count) as n:
        sums.add(x.load(builder.mul(n.index, column)))
    sums.store()


@emitted
def _measure_slope(
    builder: Any, x: Memory, grad: Memory, column: Any, count: Any, scale: Memory, shift: Memory,
    slope: Any,
    centre: Memory, sums: Memory
) -> None:  # fmt: skip
    """Sums (2, 16) of the gradient before the activation, and of that times (x - centre)."""
    factor, offset, leak, middle = (
        scale.load(),
        shift.load(),
        broadcast(builder, slope),
        centre.load(),
    )
    total, moment = Sum(builder, sums), Sum(builder, sums.at(LANES))
    with loop(builder, count) as n:
        at = builder.mul(n.index, column)
        voxel, down = x.load(at), grad.load(at)
        before = _before(builder, offset.plus(factor, voxel), down, leak)
        total.add(before)
        moment.add(before, voxel - middle)
    total.store()
    moment.store()


@emitted
def _settle_slope(
    builder: Any, x: Memory, grad: Memory, column: Any, count: Any, scale: Memory, shift: Memory,
    slope: Any,
    per_voxel: Memory, constant: Memory, out: Memory
) -> None:  # fmt: skip
    """The gradient of x: scale · (gradient before the activation) + per_voxel · x + constant."""
    factor, offset, leak = scale.load(), shift.load(), broadcast(builder, slope)
    rise, rest = per_voxel.load(), constant.load()
    with loop(builder, count) as n:
        at = builder.mul(n.index, column)
        voxel, down = x.load(at), grad.load(at)
        before = _before(builder, offset.plus(factor, voxel), down, leak)
        out.at(at).store(rest.plus(rise, voxel).plus(factor, before))


def _before(builder: Any, y: Any, grad: Any, leak: Any) -> Any:
    """The gradient in front of a leaky ReLU that got y."""
    product = builder.fmul(grad.value, leak.value)
    return Lanes(
        builder, builder.select(builder.fcmp_ordered(">", y.value, ZERO), grad.value, product)
    )


@njit(nogil=True, cache=True)
def measure_voxels(x, first, count, blocks, moments):  # type: ignore[no-untyped-def]
    """Moments (blocks, 3, 16) float64 of `count` voxels of 16 · blocks channels from voxel `first`
    on.
    """
    near = np.empty(3 * LANES, np.float32)
    moments[: blocks * 3 * LANES] = 0
    for block in range(blocks):
        row = block * 3 * LANES
        centre(x, (first * blocks + block) * LANES, near, 0)
        moments[row : row + LANES] = near[:LANES]
        for start in range(first, first + count, _NEAR):
            near[LANES:] = 0
            at = (start * blocks + block) * LANES
            _measure(x, at, blocks * LANES, min(_NEAR, first + count - start), near, 0)
            # Float32 sums are exact enough only of a few hundred numbers.
            for n in range(LANES, 3 * LANES):
                moments[row + n] += near[n]


@njit(nogil=True, cache=True)
def settle_voxels(x, first, count, blocks, scale, shift, sample, slope, y, to, channel):  # type: ignore[no-untyped-def]
    """Normalises and activates `count` voxels of 16 · blocks channels from voxel `first` on.

    They go to the channels from `channel` on of `y`, which has `to` channels and as many voxels.
    """
    for start in range(first, first + count, _NEAR):
        for block in range(blocks):
            at, of = (start * blocks + block) * LANES, (sample * blocks + block) * LANES
            there = start * to + channel + block * LANES
            near = min(_NEAR, first + count - start)
            settle(x, at, blocks * LANES, near, scale, of, shift, of, slope, y, there, to)


@njit(nogil=True, cache=True)
def measure_slopes(x, grad, first, count, blocks, scale, shift, sample, slope, centre, sums):  # type: ignore[no-untyped-def]
    """Sums (blocks, 2, 16) float64 over `count` voxels: the gradient before the activation, and
    that · (x - centre).
    """
    near = np.empty(2 * LANES, np.float32)
    sums[: blocks * 2 * LANES] = 0
    for block in range(blocks):
        of = (sample * blocks + block) * LANES
        for start in range(first, first + count, _NEAR):
            near[:] = 0
            at = (start * blocks + block) * LANES
            _measure_slope(
                x, at, grad, at, blocks * LANES, min(_NEAR, first + count - start), scale, of,
                shift, of, slope,
                centre, of, near, 0,
            )  # fmt: skip
            for n in range(2 * LANES):
                sums[block * 2 * LANES + n] += near[n]


@njit(nogil=True, cache=True)
def settle_slopes(  # type: ignore[no-untyped-def]
    x, grad, first, count, blocks, scale, shift, sample, slope, per_voxel, constant, out
):
    """The gradient of `count` voxels of x from that of the activated map; see `_settle_slope`."""
    for start in range(first, first + count, _NEAR):
        for block in range(blocks):
            at, of = (start * blocks + block) * LANES, (sample * blocks + block) * LANES
            near = min(_NEAR, first + count - start)
            _settle_slope(
                x, at, grad, at, blocks * LANES, near, scale, of, shift, of, slope, per_voxel, of,
                constant, of,
                out, at,
            )  # fmt: skip
