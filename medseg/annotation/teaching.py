"""A model trained from a growing data set by `medseg train`, in a child process: started, followed,
stopped and gone on with.

A run is a folder in DATASET/runs: 1, 2, 3 and so on, a round each. Each goes on from the model of
the round before. Stopped by SIGTERM a run keeps all that it has learnt, and the same command goes
on with it, as long as nobody has changed the data.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from medseg.annotation.listing import FINAL, StoredCase
from medseg.annotation.store import Store
from medseg.errors import BadConfig
from medseg.text import parse_json

#: Where the runs of a data set lie in it.
RUNS = "runs"
#: Names of runs that are numbers.
_NUMBER = re.compile(r"[0-9]{1,9}")
#: Lines of the child process that are kept.
_LINES = 50


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training run stands.

    state: 'running', 'done', 'stopped' (it can go on) or 'failed'. what: what is being done. share:
    of the time, 0 to 1. seconds_left: until training ends, None where it is not known. step, loss,
    dice: of training. validation: structure to Dice on scans that are not trained with, the last
    one measured; 'mean' over them. message: the error in one sentence, '' for none.
    """

    state: str = "running"
    what: str = "starting"
    share: float = 0.0
    seconds_left: float | None = None
    step: int = 0
    loss: float | None = None
    dice: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


class Teaching:
    """A child process that trains. Started by `start`; `progress` says how far it is."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        """process: `medseg train --progress json` with stderr in a pipe; run: its folder."""
        self.run, self.began = run, time.time()
        self._process = process
        self._lock = Lock()
        self._progress = Progress()
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._stopping = False
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def progress(self) -> Progress:
        """Where the run stands now."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=10)
        with self._lock:
            if code is None:
                return self._progress
            if code == 0:
                return replace(self._progress, state="done", share=1.0, seconds_left=0.0)
            if self._stopping or code in (-signal.SIGTERM, 128 + signal.SIGTERM):
                return replace(self._progress, state="stopped", message="")
            return replace(self._progress, state="failed", message=self._error(code))

    @property
    def lines(self) -> list[str]:
        """The last lines that it said."""
        with self._lock:
            return list(self._lines)

    def stop(self, timeout_s: float = 600.0) -> Progress:
        """End it so that it can go on later: what it has learnt is written first. Returns where it
        stands; one that does not end in time is killed, and goes on from its last state.
        """
        self._stopping = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self.wait()

    def wait(self, timeout_s: float | None = None) -> Progress:
        """Where it stands when it has ended, or after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.progress

    def _error(self, code: int) -> str:
        said = [line for line in self._lines if line.startswith("medseg: ")]
        return said[-1].removeprefix("medseg: ") if said else f"training ended with code {code}"

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            event = _event(line)
            with self._lock:
                if event is None:
                    self._lines.append(line.rstrip())
                else:
                    self._progress = followed(self._progress, event)
        self._process.stderr.close()


def start(
    store: Store,
    run: Path,
    *,
    time_s: float | None = None,
    model: str | Path | None = None,
    options: Sequence[str] = (),
) -> Teaching:
    """Train in a folder, or go on with the run that is there.

    time_s: all it may take. model: what to go on from. options: further words for `medseg train`.
    Raises `BadConfig` where the data set has no final label.
    """
    if not any(FINAL in one.labels for one in store.cases()):
        raise BadConfig(f"{store.folder}: no scan has a final label yet; add one with medseg add")
    process = subprocess.Popen(
        [sys.executable, "-m", "medseg", *words_of(store, run, time_s, model), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    return Teaching(process, run)


def words_of(
    store: Store, run: Path, time_s: float | None = None, model: str | Path | None = None
) -> list[str]:
    """The words after `medseg` that train in a folder."""
    words = ["train", str(store.folder), "-o", str(run), "--progress", "json"]
    words += ["--time", f"{time_s:.0f}s"] if time_s is not None else []
    return words + (["--finetune", str(model)] if model is not None else [])


def next_run(store: Store) -> Path:
    """The folder of the next round: DATASET/runs/N."""
    numbers = [int(one.name) for one in runs_of(store) if _NUMBER.fullmatch(one.name)]
    return store.folder / RUNS / str(max(numbers, default=0) + 1)


def runs_of(store: Store) -> list[Path]:
    """The folders of all rounds that were begun, the first one first."""
    folder = store.folder / RUNS
    runs = [one.parent for one in folder.glob("*/config.yaml")] if folder.is_dir() else []
    return sorted(runs, key=lambda one: (_number(one.name), one.name))


def is_finished(run: Path) -> bool:
    """Whether a run has its scored model."""
    return (run / "model" / "README.md").is_file()


def newest_models(store: Store) -> list[Path]:
    """The runs that are finished, the last round first."""
    return [one for one in runs_of(store) if is_finished(one)][::-1]


def stamp_of(case: StoredCase) -> list[list[int]]:
    """Size and time of the files that a case is trained with: others, where it was changed."""
    files = [*case.images, case.labels[FINAL]]
    stats = [path.stat() for path in files if path.exists()]
    return [[one.st_size, one.st_mtime_ns] for one in stats]


def followed(before: Progress, event: Mapping[str, Any]) -> Progress:
    """Where a run stands after an event of `medseg train --progress json`."""
    if event["event"] == "progress":
        return replace(before, what=str(event["what"]))
    if event["event"] == "validation":
        return replace(before, validation=dict(event["dice"]))
    if event["event"] == "training":
        return replace(
            before,
            what="training",
            share=float(event["share"]),
            seconds_left=float(event["seconds_left"]),
            step=int(event["step"]),
            loss=float(event["loss"]),
            dice=event.get("dice"),
        )
    return before


def _event(line: str) -> dict[str, Any] | None:
    """The event in a line of JSON, None for another line."""
    if not line.startswith("{"):
        return None
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "event" in content else None


def _number(name: str) -> int:
    return int(name) if _NUMBER.fullmatch(name) else 10**9
