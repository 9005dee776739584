"""A fully convolutional network in 3-D, with skip fusion (Long et al. 2015, arXiv:1411.4038):
FCN-8s and its kin.

A chain of convolutions halves the image level by level. The coarsest levels are scored by 1x1x1
convolutions; scores are doubled by transposed convolutions that begin as trilinear interpolation,
and added. The finest sum is interpolated to the size of the image. Instance norm and strided
convolutions stand in for VGG's dropout and pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.networks.layers import check_number, check_numbers, check_size, conv, resize


class FCN(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `FCN.multiple`.

    `features` and `blocks` (convolutions, as many) run from the finest level down. `finest` is the
    level at which the sum of scores ends: 3 is the FCN-8s of the paper, whose scores are an eighth
    of the image's size, 0 the full size. In training mode with `deep_supervision` a list of logits:
    the answer, then the sums of every level, finest first.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        blocks: Sequence[int] | None = None,
        finest: int = 2,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        levels = len(features)
        blocks = blocks or [2] * levels
        check_numbers("features", features, 4096)
        check_numbers("blocks", blocks, most=64, count=levels)
        check_number("finest", finest, most=levels - 1, least=0)
        self.channels, self.classes, self.finest, self.deep_supervision = (
            channels,
            classes,
            finest,
            deep_supervision,
        )
        self.multiple = 2 ** (levels - 1)
        inputs = [channels, *features[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                conv(inputs[n], features[n], 1 if n == 0 else 2),
                *(conv(features[n], features[n]) for _ in range(blocks[n] - 1)),
            )
            for n in range(levels)
        )
        self.scores = nn.ModuleList(
            nn.Conv3d(features[n], classes, 1) for n in range(finest, levels)
        )
        self.up = nn.ModuleList(_doubling(classes) for _ in range(finest, levels - 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in training with deep supervision a list of them, finest first."""
        check_size(x, self.multiple)
        size, maps = x.shape[2:], []
        for level, stage in enumerate(self.encoder):
            x = stage(x)
            if level >= self.finest:
                maps.append(x)
        sums = [self.scores[-1](maps[-1])]
        for n in reversed(range(len(self.up))):
            sums.append(self.up[n](sums[-1]) + self.scores[n](maps[n]))
        logits = resize(sums[-1], size)
        if not (self.training and self.deep_supervision):
            return logits
        return [logits, *sums[::-1][1 if self.finest == 0 else 0 :]]


def _doubling(classes: int) -> nn.ConvTranspose3d:
    """A transposed convolution of stride 2 that begins as trilinear interpolation of every class by
    itself.
    """
    layer = nn.ConvTranspose3d(classes, classes, 4, stride=2, padding=1, bias=False)
    row = torch.tensor([0.25, 0.75, 0.75, 0.25])
    kernel = row[:, None, None] * row[:, None] * row
    with torch.no_grad():
        layer.weight.copy_(torch.eye(classes)[:, :, None, None, None] * kernel)
    return layer
