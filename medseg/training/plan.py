"""From a data set, a machine and a time to the settings of a training run, each with its reason.

The rules start from nnU-Net's (Isensee et al. 2021, Nature Methods 18:203): spacing from medians,
intensities from what the channel is, patch and depth from shapes. Beyond that they ask how fast
this machine trains, by trying, and choose the network and the patch so that the time is enough for
thousands of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.config import Config
from medseg.dataset import Check, Dataset
from medseg.errors import BadConfig, BadFile
from medseg.labels import is_lateral
from medseg.networks import build_network, known_networks, patch_multiples, small, training_of
from medseg.training.capacity import Machine, seconds_a_voxel

#: Patches that a run should see at least; fewer and it is better to make each of them cheaper.
ENOUGH_PATCHES = 2500
#: Largest patch, in voxels.
LARGEST_PATCH = {"cpu": 96**3, "cuda": 160**3}
#: How many times cheaper a voxel is for a U-Net that works at half the resolution inside (measured:
#: 0.135 s a patch of 40x56x40 against 0.052).
HALVED_GAIN = 2.6
#: Scans are not prepared finer than so many patches for the median one; more is detail that this
#: time cannot learn.
PATCHES_A_SCAN = {"cpu": 27, "cuda": 125}
#: How long to train, in seconds, if nobody says.
DEFAULT_TIME_S = {"cpu": 3600.0, "cuda": 8 * 3600.0}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting: its dotted key in the config, its value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What planning needs to know of the cases; axes run along (R, A, S) as each scan is turned.

    shapes in voxels, spacings in mm: one per case. intensities: per channel the 0.5 and 99.5
    percentiles, mean and standard deviation of voxels inside structures. zeros: the share of cases
    of which a quarter or more is exactly 0.
    """

    cases: int
    shapes: tuple[tuple[int, int, int], ...]
    spacings_mm: tuple[tuple[float, float, float], ...]
    intensities: tuple[dict[str, float], ...]
    zeros: float

    def as_json(self) -> dict[str, Any]:
        """Medians and ranges, without anything of a single case."""
        shapes, spacings = np.array(self.shapes), np.array(self.spacings_mm)
        return {
            "cases": self.cases,
            "median_shape": np.median(shapes, 0).tolist(),
            "smallest_shape": shapes.min(0).tolist(),
            "largest_shape": shapes.max(0).tolist(),
            "median_spacing_mm": np.median(spacings, 0).round(4).tolist(),
            "spacing_range_mm": [
                spacings.min(0).round(4).tolist(),
                spacings.max(0).round(4).tolist(),
            ],
            "intensities": list(self.intensities),
            "zeros": round(self.zeros, 4),
        }


def fingerprint(check: Check, names: Sequence[str]) -> Fingerprint:
    """Of the named cases, from what `check_dataset` measured in each. Raises `BadFile` if it could
    read none.
    """
    cases = set(names)
    facts = [one for one in check.facts if one.case in cases]
    if not facts:
        raise BadFile("none of the cases to train from can be read; medseg check says why")
    intensities = []
    for channel in range(len(facts[0].channels)):
        values = np.concatenate([one.channels[channel].foreground for one in facts]).astype(
            np.float64
        )
        if not len(values):
            values = np.array([one.channels[channel].mean for one in facts])
        low, high = np.percentile(values, (0.5, 99.5))
        spread = {
            "low": float(low),
            "high": float(high),
            "mean": float(values.mean()),
            "sd": float(values.std()),
        }
        intensities.append(spread)
    # A quarter of the voxels is exactly 0 where the lowest quartile is the lowest value and 0.
    dark = [one.channels[0].percentiles[2] == one.channels[0].minimum == 0 for one in facts]
    grids = [
        (_along_ras(one.shape, one.orientation), _along_ras(one.spacing_mm, one.orientation))
        for one in facts
    ]
    shapes, spacings = zip(*grids)
    return Fingerprint(
        cases=len(facts),
        shapes=shapes,
        spacings_mm=spacings,
        intensities=tuple(intensities),
        zeros=float(np.mean(dark)),
    )


def _along_ras(numbers: Sequence[Any], orientation: str) -> tuple[Any, Any, Any]:
    """One number of each voxel axis, in the order of the axes nearest to R, A and S."""
    x, y, z = (
        numbers[next(n for n, letter in enumerate(orientation) if letter in pair)]
        for pair in ("RL", "AP", "SI")
    )
    return x, y, z


