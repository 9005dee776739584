"""Layers that several architectures share: convolutions and norms, cells, resizing, attention;
checks of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.ops import card_norm, depthwise, norm as cpu_norm


def check_numbers(
    name: str, numbers: Sequence[int], most: int, count: int | None = None, least: int = 1
) -> None:
    """Raise `ValueError` unless `numbers` are `count` (by default at most 10) whole numbers from
    `least` to `most`.
    """
    right = 1 <= len(numbers) <= 10 if count is None else len(numbers) == count
    if not right or not all(type(number) is int and least <= number <= most for number in numbers):
        many = "1 to 10" if count is None else str(count)
        raise ValueError(
            f"{name} {list(numbers)!r:.80} is not {many} whole numbers from {least} to {most}"
        )


def check_number(name: str, number: int, most: int, least: int = 1) -> None:
    """Raise `ValueError` unless `number` is a whole number from `least` to `most`."""
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{name} {number!r:.80} is not a whole number from {least} to {most}")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) interpolated trilinearly to (B, C, *size); cells stay where they are
    (`align_corners=False`).

    Equal to `F.interpolate`, as one small matrix an axis: on a GPU its gradient is the same every
    time, which that of PyTorch's kernel is not.
    """
    for axis, length in enumerate(size, 2):
        if length != x.shape[axis]:
            weights = _linear(x.shape[axis], length, x.device).to(x.dtype)
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            last = axis == x.ndim - 1
            x = x @ weights.T if last else weights @ x.reshape(-1, x.shape[axis], after.numel())
            x = x.reshape(*before, length, *after)
    return x


def _linear(length: int, wanted: int, device: torch.device) -> Tensor:
    """(wanted, length): weights that interpolate `length` cells of an axis at the middles of
    `wanted` ones.
    """
    at = ((torch.arange(wanted, device=device) + 0.5) * (length / wanted) - 0.5).clamp(
        0, length - 1
    )
    return (1 - (at[:, None] - torch.arange(length, device=device)).abs()).clamp(min=0)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The map normalised at each voxel."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of tokens (B, N, width) to other tokens (B, M,
    width).

    Keys have no bias, as softmax would cancel it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, to: Tensor, allowed: Tensor | None = None, position: Tensor | None = None
    ) -> Tensor:
        """(B, N, width). `allowed` (B, N, M) bool says where to look; `position` (.., M, width) is
        added to keys.
        """
        b, n, width = x.shape
        split = lambda y: y.view(b, -1, self.heads, width // self.heads).transpose(1, 2)  # noqa: E731
        keys = to if position is None else to + position
        mask = None if allowed is None else allowed[:, None]
        y = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(keys)), split(self.value(to)), attn_mask=mask
        )
        return self.out(y.transpose(1, 2).reshape(b, n, width))


class DepthwiseConv(nn.Conv3d):
    """A convolution of each channel by itself, of an odd kernel, that keeps the size but for its
    stride; on a CPU it learns several times faster than PyTorch's.
    """

    def __init__(
        self, channels: int, kernel: int = 3, *, stride: int = 1, bias: bool = True, **place: Any
    ) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size=kernel,
            stride=stride,
            padding=kernel // 2,
            groups=channels,
            bias=bias,
            **place,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C, D/stride, ...)."""
        y = depthwise.convolve(x, self) if depthwise.can_learn(x, self) else super().forward(x)
        return y


class InstanceNorm(nn.GroupNorm):
    """Instance norm as a group norm of one channel a group: equal values, several times faster on a
    CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        y = normed(x, self)
        return super().forward(x) if y is None else y


def normed(x: Tensor, norm: nn.Module, slope: float = 1.0) -> Tensor | None:
    """leaky_relu(norm(x), slope) where that is one step: of maps with channels last, on a CPU, or
    on a card that Triton has kernels for; None elsewhere.
    """
    for ops in (cpu_norm, card_norm):
        if ops.can_fuse(x, norm):
            assert isinstance(norm, nn.GroupNorm)
            y: Tensor = ops.norm_activate(x, norm, slope)
            return y
    return None


