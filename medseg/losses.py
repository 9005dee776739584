"""Losses on logits (B, K, ...) and integer labels (B, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _DiceCrossEntropy(torch.autograd.Function):
    """Both losses and their gradient from one softmax: a third of the memory traffic of composing them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smooth: float) -> Tensor:
        b, k = logits.shape[:2]
        target = labels.reshape(b, 1, -1)
        log_p = logits.reshape(b, k, -1).float().log_softmax(1)
        cross_entropy = -log_p.gather(1, target).mean()
        p = log_p.exp_()
        hit = p.gather(1, target)[:, 0]  # (B, V): probability given to the right class
        zeros = torch.zeros(b, k, device=p.device)
        truth = zeros.scatter_add(1, target[:, 0], torch.ones_like(hit))
        overlap = zeros.scatter_add(1, target[:, 0], hit)
        total = p.sum(2) + truth + smooth
        ctx.save_for_backward(p, target, overlap, total)
        ctx.like, ctx.smooth = logits, smooth
        return cross_entropy + 1 - ((2 * overlap + smooth) / total).mean()

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, None, None]:
        p, target, overlap, total = ctx.saved_tensors
        b, k, v = p.shape
        # d(loss)/dp is `everywhere` for each class, plus `at_truth` where the class is the true one.
        everywhere = ((2 * overlap + ctx.smooth) / total**2 / (b * k))[..., None]
        at_truth = (-2 / total / (b * k)).gather(1, target[:, 0])[:, None] * p.gather(1, target)
        mean = (p * everywhere).sum(1, keepdim=True) + at_truth
        grad = p.mul_(everywhere - mean + 1 / (b * v))
        grad.scatter_add_(1, target, at_truth - 1 / (b * v))
        return (grad * grad_output[0]).to(ctx.like.dtype).reshape(ctx.like.shape), None, None


def dice_cross_entropy(logits: Tensor, labels: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice (Milletari et al. 2016, over all classes and samples) plus cross-entropy, a scalar.

    logits (B, K, ...), labels (B, ...) int64 in 0..K-1. `smooth` in voxels keeps absent classes from dominating.
    """
    loss: Tensor = _DiceCrossEntropy.apply(logits, labels, smooth)
    return loss


def deep_supervision(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """`dice_cross_entropy` of every output, each half the size of the one before, weighted 1, 1/2, 1/4 ... and summed.

    labels (B, D, H, W) at the finest size; coarser ones are taken at every second voxel (Lee et al. 2015).
    """
    if isinstance(outputs, Tensor):
        return dice_cross_entropy(outputs, labels)
    weights = [0.5**n for n in range(len(outputs))]
    loss = torch.zeros((), device=labels.device)
    for weight, logits in zip(weights, outputs, strict=True):
        step = [full // size for full, size in zip(labels.shape[1:], logits.shape[2:], strict=True)]
        coarse = labels[:, :: step[0], :: step[1], :: step[2]]
        loss = loss + weight / sum(weights) * dice_cross_entropy(logits, coarse)
    return loss
