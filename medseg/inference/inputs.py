"""What a model's network sees of a case, and its labels on the same grid: for training, by the
functions of inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.inference.frame import Frame, lay_frame, orientation_for, prepare_frame
from medseg.inference.journey import Journey, lay_journey
from medseg.inference.preprocess import ModelGrid, labels_on_grid, prepare
from medseg.inference.regrid import regrid
from medseg.inference.transforms import travel
from medseg.models import Recipe
from medseg.volume import Volume, resample

if TYPE_CHECKING:
    from torch import Tensor

    from medseg.models import ModelSpec


def network_input(
    volumes: Sequence[Volume], spec: ModelSpec, names: Sequence[str] = ()
) -> tuple[Tensor, ModelGrid | Frame | Journey]:
    """The network's input (C, X, Y, Z) float32 of the scans of one case, and where it lies.

    names: of the channels. Raises `BadFile` as `prepare`, `prepare_frame` and `travel` do.
    """
    import torch

    if spec.recipe is None:
        return prepare(volumes, spec.spacing, spec.grid, intensity=spec.intensities, names=names)
    if not isinstance(spec.recipe, Recipe):
        return travel(volumes, lay_journey(volumes, spec.recipe))
    frame = lay_frame(volumes, spec.recipe, orientation_for(spec.recipe, dicom=False))
    return torch.from_numpy(prepare_frame(volumes, spec.recipe, frame, exact=False)), frame


def network_labels(labels: Volume, grid: ModelGrid | Frame | Journey, spec: ModelSpec) -> NDArray:
    """A label map (X, Y, Z) where `network_input` lies, its dtype kept; of models with a recipe
    resampled as the recipe says, of MONAI's the nearest voxel.
    """
    if isinstance(grid, Journey):
        assert grid.affine is not None
        return resample(labels, grid.affine, grid.shape, order=0).data
    if not isinstance(grid, Frame):
        return labels_on_grid(labels, grid)
    assert isinstance(spec.recipe, Recipe)
    on_grid = regrid(
        grid.seen(labels).astype(np.float32),
        grid.shape,
        spec.recipe.labels,
        current=grid.spacing_mm,
        new=grid.target_mm,
        exact=True,
        labels=True,
    )
    return on_grid.astype(labels.data.dtype)
