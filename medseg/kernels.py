"""The compiled loops of `cleanup` and `metrics`: compiled by numba at the first call, cached, not imported with medseg.

Every kernel releases the interpreter lock, works on C-contiguous arrays and touches each voxel once. Callers cut the
first axis into slabs and run them on threads (`in_slabs`): there is no numba thread pool that could hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit


def threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_slabs(work: Callable[[int, int], Any], length: int, slabs_per_thread: int = 4) -> list[Any]:
    """Results of `work(start, stop)` over consecutive slabs of range(length), in order, on all threads."""
    if threads() == 1 or length < 16 or not slabs_per_thread:
        return [work(0, length)]
    count = min(length, threads() * slabs_per_thread)
    edges = [length * n // count for n in range(count + 1)]
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))


@njit(cache=True, nogil=True)
def component_table(ids, labels, count, offset, steps):  # type: ignore[no-untyped-def]
    """Label, voxels, first voxel and bounding box of the components 1..count, read run by run.

    ids, labels: (A, B, C) C-contiguous, the part of an array from row `offset` of the first axis on.
    steps: what one step along each axis adds to the number of a voxel.
    Returns int64 (count + 1, 9): label, voxels, smallest voxel number, start (3), stop (3); row 0 is unused.
    """
    table = np.zeros((count + 1, 9), np.int64)
    table[:, 2:6] = np.iinfo(np.int64).max
    for a in range(ids.shape[0]):
        for b in range(ids.shape[1]):
            row = ids[a, b]
            c = 0
            end = row.size
            while c < end:
                one = row[c]
                start = c
                c += 1
                while c < end and row[c] == one:
                    c += 1
                if one == 0:
                    continue
                entry = table[one]
                entry[0] = labels[a, b, start]
                entry[1] += c - start
                entry[2] = min(entry[2], (a + offset) * steps[0] + b * steps[1] + start * steps[2])
                entry[3] = min(entry[3], a + offset)
                entry[4] = min(entry[4], b)
                entry[5] = min(entry[5], start)
                entry[6] = max(entry[6], a + offset + 1)
                entry[7] = max(entry[7], b + 1)
                entry[8] = max(entry[8], c)
    return table


@njit(cache=True, nogil=True)
def look_up(ids, table, out):  # type: ignore[no-untyped-def]
    """out = table[ids], all C-contiguous."""
    source, target = ids.ravel(), out.ravel()
    for n in range(source.size):
        target[n] = table[source[n]]


@njit(cache=True, nogil=True)
def touching(ids):  # type: ignore[no-untyped-def]
    """Pairs of region numbers that share a voxel face: uint64, the smaller number in the high half.

    ids: (A, B, C) C-contiguous. A pair may be returned several times.
    """
    pairs = np.empty(1024, np.uint64)
    found = 0
    seen = np.zeros(4096, np.uint64)
    for a in range(ids.shape[0]):
        for b in range(ids.shape[1]):
            row = ids[a, b]
            above = ids[max(a - 1, 0), b]
            before = ids[a, max(b - 1, 0)]
            left = row[0]
            for c in range(row.size):
                one = row[c]
                if one == left and one == above[c] and one == before[c]:
                    continue
                for other in (left, above[c], before[c]):
                    if other != one:
                        pair = (np.uint64(min(one, other)) << np.uint64(32)) | np.uint64(max(one, other))
                        slot = (pair * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(52)
                        if seen[slot] != pair:
                            seen[slot] = pair
                            if found == pairs.size:
                                grown = np.empty(2 * found, np.uint64)
                                grown[:found] = pairs
                                pairs = grown
                            pairs[found] = pair
                            found += 1
                left = one
    return pairs[:found]
