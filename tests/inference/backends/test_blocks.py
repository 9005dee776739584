"""Fast forms of MONAI's transformers against MONAI's own blocks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from medseg.inference.backends import blocks
from medseg.inference.backends.accelerate import accelerate
from medseg.inference.backends.blocks import FastStage, form_of
from medseg.inference.backends.residual import FastJoin, FastPoint, FastResidual
from medseg.networks.bundles import bundle_network
from medseg.networks.zoo import build_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def learnt(network: nn.Module) -> nn.Module:
    """A network whose positions and norms are not those of a beginner."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias_table" in name or parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def same(found: torch.Tensor, expected: torch.Tensor, share: float = 2e-4) -> bool:
    return float((found - expected).abs().max()) < share * float(expected.std())


def forms(network: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


SWIN = {"feature_size": 48, "depths": (2, 2, 1, 1), "num_heads": (3, 6, 12, 24), "window_size": 7}


def test_a_swin_unetr_gives_what_monais_gives_and_every_block_has_its_fast_form():
    pytest.importorskip("monai")
    network = learnt(build_network("swin_unetr", 2, 3, **SWIN))
    fast, x = accelerate(network, form_of), torch.randn(1, 2, 32, 64, 32)
    assert forms(fast, FastStage) == 4
    assert forms(fast, FastResidual) == 10
    assert forms(fast, FastJoin) == 5
    with torch.inference_mode():
        expected = network(x)
        assert same(fast(x), expected)
        assert same(fast(x), expected)  # with what was kept from the first time
    assert not forms(network, FastStage)


def test_a_bundles_swin_unetr_and_a_unetr_are_the_same_too():
    pytest.importorskip("monai")
    arguments = {"feature_size": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
    arguments |= {"window_size": 4, "use_v2": True}
    bundle = learnt(bundle_network(1, 3, network="SwinUNETR", arguments=arguments))
    unetr = learnt(
        build_network("unetr", 1, 3, patch=[32, 32, 32], hidden_size=48, mlp_dim=64, num_heads=2)
    )
    for network, size in ((bundle, (32, 32, 64)), (unetr, (32, 32, 32))):
        fast, x = accelerate(network, form_of), torch.randn(1, 1, *size)
        assert forms(fast, FastPoint)
        with torch.inference_mode():
            assert same(fast(x), network(x))


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((10, 9, 7), 4, 2),
        ((8, 8, 8), 4, 2),
        ((3, 12, 5), 4, 2),
        ((4, 9, 2), 4, 2),
        ((7, 5, 6), 3, 1),
    ],
)
def test_a_stage_of_any_size_attends_as_monais_does(size: Any, window: int, shift: int):
    """Maps that are padded, smaller than a window along some axes, or rolled along some only."""
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    stage = swin.BasicLayer(12, 2, 2, (window,) * 3, [0.0, 0.0], qkv_bias=True)
    assert stage.shift_size == (shift,) * 3
    fast, x = FastStage(learnt(stage)), torch.randn(2, 12, *size)
    with torch.inference_mode():
        assert same(fast(x), stage(x))
        assert same(fast(x), stage(x))


def test_windows_hold_every_token_once_and_pairs_are_apart_where_monais_mask_says():
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    size, window, shift = (10, 9, 7), (4, 4, 4), (2, 2, 2)
    places = blocks._windows(size, window, shift)
    assert places.tokens == 3 * 3 * 2
    inside = torch.ones(len(places.order), dtype=torch.bool)
    inside[places.padded] = False
    assert sorted(places.order[inside].tolist()) == list(range(10 * 9 * 7))
    assert torch.equal(places.order[places.back], torch.arange(10 * 9 * 7))
    expected = swin.compute_mask([12, 12, 8], window, shift, "cpu")
    masks = [mask for count, mask in places.kinds for _ in range(count)]
    assert len(masks) == len(expected)
    plain = torch.zeros(64, 64)
    kinds = [plain if mask is None else mask for mask in masks]
    counted = sorted(tuple(one.flatten().tolist()) for one in kinds)
    assert counted == sorted(tuple(one.flatten().tolist()) for one in expected)


@pytest.mark.parametrize(("channels", "batch"), list(product((16, 32), (1, 2))))
def test_a_residual_block_is_monais_for_all_channels_and_batches(channels: int, batch: int):
    block = pytest.importorskip("monai.networks.blocks").UnetResBlock
    network = nn.Sequential(block(3, channels, 32, 3, 1, ("instance", {"affine": True})))
    network = learnt(network)
    fast, x = accelerate(network, form_of), torch.randn(batch, channels, 12, 11, 13)
    assert forms(fast, FastResidual) == 1
    before = x.clone()
    with torch.inference_mode():
        assert same(fast(x), network(x))
        assert torch.equal(x, before)
    assert same(fast(x).detach(), network(x).detach())  # with gradients: MONAI's own


@pytest.mark.parametrize(
    "options", [{"norm_name": "batch"}, {"stride": 2}, {"out_channels": 20}, {"act_name": "relu"}]
)
def test_blocks_of_other_parts_stay_what_they_are(options: dict[str, Any]):
    block = pytest.importorskip("monai.networks.blocks").UnetResBlock
    usual = {"spatial_dims": 3, "in_channels": 16, "out_channels": 32, "kernel_size": 3}
    usual |= {"stride": 1, "norm_name": "instance"}
    network = nn.Sequential(block(**(usual | options))).eval()
    fast, x = accelerate(network, form_of), torch.randn(1, 16, 12, 12, 12)
    assert not forms(fast, FastResidual)
    with torch.inference_mode():
        assert same(fast(x), network(x))


def test_a_convolution_of_single_voxels_takes_joined_and_odd_maps():
    conv = nn.Sequential(nn.Conv3d(20, 6, 1)).eval()
    fast = accelerate(conv, form_of)
    assert forms(fast, FastPoint) == 1
    for x in (
        torch.randn(2, 20, 5, 6, 7),
        torch.randn(2, 5, 6, 7, 20).permute(0, 4, 1, 2, 3),
        torch.randn(2, 40, 5, 6, 7)[:, ::2],
    ):
        with torch.inference_mode():
            assert torch.allclose(fast(x), conv(x), atol=1e-5)
