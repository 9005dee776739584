"""A cohort, or a part of it: what is done already, what is to be done, and doing it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

from medseg.cohort import attempts
from medseg.cohort.bids import write_dataset, write_table
from medseg.cohort.cases import Case, Cohort, located, part_of
from medseg.cohort.course import Came, Course, Item, Limits
from medseg.cohort.output import Output, open_output
from medseg.cohort.places import Places
from medseg.cohort.records import read_outcome, write_failure
from medseg.cohort.request import Request, settled_arithmetic, write_cohort
from medseg.cohort.staff import Staff
from medseg.cohort.stores import is_store, states_of
from medseg.errors import BadConfig, BadOutput
from medseg.files import ignores_case
from medseg.inference import Job, Model, Plan, forecast_job
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.text import alike_but_for_case

#: What `--retry` may name.
RETRIES = ("failed", "lost", "timeout", "memory", "all")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which cases of a cohort are done. part: i of n, 0 <= i < n. retry: statuses that are tried
    again. keep_others: whether results of other models and settings stay.
    """

    part: tuple[int, int] = (0, 1)
    retry: tuple[str, ...] = ()
    keep_others: bool = False

    @property
    def part_name(self) -> str:
        """As `--shard` has it."""
        return f"{self.part[0]}/{self.part[1]}"


@dataclass(kw_only=True)
class Sorted:
    """The cases of a part by what is to be done with them.

    largest: bytes of the files of the largest that is to be done, where they are files here.

    kept: how many stay in which status. failures: of those the ones that are not done. changed:
    cases whose result is of another model, setting or scan, and is made anew.
    """

    items: list[Item] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    lost: list[Item] = field(default_factory=list)
    changed: int = 0
    missing: int = 0
    input_bytes: int = 0
    largest: tuple[int, Case] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a part: cases by status, sentences about those that are not done, why it stopped
    early.
    """

    counts: Counter[str]
    failures: Sequence[tuple[str, str, str]]
    total: int
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0 where every case is done, 3 where some are not."""
        return 0 if self.counts["done"] + self.counts["skipped"] == self.total else 3


def run_part(
    cohort: Cohort,
    out: Path | str,
    request: Request,
    choice: Choice,
    limits: Limits,
    table: LabelTable,
    *,
    progress: Progress = silent,
    announce: Any = None,
    on: str | None = None,
    command: Any = None,
) -> Result:
    """Do the cases of a part that are not done. out: a folder, or the address of a place in a
    store. table: of the model's labels. announce: gets `Sorted` before any is. on: the address of a
    Ray cluster, '' for one started here, None for processes of this machine.

    Raises `BadOutput` where nothing can be written, `BadConfig` and `BadModel` where no case could
    be done, `Interrupted` when it is stopped. What is done by then stays, and the same call goes
    on.
    """
    check_output(cohort, out)
    if str(out).lower().startswith("memory:"):
        raise BadConfig(
            f"{out}: is each process's own, and workers are processes, with which results would be"
            " gone; give a folder, or a place in another store"
        )
    part = part_of(cohort.cases, choice.part)
    if on is not None:  # workers elsewhere have another working folder
        from medseg.cohort.cluster import check_answers, check_ray

        check_ray()
        check_answers(on)
        part = [located(case) for case in part]
    with open_output(out) as output:
        places = _write_top(cohort, output, request, table)
        make_staff = _maker_of_staff(on, command)
        course = Course(output, request, limits, part=choice.part_name, make_staff=make_staff)
        try:
            arithmetic = request.arithmetic(course.settle()) or ""
            worklist = sort_cases(part, output, request, choice=choice, arithmetic=arithmetic)
            for item in worklist.lost:
                output.keep(_write_lost(places, item, choice.part_name))
            if announce is not None:
                announce(worklist)
            came = course.run(worklist.items, progress) if worklist.items else Came()
        finally:
            course.close()
    counts = worklist.kept + came.counts
    counts["waiting"] = len(part) - counts.total()
    failures = sorted([*worklist.failures, *came.failures])
    return Result(counts=counts, failures=failures, total=len(part), stopped=came.stopped)


