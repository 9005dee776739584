"""Scans with labels as what a model is trained from: prepared once on the model's grid, then drawn
as random patches.

Preparation calls the same functions as inference (see `preprocess`) and leaves arrays on disk that
are mapped into memory, so that a data set may be larger than that, and an interrupted run finds
them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.config import AugmentConfig, Config
from medseg.dataset import Case, Dataset, read_case_labels, read_channels
from medseg.errors import BadConfig, NotEnoughMemory
from medseg.files import output_errors
from medseg.inference import Courier, Settings, segment, unless_full
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.models import Checkpoint, ModelSpec
from medseg.networks import build_network
from medseg.training.augment import draw_patches
from medseg.training.losses import segmentation_loss
from medseg.training.prepared.arrays import Preparation
from medseg.training.prepared.formats import NAMES, Stored, check_room, map_npy, write_npy
from medseg.training.prepared.reading import PreparedScans
from medseg.training.processes import Deal, alone
from medseg.training.source import Batch, network_spec
from medseg.volume import Volume


@dataclass(frozen=True)
class Trained(Checkpoint):
    """A network in memory as a checkpoint, for inference in the middle of training."""

    built: nn.Module

    @property
    def weight_bytes(self) -> int:
        """Of the weights, were they stored."""
        return 2 * sum(p.numel() for p in self.built.parameters())

    def outline(self) -> nn.Module:
        """The network in evaluation mode without memory for its weights, of which none are
        stored.
        """
        spec = self.spec
        with torch.device("meta"):
            network = build_network(spec.architecture, spec.channels, spec.outputs, **spec.options)
        return network.to("meta").eval()

    def network(self) -> nn.Module:
        """A copy in evaluation mode, float32, on the CPU."""
        return deepcopy(self.built).float().cpu().eval()


class ScanSource:
    """The `Source` of a config without `synth`: cases of a data set, by name, for training and for
    validation.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        training: Sequence[str],
        validation: Sequence[str],
        store: Path,
        progress: Progress = silent,
        *,
        watched: Sequence[str] = (),
        prepared: PreparedScans | None = None,
        room_bytes: int | None = None,
    ) -> None:
        """Prepare the training cases in the folder `store`, as far as they are not there yet.

        watched: the validation cases in the order in which they are looked at in between; as they
        come if none is said. prepared: a store that has the cases already; then nothing is
        written. room_bytes: what this process may hold while it segments; None: what is free.
        Raises `BadFile` for a case that cannot be read, `BadConfig` if there is nothing to train
        from or no room.
        """
        self.config, self.dataset, self.store, self.table = config, dataset, store, dataset.table
        self.channels = len(dataset.channels)
        self.classes = (0, *(label.value for label in dataset.table.labels))
        self.membership = _membership(dataset)
        self.outputs = len(dataset.regions) or len(self.classes)
        self.spacing_mm = _triple(config.model.spacing_mm)
        self.swap = _lateral_swap(dataset, self.membership)
        self.training = [dataset[name] for name in training]
        self._variations = [_variations_of(config.augment, self.table, c) for c in self.training]
        self.validation = [dataset[name] for name in validation]
        self.watched = [dataset[name] for name in watched] or self.validation
        self.cases, self._inference_bytes = len(self.training), room_bytes
        if config.model.name == "mask2former" and (
            self.membership is not None or any(c.labelled for c in dataset.cases)
        ):
            raise BadConfig(
                "mask2former learns neither overlapping regions nor partly labelled cases; use"
                " --model unet"
            )
        if not self.training:
            raise BadConfig(f"{dataset.folder}: there are no cases to train from")
        self.seconds_a_case = 0.0
        self._preparation, self._prepared = Preparation(config, dataset), prepared
        if prepared is None:
            self._prepare(progress)
        else:
            prepared.check_arrays(self._preparation, self.training + self.validation)
        self._permutations: dict[int, list[int]] = {}
        self._courier: Courier | None = None
        self._room_bytes = 0
        self._resident: dict[int, tuple[Tensor, Tensor]] = {}

    # Preparation ----------------------------------------------------------------------------------

    def _prepare(self, progress: Progress) -> None:
        """Write what is missing in the store, several cases at a time."""
        preparation = self._preparation
        with output_errors(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
        self._paths = [
            {name: self.store / f"{preparation.key(case)}.{name}.npy" for name in NAMES}
            for case in self.training
        ]
        # The points are written last: where they are, the rest is.
        missing = [
            (case, paths)
            for case, paths in zip(self.training, self._paths)
            if not paths[NAMES[-1]].exists()
        ]

        def write(case: Case, paths: Mapping[str, Path]) -> None:
            arrays = preparation.arrays(case)
            check_room(self.store, arrays["image"].nbytes)
            for name, path in paths.items():
                write_npy(path, arrays[name])

        with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
            jobs = [pool.submit(write, case, paths) for case, paths in missing]
            try:
                for number, (job, (case, _)) in enumerate(zip(jobs, missing), start=1):
                    job.result()
                    progress(case.name, number, len(missing))
            finally:
                for job in jobs:
                    job.cancel()

    # Training -------------------------------------------------------------------------------------

    def batch(self, step: int, seeds: list[int], samples: range, device: torch.device) -> Batch:
        """Patches (B, C, X, Y, Z) and their classes (B, X, Y, Z) int64; see `Source`.

        Cases come in a new random order in every pass; where a patch lies and what is done to it is
        the seed's choice.
        """
        numbers = [self._case_of(sample) for sample in samples]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        patches, targets = [], []
        for number, generator in zip(numbers, generators):
            image, labels = self._case(number, device)
            centre = self._centre(labels.shape, self._array(number, "points"), generator)
            pair = draw_patches(
                [image],
                [labels],
                centres=torch.tensor([centre], dtype=torch.float64),
                patch=self.config.model.patch,
                spacing_mm=self.spacing_mm,
                settings=self._variations[number],
                generator=generator,
                lateral_swap=self.swap,
                background=[torch.zeros(self.channels, device=device)],  # as inference pads
                device=device,
                send=self._courier_to(device).send,
            )
            patches.append(pair[0])
            targets.append(pair[1])
        return Batch(
            torch.cat(patches), torch.cat(targets).long(), self._unlabelled(numbers, device)
        )

    def reside(self, room_bytes: int) -> None:
        """Keep cases that were drawn from on the device, as far as so many bytes hold them. No
        batch is another for that.
        """
        self._room_bytes = room_bytes

    def _case(self, number: int, device: torch.device) -> tuple[Tensor | Stored, Tensor | Stored]:
        """Image (C, X, Y, Z) and classes (X, Y, Z) of a case: on the device where there was room,
        else on the disk, of which what is asked for is read.
        """
        if number in self._resident:
            return self._resident[number]
        image, labels = self._opened(number, "image"), self._opened(number, "labels")
        size_bytes = image.nbytes + labels.nbytes
        if size_bytes > self._room_bytes:
            return image, labels
        send = self._courier_to(device).send
        there = unless_full(lambda: (send(image[...]), send(labels[...])))
        if there is None:  # somebody else has taken what was free
            self._room_bytes = 0
            return image, labels
        self._room_bytes -= size_bytes
        self._resident[number] = there
        return there

    def _courier_to(self, device: torch.device) -> Courier:
        if self._courier is None or self._courier.device != device:
            self._courier = Courier(device)
        return self._courier

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Dice and cross-entropy of classes, or of overlapping regions; what is to be ignored does
        not count.
        """
        return segmentation_loss(
            outputs,
            batch.labels,
            name=self.config.train.loss,
            with_ignored=self.dataset.ignore is not None,
            unlabelled=batch.unlabelled,
            membership=self.membership,
        )

    def _opened(self, number: int, name: str) -> Tensor | Stored:
        """An array of a training case, of which nothing is read yet."""
        if self._prepared is not None:
            return self._prepared.open(self.training[number], name)
        return torch.from_numpy(map_npy(self._paths[number][name]))

    def _array(self, number: int, name: str) -> NDArray:
        """An array of a training case."""
        return self._opened(number, name)[...].numpy()

    def discard(self) -> None:
        """Delete what was prepared for this run alone."""
        if self._prepared is None:
            for path in sorted(self.store.glob("*.npy")):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # what else is there is not ours, or a server's, for a while
                self.store.rmdir()

    def _case_of(self, sample: int) -> int:
        """The number of the training case that the run's sample of this place is drawn from."""
        epoch, place = divmod(sample, len(self.training))
        if epoch not in self._permutations:
            seed = (self.config.train.seed * 1_000_003 + epoch) * 4096 + 4094
            order = torch.randperm(
                len(self.training), generator=torch.Generator().manual_seed(seed)
            )
            self._permutations = {epoch: order.tolist()} | dict(
                list(self._permutations.items())[-1:]
            )
        return self._permutations[epoch][place]

    def _centre(
        self, shape: Sequence[int], points: NDArray, generator: torch.Generator
    ) -> list[int]:
        """The voxel in the middle of a patch: one of a random structure, or anywhere; patches keep
        to the scan.

        A scan smaller than the patch lies somewhere in it.
        """
        draw = lambda count: int(torch.randint(count, (), generator=generator))  # noqa: E731
        patch = self.config.model.patch
        voxel = None
        if float(torch.rand((), generator=generator)) < self.config.train.foreground and len(
            points
        ):
            present = np.unique(points[:, 0])
            mine = points[points[:, 0] == present[draw(len(present))], 1:]
            voxel = mine[draw(len(mine))].tolist()
        centre = []
        for axis, (size, length) in enumerate(zip(shape, patch)):
            low, high = min(0, size - length), max(0, size - length)
            start = low + draw(high - low + 1)
            if voxel is not None and size > length:
                start = min(max(voxel[axis] - length // 2, low), high)
            centre.append(start + length // 2)
        return centre

    def _unlabelled(self, numbers: list[int], device: torch.device) -> Tensor | None:
        """(B, K) true where a sample's labels do not tell a class from background; None if all are
        told.
        """
        cases = [self.training[number] for number in numbers]
        if self.membership is not None or all(case.labelled is None for case in cases):
            return None
        rows = [
            [
                case.labelled is not None and value != 0 and value not in case.labelled
                for value in self.classes
            ]
            for case in cases
        ]
        # Where there are none, nothing need ask the device for them.
        return torch.tensor(rows, device=device) if any(map(any, rows)) else None

    # Validation -----------------------------------------------------------------------------------

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""
        mirror = tuple(axis for axis in self.config.augment.mirror if axis or self.swap is None)
        return self._preparation.spec() | {"mirror": mirror}

    def _spec(self) -> ModelSpec:
        return ModelSpec(sha256="0" * 64, **network_spec(self.config, self))

    def as_model(self, network: nn.Module) -> Trained:
        """A network of this source's as a model that segments scans."""
        return Trained(spec=self._spec(), table=self.table, folder=self.store, built=network)

    def segment(
        self, volumes: Sequence[Volume], model: Checkpoint, device: torch.device, **settings: Any
    ) -> Volume:
        """A scan segmented as inference does it; settings: of `Settings`."""
        room = self._inference_bytes
        how = Settings(device=str(device), backend="torch", max_memory_bytes=room, **settings)
        try:
            return segment(volumes, model, how).labels
        except NotEnoughMemory:
            if room is None:
                raise
            raise NotEnoughMemory(
                f"a scan to validate with needs more than the {room / 1e9:.2f} GB of memory that"
                " each process of this machine may take; start fewer processes here"
            ) from None

    def validate(
        self,
        network: nn.Module,
        *,
        seeds: list[int],
        device: torch.device,
        dtype: torch.dtype,
        deal: Deal[Any] = alone,
    ) -> dict[str, float]:
        """Dice of each structure on as many whole validation scans as there are seeds, by the path
        inference takes.
        """
        model = self.as_model(network)
        watched = self.watched[: len(seeds)]

        def look(number: int) -> tuple[float, dict[str, Score]]:
            start_s, case = time.monotonic(), watched[number]
            volumes = read_channels(self.dataset, case)
            labels = self.segment(volumes, model, device)
            scores = self.score(labels.data, read_case_labels(case, volumes[0]).data, case)
            return time.monotonic() - start_s, scores

        looks = deal(len(watched), look)
        # Of the last: the first one also waits for compilation.
        self.seconds_a_case = looks[-1][0] if looks else self.seconds_a_case
        means = mean_scores([scores_of(row) for _, row in looks])
        return means | {"mean": float(np.mean(list(means.values())))} if means else {}

    def score(self, found: NDArray, truth: NDArray, case: Case) -> dict[str, Score]:
        """Dice of the structures annotated in a case and present in the result or the truth."""
        counted = (
            truth != self.dataset.ignore if self.dataset.ignore is not None else np.ones(1, bool)
        )
        scores = {}
        for name, values in structures_of(self.dataset).items():
            if case.labelled is not None and not set(values) <= set(case.labelled):
                continue
            a, b = np.isin(found, values) & counted, np.isin(truth, values) & counted
            if a.any() or b.any():
                dice = 2 * float((a & b).sum()) / float(a.sum() + b.sum())
                scores[name] = Score(dice, has_reference=bool(b.any()))
        return scores


class Score(NamedTuple):
    """Dice of a structure in a case, and whether there is a voxel of it to be found there."""

    dice: float
    has_reference: bool


def scores_of(row: Mapping[str, Sequence[Any]]) -> dict[str, Score]:
    """The scores of a case, also where another process has found them."""
    return {name: Score(*values) for name, values in row.items()}


def mean_scores(rows: Sequence[Mapping[str, Score]]) -> dict[str, float]:
    """The mean Dice of each structure that one case at least holds; of others it is 0 whatever is
    found.
    """
    names = dict.fromkeys(
        name for row in rows for name, score in row.items() if score.has_reference
    )
    return {name: float(np.mean([row[name].dice for row in rows if name in row])) for name in names}


def structures_of(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """Name -> the label values whose union it is, for scoring."""
    parts = dataset.regions or [(label.value,) for label in dataset.table.labels]
    return {
        label.name: tuple(part) for label, part in zip(dataset.table.labels, parts, strict=True)
    }


def _triple(spacing_mm: float | Sequence[float]) -> tuple[float, float, float]:
    if isinstance(spacing_mm, int | float):
        return float(spacing_mm), float(spacing_mm), float(spacing_mm)
    a, b, c = spacing_mm
    return float(a), float(b), float(c)


def _other_sides(table: LabelTable) -> list[int]:
    """Of each structure the place in the table of the same one on the other side, or its own."""
    pairs = table.mirror_pairs()
    return [table.values.index(pairs.get(value, value)) for value in table.values]


def _membership(dataset: Dataset) -> Tensor | None:
    """(classes, R) of 0 and 1: which label value, background first, lies in which region; then what
    patches mirrored left-right hold that no value stands for. None without regions.
    """
    if not dataset.regions:
        return None
    rows = [
        [float(value in region) for region in dataset.regions] for value in (0, *dataset.values)
    ]
    sides = _other_sides(dataset.table)
    for row in list(rows):
        mirrored = [row[side] for side in sides]
        if mirrored not in rows:
            rows.append(mirrored)
    return torch.tensor(rows)


def _lateral_swap(dataset: Dataset, membership: Tensor | None) -> Tensor | None:
    """Class -> class of the other side, for patches mirrored left-right; None if no structure has a
    side. Of label values that make regions: one that lies in the regions of the other side.
    """
    sides = _other_sides(dataset.table)
    if sides == list(range(len(sides))):
        return None
    if membership is None:
        return torch.tensor([0, *(side + 1 for side in sides)])
    rows = membership.tolist()
    mirrored = [[row[side] for side in sides] for row in rows]
    pairs = zip(rows, mirrored)
    return torch.tensor([n if a == b else rows.index(b) for n, (a, b) in enumerate(pairs)])


def _variations_of(settings: AugmentConfig, table: LabelTable, case: Case) -> AugmentConfig:
    """How patches of a case vary: not mirrored left-right where a structure is annotated on one
    side alone, for a mirrored patch would say that it is not on the other.
    """
    labelled = case.labelled or ()
    pairs = table.mirror_pairs().items() if case.labelled is not None else ()
    if all((one in labelled) == (other in labelled) for one, other in pairs):
        return settings
    return settings.model_copy(update={"mirror": tuple(axis for axis in settings.mirror if axis)})
