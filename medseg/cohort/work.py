"""One case in a worker: read, segment, measure, write, with the record last."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.cohort.cases import Case
from medseg.cohort.measures import add_intensities, structure_intensities
from medseg.cohort.output import put_case
from medseg.cohort.records import frames_of, sentence_of, write_failure
from medseg.cohort.request import Request
from medseg.cohort.stores import Store, fetch, is_store
from medseg.errors import (
    BadFile,
    BadOutput,
    DeviceFailed,
    Interrupted,
    MedsegError,
    NotEnoughMemory,
)
from medseg.files import private_folder
from medseg.inference import Addition, Job, check_job, finished_now, infer, voxel_hash

if TYPE_CHECKING:
    from medseg.inference import Model, Segmentation
    from medseg.volume import Volume

#: Failures of a file system that every further case would meet, too.
_OF_THE_PLACE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
#: Addresses of series in a PACS.
_PACS = ("dicomweb://", "dicomweb+http://")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One case to be done now.

    max_memory_bytes: what the worker may hold. max_windows: a case of more is put off, 0: of any
    number. is_alone: whether there is no later time to put it off to.
    """

    case: Case
    key: str
    attempt: int
    part: str
    max_memory_bytes: int = 0
    max_windows: int = 0
    is_alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a task: 'done', 'failed', 'memory', 'put off', or 'stop' where no case can be
    written.
    """

    status: str
    error: str = ""
    exit_code: int = 0
    windows: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a worker keeps from case to case. name: random. device: for the record. store: where
    results go to, None for the folder `out`.
    """

    name: str
    out: Path
    store: Store | None = None
    request: Request
    model: Model
    device: str


class _PutOff(MedsegError):
    """The case is for the end, when it has the machine for itself."""


def do(task: Task, worker: Worker, wait_s: float = 0.0) -> Ended:
    """Do one case. Whatever goes wrong with it is written to its record, and told."""
    if worker.store is None:
        return _do(task, worker, wait_s)
    with private_folder() as folder:
        outcome = _do(task, replace(worker, out=folder), wait_s)
        if outcome.status in ("put off", "stop"):
            return outcome
        record = worker.request.places(folder).record(task.case.name)
        try:
            put_case(worker.store, folder, record.relative_to(folder).as_posix())
        except BadOutput as error:
            return replace(outcome, status="stop", error=str(error), exit_code=error.exit_code)
        return outcome


def _do(task: Task, worker: Worker, wait_s: float) -> Ended:
    places, case = worker.request.places(worker.out), task.case
    start = time.perf_counter()
    about = _about(task, worker)
    usage: dict[str, int] = {}
    hidden = _hidden(case, worker.out)
    with suppress(OSError):  # the peak of this case alone
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def ended(status: str, error: str = "", exit_code: int = 0) -> Ended:
        seconds = time.perf_counter() - start
        return Ended(status=status, error=error, exit_code=exit_code, seconds=seconds, **usage)

    try:
        with _at_hand(case, hidden) as files:
            _segment(task, worker, files, about | {"status": "done"}, usage, wait_s)
        return ended("done")
    except (DeviceFailed, Interrupted):  # no case can be done here any more
        raise
    except _PutOff:
        return ended("put off")
    except Exception as error:
        if isinstance(error, NotEnoughMemory | MemoryError) and not task.is_alone:
            return ended("put off")
        text = sentence_of(error, hidden)
        if _is_about_the_place(error):
            return ended("stop", text, BadOutput.exit_code)
        status = "memory" if isinstance(error, NotEnoughMemory | MemoryError) else "failed"
        facts: dict[str, Any] = {
            "status": status,
            "error": text,
            "error_kind": type(error).__name__,
        }
        if not isinstance(error, MedsegError):
            facts["frames"] = frames_of(error)
        facts["seconds"] = {"total": round(time.perf_counter() - start, 3)}
        try:
            write_failure(places.record(case.name), about, **facts)
        except BadOutput as problem:
            return ended("stop", str(problem), problem.exit_code)
        code = error.exit_code if isinstance(error, MedsegError) else MedsegError.exit_code
        return ended(status, text, code)


