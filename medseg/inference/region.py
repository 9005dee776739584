"""The part of a scan that is looked at: around what a coarse model finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from medseg.inference.settings import Model, Settings, as_list, is_set
from medseg.models import plain_name
from medseg.volume import Volume, value_counts

if TYPE_CHECKING:
    from medseg.models import Checkpoint

Box: TypeAlias = tuple[slice, slice, slice]
#: Kept around what is looked for in mm, and at least so many of the coarse model's voxels.
MARGIN_MM, MARGIN_VOXELS = 20.0, 3


def region_around(
    volumes: Sequence[Volume], model: Model, settings: Settings, run: Callable[..., Any]
) -> tuple[Box, float] | None:
    """The box of the scan around the structures `settings.roi`, and the seconds it took to find.

    None where nothing can be left out: with `exact`, without a coarse model of the same task, for
    cascades, and where the coarse model does not find one of the structures, which may be there
    all the same. run: `segment`.
    """
    if not settings.roi or settings.exact or settings.region or isinstance(model, str):
        return None
    coarse: list[Checkpoint] = model.coarse() if is_set(model) else as_list(model)[0].coarse()
    if not coarse:
        return None
    table = model.table if is_set(model) else as_list(model)[0].table
    values_by_name = {plain_name(label.name): label.value for label in coarse[0].table.labels}
    values = [values_by_name.get(plain_name(table.names[value])) for value in settings.roi]
    targets = [value for value in values if value is not None]
    if len(targets) < len(values):
        return None
    plain = replace(
        settings, roi=(), probabilities=(), uncertainty=False, postprocess=False, tta=None
    )
    segmentation = run(volumes, coarse, plain)
    counts = value_counts(segmentation.labels.data, max(targets) + 1)
    if not all(counts[value] for value in targets):
        return None
    margin_mm = max(MARGIN_MM, MARGIN_VOXELS * max(coarse[0].spec.spacing))
    return region_of(segmentation.labels, targets, margin_mm), sum(segmentation.seconds.values())


def region_of(labels: Volume, values: Sequence[int], margin_mm: float) -> Box:
    """The box around labels with a margin, cut at the volume's edges; the whole volume if none of
    them is there.
    """
    box = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        planes = np.flatnonzero(np.isin(labels.data, values).any(axis=others))
        margin = int(np.ceil(margin_mm / labels.spacing_mm[axis]))
        ends = (
            (planes[0] - margin, planes[-1] + 1 + margin)
            if len(planes)
            else (0, labels.shape[axis])
        )
        box.append(slice(max(0, int(ends[0])), min(labels.shape[axis], int(ends[1]))))
    return box[0], box[1], box[2]
