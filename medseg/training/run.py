"""From a data set to a scored model folder: look at it, check it, plan, prepare, train, score, write it all down.

`loop.train` is the loop; here is what comes before and after it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.config import Config, make_config, override, read_settings
from medseg.dataset import (
    Case,
    Dataset,
    Finding,
    check_dataset,
    read_case_labels,
    read_channels,
    read_dataset,
    split_cases,
    usual_folds,
)
from medseg.documents import read_json
from medseg.errors import BadConfig, BadFile, BadModel
from medseg.evaluation import Evaluation, Options, evaluate, read_scores, summarise, write_evaluation
from medseg.files import atomic_write, private_folder, sweep
from medseg.inference import Settings, segment
from medseg.io import is_slicer_segmentation, read_labels, write
from medseg.memory import free_bytes
from medseg.models import Checkpoint, change_spec, load_checkpoint, model_card
from medseg.networks import DEEP_SUPERVISION, build_model
from medseg.postprocess import clean
from medseg.training.loop import train
from medseg.training.plan import Choice, Machine, as_json, as_settings, check_memory, fingerprint, make_plan
from medseg.training.processes import Team
from medseg.training.scans import Scans, structures_of
from medseg.training.state import load_state, locked, record_config
from medseg.training.tracking import open_trackers
from medseg.volume import same_grid

#: A cleanup step is kept if it raises the mean Dice on the validation scans by more than this.
_WORTH_CLEANING = 5e-4


@dataclass(frozen=True)
class Request:
    """What a person asked for.

    data: the data set. run: the folder of the run. config: a YAML file with some of the settings of `Config`.
    overrides: dotted settings, which go over the file's. folds, fold: how many parts the cases are split into (None:
    `usual_folds`), and which of them validates (None: the first, or with every_fold each in turn). finetune: a model or
    run to go on from. memory_bytes: not to be exceeded. anyway: train although the check found errors.
    """

    data: Path
    run: Path | None = None
    config: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    time_s: float | None = None
    folds: int | None = None
    fold: int | None = None
    every_fold: bool = False
    finetune: str | None = None
    memory_bytes: int | None = None
    track: tuple[str, ...] = ()
    resume: bool = True
    anyway: bool = False


def _nothing(*arguments: Any) -> None:
    pass


@dataclass(frozen=True)
class Listener:
    """Who is told what happens; each is called with what its name says."""

    found: Callable[[Dataset, Sequence[Finding]], None] = _nothing
    reading: Callable[[str, int, int], None] = _nothing  # what is done, cases done, all cases
    planned: Callable[[Sequence[Choice], Config], None] = _nothing
    training: Callable[[float, Mapping[str, Any]], None] = _nothing
    scored: Callable[[Evaluation], None] = _nothing
    say: Callable[[str], None] = _nothing


@dataclass(frozen=True)
class Outcome:
    """Finished training: the run folder, the models in it, their scores (None if nothing was held out), and for each
    scored case the files of its true and its found labels."""

    run: Path
    models: tuple[Path, ...]
    evaluation: Evaluation | None
    pairs: Mapping[str, tuple[Path, Path]] = field(default_factory=dict)


def train_folds(request: Request, listener: Listener | None = None) -> Outcome | None:
    """`train_dataset`, or with `every_fold` that for each fold in RUN/fold0 and so on, and scores over all of them.

    The time is shared by the folds. None in other processes than the first that torchrun started.
    """
    if not request.every_fold:
        return train_dataset(request, listener)
    dataset = read_dataset(request.data)
    run = request.run or Path("runs") / slug(dataset.name)
    count = len(_splits(request, dataset))
    time_s = request.time_s / count if request.time_s else None
    outcomes = [
        train_dataset(replace(request, run=run / f"fold{n}", fold=n, every_fold=False, time_s=time_s), listener)
        for n in range(count)
    ]
    done = [one for one in outcomes if one is not None]
    if len(done) < count:
        return None
    models = tuple(model for one in done for model in one.models)
    scored = [one.evaluation for one in done if one.evaluation is not None]
    rows = [row for one in scored for row in one.rows]
    cases = {"scored": [], "without_prediction": [], "without_reference": [], "failed": {}}  # type: ignore[var-annotated]
    for one in scored:
        cases["scored"] += one.summary["cases"]["scored"]
    summary = scored[0].summary | {"cases": scored[0].summary["cases"] | cases} | summarise(rows)
    pairs = {name: pair for one in done for name, pair in one.pairs.items()}
    evaluation = Evaluation(rows, summary, [problem for one in scored for problem in one.problems])
    write_evaluation(evaluation, run, pairs, _options(dataset))
    return Outcome(run, models, evaluation, pairs)


def train_dataset(request: Request, listener: Listener | None = None) -> Outcome | None:
    """Train on a data set, or go on where the run in the folder was left, and score the model.

    The run folder gets config.yaml, plan.json, splits.json, metrics.jsonl, progress.png, model/ (with its card),
    validation/ (label maps), scores.csv, summary.json and report.html. None in other processes than the first.
    Raises `BadFile` for data with errors, `BadConfig` for settings that contradict them, `NotEnoughMemory` before it
    begins.
    """
    began = time.monotonic()
    told = listener = listener or Listener()
    dataset = read_dataset(request.data, lambda name, done, count: told.reading("reading", done, count))
    run = request.run or Path("runs") / slug(dataset.name)
    _check_folder(run, request.resume)
    with Team() as team:
        if team.first:
            run.mkdir(parents=True, exist_ok=True)
            with locked(run, team):  # two processes must not plan into one folder
                for folder in (run, run / "prepared", run / "validation", run / "model"):
                    sweep(folder, min_age_s=0)
                _begin(request, dataset, run, team, listener)
        else:
            listener = Listener()
        team.wait()
        config, splits = _recorded(request, run)
        lost = [name for part in splits.values() for name in part if name not in {case.name for case in dataset.cases}]
        if lost:
            raise BadFile(f"{request.data}: case {lost[0]}, which {run} was begun with, is gone; choose another -o")
        if _is_finished(run):
            listener.say(f"{run} is finished; choose another -o to train again")
            return _recalled(run, dataset, splits["validation"]) if team.first else None

        def preparing(name: str, done: int, count: int) -> None:
            listener.reading("preparing", done, count)

        parts = splits["training"], splits["validation"], run / "prepared"
        if team.first:
            source = Scans(config, dataset, *parts, preparing)
        team.wait()
        if not team.first:  # finds what the first has prepared
            source = Scans(config, dataset, *parts)
        reserve = _rehearse(config, source, team)
        with open_trackers(request.track if team.first else (), run, start=int(_facts(run).get("step", 0))) as track:
            train(
                config, run, source,
                team=team, began=began, reserve=reserve, progress=listener.training, track=track,
            )  # fmt: skip
        if not team.first:
            return None
    return _finish(dataset, source, config, run, listener)


def _recalled(run: Path, dataset: Dataset, validation: Sequence[str]) -> Outcome:
    """What a finished run left."""
    if not validation:
        return Outcome(run, (run / "model",), None)
    summary = read_json(run / "summary.json")
    evaluation = Evaluation(read_scores(run / "scores.csv"), summary, summary["problems"])
    return Outcome(run, (run / "model",), evaluation, _pairs([dataset[name] for name in validation], run, summary))


#: What a run that was killed while it began may have left before its config.yaml.
_BEGUN = ("plan.json", "splits.json")


def _check_folder(run: Path, resume: bool) -> None:
    if (run / "config.yaml").exists():
        if not resume:
            raise BadConfig(f"{run} holds a run; choose another -o, or leave --no-resume out to go on with it")
    elif run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir() if path.name not in _BEGUN):
        raise BadConfig(f"{run} is not empty and holds no run; choose another -o")


def slug(name: str) -> str:
    """A name as the config takes it: lower case letters, digits, _ and -."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "model"


