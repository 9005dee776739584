"""Slices become volumes: which belong together, in which order, and where they lie (PS3.3 C.7.6.2, C.7.6.16).

A volume is found by what all its slices share (series, kind, size, spacing, orientation); where several slices then lie
at one place, by what tells them apart (echo, time, diffusion, acquisition ...), and only if that does so for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.slices import CLASSIC, SOP_CLASSES, Slice
from medseg.io.dicom.source import Source
from medseg.volume import LPS

#: Steps between slices may differ from each other by this part of their median (rounded positions do).
MAX_STEP_DIFFERENCE = 0.01
#: A slice may lie this part of the smallest voxel edge away from where even steps would put it.
MAX_DRIFT = 0.05
#: Largest angle in radians between the stacking direction and the slices' normal that is still rounding.
MAX_TILT = 1e-3
#: Slices closer than this along their normal, in mm, lie at the same place.
SAME_PLACE_MM = 1e-2
#: What tells volumes of a series apart, in the order in which it is tried. Those in `_ALWAYS` separate slices even
#: where none lie at the same place: echoes, diffusion weightings and times never make up one volume.
_TRAITS = (
    "kind", "echo", "b_value", "gradient", "temporal", "trigger", "inversion", "flip", "stack", "dimensions",
    "frame_time", "acquisition", "file", "acquisition_time",
)  # fmt: skip
_ALWAYS = ("echo", "b_value", "temporal")


@dataclass(frozen=True)
class Found:
    """A volume in a source. `slices` are in k order if there is no `problem`."""

    number: str  # N for a series, N.M for a volume of a series that holds several
    slices: tuple[Slice, ...]
    affine: NDArray[np.float64] | None  # voxel index to RAS+ mm; None where the slices do not say
    problem: str = ""  # why it cannot be read as it is: a sentence after the name of the source
    differs: str = ""  # in what it differs from the others of its series
    problem_of_slice: bool = False  # whether the problem lies in one slice, not in how they lie together

    @property
    def series(self) -> str:
        """The Series Instance UID."""
        return self.slices[0].series

    @property
    def modality(self) -> str:
        """CT, MR, PT, or '' for images that are no scans."""
        return SOP_CLASSES.get(self.slices[0].sop_class, "")


def find_volumes(source: Source, slices: Sequence[Slice]) -> tuple[list[Found], int]:
    """The volumes that slices make up, and how many images were set aside (localizers, pictures of other kinds).

    Series are numbered by Series Number, then by UID: the numbers do not depend on the names of files.
    """
    by_series: dict[str, list[Slice]] = {}
    for piece in sorted(slices, key=lambda piece: (piece.instance_number or 0, piece.sop_instance, piece.frame)):
        by_series.setdefault(piece.series, []).append(piece)
    kept: list[list[Slice]] = []
    for pieces in by_series.values():
        scans = [piece for piece in pieces if not piece.localizer]
        if any(piece.sop_class in SOP_CLASSES for piece in scans):
            kept.append(scans)
    if not kept:  # nothing else is there: say what it is
        kept = list(by_series.values())
    aside = len(slices) - sum(map(len, kept))
    kept.sort(key=lambda pieces: (pieces[0].series_number, pieces[0].series))
    found: list[Found] = []
    for n, pieces in enumerate(kept, start=1):
        parts, differs = _volumes_of(source, pieces)
        for m, part in enumerate(parts, start=1):
            found.append(_arranged(source, f"{n}.{m}" if len(parts) > 1 else str(n), part, differs))
    return found, aside


def _volumes_of(source: Source, pieces: list[Slice]) -> tuple[list[list[Slice]], str]:
    """A series' slices volume by volume, and what was found to differ between them."""
    parts, differs = [pieces], ""
    whole: list[list[Slice]] = []
    for what, key, tolerance in _SHARED:
        split = [group for part in parts for group in _groups(part, key, tolerance)]
        if len(split) > len(parts):
            parts, differs = split, differs or what
        if what == "kinds of image":  # the rest can only be compared if every slice says it
            whole = [part for part in parts if any(_defect(source, piece) for piece in part)]
            parts = [part for part in parts if part not in whole]
    out = whole
    for part in parts:
        alone, reason = _untangled(part)
        differs = differs or reason
        out += alone
    return out, differs


