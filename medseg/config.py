"""Everything configurable, as data: YAML in, checked by pydantic, no code. Unknown keys and wrong
types are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from medseg.errors import BadConfig
from medseg.text import read_yaml


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the first end of a range is not below the second")
    return ends


_Share = Annotated[float, Field(ge=0, le=1)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Degrees = Annotated[float, Field(ge=0, le=180)]
_Factors = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)
]
_Lengths = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ordered)
]


class AugmentConfig(BaseModel):
    """What happens to training patches at random; defaults are those of nnU-Net (Isensee et al.
    2021, and version 2).

    A `_share` is the probability with which a patch gets it. Factors are drawn evenly in their
    logarithm, so that 0.5 and 2 are as likely. Mirroring is off until axes are named, because it
    swaps left and right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rotation_share: _Share = 0.2
    rotation_degrees: tuple[_Degrees, _Degrees, _Degrees] = Field(
        default=(30.0, 30.0, 30.0), description="largest angle about each axis"
    )
    scaling_share: _Share = 0.2
    scaling: _Factors = Field(default=(0.7, 1.4), description="above 1 anatomy gets larger")
    anisotropic_share: _Share = Field(
        default=0.0, description="share of the scaled with a factor for each axis"
    )
    elastic_share: _Share = 0.0
    elastic_mm: _Lengths = Field(
        default=(0.0, 3.0), description="standard deviation of the displacement"
    )
    elastic_spacing_mm: float = Field(
        default=24.0, gt=0, description="between the points that are displaced"
    )
    mirror: tuple[Literal[0, 1, 2], ...] = Field(
        default=(), description="axes mirrored in half of the patches"
    )

    noise_share: _Share = 0.1
    noise_variance: _Lengths = Field(
        default=(0.0, 0.1), description="relative to the variance of the patch"
    )
    blur_share: _Share = 0.2
    blur_voxels: _Lengths = Field(
        default=(0.5, 1.0), description="standard deviation of the Gaussian"
    )
    brightness_share: _Share = 0.15
    brightness: _Factors = (0.75, 1.25)
    contrast_share: _Share = 0.15
    contrast: _Factors = (0.75, 1.25)
    low_resolution_share: _Share = 0.25
    low_resolution: _Factors = Field(
        default=(0.5, 1.0), description="of the voxels along each axis"
    )
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


