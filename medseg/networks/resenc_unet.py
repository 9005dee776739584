"""nnU-Net's residual encoder U-Net (Isensee et al. 2024, arXiv:2404.09556): many residual blocks go
down, one convolution a level comes up. It is the U-Net of `networks.unet` with other defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medseg.networks.unet import UNet

#: Residual blocks a level in nnU-Net's presets; deeper levels have as many as the last.
BLOCKS = (1, 3, 4, 6)


def resenc_unet(
    channels: int,
    classes: int,
    *,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    encoder_blocks: Sequence[int] | None = None,
    decoder_blocks: Sequence[int] | None = None,
    **options: Any,
) -> UNet:
    """A `UNet` of residual blocks: 1, 3, 4, 6, 6 ... going down and one convolution a level coming
    up.

    Options are `UNet`'s, but `residual`: (B, channels, D, H, W) to logits (B, classes, D, H, W).
    """
    levels = len(features)
    return UNet(
        channels,
        classes,
        residual=True,
        features=features,
        encoder_blocks=encoder_blocks or [*BLOCKS, *[BLOCKS[-1]] * levels][:levels],
        decoder_blocks=decoder_blocks or [1] * (levels - 1),
        **options,
    )