def _begin(request: Request, dataset: Dataset, run: Path, team: Team, listener: Listener) -> None:
    """Check and plan, and record the plan in the run folder; nothing is to be done if a plan is there."""
    if (run / "config.yaml").exists():
        return
    fixed = _fixed(request)
    check = check_dataset(dataset, lambda name, done, count: listener.reading("checking", done, count))
    listener.found(dataset, check.findings)
    errors = check.errors
    if errors and not request.anyway:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        first = f"{errors[0].case or dataset.folder}: {errors[0].message}{more}"
        raise BadFile(f"{first}; medseg check {request.data} shows all, and --anyway trains")
    training, validation = _split(request, dataset)
    found = fingerprint(check, training)
    machine = _machine(request, team)
    source_spec = load_checkpoint(request.finetune) if request.finetune else None
    if source_spec is not None:
        fixed = _adopted(source_spec, dataset) | fixed
    architecture = str(fixed.get("model.name") or request.architecture or "unet")
    choices = make_plan(dataset, found, machine, architecture, fixed)
    content: dict[str, Any] = {"name": slug(dataset.name), "data": str(request.data), "hold_out": validation}
    if request.finetune:
        content["start_from"] = str(source_spec.folder if source_spec else request.finetune)
    config = make_config(override(content, as_settings(choices) | fixed), str(request.config or request.data))
    check_memory(config, len(dataset.channels), len(dataset.regions) or len(dataset.table.labels) + 1, machine)
    listener.planned(choices, config)
    _write_json(run / "plan.json", as_json(choices, found))
    _write_json(run / "splits.json", {"training": training, "validation": validation})
    record_config(config, run)