_Positive = Annotated[float, Field(gt=0)]
_Length = Annotated[float, Field(ge=0)]
_Size = Annotated[int, Field(ge=1, le=1024)]
_Spacing = Annotated[float, Field(gt=0.05, lt=20)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SynthConfig(_Strict):
    """How label maps become images; lengths in mm, intensities relative to a range of 0 to 1."""

    merge: dict[int, int] = Field(
        default={}, description="label value -> the label value it is trained as"
    )
    mirror: dict[int, int] = Field(
        default={}, description="left value -> right value, beside those found by name"
    )
    outside: tuple[int, ...] = Field(
        default=(), description="label values a skull-stripped image lacks"
    )
    t1_like: dict[int, tuple[float, float]] = Field(
        default={}, description="value -> (mean, sd) in a T1-like image"
    )
    t1_share: tuple[_Share, _Share] = Field(
        default=(0.0, 0.0), description="share of T1-like images, first and last"
    )
    t1_steps: tuple[int, int] = Field(
        default=(0, 1), description="steps between which that share changes"
    )
    curved: _Share = Field(
        default=0.0, description="share of the others drawn as a random curve over T1 intensities"
    )
    mixed: _Share = Field(
        default=0.0, description="share of images with two intensities in what lies outside"
    )
    ghosts: _Share = Field(
        default=0.0, description="share of images with a ghost, a wrap or a head that moved"
    )
    border: dict[int, tuple[int, ...]] = Field(
        default={},
        description="label value -> tissues that its voxels beside them are partly made of",
    )
    border_share: tuple[_Share, _Share] = Field(
        default=(0.0, 0.4),
        description="how much of such a voxel is tissue, for each side it touches; from, to",
    )
    rotation_degrees: float = Field(default=20.0, ge=0, le=180)
    scaling: tuple[_Positive, _Positive] = (0.85, 1.2)
    anisotropic_scaling: float = Field(default=0.08, ge=0, lt=0.5)
    shearing: float = Field(default=0.02, ge=0, lt=0.5)
    flip: float = Field(default=0.5, ge=0, le=1)
    deformation_mm: tuple[tuple[_Positive, _Length], ...] = ((48.0, 4.0), (20.0, 1.5))
    anywhere: float = Field(
        default=0.15, ge=0, le=1, description="share of windows centred anywhere in the head"
    )
    offset_mm: float = Field(
        default=12.0, ge=0, description="sd of the window's distance from the target's middle"
    )
    noise_within: float = Field(
        default=0.1, ge=0, description="largest sd of intensity within a structure"
    )
    dark_background: float = Field(default=0.9, ge=0, le=1)
    skull_stripped: float = Field(default=0.3, ge=0, le=1)
    bias: float = Field(default=0.4, ge=0, description="largest sd of the log bias field")
    blurred: float = Field(default=0.7, ge=0, le=1)
    blur_mm: float = Field(default=2.0, gt=0)
    coarse: float = Field(default=0.5, ge=0, le=1, description="share of images with thick slices")
    thickest_mm: float = Field(default=7.0, gt=0)
    noise: float = Field(default=0.08, ge=0)
    gamma: float = Field(default=0.4, ge=0)
    cut: float = Field(
        default=0.15, ge=0, le=1, description="share of images with a cut field of view"
    )


class FluidSpec(_Strict):
    """Which labels `medseg.postprocess.fluid.separate_fluid` tells from which fluid, by the scan's
    intensities.
    """

    tissue: tuple[int, ...]
    value: int


class BrainSpec(_Strict):
    """Which labels make up a brain, for what `medseg.postprocess.anatomy` derives and checks."""

    csf: tuple[int, ...] = Field(description="fluid within the brain: ventricles")
    grey: tuple[int, ...]
    white: tuple[int, ...]
    around: tuple[int, ...] = Field(
        default=(), description="fluid around the brain, inside the skull"
    )


class ModelConfig(_Strict):
    """Which network, and its options (see `medseg/networks`), and the grid and intensities it
    sees.
    """

    name: str
    options: dict[str, Any] = {}
    patch: tuple[_Size, _Size, _Size]
    spacing_mm: _Spacing | tuple[_Spacing, _Spacing, _Spacing] = Field(
        description="one number, or along R, A and S"
    )
    grid: Literal["world", "scan"] = Field(
        default="world", description="along RAS, or along the scan's own axes"
    )
    intensity: Literal["percentiles"] | tuple[dict[str, Any], ...] = Field(
        default="percentiles",
        description="or for each channel {scheme: zscore}, {scheme: ct, low: ...}",
    )
    recipe: dict[str, Any] | Literal["monai"] | None = Field(
        default=None,
        description="how a model of another program that is gone on from sees scans; monai: as"
        " MONAI's bundles do, for models that are to be exported as one",
    )


class TrainConfig(_Strict):
    """The loop: lengths in steps, or for a time in seconds."""

    steps: int | None = Field(
        default=None, ge=1, description="how many; without it, as many as time_s allows"
    )
    time_s: float | None = Field(
        default=None, gt=0, description="from the command to the scored model"
    )
    batch: int = Field(default=1, ge=1, le=4096)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    loss: Literal["dice_cross_entropy", "cross_entropy"] = Field(
        default="dice_cross_entropy",
        description="of classes; overlapping regions have Dice and binary cross-entropy",
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["linear", "poly", "cosine"] = Field(
        default="linear",
        description="how the rate falls: over the last `decay` steps, or all along",
    )
    warmup: int = Field(default=200, ge=1)
    decay: int = Field(
        default=2000, ge=1, description="linear: steps at the end over which the rate falls to zero"
    )
    weight_decay: float = Field(default=1e-2, ge=0)
    betas: tuple[_Decay, _Decay] = Field(
        default=(0.9, 0.999), description="adamw: how slowly the means of gradients forget"
    )
    gradient_clip: float = Field(default=5.0, gt=0)
    ema: float = Field(
        default=0.998, ge=0, lt=1, description="decay of the moving average of weights"
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description=(
            "the averaged weights at the end, or those that did best on the validation data"
        ),
    )
    foreground: _Share = Field(
        default=0.5, description="scans: share of patches centred on a structure"
    )
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,4})?)$",
        description="auto: a GPU that works, else the CPU; or cpu, cuda, cuda:N",
    )
    deterministic: bool = Field(
        default=False, description="also on a GPU: the same bits every time, and slower"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="with torchrun: a network on each process, or one shared out (fsdp)",
    )
    checkpoint_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=20, ge=1)
    validate_every: int = Field(default=500, ge=1)
    validate_samples: int = Field(
        default=4, ge=0, description="images, or whole scans, looked at during the run"
    )


