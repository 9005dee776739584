"""Norm and leaky ReLU on a card, by Triton's interpreter on this CPU, against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from medseg.errors import DataWarning
from medseg.networks import layers, ops
from medseg.networks.layers import Block, conv, has_depthwise
from medseg.networks.ops import card_norm
from medseg.networks.zoo import build_network, small

pytestmark = pytest.mark.usefixtures("one_thread")

#: Run with TRITON_INTERPRET=1, which has to be said before Triton is imported.
AGAINST_FLOAT64 = """
from contextlib import nullcontext
import torch
from torch.nn import functional as F
from medseg.networks.ops import card_norm

card_norm._TOGETHER, card_norm._CHANNELS, card_norm._RUN = 64, 8, 50
card_norm.is_card = lambda device: True
torch.cuda.device = nullcontext
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

def compared(batch, channels, size, dtype, slope, offset):
    random = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, *size, generator=random) + offset
    weight, bias, down = (torch.randn(n, generator=random) for n in (channels, channels, x.numel()))
    x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    down = down.view(x.shape).to(dtype)
    exact = [one.double().requires_grad_() for one in (x, weight, bias)]
    y = F.leaky_relu(F.group_norm(exact[0], channels, *exact[1:]), slope)
    y.backward(down.double())
    ours = [one.clone().requires_grad_() for one in (x, weight, bias)]
    norm = torch.nn.GroupNorm(channels, channels)
    norm.weight, norm.bias = (torch.nn.Parameter(one.detach()) for one in ours[1:])
    assert card_norm.can_fuse(ours[0], norm), (channels, size)
    found = card_norm.norm_activate(ours[0], norm, slope)
    found.backward(down)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)
    ours[1].grad, ours[2].grad = norm.weight.grad, norm.bias.grad
    pairs = [(found, y), *((a.grad, b.grad) for a, b in zip(ours, exact))]
    errors = [float((a.detach().double() - b).norm() / b.detach().norm()) for a, b in pairs]
    # The offset costs a value of float32 its last digits before any norm sees it.
    assert max(errors) < LIMITS[dtype] * (1 + 10 * abs(offset)), (dtype, channels, errors)

for dtype in LIMITS:
    compared(2, 6, (5, 4, 7), dtype, 0.01, 0)
compared(1, 20, (3, 8, 5), torch.float32, 1.0, 0)
compared(3, 1, (4, 4, 4), torch.float32, 0.2, 0)
compared(1, 8, (7, 5, 3), torch.float32, 0.01, 100)
compared(1, 3, (1, 2, 3), torch.float32, 0.01, 0)
twice = []
for _ in range(2):
    x = torch.randn(2, 16, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last_3d)
    twice.append(card_norm.norm_activate(x, torch.nn.GroupNorm(16, 16)))
