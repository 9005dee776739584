"""What is this scan: CT or not, a head or not; and with that which model, or a refusal.

Only what is certain decides. What DICOM says is its modality is believed, and values that are
Hounsfield units beyond doubt are CT. Whether there is a head is asked of the small brain model:
a brain with everything where it belongs is one; nothing like a brain in a scan with
room for one is none. Everything between is a doubt, which is written down and stops nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.inference.jobs import Extras, Job
from medseg.inference.segmentation import segment
from medseg.inference.settings import Model, Settings, as_list, is_set
from medseg.inference.untrained import AUTO, CT_TISSUES
from medseg.io import is_dicom_source, list_volumes
from medseg.postprocess import anatomy, structure_volumes
from medseg.volume import Volume, crop, reorient

if TYPE_CHECKING:
    from medseg.models import Checkpoint

#: The model for MR of heads, and the one that looks for a head.
BRAIN, LOOKS = "brain", "brain-fast"
#: A whole head is at least so long along every axis of a scan, and a scan with room for one in
#: which less brain than this is found holds none. Of scans at hand 1,100 mL and more are found in
#: heads, turned ones too, and up to 40 in cylinders and noise.
ROOM_MM, NO_BRAIN_ML = 150.0, 50.0
#: A brain that may be one, though not all is in its place: its mL, structures, and confidence.
LIKELY_ML, LIKELY_STRUCTURES, LIKELY_CONFIDENCE = 500.0, 12, 0.6
#: CT: shares of the voxels that are air, and of the others that are fat, lean, or either.
_CT_AIR, _CT_FAT, _CT_LEAN, _CT_TISSUE = 0.02, 0.01, 0.10, 0.60
#: By how much more is lean than as bright as contrast medium.
_CT_PEAK = 1.3
#: Of planes that hold something more of the voxels than this are brighter than the mean.
_CONTENT = 0.03
#: Neighbours in noise are less alike than this; in images they are by 0.5 and more.
NOISE_CORRELATION = 0.1
#: Noise is looked for in so many blocks along each axis, each of so many voxels along it.
BLOCKS, BLOCK = 3, 42
#: Words for modalities.
_WORDS = {"MR": "MR", "CT": "CT", "PT": "PET", "NM": "a nuclear medicine scan"}


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the small brain model found.

    is_brain: everything is where it belongs. is_likely: much of it. is_none: nothing, though there
    is room. doubts: what is not where it belongs.
    """

    is_brain: bool
    is_likely: bool
    is_none: bool
    doubts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is certain of a scan.

    modality: as DICOM codes it, '' unless it is certain. head: None where nobody looked. forced:
    why the model makes no sense, where it is to run all the same.
    """

    modality: str
    head: Head | None = None
    forced: str = ""

    def doubts(self, model: Model) -> list[str]:
        """What speaks against a model, a sentence each."""
        if self.forced:
            return [f"computed by force: {self.forced}"]
        name = bundled_brain(model)
        if name and self.modality not in ("", "MR", "CT"):
            return [f"{self}, and {name} was trained for MR"]
        return []

    def recorded(self) -> dict[str, Any]:
        """For the record."""
        head = self.head
        answer = None if head is None or not (head.is_brain or head.is_none) else head.is_brain
        extra = {"forced": True} if self.forced else {}
        return {"modality": self.modality or None, "head": answer} | extra

    def __str__(self) -> str:
        if self.modality == "CT":
            return "this is CT"
        what = _WORDS.get(self.modality, "a scan of a modality that its file does not say")
        if self.modality and self.modality not in _WORDS:
            what = f"a scan of modality {self.modality}"
        head = "" if self.head is None else ", and no whole head was found in it"
        return f"this is {what}{head}"


def is_hounsfield(volume: Volume) -> bool:
    """Whether values are Hounsfield units beyond doubt: air, fat and soft tissue where they belong.

    A piece of CT without air is not: nothing tells its values from another scale.
    """
    thin = volume.data[tuple(slice(None, None, max(1, n // 96)) for n in volume.shape)]
    values = thin[np.isfinite(thin)].astype(np.float64)
    if not values.size or values.min() > -500 or values.max() > 100_000:
        return False
    air, tissue = values < -800, values[values > -300]
    if air.mean() < _CT_AIR or tissue.size < 0.02 * values.size:
        return False
    fat, lean, bright = (
        np.mean((tissue > low) & (tissue < high))
        for low, high in ((-150, -30), (-20, 110), (110, 240))
    )
    soft = np.mean((tissue > -200) & (tissue < 300))
    where_they_belong = fat >= _CT_FAT and lean >= _CT_LEAN and soft >= _CT_TISSUE
    return bool(where_they_belong and lean > _CT_PEAK * bright and not is_noise(volume))


def is_noise(volume: Volume) -> bool:
    """Whether voxels have nothing to do with their neighbours, as in no image of anything.

    Blocks from all over the scan are asked together: in the air around a patient there is noise,
    and a corner of a large scan may hold nothing else.
    """
    blocks = [np.nan_to_num(block).astype(np.float64) for block in _blocks_of(volume.data)]
    count = sum(block.size for block in blocks)
    if count < 1000:
        return False
    mean = sum(float(block.sum()) for block in blocks) / count
    power = sum(float(((block - mean) ** 2).sum()) for block in blocks) / count
    if not power:
        return False
    return not any(_likeness(blocks, axis, mean) > NOISE_CORRELATION * power for axis in range(3))


def _blocks_of(data: NDArray) -> Iterator[NDArray]:
    """Blocks of a scan, evenly spread; all of one that is no larger than they are together."""
    along = [np.linspace(0, max(0, n - BLOCK), BLOCKS).astype(int) for n in data.shape]
    starts = [sorted({int(start) for start in one}) for one in along]
    if max(data.shape) <= BLOCK * BLOCKS:
        yield data
        return
    for corner in product(*starts):
        yield data[tuple(slice(start, start + BLOCK) for start in corner)]


def _likeness(blocks: Sequence[NDArray[np.float64]], axis: int, mean: float) -> float:
    """The mean product of neighbours along an axis, without its sign; 0 where there are none."""
    pairs, total = 0, 0.0
    for block in blocks:
        one, other = np.delete(block - mean, 0, axis), np.delete(block - mean, -1, axis)
        pairs += one.size
        total += float((one * other).sum())
    return abs(total) / pairs if pairs else 0.0


def modality_of(job: Job | None, volume: Volume, extras: Extras) -> str:
    """The modality, as DICOM codes it; '' unless it is certain. job: None for a scan in memory."""
    if job is not None and is_dicom_source(job.scan):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # said when it was read
            try:
                series = list_volumes(job.scan)
            except BadFile:
                series = []
        matches = [one for one in series if extras.series in (one.number, one.number.split(".")[0])]
        modalities = {one.modality for one in matches or series if not one.problem or extras.repair}
        if len(modalities) == 1 and (modality := modalities.pop()):
            return modality
    return "CT" if is_hounsfield(volume) else ""


def has_room(volume: Volume) -> bool:
    """Whether a whole head would fit into a scan."""
    return bool((np.array(volume.shape) * volume.spacing_mm >= ROOM_MM).all())


def look_for_head(volume: Volume, settings: Settings) -> Head:
    """Ask the small brain model, with windows that do not overlap; there is none in noise.

    First of the one window in which most brains lie: a whole brain there, with everything in its
    place, is the answer. Of anything else the whole scan is asked.
    """
    if is_noise(volume):
        nothing = "neighbouring voxels have nothing in common: this is noise"
        return Head(is_brain=False, is_likely=False, is_none=has_room(volume), doubts=(nothing,))
    quick = Settings(
        device=settings.device,
        overlap=0.0,
        max_memory_bytes=settings.max_memory_bytes,
        backend="torch",  # eight windows at most: a trial of another would be a ninth of the look
    )
    from medseg.models import load_checkpoint

    model = load_checkpoint(LOOKS)
    part = upper_part(volume, np.multiply(model.spec.patch, model.spec.spacing_mm))
    if part is not None:
        head = _asked(part, model, quick)
        if head.is_brain and head.is_likely:
            return head
    return _asked(volume, model, quick)


def upper_part(volume: Volume, size_mm: NDArray[np.float64]) -> Volume | None:
    """What lies below the vertex, in the middle: a box of so many mm along R, A and S that holds
    the brain of a head whose header is right. None of a scan that is not larger than that.
    """
    ras = reorient(volume)
    # Along R, A and S an oblique box is longer than its edges; it is to be one window at most.
    along = np.abs(ras.affine[:3, :3]) @ (size_mm / ras.spacing_mm)
    fits = float((size_mm / along).min())
    count = np.floor(fits * size_mm / ras.spacing_mm).astype(int) - 2
    if (np.array(ras.shape) <= count).all() or (count < 2).any():
        return None
    steps = [max(1, n // 64) for n in ras.shape]
    thin = np.nan_to_num(ras.data[tuple(slice(None, None, step) for step in steps)])
    bright = thin > thin.mean()
    starts = []
    for axis, size in enumerate(ras.shape):
        others = tuple(other for other in range(3) if other != axis)
        planes = np.flatnonzero(bright.mean(others) > _CONTENT) * steps[axis]
        low, high = (int(planes[0]), int(planes[-1]) + steps[axis]) if planes.size else (0, size)
        start = high - count[axis] if axis == 2 else (low + high - count[axis]) // 2
        starts.append(int(np.clip(start, 0, max(0, size - count[axis]))))
    shape = [int(min(size, n)) for size, n in zip(ras.shape, count)]
    return crop(ras, (starts[0], starts[1], starts[2]), (shape[0], shape[1], shape[2]))


def _asked(volume: Volume, model: Checkpoint, quick: Settings) -> Head:
    """What the small brain model says of a scan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        segmentation = segment(volume, model, quick)
    spec = model.spec.brain
    assert spec is not None
    rows = structure_volumes(segmentation.labels, segmentation.table)
    brain = spec.csf + spec.grey + spec.white
    here = [row for row in rows if row["value"] in brain and row["voxels"]]
    ml = sum(row["ml"] for row in here)
    confidence = [segmentation.confidence.get(row["value"], 0.0) for row in here] or [0.0]
    doubts = anatomy.implausible(segmentation.labels, segmentation.table, spec, structures=rows)
    likely = ml >= LIKELY_ML and len(here) >= LIKELY_STRUCTURES
    return Head(
        is_brain=not doubts,
        is_likely=likely and float(np.mean(confidence)) >= LIKELY_CONFIDENCE,
        is_none=ml < NO_BRAIN_ML and has_room(volume),
        doubts=tuple(doubts),
    )


