"""A step whose memory is out is taken in parts; what it learns is the same but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from making.configs import make_config
from making.notices import notices
from medseg.config import Config, load_config
from medseg.errors import DataWarning, DeviceFailed, NotEnoughMemory
from medseg.training import capacity, precision
from medseg.training.loop import train
from medseg.training.state import load_state
from medseg.training.step import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("config")
    return load_config(make_config(folder, train__steps=3, train__batch=4, train__log_every=1))


def room_for(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory is out for more samples than these; how many each forward pass had."""
    real, sizes = Run.forward, []

    def forward(run: Run, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(run, images)

    monkeypatch.setattr(Run, "forward", forward)
    return sizes


def test_a_batch_too_large_for_memory_is_learnt_from_in_parts(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(config, tmp_path / "whole")
    sizes = room_for(2, monkeypatch)
    with pytest.warns(DataWarning, match="4 patches of a step are learnt from in 2 parts") as told:
        train(config, tmp_path / "parts")
    assert sizes == [4, 2, 2, 2, 2, 2, 2], "and stay so"
    assert len(notices(told)) == 1
    (whole, facts), (parts, others) = (
        load_state(tmp_path / name / "state.safetensors") for name in ("whole", "parts")
    )
    assert facts["step"] == others["step"] == 3
    for key, value in whole.items():
        if key.startswith("average."):
            assert torch.allclose(parts[key], value, atol=2e-3), key


def test_a_step_in_which_not_one_sample_fits_is_refused_with_what_to_do(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = room_for(0, monkeypatch)
    with (
        pytest.warns(DataWarning),
        pytest.raises(
            NotEnoughMemory, match="in step 1, with patches of 16 x 16 x 16, 1 at a time"
        ),
    ):
        train(config, tmp_path / "run")
    assert sizes == [4, 2, 1]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_batch_that_a_full_card_could_not_make_is_made_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    train(config, tmp_path / "whole")
    real, steps = Run._make_batch, []

    def make(run: Run, step: int) -> Any:
        steps.append(step)
        if steps.count(at) == 1 and step == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(run, step)

    monkeypatch.setattr(Run, "_make_batch", make)
    train(config, tmp_path / "again")
    assert steps.count(at) == 2
    (whole, _), (again, _) = (
        load_state(tmp_path / name / "state.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.parametrize("part", ["move_weights", "_make_batch"])
@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", NotEnoughMemory, "no memory to go on"),
        ("CUDA error: unspecified launch failure", DeviceFailed, "the GPU stopped working"),
    ],
)
def test_what_ends_a_step_anywhere_is_a_sentence(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, text: str,
    kind: type[Exception], sentence: str,
):  # fmt: skip
    def ends(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(Run, part, ends)
    with pytest.raises(kind, match=sentence):
        train(config, tmp_path / "run")


def test_speed_is_tried_on_the_card_that_will_train(monkeypatch: pytest.MonkeyPatch):
    places: list[str] = []

    def half(device: torch.device) -> str:
        places.append(str(device))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capacity, "half_on_card", half)
    second = capacity.Machine(device="cuda", memory_bytes=2**34, card="cuda:1")
    with pytest.raises(NotEnoughMemory, match="no memory on cuda:1 to try how fast it trains"):
        capacity.seconds_a_voxel(second, 1)
    assert places == ["cuda:1"]


def test_the_arithmetic_is_that_of_the_card_that_will_train(
    config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: device.index == 1)
    settings = config.train.model_copy(update={"precision": "auto"})
    config = config.model_copy(update={"train": settings})
    kinds = [precision.choose_training_precision(config, torch.device("cuda", n)) for n in (0, 1)]
    assert kinds == ["fp16", "bf16"]
