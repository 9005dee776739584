"""A MONAI bundle as what medseg runs: a `ModelSpec` with a recipe, a label table, and checked
weights.

Data in, nothing executed: the config is read as JSON or YAML (`bundle_config`), each part of it
that decides the labels by an allow-list (`bundle_parts`, `bundle_steps`, `bundle_ending`), and only
then are weights loaded, as plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from medseg.errors import BadFile, BadModel
from medseg.files import read_text
from medseg.models.anatomy import table_of
from medseg.models.archives import names_in, unpacked
from medseg.models.bundle_config import Config, config_file, read_config
from medseg.models.bundle_ending import Decision, read_ending
from medseg.models.bundle_parts import Network, read_inferer, read_network
from medseg.models.bundle_steps import read_steps
from medseg.models.folder import sha256_of
from medseg.models.spec import ModelSpec
from medseg.models.steps import Crop, Space, StepRecipe
from medseg.models.weights import WeightsCheckpoint, bare_network, fitted, load_plain, state_of
from medseg.text import harmless, read_json

#: Files of a bundle that are taken out of a zip, by the folder that they lie in.
_CONFIGS = ("inference.json", "inference.yaml", "inference.yml", "metadata.json")
#: Most characters of a licence that are kept.
_MAX_LICENCE = 20_000
#: Longest name of a file, with its folders.
_MAX_PATH = 1000
_BACKGROUND = ("background", "backgound", "bg", "unlabeled", "unlabelled", "clear", "none")


def is_bundle(path: Path) -> bool:
    """Whether a path holds a bundle of MONAI, a folder or a zip, judged by names alone."""
    if path.is_file():
        return path.suffix.lower() == ".zip" and _has_config(names_in(path))
    return path.is_dir() and _root(path) is not None


def _has_config(names: Sequence[str]) -> bool:
    parts = [PurePosixPath(name).parts for name in names]
    return any(len(p) in (2, 3) and p[-2] == "configs" and p[-1] in _CONFIGS[:3] for p in parts)


def _root(folder: Path) -> Path | None:
    """The folder with `configs`: this one, or the only one in it, as in the zips of the zoo."""
    if config_file(folder):
        return folder
    try:
        inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    except OSError:
        return None
    inner = [entry for entry in inner if not entry.is_symlink() and config_file(entry)]
    return inner[0] if len(inner) == 1 else None


def _is_needed(parts: tuple[str, ...]) -> bool:
    """Whether an entry of a zip is taken out: configs, weights that are no code, and what says what
    may be done with them."""
    folder, name = (parts[-2] if len(parts) > 1 else "", parts[-1])
    if folder == "configs":
        return name in _CONFIGS
    return (
        name.endswith((".pt", ".pth"))
        or name.upper().startswith("LICENSE")
        or (folder == "docs" and name.endswith((".txt", ".md")))
    )


def _nothing(names: Sequence[str], path: Path) -> BadModel | None:
    return None if _has_config(names) else BadModel(f"{path}: holds no bundle of MONAI")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle, read and checked, but for its weights."""

    folder: Path
    config: Config
    network: Network
    recipe: StepRecipe
    patch: tuple[int, int, int]
    decision: Decision
    metadata: Mapping[str, Any]
    weights: Path


def load_bundle(path: Path) -> list[WeightsCheckpoint]:
    """The model of a bundle, a folder or a zip. Raises `BadModel` naming what medseg does not run:
    before weights are read, and before a scan is touched."""
    root = unpacked(path, is_needed=_is_needed, nothing=_nothing) if path.is_file() else path
    folder = _root(root)
    if folder is None:
        raise BadModel(f"{path}: holds no bundle of MONAI (configs/inference.json)")
    bundle = read_bundle(folder, shown=path)
    return [_checkpoint(bundle, path)]