def bundled_brain(model: Model) -> str:
    """The name of a bundled model of the brain, alone; '' of any other."""
    if isinstance(model, str) or is_set(model):
        return ""
    one = as_list(model)
    is_bundled = len(one) == 1 and one[0].folder.parent.name == "bundled"
    return one[0].spec.name if is_bundled and one[0].spec.brain is not None else ""


def look(
    job: Job | None, volumes: Sequence[Volume], model: Model, settings: Settings, extras: Extras
) -> Seen:
    """What is certain about a scan, as far as the model asks for it.

    The look for a head is made before `brain`, which takes several times as long; `brain-fast` is
    that look itself.
    """
    modality = modality_of(job, volumes[0], extras)
    could_refuse = bundled_brain(model) == BRAIN and has_room(volumes[0])
    if modality not in ("", "MR") or not (model == AUTO or could_refuse):
        return Seen(modality=modality)
    return Seen(modality=modality, head=look_for_head(volumes[0], settings))


def choose(seen: Seen) -> str:
    """The name of the model for a scan. Raises `BadConfig` if there is none."""
    if seen.modality == "CT":
        return CT_TISSUES
    if seen.head is not None and (seen.head.is_brain or seen.head.is_likely):
        return BRAIN
    raise BadConfig(
        f"{seen}; there are models for MR of whole heads ({BRAIN}) and for CT ({CT_TISSUES}), and"
        " medseg models lists all: choose one with -m"
    )


