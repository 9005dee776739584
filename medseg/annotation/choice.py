"""Which scan to label next: the one about which a model is most unsure.

Two signs of doubt are measured, both as one minus a Dice, so that their mean is one, too:

- unsure: one minus the Dice that the model expects of itself. If a voxel is of a structure as often
  as the model says, this is the sum of its probabilities where it labels the structure, twice, over
  the sum of all its probabilities and the number of voxels that it labels; a mean over structures.
- disagreement: one minus the mean Dice of its labels and those of another model, such as that of
  the round before, of structures that either has (query by committee: Seung, Opper and Sompolinsky
  1992, COLT).

A scan in which the model finds nothing at all counts as fully unsure. How this was chosen stands in
docs/annotation.md.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.annotation.listing import FINAL, check_id, in_order
from medseg.annotation.names import dice_by_name
from medseg.annotation.store import Store
from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning, MedsegError
from medseg.files import atomic_write
from medseg.inference import (
    Job,
    Model,
    Segmentation,
    Settings,
    as_list,
    channel_names,
    identity_of,
    is_set,
    label_table,
    list_jobs,
    segment,
)
from medseg.io import read, strip_suffix
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.text import parse_json
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.models import Checkpoint

STRATEGIES = ("uncertain", "random", "first")
#: Doubts that were measured with the newest model, so that who asks again need not wait again.
_KEPT = ".doubts.json"
#: Bytes of memory for maps of probabilities.
_MOST_MAPS_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scan that has no final label. files: one for each channel; stored: whether the data set
    has it under this id.
    """

    id: str
    files: tuple[Path, ...]
    stored: bool = False


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """How unsure a model is about a scan, from 0 to 1. unsure, disagreement: the signs, the latter
    None without a second model; share: of the scan that the model labels.
    """

    unsure: float
    disagreement: float | None = None
    share: float = 0.0

    @property
    def score(self) -> float:
        """The mean of the signs."""
        if self.disagreement is None:
            return self.unsure
        return (self.unsure + self.disagreement) / 2

    @property
    def why(self) -> str:
        """The score in words."""
        if not self.share:
            return "the model finds nothing in it"
        text = f"the model expects a Dice of {1 - self.unsure:.2f}"
        if self.disagreement is None:
            return text
        return f"{text} and agrees with the other one by {1 - self.disagreement:.2f}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The scan to label next, segmented. doubts: of every scan that was looked at, by id."""

    candidate: Candidate
    doubt: Doubt
    strategy: str
    result: Segmentation
    doubts: Mapping[str, Doubt] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """Why this one, in words."""
        if self.strategy == "random":
            return f"chosen at random; {self.doubt.why}"
        if self.strategy == "first":
            return f"the first by its name; {self.doubt.why}"
        most = f"most unsure of {len(self.doubts)}" if len(self.doubts) > 1 else "the only one left"
        return f"{most}: {self.doubt.why}"


def candidates(store: Store, model: Model, folder: Path | None = None) -> list[Candidate]:
    """The scans without a final label, of the data set, or of a folder of scans; in the order of
    their names.

    Of a folder those are left out that the data set has under their name, with a final label. Files
    called CASE_0000, CASE_0001 ... are the channels of one scan for a model of several. What cannot
    be taken is a `DataWarning`.
    """
    cases = {one.id: one for one in store.cases()}
    if folder is None:
        open_cases = [one for one in cases.values() if FINAL not in one.labels]
        return [
            Candidate(id=one.id, files=one.images, stored=True)
            for one in sorted(open_cases, key=lambda one: _natural(one.id))
        ]
    if not folder.is_dir():
        raise BadFile(f"{folder}: is no folder; give one that holds scans")
    scans = []
    for job in list_jobs([folder], None, names=channel_names(model)):
        try:
            if job.problem is not None:
                raise job.problem
            name = check_id(name_of(job))
        except MedsegError as error:
            warnings.warn(f"{job.scan}: is left out: {error}", DataWarning, stacklevel=2)
            continue
        case = cases.get(name)
        if case is None or FINAL not in case.labels:
            scans.append(Candidate(id=name, files=job.files, stored=case is not None))
    return sorted(scans, key=lambda one: _natural(one.id))


