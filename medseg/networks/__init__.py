"""Architectures: torch, and nothing of files."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.networks.layers import (
        Block as Block,
        conv as conv,
        has_depthwise as has_depthwise,
        likes_channels_last as likes_channels_last,
    )
    from medseg.networks.monai import as_group_norms as as_group_norms
    from medseg.networks.zoo import (
        DEEP_SUPERVISION as DEEP_SUPERVISION,
        FLOAT32_ON_CPU as FLOAT32_ON_CPU,
        RUN_ALONE as RUN_ALONE,
        build_network as build_network,
        check_patch as check_patch,
        known_networks as known_networks,
        patch_multiples as patch_multiples,
        small as small,
        training_of as training_of,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "layers": ("Block", "conv", "has_depthwise", "likes_channels_last"),
        "monai": ("as_group_norms",),
        "zoo": (
            "DEEP_SUPERVISION",
            "FLOAT32_ON_CPU",
            "RUN_ALONE",
            "build_network",
            "check_patch",
            "known_networks",
            "patch_multiples",
            "small",
            "training_of",
        ),
    },
)
