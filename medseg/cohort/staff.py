"""The processes that work on a cohort: started, spoken to, listened to, watched and ended."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

#: What is run: the worker of this very medseg. `-P` keeps the folder it is run in from giving it
#: modules.
COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import sys; home = sys.argv[1]; home in sys.path or sys.path.insert(0, home); "
    "from medseg.cohort.worker import main; main()",
    str(Path(__file__).parents[2]),
)
#: Seconds that a worker has to leave once it is told to.
_LEAVE_S = 15.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 1 << 16


class Hand:
    """A worker process. `doing` is what it does now, `since` when that began (monotonic)."""

    def __init__(self, command: Sequence[str]) -> None:
        self.name = secrets.token_hex(4)
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is for us, who then tell it
        )
        self.is_ready = False
        self.doing: Any = None
        self.since = time.monotonic()
        self.ended_for = ""  # why we ended it: 'timeout', 'memory', 'given up'
        self.is_fresh = True  # it has not begun a case
        self._rest = b""

    def tell(self, **message: Any) -> None:
        """Send a message; that it is gone is heard of elsewhere."""
        stream = self.process.stdin
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()

    def hear(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether it will send no more."""
        stream = self.process.stdout
        assert stream is not None
        try:
            piece = os.read(stream.fileno(), _CHUNK)
        except OSError:
            piece = b""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines if line], not piece

    def resident_bytes(self) -> int:
        """Memory that it and what it started hold now; 0 where that cannot be known."""
        pids = [self.process.pid]
        with suppress(OSError, ValueError):
            place = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
            pids += [int(one) for one in Path(place).read_text(encoding="ascii").split()]
        total = 0
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
                total += int(text.split()[1]) * _PAGE
        return total

    def end(self, why: str = "") -> None:
        """End it at once."""
        self.ended_for = why
        with suppress(OSError):
            self.process.kill()

    def close(self) -> int:
        """Wait until it is gone; returns its exit status, negative for a signal."""
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self.process.returncode

    def last_words(self) -> str:
        """The last line that it wrote to stderr."""
        self.errors.seek(0)
        lines = self.errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


class Staff:
    """All workers of one part, each spoken to with `hello` when it starts."""

    def __init__(self, hello: Mapping[str, Any], command: Sequence[str] = COMMAND) -> None:
        self.hands: list[Hand] = []
        self._hello = dict(hello)
        self._command = command
        self._selector = selectors.DefaultSelector()

    def hire(self, threads: int, settled: Mapping[str, str]) -> Hand:
        """Start a worker of so many threads."""
        hand = Hand(self._command)
        self.hands.append(hand)
        self._selector.register(hand.process.stdout, selectors.EVENT_READ, hand)  # type: ignore[arg-type]
        hand.tell(**self._hello, threads=threads, settled=dict(settled), name=hand.name)
        return hand

    def listen(self, timeout_s: float) -> Iterator[tuple[Hand, dict[str, Any]]]:
        """What workers say within a time; of one that is gone {"event": "gone"}."""
        if not self.hands:
            time.sleep(timeout_s)
        for key, _ in self._selector.select(timeout_s):
            hand: Hand = key.data
            messages, is_over = hand.hear()
            for message in messages:
                yield hand, message
            if is_over:
                yield hand, {"event": "gone", "status": self.dismiss(hand)}

    def dismiss(self, hand: Hand) -> int:
        """Let a worker go; returns its exit status."""
        if hand in self.hands:
            self.hands.remove(hand)
            self._selector.unregister(hand.process.stdout)  # type: ignore[arg-type]
        return hand.close()

    def close(self) -> None:
        """Let all workers go; those that are at work are ended."""
        for hand in self.hands:
            if hand.doing is not None or not hand.is_ready:
                hand.end()
        for hand in list(self.hands):
            self.dismiss(hand)
        self._selector.close()
