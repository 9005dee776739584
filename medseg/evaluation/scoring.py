"""`medseg evaluate`: label maps against references, case by case."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.evaluation.metrics import lesion_scores, score
from medseg.evaluation.pairs import listed, match_cases, numbered, on_grid_of, without_names
from medseg.evaluation.summary import Evaluation, Options, scores_csv, summarise
from medseg.files import atomic_write
from medseg.io import read_labels
from medseg.labels import LabelTable
from medseg.progress import Progress, silent


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
    progress: Progress = silent,
) -> Evaluation:
    """Score a prediction, or a folder of them, and write scores.csv, summary.json and report.html to `output`.

    Cases are matched by file name without suffix and `NAME_ENDINGS`. A case that cannot be scored is a problem of the
    evaluation and not an error, unless it is the only one.
    Raises `BadFile` for folders without a pair or where no case can be read, `BadGeometry` for a single case on two
    grids, `BadConfig` for options that contradict the data, `BadOutput` for a place that cannot be written.
    """
    options = options or Options()
    if options.structures is None and table is not None:
        options = replace(options, structures={label.name: (label.value,) for label in table.labels})
    _check_names(options)
    pairs, missing, extra = match_cases(reference, prediction)
    if options.number_cases:
        pairs, missing, extra = numbered(pairs, missing, extra)
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
            failed[case] = without_names(str(result), *pairs[case])
        progress(case, done, len(pairs))
    problems += [f"{case}: {error}" for case, error in failed.items()]
    problems += [f"{case}: {one.grid_note}" for case, one in cases.items() if one.grid_note]
    if not cases:
        raise BadFile(f"{prediction}: no case could be scored; the first problem was {problems[0]}")
    strays = sorted({value for one in cases.values() for value in one.strays})
    if strays and table is not None:
        problems.append(f"labels {listed(strays)} are in the files but in no structure; they were not scored")
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


def _check_names(options: Options) -> None:
    """Raise `BadConfig` if lesions or tolerances name a structure that is not scored."""
    tolerances = options.tolerance_mm if isinstance(options.tolerance_mm, Mapping) else {}
    if options.structures is None:
        return
    for name in [*options.lesions, *tolerances]:
        if name and name not in options.structures:
            raise BadConfig(f"'{name}' is not one of the structures {listed(options.structures)}")


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


def write_evaluation(
    result: Evaluation, output: str | Path, pairs: Mapping[str, tuple[Path, Path]], options: Options
) -> None:
    """Write scores.csv, summary.json and report.html to a folder, each whole or not at all."""
    from medseg.evaluation.report import report_html

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


def _plain(value: Any) -> Any:
    """The value with tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
