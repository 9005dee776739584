"""Scores of lesions: connected parts of one structure, matched between two label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from medseg.errors import BadConfig
from medseg.evaluation.surfaces import Surface, hausdorff, surface_distances
from medseg.postprocess import Components, connected_components
from medseg.text import as_number, as_whole


@dataclass(frozen=True)
class LesionOptions:
    """How lesions are found and matched; `matching` "overlap" is that of BraTS 2023 for a dilation
    of 3.

    matching: "overlap" (a predicted lesion belongs to every reference lesion that it touches, after
    dilation) or "iou" (one to one, the pairs of most total IoU with each at least `min_iou`;
    Kirillov et al. 2019 for 0.5). connectivity: 6, 18 or 26. min_mm3: smaller lesions are left out,
    in the reference and in the prediction; a predicted lesion that only touches a left-out one is
    not invented ("overlap"). dilation: voxels by which the reference grows before lesions are told
    apart and matched ("overlap" only). penalty_mm: HD95 of a missed or an invented lesion; BraTS
    takes 374, the diagonal of its images.
    """

    matching: Literal["overlap", "iou"] = "overlap"
    min_iou: float = 0.5
    connectivity: int = 26
    min_mm3: float = 0
    dilation: int = 0
    penalty_mm: float = 374.0

    def __post_init__(self) -> None:
        if self.matching not in ("overlap", "iou"):
            raise BadConfig(f"lesions are matched by overlap or iou, not '{self.matching}'")
        values: dict[str, float] = {
            "min_iou": as_number(self.min_iou, "the least IoU of a lesion", most=1),
            "min_mm3": as_number(self.min_mm3, "the least volume of a lesion in mm3"),
            "dilation": as_whole(self.dilation, "the dilation of lesions in voxels"),
            "penalty_mm": as_number(self.penalty_mm, "the penalty of a lesion in mm"),
        }
        if not self.min_iou:
            raise BadConfig("the least IoU of a lesion is above 0")
        if self.connectivity not in (6, 18, 26):
            raise BadConfig(f"connectivity is 6, 18 or 26, not {self.connectivity!r:.40}")
        for name, value in values.items():
            object.__setattr__(self, name, value)


def lesion_scores(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    options: LesionOptions | None = None,
    surface: Surface = "surfel",
) -> dict[str, float]:
    """Scores of the lesions (connected components) of one structure: (I, J, K) masks.

    lesions_reference, lesions_prediction: how many; lesions_found: reference lesions with a match;
    lesions_invented: predicted ones without. lesion_f1 (RQ) = TP / (TP + FP / 2 + FN / 2),
    lesion_sq: mean IoU of found lesions with what matched them, lesion_pq = RQ * SQ. lesion_dice,
    lesion_hausdorff95_mm: mean over all reference lesions and invented ones, which with missed ones
    count 0 and `penalty_mm` (BraTS 2023, Moawad et al., arXiv 2305.19369). Without any lesion in
    both masks scores are nan.
    """
    options = options or LesionOptions()
    voxel_mm3 = float(np.prod(spacing_mm))
    reach = _grown(reference, options)
    ours, our_parts = connected_components(reach, options.connectivity)
    theirs, their_parts = connected_components(prediction, options.connectivity)
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    contact = reach & prediction
    first, second, shared = _shared(ours[contact], theirs[contact])
    # Lesions are as large as they were before they grew.
    our_voxels = np.bincount(ours[reference], minlength=len(our_parts) + 1)
    their_voxels = np.append(0, their_parts.voxels)
    ours_count = _large_enough(our_voxels * voxel_mm3, options)
    theirs_count = _large_enough(their_voxels * voxel_mm3, options)
    large = np.isin(second, theirs_count)
    first, second, shared = first[large], second[large], shared[large]
    if options.matching != "overlap":
        iou = shared / (our_voxels[first] + their_voxels[second] - shared)
        valid = (iou >= options.min_iou) & np.isin(first, ours_count)
        first, second = _one_to_one(first[valid], second[valid], iou[valid])
    dice, iou_found, distance = [], [], []
    for lesion in ours_count:
        matches = second[first == lesion]
        if not len(matches):
            continue
        box = _box(our_parts, int(lesion) - 1, [(their_parts, int(match) - 1) for match in matches])
        mine = (ours[box] == lesion) & reference[box]
        other = np.isin(theirs[box], matches)
        both = int((mine & other).sum())
        total = int(mine.sum()) + int(other.sum())
        dice.append(2 * both / total)
        iou_found.append(both / (total - both))
        surfaces = surface_distances(mine, other, spacing_mm, structures=[[1]], surface=surface)[0]
        distance.append(hausdorff(surfaces, 95))
    counts = len(ours_count), len(theirs_count), len(np.setdiff1d(theirs_count, second))
    return _lesion_row(
        *counts, dice=dice, iou=iou_found, distance_mm=distance, penalty_mm=options.penalty_mm
    )


def _grown(reference: NDArray[np.bool_], options: LesionOptions) -> NDArray[np.bool_]:
    """The reference's lesions as far as predicted ones may be from them and still touch them."""
    if options.matching != "overlap" or not options.dilation:
        return reference
    near = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[options.connectivity])
    reach: NDArray[np.bool_] = ndimage.binary_dilation(reference, near, iterations=options.dilation)
    return reach


