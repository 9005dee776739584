"""Scores of cases put together: statistics of each structure, and the table of scores as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile
from medseg.evaluation.lesions import LesionOptions
from medseg.evaluation.metrics import Empty, main_columns, title_of
from medseg.evaluation.surfaces import Surface
from medseg.files import read_text
from medseg.labels import MAX_VALUE
from medseg.text import (
    as_mapping,
    as_names,
    as_number,
    as_whole,
    counted,
    decimal_number,
    from_cell,
    harmless,
    to_cell,
)

#: Most resamplings of cases; more changes no digit that is shown.
MOST_RESAMPLINGS = 1_000_000
#: Columns of scores.csv that are not scores.
NOT_SCORES = (
    "case",
    "structure",
    "status",
    "n_reference",
    "n_prediction",
    "n_both",
    "tolerance_mm",
)


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is done; all of it is written to summary.json.

    structures: name to the labels whose union it is; None for every label of the references, named
    by `table`. ignore: label of the reference whose voxels do not count. surface, percentiles,
    tolerance_mm, empty: see `metrics.score`. lesions: structures also scored lesion by lesion, with
    `lesion_options`. resample: put predictions of another grid on the reference's by nearest
    neighbour. bootstrap: resamplings of cases for the intervals, drawn from `seed`. number_cases:
    name cases by numbers, because names of files may name patients.
    """

    structures: Mapping[str, tuple[int, ...]] | None = None
    ignore: int | None = None
    surface: Surface = "surfel"
    percentiles: tuple[float, ...] = (95,)
    tolerance_mm: float | Mapping[str, float] = 1.0
    empty: Empty = "nan"
    lesions: tuple[str, ...] = ()
    lesion_options: LesionOptions = field(default_factory=LesionOptions)
    resample: bool = False
    bootstrap: int = 2000
    seed: int = 0
    number_cases: bool = False

    def __post_init__(self) -> None:
        """Raise `BadConfig` for values that an option cannot have."""
        several = _as_list(self.percentiles)
        values: dict[str, Any] = {
            "percentiles": tuple(as_number(one, "a percentile", most=100) for one in several),
            "tolerance_mm": _tolerance(self.tolerance_mm),
            "lesions": as_names(self.lesions, "lesions"),
            "bootstrap": as_whole(self.bootstrap, "bootstrap", most=MOST_RESAMPLINGS),
            "seed": as_whole(self.seed, "seed"),
        }
        if self.ignore is not None:
            values["ignore"] = as_whole(self.ignore, "ignore", most=MAX_VALUE)
        if self.structures is not None:
            values["structures"] = {
                name: _label_values(name, labels)
                for name, labels in as_mapping(self.structures, "structures").items()
            }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.lesion_options, LesionOptions):
            raise BadConfig("lesion_options are a medseg.evaluation.LesionOptions")
        for name in ("resample", "number_cases"):
            if getattr(self, name) not in (True, False):
                raise BadConfig(
                    f"{name} is True or False, and {getattr(self, name)!r:.40} was given"
                )


def _as_list(value: Any) -> list[Any]:
    """Several values as a list; of one, a list of it."""
    is_several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    return list(value) if is_several else [value]


def _tolerance(value: object) -> float | dict[str, float]:
    """A length in mm, or one for each structure."""
    if isinstance(value, Mapping):
        return {name: as_number(one, "a tolerance in mm") for name, one in value.items()}
    return as_number(value, "a tolerance in mm")


def _label_values(name: str, labels: object) -> tuple[int, ...]:
    """The labels of which a structure is the union; one may stand alone."""
    what = f"each label of '{harmless(name)}'"
    return tuple(as_whole(one, what, most=MAX_VALUE) for one in _as_list(labels))


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What an evaluation found.

    rows: one dict per case and structure, the lines of scores.csv. summary: the content of
    summary.json. problems: sentences on what could not be scored or was not as expected, also in
    the summary.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    problems: list[str]

    def __repr__(self) -> str:
        cases = len({row["case"] for row in self.rows})
        mean = self.summary.get("mean_over_structures", {}).get("dice")
        dice = "" if mean is None else f", mean Dice {mean:.3f}"
        structures = len({row["structure"] for row in self.rows})
        problems = f"; {counted(len(self.problems), 'problem')}" if self.problems else ""
        of = f"{counted(cases, 'case')}, {counted(structures, 'structure')}"
        return f"<Evaluation of {of}{dice}{problems}>"


