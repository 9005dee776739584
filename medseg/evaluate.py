"""Scoring predicted label maps against references: cases matched by name, one table, one summary, one page.

`evaluate` is the whole of `medseg evaluate`. Geometry is never guessed: a prediction on another grid is an error of
that case which names both grids, unless resampling was asked for; the same grid stored in another orientation is
turned without loss. Nothing drops out in silence: cases without a partner, cases that failed and structures that a mask
lacks are listed and counted.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadGeometry, BadOutput, MedsegError
from medseg.files import atomic_write, read_text
from medseg.io import is_readable_name, read_labels, strip_suffix
from medseg.io.slicer import read_table
from medseg.labels import LabelTable
from medseg.metrics import Empty, LesionOptions, Surface, lesion_scores, score
from medseg.volume import Volume, reorient, resample, same_grid

#: Endings that predictions and references of one case may differ by.
NAME_ENDINGS = ("_seg", "_dseg", "_labels", "_label", "_mask", "_gt", "_pred")
#: Columns of scores.csv that are not scores.
NOT_SCORES = ("case", "structure", "status", "n_reference", "n_prediction", "n_both", "tolerance_mm")


@dataclass(frozen=True)
class Options:
    """How an evaluation is done; all of it is written to summary.json.

    structures: name to the labels whose union it is; None for every label of the references, named by `table`.
    ignore: label of the reference whose voxels do not count. surface, percentiles, tolerance_mm, empty: see
    `medseg.metrics.score`. lesions: structures also scored lesion by lesion, with `lesion_options`. resample: put
    predictions of another grid on the reference's by nearest neighbour. bootstrap: resamplings of cases for the
    intervals, drawn from `seed`. number_cases: name cases by numbers, because names of files may name patients.
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


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    rows: one dict per case and structure, the lines of scores.csv. summary: the content of summary.json.
    problems: sentences on what could not be scored or was not as expected, also in the summary.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    problems: list[str]


class _Case(NamedTuple):
    """A case that was scored: its rows, how its grid was treated, labels that belong to no structure."""

    rows: list[dict[str, Any]]
    grid_note: str
    strays: list[int]
    spacing_mm: tuple[float, float, float]


