"""One scan in memory: from channels to labels on the scan's own grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.inference.forecast import Plan, plan, window_count
from medseg.inference.intensity import INTENSITY_MODELS, intensity_table
from medseg.inference.preprocess import ModelGrid, on_one_grid, prepare, scan_to_grid
from medseg.inference.settings import (
    Model,
    Scans,
    Settings,
    as_list,
    as_volumes,
    channel_names,
    check_channels,
    mirror_axes,
)
from medseg.labels import LabelTable
from medseg.postprocess import clean, separate_fluid
from medseg.progress import Progress, silent
from medseg.volume import Volume, crop

if TYPE_CHECKING:
    import torch

    from medseg.inference.backends.predictor import Predictor
    from medseg.inference.painter import Painter
    from medseg.models import Checkpoint


#: A plane of the model's input belongs to the content if any of its voxels is brighter than this share.
CONTENT_ABOVE = 0.1
#: Voxels kept around the content.
CONTENT_MARGIN = 6
#: Logit of every other class where a voxel is known to be background.
_NEVER = -1e4


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


def segment(
    scan: Scans,
    model: Model,
    settings: Settings = Settings(),
    *,
    progress: Progress = silent,
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
        from medseg.models import load_checkpoint

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
    from medseg.models import load_checkpoint

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
    from medseg.inference.backends.opening import open_models
    from medseg.inference.backends.predictor import choose_device

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

    from medseg.inference.painter import Painter

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
    from medseg.inference.window import plan_windows, sliding_window

    spec = checkpoint.spec
    windows = plan_windows(image.shape[1:], spec.patch, settings.overlap, predictor.cell)
    total, done = window_count(windows, made.stripes), 0

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
