"""Which grey values of a scan to show: the soft-tissue window of CT, percentiles of everything
else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Soft tissue in Hounsfield units: level 40, width 400.
CT_WINDOW = (-160.0, 240.0)
_SAMPLE = 1 << 20  # voxels from which percentiles are taken


class Contrast(NamedTuple):
    """The values drawn black and white, the range of values worth keeping around them, and their
    unit ('' or ' HU').
    """

    low: float
    high: float
    least: float
    most: float
    unit: str


def contrast_of(data: NDArray) -> Contrast:
    """The display window of a scan of any dtype and shape (I, J, K).

    Values are taken for Hounsfield units where there is air below -500 and something between fat
    and contrast medium, and nothing below what scanners write (-3100); MR, PET and ultrasound do
    not look like that.
    """
    sample = _sample(data)
    least, most = float(sample.min()), float(sample.max())
    soft = float(((sample > -150) & (sample < 250)).mean())
    air = float((sample < -500).mean())
    if -3100 <= least <= -500 and most < 32768 and soft > 0.01 and air > 0.001:
        low, high = CT_WINDOW
        return Contrast(low, high, min(-1024.0, least), most=max(most, high), unit=" HU")
    low, high = (float(value) for value in np.percentile(sample, (1, 99.7)))
    if high <= low:
        low, high = least, most
    if high <= low:
        high = low + 1
    return Contrast(low, high, min(least, low), most=max(most, high), unit="")


def _sample(data: NDArray) -> NDArray[np.float32]:
    """Every n-th voxel of every axis, so that it is about `_SAMPLE`."""
    step = max(1, int(np.ceil((data.size / _SAMPLE) ** (1 / 3))))
    return data[::step, ::step, ::step].astype(np.float32)
