"""Slices become volumes: which belong together, in which order, and where they lie (PS3.3 C.7.6.2, C.7.6.16).

A volume is found by what all its slices share (series, kind, size, orientation, spacing); where several slices then lie
at one place, by what tells them apart (echo, time, diffusion, acquisition ...), and only if that does so for all.
Slices that lie between one another on one line are never volumes of their own, whatever their headers say: a part of a
stack is no scan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import BadFile
from medseg.io.dicom.slices import CAPTURES, SOP_CLASSES, Slice
from medseg.io.dicom.source import Source
from medseg.io.dicom.stack import EQUAL, SAME_PLACE_MM, normal_of, spans, stacked

#: What tells volumes of a series apart, in the order in which it is tried. Those in `_ALWAYS` separate slices even
#: where none lie at the same place: echoes, diffusion weightings and times never make up one volume.
_TRAITS = (
    "frame", "kind", "echo", "b_value", "gradient", "temporal", "trigger", "inversion", "flip", "stack", "dimensions",
    "frame_time", "acquisition", "file", "acquisition_time", "turn", "edges", "format",
)  # fmt: skip
_ALWAYS = ("echo", "b_value", "temporal")
#: What may differ within one volume by carelessness, so that alone it separates only blocks that lie apart.
_CARELESS = ("frame", "turn", "edges", "format")
#: Slices whose pixels lie off each other by this part of a pixel through orientation or pixel spacing may be one stack,
#: which is looked into closely then.
_NEAR_PIXELS = 0.5
#: Least cosine between normals of slices on one line, and least share of its places that slices of one stack fill.
_SAME_LINE, _FILLED = 0.98, 0.5
#: Stacks of their own share more of the places of the smaller one.
_SHARED = 0.25
#: Echo times in ms and diffusion weightings in s/mm2 that differ by no more, or by a hundredth, differ by rounding.
_ROUNDING = 0.05
#: Blocks of slices this many steps apart are no longer one stack with slices missing.
_MAX_GAP = 4.5
#: Most different geometries, and parts, of a series that are compared with each other.
_MAX_KINDS, _MAX_PARTS = 2000, 500


@dataclass(frozen=True, kw_only=True)
class Found:
    """A volume in a source. `slices` are in k order if there is no `problem`."""

    number: str  # N for a series, N.M for a volume of a series that holds several
    slices: tuple[Slice, ...]
    affine: NDArray[np.float64] | None = None  # voxel index to RAS+ mm; None where the slices do not say
    problem: str = ""  # why it cannot be read as it is: a sentence after the name of the source
    differs: str = ""  # in what it differs from the others of its series
    problem_of_slice: bool = False  # whether the problem lies in the slices, not in how they lie together
    remarks: tuple[str, ...] = ()  # what its headers disagree in without consequence
    assumed: str = ""  # what `repair` takes for granted, in words

    @property
    def series(self) -> str:
        """The Series Instance UID."""
        return self.slices[0].series

    @property
    def modality(self) -> str:
        """CT, MR, PT, XA, DX, MG, OT for secondary captures, or '' for images that are no scans."""
        return (SOP_CLASSES | CAPTURES).get(self.slices[0].sop_class, "")


def find_volumes(source: Source, slices: Sequence[Slice]) -> tuple[list[Found], int]:
    """The volumes that slices make up, and how many images were set aside (localizers, pictures of other kinds).

    Series are numbered by Series Number, then by UID: the numbers do not depend on the names of files.
    """
    by_series: dict[str, list[Slice]] = {}
    for piece in sorted(slices, key=lambda piece: (piece.instance_number or 0, piece.sop_instance, piece.frame)):
        by_series.setdefault(piece.series, []).append(piece)
    kept = _scans(by_series.values(), _is_scan) or _scans(by_series.values(), _is_placed_capture)
    if not kept:  # nothing else is there: say what it is
        kept = list(by_series.values())
    aside = len(slices) - sum(map(len, kept))
    kept.sort(key=lambda pieces: (pieces[0].series_number, pieces[0].series))
    found: list[Found] = []
    for n, pieces in enumerate(kept, start=1):
        parts = _volumes_of(source, pieces)
        for m, part in enumerate(parts, start=1):
            number = f"{n}.{m}" if len(parts) > 1 else str(n)
            found.append(_arranged(source, number, part))
    return found, aside


def _scans(series: Iterable[list[Slice]], wanted: Callable[[Slice], bool]) -> list[list[Slice]]:
    """Of the series that hold a wanted slice, all slices but the localizers."""
    scans = [[piece for piece in pieces if not piece.localizer] for pieces in series]
    return [pieces for pieces in scans if any(wanted(piece) for piece in pieces)]


def _is_scan(piece: Slice) -> bool:
    return piece.sop_class in SOP_CLASSES


def _is_placed_capture(piece: Slice) -> bool:
    return piece.sop_class in CAPTURES and piece.placed


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Slices that may be a volume, in what they differ from others of their series, and why they are none."""

    pieces: list[Slice]
    differs: str = ""
    problem: str = ""


