"""Sets of models that see the same scan, as TotalSegmentator's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medseg.labels import LabelTable
from medseg.models.folder import Checkpoint


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelSet:
    """Models that see the same scan; what they find is laid over each other in order, in one table.

    labels: for each model, the set's label for each of its own. coarse: gives a model of the same
    task with larger voxels, to find what is looked for; nothing where there is none.
    """

    name: str
    models: tuple[tuple[Checkpoint, ...], ...]
    labels: tuple[Mapping[int, int], ...]
    table: LabelTable
    coarse: Callable[[], list[Checkpoint]] = list

    def __repr__(self) -> str:
        return f"<ModelSet {self.name}: {len(self.models)} models to {len(self.table)} structures>"

    def only(self, values: Sequence[int]) -> ModelSet:
        """The set without models that find none of these labels, and without the other labels."""
        subset = set(values)
        indices = [n for n, labels in enumerate(self.labels) if subset & set(labels.values())]
        return ModelSet(
            name=self.name,
            models=tuple(self.models[n] for n in indices),
            labels=tuple(
                {own: out for own, out in self.labels[n].items() if out in subset} for n in indices
            ),
            table=LabelTable(tuple(label for label in self.table.labels if label.value in subset)),
            coarse=self.coarse,
        )
