"""Where processes train, and what is the same every time; no card is needed."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn

from medseg.errors import BadConfig, MedsegError
from medseg.networks import build_network
from medseg.training import processes as module
from medseg.training.capacity import _saved_bytes, training_bytes
from medseg.training.processes import Processes, _device_of


@pytest.fixture
def two_cards() -> Iterator[None]:
    """PyTorch sees two that work."""
    with (
        mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2),
        mock.patch("medseg.inference.backends.predictor.problem_of", return_value=""),
    ):
        yield


@pytest.mark.usefixtures("two_cards")
def test_every_process_has_a_card_of_its_own():
    assert _device_of("auto", 1, 2) == torch.device("cuda", 1)
    assert _device_of("cuda:1", 0, 1) == torch.device("cuda", 1)
    assert _device_of("cpu", 1, 2) == torch.device("cpu")
    for device, rank, size in (("auto", 2, 3), ("cuda:1", 0, 2)):
        with pytest.raises(BadConfig, match="there are 2 here: start as many"):
            _device_of(device, rank, size)


@pytest.mark.usefixtures("two_cards")
def test_cublas_is_told_to_be_repeatable_before_it_is_used():
    with mock.patch.dict(os.environ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        Processes()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_a_cpu_the_environment_stays_as_it_is():
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        Processes()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_training_on_mps_is_refused_in_a_sentence():
    with pytest.raises(BadConfig, match=r"not on mps; use --device cpu"):
        Processes("mps")


def test_a_device_that_is_not_here_is_refused():
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        pytest.raises(BadConfig, match="no CUDA device here"),
    ):
        Processes("cuda")
    with pytest.raises(BadConfig, match="no device 'gpu'"):
        Processes("gpu")


def on_a_card() -> Processes:
    """Processes that believe they have one."""
    processes = Processes("cpu")
    processes.device = torch.device("cuda")
    return processes


def test_one_that_never_comes_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (place | {"RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_COME_S", 1.0)
    with pytest.raises(MedsegError, match="not all processes of this run have come within 1 sec"):
        Processes("cpu").__enter__()


def test_what_gives_other_bits_every_time_is_refused_on_a_card():
    with (
        pytest.raises(BadConfig, match="upsample_bicubic2d_backward_out_cuda gives other bits"),
        on_a_card().repeatable(True),
    ):
        raise RuntimeError(
            "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation,"
            " but you set ..."
        )
    with pytest.raises(RuntimeError, match="shapes"), on_a_card().repeatable(True):
        raise RuntimeError("shapes do not fit")


def test_settings_of_torch_are_as_before_after_a_repeatable_run():
    def state() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.flash_sdp_enabled(),
        )

    before = state()
    with on_a_card().repeatable(True):
        assert state() == (True, False, False, False, False)
    assert state() == before
    with on_a_card().repeatable(False):
        assert state() == before


def test_the_whole_network_of_a_shared_one_lies_on_the_cpu_but_when_it_is_used():
    first, second = Processes("cpu"), Processes("cpu")
    first._whole = whole = nn.Linear(1, 1)
    first.device = torch.device("meta")  # stands for a card
    back = mock.patch.object(whole, "cpu")
    weights = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}
    shared = nn.Linear(1, 1)
    with back as to_cpu, first.whole_network(shared, weights) as network:
        assert {value.device.type for value in network.parameters()} == {"meta"}
        to_cpu.assert_not_called()
    to_cpu.assert_called_once()
    with second.whole_network(shared, weights) as network:
        assert network is shared


def test_a_card_is_forecast_to_keep_group_norms_in_float32():
    """By hand: 10 bytes a voxel and channel where float32 keeps 8, plus what is the same."""
    options = {"features": [8, 16]}
    sizes = (1, 2, (32, 32, 32), 2)
    here, there = (
        training_bytes("unet", options, *sizes, device=device) for device in ("cpu", "cuda")
    )
    network = build_network("unet", 1, 2, **options).to("meta").train()
    kept = _saved_bytes(network, torch.empty(2, 1, 32, 32, 32, device="meta"))
    assert there - here == pytest.approx(900_000_000 + 0.25 * 1.25 * kept, abs=2)


def test_every_part_of_mask2former_has_a_gradient_where_nothing_is_labelled():
    network = build_network("mask2former", 1, 3, features=[8, 16], width=16, queries=4).train()
    said = network(torch.rand(1, 1, 16, 16, 16))
    network.loss(said, torch.full((1, 16, 16, 16), -1)).backward()
    without = [name for name, value in network.named_parameters() if value.grad is None]
    assert not without


def test_data_that_are_other_ones_elsewhere_are_named_with_the_machine():
    processes = Processes("cpu")
    views = [["one", {"case a": "1", "case b": "2"}], ["two", {"case a": "1", "case c": "3"}]]
    with mock.patch.object(processes, "gather", return_value=[views[0], views[0]]):
        processes.check_same({}, "data")
    words = "data: process 2 on two does not see the same case b (and 1 more) as the first"
    with (
        mock.patch.object(processes, "gather", return_value=[views[0], *views]),
        pytest.raises(BadConfig, match=re.escape(words)),
    ):
        processes.check_same({}, "data")
