"""Comparing methods from their scores.csv: paired tests, a ranking, and how far the ranking can be
trusted.

Follows challengeR (Wiesenfarth et al., Scientific Reports 2021): methods are ranked in every case
and ordered by their mean rank; cases are resampled to see how stable that order is. Pairs of
methods are tested with Wilcoxon's signed-rank test on the cases, corrected by Holm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medseg.errors import BadConfig, BadFile
from medseg.evaluation.metrics import metric_of
from medseg.evaluation.summary import read_scores, score_columns
from medseg.labels import same_name
from medseg.text import counted

#: By how much a share may exceed 1 as other programs round.
ROUNDING = 1e-6


#: A score by case and structure.
Scores = Mapping[tuple[str, str], float]


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison found.

    methods: per method, best first: name, mean (over cases with finite values), median, n_inf,
    mean_rank, rank, rank_ci95 (two ranks), share_first (of the resamplings in which it leads).
    tests: per pair: first, second, difference (median of first - second, of sizes where less is
    better; None where it is infinite), p, p_holm. kendall_tau: mean and 2.5 percentile over
    resamplings of the agreement with the order found. n_cases; n_excluded: pairs of case and
    structure left out as undefined in a method. problems: sentences on what is not in every file.
    """

    score: str
    methods: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    kendall_tau: dict[str, float]
    n_cases: int
    n_excluded: int
    problems: list[str]

    def __repr__(self) -> str:
        order = " > ".join(str(one["method"]) for one in self.methods)
        return f"<Comparison by {self.score} over {self.n_cases} cases: {order}>"


def compare(
    paths: Sequence[str | Path],
    score: str = "dice",
    structure: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare two methods or more by one score, averaged in each case over its structures, or of
    one structure.

    Only cases and structures that every file has count; the others are named. Pairs that are
    undefined (nan) in any method are left out and counted; an infinite distance stays and ranks
    last. Raises `BadFile` for files that are no scores, `BadConfig` for fewer than two methods, a
    score or structure that is not there, or fewer than two common cases.
    """
    if len(paths) < 2:
        raise BadConfig("a comparison needs the scores.csv of two methods or more")
    methods = _method_names(paths)
    tables = [_values(path, score, structure) for path in paths]
    common = set.intersection(*(set(table) for table in tables))
    problems = [
        problem
        for method, table in zip(methods, tables)
        for other, other_table in zip(methods, tables)
        for problem in _lacking(method, table, other, other_table)
    ]
    keys = sorted(key for key in common if not any(np.isnan(table[key]) for table in tables))
    if len({case for case, _ in keys}) < 2:
        raise BadConfig(f"there are fewer than two cases in which every method has a {score}")
    by_case = {case: list(some) for case, some in groupby(keys, key=itemgetter(0))}
    cases = list(by_case)
    values = _means(tables, by_case)
    # Too much of one structure does not make up for too little of another.
    costs = _means(tables, by_case, size=abs) if _less_is_better(score) else -values
    if np.isnan(costs).any():
        case = cases[int(np.isnan(costs).any(axis=1).argmax())]
        raise BadConfig(
            f"{score} of {case} is infinite in both directions, which has no mean; choose one"
            " structure with --structure"
        )
    ranks = stats.rankdata(costs, axis=1)
    order = np.argsort(ranks.mean(axis=0), kind="stable")
    draws = np.random.default_rng(seed).integers(len(cases), size=(bootstrap, len(cases)))
    resamples = (
        stats.rankdata(ranks[draws].mean(axis=1), axis=1, method="min") if bootstrap else ranks[:0]
    )
    places = stats.rankdata(ranks.mean(axis=0), method="min")
    rows = [
        _method_row(methods[m], values[:, m], ranks[:, m], rank=places[m], drawn=resamples[:, m])
        for m in order
    ]
    tau = np.nan_to_num([stats.kendalltau(places, one).statistic for one in resamples], nan=0.0)
    agreement = (
        {"mean": float(tau.mean()), "p2_5": float(np.percentile(tau, 2.5))} if bootstrap else {}
    )
    tests = _tests(methods, costs if _less_is_better(score) else values)
    return Comparison(
        score, rows, tests=tests, kendall_tau=agreement, n_cases=len(cases),
        n_excluded=len(common) - len(keys), problems=problems,
    )  # fmt: skip


def _lacking(method: str, table: Scores, other: str, other_table: Scores) -> Iterator[str]:
    """Sentences on the cases, and the structures in cases of both, that a method lacks."""
    lacking = other_table.keys() - table.keys()
    own = {case for case, _ in table}
    if cases := sorted({case for case, _ in lacking} - own):
        yield f"{method} has no score of {', '.join(cases)}, which {other} has; not compared"
    counts = Counter(structure for case, structure in lacking if case in own)
    if counts:
        names = (f"{name} in {counted(count, 'case')}" for name, count in sorted(counts.items()))
        yield f"{method} has no score of {', '.join(names)}, which {other} has; not compared"


def _means(
    tables: Sequence[Scores],
    by_case: Mapping[str, Sequence[tuple[str, str]]],
    size: Callable[[float], float] = float,
) -> NDArray[np.float64]:
    """The mean of each case over its structures, or of the size of their scores: (cases, methods).

    Sums that are equal but for rounding become equal, as their order would rank methods otherwise.
    """
    with np.errstate(invalid="ignore"):
        means = [
            [np.mean([size(table[key]) for key in some]) for table in tables]
            for some in by_case.values()
        ]
    return np.array([[_rounded(float(one)) for one in row] for row in means])


def _rounded(value: float) -> float:
    """The digits that scores.csv has."""
    return float(f"{value:.9g}")


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, Scandinavian Journal of Statistics 1979)."""
    order = np.argsort(p, kind="stable")
    p_holm = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p, float)[order])
    result = np.empty(len(p))
    result[order] = np.minimum(p_holm, 1)
    return [float(one) for one in result]


