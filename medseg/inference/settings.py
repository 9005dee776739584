"""What a scan is segmented with: settings, models and channels, checked before anything is
computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg.errors import BadConfig, BadModel
from medseg.inference.untrained import UNTRAINED
from medseg.volume import Volume

if TYPE_CHECKING:
    from typing import TypeGuard

    from medseg.labels import LabelTable
    from medseg.models import Checkpoint, ModelSet, ModelSpec


#: One checkpoint, several of the same task whose logits are averaged, a set of models whose labels
#: are laid over each other, or the name of an intensity model.
Model: TypeAlias = "Checkpoint | Sequence[Checkpoint] | ModelSet | str"
#: One scan, or one for each of the model's channels, in its order and on one grid.
Scans: TypeAlias = Volume | Sequence[Volume]


#: The largest share by which windows may overlap.
MOST_OVERLAP = 0.9
#: The words that a setting takes.
SETTING_WORDS = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "backend": ("auto", "torch", "openvino"),
    "orientation": ("auto", "stored", "RAS", "LPS", "LAS"),
}


def check_device(device: str) -> None:
    """Raise `BadConfig` for a word that names no device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", str(device)):
        raise BadConfig(
            f"there is no device '{device}'; use auto, cpu, cuda, cuda:N for one of several, or mps"
            " for the GPU of a Mac"
        )


_ANY = (lambda value: True, "True or False")
#: Setting -> of which types its values are, which of these are right, and what is said of others.
_RIGHT: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "overlap": (
        (int, float, NoneType),
        lambda value: value is None or 0 <= value <= MOST_OVERLAP,
        f"a share from 0 to {MOST_OVERLAP}",
    ),
    "batch": ((int,), lambda value: value >= 0, "a number of windows, or 0 for what suits"),
    "max_memory_bytes": (
        (int, float, NoneType),
        lambda value: value is None or 0 < value < float("inf"),
        "a number of bytes such as 4e9",
    ),
    "tta": ((bool, NoneType), *_ANY),
    **dict.fromkeys(
        ("cleanup", "uncertainty", "exact", "postprocess", "from_dicom"), ((bool,), *_ANY)
    ),
}


def _plain(value: Any) -> Any:
    """A number of numpy or torch, as tables of pandas hold them, as one of Python; a device of
    torch by its name.
    """
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        return str(value)
    is_number = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_number else value


def _label_values(name: str, values: Any) -> tuple[int, ...]:
    """The values as a tuple. Raises `BadConfig` for what are no label values."""
    several = tuple(values) if isinstance(values, Iterable) else (None,)
    if any(isinstance(one, bool) or not isinstance(one, Integral) for one in several):
        raise BadConfig(
            f"{name} are label values such as (17, 53), and {values!r:.40} was given; the label"
            " table of the model says which there are"
        )
    return tuple(int(one) for one in several)


