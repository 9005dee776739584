"""Scores, comparisons and cleaned label maps from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from medseg.errors import BadConfig
from medseg.evaluation import (
    Evaluation,
    EvaluationOptions,
    compare as compare_files,
    evaluate as evaluate_files,
    find_table,
    parse_structures,
)
from medseg.files import private_folder
from medseg.inference import Segmentation
from medseg.io import ScanLike, as_labels, as_path, embedded_table, is_path, what_is, write
from medseg.labels import MAX_VALUE, LabelTable, structure_value
from medseg.logs import Progress, silent
from medseg.postprocess import clean as clean_labels, steps_of
from medseg.text import as_whole
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.evaluation import Comparison, LesionOptions


class Scoring(TypedDict, total=False):
    """The fields of `EvaluationOptions` as keywords."""

    ignore: int | None
    surface: Literal["surfel", "voxel"]
    percentiles: tuple[float, ...]
    tolerance_mm: float | Mapping[str, float]
    empty: Literal["nan", "best_worst", "diagonal"]
    lesions: tuple[str, ...]
    lesion_options: LesionOptions
    resample: bool
    bootstrap: int
    seed: int
    number_cases: bool


def evaluate(
    reference: ScanLike | Segmentation,
    prediction: ScanLike | Segmentation,
    output: str | Path | None = None,
    *,
    labels: str | Mapping[str, int | Sequence[int]] | None = None,
    table: LabelTable | str | Path | None = None,
    volume_index: int | None = None,
    scans: str | Path | None = None,
    progress: Progress = silent,
    **options: Unpack[Scoring],
) -> Evaluation:
    """Score label maps against references, as `medseg evaluate` does.

    reference, prediction: files or folders of them; or two label maps that a program holds, such as
    what `segment` returned. output: a folder for scores.csv, summary.json and report.html. labels:
    structures as '1,2', 'liver=1,tumour=1+2+3' or a mapping of names to values. table: what values
    mean; else what lies beside the files. scans: a folder of the scans, or the scan of one case, to
    be shown under the errors in report.html. options: see `medseg.evaluation.EvaluationOptions`.
    Raises `BadFile`, `BadGeometry` for two maps on different grids, `BadConfig`, `BadOutput`.
    """
    known = {one.name for one in fields(EvaluationOptions)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"there is no option '{unknown[0]}'; there are {', '.join(sorted(known))}")
    with ExitStack() as ending:
        if is_path(reference) and is_path(prediction):
            files = as_path(reference, "the reference"), as_path(prediction, "the prediction")
        else:
            table = table or _table_of(reference) or _table_of(prediction)
            folder = ending.enter_context(private_folder())
            files = (
                _file_of(reference, folder / "reference.nrrd"),
                _file_of(prediction, folder / "prediction.nrrd"),
            )
        names = table_of(table) or find_table(None, *files)
        asked = replace(EvaluationOptions(), **options)
        if labels is not None:
            asked = replace(asked, structures=_structures(labels, names))
        return evaluate_files(
            *files, None if output is None else as_path(output, "output"), asked, names, progress,
            volume_index=volume_index, scans=None if scans is None else as_path(scans, "scans"),
        )  # fmt: skip


def _structures(
    labels: str | Mapping[str, int | Sequence[int]], table: LabelTable | None
) -> dict[str, Any]:
    if isinstance(labels, str):
        return dict(parse_structures(labels, table))
    if isinstance(labels, Mapping) and labels:
        return dict(labels)
    raise BadConfig(f"labels are a text such as '1,2' or a mapping, and this is {what_is(labels)}")


def table_of(table: object) -> LabelTable | None:
    """A label table or its file; None where none is given. Raises `BadConfig` for anything else."""
    if table is None or isinstance(table, LabelTable):
        return table
    if not is_path(table):
        raise BadConfig(f"a table is a medseg.LabelTable or its file, and this is {what_is(table)}")
    return LabelTable.read(as_path(table, "a table"))


def _table_of(labels: object) -> LabelTable | None:
    return labels.table if isinstance(labels, Segmentation) else None


def _file_of(labels: ScanLike | Segmentation, path: Path) -> Path:
    """The file of a label map, which is written to `path` where it has none."""
    if is_path(labels):
        return as_path(labels, "a label map")
    write(label_map(labels), path)
    return path


def label_map(labels: ScanLike | Segmentation) -> Volume:
    """Any form of a label map, a result too. Raises `BadConfig`, `BadFile`."""
    return as_labels(labels.labels if isinstance(labels, Segmentation) else labels)


def compare(
    scores: Sequence[str | Path],
    score: str = "dice",
    *,
    structure: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare methods on the same cases by their scores.csv, as `medseg compare` does: ranking, its
    stability, and paired tests.

    Raises `BadFile` for files that are no scores, `BadConfig` for fewer than two, a score or
    structure that is not there, or fewer than two common cases.
    """
    if isinstance(scores, str | Path) or not isinstance(scores, Sequence):
        raise BadConfig(f"scores are a list of two files or more, and this is {what_is(scores)}")
    files = [as_path(one, "each of scores") for one in scores]
    bootstrap, seed = as_whole(bootstrap, "bootstrap"), as_whole(seed, "seed")
    return compare_files(files, score, structure, bootstrap, seed)


def clean(
    labels: ScanLike | Segmentation,
    output: str | Path | None = None,
    *,
    only: Iterable[int | str] = (),
    keep_largest: bool = False,
    keep: int | None = None,
    min_mm3: float | None = None,
    fill_holes: bool = False,
    overwrite: bool = False,
    connectivity: Literal[6, 18, 26] = 26,
) -> Volume:
    """Clean up a label map, as `medseg clean` does: keep the largest parts, drop small ones, fill
    holes, in this order. Returns it, and writes it where `output` says.

    only: the labels that this is about by value or name, all by default. keep: so many parts of
    each. overwrite: fill holes over other labels, too. connectivity: what touches is one part.
    Raises `BadConfig` where nothing is to be done.
    """
    for name, one in (("keep_largest", keep_largest), ("fill_holes", fill_holes)):
        if one not in (True, False):
            raise BadConfig(f"{name} is True or False, and this is {what_is(one)}")
    table = embedded_table(Path(labels)) if is_path(labels) else _table_of(labels)
    values = _values_of(only, labels, table)
    chosen = {"labels": values} if values else {}
    steps = steps_of(
        count=keep or int(keep_largest),
        min_mm3=min_mm3,
        fill=fill_holes,
        overwrite=overwrite,
        connectivity=connectivity,
    )
    if not steps:
        raise BadConfig("say what to do: keep_largest, keep, min_mm3 or fill_holes")
    cleaned = clean_labels(label_map(labels), [step | chosen for step in steps])
    if output is not None:
        write(cleaned, as_path(output, "output"), table=table)
    return cleaned


def _values_of(
    only: Iterable[int | str], labels: ScanLike | Segmentation, table: LabelTable | None
) -> list[int]:
    """Label values by values or names. Raises `BadConfig`."""
    if isinstance(only, str) or not isinstance(only, Iterable):
        raise BadConfig(f"only is a list of names or values, and this is {what_is(only)}")
    names = list(only)
    if table is None and is_path(labels):
        table = find_table(None, Path(labels), Path(labels))
    return [
        structure_value(one, table, "only")
        if isinstance(one, str)
        else as_whole(one, "each of only", least=1, most=MAX_VALUE)
        for one in names
    ]
