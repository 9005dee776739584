"""Models and training states on disk: safetensors with JSON beside them, never pickle.

A model is a folder: `model.safetensors` (weights), `model.json` (`ModelSpec`: everything needed to use them) and
`labels.csv` (the structures). `model.json` carries the SHA-256 of the weights and is written last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medseg.cleanup import check_steps
from medseg.config import BrainSpec, FluidSpec
from medseg.errors import BadConfig, BadFile, BadModel
from medseg.files import atomic_write
from medseg.labels import LabelTable

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Models that come with medseg, by name.
BUNDLED = Path(__file__).parent / "bundled"
MAX_WEIGHTS = 2_000_000_000
_Size = Annotated[int, Field(ge=1, le=1024)]
_Spacing = Annotated[float, Field(gt=0.01, lt=30)]


class PercentileScale(BaseModel):
    """Intensities scaled so that two percentiles of a scan become 0 and 1, and clamped there; air is 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["percentiles"] = "percentiles"


class ZScore(BaseModel):
    """Intensities minus their mean over their standard deviation, both of this scan on the model's grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["zscore"] = "zscore"
    nonzero: bool = Field(default=False, description="only of voxels that are not 0; those that are stay 0")


class FixedScale(BaseModel):
    """Clipped intensities minus a mean over a standard deviation that the training data gave, as for CT in HU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["ct"] = "ct"
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    mean: float = Field(allow_inf_nan=False)
    sd: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_a_range(self) -> FixedScale:
        if not self.low < self.high:
            raise ValueError("low is not below high")
        return self


#: How one channel's intensities become what a network sees.
IntensitySpec: TypeAlias = Annotated[PercentileScale | ZScore | FixedScale, Field(discriminator="scheme")]
#: 'world': voxels along RAS wherever the scan lies; 'scan': along the scan's own axes, turned to the nearest RAS.
GridKind: TypeAlias = Literal["world", "scan"]


class LocateSpec(BaseModel):
    """How a model finds the part of a scan it looks at: a coarse model in a folder beside its `model.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(default="coarse", pattern=r"^[A-Za-z0-9_-]+$")
    labels: tuple[int, ...] = Field(default=(), description="what to look for; empty: all it finds")
    margin_mm: float = Field(default=20.0, ge=0, description="kept around it")


class ModelSpec(BaseModel):
    """What a model's JSON says; spatial numbers run along (R, A, S)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["medseg-model-1"] = "medseg-model-1"
    name: str
    description: str = ""
    architecture: str
    options: dict[str, Any] = {}
    channels: int = Field(default=1, ge=1, le=64, description="scans it takes, on one grid")
    channel_names: tuple[str, ...] = Field(default=(), description="what each of them is, in their order")
    classes: tuple[int, ...] = Field(min_length=2, description="label value of each output; the first is background 0")
    patch: tuple[_Size, _Size, _Size]
    spacing_mm: _Spacing | tuple[_Spacing, _Spacing, _Spacing]
    grid: GridKind = "world"
    intensity: Literal["percentiles"] | tuple[IntensitySpec, ...] = Field(
        default="percentiles", description="of every channel; one word: the same for all"
    )
    regions: bool = Field(default=False, description="outputs are classes[1:] and may overlap; later ones lie on top")
    mirror: tuple[Literal[0, 1, 2], ...] = Field(default=(), description="axes along which training mirrored patches")
    skip_empty: bool = Field(default=False, description="windows of nothing but air are background, unseen")
    locate: LocateSpec | None = None
    fluid: FluidSpec | None = None
    brain: BrainSpec | None = None
    cleanup: tuple[dict[str, Any], ...] = ()
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of model.safetensors")
    card: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSpec:
        if self.channel_names and len(self.channel_names) != self.channels:
            raise ValueError(f"channel_names has {len(self.channel_names)} entries for {self.channels} channels")
        if len(self.intensities) != self.channels:
            raise ValueError(f"intensity has {len(self.intensities)} entries for {self.channels} channels")
        if self.skip_empty and not self.dark_air:
            raise ValueError("skip_empty needs intensity 'percentiles', for which air is 0")
        return self

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edges of a voxel of the model's grid in mm along (R, A, S)."""
        return self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm,) * 3

    @property
    def intensities(self) -> tuple[PercentileScale | ZScore | FixedScale, ...]:
        """How each channel's intensities are scaled."""
        return (PercentileScale(),) * self.channels if isinstance(self.intensity, str) else self.intensity

    @property
    def dark_air(self) -> bool:
        """Whether air is 0 in every channel of the network's input."""
        return all(one.scheme == "percentiles" for one in self.intensities)

    @property
    def outputs(self) -> int:
        """Channels the network puts out."""
        return len(self.classes) - self.regions


