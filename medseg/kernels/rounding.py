"""The compiled loop of `exact`: logits in half precision interpolated as scipy does it, rounded,
and compared.

Imported where used: numba takes longer to load than a small scan to segment.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: The smallest positive number of half precision; its logistic function rounds to a half in
#: float32, so it is no yes.
SMALLEST_HALF = 2.0**-24


@njit(cache=True, nogil=True)
def round_half(value):  # type: ignore[no-untyped-def]
    """The number of half precision nearest to a float64, ties to even; beyond its range
    infinite."""
    size = abs(value)
    if size >= 65520.0:
        return np.inf if value > 0 else -np.inf
    if size == 0.0 or size != size:
        return value
    exponent = max(int(np.floor(np.log2(size))), -14)
    # The logarithm may have been rounded up to a power of two.
    if 2.0**exponent > size and exponent > -14:
        exponent -= 1
    quantum = 2.0 ** (exponent - 10)
    return np.rint(value / quantum) * quantum


@njit(cache=True, nogil=True)
def sure_classes(low, high, block, regions, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z) uint16: the class at every voxel of block (X, Y, Z, K), where
    rounding cannot matter.

    Where it may, 65535. Two logits further apart than 2^-9 of the larger one stay apart by more
    than half precision rounds, also in every mean of such voxels; of regions, so do those above
    2^-14 or not above 0.
    """
    for a in range(low, high):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                logits = block[a, b, c]
                sure, number = True, 0
                if regions:
                    for n in range(len(logits)):
                        if logits[n] > 0:
                            number = n + 1
                            sure = sure and logits[n] > 2.0**-14
                else:
                    for n in range(1, len(logits)):
                        if logits[n] > logits[number]:
                            number = n
                    most = logits[number]
                    for n in range(len(logits)):
                        apart = 2.0**-9 * max(abs(logits[n]), abs(most)) + 2.0**-23
                        sure = sure and (n == number or most - logits[n] > apart)
                out[a, b, c] = number if sure else 65535


