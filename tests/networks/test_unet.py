"""Every architecture: shapes, gradients, and that its parts are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.errors import BadModel
from medseg.networks.layers import InstanceNorm, unfold_cells
from medseg.networks.unet import UNet
from medseg.networks.zoo import NETWORKS, build_network, check_patch
from medseg.training.losses import deep_supervision

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "plain": {},
    "residual": {"residual": True},
    "stem 2": {"stem": 2},
    "residual, stem 2": {"residual": True, "stem": 2},
    "deep supervision": {"deep_supervision": True},
    "deep supervision, stem 2": {"deep_supervision": True, "stem": 2},
    "blocks": {"encoder_blocks": [1, 2, 3], "decoder_blocks": [2, 1], "residual": True},
}
FEATURES = [4, 6, 8]


def network_of(variant: str, classes: int = 3, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return build_network("unet", channels, classes, features=FEATURES, **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 1, (16, 8, 24)), (2, 3, (8, 8, 8))])
def test_logits_have_one_channel_a_class_and_the_size_of_the_patch(variant, batch, channels, size):
    network = network_of(variant, classes=5, channels=channels).eval()
    with torch.inference_mode():
        assert network(torch.randn(batch, channels, *size)).shape == (batch, 5, *size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_finite_and_gets_a_gradient(variant: str):
    network = network_of(variant).train()
    torch.manual_seed(1)
    outputs = network(torch.randn(2, 1, 16, 16, 16))
    deep_supervision(outputs, torch.randint(3, (2, 16, 16, 16))).backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_on_one_image_lower_the_loss(variant: str):
    network = network_of(variant).train()
    torch.manual_seed(2)
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.int64)
    labels[:, 4:12, 4:12, 4:12], labels[:, 6:10, 6:10, 6:10] = 1, 2
    image = labels[:, None].float() + 0.1 * torch.randn(1, 1, 16, 16, 16)
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    before = None
    for _ in range(4):
        loss = deep_supervision(network(image), labels)
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(deep_supervision(network(image), labels)) < before


@pytest.mark.parametrize(("stem", "sizes"), [(1, [16, 8]), (2, [16, 8, 4])])
def test_deep_supervision_gives_a_list_of_halving_logits_in_training_only(
    stem: int, sizes: list[int]
):
    network = UNet(1, 3, features=FEATURES, deep_supervision=True, stem=stem)
    outputs = network.train()(torch.randn(1, 1, 16, 16, 16))
    assert [tuple(y.shape) for y in outputs] == [(1, 3, n, n, n) for n in sizes]
    assert network.eval()(torch.randn(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_the_weights_of_deep_heads_are_not_needed_without_deep_supervision():
    trained = UNet(1, 3, features=FEATURES, deep_supervision=True, stem=2)
    state = {
        key: value
        for key, value in trained.state_dict().items()
        if not key.startswith("deep_heads.")
    }
    plain = UNet(1, 3, features=FEATURES, stem=2)
    plain.load_state_dict(state)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(image), trained.eval()(image))


@pytest.mark.parametrize("variant", ["plain", "stem 2"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_patch_that_cannot_be_halved_as_often_as_needed_is_refused(variant: str, axis: int):
    network = network_of(variant)
    multiple = 4 * VARIANTS[variant].get("stem", 1)
    assert network.multiple == multiple
    size = [multiple] * 3
    size[axis] += multiple // 2
    with pytest.raises(ValueError, match=f"multiple of {multiple}"):
        network(torch.randn(1, 1, *size))


def test_unfold_cells_puts_each_channel_of_a_cell_at_its_voxel():
    b, k, s, d, h, w = 2, 3, 2, 2, 3, 4
    x = torch.randn(b, k * s**3, d, h, w)
    expected = torch.empty(b, k, d * s, h * s, w * s)
    for n, c, i, j, m in np.ndindex(*expected.shape):
        channel = c * s**3 + (i % s) * s**2 + (j % s) * s + m % s
        expected[n, c, i, j, m] = x[n, channel, i // s, j // s, m // s]
    assert torch.equal(unfold_cells(x, s), expected)
    assert unfold_cells(x, 1) is x


def test_instance_norm_equals_torchs():
    ours, reference = InstanceNorm(5), nn.InstanceNorm3d(5, affine=True)
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            values = torch.randn(5)
            getattr(ours, parameter).copy_(values)
            getattr(reference, parameter).copy_(values)
    x = torch.randn(3, 5, 4, 6, 8) * 7 + 100
    y = x.clone()
    x.requires_grad_()
    y.requires_grad_()
    weight = torch.randn(3, 5, 4, 6, 8)
    (ours(x) * weight).sum().backward()
    (reference(y) * weight).sum().backward()
    assert torch.allclose(ours(x), reference(y), rtol=0, atol=1e-4)
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_weights():
    one, two = network_of("residual").state_dict(), network_of("residual").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(BadModel, match=r"'vnet'.*" + sorted(NETWORKS)[0]):
        build_network("vnet", 1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 3},
        {"features": "many"},
        {"features": []},
        {"features": [4, -8]},
        {"features": [4, 2.5]},
        {"features": None},
        {"features": [4] * 11},
        {"features": [4, 10**9]},
        {"encoder_blocks": [1, 1, 1, 10**9]},
        {"channels": 2},
        {"name": "x"},
        {"stem": 3},
        {"stem": "2"},
        {"encoder_blocks": [1]},
        {"decoder_blocks": [1, 1, 1, 1]},
        {"features": [10**30, 10**30]},
    ],
)
def test_options_that_make_no_network_are_refused(options: dict):
    with torch.device("meta"), pytest.raises(BadModel, match="unet"):
        build_network("unet", 1, 2, **options)


@pytest.mark.parametrize(
    ("stem", "patch", "fits"),
    [
        (1, (8, 8, 8), True),
        (1, (4, 4, 8), True),
        (1, (4, 4, 4), False),  # one voxel at the coarsest level cannot be normalised
        (1, (8, 8, 10), False),
        (2, (8, 16, 8), True),
        (2, (8, 12, 8), False),
        (2, (0, 16, 8), False),
        (2, (-8, 16, 8), False),
    ],
)
def test_check_patch_agrees_with_what_the_network_can_take(stem: int, patch: tuple, fits: bool):
    network = UNet(1, 2, features=FEATURES, stem=stem).eval()
    if fits:
        check_patch(network, patch)
        with torch.inference_mode():
            assert network(torch.randn(1, 1, *patch)).shape == (1, 2, *patch)
    else:
        with pytest.raises(BadModel, match="patch"):
            check_patch(network, patch)
        with torch.inference_mode(), pytest.raises((ValueError, RuntimeError)):
            network(torch.randn(1, 1, *patch))
