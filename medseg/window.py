"""The sliding window: patches in, labels on the scan's grid out, in memory that the scan's length does not change.

Windows run along the first axis; each row of them is added up with Gaussian weights (Isensee et al. 2021) in a buffer
as long as one patch, planes that no later window touches are handed on at once, and labels are painted from them while
they exist. Neither logits nor probabilities of a whole scan are ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

#: Planes of logits handed on at a time.
_PLANES = 16
#: Patches (B, C, X, Y, Z) to logits (B, K, X, Y, Z).
Predict = Callable[[Tensor], Tensor]


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: evenly spread, first at 0, last ending at `size`, overlapping by at least
    the share `overlap`."""
    if size <= patch:
        return [0]
    step = max(1.0, patch * (1 - overlap))
    count = math.ceil((size - patch) / step - 1e-9) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def gaussian_weights(patch: int) -> Tensor:
    """(patch,) weights of one axis: a Gaussian with sd of an eighth of the patch, never below 1/1000 of its peak."""
    at = (torch.arange(patch) - (patch - 1) / 2) / (patch / 8)
    return torch.exp(-0.5 * at**2).clamp_(min=1e-3)


def sliding_window(
    predict: Predict,
    image: Tensor,
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, Tensor]]:
    """Weighted mean logits of `image` (C, X, Y, Z), as (first plane, logits (K, planes, Y, Z) float32) along X.

    The planes come in order and together cover X once. Images smaller than the patch are padded with zeros. `progress`
    is called with (windows done, windows in all). A yielded tensor may be kept: it is not written to again.
    """
    shape = tuple(int(n) for n in image.shape[1:])
    padded = [max(size, p) for size, p in zip(shape, patch)]
    image = F.pad(image, [n for p, size in zip(padded[::-1], shape[::-1]) for n in (0, p - size)])
    rows, *columns = (window_starts(size, p, overlap) for size, p in zip(padded, patch))
    weights = [gaussian_weights(p).to(image.device) for p in patch]
    window = weights[0][:, None, None] * weights[1][:, None] * weights[2]
    total, done = len(rows) * len(columns[0]) * len(columns[1]), 0

    sums: Tensor | None = None  # (K, patch X, Y, Z) of the current row of windows
    along = torch.zeros(padded[0], device=image.device)  # how much weight each plane has collected
    across = [torch.zeros(n, device=image.device) for n in padded[1:]]
    for weight, starts, summed in zip(weights[1:], columns, across):
        for start in starts:
            summed[start : start + len(weight)] += weight
    scale = 1 / (across[0][: shape[1], None] * across[1][: shape[2]])

    for number, x in enumerate(rows):
        along[x : x + patch[0]] += weights[0]
        places = list(product(*columns))
        for begin in range(0, len(places), batch):
            part = places[begin : begin + batch]
            windows = [image[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]] for y, z in part]
            logits = predict(torch.stack(windows))
            if sums is None:
                sums = torch.zeros(logits.shape[1], patch[0], *padded[1:], device=image.device)
            for (y, z), one in zip(part, logits):
                sums[:, :, y : y + patch[1], z : z + patch[2]].addcmul_(one.float(), window)
            done += len(part)
            progress(done, total)
        assert sums is not None
        last = number == len(rows) - 1
        finished = (shape[0] if last else rows[number + 1]) - x
        for plane in range(0, finished, _PLANES):  # a few at a time, so that copies of them stay small
            stop = min(plane + _PLANES, finished)
            ready = sums[:, plane:stop, : shape[1], : shape[2]] * scale
            ready /= along[x + plane : x + stop, None, None]
            yield x + plane, ready
        if not last:  # what later windows add to moves to the front of the buffer
            for plane in range(finished, patch[0]):
                sums[:, plane - finished] = sums[:, plane]
            sums[:, patch[0] - finished :] = 0


