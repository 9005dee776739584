"""The compiled loops of the loss on channels-last logits, float32 or bfloat16: softmax, sums,
gradient, hard counts.

Logits are a flat array of cells, each with its classes times the `cube` voxels it stands for (1, or
8 where a network works at half the resolution of its input); bfloat16 comes as uint16, float32 as
uint32, and `shift` is 16 or 0. Labels are a flat array (samples, D, H, W) int64, negative where a
voxel does not count. A unit is some rows of cells of one sample; what is met first is made into
rows of one class each, so that a vector holds voxels.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: Voxels that are worked on at once: a row of floats for each class stays in the nearest caches.
_NEAR = 128
# Sums may be taken in any order, but NaN and infinity must come through.
_FAST = {"reassoc", "contract", "nsz"}


# The loops below index from 0 in slices and reshaped views: numba's care for negative indices keeps
# LLVM from vectors.


@njit(nogil=True, cache=True, fastmath=_FAST)
def _by_class(x, shift, bits, logits):  # type: ignore[no-untyped-def]
    """The logits x (cells · classes · cube) as rows (classes, cells, cube); `bits` is room for as
    many.
    """
    classes, _, cube = logits.shape
    for n in range(x.size):
        bits[n] = np.uint32(x[n]) << shift
    numbers = bits.view(np.float32)[: x.size].reshape(-1, classes, cube)
    for cell in range(numbers.shape[0]):
        if cube == 8:
            for k in range(classes):
                for v in range(8):
                    logits[k, cell, v] = numbers[cell, k, v]
        else:
            for k in range(classes):
                logits[k, cell, 0] = numbers[cell, k, 0]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _by_cell(values, shift, bits, out):  # type: ignore[no-untyped-def]
    """The reverse of `_by_class`, rounded to nearest even where `shift` is 16."""
    classes, _, cube = values.shape
    numbers = bits.view(np.float32)[: out.size].reshape(-1, classes, cube)
    for cell in range(numbers.shape[0]):
        if cube == 8:
            for k in range(classes):
                for v in range(8):
                    numbers[cell, k, v] = values[k, cell, v]
        else:
            for k in range(classes):
                numbers[cell, k, 0] = values[k, cell, 0]
    half, odd = np.uint32(0x7FFF if shift else 0), np.uint32(1 if shift else 0)
    for n in range(out.size):
        out[n] = (bits[n] + half + ((bits[n] >> np.uint32(16)) & odd)) >> shift


@njit(nogil=True, cache=True)
def _voxels(cell, cells, row, size, fold, labels, first, found):  # type: ignore[no-untyped-def]
    """The labels of `cells` cells of a row, in the order of `_by_class`; `row` counts the rows of a
    sample.
    """
    height, width = size[1] * fold, size[2] * fold
    x, y = row // size[1] * fold, row % size[1] * fold
    n = 0
    for z in range(cell * fold, (cell + cells) * fold, fold):
        for a in range(fold):
            for b in range(fold):
                at = first + ((x + a) * height + y + b) * width + z
                for c in range(fold):
                    found[n] = labels[at + c]
                    n += 1


@njit(nogil=True, cache=True)
def _room(classes, cube):  # type: ignore[no-untyped-def]
    """What the loops below work in: bits, rows of classes (classes, voxels), their largest
    (voxels,), and labels.
    """
    voxels = max(1, _NEAR // cube) * cube
    rows = np.empty((classes, voxels), np.float32)
    return (
        np.empty(voxels * classes, np.uint32),
        rows,
        np.empty(voxels, np.float32),
        np.empty(voxels, np.int64),
    )


@njit(nogil=True, cache=True)
def _fetch(x, shift, size, fold, sample, line, cell, labels, bits, rows, found):  # type: ignore[no-untyped-def]
    """As many cells as fit into `rows`, from number `cell` of a line on, with their labels.

    Returns how many voxels they are and where their numbers begin in x.
    """
    classes, cube = len(rows), fold**3
    cells = min(rows.shape[1] // cube, size[2] - cell)
    before = sample * size[0] * size[1] * size[2]
    at = (before + line * size[2] + cell) * classes * cube
    count = cells * cube
    _by_class(x[at : at + count * classes], shift, bits, rows.reshape(classes, -1, cube))
    _voxels(cell, cells, line, size, fold, labels, before * cube, found)
    return count, at


@njit(nogil=True, cache=True, fastmath=_FAST)
def _softmax(p, classes, count, top, total, powers):  # type: ignore[no-untyped-def]
    """Logits (classes, count) to probabilities in place; `top` becomes the largest and `total` the
    sum of exponentials.

    The exponential: 2 to a whole power from the bits of a float, times a polynomial (Cephes, expf),
    to 2e-7.
    """
    scale = powers.view(np.float32)
    for n in range(count):
        top[n] = p[0, n]
        total[n] = 0
    for k in range(1, classes):
        for n in range(count):
            top[n] = max(top[n], p[k, n])
    for k in range(classes):
        for n in range(count):
            x = p[k, n] - top[n]
            x = np.float32(-87) if x < np.float32(-87) else x
            whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
            powers[n] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            x = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
            y = np.float32(1.9875691500e-4)
            y = y * x + np.float32(1.3981999507e-3)
            y = y * x + np.float32(8.3334519073e-3)
            y = y * x + np.float32(4.1665795894e-2)
            y = y * x + np.float32(1.6666665459e-1)
            y = y * x + np.float32(5.0000001201e-1)
            p[k, n] = y * x * x + x + np.float32(1)
        for n in range(count):
            p[k, n] *= scale[n]
            total[n] += p[k, n]
    for n in range(count):
        scale[n] = np.float32(1) / total[n]
    for k in range(classes):
        for n in range(count):
            p[k, n] *= scale[n]


@njit(nogil=True, cache=True, fastmath=_FAST)
def sum_loss(x, shift, classes, size, fold, sample, row, rows, labels, sums):  # type: ignore[no-untyped-def]
    """Of a unit: probability, probability of the right class and number of voxels of each class,
    and cross-entropy.

    sums (3 · classes + 1) float64; size: cells of a sample along each axis; fold: voxels of a cell
    along each axis.
    """
    bits, p, top, targets = _room(classes, fold**3)
    voxels, most = len(top), len(top) // fold**3
    total, powers = np.empty(voxels, np.float32), np.empty(voxels, np.int32)
    right, counts = np.empty(voxels, np.float32), np.empty(voxels, np.float32)
    sums[:] = 0
    for line in range(row, row + rows):
        for cell in range(0, size[2], most):
            count, _ = _fetch(x, shift, size, fold, sample, line, cell, labels, bits, p, targets)
            for n in range(count):
                right[n] = p[max(targets[n], 0), n]
                counts[n] = np.float32(targets[n] >= 0)
            _softmax(p, classes, count, top, total, powers)
            for k in range(classes):
                near = np.float32(0)
                for n in range(count):
                    near += p[k, n] * counts[n]
                sums[k] += near
            entropy = 0.0
            for n in range(count):
                if targets[n] >= 0:
                    sums[classes + targets[n]] += p[targets[n], n]
                    sums[2 * classes + targets[n]] += 1
                    entropy += np.log(total[n]) - (right[n] - top[n])
            sums[3 * classes] += entropy


@njit(nogil=True, cache=True, fastmath=_FAST)
def slope_of_loss(  # type: ignore[no-untyped-def]
    x,
    shift,
    classes,
    size,
    fold,
    sample,
    row,
    rows,
    labels,
    everywhere,
    at_truth,
    share,
    factor,
    out,
):
    """Writes the gradient of a unit's logits to `out`, laid out as x; see `ops.loss` for what it is
    made of.
    """
    bits, p, top, targets = _room(classes, fold**3)
    voxels, most = len(top), len(top) // fold**3
    total, powers = np.empty(voxels, np.float32), np.empty(voxels, np.int32)
    truth, factors = np.empty(voxels, np.float32), np.empty(voxels, np.float32)
    for line in range(row, row + rows):
        for cell in range(0, size[2], most):
            count, at = _fetch(x, shift, size, fold, sample, line, cell, labels, bits, p, targets)
            _softmax(p, classes, count, top, total, powers)
            for n in range(count):
                k = max(targets[n], 0)
                truth[n] = at_truth[sample, k] * p[k, n]
                top[n] = truth[n] - share
                factors[n] = factor if targets[n] >= 0 else np.float32(0)
            for k in range(classes):
                each = everywhere[sample, k]
                for n in range(count):
                    top[n] += p[k, n] * each
            # `top` is now what is taken off everywhere: the mean of the gradients of p, less the
            # share of a voxel.
            for k in range(classes):
                each = everywhere[sample, k]
                for n in range(count):
                    p[k, n] = p[k, n] * (each - top[n]) * factors[n]
            for n in range(count):
                p[max(targets[n], 0), n] += (truth[n] - share) * factors[n]
            _by_cell(p.reshape(classes, most, fold**3), shift, bits, out[at : at + count * classes])


@njit(nogil=True, cache=True)
def count_hits(x, shift, classes, size, fold, sample, row, rows, labels, counts):  # type: ignore[no-untyped-def]
    """Of a unit: voxels of each class that were found, that are, and that are both; counts (3 ·
    classes) int64.
    """
    bits, p, top, targets = _room(classes, fold**3)
    voxels, most = len(top), len(top) // fold**3
    best = np.empty(voxels, np.int32)
    counts[:] = 0
    for line in range(row, row + rows):
        for cell in range(0, size[2], most):
            count, _ = _fetch(x, shift, size, fold, sample, line, cell, labels, bits, p, targets)
            for n in range(count):
                top[n] = p[0, n]
                best[n] = 0
            for k in range(1, classes):
                for n in range(count):
                    more = p[k, n] > top[n]
                    top[n] = p[k, n] if more else top[n]
                    best[n] = k if more else best[n]
            for n in range(count):
                if targets[n] >= 0:
                    counts[best[n]] += 1
                    counts[classes + targets[n]] += 1
                    counts[2 * classes + targets[n]] += best[n] == targets[n]
