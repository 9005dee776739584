"""Scans that were sent for a while end in time, and their files with them."""

from __future__ import annotations

from pathlib import Path

from medseg.annotation.sessions import IDLE_S, MAX_SESSIONS, Sessions


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def scan(folder: Path, name: str, size: int = 10) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def test_a_session_ends_when_its_owner_says_so(tmp_path: Path):
    sessions = Sessions(tmp_path, 1000)
    session = sessions.add(scan(tmp_path, "a"))
    assert sessions.get(session.identity) is session
    assert sessions.remove(session.identity) is session
    assert sessions.get(session.identity) is sessions.remove(session.identity) is None
    assert list(tmp_path.iterdir()) == []


def test_names_of_sessions_cannot_be_guessed(tmp_path: Path):
    sessions = Sessions(tmp_path, 1000)
    names = {sessions.add(scan(tmp_path, str(n))).identity for n in range(5)}
    assert len(names) == 5 and all(len(name) >= 32 for name in names)


def test_who_is_idle_goes_and_who_asks_stays(tmp_path: Path):
    clock = Clock()
    sessions = Sessions(tmp_path, 1000, clock)
    idle, asked = (sessions.add(scan(tmp_path, name)) for name in "ab")
    clock.now_s = IDLE_S - 1
    assert sessions.get(asked.identity)
    clock.now_s = IDLE_S + 1
    assert sessions.get(idle.identity) is None and sessions.get(asked.identity)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_longest_idle_makes_room(tmp_path: Path):
    clock = Clock()
    sessions = Sessions(tmp_path, 1000, clock)
    first, *_ = [sessions.add(scan(tmp_path, str(n))) for n in range(MAX_SESSIONS)]
    clock.now_s = 1
    sessions.get(first.identity)
    sessions.add(scan(tmp_path, "new"))
    assert sessions.get(first.identity) and len(list(tmp_path.iterdir())) == MAX_SESSIONS
    large = sessions.add(scan(tmp_path, "large", 995))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert sessions.get(large.identity) and sessions.get(first.identity) is None
