"""Blocks of MONAI's transformers in forms that are fast on a CPU, for `accelerate`.

A stage of a Swin transformer attends in windows. MONAI's makes the table of all pairs of a window's
tokens four times over, and one mask for every window, of which nearly all are alike; here tokens
are gathered once a block, windows that are masked alike lie together, and PyTorch's fused attention
takes positions and mask as one small table. A residual block's norms, sum and activation are one
pass, its 1x1x1 convolution a product of matrices, and what it joins is not copied. What comes out
differs by rounding alone.

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

from medseg.inference.backends.accelerate import (
    Deferred,
    FastConv,
    Source,
    is_half,
    is_plain,
    sources_of,
)
from medseg.networks.ops.norm import moments

#: Rows of tokens or voxels that go through several layers while they lie in the cache.
_ROWS = 4096
#: Bytes of projected tokens of the windows that attend at a time.
_PROJECTED_BYTES = 2**25
#: What MONAI adds to the products of tokens that are not to see each other.
_APART = -100.0


def form_of(module: nn.Module) -> nn.Module | None:
    """The fast form of a block of MONAI's or of a 1x1x1 convolution, or None."""
    if type(module) is nn.Conv3d and _is_pointwise(module):
        return FastPoint(module)
    if not type(module).__module__.startswith("monai."):
        return None
    make = _FORMS.get(type(module).__name__)
    return None if make is None else make(module)


def _runs_plainly(x: Tensor) -> bool:
    """Whether a tensor is one for the original modules: on another device, or with gradients."""
    return x.device.type != "cpu" or torch.is_grad_enabled()


# Convolutions -------------------------------------------------------------------------------------


def _is_pointwise(conv: nn.Conv3d) -> bool:
    """Whether a convolution is one product of matrices."""
    plain = conv.groups == 1 and conv.padding == (0, 0, 0) and conv.weight.dtype == torch.float32
    return plain and conv.kernel_size == conv.stride == (1, 1, 1)


def _pointwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A 1x1x1 convolution of a map in float32, perhaps of joined ones, channels innermost."""
    rows, channel = None, 0
    weight = conv.weight.flatten(1)
    maps = [source.settle() for source in sources_of(x)]
    for one in maps:
        part = weight[:, channel : channel + one.shape[1]]
        flat = one.permute(0, 2, 3, 4, 1).reshape(-1, one.shape[1])
        channel += one.shape[1]
        if rows is None:
            rows = F.linear(flat, part, conv.bias)
        else:
            torch.addmm(rows, flat, part.T, out=rows)
    assert rows is not None
    shape = (maps[0].shape[0], *maps[0].shape[2:], conv.out_channels)
    return rows.view(shape).permute(0, 4, 1, 2, 3)


class FastPoint(nn.Module):
    """A 1x1x1 convolution as a product of matrices."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D, H, W)."""
        if _runs_plainly(x) or is_half(x) or x.dtype != torch.float32:
            y: Tensor = self.conv(x)
            return y
        return _pointwise(x, self.conv)


class FastResidual(nn.Module):
    """Two convolutions around a shortcut, MONAI's `UnetResBlock`; the last norms, the sum and the
    activation are one pass.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain, self.slope = plain, float(plain.lrelu.negative_slope)
        self.first = FastConv(plain.conv1.conv, plain.norm1, self.slope)
        self.second = FastConv(plain.conv2.conv, plain.norm2, 1.0)
        self.shortcut = _bare(plain.conv3.conv) if plain.downsample else None
        self._norm = FastConv(self.shortcut, plain.norm3) if self.shortcut is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D, H, W)."""
        if _runs_plainly(x) or is_half(x) or x.dtype != torch.float32:
            z: Tensor = self.plain(x)
            return z
        y = self.second.source(self.first(x), half=False)
        if self.shortcut is None or self._norm is None:
            (shortcut,) = [source.settle() for source in sources_of(x)]
            other = Source(shortcut)
        else:
            shortcut = _pointwise(x, self.shortcut)
            other = Source(shortcut, *self._norm.normalisation(shortcut, moments(shortcut)))
        return _sum(y, other, self.slope)


def _sum(y: Source, other: Source, slope: float) -> Tensor:
    """leaky_relu(norm(y) + norm(other), slope), in the memory of y."""
    assert y.scale is not None and y.shift is not None
    batch, channels = y.map.shape[:2]
    shift = y.shift if other.shift is None else y.shift + other.shift
    scales, shifts = (torch.from_numpy(one).view(batch, channels) for one in (y.scale, shift))
    seconds = None
    if other.scale is not None:
        seconds = torch.from_numpy(other.scale).view(batch, channels)
    for n in range(batch):
        rows, more = (one.map[n].permute(1, 2, 3, 0).reshape(-1, channels) for one in (y, other))
        for low in range(0, len(rows), _ROWS):
            part, addend = rows[low : low + _ROWS], more[low : low + _ROWS]
            torch.addcmul(shifts[n], part, scales[n], out=part)
            if seconds is None:
                part.add_(addend)
            else:
                part.addcmul_(addend, seconds[n])
            F.leaky_relu_(part, slope)
    return y.map


