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
                sure, chosen = True, 0
                if regions:
                    for n in range(len(logits)):
                        if logits[n] > 0:
                            chosen = n + 1
                            sure = sure and logits[n] > 2.0**-14
                else:
                    for n in range(1, len(logits)):
                        if logits[n] > logits[chosen]:
                            chosen = n
                    most = logits[chosen]
                    for n in range(len(logits)):
                        apart = 2.0**-9 * max(abs(logits[n]), abs(most)) + 2.0**-23
                        sure = sure and (n == chosen or most - logits[n] > apart)
                out[a, b, c] = chosen if sure else 65535


@njit(cache=True, nogil=True)
def paint_rounded(  # type: ignore[no-untyped-def]
    low, high, left, right, labels, maps, zooms, block, cells, origin, size, regions, halved,
    wanted, values,
):  # fmt: skip
    """Labels, and maps, of voxels whose eight neighbours on the model's grid all lie in `block`; as
    `paint` does it.

    cells: (X, Y, Z) the class that a voxel and its upper neighbours surely share, or 65535.
    zooms: (3,) voxels of the model's grid for one here, cell centres on cell centres as scipy
    counts. halved: interpolated logits are rounded to half precision, else to float32.
    wanted: outputs whose probabilities maps (M, I, J, K) get, and last the entropy; M = 0: none.
    """
    outputs = block.shape[3]
    logits = np.empty(outputs)
    for i in range(low, high):
        x = min(max((i + 0.5) * zooms[0] - 0.5, 0.0), size[0] - 1.0)
        x0 = int(np.floor(x))
        fx = x - x0
        x1 = min(x0 + 1, size[0] - 1)
        if min(x0, max(size[0] - 2, 0)) < origin[0] or x1 >= origin[0] + block.shape[0]:
            continue
        for j in range(left, right):
            y = min(max((j + 0.5) * zooms[1] - 0.5, 0.0), size[1] - 1.0)
            y0 = int(np.floor(y))
            fy = y - y0
            y1 = min(y0 + 1, size[1] - 1)
            if min(y0, max(size[1] - 2, 0)) < origin[1] or y1 >= origin[1] + block.shape[1]:
                continue
            a0, a1, b0, b1 = x0 - origin[0], x1 - origin[0], y0 - origin[1], y1 - origin[1]
            for k in range(labels.shape[2]):
                z = min(max((k + 0.5) * zooms[2] - 0.5, 0.0), size[2] - 1.0)
                z0 = int(np.floor(z))
                fz = z - z0
                z1 = min(z0 + 1, size[2] - 1)
                sure = cells[a0, b0, z0]
                if sure != 65535 and not maps.shape[0]:
                    labels[i, j, k] = values[sure]
                    continue
                gx, gy, gz = 1.0 - fx, 1.0 - fy, 1.0 - fz
                for n in range(outputs):
                    # Factor by factor and neighbour by neighbour in scipy's order, so that ties
                    # round alike.
                    total = np.float64(block[a0, b0, z0, n]) * gx * gy * gz
                    total += np.float64(block[a0, b0, z1, n]) * gx * gy * fz
                    total += np.float64(block[a0, b1, z0, n]) * gx * fy * gz
                    total += np.float64(block[a0, b1, z1, n]) * gx * fy * fz
                    total += np.float64(block[a1, b0, z0, n]) * fx * gy * gz
                    total += np.float64(block[a1, b0, z1, n]) * fx * gy * fz
                    total += np.float64(block[a1, b1, z0, n]) * fx * fy * gz
                    total += np.float64(block[a1, b1, z1, n]) * fx * fy * fz
                    logits[n] = round_half(total) if halved else np.float64(np.float32(total))
                chosen = 0
                if regions:
                    for n in range(outputs):
                        if logits[n] > (SMALLEST_HALF if halved else 0.0):
                            chosen = n + 1
                else:
                    for n in range(1, outputs):
                        if logits[n] > logits[chosen]:
                            chosen = n
                labels[i, j, k] = values[chosen]
                if maps.shape[0]:
                    _confide(logits, regions, wanted, maps[:, i, j, k])


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
