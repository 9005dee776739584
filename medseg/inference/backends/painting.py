"""The painter in operations of torch, for features that lie on a card: labels alone come back.

It says of every voxel what `painter.Painter` says, but for rounding where two classes are as
likely.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import DataWarning
from medseg.inference.backends.cards import is_out_of_memory
from medseg.inference.backends.copies import Event, Link, link_to
from medseg.inference.painter import EVERY, Painter

#: Scan voxels that are looked at together, and numbers that are mixed together.
SLAB_VOXELS, MIXED_NUMBERS = 2**22, 2**24
#: In a map of cells: their eight corners are not all of one class.
_MIXED = -1
#: As what labels lie on a card, where torch knows few things about unsigned numbers of 16 bits.
_SIGNED = {1: np.uint8, 2: np.int16}


class CardPainter(Painter):
    """A painter of labels, and of how sure they are, on a card; without maps of probabilities.

    Where the card has no room for it the CPU goes on.
    """

    def __init__(
        self, *arguments: Any, device: torch.device, link: Link | None = None, **options: Any
    ) -> None:
        """device: where blocks lie. Others are of `Painter`, but for `wanted`."""
        super().__init__(*arguments, **options)
        assert self._wanted is None
        self.device, self._link = device, link or link_to(device)
        self._canvas: Tensor | None = None
        self._sure = torch.zeros(())
        self._last_plane: Tensor | None = None
        self._last_line = torch.zeros(0)
        self._there: dict[str, Tensor] = {}
        self._is_on_card = True

    def begin_part(self) -> None:
        """What comes next does not go on from what came before; it overlaps it by a plane."""
        super().begin_part()
        self._last_plane = None

    def add(
        self, x: int, y: int, block: NDArray[np.float32] | Tensor, ready: Event | None = None
    ) -> None:
        """As `Painter.add`; block: on the card, or here. ready: what has to be waited for."""
        if self._is_on_card:
            try:
                self._beside(x, y, torch.as_tensor(block), ready)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._step_down()
        if ready is not None:
            ready.wait()
        super().add(x, y, block.cpu().numpy() if isinstance(block, Tensor) else block)

    def finish(self) -> None:
        """All blocks have been added: the labels come back."""
        if self._is_on_card and self._canvas is not None:
            self._in_order(self._fetch)

    def _beside(self, x: int, y: int, block: Tensor, ready: Event | None) -> None:
        def work() -> None:
            if ready is not None:
                ready.hold(block)
            self._add(x, y, block.to(self.device))

        self._in_order(work)

    def _in_order(self, work: Any) -> None:
        """Work on a stream of its own, so that waiting for it waits for nothing else."""
        if self._link is None:
            work()
            return
        self._link.beside(lambda: work() or ())

    def _fetch(self) -> None:
        assert self._canvas is not None
        self.labels[...] = self._canvas.cpu().numpy().view(self.values.dtype)
        self._certain += self._sure.cpu().numpy()
        self._canvas = None

    def _step_down(self) -> None:
        """Go on with compiled loops on the CPU, from what is painted."""
        self._is_on_card = False
        if self._canvas is not None:
            self._in_order(self._fetch)
        if self._last_plane is not None:
            self._plane = self._last_plane.cpu().numpy()
            self._line = self._last_line.cpu().numpy()
        self._last_plane = None
        warnings.warn(
            "the GPU has no room to paint labels; the CPU paints, which is slower",
            DataWarning,
            stacklevel=3,
        )

    # On the card ----------------------------------------------------------------------------------

    def _place(self) -> None:
        """Put on the card what is the same for all blocks."""
        signed = _SIGNED[self.values.dtype.itemsize]
        arrays = {
            "weights": self._weights,
            "bias": self._bias,
            "values": self.values.view(signed),
            "slopes": self._slopes[0],
            "slope_bias": self._slopes[1],
        }
        if self._unfold is not None:
            arrays |= {"cells": self._unfold[0], "cell_bias": self._unfold[1]}
        self._there = {name: torch.as_tensor(one).to(self.device) for name, one in arrays.items()}
        self._sure = torch.zeros(self._certain.shape, dtype=torch.float64, device=self.device)
        self._canvas = torch.zeros(
            self.labels.shape, dtype=self._there["values"].dtype, device=self.device
        )

    def _add(self, x: int, y: int, block: Tensor) -> None:
        """`Painter.add`, which says what is done."""
        if self._canvas is None:
            self._place()
        if self._unfold is not None:
            x, y = self._cell * x, self._cell * y
            block = self._voxels_of(
                block, [int(size) - first for size, first in zip(self._size, (x, y, 0))]
            )
        plane, line = self._last_plane, self._last_line
        if plane is None:
            plane = block.new_zeros((int(self._size[1]), *block.shape[2:]))
            self._first = (x, y)
        below, before = int(x > self._first[0]), int(y > self._first[1])
        columns = slice(y, y + block.shape[1])
        sure = self._paint_there(x, y, block, inner=True)
        if below:
            seam = torch.stack((plane[columns], block[0]))
            if before:
                seam = torch.cat((line[:2, None], seam), 1)
            self._paint_there(x - 1, y - before, seam)
        if before:
            self._paint_there(x, y - 1, torch.stack((line[below:], block[:, 0]), 1))
        # From here on nothing needs memory that is not there.
        self._last_line = torch.cat((plane[None, columns.stop - 1][:below], block[:, -1]))
        plane[columns] = block[-1]
        self._last_plane = plane
        if sure is not None:
            self._sure += sure

    def _voxels_of(self, block: Tensor, most: Sequence[int]) -> Tensor:
        """`Painter._unfolded`: logits of the voxels of cells."""
        weights, bias, cell = self._there["cells"], self._there["cell_bias"], self._cell
        features, voxels, classes = weights.shape
        logits = block @ weights.reshape(features, -1) + bias.reshape(-1)
        logits = logits.view(*block.shape[:3], voxels, classes)
        if len(self._there["slopes"]):
            slope = block @ self._there["slopes"] + self._there["slope_bias"]
            own = self._slopes[2]
            logits = logits + slope[..., None, :] * block[..., own : own + voxels, None]
        logits = logits.view(*block.shape[:3], cell, cell, cell, classes)
        logits = logits.permute(0, 3, 1, 4, 2, 5, 6)
        logits = logits.reshape(*(cell * size for size in block.shape[:3]), classes)
        return logits[: most[0], : most[1], : most[2]].contiguous()

    def _logits(self, features: Tensor) -> Tensor:
        """(..., K) of features (..., F)."""
        if not self._headed:
            return features
        return features @ self._there["weights"] + self._there["bias"]

    def _chosen(self, features: Tensor) -> Tensor:
        """(...) the number of the class, or of the last region, as `kernels.painting` has them."""
        logits = self._logits(features)
        if not self._regions:
            return logits.argmax(-1)
        numbers = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        return ((logits > 0) * numbers).amax(-1)

    def _paint_there(self, x: int, y: int, block: Tensor, inner: bool = False) -> Tensor | None:
        """`Painter._paint`; what it adds to how sure classes are, where that is asked for."""
        row = block.shape[1] * block.shape[2] * max(block.shape[3], len(self._bias))
        slabs = block.split(max(1, MIXED_NUMBERS // row))
        best = torch.cat([self._chosen(part) for part in slabs])
        cells = _agreeing(best)
        (first_i, last_i), (first_j, last_j) = self._reach((x, y), block.shape)
        if last_i > first_i and last_j > first_j:
            step = max(1, SLAB_VOXELS // ((last_j - first_j) * self.labels.shape[2]))
            for low in range(first_i, last_i, step):
                rows = range(low, min(low + step, last_i)), range(first_j, last_j)
                self._paint_slab(rows, (x, y), block, cells)
        return self._certainty(block, best) if self._asked and inner else None

    def _paint_slab(
        self, rows: tuple[range, range], origin: tuple[int, int], block: Tensor, cells: Tensor
    ) -> None:
        """Labels of the scan voxels of these rows whose eight neighbours lie in the block."""
        places = [
            self._places(
                axis, rows, first=origin[axis] if axis < 2 else 0, length=block.shape[axis]
            )
            for axis in range(3)
        ]
        inside = places[0][0] & places[1][0] & places[2][0]
        (_, a, a1, fx), (_, b, b1, fy), (_, c, c1, fz) = places
        _, across, deep, width = block.shape
        shape = inside.shape
        number = cells.reshape(-1)[((a * across + b) * deep + c).expand(shape)]
        assert self._canvas is not None
        values = self._there["values"]
        target = self._canvas[rows[0].start : rows[0].stop, rows[1].start : rows[1].stop]
        target.copy_(torch.where(inside & (number != _MIXED), values[number.clamp(min=0)], target))
        # Waits for the card: how many there are decides how much is computed.
        mixed = (inside & (number == _MIXED)).reshape(-1).nonzero()[:, 0]
        flat, painted = block.reshape(-1, width), target.reshape(-1)
        for some in mixed.split(max(1, MIXED_NUMBERS // max(width, len(self._bias)))):
            at = [one.expand(shape).reshape(-1)[some] for one in (a, a1, fx, b, b1, fy, c, c1, fz)]
            painted[some] = values[self._chosen(_mixed(flat, at, across=across, deep=deep))]
        if painted.data_ptr() != target.data_ptr():  # `reshape` has copied
            target.copy_(painted.view(shape))

    def _places(
        self, axis: int, rows: tuple[range, range], *, first: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of scan voxels along one axis of the model's grid: whether they lie between planes of the
        block, which two, and their share of the way between them. Broadcast to (I, J, K).
        """
        size, row = int(self._size[axis]), self._matrix[axis]
        double: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        i = torch.arange(rows[0].start, rows[0].stop, **double).view(-1, 1, 1)
        j = torch.arange(rows[1].start, rows[1].stop, **double).view(1, -1, 1)
        k = torch.arange(self.labels.shape[2], **double).view(1, 1, -1)
        # What does not change along an axis of the scan stays short along it.
        at = torch.full((1, 1, 1), float(row[3]), **double)
        base = [index * float(share) for index, share in zip((i, j), row[:2]) if share]
        at = sum(base[1:], base[0]) + at if base else at
        at = at + float(row[2]) * k if row[2] else at
        low, high = (float(limit) for limit in self._limits[axis])
        inside = (at >= low) & (at <= high)
        at = at.clamp(0.0, size - 1.0)
        cell = at.long().clamp(max=max(size - 2, 0))
        share = (at - cell).float()
        last = (cell + 1).clamp(max=size - 1) - first
        inside = inside & (cell >= first) & (last < length)
        place = (cell - first).clamp(0, length - 1)
        return inside, place, last.clamp(0, length - 1), share

    def _certainty(self, block: Tensor, best: Tensor) -> Tensor:
        """`kernels.painting.certainty` of the whole block."""
        logits = self._logits(block[::EVERY, ::EVERY, ::EVERY]).reshape(-1, len(self._bias))
        number = best[::EVERY, ::EVERY, ::EVERY].reshape(-1)
        if self._regions:
            p = logits.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0].sigmoid()
        else:
            p = logits.softmax(1).gather(1, number[:, None])[:, 0]
        rows = [torch.zeros(2, dtype=torch.float64, device=self.device)]
        for n in range(1, len(self._certain)):
            here = number == n
            rows.append(torch.stack(((p * here).sum(dtype=torch.float64), here.sum().double())))
        return torch.stack(rows)


def _agreeing(best: Tensor) -> Tensor:
    """`kernels.painting.agree`: the class that the corners of a cell share, or `_MIXED`."""
    after = F.pad(best[None, None].float(), (0, 1, 0, 1, 0, 1), mode="replicate")[0, 0].long()
    same = torch.ones_like(best, dtype=torch.bool)
    for corner in product((0, 1), repeat=3):
        sides = (slice(bit, bit + size) for bit, size in zip(corner, best.shape))
        same &= after[tuple(sides)] == best
    return torch.where(same, best, _MIXED)


def _mixed(flat: Tensor, at: Sequence[Tensor], *, across: int, deep: int) -> Tensor:
    """(N, F) features between eight voxels of a block, in the order in which the kernel sums."""
    a, a1, fx, b, b1, fy, c, c1, fz = at

    def plane(z: Tensor) -> Tensor:
        total: Any = 0
        for row, one in ((a, 1 - fx), (a1, fx)):
            for column, two in ((b, 1 - fy), (b1, fy)):
                total = total + (one * two)[:, None] * flat[(row * across + column) * deep + z]
        mix: Tensor = total
        return mix

    return (1 - fz)[:, None] * plane(c) + fz[:, None] * plane(c1)