assert torch.equal(*twice)
print("right")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton)",
)
def test_value_and_gradients_are_those_of_float64():
    """Of any size, kind and number of channels; with an offset a hundred times the spread, too."""
    ran = subprocess.run(
        [sys.executable, "-c", AGAINST_FLOAT64],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == "right"


def test_without_triton_and_where_its_kernels_are_wrong_pytorch_s_norm_goes_on():
    card_norm.works_on.cache_clear()
    card = torch.device("cuda")
    with mock.patch.dict(sys.modules, {"triton": None}):
        assert not card_norm.works_on(card)
    card_norm.works_on.cache_clear()
    with mock.patch.dict(sys.modules, {"triton": SimpleNamespace(__version__="0.0")}):
        for broken, why in (
            (mock.Mock(return_value=0.5), "its kernels compute wrongly"),
            (mock.Mock(side_effect=RuntimeError("Failed to find C compiler")), "C compiler"),
        ):
            with (
                mock.patch.object(card_norm, "_difference_on", broken),
                pytest.warns(DataWarning, match=why),
            ):
                assert not card_norm.works_on(card)
            card_norm.works_on.cache_clear()
        with mock.patch.object(card_norm, "_difference_on", return_value=1e-6):
            assert card_norm.works_on(card)
    card_norm.works_on.cache_clear()


def test_kernels_run_on_the_card_on_which_their_maps_lie(monkeypatch: pytest.MonkeyPatch):
    """Triton launches on the current card, on which memory of another one is none."""
    cards, launches = ["the current one"], []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        cards.append(str(device))
        yield
        cards.pop()

    def launched(*arguments: object, **options: object) -> None:
        launches.append(cards[-1])

    names = ("measure", "settle", "measure_slopes", "settle_slopes")
    kernels = SimpleNamespace(**dict.fromkeys(names, launched))
    monkeypatch.setitem(sys.modules, "medseg.networks.ops.card_kernels", kernels)
    monkeypatch.setattr(ops, "card_kernels", kernels, raising=False)
    monkeypatch.setattr(card_norm, "is_card", lambda device: device.type == "meta")
    monkeypatch.setattr(torch.cuda, "device", current)
    x = torch.empty(1, 4, 3, 3, 3, device="meta", requires_grad=True)
    weight = torch.empty(4, device="meta")
    last = x.contiguous(memory_format=torch.channels_last_3d)
    card_norm._NormActivate.apply(last, weight, weight, 1e-5, 0.01).sum().backward()
    assert launches == ["meta"] * 4


@pytest.mark.parametrize("name", ["unet", "resenc_unet", "nnunet", "deeplab", "fcn"])
def test_on_a_card_every_norm_of_a_network_goes_that_way(name: str):
    """In which layout and arithmetic maps come to it only a card can show: part 7 of the check."""
    torch.manual_seed(0)
    network = build_network(name, 1, 3, **small(name, (32, 32, 32))).eval()
    x, seen = torch.rand(1, 1, 32, 32, 32), []

    def norm_activate(y: torch.Tensor, norm: nn.GroupNorm, slope: float = 1.0) -> torch.Tensor:
        seen.append(norm)
        return nn.functional.leaky_relu(nn.GroupNorm.forward(norm, y), slope)

    with (
        torch.inference_mode(),
        mock.patch.object(layers.cpu_norm, "can_fuse", return_value=False),
        mock.patch.object(card_norm, "can_fuse", lambda x, norm: isinstance(norm, nn.GroupNorm)),
        mock.patch.object(card_norm, "norm_activate", norm_activate),
    ):
        found = network(x)
    norms = [one for one in network.modules() if isinstance(one, nn.GroupNorm)]
    assert set(seen) == set(norms) != set()
    assert torch.allclose(found, network(x).detach(), atol=1e-3)


def test_what_the_kernels_cannot_take_is_left_to_pytorch():
    norm, last = nn.GroupNorm(4, 4), torch.channels_last_3d
    x = torch.rand(2, 4, 3, 3, 3).contiguous(memory_format=last)
    with mock.patch.object(card_norm, "works_on", return_value=True):
        assert not card_norm.can_fuse(x, norm), "a CPU"
        with mock.patch.object(card_norm, "is_card", return_value=True):
            assert card_norm.can_fuse(x, norm)
            assert not card_norm.can_fuse(x.contiguous(), norm)
            assert not card_norm.can_fuse(x.double(), norm)
            assert not card_norm.can_fuse(x, nn.GroupNorm(2, 4))
            assert not card_norm.can_fuse(x, nn.GroupNorm(4, 4, affine=False))


def test_depthwise_convolutions_are_found():
    """They keep channels first on a card; all others have them last."""
    assert not has_depthwise(conv(4, 8))
    assert has_depthwise(Block(nn.Conv3d(4, 4, 3, groups=4), nn.Identity(), nn.Identity()))
    kinds = {name: has_depthwise(build_network(name, 1, 3)) for name in ("unet", "segformer")}
    assert kinds == {"unet": False, "segformer": True}
