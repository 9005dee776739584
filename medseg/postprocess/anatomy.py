"""What a brain's labels also say: the brain mask, the scan without skull, tissue classes, and
whether it can be right.

Which labels are brain, fluid, grey and white matter a model's JSON says (`brain`). Checks compare a
result with what holds for every human head: volumes, left as large as right, what lies above,
behind and on which side of what. They warn and change nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.config import BrainSpec
from medseg.files import atomic_write
from medseg.labels import Label, LabelTable
from medseg.postprocess.cleanup import fill_holes
from medseg.text import to_cell
from medseg.volume import Volume

#: Values of a tissue map and what they are.
TISSUES = LabelTable(
    (
        Label(1, "CSF", (60, 90, 200)),
        Label(2, "grey matter", (205, 62, 78)),
        Label(3, "white matter", (245, 245, 245)),
    )
)
#: Brain and ventricles of people from one year on, in mL, widened: adults have 900 to 1,700
#: (Bethlehem et al. 2022, Nature 604:525, fig. 1).
BRAIN_ML = (550.0, 2100.0)
#: The larger of two hemispheres over the smaller: a fifth is far more than healthy and most
#: diseased brains differ by.
LARGEST_ASYMMETRY = 1.2
#: So many small structures may be missed where slices are thick.
FEW_MISSING = 3


def brain_mask(labels: Volume, spec: BrainSpec, *, with_fluid: bool = False) -> Volume:
    """1 in the brain and its ventricles, enclosed holes too, else 0; uint8, on the grid of the
    labels.

    with_fluid: also in the fluid around the brain, which the masks of most tools for brain
    extraction take in.
    """
    parts = spec.csf + spec.grey + spec.white + (spec.around if with_fluid else ())
    return labels.with_data(fill_holes(np.isin(labels.data, parts).astype(np.uint8)))


def stripped(scan: Volume, mask: Volume) -> Volume:
    """The scan with what lies outside `mask` at 0, or at the scan's least value if that is below;
    its type stays.

    Tools that strip skulls keep the fluid, and others that read their scans expect it: see
    `brain_mask`'s `with_fluid`.
    """
    outside = min(scan.data.min(), scan.data.dtype.type(0))
    return scan.with_data(np.where(mask.data > 0, scan.data, outside))


def tissue(labels: Volume, spec: BrainSpec) -> Volume:
    """CSF 1, in and around the brain, grey matter 2, white matter 3 (`TISSUES`); uint8."""
    largest = max(int(labels.data.max()), *spec.csf, *spec.around, *spec.grey, *spec.white)
    table = np.zeros(largest + 1, np.uint8)
    for value, members in enumerate((spec.csf + spec.around, spec.grey, spec.white), 1):
        table[list(members)] = value
    return labels.with_data(table[labels.data])


def totals(structures: Sequence[dict[str, Any]], spec: BrainSpec) -> list[dict[str, Any]]:
    """Name and mL of the brain's parts, from the rows of `volumes.structure_volumes`.

    The intracranial volume is brain, ventricles and the fluid around them.
    """
    ml = {row["value"]: row["ml"] for row in structures}
    parts = {
        "grey matter": spec.grey,
        "white matter": spec.white,
        "ventricles": spec.csf,
        "brain with ventricles": spec.csf + spec.grey + spec.white,
        "CSF around the brain": spec.around,
        "intracranial": spec.csf + spec.grey + spec.white + spec.around,
    }
    return [
        {"name": name, "ml": round(sum(ml.get(v, 0.0) for v in values), 3)}
        for name, values in parts.items()
    ]


def write_volumes(path: Path, structures: Sequence[dict[str, Any]], spec: BrainSpec) -> None:
    """A CSV table of value, name and mL: every structure, then the totals, which have no value."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("value", "name", "ml"))
    table.writerows((row["value"], to_cell(row["name"]), row["ml"]) for row in structures)
    table.writerows(("", row["name"], row["ml"]) for row in totals(structures, spec))
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


def implausible(
    labels: Volume, table: LabelTable, spec: BrainSpec, structures: Sequence[dict[str, Any]]
) -> list[str]:
    """What cannot be right about a result, a sentence each; empty where nothing is odd.

    structures: the rows of `volumes.structure_volumes` for these labels. What is wrong is not told
    apart: a scan that is no head, only a part of one, one whose header names the wrong directions,
    or a result that failed.
    """
    brain = spec.csf + spec.grey + spec.white
    counts = {row["value"]: row["voxels"] for row in structures if row["value"] in brain}
    ml = {value: count * labels.voxel_mm3 / 1000 for value, count in counts.items()}
    if doubts := _about_volume(sum(ml.values())):
        return doubts
    names = table.names
    pairs = [(a, b) for a, b in table.mirror_pairs().items() if a < b and {a, b} <= ml.keys()]
    places = _places(labels, [value for value, count in counts.items() if count])
    doubts = _about_asymmetry(pairs, ml)
    doubts += _about_sides(pairs, places, names)
    doubts += _about_order(places, names, counts)
    doubts += _about_missing(names, counts)
    if doubts:
        doubts[-1] += "; does the header name the scan's directions rightly? medseg info shows them"
    return doubts


