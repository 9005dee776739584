"""The compiled loops of `window` and `painter`: adding windows up, largest classes, and labels on the scan's grid.

Arrays are C-contiguous float32 with the features of a voxel next to each other, (X, Y, Z, F). Every kernel works on a
range of its first axis, releases the interpreter lock, and gives each voxel the same sums in the same order however
many threads share the work. Imported where used: numba takes longer to load than a small scan to segment.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def add_window(low, high, sums, features, along, across, up, z):  # type: ignore[no-untyped-def]
    """sums[low:high, :Y, z : z + Z, :F] += features (X, Y, Z, F) times along (X,) times across (Y,) times up (Z,).

    A single feature vector (1, 1, 1, F) stands for a window that is the same everywhere.
    """
    same = features.size == features.shape[3]
    for a in range(low, high):
        for b in range(len(across)):
            weight = along[a] * across[b]
            target = sums[a, b]
            source = features[0, 0] if same else features[a, b]
            for c in range(len(up)):
                w = weight * up[c]
                one = source[0] if same else source[c]
                out = target[z + c]
                for f in range(len(one)):
                    out[f] += w * one[f]


@njit(cache=True, nogil=True)
def scaled(low, high, sums, along, across, up, out):  # type: ignore[no-untyped-def]
    """out[low:high] = sums[low:high] times along (X,) times across (Y,) times up (Z,), cut to the shape of `out`."""
    for a in range(low, high):
        for b in range(out.shape[1]):
            weight = along[a] * across[b]
            for c in range(out.shape[2]):
                w = weight * up[c]
                for f in range(out.shape[3]):
                    out[a, b, c, f] = w * sums[a, b, c, f]


@njit(cache=True, nogil=True)
def _logits(one, weights, bias, headed, out):  # type: ignore[no-untyped-def]
    """out (K,) = bias + one (F,) @ weights (F, K), or a copy of `one` where there is no head."""
    if headed:
        for k in range(len(out)):
            out[k] = bias[k]
        for f in range(len(one)):
            value = one[f]
            row = weights[f]
            for k in range(len(out)):
                out[k] += value * row[k]
    else:
        for k in range(len(out)):
            out[k] = one[k]


@njit(cache=True, nogil=True)
def _chosen(logits, regions):  # type: ignore[no-untyped-def]
    """The first largest of (K,) logits; of regions 1 + the last above 0, or 0 where none is."""
    top = 0
    if regions:
        for k in range(len(logits)):
            if logits[k] > 0:
                top = k + 1
        return top
    for k in range(1, len(logits)):
        if logits[k] > logits[top]:
            top = k
    return top


@njit(cache=True, nogil=True)
def choose(low, high, block, weights, bias, headed, regions, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z) uint16: the class chosen at every voxel of block (X, Y, Z, F)."""
    logits = np.empty(len(bias), np.float32)
    for a in range(low, high):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                if headed:
                    _logits(block[a, b, c], weights, bias, headed, logits)
                    out[a, b, c] = _chosen(logits, regions)
                else:
                    out[a, b, c] = _chosen(block[a, b, c], regions)


