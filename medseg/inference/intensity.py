"""Segmentation by intensity alone, for a first look or a baseline: no training, no anatomy.

All three work on a histogram of the scan's finite voxels, so that their cost does not grow with the
scan, and number classes from dark to bright. They say nothing about what the classes are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.labels import Label, LabelTable
from medseg.volume import Volume, computable

_BINS = 512


def otsu_threshold(counts: NDArray, centres: NDArray) -> float:
    """The threshold that maximises the variance between the two sides of a histogram (Otsu
    1979).
    """
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sum_below / below - (sum_below[-1] - sum_below) / above) ** 2
    # An empty valley is a plateau.
    best = np.flatnonzero(np.nan_to_num(between) >= np.nanmax(between) * (1 - 1e-12))
    return float((centres[best[0]] + centres[min(best[-1] + 1, len(centres) - 1)]) / 2)


def kmeans_thresholds(counts: NDArray, centres: NDArray, classes: int) -> list[float]:
    """Borders between `classes` groups of a histogram by Lloyd's algorithm (1982), started at equal
    quantiles.
    """
    share = (np.cumsum(counts) - counts / 2) / counts.sum()
    means = np.interp((np.arange(classes) + 0.5) / classes, share, centres)
    for _ in range(500):
        group = np.abs(centres[:, None] - means).argmin(1)
        weight = np.bincount(group, counts, classes)
        new_means = np.where(
            weight > 0, np.bincount(group, counts * centres, classes) / np.maximum(weight, 1), means
        )
        if np.allclose(new_means, means, rtol=0, atol=1e-9 * np.ptp(centres)):
            break
        means = np.sort(new_means)
    return ((means[1:] + means[:-1]) / 2).tolist()


def gmm_classes(counts: NDArray, centres: NDArray, classes: int) -> NDArray:
    """The most likely of `classes` Gaussians for each bin (EM; Dempster et al. 1977), started from
    k-means.
    """
    group = np.digitize(centres, kmeans_thresholds(counts, centres, classes))
    share = np.eye(classes)[group]
    width = centres[1] - centres[0]
    score = share
    for _ in range(500):
        weight = (share * counts[:, None]).sum(0) + 1e-12
        mean = (share * (counts * centres)[:, None]).sum(0) / weight
        squares = (centres[:, None] - mean) ** 2
        variance = (share * counts[:, None] * squares).sum(0) / weight + width**2
        score = (
            np.log(weight)
            - 0.5 * np.log(variance)
            - 0.5 * (centres[:, None] - mean) ** 2 / variance
        )
        new = np.exp(score - score.max(1, keepdims=True))
        new /= new.sum(1, keepdims=True)
        if np.abs(new - share).max() < 1e-6:
            break
        share = new
    return np.argsort(np.argsort(mean))[score.argmax(1)]


def _histogram(volume: Volume) -> tuple[Volume, NDArray, NDArray, float, float]:
    """The scan in numbers to compute with, its counts, the centres of the bins, and the ends of the
    range.
    """
    volume = computable(volume)
    low, high = (float(p) for p in np.percentile(volume.data, (0.05, 99.95)))
    if not high > low:
        raise BadFile("the scan has one intensity everywhere; there is nothing to segment")
    counts, edges = np.histogram(np.clip(volume.data, low, high), _BINS, (low, high))
    return volume, counts.astype(float), (edges[1:] + edges[:-1]) / 2, low, high


def _apply(volume: Volume, class_of_bin: NDArray, low: float, high: float) -> Volume:
    """Classes looked up plane by plane, so that no float copy of the scan is made."""
    labels = np.empty(volume.shape, np.uint8)
    for plane, out in zip(volume.data, labels):
        at = (plane.astype(np.float64) - low) * (_BINS / (high - low))
        out[...] = class_of_bin[np.clip(at, 0, _BINS - 1).astype(np.intp)]
    return volume.with_data(labels)


def otsu(volume: Volume, classes: int = 2) -> Volume:
    """Foreground 1 where the scan is brighter than Otsu's threshold of all its voxels."""
    volume, counts, centres, low, high = _histogram(volume)
    return _apply(
        volume, (centres > otsu_threshold(counts, centres)).astype(np.uint8), low, high=high
    )


def kmeans(volume: Volume, classes: int = 4) -> Volume:
    """Classes 0 (darkest) to `classes` - 1 by k-means of the intensities."""
    volume, counts, centres, low, high = _histogram(volume)
    return _apply(
        volume, np.digitize(centres, kmeans_thresholds(counts, centres, classes)), low, high=high
    )


def gmm(volume: Volume, classes: int = 4) -> Volume:
    """Classes 0 (darkest) to `classes` - 1 by a mixture of Gaussians of the intensities."""
    volume, counts, centres, low, high = _histogram(volume)
    return _apply(volume, gmm_classes(counts, centres, classes), low, high=high)


#: Name on the command line -> (function, classes it makes, background included).
INTENSITY_MODELS: dict[str, tuple[Callable[[Volume, int], Volume], int]] = {
    "otsu": (otsu, 2),
    "kmeans": (kmeans, 4),
    "gmm": (gmm, 4),
}


def intensity_table(name: str) -> LabelTable:
    """Names and colours of what an intensity model makes."""
    classes = INTENSITY_MODELS[name][1]
    if classes == 2:
        return LabelTable((Label(1, "foreground", (230, 180, 60)),))
    colors = [(70, 130, 200), (110, 190, 110), (240, 200, 80)]
    return LabelTable(
        tuple(
            Label(n, f"intensity class {n} of {classes - 1}", colors[n - 1])
            for n in range(1, classes)
        )
    )
