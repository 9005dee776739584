"""The settings of `medseg.augment` as data; apart from it, so that reading a config needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the first end of a range is not below the second")
    return ends


_Share = Annotated[float, Field(ge=0, le=1)]
_Degrees = Annotated[float, Field(ge=0, le=180)]
_Factors = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)]
_Lengths = Annotated[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ordered)]


class AugmentConfig(BaseModel):
    """What happens to training patches at random; defaults are those of nnU-Net (Isensee et al. 2021, and version 2).

    A `_share` is the probability with which a patch gets it. Factors are drawn evenly in their logarithm, so that 0.5
    and 2 are as likely. Mirroring is off until axes are named, because it swaps left and right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation_share: _Share = 0.2
    rotation_degrees: tuple[_Degrees, _Degrees, _Degrees] = Field(
        default=(30.0, 30.0, 30.0), description="largest angle about each axis"
    )
    scaling_share: _Share = 0.2
    scaling: _Factors = Field(default=(0.7, 1.4), description="above 1 anatomy gets larger")
    anisotropic_share: _Share = Field(default=0.0, description="share of the scaled with a factor for each axis")
    elastic_share: _Share = 0.0
    elastic_mm: _Lengths = Field(default=(0.0, 3.0), description="standard deviation of the displacement")
    elastic_spacing_mm: float = Field(default=24.0, gt=0, description="between the points that are displaced")
    mirror: tuple[Literal[0, 1, 2], ...] = Field(default=(), description="axes mirrored in half of the patches")

    noise_share: _Share = 0.1
    noise_variance: _Lengths = Field(default=(0.0, 0.1), description="relative to the variance of the patch")
    blur_share: _Share = 0.2
    blur_voxels: _Lengths = Field(default=(0.5, 1.0), description="standard deviation of the Gaussian")
    brightness_share: _Share = 0.15
    brightness: _Factors = (0.75, 1.25)
    contrast_share: _Share = 0.15
    contrast: _Factors = (0.75, 1.25)
    low_resolution_share: _Share = 0.25
    low_resolution: _Factors = Field(default=(0.5, 1.0), description="of the voxels along each axis")
    inverted_gamma_share: _Share = 0.1
    gamma_share: _Share = 0.3
    gamma: _Factors = (0.7, 1.5)
    inversion_share: _Share = Field(default=0.0, description="bright becomes dark and dark bright")


#: Patches as they are.
NO_AUGMENTATION = AugmentConfig(
    rotation_share=0,
    scaling_share=0,
    noise_share=0,
    blur_share=0,
    brightness_share=0,
    contrast_share=0,
    low_resolution_share=0,
    inverted_gamma_share=0,
    gamma_share=0,
)