def evaluate(
    reference: str | Path,
    prediction: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    table: LabelTable | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Score a prediction, or a folder of them, and write scores.csv, summary.json and report.html to `output`.

    Cases are matched by file name without suffix and `NAME_ENDINGS`. `progress` is called with cases done, all cases
    and the name of the last one. A case that cannot be scored is a problem of the evaluation and not an error, unless
    it is the only one.
    Raises `BadFile` for folders without a pair or where no case can be read, `BadGeometry` for a single case on two
    grids, `BadConfig` for options that contradict the data, `BadOutput` for a place that cannot be written.
    """
    options = options or Options()
    if options.structures is None and table is not None:
        options = replace(options, structures={label.name: (label.value,) for label in table.labels})
    _check_names(options)
    pairs, missing, extra = match_cases(reference, prediction)
    if options.number_cases:
        pairs, missing, extra = _numbered(pairs, missing, extra)
    problems = [f"{case}: there is no prediction" for case in missing]
    problems += [f"{case}: there is no reference" for case in extra]
    cases: dict[str, _Case] = {}
    failed: dict[str, str] = {}
    for done, (case, result) in enumerate(_in_parallel(pairs, options), start=1):
        if isinstance(result, _Case):
            cases[case] = result
        elif len(pairs) == 1:
            raise result
        else:
            failed[case] = _without_names(str(result), *pairs[case])
        if progress:
            progress(done, len(pairs), case)
    problems += [f"{case}: {error}" for case, error in failed.items()]
    problems += [f"{case}: {one.grid_note}" for case, one in cases.items() if one.grid_note]
    if not cases:
        raise BadFile(f"{prediction}: no case could be scored; the first problem was {problems[0]}")
    strays = sorted({value for one in cases.values() for value in one.strays})
    if strays and table is not None:
        problems.append(f"labels {_list(strays)} are in the files but in no structure; they were not scored")
    rows = _with_absent(cases, options)
    summary = {
        "cases": {
            "scored": list(cases),
            "without_prediction": missing,
            "without_reference": extra,
            "failed": failed,
            "turned_or_resampled": {case: one.grid_note for case, one in cases.items() if one.grid_note},
        },
        "problems": problems,
        "options": _plain(asdict(options)),
        **summarise(rows, options.bootstrap, options.seed),
    }
    evaluation = Evaluation(rows, summary, problems)
    if output is not None:
        write_evaluation(evaluation, output, {case: pairs[case] for case in cases}, options)
    return evaluation


def match_cases(
    reference: str | Path, prediction: str | Path
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """Pairs of files by case name, sorted; cases without a prediction; cases without a reference.

    Two files are one pair whatever their names. Raises `BadFile` for folders without a pair and for two files of one
    folder that could be the same case.
    """
    reference, prediction = Path(reference), Path(prediction)
    for path in (reference, prediction):
        if not path.exists():
            raise BadFile(f"{path}: there is no such file or folder")
    if not reference.is_dir() and not prediction.is_dir():
        return {case_name(reference): (reference, prediction)}, [], []
    if reference.is_dir() != prediction.is_dir():
        raise BadFile(f"{reference} and {prediction}: give two files or two folders")
    ours, theirs = _cases_in(reference), _cases_in(prediction)
    pairs = {case: (ours[case], theirs[case]) for case in sorted(ours.keys() & theirs.keys())}
    if not pairs:
        raise BadFile(
            f"{reference} and {prediction}: no two files have the same case name "
            f"({len(ours)} and {len(theirs)} label maps were found)"
        )
    return pairs, sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())


def _numbered(
    pairs: dict[str, tuple[Path, Path]], missing: list[str], extra: list[str]
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """What `match_cases` found, with numbers in the order of the names instead of names."""
    names = sorted([*pairs, *missing, *extra])
    numbers = {name: f"case {n:0{len(str(len(names)))}d}" for n, name in enumerate(names, start=1)}
    return (
        {numbers[name]: paths for name, paths in pairs.items()},
        [numbers[m] for m in missing],
        [numbers[e] for e in extra],
    )


def _without_names(text: str, reference: Path, prediction: Path) -> str:
    """An error with other words for the files, whose paths have no place in results."""
    return text.replace(str(reference), "the reference").replace(str(prediction), "the prediction")


def case_name(path: str | Path) -> str:
    """The name of a file without its suffix and one of `NAME_ENDINGS`."""
    name = strip_suffix(path)
    ending = next((ending for ending in NAME_ENDINGS if name.lower().endswith(ending) and len(name) > len(ending)), "")
    return name[: len(name) - len(ending)]


def _cases_in(folder: Path) -> dict[str, Path]:
    cases: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not is_readable_name(path):
            continue
        case = case_name(path)
        if case in cases:
            raise BadFile(f"{folder}: {cases[case].name} and {path.name} could both be case '{case}'; keep one of them")
        cases[case] = path
    return cases


def parse_structures(text: str, table: LabelTable | None = None) -> dict[str, tuple[int, ...]]:
    """Structures from "1,2", "liver=1,tumour=1+2+3" or names of `table`. Raises `BadConfig`."""
    names = table.names if table else {}
    values = {name: value for value, name in names.items()}
    structures: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, union = (piece.strip() for piece in part.partition("="))
        try:
            labels = tuple(values[one] if one in values else int(one) for one in (union if equals else name).split("+"))
        except ValueError:
            raise BadConfig(f"'{part.strip()}' is no structure; write 3, liver=1 or tumour=1+2+3") from None
        if not all(0 <= label <= 65_535 for label in labels):
            raise BadConfig(f"'{part.strip()}' has a label that is not 0 to 65535")
        if not equals and len(labels) == 1:
            name = names.get(labels[0], f"label {labels[0]}")
        if name in structures:
            raise BadConfig(f"the structure '{name}' is given twice")
        structures[name] = labels
    return structures


def on_grid_of(reference: Volume, prediction: Volume, may_resample: bool = False) -> tuple[Volume, str]:
    """The prediction on the reference's grid, and what was done to it in words ("" for nothing).

    The same grid stored along other axes is turned, which loses nothing. Raises `BadGeometry` naming both grids if they
    differ, unless nearest-neighbour resampling was asked for.
    """
    # A hundredth of a voxel is rounding in somebody's header.
    tolerance_mm = max(1e-3, 0.01 * min(reference.spacing_mm))
    if same_grid(reference, prediction, tolerance_mm):
        return prediction, ""
    turned = reorient(prediction, reference.orientation)
    if same_grid(reference, turned, tolerance_mm):
        note = f"the prediction is stored as {prediction.orientation}; it was turned to {reference.orientation}"
        return turned, f"{note} without loss"
    grids = f"the prediction has {_grid(prediction)}, the reference {_grid(reference)}"
    if not may_resample:
        raise BadGeometry(f"{grids}; these are different grids, and --resample compares them nevertheless")
    moved = resample(prediction, reference.affine, reference.shape, order=0)
    return moved, f"{grids}; the prediction was resampled to the nearest voxel"


def _grid(volume: Volume) -> str:
    origin = ", ".join(f"{x:.4g}" for x in volume.affine[:3, 3])
    spacing = " x ".join(f"{x:.4g}" for x in volume.spacing_mm)
    shape = " x ".join(str(n) for n in volume.shape)
    return f"{shape} voxels of {spacing} mm, {volume.orientation}, first voxel at ({origin}) mm"


def _check_names(options: Options) -> None:
    """Raise `BadConfig` if lesions or tolerances name a structure that is not scored."""
    tolerances = options.tolerance_mm if isinstance(options.tolerance_mm, Mapping) else {}
    if options.structures is None:
        return
    for name in [*options.lesions, *tolerances]:
        if name and name not in options.structures:
            raise BadConfig(f"'{name}' is not one of the structures {_list(options.structures)}")


def _in_parallel(pairs: Mapping[str, tuple[Path, Path]], options: Options) -> Iterator[tuple[str, _Case | MedsegError]]:
    """Score the cases on threads (reading and scoring release the interpreter lock), and yield them in order."""

    def one(case: str) -> _Case | MedsegError:
        try:
            return _score_case(case, *pairs[case], options)
        except BadConfig:
            raise  # not the fault of a case
        except MedsegError as error:
            return error

    workers = min(len(pairs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers)
    try:
        yield from zip(pairs, pool.map(one, pairs))
    finally:
        pool.shutdown(cancel_futures=True)


def _score_case(case: str, reference_path: Path, prediction_path: Path, options: Options) -> _Case:
    reference = read_labels(reference_path)
    prediction, note = on_grid_of(reference, read_labels(prediction_path), options.resample)
    present = np.union1d(_values(reference.data), _values(prediction.data))
    present = present[(present != 0) & (present != (0 if options.ignore is None else options.ignore))]
    structures = options.structures
    if structures is None:
        structures = {f"label {value}": (int(value),) for value in present}
    scores = score(
        reference.data,
        prediction.data,
        reference.spacing_mm,
        structures,
        surface=options.surface,
        percentiles=options.percentiles,
        tolerance_mm=options.tolerance_mm,
        ignore=options.ignore,
        empty=options.empty,
    )
    for name in options.lesions:
        if name in structures:
            masks = [np.isin(volume.data, structures[name]) for volume in (reference, prediction)]
            if options.ignore is not None:
                masks = [mask & (reference.data != options.ignore) for mask in masks]
            scores[name] |= lesion_scores(
                masks[0], masks[1], reference.spacing_mm, options.lesion_options, options.surface
            )
    known = {value for values in structures.values() for value in values}
    strays = [int(value) for value in present if int(value) not in known]
    rows = [{"case": case, "structure": name, **row} for name, row in scores.items()]
    return _Case(rows, note, strays, reference.spacing_mm)


def _values(labels: NDArray) -> NDArray[np.int64]:
    there = np.zeros(65_536, bool)
    for plane in labels:
        there[plane] = True
    return np.flatnonzero(there)


def _with_absent(cases: Mapping[str, _Case], options: Options) -> list[dict[str, Any]]:
    """The rows of all cases, with one of status both_empty for each structure that only other cases have."""
    names = options.structures
    if names is None:
        every = {row["structure"] for one in cases.values() for row in one.rows}
        names = {name: (int(name.split()[1]),) for name in sorted(every, key=lambda name: int(name.split()[1]))}
    rows = []
    nothing = np.zeros((1, 1, 1), np.uint8)
    for case, one in cases.items():
        there = {row["structure"]: row for row in one.rows}
        lacking = {name: values for name, values in names.items() if name not in there}
        absent: dict[str, dict[str, Any]] = {}
        if lacking:
            absent = score(
                nothing,
                nothing,
                one.spacing_mm,
                lacking,
                percentiles=options.percentiles,
                tolerance_mm=options.tolerance_mm,
                empty=options.empty,
            )
        rows += [there.get(name) or {"case": case, "structure": name, **absent[name]} for name in names]
    return rows


def find_table(path: str | Path | None, reference: Path, prediction: Path) -> LabelTable | None:
    """The label table at `path`; or else what the references or predictions come with, or none.

    These are labels.csv in their folder, the tables that `medseg infer` writes beside its results if they all say the
    same, and the segments of a single .seg.nrrd.
    """
    if path is not None:
        return LabelTable.read(path)
    for place in (reference, prediction):
        if place.name.endswith(".seg.nrrd"):
            return read_table(place)
        folder, pattern = (
            (place, "*.labels.csv") if place.is_dir() else (place.parent, f"{strip_suffix(place)}.labels.csv")
        )
        if (folder / "labels.csv").is_file():
            return LabelTable.read(folder / "labels.csv")
        found = sorted(file for file in folder.glob(glob.escape(pattern) if place.is_file() else pattern))
        if found and len({read_text(file) for file in found}) == 1:
            return LabelTable.read(found[0])
    return None


def summary_table(summary: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A title and one row per structure with the means of the main scores, for the terminal.

    Columns excluded and infinite count the cases that the mean of any of them leaves out.
    """
    shown = ("dice", "hausdorff95_mm", "assd_mm", "surface_dice", "lesion_f1")
    rows = []
    for structure, scores in summary["structures"].items():
        there = [name for name in shown if name in scores]
        row: dict[str, Any] = {"structure": structure} | {name: scores[name]["mean"] for name in there}
        row["n"] = sum(scores["status"].values())
        row["excluded"] = max((scores[name]["n_excluded"] for name in there), default=0)
        row["infinite"] = max((scores[name]["n_inf"] for name in there), default=0)
        rows.append(row)
    cases = summary["cases"]
    title = f"{len(cases['scored'])} cases scored, {len(cases['without_prediction'])} without prediction, "
    title += f"{len(cases['without_reference'])} without reference, {len(cases['failed'])} failed; means over cases"
    return title, rows


def summarise(rows: Sequence[Mapping[str, Any]], bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Statistics over cases of each score of each structure, and of the means over structures.

    Each has n (cases), n_excluded (of them undefined, nan), n_inf (infinite), and over the others mean, sd, median, q1,
    q3 and ci95: the 2.5 and 97.5 percentiles of the mean over `bootstrap` resamplings of the cases. None where there
    is nothing to compute from; an interval needs two cases. status counts how often masks were empty.
    """
    names = score_columns(rows)
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    draws = np.random.default_rng(seed).integers(len(cases), size=(bootstrap, len(cases)))
    times = np.stack([np.bincount(draw, minlength=len(cases)) for draw in draws]) if bootstrap else None
    result: dict[str, Any] = {}
    for structure in structures:
        mine = {row["case"]: row for row in rows if row["structure"] == structure}
        statuses = [row["status"] for row in mine.values()]
        result[structure] = {"status": {status: statuses.count(status) for status in sorted(set(statuses))}}
        for name in names:
            if all(row.get(name, "") == "" for row in mine.values()):
                continue
            values = np.array([_number(mine.get(case, {}).get(name, "")) for case in cases])
            result[structure][name] = _statistics(values, times)
    overall = {}
    for name in names:
        means = [one[name]["mean"] for one in result.values() if name in one and one[name]["mean"] is not None]
        overall[name] = float(np.mean(means)) if means else None
    return {"structures": result, "mean_over_structures": overall}


def score_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the scores that rows hold, in order."""
    return [name for name in dict.fromkeys(key for row in rows for key in row) if name not in NOT_SCORES]


def _statistics(values: NDArray[np.float64], times: NDArray[np.int64] | None) -> dict[str, Any]:
    finite = np.isfinite(values)
    good = values[finite]
    counts = {"n": len(values), "n_excluded": int(np.isnan(values).sum()), "n_inf": int(np.isinf(values).sum())}
    if not len(good):
        return counts | dict.fromkeys(("mean", "sd", "median", "q1", "q3", "ci95"))
    interval = None
    if times is not None and len(good) > 1:
        drawn = times[:, finite]
        some = drawn.sum(axis=1) > 0
        means = drawn[some] @ good / drawn[some].sum(axis=1)
        interval = [float(q) for q in np.percentile(means, (2.5, 97.5))]
    q1, median, q3 = (float(q) for q in np.percentile(good, (25, 50, 75)))
    sd = float(good.std(ddof=1)) if len(good) > 1 else None
    return counts | {"mean": float(good.mean()), "sd": sd, "median": median, "q1": q1, "q3": q3, "ci95": interval}


def write_evaluation(
    result: Evaluation, output: str | Path, pairs: Mapping[str, tuple[Path, Path]], options: Options
) -> None:
    """Write scores.csv, summary.json and report.html to a folder, each whole or not at all."""
    from medseg.report import report_html

    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(f"{output}: this folder cannot be made: {error.strerror}") from None
    texts = {
        "scores.csv": scores_csv(result.rows),
        "summary.json": json.dumps(result.summary, indent=1, allow_nan=False) + "\n",
        "report.html": report_html(result, pairs, options),
    }
    for name, text in texts.items():
        with atomic_write(output / name) as file:
            file.write(text.encode())


def scores_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV: case, structure, status, scores; undefined is nan, infinite is inf, not asked for is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
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
        row: dict[str, Any] = {"case": line["case"], "structure": line["structure"], "status": line.get("status", "")}
        for name, text in line.items():
            if name in NOT_SCORES or not text:
                continue
            try:
                row[name] = float(text)
            except (TypeError, ValueError):
                raise BadFile(f"{path}: line {reader.line_num} has '{text}' for {name}, which is no number") from None
        rows.append(row)
    if not rows:
        raise BadFile(f"{path}: holds no scores")
    return rows


def _number(value: Any) -> float:
    return float("nan") if value == "" else float(value)


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """The value with tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _list(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
