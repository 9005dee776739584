"""Losses on logits (B, K, ...) and integer labels (B, ...); a label of -1 is not to be learnt
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.networks.ops import loss as fused_loss
from medseg.networks.ops.loss import can_fuse_loss, hits

#: Label of voxels that say nothing: an ignore label of the data set.
IGNORE = -1


class _DiceCrossEntropy(torch.autograd.Function):
    """Both losses and their gradient from one softmax: a third of the memory traffic of composing
    them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smooth: float, with_ignored: bool
    ) -> Tensor:
        b, k = logits.shape[:2]
        target = labels.reshape(b, 1, -1)
        log_p = logits.reshape(b, k, -1).float().log_softmax(1)
        counts = torch.ones_like(log_p[:, 0])
        if with_ignored:
            counts = (target[:, 0] != IGNORE).float()
            target = target.clamp(min=0)
        voxels = counts.sum().clamp(min=1)
        cross_entropy = -(log_p.gather(1, target)[:, 0] * counts).sum() / voxels
        p = log_p.exp_()
        hit = p.gather(1, target)[:, 0] * counts  # (B, V): probability given to the right class
        truth, overlap = sums_of_classes(target[:, 0], k, counts, hit)
        total = (p * counts[:, None] if with_ignored else p).sum(2) + truth + smooth
        ctx.save_for_backward(p, target, overlap, total, counts, voxels)
        ctx.like, ctx.smooth, ctx.with_ignored = logits, smooth, with_ignored
        return cross_entropy + 1 - ((2 * overlap + smooth) / total).mean()

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        p, target, overlap, total, counts, voxels = ctx.saved_tensors
        b, k, _ = p.shape
        # d(loss)/dp is `everywhere` for each class, plus `at_truth` where the class is the true
        # one.
        everywhere = ((2 * overlap + ctx.smooth) / total**2 / (b * k))[..., None]
        at_truth = (-2 / total / (b * k)).gather(1, target[:, 0])[:, None] * p.gather(1, target)
        mean = (p * everywhere).sum(1, keepdim=True) + at_truth
        grad = p.mul_(everywhere - mean + 1 / voxels)
        if _scatters(p.device):
            grad.scatter_add_(1, target, at_truth - 1 / voxels)
        else:  # the same sums, which a card makes alike every time
            grad.scatter_(1, target, grad.gather(1, target) + (at_truth - 1 / voxels))
        if ctx.with_ignored:
            grad.mul_(counts[:, None])
        return (grad * grad_output[0]).to(ctx.like.dtype).reshape(ctx.like.shape), None, None, None


def _scatters(device: torch.device) -> bool:
    """Whether sums of classes are made voxel by voxel: on a card thousands of threads would wait
    for the same few places, and add one by one in float32, in another order every time.
    """
    return device.type == "cpu"


def sums_of_classes(target: Tensor, classes: int, *values: Tensor) -> list[Tensor]:
    """Of each values (B, V) the sums (B, K) over the voxels of each class of target (B, V)."""
    if _scatters(target.device):
        zeros = torch.zeros(len(target), classes, device=target.device)
        return [zeros.scatter_add(1, target, one) for one in values]
    target = target.to(torch.int16 if classes < 2**15 else torch.int32)
    rows = []
    for k in range(classes):
        here = target == k
        rows.append([(one * here).sum(1) for one in values])
    return [torch.stack(sums, 1) for sums in zip(*rows)]


def dice_cross_entropy(
    logits: Tensor, labels: Tensor, smooth: float = 1.0, with_ignored: bool = False
) -> Tensor:
    """Soft Dice (Milletari et al. 2016, over all classes and samples) plus cross-entropy, a scalar.

    logits (B, K, ...), or folded cells as `unfolded` takes them; labels (B, ...) int64 in 0..K-1,
    and `IGNORE` only with `with_ignored`. `smooth` in voxels keeps absent classes from dominating.
    """
    if fused_loss.can_fuse_loss(logits):
        return fused_loss.dice_cross_entropy(logits, labels, smooth)
    logits = unfolded(logits)
    loss: Tensor = _DiceCrossEntropy.apply(logits, labels, smooth, with_ignored)
    return loss


def cross_entropy(logits: Tensor, labels: Tensor, *, with_ignored: bool = False) -> Tensor:
    """The mean cross-entropy over voxels, a scalar; arguments as of `dice_cross_entropy`."""
    target = labels if with_ignored else labels.clamp(min=0)
    logits = unfolded(logits).float()
    if not _scatters(logits.device):  # of maps a card makes other sums every time, of rows none
        logits, target = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    loss: Tensor = F.cross_entropy(logits, target, ignore_index=IGNORE)
    return loss


#: Name in a config -> loss(logits, labels, with_ignored=). A new one is a line here and a name in
#: `TrainConfig.loss`.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dice_cross_entropy": dice_cross_entropy,
    "cross_entropy": cross_entropy,
}


def unfolded(logits: Tensor) -> Tensor:
    """Folded cells (B, K, d, s, h, s, w, s) as (B, K, d·s, h·s, w·s); other logits as they are."""
    return logits.flatten(6, 7).flatten(4, 5).flatten(2, 3) if logits.ndim == 8 else logits


