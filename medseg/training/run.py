"""`medseg train DATASET`: check, plan, prepare, train, score, write down; or go on where that was
left.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.config import Config, make_config, override, read_settings
from medseg.dataset import Dataset, Split, covering, read_dataset
from medseg.errors import BadConfig, BadModel, BadOutput, DataWarning, MedsegError
from medseg.evaluation import (
    Evaluation,
    read_scores,
    score_titles,
    summarise,
    write_evaluation,
)
from medseg.files import atomic_write, output_errors, sweep
from medseg.models import change_spec, load_checkpoint, model_card
from medseg.text import read_json
from medseg.training.beginning import (
    begin,
    fold_number,
    folds_of,
    splits_of,
    view_of,
)
from medseg.training.identity import (
    NAME as IDENTITY,
    check_same_data,
    check_same_split,
    check_same_start,
    read_identity,
)
from medseg.training.loop import train
from medseg.training.origin import hash_of, read_start
from medseg.training.prepared.reading import PreparedScans
from medseg.training.processes import Processes
from medseg.training.request import Events, Outcome, Request
from medseg.training.scans import ScanSource
from medseg.training.scoring import (
    predict,
    rehearse,
    score_validation,
    scored_pairs,
    scoring_options,
)
from medseg.training.state import check_same_settings, load_state, locked
from medseg.training.step import LEAST_PASSES
from medseg.training.tracking import open_trackers

#: What a run that was killed while it began may have left before its config.yaml.
_BEGUN = ("plan.json", "splits.json", IDENTITY)


def train_folds(request: Request, events: Events | None = None) -> Outcome | None:
    """`train_dataset`, or with `every_fold` that for each fold in RUN/fold0 and so on, and scores
    over all of them.

    The time is shared by the folds. None in other processes than the first that torchrun started.
    """
    if not request.every_fold:
        return train_dataset(request, events)
    with Processes(_device(request)):  # what one of them cannot read ends all
        dataset = read_dataset(request.data)
        run, folds = request.folder(dataset), range(len(splits_of(request, dataset)))
    time_s = request.time_s / len(folds) if request.time_s else None
    outcomes = []
    for fold in folds:
        one = replace(request, run=run / f"fold{fold}", fold=fold, every_fold=False, time_s=time_s)
        outcomes.append(
            _train(one if fold == 0 else replace(one, began=None), events, folds=folds[fold:])
        )
    fold_outcomes = [outcome for outcome in outcomes if outcome is not None]
    return _together(fold_outcomes, dataset, run) if len(fold_outcomes) == len(folds) else None


def _together(outcomes: Sequence[Outcome], dataset: Dataset, run: Path) -> Outcome:
    """The models of all folds, and the scores of all cases."""
    evaluations = [one.evaluation for one in outcomes if one.evaluation is not None]
    rows = [row for one in evaluations for row in one.rows]
    problems = [problem for one in evaluations for problem in one.problems]
    folds = [one.summary["cases"] for one in evaluations]
    cases = {
        name: {case: text for one in folds for case, text in one[name].items()}
        if isinstance(some, dict)
        else [case for one in folds for case in one[name]]
        for name, some in folds[0].items()
    }
    summary = evaluations[0].summary | {"cases": cases, "problems": problems} | summarise(rows)
    pairs = {name: pair for one in outcomes for name, pair in one.pairs.items()}
    evaluation = Evaluation(rows=rows, summary=summary, problems=problems)
    write_evaluation(evaluation, run, pairs=pairs, options=scoring_options(dataset))
    models = tuple(model for one in outcomes for model in one.models)
    return Outcome(run=run, models=models, evaluation=evaluation, pairs=pairs)


def train_dataset(request: Request, events: Events | None = None) -> Outcome | None:
    """Train on a data set, or go on where the run in the folder was left, and score the model.

    The run folder gets config.yaml, plan.json, splits.json, data.json, metrics.jsonl, progress.png,
    model/ (with its card), validation/ (label maps), scores.csv, summary.json and report.html. None
    in other processes than the first. Raises `BadFile` for data with errors, `BadConfig` for
    settings that contradict them, for a run that was begun with something else and for a time in
    which nothing can be learnt, `NotEnoughMemory` before it begins.
    """
    return _train(request, events, folds=(request.fold or 0,))


def _train(request: Request, events: Events | None, *, folds: Sequence[int]) -> Outcome | None:
    """`train_dataset`. folds: those that the command trains, this one first."""
    began = time.monotonic() if request.began is None else request.began
    request, hear = replace(request, began=began), events or Events()
    # The others are joined before anything is read: what one of them cannot read ends all.
    with Processes(_device(request)) as processes:
        hear = hear if processes.first else Events()
        dataset = read_dataset(
            request.data, lambda name, done, count: hear.reading("reading", done, count)
        )
        run = request.folder(dataset)
        _check_folder(run, request.resume)
        if processes.size > 1:
            processes.check_same(view_of(dataset, request.prepared_scans), dataset.folder)
        _begin(request, dataset, run, processes=processes, events=hear, folds=folds)
        config, (training, validation) = _recorded(request, run)
        processes.check_batch(config.train.batch)
        if _is_finished(run):
            hear.say(f"{run} is finished; choose another -o to train again")
            return _recalled(run, dataset, validation) if processes.first else None
        source = _prepare(
            config, dataset, run, split=(training, validation), processes=processes, events=hear,
            prepared=request.prepared_scans,
        )  # fmt: skip
        reserve = rehearse(config, source, processes)
        if processes.first:
            _check_time_left(
                config,
                run,
                left_s=(config.train.time_s or 0.0) - time.monotonic() + began - reserve(),
            )
        step = int(_facts(run).get("step", 0))
        with open_trackers(request.track if processes.first else (), run, start=step) as track:
            train(
                config,
                run,
                source,
                processes=processes,
                began=began,
                reserve=reserve,
                progress=hear.training,
                track=track,
            )
        scored = None
        if source.validation:
            scored = _score(source, config, run=run, processes=processes, events=hear)
        if not processes.first:
            return None
    return _finish(dataset, source, config, run=run, scored=scored, events=hear)


def _device(request: Request) -> str:
    """The device asked for; 'auto' where that cannot be read, which is said later, to all."""
    settings = dict(request.overrides)
    with suppress(MedsegError):
        settings = request.fixed()
    return str(settings.get("train.device", "auto"))


def _begin(
    request: Request,
    dataset: Dataset,
    run: Path,
    *,
    processes: Processes,
    events: Events,
    folds: Sequence[int],
) -> None:
    """Record what is to be done in the run folder, or check that it is what was begun there, which
    is the first process's business.
    """
    batch = request.fixed().get("train.batch")
    if isinstance(batch, int):
        processes.check_batch(batch)  # before a plan is recorded with it
    with _own_folder(run) if processes.first else nullcontext():
        processes.check_folder(run)
        if processes.first:
            with locked(run, processes):  # two commands must not plan into one folder
                for folder in (run, run / "prepared", run / "validation", run / "model"):
                    sweep(folder, min_age_s=0)
                if (run / "config.yaml").exists():
                    _check_same(request, dataset, run, events=events)
                else:
                    begin(request, dataset, run, processes=processes, events=events, folds=folds)
    processes.wait()


def _check_folder(run: Path, resume: bool) -> None:
    if run.exists() and not run.is_dir():
        raise BadOutput(f"{run}: is a file; give a folder with -o")
    if (run / "config.yaml").exists():
        if not resume:
            raise BadConfig(
                f"{run} holds a run; choose another -o, or leave --no-resume out to go on with it"
            )
    elif run.is_dir() and any(
        not path.name.startswith(".") for path in run.iterdir() if path.name not in _BEGUN
    ):
        raise BadConfig(f"{run} is not empty and holds no run; choose another -o")


@contextmanager
def _own_folder(run: Path) -> Iterator[None]:
    """The run folder, which goes again if it was made here and what is refused has left nothing but
    a lock in it.
    """
    made = not run.exists()
    with output_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made and {path.name for path in run.iterdir()} <= {".lock"}:
            (run / ".lock").unlink(missing_ok=True)
            run.rmdir()


# Going on -----------------------------------------------------------------------------------------


def _check_same(request: Request, dataset: Dataset, run: Path, *, events: Events) -> None:
    """Raises `BadConfig` naming what is not as it was when the run in the folder began."""
    config, _ = _recorded(request, run)
    check_same_settings(config, run, finished=_is_finished(run))
    start = hash_of(read_start(request.finetune)) if request.finetune else None
    check_same_start(run, start, has_state=(run / "state.safetensors").exists())
    check_same_split(
        run,
        dataset,
        folds=None if request.folds is None else folds_of(request, dataset),
        fold=request.fold,
        split_of=lambda fold: _held_out(request, dataset, fold),
    )
    check_same_data(
        run, dataset, lambda name, done, count: events.reading("comparing", done, count)
    )


def _held_out(request: Request, dataset: Dataset, fold: int) -> list[str]:
    """The cases that a fold validates with. Raises `BadConfig` if there is no such fold."""
    splits = splits_of(request, dataset)
    return list(splits[fold_number(replace(request, fold=fold), splits)][1])


def _recorded(request: Request, run: Path) -> tuple[Config, Split]:
    """The config and the split that the run folder holds; what is asked for now goes over it and is
    checked later.
    """
    content = read_settings(run / "config.yaml") | {"data": str(request.data)}
    config = make_config(override(content, request.fixed()), str(run / "config.yaml"))
    sides = read_json(run / "splits.json")
    start = {"start_from": Path(request.finetune)} if request.finetune else {}
    return config.model_copy(update=start), (sides["training"], sides["validation"])


def _facts(run: Path) -> dict[str, Any]:
    """What the newest state says of the run; nothing if there is none that can be read."""
    try:
        return (
            load_state(run / "state.safetensors")[1] if (run / "state.safetensors").exists() else {}
        )
    except BadModel:
        return {}


def _is_finished(run: Path) -> bool:
    return (run / "model" / "README.md").exists() and float(_facts(run).get("position", 0)) >= 1


def _recalled(run: Path, dataset: Dataset, validation: Sequence[str]) -> Outcome:
    """What a finished run left."""
    models = (run / "model",)
    if not validation:
        return Outcome(run=run, models=models, evaluation=None)
    summary = read_json(run / "summary.json")
    rows = read_scores(run / "scores.csv")
    evaluation = Evaluation(rows=rows, summary=summary, problems=summary["problems"])
    pairs = scored_pairs([dataset[name] for name in validation], run, summary)
    return Outcome(run=run, models=models, evaluation=evaluation, pairs=pairs)


# The run itself -----------------------------------------------------------------------------------


def _prepare(
    config: Config,
    dataset: Dataset,
    run: Path,
    *,
    split: Split,
    processes: Processes,
    events: Events,
    prepared: PreparedScans | None,
) -> ScanSource:
    """The source of the run; the first process prepares the scans, and the others find what it has
    prepared.
    """
    training, validation = split
    identity = read_identity(run)
    holdings = {name: case.holds for name, case in identity.cases.items()} if identity else {}
    count = config.train.validate_samples

    def open_source(progress: Any) -> ScanSource:
        return ScanSource(
            config,
            dataset,
            training=training,
            validation=validation,
            store=run / "prepared",
            progress=progress,
            watched=covering(validation, count, holdings),
            room_bytes=processes.room_bytes,
            prepared=prepared,
        )

    def preparing(name: str, done: int, count: int) -> None:
        events.reading("preparing", done, count)

    if processes.first:
        source = open_source(preparing)
    processes.wait()
    if not processes.first:
        source = open_source(lambda name, done, count: None)
    _warn_of_few_passes(config, source)
    return source


def _warn_of_few_passes(config: Config, source: ScanSource) -> None:
    """Of a run whose steps a person has chosen; one that is given a time is refused if it is too
    short.
    """
    passes = (config.train.steps or 0) * config.train.batch / source.cases
    if config.train.steps is not None and passes < LEAST_PASSES:
        warnings.warn(
            _few_passes(config.train.steps, passes, source.cases), DataWarning, stacklevel=2
        )


def _few_passes(steps: int, passes: float, cases: int) -> str:
    count = "1 step is" if steps == 1 else f"{steps} steps are"
    return (
        f"{count} {passes:.2g} passes over the {cases} cases to train from: too few to have learnt"
        " from them"
    )


def _check_time_left(config: Config, run: Path, *, left_s: float) -> None:
    if config.train.steps is None and left_s <= 0 and float(_facts(run).get("position", 0)) < 1:
        raise BadConfig(
            f"{run}: the time was over before the first step, and {-left_s:.0f} seconds more are"
            " needed to score the model; give a longer --time, and the same command goes on"
        )


def _score(
    source: ScanSource, config: Config, *, run: Path, processes: Processes, events: Events
) -> Evaluation | None:
    """Segment and score the validation scans, and choose the model's cleanup. None in other
    processes than the first.
    """
    steps = predict(
        config,
        source,
        run,
        processes=processes,
        progress=lambda done, count: events.reading("scoring", done, count),
    )
    if processes.first:
        change_spec(run / "model", cleanup=steps)
    return score_validation(source, run, processes)


def _finish(
    dataset: Dataset,
    source: ScanSource,
    config: Config,
    *,
    run: Path,
    scored: Evaluation | None,
    events: Events,
) -> Outcome:
    """Write the scores of the model and its card, and delete the prepared scans."""
    evaluation, pairs = scored, dict[str, tuple[Path, Path]]()
    if evaluation is not None:
        pairs = scored_pairs(source.validation, run, evaluation.summary)
        write_evaluation(evaluation, run, pairs=pairs, options=scoring_options(source.dataset))
        events.scored(evaluation)
    _, facts = load_state(run / "state.safetensors")
    plan = read_json(run / "plan.json")
    card = {
        "cases": {"training": len(source.training), "validation": len(source.validation)},
        "layout": dataset.layout,
        "steps": facts["step"],
        "training_seconds": round(facts["seconds"]),
        "fingerprint": plan["fingerprint"],
    }
    change_spec(run / "model", card=config.card | {"training": card})
    passes = facts["step"] * config.train.batch / source.cases
    few_passes = _few_passes(facts["step"], passes, source.cases) if passes < LEAST_PASSES else ""
    source.discard()
    # Last of all, for a run with a card counts as finished.
    with atomic_write(run / "model" / "README.md") as handle:
        about = {
            "scores": evaluation.summary if evaluation else None,
            "score_titles": score_titles(),
            "few_passes": few_passes,
        }
        text = model_card(load_checkpoint(str(run / "model")), card | about)
        handle.write(text.encode())
    return Outcome(run=run, models=(run / "model",), evaluation=evaluation, pairs=pairs)
