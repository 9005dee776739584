"""Networks of MONAI as its bundles describe them: by the name of a class on a short list, with
plain arguments. They are run, not trained here.

MONAI is an extra; it is imported when one of its networks is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import BadModel
from medseg.networks.layers import check_number

#: The classes of `monai.networks.nets` that are built.
CLASSES = frozenset(
    {
        "AttentionUnet", "BasicUNet", "DynUNet", "MedNeXt", "SegResNet", "SegResNetDS", "SwinUNETR",
        "UNETR", "UNet", "VNet",
    }
)  # fmt: skip
#: Arguments that count blocks or layers: a stranger's number must not build for hours.
_COUNTS = frozenset(
    {
        "blocks_down", "blocks_up", "depths", "num_layers", "num_res_units", "blocks_bottleneck",
        "dsdepth", "deep_supr_num", "num_heads", "window_size",
    }
)  # fmt: skip
_MOST_BLOCKS, _WIDEST = 64, 768


class BundleNetwork(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W) by a network of MONAI as it is.

    Numbers that count, and not weigh, are no part of its weights; those of a checkpoint are left
    out.
    """

    multiple = 1

    def __init__(self, network: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.network, self.channels, self.classes = network, channels, classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits; of a network that gives several, the first."""
        outputs: Any = self.network(x)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
        return logits


def bundle_network(
    channels: int, classes: int, *, network: str, arguments: Mapping[str, Any]
) -> BundleNetwork:
    """The network `network` of MONAI. Raises `ValueError` for a class that is not on the list, and
    `BadModel` where MONAI is not installed.

    On the meta device only what is computed when it is built, as relative positions are, takes
    memory.
    """
    if network not in CLASSES:
        raise ValueError(f"'{network:.60}' is none of MONAI's networks that medseg runs")
    for name in _COUNTS & arguments.keys():
        for number in _numbers(arguments[name]):
            check_number(name, number, _MOST_BLOCKS, least=0)
    meta = torch.empty(0).is_meta
    real = meta and network == "SwinUNETR"  # whose positions are computed when it is built
    if real:
        for number in _numbers(arguments.get("feature_size", 24)):
            check_number("feature_size", number, _WIDEST)
    try:
        import monai.networks.nets as networks

        with torch.device("cpu" if real else torch.get_default_device()):
            model: nn.Module = getattr(networks, network)(
                **{key: _tuples(one) for key, one in arguments.items()},
                in_channels=channels,
                out_channels=classes,
                spatial_dims=3,
            )
    except ImportError:
        raise BadModel(
            f"the network {network} needs MONAI, which is not installed or not complete; install it"
            ' with pip install "medseg[monai]"'
        ) from None
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{network}: {error}") from None
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                continue
            if name == "num_batches_tracked":
                module.register_buffer(name, None)
            else:
                module.register_buffer(name, buffer, persistent=False)
        for name, weight in list(module.named_parameters(recurse=False)) if real else ():
            setattr(module, name, nn.Parameter(weight.to("meta")))
    return BundleNetwork(model.eval(), channels, classes)


def _tuples(value: Any) -> Any:
    """Lists as tuples, as which MONAI takes norms and sizes alike."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(one) for one in value)
    return value


def _numbers(value: Any) -> list[Any]:
    """The numbers of a number or of nested lists."""
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value]
