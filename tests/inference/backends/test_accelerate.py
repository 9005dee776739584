"""Accelerated networks against the same networks in float64."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from medseg.inference.backends import accelerate as fast_conv
from medseg.inference.backends.accelerate import Deferred, FastConv, FastUp, accelerate
from medseg.networks.layers import InstanceNorm
from medseg.networks.unet import UNet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def always(monkeypatch):
    """Winograd for maps of every size, so that small tests reach it."""
    monkeypatch.setattr(fast_conv, "_SHORTEST", 1)


def error(network: nn.Module, fast: nn.Module, x: torch.Tensor) -> float:
    """The greatest difference from the network in float64, in standard deviations of its output."""
    reference = copy.deepcopy(network).double()(x.double())
    return float((fast(x).double() - reference).abs().max() / reference.std())


def is_fast(network: nn.Module) -> list[FastConv]:
    return [module for module in network.modules() if isinstance(module, FastConv)]


NORMS = {
    "none": lambda channels: [],
    "group": lambda channels: [InstanceNorm(channels)],
    "instance": lambda channels: [nn.InstanceNorm3d(channels, affine=True)],
    "plain": lambda channels: [nn.InstanceNorm3d(channels)],
}
ACTIVATIONS = {"none": [], "relu": [nn.ReLU()], "leaky": [nn.LeakyReLU(0.01, inplace=True)]}


@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 11)] * 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    norm=st.sampled_from(sorted(NORMS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_one_convolution_of_any_size(shape, blocks, norm, activation, bias):
    batch, *size = shape
    # A norm of a few voxels magnifies any rounding.
    if norm != "none" and min(size) * max(size) < 4:
        size = [length + 3 for length in size]
    channels, features = (16 * n for n in blocks)
    conv = nn.Conv3d(channels, features, 3, 1, 1, bias=bias)
    network = nn.Sequential(conv, *NORMS[norm](features), *ACTIVATIONS[activation])
    x = torch.randn(batch, channels, *size) + 1
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_conv, "_SHORTEST", 1)
        fast = accelerate(network)
        assert len(is_fast(fast)) == 1
        assert error(network, fast, x) < 1e-4


@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 30)] * 3),
    channels=st.integers(1, 4),
    blocks=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    last=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_convolution_of_few_channels_of_any_size(shape, channels, blocks, activation, bias, last):
    batch, *size = shape
    size = [*size[:2], size[2] + 3]  # a norm of a few voxels magnifies any rounding
    features = 16 * blocks
    conv = nn.Conv3d(channels, features, 3, 1, 1, bias=bias)
    network = nn.Sequential(conv, InstanceNorm(features), *ACTIVATIONS[activation])
    x = torch.randn(batch, channels, *size) + 1
    with torch.inference_mode():
        fast = accelerate(network)
        y = fast(x.contiguous(memory_format=torch.channels_last_3d) if last else x)
        assert isinstance(y, Deferred)
        y = y + 0
        reference = copy.deepcopy(network).double()(x.double())
    assert (y - reference).abs().max() < 1e-4 * max(1, reference.std())


@given(
    shape=st.tuples(st.integers(1, 3), *[st.integers(1, 9)] * 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    before=st.sampled_from(["nothing", "a norm", "two maps"]),
)
@settings(max_examples=40, deadline=None)
def test_a_transposed_convolution_of_any_size(shape, blocks, bias, before):
    batch, *size = shape
    size[2] += 3  # a norm of a few voxels magnifies any rounding
    channels, features = (16 * n for n in blocks)
    up = nn.ConvTranspose3d(
        2 * channels if before == "two maps" else channels, features, 2, 2, bias=bias
    )
    norm = nn.Sequential(
        nn.Conv3d(channels, channels, 3, 1, 1), InstanceNorm(channels), nn.LeakyReLU(0.1)
    )
    network = nn.ModuleList([norm, up])
    x = torch.randn(batch, channels, *size)

    def run(network, x):
        y = x if before == "nothing" else network[0](x)
        return network[1](torch.cat((y, x), 1) if before == "two maps" else y)

    with torch.inference_mode():
        fast = accelerate(network)
        assert isinstance(fast[1], FastUp)
        y, reference = run(fast, x), run(copy.deepcopy(network).double(), x.double())
    assert y.shape == reference.shape
    assert (y - reference).abs().max() < 1e-4 * reference.std()


def test_a_norm_with_weights_and_a_mean_far_from_zero(always):
    network = nn.Sequential(nn.Conv3d(16, 32, 3, 1, 1), InstanceNorm(32), nn.LeakyReLU(0.2))
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    nn.init.constant_(network[0].bias, 100.0)
    assert error(network, accelerate(network), torch.randn(2, 16, 9, 12, 10)) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "channels"), [({}, 1), ({"residual": True}, 2), ({"stem": 2}, 1)]
)
def test_networks(arguments, channels, always):
    network = UNet(channels, 5, features=(16, 32, 48), **arguments).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    before = copy.deepcopy(network.state_dict())
    fast = accelerate(network)
    assert is_fast(fast) and not is_fast(network)
    x = torch.randn(2, channels, 16, 24, 32)
    assert error(network, fast, x) < 1e-4
    assert error(network, fast, x) < 1e-4  # nothing of the first run stays behind
    assert type(fast(x)) is torch.Tensor
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_result_does_not_depend_on_the_number_of_threads(always):
    fast = accelerate(UNet(1, 3, features=(16, 32)).eval())
    x = torch.randn(1, 1, 24, 24, 40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fast(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_does_not_match_is_left_alone():
    network = nn.Sequential(
        nn.Conv3d(16, 16, 3, 1, 1, groups=2),
        nn.Conv3d(16, 16, 3, 1, 1, padding_mode="circular"),
        nn.Conv3d(16, 20, 3, 1, 1),
        nn.BatchNorm3d(20),
        nn.GELU(),
        nn.Conv3d(20, 5, 1),
    ).eval()
    fast = accelerate(network)
    assert not is_fast(fast)
    x = torch.randn(1, 16, 6, 6, 6)
    assert torch.equal(fast(x), network(x))


def test_norms_over_several_channels_or_with_running_statistics_stay():
    for norm in (nn.GroupNorm(4, 16), nn.InstanceNorm3d(16, track_running_stats=True)):
        network = nn.Sequential(nn.Conv3d(16, 16, 3, 1, 1), norm, nn.ReLU()).eval()
        fast = accelerate(network)
        assert type(fast[1]) is type(norm)
        assert error(network, fast, torch.randn(1, 16, 8, 8, 8)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_the_original_modules(dtype):
    network = nn.Sequential(nn.Conv3d(16, 16, 3, 1, 1), InstanceNorm(16), nn.LeakyReLU(0.01)).to(
        dtype
    )
    x = torch.randn(1, 16, 12, 12, 12).to(dtype)
    assert torch.equal(accelerate(network)(x), network(x))


@pytest.mark.parametrize("features", [(16, 32), (16, 32, 48)])
def test_a_network_in_bfloat16_is_as_close_as_pytorch_s_own(features):
    network = UNet(1, 5, features=features).eval()
    x = torch.randn(2, 1, 16, 24, 16)
    fast = accelerate(network)

    def halved(network: nn.Module) -> nn.Module:
        class Halved(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return network(x)

        return Halved()

    reference = copy.deepcopy(network).double()(x.double())
    errors = [
        (halved(one)(x).double() - reference).square().mean().sqrt() for one in (network, fast)
    ]
    assert 0 < float(errors[1]) < 1.5 * float(errors[0])
    assert float(errors[1]) < 0.05 * float(reference.std())
    assert torch.equal(halved(fast)(x), halved(fast)(x))
    assert error(network, fast, x) < 1e-4  # and in float32, when autocast is off


@pytest.mark.parametrize("norm", [True, False])
def test_joined_maps_in_bfloat16_are_convolved_one_by_one(norm):
    """Close to float64, and no further from it than the convolution of the joined map."""
    conv = nn.Sequential(
        nn.Conv3d(48, 32, 3, 1, 1), *([InstanceNorm(32), nn.LeakyReLU(0.01)] if norm else [])
    )
    fast = accelerate(conv)
    a, b = (torch.randn(2, channels, 6, 7, 5).bfloat16() for channels in (16, 32))
    before = [Deferred(fast_conv.sources_of(x)) for x in (a, b)]
    joined = torch.cat(before, 1)
    assert isinstance(joined, Deferred) and len(joined.sources) == 2
    reference = copy.deepcopy(conv).double()(torch.cat((a, b), 1).double())
    with torch.autocast("cpu", torch.bfloat16):
        split, whole = fast(joined) + 0, fast(torch.cat((a, b), 1)) + 0
    errors = [float((x.double() - reference).square().mean().sqrt()) for x in (split, whole)]
    assert 0 < errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.01 * float(reference.std())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolution_of_few_channels_in_bfloat16(channels):
    conv = nn.Sequential(nn.Conv3d(channels, 32, 3, 1, 1), InstanceNorm(32), nn.LeakyReLU(0.01))
    x = torch.randn(2, channels, 9, 8, 14) + 3
    reference = copy.deepcopy(conv).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = accelerate(conv)(x) + 0
    assert y.dtype == torch.bfloat16
    assert float((y.double() - reference).square().mean().sqrt()) < 0.005 * float(reference.std())


def test_joining_maps_does_not_import_what_it_does_not_need():
    """PyTorch imports its distributed tensors, half a second, on the way to a
    `__torch_dispatch__`.
    """
    code = (
        "import sys, torch\n"
        "from medseg.inference.backends.accelerate import accelerate\n"
        "from medseg.networks.unet import UNet\n"
        "with torch.inference_mode():\n"
        "    accelerate(UNet(1, 2, features=(16, 16)).eval())(torch.zeros(1, 1, 16, 16, 16))\n"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_other_transposed_convolutions_and_a_shared_one():
    shared = nn.ConvTranspose3d(16, 16, 2, 2)
    others = [nn.ConvTranspose3d(16, 16, 2, 2, groups=2), nn.ConvTranspose3d(16, 16, 3, 2, 1, 1)]
    fast = accelerate(nn.Sequential(shared, shared, *others))
    assert isinstance(fast[0], FastUp) and fast[0] is fast[1]
    assert all(type(module) is nn.ConvTranspose3d for module in fast[2:])
    x = torch.randn(1, 16, 2, 2, 2)
    assert torch.allclose(fast(x), nn.Sequential(shared, shared, *others)(x), atol=1e-5)


def test_gradients_still_flow():
    with torch.inference_mode(False), torch.enable_grad():
        network = accelerate(
            nn.Sequential(nn.Conv3d(16, 16, 3, 1, 1), InstanceNorm(16), nn.LeakyReLU(0.01))
        )
        x = torch.randn(1, 16, 5, 5, 5, requires_grad=True)
        network(x).sum().backward()
        assert x.grad is not None


def test_a_deferred_map_may_be_used_twice_and_in_any_operation(always):
    conv = nn.Sequential(nn.Conv3d(16, 16, 3, 1, 1), InstanceNorm(16), nn.LeakyReLU(0.01))
    x = torch.randn(1, 16, 9, 9, 9)
    y = accelerate(conv)(x)
    assert isinstance(y, Deferred) and y.shape == (1, 16, 9, 9, 9)
    expected = conv(x)
    joined = torch.cat((x, y), 1)
    assert isinstance(joined, Deferred)
    for result, wanted in (
        (y + 1, expected + 1),
        (2 * y, 2 * expected),
        (joined + 0, torch.cat((x, expected), 1)),
    ):
        assert torch.allclose(result, wanted, atol=1e-4)
    again = accelerate(nn.Sequential(nn.Conv3d(32, 16, 3, 1, 1)))
    assert torch.allclose(again(joined), again[0].conv(torch.cat((x, expected), 1)), atol=1e-4)


def test_a_not_a_number_is_not_hidden(always):
    network = accelerate(
        nn.Sequential(nn.Conv3d(16, 16, 3, 1, 1), InstanceNorm(16), nn.LeakyReLU(0.01))
    )
    x = torch.randn(1, 16, 8, 8, 8)
    x[0, 3, 4, 4, 4] = float("nan")
    assert (network(x) + 0).isnan().any()


def test_a_module_that_is_used_twice_gets_one_form():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    made = []

    def form_of(module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear:
            return None
        made.append(nn.Identity())
        return made[-1]

    fast = accelerate(Twice(), form_of)
    assert len(made) == 1
    assert fast.one is fast.two is made[0]
