"""Residual blocks whose maps take one another's place, against MONAI's own and float64."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.inference.backends import accelerate as fast_conv
from medseg.inference.backends.accelerate import MARGIN, FastConv, accelerate
from medseg.inference.backends.blocks import form_of
from medseg.inference.backends.residual import DeepConv, FastJoin, FastResidual, Strip

SIZES = [(13, 21, 19), (9, 30, 30), (5, 17, 40)]
AFFINE = ("instance", {"affine": True})


pytestmark = pytest.mark.usefixtures("inferring")


def learnt(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def same(y: torch.Tensor, reference: torch.Tensor) -> bool:
    return float((y - reference).abs().max()) < 2e-4 * float(reference.std())


class Joined(nn.Module):
    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.join(x, skip)
        return y


def join_and_maps(size: tuple[int, ...], channels: int = 32) -> tuple[nn.Module, Any, Any, Any]:
    """MONAI's, its fast form, a coarse map and a skip of twice its size."""
    make = pytest.importorskip("monai.networks.blocks").UnetrUpBlock
    plain = learnt(make(3, 48, channels, 3, 2, AFFINE, True))
    fast = accelerate(Joined(plain), form_of).join
    assert isinstance(fast, FastJoin)
    skip = torch.randn(1, channels, *(2 * n for n in size))
    skip = skip.contiguous(memory_format=torch.channels_last_3d)
    return plain, fast, torch.randn(1, 48, *size), skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 16, 32])
def test_the_second_convolution_takes_the_place_of_the_first(size: Any, channels: int, large: None):
    make = pytest.importorskip("monai.networks.blocks").UnetResBlock
    network = learnt(nn.Sequential(make(3, channels, 32, 3, 1, AFFINE)))
    fast = accelerate(network, form_of)
    assert isinstance(fast[0], FastResidual) and fast[0]._turns(torch.Size((1, 32, *size)))
    x = torch.randn(1, channels, *size) + 1
    before = x.clone()
    y = fast(x)
    assert y.untyped_storage().nbytes() > 4 * y.numel()  # the memory of both maps
    assert same(y, network(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(7, 11, 9), (4, 15, 16), (5, 12, 21)])
def test_a_join_in_place_is_monais_and_leaves_the_skip_unless_it_may_be_spent(
    size: Any, large: None
):
    plain, fast, x, skip = join_and_maps(size)
    assert fast.plain.conv_block.takes(skip, 32)
    reference, before = plain(x, skip), skip.clone()
    assert same(fast(x, skip), reference)
    assert torch.equal(skip, before)
    assert same(fast.joined([x], skip, spend=True), reference)
    assert not torch.equal(skip, before)


def test_a_skip_with_channels_outermost_is_never_spent(large: None):
    plain, fast, x, skip = join_and_maps((5, 9, 8))
    skip = skip.contiguous()
    before = skip.clone()
    assert same(fast.joined([x], skip, spend=True), plain(x, skip))
    assert torch.equal(skip, before)


def test_a_map_with_too_few_tiles_in_a_plane_goes_the_usual_way(large: None):
    plain, fast, x, skip = join_and_maps((30, 4, 4))
    assert not fast.plain.conv_block.takes(skip, 32)
    assert same(fast.joined([x], skip, spend=True), plain(x, skip))


def test_small_maps_and_several_samples_go_the_usual_way():
    plain, fast, x, skip = join_and_maps((7, 11, 9))
    assert not fast.plain.conv_block.takes(skip, 32)
    assert not fast.plain.conv_block.takes(torch.cat((skip, skip)), 32)
    both = fast(torch.cat((x, x + 1)), torch.cat((skip, skip)))
    assert same(both, plain(torch.cat((x, x + 1)), torch.cat((skip, skip))))


def test_maps_in_place_do_not_depend_on_the_number_of_threads(large: None):
    _, fast, x, skip = join_and_maps((8, 12, 14))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fast(x, skip).clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("units", "room", "plane"), [(144, 96, 576), (31, 9, 10), (7, 5, 5)])