def _volumes_of(source: Source, pieces: list[Slice]) -> list[_Part]:
    """A series' slices volume by volume."""
    kinds = _groups(pieces, lambda piece: (piece.sop_class, piece.samples))
    differs = "kinds of image" if len(kinds) > 1 else ""
    # The rest can only be compared if every slice says it.
    defective = [any(_defect(source, piece) for piece in part) for part in kinds]
    parts = [part for part, bad in zip(kinds, defective) if not bad]
    out = [_Part(pieces=part) for part, bad in zip(kinds, defective) if bad]
    for what, split in _SPLITS:
        finer = [group for part in parts for group in split(part)]
        differs = differs or (what if len(finer) > len(parts) else "")
        parts = finer
    for members in _entwined(parts):
        if len(members) > 1:
            out.append(_Part(pieces=[piece for part in members for piece in part], problem=_mixed(members)))
            continue
        alone, reason = _untangled(members[0])
        differs = differs or reason
        out += alone
    return [replace(part, differs=differs) for part in out]


_Key = Callable[[Slice], object]


def _groups(pieces: list[Slice], key: _Key, tolerance: float = 0) -> list[list[Slice]]:
    """Slices of equal key, or whose numbers differ from the first of their group by at most `tolerance`."""
    groups: dict[object, list[Slice]] = {}
    for piece in pieces:
        value = key(piece)
        if value not in groups and tolerance and len(groups) < _MAX_KINDS:
            value = next((first for first in groups if _differ_by(first, value) <= tolerance), value)
        groups.setdefault(value, []).append(piece)
    return list(groups.values())


def _differ_by(one: Any, other: Any) -> float:
    return float(np.abs(np.subtract(one, other)).max())


def _by_size(pieces: list[Slice]) -> list[list[Slice]]:
    return _groups(pieces, lambda piece: (piece.rows, piece.columns))


def _by_grey(pieces: list[Slice]) -> list[list[Slice]]:
    return _groups(pieces, lambda piece: piece.photometric)


def _by_orientation(pieces: list[Slice]) -> list[list[Slice]]:
    """Slices turned alike, but for rounding: those whose corners are near each other when their centres coincide."""
    spacing = pieces[0].spacing
    return _linked(pieces, lambda piece: (piece.orientation, spacing))


def _by_spacing(pieces: list[Slice]) -> list[list[Slice]]:
    """Slices with pixels of one size, but for rounding."""
    orientation = pieces[0].orientation
    return _linked(pieces, lambda piece: (orientation, piece.spacing))


#: What all slices of a volume share, each with how it parts the slices of a series.
_SPLITS: tuple[tuple[str, Callable[[list[Slice]], list[list[Slice]]]], ...] = (
    ("sizes", _by_size),
    ("grey scales (Photometric Interpretations)", _by_grey),
    ("orientations", _by_orientation),
    ("pixel spacings", _by_spacing),
)


def _linked(pieces: list[Slice], key: Callable[[Slice], tuple[Any, Any]]) -> list[list[Slice]]:
    """Slices in groups within which each has a neighbour whose corners lie less than half a pixel off its own."""
    by_value: dict[tuple[Any, Any], list[Slice]] = {}
    for piece in pieces:
        by_value.setdefault(key(piece), []).append(piece)
    if len(by_value) == 1 or len(by_value) > _MAX_KINDS:  # so many are no volumes; the stack will be refused
        return [pieces]
    first = pieces[0]
    extents = [spans(replace(first, orientation=turn, spacing=edges)) for turn, edges in by_value]
    corners = np.array([(right + down, right - down) for right, down in extents]) / 2  # from the centre
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


