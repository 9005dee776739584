"""Voxels and millilitres of each structure."""

from __future__ import annotations

from typing import Any

import numpy as np

from medseg.labels import LabelTable
from medseg.volume import Volume


def structure_volumes(labels: Volume, table: LabelTable) -> list[dict[str, Any]]:
    """Voxels and volume in mL of every structure of the table, absent ones with 0."""
    counts = np.zeros(max(table.values, default=0) + 1, np.int64)
    for plane in labels.data:  # one at a time: bincount makes 64-bit numbers of them
        plane_counts = np.bincount(plane.ravel(), minlength=len(counts))
        counts = plane_counts + np.pad(counts, (0, len(plane_counts) - len(counts)))
    return [
        {
            "value": label.value,
            "name": label.name,
            "voxels": int(counts[label.value]),
            "ml": round(float(counts[label.value]) * labels.voxel_mm3 / 1000, 3),
        }
        for label in table.labels
    ]
