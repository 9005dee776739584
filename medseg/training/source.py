"""What can be trained from, and the model that comes of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medseg.config import Config
from medseg.labels import LabelTable


class Source(Protocol):
    """What a model is trained from: `RenderedSource`, or `ScanSource`."""

    channels: int
    outputs: int
    table: LabelTable

    def batch(
        self, step: int, seeds: list[int], samples: range, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (B, C, X, Y, Z), labels (B, X, Y, Z) int64, and which classes are unlabelled (B, K) or None.

        `samples` are their places in the whole run; all that is random comes from the seeds, one for each sample.
        """

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""

    def validate(
        self, network: nn.Module, seeds: list[int], device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """Dice of each structure and their 'mean' on some data held out; empty if there is none."""


def model_spec(config: Config, source: Source) -> dict[str, Any]:
    """The fields of `ModelSpec`, but the hash, of the model that a run makes."""
    options = {key: value for key, value in config.model.options.items() if key != "deep_supervision"}
    return {
        "name": config.name,
        "description": config.description,
        "architecture": config.model.name,
        "options": options,
        "patch": config.model.patch,
        "spacing_mm": config.model.spacing_mm,
        "grid": config.model.grid,
        "intensity": config.model.intensity,
        "mirror": config.augment.mirror if config.synth is None else (),
        "fluid": config.fluid,
        "brain": config.brain,
        "cleanup": [] if config.cleanup == "auto" else config.cleanup,
        "card": config.card,
    } | source.spec()
