"""Logits of the voxels of cells to which each voxel's own number is added, times a slope of its
cell for each class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.kernels.threads import in_slabs
from medseg.networks.ops.loss import flat


def add_slopes(logits: Tensor, slopes: Tensor, own: Tensor) -> Tensor:
    """logits (B, K · V, D, H, W), V of the first class first, plus slopes (B, K, D, H, W) times own
    (B, V, D, H, W).

    On a CPU with channels innermost it is done in place.
    """
    if can_fuse_slopes(logits, own):
        result: Tensor = _AddSlopes.apply(logits, slopes, own)
        return result
    b, k, *sizes = slopes.shape
    return logits + (slopes[:, :, None] * own[:, None]).to(logits.dtype).reshape(
        b, k * own.shape[1], *sizes
    )


def can_fuse_slopes(logits: Tensor, own: Tensor) -> bool:
    """Whether the compiled loops take them."""
    return (
        type(logits) is Tensor
        and logits.device.type == "cpu"
        and not torch.jit.is_tracing()
        and logits.dtype in (torch.bfloat16, torch.float32)
        and own.shape[1] == 8
        and _innermost(logits).is_contiguous()
    )


def _innermost(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)


def _rows(x: Tensor) -> np.ndarray:
    """(cells, channels) float32."""
    rows: np.ndarray = _innermost(x.detach()).float().contiguous().flatten(0, 3).numpy()
    return rows


def _on_all_threads(work: Callable[[int, int], None], cells: int) -> None:
    in_slabs(work, cells, workers=torch.get_num_threads())


class _AddSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, slopes: Tensor, own: Tensor) -> Tensor:
        from medseg.kernels import slopes as slope_kernels

        ctx.mark_dirty(logits)
        ctx.save_for_backward(own)
        ctx.like = slopes.dtype
        numbers, a, x = flat(_innermost(logits)), _rows(slopes), _rows(own)
        shift = np.uint32(16 if logits.dtype == torch.bfloat16 else 0)

        def add(low: int, high: int) -> None:
            slope_kernels.add_slopes(low, high, numbers=numbers, shift=shift, slopes=a, own=x)

        _on_all_threads(add, len(a))
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from medseg.kernels import slopes as slope_kernels

        (own,) = ctx.saved_tensors
        inner = _innermost(grads[0]).contiguous()
        numbers, x = flat(inner), _rows(own)
        shift = np.uint32(16 if inner.dtype == torch.bfloat16 else 0)
        out = np.empty((len(x), inner.shape[-1] // 8), np.float32)

        def sum_up(low: int, high: int) -> None:
            slope_kernels.sum_over_voxels(low, high, numbers=numbers, shift=shift, own=x, out=out)

        _on_all_threads(sum_up, len(x))
        slope = torch.from_numpy(out).view(*inner.shape[:4], -1).permute(0, 4, 1, 2, 3)
        return grads[0], slope.to(ctx.like), None