def _large_enough(sizes_mm3: NDArray, options: LesionOptions) -> NDArray[np.int64]:
    """The numbers of the lesions that count, from their sizes; number 0 is background."""
    numbers = np.flatnonzero(sizes_mm3 >= options.min_mm3 * (1 - 1e-6))
    return numbers[numbers > 0]


def _lesion_row(
    in_reference: int,
    in_prediction: int,
    invented: int,
    *,
    dice: Sequence[float],
    iou: Sequence[float],
    distance_mm: Sequence[float],
    penalty_mm: float,
) -> dict[str, float]:
    """The scores, from how many lesions there are and what those that were found score."""
    missed = in_reference - len(dice)
    every = in_reference + invented
    nan = float("nan")
    f1 = 2 * len(dice) / (2 * len(dice) + invented + missed) if every else nan
    sq = float(np.mean(iou)) if iou else (0.0 if every else nan)
    return {
        "lesions_reference": in_reference,
        "lesions_prediction": in_prediction,
        "lesions_found": len(dice),
        "lesions_missed": missed,
        "lesions_invented": invented,
        "lesion_f1": f1,
        "lesion_sq": sq,
        "lesion_pq": f1 * sq,
        "lesion_dice": sum(dice) / every if every else nan,
        "lesion_hausdorff95_mm": (
            (sum(distance_mm) + (missed + invented) * penalty_mm) / every if every else nan
        ),
    }


def _shared(ours: NDArray, theirs: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs of component numbers that share voxels, and how many."""
    pairs, shared = np.unique(
        ours.astype(np.int64) << 32 | theirs.astype(np.int64), return_counts=True
    )
    return pairs >> 32, pairs & 0xFFFFFFFF, shared


def _one_to_one(first: NDArray, second: NDArray, iou: NDArray) -> tuple[NDArray, NDArray]:
    """The pairs of most total IoU in which every component occurs once."""
    rows, row = np.unique(first, return_inverse=True)
    columns, column = np.unique(second, return_inverse=True)
    gain = np.zeros((len(rows), len(columns)))
    gain[row, column] = iou
    i, j = linear_sum_assignment(gain, maximize=True)
    real = gain[i, j] > 0
    return rows[i[real]], columns[j[real]]


def _box(parts: Components, row: int, others: list[tuple[Components, int]]) -> tuple[slice, ...]:
    """The smallest box around components."""
    every = [(parts, row), *others]
    start = np.min([table.start[n] for table, n in every], axis=0)
    stop = np.max([table.stop[n] for table, n in every], axis=0)
    return tuple(slice(a, b) for a, b in zip(start, stop))
