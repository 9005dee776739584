"""What a scan is segmented with: settings, models and channels, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from medseg.errors import BadConfig, BadModel
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.models import Checkpoint


#: One checkpoint, several of the same task whose logits are averaged, or the name of an intensity model.
Model: TypeAlias = "Checkpoint | Sequence[Checkpoint] | str"
#: One scan, or one for each of the model's channels, in its order and on one grid.
Scans: TypeAlias = Volume | Sequence[Volume]


@dataclass(frozen=True)
class Settings:
    """How to run a model; see `medseg infer --help`."""

    device: str = "auto"
    precision: str = "auto"
    overlap: float = 0.5
    cleanup: bool = True
    backend: str = "auto"
    batch: int = 0  # windows at a time; 0: what suits the device
    tta: bool = False
    max_memory_bytes: int | None = None
    probabilities: tuple[int, ...] = ()  # label values
    uncertainty: bool = False


def as_list(model: Checkpoint | Sequence[Checkpoint]) -> list[Checkpoint]:
    """One checkpoint or several as a list."""
    return list(model) if isinstance(model, Sequence) else [model]


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
        listed = f" ({', '.join(names)})" if any(names) else ""
        wanted = "1 scan" if len(names) == 1 else f"{len(names)} scans"
        order = " in this order" if len(names) > 1 and listed else ""
        count = "1 is" if len(volumes) == 1 else f"{len(volumes)} are"
        raise BadConfig(f"the model {title} takes {wanted}{listed}{order} and {count} given; see --channel")


def check_settings(checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    """Raise `BadModel` for models that do not belong together, `BadConfig` for what a model cannot give."""
    spec = checkpoints[0].spec
    keys = {"spacing": "spacing_mm", "intensities": "intensity"}  # as the JSON names them
    for key in ("classes", "patch", "spacing", "grid", "channels", "channel_names", "intensities", "regions"):
        if any(getattr(one.spec, key) != getattr(spec, key) for one in checkpoints):
            name = keys.get(key, key)
            raise BadModel(f"the models differ in their {name}; only models of one task and plan can be averaged")
    if settings.tta and not mirror_axes(checkpoints):
        raise BadConfig(f"the model {spec.name} must not be mirrored; leave out --tta")
    unknown = [value for value in settings.probabilities if value not in spec.classes[1:]]
    if unknown:
        raise BadConfig(
            f"the model {spec.name} has no label {unknown[0]}; `medseg models` and its labels.csv list them"
        )


def mirror_axes(checkpoints: Sequence[Checkpoint]) -> tuple[int, ...]:
    """The axes along which patches may be mirrored: those of training, never left-right if a label has a side."""
    axes = set.intersection(*(set(one.spec.mirror) for one in checkpoints))
    lateral = any(one.table.mirror_pairs() for one in checkpoints)
    return tuple(sorted(axes - ({0} if lateral else set())))
