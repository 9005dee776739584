"""Models of other programs in medseg's own form, and what there is to say of a model.

A set of models is a folder with `set.json` (the folders of its models and the set's label for each
of theirs) and the set's `labels.csv`; several folds are folders `fold_*`; a cascade's first stage
is the folder `first_stage`.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadModel, BadOutput
from medseg.files import TEMPORARY, atomic_write
from medseg.labels import LabelTable
from medseg.models.folder import (
    COARSE,
    FIRST_STAGE,
    FOLD,
    Checkpoint,
    load_checkpoints,
    save_checkpoint,
)
from medseg.models.recipe import Recipe
from medseg.models.sets import ModelSet

if TYPE_CHECKING:
    from medseg.models.spec import ModelSpec

#: The file that says which models are a set.
SET_FILE = "set.json"


def write_models(models: Sequence[Checkpoint] | ModelSet, target: Path) -> None:
    """Write models in medseg's own form, weights in float32, whole or not at all. Raises
    `BadOutput`, `BadModel`.

    The folder must not exist, or be empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadOutput(f"{target}: is there already; choose another name for the model")
    folder = target.resolve().parent / f"{TEMPORARY}{secrets.token_hex(12)}"
    try:
        folder.mkdir(parents=True)
        if isinstance(models, ModelSet):
            _write_set(models, folder)
        else:
            _write_folds(models, folder)
            _write_coarse(models[0].coarse(), folder)
        if target.exists():
            target.rmdir()
        folder.replace(target)
    except OSError as error:
        raise BadOutput(
            f"{target}: cannot be written ({error.strerror}); choose another place"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_set(models: ModelSet, folder: Path) -> None:
    names = [f"part_{number}" for number in range(1, len(models.models) + 1)]
    for name, checkpoints in zip(names, models.models):
        _write_folds(checkpoints, folder / name)
    models.table.write(folder / "labels.csv")
    labels = [{str(own): out for own, out in one.items()} for one in models.labels]
    content = {"format": "medseg-set-1", "name": models.name, "models": names, "labels": labels}
    with atomic_write(folder / SET_FILE) as handle:
        handle.write((json.dumps(content, indent=1) + "\n").encode())
    _write_coarse(models.coarse(), folder)


def _write_coarse(coarse: Sequence[Checkpoint], folder: Path) -> None:
    if coarse:
        _write_folds(coarse, folder / COARSE)


def _write_folds(checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    for number, one in enumerate(checkpoints):
        place = folder if len(checkpoints) == 1 else folder / f"{FOLD}{number}"
        spec = one.spec.model_dump(exclude={"sha256"})
        groups = one.postprocessing()
        spec["card"] = spec["card"] | {"source_sha256": one.spec.sha256}
        if groups:
            spec["card"]["postprocessing"] = groups
        save_checkpoint(place, spec, dict(one.network().state_dict()), table=one.table, half=False)
    recipe = checkpoints[0].spec.recipe
    if recipe is not None and recipe.previous:
        _write_folds(checkpoints[0].first_stage(), folder / FIRST_STAGE)


def read_set(folder: Path) -> ModelSet:
    """The set of models in a folder that `write_models` wrote. Raises `BadModel`."""
    path = folder / SET_FILE
    title, names, tables = _read_set_file(path)
    models = tuple(tuple(load_checkpoints(str(folder / name))) for name in names)
    table = LabelTable.read(folder / "labels.csv")
    for checkpoints, own in zip(models, tables):
        if set(own) != set(checkpoints[0].spec.classes[1:]) or not set(own.values()) <= set(
            table.values
        ):
            raise BadModel(
                f"{path}: its labels are not those of its models; convert the models again"
            )
    there = (folder / COARSE).is_dir()
    coarse = partial(load_checkpoints, str(folder / COARSE)) if there else list
    return ModelSet(name=title, models=models, labels=tables, table=table, coarse=coarse)


def _read_set_file(path: Path) -> tuple[str, list[str], tuple[dict[int, int], ...]]:
    """The set's name, the folders of its models, and the set's label for each of theirs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, labels = content["models"], content["labels"]
        tables = tuple({int(own): int(out) for own, out in one.items()} for one in labels)
        inside = all(_is_part_folder(name) for name in names)
        title = str(content["name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadModel(f"{path}: is damaged; convert the models again") from None
    if not inside or len(names) != len(tables) or not names:
        raise BadModel(f"{path}: is damaged; convert the models again")
    return title, names, tables


def _is_part_folder(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("part_") and "/" not in name


def facts_of(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What there is to say of a model, for people and for JSON."""
    spec = checkpoints[0].spec
    facts: dict[str, Any] = {"name": spec.name, "about": spec.description}
    card = spec.card
    for key in ("made_by", "version", "authors", "trainer", "plans", "configuration"):
        if card.get(key) and (key != "made_by" or spec.architecture != "nnunet"):
            facts[key] = card[key]
    for key in ("license", "data_license"):
        if card.get(key):
            facts[key] = first_line(card[key])
    if card.get("fold") is not None:
        facts["folds"] = [one.spec.card.get("fold") for one in checkpoints]
        facts["checkpoint"] = card.get("checkpoint")
    facts |= {
        "network": _network(spec),
        "channels": list(spec.channel_names) or spec.channels,
        "labels": {str(value): name for value, name in checkpoints[0].table.names.items()},
        "patch": list(spec.patch),
        "spacing_mm": list(spec.recipe.spacing_mm if spec.recipe else spec.spacing),
        "mirrored_axes": list(spec.mirror),
        "weights_bytes": sum(one.weight_bytes for one in checkpoints),
        "weights_sha256": [one.spec.sha256 for one in checkpoints],
    }
    if spec.recipe is not None:
        if isinstance(spec.recipe, Recipe):
            facts["axes"] = list(spec.recipe.axes)
        facts["orientation"] = spec.recipe.orientation
        facts["overlapping_regions"] = spec.regions
        facts["first_stage"] = bool(spec.recipe.previous)
        facts["postprocessing"] = checkpoints[0].postprocessing()
        facts["notes"] = list(card.get("notes", []))
    return facts


def first_line(text: Any) -> str:
    """The first line of a licence that says something."""
    lines = (line.strip() for line in str(text).splitlines())
    return next((line for line in lines if line), "")[:200]


def _network(spec: ModelSpec) -> str:
    if spec.architecture == "bundle":
        return str(spec.options.get("network"))
    if spec.architecture != "nnunet":
        return spec.architecture
    kind = "ResidualEncoderUNet" if spec.options.get("residual") else "PlainConvUNet"
    return f"{kind}, features {', '.join(map(str, spec.options.get('features', [])))}"
