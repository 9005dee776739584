"""What tells the volumes of a series apart: echoes, times, diffusion, acquisitions, and in the end
their order.

A trait parts slices only if it does so for all, so that no two of a volume lie at the same place.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medseg.io.dicom.lines import Key, alike, are_blocks_apart
from medseg.io.dicom.slices import SOP_CLASSES, Slice
from medseg.io.dicom.stack import EQUAL, SAME_PLACE_MM

#: What tells volumes of a series apart, in the order in which it is tried. Those in `_ALWAYS`
#: separate slices even where none lie at the same place: echoes, diffusion weightings and times
#: never make up one volume.
_TRAITS = (
    "frame", "kind", "echo", "b_value", "gradient", "temporal", "trigger", "inversion", "flip",
    "stack", "dimensions", "frame_time", "acquisition", "file", "acquisition_time", "turn", "edges",
    "format",
)  # fmt: skip
_ALWAYS = ("echo", "b_value", "temporal")
#: What may differ within one volume by carelessness, so that alone it separates only blocks that
#: lie apart.
_CARELESS = ("frame", "turn", "edges", "format")
#: Those whose values have no order of their own.
_UNORDERED = ("kind", "gradient", "file", *_CARELESS)
#: Echo times in ms and diffusion weightings in s/mm2 that differ by no more, or by a hundredth,
#: differ by rounding.
_ROUNDING = 0.05


def untangled(pieces: list[Slice]) -> tuple[list[list[Slice]], str]:
    """Slices of one size and orientation as volumes in which no two lie at the same place, if there
    is a sure way.
    """
    parts, reason = [pieces], ""
    for name in _TRAITS:
        split = [group for part in parts for group in _split_by(part, name)]
        if len(split) > len(parts):
            parts, reason = split, reason or _WORDS.get(name, name)
    split = [group for part in parts for group in _split_by_number(part)]
    if len(split) > len(parts):
        parts, reason = split, reason or "times or directions"
    return parts, reason


_WORDS = {
    "frame": "coordinate systems",
    "kind": "image types",
    "echo": "echoes",
    "b_value": "diffusion weightings",
    "gradient": "diffusion directions",
    "temporal": "times",
    "trigger": "heart phases",
    "inversion": "inversion times",
    "flip": "flip angles",
    "stack": "stacks",
    "dimensions": "dimension indices",
    "frame_time": "times",
    "acquisition": "acquisitions",
    "file": "files",
    "acquisition_time": "times",
    "turn": "orientations",
    "edges": "pixel spacings",
    "format": "pixel formats",
}
_OF_SLICE: dict[str, tuple[Key, float]] = {
    "frame": (lambda piece: piece.frame_of_reference, 0),
    "kind": (lambda piece: piece.image_type, 0),
    "turn": (lambda piece: piece.orientation, EQUAL),
    "edges": (lambda piece: piece.spacing, EQUAL),
    "format": (lambda piece: piece.bits, 0),
}


def _by_trait(pieces: list[Slice], name: str) -> list[list[Slice]]:
    if name in _OF_SLICE:
        key, tolerance = _OF_SLICE[name]
        return alike(pieces, key, tolerance)
    return alike(pieces, lambda piece: piece.traits.get(name))


def _split_by(pieces: list[Slice], name: str) -> list[list[Slice]]:
    """The slices parted by a trait, smallest value first, or as they are if the trait does not part
    them cleanly.
    """
    places = dict(zip(map(id, pieces), _places(pieces)))
    whole = len(set(places.values()))
    crowded = whole < len(pieces)
    if whole < 3 or not (crowded or name in _CARELESS or _is_always(pieces, name)):
        return [pieces]
    groups = _by_trait(pieces, name)
    if not crowded and name in _ALWAYS:
        groups = _without_rounding(groups, name)
    if len(groups) < 2:
        return [pieces]
    group_places = [list(map(places.__getitem__, map(id, group))) for group in groups]
    if crowded:
        clean = _are_volumes(group_places, whole, careless=name in _CARELESS)
    else:
        clean = _are_stacks(groups, group_places, name)
    return sorted(groups, key=lambda group: _rank(group, name)) if clean else [pieces]


def _are_volumes(covered: list[list[int]], whole: int, *, careless: bool) -> bool:
    """Whether groups of slices, by the places they cover, have all `whole` places, or each place at
    most once.

    A group of one or two slices beside a complete one is what a scan that was broken off leaves,
    unless the trait that makes it one may differ by carelessness.
    """
    sizes = [len(set(places)) for places in covered]
    apart = all(size == len(places) for size, places in zip(sizes, covered))
    long_enough = min(sizes) >= 3 or (max(sizes) == whole and not careless)
    return min(sizes) == whole or (apart and long_enough)


def _are_stacks(groups: list[list[Slice]], covered: list[list[int]], name: str) -> bool:
    """Whether groups of slices, no two of which lie at one place, are stacks of their own by a
    trait.
    """
    if min(len(set(places)) for places in covered) < 3:
        return False
    # Of image types that show the same `why_mixed_types` says why they are no volumes.
    blocks_alone = name in _CARELESS or (name == "kind" and _same_contrast(groups))
    return not blocks_alone or are_blocks_apart(groups)


def _is_always(pieces: list[Slice], name: str) -> bool:
    return name in _ALWAYS or (name == "kind" and SOP_CLASSES.get(pieces[0].sop_class) == "MR")


def _rank(group: list[Slice], name: str) -> tuple[object, ...]:
    """The place of a volume among those of its series."""
    value = _OF_SLICE[name][0](group[0]) if name in _OF_SLICE else group[0].traits.get(name)
    first = min(piece.instance_number or 0 for piece in group)
    return (first if name in _UNORDERED else 0, value is None, _sortable(value))


def _sortable(value: object) -> tuple[tuple[int, float, str], ...]:
    parts = value if isinstance(value, tuple) else (value,)
    return tuple(
        (0, float(p), "") if isinstance(p, int | float) else (1, 0.0, str(p)) for p in parts
    )


def _without_rounding(groups: list[list[Slice]], name: str) -> list[list[Slice]]:
    """Slices of which no two lie at one place, parted by a number; numbers that differ by rounding
    are one.
    """
    if not all(isinstance(group[0].traits.get(name), float) for group in groups):
        return groups
    sequence = sorted(groups, key=lambda group: float(group[0].traits[name]))
    out = sequence[:1]
    for before, after in pairwise(sequence):
        last, value = (float(group[0].traits[name]) for group in (before, after))
        if value - last <= max(_ROUNDING, 0.01 * abs(value)):
            out[-1] = out[-1] + after
        else:
            out.append(after)
    return out


def _same_contrast(groups: list[list[Slice]]) -> bool:
    """Whether Image Types agree in what an MR image shows (PS3.3 C.8.3.1.1.1: the third value: M,
    P, R, W ...).
    """
    return len({group[0].image_type[2:3] for group in groups}) == 1


def why_mixed_types(pieces: list[Slice]) -> str:
    """Why MR slices that lie between one another and differ in what was done to them are no volume;
    '' if they are.
    """
    if SOP_CLASSES.get(pieces[0].sop_class) != "MR" or len(set(_places(pieces))) < len(pieces):
        return ""
    groups = _by_trait(pieces, "kind")
    if len(groups) < 2 or min(map(len, groups)) < 3:
        return ""
    return (
        "its slices lie on one line as one stack but are of different image types, and a part of "
        "them is no scan; export the series again, or take the slices that do not belong to it out "
        "of the folder"
    )


def _split_by_number(pieces: list[Slice]) -> list[list[Slice]]:
    """Volumes told apart by Instance Number alone, if the slices come volume after volume or place
    after place.
    """
    places = _places(pieces)
    whole = len(set(places))
    times, rest = divmod(len(pieces), whole)
    order = _instance_order(pieces)
    if whole < 3 or times < 2 or rest or not order:
        return [pieces]
    table = np.array([places[n] for n in order])
    if _all_have(table.reshape(times, whole), whole):
        volumes = np.array(order).reshape(times, whole)
    elif _all_have(table.reshape(whole, times), 1):
        volumes = np.array(order).reshape(whole, times).T
    else:
        return [pieces]
    return [[pieces[n] for n in row] for row in volumes.tolist()]


def _instance_order(pieces: list[Slice]) -> list[int]:
    """Which slice follows which by Instance Number; none unless each has one of its own."""
    numbers = [piece.instance_number for piece in pieces]
    if None in numbers or len(set(numbers)) < len(numbers):
        return []
    return sorted(range(len(pieces)), key=lambda n: numbers[n] or 0)


def _all_have(table: NDArray, count: int) -> bool:
    """Whether every row of a table holds so many different numbers."""
    return all(len(set(row)) == count for row in table.tolist())


def _places(pieces: list[Slice]) -> list[int]:
    """For each slice the number of its place along the normal, slices at one place having one
    number.
    """
    along, down = np.reshape(pieces[0].orientation or (), (2, 3))
    offsets = np.array([piece.position for piece in pieces]) @ np.cross(along, down)
    order = np.argsort(offsets, kind="stable")
    numbers = np.empty(len(pieces), int)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(offsets[order]) > SAME_PLACE_MM)])
    return [int(n) for n in numbers]
