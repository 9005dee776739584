"""Slopes on each voxel's own number: the compiled loops give what the definition gives, and so do
their gradients.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg.networks.layers import unfold_cells
from medseg.networks.ops import slopes as fused_slopes
from medseg.networks.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = torch.channels_last_3d


def made(dtype: torch.dtype = torch.float32, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, classes * 8, 3, 4, 5), (2, classes, 3, 4, 5), (2, 8, 3, 4, 5))
    logits, slope, own = (torch.randn(shape).to(memory_format=LAST) for shape in shapes)
    return logits.to(dtype), slope.to(dtype), own


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_compiled_slopes_and_their_gradients_are_those_of_the_definition(
    dtype: torch.dtype, bound: float
):
    logits, slope, own = made(dtype)
    weight = torch.randn_like(logits)
    found = []
    for fused in (True, False):
        a, b = (
            logits.clone(memory_format=torch.preserve_format).requires_grad_(),
            slope.clone().requires_grad_(),
        )
        begin = a * 1  # in place on what came before
        if not fused:
            begin = begin.contiguous()
        assert fused_slopes.can_fuse_slopes(begin, own) == fused
        result = fused_slopes.add_slopes(begin, b, own)
        (result * weight).sum().backward()
        found.append((result.detach().float(), a.grad.float(), b.grad.float()))
    for ours, theirs in zip(*found):
        assert float((ours - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))


def test_each_voxel_gets_the_slope_of_its_cell_times_its_own_intensity():
    torch.manual_seed(1)
    options = {"features": (8, 16), "encoder_blocks": (1, 1), "decoder_blocks": (1,), "stem": 2}
    network = UNet(1, 3, own_intensity=True, **options).eval()
    plain = UNet(1, 3, **options).eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    x = torch.rand(1, 1, 8, 12, 16)
    with torch.no_grad():
        assert torch.equal(network(x), plain(x))  # no slopes yet
        torch.nn.init.normal_(network.slope.weight)
        slope = (
            network.slope(plain.features(x))
            .repeat_interleave(2, 2)
            .repeat_interleave(2, 3)
            .repeat_interleave(2, 4)
        )
        assert torch.allclose(network(x), plain(x) + slope * (16 * x - 8), atol=1e-5)


def test_features_are_what_head_and_slopes_make_the_logits_of():
    torch.manual_seed(2)
    network = UNet(1, 20, features=(8, 16), stem=2, own_intensity=True).eval()
    torch.nn.init.normal_(network.slope.weight)
    x = torch.rand(1, 1, 8, 8, 12)
    with torch.no_grad():
        found = network.features(x)
        body, own = found[:, :8], found[:, 8:]
        logits = network.head(body) + (network.slope(body)[:, :, None] * own[:, None]).flatten(1, 2)
        assert torch.allclose(unfold_cells(logits, 2), network(x), atol=1e-5)


@pytest.mark.parametrize("options", [{"stem": 1}, {"stem": 2, "channels": 2}])
def test_own_intensities_need_cells_and_one_channel(options: dict):
    channels = options.pop("channels", 1)
    with pytest.raises(ValueError, match="one channel"):
        UNet(channels, 3, features=(8, 16), own_intensity=True, **options)
