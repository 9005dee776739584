"""The architectures, by name. A new one is a file here, a line in `NETWORKS` and one in
`TRAINING`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from medseg import packages
from medseg.errors import BadModel
from medseg.networks.bundles import bundle_network
from medseg.networks.deeplab import DeepLab
from medseg.networks.fcn import FCN
from medseg.networks.mask2former import Mask2Former
from medseg.networks.mednext import mednext
from medseg.networks.nnunet import NnUNet
from medseg.networks.primus import Primus
from medseg.networks.resenc_unet import resenc_unet
from medseg.networks.segformer import SegFormer
from medseg.networks.segresnet import segresnet
from medseg.networks.swin_unetr import swin_unetr
from medseg.networks.unet import UNet
from medseg.networks.unetr import unetr

#: Name in a config or a model's JSON -> builder(channels, classes, **options).
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "resenc_unet": resenc_unet,
    "fcn": FCN,
    "deeplab": DeepLab,
    "unetr": unetr,
    "swin_unetr": swin_unetr,
    "segformer": SegFormer,
    "primus": Primus,
    "mask2former": Mask2Former,
    "segresnet": segresnet,
    "mednext": mednext,
    "nnunet": NnUNet,
}
#: Networks of other programs that are run and not trained.
RUN_ALONE: dict[str, Callable[..., nn.Module]] = {"bundle": bundle_network}

_CONVOLUTIONS = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2, "warmup": 50}
_TRANSFORMERS = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2, "warmup": 100}
#: Name -> how it is trained, as settings of `train`: the optimizer, its highest learning rate, its
#: weight decay, steps of warm-up, and whatever else is not the usual.
TRAINING: dict[str, dict[str, Any]] = {
    "unet": _CONVOLUTIONS,
    "resenc_unet": _CONVOLUTIONS,
    "fcn": _CONVOLUTIONS,
    "deeplab": _CONVOLUTIONS,
    "segresnet": _CONVOLUTIONS,
    "mednext": _CONVOLUTIONS,
    "nnunet": _CONVOLUTIONS,
    "unetr": _TRANSFORMERS,
    "swin_unetr": _TRANSFORMERS,
    "segformer": _TRANSFORMERS | {"learning_rate": 1.5e-3},
    "primus": _TRANSFORMERS
    | {"learning_rate": 3e-4, "weight_decay": 5e-2, "warmup": 1000}
    | {"betas": [0.9, 0.98], "gradient_clip": 1.0},
    "mask2former": _TRANSFORMERS | {"learning_rate": 5e-4},
}
#: The networks that train slower in bfloat16 on a CPU, also with matrix units: 1.3 and 1.6 times
#: (measured). Convolutions of single channels are what they have in common.
FLOAT32_ON_CPU = frozenset({"mednext", "segformer"})
#: The networks that take the option `deep_supervision`.
DEEP_SUPERVISION = frozenset(
    {"unet", "resenc_unet", "fcn", "deeplab", "segresnet", "mednext", "mask2former"}
)


def _small_options(halvings: int, patch: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By network; the image is halved so often."""
    levels = halvings + 1
    features = [16, 32, 64, 128][:levels]
    return {
        "unet": {"features": features},
        "resenc_unet": {"features": features, "encoder_blocks": [1, 2, 2, 2][:levels]},
        "fcn": {
            "features": [16, 32, 64, 192][:levels],
            "blocks": [2, 2, 2, 3][:levels],
            "finest": min(1, halvings),
        },
        "deeplab": {
            "features": features,
            "blocks": [1, 2, 2, 2][:levels],
            "rates": [2, 3, 4],
            "pyramid": 64,
            "skip": min(1, halvings),
            "reduced": 16,
        },
        "segformer": {
            "widths": [32, 64, 128][: max(1, halvings)],
            "strides": [2, 2, 2][:halvings] or [1],
            "depths": [2, 2, 2][: max(1, halvings)],
            "heads": [1, 2, 4][: max(1, halvings)],
            "reductions": [2**n for n in reversed(range(halvings))] or [1],
            "decoder": 64,
        },
        "primus": {"width": 192, "depth": 6, "heads": 4, "decoder": [48, 16]}
        | {"token": [_token(size) for size in patch]},
        "mask2former": {
            "features": [16, 32, 64, 128][: max(2, levels)],
            "encoder_blocks": [1, 1, 2, 2][: max(2, levels)],
            "decoder_blocks": [1, 1, 1][: max(1, halvings)],
            "width": 96,
            "heads": 4,
            "layers": 3,
            "queries": 16,
            "mask_width": 32,
            "points": 4096,
        },
        "unetr": {"patch": list(patch), "feature_size": 16, "hidden_size": 144}
        | {"mlp_dim": 576, "num_heads": 4},
        "swin_unetr": {"feature_size": 12, "window_size": 4},
        "segresnet": {"init_filters": 16, "blocks_down": [1, 2, 2, 2][: max(2, levels)]},
        "nnunet": _cubes(levels)
        | {"features": features, "bias": False}
        | {"encoder_blocks": [2] * levels, "decoder_blocks": [2] * halvings},
        "mednext": {
            "init_filters": 16,
            "blocks_down": [1, 2, 2][: max(1, halvings)],
            "blocks_bottleneck": 4,
            "bottleneck_expansion_ratio": 4,
            "blocks_up": [2, 2, 1][-max(1, halvings) :],
        },
    }


