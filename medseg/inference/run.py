"""One job: read, segment, record, write."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg import logs
from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.inference import record
from medseg.inference.forecast import Plan, plan
from medseg.inference.jobs import Extras, Job
from medseg.inference.look import Seen, fitting
from medseg.inference.result import Segmentation
from medseg.inference.results import (
    BRAIN_RESULTS,
    TABLE_RESULTS,
    brain_of,
    brain_writes,
    check_also,
    dicom_results,
    dicom_writes,
    identity_of,
    leftovers,
    origin_of,
    result_files,
    write_results,
)
from medseg.inference.segmentation import segment
from medseg.inference.settings import Model, Settings, as_list, channel_names
from medseg.inference.tissues.measures import measure, write_table
from medseg.inference.untrained import AUTO, CT_TISSUES, UNTRAINED
from medseg.io import DicomOptions, SeveralVolumes, is_dicom_source, read, write
from medseg.logs import Progress, silent
from medseg.machine import peak_memory_bytes
from medseg.packages import versions
from medseg.postprocess import anatomy, areas_at, face, slices_at, structure_volumes
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.io.dicom import Origin

#: Settings that only models of other programs know.
FOREIGN_KEYS = ("exact", "orientation", "postprocess")


def load_model(*names: str, folds: Sequence[str] = (), checkpoint: str = "final") -> Model:
    """The checkpoints of bundled models and model folders, a set of models, or the name of one
    without weights; without names 'auto', which chooses by the scan.

    folds, checkpoint: of models of nnU-Net. Raises `BadModel`, and `BadConfig` for these of others.
    """
    if not names or (names[0] in UNTRAINED and len(names) == 1):
        if folds or checkpoint != "final":
            whose = f", and {names[0]} is medseg's own" if names else "; name one"
            raise BadConfig(f"--folds and --checkpoint are for models of nnU-Net{whose}")
        return names[0] if names else AUTO
    from medseg.models import load_models

    return load_models(names, folds=folds, checkpoint=checkpoint)


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What a program adds to a job of its own.

    about: what its record begins with. consider: called with windows and bytes of memory of each
    network's plan before anything is computed, and may raise. complete: called with scan, result
    and record before anything is written. writes: each says of scan and result which file else is
    written with the others, and how.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    consider: Callable[[int, int], None] = lambda windows, memory_bytes: None
    complete: Callable[[Sequence[Volume], Segmentation, dict[str, Any]], None] = (
        lambda volumes, result, content: None
    )
    writes: Sequence[Callable[[Sequence[Volume], Segmentation], Write]] = ()


#: A file and what writes it.
Write: TypeAlias = tuple[Path, Callable[[Path], None]]


def infer(
    job: Job,
    model: Model,
    settings: Settings,
    extras: Extras,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
    addition: Addition = Addition(),
) -> dict[str, Any]:
    """Segment one scan and write its results; returns the run record.

    `announce` gets one line about what will be done before it is. The results appear together; on
    any error nothing new is left behind and what was there stays.
    """
    if job.problem is not None:
        raise job.problem
    check_also(model, extras.also)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DataWarning)
        settings = replace(settings, from_dicom=is_dicom_source(job.scan))
        scan = _read(job, model, settings, extras, progress)
        model = scan.model
        slices_at(scan.volumes[0], extras.at_mm)  # heights outside the scan are refused

        def planned(forecast: Plan) -> None:
            text = announcement(scan.volumes, forecast)
            logs.info(__name__, "%s", text)
            announce(text)
            addition.consider(forecast.windows, forecast.memory_bytes)

        try:
            result = segment(scan.volumes, model, settings, progress=progress, announce=planned)
        except BadFile as error:  # what is wrong with the voxels is known before the file's name is
            raise BadFile(f"{job.scan}: {error}") from None
    if extras.table:
        result = replace(result, table=extras.table.over(result.table))
    texts = [str(one.message) for one in notices if issubclass(one.category, DataWarning)]
    return write_job(
        job,
        scan,
        settings=settings,
        extras=extras,
        result=result,
        messages=without_names(texts, job),
        addition=addition,
        progress=progress,
    )


def forecast_job(job: Job, model: Model, settings: Settings, extras: Extras) -> Plan:
    """What `infer` would do with a job and need for it; nothing is computed. Raises as `infer`."""
    settings = replace(settings, from_dicom=is_dicom_source(job.scan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the run says it again
        scan = _read(job, model, settings, extras, silent)
    return plan(scan.volumes, scan.model, settings)


def write_job(
    job: Job,
    scan: Scan,
    *,
    settings: Settings,
    extras: Extras,
    result: Segmentation,
    messages: list[str],
    addition: Addition = Addition(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the results of a job, together or none; returns the run record.

    messages: warnings about the scan, without names of files. Raises `BadOutput`.
    """
    model = scan.model
    content = {"format": record.FORMAT, **addition.about}
    content |= _record_of(scan, settings, extras, result=result, messages=messages)
    addition.complete(scan.volumes, result, content)
    progress("writing", 0, 1)
    begun = time.perf_counter()
    for ending in leftovers(job, result_files(job, settings, extras)):
        content["notes"].append(
            f"the file beside the labels that ends in {ending} is of an earlier run"
        )

    def finish() -> None:
        seconds = {**scan.seconds, **result.seconds, "write": time.perf_counter() - begun}
        content["seconds"] = {key: round(value, 3) for key, value in seconds.items()}
        content["forecast_memory_bytes"] = result.plan.memory_bytes
        content["peak_memory_bytes"] = peak_memory_bytes()
        content["finished"] = record.finished_now()

    writes = _writes(job, scan, model=model, extras=extras, result=result, content=content)
    writes += [write_of(scan.volumes, result) for write_of in addition.writes]
    write_results(job, writes, content, finish=finish)
    _log(content)
    return content


