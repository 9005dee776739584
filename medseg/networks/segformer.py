"""SegFormer in 3-D (Xie et al. 2021, arXiv:2105.15203; in 3-D also Perera et al. 2024,
arXiv:2404.10156).

A transformer in stages: each embeds overlapping blocks of the one before, attends to a map reduced
in space, and mixes neighbours by a depthwise convolution between two linear layers, so that no
position is learnt and any size will do. The decoder is linear layers alone. The paper's linear
layer for each stage and the one that fuses their concatenation have nothing between them; here they
are one layer for each stage, and the fused map is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers import (
    Attention,
    DepthwiseConv,
    InstanceNorm,
    check_number,
    check_numbers,
    check_size,
    resize,
)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, D, H, W) to (B, D·H·W, C)."""
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D·H·W, C) to (B, C, D, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size)


class MixFFN(nn.Module):
    """Linear, depthwise 3x3x3 convolution, GELU, linear: tokens (B, N, width) to as many."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.mix = DepthwiseConv(ratio * width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens of a map of `size`."""
        y = self.mix(_map(self.first(x), size))
        z: Tensor = self.second(F.gelu(_tokens(y)))
        return z


class Block(nn.Module):
    """Attention to a map `reduction` times smaller along each axis, then `MixFFN`; both around a
    shortcut.
    """

    def __init__(self, width: int, *, heads: int, reduction: int, ratio: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads), MixFFN(width, ratio)
        self.reduce: nn.Module | None = None
        if reduction > 1:
            self.reduce = nn.Conv3d(width, width, kernel_size=reduction, stride=reduction)
            self.norm_reduced = nn.LayerNorm(width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens (B, N, width) of a map of `size`."""
        y = self.norm_attention(x)
        keys = y if self.reduce is None else self.norm_reduced(_tokens(self.reduce(_map(y, size))))
        x = x + self.attention(y, keys)
        z: Tensor = x + self.ffn(self.norm_ffn(x), size)
        return z


class Stage(nn.Module):
    """Overlapped embedding and blocks: (B, channels, D, H, W) to (B, width, D/stride, H/stride,
    W/stride).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int,
        depth: int,
        heads: int,
        reduction: int,
        ratio: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv3d(
            channels, width, kernel_size=2 * stride - 1, stride=stride, padding=stride - 1
        )
        self.norm_embed, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, heads=heads, reduction=reduction, ratio=ratio) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The map of this stage."""
        x = self.embed(x)
        size = x.shape[2:]
        x = self.norm_embed(_tokens(x))
        for block in self.blocks:
            x = block(x, size)
        return _map(self.norm(x), size)


class SegFormer(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `SegFormer.multiple`.

    Options have one number a stage, the finest first: `widths`, `strides` (from the stage before:
    1, 2 or 4), `depths` (blocks), `heads`, and `reductions` of the map that is attended to. `ratio`
    is how much wider `MixFFN` is inside, `decoder` how wide the decoder is. Logits are made at the
    size of the first stage and interpolated.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        widths: Sequence[int] = (32, 64, 160, 256),
        strides: Sequence[int] = (4, 2, 2, 2),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (4, 2, 1, 1),
        ratio: int = 4,
        decoder: int = 256,
    ) -> None:
        super().__init__()
        stages = len(widths)
        check_numbers("widths", widths, 4096)
        for name, numbers, most in (
            ("strides", strides, 4),
            ("depths", depths, 64),
            ("heads", heads, 64),
            ("reductions", reductions, 16),
        ):
            check_numbers(name, numbers, most=most, count=stages)
        check_number("ratio", ratio, 16)
        check_number("decoder", decoder, 4096)
        self.channels, self.classes = channels, classes
        self.multiple = math.lcm(*map(mul, accumulate(strides, mul), reductions))
        inputs = [channels, *widths[:-1]]
        self.stages = nn.ModuleList(
            Stage(
                inputs[n],
                widths[n],
                stride=strides[n],
                depth=depths[n],
                heads=heads[n],
                reduction=reductions[n],
                ratio=ratio,
            )
            for n in range(stages)
        )
        # Norm and activation come after the sum, so one bias is enough, and the norm has it.
        self.linear = nn.ModuleList(nn.Conv3d(width, decoder, 1, bias=False) for width in widths)
        self.fuse = nn.Sequential(InstanceNorm(decoder), nn.LeakyReLU(0.01, inplace=True))
        self.classifier = nn.Conv3d(decoder, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        check_size(x, self.multiple)
        size, maps = x.shape[2:], []
        for stage, linear in zip(self.stages, self.linear, strict=True):
            x = stage(x)
            maps.append(linear(x))
        total = maps[0]
        for y in maps[1:]:
            total = total + resize(y, total.shape[2:])
        return resize(self.classifier(self.fuse(total)), size)
