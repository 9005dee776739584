"""A 3-D U-Net, plain or with a residual encoder, with instance norm and optional deep supervision.

Ronneberger et al. 2015 (arXiv:1505.04597) in the form that nnU-Net made standard (Isensee et al. 2021 and, for the
residual encoder, 2024, arXiv:2404.09556): strided convolutions go down, transposed convolutions come up, leaky ReLU.
With `stem=2` the network works at half the resolution of its input and its head predicts the 2x2x2 voxels of each
cell (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158): several times cheaper, for laptops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm(nn.GroupNorm):
    """Instance norm as a group norm of one channel a group: equal values, several times faster on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)


def conv(channels: int, features: int, stride: int = 1) -> nn.Sequential:
    """3x3x3 convolution, instance norm, leaky ReLU: (B, channels, D, H, W) to (B, features, D/stride, ...)."""
    return nn.Sequential(
        nn.Conv3d(channels, features, 3, stride, 1, bias=False),
        InstanceNorm(features),
        nn.LeakyReLU(0.01, inplace=True),
    )


class Residual(nn.Module):
    """Two convolutions around a shortcut (He et al. 2016); the shortcut is averaged and projected where it must be."""

    def __init__(self, channels: int, features: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv(channels, features, stride)
        self.second = nn.Sequential(nn.Conv3d(features, features, 3, 1, 1, bias=False), InstanceNorm(features))
        # A strided 1x1x1 convolution on summed neighbours would need avg_pool3d, which CPUs lack in bfloat16.
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != features:
            self.shortcut = nn.Sequential(
                nn.Conv3d(channels, features, stride, stride, bias=False), InstanceNorm(features)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D/stride, H/stride, W/stride)."""
        return F.leaky_relu(self.second(self.first(x)) + self.shortcut(x), 0.01)


class UNet(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of `UNet.multiple`.

    In training mode with `deep_supervision` a list of logits is returned, finest first, each half the size of the one
    before. `features`, `encoder_blocks` (as many) and `decoder_blocks` (one fewer) run from the finest level down.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256),
        encoder_blocks: Sequence[int] | None = None,
        decoder_blocks: Sequence[int] | None = None,
        residual: bool = False,
        stem: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        levels = len(features)
        encoder_blocks = encoder_blocks or [2] * levels
        decoder_blocks = decoder_blocks or [2] * (levels - 1)
        for numbers, most in ((features, 4096), (encoder_blocks, 64), (decoder_blocks, 64)):
            if levels > 10 or not all(type(number) is int and 1 <= number <= most for number in numbers):
                raise ValueError(f"{list(numbers)!r:.80} are not at most 10 whole numbers from 1 to {most}")
        if len(encoder_blocks) != levels or len(decoder_blocks) != levels - 1 or stem not in (1, 2):
            raise ValueError("encoder_blocks needs one number a level, decoder_blocks one fewer, and stem is 1 or 2")
        block = Residual if residual else conv
        self.channels, self.classes, self.stem, self.deep_supervision = channels, classes, stem, deep_supervision
        self.multiple = stem * 2 ** (levels - 1)

        inputs = [channels, *features[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                block(inputs[n], features[n], stem if n == 0 else 2),
                *(block(features[n], features[n]) for _ in range(encoder_blocks[n] - 1)),
            )
            for n in range(levels)
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(features[n + 1], features[n], 2, 2) for n in range(levels - 1))
        self.decoder = nn.ModuleList(
            nn.Sequential(
                conv(2 * features[n], features[n]),
                *(conv(features[n], features[n]) for _ in range(decoder_blocks[n] - 1)),
            )
            for n in range(levels - 1)
        )
        self.head = nn.Conv3d(features[0], classes * stem**3, 1)
        # Coarser heads exist only in training; inference does not need their weights.
        self.deep_heads = nn.ModuleList(
            nn.Conv3d(features[n], classes, 1) for n in range(0 if stem == 2 else 1, levels - 1) if deep_supervision
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in training with deep supervision a list of them, finest first."""
        outputs = self._decoded(x)
        logits = unfold_cells(self.head(outputs[-1]), self.stem)
        if not (self.training and self.deep_supervision):
            return logits
        finest_first = outputs[::-1][0 if self.stem == 2 else 1 :][: len(self.deep_heads)]
        return [logits, *(head(y) for head, y in zip(self.deep_heads, finest_first, strict=True))]

    def features(self, x: Tensor) -> Tensor:
        """What `head` makes logits of, (B, features, D/stem, H/stem, W/stem)."""
        return self._decoded(x)[-1]

    def _decoded(self, x: Tensor) -> list[Tensor]:
        """The output of every level of the decoder, coarsest first."""
        if any(size % self.multiple for size in x.shape[2:]):
            raise ValueError(f"a patch of {tuple(x.shape[2:])} is not a multiple of {self.multiple} along every axis")
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        for n in reversed(range(len(self.up))):
            x = self.decoder[n](torch.cat((self.up[n](x), skips[n]), 1))
            outputs.append(x)
        return outputs or [x]


def unfold_cells(x: Tensor, s: int) -> Tensor:
    """(B, K·s³, d, h, w) to (B, K, d·s, h·s, w·s): each cell's channels become its s x s x s voxels."""
    if s == 1:
        return x
    b, c, d, h, w = x.shape
    x = x.view(b, c // s**3, s, s, s, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // s**3, d * s, h * s, w * s)