def _log(content: Mapping[str, Any]) -> None:
    """Tell what came of a job."""
    for text in content["warnings"]:
        logs.warning(__name__, "%s", text)
    for text in content["notes"]:
        logs.info(__name__, "%s", text)
    spent = ", ".join(f"{part} {seconds:g} s" for part, seconds in content["seconds"].items())
    logs.info(__name__, "done: %s; %.1f GB", spent, content["peak_memory_bytes"] / 1e9)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What was read of a job: its channels, the series that DICOM results refer to, how long it
    took; the model for it, and what was seen for that.
    """

    volumes: list[Volume]
    model: Model
    seen: Seen | None
    dicom: dict[str, Path]
    origin: Origin | None
    seconds: dict[str, float]


def _read(job: Job, model: Model, settings: Settings, extras: Extras, progress: Progress) -> Scan:
    start = time.perf_counter()
    progress("reading", 0, 1)
    volumes = read_scans(job, channel_names(model), extras)
    look_start = time.perf_counter()
    model, findings = fitting(job, volumes, model, settings=settings, extras=extras)
    look_end = time.perf_counter()
    check_also(model, extras.also)
    dicom = dicom_results(job, extras.also)
    origin = origin_of(job, volumes[0], model, extras=extras) if dicom else None
    seconds = {"read": look_start - start + time.perf_counter() - look_end}
    seconds |= {"look": look_end - look_start} if findings else {}
    return Scan(
        volumes=volumes, model=model, seen=findings, dicom=dicom, origin=origin, seconds=seconds
    )


def _record_of(
    scan: Scan,
    settings: Settings,
    extras: Extras,
    result: Segmentation,
    messages: list[str],
) -> dict[str, Any]:
    """What is known of a run before its results are written."""
    volumes, model, findings = scan.volumes, scan.model, scan.seen
    brain, structures = brain_of(model), structure_volumes(result.labels, result.table)
    against = doubts_about(result, model, findings, structures=structures)
    for row in structures:
        if row["value"] in result.confidence and row["voxels"]:
            row["confidence"] = round(result.confidence[row["value"]], 3)
    totals: list[dict[str, Any]] = []
    if brain:
        totals = anatomy.totals(structures, brain)
    elif model == CT_TISSUES:
        totals = measure(volumes[0], result.labels, structures)
    levels = areas_at(volumes[0], result.labels, result.table, heights_mm=extras.at_mm)
    return {
        "versions": _versions(result.plan.device),
        "model": identity_of(model),
        **inputs_of(volumes, model),
        "settings": (
            _recorded(settings, model, result.plan)
            | {key: getattr(result.plan, key) for key in ("device", "precision", "backend")}
            | chosen_extras(extras)
        ),
        "warnings": messages + against,
        **({"seen": findings.recorded()} if findings else {}),
        **({"doubts": against} if findings or brain else {}),
        "notes": [face.NOTE] if face.shows_face(volumes[0], result.labels, result.table) else [],
        "structures": structures,
        **({"totals": totals} if totals else {}),
        **({"levels": levels} if levels else {}),
    }


def _versions(device: str) -> dict[str, str]:
    """Of packages, and where a card computed, of it and what it was driven by."""
    if not device.startswith("cuda"):
        return versions()
    from medseg.inference.backends.cards import versions_of

    return versions() | versions_of(device)


def doubts_about(
    result: Segmentation,
    model: Model,
    seen: Seen | None,
    *,
    structures: Sequence[dict[str, Any]],
) -> list[str]:
    """What speaks against a result, a sentence each: of the scan, and of where structures lie."""
    doubts = seen.doubts(model) if seen else []
    if brain := brain_of(model):
        doubts += anatomy.implausible(result.labels, result.table, brain, structures=structures)
    return doubts


def _writes(
    job: Job,
    scan: Scan,
    model: Model,
    extras: Extras,
    result: Segmentation,
    content: dict[str, Any],
) -> list[tuple[Path, Callable[[Path], None]]]:
    """Every file of a job but its record, with what writes it. The record gets the objects, where
    there are any.
    """
    writes: list[tuple[Path, Callable[[Path], None]]] = []
    if extras.instances:
        objects, content["objects"] = record.found_objects(result.labels)
        writes.append((job.beside(".objects.nii.gz"), partial(write, objects)))
    brain = brain_of(model)
    if brain:
        writes += brain_writes(
            job,
            extras.also,
            volume=scan.volumes[0],
            result=result,
            structures=content["structures"],
            brain=brain,
        )
    elif "volumes" in extras.also:
        tables = (content["structures"], content.get("totals", []), content.get("levels", []))
        writes.append((job.beside(BRAIN_RESULTS["volumes"]), partial(_write_table, tables=tables)))
    for name, volume_map in result.maps.items():
        writes.append((job.beside(f".{name}.nii.gz"), partial(write, volume_map)))
    if extras.preview:
        from medseg.view import write_beside, write_preview

        def draw(path: Path) -> None:
            write_preview(path, scan.volumes[0], result.labels, table=result.table)

        writes.append((extras.preview, partial(write_beside, draw=draw)))
    if job.has_table:
        writes.append((job.beside(".labels.csv"), result.table.write))
    for kind, ending in TABLE_RESULTS.items():
        if kind in extras.also:
            writes.append((job.beside(ending), result.table.write))
    if not job.labels.name.lower().endswith(".dcm"):
        writes.append((job.labels, partial(write, result.labels, table=result.table)))
    if scan.origin:
        writes += dicom_writes(scan.dicom, result, scan.origin)
    return writes


def _write_table(path: Path, *, tables: tuple[list[dict[str, Any]], ...]) -> None:
    structures, totals, levels = tables
    write_table(path, structures, totals, levels=levels)


def settings_of(settings: Settings, model: Model) -> dict[str, Any]:
    """The settings as a record holds them, but for what a run decides; those of foreign models only
    where asked for.
    """
    values = asdict(settings)
    for key in (*FOREIGN_KEYS, "from_dicom", "roi", "region", "every_output"):
        del values[key]
    if not isinstance(model, str):
        values["overlap"] = settings.share(as_list(model)[0].spec)
    elif settings.overlap is None:
        values["overlap"] = 0.5
    values["tta"] = bool(settings.tta)
    if settings.roi:
        values["roi"] = list(settings.roi)
    return values


def _recorded(settings: Settings, model: Model, plan: Plan) -> dict[str, Any]:
    """The settings as they took effect."""
    effective = settings_of(settings, model)
    effective["tta"] = bool(plan.mirror) or bool(settings.tta)
    if plan.taken:
        effective |= {key: getattr(settings, key) for key in FOREIGN_KEYS} | {
            "taken": list(plan.taken)
        }
    return effective


def read_scans(job: Job, names: Sequence[str], extras: Extras) -> list[Volume]:
    """The scans of a job, one for each channel; the channels may be the volumes of one file.

    What `extras` says of volumes, series, repair and SUV is about the first file. Raises `BadFile`,
    and `BadConfig` if a file holds another number of volumes than the model (of the channels
    `names`) takes.
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
            detail = f" ({', '.join(names)})" if all(names) else ""
            raise BadConfig(
                f"{job.scan}: holds {several.count} volumes, and the model takes {len(names)}"
                f" channels{detail}"
            ) from None
        return [
            read(job.scan, volume_index=n, assume_geometry=extras.assume_geometry)
            for n in range(several.count)
        ]
    return [first, *(read(path, assume_geometry=extras.assume_geometry) for path in job.channels)]


