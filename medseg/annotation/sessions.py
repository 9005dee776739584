"""Scans that somebody sent to have them segmented: in a private folder, for a while, and gone
afterwards.

A session has a number that cannot be guessed. It ends when its owner says so, when nobody asked
for it for a while, when there is no room for a newer one, or with the server.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Seconds without a request after which a session ends.
IDLE_S = 3600.0
#: Sessions at a time; one more, and the one that was idle longest ends.
MAX_SESSIONS = 16


@dataclass(kw_only=True)
class Session:
    """A scan that was sent. last_s: when it was asked for, by the clock of its `Sessions`."""

    identity: str
    scan: Path
    size_bytes: int
    last_s: float


class Sessions:
    """The sessions of a server, in a folder of ours. Safe to use from several threads."""

    def __init__(
        self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """folder: private, and removed by who made it. max_bytes: of all scans together."""
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def add(self, scan: Path) -> Session:
        """A session of a file in the folder."""
        size_bytes = scan.stat().st_size
        with self._lock:
            self._end_idle()
            while self._sessions and (
                len(self._sessions) >= MAX_SESSIONS
                or self._held_bytes() + size_bytes > self._max_bytes
            ):
                self._end(min(self._sessions.values(), key=lambda one: one.last_s))
            session = Session(
                identity=secrets.token_hex(16), scan=scan, size_bytes=size_bytes,
                last_s=self._clock(),
            )  # fmt: skip
            self._sessions[session.identity] = session
            return session

    def get(self, identity: str) -> Session | None:
        """A session, which then goes on; None where there is none."""
        with self._lock:
            self._end_idle()
            session = self._sessions.get(identity)
            if session is not None:
                session.last_s = self._clock()
            return session

    def remove(self, identity: str) -> Session | None:
        """End a session; None where there is none."""
        with self._lock:
            session = self._sessions.get(identity)
            if session is not None:
                self._end(session)
            return session

    def _held_bytes(self) -> int:
        return sum(session.size_bytes for session in self._sessions.values())

    def _end_idle(self) -> None:
        now = self._clock()
        for session in list(self._sessions.values()):
            if now - session.last_s > IDLE_S:
                self._end(session)

    def _end(self, session: Session) -> None:
        del self._sessions[session.identity]
        session.scan.unlink(missing_ok=True)
