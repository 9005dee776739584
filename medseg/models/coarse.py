"""A coarse model of the same task beside a fine one, which finds the region that is looked at.

TotalSegmentator's folder holds its task at 6 and 3 mm beside the five parts at 1.5 mm; nnU-Net's
dataset folders hold 3d_lowres beside 3d_fullres.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg.errors import MedsegError
from medseg.models.nnunet_plans import Outputs, configuration, read_outputs, read_plans

#: How many times as large a voxel must be for a model to count as coarse.
COARSER = 2.0


def plain_name(name: str) -> str:
    """A structure's name as names are compared."""
    return name.casefold().replace(" ", "_").replace("-", "_")


def same_task(folder: Path, fine: Sequence[Path]) -> bool:
    """Whether the model of a folder reads the same channels as others and knows all their
    structures by name.
    """
    try:
        own, others = read_outputs(folder / "dataset.json"), [_outputs(one) for one in fine]
    except MedsegError:
        return False
    names = {plain_name(name) for name in own.names.values()}
    fine_names = {plain_name(name) for one in others for name in one.names.values()}
    return fine_names <= names and all(one.channel_names == own.channel_names for one in others)


def coarsest(folders: Sequence[Path], fine: Sequence[Path]) -> Path | None:
    """Of the folders of models the one with the largest voxels that is for the task of `fine`, and
    coarser; None where there is none.
    """
    limits = [mm3 for one in fine if (mm3 := _voxel_mm3(one)) is not None]
    if not limits:
        return None
    sizes = {
        folder: mm3
        for folder in folders
        if folder not in fine
        and (mm3 := _voxel_mm3(folder)) is not None
        and mm3 >= COARSER * max(limits)
        and same_task(folder, fine)
    }
    return max(sizes, key=lambda folder: (sizes[folder], folder.name), default=None)


def _outputs(folder: Path) -> Outputs:
    return read_outputs(folder / "dataset.json")


def _voxel_mm3(folder: Path) -> float | None:
    """The volume of a voxel of a model's grid; None of planes, of cascades' second stages, and
    where the folder does not say which configuration it holds.
    """
    try:
        plans, outputs = read_plans(folder / "plans.json"), _outputs(folder)
        names = list(plans.content["configurations"])
        last = folder.name.split("__")[-1]
        name = last if last in names else names[0]
        if last not in names and len(names) > 1:
            return None
        plan = configuration(plans, name, len(outputs.channel_names))
    except MedsegError:
        return None
    if plan.previous_stage or plan.dimension == 2:
        return None
    return float(np.prod([mm for mm in plan.spacing_mm if mm is not None]))
