"""Files named on the command line become jobs: a scan with its channels, and where its results go.

Every folder is listed once, whatever the number of scans, and names are compared as text: 40,000
scans are a matter of seconds. What is wrong with one scan of several is that scan's `problem` and
stops no other.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.files import ignores_case, is_one_file
from medseg.io import (
    DicomOptions,
    describe_no_dicom,
    example_folder,
    is_readable_name,
    is_slicer_segmentation,
    strip_suffix,
    written_suffixes,
)
from medseg.labels import LabelTable
from medseg.text import alike_but_for_case, spelling

#: The name of one channel's file as nnU-Net and many data sets have it: CASE_0000, CASE_0001, ...
_CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")
#: What an earlier run wrote, by the end of its name without suffix.
_RESULT_NAME = re.compile(
    r"_seg(\.objects|\.uncertainty|\.probability_\d+|\.(brain|intracranial)_mask|\.stripped|\.tissue)?$"
)
#: Suffixes of files; a name that ends in one of these is not meant as a folder.
_FILE_SUFFIXES = {
    ".bmp", ".bz2", ".csv", ".dicom", ".gif", ".gz", ".h5", ".hdf5", ".hdr", ".htm", ".html",
    ".ima", ".img", ".jpeg",
    ".jpg", ".json", ".mat", ".mif", ".minc", ".mnc", ".mrb", ".nia", ".nifti", ".npy", ".npz",
    ".obj", ".pdf", ".ply",
    ".png", ".raw", ".stl", ".svg", ".tar", ".tif", ".tiff", ".txt", ".tsv", ".vtk", ".vti",
    ".webp", ".xlsx", ".xml",
    ".xz", ".yaml", ".yml", ".zip", ".zst",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One scan and where its results go.

    channels: the files of a model's further channels, in its order. problem: what is wrong with
    these files, known before any is read; a job that has one cannot be done. record: where the run
    record goes, None for beside the labels. has_table: whether the label table goes there, too.
    """

    scan: Path
    labels: Path
    channels: tuple[Path, ...] = ()
    problem: MedsegError | None = None
    record: Path | None = None
    has_table: bool = True

    @property
    def record_file(self) -> Path:
        """Where the run record goes."""
        return self.record or self.beside(".json")

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read."""
        return (self.scan, *self.channels)

    def beside(self, ending: str) -> Path:
        """A companion of the label map, e.g. '.json'."""
        return self.labels.with_name(strip_suffix(self.labels) + ending)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is written beside the label map, and how scans are read."""

    preview: Path | None = None
    instances: bool = False
    volume_index: int | None = None
    assume_geometry: str | None = None
    series: str | None = None
    repair: bool = False
    suv: bool = False
    also: tuple[str, ...] = ()
    at_mm: tuple[float, ...] = ()
    table: LabelTable | None = None  # names and colours of labels, instead of the model's
    force: bool = False  # also where the model makes no sense for the scan
    dicom: DicomOptions = field(default_factory=DicomOptions)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """Files of one scan (or what was to be one), the name of its results, and what is wrong with
    it.
    """

    files: tuple[Path, ...]
    name: str
    problem: MedsegError | None = None


def list_jobs(
    inputs: Sequence[Path],
    output: Path | None,
    *,
    names: Sequence[str] = ("",),
    channels: Sequence[Path] = (),
    is_folder: bool = False,
) -> list[Job]:
    """The scans named by files and folders with their outputs. A folder holds scans, or is one
    DICOM series.

    names: what each channel of the model is called ('' where it does not say); channels: the files
    of all but the first, for a single scan. Without them, files called CASE_0000, CASE_0001 ... are
    the channels of one case for a model of several. is_folder: the output is a folder, whatever its
    name.

    Results are called as the files were named, not as what a link leads to. Two scans of one name
    from two folders are told apart by the names of their folders. Raises `BadFile` for a single
    scan that is not there, `BadConfig` where two results would have one name and `BadOutput` for a
    format that is not written.
    """
    folders = _Folders()
    if channels:
        cases = [_case_of_channels(_scans(inputs, folders), channels)]
    elif len(names) > 1:
        cases = _grouped(_scans(inputs, folders), names, folders)
    else:
        cases = _of_one_channel(_scans(inputs, folders), folders)
    if len(cases) == 1 and cases[0].problem is not None:
        raise cases[0].problem
    if output is None or is_folder or _is_folder(output):
        jobs = _jobs_in(output, cases)
    elif len(cases) > 1:
        raise BadConfig(
            f"{len(cases)} scans cannot go into one file {output}; give a folder with -o"
        )
    else:
        jobs = [_job(cases[0], output)]
    _check_overwriting(jobs, folders)
    return jobs


