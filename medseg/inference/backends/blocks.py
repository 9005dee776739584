"""Blocks of MONAI's transformers in forms that are fast on a CPU, for `accelerate`.

A stage of a Swin transformer attends in windows. MONAI's makes the table of all pairs of a window's
tokens four times over, and one mask for every window, of which nearly all are alike; here tokens
are gathered once a block, windows that are masked alike lie together, and PyTorch's fused attention
takes positions and mask as one small table. What comes out differs by rounding alone.

Blocks are known by MONAI's names and by their parts; MONAI itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.inference.backends.lent import borrowed, room
from medseg.inference.backends.residual import FastPoint, is_pointwise, join_of, residual_of
from medseg.inference.backends.unetr import swin_of, unetr_of

#: Rows of tokens or voxels that go through several layers while they lie in the cache.
_ROWS = 4096
#: Bytes of projected tokens of the windows that attend at a time.
_PROJECTED_BYTES = 2**22
#: Planes of a map that are made half as fine at a time; an even number.
_PLANES = 8
#: What MONAI adds to the products of tokens that are not to see each other.
_APART = -100.0


def form_of(module: nn.Module) -> nn.Module | None:
    """The fast form of a block of MONAI's or of a 1x1x1 convolution, or None."""
    if type(module) is nn.Conv3d and is_pointwise(module):
        return FastPoint(module)
    if not type(module).__module__.startswith("monai."):
        return None
    make = _FORMS.get(type(module).__name__)
    return None if make is None else make(module)


def _runs_plainly(x: Tensor) -> bool:
    """Whether a tensor is one for the original modules: on another device, or with gradients."""
    return x.device.type != "cpu" or torch.is_grad_enabled()