def _tests(methods: Sequence[str], values: NDArray[np.float64]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    p_values: list[float] = []
    for a, b in combinations(range(len(methods)), 2):
        with np.errstate(invalid="ignore"):
            difference = values[:, a] - values[:, b]
        difference[values[:, a] == values[:, b]] = 0  # also of two infinite values
        middle = float(np.median(difference))
        # An infinite difference is the largest, whatever its size. Those that are equal but for
        # rounding are ties.
        largest = np.abs(difference[np.isfinite(difference)]).max(initial=0) or 1
        difference = np.round(np.nan_to_num(difference / largest, posinf=2, neginf=-2), 9)
        p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
        p_values.append(p)
        rows.append(
            {
                "first": methods[a],
                "second": methods[b],
                "difference": middle if math.isfinite(middle) else None,
                "p": p,
            }
        )
    for row, p_holm in zip(rows, holm(p_values)):
        row["p_holm"] = p_holm
    return rows


def _method_row(
    name: str, values: NDArray, ranks: NDArray, rank: float, drawn: NDArray
) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    return {
        "method": name,
        "mean": float(finite.mean()) if len(finite) else None,
        "median": float(np.median(finite)) if len(finite) else None,
        "n_inf": int(np.isinf(values).sum()),
        "mean_rank": float(ranks.mean()),
        "rank": int(rank),
        "rank_ci95": [float(q) for q in np.percentile(drawn, (2.5, 97.5))] if len(drawn) else None,
        "share_first": float((drawn == 1).mean()) if len(drawn) else None,
    }


def _method_names(paths: Sequence[str | Path]) -> list[str]:
    """The folder of each scores.csv, else the name of the file, else the whole path where that
    tells them apart.
    """
    files = [Path(path) for path in paths]
    for names in (
        [
            file.parent.name if file.name == "scores.csv" and file.parent.name else file.stem
            for file in files
        ],
        [str(file) for file in files],
    ):
        if len(set(names)) == len(names):
            return names
    raise BadConfig("the same scores are given twice")


def _values(path: str | Path, score: str, structure: str | None) -> dict[tuple[str, str], float]:
    """Score by case and structure."""
    rows: Sequence[Mapping[str, Any]] = read_scores(path)
    names = [name for name in score_columns(rows) if _has_order(name)]
    if score not in names:
        raise BadConfig(
            f"{path}: has no score '{score}' that methods can be compared by; it has"
            f" {', '.join(names)}"
        )
    if structure is not None:
        structures = list(dict.fromkeys(row["structure"] for row in rows))
        number = f"label {structure.strip()}" if structure.strip().isdigit() else structure
        same = same_name(structure, structures) or same_name(number, structures)
        if not same:
            told = ", ".join(structures[:8]) + (" ..." if len(structures) > 8 else "")
            raise BadConfig(f"{path}: has no structure '{structure}'; it has {told}")
        rows = [row for row in rows if row["structure"] == same]
    scores: dict[tuple[str, str], float] = {}
    for row in rows:
        place = (row["case"], row["structure"])
        if score not in row:
            continue
        if place in scores:
            raise BadFile(f"{path}: has two rows of {place[0]}, {place[1]}; keep the right one")
        scores[place] = row[score]
        if wrong := _absurd(score, row[score]):
            raise BadFile(
                f"{path}: {score} of {place[0]}, {place[1]} is {row[score]:g}, {wrong}; correct the"
                " scores"
            )
    return scores


def _absurd(score: str, value: float) -> str:
    """Why a value cannot be one of this score; "" if it can, and for scores that medseg does not
    know.
    """
    metric = metric_of(score)
    if metric is None or np.isnan(value):
        return ""
    if metric.most is not None and not (metric.least or 0.0) <= value <= metric.most + ROUNDING:
        return "which is no share from 0 to 1 (is it in per cent?)"
    return "which is below 0" if metric.least is not None and value < metric.least else ""


def _has_order(score: str) -> bool:
    """Whether a score says which method is better; of scores that medseg does not know more is."""
    metric = metric_of(score)
    return metric is None or metric.better != ""


def _less_is_better(score: str) -> bool:
    metric = metric_of(score)
    return metric is not None and metric.better == "less"
