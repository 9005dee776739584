"""A scan that a program holds, from whatever it gives to a checked result: what `infer` does with a
file, without the files.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg import logs
from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning, MedsegError
from medseg.files import is_one_file
from medseg.inference.forecast import Plan
from medseg.inference.jobs import Extras, Job
from medseg.inference.look import fitting
from medseg.inference.record import read_record
from medseg.inference.result import Segmentation
from medseg.inference.results import check_output, dicom_results, origin_of
from medseg.inference.run import Scan, announcement, doubts_about, write_job
from medseg.inference.segmentation import segment
from medseg.inference.settings import Model, Settings
from medseg.io import is_dicom_source, read
from medseg.logs import Progress, silent
from medseg.postprocess import structure_volumes
from medseg.volume import Volume

#: How the command line names what Python names otherwise.
_IN_PYTHON = {
    "use --force": "give force=True",
    "choose one with -m": "choose one with model=",
    "see --channel": "give a list of channels",
    "--roi:": "roi:",
    "--volume N": "medseg.read(path, volume_index=N)",
    "--series N": "medseg.read(path, series=N)",
    "--series": "medseg.read(path, series=)",
    "--assume-geometry": "medseg.read(path, assume_geometry=):",
    "--repair": "medseg.read(path, repair=True)",
} | {
    f"--{name}": name
    for name in (
        "uncertainty", "probabilities", "tta", "exact", "orientation", "postprocess", "precision",
        "backend",
    )
}  # fmt: skip


def segment_scan(
    volumes: Sequence[Volume],
    model: Model,
    settings: Settings,
    *,
    source: Path | None = None,
    inputs: Sequence[Path] = (),
    messages: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Segmentation:
    """Labels for the channels of a scan, with the model that suits it where that is 'auto'.

    source: the file or folder it was read from. inputs: all files it came from, which no result
    replaces. messages: warnings about it, without names,
    for the record of what is saved. force: also where the model makes no sense for the
    scan. What speaks against the result is a `DataWarning` each, and stands in its `doubts`. Raises
    as `medseg.inference.segment`, and `BadConfig` where no model suits or this one cannot.
    """
    job = None if source is None else Job(scan=source, labels=source)
    extras, begun = Extras(force=force), time.perf_counter()
    model, seen = fitting(job, volumes, model, settings, extras)
    looked_s = time.perf_counter() - begun
    settings = replace(settings, from_dicom=source is not None and is_dicom_source(source))

    def planned(forecast: Plan) -> None:
        logs.info(__name__, "%s", announcement(volumes, forecast))
        announce(forecast)

    try:
        result = segment(volumes, model, settings, progress=progress, announce=planned)
    except BadFile as error:  # what is wrong with the voxels is known before the file's name is
        raise BadFile(f"{source or 'the scan'}: {error}") from None
    rows = structure_volumes(result.labels, result.table)
    doubts = doubts_about(result, model, seen, structures=rows)
    for text in doubts:
        logs.warning(__name__, "%s", text)
        warnings.warn(text, DataWarning, stacklevel=4)
    spent = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in result.seconds.items())
    logs.info(__name__, "done: %s", spent)
    scan = Scan(
        volumes=list(volumes), model=model, seen=seen, dicom={}, origin=None,
        seconds={"look": looked_s} if seen else {},
    )  # fmt: skip
    writer = partial(
        _write, scan=scan, settings=settings, source=source, inputs=tuple(inputs),
        messages=tuple(messages),
    )  # fmt: skip
    return replace(result, scan=volumes[0], doubts=tuple(doubts), writer=writer)


def _write(
    result: Segmentation,
    path: Path,
    *,
    scan: Scan,
    settings: Settings,
    source: Path | None,
    inputs: Sequence[Path],
    messages: Sequence[str],
) -> dict[str, Any]:
    """Write a result as `infer` writes its own; returns the record."""
    job, extras = Job(scan=source or Path(), labels=path), Extras()
    if any(is_one_file(path, one) for one in inputs) or _holds(job, scan.volumes):
        raise BadOutput(f"{path} is the scan and would be overwritten; choose another name")
    dicom = dicom_results(job, ())
    if dicom and source is None:
        raise BadOutput(
            f"{path}: a DICOM result refers to the DICOM images it was made from, and this scan was"
            " given without its files; give the DICOM folder itself, or save it as .nii.gz"
        )
    check_output(job)
    if dicom:
        origin = origin_of(job, scan.volumes[0], scan.model, extras)
        scan = replace(scan, dicom=dicom, origin=origin)
    return write_job(
        job, scan, settings=settings, extras=extras, result=result, messages=list(messages)
    )


def _holds(job: Job, volumes: Sequence[Volume]) -> bool:
    """Whether the file of a result that is to be written holds one of the scans: a program that
    read it may have given its voxels alone.
    """
    if not job.labels.is_file() or read_record(job.record_file) is not None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            there = read(job.labels)
    except MedsegError:
        return False
    return any(there.shape == one.shape and np.array_equal(there.data, one.data) for one in volumes)


def in_python(error: MedsegError) -> MedsegError:
    """The error with the words of Python for options of the command line."""
    text = str(error)
    for option, words in _IN_PYTHON.items():
        text = text.replace(option, words)
    if text == str(error):
        return error
    return (BadFile if isinstance(error, BadFile) else BadConfig)(text)
