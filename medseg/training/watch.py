"""Whether the other processes of a run are still there.

A process that is killed closes its connections, and the others hear of it. A machine that is gone
without a word closes nothing, and PyTorch waits for it as long as for one that scores whole scans.
So each process says every few seconds that it is there, in the store by which they found each
other. One that fails says that there, too, and the others end without a word of their own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from medseg.errors import MedsegError

#: Seconds between two signs of life, and without one of another process until it counts as gone.
_SIGN_S, _GONE_S = 5.0, 50.0
#: Seconds after another has failed in which a process may end as it likes: it may be writing.
_FAILED_S = 25.0
#: Seconds until a look at the others that is under way counts as hanging.
_LEAVE_S = 5.0
#: What is said by PyTorch's backends where the other side is gone.
_CLOSED = (
    "closed by peer",
    "likely closed",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "timed out",
)
GONE = (
    "another process of this run is gone, and all end with it; what was trained up to the last"
    " state is kept, and the same command goes on, also with another number of processes"
)


class Store(Protocol):
    """What processes share: numbers by name. `add` returns the new one."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first."""


class Watch:
    """Signs of life of one process, and a look at those of the others, in a thread.

    name: of this run of the processes, the same for all and no other's. end: called where one is
    gone, with what to say.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        rank: int,
        size: int,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._name, self._rank, self._size = store, name, rank, size
        self._end = end or _end
        self._over = threading.Event()
        self._seen = {other: (-1, 0.0) for other in range(size) if other != rank}
        self._turn = self._looked = time.monotonic()  # when a look at the others began, and ended
        self._failed: float | None = None  # when it was seen that another has failed
        # Two: the store of a machine that is gone does not answer the first.
        self._threads = [
            threading.Thread(target=one, daemon=True) for one in (self._run, self._watch)
        ]

    def start(self) -> None:
        """Begin."""
        self._turn = self._looked = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say that this process leaves as it should, and look no more."""
        self._say(f"left/{self._rank}")

    def fail(self) -> bool:
        """Say that this process failed, or that another is gone, and look no more; the others end.
        Whether no other has said so: then it is for this one to say why.
        """
        return self._say("failed") <= 1

    def _say(self, word: str) -> int:
        """How often it has been said now; 0 where nobody hears it."""
        self._over.set()
        for thread in self._threads:
            thread.join(_LEAVE_S)
        with suppress(RuntimeError):  # who held the store has left before
            if not self._threads[0].is_alive():
                return self._store.add(f"{self._name}/{word}", 1)
        return 0

    def _run(self) -> None:
        while not self._over.wait(_SIGN_S):
            try:
                gone = self._look()
            except RuntimeError:  # PyTorch's own: the store, and whoever held it, is gone
                gone = set(self._seen)
            self._looked = time.monotonic()
            is_late = self._failed is not None and self._looked - self._failed > _FAILED_S
            if gone or is_late:
                self._gone(gone)

    def _watch(self) -> None:
        since, hangs_s, turn = self._looked, 0.0, time.monotonic()
        while not self._over.wait(_SIGN_S):
            now = time.monotonic()
            hangs_s = hangs_s + _passed_s(turn, now) if self._looked == since else 0.0
            since, turn = self._looked, now
            if hangs_s > _GONE_S:
                self._gone(set(self._seen))

    def _gone(self, others: set[int]) -> None:
        if not self._over.is_set():
            self._over.set()
            survivors = set(range(self._size)) - others
            is_said = self._failed is not None
            self._end(GONE if self._rank == min(survivors) and not is_said else "")

    def _look(self) -> set[int]:
        """Give a sign; those of whom there was none for too long."""
        now, gone = time.monotonic(), set()
        passed_s, self._turn = _passed_s(self._turn, now), now
        self._store.add(f"{self._name}/sign/{self._rank}", 1)
        if self._failed is None and self._store.add(f"{self._name}/failed", 0):
            self._failed = now
        for other, (before, away_s) in list(self._seen.items()):
            count = self._store.add(f"{self._name}/sign/{other}", 0)
            self._seen[other] = count, away_s + passed_s if count == before else 0.0
            if count != before:
                continue
            if self._store.add(f"{self._name}/left/{other}", 0):
                del self._seen[other]
            elif away_s + passed_s > _GONE_S:
                gone.add(other)
        return gone


def _passed_s(before: float, now: float) -> float:
    """Seconds between two looks; those in which nobody looked, for the whole job was suspended,
    count for nobody.
    """
    return min(now - before, 2 * _SIGN_S)


def _end(words: str) -> None:
    """End this process at once: its main thread waits for one that is gone."""
    if words:
        sys.stderr.write(f"medseg: {words}\n")
        sys.stderr.flush()
    os._exit(MedsegError.exit_code)


def is_about_another(error: BaseException | None) -> bool:
    """Whether an error of PyTorch says that another process is gone."""
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _CLOSED)
