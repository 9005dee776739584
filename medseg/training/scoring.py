"""What follows the loop: the validation scans segmented and scored, cleanup chosen; and how long
that will take.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from medseg.config import Config
from medseg.dataset import Case, Dataset, read_case_labels, read_channels
from medseg.errors import BadConfig
from medseg.evaluation import (
    Evaluation,
    EvaluationOptions,
    evaluate,
    evaluation_of,
    score_pairs,
    summarise,
    write_evaluation,
)
from medseg.files import output_errors, private_folder
from medseg.inference import Settings, settle_auto, use_settled
from medseg.io import is_slicer_segmentation, label_kind, read_labels, write
from medseg.models import Checkpoint, load_checkpoint
from medseg.networks import build_network
from medseg.postprocess import clean
from medseg.text import is_reserved
from medseg.training.processes import Processes, is_seen
from medseg.training.scans import ScanSource, Score, mean_scores, scores_of, structures_of
from medseg.volume import same_grid

#: A cleanup step is kept if it raises the mean Dice on the validation scans by more than this.
_WORTH_CLEANING = 5e-4
#: Seconds for writing the model and its card.
_WRITING_S = 2.0


def rehearse(config: Config, source: ScanSource, processes: Processes) -> Callable[[], float]:
    """Infer two validation scans with a fresh network and score the truth of one as if it had been
    found, each process the same at once, as they will share the scans.

    What cannot work fails now, and it is known how long scoring takes, in seconds, as far as it is
    when the result is called: where the machine has become slower since, all of it takes longer.
    """
    cases, fixed_s, warm_s = len(source.validation), 0.0, 0.0
    if cases:
        network = build_network(
            config.model.name, source.channels, source.outputs, **config.model.options
        ).eval()
        _settle(source.as_model(network), processes)
        with torch.no_grad():
            source.validate(
                network.to(processes.device),
                seeds=[0, 1][:cases],
                device=processes.device,
                dtype=torch.float32,
            )
        if config.train.steps is None:
            fixed_s, warm_s = _scoring_seconds(source, with_report=processes.first)
        # Of the slowest, for all wait for it.
        times = processes.gather([source.seconds_a_case, fixed_s, warm_s])
        source.seconds_a_case, fixed_s, warm_s = map(max, zip(*times))
    rehearsed_s, turns = source.seconds_a_case, -(-cases // processes.size)

    def seconds() -> float:
        slower = max(1.0, source.seconds_a_case / rehearsed_s) if rehearsed_s else 1.0
        return _WRITING_S + slower * (fixed_s + turns * (1.2 * rehearsed_s + warm_s))

    return seconds


def _settle(model: Checkpoint, processes: Processes) -> None:
    """Let all processes infer in one arithmetic: each processor tries what is faster, and bits are
    others in another one.
    """
    if processes.size > 1 and processes.device.type == "cpu":
        choices = processes.gather(settle_auto(model, Settings(device="cpu"), {})["precision"])
        use_settled({"precision": "float32" if len(set(choices)) > 1 else choices[0]})


def _scoring_seconds(source: ScanSource, *, with_report: bool) -> tuple[float, float]:
    """How long scoring and its report take beside the inference: once, and for each further
    case. The report, of which the import of matplotlib is the most, has pictures of some cases.
    """
    options, case = scoring_options(source.dataset), source.validation[0]
    with references(source, [case]) as truth, private_folder() as folder:
        times = [time.monotonic()]
        for _ in range(2):
            evaluation = evaluate(truth, truth, options=options)
            times.append(time.monotonic())
        name = file_name(case)
        if with_report:
            pairs = {name: (truth / f"{name}.nii.gz",) * 2}
            write_evaluation(evaluation, folder, pairs=pairs, options=options)
        times.append(time.monotonic())
    cold, warm, report = (after - before for before, after in pairwise(times))
    return cold + 2 * report, warm


def predict(
    config: Config,
    source: ScanSource,
    run: Path,
    *,
    processes: Processes,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Label maps of the validation scans in run/validation, of which each process makes its share,
    and the cleanup steps that they were given. Raises `BadModel` where the model is not seen.
    """
    is_seen(run / "model" / "model.json")
    checkpoint = load_checkpoint(str(run / "model"))
    cases, folder = source.validation, run / "validation"
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
    steps = _cleanups(source) if config.cleanup == "auto" else []

    def look(number: int) -> list[dict[str, Score]]:
        case = cases[number]
        volumes = read_channels(source.dataset, case)
        labels = source.segment(volumes, checkpoint, processes.device, cleanup=False)
        truth = read_case_labels(case, volumes[0]).data
        maps = (clean(labels, one) for one in [[], *([step] for step in steps)])
        scores = [source.score(one.data, truth, case) for one in maps]
        write(labels, result_path(run, case))
        progress(min(number + processes.size, len(cases)), len(cases))
        return scores

    table = [[scores_of(row) for row in rows] for rows in processes.deal(len(cases), look)]
    cleanup = _chosen(steps, table) if config.cleanup == "auto" else list(config.cleanup)
    for number in processes.mine(len(cases)) if cleanup else ():
        path = result_path(run, cases[number])
        write(clean(read_labels(path), cleanup), path)
    return cleanup