def make_plan(
    dataset: Dataset,
    found: Fingerprint,
    machine: Machine,
    architecture: str = "unet",
    fixed: Mapping[str, Any] | None = None,
    *,
    judged: bool = True,
) -> list[Choice]:
    """Every setting of a run that depends on data and machine.

    fixed: dotted settings that a person made. judged: whether a validation scan holds any
    structure, so that scores in between can choose the weights.
    """
    if architecture not in known_networks():
        listed = ", ".join(sorted(known_networks()))
        raise BadConfig(f"there is no architecture '{architecture}'; medseg has {listed}")
    plan = _Plan(dict(fixed or {}))
    time_s = _duration(plan, machine)
    sizes = ("model.patch", "model.options", "model.spacing_mm", "train.steps")
    known = all(key in plan.fixed for key in sizes)  # then nothing hangs on the speed
    speed = 1e-6 if known else seconds_a_voxel(machine, len(dataset.channels))
    timed = plan.get("train.steps") is None
    affordable = 0.75 * time_s / (ENOUGH_PATCHES * speed) if timed else np.inf
    most = int(min(LARGEST_PATCH[machine.device], max(affordable, 32**3)))
    spacing = _choose_grid(plan, dataset, found, most=PATCHES_A_SCAN[machine.device] * most)
    plan.choose(
        "model.name", architecture, "as asked" if architecture != "unet" else "the usual one"
    )
    shapes = np.array(found.shapes) * np.array(found.spacings_mm) / spacing
    _choose_network(
        plan, machine, architecture=architecture, shapes=shapes, spacing=spacing, most=most
    )
    steps = _choose_steps(
        plan, machine, architecture=architecture,
        seconds_a_patch=speed * int(np.prod(plan["model.patch"])),
        time_s=time_s,
    )  # fmt: skip
    _choose_validation(plan, shape=np.median(shapes, 0), judged=judged)
    plan.choose(
        "train.log_every", int(np.clip(steps / 200, 1, 100)), "about 200 points on the curves"
    )
    _choose_augmentation(plan, dataset, passes=steps * plan["train.batch"] / max(1, found.cases))
    plan.choose("cleanup", "auto", "chosen on the validation scans")
    return plan.choices


def plan_preparation(
    dataset: Dataset, found: Fingerprint, fixed: Mapping[str, Any]
) -> list[Choice]:
    """The settings that prepared scans depend on, by the data alone and not by how fast a machine
    is: scans keep their own spacing. fixed: dotted settings that a person made.
    """
    plan = _Plan(dict(fixed))
    _choose_grid(plan, dataset, found, most=np.inf)
    if "model.recipe" in fixed:
        plan.choose("model.recipe", None, "as asked")
    return plan.choices


def _choose_grid(plan: _Plan, dataset: Dataset, found: Fingerprint, *, most: float) -> NDArray:
    """Spacing, axes and intensities; returns the spacing in mm. most: voxels of the median scan, at
    most.
    """
    spacing, reason = _spacing(np.array(found.spacings_mm), np.array(found.shapes))
    coarser, why = _coarsened(spacing, found, most)
    plan.choose("model.spacing_mm", _rounded(coarser), why or reason)
    plan.choose("model.grid", "scan", "structures lie along the scan's own axes in training data")
    plan.choose("model.intensity", *_intensity(dataset, found))
    spacing_mm: NDArray = np.array(plan["model.spacing_mm"]) * np.ones(3)
    return spacing_mm


def _choose_network(
    plan: _Plan,
    machine: Machine,
    *,
    architecture: str,
    shapes: NDArray,
    spacing: NDArray,
    most: int,
) -> None:
    """Patch and size of the network, and how it is trained. shapes (cases, 3) in voxels of the
    spacing.
    """
    shape = np.median(shapes, 0)
    pooling = _pooling(np.minimum(shape, 128), spacing)
    # Where whole scans, or the largest patches, would be seen too seldom, half the resolution
    # inside is cheaper.
    halved = (
        machine.device == "cpu"
        and architecture == "unet"
        and _halves_all(pooling)
        and most < min(shape.prod(), LARGEST_PATCH["cpu"])
    )
    room = min(int(HALVED_GAIN * most), LARGEST_PATCH["cpu"]) if halved else most
    multiple = _multiples(architecture, plan.get("model.options"), pooling)
    only = (plan.get("model.options") or {}).get("patch")  # a UNETR has one size
    patch = (
        (list(only), "the only one this network takes")
        if only
        else _patch(shapes, spacing, most=room, multiple=multiple)
    )
    plan.choose("model.patch", *patch)
    options = _options(
        architecture,
        tuple(plan["model.patch"]),
        spacing=spacing,
        device=machine.device,
        halved=halved,
    )
    plan.choose("model.options", *options)
    for key, value in training_of(architecture).items():
        if key != "warmup":  # which depends on the length of the run
            plan.choose(f"train.{key}", value, f"usual for {architecture}")
    plan.choose("train.schedule", "poly", "the rate falls all along, so that it ends with the time")


