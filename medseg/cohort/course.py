"""The course of one part of a cohort: who does what next, and what follows when it ends in some
way.

An attempt is written down before a case is handed out, and a worker has one case at a time, so that
a death is charged to the case in hand and to no other. A case whose process died is done again at
the end, alone in a fresh one; so is, with the machine for itself, what needs more memory or far
more time than others.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from medseg import logs
from medseg.cohort import attempts
from medseg.cohort.cases import Case
from medseg.cohort.log import Log
from medseg.cohort.output import Output
from medseg.cohort.records import write_failure
from medseg.cohort.request import Request, request_as_json, settled_arithmetic
from medseg.cohort.resources import Measured
from medseg.cohort.staff import Hand, Staff
from medseg.cohort.work import Task, as_message
from medseg.errors import BadConfig, BadModel, BadOutput, Interrupted, MedsegError
from medseg.files import sweep, sweep_folders
from medseg.logs import Progress, silent

#: Seconds between two looks at the time and memory of workers.
_LOOK_S = 0.1
#: A case without a limit of its own may take so many times the median, at least so long, and so
#: long before there is a median.
_TIMES_MEDIAN, _LEAST_LIMIT_S, _FIRST_LIMIT_S = 30, 1800.0, 6 * 3600.0
#: A case of so many times the usual windows, and at least so many, waits for the end.
_TIMES_WINDOWS, _LEAST_WINDOWS = 20, 100
#: Ended cases after which there is something usual.
_ENOUGH = 5
#: Ended cases before a share of failures says something.
_ENOUGH_FOR_SHARE = 20
#: Workers in a row that did not even start.
_MOST_STARTS = 3
#: Cases that measure how workers and threads do: the first is slower than any other.
_TRIALS = 3
_ERRORS = {one.exit_code: one for one in (BadOutput, BadConfig, BadModel)}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a part may use. workers: 0 for as many as measurement says. case_time_s: 0 for what the
    others' time says. max_failed, max_failed_share: a number of cases, a share of those that ended.
    """

    workers: int = 0
    memory_bytes: int | None = None
    case_time_s: float = 0.0
    case_memory_bytes: int | None = None
    max_failed: int | None = None
    max_failed_share: float | None = None
    grace_s: float = 30.0


@dataclass(kw_only=True)
class Item:
    """A case that is to be done. times: by how much its limits are longer than usual."""

    case: Case
    key: str
    begun: int = 0
    deaths: int = 0
    vanished: int = 0
    is_suspect: bool = False
    times: int = 1


