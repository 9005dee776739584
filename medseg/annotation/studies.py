"""A folder of scans as people have it becomes a data set that grows: its scans are listed where
they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from medseg.annotation.listing import LIST, StoredCase, check_channels, write_list
from medseg.annotation.store import Store
from medseg.errors import BadFile
from medseg.inference import Job, list_jobs
from medseg.io import is_readable_name, strip_suffix
from medseg.text import is_reserved

#: Folders in a data set that hold no scans to label.
_OTHERS = ("labels", "models")


def open_studies(folder: Path, names: Sequence[str] = ("",)) -> Store:
    """The data set in a folder. Without a list there, one is made of the scans that lie in it, or
    in `images/` in it, files and folders of DICOM; scans that came later are added.

    names: of the channels of which a scan consists, '' where nobody says. Raises `BadFile` for a
    folder that is not there or holds other things than scans, and what `Store.open` raises.
    """
    place = folder.resolve()
    if not place.is_dir():
        raise BadFile(f"{folder}: is no folder; give one of scans to be labelled, an empty one too")
    channels = tuple(name or f"image_{n}" for n, name in enumerate(names, 1))
    channels = ("image",) if len(names) == 1 else channels
    if not (place / LIST).exists():
        check_channels(channels)
        cases = _new_cases(place, names, ())
        if not cases and any(not one.name.startswith(".") for one in place.iterdir()):
            raise BadFile(
                f"{folder}: holds no scans; give a folder of scans to be labelled, an empty one, or"
                " one that medseg add filled"
            )
        write_list(place, channels, cases)
        return Store.open(place)
    store = Store.open(place)
    there = store.cases()
    new = _new_cases(place, store.channels, there)
    if new:
        store.list_scans(new)
    return store


def _new_cases(place: Path, names: Sequence[str], there: Sequence[StoredCase]) -> list[StoredCase]:
    """A case for each scan in a folder that none of those there has."""
    known = {path for case in there for path in (*case.images, *case.labels.values())}
    taken = {case.id.casefold() for case in there}
    cases: list[StoredCase] = []
    for job in _scans_in(place, names):
        if job.problem is not None or known & set(job.files):
            continue
        case = StoredCase(id=_free_id(job, taken), images=job.files)
        taken.add(case.id.casefold())
        cases.append(case)
    return cases


def _scans_in(place: Path, names: Sequence[str]) -> Iterator[Job]:
    for folder in (place, place / "images"):
        if folder.is_dir():
            if any(is_readable_name(one.name) for one in folder.iterdir() if one.is_file()):
                yield from (job for job in list_jobs([folder], None, names=names))
            for inner in sorted(folder.iterdir()):
                if inner.is_dir() and inner.name not in (*_OTHERS, "images") and _is_series(inner):
                    yield from list_jobs([inner], None)


def _is_series(folder: Path) -> bool:
    """Whether a folder is one of DICOM, by the names of its files."""
    if folder.name.startswith("."):
        return False
    names = [one.name for one in folder.iterdir() if one.is_file()]
    return any(name.lower().endswith(".dcm") for name in names)


def _free_id(job: Job, taken: set[str]) -> str:
    """An id of a scan by its name, as `check_id` wants it."""
    name = job.scan.name if job.scan.is_dir() else strip_suffix(job.labels).removesuffix("_seg")
    plain = re.sub(r"[^\w .+-]+", "_", name).lstrip("_ .+-").rstrip(" .")[:60] or "scan"
    unique, number = plain, 1
    while unique.casefold() in taken or is_reserved(unique):
        number += 1
        unique = f"{plain}_{number}"
    return unique
