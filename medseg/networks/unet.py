"""A 3-D U-Net, plain or with a residual encoder, with instance norm and optional deep supervision.

Ronneberger et al. 2015 (arXiv:1505.04597) in the form that nnU-Net made standard (Isensee et al.
2021 and, for the residual encoder, 2024, arXiv:2404.09556): strided convolutions go down,
transposed convolutions come up, leaky ReLU. With `stem=2` the network works at half the resolution
of its input and its head predicts the 2x2x2 voxels of each cell (sub-pixel convolution, Shi et al.
2016, arXiv:1609.05158): several times cheaper, for laptops. What is thinner than a cell, such as a
sulcus, gets lost there; with `own_intensity` a voxel's own intensity x enters its logits, a_k + b_k
x, with b_k from the features of the cell: classes of Gaussian intensities whose means the
surroundings tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medseg.networks.layers import Residual, Three, check_size, conv, folded_cells, unfold_cells
from medseg.networks.ops.slopes import add_slopes


class UNet(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); every size must be a multiple of
    `UNet.multiple`.

    In training mode with `deep_supervision` a list of logits is returned, finest first, each as
    much smaller than the one before as the level's stride. `features`, `encoder_blocks` (as many)
    and `decoder_blocks` (one fewer) run from the finest level down; so do `strides` and `kernels`,
    three numbers a level along (D, H, W), for voxels that are not cubes: a stride of 1 or 2 from
    the level above (the first is 1, 1, 1), and a kernel of 1 or 3.
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
        own_intensity: bool = False,
        strides: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        levels = len(features)
        encoder_blocks = encoder_blocks or [2] * levels
        decoder_blocks = decoder_blocks or [2] * (levels - 1)
        _check_levels(features, encoder_blocks, decoder_blocks)
        _check_stem(stem, channels, own_intensity)
        step = _steps(levels, strides)
        kernel = _kernels(levels, kernels, step)
        self.channels, self.classes = channels, classes
        self.stem, self.deep_supervision = stem, deep_supervision
        #: Whether in training the finest logits stay (B, classes, d, 2, h, 2, w, 2) where the stem
        #: is 2: saves a copy.
        self.folded = False
        #: What patch sizes must be multiples of: a number, or three where the axes differ.
        self.multiple = _multiple(stem, step)

        block = Residual if residual else conv
        inputs = [channels, *features[:-1]]
        steps: list[int | Three] = [stem, *step[1:]]
        shapes = zip(inputs, features, steps, kernel, encoder_blocks)
        self.encoder = nn.ModuleList(
            _level(block, before, after, step=stride, kernel=size, blocks=blocks)
            for before, after, stride, size, blocks in shapes
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, kernel_size=stride, stride=stride)
            for fine, coarse, stride in zip(features, features[1:], step[1:])
        )
        self.decoder = nn.ModuleList(
            _level(conv, 2 * fine, fine, step=1, kernel=size, blocks=blocks)
            for fine, size, blocks in zip(features, kernel, decoder_blocks)
        )
        self.head = nn.Conv3d(features[0], classes * stem**3, 1)
        self.slope = _slopes_of_nothing(features[0], classes) if own_intensity else None
        #: How many of the decoder's finest maps have no head of their own: where the stem is 2, the
        #: finest has one.
        self.without_deep_head = 0 if stem == 2 else 1
        # Coarser heads exist only in training; inference does not need their weights.
        deep = range(self.without_deep_head, levels - 1) if deep_supervision else range(0)
        self.deep_heads = nn.ModuleList(nn.Conv3d(features[n], classes, 1) for n in deep)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in training with deep supervision a list of them, finest first."""
        outputs = self.maps(x)
        logits = self.head(outputs[-1])
        if self.slope is not None:
            logits = add_slopes(logits, self.slope(outputs[-1]), _own(x))
        logits = (
            folded_cells(logits, self.stem)
            if self.training and self.folded
            else unfold_cells(logits, self.stem)
        )
        if not (self.training and self.deep_supervision):
            return logits
        finest_first = outputs[::-1][self.without_deep_head :][: len(self.deep_heads)]
        return [logits, *(head(y) for head, y in zip(self.deep_heads, finest_first, strict=True))]

    def features(self, x: Tensor) -> Tensor:
        """What `head` makes logits of, (B, features, D/stem, H/stem, W/stem); then the voxels that
        `slope` is for.
        """
        finest = self.maps(x)[-1]
        return finest if self.slope is None else torch.cat((finest, _own(x).to(finest.dtype)), 1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The output of the coarsest level and of every level of the decoder, coarsest first."""
        check_size(x, self.multiple)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = [x]
        for n in reversed(range(len(self.up))):
            x = self.decoder[n](torch.cat((self.up[n](x), skips[n]), 1))
            outputs.append(x)
        return outputs


def _check_levels(
    features: Sequence[int], encoder_blocks: Sequence[int], decoder_blocks: Sequence[int]
) -> None:
    """Raise `ValueError` unless there are at most 10 levels, with numbers that a network can
    have.
    """
    levels = len(features)
    for numbers, most in ((features, 4096), (encoder_blocks, 64), (decoder_blocks, 64)):
        if levels > 10 or not all(
            type(number) is int and 1 <= number <= most for number in numbers
        ):
            raise ValueError(
                f"{list(numbers)!r:.80} are not at most 10 whole numbers from 1 to {most}"
            )
    if len(encoder_blocks) != levels or len(decoder_blocks) != levels - 1:
        raise ValueError("encoder_blocks needs one number a level, and decoder_blocks one fewer")


def _check_stem(stem: int, channels: int, own_intensity: bool) -> None:
    """Raise `ValueError` for a stem that there is not, or that own intensities cannot go with."""
    if stem not in (1, 2):
        raise ValueError(f"stem is 1 or 2, not {stem!r:.80}")
    if own_intensity and (stem, channels) != (2, 1):
        raise ValueError("own_intensity is for a stem of 2 and one channel")


def _multiple(stem: int, steps: Sequence[Three]) -> int | tuple[int, ...]:
    """How much smaller than the patch the coarsest level is, along all axes or along each."""
    per_axis = tuple(stem * math.prod(axis) for axis in zip(*steps))
    return per_axis[0] if len(set(per_axis)) == 1 else per_axis


def _level(
    block: Callable[..., nn.Module],
    channels: int,
    features: int,
    *,
    step: int | Three,
    kernel: Three,
    blocks: int,
) -> nn.Sequential:
    """The blocks of a level: the first takes `channels` and may step, the others keep what they
    get.
    """
    first = block(channels, features, stride=step, kernel=kernel)
    others = [block(features, features, stride=1, kernel=kernel) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


def _slopes_of_nothing(features: int, classes: int) -> nn.Conv3d:
    """The slopes of own intensities, zero at first, so that a model without goes on as it was."""
    slope = nn.Conv3d(features, classes, 1)
    for parameter in slope.parameters():
        nn.init.zeros_(parameter)
    return slope


def _steps(levels: int, strides: Sequence[Sequence[int]] | None) -> list[Three]:
    """How far each level's first convolution steps along each axis; by default 2, but for the first
    level.
    """
    numbers = strides or [[1] * 3, *([2] * 3 for _ in range(levels - 1))]
    return _threes(numbers, levels, allowed=(1, 2), name="strides", first=(1, 1, 1))


def _kernels(
    levels: int, kernels: Sequence[Sequence[int]] | None, steps: Sequence[Three]
) -> list[Three]:
    """The sizes of each level's kernels, by default 3. Raises `ValueError` where one would step
    over voxels.
    """
    sizes = _threes(kernels or [[3] * 3] * levels, levels, allowed=(1, 3), name="kernels")
    for step, size in zip(steps, sizes):
        if (2, 1) in zip(step, size):
            raise ValueError(
                "an axis that a level halves needs a kernel of 3 there, or every second voxel goes"
                " unseen"
            )
    return sizes


def _threes(
    numbers: Sequence[Sequence[int]],
    levels: int,
    *,
    allowed: Sequence[int],
    name: str,
    first: Three | None = None,
) -> list[Three]:
    """`levels` times three numbers, all allowed. Raises `ValueError`."""
    threes = [tuple(three) for three in numbers]
    good = all(
        len(three) == 3 and all(type(n) is int and n in allowed for n in three) for three in threes
    )
    if len(threes) != levels or not good or (first and threes[0] != first):
        begin = f", the first {first}" if first else ""
        raise ValueError(
            f"{name} needs three numbers a level, each {allowed[0]} or {allowed[1]}{begin}"
        )
    return [(a, b, c) for a, b, c in threes]


def _own(x: Tensor) -> Tensor:
    """The intensities (B, 1, 2d, 2h, 2w) of each cell's voxels, (B, 8, d, h, w), scaled: 0 to 1 as
    -8 to 8.
    """
    b, _, d, h, w = x.shape
    cells = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    return 16 * cells.reshape(b, 8, d // 2, h // 2, w // 2) - 8
