"""The record of a case: the only proof that it is done, and what is known of one that failed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from medseg.errors import MedsegError
from medseg.files import atomic_write, output_errors
from medseg.inference import FORMAT as RECORD_FORMAT, finished_now
from medseg.packages import versions

#: What may become of a case. 'skipped': kept although it was made by another model or with other
#: settings.
STATUSES = ("done", "failed", "lost", "timeout", "memory", "skipped", "waiting")
#: Bytes within which the first lines of a record lie, and those lines. In a string of JSON no line
#: ends, so that what looks like one is one.
_HEAD = 2000
_FIRST_LINE = f'{{\n "format": "{RECORD_FORMAT}",\n'.encode()
_HEAD_LINES = (
    re.compile(rb'\n "key": "([0-9a-f]{64})",\n'),
    re.compile(rb'\n "attempt": ([0-9]{1,9}),\n'),
    re.compile(rb'\n "status": "done",\n'),
)
#: Frames of a foreign error that are kept.
_FRAMES = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a record says of a case."""

    status: str
    key: str
    attempt: int = 0
    error: str = ""


def write_failure(path: Path, about: Mapping[str, Any], **facts: Any) -> None:
    """Write the record of a case that failed, whole or not at all. Raises `BadOutput`.

    about: case, key and attempt. facts: status, error, error_kind and whatever else is known.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"versions": versions(), "finished": finished_now()}
    content = {"format": RECORD_FORMAT, **about, **facts, **provenance}
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_outcome(path: Path) -> Outcome | None:
    """What a record says; None where there is none, or no whole one.

    Of one that is done no more is looked at than its first lines, which is many times as fast.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a text is faster, of 40,000
            text = file.read()
    except OSError:
        return None
    begin = text[:_HEAD]
    lines = [pattern.search(begin) for pattern in _HEAD_LINES]
    is_whole = text.endswith(b"}\n") and b"\0" not in text  # which a power cut may leave
    if is_whole and all(lines) and begin.startswith(_FIRST_LINE):
        key, attempt = (line[1].decode() for line in lines[:2] if line is not None)
        return Outcome(status="done", key=key, attempt=int(attempt))
    content = load(path)
    return None if content is None else outcome_of(content)


def outcome_of(content: Mapping[str, Any]) -> Outcome | None:
    """What the content of a record says; None where it is not that of a case of a cohort."""
    status, key, attempt = (content.get(name) for name in ("status", "key", "attempt"))
    if status not in STATUSES or not isinstance(key, str):
        return None
    attempt = attempt if isinstance(attempt, int) else 0
    return Outcome(status=status, key=key, attempt=attempt, error=str(content.get("error", "")))


def load(path: str | Path) -> dict[str, Any] | None:
    """The content of a record; None where it is not there or is something else."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a text is faster, of 40,000
            content = from_json(file.read())
    except (OSError, ValueError):
        return None
    is_record = isinstance(content, dict) and content.get("format") == RECORD_FORMAT
    return content if is_record else None


def names_on_shelves(folder: Path) -> Iterator[str]:
    """Names of the files in the folders `ab` of a folder."""
    try:
        shelves = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for one in shelves:
        with suppress(OSError), os.scandir(one) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))


def sentence_of(error: BaseException, hidden: Mapping[str, str]) -> str:
    """What is kept of an error: one line, of a foreign one without what it says, which may quote a
    header.

    hidden: paths, and what to write for them.
    """
    if not isinstance(error, MedsegError):
        return f"stopped by an error of its own ({type(error).__name__})"
    text = " ".join(str(error).split())
    for path in sorted(filter(None, hidden), key=len, reverse=True):
        text = text.replace(path, hidden[path])
    return text


def frames_of(error: BaseException) -> list[str]:
    """The places in medseg that a foreign error came through, the innermost last."""
    from traceback import extract_tb

    frames = []
    for frame in extract_tb(error.__traceback__):
        parts = Path(frame.filename).parts
        if "medseg" in parts:
            frames.append(f"{'/'.join(parts[-2:])}, line {frame.lineno}")
    return frames[-_FRAMES:]
