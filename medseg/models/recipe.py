"""A foreign model's recipe: how a scan becomes what the network sees, and its answer labels, as
data.

Each word stands for a function in a dict of `medseg.inference`; the engine asks the dict and never
the model's origin.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Millimetres = Annotated[float, Field(gt=0.01, lt=1000)]
_Axis: TypeAlias = Literal[0, 1, 2]
_LARGEST = 1e300


def is_number(value: Any) -> bool:
    """Whether a value of a stranger's file is a number that is finite as a float: whole ones of
    any length may stand there."""
    return type(value) in (int, float) and abs(value) <= _LARGEST


class Resampling(BaseModel):
    """How an array changes grids.

    spline: of `order` in float64 on cell centres, edges repeated, clipped to the input's range
    (nnU-Net's default). linear: in float32, not clipped. none: not at all. Where `separate` says so
    (None: where one spacing is more than 3 times another), planes are resampled on their own and
    then with `order_across` along the axis that is left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["spline", "linear", "none"] = "spline"
    order: int = Field(default=3, ge=0, le=5)
    order_across: int = Field(default=0, ge=0, le=5)
    separate: bool | None = None


class ChannelScale(BaseModel):
    """How one channel's intensities are scaled before it is resampled.

    fixed: clipped to low..high, minus mean, over sd. zscore: of the scan, or with `masked` of what
    is not 0. range: to 0..1. bytes: over 255.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["fixed", "zscore", "range", "bytes", "none"]
    masked: bool = False
    low: _Number = 0.0
    high: _Number = 0.0
    mean: _Number = 0.0
    sd: _Number = 1.0


class Recipe(BaseModel):
    """The whole way, along the network's axes; `medseg/inference` holds the functions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orientation: Literal["auto", "stored", "RAS", "LPS", "LAS"] = Field(
        default="auto",
        description="what a scan is turned to first; auto: DICOM to LPS, files as they are stored",
    )
    axes: tuple[_Axis, _Axis, _Axis] = Field(
        description="the turned scan's axis along each of the network's"
    )
    spacing_mm: tuple[_Millimetres | None, _Millimetres, _Millimetres] = Field(
        description="null: the scan's own"
    )
    crop: Literal["none", "nonzero"] = "none"
    channels: tuple[ChannelScale, ...]
    image: Resampling
    labels: Resampling = Resampling(order=1)
    logits: Resampling = Resampling(order=1)
    padding: Literal["both", "behind"] = "both"
    layout: Literal["even", "nnunet"] = "nnunet"
    weights: Literal["floored", "nnunet"] = "nnunet"
    overlap: float = Field(default=0.5, ge=0, lt=1)
    previous: tuple[int, ...] = Field(
        default=(), description="labels of the first stage that are further channels"
    )

    @property
    def inputs(self) -> int:
        """Scans of a case, one for each channel."""
        return len(self.channels)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes {self.axes} are not an order of the three axes")
        if self.logits.order > 1 or self.logits.order_across > 1:
            raise ValueError("logits are brought back by order 0 or 1")
        return self
