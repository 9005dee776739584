"""`medseg prepare`: a data set made ready for training by as many jobs as there are, each of which
does its part of the cases and waits for no other.

First a part checks its own cases. When the facts of all cases are there, the plan follows from
them alone, whoever makes it, and the part makes the arrays of its own cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medseg.config import Config, make_config, override
from medseg.dataset import (
    Case,
    Dataset,
    Finding,
    Measurement,
    conclude,
    measure_case,
    read_dataset,
)
from medseg.errors import BadConfig, BadOutput, Interrupted, MedsegError
from medseg.files import write_once
from medseg.training.identity import used_cases
from medseg.training.origin import adopted, read_start
from medseg.training.plan import as_json, as_settings, fingerprint, plan_preparation
from medseg.training.prepared.arrays import SETTINGS, Preparation
from medseg.training.prepared.formats import check_room
from medseg.training.prepared.store import (
    Store,
    about_store,
    as_text,
    begin_store,
    facts_key,
    find_store,
    read_content,
    sizes_of,
    without_folder,
    write_content,
)
from medseg.training.request import Events, Request, slug

#: Attempts at a case that ended with their process, after which it is not tried any more.
MOST_ATTEMPTS = 3
_LOST = (
    f"each of {MOST_ATTEMPTS} attempts at it ended with the process that worked on it; --retry"
    " tries again"
)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What came of a part. total: its cases; done: those that are ready; failures: a sentence for
    each that cannot be; unchecked: cases of any part whose facts are missing, without which nothing
    is planned.
    """

    store: Path
    total: int
    done: int
    failures: Mapping[str, str] = field(default_factory=dict)
    unchecked: int = 0

    @property
    def waiting(self) -> int:
        """Cases of the part that are neither ready nor failed."""
        return self.total - self.done - len(self.failures)

    @property
    def exit_code(self) -> int:
        """0 where every case of the part is ready, 3 where some are not."""
        return 0 if self.done == self.total else 3


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is to be done with a part. total: its cases."""

    total: int
    to_check: int
    to_prepare: int


def prepare_dataset(
    request: Request,
    folder: Path,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    retry: bool = False,
    arrays: str = "npy",
    events: Events | None = None,
) -> Prepared:
    """Prepare part i of n of a data set in a store, or go on where that was left.

    request: its data, config, overrides and finetune say what is prepared, and how. workers: cases
    at a time, 0 for what suits this machine. retry: try cases again that failed. arrays: 'npy', or
    'zarr' for compressed chunks. Raises `BadConfig` for a store of something else and for settings
    that do not belong here, `BadOutput` where nothing can be written, `BadFile` for what is no data
    set.
    """
    hear = events or Events()
    dataset = read_dataset(
        request.data, lambda name, done, count: hear.reading("reading", done, count)
    )
    asked = _asked(request, dataset)
    store = begin_store(folder, about_store(dataset, asked, arrays))
    mine = _part_of(dataset, part)
    crew = _Crew(store, workers or max(1, min(8, torch.get_num_threads())), hear)
    _check(dataset, mine, crew=crew, retry=retry)
    unchecked = _plan(dataset, store, asked)
    failures = {}
    if not unchecked:
        failures = _make_arrays(dataset, _usable(dataset, mine), crew=crew, retry=retry)
    for case in mine:  # of which all has a result now
        store.tidy(case)
    if unchecked:
        return Prepared(store=folder, total=len(mine), done=0, unchecked=unchecked)
    return Prepared(
        store=folder, total=len(mine), done=len(mine) - len(failures), failures=failures
    )


def plan_part(
    request: Request,
    folder: Path,
    *,
    part: tuple[int, int] = (0, 1),
    retry: bool = False,
    arrays: str = "npy",
) -> Outlook:
    """What `prepare_dataset` would do. Writes nothing and opens no scan."""
    dataset = read_dataset(request.data)
    store = find_store(folder, about_store(dataset, _asked(request, dataset), arrays))
    mine = _part_of(dataset, part)
    wanted = _usable(dataset, mine)
    if store is None:
        return Outlook(total=len(mine), to_check=len(mine), to_prepare=len(wanted))
    to_check = sum(_lacks_facts(store, case, retry) for case in mine)
    content = read_content(store.plan)
    present = [one for one in map(store.measurement, dataset.cases) if one is not None]
    is_whole = len(present) == len(dataset.cases)
    if is_whole and content.get("facts") == facts_key(dataset, present):
        preparation = Preparation(config_of(content["settings"], dataset), dataset)
        wanted = [case for case in wanted if _lacks_arrays(store, preparation, case, retry)]
    return Outlook(total=len(mine), to_check=to_check, to_prepare=len(wanted))


def _part_of(dataset: Dataset, part: tuple[int, int]) -> list[Case]:
    return sorted(dataset.cases, key=lambda case: case.name)[part[0] :: part[1]]


def _usable(dataset: Dataset, cases: Sequence[Case]) -> list[Case]:
    """The cases without those that are set aside for testing."""
    names = {case.name for case in used_cases(dataset)}
    return [case for case in cases if case.name in names]


def _lacks_facts(store: Store, case: Case, retry: bool) -> bool:
    kept = store.measurement(case)
    return kept is None or (retry and kept.facts is None)


def _lacks_arrays(store: Store, preparation: Preparation, case: Case, retry: bool) -> bool:
    record = store.record(case)
    if record is None or record.key != preparation.key(case):
        return True
    return retry if record.error else record.sizes != sizes_of(store.files(case))


def _asked(request: Request, dataset: Dataset) -> dict[str, Any]:
    """The settings of preparation that somebody decided. Raises `BadConfig` for --set of others,
    and for values that cannot be.
    """
    for key in request.overrides:
        if key not in SETTINGS:
            raise BadConfig(
                f"--set {key}: changes nothing in what is prepared ({', '.join(SETTINGS)} do); give"
                " it to medseg train"
            )
    settings = request.fixed()
    start = adopted(read_start(request.finetune), dataset, settings) if request.finetune else {}
    asked = {key: one for key, one in (start | settings).items() if key in SETTINGS}
    # Refused now rather than after all cases are read; the rest is as a plan may choose it.
    usual = {
        "model.grid": "scan",
        "model.intensity": [{"scheme": "zscore"}] * len(dataset.channels),
    }
    Preparation(config_of(usual | asked, dataset), dataset)
    return asked


# Facts --------------------------------------------------------------------------------------------


def _check(dataset: Dataset, cases: Sequence[Case], *, crew: _Crew, retry: bool) -> None:
    """Measure the cases that nobody has measured as they are now."""
    store = crew.store

    def measure(case: Case) -> None:
        store.keep_measurement(dataset, case, measure_case(dataset, case))

    def give_up(case: Case, why: str) -> None:
        finding = Finding(case=case.name, kind="unreadable", severity="error", message=why)
        store.keep_measurement(dataset, case, Measurement(findings=[finding]))

    missing = [case for case in cases if _lacks_facts(store, case, retry)]
    crew.do("checking", missing, measure, give_up=give_up, is_renewed=retry)


def _plan(dataset: Dataset, store: Store, asked: Mapping[str, Any]) -> int:
    """Have the plan of the cases as they are now; returns the cases whose facts are missing."""
    measurements = [store.measurement(case) for case in dataset.cases]
    present = [one for one in measurements if one is not None]
    if len(present) < len(measurements):
        return len(measurements) - len(present)
    key = facts_key(dataset, present)
    if read_content(store.plan).get("facts") == key:
        return 0
    check = conclude(
        dataset, [store.with_portrait(case, one) for case, one in zip(dataset.cases, present)]
    )
    about = fingerprint(check, [case.name for case in used_cases(dataset)])
    choices = plan_preparation(dataset, about, asked)
    config = config_of(as_settings(choices), dataset)
    model = config.model.model_dump(mode="json")
    settings = {key: model[key.removeprefix("model.")] for key in SETTINGS}
    findings = [
        asdict(one) | {"message": without_folder(one.message, dataset)} for one in check.findings
    ]
    content = {"facts": key, "settings": settings, "findings": findings, **as_json(choices, about)}
    if store.plan.exists():  # of cases that have changed since
        write_content(store.plan, content)
    else:
        write_once(store.plan, as_text(content))
    return 0


def config_of(settings: Mapping[str, Any], dataset: Dataset) -> Config:
    """A config that prepares by these dotted settings; the rest of it means nothing. Raises
    `BadConfig` for values that cannot be.
    """
    model = {"name": "unet", "patch": [1, 1, 1], "spacing_mm": 1.0}
    content: dict[str, Any] = {
        "name": slug(dataset.name), "data": str(dataset.folder), "model": model,
        "train": {"steps": 1},
    }  # fmt: skip
    return make_config(override(content, dict(settings)), "the settings")


# Arrays -------------------------------------------------------------------------------------------


def _make_arrays(
    dataset: Dataset, cases: Sequence[Case], *, crew: _Crew, retry: bool
) -> dict[str, str]:
    """Make the arrays of cases by the plan; returns why those that failed did."""
    store = crew.store
    settings = read_content(store.plan)["settings"]
    preparation = Preparation(config_of(settings, dataset), dataset)

    def make(case: Case) -> None:
        key, kept = preparation.key(case), store.measurement(case)
        store.forget_record(case)
        if kept is not None and kept.facts is None:  # reading it has failed, or worse
            store.keep_record(case, key, error=kept.findings[-1].message)
            return
        try:
            arrays = preparation.arrays(case)
            check_room(store.folder, arrays["image"].nbytes)
            store.form.write(store.place(case), arrays)
        except (BadConfig, BadOutput, Interrupted):  # every further case would fail the same way
            raise
        except MedsegError as error:
            store.keep_record(case, key, error=without_folder(str(error), dataset))
        except MemoryError:
            store.keep_record(case, key, error="needs more memory than there is")
        except Exception as error:
            sentence = f"stopped by an error of its own ({type(error).__name__})"
            store.keep_record(case, key, error=sentence)
        else:
            store.keep_record(case, key)

    def give_up(case: Case, why: str) -> None:
        store.keep_record(case, preparation.key(case), error=why)

    missing = [case for case in cases if _lacks_arrays(store, preparation, case, retry)]
    crew.do("preparing", missing, make, give_up=give_up, is_renewed=retry)
    records = {case.name: store.record(case) for case in cases}
    return {name: one.error for name, one in records.items() if one is not None and one.error}


class _Crew:
    """Threads that do the cases of a part, each attempt written down before it begins.

    A case whose attempt ended with its process comes last and alone, so that it takes no other
    along, and after some such attempts it is given up.
    """

    def __init__(self, store: Store, workers: int, events: Events) -> None:
        self.store, self._workers, self._events = store, workers, events

    def do(
        self,
        what: str,
        cases: Sequence[Case],
        work: Callable[[Case], None],
        *,
        give_up: Callable[[Case, str], None],
        is_renewed: bool,
    ) -> None:
        """Do each of the cases. is_renewed: forget attempts of before."""
        begun = {case.name: 0 if is_renewed else self.store.begun(case) for case in cases}

        def attempt(case: Case) -> None:
            if is_renewed:
                self.store.end(case)
            self.store.begin(case)
            try:
                if begun[case.name] >= MOST_ATTEMPTS:
                    give_up(case, _LOST)
                else:
                    work(case)
            finally:
                self.store.end(case)

        fresh = [case for case in cases if not begun[case.name]]
        suspects = [case for case in cases if begun[case.name]]
        with ThreadPoolExecutor(self._workers) as pool:
            jobs = [pool.submit(attempt, case) for case in fresh]
            try:
                for number, job in enumerate(jobs, start=1):
                    job.result()
                    self._events.reading(what, number, len(cases))
            finally:
                for job in jobs:
                    job.cancel()
        for number, case in enumerate(suspects, start=len(fresh) + 1):
            attempt(case)
            self._events.reading(what, number, len(cases))
