"""Residual blocks of MONAI's in forms that are fast on a CPU and take little memory, for
`accelerate`.

A residual block's norms, sum and activation are one pass, its 1x1x1 convolution a product of
matrices, and what it joins is not copied. A large map is made in the memory of the one that it is
made of: a window of 96x96x96 voxels in 48 channels takes 170 MB, and to fault that in takes as long
as a tenth of the convolution. What comes out differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.inference.backends.accelerate import (
    FEW,
    MARGIN,
    FastConv,
    FastUp,
    is_half,
    is_plain,
)
from medseg.inference.backends.deferred import (
    Deferred,
    Source,
    apart,
    empty_map,
    settled,
    sources_of,
)
from medseg.kernels.threads import in_parallel
from medseg.networks.ops.norm import LANES, moments, numbers, pieces

#: Maps of this many bytes are made in one another's place; smaller ones are had for little.
_LARGE_BYTES = 2**24
#: Voxels whose neighbourhoods are gathered for a product of matrices; and those of a map whose
#: convolution is left to oneDNN from so many pairs of channels on.
_FEW_VOXELS, _SOME_VOXELS, _MANY_PAIRS = 64, 4096, 2**15
#: Voxels of a 1x1x1 convolution that are one unit of work.
_POINT_VOXELS = 4608


def runs_plainly(x: Tensor) -> bool:
    """Whether a tensor is one for the original modules: on another device, with gradients, or not
    in float32.
    """
    return (
        x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype != torch.float32 or is_half(x)
    )


# Convolutions -------------------------------------------------------------------------------------


def is_pointwise(conv: nn.Conv3d) -> bool:
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
        if runs_plainly(x):
            y: Tensor = self.conv(x)
            return y
        return _pointwise(x, self.conv)


class DeepConv(FastConv):
    """A convolution whose weights take less memory, and of a few voxels less time.

    A few voxels take the weights as they lie: oneDNN copies them each time, which of 768 channels
    takes longer than to convolve. Of some more voxels and many channels it is oneDNN's: Winograd's
    weights are eight times as many numbers, 159 MB in a SwinUNETR, and save it 0.1 s of CPU.
    """

    def pays(self, x: Tensor) -> bool:
        """Whether one of the kernels here is to do it."""
        many = self.conv.in_channels * self.conv.out_channels >= _MANY_PAIRS
        return super().pays(x) and not (many and x.shape[2:].numel() <= _SOME_VOXELS)

    def _convolved(self, x: Tensor, **others: Any) -> tuple[Tensor, Any]:
        conv, voxels = self.conv, x.shape[0] * x.shape[2:].numel()  # which settles nothing
        around = conv.kernel_size == (3, 3, 3) and conv.padding == (1, 1, 1)
        plain = around and conv.stride == conv.dilation == (1, 1, 1)
        if others["half"] or not plain or voxels > _FEW_VOXELS or self.pays(x):
            return super()._convolved(x, **others)
        patches = F.pad(settled(x), (1,) * 6)
        for axis in (2, 3, 4):
            patches = patches.unfold(axis, 3, 1)
        rows = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(voxels, -1)
        y = F.linear(rows, conv.weight.flatten(1), conv.bias)
        return y.view(x.shape[0], *x.shape[2:], -1).permute(0, 4, 1, 2, 3), None


# Sums ---------------------------------------------------------------------------------------------


def _sum(y: Source, other: Source, slope: float) -> Tensor:
    """leaky_relu(norm(y) + norm(other), slope), in the memory of y."""
    from medseg.kernels.residual import add_voxels

    assert y.scale is not None and y.shift is not None
    shift = y.shift if other.shift is None else y.shift + other.shift
    factor = np.ones_like(y.scale) if other.scale is None else other.scale
    flat, addend = numbers(y.map), numbers(other.map)
    blocks, units, scale = y.map.shape[1] // LANES, pieces(y.map), y.scale

    def work(n: int) -> None:
        sample, first, count = units[n]
        add_voxels(flat, first, count, blocks, scale, shift, addend, factor, sample, slope)

    in_parallel(work, len(units), torch.get_num_threads())
    return y.map


def _sum_of_few(y: Source, few: Tensor, shortcut: FastConv, slope: float) -> Tensor:
    """The same of the 1x1x1 convolution of a few channels, which is not kept: its mean and variance
    follow from theirs.
    """
    from medseg.kernels.residual import add_few

    assert y.scale is not None and y.shift is not None
    (few,) = [source.settle() for source in sources_of(few)]
    batch, channels = few.shape[:2]
    rows = few.flatten(2).double()
    mean = rows.mean(2)
    rows = rows - mean[:, :, None]
    covariance = (rows @ rows.mT / rows.shape[2]).numpy()
    weight = shortcut.conv.weight.detach().flatten(1).double().numpy()
    bias = 0.0 if shortcut.conv.bias is None else shortcut.conv.bias.detach().double().numpy()
    spread = (
        mean.numpy() @ weight.T + bias,
        np.maximum(np.einsum("oi,bij,oj->bo", weight, covariance, weight), 0),
    )
    scale, shift = (one.reshape(batch, -1) for one in shortcut.normalisation(y.map, spread))
    weights = (scale[:, None] * weight.T[None]).astype(np.float32).ravel()
    offset = (y.shift.reshape(batch, -1) + shift + scale * bias).astype(np.float32).ravel()
    flat, values, factor = numbers(y.map), numbers(few), y.scale
    blocks, units = y.map.shape[1] // LANES, pieces(y.map)

    def work(n: int) -> None:
        sample, first, count = units[n]
        add_few(
            flat, first, count, blocks, factor, offset, values, channels, weights, sample, slope
        )  # fmt: skip

    in_parallel(work, len(units), torch.get_num_threads())
    return y.map


# Blocks -------------------------------------------------------------------------------------------


class Strip:
    """Memory of a map and of those that are made of it, one in the place of the other: each lies
    `MARGIN` planes before the one that it is made of. steps: how many are made.
    """

    def __init__(
        self, channels: int, size: tuple[int, ...], steps: int, *, is_apart: bool = False
    ) -> None:
        """is_apart: in memory that is given back when the strip is needed no more."""
        self._depth, planes = size[0], size[0] + steps * MARGIN
        count = planes * size[1] * size[2] * channels
        # For what malloc gives NumPy asks Linux for huge pages.
        memory = apart(count + LANES) if is_apart else np.empty(count + LANES, np.float32)
        start = -memory.ctypes.data // 4 % LANES
        self._planes = torch.from_numpy(memory[start : start + count]).view(
            planes, size[1], size[2], channels
        )

    @property
    def memory(self) -> Tensor:
        """All of it, flat."""
        return self._planes.view(-1)

    def map(self, step: int) -> Tensor:
        """(1, channels, D, H, W), channels innermost; the last one made is 0."""
        planes = self._planes[step * MARGIN : step * MARGIN + self._depth]
        return planes.permute(3, 0, 1, 2)[None]


class FastResidual(nn.Module):
    """Two convolutions around a shortcut, MONAI's `UnetResBlock`; the last norms, the sum and the
    activation are one pass.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain, self.slope = plain, float(plain.lrelu.negative_slope)
        self.first = DeepConv(plain.conv1.conv, plain.norm1, self.slope)
        self.second = DeepConv(plain.conv2.conv, plain.norm2, 1.0)
        self.shortcut = _bare(plain.conv3.conv) if plain.downsample else None
        self._norm = FastConv(self.shortcut, plain.norm3) if self.shortcut is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D, H, W)."""
        if runs_plainly(x):
            z: Tensor = self.plain(x)
            return z
        return self.made(x, self.strip_of(x))

    def strip_of(self, x: Tensor, *, is_apart: bool = False) -> Strip | None:
        """The memory in which the block of such a map is made, if it is made in place."""
        if not (self._turns(x.shape) and self.first.pays(x)):
            return None
        return Strip(self.second.conv.out_channels, tuple(x.shape[2:]), 1, is_apart=is_apart)

    def made(self, x: Tensor, strip: Strip | None) -> Tensor:
        """The block of a map in float32 on a CPU, in memory from `strip_of`."""
        y = self._convolved(x, *((strip.map(1), strip.map(0)) if strip else (None, None)))
        if self._norm is None or self.shortcut is None:
            (shortcut,) = [source.settle() for source in sources_of(x)]
            return _sum(y, Source(shortcut), self.slope)
        if self.shortcut.in_channels <= FEW:
            return _sum_of_few(y, x, self._norm, self.slope)
        return _sum(y, self._normed(_pointwise(x, self.shortcut)), self.slope)

    def joined(
        self, maps: list[Tensor], up: FastUp, skip: Tensor, *, spend: bool, strip: Strip | None
    ) -> Tensor:
        """The block of what `up` makes of the last map, joined with `skip`, each made in the place
        of the one before. spend: whether the shortcut may take the place of `skip`.
        """
        assert self.shortcut is not None
        size = tuple(skip.shape[2:])
        strip = strip or Strip(up.conv.out_channels, size, 2)
        fine = up.doubled(maps.pop(), strip.map(2))
        shortcut = skip if spend else empty_map(1, self.shortcut.out_channels, size)
        then = _pointwise_by_planes(fine, skip, self.shortcut, shortcut)
        both = Deferred([Source(fine), Source(skip)])
        first = self.first.source(both, half=False, y=strip.map(1), then=then)
        y = self.second.source(Deferred([first]), half=False, y=strip.map(0))
        return _sum(y, self._normed(shortcut), self.slope)

    def takes(self, skip: Tensor, channels: int) -> bool:
        """Whether `joined` does such a skip, joined with so many channels."""
        return (
            self._turns(skip.shape)
            and self.shortcut is not None
            and skip.shape[1] == channels == self.second.conv.out_channels
            and self.first.conv.in_channels == 2 * channels
            and self.first.pays(skip)
            and self.first.can_turn(tuple(skip.shape[2:]))
        )

    def _turns(self, shape: torch.Size) -> bool:
        """Whether the second convolution is to take the place of the first one's output."""
        channels, size = self.second.conv.out_channels, shape[2:]
        large = shape[0] == 1 and 4 * channels * size.numel() >= _LARGE_BYTES
        # The plan of a map of as many channels, without memory.
        plan = torch.empty((1, channels, *size), device="meta")
        return large and self.second.pays(plan) and self.second.can_turn(tuple(size))

    def _convolved(self, x: Tensor, middle: Tensor | None, last: Tensor | None) -> Source:
        """Both convolutions."""
        first = self.first.source(x, half=False, y=middle)
        return self.second.source(Deferred([first]), half=False, y=last)

    def _normed(self, shortcut: Tensor) -> Source:
        assert self._norm is not None
        return Source(shortcut, *self._norm.normalisation(shortcut, moments(shortcut)))


