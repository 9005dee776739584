"""OpenVINO is tried no longer than it takes to see that it does not pay."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from making import networks as tiny
from medseg.inference.backends import opening
from medseg.models import load_checkpoint


class Clock:
    """Each window takes as long as the next of `seconds`."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now, self.windows = list(seconds), 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def predict(self, patch: Any) -> None:
        self.windows += 1
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(
    ("seconds", "pays", "windows"),
    [((1.0,), False, 1), ((20.0, 1.0), False, 2), ((20.0, 15.0), True, 2)],
)
def test_a_second_window_is_tried_only_where_the_first_takes_long(
    seconds: tuple[float, ...],
    pays: bool,
    windows: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    clock = Clock(*seconds)
    monkeypatch.setattr(opening, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    checkpoint = load_checkpoint(str(tiny.save_unet(tmp_path / "model")))
    predictor: Any = clock.predict
    assert opening._openvino_pays(checkpoint, predictor, 10) is pays
    assert clock.windows == windows