def _cleanups(source: ScanSource) -> list[dict[str, Any]]:
    """The steps that are tried: the largest piece of all, and of each structure."""
    values = [label.value for label in source.table.labels]
    whole = (
        [{"step": "keep_largest", "together": True, "labels": values}] if len(values) > 1 else []
    )
    return whole + [{"step": "keep_largest", "labels": [value]} for value in values]


def _chosen(
    steps: Sequence[dict[str, Any]], table: Sequence[Sequence[Mapping[str, Score]]]
) -> list[dict[str, Any]]:
    """The steps, each tried alone, that raise the mean Dice and lower no structure's. table:
    [case][step or none].
    """
    before, cleanup = mean_scores([row[0] for row in table]), []
    for number, step in enumerate(steps, start=1):
        after = mean_scores([row[number] for row in table])
        gains = [after.get(name, 0.0) - score for name, score in before.items()]
        if gains and sum(gains) / len(gains) > _WORTH_CLEANING / len(gains) and min(gains) > -1e-4:
            cleanup.append(step)
    return cleanup


def scoring_options(dataset: Dataset) -> EvaluationOptions:
    """How the label maps of a data set are scored."""
    return EvaluationOptions(structures=structures_of(dataset), ignore=dataset.ignore)


def score_validation(source: ScanSource, run: Path, processes: Processes) -> Evaluation | None:
    """Scores of run/validation, of which each process computes its share; None in other processes
    than the first. Of partly annotated cases only what is annotated counts.
    """
    options = scoring_options(source.dataset)
    own = [source.validation[number] for number in processes.mine(len(source.validation))]
    with references(source, own) as folder:
        pairs = {
            file_name(case): (folder / f"{file_name(case)}.nii.gz", result_path(run, case))
            for case in own
        }
        parts = processes.gather(score_pairs(pairs, options))
    if not processes.first:
        return None
    scored = {case: result for part in parts for case, result in part.items()}
    result = evaluation_of({case: scored[case] for case in sorted(scored)}, options)
    names = {label.name: label.value for label in source.table.labels}
    partly = {
        file_name(case): case.labelled for case in source.validation if case.labelled is not None
    }
    rows = [
        row
        for row in result.rows
        if row["case"] not in partly or names[row["structure"]] in (partly[row["case"]] or ())
    ]
    summary = result.summary | summarise(rows)
    return Evaluation(rows=rows, summary=summary, problems=result.problems)


def scored_pairs(
    cases: Sequence[Case], run: Path, summary: Mapping[str, Any]
) -> dict[str, tuple[Path, Path]]:
    """The files of the true and the found labels of each scored case, for the report."""
    pairs = {}
    for case in cases:
        name, result = file_name(case), result_path(run, case)
        if (
            case.label is not None
            and name in summary["cases"]["scored"]
            and is_seen(result)  # another process may have written it
            and _is_as_used(case, result)
        ):
            pairs[name] = (case.label, result)
    return pairs


def _is_as_used(case: Case, result: Path) -> bool:
    """Whether the label file of a case shows what was trained: not if it is cropped, needs its
    images to be read, or numbers its structures anew.
    """
    if case.label is None or case.numbers or label_kind(case.label):
        return False
    return not is_slicer_segmentation(case.label) or same_grid(
        read_labels(case.label), read_labels(result)
    )


@contextmanager
def references(source: ScanSource, cases: Sequence[Case]) -> Iterator[Path]:
    """A folder with the true label maps of some cases, named like the results."""
    with private_folder() as folder:
        for case in cases:
            image = read_channels(source.dataset, case)[0]
            write(read_case_labels(case, image), folder / f"{file_name(case)}.nii.gz")
        yield folder


def result_path(run: Path, case: Case) -> Path:
    """Where the label map of a validation scan lies."""
    return run / "validation" / f"{file_name(case)}.nii.gz"


def file_name(case: Case) -> str:
    """What a case's files are called, without their ending."""
    name = re.sub(r"[^\w.-]+", "_", case.name)
    return f"_{name}" if is_reserved(name) else name


def check_file_names(cases: Iterable[Case]) -> None:
    """Raise `BadConfig` if the label maps of two cases would be one file, for their names differ
    only in what a file's name does not hold.
    """
    names: dict[str, str] = {}
    for case in cases:
        other = names.setdefault(os.path.normcase(file_name(case)), case.name)
        if other != case.name:
            raise BadConfig(
                f"the label maps of the validation cases {other} and {case.name} would be one file "
                f"({file_name(case)}.nii.gz); rename one of them"
            )
