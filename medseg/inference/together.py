"""Several models of nnU-Net for one task: the mean of their probabilities on the scan's grid.

Folds of one model have one plan, so their logits are averaged where they are computed. Models of
different plans meet only on the scan's own grid: float32 means of probabilities there, of classes
the largest, the first of equal ones; of regions those above a half (nnunetv2 2.8.1, `ensemble`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadModel
from medseg.inference.settings import Settings

if TYPE_CHECKING:
    from medseg.models import Checkpoint, ModelSpec


def groups_of(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """The checkpoints in groups whose logits are averaged: one group, but of models of other
    programs one for each model.
    """
    if any(one.spec.recipe is None for one in checkpoints):
        return [list(checkpoints)]
    groups: dict[object, list[Checkpoint]] = {}
    for one in checkpoints:
        groups.setdefault(one.family, []).append(one)
    return list(groups.values())


def check_together(groups: Sequence[Sequence[Checkpoint]], settings: Settings) -> None:
    """Raise `BadModel` for models of different tasks, `BadConfig` for what their mean cannot be
    made with.
    """
    from medseg.models import StepRecipe

    first = groups[0][0]
    if any(isinstance(one.spec.recipe, StepRecipe) for group in groups for one in group):
        raise BadConfig("models of MONAI are not averaged with others; give one at a time with -m")
    for other in (group[0] for group in groups[1:]):
        for what in ("channels", "classes", "regions"):
            if getattr(first.spec, what) != getattr(other.spec, what):
                raise BadModel(
                    f"the models {first.family} and {other.family} differ in their {what}; only"
                    " models of one task can be averaged"
                )
        if first.table.names != other.table.names:
            raise BadModel(
                f"the models {first.family} and {other.family} name their labels differently;"
                " only models of one task can be averaged"
            )
    if settings.precision not in ("auto", "fp32") or settings.backend == "openvino":
        raise BadConfig(
            "models of different plans are averaged in float32 on PyTorch; leave out --precision"
            " and --backend"
        )
    if settings.postprocess:
        raise BadConfig(
            "--postprocess: what one model's cross-validation advises says nothing of a mean of"
            " several; leave it out"
        )
    unknown = [value for value in settings.probabilities if value not in first.spec.classes[1:]]
    if unknown:
        raise BadConfig(f"the models have no label {unknown[0]}; `medseg info` lists them")


class Average:
    """The sum of several models' probabilities on the scan's grid, and what follows from it."""

    def __init__(self, spec: ModelSpec, shape: Sequence[int]) -> None:
        self._spec, self._count = spec, 0
        self._total = np.zeros((spec.outputs, *shape), np.float32)

    def add(self, logits: NDArray[np.float32], back: Callable[[NDArray], NDArray]) -> None:
        """Add one model's logits (K, ...), which become probabilities in place; back: from their
        grid to the scan's, 0 where a model saw nothing.
        """
        import torch

        values = torch.from_numpy(logits)
        for n in range(values.shape[1]):  # plane by plane, by the functions that nnU-Net uses
            plane = values[:, n]
            plane.copy_(torch.sigmoid(plane) if self._spec.regions else torch.softmax(plane, 0))
        for total, one in zip(self._total, logits, strict=True):
            total += back(one)
        self._count += 1

    def labels(self) -> NDArray:
        """(I, J, K) the label of every voxel; from here on the sum is the mean."""
        self._total /= self._count
        self._count = 1
        values = np.array(self._spec.classes, np.uint8 if max(self._spec.classes) < 256 else "u2")
        label_map = np.zeros(self._total.shape[1:], values.dtype, order="F")
        for k in range(label_map.shape[2]):  # plane by plane: no copy of all outputs
            mean = self._total[..., k]
            if not self._spec.regions:
                label_map[..., k] = values[mean.argmax(0)]
                continue
            for value, inside in zip(values[1:], mean > 0.5):
                label_map[..., k][inside] = value
        return label_map

    def maps(self, settings: Settings) -> dict[str, NDArray[np.float32]]:
        """The maps that are asked for, by name, after `labels`."""
        spec = self._spec
        by_name = {
            f"probability_{value}": self._total[spec.classes.index(value) - spec.regions].copy()
            for value in settings.probabilities
        }
        if settings.uncertainty:
            by_name["uncertainty"] = np.stack(
                [self._entropy(self._total[..., k]) for k in range(self._total.shape[3])], -1
            )
        return by_name

    def _entropy(self, mean: NDArray[np.float32]) -> NDArray[np.float32]:
        """How unsure the mean of a plane (K, I, J) is, from 0 to 1; of regions the most unsure."""
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.where(mean > 0, -mean * np.log(mean), 0)
            if not self._spec.regions:
                return (parts.sum(0) / np.log(len(mean))).astype(np.float32)
            others = np.where(mean < 1, -(1 - mean) * np.log(1 - mean), 0)
        return ((parts + others).max(0) / np.log(2)).astype(np.float32)

    def confidence(self, labels: NDArray) -> dict[int, float]:
        """Of each label, its mean probability where it was chosen."""
        spec = self._spec
        confidences = {}
        for n, value in enumerate(spec.classes[1:], 1):
            inside = labels == value
            if inside.any():
                confidences[value] = float(self._total[n - spec.regions][inside].mean())
        return confidences