def read_bundle(folder: Path, *, shown: Path | None = None) -> Bundle:
    """What a bundle's config says, checked. shown: the path that messages name. Raises
    `BadModel`."""
    file = config_file(folder)
    assert file is not None
    config = read_config(file)
    network = read_network(config)
    inferer = read_inferer(config)
    steps = read_steps(config)
    resampled = any(isinstance(step, Space | Crop) for step in steps)
    grids = [step for step in steps if isinstance(step, Space)]
    decision = read_ending(
        config,
        network.outputs,
        resampled=resampled,
        cropped=any(isinstance(step, Crop) for step in steps),
        nearest=bool(grids) and all(step.nearest for step in grids),
    )
    weights = _weights_file(config, folder)
    try:
        recipe = StepRecipe(
            steps=steps,
            inputs=network.inputs,
            whole=inferer.whole,
            overlap=inferer.overlap,
            weights=inferer.weights,
            sigma_scale=inferer.sigma_scale,
            padding=inferer.padding,  # type: ignore[arg-type]
            padding_value=inferer.padding_value,
            ending=decision.ending(),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise config.refuse(
            f"its steps make no way that medseg runs: {where} {first['msg']}"
        ) from None
    return Bundle(
        folder=folder,
        config=config,
        network=network,
        recipe=recipe,
        patch=inferer.roi,
        decision=decision,
        metadata=_metadata(folder),
        weights=weights,
    )


def _metadata(folder: Path) -> Mapping[str, Any]:
    path = folder / "configs" / "metadata.json"
    if not path.is_file():
        return {}
    content = read_json(path, BadModel, last_wins=True)
    if not isinstance(content, dict):
        raise BadModel(f"{path}: is no table of facts; fetch the bundle again")
    return content


def _loader(config: Config) -> Mapping[str, Any]:
    """What the config says of the file of its weights: of the first `CheckpointLoader` that is
    not disabled."""
    loaders = [config.tree.get("checkpointloader")]
    handlers = config.followed(config.tree.get("handlers"), "handlers")
    loaders += handlers if isinstance(handlers, list) else []
    for loader in loaders:
        loader = config.followed(loader, "checkpointloader")
        target = loader.get("_target_") if isinstance(loader, dict) else None
        named = isinstance(target, str) and target.split(".")[-1] == "CheckpointLoader"
        if named and loader.get("_disabled_") is not True:
            return dict(loader)
    return {}


def _state_keys(config: Config) -> tuple[str, ...]:
    """Under which key of a file the weights of the network may lie: first that which the config
    names."""
    objects = config.followed(_loader(config).get("load_dict"), "load_dict")
    names = [
        key
        for key, value in (objects.items() if isinstance(objects, dict) else ())
        if isinstance(value, str) and value.removeprefix("$").strip() == "@network"
    ]
    return (*names, "model", "state_dict", "network", "net")


def _weights_file(config: Config, folder: Path) -> Path:
    """Where the config says that its weights lie, inside of the bundle."""
    name = config.value(_loader(config).get("load_path", "models/model.pt"), "load_path")
    if not isinstance(name, str) or "\0" in name or len(name) > _MAX_PATH:
        raise config.refuse(f"load_path is {name!r:.80}, which is no file's name")
    place = folder / PurePosixPath(name.replace("\\", "/"))
    try:
        inside, there = place.resolve().is_relative_to(folder.resolve()), place.is_file()
    except OSError:  # longer than a file's name may be
        inside = there = False
    if not inside or ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise config.refuse(
            f"load_path {name!r:.80} leads out of the bundle; medseg does not go there"
        )
    if not there:
        raise BadModel(f"{place}: is missing; fetch the whole bundle with its weights")
    return place


def _checkpoint(bundle: Bundle, path: Path) -> WeightsCheckpoint:
    names, values = _outputs(bundle)
    spec = _spec(bundle, path, values)
    try:
        network = bare_network(spec)
    except BadModel as error:
        raise bundle.config.refuse(f"network_def: {error}") from None
    content = load_plain(bundle.weights)
    state = state_of(content, _state_keys(bundle.config), bundle.weights)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    weights = fitted(state, shapes, bundle.weights, name_of=lambda key: f"network.{key}")
    spec = spec.model_copy(update={"sha256": sha256_of(bundle.weights)})
    return WeightsCheckpoint(spec, table_of(names), bundle.folder, weights=weights)


def _outputs(bundle: Bundle) -> tuple[dict[int, str], tuple[int, ...]]:
    """Names by label, and the label of each output (of regions in the order in which they are
    painted), background first."""
    decision, count = bundle.decision, bundle.network.outputs
    channels = _channel_names(bundle.metadata, "outputs")

    def named(output: int, value: int) -> str:
        return channels.get(output, "").strip() or f"label {value}"

    if not decision.regions:
        first = channels.get(0, "background").strip().casefold()
        if first.replace("_", " ") not in _BACKGROUND:
            raise bundle.config.refuse(
                f"output 0 is called {first!r:.60} in metadata.json, and 0 means background in its"
                " labels"
            )
        values = decision.labels
        return {value: named(n, value) for n, value in enumerate(values) if n}, values
    order, labels = decision.order or tuple(range(count)), decision.labels
    return {v: named(output, v) for output, v in zip(order, labels)}, (0, *labels)


def _channel_names(metadata: Mapping[str, Any], side: str) -> dict[int, str]:
    """Number to name of the channels of the network's inputs or outputs, as far as told."""
    data_format: Any = metadata.get("network_data_format")
    data_format = data_format.get(side) if isinstance(data_format, dict) else None
    first = next(iter(data_format.values()), None) if isinstance(data_format, dict) else None
    if isinstance(data_format, dict) and "pred" in data_format:
        first = data_format["pred"]
    table = first.get("channel_def") if isinstance(first, dict) else None
    if not isinstance(table, dict):
        return {}
    return {
        int(key): str(name)
        for key, name in table.items()
        if str(key).isdecimal() and len(str(key)) < 6 and isinstance(name, str | int | float)
    }


def _spec(bundle: Bundle, path: Path, values: tuple[int, ...]) -> ModelSpec:
    network, recipe, facts = bundle.network, bundle.recipe, bundle.metadata
    inputs = _channel_names(facts, "inputs")
    names = tuple(inputs.get(n, "") for n in range(network.inputs))
    title = facts.get("name")
    spacing = [1.0 if mm is None else min(max(mm, 0.011), 29.9) for mm in recipe.spacing_mm]
    try:
        return ModelSpec.model_validate(
            {
                "name": _text(title) or path.stem,
                "description": _text(facts.get("description")) or "a bundle of MONAI",
                "architecture": "bundle",
                "options": {"network": network.name, "arguments": network.arguments},
                "channels": network.inputs,
                "channel_names": names if network.inputs > 1 and all(names) else (),
                "classes": values,
                "patch": bundle.patch,
                "spacing_mm": tuple(spacing),
                "regions": bundle.decision.regions,
                "recipe": recipe,
                "sha256": "0" * 64,
                "card": _card(bundle),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bundle.config.refuse(f"{where}: {first['msg']}") from None


def _card(bundle: Bundle) -> dict[str, Any]:
    """What is to be kept of a bundle: who made it, when, and what may be done with it."""
    facts = bundle.metadata
    keys = ("version", "authors", "copyright", "intended_use", "data_source", "monai_version")
    card: dict[str, Any] = {"made_by": "MONAI bundle", "network": bundle.network.name}
    card |= {key: text for key in keys if (text := _text(facts.get(key)))}
    card |= licences(bundle.folder)
    card["notes"] = list(bundle.decision.notes)
    return card


def licences(folder: Path) -> dict[str, str]:
    """The licences of a model's weights and of its data, as files beside it say them."""
    places = {
        "license": ("LICENSE", "LICENSE.txt", "LICENSE.md", "license.txt", "LICENCE"),
        "data_license": ("docs/data_license.txt", "docs/data_license.md", "data_license.txt"),
    }
    texts = {}
    for key, names in places.items():
        for name in names:
            if (folder / name).is_file():
                try:
                    text = read_text(folder / name, max_bytes=1 << 20)
                except BadFile as error:
                    raise BadModel(str(error)) from None
                texts[key] = "\n".join(harmless(line) for line in text.strip().splitlines())
                texts[key] = texts[key][:_MAX_LICENCE]
                break
    return texts


def _text(value: Any) -> str:
    return harmless(value.strip())[:2000] if isinstance(value, str) else ""
