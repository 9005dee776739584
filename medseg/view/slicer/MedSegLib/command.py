"""Run the medseg command line as a child process: models, progress, cancel, and errors as one
sentence.

Nothing but the standard library: 3D Slicer's own Python runs this, and medseg may live in another
Python.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

#: Seconds that a cancelled command has to tidy up before it is killed.
PATIENCE_S = 10.0
_QUESTION_S = 60.0  # for `medseg models`


class CommandError(Exception):
    """What went wrong, in one sentence for the user."""


class Model(NamedTuple):
    """A model that comes with medseg: its name, how many structures it finds, and what it is."""

    name: str
    structures: int
    about: str


class State(NamedTuple):
    """Where a run is: what it does, the share done (None if unknown), and the lines said since the
    last look.
    """

    what: str
    share: float | None
    lines: tuple[str, ...]


def find_command(chosen: str = "", python: str | None = None) -> list[str]:
    """The command that starts medseg: the program `chosen`, or what is on the path, or medseg in
    the Python `python`.

    Raises `CommandError` if there is none.
    """
    if chosen.strip():
        program = shutil.which(chosen.strip())
        if program is None:
            raise CommandError(
                f"{chosen.strip()} is not a program; choose the medseg program in the module's"
                " settings"
            )
        return [program]
    program = shutil.which("medseg")
    if program is not None:
        return [program]
    if python is not None and _answers([python, "-m", "medseg", "version"]):
        return [python, "-m", "medseg"]
    raise CommandError(
        "medseg was not found; install it, or choose the medseg program in the module's settings"
    )


def list_models(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[Model]:
    """The models that come with medseg. Raises `CommandError`."""
    try:
        process = subprocess.run(
            [*command, "models", "--json"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_QUESTION_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise CommandError(
            f"{command[0]} cannot be started; choose the medseg program in the settings"
        ) from None
    try:
        return [
            Model(str(row["name"]), int(row["structures"]), str(row["about"]))
            for row in json.loads(process.stdout)
        ]
    except (ValueError, KeyError, TypeError):
        raise CommandError(
            _sentence(process.stderr.splitlines()) or "medseg did not say which models it has"
        ) from None


def infer_command(
    command: Sequence[str],
    scan: Path,
    output: Path,
    model: str = "brain",
    device: str = "auto",
    cleanup: bool = True,
) -> list[str]:
    """The arguments that segment `scan` into `output` and say how far they are."""
    arguments = [
        "infer",
        str(scan),
        "-o",
        str(output),
        "--model",
        model,
        "--device",
        device,
        "--progress",
        "json",
    ]
    return [*command, *arguments, *([] if cleanup else ["--no-cleanup"])]


class Run:
    """A command at work. Look at it from time to time; nothing here waits."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it. Raises `CommandError` if it cannot be started."""
        try:
            self._process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
            )
        except OSError:
            raise CommandError(
                f"{arguments[0]} cannot be started; choose the medseg program in the settings"
            ) from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: list[str] = []
        self._what = "starting"
        self._share: float | None = None
        self._cancelled = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def look(self) -> State:
        """Where it is now."""
        lines: list[str] = []
        while not self._lines.empty():
            line = self._lines.get()
            text = self._understand(line)
            if text:
                lines.append(text)
        return State(self._what, self._share, tuple(lines))

    @property
    def running(self) -> bool:
        """Whether it still works."""
        return self._process.poll() is None

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop."""
        return self._cancelled

    def cancel(self) -> None:
        """Tell it to stop; it leaves nothing half-written. What does not stop in `PATIENCE_S` is
        killed.
        """
        self._cancelled = True
        if self.running:
            self._process.terminate()
            timer = threading.Timer(PATIENCE_S, self._process.kill)
            timer.daemon = True
            timer.start()

    def finish(self) -> None:
        """Wait for its end. Raises `CommandError` with what it said if it failed or was
        cancelled.
        """
        code = self._process.wait()
        self._reader.join()
        self.look()
        if self._cancelled:
            raise CommandError("stopped; nothing was changed")
        if code != 0:
            raise CommandError(
                _sentence(self._said) or f"medseg ended with exit code {code} and said nothing"
            )

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line.rstrip("\n"))

    def _understand(self, line: str) -> str:
        """Take up a line of JSON; give back what is to be shown of the line."""
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):
            self._said.append(line)
            return line.strip()
        if kind == "progress":
            done, total = event.get("done", 0), event.get("total", 0)
            self._what = str(event.get("what", ""))
            self._share = done / total if total > 1 else None
            return ""
        return str(event.get("text", "")).strip()


def _sentence(lines: Sequence[str]) -> str:
    """The last thing a failed medseg said, without its name."""
    own = [line.removeprefix("medseg: ") for line in lines if line.startswith("medseg: ")]
    rest = [line.strip() for line in lines if line.strip()]
    return own[-1] if own else rest[-1] if rest else ""


def _answers(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_QUESTION_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
