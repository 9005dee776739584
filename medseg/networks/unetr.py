"""UNETR (Hatamizadeh et al. 2022, arXiv:2103.10504): a vision transformer of 12 layers reads
16x16x16 blocks of the patch, and a convolutional decoder joins what four of its layers say. MONAI's
network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medseg.networks.layers import check_number, check_numbers
from medseg.networks.monai import Bound, assemble


def unetr(
    channels: int,
    classes: int,
    *,
    patch: Sequence[int] = (96, 96, 96),
    feature_size: int = 16,
    hidden_size: int = 768,
    mlp_dim: int = 3072,
    num_heads: int = 12,
    dropout_rate: float = 0.0,
) -> Bound:
    """(B, channels, *patch) to logits (B, classes, *patch).

    The network has learnt the place of every block, so it takes patches of exactly `patch`,
    multiples of 16. The other options are those of `monai.networks.nets.UNETR`; the defaults are
    the paper's.
    """
    check_numbers("patch", patch, most=1024, count=3)
    for name, number in (
        ("feature_size", feature_size),
        ("hidden_size", hidden_size),
        ("mlp_dim", mlp_dim),
    ):
        check_number(name, number, 4096)
    check_number("num_heads", num_heads, 64)
    if any(size % 16 for size in patch):
        raise ValueError(f"patch {list(patch)} is not three multiples of 16")
    network = assemble(
        "unetr",
        "UNETR",
        in_channels=channels,
        out_channels=classes,
        img_size=tuple(patch),
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        dropout_rate=dropout_rate,
    )
    for (
        block
    ) in network.vit.blocks:  # made for other uses of MONAI's transformer, and never run here
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    head, network.out = network.out.conv.conv, nn.Identity()
    return Bound(network, channels, head, multiple=16, size=patch)