def refusal(seen: Seen, model: Model) -> str:
    """Why a model makes no sense for a scan; '' unless that is certain."""
    name = bundled_brain(model)
    if not name:
        return ""
    if seen.modality == "CT":
        return f"this is CT, for which there is -m {CT_TISSUES}, and {name} knows MR alone"
    if seen.head is not None and seen.head.is_none:
        return f"no head is in this scan, and {name} knows nothing else"
    return ""


def fitting(
    job: Job | None, volumes: Sequence[Volume], model: Model, settings: Settings, extras: Extras
) -> tuple[Model, Seen | None]:
    """The model, or the one that suits the scan instead of 'auto', and what was seen.

    Only the bundled models of the brain say what they are for; of others nothing is asked. Raises
    `BadConfig` where none suits the scan, or where the model makes no sense and is not forced.
    """
    if model != AUTO and not bundled_brain(model):
        return model, None
    name = f"{job.scan}: " if job is not None else ""
    try:
        findings = look(job, volumes, model, settings, extras)
    except BadFile as error:  # the voxels are known, and the file's name is here
        raise BadFile(f"{name or 'the scan: '}{error}") from None
    if model != AUTO:
        reason = refusal(findings, model)
        if reason and not extras.force:
            raise BadConfig(
                f"{name}{reason}; see medseg models, or use --force to compute all the same"
            )
        return model, replace(findings, forced=reason)
    try:
        suitable = choose(findings)
    except BadConfig as error:
        raise BadConfig(f"{name}{error}") from None
    if suitable == CT_TISSUES:
        return suitable, findings
    from medseg.models import load_models

    return load_models([suitable]), findings
