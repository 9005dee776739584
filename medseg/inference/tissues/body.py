"""The patient told from the table, and the air inside from the air around."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.inference.tissues.grid import (
    Labels,
    Mask,
    distances_mm,
    on_sides,
    parts,
    parts_in_slices,
    spread,
)
from medseg.inference.tissues.windows import AIR_BELOW, EMPTY_BELOW

#: What is thinner than twice this is a sheet, a wire or a finger, and no body of its own.
CORE_MM = 6.0
#: A table is at most twice this thick, and wide: the greater of this and of a part of the body.
TABLE_HALF_MM, TABLE_WIDE_MM, TABLE_SHARE = 16.0, 150.0, 0.6
#: A part is the patient's if a ball of this radius fits in, or of this share of the largest's.
LIMB_MM, LIMB_SHARE = 12.0, 0.25
#: What was cut off as thin comes back if it is no longer than this: noses, ears, fingers.
THIN_MM = 100.0
#: Air around has at least this share of values as low as air; lung that a crop cuts has not.
EMPTY_SHARE = 0.25
#: Air that an axial slice encloses is outside if it is open above or below: its volume over the
#: area of its openings is at most so long. The lungs' is many metres.
OPEN_MM, OPEN_MM2 = 250.0, 100.0


@dataclass(frozen=True, kw_only=True)
class Body:
    """tissue: what is not air. inside: air in the body. other: table, clothes, tubes."""

    tissue: Mask
    inside: Mask
    other: Mask

    @property
    def whole(self) -> Mask:
        """Tissue and the air inside."""
        return self.tissue | self.inside


def find_body(hu: NDArray[np.int16], spacing_mm: NDArray[np.float64]) -> Body:
    """The body in blocks (R, A, S)."""
    solid = hu >= AIR_BELOW
    tissue = _without_table(solid, spacing_mm)
    inside = _air_inside(hu, tissue, spacing_mm)
    return Body(tissue=tissue, inside=inside, other=solid & ~tissue & ~inside)


def _boxes(numbers: NDArray) -> list[tuple[slice, slice, slice]]:
    from scipy import ndimage

    return [box for box in ndimage.find_objects(numbers) if box is not None]


def _without_table(solid: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """What is the patient's of all that is not air."""
    if solid.all() or not solid.any():
        return solid
    depth = distances_mm(~solid, spacing_mm)
    core_mm = min(CORE_MM, float(depth.max()) / 2)
    numbers, count = parts(depth > core_mm)
    radius = np.zeros(count + 1, np.float32)
    extent = np.zeros((count + 1, 3))
    for n, box in enumerate(_boxes(numbers), 1):
        own = numbers[box] == n
        radius[n] = depth[box][own].max()
        extent[n] = [(s.stop - s.start) * mm for s, mm in zip(box, spacing_mm, strict=True)]
    marks = np.concatenate([[0], _whose(radius[1:], extent[1:])]).astype(np.uint8)
    steps = int(np.ceil(core_mm / spacing_mm.min())) + 2
    labels = spread(marks[numbers], solid, steps)
    return _with_thin_parts(solid, labels, spacing_mm)


def _whose(radius: NDArray[np.float32], extent: NDArray[np.float64]) -> Labels:
    """Of each part, by its thickness and extent (n, 3) in mm: 2 for the patient's, 1 for table and
    clothes, 0 for what is as short as a thin part and is told as those are: by what it hangs on.
    """
    largest = int(radius.argmax())
    wide = np.maximum(TABLE_WIDE_MM, TABLE_SHARE * extent[largest, 0])
    is_table = (radius <= TABLE_HALF_MM) & (extent[:, 0] >= wide)
    is_table |= (radius <= TABLE_HALF_MM) & (extent.max(1) > 20 * radius)
    least = min(LIMB_MM, LIMB_SHARE * float(radius[largest]))
    keeps = (radius >= least) & ~is_table
    keeps[largest] = True
    is_short = (extent.max(1) <= THIN_MM) & ~is_table
    return np.where(keeps, 2, np.where(is_short, 0, 1)).astype(np.uint8)


def _with_thin_parts(solid: Mask, known: Labels, spacing_mm: NDArray[np.float64]) -> Mask:
    """The patient (2 in `known`) with noses, ears, fingers and the thin bone before sinuses, which
    hang on it and are short.
    """
    body = known == 2
    left = solid & (known == 0)
    if not left.any():
        return body
    numbers, count = parts(left)
    touches = np.zeros(count + 1, bool)
    beside = spread(np.where(body, 1, 0).astype(np.uint8), left, 1)
    touches[np.unique(numbers[(beside != 0) & left])] = True
    for n, box in enumerate(_boxes(numbers), 1):
        long = max((s.stop - s.start) * mm for s, mm in zip(box, spacing_mm, strict=True))
        touches[n] &= long <= THIN_MM
    touches[0] = False
    return body | touches[numbers]


def _air_inside(hu: NDArray[np.int16], tissue: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """The air that the body encloses in axial slices, unless it is open above or below.

    Where the array's side cuts the body, air that reaches the side can be lung: if it is not as
    empty as air, and does not reach a corner, where no lung was seen and much scattered air.
    """
    numbers, count = parts_in_slices(~tissue)
    flat = numbers.ravel()
    airy = (hu < AIR_BELOW).ravel()
    size = np.bincount(flat[airy], minlength=count + 1)
    empty = np.bincount(flat[(hu < EMPTY_BELOW).ravel()], minlength=count + 1)
    outside = np.zeros(count + 1, bool)
    sides = on_sides(numbers)
    outside[sides] = empty[sides] >= EMPTY_SHARE * size[sides]
    cut = _slices_cut(tissue)  # only where the body is cut can a lung reach the side
    whole = np.unique(numbers[:, :, ~cut]) if not cut.all() else np.zeros(0, int)
    outside[np.intersect1d(sides, whole)] = True
    outside[np.unique(numbers[[0, 0, -1, -1], [0, -1, 0, -1]])] = True
    outside[0] = False
    around = outside[numbers]
    return _not_open(~tissue & ~around, around & (hu < AIR_BELOW), spacing_mm)


def _slices_cut(tissue: Mask) -> Mask:
    """Of each axial slice whether the body reaches a side of the array."""
    cut = np.asarray(tissue[[0, -1]].any((0, 1)) | tissue[:, [0, -1]].any((0, 1)))
    return cut


def _not_open(inner: Mask, around: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """Enclosed air without gaps between limbs, which the air around comes into from the ends."""
    numbers, count = parts(inner)
    openings = np.zeros(count + 1, np.int64)
    above = np.where(around[:, :, 1:], numbers[:, :, :-1], 0)
    below = np.where(around[:, :, :-1], numbers[:, :, 1:], 0)
    for one in (above, below):
        openings += np.bincount(one.ravel(), minlength=count + 1)
    size = np.bincount(numbers.ravel(), minlength=count + 1)
    area = openings * spacing_mm[0] * spacing_mm[1]
    is_open = (area >= OPEN_MM2) & (size * spacing_mm.prod() <= OPEN_MM * area)
    is_open[0] = True
    return ~is_open[numbers]
