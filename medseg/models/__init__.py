"""The architectures, by name. A new one is a file here, a line in `MODELS` and one in `TRAINING`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from medseg.errors import BadModel
from medseg.models.deeplab import DeepLab
from medseg.models.fcn import FCN
from medseg.models.resenc_unet import resenc_unet
from medseg.models.unet import UNet

#: Name in a config or a model's JSON -> builder(channels, classes, **options).
MODELS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "resenc_unet": resenc_unet,
    "fcn": FCN,
    "deeplab": DeepLab,
}

#: Name -> how it is trained well: optimizer, learning rate at its highest, weight decay, steps of warm-up.
_CONVOLUTIONS = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2, "warmup": 50}
TRAINING: dict[str, dict[str, Any]] = {name: dict(_CONVOLUTIONS) for name in ("unet", "resenc_unet", "fcn", "deeplab")}


def build_model(name: str, channels: int, classes: int, /, **options: Any) -> nn.Module:
    """The named network with fresh weights. Raises `BadModel` for a name or an option that does not exist."""
    if name not in MODELS:
        raise BadModel(f"there is no architecture '{name}'; medseg has {', '.join(sorted(MODELS))}")
    try:
        return MODELS[name](channels, classes, **options)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadModel(f"the architecture '{name}' cannot be built: {error}") from None


def patch_multiples(network: nn.Module) -> tuple[int, int, int]:
    """What the sizes of patches must be multiples of along each axis."""
    multiple: Any = getattr(network, "multiple", 1)
    x, y, z = (multiple,) * 3 if isinstance(multiple, int) else multiple
    return x, y, z


def check_patch(network: nn.Module, patch: Sequence[int]) -> None:
    """Raise `BadModel` if the network cannot take patches of this shape (see `UNet.multiple`)."""
    multiples = patch_multiples(network)
    shown, needed = (" x ".join(str(size) for size in sizes) for sizes in (patch, multiples))
    if len(set(multiples)) == 1:
        needed = str(multiples[0])
    single = max(multiples) > 1 and all(size == each for size, each in zip(patch, multiples))
    if any(size < 1 or size % each for size, each in zip(patch, multiples)) or single:
        raise BadModel(f"a patch of {shown} does not fit the network: give multiples of {needed}, one of them larger")
