"""Slices that belong together as one stack: in which order, on which grid, and how far their pixels
lie off it.

Headers of one series may disagree in what means nothing: orientations and pixel spacings that
wobble by rounding, a Frame of Reference UID that some slices lack. What matters is where every
pixel lies; what moves it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.slices import Slice
from medseg.volume import LPS

#: Steps between slices may differ from each other by this part of their median (rounded positions
#: do).
MAX_STEP_DIFFERENCE = 0.01
#: A slice may lie this part of the smallest voxel edge away from where even steps would put it.
MAX_DRIFT = 0.05
#: Largest angle in radians between the stacking direction and the slices' normal that is still
#: rounding.
MAX_TILT = 1e-3
#: Slices closer than this along their normal, in mm, lie at the same place.
SAME_PLACE_MM = 1e-2
#: Direction cosines and pixel spacings in mm that differ by no more are equal.
EQUAL = 1e-4
#: Where orientations or pixel spacings wobble, a pixel may lie this many voxels off the grid of the
#: volume.
MAX_WOBBLE_VOXELS = 0.1


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Slices of one volume with one orientation, pixel spacing and frame of reference.

    remarks: what their headers disagree in without consequence, as sentences without the name of
    the source.
    conflict: why they may not be one stack after all, which only the user can decide; '' if nothing
    says so.
    """

    slices: list[Slice]
    # Voxel index to RAS+ mm; None where the slices are uneven.
    affine: NDArray[np.float64] | None = None
    problem: str = ""  # why there is no affine
    remarks: tuple[str, ...] = ()
    conflict: str = ""


def stacked(pieces: Sequence[Slice]) -> Stack:
    """Slices that belong together as one stack, in k order unless there is a problem.

    Raises `BadFile` where the slices contradict each other, with a sentence to stand after the name
    of the source.
    """
    if (
        any(piece.photometric == "MONOCHROME1" for piece in pieces)
        and len({piece.bits for piece in pieces}) > 1
    ):
        raise BadFile(
            "its slices are stored inverted (MONOCHROME1) and in different pixel formats, so that "
            "what their values mean differs; export the series again"
        )
    same_frame, conflict, remark = _in_one_frame(pieces)
    straight, wobble = straightened(same_frame)
    remarks = tuple(filter(None, (remark, wobble)))
    try:
        slices, affine = stack(straight)
    except BadFile as error:
        return Stack(slices=straight, problem=str(error), remarks=remarks, conflict=conflict)
    if not _equal_geometry(same_frame):
        original = {id(one): other for one, other in zip(straight, same_frame)}
        _check_wobble([original[id(piece)] for piece in slices], LPS @ affine)
    return Stack(slices=slices, affine=affine, remarks=remarks, conflict=conflict)


def _in_one_frame(pieces: Sequence[Slice]) -> tuple[list[Slice], str, str]:
    """The slices with one Frame of Reference UID, or with none; what contradicts that, and what is
    remarkable.
    """
    uids = [piece.frame_of_reference for piece in pieces if piece.frame_of_reference]
    systems = sorted(set(uids))
    if len(systems) == 0 or (len(systems) == 1 and len(uids) == len(pieces)):
        return list(pieces), "", ""
    if len(systems) == 1:
        # Certain: a series has one frame of reference (PS3.3 C.7.4.1), and an empty UID contradicts
        # nothing.
        return [replace(piece, frame_of_reference=systems[0]) for piece in pieces], "", ""
    bare = [replace(piece, frame_of_reference="") for piece in pieces]
    if len(systems) == len(uids) >= 3:
        # Certain where the slices also lie evenly on one line: a coordinate system of one slice
        # places nothing, so these UIDs were made slice by slice, and a series has one frame of
        # reference (PS3.3 C.7.4.1).
        return (
            bare,
            "",
            (
                "every slice has a Frame of Reference UID of its own, which were passed over:"
                f" {len(systems)}"
            ),
        )
    conflict = (
        f"its slices lie on one line as one stack, but in {len(systems)} different coordinate "
        "systems by their Frame of Reference UIDs, and a series has one; export the series again"
    )
    return bare, conflict, ""


def straightened(pieces: Sequence[Slice]) -> tuple[list[Slice], str]:
    """The slices with one orientation and pixel spacing, and a remark if that moved pixels.

    Rounding turns slices about their first pixel or about their centre; whichever leaves them on a
    straighter line keeps its place. Raises `BadFile` if pixels are moved by more than
    `MAX_WOBBLE_VOXELS`.
    """
    slices = list(pieces)
    if _equal_geometry(slices, EQUAL):
        return slices, ""
    turns = np.array([piece.orientation for piece in slices])
    edges = np.array([piece.spacing for piece in slices])
    orientation = _mean_orientation(turns)
    spacing = edges.mean(axis=0)
    candidates = [_moved(slices, orientation, spacing, about=about) for about in (0.0, 0.5)]
    straight = min(candidates, key=_crookedness)
    what = _what_differs(turns, edges)
    worst = _check_moved(slices, straight, what)
    return (
        straight,
        f"{what} of its slices wobble by up to {worst:.2g} of a voxel; their mean was taken",
    )


