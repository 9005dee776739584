"""Telling tissue from the fluid beside it by the scan's own intensities, where a model's grid is
too coarse to.

Sulci are one or two voxels wide in a 1 mm scan and vanish on a coarser grid, so that cortex fills
them. Each scan's own labels say how bright its tissue and its fluid are; a two-class Gaussian
decision (as in Ashburner and Friston 2005, NeuroImage 26:839, with the model's labels for the
priors) then gives voxels of the tissue that look like fluid to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume, computable

#: Medians this many standard deviations apart can be told from each other; nearer ones are left as
#: they are.
MIN_SEPARATION = 1.0
_SAMPLE = 500_000


def separate_fluid(labels: Volume, image: Volume, tissue: Sequence[int], fluid: int) -> Volume:
    """`labels` with the voxels of `tissue` that are more likely `fluid` by their intensity in
    `image` given to it.

    labels, image: the same grid. Medians and deviations (scaled median absolute deviation) of both
    are those of the labels; prior odds are those of their volumes. Only intensities from the
    tissue's median towards the fluid's are judged, and those beyond the fluid's median are fluid.
    Unchanged where the two look alike, or either is absent.
    """
    is_tissue, image = np.isin(labels.data, tissue), computable(image)
    grey, fluid_grey = image.data[is_tissue].astype(np.float32), image.data[labels.data == fluid]
    if not len(grey) or not len(fluid_grey):
        return labels
    (middle, spread), (fluid_middle, fluid_spread) = _robust(grey), _robust(fluid_grey)
    # None is 0, whatever the scan's unit.
    least = np.float32(1e-6 * max(abs(middle), abs(fluid_middle)))
    spread, fluid_spread = max(spread, least), max(fluid_spread, least)
    if abs(middle - fluid_middle) <= MIN_SEPARATION * np.sqrt((spread**2 + fluid_spread**2) / 2):
        return labels
    towards = np.sign(fluid_middle - middle)
    log_ratio = (
        0.5 * ((grey - middle) / spread) ** 2 - 0.5 * ((grey - fluid_middle) / fluid_spread) ** 2
    )
    log_ratio += np.log(spread / fluid_spread) - np.log(len(grey) / len(fluid_grey))
    is_fluid = ((grey - middle) * towards > 0) & (
        (log_ratio > 0) | ((grey - fluid_middle) * towards > 0)
    )
    data = labels.data.copy()
    data[is_tissue] = np.where(is_fluid, labels.data.dtype.type(fluid), data[is_tissue])
    return labels.with_data(data)


def _robust(values: NDArray) -> tuple[np.float32, np.float32]:
    """Median, and standard deviation from the median absolute deviation, of a sample of the
    values.
    """
    sample = values[:: 1 + len(values) // _SAMPLE].astype(np.float32)
    middle = np.median(sample)
    deviation = 1.4826 * np.median(np.abs(sample - middle))
    return np.float32(middle), np.float32(deviation)