def dice_binary_cross_entropy(
    logits: Tensor, targets: Tensor, counts: Tensor, smooth: float = 1.0
) -> Tensor:
    """Soft Dice plus binary cross-entropy of regions that may overlap, a scalar.

    logits (B, R, ...); targets (B, R, ...) 0 or 1; counts (B, 1, ...) 1 where the voxel is to be
    learnt from, else 0.
    """
    logits = unfolded(logits).float()
    entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * counts).sum()
    p = logits.sigmoid() * counts
    axes = tuple(range(2, logits.ndim))
    overlap, total = (p * targets).sum(axes), p.sum(axes) + (targets * counts).sum(axes)
    dice = (2 * overlap + smooth) / (total + smooth)
    return entropy / (counts.sum() * logits.shape[1]).clamp(min=1) + 1 - dice.mean()


def as_background(logits: Tensor, unlabelled: Tensor) -> Tensor:
    """Logits in which classes that a sample's labels do not tell from background are background.

    For partially labelled data (marginal loss, Shi et al. 2021, arXiv:2007.03868). logits (B, K,
    ...), unlabelled (B, K) bool, never true for class 0.
    """
    logits = unfolded(logits)
    hidden = unlabelled.reshape(*unlabelled.shape, *[1] * (logits.ndim - 2))
    hidden = hidden.expand_as(logits)
    merged = hidden.clone()
    merged[:, 0] = True
    background = logits.float().masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)
    # -30: a probability of 1e-13, so that neither the loss nor its gradient sees the class again.
    return torch.cat((background, logits[:, 1:].float().masked_fill(hidden[:, 1:], -30.0)), 1)


def deep_supervision(
    outputs: Tensor | Sequence[Tensor],
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor] = dice_cross_entropy,
) -> Tensor:
    """`loss_of` every output, each half the size of the one before, weighted 1, 1/2, 1/4 ... and
    summed.

    labels (B, D, H, W) at the finest size; coarser ones are taken at every second voxel (Lee et al.
    2015).
    """
    if isinstance(outputs, Tensor):
        return loss_of(outputs, labels)
    weights = [0.5**n for n in range(len(outputs))]
    loss = torch.zeros((), device=labels.device)
    for weight, logits in zip(weights, outputs, strict=True):
        folded = logits.ndim == 8  # such are the finest
        step = [
            1 if folded else full // size for full, size in zip(labels.shape[1:], logits.shape[2:])
        ]
        coarse = labels[:, :: step[0], :: step[1], :: step[2]]
        loss = loss + weight / sum(weights) * loss_of(logits, coarse)
    return loss


def segmentation_loss(
    outputs: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    name: str = "dice_cross_entropy",
    with_ignored: bool = False,
    unlabelled: Tensor | None = None,
    membership: Tensor | None = None,
) -> Tensor:
    """The loss of a training step, with deep supervision; `name`: of `LOSSES`, for classes.

    labels (B, D, H, W) int64: classes 0..K-1, or `IGNORE` where `with_ignored`. unlabelled (B, K):
    see `as_background`. membership (classes, R) of 0 and 1: which class lies in which region, where
    the outputs are R overlapping regions.
    """

    def of_classes(logits: Tensor, target: Tensor) -> Tensor:
        if unlabelled is not None and (unlabelled.device.type != "cpu" or bool(unlabelled.any())):
            logits = as_background(logits, unlabelled)
        return LOSSES[name](logits, target, with_ignored=with_ignored)

    def of_regions(logits: Tensor, target: Tensor) -> Tensor:
        assert membership is not None
        counts = (target != IGNORE)[:, None].float()
        return dice_binary_cross_entropy(
            logits, membership.to(target.device)[target.clamp(min=0)].movedim(-1, 1), counts
        )

    return deep_supervision(outputs, labels, of_classes if membership is None else of_regions)


def hard_dice(logits: Tensor, labels: Tensor) -> float:
    """Mean Dice of the most likely classes over the structures present in `labels` (B, X, Y, Z),
    background left out.

    Voxels of a negative label do not count. 1 where no structure is present.
    """
    return float(mean_dice(logits, labels))


@torch.no_grad()
def mean_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """`hard_dice` as a number on the device, which nobody has waited for."""
    if can_fuse_loss(logits):
        found, present, both = hits(logits, labels)
    elif _scatters(logits.device):
        classes, known = logits.shape[1], labels >= 0
        most_likely, truth = unfolded(logits).argmax(1)[known], labels[known]
        both = torch.bincount(truth[most_likely == truth], minlength=classes)
        present, found = (
            torch.bincount(values, minlength=classes) for values in (truth, most_likely)
        )
    else:
        found, present, both = _counts(unfolded(logits).argmax(1), labels, logits.shape[1])
    each = (2 * both / (found + present).clamp(min=1))[1:]
    there = present[1:] > 0
    if not _scatters(logits.device):
        mean = (each * there).sum() / there.sum().clamp(min=1)
        return torch.where(there.any(), mean, torch.ones_like(mean))
    return each[there].mean() if there.any() else torch.ones(())


def _counts(most_likely: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) of each class how often it is most likely, true, and both, where there is a label.

    What masks choose, and how many `bincount` counts, a card would have to be asked for.
    """
    most_likely, labels = most_likely.to(torch.int16), labels.to(torch.int16)
    most_likely = torch.where(labels < 0, -1, most_likely)
    rows = []
    for k in range(classes):
        chosen, true = most_likely == k, labels == k
        rows.append(torch.stack((chosen.sum(), true.sum(), (chosen & true).sum())))
    found, present, both = torch.stack(rows, 1)
    return found, present, both