@njit(cache=True, nogil=True)
def planes_last(low, high, source, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z, K) of source (K, X, Y, Z), float32: a few voxels at a time."""
    lanes = 16
    for x in range(low, high):
        for y in range(out.shape[1]):
            for first in range(0, out.shape[2], lanes):
                last = min(first + lanes, out.shape[2])
                for k in range(out.shape[3]):
                    for z in range(first, last):
                        out[x, y, z, k] = source[k, x, y, z]


@njit(cache=True, nogil=True)
def paint_rounded(  # type: ignore[no-untyped-def]
    low, high, left, right, labels, maps, zooms, block, cells, origin, size, regions, halved,
    wanted, values, raw,
):  # fmt: skip
    """Labels, and maps, of voxels whose eight neighbours on the model's grid all lie in `block`; as
    `paint` does it.

    cells: (X, Y, Z) the class that a voxel and its upper neighbours surely share, or 65535.
    zooms: (3,) voxels of the model's grid for one here, cell centres on cell centres as scipy
    counts. halved: interpolated logits are rounded to half precision, else to float32.
    wanted: outputs whose probabilities maps (M, I, J, K) get, and last the entropy; M = 0: none.
    raw: the maps get the rounded logits of all outputs instead.
    """
    outputs = block.shape[3]
    logits = np.empty(outputs)
    for i in range(low, high):
        x0, x1, fx = _neighbours(i, zooms[0], size[0])
        if min(x0, max(size[0] - 2, 0)) < origin[0] or x1 >= origin[0] + block.shape[0]:
            continue
        for j in range(left, right):
            y0, y1, fy = _neighbours(j, zooms[1], size[1])
            if min(y0, max(size[1] - 2, 0)) < origin[1] or y1 >= origin[1] + block.shape[1]:
                continue
            a0, a1, b0, b1 = x0 - origin[0], x1 - origin[0], y0 - origin[1], y1 - origin[1]
            for k in range(labels.shape[2]):
                z0, z1, fz = _neighbours(k, zooms[2], size[2])
                sure = cells[a0, b0, z0]
                if sure != 65535 and not maps.shape[0]:
                    labels[i, j, k] = values[sure]
                    continue
                # Neighbour by neighbour in scipy's order, so that ties round alike; those without
                # weight add nothing. A line (2, K) along the last axis is two of them.
                gx, gy = 1.0 - fx, 1.0 - fy
                logits[:] = 0.0
                _add_line(logits, block[a0, b0, z0], block[a0, b0, z1], gx, gy, fz)
                if fy > 0:
                    _add_line(logits, block[a0, b1, z0], block[a0, b1, z1], gx, fy, fz)
                if fx > 0:
                    _add_line(logits, block[a1, b0, z0], block[a1, b0, z1], fx, gy, fz)
                if fx > 0 and fy > 0:
                    _add_line(logits, block[a1, b1, z0], block[a1, b1, z1], fx, fy, fz)
                if maps.shape[0]:
                    for n in range(outputs):
                        logits[n] = round_half(logits[n]) if halved else np.float32(logits[n])
                labels[i, j, k] = values[_chosen(logits, regions, halved)]
                if raw:
                    for n in range(outputs):
                        maps[n, i, j, k] = logits[n]
                elif maps.shape[0]:
                    _confide(logits, regions, wanted, maps[:, i, j, k])


@njit(cache=True, nogil=True, inline="always")
def _neighbours(at, zoom, size):  # type: ignore[no-untyped-def]
    """The voxels of an axis between which one of the scan lies, and the weight of the upper one.

    Beyond the ends both are the last, and still share the weight, as they do in scipy.
    """
    place = (at + 0.5) * zoom - 0.5
    first = int(np.floor(place))
    return min(max(first, 0), size - 1), min(max(first + 1, 0), size - 1), place - first


@njit(cache=True, nogil=True, inline="always")
def _add_line(total, lower, upper, x, y, fz):  # type: ignore[no-untyped-def]
    """Add two neighbours (K,) along the last axis; factor by factor, as scipy multiplies."""
    gz = 1.0 - fz
    for n in range(len(total)):
        total[n] += np.float64(lower[n]) * x * y * gz
    if fz > 0:
        for n in range(len(total)):
            total[n] += np.float64(upper[n]) * x * y * fz


@njit(cache=True, nogil=True)
def _chosen(logits, regions, halved):  # type: ignore[no-untyped-def]
    """The class of rounded logits (K,): the first of the largest, or the last region above 0."""
    if regions:
        number = 0
        for n in range(len(logits)):
            value = logits[n]
            if halved and 0 < value < 2.0**-13:
                value = round_half(value) - SMALLEST_HALF
            if not halved:
                value = np.float32(value)
            if value > 0:
                number = n + 1
        return number
    most = logits[0]
    for n in range(1, len(logits)):
        if logits[n] > most:
            most = logits[n]
    # Rounding keeps the order, so only what is nearly as large can become equal.
    near = most - (2.0**-9 * abs(most) + 2.0**-23)
    largest = round_half(most) if halved else np.float64(np.float32(most))
    for n in range(len(logits)):
        if logits[n] >= near:
            value = round_half(logits[n]) if halved else np.float64(np.float32(logits[n]))
            if value == largest:
                return n
    return 0


@njit(cache=True, nogil=True)
def _confide(logits, regions, wanted, out):  # type: ignore[no-untyped-def]
    """out (M + 1,): probabilities of the outputs `wanted` (M,), and the entropy from 0 to 1; logits
    are used up."""
    entropy = 0.0
    if regions:
        for n in range(len(logits)):
            p = 1 / (1 + np.exp(-logits[n]))
            logits[n] = p
            if 0 < p < 1:
                entropy = max(entropy, -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2.0))
    else:
        most = logits.max()
        total = 0.0
        for n in range(len(logits)):
            logits[n] = np.exp(logits[n] - most)
            total += logits[n]
        for n in range(len(logits)):
            logits[n] /= total
            if logits[n] > 0:
                entropy -= logits[n] * np.log(logits[n])
        entropy /= np.log(len(logits))
    for m in range(len(wanted)):
        out[m] = logits[wanted[m]]
    out[len(wanted)] = entropy
