"""Outlines of masks as DICOM structure sets have them: one closed line for each part.

They run halfway between the centres of the pixels inside and outside; a hole is joined to the
outline around it by a keyhole, a channel of no width (PS3.3 C.8.8.6.3).
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed outlines (P, 2) of a mask (rows, columns), as rows and columns; one for each part,
    holes by keyhole.

    Pixels are parts of one another where they share an edge. The outline runs halfway between
    centres inside and outside, cutting corners; the channel to a hole runs between two rows, away
    from every centre.
    """
    width, size = 2 * (mask.shape[1] + 2), 4 * (mask.shape[0] + 2) * (mask.shape[1] + 2)
    following = _boundary(np.pad(mask, 1))
    loops = _loops(following)
    holes = [loop for loop in loops if _area(loop, width) < 0]
    if holes:
        _cut_channels(following, [min(hole) for hole in holes], size)
        loops = _loops(following)
    polygons = []
    for loop in loops:
        points = np.stack(np.divmod(np.array(loop) % size, width), axis=1)
        back, ahead = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
        turns = (back[:, 0] * ahead[:, 1] != back[:, 1] * ahead[:, 0]) | (
            (back * ahead).sum(axis=1) < 0
        )
        polygons.append(points[turns] / 2 - 1)
    return polygons


def _cut_channels(following: dict[int, int], starts: list[int], size: int) -> None:
    """Join every hole to the boundary left of its `start`, its topmost point, of those the
    leftmost.

    Left of there lies the mask, up to the next point of the boundary in the same row of points; the
    way there and back passes through copies of both points, numbered on by `size`.
    """
    before = {end: start for start, end in following.items()}
    points = sorted(following)
    for copy, start in enumerate(starts, 1):
        gate = points[bisect_left(points, start) - 1]
        start_again, gate_again = start + copy * size, gate + copy * size
        after, last = following[gate], before[start]
        for one, other in (
            (gate, start),
            (last, start_again),
            (start_again, gate_again),
            (gate_again, after),
        ):
            following[one], before[other] = other, one


def _boundary(mask: NDArray[np.bool_]) -> dict[int, int]:
    """Each point of the boundary of a padded mask to the next one, the mask on its right hand (rows
    run down).

    A point is halfway between two pixels, numbered row * width + column in half pixels.
    """
    width = 2 * mask.shape[1]
    # A b over e d: a cell of four centres.
    a, b, e, d = (
        mask[:-1, :-1],
        mask[:-1, 1:],
        mask[1:, :-1],
        mask[1:, 1:],
    )
    rows, columns = np.nonzero((a != b) | (a != e) | (a != d))
    a, b, e, d = (corner[rows, columns] for corner in (a, b, e, d))
    corner = 2 * rows * width + 2 * columns
    top, left, right, bottom = (
        corner + 1,
        corner + width,
        corner + width + 2,
        corner + 2 * width + 1,
    )
    # The mask is on both sides of the diagonal; its two pixels are kept apart.
    two = (a == d) & (b == e)
    enter = np.select([a & ~b, ~e & d, e & ~a], [top, bottom, left], right)
    leave = np.select([~a & b, e & ~d, a & ~e], [top, bottom, left], right)
    one = ~two
    starts, ends = [enter[one]], [leave[one]]
    for here, pairs in (
        (two & a, ((top, left), (bottom, right))),
        (two & b, ((right, top), (left, bottom))),
    ):
        for start, end in pairs:
            starts.append(start[here])
            ends.append(end[here])
    following = dict(zip(np.concatenate(starts).tolist(), np.concatenate(ends).tolist()))
    # Between two rows a straight boundary has a point as well, where a channel can meet it.
    for start, end in zip(enter[one].tolist(), leave[one].tolist()):
        if abs(end - start) == 2 * width:
            following[start] = (start + end) // 2
            following[(start + end) // 2] = end
    return following


def _loops(following: dict[int, int]) -> list[list[int]]:
    left = dict(following)
    loops = []
    while left:
        start, point = left.popitem()
        loop = [start]
        while point != start:
            loop.append(point)
            point = left.pop(point)
        loops.append(loop)
    return loops


def _area(loop: list[int], width: int) -> float:
    """Twice the signed area: positive for outlines, negative for holes."""
    row, column = np.divmod(np.array(loop), width)
    return float((column * np.roll(row, -1) - np.roll(column, -1) * row).sum())
