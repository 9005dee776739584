"""Dice and cross-entropy of channels-last logits on a CPU, with their gradient, in one pass each.

PyTorch's own operations go through the logits some fifteen times in float32. Here they are read
twice, in their own type, and the gradient is written once; cells that stand for 2x2x2 voxels are
taken as the network's head gives them. Results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.kernels.threads import in_parallel

#: Numbers of the logits that are one unit of work.
_UNIT = 2**19


def can_fuse_loss(logits: Tensor) -> bool:
    """Whether the functions here take the logits: (B, K, D, H, W) on a CPU with classes innermost,
    or folded cells.

    Folded cells are (B, K, d, s, h, s, w, s), whose classes and voxels of a cell are innermost.
    """
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.bfloat16, torch.float32)
        and logits.ndim in (5, 8)
        and logits.shape[1] > 1
        and _innermost(logits).is_contiguous()
        and (logits.ndim == 5 or logits.shape[3] == logits.shape[5] == logits.shape[7] == 2)
    )


def _innermost(logits: Tensor) -> Tensor:
    """(B, d, h, w, K) or (B, d, h, w, K, s, s, s)."""
    return (
        logits.permute(0, 2, 3, 4, 1)
        if logits.ndim == 5
        else logits.permute(0, 2, 4, 6, 1, 3, 5, 7)
    )


def flat(inner: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor of bfloat16 or float32 as unsigned integers."""
    bits = inner.detach().view(torch.uint16 if inner.dtype == torch.bfloat16 else torch.uint32)
    array: np.ndarray = bits.view(-1).numpy()
    return array


class _Work:
    """The arguments that the compiled loops share, and the units of work."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        inner = _innermost(logits.detach())
        self.batch, self.classes = logits.shape[:2]
        self.size = tuple(inner.shape[1:4])
        self.fold = 1 if logits.ndim == 5 else 2
        self.shift = np.uint32(16 if logits.dtype == torch.bfloat16 else 0)
        self.numbers = flat(inner)
        self.labels = labels.contiguous().numpy().ravel()
        if self.labels.max() >= self.classes:  # compiled loops do not look where they write
            raise ValueError(f"a label of {self.labels.max()} is none of {self.classes} classes")
        lines = self.size[0] * self.size[1]
        step = max(1, _UNIT // (self.size[2] * self.classes * self.fold**3))
        self.units = [
            (sample, line, min(step, lines - line))
            for sample in range(self.batch)
            for line in range(0, lines, step)
        ]

    def each(self, function: Callable[..., None], of_unit: Callable[[int], dict[str, Any]]) -> None:
        """Runs a compiled loop over all units on all threads; `of_unit` gives it its further
        arguments, by name.
        """

        def work(n: int) -> None:
            sample, row, rows = self.units[n]
            function(
                self.numbers,
                shift=self.shift,
                classes=self.classes,
                size=self.size,
                fold=self.fold,
                sample=sample,
                row=row,
                rows=rows,
                labels=self.labels,
                **of_unit(n),
            )

        in_parallel(work, len(self.units), torch.get_num_threads())

    def per_sample(self, values: np.ndarray) -> np.ndarray:
        """Sums of units (U, ...) to sums of samples (B, ...)."""
        sums: np.ndarray = values.reshape(self.batch, -1, values.shape[-1]).sum(1)
        return sums


class _DiceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smooth: float) -> Tensor:
        from medseg.kernels.losses import sum_loss

        work = _Work(logits, labels)
        values = np.empty((len(work.units), 3 * work.classes + 1))
        work.each(sum_loss, lambda n: {"sums": values[n]})
        sums = work.per_sample(values)
        probability, hit, truth = sums[:, :-1].reshape(work.batch, 3, -1).transpose(1, 0, 2)
        voxels = max(1.0, truth.sum())
        overlap, total = 2 * hit + smooth, probability + truth + smooth
        ctx.save_for_backward(logits, labels)
        ctx.numbers = overlap, total, voxels
        return torch.tensor(
            sums[:, -1].sum() / voxels + 1 - (overlap / total).mean(), dtype=torch.float32
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from medseg.kernels.losses import slope_of_loss

        logits, labels = ctx.saved_tensors
        overlap, total, voxels = ctx.numbers
        work = _Work(logits, labels)
        # d(loss)/dp is `everywhere` for each class, plus `at_truth` where the class is the true
        # one.
        everywhere = (overlap / total**2 / total.size).astype(np.float32)
        at_truth = (-2 / total / total.size).astype(np.float32)
        out = torch.empty_like(logits)
        further = {
            "everywhere": everywhere,
            "at_truth": at_truth,
            "share": np.float32(1 / voxels),
            "factor": np.float32(grads[0]),
            "out": flat(_innermost(out)),
        }
        work.each(slope_of_loss, lambda n: further)
        return out, None, None


def dice_cross_entropy(logits: Tensor, labels: Tensor, smooth: float) -> Tensor:
    """`losses.dice_cross_entropy` of logits for which `can_fuse_loss` holds; negative labels do not
    count.
    """
    loss: Tensor = _DiceCrossEntropy.apply(logits, labels, smooth)
    return loss


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many voxels of each class were found, are in the labels (>= 0), and both: (K,) int64
    each.

    Found is the first of the largest logits.
    """
    from medseg.kernels.losses import count_hits

    work = _Work(logits, labels)
    values = np.empty((len(work.units), 3 * work.classes), np.int64)
    work.each(count_hits, lambda n: {"counts": values[n]})
    prediction, truth, both = torch.from_numpy(values.sum(0)).view(3, -1)
    return prediction, truth, both
