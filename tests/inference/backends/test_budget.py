"""What of a run lies on a card follows from the memory that is free there; no card is needed."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from making import networks as tiny
from medseg.inference.backends.activations import activation_bytes
from medseg.inference.backends.budget import OnCard, fit_on_card
from medseg.inference.forecast import Plan, plan
from medseg.inference.run import announcement
from medseg.inference.settings import Settings
from medseg.models.folder import Checkpoint, load_checkpoint
from medseg.volume import Volume

WINDOW, SUMS, WEIGHTS = 10**9, 3 * 10**9, 2 * 10**9


def fitted(free_bytes: int, batch: int = 0) -> OnCard:
    return fit_on_card(
        lambda count: count * WINDOW,
        weight_bytes=WEIGHTS,
        sums_bytes=SUMS,
        free_bytes=free_bytes,
        batch=batch,
    )


@pytest.mark.parametrize(
    ("free_gb", "batch", "sums"),
    [(24, 4, True), (10, 2, True), (8, 1, True), (7, 2, False), (4, 1, False), (1, 1, False)],
)
def test_less_memory_means_fewer_windows_and_then_sums_on_the_cpu(
    free_gb: int, batch: int, sums: bool
):
    """By hand: 2 of weights, 0.5 of workspace, 1 a window and 3 of sums, within 0.9 of the free."""
    way = fitted(free_gb * 10**9)
    assert (way.batch, way.sums) == (batch, sums)
    assert way.needed_bytes == WEIGHTS + batch * WINDOW + sums * SUMS + 500_000_000


def test_what_a_person_asks_for_is_taken_and_only_the_sums_move():
    assert fitted(24 * 10**9, batch=8).batch == 8
    assert fitted(12 * 10**9, batch=8) == OnCard(
        batch=8, sums=False, data=False, needed_bytes=10_500_000_000
    )


@pytest.mark.parametrize(
    ("free_gb", "batch", "sums", "data"),
    [(24, 4, True, True), (10, 1, True, True), (9, 2, True, False), (4, 1, False, False)],
)
def test_image_and_labels_lie_on_the_card_before_more_windows_do(
    free_gb: int, batch: int, sums: bool, data: bool
):
    """As above, and 2 of data."""
    way = fit_on_card(
        lambda count: count * WINDOW,
        weight_bytes=WEIGHTS,
        sums_bytes=SUMS,
        data_bytes=2 * 10**9,
        free_bytes=free_gb * 10**9,
    )
    assert (way.batch, way.sums, way.data) == (batch, sums, data)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_unet(tmp_path_factory.mktemp("unet") / "m")))


def planned(unet: Checkpoint, free_bytes: int, **settings: int) -> Plan:
    """The plan on a card with so much memory."""
    scan = Volume(np.zeros((40, 44, 36), np.float32), tiny.affine_of())
    with (
        mock.patch("medseg.inference.backends.predictor.problem_of", return_value=""),
        mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1),
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(free_bytes, 2 * free_bytes)),
    ):
        return plan(scan, unet, Settings(**settings))  # type: ignore[arg-type]


def test_the_plan_says_what_lies_on_a_card(unet: Checkpoint):
    roomy, full = planned(unet, 10**11), planned(unet, 10**8)
    assert (roomy.device, roomy.precision) == ("cuda", "float16")
    assert (roomy.batch, roomy.sums_on_card, full.batch, full.sums_on_card) == (4, True, 1, False)
    least = 2 * unet.weight_bytes + 4 * activation_bytes(unet)
    assert (roomy.data_on_card, full.data_on_card) == (True, False)
    # Beside them 0.5 of workspace, 0.6 for painting, and a little scan.
    assert 1_100_000_000 < roomy.card_bytes - least < 1_200_000_000
    assert planned(unet, 10**11, batch=7).batch == 7
    scan = Volume(np.zeros((40, 44, 36), np.float32), tiny.affine_of())
    assert announcement([scan], roomy).endswith("GB of the GPU's, 4 windows at a time")
    assert announcement([scan], full).endswith("1 window at a time, and sums on the CPU")


def test_a_cpu_has_no_card_and_its_plan_says_nothing_of_one(unet: Checkpoint, tmp_path: Path):
    scan = Volume(np.zeros((40, 44, 36), np.float32), tiny.affine_of())
    made = plan(scan, unet, Settings(device="cpu"))
    assert (made.batch, made.sums_on_card, made.card_bytes) == (1, False, 0)
    assert "GPU" not in announcement([scan], made)
