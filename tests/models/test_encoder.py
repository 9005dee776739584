"""Weights of an encoder alone are read as data: names of all the programs that write them become
medseg's, and the network's size is read off their shapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import BadModel
from medseg.models import is_encoder, load_encoder
from medseg.networks import build_network

pytest.importorskip("monai")
SWIN: dict[str, Any] = {"feature_size": 12, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 4]}
UNETR: dict[str, Any] = {"hidden_size": 64, "mlp_dim": 80, "num_heads": 1}


def monai_swin(channels: int = 1) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(1)
    return SwinUNETR(channels, 3, window_size=4, **SWIN)


def monai_unetr() -> nn.Module:
    from monai.networks import nets

    torch.manual_seed(1)
    return nets.UNETR(1, 3, img_size=(32, 32, 32), feature_size=16, **UNETR)


def save(path: Path, state: dict[str, Tensor], place: str | None = "state_dict") -> Path:
    torch.save({place: state, "epoch": 7} if place else state, path)
    return path


def as_pretraining(name: str) -> str:
    """How MONAI's self-supervised training calls what `SwinUNETR.load_from` reads."""
    name = name.replace("swinViT.", "module.")
    return name.replace(".mlp.linear1.", ".mlp.fc1.").replace(".mlp.linear2.", ".mlp.fc2.")


def test_the_names_that_swin_unetr_loads_are_those_that_are_read(tmp_path: Path):
    """MONAI's own `load_from` is the reference: both networks compute the same afterwards."""
    state = {
        as_pretraining(key): value
        for key, value in monai_swin().swinViT.state_dict(prefix="swinViT.").items()
    }
    state |= {"module.rotation_head.weight": torch.zeros(4, 192)}
    torch.manual_seed(2)
    reference = type(monai_swin())(1, 3, window_size=4, **SWIN)
    reference.load_from({"state_dict": state})
    weights = load_encoder(save(tmp_path / "model_swinvit.pt", state))
    assert (weights.architecture, weights.patch) == ("swin_unetr", None)
    assert weights.options == SWIN | {"window_size": 4}
    network = build_network("swin_unetr", 1, 3, **weights.options)
    result = network.load_state_dict(dict(weights.tensors), strict=False)
    assert not result.unexpected_keys
    assert not any("swinViT" in key for key in result.missing_keys)
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.inference_mode():
        expected = reference.eval().swinViT(image)
        found = network.eval().network.swinViT(image)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize(
    "name_of",
    [
        lambda key: f"module.{key}",
        lambda key: f"module.{key.replace('swinViT', 'swin_vit')}",
        lambda key: key.removeprefix("swinViT."),
        lambda key: f"model.network.{key}",
    ],
)
def test_what_training_programs_put_before_names_does_not_matter(
    name_of: Callable[[str], str], tmp_path: Path
):
    state = monai_swin().swinViT.state_dict(prefix="swinViT.")
    plain = load_encoder(save(tmp_path / "a.pth", state, None))
    other = load_encoder(save(tmp_path / "b.pth", {name_of(k): v for k, v in state.items()}))
    assert other.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(other.tensors[key], plain.tensors[key]) for key in plain.tensors)


def test_a_whole_network_gives_its_decoder_and_head_too(tmp_path: Path):
    state = monai_swin().state_dict()
    weights = load_encoder(save(tmp_path / "whole.pt", state, "model"))
    network = build_network("swin_unetr", 1, 3, **weights.options)
    assert weights.tensors.keys() == network.state_dict().keys()
    assert torch.equal(weights.tensors["head.weight"], state["out.conv.conv.weight"])


def test_the_encoder_of_a_unetr_is_read_with_its_size_and_patch(tmp_path: Path):
    made = monai_unetr()
    weights = load_encoder(save(tmp_path / "UNETR_model_best_acc.pth", made.state_dict(), None))
    assert weights.architecture == "unetr"
    assert weights.patch == (32, 32, 32)
    assert weights.options == UNETR | {"feature_size": 16, "patch": [32, 32, 32]}
    network = build_network("unetr", 1, 3, **weights.options)
    network.load_state_dict(dict(weights.tensors))
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(network.eval()(image), made.eval()(image), atol=1e-4)


def test_a_linear_layer_on_blocks_becomes_the_convolution_that_it_is(tmp_path: Path):
    from monai.networks.nets import ViT

    torch.manual_seed(1)
    made = ViT(2, (32, 32, 32), (16, 16, 16), 64, 80, 12, 1, proj_type="perceptron")
    weights = load_encoder(save(tmp_path / "vit.pth", made.state_dict(), "model_state_dict"))
    network = build_network("unetr", 2, 3, **weights.options)
    result = network.load_state_dict(dict(weights.tensors), strict=False)
    assert not result.unexpected_keys and not any(".vit." in key for key in result.missing_keys)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.inference_mode():
        expected, found = made.eval()(image)[0], network.eval().network.vit(image)[0]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_masked_autoencoder_gives_its_encoder(tmp_path: Path):
    from monai.networks.nets import MaskedAutoEncoderViT

    made = MaskedAutoEncoderViT(
        1, (32, 32, 32), (16, 16, 16), hidden_size=192, mlp_dim=80, num_layers=12, num_heads=3,
        decoder_hidden_size=24, decoder_mlp_dim=24, decoder_num_layers=1, decoder_num_heads=1,
    )  # fmt: skip
    weights = load_encoder(save(tmp_path / "mae.pt", made.state_dict()))
    network = build_network("unetr", 1, 3, **weights.options)
    assert weights.tensors.keys() <= network.state_dict().keys()
    vit = {key for key in network.state_dict() if ".vit." in key}
    assert weights.tensors.keys() == vit
    assert torch.equal(weights.tensors["network.vit.norm.weight"], made.blocks[-1].weight)


def test_heads_that_shapes_do_not_tell_stay_open(tmp_path: Path):
    from monai.networks.nets import ViT

    state = ViT(1, (16, 16, 32), (16, 16, 16), 48, 80, 12, 3).state_dict()
    weights = load_encoder(save(tmp_path / "vit.pth", state))
    assert weights.options == {"hidden_size": 48, "mlp_dim": 80}
    assert weights.patch is None  # two blocks are no cube


def test_a_model_of_auto3dseg_is_no_encoder_and_other_files_are_none(tmp_path: Path):
    torch.save({"state_dict": {}, "config": {"network": {}}}, tmp_path / "model.pt")
    (tmp_path / "model.zip").write_bytes(b"PK")
    assert not is_encoder(tmp_path / "model.pt")
    assert not is_encoder(tmp_path / "model.zip")
    assert not is_encoder(tmp_path)
    assert is_encoder(save(tmp_path / "other.pt", {"a": torch.zeros(1)}))


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def test_what_is_no_encoder_is_refused_in_a_sentence_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bad = monai_swin().swinViT.state_dict(prefix="module.")
    bad["module.layers1.0.blocks.0.norm1.weight"][0] = float("nan")
    files = {
        "unet.pth": ({"encoder.0.weight": torch.zeros(3)}, "no encoder that medseg has"),
        "nan.pth": (bad, "not finite"),
        "code.pth": ({"a": Command()}, "nothing of the file was run"),
        "text.pth": ({"state_dict": {"a": "b"}}, "not tensors"),
    }
    for name, (content, what) in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(BadModel, match=rf"{name}.*{what}"):
            load_encoder(tmp_path / name)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "nan.pth").read_bytes()[:900])
    with pytest.raises(BadModel, match="cut"):
        load_encoder(tmp_path / "cut.pth")
    assert not (tmp_path / "was_run").exists()
