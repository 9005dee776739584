"""What is measured of each structure in a scan: volume, and intensity inside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume


def structure_intensities(
    scan: Volume, labels: Volume, values: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Mean, standard deviation (of the population) and median of a scan's intensity in each label.

    scan, labels: (I, J, K) on one grid. Of labels that are not there nothing is returned. One sort
    of the labels serves all structures, whatever their number.
    """
    inside = np.isin(labels.data, values)
    names = labels.data[inside]
    numbers = scan.data[inside]
    order = np.argsort(names, kind="stable")
    names, numbers = names[order], numbers[order]
    intensities: dict[int, dict[str, float]] = {}
    for value, some in _groups(names, numbers):
        exact = some.astype(np.float64)
        intensities[value] = {
            "mean": _short(exact.mean()),
            "sd": _short(exact.std()),
            "median": _short(np.median(exact)),
        }
    return intensities


def add_intensities(
    structures: Sequence[dict[str, object]], found: Mapping[int, Mapping[str, float]]
) -> None:
    """Put the intensities of `structure_intensities` into the rows of a record's structures."""
    for row in structures:
        row.update(found.get(row["value"], {}))  # type: ignore[call-overload]


def _groups(names: NDArray, numbers: NDArray) -> list[tuple[int, NDArray]]:
    """Each value in sorted `names` with its numbers."""
    if not names.size:
        return []
    starts = np.flatnonzero(np.diff(names, prepend=names[0] - 1 if names[0] else 0))
    starts = np.unique(np.concatenate(([0], starts)))
    return [(int(names[at]), part) for at, part in zip(starts, np.split(numbers, starts[1:]))]


def _short(value: float) -> float:
    """Six digits, which is more than an intensity has."""
    return float(f"{float(value):.6g}")
