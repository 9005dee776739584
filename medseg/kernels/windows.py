"""The compiled loops of `window`: adding windows up.

Arrays are C-contiguous float32 with the features of a voxel next to each other, (X, Y, Z, F). Every
kernel works on a range of its first axis, releases the interpreter lock, and gives each voxel the
same sums in the same order however many threads share the work. Imported where used: numba takes
longer to load than a small scan to segment.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from medseg.kernels.compiled import njit
from medseg.kernels.vectors import (
    INT,
    LANES,
    Memory,
    broadcast,
    emitted,
    loop,
)


@njit(cache=True, nogil=True)
def add_window(low, high, sums, turn, features, along, across, up, offset):  # type: ignore[no-untyped-def]
    """sums[low:high, :, offset : offset + N] += features (X, Y, N) times along (X,) times across
    (Y,) times up (N,).

    Depth and features of a voxel are one axis of N numbers here, and `up` has the weight of each.
    The second axis of sums is a ring in which the first plane is number `turn`.
    """
    for a in range(low, high):
        for b in range(len(across)):
            weight = along[a] * across[b]
            source, target = (
                features[a, b],
                sums[a, (turn + b) % sums.shape[1], offset : offset + len(up)],
            )
            for n in range(len(up)):
                target[n] += weight * up[n] * source[n]


@emitted
def _add_weighted(
    builder: Any, target: Memory, weight: Any, up: Memory, source: Memory, vectors: Any
) -> None:
    """target += weight · up · source, of 16 · vectors numbers."""
    factor = broadcast(builder, weight)
    with loop(builder, vectors) as n:
        at = builder.mul(n.index, ir.Constant(INT, LANES))
        target.store(target.load(at) + factor * up.load(at) * source.load(at), at)


@njit(cache=True, nogil=True)
def add_halves(low, high, sums, turn, features, along, across, up, offset):  # type: ignore[no-untyped-def]
    """The same for features in bfloat16 (uint16), where N is a multiple of 16."""
    target, source, width = sums.reshape(-1), features.reshape(-1), len(up)
    for a in range(low, high):
        for b in range(len(across)):
            at = (a * sums.shape[1] + (turn + b) % sums.shape[1]) * sums.shape[2] + offset
            begin = (a * features.shape[1] + b) * width
            _add_weighted(target, at, along[a] * across[b], up, 0, source, begin, width // LANES)


@njit(cache=True, nogil=True)
def add_some(low, high, sums, turn, features, along, across, up, z):  # type: ignore[no-untyped-def]
    """The same for sums (X, Y, Z, F) and fewer features (X, Y, Z, f), from depth z on.

    A single feature vector (1, 1, 1, f) stands for a window that is the same everywhere.
    """
    same = features.size == features.shape[3]
    for a in range(low, high):
        for b in range(len(across)):
            source = features[0, 0] if same else features[a, b]
            target = sums[a, (turn + b) % sums.shape[1]]
            for c in range(len(up)):
                weight = along[a] * across[b] * up[c]
                one = source[0] if same else source[c]
                for f in range(len(one)):
                    target[z + c, f] += weight * one[f]


@njit(cache=True, nogil=True)
def finish(low, high, sums, turn, carry, carried, at, along, across, up, first, out):  # type: ignore[no-untyped-def]
    """Finish the planes low..high of the second axis of a column of sums (X, Y, N), a ring that
    begins at `turn`.

    What the row before left, the first `carried` planes of carry (X, Y, N) from plane `at` on, is
    added. What is complete goes to out (X, Y, N), which begins at plane `first`, times the weights
    of the three axes; what the next row adds to goes to the carry; the sums become 0.
    """
    for b in range(low, high):
        for a in range(len(sums)):
            source = sums[a, (turn + b) % sums.shape[1]]
            if a < carried:
                before = carry[a, at + b]
                for n in range(len(source)):
                    source[n] += before[n]
            if a < len(along):
                if first <= b < first + len(across):
                    weight, target = along[a] * across[b - first], out[a, b - first]
                    for n in range(len(target)):
                        target[n] = weight * up[n] * source[n]
            elif a - len(along) < len(carry):
                after = carry[a - len(along), at + b]
                for n in range(len(source)):
                    after[n] = source[n]
            for n in range(len(source)):
                source[n] = 0
