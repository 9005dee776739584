"""What is written beside the labels: maps of a brain, DICOM objects; all of a scan or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadConfig, BadOutput
from medseg.inference.jobs import Extras, Job
from medseg.inference.segmentation import Segmentation
from medseg.inference.settings import Model, as_list, is_set
from medseg.io import is_dicom_source, write
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
#: Algorithm families (CID 7162) of the intensity models; networks are Artificial Intelligence.
_FAMILIES = {"otsu": "123105", "kmeans": "123107", "gmm": "123107"}


def brain_of(model: Model) -> BrainSpec | None:
    """Which labels are the brain, if the model says so."""
    return None if isinstance(model, str) else as_list(model)[0].spec.brain


def check_also(model: Model, also: Sequence[str]) -> None:
    """Raise `BadConfig` for what only a model of the brain can give."""
    asked = [kind for kind in also if kind in BRAIN_RESULTS]
    if asked and brain_of(model) is None:
        raise BadConfig(
            f"--also {asked[0]}: the model {identity_of(model)['name']} does not say which labels are brain"
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


def write_all(writes: Sequence[tuple[Path, Callable[[Path], None]]]) -> None:
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


def origin_of(job: Job, volume: Volume, model: Model, extras: Extras) -> Origin:
    """The series that DICOM results refer to, opened before anything is computed. Raises `BadFile`, `BadOutput`."""
    from medseg.io.dicom import check_grid, open_origin, without_warnings

    with without_warnings(job.labels):
        import highdicom  # noqa: F401  (whether it is there)
    identity = identity_of(model)
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


def dicom_writes(
    wanted: dict[str, Path], result: Segmentation, origin: Origin
) -> list[tuple[Path, Callable[[Path], None]]]:
    """What writes the DICOM results; they are made now, so that nothing is written if one of them cannot be."""
    from medseg.io.dicom import report_dataset, rtstruct_dataset, save, seg_dataset

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


def identity_of(model: Model) -> dict[str, Any]:
    """What the record says of a model."""
    if isinstance(model, str):
        return {"name": model}
    specs = [one.spec for one in as_list(model)]
    hashes = [spec.sha256 for spec in specs]
    name = model.name if is_set(model) else specs[0].name
    return {"name": name, "weights_sha256": hashes[0] if len(hashes) == 1 else hashes}
