"""The structures of a label map: their names, and those that somebody asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from medseg.errors import BadConfig, BadGeometry
from medseg.labels import Label, LabelTable
from medseg.text import harmless
from medseg.volume import Volume, resample, turned_onto, value_counts

#: Fluid of the brain, in SNOMED CT: cerebrospinal fluid, and the ventricles and the horns that it
#: fills.
_FLUID_CODES = {"65216001", "66720007", "53118009", "49841001", "35918002"}
#: How others call them, where there are no codes. A ventricle alone may be the heart's.
_FLUID_NAME = re.compile(
    r"\b(csf|cerebrospinal|(lateral|lat|3rd|4th|third|fourth) (ventricles?|vent))\b"
)


def is_fluid(label: Label) -> bool:
    """Whether a structure is fluid in or around the brain, which hides in 3D what lies in it."""
    if label.type is not None:
        return label.type.scheme == "SCT" and label.type.value in _FLUID_CODES
    return bool(_FLUID_NAME.search(re.sub(r"[\W_]+", " ", label.name.lower())))


def full_table(labels: Volume, table: LabelTable | None) -> LabelTable:
    """The table with a row, 'label 3', for every value of a label map that it does not name, by
    value.
    """
    table_labels = table.labels if table is not None else ()
    table_values = {label.value for label in table_labels}
    values = np.flatnonzero(value_counts(labels.data))
    other_labels = LabelTable.from_values(
        int(value) for value in values if value not in table_values
    ).labels
    return LabelTable(tuple(sorted((*table_labels, *other_labels), key=lambda label: label.value)))


def labels_on_scan(labels: Volume, scan: Volume) -> Volume:
    """The labels at their place in mm on the scan's grid, as pictures show them. Raises
    `BadGeometry` if none of them lies there.
    """
    if (turned := turned_onto(labels, scan)) is not None:
        return scan.with_data(turned.data)
    on_grid = resample(labels, scan.affine, scan.shape, order=0)
    if labels.data.any() and not on_grid.data.any():
        raise BadGeometry("no label lies in the scan; give labels that were made from this scan")
    return on_grid


def chosen_values(
    labels: Volume, table: LabelTable, names: Sequence[str] | None
) -> tuple[int, ...]:
    """The values of the structures of a label map that are asked for by name or number, of all that
    are there without `names`. Raises `BadConfig` for what is not there.
    """
    counts = value_counts(labels.data, 1)
    if names is None:
        values = tuple(int(value) for value in np.flatnonzero(counts) if value)
        if not values:
            raise BadConfig("the label map holds no structure")
        return values
    values = tuple(dict.fromkeys(table.value_of(name) for name in names if name.strip()))
    if not values:
        raise BadConfig("no structure is named")
    for value in values:
        if value >= len(counts) or not counts[value]:
            raise BadConfig(f"no voxel of the label map is {harmless(table[value].name)} ({value})")
    return values
