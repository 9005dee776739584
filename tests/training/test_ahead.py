"""Batches made before the network asks for them: the same ones, and never one too early or late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from making import phantoms
from making.cards import Link
from making.configs import make_config as config_of_maps
from medseg.config import Config, load_config
from medseg.dataset.reading import read_dataset
from medseg.errors import BadFile
from medseg.inference.backends import copies
from medseg.training import ahead, augment, losses, step, synth
from medseg.training.ahead import Ahead
from medseg.training.loop import train
from medseg.training.scans import ScanSource
from medseg.training.source import Batch
from medseg.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FOREVER_S = 600


def numbered(number: int) -> Batch:
    return Batch(torch.full((1, 1), float(number)), torch.full((1,), number))


def test_while_the_network_works_on_one_batch_the_next_two_are_made():
    made = {number: threading.Event() for number in range(9)}
    threads = set()

    def make(number: int) -> Batch:
        threads.add(threading.get_ident())
        made[number].set()
        return numbered(number)

    with Ahead(make, device=CPU, count=2, stop=7) as batches:
        for number in range(7):
            assert torch.equal(batches.take(number).labels, numbered(number).labels)
            for coming in range(number, min(number + 3, 7)):
                assert made[coming].wait(FOREVER_S)
            assert not any(made[late].is_set() for late in range(min(number + 3, 7), 9))
    assert threads != {threading.get_ident()}
    assert len(threads) == 1


def test_without_any_ahead_each_is_made_when_it_is_asked_for():
    asked: list[int] = []

    def make(number: int) -> Batch:
        asked.append(number)
        return numbered(number)

    with Ahead(make, device=CPU, count=0) as batches:
        batches.take(4)
        assert asked == [4]


def test_what_goes_wrong_is_raised_at_its_step_and_the_thread_ends():
    def make(number: int) -> Batch:
        if number == 2:
            raise BadFile("case_2 cannot be read")
        return numbered(number)

    with Ahead(make, device=CPU, count=2) as batches:
        for number in range(2):
            assert int(batches.take(number).labels) == number
        with pytest.raises(BadFile, match="case_2 cannot be read"):
            batches.take(2)
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_a_batch_that_a_card_still_makes_is_held_back():
    with Ahead(numbered, device=CPU, count=2, link=Link()) as batches:
        for number in range(4):
            images, labels, _ = batches.take(number)
            assert float(images) == number
            assert int(labels) == number


def of_maps(folder: Path) -> Callable[[], tuple[Config, None]]:
    path = config_of_maps(folder, train__steps=5, train__batch=2)
    return lambda: (load_config(path), None)


def of_scans(folder: Path) -> Callable[[], tuple[Config, ScanSource]]:
    data = phantoms.dataset(folder / "data", 4)
    content: dict[str, Any] = {
        "name": "x",
        "data": str(data),
        "model": {
            "name": "unet", "options": {"features": [4, 8]}, "patch": [16, 16, 16],
            "spacing_mm": 1.0, "grid": "scan", "intensity": [{"scheme": "zscore"}],
        },
        "augment": {"rotation_share": 0.7, "elastic_share": 0.5, "blur_share": 0.5},
        "train": {"steps": 5, "batch": 2, "validate_samples": 0, "precision": "fp32"},
    }  # fmt: skip
    from medseg.config import make_config

    def made() -> tuple[Config, ScanSource]:
        dataset, config = read_dataset(data), make_config(content, "test")
        names = [case.name for case in dataset.cases]
        return config, ScanSource(config, dataset, names, [], folder / "store")

    return made


def ends(make: Callable[[], tuple[Config, Any]], run: Path) -> dict[str, torch.Tensor]:
    config, source = make()
    train(config, run, source)
    return load_state(run / "state.safetensors")[0]


@pytest.mark.parametrize("material", [of_maps, of_scans])
def test_a_run_ends_with_the_same_bits_however_many_batches_are_made_ahead(
    material: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, states = material(tmp_path / "material"), []
    for count in (0, 1, 3):
        monkeypatch.setattr(step, "batches_ahead", lambda device, count=count: count)
        states.append(ends(make, tmp_path / f"run{count}"))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def as_on_a_card(monkeypatch: pytest.MonkeyPatch, link: Callable[[torch.device], Any]) -> None:
    """All of training on the way that a card takes, on this CPU."""
    for module in (augment, synth):
        monkeypatch.setattr(module, "_uses_kernels", lambda device: False)
    monkeypatch.setattr(losses, "_scatters", lambda device: False)
    monkeypatch.setattr(losses, "can_fuse_loss", lambda logits: False)
    monkeypatch.setattr(losses.fused_loss, "can_fuse_loss", lambda logits: False)
    monkeypatch.setattr(step, "batches_ahead", lambda device: 2)
    for module in (copies, ahead):
        monkeypatch.setattr(module, "link_to", link)


@pytest.mark.parametrize("material", [of_maps, of_scans])
def test_a_run_whose_copies_are_poison_until_somebody_waits_ends_with_the_same_bits(
    material: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The way of a card, with and without its copies, and with a case or two that stay there."""
    make = material(tmp_path / "material")
    plain = ends(make, tmp_path / "cpu")
    as_on_a_card(monkeypatch, lambda device: None)
    once = ends(make, tmp_path / "once")
    as_on_a_card(monkeypatch, lambda device: Link())
    monkeypatch.setattr(step, "room_for_cases", lambda *config, **other: 110_000)
    again = ends(make, tmp_path / "again")
    assert all(torch.equal(again[key], once[key]) for key in once)
    # It is what the CPU does but for rounding.
    for key in plain:
        if key.startswith("network."):
            assert torch.allclose(once[key], plain[key], atol=2e-3), key
