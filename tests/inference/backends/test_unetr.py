"""MONAI's SwinUNETR and UNETR as wholes against MONAI's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.inference.backends.accelerate import accelerate
from medseg.inference.backends.blocks import form_of
from medseg.inference.backends.residual import FastJoin
from medseg.inference.backends.unetr import FastSwin, FastUnetr, _patches
from medseg.networks.bundles import bundle_network
from medseg.networks.zoo import build_network

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"feature_size": 48, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 3}


pytestmark = pytest.mark.usefixtures("inferring")


def learnt(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if "bias_table" in name or parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def same(y: torch.Tensor, reference: torch.Tensor) -> bool:
    return float((y - reference).abs().max()) < 2e-4 * float(reference.std())


def whole(network: nn.Module, kind: type) -> Any:
    (found,) = (module for module in network.modules() if isinstance(module, kind))
    return found


@pytest.mark.parametrize("options", [{}, {"use_v2": True}, {"normalize": False}])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_swin_unetr_in_which_maps_take_one_anothers_place(
    options: dict[str, Any], channels: int, large: None
):
    pytest.importorskip("monai")
    arguments = SMALL | options
    network = learnt(bundle_network(channels, 3, network="SwinUNETR", arguments=arguments))
    fast = accelerate(network, form_of)
    swin = whole(fast, FastSwin)
    x = torch.randn(1, channels, 32, 64, 32)
    assert isinstance(swin.plain.decoder1, FastJoin)
    assert swin.plain.decoder1.plain.conv_block.takes(torch.empty(1, 48, 32, 64, 32), 48)
    before = x.clone()
    assert same(fast(x), network(x))
    assert torch.equal(x, before)


def test_windows_of_a_batch_are_done_one_by_one():
    pytest.importorskip("monai")
    network = learnt(build_network("swin_unetr", 1, 2, **(SMALL | {"feature_size": 24})))
    fast = accelerate(network, form_of)
    x = torch.randn(2, 1, 32, 32, 32)
    y = fast(x)
    assert same(y, network(x))
    assert torch.equal(y[1:], fast(x[1:]))


def test_a_unetr_too(large: None):
    pytest.importorskip("monai")
    options = {"patch": [32, 32, 48], "hidden_size": 48, "mlp_dim": 64, "num_heads": 2}
    network = learnt(build_network("unetr", 1, 3, **options))
    fast = accelerate(network, form_of)
    whole(fast, FastUnetr)
    for batch in (1, 2):
        x = torch.randn(batch, 1, 32, 32, 48)
        assert same(fast(x), network(x))


def test_what_is_asked_with_gradients_or_in_half_precision_is_monais_order():
    pytest.importorskip("monai")
    with torch.inference_mode(False), torch.enable_grad():
        network = bundle_network(1, 2, network="SwinUNETR", arguments=SMALL | {"feature_size": 12})
        fast, x = accelerate(network, form_of), torch.randn(1, 1, 32, 32, 64)
        reference = network(x).detach()
        assert same(fast(x).detach(), reference)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x).float()
    assert float((y - reference).square().mean().sqrt()) < 0.1 * float(reference.std())


def test_a_window_of_a_wrong_size_is_refused_as_monai_refuses_it():
    pytest.importorskip("monai")
    network = bundle_network(1, 2, network="SwinUNETR", arguments=SMALL | {"feature_size": 12})
    fast = accelerate(network, form_of)
    with pytest.raises(ValueError, match="divisible"):
        fast(torch.zeros(1, 1, 32, 48, 32))


@pytest.mark.parametrize(
    ("patch", "size"), [(2, (8, 6, 4)), (2, (7, 6, 5)), ((1, 2, 3), (3, 4, 9))]
)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_patches_are_monais_with_channels_innermost(patch: Any, size: Any, norm: Any):
    embed = pytest.importorskip("monai.networks.blocks").PatchEmbed(patch, 3, 20, norm).eval()
    x = torch.randn(2, 3, *size)
    y = _patches(x, embed)
    assert torch.allclose(y, embed(x), atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
