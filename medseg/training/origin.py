"""The model that a run goes on from: its plan, and its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.dataset import Dataset
from medseg.errors import BadModel, DataWarning
from medseg.io import is_dicom_source
from medseg.labels import is_lateral
from medseg.models import (
    Checkpoint,
    EncoderWeights,
    ModelSpec,
    Recipe,
    StepRecipe,
    is_encoder,
    is_model,
    load_encoder,
    load_models,
    own_network,
)
from medseg.networks import DEEP_SUPERVISION, RUN_ALONE, build_network
from medseg.training.state import load_state

#: Of a UNETR whose weights do not tell which they were trained on.
_USUAL_PATCH = (96, 96, 96)


#: What a run can go on from: a model, or the weights of an encoder alone.
Start = Checkpoint | EncoderWeights


def read_start(name: str) -> Start:
    """The model of a name, a folder or a zip, of several folds the first; or a file of an encoder's
    weights. Raises `BadModel`.
    """
    if is_encoder(Path(name)):
        return load_encoder(Path(name))
    models = load_models([name])
    if not isinstance(models, list):
        raise BadModel(f"{name}: is a set of {len(models.models)} models; go on from one of them")
    if models[0].spec.architecture in RUN_ALONE:
        return own_network(models[0])
    recipe = models[0].spec.recipe
    if recipe is not None and recipe.previous:
        raise BadModel(
            f"{name}: is the second stage of a cascade, which sees the labels of its first one;"
            " go on from its first stage or from a model that needs none"
        )
    return models[0]


def hash_of(start: Start) -> str:
    """By which a run knows its start again."""
    return start.sha256 if isinstance(start, EncoderWeights) else start.spec.sha256


def where_it_lies(start: Start, name: str) -> str:
    """What a config keeps of a start: an archive by its own name, not what it was unpacked to."""
    if isinstance(start, EncoderWeights) or start.spec.recipe is not None:
        return name
    return str(start.folder)


def adopted(start: Start, dataset: Dataset, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a start decides, as dotted settings: the network, and the grid and intensities that a
    model knows. settings: those that a person made, which go over it. Raises `BadModel` if it takes
    other scans.
    """
    if isinstance(start, EncoderWeights):
        return _of_encoder(start, settings)
    spec = start.spec
    if spec.channels != len(dataset.channels):
        raise BadModel(
            f"the model {spec.name} takes {spec.channels} channels and the data have"
            f" {len(dataset.channels)}"
        )
    options = dict(spec.options)
    if spec.architecture in DEEP_SUPERVISION:
        options["deep_supervision"] = True
    intensity = (
        spec.intensity
        if isinstance(spec.intensity, str)
        else [one.model_dump() for one in spec.intensity]
    )
    return {
        "model.name": spec.architecture,
        "model.options": options,
        "model.patch": list(spec.patch),
        "model.spacing_mm": list(spec.spacing),
        "model.grid": spec.grid,
        "model.intensity": intensity,
    } | _of_recipe(spec, dataset)


