"""The sliding window: patches in, blended features or logits out, in memory that the scan's length does not change.

Windows run along the first axis in rows, in a row along the second axis in columns. A column is added up with Gaussian
weights (Isensee et al. 2021) in a buffer as wide as one patch. What no later window touches is handed on at once; what
later ones add to waits in the column, or, between rows, in a carry as deep as the overlap. Nothing of the size of a
whole scan exists here, whatever the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

#: Patches (B, C, X, Y, Z) to features or logits (B, F, X, Y, Z).
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """Where the windows of one run lie: their first voxels along each axis of the padded image."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def padded(self) -> tuple[int, int, int]:
        """The image's shape, at least a patch along each axis."""
        x, y, z = (max(size, p) for size, p in zip(self.shape, self.patch))
        return x, y, z

    @property
    def count(self) -> int:
        """How many windows there are."""
        return math.prod(len(starts) for starts in self.starts)

    def columns(self, low: int, high: int) -> tuple[int, ...]:
        """The starts along the second axis of the windows that touch its planes low..high."""
        return tuple(y for y in self.starts[1] if y < high and y + self.patch[1] > low)

    def stripes(self, count: int) -> list[tuple[int, int]]:
        """The second axis in `count` parts (first, past the last) that can be computed one after the other.

        A part begins one plane before the other ends, so that everything between two planes lies in one of them.
        """
        edges = [round(n * self.shape[1] / count) for n in range(count + 1)]
        return [(max(0, low - 1), high) for low, high in pairwise(edges) if high > low]


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: evenly spread, first at 0, last ending at `size`, overlapping by at least
    the share `overlap`."""
    if size <= patch:
        return [0]
    step = max(1.0, patch * (1 - overlap))
    count = math.ceil((size - patch) / step - 1e-9) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def plan_windows(shape: Sequence[int], patch: Sequence[int], overlap: float) -> Windows:
    """Windows of `patch` voxels over an image of `shape`."""
    starts = [tuple(window_starts(size, p, overlap)) for size, p in zip(shape, patch)]
    return Windows(tuple(shape), tuple(patch), tuple(starts))  # type: ignore[arg-type]


def gaussian_weights(patch: int) -> Tensor:
    """(patch,) weights of one axis: a Gaussian with sd of an eighth of the patch, never below 1/1000 of its peak."""
    at = (torch.arange(patch) - (patch - 1) / 2) / (patch / 8)
    return torch.exp(-0.5 * at**2).clamp_(min=1e-3)


@dataclass(frozen=True)
class Block:
    """Finished features (X, Y, Z, F) float32 whose first voxel is (x, y, 0). It is not written to again."""

    x: int
    y: int
    data: NDArray[np.float32]


def sliding_window(
    predict: Predict,
    image: Tensor,
    windows: Windows,
    *,
    batch: int = 1,
    stripe: tuple[int, int] | None = None,
    empty: tuple[float, Sequence[float]] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda windows: None,
) -> Iterator[Block]:
    """Weighted means of what `predict` says of the windows of `image` (C, X, Y, Z), as blocks that cover it once.

    Blocks come row by row, in a row along the second axis. Images smaller than the patch are padded with zeros. Only
    the part `stripe` of the second axis is computed if one is given. `empty` (threshold, features): windows in which
    nothing is brighter than the threshold are not predicted; the features are taken for them. The sums are kept on
    `device`, and on the CPU once it runs out of memory. `progress` is called with the number of windows just done.
    """
    low, high = stripe or (0, windows.shape[1])
    rows, columns, depths = windows.starts[0], windows.columns(low, high), windows.starts[2]
    image = F.pad(image, [n for p, size in zip(windows.padded[::-1], windows.shape[::-1]) for n in (0, p - size)])
    # Of every axis the weights of one window, and one over what each plane collects from all of them.
    weights = [gaussian_weights(p).numpy() for p in windows.patch]
    share = [_one_over_sums(w, starts, n) for w, starts, n in zip(weights, windows.starts, windows.padded)]
    patch_x, patch_y, patch_z = windows.patch
    sums: _Sums | None = None
    for row, x in enumerate(rows):
        finished_x = (windows.shape[0] if row == len(rows) - 1 else rows[row + 1]) - x
        for column, y in enumerate(columns):
            last = column == len(columns) - 1
            todo = [(z, image[:, x : x + patch_x, y : y + patch_y, z : z + patch_z]) for z in depths]
            if empty is not None:
                nothing = [z for z, window in todo if float(window.max()) <= empty[0]]
                if sums is None and nothing:
                    sums = _Sums(windows, columns, len(empty[1]), torch.device(device))
                for z in nothing:
                    assert sums is not None
                    sums.add(torch.tensor(empty[1]).view(-1, 1, 1, 1), weights, z)
                todo = [(z, window) for z, window in todo if z not in nothing]
                progress(len(nothing))
            for begin in range(0, len(todo), batch):
                part = todo[begin : begin + batch]
                predicted = predict(torch.stack([window for _, window in part]))
                if sums is None:
                    features = predicted.shape[1] if empty is None else len(empty[1])
                    sums = _Sums(windows, columns, features, torch.device(device))
                for (z, _), one in zip(part, predicted):
                    sums.add(one, weights, z)
                progress(len(part))
            assert sums is not None
            finished_y = (columns[column + 1] if not last else min(y + patch_y, windows.shape[1])) - y
            first = max(0, low - y)  # planes before the stripe are not wanted
            stop = min(finished_y, high - y)
            sums.merge(y, finished_y)
            if stop > first:
                scales = (share[0][x : x + finished_x], share[1][y + first : y + stop], share[2][: windows.shape[2]])
                yield Block(x, y + first, sums.finished(first, scales))
            sums.move_on(y, finished_x, finished_y, last)


class _Sums:
    """Weighted sums of the current column (X, Y, Z, F), and of the planes that the next row adds to."""

    def __init__(self, windows: Windows, columns: Sequence[int], features: int, device: torch.device) -> None:
        rows = windows.starts[0]
        patch_x, patch_y, depth = windows.patch[0], windows.patch[1], windows.padded[2]
        carried = max((patch_x - (b - a) for a, b in pairwise(rows)), default=0)
        self._first = columns[0]
        width = columns[-1] + patch_y - columns[0]
        shapes = ((patch_x, patch_y, depth, features), (max(0, carried), width, depth, features))
        self._compiled = _uses_kernels(device)
        try:
            self._column, self._carry = (torch.zeros(shape, device=device) for shape in shapes)
        except torch.OutOfMemoryError:
            self._compiled = True
            self._column, self._carry = (torch.zeros(shape) for shape in shapes)
        self._carried = 0  # planes of the carry that hold something

    def add(self, features: Tensor, weights: Sequence[NDArray[np.float32]], z: int) -> None:
        """Add one window (F, X, Y, Z), or one feature vector (F, 1, 1, 1) for all of it, at depth z."""
        if self._compiled:
            one = features.detach().permute(1, 2, 3, 0).to("cpu", torch.float32).contiguous().numpy()
            _in_threads("add_window", len(weights[0]), self._column.numpy(), one, *weights, z)
            return
        try:
            device = self._column.device
            along, across, up = (torch.from_numpy(w).to(device) for w in weights)
            window = (along[:, None, None] * across[:, None] * up)[..., None]
            target = self._column[:, :, z : z + len(up), : len(features)]
            torch.addcmul(target, features.permute(1, 2, 3, 0).to(device, torch.float32), window, out=target)
        except torch.OutOfMemoryError:
            self._compiled = True
            self._column, self._carry = self._column.cpu(), self._carry.cpu()
            self.add(features.cpu(), weights, z)

    def merge(self, y: int, finished_y: int) -> None:
        """Add what the row before left for the first `finished_y` planes of this column."""
        at = y - self._first
        self._column[: self._carried, :finished_y] += self._carry[: self._carried, at : at + finished_y]

    def finished(self, first: int, scales: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The means of the planes that are complete, from plane `first` of the column on."""
        along, across, up = scales
        shape = (len(along), len(across), len(up), self._column.shape[3])
        done = self._column[: shape[0], first : first + shape[1]]
        if self._compiled:
            out = np.empty(shape, np.float32)
            _in_threads("scaled", shape[0], done.numpy(), along, across, up, out)
            return out
        a, b, c = (torch.from_numpy(scale).to(done.device) for scale in scales)
        return (done[:, :, : shape[2]] * (a[:, None, None] * b[:, None] * c)[..., None]).cpu().numpy()

    def move_on(self, y: int, finished_x: int, finished_y: int, last_column: bool) -> None:
        """Keep what later windows add to, and clear the place of the next column."""
        rest, at = self._column.shape[0] - finished_x, y - self._first
        if rest > 0 and len(self._carry):
            self._carry[:rest, at : at + finished_y] = self._column[finished_x:, :finished_y]
        if last_column:
            self._carried = max(0, min(rest, len(self._carry)))
            self._column.zero_()
            return
        for plane in range(finished_y, self._column.shape[1]):
            self._column[:, plane - finished_y] = self._column[:, plane]
        self._column[:, self._column.shape[1] - finished_y :] = 0


def _uses_kernels(device: torch.device) -> bool:
    """Whether sums on a device are made by compiled loops; elsewhere torch makes them."""
    return device.type == "cpu"


class _Kernel(Protocol):
    def __call__(self, low: int, high: int, *arguments: Any) -> None: ...


def _in_threads(name: str, length: int, *arguments: Any) -> None:
    """Run a kernel of `window_kernels` over range(length) on as many threads as torch uses."""
    from medseg import window_kernels
    from medseg.kernels import in_slabs

    kernel: _Kernel = getattr(window_kernels, name)
    in_slabs(lambda low, high: kernel(low, high, *arguments), length, workers=torch.get_num_threads())


def _one_over_sums(weights: NDArray[np.float32], starts: Sequence[int], length: int) -> NDArray[np.float32]:
    """(length,) one over the weight that each plane of an axis collects from all windows."""
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weights)] += weights
    return np.reciprocal(total)
