"""`medseg evaluate`: label maps against references, case by case."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, MedsegError
from medseg.evaluation.backgrounds import match_scans
from medseg.evaluation.lesions import lesion_scores
from medseg.evaluation.metrics import score
from medseg.evaluation.pairs import (
    listed,
    match_cases,
    numbered,
    on_grid_of,
    scored_names,
    without_names,
)
from medseg.evaluation.reading import (
    LabelReader,
    MaskedCases,
    masked_cases,
    masks_in,
    table_of_masks,
)
from medseg.evaluation.summary import Evaluation, EvaluationOptions, scores_csv, summarise
from medseg.files import atomic_write, written_together
from medseg.kernels.threads import threads
from medseg.labels import LabelTable
from medseg.logs import Progress, silent


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A case that was scored.

    rows: of scores.csv. grid_note: how its grid was treated. strays: labels that belong to no
    structure. values: those of the reference and of the prediction. not_annotated: structures that
    the reference has no mask of.
    """

    rows: list[dict[str, Any]]
    grid_note: str
    strays: list[int]
    values: tuple[list[int], list[int]]
    spacing_mm: tuple[float, float, float]
    not_annotated: tuple[str, ...] = ()

    @property
    def apart(self) -> bool:
        """Whether both maps hold labels, and none in common, neither as values nor as
        structures.
        """
        ours, theirs = self.values
        together = any(row["n_reference"] and row["n_prediction"] for row in self.rows)
        return bool(ours and theirs) and not set(ours) & set(theirs) and not together


def evaluate(
    reference: str | Path,
    prediction: str | Path,
    output: str | Path | None = None,
    options: EvaluationOptions | None = None,
    table: LabelTable | None = None,
    progress: Progress = silent,
    *,
    volume_index: int | None = None,
    scans: str | Path | None = None,
) -> Evaluation:
    """Score a prediction, or a folder of them, and write scores.csv, summary.json and report.html
    to `output`.

    Cases are matched by file name without suffix and `NAME_ENDINGS`. A folder with a mask of each
    structure is a case, too; structures that a reference has no mask of are not annotated there and
    are not scored. A case that cannot be scored is a problem of the evaluation and not an error,
    unless it is the only one. volume_index: which volume of files that hold several. scans: a
    folder of the scans, which report.html then shows under the errors. Raises `BadFile` for folders
    without a pair or where no case can be read, `BadGeometry` for a single case on two grids,
    `BadConfig` for options that contradict the data, `BadOutput` for a place that cannot be
    written.
    """
    reference, prediction = Path(reference), Path(prediction)
    masks = masked_cases(reference, prediction, table)
    table = _table_with_masks(masks, table, reference, prediction=prediction)
    options = _with_structures(options or EvaluationOptions(), table)
    values = {label.name: label.value for label in table.labels} if table else {}
    volume = {} if volume_index is None else {"volume": volume_index}
    reader = LabelReader(values=values, volume_index=volume_index)
    pairs, missing, extra = match_cases(reference, prediction, masks)
    backgrounds = {} if scans is None else match_scans(scans, pairs)
    if options.number_cases:
        backgrounds, pairs, missing, extra = numbered(backgrounds, pairs, missing, extra)
    cases, failures = _score_all(pairs, options, reader=reader, progress=progress)
    _check_names(options, sorted({row["structure"] for one in cases.values() for row in one.rows}))
    if not cases:
        problems = _why_not_scored(missing, extra, failures)
        raise BadFile(f"{prediction}: no case could be scored; the first problem was {problems[0]}")
    evaluation = _put_together(
        cases, failures, options=options, unmatched=(missing, extra), named=table is not None
    )
    evaluation.summary["options"] |= volume
    if output is not None:
        paths = {case: pairs[case] for case in cases}
        write_evaluation(evaluation, output, paths, options, reader=reader, scans=backgrounds)
    return evaluation