class FastJoin(nn.Module):
    """A map twice as fine, joined with another one of its size and convolved: MONAI's
    `UnetrUpBlock`, which copies both to join them.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, channels, D, H, W) and (B, features, 2D, 2H, 2W) to the size of the latter."""
        if _runs_plainly(x) or is_half(x) or x.dtype != torch.float32:
            y: Tensor = self.plain(x, skip)
            return y
        fine = self.plain.transp_conv(x)
        y = self.plain.conv_block(Deferred([*sources_of(fine), *sources_of(skip)]))
        return y


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
        self._tables: dict[tuple[int, int], Tensor] = {}

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
        y = torch.empty_like(x)
        for n in range(len(x)):
            rows = x[n].flatten(0, 2)
            for number, block in enumerate(plain.blocks):
                steps = [
                    0 if length <= side else step
                    for length, side, step in zip(size, plain.window_size, block.shift_size)
                ]
                places = _windows(size, window, (steps[0], steps[1], steps[2]))
                rows = self._attended(rows, block, number, places)
                rows = _mixed(rows, block)
            y[n] = rows.view(*size, -1)
        if plain.downsample is not None:
            y = plain.downsample(y)
        return y.permute(0, 4, 1, 2, 3)

    def _attended(self, rows: Tensor, block: Any, number: int, places: _Windows) -> Tensor:
        """Tokens (T, width) with what they see in their windows."""
        attention = block.attn
        tokens = len(places.order) // places.tokens
        width, heads = rows.shape[1], attention.num_heads
        normed = block.norm1(rows)
        table = self._table(attention, number, tokens)
        seen = torch.empty(len(places.order), width, dtype=rows.dtype)
        at = _PROJECTED_BYTES // (12 * width * tokens) or 1
        place = 0
        for count, mask in places.kinds:
            bias = table if mask is None else table + mask
            for low in range(0, count, at):
                some = min(at, count - low)
                span = slice(place, place + some * tokens)
                here = normed.index_select(0, places.order[span])
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
        return seen.index_select(0, places.back).add_(rows)

    def _table(self, attention: Any, number: int, tokens: int) -> Tensor:
        """What relative positions add, (1, heads, N, N); of fewer tokens than a window has, the
        first ones', as in MONAI."""
        if (number, tokens) not in self._tables:
            index = attention.relative_position_index[:tokens, :tokens].reshape(-1)
            table = attention.relative_position_bias_table[index].view(tokens, tokens, -1)
            self._tables[number, tokens] = table.permute(2, 0, 1)[None].contiguous()
        return self._tables[number, tokens]


def _mixed(rows: Tensor, block: Any) -> Tensor:
    """Tokens (T, width) and what a perceptron adds to each, in their memory."""
    for low in range(0, len(rows), _ROWS):
        part = rows[low : low + _ROWS]
        part.add_(block.mlp(block.norm2(part)))
    return rows


# What is replaced ---------------------------------------------------------------------------------


def _residual(module: Any) -> nn.Module | None:
    """Where convolutions and norms are those that `FastConv` does."""
    names = ("conv1", "conv2", "conv3") if module.downsample else ("conv1", "conv2")
    convs = [_bare(getattr(getattr(module, name), "conv", None)) for name in names]
    plain = all(isinstance(conv, nn.Conv3d) and is_plain(conv) for conv in convs)
    norms = [getattr(module, name.replace("conv", "norm")) for name in names]
    fits = all(isinstance(n, nn.GroupNorm) and n.num_groups == n.num_channels for n in norms)
    if not plain or not fits or type(module.lrelu) is not nn.LeakyReLU:
        return None
    if module.downsample and not _is_pointwise(convs[-1]):
        return None
    return FastResidual(module)


def _bare(conv: Any) -> Any:
    """A convolution, also one that has its fast form already."""
    return conv.conv if isinstance(conv, FastPoint) else conv


def _join(module: Any) -> nn.Module | None:
    fits = isinstance(module.conv_block, FastResidual)
    return FastJoin(module) if fits else None


def _stage(module: Any) -> nn.Module | None:
    """Where blocks are those of windows that attend."""
    plain = all(type(block).__name__ == "SwinTransformerBlock" for block in module.blocks)
    return FastStage(module) if plain and len(module.window_size) == 3 else None


#: Name of a block of MONAI's -> what makes its fast form, or None where it has none.
_FORMS: dict[str, Callable[[Any], nn.Module | None]] = {
    "UnetResBlock": _residual,
    "UnetrUpBlock": _join,
    "BasicLayer": _stage,
}