@njit(cache=True, nogil=True)
def confidence(low, high, block, weights, bias, headed, regions, wanted, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z, M + 1): probabilities of the classes `wanted` (M,), and the entropy from 0 to 1.

    Softmax and its Shannon entropy over log K; of regions the logistic function and the largest binary entropy.
    """
    logits = np.empty(len(bias), np.float32)
    for a in range(low, high):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                _logits(block[a, b, c], weights, bias, headed, logits)
                entropy = 0.0
                if regions:
                    for k in range(len(logits)):
                        p = 1 / (1 + np.exp(-logits[k]))
                        logits[k] = p
                        if 0 < p < 1:
                            entropy = max(entropy, -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2.0))
                else:
                    most = logits[0]
                    for k in range(1, len(logits)):
                        most = max(most, logits[k])
                    total = 0.0
                    for k in range(len(logits)):
                        logits[k] = np.exp(logits[k] - most)
                        total += logits[k]
                    for k in range(len(logits)):
                        logits[k] /= total
                        if logits[k] > 0:
                            entropy -= logits[k] * np.log(logits[k])
                    entropy /= np.log(len(logits))
                for m in range(len(wanted)):
                    out[a, b, c, m] = logits[wanted[m]]
                out[a, b, c, len(wanted)] = entropy


@njit(cache=True, nogil=True)
def _between(base, slope, first, stop, size, begin, end):  # type: ignore[no-untyped-def]
    """The part of begin..end in which base + slope * k may lie in the cells first..stop of an axis of `size` voxels.

    It may be a little too long, never too short: the first and the last cell of an axis also get what lies beyond it.
    """
    low = -np.inf if first == 0 else float(first)
    high = np.inf if stop == size else stop - 1.0
    if abs(slope) < 1e-9:
        inside = low - 1e-3 <= base <= high + 1e-3
        return begin, (end if inside else begin)
    a, b = (low - base) / slope, (high - base) / slope
    if a > b:
        a, b = b, a
    if a > begin:
        begin = int(min(a - 1, end))
    if b < end:
        end = int(max(b + 2, begin))
    return begin, end


@njit(cache=True, nogil=True)
def paint(  # type: ignore[no-untyped-def]
    low, high, labels, maps, matrix, block, best, field, origin, size, limits, weights, bias, headed, regions, values
):
    """Labels, and maps, of the scan rows low..high whose eight neighbours on the model's grid all lie in `block`.

    labels (I, J, K), maps (M, I, J, K) or M = 0. block (X, Y, Z, F), its chosen classes best (X, Y, Z) and what is
    mapped, field (X, Y, Z, M), begin at `origin` (2,) of a grid of `size` (3,) voxels and span its last axis. matrix:
    (3, 4) scan index to model index. limits: (3, 2) model indices outside of which nothing is painted. values: the
    label of each class; of regions of none, and then of each.
    """
    mixed = np.empty(block.shape[3], np.float32)
    logits = np.empty(len(bias), np.float32)
    one = np.float32(1)
    corner = np.empty(8, np.float32)
    for i in range(low, high):
        for j in range(labels.shape[1]):
            bases = matrix[:, 0] * i + matrix[:, 1] * j + matrix[:, 3]
            begin, end = 0, labels.shape[2]
            for axis in range(2):
                stop = origin[axis] + block.shape[axis]
                begin, end = _between(bases[axis], matrix[axis, 2], origin[axis], stop, size[axis], begin, end)
            for k in range(begin, end):
                x, y = bases[0] + matrix[0, 2] * k, bases[1] + matrix[1, 2] * k
                z = bases[2] + matrix[2, 2] * k
                if x < limits[0, 0] or x > limits[0, 1] or y < limits[1, 0] or y > limits[1, 1]:
                    continue
                if z < limits[2, 0] or z > limits[2, 1]:
                    continue
                x, y = min(max(x, 0.0), size[0] - 1.0), min(max(y, 0.0), size[1] - 1.0)
                z = min(max(z, 0.0), size[2] - 1.0)
                x0, x1 = min(int(x), max(size[0] - 2, 0)), min(int(x) + 1, size[0] - 1)
                y0, y1 = min(int(y), max(size[1] - 2, 0)), min(int(y) + 1, size[1] - 1)
                z0, z1 = min(int(z), max(size[2] - 2, 0)), min(int(z) + 1, size[2] - 1)
                if x0 < origin[0] or y0 < origin[1]:
                    continue
                if x1 >= origin[0] + block.shape[0] or y1 >= origin[1] + block.shape[1]:
                    continue
                fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
                x0, x1, y0, y1 = x0 - origin[0], x1 - origin[0], y0 - origin[1], y1 - origin[1]
                corner[0] = (one - fx) * (one - fy) * (one - fz)
                corner[1] = (one - fx) * (one - fy) * fz
                corner[2] = (one - fx) * fy * (one - fz)
                corner[3] = (one - fx) * fy * fz
                corner[4] = fx * (one - fy) * (one - fz)
                corner[5] = fx * (one - fy) * fz
                corner[6] = fx * fy * (one - fz)
                corner[7] = fx * fy * fz
                for m in range(maps.shape[0]):
                    maps[m, i, j, k] = (
                        corner[0] * field[x0, y0, z0, m]
                        + corner[1] * field[x0, y0, z1, m]
                        + corner[2] * field[x0, y1, z0, m]
                        + corner[3] * field[x0, y1, z1, m]
                        + corner[4] * field[x1, y0, z0, m]
                        + corner[5] * field[x1, y0, z1, m]
                        + corner[6] * field[x1, y1, z0, m]
                        + corner[7] * field[x1, y1, z1, m]
                    )
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
                v000, v001, v010, v011 = block[x0, y0, z0], block[x0, y0, z1], block[x0, y1, z0], block[x0, y1, z1]
                v100, v101, v110, v111 = block[x1, y0, z0], block[x1, y0, z1], block[x1, y1, z0], block[x1, y1, z1]
                for n in range(len(mixed)):
                    mixed[n] = (
                        corner[0] * v000[n]
                        + corner[1] * v001[n]
                        + corner[2] * v010[n]
                        + corner[3] * v011[n]
                        + corner[4] * v100[n]
                        + corner[5] * v101[n]
                        + corner[6] * v110[n]
                        + corner[7] * v111[n]
                    )
                if headed:
                    _logits(mixed, weights, bias, headed, logits)
                    labels[i, j, k] = values[_chosen(logits, regions)]
                else:
                    labels[i, j, k] = values[_chosen(mixed, regions)]
