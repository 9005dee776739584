"""Which slices of a series lie on one line as one stack, whatever their headers say.

Slices that differ in orientation or pixel spacing by rounding alone are alike. Slices that differ
for good but lie between one another on one line are no volumes of their own: a part of a stack is
no scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.io.dicom.slices import Slice
from medseg.io.dicom.stack import SAME_PLACE_MM, normal_of, spans

#: Slices whose pixels lie off each other by this part of a pixel through orientation or pixel
#: spacing may be one stack, which is looked into closely then.
_NEAR_PIXELS = 0.5
#: Least cosine between normals of slices on one line, and least share of its places that slices of
#: one stack fill.
_SAME_LINE, _FILLED = 0.98, 0.5
#: Stacks of their own share more of the places of the smaller one.
_SHARED = 0.25
#: Blocks of slices this many steps apart are no longer one stack with slices missing.
_MAX_GAP = 4.5
#: Most different geometries, and parts, of a series that are compared with each other.
_MAX_KINDS, _MAX_PARTS = 2000, 500

Key = Callable[[Slice], object]


def alike(pieces: list[Slice], key: Key, tolerance: float = 0) -> list[list[Slice]]:
    """Slices of equal key, or whose numbers differ from the first of their group by at most
    `tolerance`.
    """
    groups: dict[object, list[Slice]] = {}
    for piece in pieces:
        value = key(piece)
        if value not in groups and tolerance and len(groups) < _MAX_KINDS:
            value = next(
                (first for first in groups if _differ_by(first, value) <= tolerance), value
            )
        groups.setdefault(value, []).append(piece)
    return list(groups.values())


def _differ_by(one: Any, other: Any) -> float:
    return float(np.abs(np.subtract(one, other)).max())


def _by_size(pieces: list[Slice]) -> list[list[Slice]]:
    return alike(pieces, lambda piece: (piece.rows, piece.columns))


def _by_grey(pieces: list[Slice]) -> list[list[Slice]]:
    return alike(pieces, lambda piece: piece.photometric)


def _by_orientation(pieces: list[Slice]) -> list[list[Slice]]:
    """Slices turned alike, but for rounding: those whose corners are near each other when their
    centres coincide.
    """
    spacing = pieces[0].spacing
    return _linked(pieces, lambda piece: (piece.orientation, spacing))


def _by_spacing(pieces: list[Slice]) -> list[list[Slice]]:
    """Slices with pixels of one size, but for rounding."""
    orientation = pieces[0].orientation
    return _linked(pieces, lambda piece: (orientation, piece.spacing))


#: What all slices of a volume share, each with how it parts the slices of a series.
SPLITS: tuple[tuple[str, Callable[[list[Slice]], list[list[Slice]]]], ...] = (
    ("sizes", _by_size),
    ("grey scales (Photometric Interpretations)", _by_grey),
    ("orientations", _by_orientation),
    ("pixel spacings", _by_spacing),
)


def _linked(pieces: list[Slice], key: Callable[[Slice], tuple[Any, Any]]) -> list[list[Slice]]:
    """Slices in groups within which each has a neighbour whose corners lie less than half a pixel
    off its own.
    """
    by_value: dict[tuple[Any, Any], list[Slice]] = {}
    for piece in pieces:
        by_value.setdefault(key(piece), []).append(piece)
    # So many are no volumes; the stack will be refused.
    if len(by_value) == 1 or len(by_value) > _MAX_KINDS:
        return [pieces]
    first = pieces[0]
    extents = [spans(replace(first, orientation=turn, spacing=edges)) for turn, edges in by_value]
    # From the centre.
    corners = np.array([(right + down, right - down) for right, down in extents]) / 2
    smallest = np.array([min(edges) for _, edges in by_value])
    group_of = np.full(len(corners), -1)
    for start in range(len(corners)):
        if group_of[start] >= 0:
            continue
        group_of[start] = start
        waiting = [start]
        while waiting:
            here = waiting.pop()
            apart = np.linalg.norm(corners - corners[here], axis=2).max(axis=1)
            near = (apart <= _NEAR_PIXELS * np.minimum(smallest, smallest[here])) & (group_of < 0)
            group_of[near] = start
            waiting += np.flatnonzero(near).tolist()
    groups: dict[int, list[Slice]] = {}
    number_of = dict(zip(by_value, group_of.tolist()))
    for piece in pieces:
        groups.setdefault(number_of[key(piece)], []).append(piece)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Line:
    """Where slices lie: centres (N, 3) in LPS mm, and their unit normals (N, 3)."""

    centres: NDArray[np.float64]
    normals: NDArray[np.float64]
    reach_mm: float  # from the centre of a slice to its corners

    def places(self, normal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where along a normal slices lie, in mm and in order, each place once."""
        return _distinct(self.centres @ normal)