def inputs_of(volumes: Sequence[Volume], model: Model) -> dict[str, Any]:
    """For the record: the first scan, and every channel where there are several."""
    if len(volumes) == 1:
        return {"input": record.describe(volumes[0])}
    channels = [
        {"channel": name} | record.describe(one) for name, one in zip(channel_names(model), volumes)
    ]
    return {
        "input": {key: value for key, value in channels[0].items() if key != "channel"},
        "inputs": channels,
    }


#: What `chosen_extras` may hold.
EXTRA_KEYS = ("repair", "suv", "seg_type", "deidentify", "deterministic", "at_mm", "table")


def chosen_extras(extras: Extras) -> dict[str, Any]:
    """For the record: what was asked for when the scan was read, and of DICOM results, if anything
    was.
    """
    of_dicom = ("seg_type", "deidentify", "deterministic")
    at_mm = list(extras.at_mm) or False
    names = [list(one) for one in extras.table.names.items()] if extras.table else False
    read = {"repair": extras.repair, "suv": extras.suv, "at_mm": at_mm, "table": names}
    values = read | {key: getattr(extras.dicom, key) for key in of_dicom}
    usual = {"seg_type": DicomOptions().seg_type}
    return {key: value for key, value in values.items() if value != usual.get(key, False)}


def without_names(messages: Sequence[str], job: Job) -> list[str]:
    """Warnings with other words for the files they begin with: the record must not hold a name."""
    words = {
        str(path): f"channel {n + 1}" if job.channels else "the scan"
        for n, path in enumerate(job.files)
    }
    longest_first = sorted(words, key=len, reverse=True)  # a name may begin as another one does
    texts = list(messages)
    for name in longest_first:
        texts = [
            f"{words[name]}{text[len(name) :]}" if text.startswith(name) else text for text in texts
        ]
    return texts


