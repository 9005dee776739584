"""Swin UNETR (Hatamizadeh et al. 2022, arXiv:2201.01266): a hierarchical transformer whose
attention stays in shifted windows, and a convolutional decoder. MONAI's network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medseg.networks.layers import check_number, check_numbers
from medseg.networks.monai import Bound, assemble


def swin_unetr(
    channels: int,
    classes: int,
    *,
    feature_size: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    dropout_path_rate: float = 0.0,
    use_v2: bool = False,
) -> Bound:
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of 32.

    Options are those of `monai.networks.nets.SwinUNETR`, `feature_size` a multiple of 12; the
    defaults are the paper's.
    """
    check_number("feature_size", feature_size, 384)
    check_numbers("depths", depths, most=32, count=4)
    check_numbers("num_heads", num_heads, most=64, count=4)
    check_number("window_size", window_size, most=16, least=2)
    network = assemble(
        "swin_unetr",
        "SwinUNETR",
        in_channels=channels,
        out_channels=classes,
        feature_size=feature_size,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        window_size=window_size,
        drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate,
        dropout_path_rate=dropout_path_rate,
        use_v2=use_v2,
    )
    head, network.out = network.out.conv.conv, nn.Identity()
    return Bound(network, channels, head, multiple=32)
