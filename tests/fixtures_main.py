"""Fixtures of the tests of the main path; a test module imports those it wants for all its tests."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import models_for_tests as tiny
import pytest
import torch

from medseg.networks.zoo import MODELS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the machine; tiny tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def known_networks() -> Iterator[None]:
    """The networks of `models_for_tests.KNOWN` count as architectures."""
    with mock.patch.dict(MODELS, tiny.KNOWN):
        yield
