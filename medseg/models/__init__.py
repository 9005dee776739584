"""The architectures, by name. A new one is a file here and a line in `MODELS`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from medseg.errors import BadModel
from medseg.models.unet import UNet

#: Name in a config or a model's JSON -> builder(channels, classes, **options).
MODELS: dict[str, Callable[..., nn.Module]] = {"unet": UNet}


def build_model(name: str, channels: int, classes: int, /, **options: Any) -> nn.Module:
    """The named network with fresh weights. Raises `BadModel` for a name or an option that does not exist."""
    if name not in MODELS:
        raise BadModel(f"there is no architecture '{name}'; medseg has {', '.join(sorted(MODELS))}")
    try:
        return MODELS[name](channels, classes, **options)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadModel(f"the architecture '{name}' cannot be built: {error}") from None


def check_patch(network: nn.Module, patch: Sequence[int]) -> None:
    """Raise `BadModel` if the network cannot take patches of this shape (see `UNet.multiple`)."""
    multiple = getattr(network, "multiple", 1)
    if any(size < 1 or size % multiple for size in patch) or (multiple > 1 and max(patch) == multiple):
        shown = " x ".join(str(size) for size in patch)
        raise BadModel(f"a patch of {shown} does not fit the network: give multiples of {multiple}, one of them larger")