def _entwined(parts: list[list[Slice]]) -> list[list[list[Slice]]]:
    """The parts of a series, those together that lie between one another on one line."""
    if len(parts) > _MAX_PARTS:
        return [parts]
    group_of = list(range(len(parts)))
    ordered = sorted(range(len(parts)), key=lambda n: -len(parts[n]))
    lines = [_line_of(part) for part in parts] if len(parts) > 1 else []
    for place, n in enumerate(ordered):
        if len(parts[n]) < 3:  # those behind are no volumes either
            break
        for m in ordered[place + 1 :]:
            if group_of[n] != group_of[m] and _are_one_stack(lines[n], lines[m]):
                old, new = group_of[m], group_of[n]
                group_of = [new if group == old else group for group in group_of]
    groups: dict[int, list[list[Slice]]] = {}
    for n, part in enumerate(parts):
        groups.setdefault(group_of[n], []).append(part)
    return list(groups.values())


def _are_one_stack(larger: _Line, smaller: _Line) -> bool:
    """Whether slices that differ lie on one line, at different places of one grid, and not one block after the other.

    Stacks that are scans of their own share places (a thin one and a thick one of the same body), fit no common grid,
    or follow each other. A block of one or two slices that follows is none of its own.
    """
    normal = larger.normals[0]
    if np.abs(smaller.normals @ normal).min() < _SAME_LINE:
        return False
    aside = smaller.centres.mean(axis=0) - larger.centres.mean(axis=0)
    if np.linalg.norm(aside - (aside @ normal) * normal) > max(larger.reach_mm, smaller.reach_mm):
        return False
    return _interleave(larger.places(normal), smaller.places(normal))


def _interleave(larger: NDArray[np.float64], smaller: NDArray[np.float64]) -> bool:
    """Whether places in mm along a line are those of one stack, neither block after block nor a stack each."""
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
    if np.abs(ratios - np.rint(ratios)).max() > 0.1 or len(both) < _FILLED * (1 + np.rint(ratios).sum()):
        return False
    if smaller[-1] < larger[0] or larger[-1] < smaller[0]:
        gap = max(smaller[0] - larger[-1], larger[0] - smaller[-1])
        return len(smaller) < 3 and gap < 1.5 * usual
    return True


def _centre(piece: Slice) -> NDArray[np.float64]:
    right, down = spans(piece)
    return np.asarray(np.array(piece.position) + (right + down) / 2, dtype=np.float64)


def _distinct(offsets: ArrayLike) -> NDArray[np.float64]:
    """Offsets in mm in order, those at the same place once."""
    ordered = np.sort(offsets)
    return ordered[np.concatenate([[True], np.diff(ordered) > SAME_PLACE_MM])]


def _mixed(parts: list[list[Slice]]) -> str:
    """Why parts of a series that are one stack cannot be read, as a sentence after the source's name."""
    pieces = [piece for part in parts for piece in part]
    if len({(piece.sop_class, piece.samples) for piece in pieces}) > 1:
        what = "kinds of image"
    else:
        what = next((name for name, split in _SPLITS if len(split(pieces)) > 1), "kinds")
    return (
        f"its slices lie on one line as one stack but are of different {what}, and a part of them is no scan; export "
        "the series again, or take the slices that do not belong to it out of the folder"
    )


def _untangled(pieces: list[Slice]) -> tuple[list[_Part], str]:
    """Slices of one size and orientation as volumes in which no two lie at the same place, if there is a sure way."""
    parts, reason = [pieces], ""
    for name in _TRAITS:
        split = [group for part in parts for group in _split_by(part, name)]
        if len(split) > len(parts):
            parts, reason = split, reason or _WORDS.get(name, name)
    split = [group for part in parts for group in _split_by_number(part)]
    if len(split) > len(parts):
        parts, reason = split, reason or "times or directions"
    return [_Part(pieces=part, problem=_mixed_types(part)) for part in parts], reason


_WORDS = {
    "frame": "coordinate systems", "kind": "image types", "echo": "echoes", "b_value": "diffusion weightings",
    "gradient": "diffusion directions", "temporal": "times", "trigger": "heart phases", "inversion": "inversion times",
    "flip": "flip angles", "stack": "stacks", "dimensions": "dimension indices", "frame_time": "times",
    "acquisition": "acquisitions", "file": "files", "acquisition_time": "times", "turn": "orientations",
    "edges": "pixel spacings", "format": "pixel formats",
}  # fmt: skip
_OF_SLICE: dict[str, tuple[_Key, float]] = {
    "frame": (lambda piece: piece.frame_of_reference, 0),
    "kind": (lambda piece: piece.image_type, 0),
    "turn": (lambda piece: piece.orientation, EQUAL),
    "edges": (lambda piece: piece.spacing, EQUAL),
    "format": (lambda piece: piece.bits, 0),
}