# Attention in windows -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Where the tokens of a map lie in the windows of a block, windows that are masked alike
    together.

    order (W · N): the token of the map at each place, or any where `padded` (places), beyond the
    map. back (tokens): the place of each token. kinds: how many windows are alike, and what is
    added to their products, (N, N) or nothing.
    """

    tokens: int
    order: Tensor
    padded: Tensor
    back: Tensor
    kinds: tuple[tuple[int, Tensor | None], ...]


@lru_cache(maxsize=16)
def _windows(
    size: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> _Windows:
    """The windows of a map whose far end is padded to whole ones, and which is rolled by `shift`
    towards its beginning. What comes from beyond the near end does not see the rest."""
    axes, regions = [], []
    for length, side, step in zip(size, window, shift):
        full = -(-length // side) * side
        at = (torch.arange(full) + step) % full
        axes.append(at)
        places = torch.arange(full)
        region = (places >= full - side).long() + (places >= full - step).long() if step else at * 0
        regions.append(region)
    inside = [at < length for at, length in zip(axes, size)]
    steps = (size[1] * size[2], size[2], 1)
    token = _spread([at * step for at, step in zip(axes, steps)], sum)
    here = _spread(inside, lambda three: three[0] & three[1] & three[2])
    kind = _spread([region * 3**n for n, region in enumerate(regions)], sum)
    token, here, kind = (_cut(one, window) for one in (token, here, kind))
    alike, number = torch.unique(kind - kind[:, :1], dim=0, return_inverse=True)
    sequence = torch.argsort(number, stable=True)
    token, here = token[sequence].flatten(), here[sequence].flatten()
    count = size[0] * size[1] * size[2]
    back = torch.empty(count, dtype=torch.int64)
    back[token[here]] = torch.arange(len(token))[here]
    masks = [
        torch.where(row[:, None] != row[None], _APART, 0.0) if bool((row != row[0]).any()) else None
        for row in alike
    ]
    counts = torch.bincount(number, minlength=len(alike)).tolist()
    return _Windows(
        tokens=len(token) // len(alike[0]),
        order=torch.where(here, token, 0),
        padded=torch.nonzero(~here).flatten(),
        back=back,
        kinds=tuple(zip(counts, masks)),
    )


def _spread(axes: Sequence[Tensor], together: Callable[[Any], Any]) -> Tensor:
    """What three axes say together at every place, (D, H, W)."""
    x, y, z = axes
    grid: Tensor = together(
        list(torch.broadcast_tensors(x[:, None, None], y[None, :, None], z[None, None, :]))
    )
    return grid


def _cut(grid: Tensor, window: tuple[int, int, int]) -> Tensor:
    """(D, H, W) as windows (W, N)."""
    d, h, w = (length // side for length, side in zip(grid.shape, window))
    a, b, c = window
    return grid.view(d, a, h, b, w, c).permute(0, 2, 4, 1, 3, 5).reshape(d * h * w, a * b * c)


class FastStage(nn.Module):
    """A stage of a Swin transformer: MONAI's `BasicLayer` of plain blocks."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, 2 channels, D/2, H/2, W/2), channels innermost."""
        if _runs_plainly(x) or x.ndim != 5:
            z: Tensor = self.plain(x)
            return z
        plain: Any = self.plain
        x = x.permute(0, 2, 3, 4, 1).contiguous()
        size = (x.shape[1], x.shape[2], x.shape[3])
        # A map that is no larger than a window is one, and nothing is rolled along that axis.
        sides = [min(length, side) for length, side in zip(size, plain.window_size)]
        window = (sides[0], sides[1], sides[2])
        with borrowed():
            y = self._run(x, size, window)
        return y.permute(0, 4, 1, 2, 3)

    def _run(self, x: Tensor, size: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
        """A map (B, D, H, W, channels) through all blocks, made half as fine."""
        plain: Any = self.plain
        maps = []
        for n in range(len(x)):
            rows = x[n].flatten(0, 2)
            for block in plain.blocks:
                steps = [
                    0 if length <= side else step
                    for length, side, step in zip(size, plain.window_size, block.shift_size)
                ]
                places = _windows(size, window, (steps[0], steps[1], steps[2]))
                rows = _attended(rows, block, places)
                rows = _mixed(rows, block)
            maps.append(rows.view(1, *size, -1))
        y = maps[0] if len(maps) == 1 else torch.cat(maps)
        return y.clone() if plain.downsample is None else _merged(y, plain.downsample)


def _attended(rows: Tensor, block: Any, places: _Windows) -> Tensor:
    """Tokens (T, width) with what they see in their windows."""
    attention = block.attn
    tokens = len(places.order) // places.tokens
    width, heads = rows.shape[1], attention.num_heads
    result = room((len(rows), width), rows.dtype)
    seen = room((len(places.order), width), rows.dtype)
    table = _table(attention, tokens)
    at = _PROJECTED_BYTES // (12 * width * tokens) or 1
    place = 0
    for count, mask in places.kinds:
        bias = table if mask is None else table + mask
        for low in range(0, count, at):
            some = min(at, count - low)
            span = slice(place, place + some * tokens)
            here = block.norm1(rows.index_select(0, places.order[span]))
            if len(places.padded):
                inside = (places.padded >= span.start) & (places.padded < span.stop)
                here[places.padded[inside] - span.start] = 0
            qkv = attention.qkv(here).view(some, tokens, 3, heads, width // heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(
                query, key, value, scale=attention.scale,
                attn_mask=bias.to(query.dtype).expand(some, heads, tokens, tokens),
            )  # fmt: skip
            seen[span] = attention.proj(mixed.transpose(1, 2).reshape(-1, width))
            place = span.stop
    return torch.index_select(seen, 0, places.back, out=result).add_(rows)


def _table(attention: Any, tokens: int) -> Tensor:
    """What relative positions add, (1, heads, N, N); of fewer tokens than a window has, the
    first ones', as in MONAI. Made anew each time: all that a SwinUNETR needs take 29 MB.
    """
    index = attention.relative_position_index[:tokens, :tokens].reshape(-1)
    values = attention.relative_position_bias_table.T.contiguous()
    table = room((len(values), tokens * tokens), values.dtype)
    return torch.index_select(values, 1, index, out=table).view(1, -1, tokens, tokens)


def _mixed(rows: Tensor, block: Any) -> Tensor:
    """Tokens (T, width) and what a perceptron adds to each, in their memory."""
    for low in range(0, len(rows), _ROWS):
        part = rows[low : low + _ROWS]
        part.add_(block.mlp(block.norm2(part)))
    return rows


def _merged(x: Tensor, merging: Any) -> Tensor:
    """A map (B, D, H, W, channels) made half as fine, some planes at a time: MONAI's way of joining
    neighbours copies it twice.
    """
    if type(merging).__name__ not in ("PatchMerging", "PatchMergingV2"):
        y: Tensor = merging(x)
        return y
    return torch.cat([merging(part) for part in x.split(_PLANES, dim=1)], 1)


# What is replaced ---------------------------------------------------------------------------------


def _stage(module: Any) -> nn.Module | None:
    """Where blocks are those of windows that attend."""
    plain = all(type(block).__name__ == "SwinTransformerBlock" for block in module.blocks)
    return FastStage(module) if plain and len(module.window_size) == 3 else None


#: Name of a block of MONAI's -> what makes its fast form, or None where it has none.
_FORMS: dict[str, Callable[[Any], nn.Module | None]] = {
    "UnetResBlock": residual_of,
    "UnetrUpBlock": join_of,
    "BasicLayer": _stage,
    "SwinUNETR": swin_of,
    "UNETR": unetr_of,
}
