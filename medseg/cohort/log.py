"""What a part of a cohort did, in order: for people, and never read back for a decision."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO


class Log:
    """Lines of JSON, added to a file that is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def add(self, at: str, event: str, case: str, **facts: Any) -> None:
        """Add a line; at: the time of the event, '' for now. A log that cannot be written stops
        nothing.
        """
        at = at or datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8", newline="\n")
            self._file.write(json.dumps({"at": at, "event": event, "case": case} | facts) + "\n")
            self._file.flush()

    def close(self) -> bool:
        """Close the file; whether there was one."""
        if self._file is None:
            return False
        with suppress(OSError):
            self._file.close()
        self._file = None
        return True