def _write_top(cohort: Cohort, output: Output, request: Request, table: LabelTable) -> Places:
    """Write what an output has once: the list, the label table, and what makes it BIDS."""
    output.make()
    _check_spelling(cohort, output.folder)
    places = output.places(request)
    _check_label_maps(cohort, places)
    write_cohort(places, cohort, request)
    write_table(table, places.table)
    if request.layout == "bids":
        write_dataset(places, cohort, request.model, table=table)
    output.keep_top()
    return places


def _maker_of_staff(on: str | None, command: Any) -> Callable[[Mapping[str, Any]], Staff]:
    """What starts workers: here, or on a Ray cluster."""
    if on is None:
        return partial(Staff, command=command) if command else Staff
    from medseg.cohort.cluster import Cluster

    return partial(Cluster, address=on, command=command)


def plan_part(cohort: Cohort, out: Path | str, request: Request, choice: Choice) -> Sorted:
    """What `run_part` would do. Writes nothing and opens no scan."""
    check_output(cohort, out)
    part = part_of(cohort.cases, choice.part)
    with open_output(out) as output:
        places = output.places(request)
        _check_label_maps(cohort, places)
        arithmetic = request.arithmetic(settled_arithmetic(places)) or ""
        return sort_cases(part, output, request, choice=choice, arithmetic=arithmetic)


def forecast_case(case: Case, request: Request, model: Model) -> Plan:
    """What a case would need, which is read for that. Raises what `infer` does."""
    files = [Path(name) for name in case.images]
    job = Job(scan=files[0], channels=tuple(files[1:]), labels=files[0], has_table=False)
    extras = request.extras
    volume = extras.volume_index if case.volume is None else case.volume
    extras = replace(extras, series=case.series or extras.series or None, volume_index=volume)
    return forecast_job(job, model, request.settings, extras)


def sort_cases(
    cases: Sequence[Case], output: Output, request: Request, choice: Choice, arithmetic: str
) -> Sorted:
    """What is to be done with each of the cases, by the records and attempts in the output."""
    places, records = output.places(request), output.names("records")
    output.bring_records(case.name for case in cases)
    states = states_of(
        [name for case in cases for name in case.images if is_store(name)], verify=request.verify
    )
    worklist = Sorted()
    items: list[tuple[Item, int]] = []
    for case in cases:
        item = Item(case=case, key=request.key(case, arithmetic, states))
        size = _count_inputs(case, states, worklist)
        number = 0
        if f"{case.name}.json" in records:
            number = _sort_recorded(case, item, places, choice=choice, found=worklist)
        if number >= 0:
            items.append((item, number))
            if size > (worklist.largest[0] if worklist.largest else 0):
                worklist.largest = size, case
    begun = output.names("attempts")
    output.bring_attempts(item.case.name for item, _ in items)
    for item, number in items:
        if item.case.name in begun and _sort_begun(item, places, number, worklist):
            continue
        worklist.items.append(item)
    return worklist


def _sort_begun(item: Item, places: Places, number: int, worklist: Sorted) -> bool:
    """Whether a case is lost by the attempts at it. number: of the attempt that left a record."""
    name = item.case.name
    history = attempts.history(places.attempts(name), item.key, number)
    item.begun, item.deaths, item.vanished = history.begun, history.deaths, history.vanished
    item.is_suspect = history.is_suspect
    if history.is_lost:
        worklist.lost.append(item)
        worklist.kept["lost"] += 1
        worklist.failures.append((name, "lost", _LOST))
    return history.is_lost


#: What is said of a case that took its process along in earlier runs.
_LOST = "every attempt at it ended without a result, with the process that worked on it"


