"""The one training run of a server, in the words of MONAI Label's protocol."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from medseg.annotation.listing import FINAL
from medseg.annotation.protocol import Refused
from medseg.annotation.served import Served
from medseg.annotation.store import Store
from medseg.annotation.teaching import (
    Progress,
    Teaching,
    is_finished,
    next_run,
    runs_of,
    stamp_of,
    start,
)
from medseg.errors import BadFile
from medseg.files import atomic_write
from medseg.inference import check_device
from medseg.text import parse_json, read_json, seconds_of

#: How long a run may take; the first is what is chosen unless somebody chooses.
TIMES = ("10m", "30m", "2h", "8h")
_STATUS = {"running": "RUNNING", "done": "DONE", "stopped": "STOPPED", "failed": "ERROR"}
#: A run's seconds: at most ten days; and letters in which they are said.
_LEAST_S, _MOST_S, _LONGEST = 1, 864_000, 16
#: Seconds for which a run that is stopped may keep what it has learnt.
STOPPING_S = 120.0
#: What the last run was asked for, and with which labels, so that one that was stopped can go on.
_ASKED = ".asked.json"


@dataclass(kw_only=True)
class Lesson:
    """A run that was begun. request: what was asked for; base: the model it goes on from."""

    identity: str
    base: Served
    teaching: Teaching
    request: Mapping[str, Any]
    began_s: float
    ended_s: float | None = None
    is_told: bool = False


class Lessons:
    """Starts a run, follows it and stops it; one at a time. Safe to use from several threads.

    finished: called once with the lesson that has ended well. tell: gets neutral lines. without:
    takes the paths out of a text.
    """

    def __init__(
        self,
        store: Store,
        *,
        finished: Callable[[Lesson], None],
        tell: Callable[[str], None],
        without: Callable[[str], str],
    ) -> None:
        self._store, self._finished, self._tell = store, finished, tell
        self._without = without
        self._lock = RLock()
        self._lesson: Lesson | None = None

    @property
    def is_running(self) -> bool:
        """Whether a model is being trained."""
        return self._state() == "running"

    def begin(self, base: Served, params: Mapping[str, Any]) -> dict[str, Any]:
        """Train a model further; returns the task. Raises `Refused`, and 429 where one runs.

        The last run goes on if it was stopped, the same is asked for, and no label is another.
        """
        time_s, device = _seconds(params.get("time", TIMES[0])), params.get("device", "auto")
        if not isinstance(device, str):
            raise Refused(400, "device is a text such as cpu")
        check_device(device)
        if not base.can_go_on:
            raise Refused(400, "this model cannot be trained further; /info/ lists those that can")
        with self._lock:
            if self._state() == "running":
                raise Refused(429, "a model is being trained already; stop it, or wait")
            labelled = [case for case in self._store.cases() if FINAL in case.labels]
            if not labelled:
                raise Refused(400, "no scan has a final label yet; submit one first")
            request = {"model": base.name, "time": f"{time_s:.0f}s", "device": device}
            labels = {case.id: stamp_of(case) for case in labelled}
            stopped = self._stopped_run(asked := {"request": request, "labels": labels})
            run = stopped or next_run(self._store)
            with atomic_write(self._store.folder / _ASKED) as file:
                file.write(json.dumps(asked | {"run": run.name}).encode())
            teaching = start(
                self._store, run, time_s=time_s, model=base.word, options=("--device", device)
            )
            self._lesson = Lesson(
                identity=secrets.token_hex(16), base=base, teaching=teaching, request=request,
                began_s=time.time(),
            )  # fmt: skip
        self._tell(f"{base.name}: training {'goes on' if stopped else 'begins'}, {time_s:.0f} s")
        return self._task(self._lesson)

    def _stopped_run(self, asked: Mapping[str, Any]) -> Path | None:
        """The last run, if it was asked for the same and can go on."""
        try:
            kept = parse_json((self._store.folder / _ASKED).read_text(encoding="utf-8"))
            name = kept.pop("run")
        except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or damaged
            return None
        runs = runs_of(self._store)
        is_last = bool(runs) and runs[-1].name == name and not is_finished(runs[-1])
        return runs[-1] if is_last and kept == asked else None

    def task(self) -> dict[str, Any]:
        """The task that runs. Raises `Refused` (404) where none does, saying how the last ended."""
        lesson = self._lesson
        if lesson is None or self._state() != "running":
            raise Refused(404, "no model is being trained" + self._last())
        return self._task(lesson)

    def end(self) -> dict[str, Any]:
        """Stop the task that runs, which keeps what it has learnt; returns it. Raises `Refused`."""
        lesson = self._lesson
        if lesson is None or self._state() != "running":
            raise Refused(404, "no model is being trained" + self._last())
        lesson.teaching.stop(STOPPING_S)
        self._state()
        return self._task(lesson)

    def close(self) -> None:
        """Stop what runs, for the server ends."""
        if self._lesson is not None and self._state() == "running":
            self._lesson.teaching.stop(STOPPING_S)
            self._state()

    def stats(self) -> dict[str, Any]:
        """What the extension draws as bars: the share of the time as epochs of a hundred."""
        lesson = self._lesson
        if lesson is None:
            return {}
        progress = lesson.teaching.progress
        best = progress.validation.get("mean", progress.dice)
        about = {
            "epoch": round(100 * progress.share),
            "total_epochs": 100,
            "best_metric": round(float(best or 0), 4),
            "start_ts": _stamp(lesson.began_s),
        }
        if progress.state != "running":
            about["total_time"] = _span(self._ended_s(lesson) - lesson.began_s)
        return {lesson.base.name: about}

    def _state(self) -> str | None:
        """How the last run is; None where there was none. What ended is told once."""
        lesson = self._lesson
        if lesson is None:
            return None
        with self._lock:
            state = lesson.teaching.progress.state
            if state != "running" and not lesson.is_told:
                lesson.is_told = True
                self._ended_s(lesson)
                self._tell(f"{lesson.base.name}: training is {state}")
                if state == "done":
                    self._finished(lesson)
                if state == "failed":  # would fail again: the next one begins anew
                    (self._store.folder / _ASKED).unlink(missing_ok=True)
            return state

    def _ended_s(self, lesson: Lesson) -> float:
        if lesson.ended_s is None:
            lesson.ended_s = time.time()
        return lesson.ended_s

    def _last(self) -> str:
        lesson = self._lesson
        if lesson is None:
            return ""
        progress = lesson.teaching.progress
        why = f": {self._without(progress.message)}" if progress.message else ""
        return f"; the last training is {progress.state}{why}"

    def _task(self, lesson: Lesson) -> dict[str, Any]:
        progress = lesson.teaching.progress
        details = [_in_words(progress)]
        if progress.message:
            details.append(self._without(progress.message))
        running = progress.state == "running"
        return {
            "id": lesson.identity,
            "status": _STATUS[progress.state],
            "request": dict(lesson.request),
            "start_ts": _stamp(lesson.began_s),
            "end_ts": None if running else _stamp(self._ended_s(lesson)),
            "details": details,
        }


def score_of(run: Path) -> float | None:
    """The mean Dice of a run's model on the cases that validated it, None where it is not known."""
    try:
        content = read_json(run / "summary.json")
        return float(content["mean_over_structures"]["dice"])
    except (BadFile, KeyError, TypeError, ValueError):
        return None


def _seconds(text: object) -> float:
    """A time such as 30m or 2h. Raises `Refused`."""
    try:
        seconds = seconds_of(text) if isinstance(text, str) and len(text) <= _LONGEST else 0
    except ValueError:
        seconds = 0
    if not _LEAST_S <= seconds <= _MOST_S:
        raise Refused(400, "time is a text such as 30m or 2h, of ten days at most")
    return seconds


def _in_words(progress: Progress) -> str:
    """How far a run is."""
    text = f"{progress.state}: {progress.what}, {100 * progress.share:.0f} % of the time"
    if progress.step:
        text += f", step {progress.step}"
    if progress.loss is not None:
        text += f", loss {progress.loss:.3f}"
    if "mean" in progress.validation:
        text += f", Dice {progress.validation['mean']:.3f} in validation"
    return text


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
