"""Primus (Wald et al. 2025, arXiv:2503.01835): a plain vision transformer, almost all of whose
weights are attention, in the form with which transformers first equalled nnU-Net.

Blocks of 8x8x8 voxels become tokens. Every token attends to every other; where each lies is told by
rotary positions along three axes (Su et al. 2021, arXiv:2104.09864), so that any size of patch will
do. Blocks are those of EVA-02 (Fang et al. 2023, arXiv:2303.11331): norms before attention and
before a SwiGLU (Shazeer 2020, arXiv:2002.05202), one more inside each of them, layer scale
(Touvron et al. 2021, arXiv:2103.17239) and stochastic depth (Huang et al. 2016). Transposed
convolutions, nothing else, make voxels of the tokens; the last of them is one layer, `head`, that
makes the 2x2x2 voxels of each cell.

The paper also adds a learnt vector at every place, which ties the network to one patch; the option
`patch` does that. Its register tokens and masked tokens are for other uses and not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers import (
    Attention,
    ChannelNorm,
    check_number,
    check_numbers,
    check_size,
    folded_cells,
    unfold_cells,
)

#: Name -> the paper's width of tokens, number of blocks, and heads: 23, 92, 145 and 324 million
#: weights.
SIZES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
#: The slowest rotation is this many times slower than the fastest.
_SLOWEST = 10_000.0
#: How much wider a SwiGLU is inside.
_RATIO = 8 / 3


def rotations(size: Sequence[int], features: int, device: torch.device | None = None) -> Tensor:
    """(2, D·H·W, features/2) cosines and sines of the angles by which pairs of features are turned.

    A third of the pairs turns with the place along each of the axes, the first of them by one
    radian a token.
    """
    pairs = features // 6
    rates = _SLOWEST ** -(torch.arange(pairs, device=device) / pairs)
    axes = [torch.arange(length, device=device)[:, None] * rates for length in size]
    x, y, z = axes[0][:, None, None], axes[1][:, None], axes[2]
    angles = torch.cat([axis.expand(*size, pairs) for axis in (x, y, z)], 3).flatten(0, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Features (B, heads, N, F), pair by pair turned as `rotations` (2, N, F/2) says."""
    cosine, sine = turns
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


class RotaryAttention(Attention):
    """Attention of tokens (B, N, width) to each other, whose queries and keys are turned by where
    they lie, and whose values are normed before they are mixed.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, width)."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key = rotate(split(self.query(x)), turns), rotate(split(self.key(x)), turns)
        y = F.scaled_dot_product_attention(query, key, split(self.value(x)))
        z: Tensor = self.out(self.norm(y.transpose(1, 2).flatten(2)))
        return z


class SwiGLU(nn.Module):
    """Two linear layers, one of which gates the other, a norm, and a third: tokens (B, N, width) to
    as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = int(width * _RATIO)
        self.gate, self.first = nn.Linear(width, inside), nn.Linear(width, inside)
        self.norm, self.out = nn.LayerNorm(inside), nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width)."""
        y: Tensor = self.out(self.norm(F.silu(self.gate(x)) * self.first(x)))
        return y


class Branch(nn.Module):
    """What one half of a block adds to the tokens: scaled, and in training left out for a share
    `drop` of the samples.
    """

    def __init__(self, width: int, inner: nn.Module, *, drop: float, layer_scale: float) -> None:
        super().__init__()
        self.norm, self.inner, self.drop = nn.LayerNorm(width), inner, drop
        self.scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, *turns: Tensor) -> Tensor:
        """Tokens (B, N, width), added to."""
        y = self.scale * self.inner(self.norm(x), *turns)
        if self.training and self.drop:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
            y = y * (kept / (1 - self.drop)).to(y.dtype)
        return x + y


class Block(nn.Module):
    """Attention, then a SwiGLU, each added to the tokens."""

    def __init__(self, width: int, heads: int, *, drop: float, layer_scale: float) -> None:
        super().__init__()
        attention, ffn = RotaryAttention(width, heads), SwiGLU(width)
        self.attention = Branch(width, attention, drop=drop, layer_scale=layer_scale)
        self.ffn = Branch(width, ffn, drop=drop, layer_scale=layer_scale)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Tokens (B, N, width)."""
        y: Tensor = self.ffn(self.attention(x, turns))
        return y


