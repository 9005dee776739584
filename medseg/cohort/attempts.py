"""Attempts at a case, written down before they begin.

A file for each case, a line of JSON for each attempt that began, and one where it ended without a
record and somebody saw it: the process died, or the attempt was given up. What was finished leaves
a record instead. So whoever starts next knows of a case that takes its process along, and does not
charge a case that was only waiting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import BadOutput

#: Deaths that were seen, after which a case is lost.
MOST_DEATHS = 2
#: Attempts that ended with nobody left to say how (the node is gone, the memory of a whole job ran
#: out), after which a case is lost: others may have been the reason, so one more than of deaths.
MOST_VANISHED = 3


@dataclass(frozen=True, kw_only=True)
class History:
    """What came of the attempts at a case: begun in all, and of those with the key asked for, those
    whose process died and those of whose end nothing is known.
    """

    begun: int = 0
    deaths: int = 0
    vanished: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether the next attempt is to be made alone."""
        return bool(self.deaths or self.vanished)

    @property
    def is_lost(self) -> bool:
        """Whether no further attempt is to be made."""
        return is_lost(self.deaths, self.vanished)


def is_lost(deaths: int, vanished: int) -> bool:
    """Whether after so many ends without a record no further attempt is to be made."""
    return deaths >= MOST_DEATHS or deaths + vanished >= MOST_VANISHED


def begin(path: Path, *, number: int, key: str, part: str, worker: str, at: str) -> None:
    """Write down that an attempt begins. Raises `BadOutput`."""
    _add(path, {"begun": number, "key": key[:16], "at": at, "part": part, "worker": worker})


def end(path: Path, *, number: int, how: str) -> None:
    """Write down that an attempt ended without a record; how: 'died', 'given up' or 'put off'."""
    _add(path, {"ended": number, "how": how})


def history(path: Path, key: str, recorded: int = 0) -> History:
    """What is known of the attempts. recorded: the number of the attempt that left the newest
    record.
    """
    lines = lines_of(path)
    ends = {line.get("ended"): line.get("how") for line in lines if "ended" in line}
    starts = [line for line in lines if isinstance(line.get("begun"), int)]
    same = [line["begun"] for line in starts if line.get("key") == key[:16]]
    pending = [number for number in same if number > recorded]
    return History(
        begun=max((line["begun"] for line in starts), default=0),
        deaths=sum(ends.get(number) == "died" for number in pending),
        vanished=sum(number not in ends for number in pending),
    )


def _add(path: Path, line: dict[str, Any]) -> None:
    """Add a line in one piece; what a power cut may lose of it is at most one more attempt."""
    text = json.dumps(line) + "\n"
    try:
        try:
            file = path.open("a", encoding="utf-8", newline="\n")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8", newline="\n")
        with file:
            file.write(text)
    except OSError as error:
        raise BadOutput(
            f"{path}: cannot be written: {error.strerror}; make room, or choose another with -o"
        ) from error


def lines_of(path: Path) -> Sequence[dict[str, Any]]:
    """The lines that can be read; a kill may have left half of one."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
