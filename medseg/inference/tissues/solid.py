"""What is not air: bone and marrow, the wall of the body, and what it encloses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.inference.tissues.air import Air
from medseg.inference.tissues.body import Body
from medseg.inference.tissues.grid import (
    Labels,
    Mask,
    closed,
    distances_mm,
    on_sides,
    parts,
    parts_in_slices,
    spread,
)
from medseg.inference.tissues.windows import (
    AIRWAYS,
    BONE_FROM,
    CORTICAL_FROM,
    FAT,
    LUNGS,
    MUSCLE_LABEL,
    OTHER_FAT,
    SOFT_TISSUE,
    SUBCUTANEOUS_FAT,
    VISCERAL_FAT,
)

#: Bone is at most so far from its rind, or in a layer no thicker than twice the other, as the rim
#: of a vertebra is; vessels with contrast medium that touch it go on further and are thicker.
FROM_RIND_MM, LAYER_MM = 8.0, 5.0
#: Marrow: what bone encloses in a slice, up to this area, brighter than the spinal canal, as dark
#: as fat, or in a shaft that has such a middle.
MARROW_MM2, MARROW_FROM, FATTY_TO, SHAFT_MM2 = 3000.0, 55.0, -30.0, 300.0
#: Spongy bone whose rim has gaps: brighter than muscle with contrast medium, and between parts of
#: the rim that are so far apart, the depth of a vertebra (twice this).
SPONGY_FROM, SPONGY_MM = 90, 16.0
#: Skin is at most so thick.
SKIN_MM = 4.0
#: Gaps of twice this width do not open the ring of muscle and bone around the body.
RING_MM = 12.0
#: Vessels and lymph nodes in fat under the skin are smaller than this, in a slice.
SPECK_MM2 = 150.0
#: The wall of the trunk without ribs is about so thick.
WALL_MM, FAT_WALL_MM = 15.0, 8.0
#: The trunk is wider than this, or has the spine in its middle third; limbs have neither.
TRUNK_MM = 180.0
#: Limbs and necks are round, less than this wider than deep, with the bone in their middle; the
#: spine of a trunk lies behind this share of it.
ROUND, BEHIND = 1.25, 0.38
#: A skull encloses this share of a slice, at its base this, and not more than this area, which
#: large heads have (160 by 190 mm within); the face goes on so far below it.
SKULL_SHARE, SKULL_BASE_SHARE, SKULL_MM2, FACE_MM = 0.35, 0.1, 25000.0, 60.0
#: Beside and before the middle of a vertebra lie its muscles: half the width, how far before.
SPINE_HALF_MM, PSOAS_HALF_MM, PSOAS_MM = 75.0, 45.0, 30.0
#: Lungs fill this share of a slice of the chest.
CHEST_SHARE = 0.12


@dataclass(frozen=True, kw_only=True)
class Solid:
    """Labels by blocks (R, A, S): of fat, of lean tissue (0: no body); 0, 1 near bone, 2 marrow."""

    fat: Labels
    lean: Labels
    bone: Labels


def find_solid(
    hu: NDArray[np.int16], body: Body, air: Air, spacing_mm: NDArray[np.float64]
) -> Solid:
    """What fat and lean tissue are called, and where bone is."""
    bone, marrow = find_bone(hu, body.tissue, spacing_mm)
    wall = find_wall(hu, body, bone | marrow, spacing_mm=spacing_mm)
    kinds = _kinds_of_slices(body, air, bone, filled=wall.filled, spacing_mm=spacing_mm)
    fat = np.full(hu.shape, OTHER_FAT, np.uint8)
    fat[~wall.filled | wall.under_skin] = SUBCUTANEOUS_FAT
    cavity = _cavity_of_fat(wall, kinds, spacing_mm)
    fat[cavity & ~wall.under_skin] = VISCERAL_FAT
    lean = np.full(hu.shape, SOFT_TISSUE, np.uint8)
    muscle = wall.filled & kinds.limb & body.whole
    in_wall = wall.filled & kinds.trunk & ~_cavity_of_lean(wall, kinds, air, spacing_mm=spacing_mm)
    lean[muscle | in_wall] = MUSCLE_LABEL
    if kinds.lies_open:  # no skin anywhere: a piece from within, of which nothing is known
        fat[:], lean[:] = OTHER_FAT, SOFT_TISSUE
    near = spread(bone.astype(np.uint8), np.ones_like(bone), 1)
    near[marrow] = 2
    surroundings = spread(body.whole.astype(np.uint8), ~body.other, 1) != 0
    lean[~surroundings] = 0
    return Solid(fat=fat, lean=lean, bone=near)


def find_bone(
    hu: NDArray[np.int16], tissue: Mask, spacing_mm: NDArray[np.float64]
) -> tuple[Mask, Mask]:
    """Blocks of bone, and the marrow that they enclose.

    Bright parts that nowhere are as bright as a rind are vessels, bowel and kidneys with contrast
    medium, unless nothing in the scan has a rind.
    """
    import cc3d

    bright = tissue & (hu >= BONE_FROM)
    if not bright.any():
        return bright, bright.copy()
    numbers, count = cc3d.connected_components(
        np.ascontiguousarray(bright), connectivity=26, return_N=True
    )
    rind = bright & (hu >= CORTICAL_FROM)
    if rind.any():
        has_rind = np.zeros(count + 1, bool)
        has_rind[np.unique(numbers[rind])] = True
        has_rind[0] = False
        bright &= has_rind[numbers]
        near = distances_mm(rind, spacing_mm) <= FROM_RIND_MM
        bone: Mask = _goes_on(hu, bright & near, bright & ~near, spacing_mm)
        bone = bone | _enclosed(bright & ~near, bone, spacing_mm)
    else:
        bone = bright
    return bone, _marrow(hu, bone, tissue, spacing_mm=spacing_mm)


def _goes_on(
    hu: NDArray[np.int16], bone: Mask, rest: Mask, spacing_mm: NDArray[np.float64]
) -> Mask:
    """Bright tissue beyond the reach of a rind that is bone all the same, if it hangs on bone.

    It is a layer, as the rim of a vertebra; or thick, and at its edge brighter than in its middle.
    A vessel is thick, and darkest at its edge, which it shares with what is around it.
    """
    import cc3d

    depth = distances_mm(~(bone | rest), spacing_mm)
    middle = distances_mm(~rest, spacing_mm) > LAYER_MM
    one_block = 1.01 * float(spacing_mm.max())
    thick = rest & (distances_mm(middle, spacing_mm) <= LAYER_MM + one_block)
    numbers, count = parts(thick)
    sums = []
    for where in (depth <= one_block, depth > LAYER_MM):
        own = np.where(where, numbers, 0).ravel()
        size = np.bincount(own, minlength=count + 1)
        sums.append(np.bincount(own, hu.ravel(), minlength=count + 1) / np.maximum(size, 1))
    has_rim = sums[0] >= sums[1]
    has_rim[0] = False
    candidates = bone | (rest & ~thick) | has_rim[numbers]
    numbers, count = cc3d.connected_components(
        np.ascontiguousarray(candidates), connectivity=26, return_N=True
    )
    hangs_on = np.zeros(count + 1, bool)
    hangs_on[np.unique(numbers[bone])] = True
    hangs_on[0] = False
    mask: Mask = hangs_on[numbers]
    return mask


def _enclosed(rest: Mask, bone: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """Bright tissue far from a rind that the rind goes round: heads of long bones."""
    numbers, count = parts_in_slices(~bone)
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    small = sizes * spacing_mm[0] * spacing_mm[1] <= MARROW_MM2
    small[0] = False
    small[on_sides(numbers)] = False
    mask: Mask = rest & small[numbers]
    return mask


def _marrow(
    hu: NDArray[np.int16], bone: Mask, tissue: Mask, spacing_mm: NDArray[np.float64]
) -> Mask:
    """Bone without its rim, and what it encloses in axial slices but for spinal canal and skull.

    Spongy bone and marrow are bone whatever their values; the rim is told voxel by voxel.
    """
    spongy = closed(bone, spacing_mm, SPONGY_MM, in_slices=True) & tissue & (hu >= SPONGY_FROM)
    bone = bone | spongy
    gap_mm = max(SKIN_MM / 2, 1.01 * float(spacing_mm[:2].max()))
    holes = _marrow_holes(hu, closed(bone, spacing_mm, gap_mm, in_slices=True), spacing_mm)
    whole = closed(bone | (holes & tissue), spacing_mm, gap_mm, in_slices=True)
    inner: Mask = distances_mm(~whole, spacing_mm, in_slices=True) > 1.5 * spacing_mm[:2].max()
    return inner & tissue


def _marrow_holes(hu: NDArray[np.int16], rim: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """Holes of a rim, in axial slices, that hold marrow: by size and values."""
    numbers, count = parts_in_slices(~rim)
    flat = numbers.ravel()
    size = np.bincount(flat, minlength=count + 1)
    mm2 = size * spacing_mm[0] * spacing_mm[1]
    mean = np.bincount(flat, hu.ravel(), minlength=count + 1) / np.maximum(size, 1)
    lowest = np.full(count + 1, np.iinfo(np.int16).max, np.int16)
    np.minimum.at(lowest, flat[flat > 0], hu.ravel()[flat > 0])
    is_shaft = (lowest <= FATTY_TO) & (mm2 <= SHAFT_MM2)
    keep = (mm2 <= MARROW_MM2) & ((mean >= MARROW_FROM) | (mean <= FATTY_TO) | is_shaft)
    keep[0] = False
    keep[on_sides(numbers)] = False
    holes: Mask = keep[numbers]
    return holes


@dataclass(frozen=True, kw_only=True)
class Wall:
    """filled: muscle, bone and all within them. under_skin: fat in notches of it. lean: tissue."""

    filled: Mask
    under_skin: Mask
    lean: Mask
    skin: Mask


def find_wall(
    hu: NDArray[np.int16], body: Body, bone: Mask, spacing_mm: NDArray[np.float64]
) -> Wall:
    """The ring of muscle and bone, slice by slice, closed over gaps such as the white line's."""
    whole = body.whole
    thick = max(SKIN_MM, 1.5 * float(spacing_mm[:2].max()))
    skin = whole & (distances_mm(~whole, spacing_mm, in_slices=True) <= thick)
    lean = body.tissue & (hu > FAT[1])
    firm = ((lean | bone) & ~skin) | (body.inside & ~skin)
    firm = _without_specks(firm, spacing_mm)
    # Closing goes over skin in grooves, and over the air beside an arm: neither is of the ring.
    ring = closed(firm, spacing_mm, RING_MM, in_slices=True) & whole & ~skin
    numbers, count = parts_in_slices(~ring)
    open_parts = np.zeros(count + 1, bool)
    open_parts[np.unique(numbers[skin | ~whole])] = True
    outer = open_parts[numbers]
    interior = whole & ~outer
    fat = body.tissue & (hu >= FAT[0]) & (hu <= FAT[1])
    steps = int(np.ceil(RING_MM / spacing_mm[:2].min()))
    reach = spread((outer & whole).astype(np.uint8), fat & ~_holes(ring, spacing_mm), steps)
    return Wall(filled=interior, under_skin=(reach != 0) & interior, lean=lean, skin=skin)


