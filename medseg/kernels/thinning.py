"""The compiled loops that make surfaces of fewer triangles: vertices move onto a neighbour, and
the surface stays what it is: as many sheets meet at each edge as did, and none folds.

The triangles may be the walls between several labels, so that what is taken from one label its
neighbour gets. A vertex is removed if the triangles around it are one disc, or if as many half
discs meet in it along one seam; then it moves along the seam. By the link condition (Dey,
Edelsbrunner, Guha and Nekhayev 1999, Publ. Inst. Math. 66:23) the surface keeps its topology.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit
from medseg.kernels.nets import sides_of

#: Triangles around a vertex that is looked at.
_MOST = 48
#: Least cosine between a triangle's normal and what it was, and least roundness of a new triangle
#: (1: of equal sides).
_LEAST_COSINE, _LEAST_ROUNDNESS = 0.35, 0.08
_TRIES = 4


@njit(cache=True, nogil=True)
def stars(triangles, count):  # type: ignore[no-untyped-def]
    """The triangles (m, 3) int32 around each of `count` vertices: where they begin (count + 1,) in
    a list, and the list, both int32.
    """
    starts = np.zeros(count + 1, np.int32)
    for n in range(len(triangles)):
        for m in range(3):
            starts[triangles[n, m] + 1] += 1
    for n in range(count):
        starts[n + 1] += starts[n]
    members = np.empty(3 * len(triangles), np.int32)
    place = starts.copy()
    for n in range(len(triangles)):
        for m in range(3):
            vertex = triangles[n, m]
            members[place[vertex]] = n
            place[vertex] += 1
    return starts, members


@njit(cache=True, nogil=True)
def _ring(triangles, starts, members, vertex, pairs, ring, counts):  # type: ignore[no-untyped-def]
    """The other two corners of each triangle around a vertex (pairs), all of them once (ring) and
    in how many of the triangles each is (counts). Returns how many are in the ring.
    """
    size = 0
    for i in range(starts[vertex + 1] - starts[vertex]):
        number = members[starts[vertex] + i]
        first = 0
        while triangles[number, first] != vertex:
            first += 1
        for m in range(2):
            other = triangles[number, (first + 1 + m) % 3]
            pairs[i, m] = other
            place = 0
            while place < size and ring[place] != other:
                place += 1
            if place == size:
                ring[place], counts[place] = other, 0
                size += 1
            counts[place] += 1
    return size


@njit(cache=True, nogil=True)
def _seam(pairs, sides, ring, counts, size, seen, ends):  # type: ignore[no-untyped-def]
    """0 if the triangles around a vertex are one disc; 1 if they are half discs between two ring
    vertices, whose places go to `ends`; -1 otherwise.
    """
    odd = 0
    for n in range(size):
        if counts[n] != 2:
            if odd == 2:
                return -1
            ends[odd] = n
            odd += 1
    for i in range(sides):
        seen[i] = False
    if odd == 0:
        seen[0] = True
        return 0 if 1 + _walk(pairs, sides, pairs[0, 1], -1, seen) == sides else -1
    if odd == 1 or counts[ends[0]] != counts[ends[1]] or counts[ends[0]] < 3:
        return -1
    first, last = ring[ends[0]], ring[ends[1]]
    visited = 0
    for i in range(sides):
        if seen[i] or (pairs[i, 0] != first and pairs[i, 1] != first):
            continue
        seen[i] = True
        at = pairs[i, 1] if pairs[i, 0] == first else pairs[i, 0]
        visited += 1
        if at != last:
            visited += _walk(pairs, sides, at, last, seen)
    return 1 if visited == sides else -1


@njit(cache=True, nogil=True)
def _walk(pairs, sides, at, last, seen):  # type: ignore[no-untyped-def]
    """Go from triangle to triangle around a vertex until `last`, or where there is no next one;
    returns over how many.
    """
    steps = 0
    i = 0
    while i < sides:
        if not seen[i] and (pairs[i, 0] == at or pairs[i, 1] == at):
            seen[i] = True
            steps += 1
            at = pairs[i, 1] if pairs[i, 0] == at else pairs[i, 0]
            if at == last:
                return steps
            i = 0
        else:
            i += 1
    return steps


@njit(cache=True, nogil=True)
def _may_join(  # type: ignore[no-untyped-def]
    triangles, starts, members, vertex, target, pairs, sides, ring, size, edges, common
):
    """Whether a vertex may move onto a neighbour with which it shares `edges` triangles: they have
    no common neighbours but those, and no triangle comes to lie on another. common: (size,) bool,
    room to work in.
    """
    for n in range(size):
        common[n] = False
    for i in range(starts[target], starts[target + 1]):
        one, two = -1, -1
        has_vertex = False
        for m in range(3):
            other = triangles[members[i], m]
            if other == target:
                continue
            if other == vertex:
                has_vertex = True
                continue
            for n in range(size):
                if ring[n] == other:
                    common[n] = True
                    one, two = two, other
                    break
        if has_vertex or one < 0:
            continue
        for k in range(sides):
            if (pairs[k, 0] == one and pairs[k, 1] == two) or (
                pairs[k, 1] == one and pairs[k, 0] == two
            ):
                return False
    shared = 0
    for n in range(size):
        shared += common[n]
    return shared == edges


@njit(cache=True, nogil=True)
def _cross(points, w, x, y, out):  # type: ignore[no-untyped-def]
    """Put the normal of a triangle, twice as long as its area, into out (3,); returns the squared
    length of its sides.
    """
    u0, u1, u2, v0, v1, v2 = sides_of(points, w, x, y)
    out[0] = u1 * v2 - u2 * v1
    out[1] = u2 * v0 - u0 * v2
    out[2] = u0 * v1 - u1 * v0
    u = u0 * u0 + u1 * u1 + u2 * u2
    v = v0 * v0 + v1 * v1 + v2 * v2
    return 2 * (u + v - (u0 * v0 + u1 * v1 + u2 * v2))


@njit(cache=True, nogil=True)
def _gap(points, target, pairs, sides, normals, at, normal):  # type: ignore[no-untyped-def]
    """Squared distance from a point to the triangles around a vertex once it has moved onto a
    neighbour; negative if one would fold or become a needle. normals: (sides, 3) as they are;
    normal: (3,), room to work in.
    """
    least = np.inf
    for i in range(sides):
        x, y = pairs[i, 0], pairs[i, 1]
        if x == target or y == target:
            continue
        total = _cross(points, target, x, y, normal)
        dot, new, old = 0.0, 0.0, 0.0
        for axis in range(3):
            dot += normal[axis] * normals[i, axis]
            new += normal[axis] ** 2
            old += normals[i, axis] ** 2
        if dot <= _LEAST_COSINE * np.sqrt(new * old):
            return -1.0
        if 2 * np.sqrt(3.0) * np.sqrt(new) < _LEAST_ROUNDNESS * total:
            return -1.0
        least = min(least, _from_triangle(points, target, x, y, at))
    return least


@njit(cache=True, nogil=True)
def _from_triangle(points, w, x, y, at):  # type: ignore[no-untyped-def]
    """Squared distance from a point to a triangle (Ericson 2005, Real-Time Collision Detection,
    5.1.5).
    """
    d1, d2, d3, d4, d5, d6 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for axis in range(3):
        a, b, c = points[w, axis], points[x, axis], points[y, axis]
        ab, ac = np.float64(b) - a, np.float64(c) - a
        d1 += ab * (at[axis] - a)
        d2 += ac * (at[axis] - a)
        d3 += ab * (at[axis] - b)
        d4 += ac * (at[axis] - b)
        d5 += ab * (at[axis] - c)
        d6 += ac * (at[axis] - c)
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    if d1 <= 0 and d2 <= 0:
        s, t = 0.0, 0.0
    elif d3 >= 0 and d4 <= d3:
        s, t = 1.0, 0.0
    elif d6 >= 0 and d5 <= d6:
        s, t = 0.0, 1.0
    elif vc <= 0 and d1 >= 0 and d3 <= 0:
        s, t = d1 / (d1 - d3), 0.0
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        s, t = 0.0, d2 / (d2 - d6)
    elif va <= 0 and d4 - d3 >= 0 and d5 - d6 >= 0:
        t = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        s = 1 - t
    else:
        s, t = vb / (va + vb + vc), vc / (va + vb + vc)
    squared = 0.0
    for axis in range(3):
        a, b, c = points[w, axis], points[x, axis], points[y, axis]
        squared += (a + s * (b - a) + t * (c - a) - at[axis]) ** 2
    return squared


@njit(cache=True, nogil=True)
def judge(  # type: ignore[no-untyped-def]
    points, triangles, starts, members, stale, errors, most, targets, costs, gaps, start, stop
):
    """Where each of the vertices start..stop that is `stale` (n,) bool had best move: onto targets
    (n,) int32, -1 for nowhere, at costs (n,) float32, which moves the surface by gaps (n,) float32.
    Then none is stale.

    points: (n, 3) float32 in mm. errors: (n,) float32, by how much the surface around each vertex
    has been moved already; nowhere by more than `most`.
    """
    pairs = np.empty((_MOST, 2), np.int32)
    ring, counts = np.empty(_MOST * 2, np.int32), np.empty(_MOST * 2, np.int32)
    seen, common = np.empty(_MOST, np.bool_), np.empty(_MOST * 2, np.bool_)
    ends = np.zeros(2, np.int64)
    normals = np.empty((_MOST, 3), np.float32)
    prices = np.empty(_MOST * 2)
    at, room = np.empty(3, np.float32), np.empty(3, np.float32)
    for v in range(start, stop):
        if not stale[v]:
            continue
        stale[v] = False
        targets[v] = -1
        sides = starts[v + 1] - starts[v]
        if sides < 3 or sides > _MOST or errors[v] >= most:
            continue
        size = _ring(triangles, starts, members, v, pairs, ring, counts)
        kind = _seam(pairs, sides, ring, counts, size, seen, ends)
        if kind < 0:
            continue
        for axis in range(3):
            at[axis] = points[v, axis]
        for i in range(sides):
            _cross(points, v, pairs[i, 0], pairs[i, 1], normals[i])
        for n in range(size):
            prices[n] = np.inf
            if kind == 0 or n == ends[0] or n == ends[1]:
                prices[n] = _price(points, ring[n], at, normals, sides)
        along = np.float64(0)
        if kind == 1:
            along = _from_triangle(points, ring[ends[0]], ring[ends[1]], ring[ends[1]], at)
        for _ in range(_TRIES):
            n = np.argmin(prices[:size])
            price = prices[n]
            if price == np.inf:
                break
            prices[n] = np.inf
            u = ring[n]
            gap = _gap(points, u, pairs, sides, normals, at, room)
            if gap < 0:
                continue
            gap = np.sqrt(max(gap, along))
            if errors[v] + gap > most or not _may_join(
                triangles, starts, members, v, u, pairs, sides, ring, size, counts[n], common
            ):
                continue
            targets[v], gaps[v] = u, gap
            costs[v] = price + gap * gap
            break


@njit(cache=True, nogil=True)
def _price(points, target, at, normals, sides):  # type: ignore[no-untyped-def]
    """Mean square distance of a neighbour from the planes of the triangles around a vertex, and a
    thousandth of its squared distance from the vertex.
    """
    total, areas, way = 0.0, 0.0, 0.0
    for axis in range(3):
        way += (points[target, axis] - at[axis]) ** 2
    for i in range(sides):
        dot, squared = 0.0, 0.0
        for axis in range(3):
            dot += normals[i, axis] * (points[target, axis] - at[axis])
            squared += normals[i, axis] ** 2
        area = np.sqrt(squared)
        if area > 0:
            total += dot * dot / area
            areas += area
    return (total / areas if areas > 0 else 0.0) + 1e-3 * way


@njit(cache=True, nogil=True)
def join(order, targets, gaps, triangles, starts, members, stale, errors, budget):  # type: ignore[no-untyped-def]
    """Move vertices onto their targets in an order, each whose surroundings are as they were, until
    `budget` triangles are gone: their first corner is then -1. Returns how many are. Vertices whose
    surroundings are other ones become `stale` (n,) bool.
    """
    touched = np.zeros(len(targets), np.bool_)
    gone = 0
    for k in range(len(order)):
        v = order[k]
        target = targets[v]
        if touched[v] or touched[target]:
            continue
        if gone >= budget:
            break
        targets[v] = -1
        error = errors[v] + gaps[v]
        for i in range(starts[v], starts[v + 1]):
            number = members[i]
            has_target = False
            for m in range(3):
                other = triangles[number, m]
                touched[other] = True
                errors[other] = max(errors[other], error)
                has_target |= other == target
            for m in range(3):
                if triangles[number, m] == v:
                    triangles[number, m] = target
            if has_target:
                triangles[number, 0] = -1
                gone += 1
    for n in range(len(triangles)):
        if triangles[n, 0] < 0:
            continue
        for m in range(3):
            if touched[triangles[n, m]]:
                for k in range(3):
                    stale[triangles[n, k]] = True
    return gone