@dataclass(kw_only=True)
class Came:
    """What came of a part: cases by how they ended, and a sentence for each that is not done."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # name, status, sentence
    stopped: str = ""


class Course:
    """One part of a cohort on its way. Nothing happens before `settle` or `run`."""

    def __init__(
        self,
        output: Output,
        request: Request,
        limits: Limits,
        *,
        part: str = "1/1",
        make_staff: Callable[[Mapping[str, Any]], Staff] = Staff,
    ) -> None:
        self._output, self._request, self._limits, self._part = output, request, limits, part
        self._places = output.places(request)
        hello = {"request": request_as_json(request), "out": output.address}
        self._staff = make_staff(hello)
        self._settled: dict[str, str] = {}
        self._waiting: deque[Item] = deque()
        self._later: deque[Item] = deque()
        self._alone = False
        self._seconds: deque[float] = deque(maxlen=1000)
        self._windows: deque[int] = deque(maxlen=1000)
        self._most_bytes = 0
        self._trials: list[float] = []
        self._start_s = 0.0
        self._starts = 0
        self._cores = self._staff.cores
        workers = limits.workers
        self._workers = workers or 1
        self._threads = self._staff.threads_of(workers) if workers else self._cores
        self._log = Log(self._places.log(part))
        self.came = Came()

    def settle(self) -> dict[str, str]:
        """What 'auto' means in this cohort, found by a first worker if nobody has yet."""
        self._settled = settled_arithmetic(self._places)
        if self._request.arithmetic(self._settled) is None:
            while not self._settled:
                if not self._staff.hands:
                    self._staff.hire(self._threads, {})
                for hand, message in self._staff.listen(_LOOK_S):
                    self._hear(hand, message)
                self._look_at_starts()
        return self._settled

    def run(self, items: Iterable[Item], progress: Progress = silent) -> Came:
        """Do all of these cases, those under suspicion last.

        Raises `BadOutput` where nothing more can be written, `BadModel` or `BadConfig` where
        workers cannot start, `Interrupted` when it is stopped; what is done by then stays done.
        """
        for item in items:
            (self._later if item.is_suspect else self._waiting).append(item)
        total = len(self._waiting) + len(self._later)
        try:
            while not self.came.stopped and (self._waiting or self._later or self._busy()):
                self._hire()
                self._hand_out()
                for hand, message in self._staff.listen(_LOOK_S):
                    self._hear(hand, message)
                self._look()
                count = sum(self.came.counts.values())
                progress(self._in_words(), count, total)
        except Interrupted as stop:
            self._wind_down(self._limits.grace_s if stop.exit_code == 143 else 0.0)
            raise
        finally:
            self.close()
        return self.came

    def close(self) -> None:
        """End whoever is still at work; what was in hand is given up."""
        busy = self._busy()
        for hand in busy:
            hand.end("given up")
        self._staff.close()
        for hand in busy:
            self._give_up(hand.doing)
            hand.doing = None
        if self._log.close():
            self._output.keep_log(self._places.log(self._part))

    # Workers -----------------------------------------------------------------------------------

    def _busy(self) -> list[Hand]:
        return [hand for hand in self._staff.hands if hand.doing is not None]

    def _hire(self) -> None:
        """As many workers as there is work for; at the end one, alone."""
        if not self._waiting and self._later and not self._alone and not self._busy():
            self._alone = True
            for hand in list(self._staff.hands):
                self._staff.dismiss(hand)
        workers = 1 if self._alone else min(self._workers, len(self._waiting) + len(self._busy()))
        threads = self._cores if self._alone else self._threads
        while len(self._staff.hands) < workers:
            self._staff.hire(threads, self._settled)

    def _hand_out(self) -> None:
        for hand in list(self._staff.hands):
            queue = self._later if self._alone else self._waiting
            if not queue:
                return
            if not hand.is_ready or hand.doing is not None:
                continue
            if self._alone and queue[0].is_suspect and not hand.is_fresh:
                self._staff.dismiss(hand)  # it gets a fresh process
                continue
            self._begin(hand, queue.popleft(), queue[0] if queue else None)

    def _begin(self, hand: Hand, item: Item, following: Item | None) -> None:
        if item.begun:  # what an attempt before left half-written
            self._sweep(item.case)
        item.begun += 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        path = self._places.attempts(item.case.name)
        attempts.begin(
            path, number=item.begun, key=item.key, part=self._part, worker=hand.name, at=now
        )
        self._output.keep_attempt(path, item.begun)
        self._log.add(now, "begun", item.case.name, worker=hand.name, attempt=item.begun)
        task = Task(
            case=item.case,
            key=item.key,
            attempt=item.begun,
            part=self._part,
            max_memory_bytes=self._share_bytes(hand, item),
            max_windows=0 if self._alone else self._most_windows(),
            is_alone=self._alone,
        )
        hand.doing, hand.since, hand.is_fresh = item, time.monotonic(), False
        names = list(following.case.images) if following else []
        hand.tell(task=as_message(task), next=[name for name in names if "://" not in name])

    def _share_bytes(self, hand: Hand, item: Item) -> int:
        """What a worker may hold for a case."""
        workers = 1 if self._alone else self._workers
        share = self._staff.share_bytes(hand, workers, limit_bytes=self._limits.memory_bytes)
        case_bytes = self._limits.case_memory_bytes
        return min(share, case_bytes * item.times) if case_bytes else share

    def _most_windows(self) -> int:
        if len(self._windows) < _ENOUGH:
            return 0
        return max(_LEAST_WINDOWS, int(_TIMES_WINDOWS * statistics.median(self._windows)))

    def _look(self) -> None:
        """End workers whose case takes more time or memory than it may."""
        self._look_at_starts()
        now = time.monotonic()
        for hand in self._busy():
            item: Item = hand.doing
            if hand.ended_for:
                continue
            most_bytes = self._limits.case_memory_bytes
            if now - hand.since > self._limit_s() * item.times:
                hand.end("timeout")
            elif most_bytes and hand.resident_bytes() > most_bytes * item.times:
                hand.end("memory")

    def _look_at_starts(self) -> None:
        """End workers that do not get ready, such as on a disk that does not answer."""
        for hand in self._staff.hands:
            is_late = time.monotonic() - hand.since > self._staff.start_limit_s
            if is_late and not hand.is_ready and not hand.ended_for:
                hand.end("late")

    def _limit_s(self) -> float:
        if self._limits.case_time_s:
            return self._limits.case_time_s
        if len(self._seconds) < _ENOUGH:
            return _FIRST_LIMIT_S
        return max(_LEAST_LIMIT_S, _TIMES_MEDIAN * statistics.median(self._seconds))

    # What is heard -----------------------------------------------------------------------------

    def _hear(self, hand: Hand, message: Mapping[str, Any]) -> None:
        event = message["event"]
        if event == "ready":
            self._ready(hand, message["settled"])
        elif event == "refused":
            raise _ERRORS.get(message["exit_code"], MedsegError)(message["error"])
        elif event == "ended":
            item, hand.doing = hand.doing, None
            self._ended(hand, item, message)
        elif event == "gone":
            item, hand.doing = hand.doing, None
            if item is not None:
                self._died(hand, item, message["status"])
            elif not hand.is_ready:
                self._did_not_start(hand, message["status"])

    def _ready(self, hand: Hand, found: Mapping[str, str]) -> None:
        self._starts = 0
        self._start_s = max(self._start_s, time.monotonic() - hand.since)
        if not self._settled:
            settled_arithmetic(self._places, found)
            self._output.agree(self._places.arithmetic)
            self._settled = settled_arithmetic(self._places)
        hand.tell(settled=self._settled)
        hand.is_ready = True

    def _did_not_start(self, hand: Hand, status: int | None) -> None:
        self._starts += 1
        if self._starts >= _MOST_STARTS:
            how = f"workers end at their start ({_spoken(status)})"
            if hand.ended_for == "late":
                how = f"workers do not start within {self._staff.start_limit_s:.0f} seconds"
            raise MedsegError(f"{how}: {hand.last_words() or 'no message'}")

    def _ended(self, hand: Hand, item: Item, message: Mapping[str, Any]) -> None:
        status, error = message["status"], message["error"]
        if status == "stop":
            self._end_attempt(item, "given up")
            raise _ERRORS.get(message["exit_code"], BadOutput)(error)
        if status == "put off":
            self._end_attempt(item, "put off")
            self._later.append(item)
            return
        self._most_bytes = max(self._most_bytes, message["memory_bytes"])
        if status == "done":
            self._seconds.append(message["seconds"])
            if message["windows"]:
                self._windows.append(message["windows"])
            self._tried(message["seconds"] / max(1, message["windows"]))
        self._count(item, status, error, seconds=round(message["seconds"], 3))

    def _tried(self, seconds: float) -> None:
        """One of the first cases, by whose time workers and threads are chosen."""
        if self._limits.workers or len(self._trials) >= _TRIALS or self._alone:
            return
        self._trials.append(seconds)
        if len(self._trials) == _TRIALS - 1 and self._cores > 1:
            for hand in self._staff.hands:
                hand.tell(threads=1)
        if len(self._trials) < _TRIALS:
            return
        units = statistics.median(self._windows) if self._windows else 1
        costs = Measured(
            all_threads_s=self._trials[1] * units,
            one_thread_s=self._trials[2] * units,
            start_s=self._start_s,
            memory_bytes=self._most_bytes,
        )
        self._workers, self._threads = self._staff.choose(
            costs,
            cases_left=len(self._waiting),
            limit_bytes=self._limits.memory_bytes,
            on_gpu=self._settled.get("device", self._request.settings.device) == "cuda",
        )
        for hand in self._staff.hands:
            hand.tell(threads=self._threads)

    def _died(self, hand: Hand, item: Item, status: int | None) -> None:
        self._sweep(item.case)
        why = hand.ended_for
        if why in ("timeout", "memory"):
            limit = self._limit_s() * item.times
            error = (
                f"it took longer than the {limit:.0f} s that a case may take (--case-time)"
                if why == "timeout"
                else "its worker held more memory than a case may (--case-memory)"
            )
            self._fail(item, why, error, hand=hand)
            return
        if status is None:  # the machine may be gone, which is not the case's fault
            item.vanished += 1
        else:
            self._end_attempt(item, "died")
            item.deaths += 1
        item.is_suspect = True
        self._log.add("", "died", item.case.name, worker=hand.name, status=status)
        if not attempts.is_lost(item.deaths, item.vanished):
            self._later.append(item)
            return
        times = item.deaths + item.vanished
        error = f"the process that worked on it ended {times} times, the last time "
        error += _spoken(status)
        self._fail(item, "lost", error, hand=hand)

    def _fail(self, item: Item, status: str, error: str, hand: Hand) -> None:
        about = {"case": item.case.name, "key": item.key, "attempt": item.begun}
        about |= {"part": self._part, "worker": hand.name}
        total = {"total": round(time.monotonic() - hand.since, 3)}
        path = self._places.record(item.case.name)
        write_failure(path, about, status=status, error=error, error_kind="", seconds=total)
        self._output.keep(path)
        self._count(item, status, error)

    def _count(self, item: Item, status: str, error: str, **facts: Any) -> None:
        self.came.counts[status] += 1
        self._log.add("", status, item.case.name, **facts)
        logs.info(__name__, "case %d: %s", self.came.counts.total(), status)
        if status == "done":
            return
        self.came.failures.append((item.case.name, status, error))
        total = self.came.counts.total()
        failures = total - self.came.counts["done"]
        most, share = self._limits.max_failed, self._limits.max_failed_share
        above = share is not None and total >= _ENOUGH_FOR_SHARE and failures > share * total
        if above or (most is not None and failures > most):
            self.came.stopped = f"{failures} of {total} cases failed, more than --max-failed allows"

    # Ends --------------------------------------------------------------------------------------

    def _wind_down(self, grace_s: float) -> None:
        """Let workers finish what they have in hand, for so long."""
        until = time.monotonic() + grace_s
        while self._busy() and time.monotonic() < until:
            for hand, message in self._staff.listen(_LOOK_S):
                self._hear(hand, message)

    def _give_up(self, item: Item) -> None:
        with suppress(BadOutput):  # it is why we end, perhaps
            self._end_attempt(item, "given up")
        self._sweep(item.case)

    def _end_attempt(self, item: Item, how: str) -> None:
        """Write down that an attempt ended without a record."""
        path = self._places.attempts(item.case.name)
        attempts.end(path, number=item.begun, how=how)
        self._output.keep_attempt(path, item.begun)

    def _sweep(self, case: Case) -> None:
        """Remove what killed processes left half-written, and nothing that is in use."""
        for home in self._places.homes(case):
            sweep(home, min_age_s=0)
            sweep_folders(home, min_age_s=0)

    def _in_words(self) -> str:
        count = len(self.came.failures)
        return f"{count} failed" if count else ""


def _spoken(status: int | None) -> str:
    if status is None:
        return "with the machine that it ran on"
    return f"by signal {-status}" if status < 0 else f"with exit status {status}"
