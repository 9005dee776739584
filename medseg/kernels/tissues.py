"""The compiled loops of tissues in CT: block means, distances in mm, spreading, painting.

Arrays are C-contiguous. Every kernel works on a slab `start` to `stop` of one axis and releases the
interpreter lock, so that slabs run on several threads.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: A squared distance that is none.
FAR = np.float32(1e12)


@njit(cache=True, nogil=True)
def block_means(hu, factors, lowest, highest, out, start, stop):  # type: ignore[no-untyped-def]
    """Rows `start` to `stop` of out (a, b, c) int16: the means of blocks of hu (A, B, C) int16.

    factors: (3,) voxels of a block; the last blocks may be cut. Values are clipped first.
    """
    sums = np.empty((out.shape[1], out.shape[2]), np.int64)
    count = np.empty(out.shape[2], np.int64)
    for c in range(out.shape[2]):
        count[c] = min((c + 1) * factors[2], hu.shape[2]) - c * factors[2]
    for a in range(start, stop):
        sums[:] = 0
        first, last = a * factors[0], min((a + 1) * factors[0], hu.shape[0])
        for x in range(first, last):
            for y in range(hu.shape[1]):
                row = sums[y // factors[1]]
                for c in range(out.shape[2]):
                    total = 0
                    for z in range(c * factors[2], c * factors[2] + count[c]):
                        total += min(max(hu[x, y, z], lowest), highest)
                    row[c] += total
        for b in range(out.shape[1]):
            rows = min((b + 1) * factors[1], hu.shape[1]) - b * factors[1]
            for c in range(out.shape[2]):
                number = (last - first) * rows * count[c]
                out[a, b, c] = int(np.floor(sums[b, c] / number + 0.5))


@njit(cache=True, nogil=True)
def _envelope(line, squared_mm, vertex, edge, result):  # type: ignore[no-untyped-def]
    """Lower envelope of parabolas (Felzenszwalb & Huttenlocher 2012, Theory of Computing 8:415)."""
    last = -1
    for q in range(line.size):
        if line[q] >= FAR:
            continue
        crossing = -np.inf
        while last >= 0:
            p = vertex[last]
            rise = (line[q] - line[p]) / squared_mm
            crossing = (rise + q * q - p * p) / (2.0 * (q - p))
            if crossing > edge[last]:
                break
            last -= 1
        if last < 0:
            crossing = -np.inf
        last += 1
        vertex[last] = q
        edge[last] = crossing
    if last < 0:
        result[:] = FAR
        return
    k = 0
    for q in range(line.size):
        while k < last and edge[k + 1] < q:
            k += 1
        step = q - vertex[k]
        result[q] = squared_mm * step * step + line[vertex[k]]


@njit(cache=True, nogil=True)
def distances_in_rows(target, spacing, out, start, stop):  # type: ignore[no-untyped-def]
    """Squared mm from every voxel to the nearest of `target` (A, B, C) bool within its plane a.

    spacing: (3,) mm. out: (A, B, C) float32; `FAR` where the plane has no target.
    """
    height, width = target.shape[1], target.shape[2]
    vertex, edge = np.empty(height, np.int64), np.empty(height, np.float64)
    line, result = np.empty(height, np.float32), np.empty(height, np.float32)
    for a in range(start, stop):
        for b in range(height):
            nearest = -1
            for c in range(width):
                if target[a, b, c]:
                    nearest = c
                step = (c - nearest) * spacing[2]
                out[a, b, c] = step * step if nearest >= 0 else FAR
            nearest = -1
            for c in range(width - 1, -1, -1):
                if target[a, b, c]:
                    nearest = c
                if nearest >= 0:
                    step = (nearest - c) * spacing[2]
                    out[a, b, c] = min(out[a, b, c], step * step)
        for c in range(width):
            for b in range(height):
                line[b] = out[a, b, c]
            _envelope(line, spacing[1] * spacing[1], vertex, edge, result)
            for b in range(height):
                out[a, b, c] = result[b]


@njit(cache=True, nogil=True)
def distances_across(out, spacing_mm, start, stop):  # type: ignore[no-untyped-def]
    """Complete `distances_in_rows` along the first axis, rows `start` to `stop` of the second."""
    depth = out.shape[0]
    vertex, edge = np.empty(depth, np.int64), np.empty(depth, np.float64)
    line, result = np.empty(depth, np.float32), np.empty(depth, np.float32)
    for b in range(start, stop):
        for c in range(out.shape[2]):
            for a in range(depth):
                line[a] = out[a, b, c]
            _envelope(line, spacing_mm * spacing_mm, vertex, edge, result)
            for a in range(depth):
                out[a, b, c] = result[a]


@njit(cache=True, nogil=True)
def spread_once(labels, allowed, out, start, stop):  # type: ignore[no-untyped-def]
    """One step of labels (A, B, C) uint8 into unlabelled neighbours by faces that are allowed.

    The largest label wins. Returns how many voxels got one.
    """
    count = 0
    depth, height, width = labels.shape
    for a in range(start, stop):
        for b in range(height):
            for c in range(width):
                value = labels[a, b, c]
                if value == 0 and allowed[a, b, c]:
                    if a > 0:
                        value = max(value, labels[a - 1, b, c])
                    if a + 1 < depth:
                        value = max(value, labels[a + 1, b, c])
                    if b > 0:
                        value = max(value, labels[a, b - 1, c])
                    if b + 1 < height:
                        value = max(value, labels[a, b + 1, c])
                    if c > 0:
                        value = max(value, labels[a, b, c - 1])
                    if c + 1 < width:
                        value = max(value, labels[a, b, c + 1])
                    count += value != 0
                out[a, b, c] = value
    return count


@njit(cache=True, nogil=True)
def _is_rim(hu, a, b, c, air_below, fat_above):  # type: ignore[no-untyped-def]
    """Whether a voxel lies between air and lean tissue: its value is a mixture of both."""
    air, lean = False, False
    for axis in range(3):
        for step in (-1, 1):
            x, y, z = a, b, c
            if axis == 0:
                x += step
            elif axis == 1:
                y += step
            else:
                z += step
            if 0 <= x < hu.shape[0] and 0 <= y < hu.shape[1] and 0 <= z < hu.shape[2]:
                air |= hu[x, y, z] < air_below
                lean |= hu[x, y, z] > fat_above
    return air and lean


@njit(cache=True, nogil=True)
def paint(hu, factors, regions, windows, values, out, start, stop):  # type: ignore[no-untyped-def]
    """Labels of every voxel from its value and from what its block is.

    hu: (A, B, C) int16. regions: (a, b, c, 5) uint8 of each block: the label of air; of fat; of
    lean tissue (0: no body); 0, 1 near bone or 2 in marrow; the label of a lung within which this
    lies. windows: air below, fat from, fat to, lean to, bone from, metal from. values: labels of
    bone, of metal, of other soft tissue.
    """
    air_below, fat_from, fat_to, lean_to, bone_from, metal_from = windows
    bone, metal, soft = values
    for a in range(start, stop):
        for b in range(hu.shape[1]):
            row = regions[a // factors[0], b // factors[1]]
            for block in range(row.shape[0]):
                air, fat, lean = row[block, 0], row[block, 1], row[block, 2]
                bony, lung = row[block, 3], row[block, 4]
                first = block * factors[2]
                for c in range(first, min(first + factors[2], hu.shape[2])):
                    value = hu[a, b, c]
                    if value < air_below:
                        label = air
                    elif lean == 0:
                        label = lean
                    elif value >= metal_from:
                        label = metal
                    elif bony == 2 or (bony == 1 and value >= bone_from):
                        label = bone
                    elif lung != 0:
                        label = lung
                    elif fat_from <= value <= fat_to:
                        label = soft if _is_rim(hu, a, b, c, air_below, fat_to) else fat
                    elif fat_to < value <= lean_to:
                        label = lean
                    else:
                        label = soft
                    out[a, b, c] = label
