"""A foreign nnU-Net model as what medseg runs: a `ModelSpec` with a recipe, a label table, and
checked weights.

Data in, nothing executed: plans and dataset.json are read as JSON, checkpoints through stand-ins
(`nnunet_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadModel
from medseg.models.anatomy import table_of
from medseg.models.coarse import coarsest
from medseg.models.folder import Checkpoint, sha256_of
from medseg.models.nnunet_folder import (
    Found,
    find_model,
    fold_files,
    model_folders,
    postprocessing_file,
    read_postprocessing,
)
from medseg.models.nnunet_plans import (
    Configuration,
    NetworkPlan,
    Outputs,
    Plans,
    configuration,
    read_outputs,
    read_plans,
)
from medseg.models.nnunet_weights import (
    Saved,
    check_finite,
    check_trainer,
    fitted_state,
    has_batch_norm,
    load_saved,
)
from medseg.models.recipe import Recipe
from medseg.models.sets import ModelSet
from medseg.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Datasets of TotalSegmentator, whose program turns scans to RAS before anything else. Most of its
#: tasks are named by a structure and how many subjects they saw, tens at least:
#: Dataset258_lung_vessels_248subj.
_TURNED_SETS = re.compile(r"totalseg|^Dataset\d+_\w+_\d\d+subj(_|\b)", re.IGNORECASE | re.MULTILINE)
#: The folder in which its program keeps its models.
_TURNED_HOME = ".totalsegmentator"


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
    folder: Path,
    *,
    folds: Sequence[str] = (),
    checkpoint: str = "final",
    found: Found | None = None,
) -> Foreign:
    """The model of a folder with plans.json. Raises `BadModel` for all that medseg cannot run
    exactly."""
    outputs = read_outputs(folder / "dataset.json")
    plans = read_plans(folder / "plans.json")
    files = fold_files(folder, folds=folds, checkpoint=checkpoint)
    first = load_saved(files[0])
    note = check_trainer(first)
    plan = configuration(
        plans, _configuration_name(first, folder, plans), len(outputs.channel_names)
    )
    if any(axis >= plan.dimension for axis in first.mirror or ()):
        raise BadModel(
            f"{first.path}: mirrors along {first.mirror}, and {plan.name} has {plan.dimension} axes"
        )
    network = replace(plan.network, norm="batch") if has_batch_norm(first) else plan.network
    recipe = _recipe(folder, plans, plan, outputs=outputs, found=found)
    states = [first, *(load_saved(file) for file in files[1:])]
    for other in states[1:]:
        if other.configuration != first.configuration or other.mirror != first.mirror:
            raise BadModel(
                f"{other.path}: is of another configuration than {first.path}; give one with"
                " --folds"
            )
    return Foreign(
        folder=folder,
        plans=plans,
        configuration=plan,
        outputs=outputs,
        saved=tuple(states),
        recipe=recipe,
        network=network,
        notes=(note,) if note else (),
    )


def _configuration_name(saved: Saved, folder: Path, plans: Plans) -> str:
    """What the checkpoint says; where it says nothing, what the folder's name says, or the only one
    there is."""
    if saved.configuration is not None:
        return saved.configuration
    last = folder.name.split("__")[-1]
    names = list(plans.content["configurations"])
    if last in names:
        return last
    if len(names) == 1:
        return str(names[0])
    raise BadModel(
        f"{saved.path}: does not say which configuration it is, and {plans.path} has"
        f" {', '.join(names)}"
    )


def _recipe(
    folder: Path, plans: Plans, planned: Configuration, outputs: Outputs, found: Found | None
) -> Recipe:
    axes = [2 - axis for axis in plans.transpose]  # nnU-Net counts k, j, i
    names = f"{folder.parent.name}\n{plans.content.get('dataset_name')}"
    turned = (
        plans.reader.endswith("WithReorient")
        or bool(_TURNED_SETS.search(names))
        or _TURNED_HOME in folder.resolve().parts
    )
    logits = planned.logits
    if logits.order > 1 or logits.order_across > 1:
        raise BadModel(
            f"{plans.path}: brings logits back by order {logits.order}, which medseg does not do"
        )
    return Recipe(
        orientation="RAS" if turned else "auto",
        axes=(axes[0], axes[1], axes[2]),  # type: ignore[arg-type]
        spacing_mm=planned.spacing_mm,
        crop="nonzero",
        channels=planned.channels,
        image=planned.image,
        labels=planned.labels,
        logits=logits,
        overlap=0.5 if found is None else found.overlap,
        previous=outputs.foreground if planned.previous_stage else (),
    )


def build(foreign: Foreign, fold: int = 0) -> nn.Module:
    """The network of one fold in evaluation mode, float32. Raises `BadModel` if its weights do not
    fit the plans."""
    network, state = _fitted(foreign, fold)
    # A copy in float32: what is mapped must not change under a run, and half precision is widened.
    network.load_state_dict(
        {key: value.float().clone() for key, value in state.items()}, assign=True
    )
    return network.eval()


def _fitted(foreign: Foreign, fold: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network without weights, and those of a fold under its names."""
    import torch

    from medseg.networks import build_network, check_patch

    outputs = len(foreign.outputs.values) - foreign.outputs.regions
    options = _options(foreign.network)
    try:
        with torch.device("meta"):  # shapes are compared before any memory is taken
            network = build_network("nnunet", foreign.channels, outputs, **options)
        check_patch(network, foreign.configuration.patch)
    except BadModel as error:
        where = f"{foreign.plans.path}: {foreign.configuration.name}"
        raise BadModel(f"{where}: {error}") from None
    state = fitted_state(
        foreign.saved[fold], {key: value.shape for key, value in network.state_dict().items()}
    )
    return network, state


