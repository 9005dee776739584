"""A MONAI model's recipe: the transforms before its network and after it, in their order, as data.

Each step stands for a function in a dict of `medseg.inference.journey`; the arithmetic is that of
MONAI 1.6 (Cardoso et al. 2022, arXiv:2211.02701), whose transforms the steps are named after.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Millimetres = Annotated[float, Field(gt=0.01, lt=1000)]
_Voxels = Annotated[int, Field(ge=0, le=1024)]
_ThreeMillimetres: TypeAlias = tuple[_Millimetres, _Millimetres, _Millimetres]
_Share = Annotated[float, Field(ge=0, lt=1)]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Step):
    """Axes permuted and flipped so that they run to an orientation (`Orientationd`)."""

    step: Literal["turn"] = "turn"
    orientation: str = Field(pattern="^[RLAPIS]{3}$")


class Space(_Step):
    """Resampled to a spacing, the first voxel's centre kept (`Spacingd`); interpolated linearly.

    An axis whose spacing lies between `low_mm` and `high_mm` stays as it is. A spacing of None is
    the scan's own. single: computed in float32 instead of float64.
    """

    step: Literal["space"] = "space"
    spacing_mm: tuple[_Millimetres | None, _Millimetres | None, _Millimetres | None]
    low_mm: _ThreeMillimetres | None = None
    high_mm: _ThreeMillimetres | None = None
    nearest: bool = False
    single: bool = False


class Crop(_Step):
    """Cut to the box around what is above 0 in any channel, and a margin (`CropForegroundd`).

    beyond: a margin that leaves the image is filled with zeros instead of being cut off.
    """

    step: Literal["crop"] = "crop"
    margin: tuple[_Voxels, _Voxels, _Voxels] = (0, 0, 0)
    beyond: bool = False


class Range(_Step):
    """low..high to to_low..to_high, limited to that where `clip` says so
    (`ScaleIntensityRanged`)."""

    step: Literal["range"] = "range"
    low: _Number
    high: _Number
    to_low: _Number = 0.0
    to_high: _Number = 1.0
    clip: bool = False
    channels: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low == self.high:
            raise ValueError("low and high are equal")
        return self


class Standard(_Step):
    """Minus the mean, over the standard deviation (`NormalizeIntensityd`).

    nonzero: of the voxels that are not 0, which alone change. each: of every channel on its own.
    """

    step: Literal["standard"] = "standard"
    nonzero: bool = False
    each: bool = False
    channels: tuple[int, ...] | None = None


class Extent(_Step):
    """From the least and the largest value to to_low..to_high (`ScaleIntensityd`)."""

    step: Literal["extent"] = "extent"
    to_low: _Number = 0.0
    to_high: _Number = 1.0
    each: bool = False


class Curve(_Step):
    """A function of each value, as Auto3DSeg has them.

    logistic: 1 / (1 + exp(-x)). tanh: 3 tanh(x / 3). counts: the logistic function of the distance
    from the least value in standard deviations.
    """

    step: Literal["curve"] = "curve"
    function: Literal["logistic", "tanh", "counts"]
    channels: tuple[int, ...] | None = None


Step: TypeAlias = Annotated[
    Turn | Space | Crop | Range | Standard | Extent | Curve, Field(discriminator="step")
]


class Ending(_Step):
    """What is done with the network's blended outputs.

    regions: each output above a threshold is a region, of which later ones lie on top; otherwise
    the first largest output wins. activation: what outputs are made before that, and before they
    are interpolated. interpolate: outputs go back to the scan's grid linearly and decide there;
    otherwise they decide on the network's grid, and labels go back by the nearest voxel. order: of
    regions, the output that is painted first, and so on. inner, outer: labels of which only the
    largest part stays, on the network's grid and on the scan's; parts: how many of them.
    """

    activation: Literal["none", "softmax", "sigmoid"] = "none"
    threshold: _Number = 0.5
    interpolate: bool = False
    order: tuple[int, ...] = ()
    inner: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()
    parts: int = Field(default=1, ge=1, le=100)


class StepRecipe(BaseModel):
    """The whole way, along the scan's own axes until a step turns them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Step, ...] = Field(max_length=64)
    inputs: int = Field(ge=1, le=64, description="scans of a case, one for each channel")
    whole: tuple[bool, bool, bool] = Field(
        default=(False, False, False), description="axes along which a window is the whole image"
    )
    overlap: _Share | tuple[_Share, _Share, _Share] = 0.25
    weights: Literal["constant", "gaussian"] = "constant"
    sigma_scale: tuple[float, float, float] = (0.125, 0.125, 0.125)
    padding: Literal["constant", "replicate", "reflect", "circular"] = "constant"
    padding_value: _Number = 0.0
    ending: Ending = Ending()

    @model_validator(mode="after")
    def _fits_together(self) -> StepRecipe:
        grids = [one for one in self.steps if isinstance(one, Space)]
        if self.ending.interpolate and len(grids) > 1:
            raise ValueError("outputs are brought back linearly over one change of grids alone")
        return self

    @property
    def layout(self) -> Literal["stepped"]:
        """Where windows lie: a name in `medseg.inference.window.LAYOUTS`."""
        return "stepped"

    @property
    def previous(self) -> tuple[int, ...]:
        """Labels of a first stage that are further channels: none."""
        return ()

    @property
    def orientation(self) -> str:
        """What scans are turned to first, 'stored' for nothing."""
        turns = [one.orientation for one in self.steps if isinstance(one, Turn)]
        return turns[0] if turns else "stored"

    @property
    def spacing_mm(self) -> tuple[float | None, float | None, float | None]:
        """The network's spacing in mm along its axes; None where it is the scan's own."""
        grids = [one.spacing_mm for one in self.steps if isinstance(one, Space)]
        return grids[-1] if grids else (None, None, None)
