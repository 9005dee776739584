"""What tests share: the folder of real data, where it is at hand."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# Processes that test beside each other share the cores. Set before torch is loaded, which reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--system",
        choices=("windows", "macos"),
        help="let medseg see this system instead of Linux: what it lacks is taken away",
    )


def pytest_configure(config: pytest.Config) -> None:
    if system := config.getoption("--system"):
        os.environ["TESTED_SYSTEM"] = system
        from making.elsewhere.sitecustomize import move_to
        from making.places import python_path

        os.environ["PYTHONPATH"] = python_path()
        move_to(system)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[1] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data beside the repository) is not here")
    return folder.resolve()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests share the machine; tiny tensors gain nothing from threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_networks() -> Iterator[None]:
    """The networks of `making.networks.KNOWN` count as architectures."""
    from making.networks import KNOWN
    from medseg.networks.zoo import NETWORKS

    with mock.patch.dict(NETWORKS, KNOWN):
        yield


@pytest.fixture
def leave_libraries_as_they_were() -> Iterator[None]:
    """What medseg changes in libraries so that they keep quiet must not reach other tests."""
    from pydicom import config

    names = ("pynetdicom", "pydicom", "dicomweb_client", "urllib3", "requests")
    before = [
        (logging.getLogger(n), logging.getLogger(n).level, logging.getLogger(n).propagate)
        for n in names
    ]
    mode = config.settings.reading_validation_mode
    yield
    config.settings.reading_validation_mode = mode
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(scope="module")
def app() -> Any:
    """3D Slicer's own libraries; for tests of marker `slicer`, which skip without them."""
    from trame_slicer.core import SlicerApp

    return SlicerApp()


@pytest.fixture
def scene(app: Any) -> Iterator[Any]:
    """An empty scene of 3D Slicer."""
    app.scene.Clear()
    here = Path.cwd()  # Slicer changes it
    yield app.scene
    os.chdir(here)
