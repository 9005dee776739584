"""A cohort as it lies on the disk: a BIDS data set, or a folder tree of scans and DICOM."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medseg.cohort.cases import Case, Cohort, make_cohort, short_name, told_apart
from medseg.errors import BadConfig, BadFile, DataWarning, MedsegError
from medseg.files import open_file, read_text
from medseg.inference import is_result_name
from medseg.io import is_readable_name, list_volumes, strip_suffix
from medseg.text import harmless

#: Folders of a BIDS data set that hold no raw images.
_NOT_RAW = {"derivatives", "sourcedata", "code", "stimuli", "phenotype"}
#: Entities of images that are no scan of their own: phase beside magnitude and the like.
_PARTS = {"phase", "real", "imag"}
#: Where the four letters of DICOM stand.
_DICOM_AT = 128


def is_bids(folder: Path) -> bool:
    """Whether a folder is a BIDS data set, as its description or its subjects say."""
    if not folder.is_dir():
        return False
    described = (folder / "dataset_description.json").is_file()
    with os.scandir(folder) as entries:
        subjects = any(entry.name.startswith("sub-") and entry.is_dir() for entry in entries)
    return subjects and (described or not _has_scans(folder))


def read_bids(
    folder: Path,
    suffixes: Sequence[str] = (),
    filters: Mapping[str, str] | None = None,
    *,
    together: bool = False,
) -> Cohort:
    """The images of a BIDS data set as cases, called by their entities (`sub-01_ses-2_T1w`).

    suffixes: which images (T1w, FLAIR); without any, T1w. together: they are the channels of one
    case, else each is one. filters: entity to value (`ses` to `2`). Columns of `participants.tsv`
    are carried along. Raises `BadConfig` where no image fits.
    """
    suffixes = tuple(suffixes) or ("T1w",)
    by_entities: dict[tuple[str, ...], dict[str, str]] = {}
    twins: dict[tuple[str, ...], str] = {}
    all_suffixes: set[str] = set()
    for path in _bids_images(folder):
        pairs, suffix = entities_of(Path(path).name)
        all_suffixes.add(suffix)
        if suffix in suffixes and _fits(pairs, filters or {}):
            entities = tuple(_stem(Path(path).name).split("_")[:-1])
            other = by_entities.setdefault(entities, {}).setdefault(suffix, path)
            if other != path:
                below = [Path(one).relative_to(folder).as_posix() for one in (other, path)]
                twins[entities] = f"two images are called so: {below[0]} and {below[1]}"
    if not by_entities:
        there = ", ".join(sorted(harmless(one) for one in all_suffixes)[:12]) or "none"
        raise BadConfig(
            f"{folder}: holds no image of {', '.join(suffixes)} that fits; there are images "
            f"of these kinds: {there}; choose with --suffix and --filter"
        )
    columns, people = _participants(folder)
    cases = []
    for entities, images in by_entities.items():
        subject = entities[0]
        missing = [suffix for suffix in suffixes if suffix not in images] if together else []
        problem = f"there is no {missing[0]} of {'_'.join(entities)}" if missing else ""
        problem = twins.get(entities, problem)
        for kinds in [suffixes] if together else [(one,) for one in suffixes if one in images]:
            cases.append(
                Case(
                    name="_".join((*entities, "-".join(kinds))),
                    images=tuple(images[suffix] for suffix in kinds if suffix in images),
                    group=subject,
                    carried=people.get(subject, ("",) * len(columns)),
                    problem=problem,
                )
            )
    return make_cohort(folder, "bids", cases, columns=columns)


def entities_of(name: str) -> tuple[dict[str, str], str]:
    """The entities of a BIDS file name and its suffix: ({'sub': '01', 'ses': '2'}, 'T1w')."""
    *pairs, suffix = _stem(name).split("_")
    return dict(pair.partition("-")[::2] for pair in pairs if "-" in pair), suffix


def read_folder(folder: Path, *, every_series: bool = False) -> Cohort:
    """The scans below a folder, called by their path below it with / as _.

    A folder that holds DICOM files is a case, or with `every_series` each volume in it. What is
    hidden, or the result of an earlier run, is left out. Raises `BadConfig` where there is none.
    """
    cases: list[Case] = []
    for place, names in _folders_below(folder):
        scans = [name for name in names if _is_scan(name)]
        slices = [name for name in names if name not in scans and not is_readable_scan(name)]
        inner = os.path.relpath(place, folder)
        for name in scans:
            below = strip_suffix(name) if inner == "." else f"{inner}/{strip_suffix(name)}"
            images = (os.path.join(place, name),)  # noqa: PTH118 - text is faster
            cases.append(Case(name=short_name(below), images=images, group=_group(inner)))
        if any(_is_dicom(place, name) for name in slices):
            name = folder.resolve().name if inner == "." else inner
            one = Case(name=short_name(name), images=(place,), group=_group(inner))
            cases += _series_of(one) if every_series else [one]
    return make_cohort(folder, "folder", told_apart(cases, folder))


def is_readable_scan(name: str) -> bool:
    """Whether the name is that of a file of a volume, and not of a slice."""
    return is_readable_name(name) and not name.lower().endswith(".dcm")


def _is_scan(name: str) -> bool:
    if not is_readable_scan(name) or name.lower().endswith(".seg.nrrd"):
        return False
    return not is_result_name(name)


def _group(inner: str) -> str:
    """The first folder below the one given, often a patient's."""
    return "" if inner == "." else Path(inner).parts[0]


