"""The scans of the cases that are scored, by their names: only pictures need them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from medseg.errors import BadFile
from medseg.evaluation.pairs import case_name
from medseg.evaluation.reading import files_of_volumes
from medseg.io import describe_no_dicom, strip_suffix

#: A number at the end of a name as channels have it: CASE_0000.
_CHANNEL = re.compile(r"(.+)_\d{4}")
#: What the scan in the folder of a case is called.
_SCANS = {"ct", "mri", "mr", "pet", "t1", "t1w", "t2", "t2w", "flair", "image", "img", "scan"}


def match_scans(scans: str | Path, cases: Iterable[str]) -> dict[str, Path]:
    """The scan of each case that has one: a file, or a folder of DICOM.

    scans: a folder in which files or folders are called as cases, alone or with `_0000`, `_T1w` and
    the like behind; of several the first. A folder called as a case holds its scan. For a single
    case the scan itself, whatever its name. Raises `BadFile` where there is nothing, and where none
    of it belongs to a case.
    """
    path, names = Path(scans), set(cases)
    if not path.exists():
        raise BadFile(f"{path}: there is no such file or folder; --scans is where the scans are")
    if len(names) == 1 and (path.is_file() or not describe_no_dicom(path)):
        return {names.pop(): path}
    if path.is_file():
        raise BadFile(f"{path}: is one file, and there are {len(names)} cases; give a folder")
    matches: dict[str, Path] = {}
    for file in files_of_volumes(path):
        matches.setdefault(_case_of(strip_suffix(file), names), file)
    folders = (inner for inner in sorted(path.iterdir()) if inner.is_dir())
    for folder in folders:
        if (scan := _scan_in(folder)) is not None:
            matches.setdefault(_case_of(folder.name, names), scan)
    matches.pop("", None)
    if not matches:
        raise BadFile(
            f"{path}: no file or folder in it is called as a case, such as '{min(names)}'; name the"
            " scans as their label maps"
        )
    return matches


def _case_of(name: str, cases: set[str]) -> str:
    """The case that a scan of this name belongs to, or ""."""
    channel = _CHANNEL.fullmatch(name)
    for candidate in (name, case_name(name), channel[1] if channel else ""):
        if candidate in cases:
            return candidate
    longest = ""
    for case in cases:
        if name.startswith(case) and name[len(case)] in "_-." and len(case) > len(longest):
            longest = case
    return longest


def _scan_in(folder: Path) -> Path | None:
    """The scan in the folder of a case: its only file, the one that is called as scans are, the
    first channel, or the folder itself where it holds DICOM. None where that is not certain, as
    among masks.
    """
    files = [file for file in files_of_volumes(folder) if file.suffix.lower() != ".dcm"]
    if not files:
        is_dicom = any(folder.iterdir()) and not describe_no_dicom(folder)
        return folder if is_dicom else None
    scans = [file for file in files if strip_suffix(file).lower() in _SCANS]
    channels = [file for file in files if _CHANNEL.fullmatch(strip_suffix(file))]
    sure = scans or channels or files
    return sure[0] if scans or channels or len(files) == 1 else None