def _line_of(pieces: list[Slice]) -> _Line:
    first = pieces[0]
    return _Line(
        centres=np.array([_centre(piece) for piece in pieces]),
        normals=np.array([normal_of(piece) for piece in pieces]),
        reach_mm=max(float(np.linalg.norm(sum(spans(first)))) / 2, *(first.spacing or ())),
    )


def entwined(parts: list[list[Slice]]) -> list[list[list[Slice]]]:
    """The parts of a series, those together that lie between one another on one line."""
    if len(parts) > _MAX_PARTS:
        return [parts]
    group_of = list(range(len(parts)))
    order = sorted(range(len(parts)), key=lambda n: -len(parts[n]))
    lines = [_line_of(part) for part in parts] if len(parts) > 1 else []
    for place, n in enumerate(order):
        if len(parts[n]) < 3:  # those behind are no volumes either
            break
        for m in order[place + 1 :]:
            if group_of[n] != group_of[m] and _are_one_stack(lines[n], lines[m]):
                old, new = group_of[m], group_of[n]
                group_of = [new if group == old else group for group in group_of]
    groups: dict[int, list[list[Slice]]] = {}
    for n, part in enumerate(parts):
        groups.setdefault(group_of[n], []).append(part)
    return list(groups.values())


def _are_one_stack(larger: _Line, smaller: _Line) -> bool:
    """Whether slices that differ lie on one line, at different places of one grid, and not one
    block after the other.

    Stacks that are scans of their own share places (a thin one and a thick one of the same body),
    fit no common grid, or follow each other. A block of one or two slices that follows is none of
    its own.
    """
    normal = larger.normals[0]
    if np.abs(smaller.normals @ normal).min() < _SAME_LINE:
        return False
    aside = smaller.centres.mean(axis=0) - larger.centres.mean(axis=0)
    if np.linalg.norm(aside - (aside @ normal) * normal) > max(larger.reach_mm, smaller.reach_mm):
        return False
    return _interleave(larger.places(normal), smaller.places(normal))


def _interleave(larger: NDArray[np.float64], smaller: NDArray[np.float64]) -> bool:
    """Whether places in mm along a line are those of one stack, neither block after block nor a
    stack each.
    """
    distance = np.abs(smaller[:, None] - larger).min(axis=1)
    alone = smaller[distance > SAME_PLACE_MM]
    if len(alone) < (1 - _SHARED) * len(smaller):
        return False
    smaller = alone
    both = np.sort(np.concatenate([larger, smaller]))
    steps = np.diff(both)
    usual = float(np.median(steps))
    if steps.min() < usual / 2:  # they have a grid each
        return False
    ratios = steps / usual
    if np.abs(ratios - np.rint(ratios)).max() > 0.1 or len(both) < _FILLED * (
        1 + np.rint(ratios).sum()
    ):
        return False
    if smaller[-1] < larger[0] or larger[-1] < smaller[0]:
        gap = max(smaller[0] - larger[-1], larger[0] - smaller[-1])
        return len(smaller) < 3 and gap < 1.5 * usual
    return True


def are_blocks_apart(groups: list[list[Slice]]) -> bool:
    """Whether slices lie block after block along their normal, and not as a stack of which a few
    slices are missing.
    """
    normal = normal_of(groups[0][0])
    places = [_line_of(group).places(normal) for group in groups]
    blocks = sorted(places, key=lambda block: float(block[0]))
    for before, after in pairwise(blocks):
        steps = np.concatenate([np.diff(before), np.diff(after)])
        gap = float((after[0] - before[-1]) / np.median(steps))
        on_grid = abs(gap - round(gap)) <= 0.1
        if gap <= 1.1 or (on_grid and gap <= _MAX_GAP):
            return False
    return True


def _centre(piece: Slice) -> NDArray[np.float64]:
    right, down = spans(piece)
    return np.asarray(np.array(piece.position) + (right + down) / 2, dtype=np.float64)


def _distinct(offsets: ArrayLike) -> NDArray[np.float64]:
    """Offsets in mm in order, those at the same place once."""
    places = np.sort(offsets)
    return places[np.concatenate([[True], np.diff(places) > SAME_PLACE_MM])]


def why_mixed(parts: list[list[Slice]]) -> str:
    """Why parts of a series that are one stack cannot be read, as a sentence after the source's
    name.
    """
    pieces = [piece for part in parts for piece in part]
    if len({(piece.sop_class, piece.samples) for piece in pieces}) > 1:
        what = "kinds of image"
    else:
        what = next((name for name, split in SPLITS if len(split(pieces)) > 1), "kinds")
    return (
        f"its slices lie on one line as one stack but are of different {what}, and a part of them "
        "is no scan; export the series again, or take the slices that do not belong to it out of "
        "the folder"
    )