@dataclass(frozen=True)
class Checkpoint:
    """A model read from its folder and verified; `network()` builds it."""

    spec: ModelSpec
    table: LabelTable
    folder: Path

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they are stored, in half precision."""
        return (self.folder / "model.safetensors").stat().st_size

    def network(self) -> nn.Module:
        """The network in evaluation mode, float32, on the CPU. Raises `BadModel` if the weights do not fit it."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        from medseg.models import build_model, check_patch

        spec = self.spec
        content = (self.folder / "model.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != spec.sha256:
            raise BadModel(f"the weights in {self.folder} are not those its model.json names; fetch the model again")
        try:
            state = load(content)
        except (SafetensorError, ValueError) as error:
            raise BadModel(f"the weights in {self.folder} cannot be read: {error}") from None
        with torch.device("meta"):  # shapes are compared before any memory is taken
            network = build_model(spec.architecture, spec.channels, spec.outputs, **spec.options)
        check_patch(network, spec.patch)
        expected = {key: value.shape for key, value in network.state_dict().items()}
        wrong = sorted(key for key in expected.keys() | state.keys() if key not in state or key not in expected)
        wrong += [key for key in expected if key in state and state[key].shape != expected[key]]
        if wrong:
            raise BadModel(f"the weights in {self.folder} do not fit its architecture: {', '.join(wrong[:3])}")
        if any(value.dtype not in (torch.float16, torch.bfloat16, torch.float32) for value in state.values()):
            raise BadModel(f"the weights in {self.folder} are not numbers of 16 or 32 bits")
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise BadModel(f"the weights in {self.folder} hold values that are not finite")
        # Assigned, because `to_empty` would import sympy, which takes as long as a fifth of torch.
        network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        return network.eval()


def bundled_models() -> list[str]:
    """Names of the models that come with medseg."""
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "model.json").is_file())


def load_checkpoint(name: str) -> Checkpoint:
    """The model of a folder, of a training run's folder, or of a bundled name.

    Raises `BadModel` if there is none or it is damaged.
    """
    folder = BUNDLED / name if name in bundled_models() else Path(name)
    if not (folder / "model.json").is_file() and (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    if not (folder / "model.json").is_file():
        known = ", ".join(bundled_models())
        raise BadModel(f"there is no model '{name}': give a model folder, or one that comes with medseg ({known})")
    try:
        with (folder / "model.json").open(encoding="utf-8") as handle:
            spec = ModelSpec.model_validate_json(handle.read(1_000_000))
        check_steps(spec.cleanup)
        table = LabelTable.read(folder / "labels.csv")
        size = (folder / "model.safetensors").stat().st_size
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise BadModel(f"{folder / 'model.json'} is damaged: {where}: {first['msg']}") from None
    except BadConfig as error:
        raise BadModel(f"{folder / 'model.json'} is damaged: {error}") from None
    except (OSError, UnicodeDecodeError, BadFile) as error:
        raise BadModel(f"the model in {folder} is incomplete: {error}") from None
    if size > MAX_WEIGHTS:
        raise BadModel(f"the weights in {folder} hold {size} bytes, more than the {MAX_WEIGHTS} allowed")
    missing = [value for value in spec.classes[1:] if value not in table.values]
    if spec.classes[0] != 0 or len(set(spec.classes)) < len(spec.classes):
        raise BadModel(f"{folder / 'model.json'} is damaged: classes are background 0 and then each value once")
    if missing:
        raise BadModel(f"{folder}: labels.csv does not name the values {', '.join(map(str, missing))}")
    return Checkpoint(spec, table, folder)


def save_checkpoint(folder: Path, spec: dict[str, Any], state: dict[str, Tensor], table: LabelTable) -> None:
    """Write a model folder; weights in half precision. `spec` holds `ModelSpec`'s fields but the hash."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    content = save({key: value.detach().half().contiguous() for key, value in state.items()})
    checked = ModelSpec(**spec, sha256=hashlib.sha256(content).hexdigest())
    table.write(folder / "labels.csv")
    with atomic_write(folder / "model.safetensors") as handle:
        handle.write(content)
    with atomic_write(folder / "model.json") as handle:
        handle.write((checked.model_dump_json(indent=1) + "\n").encode())


def change_spec(folder: Path, **changes: Any) -> None:
    """Change fields of a model's JSON that do not touch its weights: cleanup, card, description."""
    content = json.loads((folder / "model.json").read_text(encoding="utf-8")) | changes
    checked = ModelSpec.model_validate_json(json.dumps(content))
    with atomic_write(folder / "model.json") as handle:
        handle.write((checked.model_dump_json(indent=1) + "\n").encode())


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a training state atomically: tensors and JSON facts in one safetensors file."""
    from safetensors.torch import save

    content = save({key: value.detach().contiguous() for key, value in tensors.items()}, {"medseg": json.dumps(facts)})
    with atomic_write(path) as handle:
        handle.write(hashlib.sha256(content).digest() + content)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts written by `save_state`. Raises `BadModel` if the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadModel(f"the training state {path} cannot be read: {error.strerror}") from None
    digest, content = raw[:32], raw[32:]
    if hashlib.sha256(content).digest() != digest:
        raise BadModel(f"the training state {path} is damaged")
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["medseg"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadModel(f"the training state {path} is damaged: {error}") from None
    return tensors, facts
