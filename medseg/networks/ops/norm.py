"""Instance norm and (leaky) ReLU as one step on channels-last maps on a CPU, with its gradient,
float32 or bfloat16.

PyTorch's own need several passes over a map and are slow where channels lie last; its convolutions
in bfloat16 want them there. Results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.kernels.threads import in_parallel

#: Channels come in blocks of this many.
LANES = 16


#: Numbers of a map that are one unit of work.
_UNIT = 2**19


def can_fuse(x: Tensor, norm: nn.Module) -> bool:
    """Whether `norm_activate` takes the map x, which must be on a CPU with channels last, and the
    norm after it.
    """
    return (
        isinstance(norm, nn.GroupNorm)
        and norm.num_groups == norm.num_channels
        and norm.weight is not None
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.shape[1] % LANES == 0
        and x.ndim == 5
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not x.is_contiguous()
    )


class _NormActivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        mean, variance = moments(x)
        rate = 1 / np.sqrt(variance + eps)
        scale = (rate * weight.detach().numpy()).astype(np.float32)
        shift = (bias.detach().numpy() - mean * scale).astype(np.float32)
        out = torch.empty_like(x)
        settle(x, scale.ravel(), shift.ravel(), slope=slope, out=out)
        ctx.save_for_backward(x)
        ctx.numbers = mean, rate, scale, shift, slope
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from medseg.kernels.norms import measure_slopes, settle_slopes

        (x,) = ctx.saved_tensors
        mean, rate, scale, shift, slope = ctx.numbers
        grad = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
        batch, channels = x.shape[:2]
        voxels = x[0, 0].numel()
        blocks = channels // LANES
        source, down, units = numbers(x), numbers(grad), pieces(x)
        centre = mean.astype(np.float32).ravel()
        about = {"blocks": channels // LANES, "slope": slope}
        about |= {"scale": scale.ravel(), "shift": shift.ravel()}
        sums = np.empty((len(units), blocks * 2 * LANES))

        def measure(n: int) -> None:
            sample, first, count = units[n]
            measure_slopes(
                source,
                down,
                first=first,
                count=count,
                sample=sample,
                centre=centre,
                sums=sums[n],
                **about,
            )

        in_parallel(measure, len(units), torch.get_num_threads())
        per_sample = sums.reshape(batch, -1, blocks, 2, LANES).sum(1)
        total = per_sample[:, :, 0].reshape(batch, -1)
        moment = per_sample[:, :, 1].reshape(batch, -1)
        per_voxel = -scale * rate**2 * moment / voxels
        constant = (-scale * total / voxels - per_voxel * mean).astype(np.float32).ravel()
        per_voxel = per_voxel.astype(np.float32).ravel()
        out = torch.empty_like(x)
        target = numbers(out)

        def work(n: int) -> None:
            sample, first, count = units[n]
            settle_slopes(
                source,
                down,
                first=first,
                count=count,
                sample=sample,
                per_voxel=per_voxel,
                constant=constant,
                out=target,
                **about,
            )

        in_parallel(work, len(units), torch.get_num_threads())
        to_weight = torch.from_numpy((moment * rate).sum(0).astype(np.float32))
        to_bias = torch.from_numpy(total.sum(0).astype(np.float32))
        return out, to_weight, to_bias, None, None


def norm_activate(x: Tensor, norm: nn.GroupNorm, slope: float = 1.0) -> Tensor:
    """leaky_relu(norm(x), slope) of a map (B, C, X, Y, Z) for which `can_fuse` holds."""
    y: Tensor = _NormActivate.apply(x, norm.weight, norm.bias, norm.eps, slope)
    return y


def settle(
    x: Tensor, scale: np.ndarray, shift: np.ndarray, slope: float, out: Tensor, channel: int = 0
) -> None:
    """Writes leaky_relu(x · scale + shift, slope) to the channels of `out` from `channel` on; `out`
    may be x.

    x, out: channels-last maps of one type and size; scale, shift (B · C) float32.
    """
    from medseg.kernels.norms import settle_voxels

    source, target, blocks, units = numbers(x), numbers(out), x.shape[1] // LANES, pieces(x)

    def work(n: int) -> None:
        sample, first, count = units[n]
        settle_voxels(
            source,
            first=first,
            count=count,
            blocks=blocks,
            scale=scale,
            shift=shift,
            sample=sample,
            slope=slope,
            y=target,
            to=out.shape[1],
            channel=channel,
        )

    in_parallel(work, len(units), torch.get_num_threads())


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (B, C) float64 of a channels-last map, summed in a fixed order."""
    from medseg.kernels.norms import measure_voxels

    flat, blocks, units = numbers(x), x.shape[1] // LANES, pieces(x)
    values = np.empty((len(units), blocks * 3 * LANES))

    def work(n: int) -> None:
        _, first, count = units[n]
        measure_voxels(flat, first, count, blocks=blocks, moments=values[n])

    in_parallel(work, len(units), torch.get_num_threads())
    return combined(values, np.array([count for _, _, count in units]), x.shape[0])


def combined(values: np.ndarray, counts: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (B, C) of moments (units, blocks · 3 · 16) of `counts` voxels; samples have
    as many units.
    """
    values = values.astype(np.float64, copy=False).reshape(
        batch, counts.size // batch, -1, 3, LANES
    )
    centre, total, squares = values.transpose(3, 0, 1, 2, 4).reshape(3, *values.shape[:2], -1)
    counts = counts.reshape(batch, -1, 1)
    means = centre + total / counts
    mean = (means * counts).sum(1) / counts.sum(1)
    with np.errstate(invalid="ignore"):  # what is not finite comes out so
        spread = squares - total**2 / counts + counts * (means - mean[:, None]) ** 2
    return mean, np.maximum(spread.sum(1) / counts.sum(1), 0)


def numbers(x: Tensor) -> np.ndarray:
    """The memory of a channels-last map, flat; bfloat16 as uint16."""
    flat = x.detach().permute(0, 2, 3, 4, 1).view(-1)
    array: np.ndarray = (
        flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()
    )
    return array


def pieces(x: Tensor) -> list[tuple[int, int, int]]:
    """(sample, first voxel, number of voxels) of the units of a map; voxels count through all
    samples.
    """
    voxels = x[0, 0].numel()
    step = max(1024, _UNIT // x.shape[1])
    return [
        (sample, sample * voxels + first, min(step, voxels - first))
        for sample in range(x.shape[0])
        for first in range(0, voxels, step)
    ]
