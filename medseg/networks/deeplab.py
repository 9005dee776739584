"""DeepLab v3+ in 3-D (Chen et al. 2018, arXiv:1802.02611): a residual encoder, an atrous spatial
pyramid, a decoder.

The last levels of the encoder do not halve the image further but spread their kernels (atrous
convolution). The pyramid looks at their output at several rates and as a whole. The decoder joins
it with maps of a finer level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers import (
    Block,
    InstanceNorm,
    Residual,
    check_number,
    check_numbers,
    check_size,
    conv,
    resize,
)


def _atrous(channels: int, features: int, rate: int) -> Block:
    """3x3x3 convolution of neighbours `rate` voxels away (0: 1x1x1), instance norm, leaky ReLU."""
    layer = nn.Conv3d(
        channels,
        features,
        kernel_size=3 if rate else 1,
        padding=rate,
        dilation=max(1, rate),
        bias=False,
    )
    return Block(layer, InstanceNorm(features), nn.LeakyReLU(0.01, inplace=True))


class AtrousResidual(nn.Module):
    """A residual block (B, features, D, H, W) whose kernels are spread by `rate`."""

    def __init__(self, features: int, rate: int) -> None:
        super().__init__()
        self.first = _atrous(features, features, rate)
        self.second = nn.Sequential(
            nn.Conv3d(features, features, 3, padding=rate, dilation=rate, bias=False),
            InstanceNorm(features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """As large as x."""
        return F.leaky_relu(self.second(self.first(x)) + x, 0.01)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: (B, channels, D, H, W) to (B, features, D, H, W)."""

    def __init__(self, channels: int, features: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_atrous(channels, features, rate) for rate in (0, *rates))
        # The mean over the image is a single voxel, which instance norm would make zero; it has a
        # bias instead.
        self.whole = nn.Linear(channels, features)
        self.join = _atrous((len(rates) + 2) * features, features, 0)

    def forward(self, x: Tensor) -> Tensor:
        """All branches and the mean of the image, joined."""
        maps = [branch(x) for branch in self.branches]
        whole = F.leaky_relu(self.whole(x.mean((2, 3, 4))), 0.01)
        maps.append(whole[:, :, None, None, None].expand_as(maps[0]))
        y: Tensor = self.join(torch.cat(maps, 1))
        return y


class DeepLab(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `DeepLab.multiple`.

    `features` and `blocks` (as many) run from the finest level down; each level but the first
    halves the image, and `atrous` more residual blocks work at the coarsest, spread by 2, 4, 8 ....
    `rates` are those of the pyramid of `pyramid` features. The decoder works at level `skip`, to
    whose maps, reduced to `reduced` features, the pyramid is interpolated, and its logits are
    interpolated to the image. In training mode with `deep_supervision` a list of two logits: the
    answer, and the pyramid's own at the coarsest level.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256),
        blocks: Sequence[int] | None = None,
        atrous: int = 2,
        rates: Sequence[int] = (2, 4, 6),
        pyramid: int = 128,
        skip: int = 1,
        reduced: int = 48,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        levels = len(features)
        blocks = blocks or [2] * levels
        check_numbers("features", features, 4096)
        check_numbers("blocks", blocks, most=64, count=levels)
        check_numbers("rates", rates, 64)
        for name, number, most, least in (
            ("atrous", atrous, 5, 0),
            ("pyramid", pyramid, 4096, 1),
            ("skip", skip, levels - 1, 0),
            ("reduced", reduced, 4096, 1),
        ):
            check_number(name, number, most=most, least=least)
        self.channels, self.classes, self.skip, self.deep_supervision = (
            channels,
            classes,
            skip,
            deep_supervision,
        )
        self.multiple = 2 ** (levels - 1)
        inputs = [channels, *features[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                Residual(inputs[n], features[n], 1 if n == 0 else 2),
                *(Residual(features[n], features[n]) for _ in range(blocks[n] - 1)),
            )
            for n in range(levels)
        )
        self.atrous = nn.Sequential(
            *(AtrousResidual(features[-1], 2 ** (n + 1)) for n in range(atrous))
        )
        self.pyramid = Pyramid(features[-1], pyramid, rates)
        self.reduce = _atrous(features[skip], reduced, 0)
        self.decoder = nn.Sequential(conv(pyramid + reduced, pyramid), conv(pyramid, pyramid))
        self.classifier = nn.Conv3d(pyramid, classes, 1)
        self.deep_heads = nn.ModuleList(
            [nn.Conv3d(pyramid, classes, 1)] if deep_supervision else []
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in training with deep supervision a list of two, finest first."""
        check_size(x, self.multiple)
        size, fine = x.shape[2:], x
        for level, stage in enumerate(self.encoder):
            x = stage(x)
            if level == self.skip:
                fine = x
        coarse = self.pyramid(self.atrous(x))
        features = torch.cat((resize(coarse, fine.shape[2:]), self.reduce(fine)), 1)
        logits = resize(self.classifier(self.decoder(features)), size)
        if not (self.training and self.deep_supervision):
            return logits
        return [logits, self.deep_heads[0](coarse)]
