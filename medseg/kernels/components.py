"""The compiled loops of connected parts: runs of equal voxels, what they join to, tables of the
parts.

Compiled by numba at the first call and cached. Every kernel releases the interpreter lock, works on
C-contiguous arrays and touches each voxel once.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit


@njit(cache=True, nogil=True)
def component_table(ids, labels, count, offset, steps):  # type: ignore[no-untyped-def]
    """Label, voxels, first voxel and bounding box of the components 1..count, read run by run.

    ids, labels: (A, B, C) C-contiguous, the part of an array from row `offset` of the first axis
    on. steps: what one step along each axis adds to the number of a voxel. Returns int64 (count +
    1, 9): label, voxels, smallest voxel number, start (3), stop (3); row 0 is unused.
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
def runs_of(labels):  # type: ignore[no-untyped-def]
    """The runs of equal labels along the last axis of (A, B, C), row by row.

    Returns first column (r,) int32, label (r,), and number of runs of each row (A * B,) int64.
    """
    depth, height, width = labels.shape
    first = np.empty(1024, np.int32)
    value = np.empty(1024, labels.dtype)
    rows = np.zeros(depth * height, np.int64)
    count = 0
    for a in range(depth):
        for b in range(height):
            row = labels[a, b]
            if count + width > first.size:
                more = max(2 * first.size, count + width)
                longer, more_values = np.empty(more, np.int32), np.empty(more, labels.dtype)
                for run in range(count):
                    longer[run], more_values[run] = first[run], value[run]
                first, value = longer, more_values
            before = count
            first[count], value[count] = 0, row[0]
            count += 1
            for c in range(1, width):
                if row[c] != row[c - 1]:
                    first[count], value[count] = c, row[c]
                    count += 1
            rows[a * height + b] = count - before
    return first[:count], value[:count], rows


@njit(cache=True, nogil=True)
def _root(parent, run):  # type: ignore[no-untyped-def]
    """The run that stands for the set of `run`; paths are halved on the way."""
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@njit(cache=True, nogil=True)
def regions_of_runs(first, value, begin, height, width):  # type: ignore[no-untyped-def]
    """Face-connected regions of every label, and which of them share a face.

    first, value: the runs of `runs_of`; begin: (rows + 1,) number of the first run of each row.
    Returns the region of each run, numbered from 1 in the order of their first voxels (r,); for
    regions, with an unused row 0, label, voxels and whether the region touches the edge of the
    array (n + 1, 3) int64; and pairs of regions, the smaller number in the high half, in which a
    pair may occur several times.
    """
    rows = len(begin) - 1
    parent = np.arange(len(first))
    pairs = np.empty(1024, np.uint64)
    pair_count = 0
    memory = np.zeros(4096, np.uint64)
    region = np.zeros(len(first), np.int64)
    count = 0
    # First join runs of one label, then, when regions are known, list who touches whom.
    for turn in range(2):
        for row in range(rows):
            for back in (1, height):
                if row < back or (back == 1 and row % height == 0):
                    continue
                other, other_end = begin[row - back], begin[row - back + 1]
                for run in range(begin[row], begin[row + 1]):
                    end = first[run + 1] if run + 1 < begin[row + 1] else width
                    while True:
                        if turn == 0:
                            if value[run] == value[other]:
                                one, two = _root(parent, run), _root(parent, other)
                                parent[max(one, two)] = min(one, two)
                        elif region[run] != region[other]:
                            pair_count, pairs = _add_pair(
                                region[run], region[other], pair_count, pairs, memory
                            )
                        other_stop = first[other + 1] if other + 1 < other_end else width
                        if other_stop > end:
                            break
                        other += 1
                        if other_stop == end or other == other_end:
                            break
        if turn == 0:
            for run in range(len(first)):
                root = _root(parent, run)
                if root == run:
                    count += 1
                    region[run] = count
                else:
                    region[run] = region[root]
    table = np.zeros((count + 1, 3), np.int64)
    for row in range(rows):
        edge = (
            row < height or row >= rows - height or row % height == 0 or row % height == height - 1
        )
        for run in range(begin[row], begin[row + 1]):
            last = run + 1 == begin[row + 1]
            entry = table[region[run]]
            entry[0] = value[run]
            entry[1] += (width if last else first[run + 1]) - first[run]
            entry[2] |= edge or last or first[run] == 0
            if not last:
                pair_count, pairs = _add_pair(
                    region[run], region[run + 1], pair_count, pairs, memory
                )
    return region, table, pairs[:pair_count]


@njit(cache=True, nogil=True)
def rooms_within(low, high, label, voxels, outside, wall):  # type: ignore[no-untyped-def]
    """For each region the voxels of the room it lies in, if walls are the regions labelled `wall`;
    0 if it is open.

    low, high: pairs of regions that share a face. outside: not 0 for regions at the edge of the
    array; a room with such a region is open. Walls are in no room (0).
    """
    parent = np.arange(len(label))
    for pair in range(len(low)):
        if label[low[pair]] != wall and label[high[pair]] != wall:
            one, two = _root(parent, low[pair]), _root(parent, high[pair])
            parent[max(one, two)] = min(one, two)
    room = np.zeros(len(label), np.int64)
    is_open = np.zeros(len(label), np.bool_)
    for region in range(1, len(label)):
        room[_root(parent, region)] += voxels[region]
        is_open[_root(parent, region)] |= outside[region] != 0
    # A root has the smallest number of its room: it comes last.
    for region in range(len(label) - 1, 0, -1):
        root = _root(parent, region)
        room[region] = 0 if label[region] == wall or is_open[root] else room[root]
    return room


@njit(cache=True, nogil=True)
def _add_pair(one, two, found, pairs, seen):  # type: ignore[no-untyped-def]
    """Append a pair of regions unless it is in the small memory of pairs `seen`."""
    pair = (np.uint64(min(one, two)) << np.uint64(32)) | np.uint64(max(one, two))
    slot = (pair * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(52)
    if seen[slot] == pair:
        return found, pairs
    seen[slot] = pair
    if found == pairs.size:
        new_pairs = np.empty(2 * found, np.uint64)
        for n in range(found):
            new_pairs[n] = pairs[n]
        pairs = new_pairs
    pairs[found] = pair
    return found + 1, pairs


@njit(cache=True, nogil=True)
def write_runs(first, begin, target, value, out):  # type: ignore[no-untyped-def]
    """Write the runs whose `target` label is not their `value` into the label map out (rows, C)."""
    width = out.shape[1]
    for row in range(len(begin) - 1):
        for run in range(begin[row], begin[row + 1]):
            if target[run] != value[run]:
                for c in range(first[run], first[run + 1] if run + 1 < begin[row + 1] else width):
                    out[row, c] = target[run]


@njit(cache=True, nogil=True)
def overlap(reference, prediction, counts):  # type: ignore[no-untyped-def]
    """Add up voxels of each label: counts (n, 3) int64 of reference, prediction, and both. Arrays
    are C-contiguous.
    """
    first, second = reference.ravel(), prediction.ravel()
    n = 0
    while n < first.size:
        a, b = first[n], second[n]
        start = n
        n += 1
        while n < first.size and first[n] == a and second[n] == b:
            n += 1
        counts[a, 0] += n - start
        counts[b, 1] += n - start
        if a == b:
            counts[a, 2] += n - start