def _fixed(request: Request) -> dict[str, Any]:
    """The settings that a person made, dotted: file first, then options, then overrides."""
    fixed: dict[str, Any] = {}
    for key, value in (read_settings(request.config) if request.config else {}).items():
        if key in ("model", "train", "augment") and isinstance(value, dict):
            fixed |= {f"{key}.{name}": one for name, one in value.items()}
        else:
            fixed[key] = value
    if request.architecture:
        if fixed.get("model.name", request.architecture) != request.architecture:
            raise BadConfig(f"{request.config} is for {fixed['model.name']}, not {request.architecture}")
        fixed["model.name"] = request.architecture
    if request.time_s is not None:
        fixed["train.time_s"] = request.time_s
    return fixed | dict(request.overrides)


def _recorded(request: Request, run: Path) -> tuple[Config, dict[str, list[str]]]:
    """The config and the split that the run folder holds; what is asked for now goes over it and is checked later."""
    content = read_settings(run / "config.yaml") | {"data": str(request.data)}
    config = make_config(override(content, _fixed(request)), str(run / "config.yaml"))
    splits = read_json(run / "splits.json")
    start = {"start_from": Path(request.finetune)} if request.finetune else {}
    return config.model_copy(update=start), splits


def _splits(request: Request, dataset: Dataset) -> list[tuple[list[str], list[str]]]:
    groups = {
        ("group", case.group) if case.group else ("case", case.name) for case in dataset.cases if case.split != "test"
    }
    if len(groups) < 2 and not dataset.splits:
        raise BadConfig(f"{request.data}: one case cannot both train and validate; annotate a second one")
    folds = request.folds or (usual_folds(len(groups)) if request.fold is None else 5)
    return split_cases(dataset, min(folds, max(len(groups), 2)))


def _split(request: Request, dataset: Dataset) -> tuple[list[str], list[str]]:
    splits, fold = _splits(request, dataset), request.fold or 0
    if not 0 <= fold < len(splits):
        raise BadConfig(f"there is no fold {fold}; the cases are split into {len(splits)}, counted from 0")
    return splits[fold]


def _machine(request: Request, team: Team) -> Machine:
    if team.device.type == "cuda":
        memory = torch.cuda.mem_get_info(team.device)[0]
    else:
        memory = int(0.9 * free_bytes() / team.size)
    return Machine(team.device.type, min(memory, request.memory_bytes or 2**62), team.size)


