"""A bundle whose network is one of medseg's own, as a model that can be trained on.

MONAI's `SegResNetDS`, `SwinUNETR`, `UNETR` and `MedNeXt` are medseg's `segresnet`, `swin_unetr`,
`unetr` and `mednext`, which keep the last layer apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from medseg.errors import BadModel
from medseg.models.folder import Checkpoint
from medseg.models.weights import WeightsCheckpoint, bare_network, fitted


@dataclass(frozen=True, kw_only=True)
class _Own:
    """architecture: of medseg's. options: arguments that are options there, by their names there.
    left: arguments without which the network is the same in use, or their only value. head: where
    the last layer lies, as a pattern. transposed: it is a transposed convolution, of one voxel."""

    architecture: str
    options: dict[str, str]
    left: dict[str, Any]
    head: str
    transposed: bool = False


#: Any value will do.
_ANY = object()
_CONVOLUTIONS = {"norm_name": "instance", "res_block": True, "conv_block": True}
_OWN = {
    "SegResNetDS": _Own(
        architecture="segresnet",
        options={name: name for name in ("init_filters", "blocks_down", "norm", "resolution")},
        left={"dsdepth": _ANY, "act": "relu", "upsample_mode": "deconv", "preprocess": None}
        | {"blocks_up": None},
        head=r"up_layers\.{}\.head\.",
    ),
    "SwinUNETR": _Own(
        architecture="swin_unetr",
        options={
            name: name
            for name in (
                "feature_size", "depths", "num_heads", "window_size", "drop_rate",
                "attn_drop_rate", "dropout_path_rate", "use_v2",
            )
        },
        left={
            "use_checkpoint": _ANY, "norm_name": "instance", "normalize": True,
            "downsample": "merging", "use_flash_attention": _ANY,
        },
        head=r"out\.conv\.conv\.",
    ),
    "UNETR": _Own(
        architecture="unetr",
        options={
            name: name
            for name in ("feature_size", "hidden_size", "mlp_dim", "num_heads", "dropout_rate")
        }
        | {"img_size": "patch"},
        left=_CONVOLUTIONS | {"proj_type": "conv", "qkv_bias": False, "save_attn": _ANY},
        head=r"out\.conv\.conv\.",
    ),
    "MedNeXt": _Own(
        architecture="mednext",
        options={
            name: name
            for name in (
                "init_filters", "kernel_size", "encoder_expansion_ratio",
                "decoder_expansion_ratio", "bottleneck_expansion_ratio", "blocks_down",
                "blocks_bottleneck", "blocks_up", "global_resp_norm",
            )
        },
        left={"deep_supervision": _ANY, "use_residual_connection": True, "norm_type": "group"},
        head=r"out_0\.conv_out\.",
        transposed=True,
    ),
}  # fmt: skip
#: What options are where MONAI and medseg do not mean the same without them.
_USUAL: dict[str, dict[str, Any]] = {
    "segresnet": {"norm": "batch", "blocks_down": [1, 2, 2, 4]},
    "swin_unetr": {"feature_size": 24},
    "mednext": {"kernel_size": 7},
}


def own_network(checkpoint: Checkpoint) -> WeightsCheckpoint:
    """A bundle's model with medseg's own network in the place of MONAI's, equal in what it gives.

    Raises `BadModel` for another network, and for one that medseg builds otherwise.
    """
    spec = checkpoint.spec
    assert isinstance(checkpoint, WeightsCheckpoint)
    name, arguments = str(spec.options["network"]), dict(spec.options["arguments"])
    own = _OWN.get(name)
    if own is None:
        raise BadModel(
            f"{checkpoint.folder}: is a bundle of MONAI with the network {name}, which medseg runs"
            f" and does not train; it trains {', '.join(_OWN)}"
        )
    options = dict(_USUAL.get(own.architecture, {}))
    for key, value in arguments.items():
        if key in own.options:
            options[own.options[key]] = value
        elif own.left.get(key) is not _ANY and value != own.left.get(key, ...):
            raise BadModel(
                f"{checkpoint.folder}: its {name} has {key} {value!r:.60}, with which medseg runs"
                " it and does not train it"
            )
    if own.architecture == "unetr" and isinstance(options.get("patch"), int):
        options["patch"] = [options["patch"]] * 3
    spec = spec.model_copy(update={"architecture": own.architecture, "options": options})
    expected = {key: value.shape for key, value in bare_network(spec).state_dict().items()}
    head = own.head.format(len(options.get("blocks_down", ())) - 2)

    def name_of(key: str) -> str | None:
        inner = key.removeprefix("network.")
        renamed = re.sub(f"^{head}", "head.", inner)
        if renamed != inner:
            return renamed
        return None if key not in expected else key  # other heads, and layers that never run

    state = dict(checkpoint.weights)
    if own.transposed:
        last = next(key for key in state if name_of(key) == "head.weight")
        state[last] = state[last].transpose(0, 1)
    weights = fitted(state, expected, checkpoint.folder, name_of)
    return replace(checkpoint, spec=spec, weights=weights)