def score_pairs(
    pairs: Mapping[str, tuple[Path, Path]], options: EvaluationOptions
) -> dict[str, dict[str, Any]]:
    """Score some of the cases of an evaluation, each a file of the reference and one of the
    prediction, as plain values for `evaluation_of`: another process may do the others.
    """
    if not pairs:
        return {}
    results = dict(_in_parallel(pairs, options, LabelReader()))
    return {
        case: asdict(result)
        if isinstance(result, _Case)
        else {"failure": without_names(str(result), *pairs[case])}
        for case, result in results.items()
    }


def evaluation_of(
    scored: Mapping[str, Mapping[str, Any]], options: EvaluationOptions
) -> Evaluation:
    """The evaluation of cases that `score_pairs` has scored, as `evaluate` makes it without a
    table. Raises `BadFile` where no case could be scored.
    """
    failures = {case: one["failure"] for case, one in scored.items() if "failure" in one}
    cases = {case: _Case(**one) for case, one in scored.items() if case not in failures}
    if not cases:
        case, why = next(iter(failures.items()), ("", "there is none"))
        raise BadFile(f"no case could be scored; the first problem was {case}: {why}")
    return _put_together(cases, failures, options=options)


def _put_together(
    cases: Mapping[str, _Case],
    failures: Mapping[str, str],
    *,
    options: EvaluationOptions,
    unmatched: tuple[list[str], list[str]] = ([], []),
    named: bool = False,
) -> Evaluation:
    """unmatched: cases without a prediction, and without a reference. named: whether a table names
    labels.
    """
    missing, extra = unmatched
    problems = [*_why_not_scored(missing, extra, failures), *_problems_of(cases, named=named)]
    rows = _with_absent(cases, options)
    summary = {
        "cases": {
            "scored": list(cases),
            "without_prediction": missing,
            "without_reference": extra,
            "failed": failures,
            "turned_or_resampled": _grid_notes(cases),
        },
        "problems": problems,
        "options": _plain(asdict(options)),
        **summarise(rows, options.bootstrap, options.seed),
    }
    return Evaluation(rows, summary, problems)


def _score_all(
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    *,
    reader: LabelReader,
    progress: Progress,
) -> tuple[dict[str, _Case], dict[str, str]]:
    """The scores of all cases, and of those that could not be scored the reason; of a single case
    it is raised.
    """
    cases: dict[str, _Case] = {}
    failures: dict[str, str] = {}
    for count, (case, result) in enumerate(_in_parallel(pairs, options, reader), start=1):
        if isinstance(result, _Case):
            cases[case] = result
        elif len(pairs) == 1:
            raise result
        else:
            failures[case] = without_names(str(result), *pairs[case])
        progress(case, count, len(pairs))
    return cases, failures


def _table_with_masks(
    masked: MaskedCases, table: LabelTable | None, reference: Path, prediction: Path
) -> LabelTable | None:
    """The table with the structures that masks are named after. Raises `BadConfig` where values
    have no names.

    Beside a label map of numbers alone nobody can say which mask is which number.
    """
    if not masked.sides:
        return table
    if masked.sides == 1 and table is None:
        masks, maps = (reference, prediction) if masked.reference else (prediction, reference)
        raise BadConfig(
            f"{masks}: holds a mask of each structure, and nothing names the labels of {maps}; "
            "give a table of them with --table"
        )
    return table_of_masks(masked.names, table)