def announcement(volumes: Sequence[Volume], plan: Plan) -> str:
    """A line about what will be done."""
    volume = volumes[0]
    several = f"{len(volumes)} channels of " if len(volumes) > 1 else ""
    shape = " x ".join(str(n) for n in volume.shape)
    spacing = " x ".join(f"{s:.3g}" for s in volume.spacing_mm)
    how = (
        f"up to {plan.windows} windows on {plan.device}, {plan.precision}"
        if plan.windows
        else "by rules"
        if plan.precision == "rules"
        else "by intensity"
    )
    how += f", in {plan.stripes} parts to save memory" if plan.stripes > 1 else ""
    if plan.taken:
        how += f" ({', '.join(plan.taken)})"
    return (
        f"{several}{shape} voxels of {spacing} mm, {volume.orientation}; model {plan.model}, {how};"
        f" about {plan.memory_bytes / 1e9:.1f} GB of memory{_on_card(plan)}"
    )


def _on_card(plan: Plan) -> str:
    """What a card holds of a run."""
    if not plan.card_bytes:
        return ""
    where = "" if plan.sums_on_card else ", and sums on the CPU"
    windows = "1 window" if plan.batch == 1 else f"{plan.batch} windows"
    return f" and {plan.card_bytes / 1e9:.1f} GB of the GPU's, {windows} at a time{where}"