@dataclass(frozen=True, repr=False)
class Settings:
    """How to run a model; see `medseg infer --help`. Raises `BadConfig` for words that are none of
    a setting's.
    """

    device: str = "auto"
    precision: str = "auto"
    overlap: float | None = None  # None: the model's own
    cleanup: bool = True
    backend: str = "auto"
    batch: int = 0  # windows at a time; 0: what suits the device
    # None: of foreign models as they were trained, but on a CPU; of others no.
    tta: bool | None = None
    max_memory_bytes: int | None = None
    probabilities: tuple[int, ...] = ()  # label values
    uncertainty: bool = False
    exact: bool = False  # foreign models to the last bit, in half precision where they are
    # What a foreign model sees a scan turned to; or stored, RAS, LPS, LAS.
    orientation: str = "auto"
    from_dicom: bool = False  # the scan has no stored order of its own
    # Only these labels; models of a set that find none of them are not run.
    roi: tuple[int, ...] = ()
    # Keep the largest parts as a foreign model's cross-validation advises.
    postprocess: bool = False

    region: tuple[slice, slice, slice] | None = None  # the part of a scan that is looked at
    every_output: bool = False  # maps of the logits of every output, for a mean of models

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _plain(getattr(self, one.name)))
        check_device(self.device)
        for name, words in SETTING_WORDS.items():
            word = getattr(self, name)
            if not isinstance(word, str) or word not in words:
                raise BadConfig(f"there is no {name} '{word}'; use {', '.join(words)}")
        for name, (kinds, is_right, right) in _RIGHT.items():
            value = getattr(self, name)
            is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if not (is_kind and is_right(value)):
                raise BadConfig(f"{name} is {right}, and {value!r:.40} was given")
        for name in ("probabilities", "roi"):
            object.__setattr__(self, name, _label_values(name, getattr(self, name)))
        if self.max_memory_bytes is not None:  # 4e9 is how people write it
            object.__setattr__(self, "max_memory_bytes", int(self.max_memory_bytes))

    def __repr__(self) -> str:
        changes = [
            f"{one.name}={value!r}"
            for one in fields(self)
            if (value := getattr(self, one.name)) != one.default
        ]
        return f"Settings({', '.join(changes)})"

    def share(self, spec: ModelSpec) -> float | tuple[float, float, float]:
        """By which share windows overlap."""
        if self.overlap is not None:
            return self.overlap
        return spec.recipe.overlap if spec.recipe else 0.5


def is_set(model: Model) -> TypeGuard[ModelSet]:
    """Whether a model is a set of models that see the same scan."""
    return hasattr(model, "models")


def as_list(model: Checkpoint | Sequence[Checkpoint] | ModelSet) -> list[Checkpoint]:
    """One checkpoint, several, or all of a set as a list."""
    if is_set(model):
        return [one for checkpoints in model.models for one in checkpoints]
    return list(model) if isinstance(model, Sequence) else [model]  # type: ignore[list-item]


def label_table(model: Model) -> LabelTable:
    """What the values of a model's labels mean."""
    if isinstance(model, str):
        return UNTRAINED[model].table
    return model.table if is_set(model) else as_list(model)[0].table


def labels_named(model: Model, names: Sequence[str], *, option: str = "--roi") -> tuple[int, ...]:
    """The values of a model's labels by their names or numbers; see `LabelTable.value_of`. Raises
    `BadConfig`.
    """
    if isinstance(model, str) and not UNTRAINED[model].structures:
        raise BadConfig(f"{option}: {model} finds intensities, not structures")
    table = label_table(model)
    if names and not any(name.strip() for name in names):
        raise BadConfig(f"{option}: no structure is named; give names or numbers, or leave it out")
    try:
        values = [table.value_of(name) for name in names if name.strip()]
    except BadConfig as error:
        raise BadConfig(f"{option}: the model: {error}") from None
    return tuple(dict.fromkeys(values))


def as_volumes(scan: Scans) -> list[Volume]:
    """One scan or several as a list."""
    return [scan] if isinstance(scan, Volume) else list(scan)


def channel_names(model: Model) -> list[str]:
    """What each of the scans is that a model takes; '' where the model does not say."""
    if isinstance(model, str):
        return [""]
    spec = as_list(model)[0].spec
    return list(spec.channel_names) or [""] * spec.channels


def check_channels(volumes: Sequence[Volume], model: Model) -> None:
    """Raise `BadConfig` if a model takes another number of scans."""
    names = channel_names(model)
    if len(volumes) != len(names):
        title = model if isinstance(model, str) else as_list(model)[0].spec.name
        detail = f" ({', '.join(names)})" if any(names) else ""
        scans = "1 scan" if len(names) == 1 else f"{len(names)} scans"
        order = " in this order" if len(names) > 1 and detail else ""
        count = "1 is" if len(volumes) == 1 else f"{len(volumes)} are"
        raise BadConfig(
            f"the model {title} takes {scans}{detail}{order} and {count} given; see --channel"
        )