def _equal_geometry(pieces: Sequence[Slice], tolerance: float = 0.0) -> bool:
    first = pieces[0]
    return all(
        (piece.orientation == first.orientation and piece.spacing == first.spacing)
        or (
            tolerance > 0
            and np.abs(np.subtract(piece.orientation or (), first.orientation or ())).max()
            <= tolerance
            and np.abs(np.subtract(piece.spacing or (), first.spacing or ())).max() <= tolerance
        )
        for piece in pieces
    )


def _mean_orientation(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of orientations (N, 6), its two directions at right angles."""
    along, down = turns.mean(axis=0).reshape(2, 3)
    along = along / np.linalg.norm(along)
    down = down - (down @ along) * along
    return np.concatenate([along, down / np.linalg.norm(down)])


def _moved(
    pieces: Sequence[Slice], orientation: NDArray, spacing: NDArray, *, about: float
) -> list[Slice]:
    """The slices with a common geometry; what stays in place is their first pixel (about=0) or
    centre (0.5).
    """
    turn = tuple(orientation.tolist())
    edges = tuple(spacing.tolist())
    slices = []
    for piece in pieces:
        common = replace(piece, orientation=turn, spacing=edges)
        shift = about * (sum(spans(piece)) - sum(spans(common)))
        place = np.array(piece.position) + shift
        slices.append(replace(common, position=tuple(place.tolist())))
    return slices


def spans(piece: Slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From the first pixel of a slice to the last of its row, and to the last of its column, in LPS
    mm.
    """
    along, down = np.reshape(piece.orientation or (), (2, 3))
    row_spacing, column_spacing = piece.spacing or (0.0, 0.0)
    return along * column_spacing * (piece.columns - 1), down * row_spacing * (piece.rows - 1)


def _crookedness(pieces: Sequence[Slice]) -> float:
    """How far in mm the first pixels lie off even steps along the normal, from the first slice to
    the last, at most.
    """
    _, positions, normal = sorted_along_normal(pieces)
    length = float((positions[-1] - positions[0]) @ normal)
    even = positions[0] + np.linspace(0, length, len(positions))[:, None] * normal
    return float(np.linalg.norm(positions - even, axis=1).max())


def _what_differs(turns: NDArray, edges: NDArray) -> str:
    names = ("orientations", "pixel spacings")
    return " and ".join(
        name for name, values in zip(names, (turns, edges)) if np.ptp(values, axis=0).max() > EQUAL
    )


def _corners(piece: Slice) -> NDArray[np.float64]:
    """The centres of a slice's four corner pixels in LPS mm (4, 3)."""
    right, down = spans(piece)
    first = np.array(piece.position)
    return np.stack([first, first + right, first + down, first + right + down])


def _check_moved(pieces: Sequence[Slice], straight: Sequence[Slice], what: str) -> float:
    """How many voxels pixels were moved at most. Raises `BadFile` if that is too much."""
    slices, positions, normal = sorted_along_normal(straight)
    steps = np.diff(positions @ normal)
    steps = steps[steps > SAME_PLACE_MM]
    step = float(np.median(steps)) if len(steps) else min(slices[0].spacing or (1.0,))
    axes = np.linalg.inv((LPS @ grid(slices[0], positions[0], normal * step))[:3, :3])
    shifts = np.array([_corners(one) - _corners(other) for one, other in zip(pieces, straight)])
    voxels = float(np.abs(shifts @ axes.T).max())
    if voxels > MAX_WOBBLE_VOXELS:
        raise BadFile(_too_far(what, float(np.linalg.norm(shifts, axis=-1).max()), voxels))
    return voxels


def _check_wobble(ordered: Sequence[Slice], affine: NDArray[np.float64]) -> None:
    """Raise `BadFile` unless pixels of slices in k order lie on a grid (voxel index to LPS mm)."""
    to_voxels = np.linalg.inv(affine)
    corners = np.array([_corners(piece) for piece in ordered])
    voxels = corners @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    i, j = (ordered[0].columns - 1, ordered[0].rows - 1)
    even = np.array([[(0, 0, k), (i, 0, k), (0, j, k), (i, j, k)] for k in range(len(ordered))])
    off = voxels - even
    worst = float(np.abs(off).max())
    if worst > MAX_WOBBLE_VOXELS:
        far = float(np.linalg.norm(off @ affine[:3, :3].T, axis=-1).max())
        raise BadFile(_too_far("orientations or pixel spacings", far, worst))


def _too_far(what: str, far_mm: float, voxels: float) -> str:
    return (
        f"its slices lie on one line as one stack but have different {what}, which move pixels by "
        f"up to {far_mm:.2g} mm ({voxels:.2g} of a voxel); export the series again"
    )


def stack(pieces: Sequence[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices in order along their normal, and voxel index to RAS+ mm.

    pieces: of one orientation and pixel spacing. Raises `BadFile` for an uneven stack, with a
    sentence to stand after the name of the source.
    """
    if len({piece.slope is None for piece in pieces}) > 1:
        raise BadFile(
            "only some of its slices say how their values are scaled; export the series again"
        )
    slices, positions, normal = sorted_along_normal(pieces)
    steps = np.diff(positions @ normal)
    _check_places(steps)
    if len(pieces) < 3:
        _check_known_step(pieces, steps)
    if len(pieces) == 1:
        return slices, grid(slices[0], positions[0], normal * (pieces[0].step_mm or 0.0))
    step = float(np.median(steps))
    _check_even(steps, step)
    whole = positions[-1] - positions[0]
    tilt = tilt_of(whole, normal)
    if tilt > MAX_TILT:
        raise BadFile(
            f"its slices are stacked at a slant of {math.degrees(tilt):.1f} degrees (gantry tilt); "
            "give a series that was corrected for it"
        )
    between = whole / (len(slices) - 1)
    even = positions[0] + np.arange(len(slices))[:, None] * between
    drift = float(np.linalg.norm(positions - even, axis=1).max())
    if drift > MAX_DRIFT * min(*(slices[0].spacing or ()), step):
        raise BadFile("its slices do not lie on one straight line; give a series of even distances")
    return slices, grid(slices[0], positions[0], between)


def _check_places(steps: NDArray) -> None:
    """Raise `BadFile` if slices lie at one place."""
    if len(steps) == 0:
        return
    if (steps <= SAME_PLACE_MM).all():
        raise BadFile(
            f"its {len(steps) + 1} slices all lie at the same place, which is no volume; give"
            " another series"
        )
    if steps.min() <= SAME_PLACE_MM:
        raise BadFile(
            "several slices lie at the same place: slices are stored twice, or volumes (times, "
            "echoes, directions) are mixed and nothing in the headers tells them apart; give one "
            "of them"
        )


def _check_known_step(pieces: Sequence[Slice], steps: NDArray) -> None:
    """Raise `BadFile` unless the headers of one or two slices say how far slices lie apart."""
    apart = _only_one({piece.step_mm for piece in pieces})
    thickness = _only_one({piece.thickness_mm for piece in pieces})
    if len(pieces) == 2:
        # Certain: the headers say the distance that the places have, or the slices touch, so that
        # none lies between.
        step_mm = apart if apart is not None else thickness
        if step_mm and abs(float(steps[0]) - step_mm) <= MAX_STEP_DIFFERENCE * step_mm:
            return
    elif apart and apart > 0 and thickness and apart >= (1 - MAX_STEP_DIFFERENCE) * thickness:
        # Certain: the header says it, and it is no gap between slices, as some write, for they are
        # not thicker.
        return
    raise BadFile(f"it holds {len(pieces)} slices, too few for a volume; give the whole series")


def _only_one(values: set[float | None]) -> float | None:
    """The value that all share, None if they differ."""
    return next(iter(values)) if len(values) == 1 else None


def _check_even(steps: NDArray, step: float) -> None:
    """Raise `BadFile` unless steps in mm differ by rounding alone."""
    if not (np.abs(steps - step) > MAX_STEP_DIFFERENCE * step).any():
        return
    if missing := missing_slices(steps):
        raise BadFile(f"{missing} slices are missing; export the series again")
    raise BadFile("the distances between its slices differ; give a series of even distances")


def grid(first: Slice, origin: NDArray, between: NDArray) -> NDArray[np.float64]:
    """The affine (RAS+ mm) of a stack: `origin` of its first voxel and step `between` slices in LPS
    mm.
    """
    along_row, down_column = np.reshape(first.orientation or (), (2, 3))
    row_spacing, column_spacing = first.spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = down_column * row_spacing
    affine[:3, 2] = between
    affine[:3, 3] = origin
    return LPS @ affine


def sorted_along_normal(
    pieces: Sequence[Slice],
) -> tuple[list[Slice], NDArray[np.float64], NDArray[np.float64]]:
    """The slices in order along their normal, their positions (N, 3) in LPS mm, and the unit
    normal.
    """
    normal = normal_of(pieces[0])
    slices = sorted(pieces, key=lambda piece: float(normal @ np.array(piece.position)))
    return slices, np.array([piece.position for piece in slices]), normal


def normal_of(piece: Slice) -> NDArray[np.float64]:
    """The unit normal of a slice in LPS."""
    along_row, down_column = np.reshape(piece.orientation or (), (2, 3))
    normal = np.cross(along_row, down_column)
    return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)


def missing_slices(steps: NDArray) -> int:
    """How many slices are missing if every step that is not the usual one is a multiple of it; else
    0.
    """
    step = float(np.median(steps))
    ratios = steps[np.abs(steps - step) > MAX_STEP_DIFFERENCE * step] / step
    if len(ratios) and (np.abs(ratios - np.rint(ratios)) < 0.05).all() and (ratios > 1.5).all():
        return int(np.rint(ratios).sum() - len(ratios))
    return 0


def tilt_of(whole: NDArray, normal: NDArray) -> float:
    """The angle in radians between the direction from the first slice to the last and the unit
    normal.
    """
    return math.acos(min(1.0, float(whole @ normal / np.linalg.norm(whole))))