def _adopted(checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """What a model to go on from decides: the network, and the grid and intensities it knows."""
    spec = checkpoint.spec
    if spec.recipe is not None:
        raise BadModel(f"the model {spec.name} is nnU-Net's, which sees scans in another way than training does")
    if spec.channels != len(dataset.channels):
        raise BadModel(
            f"the model {spec.name} takes {spec.channels} channels and the data have {len(dataset.channels)}"
        )
    options = dict(spec.options)
    if spec.architecture in DEEP_SUPERVISION:
        options["deep_supervision"] = True
    intensity = spec.intensity if isinstance(spec.intensity, str) else [one.model_dump() for one in spec.intensity]
    return {
        "model.name": spec.architecture,
        "model.options": options,
        "model.patch": list(spec.patch),
        "model.spacing_mm": list(spec.spacing),
        "model.grid": spec.grid,
        "model.intensity": intensity,
    }


def _rehearse(config: Config, source: Scans, team: Team) -> Callable[[], float]:
    """Infer two validation scans with a fresh network: what cannot work fails now; and so is known how long scoring
    takes, in seconds, as far as it is known when the result is called."""
    cases = len(source.validation)
    if team.first and cases:
        network = build_model(config.model.name, source.channels, source.outputs, **config.model.options).eval()
        with torch.no_grad():
            source.validate(network.to(team.device), [0, 1][:cases], team.device, torch.float32)
    team.wait()
    # Beside the inference: metrics of surfaces and the report.
    return lambda: 10.0 + cases * (1.2 * source.seconds_a_case + 0.1)


def _facts(run: Path) -> dict[str, Any]:
    """What the newest state says of the run; nothing if there is none that can be read."""
    try:
        return load_state(run / "state.safetensors")[1] if (run / "state.safetensors").exists() else {}
    except BadModel:
        return {}


def _is_finished(run: Path) -> bool:
    return (run / "model" / "README.md").exists() and float(_facts(run).get("position", 0)) >= 1


def _finish(dataset: Dataset, source: Scans, config: Config, run: Path, listener: Listener) -> Outcome:
    """Score the model on the validation scans, choose its cleanup, write its card and delete the prepared scans."""
    evaluation, pairs = None, dict[str, tuple[Path, Path]]()
    if source.validation:
        steps = _predict(config, source, run, lambda done, count: listener.reading("scoring", done, count))
        change_spec(run / "model", cleanup=steps)
        evaluation, pairs = _evaluate(source, run)
        write_evaluation(evaluation, run, pairs, _options(source.dataset))
        listener.scored(evaluation)
    _, facts = load_state(run / "state.safetensors")
    plan = read_json(run / "plan.json")
    card = {
        "cases": {"training": len(source.training), "validation": len(source.validation)},
        "layout": dataset.layout,
        "steps": facts["step"],
        "training_seconds": round(facts["seconds"]),
        "fingerprint": plan["fingerprint"],
        "scores": evaluation.summary if evaluation else None,
    }
    change_spec(run / "model", card=config.card | {"training": {k: v for k, v in card.items() if k != "scores"}})
    for path in sorted((run / "prepared").glob("*.npy")):
        path.unlink()
    (run / "prepared").rmdir()
    # Last of all, for a run with a card counts as finished.
    with atomic_write(run / "model" / "README.md") as handle:
        handle.write(model_card(load_checkpoint(str(run / "model")), card).encode())
    return Outcome(run, (run / "model",), evaluation, pairs)


def _predict(config: Config, source: Scans, run: Path, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Label maps of the validation scans in run/validation, and the cleanup steps that they were given."""
    checkpoint = load_checkpoint(str(run / "model"))
    folder = run / "validation"
    folder.mkdir(exist_ok=True)
    steps = _cleanups(source) if config.cleanup == "auto" else []
    table: list[list[dict[str, float]]] = []
    for done, case in enumerate(source.validation, start=1):
        volumes = read_channels(source.dataset, case)
        labels = segment(volumes, checkpoint, Settings(cleanup=False, backend="torch")).labels
        truth = read_case_labels(case, volumes[0])
        table.append([source.dice(clean(labels, one).data, truth.data, case) for one in [[], *([s] for s in steps)]])
        write(labels, folder / f"{_file_name(case)}.nii.gz")
        progress(done, len(source.validation))
    chosen = _chosen(steps, table) if config.cleanup == "auto" else list(config.cleanup)
    if chosen:
        for case in source.validation:
            path = folder / f"{_file_name(case)}.nii.gz"
            write(clean(read_labels(path), chosen), path)
    return chosen


def _cleanups(source: Scans) -> list[dict[str, Any]]:
    """The steps that are tried: the largest piece of all, and of each structure."""
    values = [label.value for label in source.table.labels]
    whole = [{"step": "keep_largest", "together": True, "labels": values}] if len(values) > 1 else []
    return whole + [{"step": "keep_largest", "labels": [value]} for value in values]


def _chosen(steps: Sequence[dict[str, Any]], table: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """The steps, each tried alone, that raise the mean Dice and lower no structure's. table: [case][step or none]."""

    def means(column: int) -> dict[str, float]:
        names = dict.fromkeys(name for row in table for name in row[column])
        return {name: float(np.mean([row[column][name] for row in table if name in row[column]])) for name in names}

    before, chosen = means(0), []
    for number, step in enumerate(steps, start=1):
        after = means(number)
        gains = [after.get(name, 0.0) - score for name, score in before.items()]
        if gains and np.mean(gains) > _WORTH_CLEANING / max(1, len(gains)) and min(gains) > -1e-4:
            chosen.append(step)
    return chosen


def _options(dataset: Dataset) -> Options:
    return Options(structures=structures_of(dataset), ignore=dataset.ignore)


def _evaluate(source: Scans, run: Path) -> tuple[Evaluation, dict[str, tuple[Path, Path]]]:
    """Scores of run/validation; of partly annotated cases only what is annotated counts."""
    with _references(source) as folder:
        result = evaluate(folder, run / "validation", None, _options(source.dataset))
    names = {label.name: label.value for label in source.table.labels}
    told = {_file_name(case): case.labelled for case in source.validation if case.labelled is not None}
    rows = [
        row for row in result.rows if row["case"] not in told or names[row["structure"]] in (told[row["case"]] or ())
    ]
    summary = result.summary | summarise(rows)
    return Evaluation(rows, summary, result.problems), _pairs(source.validation, run, summary)


def _pairs(cases: Sequence[Case], run: Path, summary: Mapping[str, Any]) -> dict[str, tuple[Path, Path]]:
    """The files of the true and the found labels of each scored case, for the report."""
    found = {
        _file_name(case): (case, run / "validation" / f"{_file_name(case)}.nii.gz")
        for case in cases
        if case.label is not None and _file_name(case) in summary["cases"]["scored"]
    }
    return {name: (case.label, path) for name, (case, path) in found.items() if case.label and _is_as_used(case, path)}


def _is_as_used(case: Case, result: Path) -> bool:
    """Whether the label file of a case shows what was trained: not if it is cropped or numbers its
    structures anew.
    """
    if case.label is None or case.numbers:
        return False
    return not is_slicer_segmentation(case.label) or same_grid(read_labels(case.label), read_labels(result))


@contextmanager
def _references(source: Scans) -> Iterator[Path]:
    """A folder with the true label maps of the validation scans, named like the results."""
    with private_folder() as folder:
        for case in source.validation:
            image = read_channels(source.dataset, case)[0]
            write(read_case_labels(case, image), folder / f"{_file_name(case)}.nii.gz")
        yield folder


def _file_name(case: Case) -> str:
    return re.sub(r"[^\w.-]+", "_", case.name)


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as handle:
        handle.write((json.dumps(content, indent=1) + "\n").encode())
