"""From a scan to labels on its own grid: resample, normalise, window, paint, clean."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadModel, NotEnoughMemory
from medseg.intensity import INTENSITY_MODELS, intensity_table
from medseg.labels import LabelTable
from medseg.memory import free_bytes, resident_bytes
from medseg.postprocess.cleanup import clean
from medseg.postprocess.fluid import separate_fluid
from medseg.preprocess import ModelGrid, model_grid, on_one_grid, prepare, scan_to_grid
from medseg.volume import Volume, crop

if TYPE_CHECKING:
    import torch

    from medseg.backends import Predictor
    from medseg.models.folder import Checkpoint
    from medseg.painter import Painter
    from medseg.window import Windows


#: One checkpoint, several of the same task whose logits are averaged, or the name of an intensity model.
Model: TypeAlias = "Checkpoint | Sequence[Checkpoint] | str"
#: One scan, or one for each of the model's channels, in its order and on one grid.
Scans: TypeAlias = Volume | Sequence[Volume]
#: Called with (what is being done, steps done, steps in all).
Progress = Callable[[str, int, int], None]
#: A plane of the model's input belongs to the content if any of its voxels is brighter than this share.
CONTENT_ABOVE = 0.1
#: Voxels kept around the content.
CONTENT_MARGIN = 6
#: Logit of every other class where a voxel is known to be background.
_NEVER = -1e4
#: Into how many parts a scan may be cut, to be computed one after the other, where memory is short.
_STRIPES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before it starts."""

    model: str
    device: str
    precision: str
    grid: ModelGrid | None
    windows: int
    memory_bytes: int
    stripes: int = 1
    backend: str = ""


@dataclass
class Segmentation:
    """Labels on the scan's grid, what they mean, and how long each part took in seconds.

    maps: what was asked for beside the labels, on the same grid, float32: 'probability_VALUE', 'uncertainty' (0 to 1).
    confidence: of each label found by a network, how probable it held it where it chose it, before cleaning up.
    """

    labels: Volume
    table: LabelTable
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)
    maps: dict[str, Volume] = field(default_factory=dict)
    confidence: dict[int, float] = field(default_factory=dict)


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


def content_box(image: torch.Tensor) -> tuple[slice, slice, slice]:
    """The part of a model input (C, X, Y, Z) that is more than air, with a margin; all of it if there is only air.

    Windows are laid over this part, so that air around a head, however much of it a scan has, changes nothing: instance
    norm would otherwise see another mean with every margin.
    """
    filled = image[0] > CONTENT_ABOVE
    for channel in image[1:]:
        filled |= channel > CONTENT_ABOVE
    box = []
    for axis in range(3):
        planes = filled.any(dim=tuple({0, 1, 2} - {axis})).nonzero()
        size = filled.shape[axis]
        first, last = (int(planes[0]), int(planes[-1])) if len(planes) else (0, size - 1)
        box.append(slice(max(0, first - CONTENT_MARGIN), min(size, last + 1 + CONTENT_MARGIN)))
    return box[0], box[1], box[2]


def plan(scan: Scans, model: Model, settings: Settings) -> Plan:
    """What segmenting this scan will do and how much memory the process will hold at its peak.

    Where less is allowed (`max_memory_bytes`) or free, the scan is computed in stripes, whose seams are computed twice.
    Raises `NotEnoughMemory` if that does not help, `BadConfig` for settings that do not fit the model.
    """
    limit = min(settings.max_memory_bytes or 2**62, free_bytes() + resident_bytes())
    volumes = as_volumes(scan)
    volume = volumes[0]
    check_channels(volumes, model)
    if isinstance(model, str):
        needed = resident_bytes() + 100_000_000 + 3 * volume.data.size
        _check_memory(needed, limit, settings)
        return Plan(model, "cpu", "histogram", None, 0, needed)
    from medseg.backends import blended_features, choose_device, choose_precision
    from medseg.window import plan_windows

    checkpoints = as_list(model)
    spec = checkpoints[0].spec
    _check_settings(checkpoints, settings)
    device = choose_device(settings.device)  # type: ignore[arg-type]
    precision = str(choose_precision(settings.precision, device)).removeprefix("torch.")  # type: ignore[arg-type]
    grid = model_grid(volume, spec.spacing, spec.grid)
    _, cell = blended_features(checkpoints, settings.tta)
    windows = plan_windows(grid.shape, spec.patch, settings.overlap, cell)
    for stripes in _STRIPES:
        half = precision == "bfloat16" and device.type == "cpu"
        needed = _memory(volume, grid, windows, checkpoints, settings, device.type, stripes, half)
        made = Plan(spec.name, str(device), precision, grid, _count(windows, stripes), needed, stripes)
        if needed <= limit:
            return made
    _check_memory(needed, limit, settings)
    return made