def choose(
    store: Store,
    scans: Sequence[Candidate],
    model: Model,
    *,
    strategy: str = "uncertain",
    other: Model | None = None,
    seed: int = 0,
    most: int | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Choice:
    """The scan to label next, segmented by the model.

    strategy: 'uncertain', 'random' or 'first' by name. other: a second model, whose disagreement
    counts. seed: of what is random. most: look at no more scans than these, drawn at random. What
    was measured of a scan with the same models is kept in the data set. A scan that cannot be
    segmented is left out with a `DataWarning`. Raises `BadConfig` where there is nothing to choose
    from or the model does not say how sure it is, `BadFile` where no scan can be segmented.
    """
    if strategy not in STRATEGIES:
        raise BadConfig(f"there is no strategy '{strategy}'; use {', '.join(STRATEGIES)}")
    if not scans:
        raise BadConfig(f"{store.folder}: every scan has a final label; give new ones with --from")
    if isinstance(model, str):
        raise BadConfig(f"the model {model} does not say how sure it is; give one that was trained")
    order, doubts = list(scans), dict[str, Doubt]()
    draw = random.Random(f"{seed} {len(store.cases())}")
    if strategy != "first":
        draw.shuffle(order)
    if strategy == "uncertain":
        doubts = _doubts_of(store, order[:most], model, other, settings, progress)
        order = sorted(
            (one for one in order if one.id in doubts), key=lambda one: _rank(one, doubts)
        )
    for candidate in order:
        try:
            volumes = _volumes(store, candidate, model)
            result, doubt = look_at(volumes, model, other, settings)
        except MedsegError as error:
            _leave_out(candidate, error)
            continue
        doubts |= {candidate.id: doubt}
        return Choice(
            candidate=candidate, doubt=doubt, strategy=strategy, result=result, doubts=doubts
        )
    raise BadFile(f"{scans[0].files[0]}: and no other scan can be segmented; see the warnings")


def _rank(candidate: Candidate, doubts: Mapping[str, Doubt]) -> tuple[float, str]:
    return -doubts[candidate.id].score, candidate.id


def look_at(
    volumes: Sequence[Volume],
    model: Model,
    other: Model | None = None,
    settings: Settings | None = None,
) -> tuple[Segmentation, Doubt]:
    """A scan segmented by a model, and how unsure that is. other: a second model."""
    settings = settings or Settings()
    asked = _with_maps(model, volumes[0])
    result = segment(volumes, model, replace(settings, probabilities=asked))
    labels = result.labels.data
    maps = {value: result.maps[f"probability_{value}"].data for value in asked}
    result.maps.clear()
    share = float((labels > 0).mean())
    if not share:
        return result, Doubt(unsure=1.0)
    expected = expected_dice(labels, maps) if maps else _mean(result.confidence.values())
    disagreement = None
    if other is not None:
        second = segment(volumes, other, settings)
        disagreement = 1 - agreement(labels, result.table, second.labels.data, second.table)
    return result, Doubt(unsure=1 - expected, disagreement=disagreement, share=share)


def _with_maps(model: Model, volume: Volume) -> tuple[int, ...]:
    """The structures whose probabilities are asked for: all, or where these would be too large,
    some from all over the table. None of overlapping regions, whose probabilities are not those of
    labels.
    """
    if any(one.spec.regions for one in _checkpoints(model)):
        return ()
    values = label_table(model).values
    most = max(1, _MOST_MAPS_BYTES // (4 * volume.data.size))
    if len(values) <= most:
        return values
    return tuple(values[number * len(values) // most] for number in range(most))


def _checkpoints(model: Model) -> list[Checkpoint]:
    """Every network of a model."""
    if is_set(model):
        return [one for group in model.models for one in group]
    return [] if isinstance(model, str) else as_list(model)


def expected_dice(labels: NDArray, probabilities: Mapping[int, NDArray]) -> float:
    """The Dice that a model expects of its labels (I, J, K), a mean over the structures, as far as
    it labels any of it or holds it for probable anywhere.

    probabilities: value to map (I, J, K), 0 to 1.
    """
    scores = []
    for value, chance in probabilities.items():
        here = labels == value
        size = int(here.sum()) + float(chance.sum(dtype=np.float64))
        if size >= 1:  # voxel
            scores.append(2 * float(chance[here].sum(dtype=np.float64)) / size)
    return _mean(scores)


def agreement(
    labels: NDArray, table: LabelTable, others: NDArray, other_table: LabelTable
) -> float:
    """The mean Dice of two label maps (I, J, K) over the structures, matched by name, that either
    holds; 1 where neither holds any.
    """
    scores = dice_by_name(others, other_table, labels, table)
    return _mean(scores.values()) if scores else 1.0


def _mean(values: Iterable[float]) -> float:
    """A mean, 0 of nothing."""
    every = list(values)
    return float(np.mean(every)) if every else 0.0


# What was measured before ------------------------------------------------------------------------


def _doubts_of(
    store: Store,
    scans: Sequence[Candidate],
    model: Model,
    other: Model | None,
    settings: Settings | None,
    progress: Progress,
) -> dict[str, Doubt]:
    """The doubts about scans, by id; of those that can be segmented."""
    key = json.dumps([identity_of(one) for one in (model, other) if one is not None])
    kept = _kept(store, key)
    doubts: dict[str, Doubt] = {}
    try:
        for number, candidate in enumerate(scans, 1):
            stamp = _stamp(candidate)
            if stamp not in kept:
                try:
                    volumes = _volumes(store, candidate, model)
                    kept[stamp] = look_at(volumes, model, other, settings)[1]
                except MedsegError as error:
                    _leave_out(candidate, error)
            if stamp in kept:
                doubts[candidate.id] = kept[stamp]
            progress(candidate.id, number, len(scans))
    finally:
        content = {"models": key, "doubts": {one: asdict(doubt) for one, doubt in kept.items()}}
        # Where nothing may be written, who asks again waits again.
        with suppress(BadOutput), atomic_write(store.folder / _KEPT) as file:
            file.write(json.dumps(content).encode())
    return doubts


def _kept(store: Store, key: str) -> dict[str, Doubt]:
    """What was measured with these models; nothing if there is nothing, or it is damaged."""
    try:
        content: Any = parse_json((store.folder / _KEPT).read_text(encoding="utf-8"))
        if content["models"] != key:
            return {}
        return {stamp: _doubt_of(one) for stamp, one in content["doubts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _doubt_of(content: Mapping[str, Any]) -> Doubt:
    """A doubt that was kept. Raises `TypeError`, `ValueError` or `KeyError` for what is none."""
    other = content["disagreement"]
    return Doubt(
        unsure=float(content["unsure"]),
        disagreement=None if other is None else float(other),
        share=float(content["share"]),
    )


def _stamp(candidate: Candidate) -> str:
    """Names a scan's files as they are now."""
    stats = [(path, path.stat()) for path in candidate.files if path.exists()]
    return json.dumps([(str(path), one.st_size, one.st_mtime_ns) for path, one in stats])


def _volumes(store: Store, candidate: Candidate, model: Model) -> list[Volume]:
    """The channels of a scan, in the order of the model."""
    names = channel_names(model)
    if len(candidate.files) == 1 and len(names) > 1:
        path = candidate.files[0]
        volumes = [read(path, volume_index=number) for number in range(len(names))]
    else:
        volumes = [read(path) for path in candidate.files]
    return in_order(volumes, store.channels, names) if candidate.stored else volumes


def _leave_out(candidate: Candidate, error: MedsegError) -> None:
    warnings.warn(f"{candidate.id} is left out: {error}", DataWarning, stacklevel=3)


def name_of(job: Job) -> str:
    """What a scan is called as a case, if nobody says."""
    return strip_suffix(job.labels).removesuffix("_seg")


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts case_10 after case_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
