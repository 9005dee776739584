"""The air in the body: lungs, airways, and gas anywhere else."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DataWarning
from medseg.inference.tissues.airways import Window, find_airways, lumen_below
from medseg.inference.tissues.body import Body
from medseg.inference.tissues.grid import Labels, Mask, Scan, closed, distances_mm, parts, spread
from medseg.inference.tissues.windows import (
    AIR_BELOW,
    AIRWAYS,
    GAS,
    LEFT_LUNG,
    LUNGS,
    RIGHT_LUNG,
)
from medseg.volume import reorient

#: Aerated lung has this median, away from its surface; gas is darker, what is mottled brighter.
LUNG_HU = (-955, -550)
#: Blocks from which on a median away from the surface can be told.
FEW_BLOCKS = 12
#: The share of the body's slices that a lung fills, and less where the scan cuts the lung.
LUNG_SHARE, CUT_LUNG_SHARE = 0.03, 0.01
#: Vessels and fissures narrower than twice this belong to the lung.
VESSEL_MM = 5.0
#: Lungs that touch are told apart by shrinking them up to this.
TOUCHING_MM = 15.0
#: Each side has at least this part of both, or there is only one.
LEAST_SIDE = 0.1
#: Of two lungs in a cut-out either is at least such a part of both.
SLIVER = 0.02
#: A lung begins so close to the body's surface, where no arm lies beside it.
WALL_OF_LUNG_MM = 70.0
#: Gas that goes on from the airways is part of them up to so much: larynx and pharynx.
UPPER_MM3 = 60000.0
#: Trachea and larynx are looked for so far above the lungs, and in necks, which are so small.
ABOVE_LUNGS_MM, NECK_MM2 = 150.0, 30000.0


@dataclass(frozen=True, kw_only=True)
class Air:
    """labels: (R, A, S) uint8 of the blocks that hold air. filled: lungs with their vessels.

    airways: the lumen on voxels, (R, A, S) of a box of the scan turned to RAS, and that box.
    """

    labels: Labels
    filled: Labels
    airways: Mask | None
    box: tuple[slice, slice, slice] | None


def find_air(scan: Scan, body: Body) -> Air:
    """Labels of the air inside the body."""
    spacing_mm = scan.spacing_mm
    hu = scan.blocks.data
    labels = np.where(body.inside & (hu < AIR_BELOW), GAS, 0).astype(np.uint8)
    if not labels.any():
        return Air(labels=labels, filled=labels, airways=None, box=None)
    first = _lung_like(labels == GAS, hu, body, spacing_mm=spacing_mm)
    lung_hu = float(np.median(hu[first])) if first.any() else None
    airways, box = _airways(scan, body, first, lung_hu=lung_hu)
    if airways is not None and box is not None:
        labels[_in_blocks(airways, box, scan) & (labels != 0)] = AIRWAYS
    # A wall thinner than a block does not part lung from airway: the blocks beside do.
    near = spread(np.where(labels == AIRWAYS, 1, 0).astype(np.uint8), labels == GAS, 1)
    lungs = _lung_like((labels == GAS) & (near == 0), hu, body, spacing_mm=spacing_mm)
    lungs |= (spread(lungs.astype(np.uint8), (labels == GAS) & (near != 0), 2) != 0) & (
        hu > lumen_below(lung_hu)
    )
    sides = _sides(lungs, body, spacing_mm)
    labels = _with_ends(np.where(sides != 0, sides, labels), spacing_mm)
    return Air(labels=labels, filled=_with_vessels(sides, spacing_mm), airways=airways, box=box)


def _lung_like(air: Mask, hu: NDArray, body: Body, spacing_mm: NDArray[np.float64]) -> Mask:
    """The parts of air that are lung: aerated tissue rather than gas, and a good part of a chest.

    A part that does not reach the top or bottom slice has to fill more of the body's slices: gas
    and stool of the bowel do not.
    """
    from scipy import ndimage

    numbers, count = parts(air)
    if not count:
        return np.zeros_like(air)
    deep = distances_mm(~air, spacing_mm) > 1.5 * max(spacing_mm.min(), 2.0)
    section = body.whole.sum((0, 1))
    keep = np.zeros(count + 1, bool)
    for n, box in enumerate(ndimage.find_objects(numbers), 1):
        own = numbers[box] == n
        inner = own & deep[box]
        values = hu[box][inner]
        if len(values) < FEW_BLOCKS:
            continue
        share = own.sum() / max(int(section[box[2]].sum()), 1)
        is_cut = box[2].start == 0 or box[2].stop == air.shape[2]
        median = float(np.median(values))
        keep[n] = LUNG_HU[0] <= median <= LUNG_HU[1] and share >= (
            CUT_LUNG_SHARE if is_cut else LUNG_SHARE
        )
    return _beside_the_largest(keep, numbers, spacing_mm)[numbers]


def _beside_the_largest(keep: Mask, numbers: NDArray, spacing_mm: NDArray[np.float64]) -> Mask:
    """Of parts like lung those that are not small things far below large lungs."""
    if keep.sum() < 2:
        return keep
    size = np.bincount(numbers.ravel(), minlength=len(keep)) * keep
    largest = int(size.argmax())
    lowest = np.flatnonzero((numbers == largest).any((0, 1)))[0]
    for n in np.flatnonzero(keep):
        if n != largest and size[n] < 0.1 * size[largest]:
            slices = np.flatnonzero((numbers == n).any((0, 1)))
            keep[n] = slices[-1] >= lowest
    return keep


def _airways(
    scan: Scan, body: Body, lungs: Mask, lung_hu: float | None
) -> tuple[Mask | None, tuple[slice, slice, slice] | None]:
    """The lumen on voxels and the box it is in."""
    place = _where_to_look(body, lungs, scan.spacing_mm)
    if place is None:
        return None, None
    slices, middle, half, bottom = place
    whole = reorient(scan.hu)
    factors = np.round(scan.spacing_mm / np.array(whole.spacing_mm)).astype(int)
    blocks = (
        slice(max(0, middle[0] - half[0]), middle[0] + half[0] + 1),
        slice(max(0, middle[1] - half[1]), middle[1] + half[1] + 1),
        slices,
    )
    starts = [int(s.start) * int(f) for s, f in zip(blocks, factors, strict=True)]
    offsets = _offsets(scan, whole.orientation)
    box = tuple(
        slice(max(0, start - off), min(n, int(s.stop) * int(f) - off))
        for start, off, s, f, n in zip(starts, offsets, blocks, factors, whole.shape, strict=True)
    )
    inside = _on_voxels(body.inside, box, factors, offsets=offsets)
    window = Window(
        hu=whole.data,
        box=box,  # type: ignore[arg-type]
        spacing_mm=np.array(whole.spacing_mm),
        inside=inside,
        middle=(
            float(middle[0] * factors[0] - offsets[0] - box[0].start),
            float(middle[1] * factors[1] - offsets[1] - box[1].start),
        ),
    )
    bottom_voxel = None if bottom is None else bottom * int(factors[2]) - box[2].start
    airways = find_airways(window, lumen_below(lung_hu), bottom_voxel)
    return airways, box if airways is not None else None  # type: ignore[return-value]


def _offsets(scan: Scan, orientation: str) -> list[int]:
    """By how many voxels the first block of each axis along RAS is cut: blocks begin in memory."""
    offsets = [0, 0, 0]
    for axis, letter in enumerate(scan.hu.orientation):
        world = ("LR".find(letter), "PA".find(letter), "IS".find(letter))
        row = next(n for n, at in enumerate(world) if at >= 0)
        if world[row] == 0:  # runs the other way: the cut block comes first
            size, factor = scan.hu.shape[axis], int(scan.factors[axis])
            offsets[row] = -size % factor
    return offsets


def _on_voxels(blocks: Mask, box: tuple[slice, ...], factors: NDArray, offsets: list[int]) -> Mask:
    """A mask of blocks on the voxels of a box."""
    at = [
        (np.arange(s.start, s.stop) + off) // int(f)
        for s, off, f in zip(box, offsets, factors, strict=True)
    ]
    mask: Mask = blocks[np.ix_(*at)]
    return mask


def _in_blocks(voxels: Mask, box: tuple[slice, slice, slice], scan: Scan) -> Mask:
    """Blocks of which at least a third are voxels of a mask of a box."""
    factors = np.round(scan.spacing_mm / np.array(reorient(scan.hu).spacing_mm)).astype(int)
    offsets = _offsets(scan, "RAS")
    counts = np.zeros(scan.blocks.shape, np.int32)
    at = np.argwhere(voxels)
    for axis in range(3):
        at[:, axis] = (at[:, axis] + box[axis].start + offsets[axis]) // factors[axis]
    np.add.at(counts, tuple(at.T), 1)
    result: Mask = counts * 3 >= factors.prod()
    return result


def _where_to_look(
    body: Body, lungs: Mask, spacing_mm: NDArray[np.float64]
) -> tuple[slice, tuple[int, int], tuple[int, int], int | None] | None:
    """Slices, the middle and half the size of the box in blocks, and where a trachea must reach."""
    half = (round(75 / spacing_mm[0]), round(75 / spacing_mm[1]))
    if lungs.any():
        at = np.argwhere(lungs)
        top = int(at[:, 2].max())
        low = int(np.percentile(at[:, 2], 25))
        high = min(lungs.shape[2], top + round(ABOVE_LUNGS_MM / spacing_mm[2]) + 1)
        middle = (at[:, 0].min() + at[:, 0].max()) // 2, (at[:, 1].min() + at[:, 1].max()) // 2
        return slice(low, high), (int(middle[0]), int(middle[1])), half, top
    area = body.whole.sum((0, 1)) * spacing_mm[0] * spacing_mm[1]
    neck = np.flatnonzero((area > 0) & (area < NECK_MM2) & body.inside.any((0, 1)))
    if len(neck) * spacing_mm[2] < 20:
        return None
    place = np.argwhere(body.whole[:, :, neck])
    middle = place[:, 0].mean(), place[:, 1].mean()
    return (
        slice(int(neck[0]), int(neck[-1]) + 1), (int(middle[0]), int(middle[1])), half, None,
    )  # fmt: skip


def _sides(lungs: Mask, body: Body, spacing_mm: NDArray[np.float64]) -> Labels:
    """Left and right lungs: parts by where they lie; what touches is divided where it is thin."""
    out = np.zeros(lungs.shape, np.uint8)
    if not lungs.any():
        return out
    middle = _midline(lungs, body, spacing_mm)
    depth = distances_mm(~lungs, spacing_mm)
    for mm in (0.0, *np.arange(spacing_mm.min(), TOUCHING_MM, spacing_mm.min())):
        numbers, count = parts(depth > mm)
        size = np.bincount(numbers.ravel(), minlength=count + 1)
        size[0] = 0
        place = np.array([middle] * (count + 1), float)
        for n in np.flatnonzero(size):
            planes = (numbers == n).sum((1, 2)) if size[n] > 0.02 * size.sum() else None
            if planes is not None:
                place[n] = (np.arange(len(planes)) @ planes) / planes.sum()
        right = place > middle
        shares = [size[right].sum(), size[~right].sum()]
        if min(shares) >= LEAST_SIDE * sum(shares) or not _is_joined(lungs, middle):
            break
    marks = np.where(right, RIGHT_LUNG, LEFT_LUNG).astype(np.uint8)
    small = size <= 0.02 * size.sum()
    marks[small] = 0
    sides = spread(marks[numbers], lungs, sum(lungs.shape))
    return _rest_by_side(sides, lungs, middle)


def _with_ends(labels: Labels, spacing_mm: NDArray[np.float64]) -> Labels:
    """Gas that touches the airways is theirs: larynx and pharynx, and ends of bronchi."""
    numbers, count = parts(labels == GAS)
    neighbours = spread((labels == AIRWAYS).astype(np.uint8), labels == GAS, 1)
    own = np.zeros(count + 1, bool)
    own[np.unique(numbers[(neighbours != 0) & (labels == GAS)])] = True
    own &= np.bincount(numbers.ravel(), minlength=count + 1) * spacing_mm.prod() <= UPPER_MM3
    own[0] = False
    return np.where(own[numbers], AIRWAYS, labels).astype(np.uint8)


def _is_joined(lungs: Mask, middle: float) -> bool:
    """Whether lung lies on both sides of the middle, so that it is worth dividing."""
    at = int(middle)
    left, right = int(lungs[: at + 1].sum()), int(lungs[at + 1 :].sum())
    return min(left, right) >= LEAST_SIDE * (left + right)


def _rest_by_side(known: Labels, lungs: Mask, middle: float) -> Labels:
    """Small parts by the side of the middle they lie on."""
    rest = lungs & (known == 0)
    at = np.arange(lungs.shape[0])[:, None, None] > middle
    known[rest & at] = RIGHT_LUNG
    known[rest & ~at] = LEFT_LUNG
    return known


def _midline(lungs: Mask, body: Body, spacing_mm: NDArray[np.float64]) -> float:
    """Where left and right meet along R, in blocks: the middle of the body where the lungs are.

    Where the side of the array cuts the body the middle of what is left says nothing. Two lungs
    then part where there is least of them. One alone that lies just within the other side's wall is
    that side's; cut on both sides it may be either, which is warned of.
    """
    slices = lungs.any((0, 1))
    section = body.whole[:, :, slices]
    planes = np.flatnonzero(section.any((1, 2)))
    of_lung = np.flatnonzero(lungs.any((1, 2)))
    middle = float(planes[0] + planes[-1]) / 2
    is_cut = [bool(section[end].any()) for end in (0, -1)]
    if not any(is_cut):
        return middle
    between = _between_two(lungs)
    if between is not None:
        return between
    if all(is_cut):
        warnings.warn(
            "the sides of the scan cut the body and leave one lung; whether it is the left or the"
            " right one is not certain",
            DataWarning,
            stacklevel=3,
        )
        return middle
    on_right = is_cut[0]  # the wall that is there is the right one
    wall = planes[-1] - of_lung[-1] if on_right else of_lung[0] - planes[0]
    if wall * spacing_mm[0] > WALL_OF_LUNG_MM:
        return middle
    return float(of_lung[0] - 1) if on_right else float(of_lung[-1] + 1)


def _between_two(lungs: Mask) -> float | None:
    """Where two lungs part along R: there is half as much of them as on either side, or less, and
    some of each. None for one lung.
    """
    profile = lungs.sum((1, 2))
    least = 0.5 * np.minimum(
        np.maximum.accumulate(profile), np.maximum.accumulate(profile[::-1])[::-1]
    )
    share = np.cumsum(profile) / profile.sum()
    parts_here = (profile < least) & (share >= SLIVER) & (share <= 1 - SLIVER)
    places = np.flatnonzero(parts_here)
    return float(places[profile[places].argmin()]) if len(places) else None


def _with_vessels(sides: Labels, spacing_mm: NDArray[np.float64]) -> Labels:
    """Lungs with their vessels: what a closing fills, without its outermost blocks."""
    out = np.zeros_like(sides)
    for value in LUNGS:
        own = sides == value
        if not own.any():
            continue
        box = _box_around(own, spacing_mm, 2 * VESSEL_MM)
        whole = closed(own[box], spacing_mm, VESSEL_MM, in_slices=False)
        depth = distances_mm(~whole, spacing_mm)
        out[box][depth > 1.01 * spacing_mm.max()] = value
    return out


def _box_around(
    mask: Mask, spacing_mm: NDArray[np.float64], margin_mm: float
) -> tuple[slice, slice, slice]:
    """The box of a mask with a margin."""
    box = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        at = np.flatnonzero(mask.any(others))
        margin = int(np.ceil(margin_mm / spacing_mm[axis])) + 1
        box.append(slice(max(0, int(at[0]) - margin), int(at[-1]) + 1 + margin))
    return box[0], box[1], box[2]
