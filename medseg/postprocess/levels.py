"""Areas of structures in single axial slices, as body composition is reported at a vertebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg.errors import BadConfig
from medseg.labels import LabelTable
from medseg.volume import Volume, plane_of


def slices_at(grid: Volume, heights_mm: Sequence[float]) -> list[tuple[int, float]]:
    """The number of the slice nearest to each height, and its height.

    heights_mm: along S (feet to head) of the scan's space, as viewers show them; slices are those
    of the stored axis that runs most along it, and the height of one is that of its middle. Raises
    `BadConfig` for a height outside the scan.
    """
    axis = _axial(grid)
    middle = [(size - 1) / 2 for size in grid.shape]
    middle[axis] = 0
    step = float(grid.affine[2, axis])
    heights = grid.affine[2, 3] + grid.affine[2, :3] @ middle + step * np.arange(grid.shape[axis])
    slices = []
    for target_mm in heights_mm:
        number = int(np.abs(heights - target_mm).argmin())
        height = float(heights[number])
        if abs(height - target_mm) > abs(step) / 2 + 1e-6:
            raise BadConfig(
                f"--at {target_mm:g}: the scan's slices lie at {heights.min():.1f} to"
                f" {heights.max():.1f} mm along S; give a height between them, as a viewer shows it"
            )
        slices.append((number, height))
    return slices


def _axial(grid: Volume) -> int:
    """The stored axis that runs most along feet and head."""
    return next(n for n, letter in enumerate(grid.orientation) if letter in "IS")


def areas_at(
    volume: Volume, labels: Volume, table: LabelTable, heights_mm: Sequence[float]
) -> list[dict[str, Any]]:
    """Of the slice nearest to each height (see `slices_at`) number, height, and its structures.

    Rows of structures have `cm2`, the area within the slice's plane, and `mean`, of the scan's
    values. Raises `BadConfig` for a height outside the scan.
    """
    axis = _axial(labels)
    mm2 = labels.voxel_mm3 / labels.spacing_mm[axis]
    levels = []
    for number, height in slices_at(labels, heights_mm):
        plane = plane_of(labels.data, axis, number).ravel()
        values = np.nan_to_num(plane_of(volume.data, axis, number).astype(np.float64)).ravel()
        size = max(max(table.values, default=0), int(plane.max())) + 1
        voxels, total = np.bincount(plane, minlength=size), np.bincount(plane, values, size)
        structures: list[dict[str, Any]] = []
        for label in table.labels:
            count = int(voxels[label.value])
            row = {"value": label.value, "name": label.name, "cm2": round(count * mm2 / 100, 3)}
            if count:
                row["mean"] = round(float(total[label.value]) / count, 4)
            structures.append(row)
        levels.append({"mm": round(height, 3), "slice": number, "structures": structures})
    return levels