class Block(nn.Sequential):
    """A convolution, instance norm and leaky ReLU; the latter two are one step where they can
    be.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D/stride, ...)."""
        y: Tensor = self[0](x)
        norm: Any = self[1]
        activation: Any = self[2]
        slope = getattr(activation, "negative_slope", None)  # other programs' ReLUs have none
        fused = None if slope is None else normed(y, norm, slope)
        if fused is not None:
            return fused
        y = activation(norm(y))
        return y


def has_depthwise(network: nn.Module) -> bool:
    """Whether channels of a network are convolved one by one: on a card that is done channels
    first, and maps whose channels lie last are turned over before and after.
    """
    convolutions = [one for one in network.modules() if isinstance(one, nn.Conv3d)]
    return any(one.groups == one.in_channels > 1 for one in convolutions)


def likes_channels_last(network: nn.Module) -> bool:
    """Whether training in bfloat16 on a CPU is faster with channels innermost: if all norms are
    those of this file.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm | nn.InstanceNorm3d)]
    return bool(norms) and all(isinstance(norm, InstanceNorm) for norm in norms)


#: One number an axis.
Three = tuple[int, int, int]


def conv(channels: int, features: int, stride: int | Three = 1, kernel: Three = (3, 3, 3)) -> Block:
    """Convolution, instance norm, leaky ReLU: (B, channels, D, H, W) to (B, features, D/stride,
    ...).
    """
    return Block(
        convolution(channels, features, stride=stride, kernel=kernel),
        InstanceNorm(features),
        nn.LeakyReLU(0.01, inplace=True),
    )


def convolution(
    channels: int, features: int, stride: int | Three = 1, kernel: Three = (3, 3, 3)
) -> nn.Conv3d:
    """A convolution of odd kernel that keeps the size, but for its stride; the norm after it makes
    a bias needless.
    """
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(
        channels, features, kernel_size=kernel, stride=stride, padding=padding, bias=False
    )


class Residual(nn.Module):
    """Two convolutions around a shortcut (He et al. 2016); the shortcut is averaged and projected
    where it must be.
    """

    def __init__(
        self, channels: int, features: int, stride: int | Three = 1, kernel: Three = (3, 3, 3)
    ) -> None:
        super().__init__()
        self.first = conv(channels, features, stride=stride, kernel=kernel)
        self.second = nn.Sequential(
            convolution(features, features, stride=1, kernel=kernel), InstanceNorm(features)
        )
        # A strided 1x1x1 convolution on summed neighbours would need avg_pool3d, which CPUs lack in
        # bfloat16.
        self.shortcut: nn.Module = nn.Identity()
        if stride not in (1, (1, 1, 1)) or channels != features:
            self.shortcut = nn.Sequential(
                nn.Conv3d(channels, features, kernel_size=stride, stride=stride, bias=False),
                InstanceNorm(features),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D/stride, H/stride, W/stride)."""
        return F.leaky_relu(self.second(self.first(x)) + self.shortcut(x), 0.01)


def check_size(x: Tensor, multiple: int | Sequence[int]) -> None:
    """Raise `ValueError` unless each spatial size of x (B, C, D, H, W) is a multiple of `multiple`,
    one or three.
    """
    per_axis = [multiple] * 3 if isinstance(multiple, int) else multiple
    if any(size % each for size, each in zip(x.shape[2:], per_axis)):
        factors = (
            multiple if isinstance(multiple, int) else " x ".join(str(each) for each in multiple)
        )
        raise ValueError(
            f"a patch of {tuple(x.shape[2:])} is not a multiple of {factors} along every axis"
        )


def unfold_cells(x: Tensor, s: int) -> Tensor:
    """(B, K·s³, d, h, w) to (B, K, d·s, h·s, w·s): each cell's channels become its s x s x s
    voxels.
    """
    b, c, d, h, w = x.shape
    return folded_cells(x, s).reshape(b, c // s**3, d * s, h * s, w * s) if s > 1 else x


def folded_cells(x: Tensor, s: int) -> Tensor:
    """(B, K·s³, d, h, w) as (B, K, d, s, h, s, w, s) without a copy; as it is where s is 1."""
    b, c, d, h, w = x.shape
    return x.view(b, c // s**3, s, s, s, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4) if s > 1 else x
