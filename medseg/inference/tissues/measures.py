"""What is measured of a CT's tissues: mean density, emphysema, totals; and the table of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write
from medseg.inference.tissues.windows import (
    EMPHYSEMA_BELOW,
    LUNGS,
    OTHER_FAT,
    SUBCUTANEOUS_FAT,
    TISSUES,
    VISCERAL_FAT,
)
from medseg.text import to_cell
from medseg.volume import Volume

_TOTALS = {
    "body": TISSUES.values,
    "lungs": LUNGS,
    "fat": (SUBCUTANEOUS_FAT, VISCERAL_FAT, OTHER_FAT),
}


def measure(
    volume: Volume, labels: Volume, structures: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Add `mean_hu` to the rows of structures, and to lungs `laa_950_percent`; returns totals.

    LAA-950 is the share of a lung's voxels below -950 HU (Gevenois et al. 1996), vessels included
    and airways not: in thin slices without contrast medium, breathed in, it measures emphysema.
    """
    sums = _sums(volume, labels)
    for row in structures:
        row |= _values(sums[row["value"]], row["value"] in LUNGS)
    row_values = {row["value"] for row in structures}
    ml = labels.voxel_mm3 / 1000
    totals = []
    for name, values in _TOTALS.items():
        if not row_values.issuperset(values):  # of some structures only there are no totals
            continue
        of = sums[list(values)].sum(0)
        totals.append({"name": name, "ml": round(float(of[0]) * ml, 3)})
        totals[-1] |= _values(of, name == "lungs")
    return totals


def _values(sums: NDArray[np.int64], is_lung: bool) -> dict[str, float]:
    """What is said of a structure, from its voxels, their sum, and how many are low."""
    voxels, total, low = (int(number) for number in sums)
    if not voxels:
        return {}
    values = {"mean_hu": round(total / voxels, 1)}
    return values | ({"laa_950_percent": round(100 * low / voxels, 2)} if is_lung else {})


def _sums(volume: Volume, labels: Volume) -> NDArray[np.int64]:
    """Of each label voxels, the sum of their values, and voxels below -950 HU."""
    sums = np.zeros((max(TISSUES.values) + 1, 3), np.int64)
    for k in range(volume.shape[2]):
        plane, of = volume.data[..., k], labels.data[..., k].ravel()
        values = np.nan_to_num(plane).ravel()
        sums[:, 0] += np.bincount(of, minlength=len(sums))
        sums[:, 1] += np.bincount(of, values, len(sums)).round().astype(np.int64)
        sums[:, 2] += np.bincount(of[values < EMPHYSEMA_BELOW], minlength=len(sums))
    return sums


#: Columns of the table beside the levels'.
_COLUMNS = ("value", "name", "ml", "mean_hu", "laa_950_percent")


def write_table(
    path: Path,
    structures: Sequence[dict[str, Any]],
    totals: Sequence[dict[str, Any]],
    levels: Sequence[dict[str, Any]],
) -> None:
    """A CSV table: every structure, then totals without a value; a column of cm2 for each level."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    areas = [{row["value"]: row["cm2"] for row in level["structures"]} for level in levels]
    table.writerow((*_COLUMNS, *(f"cm2 at {level['mm']:g} mm" for level in levels)))
    for row in (*structures, *totals):
        cells = [to_cell(row[key]) if key == "name" else row.get(key, "") for key in _COLUMNS]
        table.writerow((*cells, *(area.get(row.get("value"), "") for area in areas)))
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())
