"""nnU-Net's two U-Nets, plain and with a residual encoder, in the shape in which its weights come.

Isensee et al. 2021 and 2024 (arXiv:2404.09556), as `dynamic_network_architectures` 0.4 builds them.
Unlike `unet` the residual encoder has a stem, convolutions may have biases, a shortcut that only
becomes smaller is pooling alone, and norms may be batch norms. Flat (2d) networks are networks
whose kernels and strides along the first axis are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers import (
    Block,
    InstanceNorm,
    Three,
    check_number,
    check_numbers,
    check_size,
    normed,
)


class Norm(InstanceNorm):
    """Instance norm that for plain maps is PyTorch's own, as group norms round otherwise (1e-5 of
    the logits)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        if self.training or x.device.type == "meta":
            return super().forward(x)
        y = normed(x, self)
        return (
            y
            if y is not None
            else F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        )


class BatchNorm(nn.Module):
    """Batch norm; unlike PyTorch's it does not count its batches: all it keeps are floating point
    numbers."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(features)),
            nn.Parameter(torch.zeros(features)),
        )
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)  # type: ignore[arg-type]


class Pool(nn.Module):
    """Mean over blocks of voxels; a CPU has no pooling in bfloat16, so there slices are added
    up."""

    def __init__(self, stride: Three) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C, D/stride, H/stride, W/stride)."""
        if x.dtype == torch.float32:
            return F.avg_pool3d(x, self.stride, self.stride)
        a, b, c = self.stride
        parts = [x[:, :, i::a, j::b, k::c] for i in range(a) for j in range(b) for k in range(c)]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return (total / len(parts)).to(x.dtype)


class NamedBlock(Block):
    """A convolution, a norm and maybe an activation, under those names."""

    def __init__(self, conv: nn.Conv3d, norm: nn.Module, slope: float | None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        if slope is not None:
            self.activation = nn.LeakyReLU(slope, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D/stride, H/stride, W/stride)."""
        if len(self) == 3 and not isinstance(self.norm, BatchNorm):
            return super().forward(x)
        for layer in self:
            x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut (`BasicBlockD`): pooled where it shrinks, projected where
    it widens."""

    def __init__(self, first: NamedBlock, second: NamedBlock, pool: Pool | None,
    project: NamedBlock | None,
                 slope: float) -> None:  # fmt: skip
        super().__init__()
        self.first, self.second, self.pool, self.project, self.slope = (
            first,
            second,
            pool,
            project,
            slope,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D/stride, H/stride, W/stride)."""
        shortcut = x if self.pool is None else self.pool(x)
        if self.project is not None:
            shortcut = self.project(shortcut)
        return F.leaky_relu(self.second(self.first(x)) + shortcut, self.slope)


def _threes(name: str, threes: Sequence[Sequence[int]], most: int, stages: int) -> list[Three]:
    """Three numbers a stage. Raises `ValueError`."""
    check_number(f"entries of {name}", len(threes), stages, least=stages)
    for three in threes:
        check_numbers(name, three, most, count=3)
    return [(three[0], three[1], three[2]) for three in threes]


def _stage(
    first: Callable[[], nn.Module], other: Callable[[], nn.Module], blocks: int
) -> nn.Sequential:
    """Blocks one after the other, of which the first changes the number of features."""
    return nn.Sequential(*(other() if number else first() for number in range(blocks)))


class NnUNet(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `multiple`.

    `features`, `kernels`, `strides` and `encoder_blocks` have an entry for each stage, finest
    first, `decoder_blocks` one fewer, deepest first, as nnU-Net counts them.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        features: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        encoder_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
        residual: bool = False,
        bias: bool = True,
        norm: Literal["instance", "batch"] = "instance",
        eps: float = 1e-5,
        slope: float = 0.01,
    ) -> None:
        super().__init__()
        stages = len(features)
        check_numbers("features", features, 4096)
        check_numbers("encoder_blocks", encoder_blocks, 64, count=stages)
        check_numbers("decoder_blocks", decoder_blocks, 64, count=stages - 1)
        kernel, stride = (
            _threes("kernels", kernels, 15, stages),
            _threes("strides", strides, 64, stages),
        )
        self.channels, self.classes, self.residual = channels, classes, residual
        self._norm, self._eps, self._slope, self._bias = norm, eps, slope, bias
        per_axis = tuple(math.prod(axis) for axis in zip(*stride))
        #: What patch sizes must be multiples of along each axis.
        self.multiple: tuple[int, ...] = per_axis
        self.entry = self._block(channels, features[0], kernel[0]) if residual else nn.Identity()
        inputs = [features[0] if residual else channels, *features[:-1]]
        make = self._residual if residual else self._block
        self.encoder = nn.ModuleList(
            _stage(
                partial(make, inputs[n], features[n], kernel[n], stride[n]),
                partial(make, features[n], features[n], kernel[n]),
                encoder_blocks[n],
            )
            for n in range(stages)
        )
        deepest_first = list(reversed(range(stages - 1)))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(
                features[n + 1], features[n], stride[n + 1], stride[n + 1], bias=bias
            )
            for n in deepest_first
        )
        self.decoder = nn.ModuleList(
            _stage(
                partial(self._block, 2 * features[n], features[n], kernel[n]),
                partial(self._block, features[n], features[n], kernel[n]),
                blocks,
            )
            for n, blocks in zip(deepest_first, decoder_blocks)
        )
        self.head = nn.Conv3d(features[0], classes, 1)

    def _block(
        self,
        channels: int,
        features: int,
        kernel: Three,
        stride: Three = (1, 1, 1),
        *,
        active: bool = True,
    ) -> NamedBlock:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        conv = nn.Conv3d(channels, features, kernel, stride, padding, bias=self._bias)
        return NamedBlock(conv, self._normed(features), self._slope if active else None)

    def _normed(self, features: int) -> nn.Module:
        if self._norm == "batch":
            return BatchNorm(features, self._eps)
        norm = Norm(features)
        norm.eps = self._eps
        return norm

    def _residual(
        self, channels: int, features: int, kernel: Three, stride: Three = (1, 1, 1)
    ) -> ResidualBlock:
        project = None
        if channels != features:
            project = NamedBlock(
                nn.Conv3d(channels, features, 1, bias=False), self._normed(features), None
            )
        return ResidualBlock(
            self._block(channels, features, kernel, stride=stride),
            self._block(features, features, kernel, active=False),
            None if stride == (1, 1, 1) else Pool(stride),
            project=project,
            slope=self._slope,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y: Tensor = self.head(self.features(x))
        return y

    def features(self, x: Tensor) -> Tensor:
        """What `head` makes logits of, (B, features, D, H, W)."""
        check_size(x, self.multiple)
        x = self.entry(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, stage in zip(self.up, self.decoder):
            x = stage(torch.cat((up(x), skips.pop()), 1))
        return x
