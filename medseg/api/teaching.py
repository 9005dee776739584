"""Checking a data set and training on it from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from medseg.api.cohorts import part_of
from medseg.errors import BadConfig
from medseg.io import as_path, what_is
from medseg.logs import Progress, silent
from medseg.text import as_mapping, as_names, as_number, as_whole

if TYPE_CHECKING:
    from medseg.dataset import Check
    from medseg.training import Events, Outcome, Prepared


def check(
    dataset: str | os.PathLike[str],
    *,
    fix: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Check:
    """Check a data set before training, as `medseg check` does: files, geometry, labels,
    duplicates, leaks, mirrored cases, outliers.

    fix: a folder for a copy in which everything certain is corrected. The data set itself is never
    changed. What must be solved before training stands in `errors` of what is returned, all in
    `findings`. Raises `BadFile` for what is no data set.
    """
    from medseg.dataset import check_dataset, read_dataset, write_fixed

    cases = read_dataset(as_path(dataset, "a data set"), progress)
    result = check_dataset(cases, progress)
    if fix is not None:
        write_fixed(cases, result, as_path(fix, "fix"))
    return result


def prepare(
    data: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    retry: bool = False,
    format: str = "npy",
    config: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    finetune: str | None = None,
    events: Events | None = None,
) -> Prepared:
    """Prepare a data set for training in the folder `store`, as `medseg prepare` does; the same
    call goes on where an interrupted one stopped, and `train(data, prepared=store)` takes it.

    part: i of n, 0 <= i < n, of the cases by name, for several jobs, none of which waits for
    another: where `unchecked` of what is returned is not 0, call again when the others have ended.
    workers: cases at a time, 0 for what suits this machine. retry: try cases again that failed.
    format: 'npy', or 'zarr' for compressed chunks. changes: settings by their dotted names:
    `{"model.spacing_mm": 1.0}`. finetune: a model to go on from, whose grid and intensities are
    taken. Raises `BadFile`, `BadConfig`, `BadOutput`.
    """
    from medseg.training import Request, prepare_dataset

    if format not in ("npy", "zarr"):
        raise BadConfig(f"there is no format '{format}'; it is npy or zarr")
    part, workers = part_of(part), as_whole(workers, "workers", most=1024)
    request = Request(
        data=as_path(data, "data"), config=None if config is None else as_path(config, "config"),
        overrides=dict(changes or {}), finetune=None if finetune is None else os.fspath(finetune),
    )  # fmt: skip
    return prepare_dataset(
        request, as_path(store, "store"), part=part, workers=workers, retry=retry, arrays=format,
        events=events,
    )  # fmt: skip


def train(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    time_s: float | None = None,
    model: str | None = None,
    config: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    fold: int | None = None,
    folds: int | None = None,
    finetune: str | os.PathLike[str] | None = None,
    max_memory_bytes: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    device: str = "auto",
    prepared: str | os.PathLike[str] | None = None,
    track: tuple[str, ...] = (),
    resume: bool = True,
    anyway: bool = False,
    events: Events | None = None,
) -> Outcome:
    """Train a model, as `medseg train` does; the same call goes on where an interrupted run
    stopped.

    data: a data set as you have it, or a config of label maps (.yaml). output: the run folder, by
    default runs/NAME. time_s: all it may take, planning and scoring included. model: the
    architecture. changes: settings of a config by their dotted names: `{"train.batch": 4}`. folds
    without a fold: a model for each. device: 'auto', 'cpu', 'cuda' or 'cuda:N'. prepared: a store
    that `prepare` made of the data. events: who is told what happens. The model is left in
    RUN/model, scored, and stands in `models` of what is returned; `medseg.load(outcome.run)` uses
    it. Raises `BadFile` for data with errors, `BadConfig`, `NotEnoughMemory` before it begins.
    """
    began = monotonic()  # before torch is loaded, which counts into the time
    place, run = as_path(data, "data"), None if output is None else as_path(output, "output")
    time_s = None if time_s is None else as_number(time_s, "time_s")
    most = None if max_memory_bytes is None else as_number(max_memory_bytes, "max_memory_bytes")
    fold, folds = (None if one is None else as_whole(one, "a fold") for one in (fold, folds))
    settings = as_mapping(changes, "changes")
    settings |= {"train.seed": seed} if seed is not None else {}
    settings |= {"train.deterministic": True} if deterministic else {}
    settings |= {"train.device": device} if device != "auto" else {}
    if place.suffix.lower() in (".yaml", ".yml"):
        own = {"model": model, "config": config, "fold": fold, "folds": folds}
        _check_none(place, own | {"finetune": finetune, "prepared": prepared})
        settings |= {"train.time_s": time_s, "train.steps": None} if time_s else {}
        return _train_config(place, run, settings, resume=resume, events=events, began=began)
    from medseg.training import Request, train_folds

    request = Request(
        data=place, run=run, overrides=settings, architecture=model, time_s=time_s, folds=folds,
        config=None if config is None else as_path(config, "config"), fold=fold, began=began,
        finetune=None if finetune is None else str(as_path(finetune, "finetune")),
        memory_bytes=None if most is None else int(most), track=as_names(track, "track"),
        every_fold=folds is not None and fold is None, resume=resume,
        anyway=anyway, prepared=None if prepared is None else as_path(prepared, "prepared"),
    )  # fmt: skip
    outcome = train_folds(request, _checked(events))
    if outcome is None:
        raise BadConfig("this is a further process of torchrun's; only the first has the outcome")
    return outcome


def _checked(events: Events | None) -> Events | None:
    from medseg.training import Events

    if events is not None and not isinstance(events, Events):
        raise BadConfig(f"events are a medseg.training.Events, and this is {what_is(events)}")
    return events


def _check_none(path: Path, others: Mapping[str, object]) -> None:
    """Raise `BadConfig` for what a config says itself."""
    wrong = [name for name, one in others.items() if one is not None]
    if wrong:
        raise BadConfig(f"{wrong[0]} goes with a data set; {path} is a config, set it there")


def _train_config(
    path: Path,
    output: Path | None,
    changes: dict[str, Any],
    *,
    resume: bool,
    events: Events | None,
    began: float,
) -> Outcome:
    """Train from label maps, of which a config says all."""
    from medseg.config import load_config, read_settings
    from medseg.training import Events, Outcome, train as train_in

    if "synth" not in read_settings(path):
        raise BadConfig(f"{path} has no synth, so it trains from scans: give them, and config=")
    settings = load_config(path, changes)
    run = output or Path("runs") / settings.name
    if not resume and (run / "config.yaml").exists():
        raise BadConfig(f"{run} holds a run; choose another output, or leave resume out")
    model = train_in(settings, run, began=began, progress=(events or Events()).training)
    return Outcome(run=run, models=(model,), evaluation=None)