def _pointwise_by_planes(
    one: Tensor, two: Tensor, conv: nn.Conv3d, y: Tensor
) -> Callable[[int], None]:
    """What, called with a number of planes, brings the 1x1x1 convolution of two joined maps so far;
    y may be one of them.
    """
    from medseg.kernels.residual import POINT_VOXELS, pack_points, point_voxels

    outputs, plane = conv.out_channels, one.shape[3] * one.shape[4]
    weights = pack_points(conv.weight.detach().flatten(1).numpy())
    bias = np.zeros(outputs, np.float32) if conv.bias is None else conv.bias.detach().numpy()
    maps = [(numbers(x), x.shape[1]) for x in (one, two)]
    flat, done = numbers(y), [0]

    def then(planes: int) -> None:
        start, stop = done[0], max(done[0], planes * plane)

        def work(n: int) -> None:
            first = start + n * _POINT_VOXELS
            count = min(_POINT_VOXELS, stop - first)
            rows = np.empty(POINT_VOXELS * outputs, np.float32)
            point_voxels(*maps, first, count, weights, bias, flat, rows)

        in_parallel(work, -(-(stop - start) // _POINT_VOXELS), torch.get_num_threads())
        done[0] = stop

    return then


class FastJoin(nn.Module):
    """A map twice as fine, joined with another one of its size and convolved: MONAI's
    `UnetrUpBlock`, which copies both to join them.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, channels, D, H, W) and (B, features, 2D, 2H, 2W) to the size of the latter."""
        if runs_plainly(x):
            y: Tensor = self.plain(x, skip)
            return y
        return self.joined([x], skip, spend=False)

    def strip_of(self, size: tuple[int, ...]) -> Strip | None:
        """The memory in which `joined` makes a map of this size, if it makes it so."""
        skip = torch.empty(
            (1, self.plain.conv_block.second.conv.out_channels, *size), device="meta"
        )
        return Strip(skip.shape[1], size, 2) if self._up_of(skip) is not None else None

    def _up_of(self, skip: Tensor) -> FastUp | None:
        """What makes a map finer, where all is done in place."""
        up = getattr(self.plain.transp_conv, "conv", None)
        if not isinstance(up, FastUp):
            return None
        return up if self.plain.conv_block.takes(skip, up.conv.out_channels) else None

    def joined(
        self, maps: list[Tensor], skip: Tensor, *, spend: bool, strip: Strip | None = None
    ) -> Tensor:
        """The same of the last of the maps, which is taken away, in float32 on a CPU. spend:
        whether the memory of `skip` is needed no more. strip: from `strip_of`.
        """
        block = self.plain.conv_block
        if (up := self._up_of(skip)) is not None:
            before = skip
            (skip,) = [source.settle() for source in sources_of(skip)]
            return block.joined(maps, up, skip, spend=spend or skip is not before, strip=strip)
        fine = self.plain.transp_conv(maps.pop())
        y: Tensor = block(Deferred([*sources_of(fine), *sources_of(skip)]))
        return y


# What is replaced ---------------------------------------------------------------------------------


def residual_of(module: Any) -> nn.Module | None:
    """Where convolutions and norms are those that `FastConv` does."""
    names = ("conv1", "conv2", "conv3") if module.downsample else ("conv1", "conv2")
    convs = [_bare(getattr(getattr(module, name), "conv", None)) for name in names]
    plain = all(isinstance(conv, nn.Conv3d) and is_plain(conv) for conv in convs)
    norms = [getattr(module, name.replace("conv", "norm")) for name in names]
    fits = all(isinstance(n, nn.GroupNorm) and n.num_groups == n.num_channels for n in norms)
    if not plain or not fits or type(module.lrelu) is not nn.LeakyReLU:
        return None
    if module.downsample and not is_pointwise(convs[-1]):
        return None
    return FastResidual(module)


def _bare(conv: Any) -> Any:
    """A convolution, also one that has its fast form already."""
    return conv.conv if isinstance(conv, FastPoint) else conv


def join_of(module: Any) -> nn.Module | None:
    """Where the convolutions are those of a residual block."""
    return FastJoin(module) if isinstance(module.conv_block, FastResidual) else None
