"""Surfaces that touch themselves along an edge or in a corner, taken apart there: each side of a
triangle is then the side of exactly one other, as programs expect of a closed surface.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: How far the parts of what touched go apart, in voxels: enough for files that join equal points.
APART_VOXELS = 0.02


def closed(
    points: NDArray[np.float32], triangles: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The surface with points of its own for each sheet that passes through one: points (n, 3) and
    triangles (m, 3) again.

    At each edge as many triangles must lead one way as the other. Where more than two meet, those
    with the structure between them belong together. If the two sheets would share both ends of
    the edge even so, those with the outside between them do: taking the other pairs always parts
    one fan of triangles into two.
    """
    partners, crowded = _partners(points, triangles)
    while True:
        corners = _fans(triangles, partners)
        sheets = _wanting(triangles, corners, crowded)
        if not sheets:
            break
        for forth, back in sheets:
            for one, other in zip(forth, np.roll(back, -1)):
                partners[one], partners[other] = other, one
        changed = {id(forth) for forth, _ in sheets}
        crowded = [pair for pair in crowded if id(pair[0]) not in changed]
    return _parted(points, triangles, corners)


def _partners(
    points: NDArray[np.float32], triangles: NDArray[np.int32]
) -> tuple[NDArray[np.int64], list[tuple[NDArray, NDArray]]]:
    """For each side of a triangle (3 triangle + corner it begins at) the side it is joined to, and
    the sides of edges where more than two meet: those that lead forth, and back, paired.
    """
    tails, heads = triangles.ravel(), triangles[:, [1, 2, 0]].ravel()
    low, high = np.minimum(tails, heads).astype(np.int64), np.maximum(tails, heads)
    order = np.lexsort((tails > heads, low * (int(triangles.max()) + 1) + high))
    edges = low[order] * (int(triangles.max()) + 1) + high[order]
    begins = np.flatnonzero(np.r_[True, edges[1:] != edges[:-1]])
    sizes = np.diff(np.r_[begins, len(edges)])
    partners = np.empty(len(tails), np.int64)
    simple = begins[sizes == 2]
    partners[order[simple]], partners[order[simple + 1]] = order[simple + 1], order[simple]
    crowded = []
    for begin, size in zip(begins[sizes != 2], sizes[sizes != 2]):
        forth, back = _around(points, triangles, order[begin : begin + size])
        partners[forth], partners[back] = back, forth
        crowded.append((forth, back))
    return partners, crowded


def _around(
    points: NDArray[np.float32], triangles: NDArray[np.int32], sides: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sides of one edge that lead forth and those that lead back, in order around it, each two
    with the structure between them.
    """
    forth = np.arange(len(sides)) < len(sides) // 2
    numbers, starts = np.divmod(sides, 3)
    tail, head = triangles[numbers[0], starts[0]], triangles[numbers[0], (starts[0] + 1) % 3]
    along = (points[head] - points[tail]).astype(np.float64)
    across = points[triangles[numbers, (starts + 2) % 3]] - points[tail].astype(np.float64)
    first = np.cross(along, across[0])
    angles = np.arctan2(across @ first * np.linalg.norm(along), across @ np.cross(first, along))
    order = np.argsort(angles, kind="stable")
    turned = order[forth[order]]
    back = order[~forth[order]]
    if len(turned) != len(back):
        raise ValueError("the surface is not closed")
    # Seen along the edge the structure lies before a triangle that leads forth.
    before = [back[np.argmin((angles[one] - angles[back]) % (2 * np.pi))] for one in turned]
    if len(set(before)) == len(back):
        back = np.array(before)
    return sides[turned], sides[back]


def _fans(triangles: NDArray[np.int32], partners: NDArray[np.int64]) -> NDArray[np.int32]:
    """For each corner of a triangle the number of the fan of joined triangles that it is in."""
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    sides = np.arange(len(partners))
    heads = sides - sides % 3 + (sides + 1) % 3  # the corner where a side ends
    links = sparse.coo_array(
        (np.ones(len(sides), np.bool_), (sides, heads[partners])), (len(sides), len(sides))
    )
    fans: NDArray[np.int32] = connected_components(links, directed=False)[1]
    return fans


def _wanting(
    triangles: NDArray[np.int32], fans: NDArray[np.int32], crowded: list[tuple[NDArray, NDArray]]
) -> list[tuple[NDArray, NDArray]]:
    """Edges whose sheets share both ends, no two of them in one fan."""
    used: set[int] = set()
    edges = []
    for forth, back in crowded:
        heads = forth - forth % 3 + (forth + 1) % 3
        ends = {*fans[forth].tolist()}, {*fans[heads].tolist()}
        pairs = {*zip(fans[forth].tolist(), fans[heads].tolist())}
        if len(pairs) < len(forth) and not used & (ends[0] | ends[1]):
            used |= ends[0] | ends[1]
            edges.append((forth, back))
    return edges


def _parted(
    points: NDArray[np.float32], triangles: NDArray[np.int32], fans: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A point for each fan, those of one place a little apart."""
    count = int(fans.max()) + 1
    origins = np.zeros(count, np.int64)
    origins[fans] = triangles.ravel()
    places: NDArray[np.float64] = points[origins].astype(np.float64)
    several = np.bincount(origins, minlength=len(points))[origins] > 1
    if several.any():
        middles = np.repeat(points[triangles].mean(axis=1, dtype=np.float64), 3, axis=0)
        sums = [np.bincount(fans, middles[:, axis], minlength=count) for axis in range(3)]
        ways = np.stack(sums, axis=1) / np.bincount(fans, minlength=count)[:, None] - places
        lengths = np.maximum(np.linalg.norm(ways, axis=1, keepdims=True), 1e-9)
        places += np.where(several[:, None], APART_VOXELS * ways / lengths, 0)
    return places.astype(np.float32), fans.reshape(-1, 3).astype(np.int32)
