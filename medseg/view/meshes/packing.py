"""Walls between structures made small enough for a page: whole numbers that are mostly little ones,
packed.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.files import gzip_writer
from medseg.view.meshes.surfaces import Walls

_STEPS = 65535


def packed(walls: Walls) -> tuple[dict[str, Any], bytes]:
    """What a page is told of walls, JSON-ready, and their gzipped bytes.

    points, triangles: how many there are. low, step: mm, of the whole numbers that points are.
    walls: first side, second side and how many triangles lie between them, in their order. The
    bytes are the two bytes of each point's difference from the one before, of all x, all y, all z,
    low bytes first; and the three bytes of each corner of a triangle, low bytes first. A corner is
    told by how many points before the first new one its point is: 0 is the next new point.
    """
    order = np.lexsort((walls.sides[:, 1], walls.sides[:, 0]))
    sides, triangles = walls.sides[order], walls.triangles[order]
    corners, points = _by_first_use(triangles.ravel(), walls.points)
    low = points.min(axis=0) if len(points) else np.zeros(3)
    step = (np.ptp(points, axis=0) if len(points) else np.zeros(3)) / _STEPS
    step = np.where(step > 0, step, 1).astype(np.float64)
    places = np.rint((points - low) / step).astype(np.int64)
    differences = np.diff(places, axis=0, prepend=0).astype(np.uint16).T.ravel()
    new = np.maximum.accumulate(np.r_[-1, corners])[:-1] + 1  # the next new point at each corner
    codes = (new - corners).astype(np.uint32)
    begins = np.flatnonzero(np.r_[True, (sides[1:] != sides[:-1]).any(axis=1)][: len(sides)])
    counts = np.diff(np.r_[begins, len(sides)])
    facts = {
        "points": len(points),
        "triangles": len(triangles),
        "low": [round(float(x), 6) for x in low],
        "step": [float(f"{x:.9g}") for x in step],
        "walls": [[*map(int, sides[b]), int(n)] for b, n in zip(begins, counts)],
    }
    planes = [differences & 255, differences >> 8, codes & 255, (codes >> 8) & 255, codes >> 16]
    out = BytesIO()
    write, finish = gzip_writer(out)
    for plane in planes:
        write(plane.astype(np.uint8).tobytes())
    finish()
    return facts, out.getvalue()


def _by_first_use(
    corners: NDArray[np.int32], points: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Corners and points, the points numbered in the order in which the corners come to them."""
    used, first, inverse = np.unique(corners, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    numbers = np.empty(len(used), np.int64)
    numbers[order] = np.arange(len(used))
    return numbers[inverse], points[used[order]]