def _check_memory(needed: int, limit: int, settings: Settings) -> None:
    if needed > limit:
        why = "allowed; raise --max-memory" if limit == settings.max_memory_bytes else "free; close other programs"
        raise NotEnoughMemory(
            f"this run needs about {needed / 1e9:.2f} GB of memory and {limit / 1e9:.2f} GB are {why} or crop the scan"
        )


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


def _check_settings(checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
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


def _count(windows: Windows, stripes: int) -> int:
    per_column = len(windows.starts[0]) * len(windows.starts[2])
    return per_column * sum(len(windows.columns(*part)) for part in windows.stripes(stripes))


def _memory(
    volume: Volume,
    grid: ModelGrid,
    windows: Windows,
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    device: str,
    stripes: int,
    half: bool = False,
) -> int:
    """Bytes of this process at its peak: what it holds now, and the largest of its three phases.

    Sizes follow from what the code allocates; `tests/benchmarks/bench_memory.py` compares them with what is measured.
    """
    from medseg.backends import activation_bytes, blended_features

    spec = checkpoints[0].spec
    scan, image = volume.data.size, 4 * spec.channels * int(np.prod(grid.shape))
    features, cell = blended_features(checkpoints, settings.tta)
    deferred = (features, cell) != (spec.outputs, 1)
    features += spec.skip_empty
    patch, depth = windows.patch, windows.padded[2]
    # The network: weights as float32 and as the kernels want them (files hold half precision; Winograd wants eight
    # times the float32), activations, one window's features.
    weights = sum(one.weight_bytes for one in checkpoints)
    activations = activation_bytes(checkpoints[0], max(1, settings.batch), deferred)
    network = 4 * weights + activations // 2 if half else 18 * weights + activations
    network += 4 * features * int(np.prod(patch))
    # The sums, the block that is complete, once more with the planes before it, and its classes.
    rows = windows.starts[0]
    steps = [b - a for a, b in pairwise(rows)] or [windows.shape[0]]
    span = _span(windows, stripes)
    carry = max(0, patch[0] - min(steps)) * span if len(rows) > 1 else 0
    block = patch[0] * max(1, patch[1] // 4)  # of the last row
    sums = 4 * features * depth * (patch[0] * patch[1] + carry + 2 * block + windows.shape[1]) + 2 * depth * block
    if cell > 1:  # the logits of a block's voxels; and where cells reach beyond the image, it is padded
        sums += 4 * spec.outputs * cell**3 * depth * (block + windows.shape[1] // cell)
        image *= 2 if any(size % cell for size in grid.shape) else 1
    maps = 4 * scan * (len(settings.probabilities) + settings.uncertainty) + (4 * scan if settings.probabilities else 0)
    labels = scan * (1 if max(spec.classes) < 256 else 2)
    painting = labels + maps + sums + image + (network if device == "cpu" else 0)
    resampling = image + 2 * 4 * 64 * grid.shape[1] * grid.shape[2]
    cleaning = labels * 2 + maps + (12 * scan if settings.cleanup and (spec.cleanup or spec.fluid) else 0)
    return resident_bytes() + _LIBRARIES_BYTES + max(resampling, painting, cleaning)


def _span(windows: Windows, stripes: int) -> int:
    """The most planes of the second axis that the windows of a stripe cover."""
    return max(
        columns[-1] + windows.patch[1] - columns[0]
        for columns in (windows.columns(*part) for part in windows.stripes(stripes))
    )


#: What is loaded between making the plan and the peak: numba, the compiled kernels, oneDNN's buffers.
_LIBRARIES_BYTES = 150_000_000


def segment(
    scan: Scans,
    model: Model,
    settings: Settings = Settings(),
    *,
    progress: Progress = lambda what, done, total: None,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Segmentation:
    """Segment a scan with a checkpoint, a model by its name or folder, or by intensity ('otsu', 'kmeans', 'gmm').

    Models of several channels take a scan for each, in the model's order and on one grid. Several checkpoints of one
    task are averaged. The labels lie on the scan's own grid: same shape, same affine. `announce` is told the plan
    before it is carried out. Raises `BadFile` for scans that are not images, `BadConfig` for too few or too many,
    `BadModel` for models that give no finite values or do not belong together, `NotEnoughMemory` before anything is
    computed.
    """
    volumes = as_volumes(scan)
    if isinstance(model, str) and model not in INTENSITY_MODELS:
        from medseg.models.folder import load_checkpoint

        model = load_checkpoint(model)
    check_channels(volumes, model)
    names = channel_names(model)
    volumes = on_one_grid(volumes, names if all(names) else ())
    for volume, name in zip(volumes, names):
        try:
            check_image(volume)
        except BadFile as error:
            raise BadFile(f"{name}: {error}" if name and len(volumes) > 1 else str(error)) from None
    if not isinstance(model, str) and as_list(model)[0].spec.locate is not None:
        return _segment_located(volumes, as_list(model), settings, progress, announce)
    made = plan(volumes, model, settings)
    announce(made)
    if isinstance(model, str):
        start = time.perf_counter()
        function, classes = INTENSITY_MODELS[model]
        labels = function(volumes[0], classes)
        return Segmentation(labels, intensity_table(model), made, {"network": time.perf_counter() - start})
    return _segment_with_network(volumes, as_list(model), settings, made, progress)


def _segment_located(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    progress: Progress,
    announce: Callable[[Plan], None],
) -> Segmentation:
    """Find the region with the coarse model that the model names, and segment only that; the rest is background.

    A coarse model of one channel looks at the first scan.
    """
    from medseg.models.folder import load_checkpoint

    locate = checkpoints[0].spec.locate
    assert locate is not None
    coarse = load_checkpoint(str(checkpoints[0].folder / locate.folder))
    plain = replace(settings, tta=False, probabilities=(), uncertainty=False)
    found = segment(volumes[: 1 if coarse.spec.channels == 1 else None], coarse, plain, progress=progress)
    volume = volumes[0]
    box = region_of(found.labels, locate.labels or coarse.spec.classes[1:], locate.margin_mm)
    start = (box[0].start, box[1].start, box[2].start)
    parts = [crop(one, start, tuple(side.stop - side.start for side in box)) for one in volumes]
    made = plan(parts, checkpoints, settings)
    announce(made)
    result = _segment_with_network(parts, checkpoints, settings, made, progress)
    result.seconds["locate"] = sum(found.seconds.values())
    for name, inside in {"": result.labels, **result.maps}.items():
        whole = np.zeros(volume.shape, inside.data.dtype)
        whole[box] = inside.data
        if name:
            result.maps[name] = volume.with_data(whole)
        else:
            result.labels = volume.with_data(whole)
    return result


def region_of(labels: Volume, values: Sequence[int], margin_mm: float) -> tuple[slice, slice, slice]:
    """The box around labels with a margin, cut at the volume's edges; the whole volume if none of them is there."""
    box = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        planes = np.flatnonzero(np.isin(labels.data, values).any(axis=others))
        margin = int(np.ceil(margin_mm / labels.spacing_mm[axis]))
        ends = (planes[0] - margin, planes[-1] + 1 + margin) if len(planes) else (0, labels.shape[axis])
        box.append(slice(max(0, int(ends[0])), min(labels.shape[axis], int(ends[1]))))
    return box[0], box[1], box[2]


class _Clock:
    """Seconds of what overlaps nothing else, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _segment_with_network(
    volumes: Sequence[Volume], checkpoints: Sequence[Checkpoint], settings: Settings, made: Plan, progress: Progress
) -> Segmentation:
    from medseg.backends import choose_device, open_models

    spec, clock, volume = checkpoints[0].spec, _Clock(), volumes[0]
    progress("resampling", 0, 1)
    with clock("resample"):
        image, grid = prepare(volumes, spec.spacing, spec.grid, spec.intensities, names=spec.channel_names)
        x, y, z = grid.shape
        box = content_box(image) if spec.dark_air else (slice(0, x), slice(0, y), slice(0, z))
    device = choose_device(settings.device)  # type: ignore[arg-type]
    with clock("load"):
        predictor = open_models(
            checkpoints,
            backend=settings.backend,
            device=settings.device,  # type: ignore[arg-type]
            precision=settings.precision,  # type: ignore[arg-type]
            mirror=mirror_axes(checkpoints) if settings.tta else (),
            windows=made.windows,
        )
    batch = settings.batch or (4 if device.type == "cuda" else 1)
    painter = _painter(volume, checkpoints[0], predictor, settings, grid, box)
    _paint_windows(painter, predictor, image[:, *box], checkpoints[0], settings, made, batch, clock, progress)
    del image
    labels = volume.with_data(painter.labels)
    if settings.cleanup and spec.fluid:
        with clock("refine"):
            labels = separate_fluid(labels, volume, spec.fluid.tissue, spec.fluid.value)
    if settings.cleanup and spec.cleanup:
        progress("cleaning up", 0, 1)
        with clock("cleanup"):
            labels = clean(labels, list(spec.cleanup))
    names = [f"probability_{value}" for value in settings.probabilities] + ["uncertainty"] * settings.uncertainty
    maps = {name: volume.with_data(data) for name, data in zip(names, painter.maps)}
    made = replace(made, precision=predictor.precision, backend=predictor.backend)
    return Segmentation(labels, checkpoints[0].table, made, clock.seconds, maps, painter.confidence())


def _painter(
    volume: Volume,
    checkpoint: Checkpoint,
    predictor: Predictor,
    settings: Settings,
    grid: ModelGrid,
    box: tuple[slice, slice, slice],
) -> Painter:
    """A painter of what the model says inside the content box; the rest of the scan is background."""
    import torch

    from medseg.painter import Painter

    spec, head = checkpoint.spec, predictor.head
    limits = [
        (0.0 if side.start else -np.inf, side.stop - side.start - 1.0 if side.stop < size else np.inf)
        for side, size in zip(box, grid.shape)
    ]
    if head is not None and spec.skip_empty:  # one more feature says that a window was left out
        never = np.full((spec.outputs, 1), _NEVER, np.float32)
        never[: not spec.regions] = 0
        head = head.with_feature(never.repeat(predictor.cell**3, 0))
    wanted: list[int] | None = [spec.classes.index(value) - spec.regions for value in settings.probabilities]
    if not wanted and not settings.uncertainty:
        wanted = None
    return Painter(
        volume.shape,
        scan_to_grid(volume, grid, [side.start for side in box]),
        [side.stop - side.start for side in box],
        spec.classes,
        head=head,
        regions=spec.regions,
        wanted=wanted,
        limits=limits,
        certain=True,
        cell=predictor.cell,
        workers=torch.get_num_threads(),
    )


def _paint_windows(
    painter: Painter,
    predictor: Predictor,
    image: torch.Tensor,
    checkpoint: Checkpoint,
    settings: Settings,
    made: Plan,
    batch: int,
    clock: _Clock,
    progress: Progress,
) -> None:
    """Run the windows over the content of a scan and paint what is finished.

    With a GPU the painting is done beside it, in a thread of its own, one block behind.
    """
    from medseg.window import plan_windows, sliding_window

    spec = checkpoint.spec
    windows = plan_windows(image.shape[1:], spec.patch, settings.overlap, predictor.cell)
    total, done = _count(windows, made.stripes), 0

    def predict(patches: torch.Tensor) -> torch.Tensor:
        with clock("network"):
            return predictor(patches)

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress("segmenting", done, total)

    def paint(x: int, y: int, data: NDArray[np.float32]) -> None:
        with clock("paint"):
            painter.add(x, y, data)

    empty = None
    if spec.skip_empty:
        air = [0.0] * predictor.features + [1.0]
        if predictor.head is None:
            air = [_NEVER] * spec.outputs
            air[0] = _NEVER if spec.regions else 0.0
        empty = (CONTENT_ABOVE, air)
    device = made.device
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:
        for stripe in windows.stripes(made.stripes):
            painter.begin_part()
            behind: Future[None] | None = None
            run = partial(sliding_window, predict, image, windows, batch=batch, stripe=stripe, empty=empty)
            for block in run(device=device, cell=predictor.cell, progress=count):
                if device == "cpu":
                    paint(block.x, block.y, block.data)
                    continue
                if behind is not None:
                    behind.result()
                behind = beside.submit(paint, block.x, block.y, block.data)
            if behind is not None:
                behind.result()
    spent = time.perf_counter() - start
    clock.seconds["blend"] = max(0.0, spent - clock.seconds.get("network", 0.0) - clock.seconds.get("paint", 0.0))


def check_image(volume: Volume) -> None:
    """Raise `BadFile` if the voxels are not an image: one value everywhere, or a label map given by mistake."""
    data = volume.data
    # The middle of the scan tells, and is quick to look at.
    sample = data[tuple(slice(max(0, n // 2 - 48), n // 2 + 48) for n in data.shape)]
    if data.size and data.min() == data.max():
        raise BadFile("has one intensity everywhere; there is nothing to segment")
    if sample.size < 1000:
        return
    whole = np.issubdtype(sample.dtype, np.integer) or bool((sample == np.round(sample)).all())
    if whole and _piecewise_constant(sample):
        raise BadFile("looks like a label map, not an image; give the scan it was made from")


def _piecewise_constant(sample: NDArray) -> bool:
    """Whether most neighbours along every axis are equal, the most frequent value left out: so are label maps."""
    values, counts = np.unique(sample, return_counts=True)
    if len(values) <= 3:
        return True
    content = sample != values[counts.argmax()]
    shares = []
    for axis in range(3):
        if sample.shape[axis] < 3:
            continue
        a, b = (np.take(sample, range(s, s + sample.shape[axis] - 1), axis) for s in (0, 1))
        inside = np.take(content, range(sample.shape[axis] - 1), axis)
        shares.append(float((a == b)[inside].mean()) if inside.any() else 1.0)
    return bool(shares) and min(shares) > 0.6
