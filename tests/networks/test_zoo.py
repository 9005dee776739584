"""All architectures keep one contract: shapes, gradients, sizes refused, saving, learning, and what
inference makes of them; and the parts of single ones are what they say."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from making import networks as tiny
from making.network_size import parameters_and_flops
from making.places import CONFIGS
from medseg.config import TrainConfig
from medseg.errors import BadModel
from medseg.inference.backends.pytorch import open_torch
from medseg.models.folder import Checkpoint, load_checkpoint, save_checkpoint
from medseg.networks import mask2former as m2f
from medseg.networks.layers import Attention, resize, unfold_cells
from medseg.networks.zoo import (
    DEEP_SUPERVISION,
    NETWORKS,
    TRAINING,
    build_network,
    check_patch,
    patch_multiples,
    small,
)
from medseg.training.losses import deep_supervision

pytestmark = pytest.mark.usefixtures("one_thread")

#: Name -> options of a tiny network of 16 channels, which `accelerate` knows, and the smallest
#: patch that fits.
TINY: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "unet": ({"features": [16, 32, 32]}, (8, 16, 8)),
    "resenc_unet": ({"features": [16, 32], "encoder_blocks": [1, 2]}, (8, 16, 8)),
    "fcn": ({"features": [16, 16, 32], "blocks": [1, 1, 1], "finest": 1}, (8, 16, 8)),
    "deeplab": (
        {"features": [16, 32], "blocks": [1, 1], "rates": [1, 2], "pyramid": 16, "reduced": 16},
        (8, 16, 8),
    ),
    "unetr": (
        {
            "patch": [16, 32, 16],
            "feature_size": 16,
            "hidden_size": 24,
            "mlp_dim": 24,
            "num_heads": 2,
        },
        (16, 32, 16),
    ),
    "swin_unetr": ({"feature_size": 12, "depths": [1, 1, 1, 2], "window_size": 4}, (32, 32, 64)),
    "segformer": (
        {
            "widths": [8, 16],
            "strides": [2, 2],
            "depths": [1, 2],
            "heads": [1, 2],
            "reductions": [2, 1],
            "ratio": 2,
            "decoder": 16,
        },
        (8, 16, 8),
    ),
    "mask2former": (
        {
            "features": [16, 32, 32],
            "width": 24,
            "heads": 2,
            "layers": 3,
            "queries": 6,
            "mask_width": 8,
            "points": 200,
        },
        (8, 16, 8),
    ),
    "primus": (
        {"width": 24, "depth": 2, "heads": 2, "decoder": [16, 16], "token": [8, 8, 8]}
        | {"drop_path": 0.0},
        (8, 16, 8),
    ),
    "nnunet": (
        {
            "features": [16, 32],
            "kernels": [[3, 3, 3], [1, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "encoder_blocks": [1, 2],
            "decoder_blocks": [1],
            "residual": True,
            "bias": False,
        },
        (8, 16, 8),
    ),
    "segresnet": ({"init_filters": 16, "blocks_down": [1, 1, 1]}, (8, 16, 8)),
    "mednext": (
        {"init_filters": 16, "blocks_down": [1, 1], "blocks_up": [1, 1], "blocks_bottleneck": 1},
        (8, 16, 8),
    ),
}
MONAI = {"unetr", "swin_unetr", "segresnet", "mednext"}


def _each(names: Any) -> list[Any]:
    missing = pytest.mark.skipif(find_spec("monai") is None, reason="MONAI is not installed")
    return [pytest.param(name, marks=missing if name in MONAI else ()) for name in sorted(names)]


every = pytest.mark.parametrize("name", _each(NETWORKS))


def network_of(name: str, channels: int = 1, classes: int = 3, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, channels, classes, **(TINY[name][0] | more))


def sample_of(name: str, batch: int = 2, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise around two boxes, and their labels."""
    size = TINY[name][1]
    labels = torch.zeros(batch, *size, dtype=torch.int64)
    labels[:, : size[0] // 2, : size[1] // 2, 2:-2] = 1
    labels[:, size[0] // 2 :, size[1] // 2 :, 2:-2] = 2
    noise = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))
    return labels[:, None].float() + 0.3 * noise, labels