class Painter:
    """Turns planes of logits on the model's grid into labels on the scan's grid as they come.

    A scan voxel gets the class with the largest trilinearly interpolated logit, which is what interpolating every class
    over the whole scan and taking the arg-max would give. Interpolation is a convex mean, so a voxel whose eight
    neighbours agree on their largest class needs no arithmetic; only voxels near a boundary look at every class.
    """

    def __init__(self, shape: Sequence[int], to_model: NDArray[np.float64], planes: int, values: Sequence[int]) -> None:
        """shape: scan voxels; to_model: (4, 4) scan index to model index; planes: model grid's length along X;
        values: the label value of each class."""
        self.values = np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)
        self.labels = np.zeros(tuple(shape), self.values.dtype)
        self._matrix = np.ascontiguousarray(to_model[:3], dtype=np.float64)
        self._planes = planes
        self._carry: Tensor | None = None  # the last plane seen: the next block interpolates from it

    def add(self, first: int, logits: Tensor) -> None:
        """Paint every voxel that lies between the planes seen; logits (K, planes, Y, Z) begin at plane `first`."""
        logits = logits.cpu()
        if self._carry is not None:
            logits, first = torch.cat((self._carry, logits), 1), first - 1
        self._carry = logits[:, -1:].clone()
        stop = first + logits.shape[1]
        if stop < self._planes and logits.shape[1] < 2:
            return
        block = logits.permute(1, 2, 3, 0).contiguous().numpy()
        best = logits.max(0).indices.to(torch.uint8 if len(self.values) < 256 else torch.int16).numpy()
        paint = _compiled_paint()
        threads = max(1, torch.get_num_threads())
        edges = np.linspace(0, self.labels.shape[0], threads * 4 + 1).astype(int)
        with ThreadPoolExecutor(threads) as pool:
            work = [
                pool.submit(paint, self.labels, low, high, self._matrix, block, best, first, self._planes, self.values)
                for low, high in pairwise(edges)
            ]
            for task in work:
                task.result()


@cache
def _compiled_paint() -> Any:
    """`_paint` compiled; the machine code is kept on disk, so only the first run on a machine waits for it."""
    import numba

    return numba.njit(nogil=True, cache=True, fastmath=False)(_paint)


def _paint(
    labels: NDArray,
    low: int,
    high: int,
    matrix: NDArray,
    block: NDArray,
    best: NDArray,
    first: int,
    planes: int,
    values: NDArray,
) -> None:
    """Labels of scan rows low..high from block (planes, Y, Z, K), whose largest classes are best (planes, Y, Z)."""
    seen, height, depth, classes = block.shape
    mixed = np.empty(classes, np.float32)
    for i in range(low, high):
        for j in range(labels.shape[1]):
            base = matrix[0, 0] * i + matrix[0, 1] * j + matrix[0, 3]
            slope = matrix[0, 2]
            begin, end = 0, labels.shape[2]
            # Which voxels of this line can lie between the block's planes; the test below is the exact one.
            if abs(slope) > 1e-9:
                a, b = (first - 1 - base) / slope, (first + seen - base) / slope
                if first > 0 and first + seen < planes:
                    begin, end = max(begin, int(min(a, b)) - 1), min(end, int(max(a, b)) + 2)
            for k in range(begin, end):
                x = min(max(base + slope * k, 0.0), planes - 1.0)
                x0 = min(int(x), max(planes - 2, 0))
                if x0 < first or (x0 + 1 >= first + seen and planes > 1):
                    continue
                y = min(max(matrix[1, 0] * i + matrix[1, 1] * j + matrix[1, 2] * k + matrix[1, 3], 0.0), height - 1.0)
                z = min(max(matrix[2, 0] * i + matrix[2, 1] * j + matrix[2, 2] * k + matrix[2, 3], 0.0), depth - 1.0)
                y0, z0 = min(int(y), max(height - 2, 0)), min(int(z), max(depth - 2, 0))
                x1, y1, z1 = min(x0 + 1, planes - 1) - first, min(y0 + 1, height - 1), min(z0 + 1, depth - 1)
                fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
                x0 -= first
                c = best[x0, y0, z0]
                if (
                    best[x0, y0, z1] == c
                    and best[x0, y1, z0] == c
                    and best[x0, y1, z1] == c
                    and best[x1, y0, z0] == c
                    and best[x1, y0, z1] == c
                    and best[x1, y1, z0] == c
                    and best[x1, y1, z1] == c
                ):
                    labels[i, j, k] = values[c]
                    continue
                one = np.float32(1)
                w000, w001 = (one - fx) * (one - fy) * (one - fz), (one - fx) * (one - fy) * fz
                w010, w011 = (one - fx) * fy * (one - fz), (one - fx) * fy * fz
                w100, w101 = fx * (one - fy) * (one - fz), fx * (one - fy) * fz
                w110, w111 = fx * fy * (one - fz), fx * fy * fz
                for n in range(classes):
                    mixed[n] = (
                        w000 * block[x0, y0, z0, n]
                        + w001 * block[x0, y0, z1, n]
                        + w010 * block[x0, y1, z0, n]
                        + w011 * block[x0, y1, z1, n]
                        + w100 * block[x1, y0, z0, n]
                        + w101 * block[x1, y0, z1, n]
                        + w110 * block[x1, y1, z0, n]
                        + w111 * block[x1, y1, z1, n]
                    )
                top = 0
                for n in range(1, classes):
                    if mixed[n] > mixed[top]:
                        top = n
                labels[i, j, k] = values[top]
