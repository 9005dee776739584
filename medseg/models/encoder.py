"""Weights of an encoder that others have trained, in a file with nothing else of a model: those of
MONAI's Swin UNETR and UNETR, trained on labels or on scans alone.

The names are MONAI's: `swinViT.layers1.0.blocks.0.…` of `SwinUNETR` and of its pretraining (there
also behind `module.` or `swin_vit.`, or without either, with `fc1` for `linear1`), and
`vit.blocks.0.…` of `UNETR`, `ViT`, `ViTAutoEnc` and `MaskedAutoEncoderViT`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadModel
from medseg.models.folder import sha256_of
from medseg.models.weights import load_plain, state_of

if TYPE_CHECKING:
    from torch import Tensor

#: How files of weights end. What ends in .pt may also be a model of Auto3DSeg.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin")
#: Under what the tensors lie in a checkpoint.
_PLACES = ("state_dict", "model_state_dict", "model", "net", "network")
#: What a training program put before all names.
_AROUND = re.compile(r"^(module|model|network|net|backbone)\.")
#: One side of the blocks that a vision transformer reads.
_BLOCK = 16
#: Features of a head in all published vision transformers; the weights do not tell.
_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """An encoder's weights. tensors: under the names of medseg's network `architecture`; options:
    of that network, as far as shapes tell them; patch: the only one that it takes, if there is one.
    """

    path: Path
    architecture: str
    options: Mapping[str, Any]
    patch: tuple[int, int, int] | None
    sha256: str
    tensors: Mapping[str, Tensor] = field(repr=False)


def is_encoder(path: Path) -> bool:
    """Whether a file holds weights alone and no model. Raises `BadModel` if it cannot be read."""
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        return False
    return path.suffix.lower() != ".pt" or not isinstance(load_plain(path).get("config"), dict)


def load_encoder(path: Path) -> EncoderWeights:
    """The weights in a file, nothing of which is run. Raises `BadModel` for those of no encoder
    that medseg has, and for numbers that are not finite.
    """
    import torch

    state = {_bare(key): value for key, value in state_of(load_plain(path), _PLACES, path).items()}
    for architecture, (mark, name_of, options_of) in _ENCODERS.items():
        names = {key: name_of(key) for key in state}
        tensors = {name: state[key] for key, name in names.items() if name is not None}
        if mark not in tensors:
            continue
        tensors = {name: _like_ours(name, value) for name, value in tensors.items()}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
                raise BadModel(f"{path}: its weights ({name}) hold values that are not finite")
        options = options_of(tensors)
        patch = options.get("patch")
        return EncoderWeights(
            path=path,
            architecture=architecture,
            options=options,
            patch=None if patch is None else (patch[0], patch[1], patch[2]),
            sha256=sha256_of(path),
            tensors=tensors,
        )
    raise BadModel(
        f"{path}: holds the weights of no encoder that medseg has (its first is"
        f" '{next(iter(state))}'); it takes those of MONAI's SwinUNETR and UNETR"
    )


def _bare(key: str) -> str:
    """A name without what training programs put before all of them."""
    while (shorter := _AROUND.sub("", key)) != key:
        key = shorter
    return key


def _swin_name(key: str) -> str | None:
    """A name of `SwinUNETR` or of its pretraining in medseg's network; None for what has no
    place."""
    encoder = re.sub(r"^(swin_vit|swinViT)\.", "", key)
    if re.match(r"patch_embed\.|layers[1-4]c?\.", encoder):
        return _learnt(f"network.swinViT.{_linear(encoder)}")
    return _decoder_name(key)


def _vit_name(key: str) -> str | None:
    """A name of `UNETR` or of a vision transformer in medseg's network."""
    encoder = _linear(key.removeprefix("vit.")).replace(".attn.proj.", ".attn.out_proj.")
    encoder = re.sub(r"^blocks\.\d+\.(weight|bias)$", r"norm.\1", encoder)  # the last of a sequence
    encoder = encoder.replace("patch_embeddings.1.", "patch_embeddings.")
    if re.match(r"patch_embedding\.|blocks\.|norm\.", encoder):
        return _learnt(f"network.vit.{encoder}")
    return _decoder_name(key)


