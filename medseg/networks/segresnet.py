"""SegResNet (Myronenko 2018, arXiv:1810.11654): residual blocks with the norm in front, a light
decoder whose skips are added. MONAI's `SegResNetDS`, the form with deep supervision that Auto3DSeg
trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from medseg.networks.layers import check_number, check_numbers
from medseg.networks.monai import Bound, assemble


def segresnet(
    channels: int,
    classes: int,
    *,
    init_filters: int = 32,
    blocks_down: Sequence[int] = (1, 2, 2, 4, 4),
    deep_supervision: bool = False,
    norm: str | Sequence[Any] = "instance",
    resolution: Sequence[float] | None = None,
    own_norms: bool = False,
) -> Bound:
    """(B, channels, D, H, W) to logits (B, classes, D, H, W), halved as often as `blocks_down` is
    long, less one.

    Options are those of `monai.networks.nets.SegResNetDS`; with `own_norms` its instance norms
    compute as MONAI's do, to the last digit, and slower. In training mode with `deep_supervision` a
    list of logits of every level of the decoder, finest first, each half the size of the one
    before.
    """
    check_number("init_filters", init_filters, 512)
    check_numbers("blocks_down", blocks_down, 64)
    halvings = len(blocks_down) - 1
    if not halvings:
        raise ValueError("blocks_down needs two levels or more")
    depth = halvings if deep_supervision else 1
    network = assemble(
        "segresnet",
        "SegResNetDS",
        in_channels=channels,
        out_channels=classes,
        init_filters=init_filters,
        blocks_down=tuple(blocks_down),
        norm=norm if isinstance(norm, str) else tuple(norm),
        dsdepth=depth,
        own_norms=own_norms,
        **({} if resolution is None else {"resolution": tuple(resolution)}),
    )
    heads = []
    for level in list(network.up_layers)[::-1][:depth]:
        heads.append(level["head"])
        level["head"] = nn.Identity()
    sizes = [int(n) for n in network.shape_factor()]
    multiple = sizes[0] if len(set(sizes)) == 1 else sizes
    return Bound(network, channels, heads[0], multiple=multiple, deep_heads=heads[1:])