def given_name(path: Path) -> str:
    """What a file or folder is called without its suffix, as it was named: of a link its own name.

    '.' and '..' have no name of their own, so the folder's is taken. The name of a folder has no
    suffix.
    """
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name if _is_dir(path) else strip_suffix(name)


# Scans --------------------------------------------------------------------------------------------


class _Folders:
    """What lies in folders, each of which is listed once."""

    def __init__(self) -> None:
        self.problems: dict[Path, BadFile] = {}
        self._real: dict[str, str] = {}
        self._scans: dict[Path, dict[str, str]] = {}
        self._stems: dict[Path, set[str]] = {}
        self._links: dict[Path, set[str]] = {}
        self._channels: dict[Path, dict[str, dict[int, list[Path]]]] = {}

    def scans(self, folder: Path) -> dict[str, str]:
        """Name to stem of the scans in a folder, sorted, with links to files that are not there.

        None of a folder that cannot be listed; `problems` says why.
        """
        if folder not in self._scans:
            stems: dict[str, str] = {}
            links: set[str] = set()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        stem = _stem_of_scan(entry.name)
                        if stem and _is_file_or_link(entry) and not _is_segmentation(entry.path):
                            stems[entry.name] = stem
                            links |= {entry.name} if entry.is_symlink() else set()
            except OSError as error:
                self.problems[folder] = BadFile(f"{folder}: cannot be listed: {error.strerror}")
            self._scans[folder] = dict(sorted(stems.items()))
            self._links[folder] = links
        return self._scans[folder]

    def links(self, folder: Path) -> set[str]:
        """The names of the scans in a folder that are links."""
        self.scans(folder)
        return self._links[folder]

    def channels(self, folder: Path) -> dict[str, dict[int, list[Path]]]:
        """The files called CASE_0000, CASE_0001 ... in a folder: case to number to files."""
        if folder not in self._channels:
            cases: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
            for name, stem in self.scans(folder).items():
                if match := _CHANNEL_NAME.fullmatch(stem):
                    cases[match["case"]][int(match["number"])].append(folder / name)
            self._channels[folder] = cases
        return self._channels[folder]

    def stems(self, folder: Path) -> set[str]:
        """The stems of the scans in a folder."""
        if folder not in self._stems:
            self._stems[folder] = set(self.scans(folder).values())
        return self._stems[folder]

    def real(self, path: Path) -> str:
        """The path of a file with no link in it."""
        text = os.fspath(path)
        if os.path.islink(text):  # noqa: PTH114 - text is faster
            return os.path.realpath(text)
        folder, name = os.path.split(text)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)  # noqa: PTH118 - text is faster


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A scan as it was named: its file or folder of DICOM, its name, and what is wrong with it."""

    path: Path
    name: str
    is_file: bool
    problem: MedsegError | None = None


def _scans(inputs: Sequence[Path], folders: _Folders) -> list[_Given]:
    """The scans that files and folders stand for, with what is wrong with those that cannot be
    read; none twice.
    """
    scans: dict[Path, _Given] = {}
    for path in inputs:
        if not _is_dir(path):
            problem = _problem_of(path)
            entry = _Given(
                path=path, name=strip_suffix(path), is_file=problem is None, problem=problem
            )
            scans.setdefault(path, entry)
            continue
        inside, links = folders.scans(path), folders.links(path)
        for name, stem in inside.items():
            scan = path / name
            problem = _problem_of(scan) if name in links else None
            scans.setdefault(
                scan, _Given(path=scan, name=stem, is_file=problem is None, problem=problem)
            )
        if not inside:
            problem = folders.problems.get(path) or _problem_of_folder(path)
            scans.setdefault(
                path, _Given(path=path, name=given_name(path), is_file=False, problem=problem)
            )
    return list(scans.values())


def _problem_of(path: Path) -> MedsegError | None:
    """What is wrong with a file before it is read."""
    if _exists(path):
        return None
    if _is_link(path):
        return BadFile(
            f"{path}: is a link to a file that is not there; fetch it first (datalad get, git annex"
            " get)"
        )
    return BadFile(f"{path}: there is no such file or folder; check the name")


def _problem_of_folder(folder: Path) -> MedsegError | None:
    """What is wrong with a folder that holds no scan, unless it is one of DICOM."""
    contents = describe_no_dicom(folder)
    if not contents:
        return None
    example = example_folder(folder)
    if example is not None:
        return BadFile(
            f"{folder}: holds {contents}; give the folder that holds the scans, e.g. {example}"
        )
    return BadFile(f"{folder}: holds {contents}; give scans, a folder of them or one of DICOM")


def _stem_of_scan(name: str) -> str:
    """The name of a scan in a folder without its suffix; '' for what is hidden, a slice of a series
    or a result.
    """
    if (
        name.startswith(".")
        or name.lower().endswith((".dcm", ".seg.nrrd"))
        or not is_readable_name(name)
    ):
        return ""
    stem = strip_suffix(name)
    return "" if is_result_name(name) else stem


def is_result_name(name: str) -> bool:
    """Whether an earlier run called a result so."""
    return _RESULT_NAME.search(strip_suffix(name)) is not None


def _is_segmentation(path: str) -> bool:
    """Whether a file holds labels by its header, which of these formats alone is looked at."""
    return path.lower().endswith((".nrrd", ".nhdr")) and is_slicer_segmentation(path)


def _is_file_or_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() or (entry.is_symlink() and not entry.is_dir())


# Unlike pathlib's methods these also answer for names that are longer than the system allows.


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _is_link(path: Path) -> bool:
    return os.path.islink(path)  # noqa: PTH114


# Cases --------------------------------------------------------------------------------------------


def _case_of_channels(scans: Sequence[_Given], channels: Sequence[Path]) -> _Case:
    """One scan with the channels that were named. Raises `BadConfig` for several scans."""
    if len(scans) > 1:
        raise BadConfig(
            f"--channel adds to one scan, and {len(scans)} are given; give them one at a time"
        )
    problems = [scans[0].problem, *map(_problem_of, channels)]
    first = next((one for one in problems if one is not None), None)
    return _Case(files=(scans[0].path, *channels), name=scans[0].name, problem=first)


def _of_one_channel(scans: Sequence[_Given], folders: _Folders) -> list[_Case]:
    """A case for each scan, named like it.

    `_0000` numbers nnU-Net's first channel and is left out of the name of the result, where that is
    certain: no other number of this case lies beside it, and no other scan has the name that
    remains. Else the number is the case's own.
    """
    names = Counter(scan.name for scan in scans)
    cases = []
    for scan in scans:
        match = (
            _CHANNEL_NAME.fullmatch(scan.name)
            if scan.name.endswith("_0000") and scan.is_file
            else None
        )
        is_channel = (
            match
            and not names[match["case"]]
            and _is_alone(scan.path.parent, match["case"], folders)
        )
        name = match["case"] if match and is_channel else scan.name
        cases.append(_Case(files=(scan.path,), name=name, problem=scan.problem))
    return cases


def _is_alone(folder: Path, case: str, folders: _Folders) -> bool:
    """Whether CASE_0000 is the only number of its case in a folder, in which no scan is called
    CASE.
    """
    numbers = folders.channels(folder).get(case, {})
    return set(numbers) == {0} and len(numbers[0]) == 1 and case not in folders.stems(folder)


def _grouped(scans: Sequence[_Given], names: Sequence[str], folders: _Folders) -> list[_Case]:
    """The scans as cases for a model of several channels.

    Files called CASE_0000, CASE_0001 ... are one case, and so are those that lie beside one that
    was named. Other files stay alone: they may hold all channels. A case that lacks a channel or
    has too many gets a problem.
    """
    cases: dict[tuple[Path, str], _Case] = {}
    for scan in scans:
        folder, name = scan.path.parent, scan.path.name
        match = _CHANNEL_NAME.fullmatch(folders.scans(folder).get(name) or _stem_of_scan(name))
        if match is None or not (scan.is_file or _is_dir(folder)):
            cases[(scan.path, "")] = _Case(files=(scan.path,), name=scan.name, problem=scan.problem)
            continue
        key = (folder, match["case"])
        if key not in cases:
            cases[key] = _channel_files(scan.path, match["case"], names, folders=folders)
        if scan.problem is not None and cases[key].problem is None:
            cases[key] = replace(cases[key], problem=scan.problem)
    return list(cases.values())


def _channel_files(scan: Path, case: str, names: Sequence[str], folders: _Folders) -> _Case:
    """The files CASE_0000, CASE_0001 ... beside a scan, one for each of a model's channels, or what
    is wrong.
    """
    folder = scan.parent
    files = folders.channels(folder).get(case, {})
    descriptions = [
        f"{case}_{number:04d}" + (f" ({name})" if name else "") for number, name in enumerate(names)
    ]
    problem = _channel_problem(folder, files, descriptions)
    if problem is not None:
        return _Case(files=(scan,), name=case, problem=problem)
    paths = tuple(files[number][0] for number in range(len(names)))
    links = folders.links(folder)
    problems = (_problem_of(path) for path in paths if path.name in links)
    return _Case(
        files=paths, name=case, problem=next((one for one in problems if one is not None), None)
    )


def _channel_problem(
    folder: Path, files: Mapping[int, Sequence[Path]], wanted: Sequence[str]
) -> BadFile | None:
    """What is wrong with the files of a case's channels; wanted: what each should be, for
    people.
    """
    twice = next((paths for _, paths in sorted(files.items()) if len(paths) > 1), None)
    if twice:
        return BadFile(
            f"{twice[1]}: {twice[0].name} is the same channel of the same case; keep one of them"
        )
    missing = [name for number, name in enumerate(wanted) if number not in files]
    if missing:
        names = ", ".join(missing)
        return BadFile(f"{folder}: the model takes {len(wanted)} channels and {names} is not there")
    if len(files) > len(wanted):
        last = files[max(files)][0]
        return BadFile(f"{last}: the model takes {len(wanted)} channels only: {', '.join(wanted)}")
    return None


# Results ------------------------------------------------------------------------------------------


def _is_folder(output: Path) -> bool:
    """Whether results go into a folder of this name. Raises `BadOutput` for what looks like a file
    of another format.

    A folder that exists is one, whatever its name. Else a suffix of a format that is written makes
    a file, and one that no format has is part of a folder's name ('run.2', 'study.v1'), since a
    label map could not be written to it.
    """
    if _is_dir(output):
        return True
    lower = output.name.lower()
    if any(lower.endswith(suffix) and len(lower) > len(suffix) for suffix in written_suffixes()):
        return False
    suffix = output.suffix.lower()
    suffixes = [*written_suffixes(), *_FILE_SUFFIXES]
    letters = suffix[1:].isalpha()  # a slip of the pen, as in .nrdd
    if suffix in _FILE_SUFFIXES or (letters and get_close_matches(suffix, suffixes, cutoff=0.8)):
        formats = ", ".join(sorted(written_suffixes()))
        raise BadOutput(
            f"{output}: medseg does not write this format; use one of {formats}; if it is a folder,"
            " end its name with /"
        )
    return True


def _jobs_in(output: Path | None, cases: Sequence[_Case]) -> list[Job]:
    """Jobs whose results go into a folder, or without one beside each scan. Raises `BadConfig` for
    equal names.
    """
    folders = [output or _folder_of(case.files[0]) for case in cases]
    names = _told_apart(cases) if output else [case.name for case in cases]
    jobs = [
        _job(case, folder / f"{name}_seg.nii.gz")
        for folder, name, case in zip(folders, names, cases)
    ]
    _check_apart(jobs, output, names)
    return jobs


def _check_apart(jobs: Sequence[Job], output: Path | None, names: Sequence[str]) -> None:
    twice = [path for path, count in Counter(str(job.labels) for job in jobs).items() if count > 1]
    if twice:
        raise BadConfig(
            f"two scans would both be written to {min(twice)}; give them one at a time with -o"
        )
    if output and (pair := alike_but_for_case(names)) and ignores_case(output):
        raise BadConfig(
            f"{output}: takes {pair[0]} and {pair[1]} for one name, as its disk does not tell"
            " capital letters from small ones; give them one at a time with -o"
        )


def _told_apart(cases: Sequence[_Case]) -> list[str]:
    """The names of cases whose results go into one folder; those called alike get the names of
    their folders, too.
    """
    alike: dict[str, list[_Case]] = defaultdict(list)
    for case in cases:
        alike[case.name].append(case)
    longer = {
        name: iter(_names_with_folders(group, alike))
        for name, group in alike.items()
        if len(group) > 1
    }
    return [next(longer[case.name]) if case.name in longer else case.name for case in cases]


def _names_with_folders(cases: Sequence[_Case], taken: Collection[str]) -> list[str]:
    """Names of cases that are called alike: with as many of their folders' names before them as
    tell them apart.

    Where they lie in one folder nothing does, and they stay alike.
    """
    above = [Path(os.path.abspath(_folder_of(case.files[0]))).parts[1:] for case in cases]  # noqa: PTH100 - links stay
    for count in range(1, max(map(len, above), default=0) + 1):
        names = ["_".join((*parts[-count:], case.name)) for parts, case in zip(above, cases)]
        if len(set(names)) == len(names) and not any(name in taken for name in names):
            return names
    return [case.name for case in cases]


def _job(case: _Case, labels: Path) -> Job:
    return Job(scan=case.files[0], labels=labels, channels=case.files[1:], problem=case.problem)


def _folder_of(scan: Path) -> Path:
    """Where a scan lies, in the words of the user where that is possible ('.' has no name and no
    folder of its own).
    """
    return scan.parent if scan.name not in ("", "..") else scan.resolve().parent


def _check_overwriting(jobs: Iterable[Job], folders: _Folders) -> None:
    """Raise `BadConfig` if a result would be written over something that is read; a file may have
    several names.
    """
    jobs = list(jobs)
    read = {folders.real(path) for job in jobs for path in job.files}
    folded = {spelling(path): path for path in read}
    for job in jobs:
        labels = folders.real(job.labels)
        other = folded.get(spelling(labels))
        if labels in read or (other is not None and is_one_file(labels, other)):
            raise BadConfig(f"{job.labels} is an input and would be overwritten; choose another -o")
