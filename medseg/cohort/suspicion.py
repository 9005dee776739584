"""How odd each case is among the others: for sorting, and no verdict.

A robust z of every volume as a share of the whole (its logarithm), of the whole, of confidence and
of the ratio of left to right: the distance from the median in units of 1.4826 times the median
absolute deviation (Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers), among cases of one
arithmetic and, where asked, of one value of a column such as the site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.cohort.table import Table
from medseg.errors import BadConfig
from medseg.labels import Label, LabelTable

#: The largest z that counts.
_MOST = 30.0
#: Cases from which on a group has a usual value.
_ENOUGH = 5
#: The least spread of logarithms of volumes and of confidence: what is all but constant is never
#: odd.
_LEAST_OF_LOG, _LEAST_OF_CONFIDENCE = 0.02, 0.005
#: Reasons that are told, and that make up the score.
_TOLD = 3
#: Points for a warning, for a structure that nine of ten others have, for a grid that nine of ten
#: have.
_WARNING, _EMPTY, _GRID, _USUAL = 3.0, 8.0, 1.0, 0.9


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """A score for each case, 0 where nothing is known, and why."""

    scores: NDArray[np.float64]
    reasons: list[str]


def suspicion_of(table: Table, by: str = "") -> Suspicion:
    """How odd each case is. by: a column of the list whose values are compared apart."""
    features = _features(table)
    count = len(table)
    largest = np.zeros((_TOLD, count))  # the largest z of each case, from above
    names = np.full((_TOLD, count), "", dtype=object)
    for rows in _groups(table, by):
        for name, numbers, least in features:
            z = _robust_z(numbers[rows], least)
            _keep_largest(largest, names, rows, z=z, name=name)
    scores = largest.mean(axis=0)
    reasons = [
        [f"{names[k, n]} (z {largest[k, n]:.1f})" for k in range(_TOLD) if largest[k, n] >= 2]
        for n in range(count)
    ]
    _add_points(table, scores, reasons)
    return Suspicion(
        scores=np.round(scores, 2), reasons=["; ".join(some[:_TOLD]) for some in reasons]
    )


def _features(table: Table) -> list[tuple[str, NDArray[np.float64], float]]:
    """What is compared: a name for people, (cases) numbers, the least spread that is assumed."""
    values = table.values
    if not values:
        return []
    volumes = np.array([table.structures["ml", value] for value in values])
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(volumes)
        # Of other models there may be cases with a structure that these do not have.
        whole = np.log(np.nansum(volumes, axis=0))
    features = [("the whole volume", whole, _LEAST_OF_LOG)]
    by_value = dict(zip(values, logs))
    for value, name in sorted(table.names.items()):
        features.append((f"volume of {name}", by_value[value] - whole, _LEAST_OF_LOG))
        confidence = table.structures["confidence", value]
        features.append((f"confidence of {name}", confidence, _LEAST_OF_CONFIDENCE))
    for value, partner in _pairs(table):
        name = f"{table.names[value]} against the other side"
        features.append((name, by_value[value] - by_value[partner], _LEAST_OF_LOG))
    return [(name, np.where(np.isfinite(one), one, np.nan), least) for name, one, least in features]


def _pairs(table: Table) -> list[tuple[int, int]]:
    labels = tuple(Label(value, name, (0, 0, 0)) for value, name in sorted(table.names.items()))
    return [(a, b) for a, b in LabelTable(labels).mirror_pairs().items() if a < b]


def _robust_z(numbers: NDArray[np.float64], least_spread: float) -> NDArray[np.float64]:
    """Distance from the median in robust standard deviations; 0 where nothing is known."""
    finite = np.isfinite(numbers)
    if finite.sum() < _ENOUGH:
        return np.zeros_like(numbers)
    median = np.median(numbers[finite])
    spread = 1.4826 * np.median(np.abs(numbers[finite] - median))
    z = np.abs(numbers - median) / max(spread, least_spread)
    return np.where(finite, np.minimum(z, _MOST), 0.0)


def _keep_largest(
    largest: NDArray, names: NDArray, rows: NDArray[np.intp], z: NDArray, name: str
) -> None:
    """Put z into its place among the largest of each case."""
    for k in range(_TOLD):
        above = z > largest[k, rows]
        at = rows[above]
        if not at.size:
            continue
        for j in range(_TOLD - 1, k, -1):
            largest[j, at], names[j, at] = largest[j - 1, at], names[j - 1, at]
        largest[k, at], names[k, at] = z[above], name
        z = np.where(above, 0.0, z)


def _add_points(table: Table, scores: NDArray[np.float64], reasons: list[list[str]]) -> None:
    done = np.isin(table.texts["status"], ("done", "skipped"))
    if not done.any():
        return
    for value in table.values:
        ml = table.structures["ml", value]
        if (ml[done] > 0).mean() >= _USUAL:
            for row in np.flatnonzero(done & (ml == 0)):
                scores[row] += _EMPTY
                reasons[row].insert(0, f"no {table.names[value]}")
    for row in np.flatnonzero(np.nan_to_num(table.numbers["n_warnings"]) > 0):
        scores[row] += _WARNING * min(3.0, float(table.numbers["n_warnings"][row]))
        reasons[row].insert(0, table.texts["warnings"][row][:120])
    for column in ("spacing_mm", "orientation"):
        texts = np.array(table.texts[column], dtype=object)
        kinds, counts = np.unique(texts[done].astype(str), return_counts=True)
        usual = kinds[counts.argmax()]
        if counts.max() >= _USUAL * done.sum():
            for row in np.flatnonzero(done & (texts != usual)):
                scores[row] += _GRID
                reasons[row].append(f"{column.removesuffix('_mm')} {texts[row]}, mostly {usual}")


def _groups(table: Table, by: str) -> Sequence[NDArray[np.intp]]:
    """The rows of cases that are compared with each other."""
    if by and by not in table.carried:
        columns = ", ".join(table.carried) or "none"
        raise BadConfig(f"--by {by}: the list has no such column; it carries {columns}")
    place = table.carried.index(by) if by else -1
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, case in enumerate(table.cases):
        if table.texts["status"][row] in ("done", "skipped"):
            own = case.carried[place] if by else ""
            groups[table.texts["precision"][row], own].append(row)
    return [np.array(rows) for _, rows in sorted(groups.items())]
