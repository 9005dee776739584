"""Checkpoints of MONAI's Auto3DSeg, as the Slicer extension MONAIAuto3DSeg publishes them:
`model.pt`, in which a config of plain values lies beside the weights, and `labels.csv`.

The network is medseg's `segresnet`; the order of steps is the extension's
(`auto3dseg_segresnet_inference.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from medseg.errors import BadFile, BadModel
from medseg.labels import LabelTable
from medseg.models.anatomy import table_of
from medseg.models.archives import names_in, unpacked
from medseg.models.bundle import licences
from medseg.models.bundle_parts import HOMES, network_of
from medseg.models.folder import sha256_of
from medseg.models.recipe import is_number
from medseg.models.spec import ModelSpec
from medseg.models.steps import Crop, Curve, Ending, Range, Space, Standard, StepRecipe, Turn
from medseg.models.weights import WeightsCheckpoint, bare_network, fitted, load_plain, state_of
from medseg.text import harmless

#: Voxels kept around what is above 0, by how much windows overlap, and between which parts of the
#: resolution a spacing stays as it is: the extension's own numbers.
_MARGIN, _OVERLAP, _SPACING_RANGE = 10, 0.625, (0.75, 1.25)
#: Normalisations -> what is done with a channel after it is brought into its range.
_MODES = ("range", "ct", "meanstd", "mri", "meanstdtanh", "pet", "none")
_FOLDERS = 2  # how deep below what is named the model may lie


def is_auto3dseg(path: Path) -> bool:
    """Whether a path holds a checkpoint of Auto3DSeg, a folder, a zip or `model.pt` itself, judged
    by names alone."""
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return _has_model([PurePosixPath(name).name for name in names_in(path)])
        return path.suffix.lower() == ".pt"
    return path.is_dir() and _model_file(path) is not None


def _has_model(names: Sequence[str]) -> bool:
    return "model.pt" in names and "labels.csv" in names


def _model_file(folder: Path) -> Path | None:
    """The one `model.pt` in a folder or not far below it; beside it lies `labels.csv`."""
    files = []
    for depth in range(_FOLDERS + 1):
        files += sorted(folder.glob("*/" * depth + "model.pt"))
    files = [path for path in files if (path.parent / "labels.csv").is_file()]
    alone = [folder / "model.pt"] if (folder / "model.pt").is_file() else []
    return files[0] if len(files) == 1 else next(iter(alone), None)


def _is_needed(parts: tuple[str, ...]) -> bool:
    return parts[-1] in ("model.pt", "labels.csv") or parts[-1].upper().startswith("LICENSE")


def _nothing(names: Sequence[str], path: Path) -> BadModel | None:
    if _has_model([PurePosixPath(name).name for name in names]):
        return None
    return BadModel(f"{path}: holds no model of Auto3DSeg (model.pt and labels.csv)")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The config of a checkpoint, each value taken by name and checked."""

    path: Path
    content: Mapping[str, Any]

    def refuse(self, what: str) -> BadModel:
        """The error for something that the config says."""
        return BadModel(f"{self.path}: {harmless(what)}")

    def flag(self, name: str, default: bool) -> bool:
        """A truth."""
        value = self.content.get(name, default)
        if type(value) is not bool:
            raise self.refuse(
                f"its config has {name} {value!r:.60}, which is neither true nor false"
            )
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """So many finite numbers."""
        value = self.content.get(name)
        several = list(value) if isinstance(value, list | tuple) else []
        if len(several) != count or not all(map(is_number, several)):
            raise self.refuse(
                f"its config has {name} {value!r:.60} where {count} numbers are needed"
            )
        return tuple(float(n) for n in several)


def load_auto3dseg(path: Path) -> list[WeightsCheckpoint]:
    """The model of a checkpoint, a folder or zip of it. Raises `BadModel` naming what medseg does
    not run."""
    file: Path | None = path
    if path.is_dir():
        file = _model_file(path)
    elif path.suffix.lower() == ".zip":
        file = _model_file(unpacked(path, is_needed=_is_needed, nothing=_nothing))
    if file is None:
        raise BadModel(f"{path}: holds several models of Auto3DSeg, or none; name one of them")
    table_file = file.parent / "labels.csv"
    if not table_file.is_file():
        raise BadModel(
            f"{table_file}: is missing, and without it nobody knows what labels mean; fetch the"
            " whole model"
        )
    content = load_plain(file)
    config = content.get("config")
    if not isinstance(config, dict) or not isinstance(content.get("state_dict"), dict):
        raise BadModel(
            f"{file}: holds no config beside its weights; it is not a checkpoint of Auto3DSeg"
        )
    settings = _Settings(path=file, content=config)
    spec, table = _spec(settings, path, _read_table(table_file))
    try:
        network = bare_network(spec)
    except BadModel as error:
        raise settings.refuse(f"its config makes no network: {error}") from None
    last = max(
        int(n) for n in re.findall(r"network\.up_layers\.(\d+)\.", " ".join(network.state_dict()))
    )

    def medseg_name(key: str) -> str | None:
        head = re.fullmatch(r"up_layers\.(\d+)\.head\.(weight|bias)", key)
        if head is None:
            return f"network.{key}"
        return f"head.{head[2]}" if int(head[1]) == last else None

    state = state_of(content, ("state_dict",), file)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    weights = fitted(state, shapes, file, name_of=medseg_name)
    spec = spec.model_copy(update={"sha256": sha256_of(file)})
    return [WeightsCheckpoint(spec, table, file.parent, weights=weights)]