class Primus(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `Primus.multiple`.

    `size` is one of `SIZES`; `width`, `depth` and `heads` go over it, a width of six times as many
    features as heads, or a multiple. `token` is the block of voxels, 2, 4 or 8 along each axis.
    `decoder` has the features of the cells of 4 and of 2 voxels; without it they fall evenly from
    the width to twice the classes, as in the paper. `drop_path` is the share of samples that the
    last block is left out for (the first one for none), `layer_scale` what each block's share
    begins at. `patch` ties the network to one patch, at every place of which it learns a vector.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: str = "S",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        token: Sequence[int] = (8, 8, 8),
        decoder: Sequence[int] | None = None,
        drop_path: float = 0.2,
        layer_scale: float = 0.1,
        patch: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        width, depth, heads = _dimensions(size, width, depth, heads)
        decoder = _decoder(width, classes, decoder)
        _check_shares(drop_path, layer_scale)
        places = _places(token, patch)
        self.channels, self.classes, self.heads = channels, classes, heads
        self.multiple: int | tuple[int, ...] = token[0] if len(set(token)) == 1 else tuple(token)
        self.size = None if patch is None else tuple(patch)
        #: The head makes the logits of 2x2x2 voxels; in training they may stay together.
        self.stem, self.folded = 2, False
        x, y, z = token
        self.embed = nn.Conv3d(channels, width, kernel_size=(x, y, z), stride=(x, y, z))
        self.place = nn.Parameter(torch.zeros(1, places, width)) if places else None
        self.blocks = nn.ModuleList(
            Block(width, heads, drop=drop_path * n / max(1, depth - 1), layer_scale=layer_scale)
            for n in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Sequential()
        for before, after, least in zip((width, *decoder), decoder, (8, 4)):
            x, y, z = (2 if length >= least else 1 for length in token)
            self.decoder.extend(
                (
                    nn.ConvTranspose3d(before, after, kernel_size=(x, y, z), stride=(x, y, z)),
                    ChannelNorm(after, eps=1e-6),
                    nn.GELU(),
                )
            )
        self.head = nn.Conv3d(decoder[-1], classes * self.stem**3, 1)
        self._begin()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits = self.head(self.features(x))
        folded = self.training and self.folded
        return folded_cells(logits, self.stem) if folded else unfold_cells(logits, self.stem)

    def features(self, x: Tensor) -> Tensor:
        """What `head` makes logits of, (B, features, D/2, H/2, W/2)."""
        check_size(x, self.multiple)
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"a patch of {tuple(x.shape[2:])} is not the {self.size} that the network was"
                " made for"
            )
        x = self.embed(x)
        size, tokens = x.shape[2:], x.flatten(2).transpose(1, 2)
        if self.place is not None:
            tokens = tokens + self.place
        turns = rotations(size, tokens.shape[2] // self.heads, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, turns)
        y: Tensor = self.decoder(self.norm(tokens).transpose(1, 2).unflatten(2, size))
        return y

    def _begin(self) -> None:
        """The paper's first weights: small in the blocks, and smaller the deeper what adds to the
        tokens lies.
        """
        layers = [m for m in self.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            else:
                nn.init.kaiming_normal_(layer.weight, a=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.place is not None:
            nn.init.trunc_normal_(self.place, std=0.02)
        blocks: Any = self.blocks
        with torch.no_grad():
            for n, block in enumerate(blocks, 1):
                for branch in (block.attention, block.ffn):
                    branch.inner.out.weight.div_(math.sqrt(2 * n))


def _dimensions(
    size: str, width: int | None, depth: int | None, heads: int | None
) -> tuple[int, int, int]:
    """The width, depth and heads asked for. Raises `ValueError`."""
    if size not in SIZES:
        raise ValueError(f"size {size!r:.80} is none of {', '.join(SIZES)}")
    width, depth, heads = (
        usual if number is None else number
        for usual, number in zip(SIZES[size], (width, depth, heads))
    )
    check_number("width", width, 4096)
    check_number("depth", depth, 64)
    check_number("heads", heads, 64)
    if width % (6 * heads):
        raise ValueError(
            f"a width of {width} is no multiple of 6 for each of {heads} heads: rotary positions"
            " take two features an axis"
        )
    return width, depth, heads


def _decoder(width: int, classes: int, decoder: Sequence[int] | None) -> tuple[int, ...]:
    """The features of the decoder's two maps, by default the paper's. Raises `ValueError`."""
    if decoder is None:
        share = (width / (2 * classes)) ** (1 / 3)
        return tuple(max(8, 8 * round(width / share**n / 8)) for n in (1, 2))
    check_numbers("decoder", decoder, most=4096, count=2)
    return tuple(decoder)


def _check_shares(drop_path: float, layer_scale: float) -> None:
    """Raise `ValueError` for a share of all samples, and for a scale that no block begins at."""
    if isinstance(drop_path, str) or not 0 <= drop_path < 1:
        raise ValueError(f"drop_path {drop_path!r:.80} is not a number from 0 to below 1")
    if isinstance(layer_scale, str) or not 0 < layer_scale <= 1:
        raise ValueError(f"layer_scale {layer_scale!r:.80} is not a number above 0, at most 1")


def _places(token: Sequence[int], patch: Sequence[int] | None) -> int:
    """How many tokens have a learnt place. Raises `ValueError`."""
    check_numbers("token", token, most=8, count=3, least=2)
    if any(length not in (2, 4, 8) for length in token):
        raise ValueError(f"token {list(token)} is not 2, 4 or 8 along each axis")
    if patch is None:
        return 0
    check_numbers("patch", patch, most=1024, count=3)
    if any(length % each for length, each in zip(patch, token)):
        raise ValueError(f"patch {list(patch)} is not three multiples of {list(token)}")
    return math.prod(length // each for length, each in zip(patch, token))
