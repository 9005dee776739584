"""The fused loss against the same thing composed of plain torch operations."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.config import TrainConfig
from medseg.training import losses
from medseg.training.losses import (
    IGNORE,
    LOSSES,
    as_background,
    deep_supervision,
    dice_cross_entropy,
    hard_dice,
    mean_dice,
    segmentation_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def composed(logits: Tensor, labels: Tensor, smooth: float) -> Tensor:
    """The definition, in autograd: mean over samples and classes of 1 - soft Dice, plus
    cross-entropy.
    """
    p = logits.softmax(1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    space = tuple(range(2, logits.ndim))
    dice = (2 * (p * truth).sum(space) + smooth) / (p.sum(space) + truth.sum(space) + smooth)
    return F.cross_entropy(logits, labels) + (1 - dice).mean()


def sample(
    shape: tuple[int, ...], classes: int, seed: int, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape[0], classes, *shape[1:], generator=random)
    return logits, torch.randint(classes, shape, generator=random)


@pytest.mark.parametrize("shape", [(1, 5, 6, 7), (3, 4, 4, 4), (2, 9)])
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("smooth", [1.0, 1e-2])
def test_dice_cross_entropy_equals_its_definition_in_value_and_gradient(shape, classes, smooth):
    logits, labels = sample(shape, classes, seed=classes)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = dice_cross_entropy(ours, labels, smooth), composed(exact, labels, smooth)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


def test_dice_cross_entropy_when_classes_are_absent_equals_its_definition():
    logits, _ = sample((2, 4, 4, 4), 6, seed=1)
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.int64)
    labels[1, 0] = 3
    exact = logits.double().requires_grad_()
    ours = logits.clone().requires_grad_()
    loss, expected = dice_cross_entropy(ours, labels), composed(exact, labels, 1.0)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


def test_dice_cross_entropy_of_extreme_logits_is_finite():
    logits, labels = sample((1, 4, 4, 4), 3, seed=2, spread=1e4)
    logits.requires_grad_()
    loss = dice_cross_entropy(logits, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_dice_cross_entropy_of_a_perfect_answer_is_nearly_zero_and_of_a_wrong_one_is_not():
    _, labels = sample((1, 6, 6, 6), 3, seed=3)
    truth = 30 * F.one_hot(labels, 3).movedim(-1, 1).float()
    assert float(dice_cross_entropy(truth, labels)) == pytest.approx(0, abs=1e-4)
    assert float(dice_cross_entropy(-truth, labels)) > 1.5


def test_dice_cross_entropy_of_bfloat16_logits_gives_a_bfloat16_gradient():
    logits, labels = sample((1, 4, 4, 4), 3, seed=4)
    low = logits.bfloat16().requires_grad_()
    exact = low.detach().double().requires_grad_()
    dice_cross_entropy(low, labels).backward()
    composed(exact, labels, 1.0).backward()
    assert low.grad.dtype == torch.bfloat16
    assert torch.allclose(low.grad.double(), exact.grad, rtol=0.02, atol=1e-5)


def test_deep_supervision_weights_outputs_by_powers_of_a_half_that_sum_to_one():
    _, labels = sample((2, 8, 8, 8), 4, seed=5)
    outputs = [sample((2, n, n, n), 4, seed=n)[0].requires_grad_() for n in (8, 4, 2)]
    parts = [
        composed(logits, labels[:, ::s, ::s, ::s], 1.0) for logits, s in zip(outputs, (1, 2, 4))
    ]
    expected = (4 * parts[0] + 2 * parts[1] + parts[2]) / 7
    loss = deep_supervision(outputs, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, outputs)
    for ours, exact in zip(gradients, torch.autograd.grad(expected, outputs)):
        assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-7)


def test_deep_supervision_of_one_output_is_the_plain_loss():
    logits, labels = sample((1, 4, 4, 4), 3, seed=6)
    assert float(deep_supervision(logits, labels)) == pytest.approx(
        float(composed(logits, labels, 1.0)), rel=1e-5
    )
    assert float(deep_supervision([logits], labels)) == pytest.approx(
        float(composed(logits, labels, 1.0)), rel=1e-5
    )


def test_voxels_to_ignore_count_neither_in_the_loss_nor_in_its_gradient():
    """The loss equals its definition over the known voxels alone; what is said of the others
    changes nothing.
    """
    logits, labels = sample((2, 6, 5, 4), 3, seed=5)
    unknown = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    ours = logits.clone().requires_grad_()
    loss = dice_cross_entropy(ours, labels.masked_fill(unknown, IGNORE), with_ignored=True)
    exact = logits.double().requires_grad_()
    p, truth = exact.softmax(1), F.one_hot(labels, 3).movedim(-1, 1).double()
    known = (~unknown)[:, None].double()
    dice = (2 * (p * truth * known).sum((2, 3, 4)) + 1) / (
        (p * known).sum((2, 3, 4)) + (truth * known).sum((2, 3, 4)) + 1
    )
    entropy = F.cross_entropy(exact, labels, reduction="none")
    expected = (entropy * known[:, 0]).sum() / known.sum() + (1 - dice).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)
    assert (ours.grad[unknown[:, None].expand_as(logits)] == 0).all()


def test_nothing_to_ignore_gives_the_same_loss_either_way():
    logits, labels = sample((2, 5, 5, 5), 4, seed=2)
    assert (
        dice_cross_entropy(logits, labels, with_ignored=True).item()
        == dice_cross_entropy(logits, labels).item()
    )


def test_a_class_that_is_not_labelled_is_background_for_the_loss():
    """Logits merged by hand: log of the summed exponentials of background and the unlabelled
    class.
    """
    logits, _ = sample((2, 4, 4, 4), 3, seed=3)
    # Class 2 is nowhere.
    labels = torch.randint(2, (2, 4, 4, 4), generator=torch.Generator().manual_seed(9))
    unlabelled = torch.tensor([[False, False, True], [False, False, False]])
    merged = as_background(logits, unlabelled)
    p = logits.double().softmax(1)
    probability = merged.double().softmax(1)
    assert torch.allclose(probability[0, 0], p[0, 0] + p[0, 2], atol=1e-6)
    assert torch.allclose(probability[0, 1], p[0, 1], atol=1e-6)
    assert probability[0, 2].max() < 1e-9
    assert torch.allclose(probability[1], p[1], atol=1e-6)
    learnt = logits.clone().requires_grad_()
    segmentation_loss(learnt, labels, unlabelled=unlabelled).backward()
    assert torch.isfinite(learnt.grad).all()
    # More of the unlabelled class is as good as more background: their gradients have the same
    # sign.
    assert ((learnt.grad[0, 0] * learnt.grad[0, 2]) >= 0).all()


def test_regions_that_overlap_are_learnt_one_by_one():
    membership = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])  # background, rim, core
    labels = torch.randint(3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(4))
    targets = torch.stack((labels > 0, labels == 2), 1).float()
    perfect = segmentation_loss(40 * targets - 20, labels, membership=membership)
    wrong = segmentation_loss(20 - 40 * targets, labels, membership=membership)
    assert perfect.item() < 0.02
    assert wrong.item() > 10
    logits, _ = sample((2, 4, 4, 4), 2, seed=6)
    entropy = F.binary_cross_entropy_with_logits(logits, targets)
    p = logits.sigmoid()
    dice = (2 * (p * targets).sum((2, 3, 4)) + 1) / (p.sum((2, 3, 4)) + targets.sum((2, 3, 4)) + 1)
    loss = segmentation_loss(logits, labels, membership=membership)
    assert loss.item() == pytest.approx((entropy + 1 - dice.mean()).item(), rel=1e-5)
    ignored = segmentation_loss(logits, torch.full_like(labels, IGNORE), membership=membership)
    assert torch.isfinite(ignored)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_that_a_config_may_name_is_least_where_the_truth_is(name: str):
    """And a config may name no other."""
    assert set(get_args(TrainConfig.model_fields["loss"].annotation)) == set(LOSSES)
    labels = torch.randint(0, 3, (2, 4, 5, 6))
    right = 8 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    hidden = labels.clone()
    hidden[0] = IGNORE
    wrong = right.clone()
    wrong[0] = -right[0]

    assert segmentation_loss(right, labels, name=name) < segmentation_loss(
        torch.zeros_like(right), labels, name=name
    )
    ignored = segmentation_loss(wrong, hidden, name=name, with_ignored=True)
    assert ignored == pytest.approx(
        float(segmentation_loss(right[1:], labels[1:], name=name)), abs=1e-2
    )


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a card, on this CPU."""
    monkeypatch.setattr(losses, "_scatters", lambda device: False)
    monkeypatch.setattr(losses, "can_fuse_loss", lambda logits: False)


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("with_ignored", [False, True])
def test_on_a_card_the_loss_equals_its_definition_in_value_and_gradient(with_ignored: bool):
    logits, labels = sample((2, 5, 6, 7), 7, seed=3)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = dice_cross_entropy(ours, labels, with_ignored=with_ignored)
    expected = composed(exact, labels, 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.usefixtures("on_a_card")
def test_on_a_card_the_sum_of_a_class_that_fills_a_patch_is_right():
    """Added up one by one in float32, four million numbers err by half a per cent."""
    values = torch.rand(1, 160**3, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 160**3, dtype=torch.int64)
    total = losses.sums_of_classes(target, 2, values)[0][0, 0]
    assert float(total) == pytest.approx(float(values.double().sum()), rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_on_a_card_dice_is_the_cpu_s(masked: bool, monkeypatch: pytest.MonkeyPatch):
    for seed in range(4):
        logits, labels = sample((2, 5, 6, 7), 4, seed=seed)
        labels[labels == 2] = 1  # one class that is nowhere
        if masked:
            labels[:, :2] = IGNORE
        expected = hard_dice(logits, labels)
        with monkeypatch.context() as card:
            card.setattr(losses, "_scatters", lambda device: False)
            card.setattr(losses, "can_fuse_loss", lambda logits: False)
            assert hard_dice(logits, labels) == pytest.approx(expected, rel=1e-6)
            assert hard_dice(logits, torch.zeros_like(labels)) == 1.0


@pytest.mark.usefixtures("on_a_card")
def test_a_step_on_a_card_asks_it_for_nothing():
    """Tensors without content say so: what needs a number of theirs raises."""
    logits = torch.empty(2, 4, 8, 8, 8, device="meta", requires_grad=True)
    labels = torch.empty(2, 8, 8, 8, device="meta", dtype=torch.int64)
    unlabelled = torch.empty(2, 4, device="meta", dtype=torch.bool)
    for with_ignored in (False, True):
        loss = segmentation_loss(
            [logits, logits[..., ::2, ::2, ::2]],
            labels,
            with_ignored=with_ignored,
            unlabelled=unlabelled,
        )
        loss.backward()
        assert mean_dice(logits.detach(), labels).device.type == "meta"


def test_cross_entropy_on_a_card_is_of_rows_and_the_same(monkeypatch: pytest.MonkeyPatch):
    """Of maps a card sums it in another order every time, and refuses it where that is asked."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, 6, generator=random, requires_grad=True)
    labels = torch.randint(-1, 4, (2, 3, 5, 6), generator=random)
    expected = losses.cross_entropy(logits, labels, with_ignored=True)
    (gradient,) = torch.autograd.grad(expected, logits)
    real, dimensions = losses.F.cross_entropy, []

    def counted(rows: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        dimensions.append(rows.ndim)
        return real(rows, *arguments, **options)

    monkeypatch.setattr(losses, "_scatters", lambda device: False)
    monkeypatch.setattr(losses.F, "cross_entropy", counted)
    found = losses.cross_entropy(logits, labels, with_ignored=True)
    assert dimensions == [2]
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(found, logits)[0], gradient, atol=1e-7)