def loss_of(network: nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    outputs = network(image)
    return (
        network.loss(outputs, labels)
        if hasattr(network, "loss")
        else deep_supervision(outputs, labels)
    )


def saved(name: str, network: nn.Module, folder: Path) -> Checkpoint:
    options, patch = TINY[name]
    spec = {
        "name": "tiny",
        "architecture": name,
        "options": options,
        "classes": tiny.CLASSES,
        "patch": patch,
    }
    save_checkpoint(folder, spec | {"spacing_mm": 1.0}, network.state_dict(), tiny.TABLE)
    return load_checkpoint(str(folder))


def test_every_architecture_is_tested_and_has_its_training():
    assert NETWORKS.keys() == TINY.keys() == TRAINING.keys()
    for values in TRAINING.values():
        assert values.keys() >= {"optimizer", "learning_rate", "weight_decay", "warmup"}
        TrainConfig(**values)


@every
def test_logits_have_one_channel_a_class_and_the_size_of_the_patch(name: str):
    network, (image, _) = network_of(name, 2, 5).eval(), sample_of(name, 1, 2)
    with torch.inference_mode():
        assert network(image).shape == (1, 5, *image.shape[2:])


@every
def test_a_sample_s_logits_depend_on_no_neighbour_and_on_no_chance(name: str):
    network, (image, _) = network_of(name).eval(), sample_of(name)
    with torch.inference_mode():
        together = network(image)
        alone = network(image[1:])
        assert torch.equal(together, network(image))
    assert float((together[1:] - alone).abs().max()) <= 1e-4 * float(alone.std())


@every
def test_every_parameter_gets_a_finite_gradient(name: str):
    deep = {"deep_supervision": True} if name in DEEP_SUPERVISION else {}
    network, (image, labels) = network_of(name, **deep).train(), sample_of(name)
    loss_of(network, image, labels).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert float(parameter.grad.abs().sum()) > 0, key


@every
def test_a_few_steps_on_one_batch_lower_the_loss(name: str):
    network, (image, labels) = network_of(name).train(), sample_of(name)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(network, image, labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", _each(DEEP_SUPERVISION - {"mask2former"}))
def test_deep_supervision_gives_a_list_finest_first_in_training_only(name: str):
    network, (image, labels) = network_of(name, deep_supervision=True), sample_of(name)
    outputs = network.train()(image)
    sizes = [y.shape[2:].numel() for y in outputs]
    # Two levels of a U-Net leave nothing coarser.
    assert len(sizes) > 1 or len(TINY[name][0]["features"]) == 2
    assert sizes[0] == labels[0].numel()
    assert sizes == sorted(sizes, reverse=True)
    assert all(
        full % part == 0 for y in outputs for full, part in zip(labels.shape[1:], y.shape[2:])
    )
    assert isinstance(network.eval()(image), Tensor)


@pytest.mark.parametrize("name", _each(DEEP_SUPERVISION))
def test_the_weights_of_deep_heads_are_not_needed_in_inference(name: str):
    trained, (image, _) = network_of(name, deep_supervision=True).eval(), sample_of(name, 1)
    plain = network_of(name).eval()
    plain.load_state_dict(
        {k: v for k, v in trained.state_dict().items() if not k.startswith("deep_heads.")}
    )
    with torch.inference_mode():
        assert torch.equal(plain(image), trained(image))


@every
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sizes_that_do_not_fit_are_refused_clearly(name: str, axis: int):
    network, size = network_of(name), list(TINY[name][1])
    check_patch(network, size)
    multiples = patch_multiples(network)
    assert all(each == multiples[0] > 1 for each in multiples)
    size[axis] += multiples[axis] // 2
    with pytest.raises(BadModel, match=r"patch of .* does not fit"):
        check_patch(network, size)
    with pytest.raises(ValueError, match=rf"patch of .* not a multiple of {multiples[0]}"):
        network(torch.zeros(1, 1, *size))


@every
def test_parameters_and_multiply_adds_are_counted_without_computing(name: str):
    network, size = network_of(name), TINY[name][1]
    parameters, flops = parameters_and_flops(network, size)
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    longer = (size[0], 2 * size[1], size[2])
    with torch.device("meta"):
        twice = network_of(name, **({"patch": list(longer)} if name == "unetr" else {}))
    assert 1.8 * flops < parameters_and_flops(twice, longer)[1] < 4 * flops
    assert network.training


def test_multiply_adds_are_those_of_the_convolutions():
    network, size = network_of("unet").eval(), TINY["unet"][1]
    flops = parameters_and_flops(network, size)[1]
    counted = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        voxels = (
            inputs[0][0, 0].numel()
            if isinstance(layer, nn.ConvTranspose3d)
            else output[0, 0].numel()
        )
        counted.append(voxels * layer.weight.numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 1, *size))
    assert flops == sum(counted)


@every
def test_saving_and_loading_keeps_the_weights_in_half_precision(name: str, tmp_path: Path):
    network, (image, _) = network_of(name).eval(), sample_of(name, 1)
    loaded = saved(name, network, tmp_path).network()
    network.load_state_dict(
        {key: value.half().float() for key, value in network.state_dict().items()}
    )
    with torch.inference_mode():
        assert torch.equal(loaded(image), network(image))


@every
def test_inference_gives_the_network_s_logits(name: str, tmp_path: Path):
    checkpoint, (image, _) = saved(name, network_of(name), tmp_path), sample_of(name)
    with torch.inference_mode():
        expected = checkpoint.network()(image)
    for exact in (True, False):
        predictor = open_torch(checkpoint, torch.device("cpu"), torch.float32, exact=exact)
        logits = predictor(image).float()
        if predictor.head:
            weight, bias = (
                torch.from_numpy(predictor.head.weights),
                torch.from_numpy(predictor.head.bias),
            )
            logits = torch.einsum("kf,bfxyz->bkxyz", weight, logits) + bias[:, None, None, None]
            logits = unfold_cells(logits, predictor.cell)
        assert float((logits - expected).abs().max()) < 2e-3 * float(expected.std())


@pytest.mark.parametrize("name", sorted(MONAI))
def test_without_monai_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(BadModel, match=rf'{name}.*pip install "medseg\[monai\]"'):
        network_of(name)


@every
def test_options_that_make_no_network_are_refused(name: str):
    options = TINY[name][0]
    numbers = [key for key, value in options.items() if type(value) is int]
    lists = [key for key, value in options.items() if type(value) is list]
    wrong = [{"surely_not": 1}]
    wrong += [{key: value} for key in numbers for value in (-3, 10**9, "many", 2.5)]
    wrong += [
        {key: value} for key in lists for value in ([0, 0, 0], [10**9] * len(options[key]), "many")
    ]
    for change in wrong:
        with pytest.raises(BadModel, match=name):
            network_of(name, **change)


@every
@pytest.mark.parametrize("patch", [(64, 64, 64), (40, 56, 40), (4, 64, 64)])
def test_small_networks_fit_their_patch(name: str, patch: tuple[int, int, int]):
    if patch != (64, 64, 64) and name in ("unetr", "swin_unetr"):
        patch = {"unetr": (48, 64, 48), "swin_unetr": (32, 64, 32)}[name]
    with torch.device("meta"):
        network = build_network(name, 1, 3, **small(name, patch))
    check_patch(network, patch)
    assert parameters_and_flops(network, patch)[0] < 7e6
    if min(patch) > 16:
        assert parameters_and_flops(network, patch)[0] > 5e5


@every
def test_each_architecture_has_a_config_that_builds(name: str):
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert content.keys() == {"model", "train"}
    assert content["train"] == TRAINING[name]
    assert content["model"].keys() == {"name", "options"}
    with torch.device("meta"):
        network = build_network(content["model"]["name"], 1, 3, **content["model"]["options"])
        assert content["model"]["name"] == name
    assert parameters_and_flops(network, (96, 96, 96))[0] > 1e6


def test_resize_is_trilinear_interpolation():
    x = torch.randn(2, 3, 5, 6, 7)
    for size in ((10, 6, 21), (3, 9, 7), (5, 6, 7)):
        expected = F.interpolate(x, size, mode="trilinear", align_corners=False)
        assert torch.allclose(resize(x, size), expected, rtol=0, atol=1e-5)


def test_attention_is_torch_s_and_does_not_see_what_is_not_allowed():
    torch.manual_seed(0)
    attention, reference = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    own = attention.state_dict()
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat([own[f"{part}.weight"] for part in ("query", "key", "value")])
        )
        reference.in_proj_bias.copy_(
            torch.cat([own["query.bias"], torch.zeros(12), own["value.bias"]])
        )
        reference.out_proj.load_state_dict({"weight": own["out.weight"], "bias": own["out.bias"]})
    x, to = torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    allowed = torch.ones(2, 4, 5, dtype=torch.bool)
    allowed[:, :, 3:] = False
    assert torch.allclose(attention(x, to), reference(x, to, to)[0], atol=1e-5)
    assert torch.allclose(attention(x, to, allowed), attention(x, to[:, :3]), atol=1e-5)