#: Values of a structure on one side and of its partner on the other.
Pairs = Sequence[tuple[int, int]]
#: The middle in mm along (R, A, S) of each value that is there.
Places = Mapping[int, NDArray[np.float64]]


def _about_volume(whole_ml: float) -> list[str]:
    """A brain that is larger or smaller than any."""
    low, high = BRAIN_ML
    if low <= whole_ml <= high:
        return []
    usual = f"heads of people from one year on have {low:.0f} to {high:.0f} mL"
    return [f"the brain found has {whole_ml:.0f} mL, and {usual}: is it a whole head?"]


def _about_asymmetry(pairs: Pairs, ml: Mapping[int, float]) -> list[str]:
    """One side that is far larger than the other."""
    one, other = (sum(ml[pair[side]] for pair in pairs) for side in (0, 1))
    if not pairs or max(one, other) <= LARGEST_ASYMMETRY * max(min(one, other), 1e-9):
        return []
    return [f"one side of the brain found has {one:.0f} mL and the other {other:.0f} mL"]


def _about_sides(pairs: Pairs, places: Places, names: Mapping[int, str]) -> list[str]:
    """The first structure that lies on the other side of its partner."""
    for value, partner in pairs:
        if value not in places or partner not in places:
            continue
        if _is_on_the_wrong_side(names[value], places[value], places[partner]):
            return [f"{names[value]} lies on the other side of its partner"]
    return []


def _about_order(places: Places, names: Mapping[int, str], counts: Mapping[int, int]) -> list[str]:
    """Parts that lie where they lie in no head."""
    middles = {}
    for part, word in _PARTS.items():
        values = [value for value in places if word in names[value].lower()]
        middles[part] = _middle(values, places, counts)
    doubts = []
    for one_part, other_part, direction, word in _ORDER:
        a, b = middles[one_part], middles[other_part]
        if a is not None and b is not None and float((b - a) @ np.array(direction)) < 0:
            doubts.append(f"the {one_part} found does not lie {word} the {other_part}")
    return doubts


def _about_missing(names: Mapping[int, str], counts: Mapping[int, int]) -> list[str]:
    """More structures missing than chance leaves out."""
    missing = [names[value] for value, count in counts.items() if not count]
    if len(missing) <= FEW_MISSING:
        return []
    return [f"{len(missing)} structures that every brain has were not found, such as {missing[0]}"]


#: Parts of the brain, and the words that the names of their structures hold.
_PARTS = {"cerebellum": "cerebell", "cerebrum": "cerebral", "brain-stem": "brain-stem"}
#: (part, other part, direction along (R, A, S) from the first to the second, how the first lies):
#: so in every head.
_ORDER = (
    ("cerebellum", "cerebrum", (0, 0, 1), "below"),
    ("cerebellum", "cerebrum", (0, 1, 0), "behind"),
    ("brain-stem", "cerebrum", (0, 0, 1), "below"),
    ("cerebellum", "brain-stem", (0, 1, -1), "behind, rather than below,"),
)


def _places(labels: Volume, values: Sequence[int]) -> Places:
    """The middle in mm along (R, A, S) of each value; of every second voxel."""
    thin, size = labels.data[::2, ::2, ::2], max(values, default=0) + 1
    middles = np.empty((3, size))
    for axis in range(3):  # a plane at a time: bincount makes 64-bit numbers of them
        planes = np.array(
            [np.bincount(p.ravel(), minlength=size)[:size] for p in np.moveaxis(thin, axis, 0)]
        )
        total = planes.sum(0)
        middles[axis] = 2 * (np.arange(len(planes)) @ planes) / np.maximum(total, 1)
    return {
        v: labels.affine[:3, :3] @ middles[:, v] + labels.affine[:3, 3] for v in values if total[v]
    }


def _is_on_the_wrong_side(
    name: str, place: NDArray[np.float64], partner: NDArray[np.float64]
) -> bool:
    """Whether a structure called left lies further to the right than its partner, or the other way
    round.
    """
    towards_right = float(partner[0] - place[0])
    return towards_right < 0 if "left" in name.lower() else towards_right > 0


def _middle(
    values: Sequence[int], places: Places, counts: Mapping[int, int]
) -> NDArray[np.float64] | None:
    """The middle of several structures; None of none."""
    if not values:
        return None
    weights = np.array([counts[value] for value in values], float)
    products = np.array([places[value] for value in values]) * weights[:, None]
    middle: NDArray[np.float64] = products.sum(0) / weights.sum()
    return middle