def _by_trait(pieces: list[Slice], name: str) -> list[list[Slice]]:
    if name in _OF_SLICE:
        key, tolerance = _OF_SLICE[name]
        return _groups(pieces, key, tolerance)
    return _groups(pieces, lambda piece: piece.traits.get(name))


def _split_by(pieces: list[Slice], name: str) -> list[list[Slice]]:
    """The slices parted by a trait, smallest value first, or as they are if the trait does not part them cleanly."""
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
    covered = [[places[id(piece)] for piece in group] for group in groups]
    if crowded:
        complete = all(len(set(places_here)) == whole for places_here in covered)
        apart = all(len(set(places_here)) == len(places_here) >= 3 for places_here in covered)
        if not (complete or apart):
            return [pieces]
    else:
        # Of image types that show the same `_mixed_types` says why they are no volumes.
        blocks_alone = name in _CARELESS or (name == "kind" and _same_contrast(groups))
        too_few = min(len(set(places_here)) for places_here in covered) < 3
        if too_few or (blocks_alone and not _are_blocks_apart(groups)):
            return [pieces]
    by_number = name in ("kind", "gradient", "file", *_CARELESS)  # whose values have no order of their own
    return sorted(groups, key=lambda group: _rank(group, name, by_number))


def _is_always(pieces: list[Slice], name: str) -> bool:
    return name in _ALWAYS or (name == "kind" and SOP_CLASSES.get(pieces[0].sop_class) == "MR")


def _rank(group: list[Slice], name: str, by_number: bool) -> tuple[object, ...]:
    """The place of a volume among those of its series."""
    value = _OF_SLICE[name][0](group[0]) if name in _OF_SLICE else group[0].traits.get(name)
    first = min(piece.instance_number or 0 for piece in group)
    return (first if by_number else 0, value is None, _sortable(value))


def _sortable(value: object) -> tuple[tuple[int, float, str], ...]:
    parts = value if isinstance(value, tuple) else (value,)
    return tuple((0, float(p), "") if isinstance(p, int | float) else (1, 0.0, str(p)) for p in parts)


def _without_rounding(groups: list[list[Slice]], name: str) -> list[list[Slice]]:
    """Slices of which no two lie at one place, parted by a number; numbers that differ by rounding are one."""
    if not all(isinstance(group[0].traits.get(name), float) for group in groups):
        return groups
    ordered = sorted(groups, key=lambda group: float(group[0].traits[name]))
    out = ordered[:1]
    for before, after in pairwise(ordered):
        last, value = (float(group[0].traits[name]) for group in (before, after))
        if value - last <= max(_ROUNDING, 0.01 * abs(value)):
            out[-1] = out[-1] + after
        else:
            out.append(after)
    return out


def _same_contrast(groups: list[list[Slice]]) -> bool:
    """Whether Image Types agree in what an MR image shows (PS3.3 C.8.3.1.1.1: the third value: M, P, R, W ...)."""
    return len({group[0].image_type[2:3] for group in groups}) == 1


def _mixed_types(pieces: list[Slice]) -> str:
    """Why MR slices that lie between one another and differ in what was done to them are no volume; '' if they are."""
    if SOP_CLASSES.get(pieces[0].sop_class) != "MR" or len(set(_places(pieces))) < len(pieces):
        return ""
    groups = _by_trait(pieces, "kind")
    if len(groups) < 2 or min(map(len, groups)) < 3:
        return ""
    return (
        "its slices lie on one line as one stack but are of different image types, and a part of them is no scan; "
        "export the series again, or take the slices that do not belong to it out of the folder"
    )


def _are_blocks_apart(groups: list[list[Slice]]) -> bool:
    """Whether slices lie block after block along their normal, and not as a stack of which a few slices are missing."""
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


