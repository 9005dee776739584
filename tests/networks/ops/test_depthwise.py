"""The gradient of a convolution of each channel by itself, against PyTorch's own in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from medseg.networks.layers import DepthwiseConv
from medseg.networks.ops import depthwise
from medseg.networks.zoo import build_network, small

pytestmark = pytest.mark.usefixtures("one_thread")


def make(kernel: Any, stride: Any, *, bias: bool = True) -> nn.Conv3d:
    sizes = (kernel,) * 3 if isinstance(kernel, int) else kernel
    torch.manual_seed(0)
    return nn.Conv3d(
        6, 6, sizes, stride=stride, padding=tuple(n // 2 for n in sizes), groups=6, bias=bias
    )


def gradients(y: Tensor, x: Tensor, conv: nn.Conv3d) -> list[Tensor]:
    down = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *conv.parameters()], down))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((5, 4, 7), 3, 1),
        ((5, 4, 7), 3, 2),
        ((4, 6, 8), 5, 1),
        ((6, 5, 9), (1, 3, 5), 1),
        ((9, 6, 5), (3, 1, 3), (2, 1, 3)),
        ((1, 2, 3), 5, 1),
        ((30, 21, 25), 3, 1),
    ],
)
@pytest.mark.parametrize("innermost", [torch.contiguous_format, torch.channels_last_3d])
def test_values_and_gradients_are_those_of_float64(size, kernel, stride, bias, innermost):
    conv = make(kernel, stride, bias=bias)
    x = torch.randn(2, 6, *size).contiguous(memory_format=innermost).requires_grad_()
    assert depthwise.fits(conv) and depthwise.can_learn(x, conv)
    exact, precise = make(kernel, stride, bias=bias).double(), x.detach().double().requires_grad_()
    y, truth = depthwise.convolve(x, conv), exact(precise)
    pairs = [(y, truth), *zip(gradients(y, x, conv), gradients(truth, precise, exact))]
    for one, other in pairs:
        assert one.shape == other.shape and one.dtype == torch.float32
        assert (one.double() - other).norm().item() <= 2e-6 * other.norm().item()


def test_gradients_do_not_depend_on_threads():
    conv, x = make(3, 1), torch.randn(2, 6, 9, 8, 7, requires_grad=True)
    one = gradients(depthwise.convolve(x, conv), x, conv)
    with mock.patch("torch.get_num_threads", return_value=3):
        several = gradients(depthwise.convolve(x, conv), x, conv)
    assert all(torch.equal(*pair) for pair in zip(one, several))


def test_a_map_that_learns_nothing_gets_no_gradient():
    conv, x = make(3, 1), torch.randn(1, 6, 5, 5, 5)
    with mock.patch.object(depthwise.F, "conv3d", wraps=depthwise.F.conv3d) as called:
        depthwise.convolve(x, conv).sum().backward()
    assert called.call_count == 1, "the way down is not computed"
    assert x.grad is None and conv.weight.grad is not None


def test_other_convolutions_and_maps_are_left_to_pytorch():
    x = torch.randn(1, 6, 5, 5, 5)
    plain = {"kernel_size": 3, "padding": 1, "groups": 6}
    assert depthwise.fits(nn.Conv3d(6, 6, **plain))
    for change in (
        {"groups": 3}, {"kernel_size": 4}, {"padding": 0}, {"dilation": 2, "padding": 2},
        {"padding_mode": "replicate"},
    ):  # fmt: skip
        assert not depthwise.fits(nn.Conv3d(6, 6, **(plain | change))), change
    assert not depthwise.fits(nn.Conv3d(6, 12, **plain))
    conv = DepthwiseConv(6)
    assert depthwise.can_learn(x, conv)
    assert not depthwise.can_learn(x.bfloat16(), conv)
    assert not depthwise.can_learn(x.to("meta"), conv)
    with torch.no_grad():
        assert not depthwise.can_learn(x, conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert not depthwise.can_learn(x, conv)
        assert conv(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["segformer", "mednext"])
def test_networks_with_such_convolutions_learn_as_before(name: str):
    """The same weights by name, and the same gradients within rounding."""
    if name == "mednext":
        pytest.importorskip("monai", reason="needs MONAI: pip install medseg[monai]")
    network = build_network(name, 1, 2, **small(name, (16, 16, 16))).train()
    assert any(isinstance(module, DepthwiseConv) for module in network.modules())
    x = torch.randn(1, 1, 16, 16, 16)

    def learnt() -> dict[str, Tensor]:
        network.zero_grad()
        y = network(x)
        outputs = y if isinstance(y, list) else [y]
        torch.stack([one.square().mean() for one in outputs]).sum().backward()
        return {
            key: weight.grad.clone()
            for key, weight in network.named_parameters()
            if weight.grad is not None
        }

    ours = learnt()
    with mock.patch.object(depthwise, "can_learn", return_value=False):
        theirs = learnt()
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, gradient in theirs.items():
        assert torch.allclose(ours[key], gradient, rtol=1e-3, atol=1e-5), key