def _of_encoder(start: EncoderWeights, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The network that an encoder is of, in its size."""
    name = settings.get("model.name", start.architecture)
    if name != start.architecture:
        raise BadModel(
            f"{start.path}: holds the encoder of a {start.architecture}, not of a {name}; --model"
            f" {start.architecture} goes on from it"
        )
    options = dict(start.options)
    if name == "unetr":  # where another patch is asked for, its places are learnt anew
        options["patch"] = list(settings.get("model.patch") or start.patch or _USUAL_PATCH)
    heads = ("model.options", "model.options.num_heads")
    if "num_heads" not in options and not any(key in settings for key in heads):
        raise BadModel(
            f"{start.path}: does not tell how many heads its {options['hidden_size']} features are"
            " shared by; say it with --set model.options.num_heads=N"
        )
    return {"model.name": name, "model.options": options}


def _of_recipe(spec: ModelSpec, dataset: Dataset) -> dict[str, Any]:
    """What the plan of another program decides beside the rest."""
    if spec.recipe is None:
        return {}
    recipe = _for_labels(spec, regions=bool(dataset.regions)).model_dump(mode="json")
    first = dataset.cases[0].images[0] if dataset.cases else None
    if spec.recipe.orientation == "auto" and first is not None and is_dicom_source(first):
        recipe["orientation"] = "LPS"  # as inference turns DICOM
    # Where left and right lie in a scan as it is stored is not known, so structures with a side
    # cannot change places.
    sided = any(is_lateral(label.name) for label in dataset.table.labels)
    settings: dict[str, Any] = {
        "model.recipe": recipe,
        "augment.mirror": [] if sided else list(spec.mirror),
    }
    if spec.patch[0] == 1:  # planes of a 2d network stay planes
        settings |= {"augment.rotation_degrees": [30.0, 0.0, 0.0], "augment.elastic_share": 0.0}
    return settings


def _for_labels(spec: ModelSpec, *, regions: bool) -> Recipe | StepRecipe:
    """A recipe without what it says of labels that are others now: their order, and parts that are
    kept."""
    recipe = spec.recipe
    assert recipe is not None
    if not isinstance(recipe, StepRecipe):
        return recipe
    changes: dict[str, Any] = {"order": (), "inner": (), "outer": ()}
    if regions != spec.regions:
        changes |= {"activation": "sigmoid" if regions else "softmax", "threshold": 0.5}
    return recipe.model_copy(update={"ending": recipe.ending.model_copy(update=changes)})


def start_from(source: Path, network: nn.Module, *, names: Sequence[str], regions: bool) -> None:
    """Give the network the weights of a run (its averages) or of a model, as far as names and
    shapes agree, with the outputs of structures of the same name; of an encoder what has a place
    in the network.

    names: of the structures in the order of the outputs, without background; regions: whether they
    may overlap. A `DataWarning` names what was not loaded: heads for other labels. Raises
    `BadModel` if less than half fits.
    """
    outputs: list[str] | None = None
    least = len(network.state_dict())
    weights = _averages(source)
    # A run that was interrupted has no model yet, which would name its outputs.
    start = None if weights and not is_model(source) else read_start(str(source))
    if isinstance(start, EncoderWeights):
        weights, least = dict(start.tensors), len(start.tensors)
    elif start is not None:
        weights = weights or start.network().state_dict()
        outputs = _outputs_by_name(start, weights, network, names=names, regions=regions)
    own = network.state_dict()
    fitting = {
        key: value for key, value in weights.items() if key in own and own[key].shape == value.shape
    }
    if 2 * len(fitting) < least:
        raise BadModel(
            f"the weights of {source} do not fit this network; it needs one of the same kind and"
            f" size{_first_misfit(weights, own)}"
        )
    new = [key for key in own if key not in fitting]
    network.load_state_dict(fitting, strict=False)
    if outputs is not None:
        _tell_outputs(source, names, outputs)
    if new:
        examples = ", ".join(new[:4]) + (" ..." if len(new) > 4 else "")
        warnings.warn(
            f"{len(fitting)} of {len(own)} tensors were taken from {source}; new are {examples}",
            DataWarning,
            stacklevel=2,
        )


def _first_misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The first tensor that is larger or smaller than needed, in brackets."""
    for key, value in weights.items():
        if key in own and own[key].shape != value.shape:
            stored, wanted = (" x ".join(map(str, one.shape)) for one in (value, own[key]))
            return f" ({key} is {stored}, and {wanted} is needed)"
    return ""


def _averages(run: Path) -> dict[str, Tensor]:
    """The averaged weights that a run has reached; none where the folder is not of a run."""
    if not (run / "state.safetensors").is_file():
        return {}
    tensors, _ = load_state(run / "state.safetensors")
    prefix = "average."
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


@torch.no_grad()
def _outputs_by_name(
    start: Checkpoint,
    weights: dict[str, Tensor],
    network: nn.Module,
    *,
    names: Sequence[str],
    regions: bool,
) -> list[str]:
    """Put outputs for the new structures into `weights`: the old rows where the names are equal,
    fresh ones elsewhere. Returns the names of the structures that were found.
    """
    spec, own = start.spec, network.state_dict()
    before = [_plain(start.table.names[value]) for value in spec.classes[1:]]
    alike = spec.regions == regions  # else a number means another probability
    rows = {n: before.index(_plain(name)) for n, name in enumerate(names) if _plain(name) in before}
    pairs = {new + (not regions): old + (not regions) for new, old in rows.items()} if alike else {}
    if alike and not regions:
        pairs[0] = 0  # the background
    outputs_before, outputs_now = len(before) + (not spec.regions), len(names) + (not regions)
    for key, each in _rows_of_outputs(spec, outputs_before).items():
        if key not in weights or key not in own:
            continue
        old, fresh = weights[key], own[key].clone()
        rest = len(old) - each * outputs_before  # as that of "no object" of mask2former
        if fresh.shape != (each * outputs_now + rest, *old.shape[1:]):
            continue
        for new, former in pairs.items():
            fresh[each * new : each * (new + 1)] = old[each * former : each * (former + 1)]
        if alike and rest:
            fresh[-rest:] = old[-rest:]
        weights[key] = fresh
    return [names[row] for row in rows] if alike else []


def _rows_of_outputs(spec: ModelSpec, outputs: int) -> dict[str, int]:
    """The tensors that hold so many rows for each output and nothing else of it: what grows along
    its first axis alone where the network is built with one more."""
    with torch.device("meta"):
        few, more = (
            build_network(spec.architecture, spec.inputs, count, **spec.options).state_dict()
            for count in (outputs, outputs + 1)
        )
    return {
        key: len(more[key]) - len(value)
        for key, value in few.items()
        if value.ndim and len(more[key]) > len(value) and more[key].shape[1:] == value.shape[1:]
    }


def _plain(name: str) -> str:
    return name.casefold().replace(" ", "_").replace("-", "_")


def _tell_outputs(source: Path, names: Sequence[str], taken: Sequence[str]) -> None:
    fresh = [name for name in names if name not in taken]
    if fresh:
        knowledge = f"knows {', '.join(taken)}" if taken else "knows none of these structures"
        warnings.warn(
            f"{source} {knowledge}; new outputs, which begin at random, are {', '.join(fresh)}",
            DataWarning,
            stacklevel=2,
        )