def test_the_sum_of_an_fcn_s_scores_begins_as_interpolation():
    network = network_of("fcn", classes=2)
    score = torch.randn(1, 2, 6, 6, 6)
    # At the border a transposed convolution adds zeros.
    inside = (
        slice(None),
        slice(None),
        *[slice(2, -2)] * 3,
    )
    assert torch.allclose(
        network.up[0](score)[inside], resize(score, (12, 12, 12))[inside], atol=1e-5
    )


THICK = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernels": [[1, 3, 3], [1, 3, 3], [3, 3, 3]]}


@pytest.mark.parametrize("name", ["unet", "resenc_unet"])
def test_strides_and_kernels_serve_thick_slices(name: str):
    options = {"features": [4, 6, 8], "deep_supervision": True, **THICK}
    network = build_network(name, 1, 3, **options)
    assert patch_multiples(network) == network.multiple == (2, 4, 4)
    image = torch.randn(1, 1, 6, 16, 20)
    assert [tuple(y.shape[2:]) for y in network.train()(image)] == [(6, 16, 20), (6, 8, 10)]
    kernels = {
        tuple(layer.kernel_size)
        for layer in network.encoder[1].modules()
        if isinstance(layer, nn.Conv3d)
    }
    assert kernels - {(1, 2, 2), (1, 1, 1)} == {(1, 3, 3)}
    check_patch(network, (2, 8, 4))
    for patch in ((2, 4, 4), (3, 8, 8), (4, 6, 8)):
        with pytest.raises(BadModel, match="multiples of 2 x 4 x 4"):
            check_patch(network, patch)
    with pytest.raises(ValueError, match="not a multiple of 2 x 4 x 4"):
        network(torch.zeros(1, 1, 3, 8, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"strides": [[1, 1, 1], [2, 2, 2]]},
        {"strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2]]},
        {"strides": [[1, 1, 1], [1, 2], [2, 2, 2]]},
        {"strides": [[1, 1, 1], [3, 2, 2], [2, 2, 2]]},
        {"strides": [1, 2, 2]},
        {"kernels": [[2, 3, 3], [3, 3, 3], [3, 3, 3]]},
        # Halves an axis that it does not look along.
        {"kernels": [[3, 3, 3], [1, 3, 3], [3, 3, 3]]},
    ],
)
def test_strides_and_kernels_that_make_no_network_are_refused(options: dict[str, Any]):
    with pytest.raises(BadModel, match="unet"):
        build_network("unet", 1, 2, features=[4, 6, 8], **options)


