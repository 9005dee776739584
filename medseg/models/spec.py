"""What is known of a model: grid, spacing, intensities, labels and windows. Data, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medseg.config import BrainSpec, FluidSpec
from medseg.models.recipe import Recipe
from medseg.models.steps import StepRecipe

_Size = Annotated[int, Field(ge=1, le=1024)]
_Spacing = Annotated[float, Field(gt=0.01, lt=30)]


class PercentileScale(BaseModel):
    """Intensities scaled so that two percentiles of a scan become 0 and 1, and clamped there; air
    is 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["percentiles"] = "percentiles"


class ZScore(BaseModel):
    """Intensities minus their mean over their standard deviation, both of this scan on the model's
    grid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["zscore"] = "zscore"
    nonzero: bool = Field(
        default=False, description="only of voxels that are not 0; those that are stay 0"
    )


class FixedScale(BaseModel):
    """Clipped intensities minus a mean over a standard deviation that the training data gave, as
    for CT in HU.
    """

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
IntensitySpec: TypeAlias = Annotated[
    PercentileScale | ZScore | FixedScale, Field(discriminator="scheme")
]
#: 'world': voxels along RAS wherever the scan lies; 'scan': along the scan's own axes, turned to
#: the nearest RAS.
GridKind: TypeAlias = Literal["world", "scan"]


class LocateSpec(BaseModel):
    """How a model finds the part of a scan it looks at: a coarse model in a folder beside its
    `model.json`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(default="coarse", pattern=r"^[A-Za-z0-9_-]+$")
    labels: tuple[int, ...] = Field(default=(), description="what to look for; empty: all it finds")
    margin_mm: float = Field(default=20.0, ge=0, description="kept around it")


class ModelSpec(BaseModel):
    """What a model's JSON says; spatial numbers run along (R, A, S), of models with a recipe along
    its axes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["medseg-model-1"] = "medseg-model-1"
    name: str
    description: str = ""
    architecture: str
    options: dict[str, Any] = {}
    channels: int = Field(default=1, ge=1, le=64, description="scans it takes, on one grid")
    channel_names: tuple[str, ...] = Field(
        default=(), description="what each of them is, in their order"
    )
    classes: tuple[int, ...] = Field(
        min_length=2, description="label value of each output; the first is background 0"
    )
    patch: tuple[_Size, _Size, _Size]
    spacing_mm: _Spacing | tuple[_Spacing, _Spacing, _Spacing]
    grid: GridKind = "world"
    intensity: Literal["percentiles"] | tuple[IntensitySpec, ...] = Field(
        default="percentiles", description="of every channel; one word: the same for all"
    )
    regions: bool = Field(
        default=False, description="outputs are classes[1:] and may overlap; later ones lie on top"
    )
    mirror: tuple[Literal[0, 1, 2], ...] = Field(
        default=(), description="axes along which training mirrored patches"
    )
    skip_empty: bool = Field(
        default=False, description="windows of nothing but air are background, unseen"
    )
    locate: LocateSpec | None = None
    recipe: Recipe | StepRecipe | None = Field(
        default=None, description="how a foreign model sees a scan"
    )
    trained_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="arithmetic of the training, which 'auto' follows on a GPU"
    )
    fluid: FluidSpec | None = None
    brain: BrainSpec | None = None
    cleanup: tuple[dict[str, Any], ...] = ()
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of model.safetensors")
    card: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSpec:
        if self.channel_names and len(self.channel_names) != self.channels:
            raise ValueError(
                f"channel_names has {len(self.channel_names)} entries for {self.channels} channels"
            )
        if len(self.intensities) != self.channels:
            raise ValueError(
                f"intensity has {len(self.intensities)} entries for {self.channels} channels"
            )
        if self.recipe and (self.recipe.inputs != self.channels or self.skip_empty):
            raise ValueError("a recipe scales every channel, and leaves no window out")
        if self.skip_empty and not self.dark_air:
            raise ValueError("skip_empty needs intensity 'percentiles', for which air is 0")
        return self

    def __repr__(self) -> str:
        scans = ", ".join(self.channel_names) or f"{self.channels} channels" * (self.channels > 1)
        spacing = " x ".join(f"{edge:.3g}" for edge in self.spacing)
        return (
            f"<ModelSpec {self.name}: {self.architecture}, {scans or 'one scan'} to"
            f" {len(self.classes) - 1} structures, {spacing} mm, {self.grid} grid>"
        )

    __str__ = __repr__

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edges of a voxel of the model's grid in mm along (R, A, S)."""
        return self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm,) * 3

    @property
    def intensities(self) -> tuple[PercentileScale | ZScore | FixedScale, ...]:
        """How each channel's intensities are scaled."""
        return (
            (PercentileScale(),) * self.channels
            if isinstance(self.intensity, str)
            else self.intensity
        )

    @property
    def dark_air(self) -> bool:
        """Whether air is 0 in every channel of the network's input."""
        return all(one.scheme == "percentiles" for one in self.intensities)

    @property
    def inputs(self) -> int:
        """Channels the network reads: the scans, and those that a first stage's labels make."""
        return self.channels + (len(self.recipe.previous) if self.recipe else 0)

    @property
    def outputs(self) -> int:
        """Channels the network puts out."""
        return len(self.classes) - self.regions
