"""Pictures of the largest errors of the worst cases: reference and result in three planes, as
outlines over the scan where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import MedsegError
from medseg.evaluation.pairs import on_grid_of
from medseg.io import read
from medseg.view import (
    PLANES,
    Word,
    contrast_of,
    direction_words,
    grey_picture,
    lettered,
    png_bytes,
    upright,
)
from medseg.volume import Volume, plane_of, reorient, resample

if TYPE_CHECKING:
    from medseg.evaluation.reading import LabelReader
    from medseg.evaluation.summary import EvaluationOptions

#: Cases that get pictures.
WORST_CASES = 3
Color = tuple[int, int, int]
#: Colours that the colour-blind can tell apart: agreement, reference only, result only, other
#: structures.
COLORS: dict[str, Color] = {
    "both": (200, 200, 200),
    "reference": (0, 114, 178),
    "prediction": (230, 119, 0),
    "other": (62, 62, 62),
}
#: The same of lines over a grey scan, which have to be lighter.
LINES: dict[str, Color] = {"reference": (86, 180, 233), "prediction": (240, 165, 0)}
#: Pixels of a picture's longer side, and of the lines: the result's lies on the reference's.
_SIDE, _BROAD, _NARROW = 420, 4, 2
#: What is shown around a structure, in mm and as a share of it.
_AROUND_MM, _AROUND = 15.0, 0.35
_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, kw_only=True)
class ErrorPicture:
    """A slice through an error: PNG, and what it shows in words."""

    case: str
    structure: str
    dice: float
    plane: str
    at: str
    png: bytes
    has_scan: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Error:
    """A structure of a case: its masks on the grid of the reference, along RAS, and the scan."""

    grid: Volume
    reference: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    scan: Volume | None


def worst_structures(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the cases of least mean Dice, the row of the structure of least Dice of those that are
    there.
    """
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if math.isfinite(row["dice"]) and row["status"] != "both_empty":
            cases.setdefault(row["case"], []).append(row)
    means = {case: float(np.mean([row["dice"] for row in some])) for case, some in cases.items()}
    order = sorted(means, key=lambda case: (means[case], case))[:WORST_CASES]
    return [min(cases[case], key=lambda row: row["dice"]) for case in order]


def error_pictures(
    rows: Sequence[Mapping[str, Any]],
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    *,
    reader: LabelReader,
    scans: Mapping[str, Path],
    problems: list[str],
) -> Iterator[ErrorPicture]:
    """The pictures of the worst cases, through the largest error of each plane.

    pairs, scans: files of the cases, which are read again. problems: gets a sentence where a scan
    cannot be shown.
    """
    for row in worst_structures([row for row in rows if row["case"] in pairs]):
        case, structure = row["case"], row["structure"]
        labels = (options.structures or {}).get(structure) or (int(structure.split()[1]),)
        reference = reader.read(pairs[case][0])
        prediction, _ = on_grid_of(reference, reader.read(pairs[case][1]), options.resample)
        reference, prediction = (
            reorient(reference.with_data(one.data), "RAS") for one in (reference, prediction)
        )
        scored = True if options.ignore is None else reference.data != options.ignore
        ours, theirs = (np.isin(one.data, labels) & scored for one in (reference, prediction))
        scan = _scan_of(case, scans, problems)
        if scan is not None and not _covers(scan, reference, ours | theirs):
            problems.append(f"{case}: its scan does not lie where its labels are, and is not shown")
            scan = None
        error = _Error(grid=reference, reference=ours, prediction=theirs, scan=scan)
        for name, (axis, _, _, letters) in PLANES.items():
            picture, at = _picture(error, PLANES[name])
            index = [at * (one == axis) for one in range(3)]
            at_mm = float((reference.affine @ [*index, 1])[axis])
            yield ErrorPicture(
                case=case,
                structure=structure,
                dice=row["dice"],
                plane=name,
                at=f"{'RAS'[axis]} {at_mm:.1f} mm",
                png=png_bytes(lettered(picture, direction_words(picture.shape, letters, size=17))),
                has_scan=scan is not None,
            )


def _scan_of(case: str, scans: Mapping[str, Path], problems: list[str]) -> Volume | None:
    if not scans:
        return None
    if case not in scans:
        problems.append(f"{case}: there is no scan of it, so its pictures show labels alone")
        return None
    try:
        return read(scans[case])
    except MedsegError as error:
        text = str(error).replace(str(scans[case]), "the scan")
        problems.append(f"{case}: its scan cannot be shown: {text}")
        return None


def _covers(scan: Volume, grid: Volume, mask: NDArray[np.bool_]) -> bool:
    """Whether the middle of what is labelled lies in the scan."""
    middle = [float(np.flatnonzero(mask.any(axis=one)).mean()) for one in ((1, 2), (0, 2), (0, 1))]
    place = np.linalg.inv(scan.affine) @ grid.affine @ np.array([*middle, 1.0])
    return bool(all(-1 <= one <= count for one, count in zip(place, scan.shape)))


