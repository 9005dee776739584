"""How a run begins: the data checked and split, the run planned, and all that recorded before
anything is trained.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.config import Config, make_config, override
from medseg.dataset import (
    Check,
    Dataset,
    Finding,
    Holdings,
    Split,
    check_dataset,
    lacking,
    split_cases,
    usual_folds,
)
from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.files import atomic_write, file_state
from medseg.inference import free_bytes_on
from medseg.machine import free_bytes
from medseg.training.capacity import Machine, check_memory
from medseg.training.identity import identity_of, used_cases, write_identity
from medseg.training.origin import Start, adopted, hash_of, read_start, where_it_lies
from medseg.training.plan import (
    Choice,
    as_json,
    as_settings,
    fingerprint,
    make_plan,
    seconds_a_step,
)
from medseg.training.prepared.arrays import Preparation, hash_of as content_hash
from medseg.training.prepared.reading import PreparedScans
from medseg.training.processes import Processes
from medseg.training.request import Events, Request, slug
from medseg.training.scans import structures_of
from medseg.training.scoring import check_file_names
from medseg.training.state import record_config
from medseg.training.step import LEAST_PASSES, in_minutes

#: Seconds that a run takes at least beside what is measured: the model, its scores and report.
_LEAST_REST_S = 10.0


def begin(
    request: Request,
    dataset: Dataset,
    run: Path,
    *,
    processes: Processes,
    events: Events,
    folds: Sequence[int],
) -> None:
    """Check and plan, and record the plan in the run folder.

    folds: those that the command trains; what is wrong with the split of any of them is said now.
    Raises `BadFile` for data with errors, `BadConfig` for settings that contradict them and for a
    time that is too short, `NotEnoughMemory`.
    """
    began = time.monotonic()
    settings = request.fixed()
    prepared = request.prepared_scans
    check = prepared.check(dataset) if prepared else _checked(dataset, events)
    checked_s = time.monotonic() - began
    holdings = _holdings(dataset, check)
    splits = splits_of(request, dataset, holdings)
    number = fold_number(request, splits)
    check_file_names(dataset[name] for fold in folds for name in splits[fold][1])
    about = [finding for fold in folds for finding in _about_split(dataset, splits[fold], holdings)]
    about = list(dict.fromkeys(about))
    events.found(dataset, [*check.findings, *about])
    _refuse_errors(request, dataset, [*check.errors, *filter(_is_error, about)])
    for finding in about:
        warnings.warn(finding.message, DataWarning, stacklevel=2)
    training, validation = splits[number]
    machine = _machine(request, processes)
    start = read_start(request.finetune) if request.finetune else None
    settings = settings if start is None else _begun_from(start, dataset, settings, prepared)
    data_fingerprint = fingerprint(check, training)
    architecture = str(settings.get("model.name") or request.architecture or "unet")
    judged = any(holdings.get(name) for name in validation)
    choices = make_plan(
        dataset, data_fingerprint, machine, architecture=architecture, fixed=settings, judged=judged
    )
    config = _config(request, dataset, choices, fixed=settings, validation=validation, start=start)
    if prepared is not None:
        prepared.check_arrays(Preparation(config, dataset), used_cases(dataset))
    outputs = len(dataset.regions) or len(dataset.table.labels) + 1
    check_memory(config, len(dataset.channels), outputs=outputs, machine=machine)
    _check_time(
        config, dataset, machine, request=request, checked_s=checked_s, began=began,
        cases=len(training),
    )  # fmt: skip
    events.planned(choices, config)
    write_json(run / "plan.json", as_json(choices, data_fingerprint))
    write_json(run / "splits.json", {"training": training, "validation": validation})
    identity = identity_of(
        dataset, digests=check.digests,
        holdings={name: sorted(structures) for name, structures in holdings.items()},
        folds=None if dataset.splits else len(splits), fold=number,
        start=None if start is None else hash_of(start),
    )  # fmt: skip
    write_identity(run, identity)
    record_config(config, run)  # last of all: where it is, the rest is


def view_of(dataset: Dataset, prepared: PreparedScans | None) -> dict[str, str]:
    """What a process sees of the data, by names for people: files by name and size, for times of
    copies may differ.
    """
    labels = [[label.value, label.name] for label in dataset.table.labels]
    view: dict[str, Any] = {
        "labels and channels": [labels, dataset.channels, dataset.regions, dataset.ignore]
    }
    for case in used_cases(dataset):
        files = [
            *case.images,
            *([case.label] if case.label else []),
            *(one for _, one in case.masks),
        ]
        view[f"case {case.name}"] = [
            [[path.name, _sizes(file_state(path))] for path in files],
            case.numbers,
            case.labelled,
        ]
    if prepared is not None:
        view[f"prepared scans in {prepared.store.folder}"] = [prepared.facts, prepared.settings]
    return {name: content_hash(content) for name, content in view.items()}


def _sizes(state: Any) -> Any:
    """What `file_state` says, without times."""
    if not isinstance(state, list) or not state:
        return state
    if isinstance(state[0], list):
        return [[name, _sizes(one)] for name, one in state]
    return state[0]


def _checked(dataset: Dataset, events: Events) -> Check:
    return check_dataset(dataset, lambda name, done, count: events.reading("checking", done, count))


def _begun_from(
    start: Start, dataset: Dataset, settings: Mapping[str, Any], prepared: PreparedScans | None
) -> dict[str, Any]:
    """Settings with what a start decides. Raises `BadConfig` where it sees scans otherwise than
    they are prepared.
    """
    taken = adopted(start, dataset, settings)
    return {**(prepared.agreed(taken) if prepared else taken), **settings}


def _refuse_errors(request: Request, dataset: Dataset, errors: Sequence[Finding]) -> None:
    if errors and not request.anyway:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        first = f"{errors[0].case or dataset.folder}: {errors[0].message}{more}"
        raise BadFile(f"{first}; medseg check {request.data} shows all, and --anyway trains")


def _config(
    request: Request,
    dataset: Dataset,
    choices: Sequence[Choice],
    *,
    fixed: Mapping[str, Any],
    validation: Sequence[str],
    start: Start | None,
) -> Config:
    content: dict[str, Any] = {
        "name": slug(dataset.name),
        "data": str(request.data),
        "hold_out": list(validation),
    }
    if request.finetune:
        where = where_it_lies(start, request.finetune) if start else request.finetune
        content["start_from"] = where
    settings = as_settings(choices) | dict(fixed)
    return make_config(override(content, settings), str(request.config or request.data))


# Splits -------------------------------------------------------------------------------------------


def _holdings(dataset: Dataset, check: Check) -> dict[str, frozenset[str]]:
    """Case -> the structures of which it has voxels."""
    structures = structures_of(dataset)
    return {
        facts.case: frozenset(
            name for name, values in structures.items() if facts.voxels.keys() & set(values)
        )
        for facts in check.facts
    }


def splits_of(request: Request, dataset: Dataset, holdings: Holdings | None = None) -> list[Split]:
    """The training and validation cases of every fold. Raises `BadConfig`."""
    folds = folds_of(request, dataset)
    if folds < 2 and not dataset.splits:
        raise BadConfig(
            f"{request.data}: one case cannot both train and validate; annotate a second one"
        )
    return split_cases(dataset, folds, holdings=holdings)


def folds_of(request: Request, dataset: Dataset) -> int:
    """Into how many parts the cases are split, at most one for each patient or case."""
    groups = {
        ("group", case.group) if case.group else ("case", case.name) for case in used_cases(dataset)
    }
    folds = request.folds or (usual_folds(len(groups)) if request.fold is None else 5)
    return min(folds, len(groups))


def fold_number(request: Request, splits: Sequence[Split]) -> int:
    """Which of the folds validates. Raises `BadConfig` if there is no such one."""
    fold = request.fold or 0
    if not 0 <= fold < len(splits):
        raise BadConfig(
            f"there is no fold {fold}; the cases are split into {len(splits)}, counted from 0"
        )
    return fold


def _about_split(dataset: Dataset, split: Split, holdings: Holdings) -> list[Finding]:
    """Structures that one side of a split lacks: what is not trained with cannot be learnt, and
    what is not validated with is not scored."""
    training, validation = split
    names = list(structures_of(dataset))
    count = {name: sum(name in structures for structures in holdings.values()) for name in names}
    findings = []
    for name in lacking(names, training, holdings):
        where = (
            f"{count[name]} of {len(holdings)} cases have it, for validation"
            if count[name]
            else "no case has it"
        )
        message = f"no case to train from holds '{name}' ({where}), so it cannot be learnt"
        findings.append(Finding(case="", kind="split", severity="error", message=message))
    for name in lacking(names, validation, holdings):
        if count[name]:
            where = f"{count[name]} of {len(holdings)} cases have it, all to train from"
            message = (
                f"no case to validate with holds '{name}' ({where}), so no score says how well it"
                " is found"
            )
            findings.append(Finding(case="", kind="split", severity="warning", message=message))
    return findings


# Machine, time and model --------------------------------------------------------------------------


def _machine(request: Request, processes: Processes) -> Machine:
    if processes.device.type == "cuda":
        memory = free_bytes_on(processes.device)
    else:
        memory = int(0.9 * free_bytes() / processes.size)
    return Machine(
        device=processes.device.type,
        memory_bytes=min(memory, request.memory_bytes or 2**62),
        processes=processes.size,
        card=str(processes.device) if processes.device.type == "cuda" else "",
    )


def _check_time(
    config: Config,
    dataset: Dataset,
    machine: Machine,
    *,
    request: Request,
    checked_s: float,
    began: float,
    cases: int,
) -> None:
    """Raises `BadConfig` where the time is over before the network has seen its cases a few times.

    What has passed since the command began is known, preparing takes about as long as checking did,
    and a step as long as the plan has tried.
    """
    settings = config.train
    batches = LEAST_PASSES * cases / settings.batch
    if settings.steps is not None or settings.time_s is None:
        return
    passed_s = time.monotonic() - (request.began or began)
    training_s = batches * seconds_a_step(config, len(dataset.channels), machine)
    needed_s = passed_s + checked_s + training_s + _LEAST_REST_S
    if needed_s <= settings.time_s:
        return
    raise BadConfig(
        f"{settings.time_s:.0f} seconds are too short to learn anything from {request.data}:"
        f" reading, scoring and {LEAST_PASSES} passes over the {cases} cases take about"
        f" {needed_s:.0f}; give --time {in_minutes(1.5 * needed_s)} or more"
    )


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON whole or not at all."""
    with atomic_write(path) as handle:
        handle.write((json.dumps(content, indent=1) + "\n").encode())


def _is_error(finding: Finding) -> bool:
    return finding.severity == "error"