def _decoder_name(key: str) -> str | None:
    """A name of the convolutions around the encoder."""
    if re.match(r"(encoder|decoder)\d+\.", key):
        return f"network.{key}"
    if key.startswith("out.conv.conv."):
        return key.replace("out.conv.conv.", "head.")
    return None


def _linear(key: str) -> str:
    """The two layers of a perceptron as MONAI calls them now."""
    return key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _learnt(name: str) -> str | None:
    """A name, but for constants, and layers that are never run."""
    unused = name.endswith(("relative_position_index", "cls_token"))
    return None if unused or "cross_attn" in name else name


def _like_ours(name: str, value: Tensor) -> Tensor:
    """A tensor in float32; a linear layer on blocks of voxels, channels innermost, as a
    convolution."""
    if name == "network.vit.patch_embedding.patch_embeddings.weight" and value.ndim == 2:
        channels = value.shape[1] // _BLOCK**3
        if channels * _BLOCK**3 == value.shape[1]:
            value = value.reshape(-1, *(_BLOCK,) * 3, channels).permute(0, 4, 1, 2, 3)
    return value.float().contiguous()


def _swin_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `swin_unetr`, read off names and shapes."""
    stage = r"network\.swinViT\.layers{}\.0\.blocks\.(\d+)\."
    first = "network.swinViT.layers{}.0.blocks.0."
    depths, heads = [], []
    for n in range(1, 5):
        numbers = {int(m[1]) for key in tensors if (m := re.match(stage.format(n), key))}
        table = tensors.get(first.format(n) + "attn.relative_position_bias_table")
        if not numbers or table is None or table.ndim != 2:
            break
        depths.append(max(numbers) + 1)
        heads.append(table.shape[1])
        side = round(table.shape[0] ** (1 / 3))
    options: dict[str, Any] = {
        "feature_size": int(tensors[first.format(1) + "norm1.weight"].shape[0])
    }
    if len(depths) == 4:
        options |= {"depths": depths, "num_heads": heads, "window_size": (side + 1) // 2}
    if any(key.startswith("network.swinViT.layers1c.") for key in tensors):
        options["use_v2"] = True
    return options


def _vit_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `unetr`, read off shapes; a patch where the places are those of a cube. Without
    `num_heads` they are not known.
    """
    hidden = int(tensors["network.vit.blocks.0.attn.qkv.weight"].shape[1])
    options: dict[str, Any] = {"hidden_size": hidden}
    if (inner := tensors.get("network.vit.blocks.0.mlp.linear1.weight")) is not None:
        options["mlp_dim"] = int(inner.shape[0])
    if hidden % _HEAD == 0:
        options["num_heads"] = hidden // _HEAD
    if (outer := tensors.get("network.encoder1.layer.conv1.conv.weight")) is not None:
        options["feature_size"] = int(outer.shape[0])
    places = tensors.get("network.vit.patch_embedding.position_embeddings")
    side = 0 if places is None or places.ndim != 3 else round(places.shape[1] ** (1 / 3))
    if places is not None and side and side**3 == places.shape[1]:
        options["patch"] = [side * _BLOCK] * 3
    return options


_Names = Callable[[str], str | None]
_Options = Callable[[Mapping[str, "Tensor"]], dict[str, Any]]
#: Architecture -> a name that no other encoder has; what its names are; what its options are.
_ENCODERS: dict[str, tuple[str, _Names, _Options]] = {
    "swin_unetr": ("network.swinViT.layers1.0.blocks.0.norm1.weight", _swin_name, _swin_options),
    "unetr": ("network.vit.blocks.0.attn.qkv.weight", _vit_name, _vit_options),
}
