"""Voxels and millilitres of each structure."""

from __future__ import annotations

from typing import Any

from medseg.labels import LabelTable
from medseg.volume import Volume, value_counts


def structure_volumes(labels: Volume, table: LabelTable) -> list[dict[str, Any]]:
    """Voxels and volume in mL of every structure of the table, absent ones with 0."""
    counts = value_counts(labels.data, max(table.values, default=0) + 1)
    return [
        {
            "value": label.value,
            "name": label.name,
            "voxels": int(counts[label.value]),
            "ml": round(float(counts[label.value]) * labels.voxel_mm3 / 1000, 3),
        }
        for label in table.labels
    ]