def _token(size: int) -> int:
    """How long a token is along an axis: up to 8 voxels."""
    return next((length for length in (8, 4) if size % length == 0), 2)


def small(name: str, patch: Sequence[int]) -> dict[str, Any]:
    """Options of the named network that train on a laptop in minutes, 1 to 6 million weights.

    The networks that halve the image as often as is useful halve it up to three times, fewer where
    `patch` (X, Y, Z) cannot be halved so often. `unetr` needs multiples of 16 and `swin_unetr` of
    32: ask `check_patch`.
    """
    halvings = 0
    while halvings < 3 and all(
        size % 2 ** (halvings + 1) == 0 and size >= 2 ** (halvings + 2) for size in patch
    ):
        halvings += 1
    options = _small_options(halvings, patch)
    if name not in options and name in packages.added(packages.NETWORKS):
        return dict(getattr(packages.load(packages.NETWORKS, name), "small", {}))
    if name not in options:
        raise BadModel(f"there is no small '{name}'; there is one of {', '.join(sorted(options))}")
    return options[name] | ({"deep_supervision": True} if name in DEEP_SUPERVISION else {})


def known_networks() -> tuple[str, ...]:
    """The networks that can be trained, with those of installed packages."""
    return (
        *NETWORKS,
        *(name for name in packages.added(packages.NETWORKS) if name not in NETWORKS),
    )


def training_of(name: str) -> dict[str, Any]:
    """How a network is trained; one of an installed package may say so in its `training`."""
    if name in TRAINING:
        return TRAINING[name]
    return _CONVOLUTIONS | getattr(packages.load(packages.NETWORKS, name), "training", {})


def _cubes(levels: int) -> dict[str, Any]:
    """Kernels of 3 and strides of 2 along every axis."""
    return {
        "kernels": [[3] * 3] * levels,
        "strides": [[1] * 3, *([2] * 3 for _ in range(levels - 1))],
    }


def build_network(name: str, channels: int, classes: int, /, **options: Any) -> nn.Module:
    """The named network, or that of an installed package, with fresh weights. Raises `BadModel` for
    a name or an option that does not exist.
    """
    builder = (NETWORKS | RUN_ALONE).get(name)
    wrong: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError, OverflowError)
    if builder is None:
        if name not in known_networks():
            listed = ", ".join(sorted(known_networks()))
            raise BadModel(f"there is no architecture '{name}'; medseg has {listed}")
        builder = packages.load(packages.NETWORKS, name)
        wrong = (Exception,)  # its code is not ours
    try:
        return builder(channels, classes, **options)
    except wrong as error:
        reason = " ".join(str(error).split())  # a library's own message may have several lines
        raise BadModel(f"the architecture '{name}' cannot be built: {reason}") from None


def patch_multiples(network: nn.Module) -> tuple[int, int, int]:
    """What the sizes of patches must be multiples of along each axis."""
    multiple: Any = getattr(network, "multiple", 1)
    x, y, z = (multiple,) * 3 if isinstance(multiple, int) else multiple
    return x, y, z


def check_patch(network: nn.Module, patch: Sequence[int]) -> None:
    """Raise `BadModel` if the network cannot take patches of this shape (see `UNet.multiple`)."""
    multiples = patch_multiples(network)
    size = getattr(network, "size", None)
    shape = _sizes(patch)
    if size is not None and tuple(patch) != tuple(size):
        raise BadModel(
            f"a patch of {shape} does not fit the network, which was made for {_sizes(size)}: set"
            " its option patch"
        )
    factors = str(multiples[0]) if len(set(multiples)) == 1 else _sizes(multiples)
    single = max(multiples) > 1 and tuple(patch) == multiples
    if single or any(length < 1 or length % each for length, each in zip(patch, multiples)):
        raise BadModel(
            f"a patch of {shape} does not fit the network: give multiples of {factors}, one of them"
            " larger"
        )


def _sizes(lengths: Sequence[int]) -> str:
    return " x ".join(str(length) for length in lengths)
