"""What is written beside the labels: maps of a brain, DICOM objects; all of a scan or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.files import file_hash, written_together
from medseg.inference.jobs import Extras, Job
from medseg.inference.record import is_of_others, write_record
from medseg.inference.result import Segmentation
from medseg.inference.settings import Model, Settings, as_list, is_set
from medseg.inference.untrained import AUTO, CT_TISSUES, UNTRAINED
from medseg.io import is_dicom_source, label_kind, strip_suffix, write
from medseg.postprocess import anatomy, structure_volumes
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.config import BrainSpec
    from medseg.io.dicom import Origin


#: What `--also` may ask for, and the ending of its name.
DICOM_RESULTS = {"seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm", "sr": ".sr.dcm"}
#: What it may ask for of a model whose JSON says which labels are the brain.
BRAIN_RESULTS = {
    "brain-mask": ".brain_mask.nii.gz",
    "intracranial-mask": ".intracranial_mask.nii.gz",
    "stripped": ".stripped.nii.gz",
    "tissue": ".tissue.nii.gz",
    "volumes": ".volumes.csv",
}
#: Other forms of the label table it may ask for: FreeSurfer's, ITK-SNAP's.
TABLE_RESULTS = {"lut": ".lut.txt", "itksnap": ".label"}
#: What the name of a data file has more than that of its header, .nhdr or .mhd: a hash.
_DATA_FILE = len(".0123456789abcdef.raw.gz") - len(".nhdr")
#: What the path of a file has more while it is being written.
_PRIVATE = len("/.medseg-") + 24 + 8


def brain_of(model: Model) -> BrainSpec | None:
    """Which labels are the brain, if the model says so."""
    return None if isinstance(model, str) else as_list(model)[0].spec.brain


def check_also(model: Model, also: Sequence[str]) -> None:
    """Raise `BadConfig` for what only a model of the brain can give."""
    kinds = [kind for kind in also if kind in BRAIN_RESULTS]
    if model in (AUTO, CT_TISSUES):
        kinds = [kind for kind in kinds if kind != "volumes"]
    if kinds and brain_of(model) is None:
        raise BadConfig(
            f"--also {kinds[0]}: the model {identity_of(model)['name']} does not say which labels"
            " are brain"
        )


def brain_writes(
    job: Job,
    also: Sequence[str],
    volume: Volume,
    result: Segmentation,
    structures: Sequence[dict[str, Any]],
    brain: BrainSpec,
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What writes the results that follow from the labels of a brain."""
    actions: dict[str, Callable[[Path], None]] = {}
    if "brain-mask" in also:
        actions["brain-mask"] = partial(write, anatomy.brain_mask(result.labels, brain))
    if "intracranial-mask" in also or "stripped" in also:
        mask = anatomy.brain_mask(result.labels, brain, with_fluid=True)
        actions["intracranial-mask"] = partial(write, mask)
        if "stripped" in also:
            actions["stripped"] = partial(write, anatomy.stripped(volume, mask))
    if "tissue" in also:
        actions["tissue"] = partial(
            write, anatomy.tissue(result.labels, brain), table=anatomy.TISSUES
        )
    actions["volumes"] = partial(anatomy.write_volumes, structures=structures, spec=brain)
    return [
        (job.beside(BRAIN_RESULTS[kind]), action)
        for kind, action in actions.items()
        if kind in also
    ]


def write_results(
    job: Job,
    writes: Sequence[tuple[Path, Callable[[Path], None]]],
    record: dict[str, Any],
    finish: Callable[[], None],
) -> None:
    """Write a job's files and its record, all of them or, if one cannot be written, none.

    writes: paths with what writes them. The record also gets the hashes of the files that lie
    beside the labels, by the endings of their names, so that whoever relies on it can see whether
    it is about them (`describes`). finish: called when all but the record is written, to complete
    it.
    """
    hashes: dict[str, str] = {}
    with written_together() as stage:
        for path, action in writes:
            temporary_path = stage(path)
            action(temporary_path)
            ending = _ending(job, path)
            if ending:
                hashes[ending] = file_hash(temporary_path)
        record["files_sha256"] = hashes
        finish()
        write_record(stage(job.record_file), record)