def summary_table(summary: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A title and one row per structure with the means of the main scores, for the terminal.

    Columns excluded and infinite count the cases that the mean of any of them leaves out.
    """
    structures = summary["structures"]
    columns = main_columns(dict.fromkeys(name for one in structures.values() for name in one))
    rows = []
    for structure, scores in structures.items():
        there = [name for name in columns if name in scores]
        row: dict[str, Any] = {"structure": structure} | {
            title_of(name): scores[name]["mean"] for name in there
        }
        row["cases"] = sum(scores["status"].values())
        row["excluded"] = max((scores[name]["n_excluded"] for name in there), default=0)
        row["infinite"] = max((scores[name]["n_inf"] for name in there), default=0)
        rows.append(row)
    cases = summary["cases"]
    title = (
        f"{counted(len(cases['scored']), 'case')} scored,"
        f" {len(cases['without_prediction'])} without prediction,"
        f" {len(cases['without_reference'])} without reference, {len(cases['failed'])} failed;"
        " means over cases"
    )
    return title, rows


def summarise(
    rows: Sequence[Mapping[str, Any]], bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Statistics over cases of each score of each structure, and of the means over structures.

    Each has n (cases), n_excluded (of them undefined, nan), n_inf (infinite), and over the others
    mean, sd, median, q1, q3 and ci95: the 2.5 and 97.5 percentiles of the mean over `bootstrap`
    resamplings of the cases. None where there is nothing to compute from; an interval needs two
    cases. status counts how often masks were empty.
    """
    names = score_columns(rows)
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    draws = np.random.default_rng(seed).integers(len(cases), size=(bootstrap, len(cases)))
    times = (
        np.array([np.bincount(draw, minlength=len(cases)) for draw in draws], float)
        if bootstrap
        else None
    )
    result: dict[str, Any] = {}
    for structure in structures:
        mine = {row["case"]: row for row in rows if row["structure"] == structure}
        statuses = [row["status"] for row in mine.values()]
        result[structure] = {
            "status": {status: statuses.count(status) for status in sorted(set(statuses))}
        }
        for name in names:
            if all(row.get(name, "") == "" for row in mine.values()):
                continue
            values = np.array([_number(mine.get(case, {}).get(name, "")) for case in cases])
            result[structure][name] = _statistics(values, times)
    overall = {}
    for name in names:
        means = [
            one[name]["mean"]
            for one in result.values()
            if name in one and one[name]["mean"] is not None
        ]
        overall[name] = float(np.mean(means)) if means else None
    return {"structures": result, "mean_over_structures": overall}


def score_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the scores that rows hold, in order."""
    return [
        name for name in dict.fromkeys(key for row in rows for key in row) if name not in NOT_SCORES
    ]


def _statistics(values: NDArray[np.float64], times: NDArray[np.float64] | None) -> dict[str, Any]:
    finite = np.isfinite(values)
    good = values[finite]
    counts = {
        "n": len(values),
        "n_excluded": int(np.isnan(values).sum()),
        "n_inf": int(np.isinf(values).sum()),
    }
    if not len(good):
        return counts | dict.fromkeys(("mean", "sd", "median", "q1", "q3", "ci95"))
    interval = None
    if times is not None and len(good) > 1:
        weights = times @ finite
        some = weights > 0
        means = (times @ np.where(finite, values, 0))[some] / weights[some]
        interval = [float(q) for q in np.percentile(means, (2.5, 97.5))]
    q1, median, q3 = (float(q) for q in np.percentile(good, (25, 50, 75)))
    sd = float(good.std(ddof=1)) if len(good) > 1 else None
    return counts | {
        "mean": float(good.mean()),
        "sd": sd,
        "median": median,
        "q1": q1,
        "q3": q3,
        "ci95": interval,
    }


def scores_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV: case, structure, status, scores; undefined is nan, infinite is inf, not asked
    for is empty.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([to_cell(column) for column in columns])
    for row in rows:
        writer.writerow([_text(row.get(column, "")) for column in columns])
    return out.getvalue()


def read_scores(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a scores.csv: case, structure, and every number there is. Raises `BadFile`."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if not {"case", "structure"} <= set(reader.fieldnames or ()):
        raise BadFile(f"{path}: is not a table of scores; it has no columns case and structure")
    rows = []
    for line in reader:
        row: dict[str, Any] = {key: from_cell(line[key] or "") for key in ("case", "structure")}
        row["status"] = line.get("status", "")
        for name, text in line.items():
            if name in NOT_SCORES or not text:
                continue
            try:
                row[name] = decimal_number(text)
            except (AttributeError, ValueError):
                raise BadFile(
                    f"{path}: line {reader.line_num} has '{text}' for {name}, which is no number"
                ) from None
        rows.append(row)
    if not rows:
        raise BadFile(f"{path}: holds no scores")
    return rows


def _number(value: Any) -> float:
    return float("nan") if value == "" else float(value)


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(to_cell(value))
