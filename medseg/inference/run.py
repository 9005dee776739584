"""One job: read, segment, record, write."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.inference import record
from medseg.inference.forecast import Plan
from medseg.inference.intensity import INTENSITY_MODELS
from medseg.inference.jobs import Extras, Job
from medseg.inference.results import (
    brain_of,
    brain_writes,
    check_also,
    dicom_results,
    dicom_writes,
    identity_of,
    origin_of,
    write_all,
)
from medseg.inference.segmentation import segment
from medseg.inference.settings import Model, Settings, as_list, channel_names
from medseg.io import SeveralVolumes, is_dicom_source, read, write
from medseg.memory import peak_memory_bytes
from medseg.postprocess import anatomy, face, structure_volumes
from medseg.progress import Progress, silent
from medseg.version import versions
from medseg.volume import Volume


def load_model(*names: str, folds: Sequence[str] = (), checkpoint: str = "final") -> Model:
    """The checkpoints of bundled models and model folders, a set of models, or an intensity model's name.

    folds, checkpoint: of models of nnU-Net. Raises `BadModel`.
    """
    if names[0] in INTENSITY_MODELS and len(names) == 1:
        return names[0]
    from medseg.models import load_models

    return load_models(names, folds=folds, checkpoint=checkpoint)


def infer(
    job: Job,
    model: Model,
    settings: Settings,
    extras: Extras,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
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
        volumes = read_scans(job, channel_names(model), extras)
        volume = volumes[0]
        wanted = dicom_results(job, extras.also)
        origin = origin_of(job, volume, model, extras) if wanted else None
        reading = time.perf_counter() - begun
        settings = replace(settings, from_dicom=is_dicom_source(job.scan))
        try:
            result = segment(
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
    brain, structures = brain_of(model), structure_volumes(result.labels, result.table)
    for row in structures:
        if row["value"] in result.confidence and row["voxels"]:
            row["confidence"] = round(result.confidence[row["value"]], 3)
    if brain:
        told += anatomy.implausible(result.labels, result.table, brain, structures)
    content: dict[str, Any] = {
        "format": "medseg-record-1",
        "versions": versions(),
        "model": identity_of(model),
        "input": record.describe(volume),
        **_inputs(volumes, model),
        "settings": _recorded(settings, model, result.plan)
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
        writes += brain_writes(job, extras.also, volume, result, structures, brain)
    for name, volume_map in result.maps.items():
        writes.append((job.beside(f".{name}.nii.gz"), partial(write, volume_map)))
    if extras.preview:
        from medseg.view import write_preview

        writes.append((extras.preview, lambda path: write_preview(path, volume, result.labels, result.table)))
    writes.append((job.beside(".labels.csv"), lambda path: result.table.write(path)))
    if not job.labels.name.lower().endswith(".dcm"):
        writes.append((job.labels, lambda path: write(result.labels, path, table=result.table)))
    if origin:
        writes += dicom_writes(wanted, result, origin)

    def finish(path: Path) -> None:
        seconds = {"read": reading, **result.seconds, "write": time.perf_counter() - writing}
        content["seconds"] = {key: round(value, 3) for key, value in seconds.items()}
        content["forecast_memory_bytes"] = result.plan.memory_bytes
        content["peak_memory_bytes"] = peak_memory_bytes()
        content["finished"] = record.finished_now()
        record.write_record(path, content)

    writes.append((job.beside(".json"), finish))
    write_all(writes)
    return content


def _recorded(settings: Settings, model: Model, plan: Plan) -> dict[str, Any]:
    """The settings as they took effect; those of foreign models only where one ran."""
    found = asdict(settings)
    foreign = {key: found.pop(key) for key in ("exact", "orientation", "from_dicom", "postprocess", "roi")}
    found["overlap"] = 0.5 if isinstance(model, str) else settings.share(as_list(model)[0].spec)
    found["tta"] = bool(plan.mirror) or bool(settings.tta)
    if plan.taken:
        found |= {"exact": foreign["exact"], "postprocess": foreign["postprocess"], "taken": list(plan.taken)}
    if settings.roi:
        found["roi"] = list(settings.roi)
    return found


def read_scans(job: Job, names: Sequence[str], extras: Extras) -> list[Volume]:
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


def _inputs(volumes: Sequence[Volume], model: Model) -> dict[str, Any]:
    """For the record: every channel, where there are several."""
    if len(volumes) == 1:
        return {}
    names = channel_names(model)
    return {"inputs": [{"channel": name} | record.describe(one) for name, one in zip(names, volumes)]}


def _without_name(text: str, scan: Path, otherwise: str) -> str:
    """A warning that begins with a scan's name, with other words for that name."""
    name = str(scan)
    return f"{otherwise}{text[len(name) :]}" if text.startswith(name) else text


def _announcement(volumes: Sequence[Volume], plan: Plan) -> str:
    volume = volumes[0]
    several = f"{len(volumes)} channels of " if len(volumes) > 1 else ""
    shape = " x ".join(str(n) for n in volume.shape)
    spacing = " x ".join(f"{s:.3g}" for s in volume.spacing_mm)
    how = f"up to {plan.windows} windows on {plan.device}, {plan.precision}" if plan.windows else "by intensity"
    how += f", in {plan.stripes} parts to save memory" if plan.stripes > 1 else ""
    if plan.taken:
        how += f" ({', '.join(plan.taken)})"
    return (
        f"{several}{shape} voxels of {spacing} mm, {volume.orientation}; model {plan.model}, {how}; "
        f"about {plan.memory_bytes / 1e9:.1f} GB of memory"
    )