def _options(network: NetworkPlan) -> dict[str, Any]:
    """The network's options as a model's JSON holds them."""
    options = asdict(network)
    for key in ("kernels", "strides"):
        options[key] = [list(three) for three in options[key]]
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
    }


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """One fold of a model of nnU-Net, used as it lies there."""

    foreign: Foreign = field(kw_only=True)
    fold: int = field(kw_only=True)

    @property
    def weight_bytes(self) -> int:
        """Of the weights in half precision, as if they were stored so."""
        return sum(2 * value.numel() for value in self.foreign.saved[self.fold].weights.values())

    @property
    def family(self) -> Path:
        """The folder of the model, which all its folds share."""
        return self.foreign.folder

    def outline(self) -> nn.Module:
        """The network in evaluation mode without memory for its weights. Raises `BadModel`."""
        return _fitted(self.foreign, self.fold)[0].eval()

    def network(self) -> nn.Module:
        """The network in evaluation mode, float32, on the CPU. Raises `BadModel` if the weights do
        not fit it."""
        return build(self.foreign, self.fold)

    def first_stage(self) -> list[Checkpoint]:
        """The models of the configuration that this cascade names. Raises `BadModel` if it is not
        beside it."""
        return list(_first_stage(self.foreign))

    def coarse(self) -> list[Checkpoint]:
        """A model with larger voxels and the same structures beside this one; [] for none."""
        return _coarse_beside(self.foreign)

    def postprocessing(self) -> list[list[int]]:
        """What the model's cross-validation found to be worth it; nnU-Net itself leaves it out when
        it predicts."""
        folds = [_fold_of(saved) for saved in self.foreign.saved]
        path = postprocessing_file(self.foreign.folder, folds)
        return read_postprocessing(path) if path else []


def _coarse_beside(foreign: Foreign) -> list[Checkpoint]:
    """Of the same dataset, or of one beside it. A cascade sees the labels of its whole scan, so it
    has none.
    """
    if foreign.recipe.previous or foreign.configuration.dimension == 2:
        return []
    beside = model_folders(foreign.folder.parent)
    folder = coarsest(beside, [foreign.folder])
    if folder is None and foreign.folder.parent.name.startswith("Dataset"):
        folder = coarsest(model_folders(foreign.folder.parent.parent), [foreign.folder])
    return _coarse_of(folder)


def _coarse_of(folder: Path | None) -> list[Checkpoint]:
    """The checkpoints of a coarse model; [] where it cannot be used, which only makes a run
    longer."""
    try:
        return [] if folder is None else list(checkpoints_of(read_foreign(folder), mirrored=False))
    except BadModel:
        return []


def _first_stage(foreign: Foreign) -> list[ForeignCheckpoint]:
    """The checkpoints of a cascade's first stage, of the same trainer and plans, beside its second;
    of the second's kind, 'best' for example, where the first has that."""
    stage = foreign.configuration.previous_stage
    beside = [folder for folder in model_folders(foreign.folder.parent) if folder != foreign.folder]
    prefix = foreign.folder.name.rsplit("__", 1)[0]
    folder = next((one for one in beside if one.name == f"{prefix}__{stage}"), None)
    if folder is None:
        raise BadModel(
            f"{foreign.folder}: is the second stage of a cascade, and its first,"
            f" {prefix}__{stage}, is not beside it"
        )
    kind = foreign.saved[0].path.stem.removeprefix("checkpoint_")
    there = next(folder.glob(f"fold_*/checkpoint_{kind}.pth"), None) is not None
    return checkpoints_of(read_foreign(folder, checkpoint=kind if there else "final"))


