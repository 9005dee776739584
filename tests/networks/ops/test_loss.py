"""The loss in one pass over channels-last logits, against its definition in float64; networks that
hand it cells.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from medseg.networks.layers import folded_cells
from medseg.networks.ops.loss import can_fuse_loss, hits
from medseg.networks.unet import UNet
from medseg.training.losses import dice_cross_entropy, hard_dice, segmentation_loss, unfolded


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last_3d)


def defined(logits: Tensor, labels: Tensor, smooth: float = 1.0) -> Tensor:
    """Dice plus cross-entropy of (B, K, D, H, W) over the voxels whose label is no less than 0,
    step by step.
    """
    counts = (labels >= 0)[:, None].to(logits.dtype)
    truth = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0)[:, None], 1.0) * counts
    log_p = logits.log_softmax(1)
    p = log_p.exp() * counts
    axes = (2, 3, 4)
    dice = (2 * (p * truth).sum(axes) + smooth) / (p.sum(axes) + truth.sum(axes) + smooth)
    return 1 - dice.mean() - (log_p * truth).sum() / counts.sum().clamp(min=1)


def sample(
    shape, classes: int, fold: int, half: bool, ignored: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """What a network's head gives (B, classes · fold³, d, h, w), and labels (B, d · fold, ...)."""
    generator = torch.Generator().manual_seed(seed)
    batch, *size = shape
    head = 4 * torch.randn(batch, classes * fold**3, *size, generator=generator)
    labels = torch.randint(
        -1 if ignored else 0, classes, (batch, *(n * fold for n in size)), generator=generator
    )
    return channels_last(head.bfloat16() if half else head), labels


@given(
    shape=st.tuples(st.integers(1, 3), *[st.integers(2, 6)] * 2, st.integers(2, 150)),
    classes=st.integers(2, 20),
    fold=st.sampled_from([1, 2]),
    half=st.booleans(),
    ignored=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_are_those_of_the_definition(shape, classes, fold, half, ignored, seed):
    head, labels = sample(shape, classes, fold, half, ignored, seed)
    ours, exact = (head.clone(memory_format=torch.preserve_format) for _ in range(2))
    ours.requires_grad_()
    exact = exact.double().requires_grad_()
    cells = folded_cells(ours, fold)
    assert can_fuse_loss(cells)
    loss = dice_cross_entropy(cells, labels, with_ignored=ignored)
    expected = defined(unfolded(folded_cells(exact, fold)), labels)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.grad.dtype == head.dtype
    largest = float(exact.grad.abs().max())
    assert (
        float((ours.grad.double() - exact.grad).abs().max()) <= (0.005 if half else 1e-5) * largest
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fold", [1, 2])
def test_hits_are_those_of_the_first_largest_logit(half, fold):
    head, labels = sample((2, 3, 4, 21), 5, fold, half, ignored=True, seed=3)
    head[:, : 2 * fold**3] = 1.0  # classes 0 and 1 are always equal
    cells = folded_cells(head, fold)
    found, truth, both = hits(cells, labels)
    best, known = unfolded(cells).argmax(1), labels >= 0
    assert found.tolist() == torch.bincount(best[known], minlength=5).tolist()
    assert found[0] > 0 and found[1] == 0
    assert truth.tolist() == torch.bincount(labels[known], minlength=5).tolist()
    assert both.tolist() == torch.bincount(labels[known & (best == labels)], minlength=5).tolist()
    assert hard_dice(cells, labels) == pytest.approx(
        hard_dice(unfolded(cells).contiguous(), labels)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_not_hidden(value):
    head, labels = sample((1, 4, 4, 20), 3, 1, False, False, seed=1)
    head[0, 1, 2, 2, 2] = value
    assert not torch.isfinite(dice_cross_entropy(head, labels))


def test_nothing_that_counts_is_no_loss_of_cross_entropy_and_no_gradient():
    head, labels = sample((1, 2, 2, 9), 3, 1, False, False, seed=1)
    head.requires_grad_()
    loss = dice_cross_entropy(head, torch.full_like(labels, -1), with_ignored=True)
    loss.backward()
    assert loss.item() == pytest.approx(0)  # every Dice is that of nothing found where nothing is
    assert float(head.grad.abs().max()) == 0


def test_a_label_that_is_no_class_is_refused():
    head, labels = sample((1, 2, 2, 9), 3, 1, False, False, seed=1)
    labels[0, 1, 1, 4] = 3
    with pytest.raises(ValueError, match="label of 3"):
        dice_cross_entropy(head, labels)
    with pytest.raises(ValueError, match="label of 3"):
        hits(head, labels)


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr("medseg.networks.ops.loss._UNIT", 500)
    head, labels = sample((2, 5, 6, 30), 4, 2, True, False, seed=2)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = head.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = dice_cross_entropy(folded_cells(leaf, 2), labels)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    torch.set_num_threads(before)
    assert all(loss == results[0][0] and torch.equal(grad, results[0][1]) for loss, grad in results)


def test_other_logits_take_the_plain_way():
    head, labels = sample((1, 4, 4, 4), 3, 2, False, False, seed=4)
    cells = folded_cells(head.contiguous(), 2)  # classes outermost
    assert not can_fuse_loss(cells)
    assert not can_fuse_loss(channels_last(torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)))
    assert float(dice_cross_entropy(cells, labels)) == pytest.approx(
        float(defined(unfolded(cells), labels)), rel=1e-5
    )


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_network_that_leaves_its_cells_folded_learns_the_same(deep, half):
    torch.manual_seed(0)
    network = UNet(1, 3, features=(16, 32), stem=2, deep_supervision=deep).train()
    x, labels = channels_last(torch.randn(2, 1, 12, 12, 16)), torch.randint(0, 3, (2, 12, 12, 16))
    gradients, losses = [], []
    for folded in (False, True):
        network.folded = folded
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = network(x)
        finest = outputs[0] if deep else outputs
        assert finest.ndim == (8 if folded else 5)
        loss = segmentation_loss(outputs, labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < (
        0.03 if half else 1e-4
    )
    network.eval()
    assert network(x).shape == (2, 3, 12, 12, 16)