_Key = Callable[[Slice], object]
_SHARED: tuple[tuple[str, _Key, float], ...] = (
    ("kinds of image", lambda piece: (piece.sop_class, piece.samples), 0),
    ("coordinate systems", lambda piece: piece.frame_of_reference, 0),
    ("sizes", lambda piece: (piece.rows, piece.columns), 0),
    ("pixel formats", lambda piece: (piece.bits, piece.photometric), 0),
    ("orientations", lambda piece: piece.orientation, 1e-4),
    ("pixel spacings", lambda piece: piece.spacing, 1e-4),
)


def _groups(pieces: list[Slice], key: _Key, tolerance: float) -> list[list[Slice]]:
    """Slices of equal key, or whose numbers differ from the first of their group by at most `tolerance`."""
    groups: list[tuple[object, list[Slice]]] = []
    for piece in pieces:
        value = key(piece)
        for first, members in reversed(groups):
            near = tolerance and np.abs(np.array(first) - np.array(value)).max() <= tolerance
            if first == value or near:
                members.append(piece)
                break
        else:
            groups.append((value, [piece]))
    return [members for _, members in groups]


def _untangled(pieces: list[Slice]) -> tuple[list[list[Slice]], str]:
    """Slices of one size and orientation as volumes in which no two lie at the same place, if there is a sure way."""
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
    "kind": "image types", "echo": "echoes", "b_value": "diffusion weightings", "gradient": "diffusion directions",
    "temporal": "times", "trigger": "heart phases", "inversion": "inversion times", "flip": "flip angles",
    "stack": "stacks", "dimensions": "dimension indices", "frame_time": "times", "acquisition": "acquisitions",
    "file": "files", "acquisition_time": "times",
}  # fmt: skip


def _value(piece: Slice, name: str) -> object:
    return piece.image_type if name == "kind" else piece.traits.get(name)


def _split_by(pieces: list[Slice], name: str) -> list[list[Slice]]:
    """The slices parted by a trait, smallest value first, or as they are if the trait does not part them cleanly."""
    places = _places(pieces)
    whole = len(set(places))
    crowded = whole < len(pieces)
    always = name in _ALWAYS or (name == "kind" and SOP_CLASSES.get(pieces[0].sop_class) == "MR")
    if whole < 3 or not (crowded or always):
        return [pieces]
    groups: dict[object, list[int]] = {}
    for n, piece in enumerate(pieces):
        groups.setdefault(_value(piece, name), []).append(n)
    if len(groups) < 2:
        return [pieces]
    covered = [{places[n] for n in members} for members in groups.values()]
    if crowded:
        complete = all(len(places_here) == whole for places_here in covered)
        apart = all(len(set_) == len(members) >= 3 for set_, members in zip(covered, groups.values()))
        if not (complete or apart):
            return [pieces]
    elif min(map(len, covered)) < 3:
        return [pieces]
    by_number = name in ("kind", "gradient", "file")  # whose values have no order of their own
    first = {value: min(pieces[n].instance_number or 0 for n in members) for value, members in groups.items()}
    order = sorted(groups, key=lambda value: (first[value] if by_number else 0, value is None, _sortable(value)))
    return [[pieces[n] for n in groups[value]] for value in order]


def _sortable(value: object) -> tuple[tuple[int, float, str], ...]:
    parts = value if isinstance(value, tuple) else (value,)
    return tuple((0, float(p), "") if isinstance(p, int | float) else (1, 0.0, str(p)) for p in parts)


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


def _arranged(source: Source, number: str, pieces: list[Slice], differs: str) -> Found:
    """The volume of slices that belong together, or the reason why they are none."""
    problem = next(filter(None, (_defect(source, piece) for piece in pieces)), "")
    try:
        if problem:
            raise BadFile(problem)
        ordered, affine = stack(pieces)
    except BadFile as error:
        return Found(number, tuple(pieces), None, str(error), differs, bool(problem))
    return Found(number, tuple(ordered), affine, "", differs)


def _defect(source: Source, piece: Slice) -> str:
    """What is wrong with one slice, as a sentence that begins with its file; '' if nothing is."""
    where = source.where(piece.entry)
    if not piece.photometric:
        return f"{where}: does not say whether it is in grey values or colour; export it again"
    if piece.samples != 1 or not piece.photometric.startswith("MONOCHROME"):
        return f"{where}: is a colour image; give the original series in grey values"
    if piece.sop_class not in SOP_CLASSES:
        return f"{where}: is not a CT, MR or PET image; give the original series"
    if piece.localizer:
        return f"{where}: is a localizer, not a slice of a volume; give the series that was planned on it"
    if piece.problem:
        return f"{where}: {piece.problem}"
    if piece.frames > 1 and piece.sop_class in CLASSIC:
        return f"{where}: holds many slices in one file of a kind that has one; export it again"
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
    if piece.slope is None and SOP_CLASSES[piece.sop_class] != "MR":
        return f"{where}: does not say how its stored values are scaled, as CT and PET must; export it again"
    return ""


