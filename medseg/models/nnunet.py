"""A foreign nnU-Net model as what medseg runs: a `ModelSpec` with a recipe, a label table, and checked weights.

Data in, nothing executed: plans and dataset.json are read as JSON, checkpoints through stand-ins (`nnunet_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from medseg.errors import BadModel
from medseg.models.nnunet_folder import Found, fold_files
from medseg.models.nnunet_plans import (
    Configuration,
    NetworkPlan,
    Outputs,
    Plans,
    configuration,
    read_outputs,
    read_plans,
)
from medseg.models.nnunet_plans import Channel as PlannedChannel
from medseg.models.nnunet_plans import Resampling as PlannedResampling
from medseg.models.nnunet_unet import NnUNet
from medseg.models.nnunet_weights import Saved, check_trainer, fitted_state, has_batch_norm, load_saved
from medseg.models.recipe import Channel, Recipe, Resampling

#: nnU-Net's normalisation -> a recipe's word.
_SCHEMES: dict[str, Literal["fixed", "zscore", "range", "bytes", "none"]] = {
    "CTNormalization": "fixed",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "range",
    "RGBTo01Normalization": "bytes",
    "NoNormalization": "none",
}
#: Datasets of TotalSegmentator, whose program turns scans to RAS before anything else.
_TURNED_SETS = re.compile(r"totalseg", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One model of nnU-Net, read and checked, with the checkpoints of the folds that are used."""

    folder: Path
    plans: Plans
    configuration: Configuration
    outputs: Outputs
    saved: tuple[Saved, ...]
    recipe: Recipe
    network: NetworkPlan
    notes: tuple[str, ...]

    @property
    def trainer(self) -> str:
        """Who trained it, in nnU-Net's words."""
        return self.saved[0].trainer

    @property
    def mirror(self) -> tuple[int, ...]:
        """The network's axes along which its training allows mirroring."""
        return self.saved[0].mirror or ()

    @property
    def channels(self) -> int:
        """What the network reads: scans, and one for each label of a first stage."""
        return len(self.outputs.channel_names) + len(self.recipe.previous)


def read_foreign(
    folder: Path, *, folds: Sequence[str] = (), checkpoint: str = "final", found: Found | None = None
) -> Foreign:
    """The model of a folder with plans.json. Raises `BadModel` for all that medseg cannot run exactly."""
    outputs = read_outputs(folder / "dataset.json")
    plans = read_plans(folder / "plans.json")
    files = fold_files(folder, folds=folds, checkpoint=checkpoint)
    first = load_saved(files[0])
    note = check_trainer(first)
    planned = configuration(plans, _configuration_name(first, folder, plans), len(outputs.channel_names))
    network = replace(planned.network, norm="batch") if has_batch_norm(first) else planned.network
    recipe = _recipe(folder, plans, planned, outputs, found)
    saved = [first, *(load_saved(file) for file in files[1:])]
    for other in saved[1:]:
        if other.configuration != first.configuration or other.mirror != first.mirror:
            raise BadModel(f"{other.path}: is of another configuration than {first.path}; give one with --folds")
    return Foreign(
        folder=folder,
        plans=plans,
        configuration=planned,
        outputs=outputs,
        saved=tuple(saved),
        recipe=recipe,
        network=network,
        notes=(note,) if note else (),
    )


def _configuration_name(saved: Saved, folder: Path, plans: Plans) -> str:
    """The configuration: what the checkpoint says; where it says nothing, the folder's name or the only one there is."""
    if saved.configuration is not None:
        return saved.configuration
    last = folder.name.split("__")[-1]
    names = list(plans.content["configurations"])
    if last in names:
        return last
    if len(names) == 1:
        return str(names[0])
    raise BadModel(f"{saved.path}: does not say which configuration it is, and {plans.path} has {', '.join(names)}")


def _recipe(folder: Path, plans: Plans, planned: Configuration, outputs: Outputs, found: Found | None) -> Recipe:
    transposed = [2 - axis for axis in plans.transpose]  # nnU-Net counts k, j, i
    turned = plans.reader.endswith("WithReorient") or bool(_TURNED_SETS.search(folder.parent.name))
    logits = planned.logits
    if logits.order > 1 or logits.order_across > 1:
        raise BadModel(f"{plans.path}: brings logits back by order {logits.order}, which medseg does not do")
    return Recipe(
        orientation="RAS" if turned else "auto",
        axes=(transposed[0], transposed[1], transposed[2]),  # type: ignore[arg-type]
        spacing_mm=planned.spacing_mm,
        crop="nonzero",
        channels=tuple(_channel(one) for one in planned.channels),
        image=_resampling(planned.image),
        labels=_resampling(planned.labels),
        logits=_resampling(logits),
        overlap=0.5 if found is None else found.overlap,
        previous=outputs.foreground if planned.previous_stage else (),
    )


def _channel(planned: PlannedChannel) -> Channel:
    fixed = planned.scheme == "CTNormalization"
    numbers: dict[str, float] = {}
    if fixed:
        numbers = {"low": planned.low, "high": planned.high, "mean": planned.mean, "sd": planned.sd}
    return Channel(scheme=_SCHEMES[planned.scheme], masked=planned.masked, **numbers)


def _resampling(planned: PlannedResampling) -> Resampling:
    return Resampling(**asdict(planned))


def build(foreign: Foreign, fold: int = 0) -> NnUNet:
    """The network of one fold in evaluation mode, float32. Raises `BadModel` if its weights do not fit the plans."""
    outputs = len(foreign.outputs.values) - foreign.outputs.regions
    options: dict[str, Any] = asdict(foreign.network)
    with torch.device("meta"):  # shapes are compared before any memory is taken
        network = NnUNet(foreign.channels, outputs, **options)
    shapes = {key: value.shape for key, value in network.state_dict().items() if "num_batches" not in key}
    state = fitted_state(foreign.saved[fold], shapes)
    # A copy in float32: what is mapped must not change under a run, and half precision is widened.
    network.load_state_dict({key: value.float().clone() for key, value in state.items()}, strict=False, assign=True)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.num_batches_tracked = None
    return network.eval()