def _without_specks(mask: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    numbers, count = parts_in_slices(mask)
    size = np.bincount(numbers.ravel(), minlength=count + 1) * spacing_mm[0] * spacing_mm[1]
    keep = size >= SPECK_MM2
    if not keep[1:].any():
        return mask
    keep[0] = False
    large_parts: Mask = keep[numbers]
    return large_parts


def _holes(ring: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """What the ring encloses, and the ring within its own width of that."""
    numbers, _ = parts_in_slices(~ring)
    is_hole = np.ones(int(numbers.max()) + 1, bool)
    is_hole[0] = False
    is_hole[on_sides(numbers)] = False
    holes: Mask = is_hole[numbers]
    return holes


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """What each axial slice shows, as arrays (1, 1, S) of bool; the spine's place in it.

    limb: neither trunk nor skull. spine: (S, 2) R and A in blocks; nan where there is none.
    """

    trunk: Mask
    limb: Mask
    chest: Mask
    spine: NDArray[np.float64]
    lies_open: bool


def _kinds_of_slices(
    body: Body, air: Air, bone: Mask, filled: Mask, spacing_mm: NDArray[np.float64]
) -> Kinds:
    count = filled.shape[2]
    area = filled.sum((0, 1))
    lungs = np.isin(air.labels, LUNGS).sum((0, 1))
    chest = lungs > CHEST_SHARE * np.maximum(area, 1)
    trunk = np.zeros(count, bool)
    spine = np.full((count, 2), np.nan)
    for k in np.flatnonzero(area):
        trunk[k], spine[k] = _trunk_and_spine(filled[:, :, k], bone[:, :, k], spacing_mm)
    top_of_lungs = int(np.flatnonzero(lungs)[-1]) if lungs.any() else -1
    head = _head(_skull(bone, spacing_mm) / np.maximum(area, 1), top_of_lungs, spacing_mm[2])
    # Above the lungs the airways run through the neck.
    air_above = (air.labels == AIRWAYS).any((0, 1)) & (lungs == 0)
    trunk = (trunk & ~air_above) | chest
    trunk = _steady(trunk, area > 0, spacing_mm[2]) & ~head
    flat = (1, 1, count)
    return Kinds(
        trunk=trunk.reshape(flat),
        limb=(~trunk & ~head).reshape(flat),
        chest=chest.reshape(flat),
        spine=spine,
        lies_open=bool(body.whole.all()),
    )


def _trunk_and_spine(
    filled: Mask, bone: Mask, spacing_mm: NDArray[np.float64]
) -> tuple[bool, NDArray[np.float64]]:
    """Whether an axial slice (R, A) is the trunk's; the middle of its spine in blocks, or nan."""
    columns, rows = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    wide = (columns[-1] - columns[0] + 1) * spacing_mm[0]
    deep = (rows[-1] - rows[0] + 1) * spacing_mm[1]
    third = (columns[-1] - columns[0] + 1) / 3
    middle = slice(int(columns[0] + third), int(columns[-1] - third) + 2)
    back = slice(int(rows[0]), int(rows[0] + 0.65 * (rows[-1] - rows[0])) + 1)
    at = np.argwhere(bone[middle, back])
    if len(at) * spacing_mm[0] * spacing_mm[1] < SPECK_MM2:
        return bool(wide >= TRUNK_MM and not bone.any()), np.full(2, np.nan)
    spine = at.mean(0) + np.array([middle.start, back.start])
    is_round = wide < ROUND * deep
    is_behind = (spine[1] - rows[0]) * spacing_mm[1] < BEHIND * deep
    is_trunk = wide >= 0.75 * TRUNK_MM and (is_behind or not is_round) and _is_one(filled, spine)
    return bool(is_trunk), spine


def _head(share: NDArray[np.float64], top_of_lungs: int, spacing_mm: float) -> Mask:
    """The slices of the head: those of the skull, what is between them and above, and the face.

    share: of each slice what bone encloses. It lies above the lungs, where there are any.
    """
    at = np.arange(len(share))
    numbers, _ = _runs((share > SKULL_BASE_SHARE) & (at > top_of_lungs))
    seeds = np.unique(numbers[share > SKULL_SHARE])
    skull = np.isin(numbers, seeds[seeds > 0])
    if not skull.any():
        return skull
    lowest = int(np.flatnonzero(skull)[0]) - round(FACE_MM / spacing_mm)
    head: Mask = (at >= lowest) & (at > top_of_lungs)
    return head


def _runs(flags: Mask) -> tuple[NDArray[np.int32], int]:
    """Numbers of the runs of True in a row, from 1."""
    from scipy import ndimage

    numbers, count = ndimage.label(flags)
    return numbers, int(count)


def _is_one(filled: Mask, place: NDArray[np.float64]) -> bool:
    """Whether the spine lies in a body that is one in this slice, and not in one of two legs."""
    from scipy import ndimage

    numbers, _ = ndimage.label(filled)
    own = numbers[int(place[0]), int(place[1])]
    sizes = np.bincount(numbers.ravel())
    return bool(own and sizes[own] >= 0.6 * sizes[1:].sum())


def _skull(bone: Mask, spacing_mm: NDArray[np.float64]) -> NDArray[np.int64]:
    """Blocks of each slice that bone encloses, where that is more than marrow and no rib cage."""
    numbers, count = parts_in_slices(~closed(bone, spacing_mm, SKIN_MM, in_slices=True))
    mm2 = np.bincount(numbers.ravel(), minlength=count + 1) * spacing_mm[0] * spacing_mm[1]
    keep = (mm2 > MARROW_MM2) & (mm2 <= SKULL_MM2)
    keep[0] = False
    keep[on_sides(numbers)] = False
    skull_area: NDArray[np.int64] = keep[numbers].sum((0, 1))
    return skull_area


def _steady(flags: Mask, known: Mask, spacing_mm: float) -> Mask:
    """Each slice as most of those within 2 cm are."""
    from scipy import ndimage

    width = 2 * round(20 / spacing_mm) + 1
    votes = ndimage.uniform_filter1d((flags & known).astype(float), width, mode="nearest")
    of = ndimage.uniform_filter1d(known.astype(float), width, mode="nearest")
    steady: Mask = votes > 0.5 * of
    return steady


def _behind(kinds: Kinds, shape: tuple[int, ...]) -> Mask:
    """What lies behind the middle of the spine, in slices where it is known, or near to those."""
    limit = _along(kinds.spine[:, 1])
    result: Mask = np.arange(shape[1])[None, :, None] < limit[None, None, :]
    return result


def _along(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of slices, where there are none as in the nearest that has one; else far outside."""
    indices = np.flatnonzero(np.isfinite(values))
    if not len(indices):
        return np.full(len(values), -1e9)
    return np.interp(np.arange(len(values)), indices, values[indices])


def _cavity_of_fat(wall: Wall, kinds: Kinds, spacing_mm: NDArray[np.float64]) -> Mask:
    """Where fat is about organs: within the wall of the trunk, before the spine."""
    depth = distances_mm(~wall.filled, spacing_mm, in_slices=True)
    cavity: Mask = (depth > FAT_WALL_MM) & kinds.trunk
    return cavity & ~_behind(kinds, wall.filled.shape)


def _cavity_of_lean(wall: Wall, kinds: Kinds, air: Air, spacing_mm: NDArray[np.float64]) -> Mask:
    """Where lean tissue is organ: within the ribs, or within the usual thickness of the wall."""
    depth = distances_mm(~wall.filled, spacing_mm, in_slices=True)
    lungs = np.isin(air.labels, LUNGS)
    within = np.zeros_like(lungs)
    if lungs.any():
        between = np.maximum.accumulate(lungs, 0) & np.maximum.accumulate(lungs[::-1], 0)[::-1]
        within = distances_mm(between, spacing_mm, in_slices=True) <= SKIN_MM
    cavity = within | ((depth > WALL_MM) & ~kinds.chest)
    shape = wall.filled.shape
    aside = _along(kinds.spine[:, 0])
    across = np.abs(np.arange(shape[0])[:, None, None] - aside[None, None, :]) * spacing_mm[0]
    before = _along(kinds.spine[:, 1])
    ahead = (np.arange(shape[1])[None, :, None] - before[None, None, :]) * spacing_mm[1]
    muscles = (across <= SPINE_HALF_MM) & (ahead <= 0)
    muscles |= (across <= PSOAS_HALF_MM) & (ahead <= PSOAS_MM) & ~kinds.chest
    organs: Mask = cavity & kinds.trunk & ~muscles
    return organs
