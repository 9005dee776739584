"""From blended features on the model's grid to labels on the scan's grid, while the features exist.

A scan voxel gets the class with the largest trilinearly interpolated logit, which is what
interpolating every class over the whole scan and taking the arg-max would give. Interpolation is a
convex mean, so a voxel whose eight neighbours agree on their class needs no arithmetic; only voxels
near a boundary look at every class. A linear last layer of the network (`Head`) commutes with both
means, the windows' and the interpolation's, and is applied last: what is carried around is as large
as the network is wide, not as it has classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg.kernels.painting import agree, certainty, choose, confidence, paint, unfold
from medseg.kernels.threads import in_slabs

#: Of how many voxels of the model's grid along each axis one counts for the confidence in a
#: structure.
EVERY = 2


@dataclass(frozen=True)
class Slopes:
    """What a voxel's own number adds to its logits: that times (bias (K,) + weights (K, F) @
    features (F,)), float32.

    Numbers of a cell's voxels are among its features, from `own` on, with the last axis fastest.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    own: int


@dataclass(frozen=True)
class Head:
    """A linear last layer: logits (K,) = bias (K,) + weights (K, F) @ features (F,), float32, or
    with `slopes`.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    slopes: Slopes | None = None

    def with_feature(self, weights: NDArray[np.float32]) -> Head:
        """The head with one more feature, of these weights (K, 1)."""
        slopes = self.slopes
        if slopes is not None:
            slopes = replace(slopes, weights=np.pad(slopes.weights, ((0, 0), (0, 1))))
        return Head(np.hstack((self.weights, weights)), self.bias, slopes)


class Painter:
    """Labels, and maps of confidence, on a scan's grid from blocks of features on the model's
    grid.
    """

    def __init__(
        self,
        shape: Sequence[int],
        to_model: NDArray[np.float64],
        size: Sequence[int],
        values: Sequence[int],
        *,
        head: Head | None = None,
        regions: bool = False,
        wanted: Sequence[int] | None = None,
        limits: Sequence[tuple[float, float]] = ((-np.inf, np.inf),) * 3,
        certain: bool = False,
        cell: int = 1,
        workers: int | None = None,
    ) -> None:
        """shape: scan voxels; to_model: (4, 4) scan index to model index; size: the model grid's
        voxels.

        values: the label of each class; with `regions` of no region (0) and then of each in the
        order in which they are painted, where their logits are above 0. head: makes logits of
        features; without one the features are logits. wanted: classes (regions) whose probabilities
        `maps` (M + 1, I, J, K) float32 gets, and last the entropy; None: no maps. limits: scan
        voxels outside of these model indices stay 0. certain: for `confidence`. cell: a block's
        voxels are cells of so many along each axis of the model's grid, of which the head makes
        logits: K of the first class for all voxels of the cell, and so on. workers: threads to use,
        all by default.
        """
        self.values = np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)
        self.labels = np.zeros(tuple(shape), self.values.dtype)
        self._wanted = None if wanted is None else np.array(wanted, np.int64)
        self.maps = np.zeros((0 if wanted is None else len(wanted) + 1, *shape), np.float32)
        self._matrix = np.ascontiguousarray(to_model[:3], dtype=np.float64)
        self._size = np.array(size, np.int64)
        self._limits = np.array(limits, np.float64)
        self._regions, self._asked, self._workers = regions, certain, workers
        outputs = len(values) - regions
        self._cell, self._unfold = cell, None
        self._slopes = np.empty((0, outputs), np.float32), np.empty(outputs, np.float32), 0
        if head is not None and cell > 1:
            # Weights (F, voxels of a cell, K), so that the logits of a voxel are summed up
            # together.
            weights = head.weights.reshape(outputs, cell**3, -1).transpose(2, 1, 0)
            bias = head.bias.reshape(outputs, -1).T
            self._unfold = np.ascontiguousarray(weights), np.ascontiguousarray(bias)
            if head.slopes is not None:
                slopes = np.ascontiguousarray(head.slopes.weights.T)
                self._slopes = slopes, head.slopes.bias, head.slopes.own
            head = None
        self._headed = head is not None
        self._weights = (
            np.ascontiguousarray(head.weights.T) if head else np.empty((1, outputs), np.float32)
        )
        self._bias = head.bias if head else np.empty(outputs, np.float32)
        self._certain = np.zeros((outputs + 1, 2))
        # (Y, Z, F): the last plane of the row before.
        self._plane: NDArray[np.float32] | None = None
        # (X, Z, F): the last plane of the column before.
        self._line = np.zeros((0, 0, 0), np.float32)

    def confidence(self) -> dict[int, float]:
        """Of each label painted, background left out, how probable the model held it where it chose
        it, 0 to 1.

        The mean over voxels of the model's grid, of about every eighth. Nothing unless asked for
        (`certain`).
        """
        classes = [n for n in range(1, len(self.values)) if self._certain[n, 1]]
        return {
            int(self.values[n]): float(self._certain[n, 0] / self._certain[n, 1]) for n in classes
        }

    def begin_part(self) -> None:
        """What comes next does not go on from what came before; it overlaps it by a plane."""
        self._plane = None

    def finish(self) -> None:
        """All blocks have been added."""

    def add(self, x: int, y: int, block: NDArray[np.float32]) -> None:
        """Paint what lies between the planes seen; block (X, Y, Z, F) begins at (x, y, 0) of the
        model's grid.

        Blocks come row by row, in a row along the second axis, and lie one beside the other. x and
        y count cells too.
        """
        if self._unfold is not None:
            x, y = self._cell * x, self._cell * y
            block = self._unfolded(
                block, [size - first for size, first in zip(self._size, (x, y, 0))]
            )
        if self._plane is None:  # of a part, whose blocks span all of its second axis
            self._plane = np.zeros((int(self._size[1]), *block.shape[2:]), np.float32)
            self._first = (x, y)
        below, before = int(x > self._first[0]), int(y > self._first[1])
        columns = slice(y, y + block.shape[1])
        self._paint(x, y, np.ascontiguousarray(block), inner=True)
        # What lies between this block and the ones before it is painted from two planes each.
        if below:
            seam = np.empty((2, block.shape[1] + before, *block.shape[2:]), np.float32)
            seam[0, before:], seam[1, before:] = self._plane[columns], block[0]
            if before:
                seam[:, 0] = self._line[:2]
            self._paint(x - 1, y - before, seam)
        if before:
            self._paint(x, y - 1, np.stack((self._line[below:], block[:, 0]), 1))
        self._line = np.concatenate((self._plane[None, columns.stop - 1][:below], block[:, -1]))
        self._plane[columns] = block[-1]

    def _unfolded(self, block: NDArray[np.float32], most: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every voxel (X · cell, Y · cell, Z · cell, K) of the cells of a block, `most`
        along each axis.
        """
        assert self._unfold is not None
        (weights, bias), slopes = self._unfold, self._slopes
        shape = [min(self._cell * size, int(limit)) for size, limit in zip(block.shape, most)]
        out = np.empty((*shape, bias.shape[1]), np.float32)
        cell = self._cell
        in_slabs(
            lambda a, b: unfold(a, b, block, weights, bias, *slopes, cell, out),
            len(block),
            workers=self._workers,
        )
        return out

    def _paint(self, x: int, y: int, block: NDArray[np.float32], inner: bool = False) -> None:
        """Paint what lies in a block; `inner` blocks do not overlap and count for the
        confidence.
        """
        (first_i, last_i), (first_j, last_j) = self._reach((x, y), block.shape)
        head = (self._weights, self._bias, self._headed, self._regions)
        best = np.empty(block.shape[:3], np.uint16)
        cells = np.empty_like(best)
        field = np.empty((0, 0, 0, 0), np.float32)
        in_slabs(lambda a, b: choose(a, b, block, *head, best), len(block), workers=self._workers)
        in_slabs(lambda a, b: agree(a, b, best, cells), len(block), workers=self._workers)
        if self._wanted is not None:
            map_outputs = self._wanted
            field = np.empty((*block.shape[:3], len(self.maps)), np.float32)
            in_slabs(
                lambda a, b: confidence(a, b, block, *head, map_outputs, field),
                len(block),
                workers=self._workers,
            )
        if self._asked and inner:
            parts = in_slabs(
                lambda a, b: certainty(a, b, block, *head, best, EVERY),
                len(block),
                workers=self._workers,
            )
            self._certain += sum(parts)
        origin = np.array((x, y), np.int64)
        target = (first_j, last_j, self.labels, self.maps, self._matrix)
        rest = (block, cells, best, field, origin, self._size, self._limits, *head, self.values)
        in_slabs(
            lambda a, b: paint(first_i + a, first_i + b, *target, *rest),
            last_i - first_i,
            workers=self._workers,
        )

    def _reach(self, origin: tuple[int, int], shape: Sequence[int]) -> list[tuple[int, int]]:
        """The scan's indices (first, past the last) of axes 0 and 1 within which a block can paint:
        seldom too many.

        The outer planes of the model's grid also stand for what lies beyond them.
        """
        ends = [np.array((0, n - 1)) for n in self.labels.shape]
        corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
        model_corners = corners @ self._matrix[:, :3].T + self._matrix[:, 3]
        low, high = model_corners.min(0), model_corners.max(0)
        for axis, (first, count) in enumerate(zip(origin, shape)):
            if first > 0:
                low[axis] = max(low[axis], first)
            if first + count < self._size[axis]:
                high[axis] = min(high[axis], first + count - 1)
        box = np.stack(np.meshgrid(*zip(low, high), indexing="ij"), -1).reshape(-1, 3)
        scan_corners = (box - self._matrix[:, 3]) @ np.linalg.inv(self._matrix[:, :3]).T
        first, last = np.floor(scan_corners.min(0) - 0.01), np.ceil(scan_corners.max(0) + 0.01)
        limits = self.labels.shape
        spans = [(max(0, int(first[a])), min(limits[a], int(last[a]) + 1)) for a in (0, 1)]
        return [(begin, max(begin, end)) for begin, end in spans]
