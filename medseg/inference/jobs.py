"""Files named on the command line become jobs: a scan with its channels, and where its results go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.io import WRITERS, DicomOptions, is_readable_name, is_slicer_segmentation, strip_suffix

#: The name of one channel's file as nnU-Net and many data sets have it: CASE_0000, CASE_0001, ...
_CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


@dataclass(frozen=True)
class Job:
    """One scan and where its results go; channels: the files of a model's further channels, in its order."""

    scan: Path
    labels: Path
    channels: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read."""
        return (self.scan, *self.channels)

    def beside(self, ending: str) -> Path:
        """A companion of the label map, e.g. '.json'."""
        return self.labels.with_name(strip_suffix(self.labels) + ending)


@dataclass(frozen=True)
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
    dicom: DicomOptions = field(default_factory=DicomOptions)


def list_jobs(
    inputs: Sequence[Path], output: Path | None, *, names: Sequence[str] = ("",), channels: Sequence[Path] = ()
) -> list[Job]:
    """The scans named by files and folders with their outputs. A folder holds scans, or is one DICOM series.

    names: what each channel of the model is called ('' where it does not say); channels: the files of all but the
    first, for a single scan. Without them, files called CASE_0000, CASE_0001 ... are the channels of one case for a
    model of several. Raises `BadFile` for what is not there and `BadConfig` where two results would have one name.
    """
    scans: list[Path] = []
    for path in inputs:
        _check_exists(path)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and _is_scan(p))
            scans += inside or [path]
        else:
            scans.append(path)
    if channels:
        for path in channels:
            _check_exists(path)
        if len(scans) > 1:
            raise BadConfig(f"--channel adds to one scan, and {len(scans)} are given; give them one at a time")
        cases = [(strip_suffix(scans[0].resolve()), [scans[0], *channels])]
    elif len(names) > 1:
        cases = _cases(scans, names)
    else:
        cases = [(strip_suffix(scan.resolve()), [scan]) for scan in scans]
    suffix = next((s for s in WRITERS if output and output.name.lower().endswith(s)), None)
    if suffix and output:
        if len(cases) > 1:
            raise BadConfig(f"{len(cases)} scans cannot go into one file {output}; give a folder with -o")
        found = [Job(cases[0][1][0], output, tuple(cases[0][1][1:]))]
    else:
        if output and output.suffix and not output.is_dir():
            raise BadOutput(f"{output}: medseg does not write this format; use one of {', '.join(sorted(WRITERS))}")
        found = [
            Job(files[0], (output or _folder_of(files[0])) / f"{name}_seg.nii.gz", tuple(files[1:]))
            for name, files in cases
        ]
    results = [job.labels for job in found]
    twice = sorted({str(name) for name in results if results.count(name) > 1})
    if twice:
        raise BadConfig(f"two scans would both be written to {twice[0]}; give them one at a time with -o")
    # One file may be named in several ways.
    inputs_resolved = {path.resolve() for job in found for path in job.files}
    for job in found:
        if job.labels.resolve() in inputs_resolved:
            raise BadConfig(f"{job.labels} is an input and would be overwritten; choose another -o")
    return found


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise BadFile(f"{path}: there is no such file or folder; check the name")


def _cases(scans: Sequence[Path], names: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """The scans as cases (name, files), for a model of several channels.

    Files called CASE_0000, CASE_0001 ... are one case, and so are those that lie beside one that was named. Other
    files stay alone: they may hold all channels. Raises `BadFile` where a case lacks a channel or has too many.
    """
    found: dict[tuple[Path, str], list[Path]] = {}
    for scan in scans:
        match = _CHANNEL_NAME.fullmatch(strip_suffix(scan)) if scan.is_file() and _is_scan(scan) else None
        if match is None:
            found[(scan, strip_suffix(scan.resolve()))] = [scan]
        elif (key := (scan.parent, match["case"])) not in found:
            found[key] = _channel_files(scan.parent, match["case"], names)
    return [(name, files) for (_, name), files in found.items()]


def _channel_files(folder: Path, case: str, names: Sequence[str]) -> list[Path]:
    """The files CASE_0000, CASE_0001 ... in a folder, one for each of a model's channels. Raises `BadFile`."""
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _CHANNEL_NAME.fullmatch(strip_suffix(path)) if _is_scan(path) else None
        if match is None or match["case"] != case:
            continue
        number = int(match["number"])
        if number in files:
            raise BadFile(f"{path}: {files[number].name} is the same channel of the same case; keep one of them")
        files[number] = path
    wanted = [f"{case}_{number:04d}" + (f" ({name})" if name else "") for number, name in enumerate(names)]
    missing = [name for number, name in enumerate(wanted) if number not in files]
    if missing:
        raise BadFile(f"{folder}: the model takes {len(names)} channels and {', '.join(missing)} is not there")
    if len(files) > len(names):
        raise BadFile(f"{files[max(files)]}: the model takes {len(names)} channels only: {', '.join(wanted)}")
    return [files[number] for number in range(len(names))]


def _folder_of(scan: Path) -> Path:
    """Where a scan lies, in the words of the user where that is possible ('.' has no name and no folder of its own)."""
    return scan.parent if scan.name not in ("", "..") else scan.resolve().parent


def _is_scan(path: Path) -> bool:
    """Whether a file in a folder is a scan of its own: not a slice of a series, nor what an earlier run wrote there."""
    name = path.name.lower()
    result = name.endswith(".seg.nrrd") or re.search(
        r"_seg(\.objects|\.uncertainty|\.probability_\d+|\.(brain|intracranial)_mask|\.stripped|\.tissue)?$",
        strip_suffix(path),
    )
    is_scan = is_readable_name(path) and not name.endswith(".dcm") and result is None
    return is_scan and not is_slicer_segmentation(path)