def _series_of(case: Case) -> list[Case]:
    """A case for each volume of a folder of DICOM; of one alone the folder itself.

    What lies in folders below it is read with it, and is another case.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # reading says it again
            volumes = [one for one in list_volumes(case.images[0]) if one.modality]
    except MedsegError as error:
        return [replace(case, problem=str(error).replace(case.images[0], case.name))]
    if len(volumes) <= 1:
        return [case]
    return [
        replace(case, name=f"{case.name}_{one.number}", series=one.number)
        for one in volumes
        if one.folder in ("", ".")
    ]


def _folders_below(folder: Path, without: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of files), each folder once; nothing hidden, and no private folder of ours.

    without: names of folders that are left out. A link to a folder is followed where that is not
    reached without it. Warns of a folder that cannot be read.
    """
    starts, visited = deque([str(folder)]), set()
    while starts:
        for place, inner, names in os.walk(starts.popleft(), onerror=_warn_of_folder):
            about = os.stat(place)  # noqa: PTH116 - text is faster
            if (about.st_dev, about.st_ino) in visited:
                inner.clear()
                continue
            visited.add((about.st_dev, about.st_ino))
            inner[:] = sorted(n for n in inner if not n.startswith(".") and n not in without)
            paths = [os.path.join(place, name) for name in inner]  # noqa: PTH118 - as above
            starts.extend(path for path in paths if os.path.islink(path))  # noqa: PTH114
            yield place, sorted(name for name in names if not name.startswith("."))


def _warn_of_folder(error: OSError) -> None:
    text = f"{error.filename}: cannot be read and is left out: {error.strerror}"
    warnings.warn(text, DataWarning, stacklevel=2)


def _has_scans(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_scan(entry.name) for entry in entries if entry.is_file())


def _is_dicom(place: str, name: str) -> bool:
    if name.lower().endswith((".dcm", ".ima", ".dicom")):
        return True
    if name.upper() == "DICOMDIR":  # an index of what lies below
        return False
    if "." in name and not name.rpartition(".")[2].isdigit():  # UIDs are names, too
        return False
    try:
        with open_file(Path(place) / name) as file:
            return file.read(_DICOM_AT + 4)[_DICOM_AT:] == b"DICM"
    except BadFile:
        return False


# BIDS ------------------------------------------------------------------------------------------


def _bids_images(folder: Path) -> Iterator[str]:
    """The raw images of a data set."""
    for place, names in _folders_below(folder, without=_NOT_RAW):
        for name in names:
            if name.startswith("sub-") and name.endswith((".nii.gz", ".nii")):
                yield os.path.join(place, name)  # noqa: PTH118 - text is faster


def _stem(name: str) -> str:
    """The name of a BIDS image without its ending; its values may hold dots (`acq-1.5T`)."""
    return name.removesuffix(".gz").removesuffix(".nii")


def _fits(pairs: Mapping[str, str], filters: Mapping[str, str]) -> bool:
    if pairs.get("part") in _PARTS or "sub" not in pairs:
        return False
    return all(pairs.get(key) == value for key, value in filters.items())


def _participants(folder: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The columns of `participants.tsv`, if there is one, and each subject's values."""
    file = folder / "participants.tsv"
    if not file.is_file():
        return (), {}
    try:
        text = read_text(file)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    except (BadFile, csv.Error):
        return (), {}
    if not rows or "participant_id" not in rows[0]:
        return (), {}
    at = rows[0].index("participant_id")
    columns = tuple(harmless(name) for n, name in enumerate(rows[0]) if n != at)
    people = {
        f"sub-{row[at].removeprefix('sub-')}": tuple(v for n, v in enumerate(row) if n != at)
        for row in rows[1:]
        if len(row) == len(rows[0])
    }
    return columns, people
