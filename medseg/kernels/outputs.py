"""The compiled loop of `ending`: a network's outputs interpolated in float64, and compared where
they have arrived.

Imported where used: numba takes longer to load than a small scan to segment.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit
from medseg.kernels.painting import MIXED


@njit(cache=True, nogil=True)
def _cell(at, size):  # type: ignore[no-untyped-def]
    """(lower neighbour, its upper one, place between them) of an index on an axis of `size`
    voxels."""
    lower = min(int(at), max(size - 2, 0))
    return lower, min(lower + 1, size - 1), at - lower


@njit(cache=True, nogil=True)
def chosen_of(outputs, regions, threshold):  # type: ignore[no-untyped-def]
    """The first of the largest outputs (K,); of regions 1 + the last one not below the threshold, 0
    where none is."""
    number = 0
    if regions:
        for n in range(len(outputs)):
            if outputs[n] >= threshold:
                number = n + 1
    else:
        for n in range(1, len(outputs)):
            if outputs[n] > outputs[number]:
                number = n
    return number


@njit(cache=True, nogil=True)
def choose_outputs(low, high, block, regions, threshold, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z) uint16: the class at every voxel of block (X, Y, Z, K)."""
    for a in range(low, high):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                out[a, b, c] = chosen_of(block[a, b, c], regions, threshold)


@njit(cache=True, nogil=True)
def paint_outputs(  # type: ignore[no-untyped-def]
    low, high, left, right, labels, maps, matrix, block, cells, origin, size, least, most, regions,
    threshold, shares, wanted, values,
):  # fmt: skip
    """Labels, and maps, of the voxels whose eight neighbours on the network's grid all lie in
    `block`.

    Only rows low..high of the target's first axis and left..right of its second are looked at.
    labels (I, J, K), maps (M, I, J, K) or M = 0. matrix: (3, 4) index there to index of the
    network's array of `size` (3,) voxels. block (X, Y, Z, K) begins at `origin` (2,) of it and
    spans its last axis. cells: (X, Y, Z) the class that a voxel and its upper neighbours share, or
    MIXED. least, most: (3,) the grid before a crop; what lies beyond the array in it is 0 and is
    interpolated with. shares: outputs are probabilities, else logits, for `wanted` (M - 1,) maps.
    """
    outputs = block.shape[3]
    mixture = np.empty(outputs, np.float32)
    for i in range(low, high):
        for j in range(left, right):
            for k in range(labels.shape[2]):
                x = matrix[0, 0] * i + matrix[0, 1] * j + matrix[0, 2] * k + matrix[0, 3]
                y = matrix[1, 0] * i + matrix[1, 1] * j + matrix[1, 2] * k + matrix[1, 3]
                z = matrix[2, 0] * i + matrix[2, 1] * j + matrix[2, 2] * k + matrix[2, 3]
                x, y, z = (
                    min(max(x, least[0]), most[0]),
                    min(max(y, least[1]), most[1]),
                    min(max(z, least[2]), most[2]),
                )
                inner_x = min(max(x, 0.0), size[0] - 1.0)
                inner_y = min(max(y, 0.0), size[1] - 1.0)
                inner_z = min(max(z, 0.0), size[2] - 1.0)
                x0, x1, fx = _cell(inner_x, size[0])
                if x0 < origin[0] or x1 >= origin[0] + block.shape[0]:
                    continue
                y0, y1, fy = _cell(inner_y, size[1])
                if y0 < origin[1] or y1 >= origin[1] + block.shape[1]:
                    continue
                z0, z1, fz = _cell(inner_z, size[2])
                share = max(0.0, 1.0 - abs(x - inner_x))
                share *= max(0.0, 1.0 - abs(y - inner_y)) * max(0.0, 1.0 - abs(z - inner_z))
                a0, a1, b0, b1 = x0 - origin[0], x1 - origin[0], y0 - origin[1], y1 - origin[1]
                sure = cells[a0, b0, z0]
                if share == 0.0:  # all of it was cut off
                    sure = 0
                if sure != MIXED and not maps.shape[0] and (share in (0.0, 1.0) or not regions):
                    labels[i, j, k] = values[sure]
                    continue
                gx, gy, gz = 1.0 - fx, 1.0 - fy, 1.0 - fz
                for n in range(outputs):
                    total = np.float64(block[a0, b0, z0, n]) * (gx * gy * gz)
                    total += np.float64(block[a0, b0, z1, n]) * (gx * gy * fz)
                    total += np.float64(block[a0, b1, z0, n]) * (gx * fy * gz)
                    total += np.float64(block[a0, b1, z1, n]) * (gx * fy * fz)
                    total += np.float64(block[a1, b0, z0, n]) * (fx * gy * gz)
                    total += np.float64(block[a1, b0, z1, n]) * (fx * gy * fz)
                    total += np.float64(block[a1, b1, z0, n]) * (fx * fy * gz)
                    total += np.float64(block[a1, b1, z1, n]) * (fx * fy * fz)
                    mixture[n] = np.float32(total * share)
                labels[i, j, k] = values[chosen_of(mixture, regions, threshold)]
                if maps.shape[0]:
                    confide(mixture, regions, shares, wanted, maps[:, i, j, k])


@njit(cache=True, nogil=True)
def confide(outputs, regions, shares, wanted, out):  # type: ignore[no-untyped-def]
    """out (M + 1,): probabilities of the outputs `wanted` (M,), and the entropy from 0 to 1;
    `outputs` are used up.

    shares: they are probabilities already, of which those cut off lack the rest.
    """
    entropy = 0.0
    if regions:
        for n in range(len(outputs)):
            p = outputs[n] if shares else 1 / (1 + np.exp(-outputs[n]))
            outputs[n] = p
            if 0 < p < 1:
                entropy = max(entropy, -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2.0))
    else:
        most, total = outputs.max(), 0.0
        for n in range(len(outputs)):
            if not shares:
                outputs[n] = np.exp(outputs[n] - most)
            total += outputs[n]
        for n in range(len(outputs)):
            p = outputs[n] / total if total > 0 else 0.0
            outputs[n] = p
            if p > 0:
                entropy -= p * np.log(p)
        entropy /= np.log(max(2, len(outputs)))
    for m in range(len(wanted)):
        out[m] = outputs[wanted[m]]
    out[len(wanted)] = entropy


@njit(cache=True, nogil=True)
def count_outputs(block, best, regions, shares, sums):  # type: ignore[no-untyped-def]
    """Add to sums (K + 1, 2) of each class chosen (best), background left out, its probabilities,
    and how often it was chosen.

    shares: outputs are probabilities already.
    """
    for a in range(block.shape[0]):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                number = best[a, b, c]
                if number == 0:
                    continue
                outputs = block[a, b, c]
                if regions:
                    p = outputs[number - 1]
                    p = p if shares else 1 / (1 + np.exp(-p))
                elif shares:
                    p = outputs[number]
                else:
                    total = 0.0
                    for k in range(len(outputs)):
                        total += np.exp(outputs[k] - outputs[number])
                    p = 1 / total
                sums[number, 0] += p
                sums[number, 1] += 1
