"""Label maps as what a model is trained from: every sample is an image rendered from one of them
(see `synth`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import Config
from medseg.errors import BadConfig
from medseg.io import digest, read_labels
from medseg.labels import LabelTable
from medseg.training.losses import hard_dice, segmentation_loss
from medseg.training.processes import Deal, alone
from medseg.training.source import Batch
from medseg.training.synth import Heads, Lookup, load_heads, lookup, render


class RenderedSource:
    """The `Source` of a config with `synth`: `hold_out` maps validate, all others train."""

    channels = 1
    membership: Tensor | None = None

    def __init__(self, config: Config) -> None:
        """Read the maps. Raises `BadConfig` or `BadFile` for maps or a table that cannot be trained
        from.
        """
        assert config.synth is not None and config.labels is not None
        self.config, self.synth = config, config.synth
        self.table = LabelTable.read(config.labels)
        self.classes = (0, *self.table.values)
        self.outputs = len(self.classes)
        self.digests: dict[str, str] = {}
        self.training, self.held_out, self.known = self._read()
        self.cases = len(self.training.maps)

    def _read(self) -> tuple[Heads, Heads | None, Lookup]:
        paths, held_out = self._files()
        values = {*self.table.values, *self.synth.merge}
        # All maps share one list of values, so that one Lookup serves training and validation.
        maps = [read_labels(path) for path in paths]
        self.digests = {
            path.name: digest(one.data, one.data.dtype) for path, one in zip(paths, maps)
        }
        heads = load_heads(maps, sorted(values), self.synth.border)
        label_lookup = lookup(
            heads.values,
            self.classes,
            mirror=self.table.mirror_pairs() | self.synth.mirror,
            config=self.synth,
        )
        training = _select(heads, [n for n in range(len(paths)) if n not in held_out])
        validation = _select(heads, held_out) if held_out else None
        return training, validation, label_lookup

    def _files(self) -> tuple[list[Path], list[int]]:
        """The label maps, and which of them are held out. Raises `BadConfig` if some are
        missing.
        """
        config = self.config
        paths = sorted(path for path in config.data.glob("*.nii.gz") if path.is_file())
        held_out = [n for n, path in enumerate(paths) if path.name in config.hold_out]
        if len(held_out) == len(paths):
            raise BadConfig(
                f"there are no label maps (*.nii.gz) to train from in {config.data}; set"
                " data=FOLDER"
            )
        if len(held_out) != len(config.hold_out):
            raise BadConfig(
                f"hold_out names files that are not in {config.data}: {', '.join(config.hold_out)}"
            )
        return paths, held_out

    @property
    def spacing_mm(self) -> float:
        """Of the cubes that images are rendered on."""
        spacing = self.config.model.spacing_mm
        if not isinstance(spacing, float | int):
            raise BadConfig("label maps are rendered on cubes: model.spacing_mm must be one number")
        return float(spacing)

    def batch(self, step: int, seeds: list[int], samples: range, device: torch.device) -> Batch:
        """Images (B, 1, X, Y, Z) and classes (B, X, Y, Z) int64, one for each seed."""
        first, last = self.synth.t1_share
        begin, end = self.synth.t1_steps
        share = first + (last - first) * min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
        heads = self._on(device)
        pairs = [self._render(heads, seed, share, device) for seed in seeds]
        images, labels = (torch.stack(part) for part in zip(*pairs))
        return Batch(images[:, None], labels.long())

    def _on(self, device: torch.device) -> Heads:
        """The maps to train from, moved to a device once."""
        if self.training.maps[0].device.type != device.type:
            maps = tuple(one.to(device) for one in self.training.maps)
            self.training = replace(self.training, maps=maps)
        return self.training

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of all classes."""
        return segmentation_loss(outputs, batch.labels, name=self.config.train.loss)

    def _render(
        self, heads: Heads, seed: int, t1_like: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return render(
            heads,
            self.known,
            shape=self.config.model.patch,
            spacing_mm=self.spacing_mm,
            config=self.synth,
            generator=generator,
            t1_like=t1_like,
            device=device,
        )

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""
        return {"channels": 1, "classes": self.classes, "spacing_mm": self.spacing_mm}

    def validate(
        self,
        network: nn.Module,
        *,
        seeds: list[int],
        device: torch.device,
        dtype: torch.dtype,
        deal: Deal[float] = alone,
    ) -> dict[str, float]:
        """Mean Dice on a fixed image for each seed, rendered from the maps held out: half T1-like,
        half random.
        """
        held_out = self.held_out
        if held_out is None or not seeds:
            return {}

        def dice(number: int) -> float:
            image, labels = self._render(held_out, seeds[number], float(number % 2 == 0), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(image[None, None])
            return hard_dice(logits, labels[None].long())

        scores = deal(len(seeds), dice)
        return {"mean": sum(scores) / len(scores)}


def _select(heads: Heads, numbers: list[int]) -> Heads:
    maps, spacings, centres = (
        [part[n] for n in numbers] for part in (heads.maps, heads.spacings_mm, heads.centres)
    )
    return Heads(
        tuple(maps),
        tuple(spacings),
        centres=tuple(centres),
        values=heads.values,
        tissue=heads.tissue,
        sides=heads.sides,
    )