def said_of(labels: Tensor, kinds: list[int], numbers: list[int], classes: int = 3) -> m2f.Masks:
    """What a network would say that is sure of `numbers` in a map: query n has mask `labels ==
    numbers[n]` and class `kinds[n]`; a mask of number -9 is empty, and class `classes` is no
    object."""
    pixels = torch.stack([(labels == number).float() * 40 - 20 for number in numbers], 1)
    classes_said = F.one_hot(torch.tensor(kinds), classes + 1).float() * 30
    batch, queries = len(labels), len(kinds)
    return m2f.Masks(
        classes_said.expand(2, batch, -1, -1), torch.eye(queries).expand(2, batch, -1, -1), pixels
    )  # fmt: skip


def test_masks_that_are_right_cost_nothing_in_whatever_order_they_come():
    network = network_of("mask2former")
    _, labels = sample_of("mask2former", 2)
    for order in ([0, 1, 2], [2, 0, 1]):
        right = said_of(labels, [*order, 3], [*order, -9])
        assert float(network.loss(right, labels)) < 1e-2
        assert torch.equal(network.semantic(right).argmax(1), labels)
    wrong = said_of(labels, [0, 2, 1, 3], [0, 1, 2, -9])
    assert float(network.loss(wrong, labels)) > 1


def test_the_loss_sees_no_voxel_that_is_not_labelled_and_no_chance():
    network = network_of("mask2former")
    _, labels = sample_of("mask2former", 1)
    unknown = labels.clone()
    unknown[:, :, :4] = -1
    said = said_of(labels, [0, 1, 2], [0, 1, 2])
    other = said.pixels.clone()
    other[:, :, :, :4] *= -1
    torch.manual_seed(1)
    first = network.loss(said, unknown)
    torch.manual_seed(2)
    assert torch.equal(first, network.loss(said._replace(pixels=other), unknown))
    assert float(network.loss(said._replace(pixels=other), labels)) > 1 > float(first)
    assert float(network.loss(said, torch.full_like(labels, -1))) == 0


