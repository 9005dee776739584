"""The compiled loops of `ops.slopes` on channels-last logits, float32 or bfloat16 (as in
`losses`).
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit


@njit(nogil=True, cache=True)
def _read(numbers, n, shift, bits):  # type: ignore[no-untyped-def]
    """The numbers of cell n as they are stored; as float32 they go to `bits`."""
    cell = numbers[n * bits.size : (n + 1) * bits.size]
    for m in range(cell.size):
        bits[m] = np.uint32(cell[m]) << shift
    return cell


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def add_slopes(low, high, numbers, shift, slopes, own):  # type: ignore[no-untyped-def]
    """Adds slopes (N, K) times own (N, 8) to the cells low..high of the logits, flat (N · K · 8)
    and in place.

    bfloat16 comes as uint16, float32 as uint32, and `shift` is 16 or 0.
    """
    classes = slopes.shape[1]
    bits = np.empty(8 * classes, np.uint32)
    values = bits.view(np.float32).reshape(classes, 8)
    half, odd = np.uint32(0x7FFF if shift else 0), np.uint32(1 if shift else 0)
    for n in range(low, high):
        cell = _read(numbers, n, shift, bits)
        slope, x = slopes[n], own[n]
        for k in range(classes):
            for v in range(8):
                values[k, v] += slope[k] * x[v]
        for m in range(cell.size):
            cell[m] = (bits[m] + half + ((bits[m] >> np.uint32(16)) & odd)) >> shift


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def sum_over_voxels(low, high, numbers, shift, own, out):  # type: ignore[no-untyped-def]
    """out (N, K): of each class the sum over the 8 voxels of `numbers`, flat (N · K · 8), times own
    (N, 8).
    """
    classes = out.shape[1]
    bits = np.empty(8 * classes, np.uint32)
    values = bits.view(np.float32).reshape(classes, 8)
    for n in range(low, high):
        _read(numbers, n, shift, bits)
        x, row = own[n], out[n]
        for k in range(classes):
            total = np.float32(0)
            for v in range(8):
                total += values[k, v] * x[v]
            row[k] = total
