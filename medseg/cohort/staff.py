"""The processes that work on a cohort: started, spoken to, listened to, watched and ended."""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from medseg.cohort.resources import Measured, choose_workers, cores_here, usable_bytes
from medseg.machine import apart, family_bytes

#: Who says something, and what; None for nothing more.
Message = tuple["Hand", dict[str, Any] | None]


def command_of(module: str) -> tuple[str, ...]:
    """What runs `main` of a module of this very medseg. `-P` keeps the folder it is run in from
    giving it modules.
    """
    return (
        sys.executable,
        "-P",
        "-c",
        "import sys; home = sys.argv[1]; home in sys.path or sys.path.insert(0, home); "
        f"from medseg.cohort.{module} import main; main()",
        str(Path(__file__).parents[2]),
    )


#: What is run.
COMMAND = command_of("worker")
#: Seconds that a worker has to leave once it is told to.
_LEAVE_S = 15.0


class Hand:
    """A worker process. `doing` is what it does now, `since` when that began (monotonic).

    said: gets each message that comes, and None when no more will.
    """

    def __init__(self, command: Sequence[str], said: queue.SimpleQueue[Message]) -> None:
        self._prepare()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            **apart(),
        )
        # A thread listens, for not every system waits for several pipes at a time.
        self._listener = threading.Thread(target=self._hear, args=(said,), daemon=True)
        self._listener.start()

    def _prepare(self) -> None:
        self.name = secrets.token_hex(4)
        self.is_ready = False
        self.doing: Any = None
        self.since = time.monotonic()
        self.ended_for = ""  # why we ended it: 'timeout', 'memory', 'late', 'given up'
        self.is_fresh = True  # it has not begun a case

    def tell(self, **message: Any) -> None:
        """Send a message; that it is gone is heard of elsewhere."""
        stream = self.process.stdin
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()

    def _hear(self, said: queue.SimpleQueue[Message]) -> None:
        stream = self.process.stdout
        assert stream is not None
        with suppress(OSError, ValueError):  # it is gone, within a line perhaps
            for line in stream:
                said.put((self, json.loads(line)))
        said.put((self, None))

    def resident_bytes(self) -> int:
        """Memory that it and what it started hold now; 0 where that cannot be known."""
        return family_bytes(self.process.pid)

    def end(self, why: str = "") -> None:
        """End it at once."""
        self.ended_for = why
        with suppress(OSError):
            self.process.kill()

    def close(self) -> int | None:
        """Wait until it is gone; returns its exit status, negative for a signal, None where nobody
        knows.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        with suppress(OSError):
            stdin.close()
        try:
            self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(_LEAVE_S)
        if not self._listener.is_alive():  # else somebody whom it started writes there
            stdout.close()
        return self.process.returncode

    def last_words(self) -> str:
        """The last line that it wrote to stderr."""
        self.errors.seek(0)
        lines = self.errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


class Staff:
    """All workers of one part, each spoken to with `hello` when it starts; here on this machine.

    start_limit_s: seconds within which a worker must be ready.
    """

    start_limit_s = 1800.0

    def __init__(self, hello: Mapping[str, Any], command: Sequence[str] = COMMAND) -> None:
        self.hands: list[Hand] = []
        self._hello = dict(hello)
        self._command = command
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def hire(self, threads: int, settled: Mapping[str, str]) -> Hand:
        """Start a worker of so many threads."""
        hand = self._start(threads)
        self.hands.append(hand)
        hand.tell(**self._hello, threads=threads, settled=dict(settled), name=hand.name)
        return hand

    def _start(self, threads: int) -> Hand:
        return Hand(self._command, self._said)

    @property
    def cores(self) -> int:
        """Cores that one worker may use at most."""
        return cores_here()

    def threads_of(self, workers: int) -> int:
        """Threads of each of so many workers."""
        return max(1, self.cores // workers)

    def share_bytes(self, hand: Hand, workers: int, limit_bytes: int | None) -> int:
        """What a worker may hold for a case, one of so many within a limit for all."""
        share = usable_bytes(limit_bytes) + sum(one.resident_bytes() for one in self.hands)
        return min(share, limit_bytes or share) // workers

    def choose(
        self, costs: Measured, *, cases_left: int, limit_bytes: int | None, on_gpu: bool
    ) -> tuple[int, int]:
        """(workers, threads of each) that promise to end soonest."""
        if on_gpu:
            return 1, self.cores  # processes that share a GPU also share its memory
        staff_bytes = sum(hand.resident_bytes() for hand in self.hands)
        return choose_workers(
            costs,
            cores=self.cores,
            memory_bytes=usable_bytes(limit_bytes) + staff_bytes,
            cases_left=cases_left,
        )

    def listen(self, timeout_s: float) -> Iterator[tuple[Hand, dict[str, Any]]]:
        """What workers say within a time; of one that is gone {"event": "gone"}."""
        try:
            hand, message = self._said.get(timeout=timeout_s)
            while True:
                if hand in self.hands:  # and not dismissed meanwhile
                    if message is None:
                        message = {"event": "gone", "status": self.dismiss(hand)}
                    yield hand, message
                hand, message = self._said.get_nowait()
        except queue.Empty:
            pass

    def dismiss(self, hand: Hand) -> int | None:
        """Let a worker go; returns its exit status."""
        if hand in self.hands:
            self.hands.remove(hand)
        return hand.close()

    def close(self) -> None:
        """Let all workers go; those that are at work are ended."""
        for hand in self.hands:
            if hand.doing is not None or not hand.is_ready:
                hand.end()
        for hand in list(self.hands):
            self.dismiss(hand)