def _picture(error: _Error, plane: tuple[int, int, int, str]) -> tuple[NDArray[np.uint8], int]:
    """The slice across an axis where masks differ most, as (rows, columns, 3), and its index."""
    axis, across, up, _ = plane
    ours, theirs = error.reference, error.prediction
    others = tuple(one for one in range(3) if one != axis)
    differing = (ours != theirs).sum(axis=others)
    at = int(np.argmax(differing if differing.any() else ours.sum(axis=others)))
    a, b, other = (
        upright(plane_of(one, axis, at), across, up) for one in (ours, theirs, error.grid.data != 0)
    )
    spacing = error.grid.spacing_mm
    sizes_mm = (spacing[up], spacing[across])
    if error.scan is None:
        shape = _shape_of(a.shape, sizes_mm)
        return _areas(*(_scaled(one, shape) for one in (a, b, other))), at
    part = _around(a | b, sizes_mm)
    a, b = a[part], b[part]
    shape = _shape_of(a.shape, sizes_mm)
    grey = upright(_slice_of(error.scan, error.grid, axis=axis, at=at), across, up)[part]
    low, high = contrast_of(error.scan.data)[:2]
    picture = _smooth(grey_picture(grey, low, high).astype(np.uint8), shape)
    for mask, name, width in ((a, "reference", _BROAD), (b, "prediction", _NARROW)):
        picture[_outline(_scaled(mask, shape), width)] = LINES[name]
    return _with_bar(picture, shape[1] / (a.shape[1] * sizes_mm[1])), at


def _areas(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], other: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """What both have and only one has, as areas."""
    picture = np.zeros((*ours.shape, 3), np.uint8)
    picture[other] = COLORS["other"]
    picture[ours & theirs] = COLORS["both"]
    picture[ours & ~theirs] = COLORS["reference"]
    picture[theirs & ~ours] = COLORS["prediction"]
    return picture


def _shape_of(shape: tuple[int, ...], sizes_mm: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns of a picture in which a mm is as long both ways."""
    extent = [count * size for count, size in zip(shape, sizes_mm)]
    rows, columns = (max(1, round(_SIDE * one / max(extent))) for one in extent)
    return rows, columns


def _scaled(plane: NDArray, shape: tuple[int, int]) -> NDArray:
    """Every voxel as a rectangle of pixels."""
    rows, columns = (
        ((np.arange(count) + 0.5) * size / count).astype(int)
        for count, size in zip(shape, plane.shape)
    )
    return plane[np.ix_(rows, columns)]


def _smooth(picture: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture in another size, interpolated between its pixels."""
    from PIL import Image

    image = Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.array(image)


def _around(mask: NDArray[np.bool_], sizes_mm: tuple[float, float]) -> tuple[slice, slice]:
    """The part of a slice that a structure fills, and what is around it; all where it is empty."""
    parts = []
    for axis, size_mm in enumerate(sizes_mm):
        there = np.flatnonzero(mask.any(axis=1 - axis))
        if not len(there):
            return slice(None), slice(None)
        first, last = int(there[0]), int(there[-1]) + 1
        margin = math.ceil(max(_AROUND_MM / size_mm, _AROUND * (last - first)))
        parts.append(slice(max(0, first - margin), min(mask.shape[axis], last + margin)))
    return parts[0], parts[1]


def _slice_of(scan: Volume, grid: Volume, *, axis: int, at: int) -> NDArray:
    """The slice of a scan that lies at a slice of a grid, interpolated."""
    affine = grid.affine.copy()
    affine[:, 3] += affine[:, axis] * at
    shape = tuple(1 if one == axis else count for one, count in enumerate(grid.shape))
    outside = float(scan.data.min())
    plane = resample(scan, affine, (shape[0], shape[1], shape[2]), order=1, outside=outside)
    return plane_of(plane.data, axis, 0)


def _outline(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The rim of a mask, inside it, so many pixels wide."""
    inner = mask
    for _ in range(width):
        around = np.pad(inner, 1, mode="edge")
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inner


def _with_bar(picture: NDArray[np.uint8], pixels_a_mm: float) -> NDArray[np.uint8]:
    """The picture with a bar of a round length, at most a quarter as long as it."""
    rows, columns = picture.shape[:2]
    length_mm = max(
        (one for one in _BARS_MM if one * pixels_a_mm <= columns / 4), default=_BARS_MM[0]
    )
    end = 10 + round(length_mm * pixels_a_mm)
    picture = picture.copy()
    picture[rows - 13 : rows - 8, 9 : end + 1] = 0
    picture[rows - 12 : rows - 9, 10:end] = 255
    word = Word(
        text=f"{length_mm} mm",
        place=(rows - 15, 10),
        anchor="ls",
        color=(255, 255, 255),
        size=15,
    )
    return lettered(picture, [word])
