"""The compiled loops of surfaces: nets between voxels of different labels, smoothed.

A net (Gibson 1998, MERL TR-98-20; of several labels Frisken 2022, JCGT 11:34) has a vertex in every
cell of 2 x 2 x 2 voxels that do not all agree, and a face of four corners between every two
neighbouring voxels that differ. Coordinates are in voxels: voxel (a, b, c) reaches from (a, b, c)
to (a + 1, b + 1, c + 1), and the cell before it lies at its corner (a, b, c).
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: How far a vertex may leave its corner along an axis, in voxels; and where a part is one voxel
#: thick, so that something of it stays.
REACH, REACH_THIN = 0.5, 0.25


@njit(cache=True, nogil=True)
def count_net(labels):  # type: ignore[no-untyped-def]
    """How many vertices and faces the net of labels (A, B, C) has, whose border is 0."""
    depth, height, width = labels.shape
    vertices, faces = 0, 0
    for a in range(depth - 1):
        for b in range(height - 1):
            here, after = labels[a, b], labels[a, b + 1]
            below, across = labels[a + 1, b], labels[a + 1, b + 1]
            for c in range(width - 1):
                one = here[c]
                faces += (one != below[c]) + (one != after[c]) + (one != here[c + 1])
                vertices += (
                    one != here[c + 1]
                    or one != after[c]
                    or one != after[c + 1]
                    or one != below[c]
                    or one != below[c + 1]
                    or one != across[c]
                    or one != across[c + 1]
                )
    return vertices, faces


@njit(cache=True, nogil=True)
def _sides(w, x, y, z):  # type: ignore[no-untyped-def]
    """How many labels meet at an edge of four voxels: 1, 2, or 3 for more."""
    count = 1 + (x != w)
    if y != w and y != x:
        count += 1
    if z != w and z != x and z != y:
        count += 1
    return min(count, 3)


@njit(cache=True, nogil=True)
def _joined(labels, axis, a, b, c):  # type: ignore[no-untyped-def]
    """`_sides` of the edge from the cell at corner (a, b, c) back along an axis."""
    if axis == 0:
        low = a - 1
        return _sides(
            labels[low, b - 1, c - 1],
            labels[low, b - 1, c],
            labels[low, b, c - 1],
            labels[low, b, c],
        )
    if axis == 1:
        low = b - 1
        return _sides(
            labels[a - 1, low, c - 1],
            labels[a - 1, low, c],
            labels[a, low, c - 1],
            labels[a, low, c],
        )
    low = c - 1
    return _sides(
        labels[a - 1, b - 1, low], labels[a - 1, b, low], labels[a, b - 1, low], labels[a, b, low]
    )


@njit(cache=True, nogil=True)
def _is_thin(labels, axis, a, b, c):  # type: ignore[no-untyped-def]
    """Whether of the four lines of voxels along an axis through a cell one changes its label twice
    within two voxels.
    """
    count = labels.shape[axis]
    at = a if axis == 0 else (b if axis == 1 else c)
    for n in range(4):
        i, j = n >> 1, n & 1
        if axis == 0:
            line = labels[:, b - 1 + i, c - 1 + j]
        elif axis == 1:
            line = labels[a - 1 + i, :, c - 1 + j]
        else:
            line = labels[a - 1 + i, b - 1 + j, :]
        before, behind = line[at - 1], line[at]
        if before == behind:
            continue
        if at >= 2 and line[at - 2] != before:
            return True
        if at + 1 < count and line[at + 1] != behind:
            return True
    return False


@njit(cache=True, nogil=True)
def _add_face(faces, sides, number, w, x, y, z, back, front):  # type: ignore[no-untyped-def]
    """A face whose normal leads from the label `back` to `front`; turned to lead to the larger."""
    faces[number, 0] = w
    faces[number, 2] = y
    if back < front:
        faces[number, 1], faces[number, 3] = x, z
        sides[number, 0], sides[number, 1] = back, front
    else:
        faces[number, 1], faces[number, 3] = z, x
        sides[number, 0], sides[number, 1] = front, back


@njit(cache=True, nogil=True)
def fill_net(labels, corners, around, reach, faces, sides):  # type: ignore[no-untyped-def]
    """The net of labels (A, B, C) uint16, whose border is 0.

    corners: (n, 3) int32, where the vertices are. around: (n, 6) int32, the vertices that each is
    smoothed with, -1 for none: along the axes, back and forth; where three labels meet only those
    along their seam. reach: (n, 3) float32, how far each may leave its corner. faces: (m, 4) int32
    vertices, sides: (m, 2) uint16 the labels behind and before each face, in rising order.
    """
    depth, height, width = labels.shape
    slab = np.full((2, height, width), -1, np.int32)  # vertices of the corners at a - 1 and a
    seam = np.zeros((len(corners), 6), np.uint8)
    vertex, face = 0, 0
    for a in range(1, depth):
        old, new = slab[(a - 1) & 1], slab[a & 1]
        for b in range(height):
            for c in range(width):
                new[b, c] = -1
        for b in range(1, height):
            for c in range(1, width):
                one = labels[a, b, c]
                if (
                    one == labels[a - 1, b - 1, c - 1]
                    and one == labels[a - 1, b - 1, c]
                    and one == labels[a - 1, b, c - 1]
                    and one == labels[a - 1, b, c]
                    and one == labels[a, b - 1, c - 1]
                    and one == labels[a, b - 1, c]
                    and one == labels[a, b, c - 1]
                ):
                    continue
                new[b, c] = vertex
                corners[vertex, 0], corners[vertex, 1], corners[vertex, 2] = a, b, c
                for axis in range(3):
                    around[vertex, 2 * axis] = around[vertex, 2 * axis + 1] = -1
                    thin = _is_thin(labels, axis, a, b, c)
                    reach[vertex, axis] = REACH_THIN if thin else REACH
                for axis in range(3):
                    meeting = _joined(labels, axis, a, b, c)
                    if meeting == 1:
                        continue
                    other = (
                        old[b, c] if axis == 0 else (new[b - 1, c] if axis == 1 else new[b, c - 1])
                    )
                    around[vertex, 2 * axis], around[other, 2 * axis + 1] = other, vertex
                    seam[vertex, 2 * axis] = seam[other, 2 * axis + 1] = meeting == 3
                vertex += 1
        # Faces of the voxels (a - 1, b, c): to (a, b, c), and to their next ones along b and c.
        for b in range(height - 1):
            for c in range(width - 1):
                one = labels[a - 1, b, c]
                if one != labels[a, b, c]:
                    _add_face(
                        faces, sides, face, new[b, c], new[b + 1, c], new[b + 1, c + 1],
                        new[b, c + 1], one, labels[a, b, c],
                    )  # fmt: skip
                    face += 1
                if one != labels[a - 1, b + 1, c]:
                    _add_face(
                        faces, sides, face, old[b + 1, c], old[b + 1, c + 1], new[b + 1, c + 1],
                        new[b + 1, c], one, labels[a - 1, b + 1, c],
                    )  # fmt: skip
                    face += 1
                if one != labels[a - 1, b, c + 1]:
                    _add_face(
                        faces, sides, face, old[b, c + 1], new[b, c + 1], new[b + 1, c + 1],
                        old[b + 1, c + 1], one, labels[a - 1, b, c + 1],
                    )  # fmt: skip
                    face += 1
    for n in range(len(around)):
        on_seam = 0
        for m in range(6):
            on_seam += seam[n, m]
        if on_seam >= 2:
            for m in range(6):
                if not seam[n, m]:
                    around[n, m] = -1


@njit(cache=True, nogil=True)
def relax(offsets, corners, around, reach, share, out, start, stop):  # type: ignore[no-untyped-def]
    """Move each of the vertices start..stop by a share of the way to the middle of those around it,
    within its reach.

    offsets, out: (n, 3) float32 from the corners.
    """
    for n in range(start, stop):
        count = 0
        x, y, z = np.float32(0), np.float32(0), np.float32(0)
        for m in range(6):
            other = around[n, m]
            if other < 0:
                continue
            count += 1
            x += np.float32(corners[other, 0] - corners[n, 0]) + offsets[other, 0]
            y += np.float32(corners[other, 1] - corners[n, 1]) + offsets[other, 1]
            z += np.float32(corners[other, 2] - corners[n, 2]) + offsets[other, 2]
        part = share / np.float32(max(count, 1))
        keep = np.float32(1) - share
        out[n, 0] = _within(keep * offsets[n, 0] + part * x, reach[n, 0])
        out[n, 1] = _within(keep * offsets[n, 1] + part * y, reach[n, 1])
        out[n, 2] = _within(keep * offsets[n, 2] + part * z, reach[n, 2])


@njit(cache=True, nogil=True)
def _within(x, reach):  # type: ignore[no-untyped-def]
    return min(max(x, -reach), reach)


@njit(cache=True, nogil=True)
def measure(points, triangles, sides, volumes, walls):  # type: ignore[no-untyped-def]
    """Add to volumes (labels + 1,) float64 what triangles enclose of each label, in voxels, and to
    walls (triangles,) float64 put the area of each.

    points: (n, 3) float32; triangles: (m, 3) int32, their normal leading from the first to the
    second of sides (m, 2) uint16.
    """
    normal = np.empty(3)
    for n in range(len(triangles)):
        w, x, y = triangles[n, 0], triangles[n, 1], triangles[n, 2]
        _normal(points, w, x, y, normal)
        held = 0.0
        for axis in range(3):
            held += normal[axis] * points[w, axis]
        volumes[sides[n, 0]] += held / 3
        volumes[sides[n, 1]] -= held / 3
        walls[n] = np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)


@njit(cache=True, nogil=True)
def sides_of(points, w, x, y):  # type: ignore[no-untyped-def]
    """Two sides of a triangle, from its corner w to x and to y, as six numbers."""
    return (
        points[x, 0] - points[w, 0],
        points[x, 1] - points[w, 1],
        points[x, 2] - points[w, 2],
        points[y, 0] - points[w, 0],
        points[y, 1] - points[w, 1],
        points[y, 2] - points[w, 2],
    )


@njit(cache=True, nogil=True)
def _normal(points, w, x, y, out):  # type: ignore[no-untyped-def]
    """Half the cross product of two sides of a triangle: its normal, as long as its area."""
    u0, u1, u2, v0, v1, v2 = sides_of(points, w, x, y)
    out[0] = 0.5 * (np.float64(u1) * v2 - np.float64(u2) * v1)
    out[1] = 0.5 * (np.float64(u2) * v0 - np.float64(u0) * v2)
    out[2] = 0.5 * (np.float64(u0) * v1 - np.float64(u1) * v0)


@njit(cache=True, nogil=True)
def push(points, triangles, sides, pressures, moves):  # type: ignore[no-untyped-def]
    """moves (n, 3) float64: how far each vertex goes where each label pushes its walls by the
    difference of its pressure (labels + 1,) float64 and that beyond, in voxels.
    """
    areas = np.zeros(len(points))
    normal = np.empty(3)
    for n in range(len(triangles)):
        _normal(points, triangles[n, 0], triangles[n, 1], triangles[n, 2], normal)
        by = pressures[sides[n, 0]] - pressures[sides[n, 1]]
        area = np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)
        for m in range(3):
            vertex = triangles[n, m]
            areas[vertex] += area
            for axis in range(3):
                moves[vertex, axis] += by * normal[axis]
    for n in range(len(points)):
        if areas[n] > 0:
            for axis in range(3):
                moves[n, axis] /= areas[n]