def _problems_of(cases: Mapping[str, _Case], *, named: bool) -> list[str]:
    """What a reader of the scores should know of the cases that were scored. named: whether a table
    names labels.
    """
    problems = [f"{case}: {one.grid_note}" for case, one in cases.items() if one.grid_note]
    apart = {case: one for case, one in cases.items() if one.apart}
    if apart:
        first, one = next(iter(apart.items()))
        problems.append(
            f"{len(apart)} of {len(cases)} cases have no label value in common: in {first} the"
            f" reference has {listed(one.values[0])} and the prediction {listed(one.values[1])};"
            " where these mean the same, say so with --labels, e.g. --labels"
            f" name={one.values[0][0]}+{one.values[1][0]}"
        )
    for name in dict.fromkeys(name for one in cases.values() for name in one.not_annotated):
        count = sum(name in one.not_annotated for one in cases.values())
        problems.append(
            f"{name}: {count} of {len(cases)} references have no mask of it, and it was not scored"
            " there"
        )
    strays = sorted({value for one in cases.values() for value in one.strays})
    if strays and named:
        problems.append(
            f"labels {listed(strays)} are in the files but in no structure; they were not scored"
        )
    return problems


def _with_structures(options: EvaluationOptions, table: LabelTable | None) -> EvaluationOptions:
    """The options with the structures of the table where they name none, but for the one to be
    ignored. Raises `BadConfig` if lesions or tolerances name a structure that is not scored.
    """
    if options.structures is None and table is not None:
        names = scored_names(table)
        structures = {name: (value,) for value, name in names.items() if value != options.ignore}
        options = replace(options, structures=structures)
    if options.structures is None:
        return options
    _check_names(options, options.structures)
    return options


def _check_names(options: EvaluationOptions, structures: Collection[str]) -> None:
    """Raise `BadConfig` if lesions or tolerances name a structure that is not scored."""
    tolerances = options.tolerance_mm if isinstance(options.tolerance_mm, Mapping) else {}
    for name in [*options.lesions, *tolerances]:
        if name and structures and name not in structures:
            raise BadConfig(f"'{name}' is not one of the structures {listed(structures)}")


def _in_parallel(
    pairs: Mapping[str, tuple[Path, Path]], options: EvaluationOptions, reader: LabelReader
) -> Iterator[tuple[str, _Case | MedsegError]]:
    """Score the cases on threads (reading and scoring release the interpreter lock), and yield them
    in order.
    """

    def one(case: str) -> _Case | MedsegError:
        try:
            return _score_case(case, *pairs[case], options=options, reader=reader)
        except BadConfig:
            raise  # not the fault of a case
        except MedsegError as error:
            return error

    pool = ThreadPoolExecutor(min(len(pairs), threads()))
    try:
        yield from zip(pairs, pool.map(one, pairs))
    finally:
        pool.shutdown(cancel_futures=True)


def _score_case(
    case: str,
    reference_path: Path,
    prediction_path: Path,
    *,
    options: EvaluationOptions,
    reader: LabelReader,
) -> _Case:
    reference = reader.read(reference_path)
    prediction, note = on_grid_of(reference, reader.read(prediction_path), options.resample)
    values = [_labels_in(volume.data, options.ignore) for volume in (reference, prediction)]
    present = sorted({*values[0], *values[1]})
    structures = options.structures
    if structures is None:
        structures = {f"label {value}": (value,) for value in present}
    not_annotated = _not_annotated(reference_path, structures, reader)
    structures = {name: labels for name, labels in structures.items() if name not in not_annotated}
    scores = _scores(
        reference.data, prediction.data, reference.spacing_mm, structures, options=options
    )
    structure_values = {value for labels in structures.values() for value in labels}
    structure_values |= {reader.values[name] for name in not_annotated if name in reader.values}
    return _Case(
        rows=[{"case": case, "structure": name, **row} for name, row in scores.items()],
        grid_note=note,
        strays=[value for value in present if value not in structure_values],
        values=(values[0], values[1]),
        spacing_mm=reference.spacing_mm,
        not_annotated=not_annotated,
    )