def describes(record: dict[str, Any] | None, job: Job) -> bool:
    """Whether a record is about the files that lie beside a job's labels, as it was written with
    them.

    Not if one of them was replaced since, as by a run that was killed, and not if it does not say
    which they are.
    """
    hashes = (record or {}).get("files_sha256")
    if not isinstance(hashes, dict) or _ending(job, job.labels) not in hashes:
        return False
    try:
        return all(file_hash(job.beside(ending)) == digest for ending, digest in hashes.items())
    except BadFile:
        return False


def _ending(job: Job, path: Path) -> str:
    """How a name goes on after the stem that all of a job's files have; '' for files elsewhere and
    pictures.
    """
    stem = strip_suffix(job.labels)
    beside = (
        path.parent == job.labels.parent
        and path.name.startswith(f"{stem}.")
        and path.suffix != ".png"
    )
    return path.name[len(stem) :] if beside else ""


def result_files(job: Job, settings: Settings, extras: Extras) -> list[Path]:
    """Every file that a job writes; the record is the last."""
    files = [job.labels, *dicom_results(job, extras.also).values()]
    files += [job.beside(".labels.csv")] if job.has_table else []
    beside = BRAIN_RESULTS | TABLE_RESULTS
    files += [job.beside(beside[kind]) for kind in extras.also if kind in beside]
    files += [job.beside(f".probability_{value}.nii.gz") for value in settings.probabilities]
    if settings.uncertainty:
        files.append(job.beside(".uncertainty.nii.gz"))
    if extras.instances:
        files.append(job.beside(".objects.nii.gz"))
    if extras.preview:
        files.append(extras.preview)
    return [*dict.fromkeys(files), job.record_file]


def leftovers(job: Job, files: Sequence[Path]) -> list[str]:
    """Endings of what an earlier run left beside the labels and a new one, which writes `files`,
    does not replace.
    """
    endings = [
        ".objects.nii.gz",
        ".uncertainty.nii.gz",
        *BRAIN_RESULTS.values(),
        *DICOM_RESULTS.values(),
        *TABLE_RESULTS.values(),
    ]
    return [
        ending
        for ending in endings
        if job.beside(ending) not in files and job.beside(ending).exists()
    ]


def dicom_results(job: Job, also: Sequence[str]) -> dict[str, Path]:
    """The DICOM results of a job: kind ('seg', 'rtstruct', 'sr') to path. `BadConfig` for an SR
    without a SEG.
    """
    name = job.labels.name.lower()
    paths: dict[str, Path] = {}
    if name.endswith(".dcm"):
        paths = {"rtstruct" if name.endswith(".rtstruct.dcm") else "seg": job.labels}
    for kind in also:
        if kind in DICOM_RESULTS:
            paths.setdefault(kind, job.beside(DICOM_RESULTS[kind]))
    if "sr" in paths and "seg" not in paths:
        raise BadConfig("a structured report refers to a segmentation; ask for both: --also seg,sr")
    return paths


def origin_of(job: Job, volume: Volume, model: Model, extras: Extras) -> Origin:
    """The series that DICOM results refer to, opened before anything is computed. Raises `BadFile`,
    `BadOutput`.
    """
    from medseg.io.dicom import check_grid, open_origin, without_warnings

    with without_warnings(job.labels):
        import highdicom  # noqa: F401  (whether it is there)
    identity = identity_of(model)
    hashes = identity.get("weights_sha256", "")
    options = replace(
        extras.dicom,
        model=identity["name"],
        version=hashes if isinstance(hashes, str) else "+".join(one[:16] for one in hashes),
        family=UNTRAINED[model].family if isinstance(model, str) else extras.dicom.family,
        series=extras.series,
        volume_index=extras.volume_index,
        repair=extras.repair,
    )
    origin = open_origin(job.scan, options)
    check_grid(origin, volume, job.scan)
    return origin