def _read_table(path: Path) -> LabelTable:
    try:
        return LabelTable.read(path)
    except BadFile as error:
        raise BadModel(str(error)) from None


def _spec(settings: _Settings, path: Path, table: LabelTable) -> tuple[ModelSpec, LabelTable]:
    options, inputs, outputs = _network(settings)
    regions = settings.flag("sigmoid", False)
    modes, names = _modes(settings, inputs)
    tumours = "brats" in f"{path.name} {settings.path.parent.name}".casefold()
    order, values = _regions(settings, outputs, table, tumours=tumours) if regions else ((), ())
    classes = (0, *values) if regions else tuple(range(outputs))
    whole_head = "whole-head" in f"{path.name} {settings.path.parent.name}".casefold()
    roi = settings.numbers("roi_size", 3)
    spacing = settings.content.get("resample_resolution")
    millimetres = (1.0, 1.0, 1.0) if spacing is None else settings.numbers("resample_resolution", 3)
    try:
        recipe = StepRecipe(
            steps=_steps(settings, modes, tumours=tumours),
            inputs=inputs,
            overlap=_OVERLAP,
            weights="gaussian",
            ending=Ending(
                activation="sigmoid" if regions else "softmax",
                order=order,
                outer=classes[1:] if whole_head and not regions else (),
                parts=2 if whole_head else 1,
            ),
        )
        spec = ModelSpec.model_validate(
            {
                "name": path.stem if path.is_file() else path.resolve().name,
                "description": "a checkpoint of MONAI's Auto3DSeg",
                "architecture": "segresnet",
                "options": options,
                "channels": inputs,
                "channel_names": names,
                "classes": classes,
                "patch": tuple(int(n) for n in roi),
                "spacing_mm": tuple(min(max(mm, 0.011), 29.9) for mm in millimetres),
                "regions": regions,
                "recipe": recipe,
                "sha256": "0" * 64,
                "card": {
                    "made_by": "MONAI Auto3DSeg",
                    "network": "SegResNetDS",
                    **licences(settings.path.parent),
                    "notes": [],
                },
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise settings.refuse(f"its config makes no model: {where}: {first['msg']}") from None
    return spec, _named(table, classes[1:])


def _named(table: LabelTable, values: Sequence[int]) -> LabelTable:
    """The structures of a model in the table's order; those that it leaves out are called by their
    numbers."""
    labels = [label for label in table.labels if label.value in values]
    left = {value: f"label {value}" for value in values if value not in table}
    return LabelTable((*labels, *table_of(left).labels))


def _network(settings: _Settings) -> tuple[dict[str, Any], int, int]:
    """Options of `segresnet`, and the network's channels in and out."""
    raw = settings.content.get("network")
    if not isinstance(raw, dict):
        raise settings.refuse("its config names no network")
    target = raw.get("_target_")
    if target not in {f"{home}SegResNetDS" for home in ("", *HOMES["network"])}:
        raise settings.refuse(
            f"its config wants the network {target!s:.80}, which medseg does not run; it knows"
            " SegResNetDS"
        )
    arguments = {key: value for key, value in raw.items() if key != "_target_"}
    for key in ("_requires_", "_desc_"):
        arguments.pop(key, None)
    plain = network_of("SegResNetDS", arguments, settings.refuse)
    left = dict(plain.arguments)
    left.pop("dsdepth", None)  # coarser outputs, for training
    activation = left.get("act")
    if isinstance(activation, list | tuple) and len(activation) == 2:
        name, more = activation
        if isinstance(more, dict) and more.keys() <= {"inplace"}:  # where it is computed
            left["act"] = name
    for key, values in (
        ("act", ("relu", "RELU", "ReLU")),
        ("preprocess", (None,)),
        ("upsample_mode", ("deconv",)),
        ("blocks_up", (None,)),
    ):
        if left.pop(key, values[0]) not in values:
            raise settings.refuse(
                f"its network has {key} {arguments[key]!r:.60}; medseg knows none"
            )
    options: dict[str, Any] = {"norm": "batch", "own_norms": True}
    for key in ("init_filters", "blocks_down", "norm", "resolution"):
        if left.get(key) is not None:
            value = left[key]
            options[key] = list(value) if isinstance(value, tuple) else value
        left.pop(key, None)
    if left:
        raise settings.refuse(f"its network has {next(iter(left))}, which medseg does not know")
    options.setdefault("blocks_down", [1, 2, 2, 4])
    return options, plain.inputs, plain.outputs


def _modes(settings: _Settings, inputs: int) -> tuple[list[str], tuple[str, ...]]:
    """How each channel is scaled, and what it is."""
    first = settings.content.get("normalize_mode")
    extra = settings.content.get("extra_modalities")
    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        extra = dict(extra) if _are_pairs(extra) else None
    if extra is None:
        raise settings.refuse("its config has extra_modalities that are no names with modes")
    modes = [first, *extra.values()] if extra else [first] * inputs
    for mode in modes:
        if mode not in _MODES:
            raise settings.refuse(
                f"its config scales intensities by {mode!r:.60}; medseg knows {', '.join(_MODES)}"
            )
    if len(modes) != inputs:
        raise settings.refuse(
            f"its network reads {inputs} channels, and its config scales {len(modes)}"
        )
    own = settings.content.get("modality")
    names = (own if isinstance(own, str) and own.strip() else "image", *map(str, extra))
    distinct = len(names) == inputs > 1 and len(set(names)) == inputs and all(names)
    return [str(mode) for mode in modes], tuple(map(harmless, names)) if distinct else ()


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 for one in value
    )


def _steps(settings: _Settings, modes: Sequence[str], *, tumours: bool) -> tuple[Any, ...]:
    """What is done to a scan, in the extension's order; with brain tumours (BraTS) it scales
    last."""
    scaling: list[Any] = []
    for channel, mode in enumerate(modes):
        scaling += _scaling(settings, mode, (channel,) if len(modes) > 1 else None)
    grid: list[Any] = []
    if settings.flag("orientation_ras", False):
        grid.append(Turn(orientation="RAS"))
    if settings.flag("crop_foreground", True):
        grid.append(Crop(margin=(_MARGIN, _MARGIN, _MARGIN)))
    if settings.content.get("resample_resolution") is not None:
        a, b, c = settings.numbers("resample_resolution", 3)
        if not all(0.01 < mm < 1000 for mm in (a, b, c)):
            raise settings.refuse(f"its config has a resolution of {a:g} x {b:g} x {c:g} mm")
        low, high = ((a * n, b * n, c * n) for n in _SPACING_RANGE)
        grid.append(Space(spacing_mm=(a, b, c), low_mm=low, high_mm=high))
    return tuple(grid + scaling if tumours else scaling + grid)


def _scaling(settings: _Settings, mode: str, channels: tuple[int, ...] | None) -> list[Any]:
    if mode in ("range", "ct"):
        low, high = settings.numbers("intensity_bounds", 2)
        if low == high:
            raise settings.refuse("its intensity_bounds are equal")
        return [
            Range(low=low, high=high, to_low=-1, to_high=1, channels=channels),
            Curve(function="logistic", channels=channels),
        ]
    if mode in ("meanstd", "mri", "meanstdtanh"):
        steps: list[Any] = [Standard(nonzero=True, each=channels is None, channels=channels)]
        if mode == "meanstdtanh":
            steps.append(Curve(function="tanh", channels=channels))
        return steps
    return [Curve(function="counts", channels=channels)] if mode == "pet" else []


def _regions(
    settings: _Settings, outputs: int, table: LabelTable, tumours: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The outputs in the order in which their regions are painted, and the label of each.

    The config's `class_index` lists the labels that each region is made of: what is in it and in no
    later, smaller one is its own. Of BraTS, where the config does not say, the whole tumour lies
    below the core, and that below what enhances, as in the extension.
    """
    groups = settings.content.get("class_index")
    if isinstance(groups, list | tuple) and len(groups) == outputs:
        sets = [
            {n for n in (one if isinstance(one, list | tuple) else [one]) if type(n) is int}
            for one in groups
        ]
        order = sorted(range(outputs), key=lambda n: -len(sets[n]))
        own = [
            sets[n] - set().union(*(sets[m] for m in order[i + 1 :])) for i, n in enumerate(order)
        ]
        if not all(len(one) == 1 for one in own):
            raise settings.refuse(
                f"its class_index {groups!r:.80} does not say which label each region has alone"
            )
        return tuple(order), tuple(next(iter(one)) for one in own)
    if tumours and outputs == 3 and set(table.values) == {1, 2, 3}:
        return (0, 1, 2), (2, 1, 3)
    return (), tuple(range(1, outputs + 1))