def _segment(
    task: Task,
    worker: Worker,
    files: Sequence[Path],
    about: dict[str, Any],
    known: dict[str, int],
    wait_s: float,
) -> None:
    """Segment a case and write all that belongs to it. known: gets windows and memory once they
    are.
    """
    request, case = worker.request, task.case
    places = request.places(worker.out)
    if case.problem:
        raise BadFile(case.problem)
    job = Job(
        scan=files[0],
        channels=tuple(files[1:]),
        labels=places.labels(case),
        record=places.record(case.name),
        has_table=False,
    )
    series = case.series or request.extras.series
    volume = request.extras.volume_index if case.volume is None else case.volume
    extras = replace(request.extras, series=series or None, volume_index=volume)
    settings = replace(request.settings, max_memory_bytes=task.max_memory_bytes or None)
    for path in files:
        if not path.exists():
            raise BadFile(f"{path}: there is no such file or folder; check the list")
    check_job(job, settings, extras)

    def consider(windows: int, memory_bytes: int) -> None:
        known["windows"] = known.get("windows", 0) + windows
        known["memory_bytes"] = max(memory_bytes, known.get("memory_bytes", 0))
        if task.max_windows and known["windows"] > task.max_windows:
            raise _PutOff("the scan needs much more time than others")

    def complete(volumes: Sequence[Volume], result: Segmentation, content: dict[str, Any]) -> None:
        values = [row["value"] for row in content["structures"] if row["voxels"]]
        intensities = structure_intensities(volumes[0], result.labels, values)
        add_intensities(content["structures"], intensities)
        content["labels_sha256"] = voxel_hash(result.labels)
        content["wait_s"] = round(wait_s, 3)

    writes: list[Callable[[Sequence[Volume], Segmentation], tuple[Path, Callable]]] = []
    if request.pictures:
        writes.append(partial(_picture, places.picture(case.name)))
    if request.layout == "bids":
        writes.append(partial(_sidecar, job, case))
    addition = Addition(about=about, consider=consider, complete=complete, writes=tuple(writes))
    infer(job, worker.model, settings, extras, addition=addition)


def _about(task: Task, worker: Worker) -> dict[str, Any]:
    """What every record of a cohort begins with."""
    return {
        "case": task.case.name,
        "key": task.key,
        "attempt": task.attempt,
        "part": task.part,
        "worker": worker.name,
        "device_name": worker.device,
        "settings_sha256": worker.request.settings_sha256,
        "started": finished_now(),
    }


def _picture(
    path: Path, volumes: Sequence[Volume], result: Segmentation
) -> tuple[Path, Callable[[Path], None]]:
    from medseg.view import write_beside, write_strip

    def draw(staged: Path) -> None:
        write_strip(staged, volumes[0], result.labels, table=result.table)

    return path, partial(write_beside, draw=draw)


def _sidecar(
    job: Job, case: Case, volumes: Sequence[Volume], result: Segmentation
) -> tuple[Path, Callable[[Path], None]]:
    from medseg.cohort.bids import write_sidecar

    return job.beside(".json"), partial(write_sidecar, case=case, result=result)


@contextmanager
def _at_hand(case: Case, hidden: dict[str, str]) -> Iterator[list[Path]]:
    """The files of a case as local paths; what lies in a store or a PACS is fetched, and gone
    afterwards. hidden: gets the words for these paths.
    """
    if not any("://" in name for name in case.images):
        yield [Path(name) for name in case.images]
        return
    with private_folder() as folder:
        files = []
        for number, name in enumerate(case.images):
            files.append(_fetched(name, folder / str(number)))
            hidden[str(files[-1])] = hidden[name]
        hidden[f"{folder}{os.sep}"] = ""
        yield files


def _fetched(name: str, target: Path) -> Path:
    """A local path of a file or an address. Raises `BadFile` for an address of another kind."""
    if "://" not in name:
        return Path(name)
    if is_store(name):
        return fetch(name, target)
    if not name.startswith(_PACS):
        raise BadFile(
            f"{name}: medseg does not fetch from such an address; use s3://, gs://, az://,"
            " dicomweb:// or a file"
        )
    from medseg.pacs import Limits, Pacs, parse_address

    target.mkdir()
    Pacs(parse_address(name, plain_http=False), None, None).fetch(target, Limits())
    return target


def _hidden(case: Case, out: Path) -> dict[str, str]:
    """Paths that a message must not hold, and the words for them."""
    several = len(case.images) > 1
    words = {
        name: f"channel {n + 1}" if several else "the scan" for n, name in enumerate(case.images)
    }
    folders = {f"{Path(name).parent}{os.sep}": "" for name in case.images if os.sep in name}
    return folders | words | {f"{out}{os.sep}": ""}


def _is_about_the_place(error: BaseException) -> bool:
    """Whether an error is one of writing that every further case would meet."""
    if not isinstance(error, BadOutput):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_THE_PLACE:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def as_message(value: Task | Ended) -> dict[str, Any]:
    """A task or an end as values for JSON."""
    return asdict(value)


def task_of(message: Mapping[str, Any]) -> Task:
    """The task of `as_message`."""
    values = dict(message)
    case = dict(values.pop("case"))
    images, carried = tuple(case.pop("images")), tuple(case.pop("carried"))
    return Task(case=Case(images=images, carried=carried, **case), **values)