def test_turns_hold_every_unit_once_and_never_write_what_a_later_one_reads(
    units: int, room: int, plane: int
):
    turns = list(fast_conv._turns(units, room, plane))
    assert [n for turn in turns for n in turn] == list(range(units))
    for turn in turns:
        last_written = 4 * (((turn.stop * room) - 1) // plane) + 3
        first_read = 4 * (turn.start * room // plane) - 1
        assert last_written < first_read + MARGIN


def test_maps_of_a_strip_begin_at_cache_lines_and_lie_one_behind_the_other():
    strip = Strip(16, (4, 3, 5), 2)
    maps = [strip.map(n) for n in range(3)]
    for y in maps:
        assert y.shape == (1, 16, 4, 3, 5)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert y.data_ptr() % 64 == 0
    for y, before in pairwise(maps):
        assert before.data_ptr() - y.data_ptr() == 4 * 16 * MARGIN * 3 * 5


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (2, 2, 5, 3), (1, 1, 2, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_few_voxels_is_a_product(shape: Any, bias: bool, monkeypatch):
    conv = nn.Conv3d(48, 32, 3, 1, 1, bias=bias).eval()
    x = torch.randn(shape[0], 48, *shape[1:])
    reference = copy.deepcopy(conv).double()(x.double())
    monkeypatch.delattr(FastConv, "_convolved")
    y = DeepConv(conv).source(x, half=False).map
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert float((y - reference).abs().max()) < 1e-5


def test_the_weights_of_many_channels_are_not_spread_for_a_small_map():
    wide, narrow = (DeepConv(nn.Conv3d(n, n, 3, 1, 1).eval()) for n in (192, 48))
    small, large = (torch.empty(1, 1, n, n, n, device="meta") for n in (12, 24))
    assert not wide.pays(small)
    assert wide.pays(large) and narrow.pays(small) and narrow.pays(large)
    x = torch.randn(1, 192, 10, 11, 12)
    assert torch.allclose(wide.source(x, half=False).map, wide.conv(x), atol=1e-4)
    assert wide._packed is None


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 0}, {"kernel_size": 1, "padding": 0}]
)
def test_other_convolutions_of_few_voxels_stay_oneDNNs(options: dict[str, Any]):  # noqa: N802
    usual = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1}
    conv = nn.Conv3d(**(usual | options)).eval()
    x = torch.randn(1, 16, 5, 4, 6)
    assert torch.allclose(DeepConv(conv).source(x, half=False).map, conv(x), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_shortcut_of_a_few_channels_is_not_made_and_even_ones_do_not_vary(channels: int):
    make = pytest.importorskip("monai.networks.blocks").UnetResBlock
    network = learnt(nn.Sequential(make(3, channels, 32, 3, 1, AFFINE)))
    fast = accelerate(network, form_of)
    x = torch.randn(2, channels, 12, 11, 10) * 2 + 5
    x[:, -1] = 3.0  # a channel that is the same everywhere
    reference = copy.deepcopy(network).double()(x.double())
    y = fast(x)
    assert torch.isfinite(y).all()
    if channels > 1:
        assert same(y, reference)
    else:  # all is the same everywhere: what is left is rounding, magnified by the norm
        assert float((y - network(x)).abs().max()) < 0.05


@pytest.mark.parametrize("count", [1, 23, 24, 25, 150])
def test_a_product_of_joined_maps_may_overwrite_one_of_them(count: int):
    from medseg.kernels.residual import POINT_VOXELS, pack_points, point_voxels

    rng = np.random.default_rng(0)
    one, two = (rng.standard_normal((160, n), dtype=np.float32) for n in (16, 32))
    weight = rng.standard_normal((32, 48), dtype=np.float32)
    bias = rng.standard_normal(32, dtype=np.float32)
    reference = np.concatenate((one, two), 1) @ weight.T.astype(np.float64) + bias
    before, first = two.copy(), 3
    rows = np.empty(POINT_VOXELS * 32, np.float32)
    maps = (one.ravel(), 16), (two.reshape(-1), 32)
    point_voxels(*maps, first, count, pack_points(weight), bias, maps[1][0], rows)
    assert np.allclose(two[first : first + count], reference[first : first + count], atol=1e-4)
    assert np.array_equal(two[:first], before[:first])
    assert np.array_equal(two[first + count :], before[first + count :])


def test_sums_of_maps_and_of_few_channels_are_pytorchs():
    from medseg.kernels.residual import add_few, add_voxels

    y, other = torch.randn(2, 70, 32), torch.randn(2, 70, 32)
    few, weights = torch.randn(2, 70, 3), torch.randn(2, 3, 32)
    scale, shift, factor = torch.randn(3, 2, 32)
    base = y * scale[:, None] + shift[:, None]
    for n in range(2):
        flat = y.clone().view(-1).numpy()
        scales = scale.reshape(-1).numpy(), shift.reshape(-1).numpy()
        of = factor.reshape(-1).numpy()
        add_voxels(flat, 70 * n, 70, 2, *scales, other.view(-1).numpy(), of, n, 0.1)
        reference = F.leaky_relu(base + other * factor[:, None], 0.1)
        found = torch.from_numpy(flat).view(2, 70, 32)
        assert torch.allclose(found[n], reference[n], atol=1e-5)
        assert torch.equal(found[1 - n], y[1 - n])
        flat = y.clone().view(-1).numpy()
        of = weights.reshape(-1).numpy()
        add_few(flat, 70 * n, 70, 2, *scales, few.view(-1).numpy(), 3, of, n, 0.1)
        reference = F.leaky_relu(base + few @ weights, 0.1)
        assert torch.allclose(torch.from_numpy(flat).view(2, 70, 32)[n], reference[n], atol=1e-5)
