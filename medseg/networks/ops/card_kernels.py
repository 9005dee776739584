"""Instance norm and leaky ReLU on a card, in Triton's language (Tillet et al. 2019).

Maps lie as (B, V, C): channels innermost, V voxels a sample. A program takes some channels of a run
of voxels. Sums are made in float32, of runs first and then of those, always in the same order.
Imported where used: Triton comes with PyTorch for CUDA alone.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    x, means, spreads, voxels, channels, run, RUNS: tl.constexpr, VOXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """means, spreads (B, RUNS, C): of each run of voxels the mean, and the sum of squares about
    it.
    """
    sample, part = (tl.program_id(0) // RUNS).to(tl.int64), tl.program_id(0) % RUNS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_there = channel < channels
    first, past = part * run, tl.minimum(part * run + run, voxels)
    mean = tl.zeros((CHANNELS,), tl.float32)
    spread = tl.zeros((CHANNELS,), tl.float32)
    for begin in range(first, past, VOXELS):
        voxel = begin + tl.arange(0, VOXELS)
        at = (sample * voxels + voxel)[:, None] * channels + channel[None, :]
        counts = (voxel < past)[:, None] & is_there[None, :]
        value = tl.load(x + at, mask=counts, other=0.0).to(tl.float32)
        count = tl.minimum(past - begin, VOXELS).to(tl.float32)
        own = tl.sum(value, axis=0) / count
        about = tl.where(counts, value - own[None, :], 0.0)
        # Chan, Golub and LeVeque 1983: moments of two sets make those of both.
        before = (begin - first).to(tl.float32)
        apart = own - mean
        mean += apart * (count / (before + count))
        spread += tl.sum(about * about, axis=0) + apart * apart * (
            before * count / (before + count)
        )
    to = (sample * RUNS + part) * channels + channel
    tl.store(means + to, mean, mask=is_there)
    tl.store(spreads + to, spread, mask=is_there)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    x, y, scale, shift, slope, voxels, channels, VOXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """y = leaky_relu(x * scale + shift); scale, shift (B, C)."""
    sample = tl.program_id(2).to(tl.int64)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = (sample * voxels + voxel)[:, None] * channels + channel[None, :]
    is_there = (voxel < voxels)[:, None] & (channel < channels)[None, :]
    row = sample * channels + channel
    a = tl.load(scale + row, mask=channel < channels, other=0.0)
    b = tl.load(shift + row, mask=channel < channels, other=0.0)
    value = tl.load(x + at, mask=is_there, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=is_there)


@triton.jit
def _measure_slopes(  # type: ignore[no-untyped-def]
    x, grad, mean, scale, shift, totals, moments, slope, voxels, channels, run,
    RUNS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """totals, moments (B, RUNS, C): of each run the sums of the gradient before the ReLU, and of
    that times (x - mean).
    """
    sample, part = (tl.program_id(0) // RUNS).to(tl.int64), tl.program_id(0) % RUNS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_there = channel < channels
    row = sample * channels + channel
    centre = tl.load(mean + row, mask=is_there, other=0.0)
    a = tl.load(scale + row, mask=is_there, other=0.0)
    b = tl.load(shift + row, mask=is_there, other=0.0)
    first, past = part * run, tl.minimum(part * run + run, voxels)
    total = tl.zeros((CHANNELS,), tl.float32)
    moment = tl.zeros((CHANNELS,), tl.float32)
    for begin in range(first, past, VOXELS):
        voxel = begin + tl.arange(0, VOXELS)
        at = (sample * voxels + voxel)[:, None] * channels + channel[None, :]
        counts = (voxel < past)[:, None] & is_there[None, :]
        value = tl.load(x + at, mask=counts, other=0.0).to(tl.float32)
        down = tl.load(grad + at, mask=counts, other=0.0).to(tl.float32)
        down = tl.where(value * a[None, :] + b[None, :] > 0, down, down * slope)
        total += tl.sum(down, axis=0)
        moment += tl.sum(down * tl.where(counts, value - centre[None, :], 0.0), axis=0)
    to = (sample * RUNS + part) * channels + channel
    tl.store(totals + to, total, mask=is_there)
    tl.store(moments + to, moment, mask=is_there)


@triton.jit
def _settle_slopes(  # type: ignore[no-untyped-def]
    x, grad, out, scale, shift, per_voxel, constant, slope, voxels, channels,
    VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = scale * (gradient before the ReLU) + per_voxel * x + constant; each (B, C)."""
    sample = tl.program_id(2).to(tl.int64)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = (sample * voxels + voxel)[:, None] * channels + channel[None, :]
    is_there = (voxel < voxels)[:, None] & (channel < channels)[None, :]
    row = sample * channels + channel
    a = tl.load(scale + row, mask=channel < channels, other=0.0)[None, :]
    b = tl.load(shift + row, mask=channel < channels, other=0.0)[None, :]
    p = tl.load(per_voxel + row, mask=channel < channels, other=0.0)[None, :]
    c = tl.load(constant + row, mask=channel < channels, other=0.0)[None, :]
    value = tl.load(x + at, mask=is_there, other=0.0).to(tl.float32)
    down = tl.load(grad + at, mask=is_there, other=0.0).to(tl.float32)
    down = tl.where(value * a + b > 0, down, down * slope)
    tl.store(out + at, (a * down + p * value + c).to(out.dtype.element_ty), mask=is_there)


#: Voxels and channels that a program takes at a time.
Sizes = tuple[int, int]


def measure(
    x: Tensor,
    means: Tensor,
    spreads: Tensor,
    *,
    voxels: int,
    channels: int,
    run: int,
    sizes: Sizes,
) -> None:
    """Launch `_measure` on a map of so many voxels and channels, in runs of `run` voxels."""
    batch, runs = means.shape[:2]
    grid = (batch * runs, triton.cdiv(channels, sizes[1]))
    _measure[grid](
        x, means, spreads, voxels, channels, run, RUNS=runs, VOXELS=sizes[0], CHANNELS=sizes[1]
    )


def settle(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: float,
    *,
    voxels: int,
    channels: int,
    sizes: Sizes,
) -> None:
    """Launch `_settle`."""
    grid = (triton.cdiv(voxels, sizes[0]), triton.cdiv(channels, sizes[1]), len(scale))
    _settle[grid](x, y, scale, shift, slope, voxels, channels, VOXELS=sizes[0], CHANNELS=sizes[1])


def measure_slopes(
    x: Tensor,
    grad: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    totals: Tensor,
    moments: Tensor,
    slope: float,
    *,
    voxels: int,
    channels: int,
    run: int,
    sizes: Sizes,
) -> None:
    """Launch `_measure_slopes`."""
    batch, runs = totals.shape[:2]
    grid = (batch * runs, triton.cdiv(channels, sizes[1]))
    _measure_slopes[grid](
        x, grad, mean, scale, shift, totals, moments, slope, voxels, channels, run, RUNS=runs,
        VOXELS=sizes[0], CHANNELS=sizes[1],
    )  # fmt: skip


def settle_slopes(
    x: Tensor,
    grad: Tensor,
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_voxel: Tensor,
    constant: Tensor,
    slope: float,
    *,
    voxels: int,
    channels: int,
    sizes: Sizes,
) -> None:
    """Launch `_settle_slopes`."""
    grid = (triton.cdiv(voxels, sizes[0]), triton.cdiv(channels, sizes[1]), len(scale))
    _settle_slopes[grid](
        x, grad, out, scale, shift, per_voxel, constant, slope, voxels, channels,
        VOXELS=sizes[0], CHANNELS=sizes[1],
    )  # fmt: skip
