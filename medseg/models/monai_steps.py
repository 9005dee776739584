"""MONAI's way with a scan, for models that medseg trains: what `model.recipe=monai` stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.errors import BadConfig
from medseg.models.spec import FixedScale, IntensitySpec, ZScore
from medseg.models.steps import Ending, Range, Space, Standard, StepRecipe, Turn

#: Windows as nnU-Net lays them, which is what medseg's own models are used to.
_OVERLAP = 0.5


def monai_recipe(
    spacing_mm: float | Sequence[float],
    intensities: Sequence[IntensitySpec],
    *,
    regions: bool = False,
) -> StepRecipe:
    """The steps of MONAI that come closest to medseg's grid 'scan' and to these intensities.

    A scan is turned to RAS, resampled with its first voxel kept, scaled; windows are blended by a
    Gaussian; outputs go back to the scan linearly and the largest wins there, or with `regions`
    each that is above 0, later ones on top. Raises `BadConfig`
    for intensities that MONAI's transforms do not make.
    """
    x, y, z = (spacing_mm,) * 3 if isinstance(spacing_mm, int | float) else spacing_mm
    return StepRecipe(
        steps=(
            Turn(orientation="RAS"),
            Space(spacing_mm=(x, y, z)),
            _scaling(intensities),
        ),
        inputs=len(intensities),
        overlap=_OVERLAP,
        weights="gaussian",
        ending=Ending(interpolate=True, threshold=math.ulp(0.0) if regions else 0.5),
    )


def _scaling(intensities: Sequence[IntensitySpec]) -> Range | Standard:
    first = intensities[0]
    if any(one != first for one in intensities):
        raise BadConfig("MONAI's transforms scale all channels in one way, and these have several")
    if isinstance(first, ZScore):
        return Standard(nonzero=first.nonzero, each=True)
    if isinstance(first, FixedScale):
        return Range(
            low=first.low,
            high=first.high,
            to_low=(first.low - first.mean) / first.sd,
            to_high=(first.high - first.mean) / first.sd,
            clip=True,
        )
    raise BadConfig(
        f"MONAI's transforms have nothing like the intensity '{first.scheme}'; train with zscore or"
        " ct"
    )