def checkpoints_of(foreign: Foreign, *, mirrored: bool = True) -> list[ForeignCheckpoint]:
    """What medseg runs: one checkpoint a fold.

    Raises `BadModel` if a file cannot be read, or its weights do not fit the plans: before a scan
    is touched.
    """
    table = table_of(foreign.outputs.names)
    checkpoints = []
    for fold, saved in enumerate(foreign.saved):
        check_finite(saved, _fitted(foreign, fold)[1])
        digest = sha256_of(saved.path)
        spec = _spec(foreign, digest, saved, mirrored=mirrored)
        checkpoints.append(
            ForeignCheckpoint(spec, table, foreign.folder, foreign=foreign, fold=fold)
        )
    return checkpoints


def _spec(foreign: Foreign, digest: str, saved: Saved, *, mirrored: bool) -> ModelSpec:
    plan, outputs = foreign.configuration, foreign.outputs
    own, *others = plan.spacing_mm
    spacing = [min(max(mm, 0.011), 29.9) for mm in (own or others[0], *others)]
    flat = plan.dimension == 2
    mirror = tuple(axis + flat for axis in foreign.mirror) if mirrored else ()
    return ModelSpec.model_validate(
        {
            "name": _name(foreign),
            "description": f"{foreign.trainer}, {foreign.plans.name}, {plan.name}, of nnU-Net",
            "architecture": "nnunet",
            "options": _options(foreign.network),
            "channels": len(outputs.channel_names),
            "channel_names": outputs.channel_names,
            "classes": outputs.values,
            "patch": plan.patch,
            "spacing_mm": tuple(spacing),
            "regions": outputs.regions,
            "mirror": mirror,
            "recipe": foreign.recipe,
            "sha256": digest,
            "card": {
                "made_by": "nnU-Net v2",
                "trainer": foreign.trainer,
                "plans": foreign.plans.name,
                "configuration": plan.name,
                "fold": _fold_of(saved),
                "checkpoint": saved.path.stem,
                "reader": foreign.plans.reader,
                "notes": list(foreign.notes),
            },
        }
    )


def _fold_of(saved: Saved) -> str:
    return saved.path.parent.name.removeprefix("fold_")


def _name(foreign: Foreign) -> str:
    name = foreign.plans.content.get("dataset_name")
    if isinstance(name, str) and name.strip():
        return name
    return foreign.folder.parent.name if "__" in foreign.folder.name else foreign.folder.name


def load_nnunet(
    path: Path, *, folds: Sequence[str] = (), checkpoint: str = "final"
) -> list[ForeignCheckpoint] | ModelSet:
    """The folds of the model that a path means, or its set of parts. Raises `BadModel` naming what
    is wrong.

    folds: '0', 'all'; by default all there are. checkpoint: 'final', 'best' or 'latest'.
    """
    source = find_model(path)
    fold_names = tuple(folds) or source.folds
    models = [
        checkpoints_of(
            read_foreign(part.folder, folds=fold_names, checkpoint=checkpoint, found=source),
            mirrored=source.mirrored,
        )
        for part in source.parts
    ]
    if not source.several:
        return models[0]
    labels: list[dict[int, int]] = []
    names: dict[int, str] = dict(source.names or {})
    for part, model in zip(source.parts, models):
        own = part.labels
        if own is None:  # one after the other, as TotalSegmentator counts them
            start = max((value for one in labels for value in one.values()), default=0)
            own = {
                value: start + number
                for number, value in enumerate(sorted(model[0].table.values), 1)
            }
            names |= {out: model[0].table.names[value] for value, out in own.items()}
        if set(own) != set(model[0].table.values):
            raise BadModel(
                f"{part.folder}: the set's table and dataset.json do not name the same labels"
            )
        labels.append(own)
    return ModelSet(
        name=path.name,
        models=tuple(map(tuple, models)),
        labels=tuple(labels),
        table=table_of(names),
        coarse=lambda: _coarse_of(coarsest(source.others, [part.folder for part in source.parts])),
    )