def _split_by_number(pieces: list[Slice]) -> list[list[Slice]]:
    """Volumes told apart by Instance Number alone, if the slices come volume after volume or place after place."""
    places = _places(pieces)
    whole = len(set(places))
    times, rest = divmod(len(pieces), whole)
    numbers = [piece.instance_number for piece in pieces]
    if whole < 3 or times < 2 or rest or None in numbers or len(set(numbers)) < len(numbers):
        return [pieces]
    order = sorted(range(len(pieces)), key=lambda n: numbers[n] or 0)
    table = np.array([places[n] for n in order])
    if all(len(set(chunk)) == whole for chunk in table.reshape(times, whole).tolist()):
        chosen = np.array(order).reshape(times, whole)
    elif all(len(set(chunk)) == 1 for chunk in table.reshape(whole, times).tolist()):
        chosen = np.array(order).reshape(whole, times).T
    else:
        return [pieces]
    return [[pieces[n] for n in row] for row in chosen.tolist()]


def _places(pieces: list[Slice]) -> list[int]:
    """For each slice the number of its place along the normal, slices at one place having one number."""
    along, down = np.reshape(pieces[0].orientation or (), (2, 3))
    offsets = np.array([piece.position for piece in pieces]) @ np.cross(along, down)
    order = np.argsort(offsets, kind="stable")
    numbers = np.empty(len(pieces), int)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(offsets[order]) > SAME_PLACE_MM)])
    return [int(n) for n in numbers]


def _arranged(source: Source, number: str, part: _Part) -> Found:
    """The volume of slices that belong together, or the reason why they are none."""
    found = Found(number=number, slices=tuple(part.pieces), differs=part.differs, problem_of_slice=True)
    problem = next(filter(None, (_defect(source, piece) for piece in part.pieces)), "") or part.problem
    if problem:
        return replace(found, problem=problem)
    try:
        made = stacked(part.pieces)
    except BadFile as error:
        return replace(found, problem=str(error))
    return replace(
        found,
        slices=tuple(made.slices),
        affine=None if made.conflict else made.affine,
        problem=made.conflict or made.problem,
        problem_of_slice=False,
        remarks=made.remarks,
        assumed="its coordinate systems were taken to be one" if made.conflict else "",
    )


def _defect(source: Source, piece: Slice) -> str:
    """What is wrong with one slice, as a sentence that begins with its file; '' if nothing is."""
    where = source.where(piece.entry)
    if not piece.photometric:
        return f"{where}: does not say whether it is in grey values or colour; export it again"
    if piece.samples != 1 or not piece.photometric.startswith("MONOCHROME"):
        return f"{where}: is a colour image; give the original series in grey values"
    if not _is_scan(piece) and not (piece.sop_class in CAPTURES and (piece.placed or piece.problem)):
        return f"{where}: is not a CT, MR or PET image, nor one that says where it lies; give the original series"
    if piece.localizer:
        return f"{where}: is a localizer, not a slice of a volume; give the series that was planned on it"
    if piece.problem:
        return f"{where}: {piece.problem}"
    if piece.rows < 1 or piece.columns < 1:
        return f"{where}: its header gives an axis a length that no scan has; the file is damaged"
    if -1 in piece.bits:
        return f"{where}: its pixels are stored in a way that medseg does not read; export it again"
    if piece.has_lookup:
        return f"{where}: its values need a lookup table, which medseg does not apply; export it again"
    if piece.position is None or piece.orientation is None or piece.spacing is None:
        return f"{where}: does not say where its slice lies or how large its pixels are; export it again"
    along, down = np.reshape(piece.orientation, (2, 3))
    if np.abs(np.array([along @ along, down @ down, along @ down]) - (1, 1, 0)).max() > 2e-3:
        return f"{where}: the directions of its rows and columns are not at right angles; export it again"
    if (piece.slope is None) != (piece.intercept is None) or piece.slope == 0:
        return f"{where}: the scaling of its values is impossible; export it again"
    if piece.slope is None and SOP_CLASSES.get(piece.sop_class) in ("CT", "PT"):
        return f"{where}: does not say how its stored values are scaled, as CT and PET must; export it again"
    return ""


def differences(found: Sequence[Found]) -> str:
    """How several volumes come about, for a message: series, and in what volumes of one series differ."""
    series = Counter(volume.series for volume in found)
    if len(series) > 1:
        return f"holds {len(found)} volumes of {len(series)} series"
    return f"holds {len(found)} volumes of different {found[0].differs or 'kinds'} in one series"
