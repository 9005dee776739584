"""What a run will do and need: windows, stripes, memory; refused before it starts where memory will
not do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import NotEnoughMemory
from medseg.inference.frame import Frame, lay_frame, orientation_for
from medseg.inference.journey import Journey, lay_journey
from medseg.inference.preprocess import ModelGrid, model_grid
from medseg.inference.settings import (
    Model,
    Scans,
    Settings,
    as_list,
    as_volumes,
    check_channels,
    check_settings,
    mirror_axes,
    mirroring,
)
from medseg.inference.untrained import UNTRAINED
from medseg.machine import free_bytes, resident_bytes
from medseg.models import Recipe, StepRecipe
from medseg.volume import Volume

if TYPE_CHECKING:
    import torch

    from medseg.inference.backends.budget import OnCard
    from medseg.inference.window import Windows
    from medseg.models import Checkpoint, ModelSpec


#: Multiplications from which on a foreign model may run in bfloat16 on a CPU. What is less takes a
#: minute at most in float32, and bfloat16 changes some voxels in 10,000 (0.005 to 0.06 % of those
#: of small networks).
LIGHT = 2e12
#: Into how many parts a scan may be cut, to be computed one after the other, where memory is short.
_STRIPES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before it starts."""

    model: str
    device: str
    precision: str
    grid: ModelGrid | Frame | Journey | None
    windows: int
    memory_bytes: int
    stripes: int = 1
    backend: str = ""
    taken: tuple[
        str, ...
    ] = ()  # of a foreign model: what was taken of its folder, and how scans are turned
    mirror: tuple[int, ...] = ()
    # sums and logits are rounded to half precision, as a foreign model's own program does
    half: bool = False
    plain: bool = False  # PyTorch's own arithmetic in float32, every output on its own
    batch: int = 1  # windows at a time
    sums_on_card: bool = False
    data_on_card: bool = False  # image and labels, which are painted there
    card_bytes: int = 0  # of the card's memory at the peak


def plan(scan: Scans, model: Model, settings: Settings) -> Plan:
    """What segmenting this scan will do and how much memory the process will hold at its peak.

    Where less is allowed (`max_memory_bytes`) or free, the scan is computed in stripes, whose seams
    are computed twice. Raises `NotEnoughMemory` if that does not help, `BadConfig` for settings
    that do not fit the model.
    """
    limit = min(settings.max_memory_bytes or 2**62, free_bytes() + resident_bytes())
    volumes = as_volumes(scan)
    volume = volumes[0]
    check_channels(volumes, model)
    if isinstance(model, str):
        method = UNTRAINED[model]
        peak_bytes = resident_bytes() + 100_000_000 + method.bytes_per_voxel * volume.data.size
        _check_memory(peak_bytes, limit, settings)
        return Plan(
            model,
            "cpu",
            precision="rules" if method.structures else "histogram",
            grid=None,
            windows=0,
            memory_bytes=peak_bytes,
        )
    from medseg.inference.backends.predictor import choose_device

    checkpoints = as_list(model)
    check_settings(checkpoints, settings)
    device = choose_device(settings.device)
    layout = _lay(volumes, checkpoints, settings, device=device)
    for stripes in _STRIPES:
        peak_bytes = memory_needed(
            volume,
            layout,
            checkpoints=checkpoints,
            settings=settings,
            device=device.type,
            stripes=stripes,
        )
        forecast = Plan(
            checkpoints[0].spec.name,
            str(device),
            precision=layout.precision,
            grid=layout.grid,
            windows=window_count(layout.windows, stripes),
            memory_bytes=peak_bytes,
            stripes=stripes,
            taken=layout.taken,
            mirror=layout.mirror,
            half=layout.half,
            plain=layout.plain,
        )
        if peak_bytes <= limit:
            break
    _check_memory(peak_bytes, limit, settings)
    if device.type != "cuda":
        return replace(forecast, batch=settings.batch or 1)
    return _with_card(forecast, volume, layout, checkpoints, settings, device=device)


