"""Run the medseg command line as a child process: progress, time left, cancel, and errors as one
sentence.

medseg may live in another Python than Slicer's.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from MedSegLib.sentences import explain_end

#: Seconds that a cancelled command has to tidy up before it is killed.
PATIENCE_S = 10.0
_QUESTION_S = 60.0
#: Less than this share tells nothing of the time left.
_LEAST_SHARE = 0.02


class CommandError(Exception):
    """What went wrong, in one sentence for the user."""


class State(NamedTuple):
    """Where a run is: what it does, the share done (None if unknown), the lines said since the last
    look, and the seconds left (None if unknown).
    """

    what: str
    share: float | None
    lines: tuple[str, ...]
    left_s: float | None = None


def find_command(
    chosen: str = "", python: str | None = None, has_medseg: bool | None = None
) -> list[str]:
    """The command that starts medseg: the program `chosen`, or medseg in Slicer's Python `python`,
    or what is on the path.

    has_medseg: whether `python` has medseg, where that is known; else it is asked. Raises
    `CommandError` if there is none.
    """
    if chosen.strip():
        program = shutil.which(chosen.strip())
        if program is None:
            raise CommandError(
                f"{chosen.strip()} is not a program; choose the medseg program in the module's"
                " settings"
            )
        return [program]
    if python is not None and has_medseg:
        return [python, "-m", "medseg"]
    program = shutil.which("medseg")
    if program is not None:
        return [program]
    if python is not None and has_medseg is None and _answers([python, "-m", "medseg", "version"]):
        return [python, "-m", "medseg"]
    raise CommandError(
        "medseg was not found; press Install, or choose the medseg program in the module's settings"
    )


class Run:
    """A command at work. Look at it from time to time; nothing here waits."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        patience_s: float | None = None,
    ) -> None:
        """Start it. patience_s: seconds to tidy up once it is told to stop; None: `PATIENCE_S`.
        Raises `CommandError` if it cannot be started.
        """
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        try:
            self._process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
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
        self._output: list[str] = []
        self._what = "starting"
        self._share: float | None = None
        self._pace = Pace()
        self._told_left_s: float | None = None
        self._cancelled = False
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_output, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def look(self) -> State:
        """Where it is now."""
        lines: list[str] = []
        while not self._lines.empty():
            text = self._understand(self._lines.get())
            if text:
                lines.append(text)
        left_s = self._pace.left_s(self._share) if self._told_left_s is None else self._told_left_s
        return State(self._what, self._share, tuple(lines), left_s)

    @property
    def running(self) -> bool:
        """Whether it still works."""
        return self._process.poll() is None

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop."""
        return self._cancelled

    @property
    def output(self) -> str:
        """What it wrote to stdout; whole once it has finished."""
        return "".join(self._output)

    def cancel(self) -> None:
        """Tell it to stop; it leaves nothing half-written. What has no end when patience is at its
        end is killed.
        """
        self._cancelled = True
        if self.running:
            self._process.terminate()
            timer = threading.Timer(self._patience_s, self._process.kill)
            timer.daemon = True
            timer.start()

    def finish(self, *, answers_anyway: bool = False) -> None:
        """Wait for its end. Raises `CommandError` with what it said if it failed or was
        cancelled.

        answers_anyway: that it answered in JSON is no failure, whatever its exit code: what it
        looked at has errors, and the answer says which.
        """
        code = self._process.wait()
        for reader in self._readers:
            reader.join()
        self.look()
        if self._cancelled:
            raise CommandError("stopped; nothing was changed")
        if code != 0 and not (answers_anyway and self.output.lstrip().startswith("{")):
            raise CommandError(explain_end(code, self._said))

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line.rstrip("\n"))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._output.append(line)

    def _understand(self, line: str) -> str:
        """Take up a line of JSON; give back what is to be shown of the line."""
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):
            self._said.append(line)
            return line.strip()
        if kind == "training":
            self._what, self._share = "training", _number(event.get("share"))
            self._told_left_s = _number(event.get("seconds_left"))
            return ""
        if kind == "validation":
            return f"step {event.get('step')}: Dice of the held-out cases {event.get('dice')}"
        self._told_left_s = None
        if kind == "progress":
            done, total = event.get("done", 0), event.get("total", 0)
            what = str(event.get("what", ""))
            if what != self._what:
                self._pace = Pace()
            self._what = what
            self._share = done / total if total > 1 else None
            return ""
        return str(event.get("text", "")).strip()


class Pace:
    """How long something still takes, from the share that is done and the time it took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: tuple[float, float] | None = None

    def left_s(self, share: float | None) -> float | None:
        """The seconds left, None while nothing is known. What was done at the first look is not
        counted, so that starting is not.
        """
        if share is None:
            return None
        if self._since is None or share < self._since[1]:
            self._since = (self._clock(), share)
            return None
        at, first = self._since
        if share - first < _LEAST_SHARE:
            return None
        return (self._clock() - at) / (share - first) * max(0.0, 1 - share)


class Chain:
    """Several commands one after the other, seen as one. Look at it from time to time: the next one
    is started by that.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the first. Raises `CommandError` if it cannot be started or there is none."""
        if not commands:
            raise CommandError("there is nothing to do")
        self._commands = list(commands)
        self._environment = environment
        self._runs = [Run(self._commands[0], environment)]
        self._pace = Pace()
        self._failure: CommandError | None = None

    def look(self) -> State:
        """Where it is now."""
        state = self._runs[-1].look()
        count = len(self._commands)
        if not self._runs[-1].running and not self._failure:
            self._go_on()
        if count == 1:
            return state
        done = len(self._runs) - 1
        share = (done + (state.share or 0.0)) / count
        what = f"{done + 1} of {count}: {state.what}"
        return State(what, share, state.lines, self._pace.left_s(share))

    @property
    def running(self) -> bool:
        """Whether there is something left to do."""
        if self._failure or self.cancelled:
            return self._runs[-1].running
        return self._runs[-1].running or len(self._runs) < len(self._commands)

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop."""
        return self._runs[-1].cancelled

    @property
    def outputs(self) -> list[str]:
        """What each of them wrote to stdout."""
        return [run.output for run in self._runs]

    def cancel(self) -> None:
        """Tell the one at work to stop, and start no other."""
        self._runs[-1].cancel()

    def finish(self) -> None:
        """Wait for the end of all that began. Raises `CommandError` as `Run.finish`."""
        while self.running:
            self._runs[-1].finish()
            self._go_on()
        if self._failure:
            raise self._failure
        self._runs[-1].finish()

    def _go_on(self) -> None:
        try:
            self._runs[-1].finish()
            if len(self._runs) < len(self._commands):
                self._runs.append(Run(self._commands[len(self._runs)], self._environment))
        except CommandError as error:
            self._failure = error


def ask(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command that takes a moment prints. Raises `CommandError`."""
    try:
        process = subprocess.run(
            list(arguments),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_QUESTION_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise CommandError(
            f"{arguments[0]} cannot be started; choose the medseg program in the settings"
        ) from None
    if process.returncode != 0:
        raise CommandError(explain_end(process.returncode, process.stderr.splitlines()))
    return process.stdout


def time_left(seconds: float | None) -> str:
    """A time to wait in words; '' where it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _answers(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_QUESTION_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
