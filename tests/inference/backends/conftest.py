"""What tests of fast forms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medseg.inference.backends import accelerate, residual


@pytest.fixture
def inferring() -> Iterator[None]:
    """The same random numbers each time, and no gradients."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps go the way of large ones."""
    monkeypatch.setattr(residual, "_LARGE_BYTES", 0)
    monkeypatch.setattr(accelerate, "_SHORTEST", 1)