def check_settings(checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    """Raise `BadModel` for models that do not belong together, `BadConfig` for what a model cannot
    give.
    """
    spec = checkpoints[0].spec
    keys = {"spacing": "spacing_mm", "intensities": "intensity"}  # as the JSON names them
    for key in (
        "classes",
        "patch",
        "spacing",
        "grid",
        "channels",
        "channel_names",
        "intensities",
        "regions",
        "recipe",
    ):
        if any(getattr(one.spec, key) != getattr(spec, key) for one in checkpoints):
            name = keys.get(key, key)
            raise BadModel(
                f"the models differ in their {name}; only models of one task and plan can be"
                " averaged"
            )
    if settings.tta and not mirror_axes(checkpoints):
        raise BadConfig(f"the model {spec.name} must not be mirrored; leave out --tta")
    _check_foreign(spec, settings)
    unknown = [value for value in settings.probabilities if value not in spec.classes[1:]]
    if unknown:
        raise BadConfig(
            f"the model {spec.name} has no label {unknown[0]}; `medseg models` and its labels.csv"
            " list them"
        )


def mirror_axes(checkpoints: Sequence[Checkpoint]) -> tuple[int, ...]:
    """The axes along which patches may be mirrored: those of training, never left-right if a label
    has a side.
    """
    axes = set.intersection(*(set(one.spec.mirror) for one in checkpoints))
    # What nnU-Net mirrored in training it mirrors here, sides or not.
    if checkpoints[0].spec.recipe:
        return tuple(sorted(axes))
    lateral = any(one.table.mirror_pairs() for one in checkpoints)
    return tuple(sorted(axes - ({0} if lateral else set())))


def mirroring(
    checkpoints: Sequence[Checkpoint], settings: Settings, device: str
) -> tuple[int, ...]:
    """The axes along which patches are mirrored in this run.

    Unless `tta` decides, foreign models are mirrored as they were trained: with `exact` and on a
    GPU. On a CPU it would take two to eight times as long and changes little.
    """
    if settings.tta is not None:
        return mirror_axes(checkpoints) if settings.tta else ()
    follows = checkpoints[0].spec.recipe is not None and (settings.exact or device == "cuda")
    return mirror_axes(checkpoints) if follows else ()


def _check_foreign(spec: ModelSpec, settings: Settings) -> None:
    """Raise `BadConfig` for what is only for models of other programs, or not for them."""
    from medseg.models import Recipe

    of_nnunet = isinstance(spec.recipe, Recipe)
    options = {
        "--exact": settings.exact and spec.recipe is None,
        "--orientation": settings.orientation != "auto" and not of_nnunet,
        "--postprocess": settings.postprocess and not of_nnunet,
    }
    whose = "medseg's own" if spec.recipe is None else "MONAI's"
    for option, given in options.items():
        if given:
            raise BadConfig(f"{option} is for models of nnU-Net, and {spec.name} is {whose}")
    if settings.exact and settings.precision not in ("auto", "fp32"):
        raise BadConfig("--exact computes in float32 as nnU-Net does; leave out --precision")
    if settings.exact and settings.backend == "openvino":
        raise BadConfig("--exact runs on PyTorch as nnU-Net does; leave out --backend")


def check_untrained(model: str, settings: Settings) -> None:
    """Raise `BadConfig` for what only a network can give."""
    asked = {
        "--uncertainty": settings.uncertainty,
        "--probabilities": settings.probabilities,
        "--tta": settings.tta,
        "--exact": settings.exact,
        "--orientation": settings.orientation != "auto",
        "--postprocess": settings.postprocess,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise BadConfig(f"{option} is for networks, and {model} is none; leave it out")


def check_set(models: ModelSet, settings: Settings) -> None:
    """Raise `BadConfig` for labels that a set does not have, or where nothing of it is left."""
    unknown = [value for value in settings.probabilities if value not in models.table]
    if unknown:
        raise BadConfig(
            f"the models {models.name} have no label {unknown[0]}; `medseg info` lists them"
        )
    if not models.models:
        raise BadConfig(f"of the models {models.name} none finds what is asked for")