def stack(pieces: Sequence[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices in order along their normal, and voxel index to RAS+ mm.

    Raises `BadFile` for an uneven stack, with a sentence to stand after the name of the source.
    """
    if len({piece.slope is None for piece in pieces}) > 1:
        raise BadFile("only some of its slices say how their values are scaled; export the series again")
    ordered, positions, normal = sorted_along_normal(pieces)
    steps = np.diff(positions @ normal)
    if len(pieces) > 1 and (steps <= SAME_PLACE_MM).all():
        raise BadFile(f"its {len(pieces)} slices all lie at the same place, which is no volume; give another series")
    if len(pieces) > 1 and steps.min() <= SAME_PLACE_MM:
        raise BadFile(
            "several slices lie at the same place: slices are stored twice, or volumes (times, echoes, directions) are "
            "mixed and nothing in the headers tells them apart; give one of them"
        )
    if len(pieces) < 3:  # of two, nothing confirms the distance
        raise BadFile(f"it holds {len(pieces)} slices, too few for a volume; give the whole series")
    step = float(np.median(steps))
    uneven = np.abs(steps - step) > MAX_STEP_DIFFERENCE * step
    if uneven.any():
        if missing := missing_slices(steps):
            raise BadFile(f"{missing} slices are missing; export the series again")
        raise BadFile("the distances between its slices differ; give a series of even distances")
    whole = positions[-1] - positions[0]
    tilt = tilt_of(whole, normal)
    if tilt > MAX_TILT:
        raise BadFile(
            f"its slices are stacked at a slant of {math.degrees(tilt):.1f} degrees (gantry tilt); "
            "give a series that was corrected for it"
        )
    between = whole / (len(ordered) - 1)
    even = positions[0] + np.arange(len(ordered))[:, None] * between
    drift = float(np.linalg.norm(positions - even, axis=1).max())
    if drift > MAX_DRIFT * min(*(ordered[0].spacing or ()), step):
        raise BadFile("its slices do not lie on one straight line; give a series of even distances")
    return ordered, grid(ordered[0], positions[0], between)


def grid(first: Slice, origin: NDArray, between: NDArray) -> NDArray[np.float64]:
    """The affine (RAS+ mm) of a stack: `origin` of its first voxel and step `between` slices in LPS mm."""
    along_row, down_column = np.reshape(first.orientation or (), (2, 3))
    row_spacing, column_spacing = first.spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = down_column * row_spacing
    affine[:3, 2] = between
    affine[:3, 3] = origin
    return LPS @ affine


def sorted_along_normal(pieces: Sequence[Slice]) -> tuple[list[Slice], NDArray[np.float64], NDArray[np.float64]]:
    """The slices in order along their normal, their positions (N, 3) in LPS mm, and the unit normal."""
    along_row, down_column = np.reshape(pieces[0].orientation or (), (2, 3))
    normal = np.cross(along_row, down_column)
    normal = normal / np.linalg.norm(normal)
    ordered = sorted(pieces, key=lambda piece: float(normal @ np.array(piece.position)))
    return ordered, np.array([piece.position for piece in ordered]), normal


def missing_slices(steps: NDArray) -> int:
    """How many slices are missing if every step that is not the usual one is a multiple of it; else 0."""
    step = float(np.median(steps))
    ratios = steps[np.abs(steps - step) > MAX_STEP_DIFFERENCE * step] / step
    if len(ratios) and (np.abs(ratios - np.rint(ratios)) < 0.05).all() and (ratios > 1.5).all():
        return int(np.rint(ratios).sum() - len(ratios))
    return 0


def tilt_of(whole: NDArray, normal: NDArray) -> float:
    """The angle in radians between the direction from the first slice to the last and the unit normal."""
    return math.acos(min(1.0, float(whole @ normal / np.linalg.norm(whole))))


def differences(found: Sequence[Found]) -> str:
    """How several volumes come about, for a message: series, and in what volumes of one series differ."""
    series = Counter(volume.series for volume in found)
    if len(series) > 1:
        return f"holds {len(found)} volumes of {len(series)} series"
    return f"holds {len(found)} volumes of different {found[0].differs or 'kinds'} in one series"