def dicom_writes(
    wanted: dict[str, Path], result: Segmentation, origin: Origin
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What writes the DICOM results; they are made now, so that nothing is written if one of them
    cannot be.
    """
    from medseg.io.dicom import report_dataset, rtstruct_dataset, save, seg_dataset

    datasets: dict[str, Any] = {}
    for kind in ("seg", "rtstruct"):
        if kind in wanted:
            build = seg_dataset if kind == "seg" else rtstruct_dataset
            datasets[kind] = build(result.labels, origin, wanted[kind], table=result.table)
    if "sr" in wanted:
        ml = {row["value"]: row["ml"] for row in structure_volumes(result.labels, result.table)}
        datasets["sr"] = report_dataset(
            datasets["seg"], origin, ml, path=wanted["sr"], table=result.table
        )
    return [(wanted[kind], partial(save, dataset)) for kind, dataset in datasets.items()]


def check_job(job: Job, settings: Settings, extras: Extras) -> None:
    """Raise `BadOutput` before any work if a job's results cannot be written as they will be
    called, or at all.
    """
    check_names(job, result_files(job, settings, extras))
    check_output(job, extras.also)


def check_output(job: Job, also: Sequence[str] = ()) -> None:
    """Raise `BadOutput` before any work if the results cannot be written: the folder, or DICOM
    about what is none.
    """
    if dicom_results(job, also) and not is_dicom_source(job.scan):
        raise BadOutput(
            f"{job.labels}: a DICOM result refers to the DICOM images it was made from, and"
            f" {job.scan} is no DICOM; give the DICOM series, or another suffix with -o"
        )
    check_names(job, [job.labels])
    _check_others(job)
    folder = _existing(job.labels.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise BadOutput(f"{job.labels.parent} cannot be written to; choose another folder with -o")


def _check_others(job: Job) -> None:
    """Raise `BadOutput` for a result that would replace what is certainly no result: an image of
    the DICOM folder that is read, or JSON of others such as the sidecar of a scan in BIDS.
    """
    labels = job.labels
    within = job.scan.is_dir() and job.scan.resolve() in labels.resolve().parents
    if within and labels.is_file() and is_dicom_source(labels) and not label_kind(labels):
        raise BadOutput(
            f"{labels} is an image of the scan and would be overwritten; choose another name"
        )
    record = job.record_file
    if record.is_file() and is_of_others(record):
        raise BadOutput(
            f"{record} is no run record of medseg and would be overwritten by that of"
            f" {labels.name}; choose another name for the labels"
        )


def check_names(job: Job, files: Sequence[Path]) -> None:
    """Raise `BadOutput` before any work if the name of a file to be written is longer than its file
    system allows.
    """
    for path in files:
        most_bytes, most_bytes_of_path = _longest_names(path.parent)
        data_file = _DATA_FILE if path.suffix.lower() in (".mhd", ".nhdr") else 0
        parts = [len(os.fsencode(part)) for part in path.parts]
        parts[-1] += data_file
        if (
            max(parts) > most_bytes
            or len(os.fsencode(path.absolute())) + _PRIVATE > most_bytes_of_path
        ):
            raise BadOutput(
                f"{job.scan}: the name of the result is too long: one ends in {path.name[-20:]} and"
                f" has {max(parts)} bytes, where {most_bytes} are allowed ({most_bytes_of_path}"
                " with its folders); give another with -o"
            )


def _longest_names(folder: Path) -> tuple[int, int]:
    """The bytes that a name and a whole path may have in a folder, which may not be there yet."""
    usual = (255, 4096)
    try:
        place = _existing(folder)
        return os.pathconf(place, "PC_NAME_MAX"), os.pathconf(place, "PC_PATH_MAX")
    except (OSError, ValueError):  # what has no such limit, and names that are too long themselves
        return usual


def _existing(folder: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next((place for place in (folder, *folder.parents) if place.exists()), folder)


def identity_of(model: Model) -> dict[str, Any]:
    """What the record says of a model."""
    if isinstance(model, str):
        return {"name": model}
    specs = [one.spec for one in as_list(model)]
    hashes = [spec.sha256 for spec in specs]
    name = model.name if is_set(model) else specs[0].name
    from medseg.models import first_line

    licences = {
        key: first_line(specs[0].card[key])
        for key in ("license", "data_license")
        if specs[0].card.get(key)
    }
    return {"name": name, "weights_sha256": hashes[0] if len(hashes) == 1 else hashes} | licences