def _sort_recorded(case: Case, item: Item, places: Places, choice: Choice, found: Sorted) -> int:
    """-1 if a case with a record stays as it is, else the number of the attempt that left it."""
    outcome = read_outcome(places.record(case.name))
    if outcome is None:
        return 0
    if outcome.key != item.key:
        if choice.keep_others and outcome.status == "done":
            found.kept["skipped"] += 1
            return -1
        found.changed += outcome.status == "done"
        return outcome.attempt
    if outcome.status == "done":
        if places.has(places.labels(case)):
            found.kept["done"] += 1
            return -1
        return outcome.attempt
    if outcome.status in choice.retry or "all" in choice.retry:
        item.times = 2 if outcome.status in ("timeout", "memory") else 1
        return outcome.attempt
    found.kept[outcome.status] += 1
    found.failures.append((case.name, outcome.status, outcome.error))
    return -1


def check_output(cohort: Cohort, out: Path | str) -> None:
    """Raise `BadConfig` if results would lie among the scans, or on one, and `BadOutput` for a
    file.
    """
    if is_store(out):
        begin = f"{str(out).rstrip('/')}/"
        for name in (name for case in cohort.cases for name in case.images):
            if name.startswith(begin):
                raise BadConfig(f"{name}: lies in the output {out}; choose another with -o")
        return
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadOutput(f"{out}: is a file; give a folder with -o")
    place = os.path.realpath(out)
    inside = f"{place}{os.sep}"
    above = {place, *map(str, Path(place).parents)}
    for folder, name in _folders_of(cohort.cases):
        if f"{os.path.realpath(folder)}{os.sep}".startswith(inside):
            raise BadConfig(f"{name}: lies in the output folder {out}; choose another with -o")
    for case in cohort.cases:
        for name in case.images:
            # Of a folder of DICOM all that lies in it is the scan.
            if name in above or os.path.abspath(name) in above:  # noqa: PTH100 - text is faster
                raise BadConfig(
                    f"{out}: lies in {name}, all of which is one scan; choose another with -o"
                )


def _check_spelling(cohort: Cohort, out: Path) -> None:
    """Raise `BadConfig` for names of cases that are one on the disk of the output."""
    pair = alike_but_for_case(case.name for case in cohort.cases)
    if pair and ignores_case(out):
        raise BadConfig(
            f"{cohort.source}: '{pair[0]}' and '{pair[1]}' name two cases, and the disk of {out}"
            " does not tell capital letters from small ones; give them other names"
        )


def _check_label_maps(cohort: Cohort, places: Places) -> None:
    """Raise `BadConfig` where the label maps of two cases would be one file, as those of odd names
    in BIDS form.
    """
    names: dict[str, str] = {}
    for case in cohort.cases if places.bids else ():
        other = names.setdefault(places.labels_below(case), case.name)
        if other != case.name:
            raise BadConfig(
                f"{cohort.source}: the label maps of {other} and {case.name} would be one file in"
                " BIDS form; give --layout cases, or rename one of them"
            )


def _folders_of(cases: Collection[Case]) -> Iterator[tuple[str, str]]:
    """The folders of the scans, each with a scan in it."""
    folders = {
        os.path.split(name)[0]: name for case in cases for name in case.images if "://" not in name
    }
    yield from folders.items()


def _count_inputs(case: Case, states: Mapping[str, Any], found: Sorted) -> int:
    """Count what a case's files take; returns the bytes of those that are files here."""
    size = 0
    for name in case.images:
        if name in states:
            found.missing += states[name] is None
            found.input_bytes += _bytes_in(states[name])
        if "://" in name:
            continue
        try:
            about = os.stat(name)  # noqa: PTH116 - text is faster
            found.input_bytes += about.st_size
            size += about.st_size if S_ISREG(about.st_mode) else 0
        except OSError:
            found.missing += 1
    return size


def _bytes_in(state: Any) -> int:
    """The size of what lies in a store, as `states_of` has it; 0 where it does not say."""
    if not isinstance(state, list) or not state:
        return 0
    if isinstance(state[0], list):
        return sum(_bytes_in(one) for _, one in state)
    return state[0] if isinstance(state[0], int) else 0


def _write_lost(places: Places, item: Item, part: str) -> Path:
    about = {"case": item.case.name, "key": item.key, "attempt": item.begun, "part": part}
    path = places.record(item.case.name)
    write_failure(path, about, status="lost", error=_LOST, error_kind="")
    return path