class Config(_Strict):
    """One training run: from label maps if `synth` is given, else from scans with labels."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    data: Path
    hold_out: tuple[str, ...] = Field(
        default=(), description="files or cases of `data` used for validation only"
    )
    start_from: Path | None = Field(
        default=None, description="a run or model folder whose weights this run takes"
    )
    labels: Path | None = Field(
        default=None, description="label maps: Slicer label table of what to predict"
    )
    card: dict[str, Any] = Field(default={}, description="goes into the model's JSON as it is")
    fluid: FluidSpec | None = None
    brain: BrainSpec | None = None
    cleanup: list[dict[str, Any]] | Literal["auto"] = Field(
        default=[], description="steps, or auto: chosen on the validation scans"
    )
    model: ModelConfig
    synth: SynthConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _complete(self) -> Config:
        if self.synth is not None and self.labels is None:
            raise ValueError(
                "training from label maps needs labels, a table of the structures to predict"
            )
        if self.train.steps is None and self.train.time_s is None:
            raise ValueError("train.steps or train.time_s must say how long to train")
        return self


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The config in a YAML file with dotted `overrides` ({'train.steps': 10}) applied; paths count
    from its folder.

    Raises `BadConfig` naming the key, the value and what is allowed.
    """
    content = read_settings(path)
    for key in ("data", "labels", "start_from"):
        if isinstance(content.get(key), str):
            content[key] = str(path.parent / content[key])
    return make_config(override(content, overrides or {}), str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, unchecked. Raises `BadConfig` if it cannot be read or holds none."""
    content = read_yaml(path, BadConfig)
    if not isinstance(content, dict):
        raise BadConfig(f"{path} is not a training config: it holds no keys")
    for key in content:
        if not isinstance(key, str):
            raise BadConfig(
                f"{path} is not a training config: it has the key {key}, which is no name of a"
                " setting"
            )
    return content


def override(content: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`content` changed in place by dotted keys. Raises `BadConfig` where a key lies below
    something not a group.
    """
    for setting, value in overrides.items():
        *parents, last = setting.split(".")
        branch = content
        for key in parents:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise BadConfig(f"{setting} cannot be set: {key} is not a group of settings")
        branch[last] = value
    return content


def make_config(content: dict[str, Any], origin: str) -> Config:
    """The config of nested settings. Raises `BadConfig` naming `origin`, the key, the value and
    what is allowed.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise BadConfig(f"{origin}{_detail(error.errors()[0])}") from None


def check_given(settings: Mapping[str, Any], origin: str) -> None:
    """Raise `BadConfig` for a dotted setting with a value that it cannot have, whatever the others
    will be: plans compute with what is given before there is a config.
    """
    try:
        Config.model_validate(override({}, dict(settings)))
    except ValidationError as error:
        for one in error.errors():
            is_later = one["type"] in ("missing", "extra_forbidden") or one["loc"][-1:] == (
                "device",
            )
            if one["loc"] and not is_later:  # a device is looked for, with a sentence of its own
                raise BadConfig(f"{origin}{_detail(one)}") from None


def _detail(error: Mapping[str, Any]) -> str:
    """What is wrong with a setting, as pydantic found it."""
    where = ".".join(str(part) for part in error["loc"])
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f": {where}: {reason}, not {error['input']!r:.60}" if where else f": {reason}"
