"""The cases of a cohort: their names, which are unique and kept, and what belongs to each."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.errors import BadConfig
from medseg.text import harmless, is_reserved

#: Most bytes of a name: files are called NAME with an ending, within the 255 of file systems.
MOST_NAME_BYTES = 180
#: What no file can be called by on some system.
_NOT_IN_NAMES = '/\\:*?"<>|'
#: Cases or rows that a message names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One case: the files of its channels, and what the list says of it.

    images: a file or folder for each channel. carried: values of the list's further columns, in the
    order of `Cohort.columns`. problem: why it cannot be done, known from the list alone.
    """

    name: str
    images: tuple[str, ...]
    group: str = ""
    series: str = ""
    volume: int | None = None
    carried: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Cases in the order of their names, and the names of the columns carried along.

    kind: 'list', 'bids' or 'folder'. source: what was given.
    """

    source: Path
    kind: str
    cases: tuple[Case, ...]
    columns: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of all that is known of the cases."""
        digest = hashlib.sha256(repr(self.columns).encode())
        for case in self.cases:
            digest.update(repr(as_row(case)).encode())
        return digest.hexdigest()


def as_row(case: Case) -> list[Any]:
    """A case as values for JSON; `from_row` reads them."""
    images = list(case.images)
    return [
        case.name,
        images,
        case.group,
        case.series,
        case.volume,
        list(case.carried),
        case.problem,
    ]


def from_row(row: Sequence[Any]) -> Case:
    """A case from the values of `as_row`. Raises `ValueError` for others."""
    name, images, group, series, volume, carried, problem = row
    return Case(
        name=str(name),
        images=tuple(map(str, images)),
        group=str(group),
        series=str(series),
        volume=None if volume is None else int(volume),
        carried=tuple(map(str, carried)),
        problem=str(problem),
    )


def make_cohort(
    source: Path, kind: str, cases: Iterable[Case], columns: Sequence[str] = ()
) -> Cohort:
    """The cohort of these cases. Raises `BadConfig` for none, for names twice, and for bad ones."""
    sorted_cases = sorted(cases, key=lambda case: case.name)
    if not sorted_cases:
        raise BadConfig(
            f"{source}: holds no case; give a list, a BIDS data set or a folder of scans"
        )
    for case in sorted_cases:
        check_name(source, case.name)
    twice = [
        name for name, count in Counter(case.name for case in sorted_cases).items() if count > 1
    ]
    if twice:
        names = ", ".join(harmless(name) for name in twice[:_NAMED])
        more = f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else ""
        raise BadConfig(
            f"{source}: {len(twice)} names of cases are there more than once: {names}{more}; "
            "give each row a name of its own in the column 'case'"
        )
    return Cohort(source=source, kind=kind, cases=tuple(sorted_cases), columns=tuple(columns))


def check_name(source: Path, name: str) -> None:
    """Raise `BadConfig` for what cannot be the name of a file everywhere."""
    text = harmless(name)
    odd = not name.strip() or name.startswith((".", "-")) or text != name or name != name.strip()
    if odd or is_reserved(name) or any(letter in name for letter in _NOT_IN_NAMES):
        raise BadConfig(
            f"{source}: '{text[:60]}' cannot name a case, whose files are called so; use letters, "
            "digits, - and _"
        )
    if len(os.fsencode(name)) > MOST_NAME_BYTES:
        raise BadConfig(
            f"{source}: the name '{text[:30]}...' of a case is longer than {MOST_NAME_BYTES} bytes"
        )


def told_apart(cases: Sequence[Case], folder: Path) -> list[Case]:
    """The cases of a folder, those of one name with a part of the hash of their files behind it.

    So a name depends on where a scan lies in the folder alone, and not on how many others there
    are, nor on where a machine has the folder: parts of a cohort must agree about the names.
    """
    names = Counter(case.name for case in cases)
    return [
        replace(case, name=f"{case.name}-{_short_hash(case, folder)}")
        if names[case.name] > 1
        else case
        for case in cases
    ]


def short_name(name: str) -> str:
    """A name made of a path as a file can have it: odd letters as _, the middle of a long one left
    out.
    """
    letters = [
        "_" if letter in _NOT_IN_NAMES or harmless(letter) != letter else letter for letter in name
    ]
    plain = "".join(letters).strip().lstrip(".-").rstrip(". ") or "scan"
    plain = f"_{plain}" if is_reserved(plain) else plain
    if len(os.fsencode(plain)) <= MOST_NAME_BYTES - 16:
        return plain
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
    begin = os.fsencode(plain)[:70].decode(errors="ignore")
    return f"{begin}-{digest}-{os.fsencode(plain)[-70:].decode(errors='ignore')}"


def located(case: Case) -> Case:
    """A case with the whole paths of its files, for whoever has another working folder."""
    images = tuple(one if "://" in one else str(Path(one).absolute()) for one in case.images)
    return replace(case, images=images)


def part_of(cases: Sequence[Case], part: tuple[int, int]) -> list[Case]:
    """The cases of part i of n: every n-th, so that all parts are of one size. Raises `BadConfig`
    unless 0 <= i < n.
    """
    if not 0 <= part[0] < part[1]:
        raise BadConfig(f"there is no part {part[0]} of {part[1]}; parts are numbered from 0")
    return list(cases[part[0] :: part[1]])


def _short_hash(case: Case, folder: Path) -> str:
    below = [Path(os.path.relpath(one, folder)).as_posix() for one in case.images]
    identity = "\0".join((*below, case.series, str(case.volume)))
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:8]
