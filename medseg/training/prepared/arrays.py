"""A case as arrays on the model's grid, as a network learns from them; whoever makes them, and
when, they are the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from medseg.config import Config
from medseg.dataset import Case, Dataset, load_case
from medseg.errors import BadConfig, BadFile
from medseg.files import file_state
from medseg.inference import network_input, network_labels
from medseg.models import ModelSpec
from medseg.training.losses import IGNORE
from medseg.training.source import network_spec

#: The settings that arrays depend on.
SETTINGS = ("model.spacing_mm", "model.grid", "model.intensity", "model.recipe")
#: Voxels of each label, at most, that are remembered for every case, to centre patches on.
POSITIONS = 2000


class Preparation:
    """How the cases of a data set become arrays: by the grid and the intensities of a config.
    Raises `BadConfig` for settings that do not fit the data.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.classes = (0, *(label.value for label in dataset.table.labels))
        try:
            self._spec = ModelSpec(sha256="0" * 64, **network_spec(config, self))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BadConfig(f"the settings of the model: {where}: {first['msg']}") from None

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""
        channels = self.dataset.channels
        return {
            "channels": len(channels),
            "channel_names": channels if len(set(channels)) == len(channels) else (),
            "classes": self.classes,
            "regions": bool(self.dataset.regions),
        }

    def key(self, case: Case) -> str:
        """A hash of what a case's arrays depend on: its name, its files by size and time, and how
        it is prepared; not where they lie.
        """
        model = self.config.model.model_dump(
            mode="json", include={"spacing_mm", "grid", "intensity", "recipe"}
        )
        values = [self.classes, self.dataset.regions, self.dataset.ignore]
        return hash_of([inputs_of(case), model, *values])

    def arrays(self, case: Case) -> dict[str, NDArray]:
        """image (C, X, Y, Z) float32, labels (X, Y, Z) as classes, points (N, 4) int16: class and
        voxel of some voxels of each class. Raises `BadFile`.
        """
        volumes, labels = load_case(self.dataset, case)
        image, grid = network_input(volumes, self._spec, names=self.dataset.channels)
        classes = self._classes_of(network_labels(labels, grid, self._spec), case)
        # By the name, so that arrays are the same wherever the data lie.
        seed = int(hashlib.sha256(case.name.encode(errors="surrogateescape")).hexdigest()[:12], 16)
        return {"image": image.numpy(), "labels": classes, "points": _points(classes, seed)}

    def _classes_of(self, values: NDArray, case: Case) -> NDArray:
        """Label values as classes: 0 and on, `IGNORE` where the data set says so. Raises `BadFile`
        for others.
        """
        class_values = (0, *self.dataset.values) if self.dataset.regions else self.classes
        # Patches of regions, mirrored, may hold as many classes again.
        most = len(class_values) * (2 if self.dataset.regions else 1)
        kind = np.int8 if most < 127 else np.int16
        table = np.full(max(65_536, max(class_values) + 1), -2, np.int32)
        table[list(class_values)] = range(len(class_values))
        if self.dataset.ignore is not None:
            table[self.dataset.ignore] = IGNORE
        classes = table[values]
        if classes.min() < IGNORE:
            strange = sorted(set(np.unique(values).tolist()) - {*class_values, self.dataset.ignore})
            raise BadFile(
                f"{case.label or case.name}: holds the label values {strange}, which the data set"
                " does not name; correct the file, or name them"
            )
        return classes.astype(kind)


def inputs_of(case: Case) -> list[Any]:
    """What a case is made of, as values for JSON: files by name, size and time of change."""
    files = [*case.images, *([case.label] if case.label else []), *(path for _, path in case.masks)]
    states = [[path.name, file_state(path)] for path in files]
    return [case.name, len(case.images), states, [value for value, _ in case.masks], case.numbers]


def hash_of(content: Any) -> str:
    """A short name for values of JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _points(classes: NDArray, seed: int) -> NDArray[np.int16]:
    """(N, 4): class and voxel of at most `POSITIONS` voxels of each class but background."""
    random = np.random.default_rng(seed)
    flat = classes.ravel()
    inside = np.flatnonzero(flat > 0)
    order = inside[np.argsort(flat[inside], kind="stable")]
    samples = []
    for part in np.split(order, np.flatnonzero(np.diff(flat[order])) + 1) if len(order) else []:
        samples.append(random.choice(part, min(len(part), POSITIONS), replace=False))
    at = np.concatenate(samples) if samples else np.empty(0, np.int64)
    return np.column_stack((flat[at], *np.unravel_index(at, classes.shape))).astype(np.int16)
