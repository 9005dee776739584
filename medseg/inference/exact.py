"""A model computed to the last bit as nnU-Net computes it: sums and logits in half precision, plain
convolutions.

It runs in the one engine: `HalfSums` takes the place of the sums of `window`, `HalfPainter` that of
the painter. What is done in float32 and what is rounded to half precision, and when, is nnU-Net
2.8's (`predict_from_raw_data`, `sliding_window_prediction`, `export_prediction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import BadModel
from medseg.inference.painter import EVERY, Painter
from medseg.inference.window import Windows
from medseg.kernels.threads import in_slabs

#: In a map of classes: rounding decides, so that each voxel of the scan has to be looked at.
_UNSURE = 65535


def half_weights(patch: Sequence[int]) -> Tensor:
    """Weights of a window (A, B, C) as nnU-Net rounds them to half precision: neither symmetric nor
    separable.

    A unit impulse at half the patch, filtered by a Gaussian of an eighth of it, scaled to 10; what
    rounds to 0 becomes the smallest of the others. A patch of one plane is a flat one.
    """
    from scipy import ndimage

    lengths = [length for length in patch if length > 1] if patch[0] == 1 else list(patch)
    smooth = np.ones(())
    for length in lengths:  # axis by axis, as the filter would go over all of the window
        impulse = np.zeros(length)
        impulse[length // 2] = 1
        line = ndimage.gaussian_filter1d(impulse, length / 8, mode="constant", cval=0)
        smooth = smooth[..., None] * line
    weights = torch.from_numpy(smooth / (smooth.max() / 10)).to(torch.half)
    weights[weights == 0] = weights[weights != 0].min()
    return weights.reshape(tuple(patch))


class HalfSums:
    """Weighted sums in half precision of a row of windows (F, X, Y, Z), and of the weights; each
    addition is rounded.

    The next row goes on from what this one left, so that every voxel is added to in nnU-Net's
    order. folds: so many networks' logits lie side by side; each is divided by the weights and
    rounded, then they are averaged.
    """

    def __init__(self, windows: Windows, columns: Sequence[int], features: int, folds: int) -> None:
        width = columns[-1] + windows.patch[1] - columns[0]
        shape = (windows.patch[0], width, windows.padded[2])
        self._sums = torch.zeros((features, *shape), dtype=torch.half)
        self._count = torch.zeros(shape, dtype=torch.half)
        self._weights = half_weights(windows.patch)
        self._at, self._folds = 0, folds

    def add(self, features: Tensor, weights: Sequence[NDArray[np.float32]], z: int) -> None:
        """Add one window (F, X, Y, Z) at depth z of the current column; the weights are this
        class's own.
        """
        _, across, up = self._weights.shape
        place = (slice(None), slice(self._at, self._at + across), slice(z, z + up))
        float_weights = self._weights.float()
        for total, one in zip(self._sums, features):  # so much at a time as stays in the cache
            target = total[place]
            product = one.to("cpu", torch.float32) * float_weights
            target.copy_(product.add_(target.float()))  # summed in float32, rounded once
        self._count[place] += self._weights

    def finish(
        self, y: int, finished: int, first: int, scales: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The means (X, Y, Z, K) of the next `finished` planes of the row, those from `first`
        on.
        """
        from medseg.kernels.rounding import planes_last

        along, across, up = (len(scale) for scale in scales)
        start = self._at + first
        place = (slice(0, along), slice(start, start + across), slice(0, up))
        self._at += finished
        count = self._count[place].float()
        outputs = len(self._sums) // self._folds
        means = torch.empty((outputs, *count.shape))
        for n, target in enumerate(means):
            for fold in range(self._folds):
                mean = (self._sums[fold * outputs + n][place].float() / count).half()
                if bool(torch.isinf(mean).any()):
                    raise BadModel(
                        "the model's values on this scan are too large for half precision;"
                        " leave out --exact"
                    )
                if fold:
                    mean = (target + mean).half()
                target.copy_(mean)
            if self._folds > 1:
                target.copy_((target / self._folds).half())
        out = np.empty((*count.shape, outputs), np.float32)
        in_slabs(
            lambda a, b: planes_last(a, b, means.numpy(), out),
            len(out),
            workers=torch.get_num_threads(),
        )
        return out

    def end_row(self, deep: int) -> None:
        """Begin a new row, which adds to the last `deep` planes of this one."""
        for sums in (self._sums, self._count[None]):
            tail = sums[:, sums.shape[1] - deep :].clone() if deep > 0 else None
            sums.zero_()
            if tail is not None:
                sums[:, :deep] = tail
        self._at = 0


class HalfPainter(Painter):
    """Labels of logits that are interpolated in float64, one by one, and rounded before they are
    compared."""

    def __init__(
        self, *arguments: Any, halved: bool = True, raw: bool = False, **options: Any
    ) -> None:
        """As `Painter`, without a head, and between parallel grids. halved: rounded to half
        precision. raw: the maps hold the rounded logits of all outputs.
        """
        super().__init__(*arguments, **options)
        self._halved, self._raw = halved, raw

    def _paint(self, x: int, y: int, block: NDArray[np.float32], inner: bool = False) -> None:
        from medseg.kernels.painting import agree, certainty
        from medseg.kernels.rounding import paint_rounded, sure_classes

        sure = np.empty(block.shape[:3], np.uint16)
        cells = np.empty_like(sure)
        in_slabs(
            lambda a, b: sure_classes(a, b, block, self._regions, sure),
            len(block),
            workers=self._workers,
        )
        in_slabs(lambda a, b: agree(a, b, sure, cells), len(block), workers=self._workers)
        if self._asked and inner:
            head = (self._weights, self._bias, False, self._regions)
            classes = np.where(sure == _UNSURE, 0, sure)
            parts = in_slabs(
                lambda a, b: certainty(a, b, block, *head, classes, EVERY),
                len(block),
                workers=self._workers,
            )
            self._certain += sum(parts)
        (first_i, last_i), (first_j, last_j) = self._reach((x, y), block.shape)
        map_outputs = np.zeros(0, np.int64) if self._wanted is None else self._wanted
        origin = np.array((x, y), np.int64)
        zooms = np.ascontiguousarray(np.diagonal(self._matrix[:, :3]))
        rest = (
            self.labels,
            self.maps,
            zooms,
            block,
            cells,
            origin,
            self._size,
            self._regions,
            self._halved,
            map_outputs,
        )

        def work(a: int, b: int) -> None:
            paint_rounded(first_i + a, first_i + b, first_j, last_j, *rest, self.values, self._raw)

        in_slabs(work, last_i - first_i, workers=self._workers)
