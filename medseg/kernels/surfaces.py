"""The compiled loops of distances: surface elements of label maps, and the nearest of another map.

Compiled by numba at the first call and cached. Every kernel releases the interpreter lock, works on
C-contiguous arrays and touches each voxel once.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: In an element map: a corner that several labels meet at, to be looked up in the label map.
SEVERAL = 255


@njit(cache=True, nogil=True)
def border_map(labels, start, stop, out):  # type: ignore[no-untyped-def]
    """out[start:stop]: the label of voxels with a face to another label or to the outside of the
    array, else 0.

    labels, out: (A, B, C) uint8.
    """
    depth, height, width = labels.shape
    nothing = np.zeros(width, np.uint8)
    padded_row = np.zeros(width + 2, np.uint8)
    for a in range(start, stop):
        for b in range(height):
            row = labels[a, b]
            for c in range(width):
                padded_row[c + 1] = row[c]
            above = labels[a - 1, b] if a else nothing
            below = labels[a + 1, b] if a + 1 < depth else nothing
            before = labels[a, b - 1] if b else nothing
            after = labels[a, b + 1] if b + 1 < height else nothing
            for c in range(width):
                one = row[c]
                differs = (
                    (one ^ above[c])
                    | (one ^ below[c])
                    | (one ^ before[c])
                    | (one ^ after[c])
                    | (one ^ padded_row[c])
                    | (one ^ padded_row[c + 2])
                )
                out[a, b, c] = one if differs else np.uint8(0)


@njit(cache=True, nogil=True)
def corner_map(labels, start, stop, out):  # type: ignore[no-untyped-def]
    """out[start:stop]: for corners between voxels, 0 if all 8 voxels agree, the one label if the
    rest is 0, or SEVERAL.

    labels: (A, B, C) uint8, 0 outside. out: (A + 1, B + 1, C + 1) uint8; corner (a, b, c) lies
    before voxel (a, b, c).
    """
    depth, height, width = labels.shape
    nothing = np.zeros(width, np.uint8)
    # Over the 4 voxels of a column: largest label, smallest value, smallest label (less 1, so that
    # 0 counts as 255).
    high = np.zeros(width + 2, np.uint8)
    low = np.zeros(width + 2, np.uint8)
    least = np.full(width + 2, np.uint8(255))
    one = np.uint8(1)
    for a in range(start, stop):
        for b in range(height + 1):
            w = labels[a - 1, b - 1] if a and b else nothing
            x = labels[a - 1, b] if a and b < height else nothing
            y = labels[a, b - 1] if a < depth and b else nothing
            z = labels[a, b] if a < depth and b < height else nothing
            for c in range(width):
                high[c + 1] = max(max(w[c], x[c]), max(y[c], z[c]))
                low[c + 1] = min(min(w[c], x[c]), min(y[c], z[c]))
                least[c + 1] = min(
                    min(np.uint8(w[c] - one), np.uint8(x[c] - one)),
                    min(np.uint8(y[c] - one), np.uint8(z[c] - one)),
                )
            for c in range(width + 1):
                highest = max(high[c], high[c + 1])
                if highest == min(low[c], low[c + 1]):
                    out[a, b, c] = 0
                elif highest == np.uint8(min(least[c], least[c + 1]) + one):
                    out[a, b, c] = highest
                else:
                    out[a, b, c] = SEVERAL


@njit(cache=True, nogil=True)
def voxels_around(labels, a, b, c, cell):  # type: ignore[no-untyped-def]
    """cell[4 i + 2 j + k] = label of the voxel (a - 1 + i, b - 1 + j, c - 1 + k), 0 outside."""
    for n in range(8):
        i, j, k = a - 1 + (n >> 2), b - 1 + ((n >> 1) & 1), c - 1 + (n & 1)
        inside = 0 <= i < labels.shape[0] and 0 <= j < labels.shape[1] and 0 <= k < labels.shape[2]
        cell[n] = labels[i, j, k] if inside else np.uint8(0)


@njit(cache=True, nogil=True)
def is_around(labels, a, b, c, value):  # type: ignore[no-untyped-def]
    """Whether one of the 8 voxels around a corner has the label."""
    for i in range(max(a - 1, 0), min(a + 1, labels.shape[0])):
        for j in range(max(b - 1, 0), min(b + 1, labels.shape[1])):
            for k in range(max(c - 1, 0), min(c + 1, labels.shape[2])):
                if labels[i, j, k] == value:
                    return True
    return False


@njit(cache=True, nogil=True)
def labels_at(elements, labels, a, b, c, cell):  # type: ignore[no-untyped-def]
    """Put the distinct labels with an element at (a, b, c) first in `cell` (8,) and return how many
    there are.
    """
    if elements[a, b, c] != SEVERAL:
        cell[0] = elements[a, b, c]
        return 1
    voxels_around(labels, a, b, c, cell)
    count = 0
    for n in range(8):
        value = cell[n]
        known = value == 0
        for m in range(count):
            known |= cell[m] == value
        if not known:
            cell[count] = value
            count += 1
    return count


@njit(cache=True, nogil=True)
def presence(elements, labels, block, start, stop, bits):  # type: ignore[no-untyped-def]
    """Set in bits[start:stop] which labels have elements in each block of `block` (3,) elements.

    bits: (blocks along A, B, C, 4) uint64; label n is bit n % 64 of word n // 64.
    """
    cell = np.zeros(8, np.uint8)
    one = np.uint64(1)
    for a in range(start * block[0], min(stop * block[0], elements.shape[0])):
        for b in range(elements.shape[1]):
            row = elements[a, b]
            there = bits[a // block[0], b // block[1]]
            last = np.uint8(0)
            until = 0
            for c in range(row.size):
                if row[c] == 0 or (row[c] == last and c < until):
                    continue
                for n in range(labels_at(elements, labels, a, b, c, cell)):
                    there[c // block[2], cell[n] >> 6] |= one << np.uint64(cell[n] & 63)
                last = row[c] if row[c] != SEVERAL else np.uint8(0)
                until = (c // block[2] + 1) * block[2]


@njit(cache=True, nogil=True)
def _twice_as_long(rows):  # type: ignore[no-untyped-def]
    """A copy of (n, m) with room for n more rows."""
    longer = np.empty((2 * rows.shape[0], rows.shape[1]), rows.dtype)
    for n in range(rows.shape[0]):  # an assignment of slices takes numba seconds to compile
        for m in range(rows.shape[1]):
            longer[n, m] = rows[n, m]
    return longer


@njit(cache=True, nogil=True)
def nearest(  # type: ignore[no-untyped-def]
    elements, labels, others, other_labels, reach, block, offsets, areas, start, stop, histogram
):
    """Distance from each surface element in [start, stop) to the nearest element of its label in
    the other map.

    elements, others: (A, B, C) uint8 as `border_map` or `corner_map` gives them. labels,
    other_labels: the label maps. offsets: (n, 3) int64 steps in order of length; the first is (0,
    0, 0). reach: `presence` of `others` spread to the neighbouring blocks, so that a label without
    its bit there is out of reach of all offsets. areas: (256,) int64 weight of a corner by which of
    its 8 voxels have the label; empty if each element counts as 1. histogram: (256, n) int64, added
    to: weight of the elements of a label whose nearest lies at an offset. Returns int64 (m, 3):
    label, element number and weight of the elements beyond all offsets.
    """
    depth, height, width = elements.shape
    flat = others.ravel()
    count = len(offsets)
    deltas = np.empty(count, np.int64)
    for m in range(count):
        deltas[m] = (offsets[m, 0] * height + offsets[m, 1]) * width + offsets[m, 2]
    cell = np.zeros(8, np.uint8)
    around = np.zeros(8, np.uint8)
    far = np.empty((1024, 3), np.int64)
    beyond = 0
    one = np.uint64(1)
    for a in range(start, stop):
        for b in range(height):
            row = elements[a, b]
            safe_ab = block[0] <= a < depth - block[0] and block[1] <= b < height - block[1]
            for c in range(width):
                if row[c] == 0:
                    continue
                number = (a * height + b) * width + c
                safe = safe_ab and block[2] <= c < width - block[2]
                if len(areas):
                    voxels_around(labels, a, b, c, around)
                for n in range(labels_at(elements, labels, a, b, c, cell)):
                    value = cell[n]
                    weight = 1
                    if len(areas):
                        code = 0
                        for m in range(8):
                            code |= (around[m] == value) << m
                        weight = areas[code]
                    hit = count
                    if flat[number] == value or (
                        flat[number] == SEVERAL and is_around(other_labels, a, b, c, value)
                    ):
                        hit = 0
                    elif reach[a // block[0], b // block[1], c // block[2], value >> 6] & (
                        one << np.uint64(value & 63)
                    ):
                        if safe:
                            for m in range(1, count):
                                there = flat[number + deltas[m]]
                                if there == value or (
                                    there == SEVERAL
                                    and is_around(
                                        other_labels,
                                        a + offsets[m, 0],
                                        b + offsets[m, 1],
                                        c + offsets[m, 2],
                                        value,
                                    )
                                ):
                                    hit = m
                                    break
                        else:
                            for m in range(1, count):
                                i, j, k = a + offsets[m, 0], b + offsets[m, 1], c + offsets[m, 2]
                                if not (0 <= i < depth and 0 <= j < height and 0 <= k < width):
                                    continue
                                there = others[i, j, k]
                                if there == value or (
                                    there == SEVERAL and is_around(other_labels, i, j, k, value)
                                ):
                                    hit = m
                                    break
                    if hit < count:
                        histogram[value, hit] += weight
                        continue
                    if beyond == len(far):
                        far = _twice_as_long(far)
                    far[beyond, 0] = value
                    far[beyond, 1] = number
                    far[beyond, 2] = weight
                    beyond += 1
    return far[:beyond]


@njit(cache=True, nogil=True)
def nearest_far(numbers, value, groups, blocks, block, others, other_labels, spacing):  # type: ignore[no-untyped-def]
    """Distance in mm from each element to the nearest element with label `value`, however far:
    float64 (m,).

    numbers: (m,) int64 elements, best in an order in which neighbours follow each other. blocks:
    (n, 3) int64, the blocks of `block` elements in which the label is present. groups: (g, 8)
    int64, for runs of neighbouring blocks their first and last (exclusive) row and their bounding
    box in blocks, start (3) and stop (3). Elements of a block are listed, and its box drawn tight
    around them, when it is first looked at.
    """
    distance = np.full(len(numbers), np.inf)
    first = np.full(len(blocks), -1)
    last = np.zeros(len(blocks), np.int64)
    points = np.empty((1024, 3), np.float64)
    count = 0
    height, width = others.shape[1], others.shape[2]
    group_boxes, boxes = np.empty((len(groups), 6)), np.empty((len(blocks), 6))
    for g in range(len(groups)):
        _box_mm(groups[g, 2:5], groups[g, 5:8], block, spacing, group_boxes[g])
    for m in range(len(blocks)):
        _box_mm(blocks[m], blocks[m] + 1, block, spacing, boxes[m])
    at = np.empty(3)
    guess = np.full(3, np.inf)
    for n in range(len(numbers)):
        at[0] = numbers[n] // (height * width) * spacing[0]
        at[1] = numbers[n] // width % height * spacing[1]
        at[2] = numbers[n] % width * spacing[2]
        # The element found last is likely near: it spares most blocks.
        best = (at[0] - guess[0]) ** 2 + (at[1] - guess[1]) ** 2 + (at[2] - guess[2]) ** 2
        # Of the nearest group look at the nearest block first: what it holds spares most others.
        least_gap, nearest_group = np.inf, 0
        for g in range(len(groups)):
            gap = _squared_gap(at, group_boxes[g])
            if gap < least_gap:
                least_gap, nearest_group = gap, g
        least_gap, nearest_block = np.inf, 0
        if len(groups) and least_gap < best:
            for m in range(groups[nearest_group, 0], groups[nearest_group, 1]):
                gap = _squared_gap(at, boxes[m])
                if gap < least_gap:
                    least_gap, nearest_block = gap, m
        for g in range(-1, len(groups)):
            if g < 0:
                begin, end = nearest_block, min(nearest_block + 1, len(blocks))
            elif _squared_gap(at, group_boxes[g]) < best:
                begin, end = groups[g, 0], groups[g, 1]
            else:
                continue
            for m in range(begin, end):
                if _squared_gap(at, boxes[m]) >= best:
                    continue
                if first[m] < 0:
                    first[m] = count
                    low = blocks[m] * block
                    for axis in range(3):
                        boxes[m, axis], boxes[m, 3 + axis] = np.inf, -np.inf
                    for i in range(low[0], min(low[0] + block[0], others.shape[0])):
                        for j in range(low[1], min(low[1] + block[1], height)):
                            for k in range(low[2], min(low[2] + block[2], width)):
                                there = others[i, j, k]
                                if there == value or (
                                    there == SEVERAL and is_around(other_labels, i, j, k, value)
                                ):
                                    if count == len(points):
                                        points = _twice_as_long(points)
                                    points[count, 0] = i * spacing[0]
                                    points[count, 1] = j * spacing[1]
                                    points[count, 2] = k * spacing[2]
                                    for axis in range(3):
                                        boxes[m, axis] = min(boxes[m, axis], points[count, axis])
                                        boxes[m, 3 + axis] = max(
                                            boxes[m, 3 + axis], points[count, axis]
                                        )
                                    count += 1
                    last[m] = count
                for e in range(first[m], last[m]):
                    square = (
                        (at[0] - points[e, 0]) ** 2
                        + (at[1] - points[e, 1]) ** 2
                        + (at[2] - points[e, 2]) ** 2
                    )
                    if square < best:
                        best = square
                        for axis in range(3):
                            guess[axis] = points[e, axis]
        distance[n] = np.sqrt(best)
    return distance


@njit(cache=True, nogil=True)
def _squared_gap(at, box):  # type: ignore[no-untyped-def]
    """Square of the distance from a point (3,) to a box (6,): low and high corner."""
    total = 0.0
    for axis in range(3):
        gap = max(max(box[axis] - at[axis], at[axis] - box[3 + axis]), 0.0)
        total += gap * gap
    return total


@njit(cache=True, nogil=True)
def _box_mm(start, stop, block, spacing, box):  # type: ignore[no-untyped-def]
    """Fill box (6,) with the corners in mm of the elements of the blocks from start to stop."""
    for axis in range(3):
        box[axis] = start[axis] * block[axis] * spacing[axis]
        box[3 + axis] = (stop[axis] * block[axis] - 1) * spacing[axis]
