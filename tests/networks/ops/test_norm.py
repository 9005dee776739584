"""Norm and activation as one step, against PyTorch's own in float64; and networks that use them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from medseg.networks.layers import Block, InstanceNorm, conv, likes_channels_last
from medseg.networks.ops import norm as fused_norm
from medseg.networks.ops.norm import can_fuse, norm_activate
from medseg.networks.unet import UNet


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last_3d)


def a_norm(channels: int) -> InstanceNorm:
    norm = InstanceNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def results(
    x: torch.Tensor, norm: nn.GroupNorm, slope: float, down: torch.Tensor, fused: bool
) -> list[torch.Tensor]:
    """The map and the gradients of x, weight and bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (
        norm_activate(x, norm, slope)
        if fused
        else F.leaky_relu(nn.GroupNorm.forward(norm, x), slope)
    )
    norm.zero_grad()
    (y * down).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()]


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), *[st.integers(2, 12)] * 3),
    slope=st.sampled_from([0.0, 0.01, 1.0]),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_the_plain_operations(shape, slope, half, seed):
    torch.manual_seed(seed)
    batch, blocks, *size = shape
    norm = a_norm(16 * blocks)
    x = channels_last(torch.randn(batch, 16 * blocks, *size) * 3 + 1)
    x = x.bfloat16() if half else x
    down = torch.randn(x.shape).to(x.dtype)
    double = copy.deepcopy(norm).double()
    plain = F.group_norm(x.double(), 16 * blocks, double.weight, double.bias)
    if slope < 1:  # at the kink either side is right
        down[plain.abs() < 1e-3] = 0
    assert can_fuse(x, norm)
    found = results(x, norm, slope, down, fused=True)
    expected = results(x.double(), double, slope, down.double(), fused=False)
    tolerances = [0.02, 0.05, 1e-4, 1e-4] if half else [1e-5] * 4
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        assert float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max() + 0.1)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(fused_norm, "_UNIT", 16 * 1024)  # so that there are several units
    torch.manual_seed(0)
    norm, x = a_norm(16), channels_last(torch.randn(2, 16, 20, 20, 20)).bfloat16()
    down = torch.randn(x.shape).bfloat16()
    before = torch.get_num_threads()
    try:
        all_results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            all_results.append(results(x, norm, 0.01, down, fused=True))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*all_results, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_what_is_not_finite():
    norm = InstanceNorm(16)
    x = channels_last(torch.randn(1, 16, 9, 9, 9)).bfloat16()
    y, exact = norm_activate(x, norm), F.group_norm(x.float(), 16, norm.weight, norm.bias)
    # The two differ in the last bits of float32, so only numbers between two of bfloat16 may go the
    # other way.
    assert float((y == exact.bfloat16()).float().mean()) > 0.999
    x[0, 3, 4, 4, 4] = torch.inf
    assert torch.isnan(norm_activate(x, norm)[0, 3]).any()
    assert torch.isfinite(norm_activate(x, norm)[0, :3].float()).all()


@pytest.mark.parametrize(
    ("x", "norm"),
    [
        (torch.zeros(1, 16, 4, 4, 4), InstanceNorm(16)),  # channels first
        (channels_last(torch.zeros(1, 8, 4, 4, 4)), InstanceNorm(8)),
        (channels_last(torch.zeros(1, 16, 4, 4, 4)).double(), InstanceNorm(16).double()),
        (channels_last(torch.zeros(1, 16, 4, 4, 4)), nn.GroupNorm(4, 16)),
        (channels_last(torch.zeros(1, 16, 4, 4, 4)), nn.InstanceNorm3d(16)),
    ],
    ids=["channels first", "8 channels", "float64", "groups", "no weights"],
)
def test_what_cannot_be_fused_is_left_to_pytorch(x, norm):
    assert not can_fuse(x, norm)


def test_a_block_trains_alike_in_both_layouts():
    torch.manual_seed(0)
    block, x = conv(1, 16), torch.randn(2, 1, 8, 8, 8)
    assert type(block) is Block
    gradients = []
    for images in (x, x.to(memory_format=torch.channels_last_3d)):
        block.zero_grad()
        y = block(images)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    assert images.stride()[1] == 1 and y.is_contiguous(memory_format=torch.channels_last_3d)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_networks_whose_norms_are_all_fused_like_channels_last():
    assert likes_channels_last(UNet(1, 2, features=(16, 32)))
    assert not likes_channels_last(nn.Sequential(conv(1, 16), nn.GroupNorm(4, 16)))
    assert not likes_channels_last(nn.Conv3d(1, 16, 3))
