"""`medseg infer`: scans in, label maps, label tables and run records out."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg import inference, record
from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning, MedsegError
from medseg.intensity import INTENSITY_MODELS
from medseg.io import (
    READERS,
    WRITERS,
    DicomOptions,
    SeveralVolumes,
    is_dicom_source,
    is_readable_name,
    read,
    strip_suffix,
    write,
)
from medseg.memory import peak_memory_bytes
from medseg.postprocess import anatomy, face
from medseg.postprocess.volumes import structure_volumes
from medseg.version import versions

if TYPE_CHECKING:
    from medseg.config import BrainSpec
    from medseg.io.dicom.result import Origin

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
#: Algorithm families (CID 7162) of the intensity models; networks are Artificial Intelligence.
_FAMILIES = {"otsu": "123105", "kmeans": "123107", "gmm": "123107"}


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


def jobs(
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
    return is_readable_name(path) and not name.endswith(".dcm") and result is None


def load_model(*names: str) -> inference.Model:
    """The checkpoints of bundled models and model folders, or an intensity model's name. Raises `BadModel`."""
    if names[0] in INTENSITY_MODELS and len(names) == 1:
        return names[0]
    from medseg.models.folder import load_checkpoint

    return [load_checkpoint(name) for name in names]


def infer(
    job: Job,
    model: inference.Model,
    settings: inference.Settings,
    extras: Extras,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: inference.Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Segment one scan and write its results; returns the run record.

    `announce` gets one line about what will be done before it is. On any error nothing new is left behind.
    """
    begun = time.perf_counter()
    check_also(model, extras.also)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DataWarning)
        progress("reading", 0, 1)
        volumes = read_scans(job, inference.channel_names(model), extras)
        volume = volumes[0]
        wanted = dicom_results(job, extras.also)
        origin = _origin(job, volume, model, extras) if wanted else None
        reading = time.perf_counter() - begun
        try:
            result = inference.segment(
                volumes,
                model,
                settings,
                progress=progress,
                announce=lambda made: announce(_announcement(volumes, made)),
            )
        except BadFile as error:  # what is wrong with the voxels is known before the file's name is
            raise BadFile(f"{job.scan}: {error}") from None
    # A reader's warning names the file as the user typed it; the record must not.
    told = [str(w.message) for w in caught if issubclass(w.category, DataWarning)]
    words = {path: f"channel {n + 1}" if job.channels else "the scan" for n, path in enumerate(job.files)}
    for path in sorted(words, key=lambda path: -len(str(path))):  # a name may begin as another one does
        told = [_without_name(text, path, words[path]) for text in told]
    brain, structures = _brain(model), structure_volumes(result.labels, result.table)
    for row in structures:
        if row["value"] in result.confidence and row["voxels"]:
            row["confidence"] = round(result.confidence[row["value"]], 3)
    if brain:
        told += anatomy.implausible(result.labels, result.table, brain, structures)
    content: dict[str, Any] = {
        "format": "medseg-record-1",
        "versions": versions(),
        "model": _identity(model),
        "input": record.describe(volume),
        **_inputs(volumes, model),
        "settings": asdict(settings)
        | {key: getattr(result.plan, key) for key in ("device", "precision", "backend")}
        | {key: True for key, asked in (("repair", extras.repair), ("suv", extras.suv)) if asked},
        "warnings": told,
        "notes": [face.NOTE] if face.shows_face(volume, result.labels, result.table) else [],
        "structures": structures,
        **({"totals": anatomy.totals(structures, brain)} if brain else {}),
    }
    progress("writing", 0, 1)
    writing = time.perf_counter()
    writes: list[tuple[Path, Callable[[Path], None]]] = []
    if extras.instances:
        objects, rows = record.found_objects(result.labels)
        content["objects"] = rows
        writes.append((job.beside(".objects.nii.gz"), lambda path: write(objects, path)))
    if brain:
        writes += _brain_writes(job, extras.also, volume, result, structures, brain)
    for name, volume_map in result.maps.items():
        writes.append((job.beside(f".{name}.nii.gz"), partial(write, volume_map)))
    if extras.preview:
        from medseg.view.preview import write_preview

        writes.append((extras.preview, lambda path: write_preview(path, volume, result.labels, result.table)))
    writes.append((job.beside(".labels.csv"), lambda path: result.table.write(path)))
    if not job.labels.name.lower().endswith(".dcm"):
        writes.append((job.labels, lambda path: write(result.labels, path, table=result.table)))
    if origin:
        writes += _dicom_writes(wanted, result, origin)

    def finish(path: Path) -> None:
        seconds = {"read": reading, **result.seconds, "write": time.perf_counter() - writing}
        content["seconds"] = {key: round(value, 3) for key, value in seconds.items()}
        content["forecast_memory_bytes"] = result.plan.memory_bytes
        content["peak_memory_bytes"] = peak_memory_bytes()
        content["finished"] = record.finished_now()
        record.write_record(path, content)

    writes.append((job.beside(".json"), finish))
    _write_all(writes)
    return content


def _brain(model: inference.Model) -> BrainSpec | None:
    """Which labels are the brain, if the model says so."""
    return None if isinstance(model, str) else inference.as_list(model)[0].spec.brain


def check_also(model: inference.Model, also: Sequence[str]) -> None:
    """Raise `BadConfig` for what only a model of the brain can give."""
    asked = [kind for kind in also if kind in BRAIN_RESULTS]
    if asked and _brain(model) is None:
        raise BadConfig(f"--also {asked[0]}: the model {_identity(model)['name']} does not say which labels are brain")


def _brain_writes(
    job: Job,
    also: Sequence[str],
    volume: inference.Volume,
    result: inference.Segmentation,
    structures: Sequence[dict[str, Any]],
    brain: BrainSpec,
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What writes the results that follow from the labels of a brain."""
    made: dict[str, Callable[[Path], None]] = {}
    if "brain-mask" in also:
        made["brain-mask"] = partial(write, anatomy.brain_mask(result.labels, brain))
    if "intracranial-mask" in also or "stripped" in also:
        mask = anatomy.brain_mask(result.labels, brain, with_fluid=True)
        made["intracranial-mask"] = partial(write, mask)
        if "stripped" in also:
            made["stripped"] = partial(write, anatomy.stripped(volume, mask))
    if "tissue" in also:
        made["tissue"] = partial(write, anatomy.tissue(result.labels, brain), table=anatomy.TISSUES)
    made["volumes"] = partial(anatomy.write_volumes, structures=structures, spec=brain)
    return [(job.beside(BRAIN_RESULTS[kind]), action) for kind, action in made.items() if kind in also]


def read_scans(job: Job, names: Sequence[str], extras: Extras) -> list[inference.Volume]:
    """The scans of a job, one for each channel; the channels may be the volumes of one file.

    What `extras` says of volumes, series, repair and SUV is about the first file. Raises `BadFile`, and `BadConfig` if
    a file holds another number of volumes than the model (of the channels `names`) takes.
    """
    try:
        first = read(
            job.scan,
            volume_index=extras.volume_index,
            assume_geometry=extras.assume_geometry,
            series=extras.series,
            repair=extras.repair,
            suv=extras.suv,
        )
    except SeveralVolumes as several:
        if len(names) == 1 or job.channels:
            raise
        if several.count != len(names):
            listed = f" ({', '.join(names)})" if all(names) else ""
            raise BadConfig(
                f"{job.scan}: holds {several.count} volumes, and the model takes {len(names)} channels{listed}"
            ) from None
        return [read(job.scan, volume_index=n, assume_geometry=extras.assume_geometry) for n in range(several.count)]
    return [first, *(read(path, assume_geometry=extras.assume_geometry) for path in job.channels)]


def _inputs(volumes: Sequence[inference.Volume], model: inference.Model) -> dict[str, Any]:
    """For the record: every channel, where there are several."""
    if len(volumes) == 1:
        return {}
    names = inference.channel_names(model)
    return {"inputs": [{"channel": name} | record.describe(one) for name, one in zip(names, volumes)]}


def _without_name(text: str, scan: Path, otherwise: str) -> str:
    """A warning that begins with a scan's name, with other words for that name."""
    name = str(scan)
    return f"{otherwise}{text[len(name) :]}" if text.startswith(name) else text


def _write_all(writes: Sequence[tuple[Path, Callable[[Path], None]]]) -> None:
    """Write every file or, if one cannot be written, leave none that was not there before."""
    new = [path for path, _ in writes if not path.exists()]
    try:
        for path, action in writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            action(path)
    except BaseException as error:
        for path in new:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BadOutput(f"{path.parent} cannot be written to ({error.strerror}); choose another -o") from None
        raise


def dicom_results(job: Job, also: Sequence[str]) -> dict[str, Path]:
    """The DICOM results of a job: kind ('seg', 'rtstruct', 'sr') to path. `BadConfig` for an SR without a SEG."""
    name = job.labels.name.lower()
    found = {}
    if name.endswith(".dcm"):
        found = {"rtstruct" if name.endswith(".rtstruct.dcm") else "seg": job.labels}
    for kind in also:
        if kind in DICOM_RESULTS:
            found.setdefault(kind, job.beside(DICOM_RESULTS[kind]))
    if "sr" in found and "seg" not in found:
        raise BadConfig("a structured report refers to a segmentation; ask for both: --also seg,sr")
    return found


def _origin(job: Job, volume: inference.Volume, model: inference.Model, extras: Extras) -> Origin:
    """The series that DICOM results refer to, opened before anything is computed. Raises `BadFile`, `BadOutput`."""
    from medseg.io.dicom.result import check_grid, open_origin, without_warnings

    with without_warnings(job.labels):
        import highdicom  # noqa: F401  (whether it is there)
    identity = _identity(model)
    hashes = identity.get("weights_sha256", "")
    options = replace(
        extras.dicom,
        model=identity["name"],
        version=hashes if isinstance(hashes, str) else "+".join(one[:16] for one in hashes),
        family=_FAMILIES.get(identity["name"], extras.dicom.family),
        series=extras.series,
        volume_index=extras.volume_index,
    )
    origin = open_origin(job.scan, options)
    check_grid(origin, volume, job.scan)
    return origin


def _dicom_writes(
    wanted: dict[str, Path], result: inference.Segmentation, origin: Origin
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What writes the DICOM results; they are made now, so that nothing is written if one of them cannot be."""
    from medseg.io.dicom.report import report_dataset
    from medseg.io.dicom.result import save
    from medseg.io.dicom.rtstruct import rtstruct_dataset
    from medseg.io.dicom.seg import seg_dataset

    made: dict[str, Any] = {}
    for kind in ("seg", "rtstruct"):
        if kind in wanted:
            build = seg_dataset if kind == "seg" else rtstruct_dataset
            made[kind] = build(result.labels, origin, wanted[kind], table=result.table)
    if "sr" in wanted:
        ml = {row["value"]: row["ml"] for row in structure_volumes(result.labels, result.table)}
        made["sr"] = report_dataset(made["seg"], origin, ml, wanted["sr"], table=result.table)
    return [(wanted[kind], partial(save, dataset)) for kind, dataset in made.items()]


def check_output(job: Job, also: Sequence[str] = ()) -> None:
    """Raise `BadOutput` before any work if the results cannot be written: the folder, or DICOM about what is none."""
    if dicom_results(job, also) and not is_dicom_source(job.scan):
        raise BadOutput(
            f"{job.labels}: a DICOM result refers to the DICOM images it was made from, and {job.scan} is no DICOM; "
            "give the DICOM series, or another suffix with -o"
        )
    folder = job.labels.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise BadOutput(f"{job.labels.parent} cannot be written to; choose another folder with -o")


def _announcement(volumes: Sequence[inference.Volume], plan: inference.Plan) -> str:
    volume = volumes[0]
    several = f"{len(volumes)} channels of " if len(volumes) > 1 else ""
    shape = " x ".join(str(n) for n in volume.shape)
    spacing = " x ".join(f"{s:.3g}" for s in volume.spacing_mm)
    how = f"up to {plan.windows} windows on {plan.device}, {plan.precision}" if plan.windows else "by intensity"
    how += f", in {plan.stripes} parts to save memory" if plan.stripes > 1 else ""
    return (
        f"{several}{shape} voxels of {spacing} mm, {volume.orientation}; model {plan.model}, {how}; "
        f"about {plan.memory_bytes / 1e9:.1f} GB of memory"
    )


def _identity(model: inference.Model) -> dict[str, Any]:
    if isinstance(model, str):
        return {"name": model}
    specs = [one.spec for one in inference.as_list(model)]
    hashes = [spec.sha256 for spec in specs]
    return {"name": specs[0].name, "weights_sha256": hashes[0] if len(hashes) == 1 else hashes}


__all__ = ["READERS", "Extras", "Job", "MedsegError", "check_output", "infer", "jobs", "load_model"]