def test_the_loss_of_voxels_is_that_of_those_labelled():
    network = network_of("mask2former", deep_supervision=True)
    _, labels = sample_of("mask2former", 1)
    labels[:, :2] = -1
    logits = torch.randn(1, 3, *labels.shape[1:])
    chance, known = logits.softmax(1).movedim(1, -1)[labels >= 0], labels[labels >= 0]
    truth = F.one_hot(known, 3).float()
    dice = 1 - (2 * (chance * truth).sum(0) + 1) / (chance.sum(0) + truth.sum(0) + 1)
    entropy = F.cross_entropy(logits, labels, ignore_index=-1)
    assert torch.allclose(
        network._voxel_loss(logits, labels), 5 * entropy + 5 * dice.mean(), atol=1e-5
    )


def test_instances_are_targets_of_their_own_and_come_back(monkeypatch: pytest.MonkeyPatch):
    network = network_of("mask2former")
    labels = torch.zeros(1, 8, 16, 8, dtype=torch.int64)
    instances = torch.zeros_like(labels)
    for number, begin in ((1, 0), (2, 6), (3, 12)):
        instances[:, 1:5, begin : begin + 3, 1:5] = number
    labels[instances > 0] = 1
    labels[instances == 3] = 2
    said = said_of(instances, [0, 1, 1, 2], [0, 1, 2, 3])
    assert float(network.loss(said, labels, instances)) < 1e-2
    # One mask for both objects of class 1 is wanted then.
    assert float(network.loss(said, labels)) > 0.1
    monkeypatch.setattr(network, "_said", lambda x: said)
    found = network.instances(torch.zeros(1, 1, 8, 16, 8))[0]
    assert sorted(kind for kind, _, _ in found) == [1, 1, 2]
    assert all(score > 0.9 for _, score, _ in found)
    masks = {tuple(torch.unique(instances[0][mask]).tolist()) for _, _, mask in found}
    assert masks == {(1,), (2,), (3,)}
    assert network.instances(torch.zeros(1, 1, 8, 16, 8), threshold=1.1) == [[]]


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_best_of_all_assignments(seed: int):
    torch.manual_seed(seed)
    classes, logits = torch.randn(4, 4), torch.randn(4, 30) * 2
    wanted, truth = torch.tensor([0, 2, 2]), (torch.rand(3, 30) > 0.6).float()

    def cost(query: int, target: int) -> float:
        chance = logits[query].sigmoid()
        mask = F.binary_cross_entropy(chance, truth[target])
        dice = 1 - (2 * (chance * truth[target]).sum() + 1) / (
            chance.sum() + truth[target].sum() + 1
        )
        return float(5 * mask + 5 * dice - 2 * classes[query].softmax(0)[wanted[target]])

    best = min(
        sum(cost(q, t) for t, q in enumerate(chosen)) for chosen in permutations(range(4), 3)
    )
    query, aim = m2f._match(classes, logits, wanted=wanted, truth=truth)
    assert sorted(aim.tolist()) == [0, 1, 2]
    assert np.isclose(
        sum(cost(q, t) for q, t in zip(query.tolist(), aim.tolist())), best, atol=1e-4
    )