def _choose_steps(
    plan: _Plan, machine: Machine, *, architecture: str, seconds_a_patch: float, time_s: float
) -> float:
    """Batch, warm-up and averaging; returns about how many steps there will be."""
    voxels = int(np.prod(plan["model.patch"]))
    batch = 2 if machine.device == "cpu" else max(2, min(16, round(4 * 128**3 / voxels)))
    batch = -(-batch // machine.processes) * machine.processes
    plan.choose(
        "train.batch", batch, "small steps, many of them" if batch == 2 else "fills the device"
    )
    steps: float = plan.get("train.steps") or 0.75 * time_s / (
        seconds_a_patch * plan["train.batch"]
    )
    warmup = max(1, min(training_of(architecture)["warmup"], round(steps / 20)))
    plan.choose("train.warmup", warmup, f"usual for {architecture}, at most a twentieth of the run")
    ema = round(1 - min(0.01, max(0.001, 10 / max(steps, 1))), 4)
    plan.choose("train.ema", ema, "averages weights over the last few per cent of the run")
    return steps


def _choose_validation(plan: _Plan, *, shape: NDArray, judged: bool) -> None:
    """How many scans are looked at in between, and what their scores choose. shape: of the median
    scan, in voxels.
    """
    looked_at = int(np.clip(40 * 64**3 / max(shape.prod(), 1), 2, 16))
    plan.choose(
        "train.validate_samples", looked_at, "scans looked at in between; few where they are large"
    )
    if judged:
        why = "the weights that did best on these; long runs on few cases learn them by heart"
        plan.choose("train.keep", "best", why)
    else:
        plan.choose(
            "train.keep",
            "last",
            "no validation scan holds a structure, so no score can choose the weights",
        )


def _choose_augmentation(plan: _Plan, dataset: Dataset, *, passes: float) -> None:
    """Mirroring, and how much patches vary. passes: how often each case is seen."""
    plan.choose("augment.mirror", *_mirror(dataset))
    values, why = (_STRONG_AUGMENTATION, "many") if passes > MANY_PASSES else (_AUGMENTATION, "few")
    for key, value in values.items():
        plan.choose(f"augment.{key}", value, f"for {why} passes over the cases: about {passes:.0f}")


def seconds_a_step(config: Config, channels: int, machine: Machine) -> float:
    """How long a step of a planned run takes on this machine, by what planning has tried."""
    return (
        seconds_a_voxel(machine, channels) * int(np.prod(config.model.patch)) * config.train.batch
    )


#: Passes over the cases beyond which patches vary as much as they can: before, a network has not
#: learnt them by heart.
MANY_PASSES = 100
#: Where it departs from `AugmentConfig`: shapes vary in most patches, in long runs more so and in
#: more ways.
_AUGMENTATION = {
    "rotation_share": 0.5,
    "rotation_degrees": (20.0, 20.0, 20.0),
    "scaling_share": 0.5,
    "scaling": (0.8, 1.25),
}
_STRONG_AUGMENTATION = {
    "rotation_share": 0.7,
    "rotation_degrees": (30.0, 30.0, 30.0),
    "scaling_share": 0.7,
    "scaling": (0.7, 1.4),
    "anisotropic_share": 0.3,
    "elastic_share": 0.3,
    "noise_share": 0.2,
    "brightness_share": 0.3,
    "contrast_share": 0.3,
}


class _Plan:
    """Choices as they are made; what a person fixed stays."""

    def __init__(self, fixed: dict[str, Any]) -> None:
        self.fixed, self.choices = fixed, list[Choice]()

    def choose(self, key: str, value: Any, reason: str) -> None:
        if key in self.fixed:
            value, reason = self.fixed[key], "as asked"
        self.choices.append(Choice(key=key, value=value, reason=reason))

    def get(self, key: str) -> Any:
        return next((c.value for c in self.choices if c.key == key), self.fixed.get(key))

    def __getitem__(self, key: str) -> Any:
        return next(c.value for c in self.choices if c.key == key)


def _duration(plan: _Plan, machine: Machine) -> float:
    if plan.get("train.steps") is not None:
        return float(plan.get("train.time_s") or DEFAULT_TIME_S[machine.device])
    plan.choose(
        "train.time_s", DEFAULT_TIME_S[machine.device], "nobody said how long; --time says so"
    )
    return float(plan["train.time_s"])


def _spacing(spacings: NDArray, shapes: NDArray) -> tuple[NDArray, str]:
    """nnU-Net's target spacing: medians, and the 10th percentile along an axis that is far coarser
    than the others.
    """
    target = np.median(spacings, 0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    sizes = np.median(shapes, 0)
    if target[worst] > 3 * max(target[others]) and 3 * sizes[worst] < min(sizes[others]):
        finer = float(np.percentile(spacings[:, worst], 10))
        if finer > max(target[others]):
            target[worst] = finer
            return target, "medians; slices are thick, there the finer tenth of the scans rules"
    same = np.ptp(spacings, 0).max() < 1e-3 * target.max()
    return target, "all scans have it" if same else "median over the scans"


def _coarsened(spacing: NDArray, found: Fingerprint, most_voxels: float) -> tuple[NDArray, str]:
    """The spacing, coarser if the median scan has more voxels than the time allows to learn
    from.
    """
    extents = np.array(found.shapes) * np.array(found.spacings_mm)
    extent = np.median(extents, 0)
    if (extent / spacing).prod() <= most_voxels:
        return spacing, ""
    low, high = float(spacing.min()), float(extent.max())
    for _ in range(40):  # the finest axes first, until all are equally coarse
        middle = (low + high) / 2
        too_fine = (extent / np.maximum(spacing, middle)).prod() > most_voxels
        low, high = (middle, high) if too_fine else (low, middle)
    return (
        np.maximum(spacing, high),
        "coarser than the scans: at their own spacing this time would show too little",
    )


def _rounded(spacing: NDArray) -> list[float]:
    return [float(f"{x:.4g}") for x in spacing]


def _intensity(dataset: Dataset, found: Fingerprint) -> tuple[list[dict[str, Any]], str]:
    schemes: list[dict[str, Any]] = []
    flat = ""
    for name, facts in zip(dataset.channels, found.intensities):
        scale = {key: float(f"{value:.6g}") for key, value in facts.items()}
        is_ct = name.strip().lower() in ("ct", "cbct", "hu")
        if is_ct and scale["low"] < scale["high"] and scale["sd"] > 0:
            schemes.append({"scheme": "ct"} | scale)
        else:
            schemes.append({"scheme": "zscore", "nonzero": found.zeros > 0.5})
            flat = flat or (name if is_ct else "")
    kinds = {scheme["scheme"] for scheme in schemes}
    if kinds == {"ct"}:
        return (
            schemes,
            "CT numbers mean the same in all scans: clipped and scaled by what structures have",
        )
    around = "; zeros around the anatomy do not count" if found.zeros > 0.5 else ""
    if flat:
        why = f"all structures have one value in {flat}, which is no window to clip to"
        return schemes, f"{why}: each scan by its own mean and spread{around}"
    return schemes, f"scales differ between scans: each by its own mean and spread{around}"


def _pooling(shape: NDArray, spacing: NDArray) -> list[tuple[int, int, int]]:
    """Strides of each level but the first: halve the finest axes, until 4 to 7 voxels are left
    along each.
    """
    strides: list[tuple[int, int, int]] = []
    size, step = shape.astype(float), spacing.astype(float)
    while len(strides) < 5:
        halve = (size >= 8) & (
            step < 2 * step[size >= 8].min() - 1e-6 if (size >= 8).any() else False
        )
        if not halve.any():
            break
        x, y, z = (2 if one else 1 for one in halve)
        strides.append((x, y, z))
        size, step = size / strides[-1], step * strides[-1]
    return strides


def _halves_all(pooling: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the first step halves every axis, as a stem of 2 does."""
    return pooling[:1] == [(2, 2, 2)]


def _multiples(
    architecture: str, options: Mapping[str, Any] | None, pooling: Sequence[tuple[int, int, int]]
) -> NDArray:
    """What patch sizes must be multiples of."""
    if options is None and architecture in ("unet", "resenc_unet"):
        return np.prod(pooling, 0) if len(pooling) else np.ones(3, int)
    with torch.device("meta"):
        network = build_network(
            architecture, 1, 2, **(options or small(architecture, (64, 64, 64)))
        )
    return np.array(patch_multiples(network))


def _patch(
    shapes: NDArray, spacing: NDArray, most: int, multiple: NDArray
) -> tuple[list[int], str]:
    """As large as nine of ten scans or as the median scan, or what fits into `most` voxels, with
    equal edges in mm.

    shapes (cases, 3). A network that sees a whole scan also sees where in it it is.
    """
    # A size that is there, not one towards a huge scan.
    most_scans = np.quantile(shapes, 0.9, axis=0, method="lower")
    for size, words in (
        (most_scans, "as large as nine of ten scans"), (np.median(shapes, 0),
        "as large as the median scan")
    ):  # fmt: skip
        whole = np.maximum(1, np.ceil(size / multiple - 0.25)) * multiple
        if whole.prod() <= most:
            return _more_than_one_cell(whole, multiple), words
    low, high = 0.0, float((whole * spacing).max())
    for _ in range(40):
        edge = (low + high) / 2
        fits = (
            np.minimum(np.maximum(1, np.round(edge / spacing / multiple)) * multiple, whole).prod()
            <= most
        )
        low, high = (edge, high) if fits else (low, edge)
    cut = np.minimum(np.maximum(1, np.round(low / spacing / multiple)) * multiple, whole)
    return _more_than_one_cell(cut, multiple), "what this machine can go through thousands of times"


def _more_than_one_cell(sizes: NDArray, multiple: NDArray) -> list[int]:
    """Sizes of which one is increased where the coarsest level would be a single voxel, which has
    no spread to norm.
    """
    if multiple.max() > 1 and (sizes == multiple).all():
        sizes = sizes + np.where(np.arange(3) == int(sizes.argmax()), multiple, 0)
    return [int(n) for n in sizes]


def _options(
    architecture: str, patch: tuple[int, ...], *, spacing: NDArray, device: str, halved: bool
) -> tuple[dict[str, Any], str]:
    """The network's size."""
    if architecture not in ("unet", "resenc_unet"):
        return small(architecture, patch), "its small form"
    pooling = _pooling(np.array(patch), spacing)
    halved = halved and _halves_all(pooling)
    base = 32 if device == "cuda" or halved else 16
    options: dict[str, Any] = {"deep_supervision": True}
    if halved:
        pooling, options["stem"] = pooling[1:], 2
    options["features"] = [min(320, base * 2**n) for n in range(len(pooling) + 1)]
    if any(len(set(stride)) > 1 for stride in pooling):
        options |= _uneven_steps(pooling, spacing)
    if architecture == "resenc_unet":
        options["encoder_blocks"] = [1, 2, 3, 4, 6, 6][: len(options["features"])]
        options["decoder_blocks"] = [1] * (len(options["features"]) - 1)
    if halved:
        return (
            options,
            (
                "works at half the resolution and predicts 2x2x2 voxels at a time: cheap enough for"
                " the time"
            ),
        )
    return options, "halves while there are 8 voxels; " + (
        "32 features for a GPU" if base == 32 else "16 for a CPU"
    )


def _uneven_steps(pooling: Sequence[tuple[int, ...]], spacing: NDArray) -> dict[str, Any]:
    """Strides and kernels of a network that does not halve all axes alike: flat while an axis is
    twice as coarse as the others and not halved.
    """
    strides = np.array([(1, 1, 1), *pooling])
    steps = np.cumprod(strides, 0) * spacing
    near = (steps < 2 * steps.min(1, keepdims=True)) | (strides > 1)
    # As nnU-Net has it: an axis that was looked along once is so on all coarser levels. In a thin
    # slab, which is never halved across, the others become far coarser than that.
    kernels = np.where(np.logical_or.accumulate(near), 3, 1)
    return {"strides": strides.tolist(), "kernels": kernels.tolist()}


def _mirror(dataset: Dataset) -> tuple[list[int], str]:
    """Left-right mirroring, unless a structure of one side lacks its partner."""
    pairs = dataset.table.mirror_pairs()
    alone = [
        label.name
        for label in dataset.table.labels
        if is_lateral(label.name) and label.value not in pairs
    ]
    if alone:
        return [], f"not mirrored: '{alone[0]}' has a side and no partner"
    if pairs:
        return [0], "left and right structures change places"
    return [0], "bodies are alike on both sides, and along no other axis"


def as_settings(choices: Sequence[Choice]) -> dict[str, Any]:
    """Choices by their dotted keys."""
    return {choice.key: choice.value for choice in choices}


def as_json(choices: Sequence[Choice], found: Fingerprint) -> dict[str, Any]:
    """What plan.json holds: the fingerprint, and every choice with its reason."""
    return {"fingerprint": found.as_json(), "choices": [asdict(choice) for choice in choices]}