def _with_card(
    forecast: Plan,
    volume: Volume,
    layout: Laid,
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    *,
    device: torch.device,
) -> Plan:
    card = _fit_on_card(
        volume, layout, checkpoints, settings, device=device, stripes=forecast.stripes
    )
    return replace(
        forecast,
        batch=card.batch,
        sums_on_card=card.sums,
        data_on_card=card.data,
        card_bytes=card.needed_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Laid:
    """How a scan will be computed, but for stripes: grid, windows, arithmetic, mirrored axes.

    half: sums in half precision. plain: no arithmetic but PyTorch's own. taken: what is said of a
    foreign model.
    """

    grid: ModelGrid | Frame | Journey
    windows: Windows
    precision: str
    mirror: tuple[int, ...]
    half: bool = False
    plain: bool = False
    taken: tuple[str, ...] = ()


def _lay(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: torch.device,
) -> Laid:
    """The grid, the windows and the arithmetic."""
    return _LAYING[type(checkpoints[0].spec.recipe)](volumes, checkpoints, settings, device)


def _lay_own(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: torch.device,
) -> Laid:
    from medseg.inference.backends.opening import blended_features
    from medseg.inference.window import plan_windows

    spec = checkpoints[0].spec
    mirror = mirroring(checkpoints, settings, device.type)
    _, cell = blended_features(checkpoints, bool(mirror))
    grid = model_grid(volumes[0], spec.spacing, spec.grid)
    windows = plan_windows(grid.shape, spec.patch, settings.share(spec), cell=cell)
    return Laid(
        grid=grid, windows=windows, precision=_precision(settings, device, spec), mirror=mirror
    )


def _precision(settings: Settings, device: torch.device, spec: ModelSpec) -> str:
    """The arithmetic of the network: 'float32', for example."""
    from medseg.inference.backends.pytorch import choose_precision

    asked: Any = settings.precision
    return str(choose_precision(asked, device, spec.trained_precision)).removeprefix("torch.")


def _lay_journey(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: torch.device,
) -> Laid:
    from medseg.inference.ending import window_of
    from medseg.inference.window import plan_windows

    spec = checkpoints[0].spec
    recipe = spec.recipe
    assert isinstance(recipe, StepRecipe)
    journey = lay_journey(volumes, recipe, dicom=settings.from_dicom)
    patch = window_of(recipe, spec.patch, journey.shape)
    shape = [max(size, side) for size, side in zip(journey.shape, patch)]
    windows = plan_windows(shape, patch, settings.share(spec), cell=1, layout=recipe.layout)
    plain = settings.exact or settings.precision == "fp32"
    # bfloat16 changed 0.01 to 2 % of the voxels of such models; who wants it asks for it.
    single = plain or (settings.precision == "auto" and device.type == "cpu")
    orientation = journey.orientation
    return Laid(
        grid=journey,
        windows=windows,
        precision="float32" if single else _precision(settings, device, spec),
        mirror=mirroring(checkpoints, settings, device.type),
        plain=plain,
        taken=(
            str(spec.card.get("made_by", "MONAI")),
            str(spec.card.get("network", spec.architecture)),
            "scan as it is stored" if orientation == "stored" else f"scan turned to {orientation}",
        ),
    )


def _lay_frame(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: torch.device,
) -> Laid:
    from medseg.inference.backends.opening import blended_features
    from medseg.inference.window import plan_windows

    spec = checkpoints[0].spec
    assert isinstance(spec.recipe, Recipe)
    mirror = mirroring(checkpoints, settings, device.type)
    features, _ = blended_features(checkpoints, bool(mirror))
    share = settings.share(spec)
    orientation = orientation_for(spec.recipe, settings.orientation, dicom=settings.from_dicom)
    frame = lay_frame(volumes, spec.recipe, orientation, region=settings.region, patch=spec.patch)
    shape = [max(size, patch) for size, patch in zip(frame.shape, spec.patch)]
    windows = plan_windows(shape, spec.patch, share, cell=1, layout=spec.recipe.layout)
    work = multiply_adds(spec) * windows.count * len(checkpoints) * 2 ** len(mirror)
    light = settings.precision == "auto" and device.type == "cpu" and work < LIGHT
    rounded = settings.exact or settings.every_output
    precision = "float32" if rounded or light else _precision(settings, device, spec)
    return Laid(
        grid=frame,
        windows=windows,
        precision=precision,
        mirror=mirror,
        half=rounded or _rounds(checkpoints, precision, device.type, features=features),
        taken=taken_of(checkpoints, mirror, orientation) + _about_region(frame, settings),
    )


def _about_region(frame: Frame, settings: Settings) -> tuple[str, ...]:
    if settings.region is None:
        return ()
    size = " x ".join(str(side.stop - side.start) for side in frame.box)
    return (f"only {size} voxels around what is asked for",)


#: Kind of a model's recipe -> how its scans are laid.
_LAYING: dict[type, Callable[..., Laid]] = {
    type(None): _lay_own,
    Recipe: _lay_frame,
    StepRecipe: _lay_journey,
}


def multiply_adds(spec: ModelSpec) -> float:
    """About how many multiplications the network of a foreign model makes for one window."""
    if spec.architecture != "nnunet":  # then nobody counted, and no run counts as light
        return float("inf")
    options = spec.options
    size = np.array(spec.patch, float)
    total, below = 0.0, spec.inputs
    for n, features in enumerate(options["features"]):
        size = size / options["strides"][n]
        taps = float(np.prod(options["kernels"][n])) * float(np.prod(size)) * features
        down = options["encoder_blocks"][n] * (2 if options["residual"] else 1)
        up = options["decoder_blocks"][-(n + 1)] + 1 if n < len(options["decoder_blocks"]) else 0
        total += taps * (below + (down - 1 + up) * features)
        below = features
    return total


def _rounds(checkpoints: Sequence[Checkpoint], precision: str, device: str, features: int) -> bool:
    """Whether a foreign model's sums are rounded as its own program does it, though nobody asked
    for every voxel.

    In float32 that decides the last voxels in 100,000; and where there are few classes, half
    precision is smaller, too. With more of them the features before the last layer are added up
    instead, whose number the classes do not change.
    """
    spec = checkpoints[0].spec
    few = 2 * (spec.outputs * len(checkpoints) + 1) <= 4 * features
    return spec.recipe is not None and precision == "float32" and device == "cpu" and few


def taken_of(
    checkpoints: Sequence[Checkpoint], mirror: Sequence[int], orientation: str
) -> tuple[str, ...]:
    """What is taken of a foreign model, for people: trainer, plans, folds, mirroring, and how scans
    are turned.
    """
    card = checkpoints[0].spec.card
    folds = ", ".join(str(one.spec.card.get("fold", "")) for one in checkpoints)
    facts = [str(card.get(key, "")) for key in ("trainer", "plans", "configuration")]
    facts += [
        f"fold {folds}" if len(checkpoints) == 1 else f"folds {folds}",
        str(card.get("checkpoint", "")),
    ]
    axes = mirror_axes(checkpoints)
    if mirror:
        facts.append(f"mirrored along axes {', '.join(map(str, mirror))}")
    elif axes:
        facts.append(
            f"not mirrored; --tta mirrors as in training and takes {2 ** len(axes)} times as long"
        )
    else:
        facts.append("not mirrored, as in training")
    facts.append(
        "scan as it is stored" if orientation == "stored" else f"scan turned to {orientation}"
    )
    return tuple(fact for fact in facts if fact)


def _check_memory(needed: int, limit: int, settings: Settings) -> None:
    if needed > limit:
        why = (
            "allowed; raise --max-memory"
            if limit == settings.max_memory_bytes
            else "free; close other programs"
        )
        raise NotEnoughMemory(
            f"this run needs about {needed / 1e9:.2f} GB of memory and {limit / 1e9:.2f} GB are"
            f" {why} or crop the scan"
        )


def window_count(windows: Windows, stripes: int) -> int:
    """How many windows are computed, those twice that lie on a seam."""
    per_column = len(windows.starts[0]) * len(windows.starts[2])
    return per_column * sum(len(windows.columns(*part)) for part in windows.stripes(stripes))


def memory_needed(
    volume: Volume,
    laid: Laid,
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: str,
    stripes: int,
) -> int:
    """Bytes of this process at its peak: what it holds now, and the largest of its three phases.

    Sizes follow from what the code allocates; `tests/benchmarks/bench_memory.py` compares them with
    what is measured.
    """
    from medseg.inference.backends.activations import activation_bytes

    spec, grid, windows = checkpoints[0].spec, laid.grid, laid.windows
    features, cell, deferred = _blended(checkpoints, laid)
    image = _image_bytes(grid, spec, cell)
    activations = activation_bytes(
        _with_patch(checkpoints[0], windows, cell), max(1, settings.batch), deferred
    )
    bfloat = laid.precision == "bfloat16" and device == "cpu"
    network = _network_bytes(checkpoints, activations, bfloat=bfloat)
    network += 4 * features * int(np.prod(windows.patch))  # of one window
    if laid.half:
        sums = _half_sums_bytes(windows, features, stripes)
    else:
        sums = _sums_bytes(windows, features, stripes) + _cells_bytes(windows, spec.outputs, cell)
    maps = _maps_bytes(volume.data.size, settings, spec)
    labels = _label_bytes(volume.data.size, spec, grid)
    resampling = image + _resampling_bytes(grid, exact=settings.exact)
    # A card holds the network, and CUDA takes memory of this process; a Mac's memory is one.
    painting = labels + maps + sums + image + (_CUDA_BYTES if device == "cuda" else network)
    cleaning = labels * 2 + maps
    if settings.cleanup and (spec.cleanup or spec.fluid):
        cleaning += 12 * volume.data.size
    return resident_bytes() + _LIBRARIES_BYTES + max(resampling, painting, cleaning)


def _blended(checkpoints: Sequence[Checkpoint], laid: Laid) -> tuple[int, int, bool]:
    """How many numbers are added up of each voxel, or cell of so many along each axis; and whether
    they are features before the last layer.
    """
    from medseg.inference.backends.opening import blended_features

    spec = checkpoints[0].spec
    features, cell = blended_features(checkpoints, bool(laid.mirror))
    if laid.half or laid.plain:
        features, cell = spec.outputs * len(checkpoints), 1
    deferred = (features, cell) != (spec.outputs, 1) and not (laid.half or laid.plain)
    # With a journey the weights of windows are added up, too.
    return features + spec.skip_empty + isinstance(laid.grid, Journey), cell, deferred


def _fit_on_card(
    volume: Volume,
    laid: Laid,
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    *,
    device: torch.device,
    stripes: int,
) -> OnCard:
    """What of a run lies on the card, by the memory that is free there."""
    from medseg.inference.backends.activations import activation_bytes
    from medseg.inference.backends.budget import fit_on_card
    from medseg.inference.backends.cards import free_bytes_on

    features, cell, deferred = _blended(checkpoints, laid)
    checkpoint = _with_patch(checkpoints[0], laid.windows, cell)
    window = 4 * features * int(np.prod(laid.windows.patch))
    maps = activation_bytes(checkpoint, 1, deferred)
    # Files hold half precision, and a card float32.
    weights = 2 * sum(one.weight_bytes for one in checkpoints)
    return fit_on_card(
        lambda count: count * (maps + window),
        weight_bytes=weights,
        # One window more while it is added.
        sums_bytes=_sums_bytes(laid.windows, features, stripes) + window,
        data_bytes=_data_bytes(volume, laid, checkpoints[0].spec, settings, cell=cell),
        free_bytes=free_bytes_on(device),
        batch=settings.batch,
    )


def _data_bytes(
    volume: Volume, laid: Laid, spec: ModelSpec, settings: Settings, *, cell: int
) -> int | None:
    """Bytes of what a card holds where it paints: image, labels, and what is made of a block on the
    way; None where it does not paint: probabilities, journeys, and what is rounded on purpose.
    """
    asks_for_maps = settings.probabilities or settings.uncertainty or settings.every_output
    if isinstance(laid.grid, Journey) or laid.half or laid.plain or asks_for_maps:
        return None
    image = _image_bytes(laid.grid, spec, cell)
    labels = _label_bytes(volume.data.size, spec, laid.grid)
    return image + labels + _cells_bytes(laid.windows, spec.outputs, cell) + _SLAB_BYTES


#: What painting takes of a card for some scan voxels at a time.
_SLAB_BYTES = 600_000_000


def _with_patch(checkpoint: Checkpoint, windows: Windows, cell: int) -> Checkpoint:
    """A model whose windows are those of a run, where they are as large as the image."""
    patch = tuple(side * cell for side in windows.patch)
    if not isinstance(checkpoint.spec.recipe, StepRecipe) or patch == checkpoint.spec.patch:
        return checkpoint
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update={"patch": patch}))


