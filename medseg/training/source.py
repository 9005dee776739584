"""What can be trained from, and the model that comes of it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from medseg.config import Config, ModelConfig
from medseg.errors import BadConfig
from medseg.labels import LabelTable
from medseg.models import IntensitySpec, monai_recipe
from medseg.training.processes import Deal, alone


class Batch(NamedTuple):
    """What a step is trained on.

    images (B, C, X, Y, Z); labels (B, X, Y, Z) int64; unlabelled (B, K): which classes a sample's
    labels do not tell from background, or None if all are told.
    """

    images: Tensor
    labels: Tensor
    unlabelled: Tensor | None = None


class Source(Protocol):
    """What a model is trained from: `RenderedSource`, or `ScanSource`.

    channels and outputs: of the network. cases: how many are trained from. membership: which class
    lies in which region, where the outputs are overlapping regions, else None.
    """

    channels: int
    outputs: int
    cases: int
    table: LabelTable
    membership: Tensor | None

    def batch(self, step: int, seeds: list[int], samples: range, device: torch.device) -> Batch:
        """The samples of a step; all that is random comes from the seeds, one for each sample.

        samples: their places in the whole run.
        """

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """How far a network's outputs are from the labels: one number."""

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""

    def validate(
        self,
        network: nn.Module,
        *,
        seeds: list[int],
        device: torch.device,
        dtype: torch.dtype,
        deal: Deal[Any] = alone,
    ) -> dict[str, float]:
        """Dice of each structure and their 'mean' on some data held out; empty where none is
        defined. deal: shares the samples among processes; the result is the same bits.
        """


class Described(Protocol):
    """What says of its data what a model needs to know: every `Source`."""

    def spec(self) -> dict[str, Any]:
        """The fields of `ModelSpec` that are of the data."""


@runtime_checkable
class WithLoss(Protocol):
    """A network with a loss of its own: mask classification."""

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """How far its outputs are from the labels (B, X, Y, Z)."""


@runtime_checkable
class Residing(Protocol):
    """A source that can keep what it draws from on a device."""

    def reside(self, room_bytes: int) -> None:
        """Keep as much as fits into so many bytes there."""


@runtime_checkable
class Folding(Protocol):
    """A network that can leave its logits folded, 2x2x2 voxels in one, as the losses take them."""

    folded: bool


def network_spec(config: Config, source: Described) -> dict[str, Any]:
    """The fields of `ModelSpec` that say what the network is and what it sees."""
    options = {
        key: value for key, value in config.model.options.items() if key != "deep_supervision"
    }
    source_fields = source.spec()
    return (
        {
            "name": config.name,
            "architecture": config.model.name,
            "options": options,
            "patch": config.model.patch,
            "spacing_mm": config.model.spacing_mm,
            "grid": config.model.grid,
            "intensity": config.model.intensity,
        }
        | source_fields
        | _recipe(config.model, regions=source_fields.get("regions", False))
    )


def _recipe(model: ModelConfig, *, regions: bool) -> dict[str, Any]:
    """The recipe among the fields of `ModelSpec`. Raises `BadConfig` for what MONAI cannot do."""
    if model.recipe != "monai":
        return {} if model.recipe is None else {"recipe": model.recipe}
    if model.grid != "scan" or isinstance(model.intensity, str):
        raise BadConfig(
            "model.recipe=monai needs model.grid=scan and intensities of the scheme zscore or ct:"
            " MONAI has nothing like the others"
        )
    scales = TypeAdapter(tuple[IntensitySpec, ...]).validate_python(model.intensity)
    recipe = monai_recipe(model.spacing_mm, scales, regions=regions)
    return {"recipe": recipe.model_dump(mode="json")}


def model_spec(config: Config, source: Source) -> dict[str, Any]:
    """The fields of `ModelSpec`, but the hash, of the model that a run makes."""
    return {
        "description": config.description,
        "mirror": config.augment.mirror if config.synth is None else (),
        "fluid": config.fluid,
        "brain": config.brain,
        "cleanup": [] if config.cleanup == "auto" else config.cleanup,
        "card": config.card,
    } | network_spec(config, source)
