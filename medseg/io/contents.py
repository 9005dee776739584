"""What lies in a folder that was given as a scan: DICOM, or else which files, in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from medseg.errors import BadFile
from medseg.files import open_file
from medseg.io.dicom.headers import is_dicom
from medseg.io.formats import is_readable_name

#: Files that are opened to see whether they are DICOM; a folder of more is left to the reader of
#: DICOM.
MOST_OPENED = 2000
#: Places and kinds of files that are named.
_NAMED = 3


def describe_no_dicom(folder: str | Path) -> str:
    """What a folder without any DICOM file holds instead, for a message; '' where it holds DICOM,
    or nothing at all.

    '' also where there are too many files to tell: then the reader of DICOM has to say it. Links
    are followed as that reader does: to files, not to folders.
    """
    scans: Counter[str] = Counter()
    others: Counter[str] = Counter()
    tries = 0
    for place, name in _files_below(folder):
        path = Path(place) / name
        if is_readable_name(name) and not name.lower().endswith(".dcm"):
            scans[os.path.relpath(place, folder)] += 1
            continue
        tries += 1
        if tries > MOST_OPENED or _may_be_dicom(path):
            return ""
        others[path.suffix.lower() or "no suffix"] += 1
    if scans:
        return f"no DICOM, but files of volumes: {_first(_places_of(scans))}"
    kinds = [f"{count} with {suffix}" for suffix, count in others.most_common()]
    return f"no DICOM, but other files: {_first(kinds)}" if kinds else ""


def _places_of(scans: Counter[str]) -> list[str]:
    """How many files of volumes lie where, in words; those in the folder itself first."""
    places = [f"{count} in {place}" for place, count in sorted(scans.items()) if place != "."]
    return [f"{scans['.']} in the folder itself", *places] if "." in scans else places


def example_folder(folder: str | Path) -> Path | None:
    """The first folder below `folder`, by name, that holds files of volumes; None if there is
    none.
    """
    for place, name in _files_below(folder):
        if is_readable_name(name) and Path(place) != Path(folder):
            return Path(place)
    return None


def _files_below(folder: str | Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of all files that are not hidden, folders and names in order."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from ((place, name) for name in sorted(names) if not name.startswith("."))


def _may_be_dicom(path: Path) -> bool:
    """Whether the reader of DICOM would look into a file; one that may not be read is left to it,
    too.
    """
    try:
        with open_file(path) as file:
            return is_dicom(file.read(132))
    except BadFile:
        return path.is_file() and path.stat().st_size > 0


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