def _image_bytes(grid: ModelGrid | Frame | Journey, spec: ModelSpec, cell: int) -> int:
    """Bytes of the channels on the network's grid, and of their copy where they are padded."""
    image = 4 * spec.inputs * int(np.prod(grid.shape))
    if not isinstance(grid, ModelGrid) and any(size < p for size, p in zip(grid.shape, spec.patch)):
        image *= 2
    if any(size % cell for size in grid.shape):  # cells reach beyond the image
        image *= 2
    return image


def _network_bytes(checkpoints: Sequence[Checkpoint], activations: int, *, bfloat: bool) -> int:
    """Bytes of weights, as float32 and as the kernels want them, and of activations.

    Files hold half precision; Winograd wants eight times the float32.
    """
    weights = sum(one.weight_bytes for one in checkpoints)
    return 4 * weights + activations // 2 if bfloat else 18 * weights + activations


def _block_voxels(windows: Windows) -> int:
    """Voxels, but for depth, of a block of the last row."""
    return windows.patch[0] * max(1, windows.patch[1] // 4)


def _sums_bytes(windows: Windows, features: int, stripes: int) -> int:
    """Bytes of the sums, the block that is complete, once more with the planes before it, and its
    classes.
    """
    rows, patch, depth = windows.starts[0], windows.patch, windows.padded[2]
    carry = 0
    if len(rows) > 1:
        step = min(b - a for a, b in pairwise(rows))
        carry = max(0, patch[0] - step) * _span(windows, stripes)
    block = _block_voxels(windows)
    planes = patch[0] * patch[1] + carry + 2 * block + windows.shape[1]
    return 4 * features * depth * planes + 2 * depth * block


def _cells_bytes(windows: Windows, outputs: int, cell: int) -> int:
    """Bytes of the logits of a block's voxels where features are of cells of several."""
    if cell == 1:
        return 0
    depth = windows.padded[2]
    return 4 * outputs * cell**3 * depth * (_block_voxels(windows) + windows.shape[1] // cell)


def _half_sums_bytes(windows: Windows, features: int, stripes: int) -> int:
    """Bytes of a whole row of windows in half precision, of which blocks are copied out."""
    depth = windows.padded[2]
    row = windows.patch[0] * _span(windows, stripes) * depth
    rows = 2 if len(windows.starts[0]) > 1 else 1
    return 2 * (features + 1) * row * rows + 4 * features * depth * 4 * _block_voxels(windows)


def _maps_bytes(voxels: int, settings: Settings, spec: ModelSpec) -> int:
    """Bytes of the maps that are asked for; with probabilities one more while they are made."""
    if settings.every_output:  # those of this model, their sum, and one on its way from there
        return 4 * voxels * (2 * spec.outputs + 2)
    count = len(settings.probabilities) + settings.uncertainty + bool(settings.probabilities)
    return 4 * voxels * count


def _label_bytes(voxels: int, spec: ModelSpec, grid: ModelGrid | Frame | Journey) -> int:
    """Bytes of the labels; in a frame as they are painted, and as they lie in the scan."""
    each = 1 if max(spec.classes) < 256 else 2
    return voxels * each * (1 if isinstance(grid, ModelGrid) else 2)


def _resampling_bytes(grid: ModelGrid | Frame | Journey, *, exact: bool) -> int:
    """Bytes that the way to the network's grid takes beside the result."""
    if isinstance(grid, Frame):
        return _regridding(grid, exact=exact)
    if isinstance(
        grid, Journey
    ):  # every channel in float32 before and after a step, one in 64 bits
        there, here = grid.scan.data.size, int(np.prod(grid.shape))
        return (8 * grid.inputs + 8) * max(there, here) + 200_000_000
    return 2 * 4 * 64 * grid.shape[1] * grid.shape[2]


def _regridding(frame: Frame, *, exact: bool) -> int:
    """Bytes that one channel takes on its way to the network's grid beside the result."""
    cropped_voxels = int(np.prod(frame.cropped))
    if frame.cropped == frame.shape:
        return 4 * cropped_voxels
    padded_voxels = int(np.prod([n + 24 for n in frame.cropped]))
    # In float32: the scan, padded, its spline's coefficients. By scipy: in float64, padded,
    # filtered, and the result.
    return 4 * cropped_voxels + (
        8 * (cropped_voxels + 2 * padded_voxels) + 16 * int(np.prod(frame.shape))
        if exact
        else 8 * padded_voxels
    )


def _span(windows: Windows, stripes: int) -> int:
    """The most planes of the second axis that the windows of a stripe cover."""
    return max(
        columns[-1] + windows.patch[1] - columns[0]
        for columns in (windows.columns(*part) for part in windows.stripes(stripes))
    )


#: What is loaded between making the plan and the peak: numba, the compiled kernels, oneDNN's
#: buffers.
_LIBRARIES_BYTES = 150_000_000
#: What CUDA, cuDNN and cuBLAS take of a process's own memory (an estimate; none was measured here).
_CUDA_BYTES = 1_000_000_000
