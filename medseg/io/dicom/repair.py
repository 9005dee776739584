"""Uneven stacks of slices made even: what `--repair` does, where it is well defined.

Slices stored twice are dropped, missing ones are interpolated, uneven distances and slanted stacks
(gantry tilt) are resampled. Interpolation is linear in space: along the normal between neighbouring
slices, and within a slice by the part of a pixel that it is shifted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.slices import Slice
from medseg.io.dicom.stack import (
    MAX_DRIFT,
    MAX_STEP_DIFFERENCE,
    MAX_TILT,
    SAME_PLACE_MM,
    grid,
    missing_slices,
    sorted_along_normal,
    tilt_of,
)

#: Largest share of a volume's slices that may be missing, and the widest gap in slices' distances.
MAX_MISSING, MAX_GAP = 0.25, 4.0
#: Smallest step between slices as a share of the usual one.
MIN_STEP = 0.25
#: Largest slant in radians (the widest a gantry goes is 30 degrees).
MAX_SLANT = 0.6


def doubles(pieces: Sequence[Slice]) -> list[tuple[int, int]]:
    """Pairs of slices, by number in order along the normal, that lie at one place; the second could
    be a copy.
    """
    _, positions, _ = sorted_along_normal(pieces)
    near = np.linalg.norm(np.diff(positions, axis=0), axis=1) <= SAME_PLACE_MM
    return [(int(n), int(n) + 1) for n in np.flatnonzero(near)]


def check_repair(pieces: Sequence[Slice]) -> None:
    """Raise `BadFile`, with a sentence for after the source's name, unless an even grid follows
    from the positions.

    Slices at one place are taken to be copies, of which one is kept.
    """
    originals = _kept(pieces)
    if len(originals) == 1 < len(pieces):
        raise BadFile(
            f"its {len(pieces)} slices all lie at the same place, which is no volume; give another"
            " series"
        )
    if len(originals) < 3:
        raise BadFile(
            f"it holds {len(originals)} slices, too few for a volume; give the whole series"
        )
    _, positions, normal = sorted_along_normal(originals)
    steps = np.diff(positions @ normal)
    step = float(np.median(steps))
    if steps.min() < max(MIN_STEP * step, SAME_PLACE_MM) or steps.max() > (MAX_GAP + 0.1) * step:
        raise BadFile(
            "the distances between its slices differ too much to be resampled; give another series"
        )
    lacking = round(float(steps.sum()) / step) + 1 - len(originals)
    if lacking > MAX_MISSING * (len(originals) + lacking):
        raise BadFile("too many slices are missing to be interpolated; export the series again")
    sideways = positions - np.outer(positions @ normal, normal)
    slopes = np.linalg.norm(np.diff(sideways, axis=0), axis=1) / steps
    if np.arctan(slopes.max()) > MAX_SLANT:
        raise BadFile(
            "its slices are shifted too far against each other to be resampled; give another series"
        )


def repaired(
    pieces: Sequence[Slice], data: NDArray
) -> tuple[NDArray, NDArray[np.float64], list[str]]:
    """Voxels on an even grid, its affine (RAS+ mm), and what was done in words.

    pieces: slices in order along their normal; data: their values (I, J, K), scaled. Whole numbers
    stay whole numbers. Raises `BadFile`, with a sentence for after the source's name, where the
    right grid does not follow from the slices.
    """
    check_repair(pieces)
    pieces, data, copies = _without_copies(pieces, data)
    repairs = [f"{copies} slices stored twice were dropped"] if copies else []
    _, positions, normal = sorted_along_normal(pieces)
    offsets = positions @ normal
    steps = np.diff(offsets)
    step = float(np.median(steps))
    count = max(len(pieces), round(float(steps.sum()) / step) + 1)
    between = (positions[-1] - positions[0]) / (count - 1)
    uneven = bool((np.abs(steps - step) > MAX_STEP_DIFFERENCE * step).any())
    repairs += _evened(steps, count) if uneven else []
    shifts, slanted = _shifts(pieces, positions, normal=normal, between=between)
    if slanted:
        degrees = np.degrees(tilt_of(positions[-1] - positions[0], normal))
        repairs.append(f"a slant of {degrees:.1f} degrees was resampled to a straight stack")
        between = normal * float(steps.sum()) / (count - 1)
    if not (uneven or slanted):
        return data, grid(pieces[0], positions[0], between), repairs
    low = np.floor(shifts.min(axis=0) + 1e-6).astype(int)
    room = np.ceil(shifts.max(axis=0) - 1e-6).astype(int) - low
    even_offsets = np.linspace(offsets[0], offsets[-1], count)
    data = _resampled(data, offsets, wanted=even_offsets, shifts=shifts - low, room=room)
    along, down = np.reshape(pieces[0].orientation or (), (2, 3))
    row_spacing, column_spacing = pieces[0].spacing or (0.0, 0.0)
    origin = positions[0] + along * low[0] * column_spacing + down * low[1] * row_spacing
    return data, grid(pieces[0], origin, between), repairs


def _without_copies(pieces: Sequence[Slice], data: NDArray) -> tuple[Sequence[Slice], NDArray, int]:
    """Slices and their values without those stored twice, and how many these are. Raises `BadFile`
    where slices at one place differ.
    """
    copies = set()
    for first, second in doubles(pieces):
        if not np.array_equal(data[..., first], data[..., second]):
            raise BadFile(
                "several slices lie at the same place and differ; give one volume of them"
            )
        copies.add(second)
    if not copies:
        return pieces, data, 0
    keep = [n for n in range(len(pieces)) if n not in copies]
    return [pieces[n] for n in keep], data[..., keep], len(copies)


def _evened(steps: NDArray, count: int) -> list[str]:
    """What is done to uneven steps that become those of `count` slices, in words."""
    if missing := missing_slices(steps):
        return [f"{missing} of {count} slices were missing and were interpolated"]
    return ["uneven distances between slices were resampled to even ones"]


def _kept(pieces: Sequence[Slice]) -> list[Slice]:
    slices, _, _ = sorted_along_normal(pieces)
    copies = {second for _, second in doubles(pieces)}
    return [piece for n, piece in enumerate(slices) if n not in copies]


def _shifts(
    pieces: Sequence[Slice], positions: NDArray, *, normal: NDArray, between: NDArray
) -> tuple[NDArray[np.float64], bool]:
    """How far each slice is shifted along (i, j) from the first one, in pixels (K, 2), and whether
    that matters.
    """
    along, down = np.reshape(pieces[0].orientation or (), (2, 3))
    row_spacing, column_spacing = pieces[0].spacing or (0.0, 0.0)
    away = positions - positions[0]
    shifts = np.stack([away @ along / column_spacing, away @ down / row_spacing], axis=1)
    offsets = away @ normal
    straight = np.outer(offsets / offsets[-1], positions[-1] - positions[0])
    drift = float(np.linalg.norm(away - straight, axis=1).max())
    step = float(np.linalg.norm(between))
    slanted = tilt_of(positions[-1] - positions[0], normal) > MAX_TILT
    if slanted or drift > MAX_DRIFT * min(row_spacing, column_spacing, step):
        return shifts, True
    return np.zeros_like(shifts), False


def _resampled(
    data: NDArray, offsets: NDArray, *, wanted: NDArray, shifts: NDArray, room: NDArray
) -> NDArray:
    """Slices at `offsets`, moved by `shifts` pixels, at the offsets `wanted`; outside is the lowest
    value.
    """
    rows, columns, _ = data.shape
    outside = data.min()
    out = np.full((rows + room[0], columns + room[1], len(wanted)), outside, data.dtype, order="F")
    step = float(wanted[1] - wanted[0])
    for k, offset in enumerate(wanted):
        nearest = int(np.abs(offsets - offset).argmin())
        if abs(offsets[nearest] - offset) <= 1e-3 * step:
            parts = [(nearest, 1.0)]
        else:
            above = int(np.searchsorted(offsets, offset))
            weight = float((offset - offsets[above - 1]) / (offsets[above] - offsets[above - 1]))
            parts = [(above - 1, 1 - weight), (above, weight)]
        plane = np.zeros(out.shape[:2])
        inside = np.ones(out.shape[:2], bool)
        for n, weight in parts:
            picture, valid = _moved(data[..., n], shifts[n], room)
            plane += weight * picture
            inside &= valid
        if data.dtype.kind in "iu":
            plane = np.rint(plane)
        out[..., k][inside] = plane[inside]
    return out


def _moved(plane: NDArray, shift: NDArray, room: NDArray) -> tuple[NDArray, NDArray]:
    """A slice (I, J) moved by a part of a pixel into a larger picture, and where it is known
    there.
    """
    out: NDArray = plane.astype(np.float64)
    valid: NDArray = np.ones(1, bool)
    for axis in (0, 1):
        whole = int(np.floor(shift[axis] + 1e-6))
        part = float(max(0.0, shift[axis] - whole))
        size = list(out.shape)
        size[axis] += int(room[axis])
        wide = np.zeros(size)
        length = out.shape[axis]
        place = [slice(None)] * 2
        place[axis] = slice(whole, whole + length)
        wide[tuple(place)] = out * (1 - part)
        here = np.zeros(size[axis], bool)
        here[whole : whole + length] = True
        if part > 1e-6:
            place[axis] = slice(whole + 1, whole + 1 + length)
            wide[tuple(place)] += out * part
            here[whole] = False
        out = wide
        valid = valid[..., None] & here if axis else here
    return out, valid
