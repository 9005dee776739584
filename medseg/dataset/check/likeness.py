"""How like each other the thumbnails of cases are, as they are and flipped."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

#: Groups smaller than this have no usual case to compare with.
MIN_GROUP = 8
#: Every way to flip along one axis or several.
FLIPS = tuple(flip for count in (1, 2, 3) for flip in combinations(range(3), count))


def standardised(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thumbnails with mean 0 and length 1, so that products are correlations; (cases, 24, 24,
    24).
    """
    deviations = thumbnails - thumbnails.mean(axis=(1, 2, 3), keepdims=True)
    length = np.sqrt((deviations**2).sum(axis=(1, 2, 3), keepdims=True))
    return deviations / np.maximum(length, np.finfo(np.float32).tiny)


def likeness(thumbnails: NDArray[np.float32], flip: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """Correlation of every case, flipped along some axes, with the mean of all others."""
    cases = np.flip(thumbnails, tuple(axis + 1 for axis in flip)) if flip else thumbnails
    total = thumbnails.sum(axis=0)
    own = np.einsum("nijk,nijk->n", cases, thumbnails)
    with_all = np.einsum("nijk,ijk->n", thumbnails, total)
    # |total - case|; cases have length 1.
    rest = np.sqrt(np.maximum((total**2).sum() - 2 * with_all + 1.0, 1e-12))
    return (np.einsum("nijk,ijk->n", cases, total) - own) / rest


def spread_of(values: NDArray[np.float64]) -> float:
    """The standard deviation of a group, estimated from the median distance to its median."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