def _scores(
    reference: NDArray,
    prediction: NDArray,
    spacing_mm: tuple[float, float, float],
    structures: Mapping[str, tuple[int, ...]],
    *,
    options: EvaluationOptions,
) -> dict[str, dict[str, Any]]:
    """The scores of structures in a pair of label maps, those of lesions too where asked."""
    scores = score(
        reference,
        prediction,
        spacing_mm,
        structures,
        surface=options.surface,
        percentiles=options.percentiles,
        tolerance_mm=options.tolerance_mm,
        ignore=options.ignore,
        empty=options.empty,
    )
    for name in options.lesions:
        if name in structures:
            masks = [np.isin(labels, structures[name]) for labels in (reference, prediction)]
            if options.ignore is not None:
                masks = [mask & (reference != options.ignore) for mask in masks]
            scores[name] |= lesion_scores(
                masks[0],
                masks[1],
                spacing_mm,
                options=options.lesion_options,
                surface=options.surface,
            )
    return scores


def _not_annotated(
    reference: Path, structures: Mapping[str, tuple[int, ...]], reader: LabelReader
) -> tuple[str, ...]:
    """Structures of which a label has no mask in a reference that is a folder of masks."""
    if not reference.is_dir():
        return ()
    there = {reader.values[name] for name in masks_in(reference)}
    return tuple(name for name, labels in structures.items() if not set(labels) <= there)


def _labels_in(labels: NDArray, ignore: int | None) -> list[int]:
    """The values of a label map without background and the one to be ignored."""
    return [int(value) for value in _values(labels) if value not in (0, ignore)]


def _values(labels: NDArray) -> NDArray[np.int64]:
    there = np.zeros(65_536, bool)
    for plane in labels:
        there[plane] = True
    return np.flatnonzero(there)


def _with_absent(cases: Mapping[str, _Case], options: EvaluationOptions) -> list[dict[str, Any]]:
    """The rows of all cases, with one of status both_empty for each structure that only other cases
    have.
    """
    names = options.structures
    if names is None:
        every = {row["structure"] for one in cases.values() for row in one.rows}
        names = {
            name: (int(name.split()[1]),)
            for name in sorted(every, key=lambda name: int(name.split()[1]))
        }
    rows = []
    nothing = np.zeros((1, 1, 1), np.uint8)
    for case, one in cases.items():
        there = {row["structure"]: row for row in one.rows}
        structures = [name for name in names if name not in one.not_annotated]
        lacking = {name: names[name] for name in structures if name not in there}
        absent: dict[str, dict[str, Any]] = {}
        if lacking:
            absent = _scores(nothing, nothing, one.spacing_mm, lacking, options=options)
        rows += [
            there.get(name) or {"case": case, "structure": name, **absent[name]}
            for name in structures
        ]
    return rows


def write_evaluation(
    result: Evaluation,
    output: str | Path,
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    reader: LabelReader | None = None,
    scans: Mapping[str, Path] | None = None,
) -> None:
    """Write scores.csv, summary.json and report.html to a folder: all three, or none where one
    cannot be written. scans: files of the scans, by case, to be shown in the report.
    """
    from medseg.evaluation.report import report_html

    output = Path(output)
    texts = {
        "scores.csv": scores_csv(result.rows),
        "summary.json": json.dumps(result.summary, indent=1, allow_nan=False) + "\n",
        "report.html": report_html(
            result, pairs, options, reader=reader or LabelReader(), scans=scans
        ),
    }
    with written_together() as stage:
        for name, text in texts.items():
            with atomic_write(stage(output / name)) as file:
                file.write(text.encode())


def _plain(value: Any) -> Any:
    """The value with tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _grid_notes(cases: Mapping[str, Any]) -> dict[str, str]:
    """Of each case whose prediction lay on another grid: what was done about it."""
    return {case: one.grid_note for case, one in cases.items() if one.grid_note}


def _why_not_scored(
    missing: Iterable[str], extra: Iterable[str], failed: Mapping[str, Any]
) -> list[str]:
    """A sentence for each case without a score."""
    return [
        *(f"{case}: there is no prediction" for case in missing),
        *(f"{case}: there is no reference" for case in extra),
        *(f"{case}: {error}" for case, error in failed.items()),
    ]
