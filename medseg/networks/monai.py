"""MONAI's networks as medseg's: their last layer set apart as `head`, sizes checked, norms that are
fast on a CPU.

MONAI is an extra; it is imported when one of its networks is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import BadModel
from medseg.networks.layers import DepthwiseConv, check_size
from medseg.networks.ops import card_norm, depthwise


class Bound(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W), by a network of MONAI without its
    last layer.

    network: gives features (B, F, D, H, W), in training perhaps a sequence of them, finest first.
    head: their last layer, 1x1x1. deep_heads: the heads of coarser features, for as many scales as
    there are. size: the only patch that the network takes, if it has learnt something for every
    place.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        head: nn.Conv3d,
        multiple: int | Sequence[int],
        *,
        deep_heads: Sequence[nn.Conv3d] = (),
        size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.head, self.deep_heads = network, head, nn.ModuleList(deep_heads)
        self.channels, self.classes = channels, head.out_channels
        self.multiple = multiple if isinstance(multiple, int) else tuple(multiple)
        self.size = None if size is None else tuple(size)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in training with deep supervision a list of them, finest first."""
        outputs = self._run(x)
        if isinstance(outputs, Tensor):
            logits: Tensor = self.head(outputs)
            return logits
        return [head(y) for head, y in zip([self.head, *self.deep_heads], outputs)]

    def features(self, x: Tensor) -> Tensor:
        """What `head` makes logits of, (B, F, D, H, W)."""
        outputs = self._run(x)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def _run(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        check_size(x, self.multiple)
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"a patch of {tuple(x.shape[2:])} is not the {self.size} that the network was"
                " made for"
            )
        outputs: Tensor | Sequence[Tensor] = self.network(x)
        return outputs


def assemble(architecture: str, name: str, *, own_norms: bool = False, **arguments: Any) -> Any:
    """The network `name` of `monai.networks.nets`; its constants are no part of its weights, and
    its instance norms are fast on a CPU, or with `own_norms` MONAI's own to the last digit. Raises
    `BadModel` naming the extra where MONAI is not installed.

    On the meta device only the weights are left out: constants are needed, and come in no
    checkpoint.
    """
    meta = torch.empty(0).is_meta
    try:
        import monai.networks.nets as networks

        with torch.device("cpu" if meta else torch.get_default_device()):
            network: nn.Module = getattr(networks, name)(**arguments)
    except ImportError:
        raise BadModel(
            f"the architecture '{architecture}' needs MONAI, which is not installed or not"
            ' complete; install it with pip install "medseg[monai]"'
        ) from None
    network.arguments = arguments  # type: ignore[assignment]  # for those who build it elsewhere
    if not own_norms:
        as_group_norms(network)
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            learnt = name in ("running_mean", "running_var")
            module.register_buffer(name, buffer.to("meta") if learnt and meta else buffer, learnt)
        for name, weight in list(module.named_parameters(recurse=False)) if meta else ():
            setattr(module, name, nn.Parameter(weight.to("meta")))
    return network


def as_group_norms(network: nn.Module) -> None:
    """Put group norms in the place of instance norms that take their statistics from what they
    see."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm3d) and not child.track_running_stats:
                setattr(module, name, _group_norm(child))


def _is_depthwise(conv: nn.Conv3d) -> bool:
    """Whether it is what `DepthwiseConv` makes."""
    return depthwise.fits(conv) and len({*conv.kernel_size}) == len({*conv.stride}) == 1


def learn_depthwise(network: nn.Module) -> None:
    """Put convolutions that learn faster on a CPU in the place of those of each channel by
    itself.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv3d) and _is_depthwise(child):
                conv = DepthwiseConv(
                    child.in_channels,
                    child.kernel_size[0],
                    stride=child.stride[0],
                    bias=child.bias is not None,
                    device="meta",
                )
                conv.weight, conv.bias = child.weight, child.bias
                setattr(module, name, conv)


class _Norm(nn.GroupNorm):
    """A group norm that on a card is one step where it can be."""

    def forward(self, x: Tensor) -> Tensor:
        """The map normalised."""
        if card_norm.can_fuse(x, self):
            return card_norm.norm_activate(x, self)
        return super().forward(x)


def _group_norm(norm: nn.InstanceNorm3d) -> nn.GroupNorm:
    """The same norm as a group norm of one channel a group, which a CPU computes several times
    faster.
    """
    group_norm = _Norm(
        norm.num_features,
        norm.num_features,
        eps=norm.eps,
        affine=norm.affine,
        device="meta",
    )
    if norm.affine:
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm
