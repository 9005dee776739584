"""From a scan to labels on its own grid: resample, normalise, window, paint, clean."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.cleanup import clean
from medseg.errors import BadFile, NotEnoughMemory
from medseg.intensity import INTENSITY_MODELS, intensity_table
from medseg.labels import LabelTable
from medseg.refine import separate_fluid
from medseg.volume import Volume, reorient, resample

if TYPE_CHECKING:
    import torch

    from medseg.checkpoint import Checkpoint

#: Called with (what is being done, steps done, steps in all).
Progress = Callable[[str, int, int], None]
#: A plane of the model's input belongs to the content if any of its voxels is brighter than this share.
CONTENT_ABOVE = 0.1
#: Voxels kept around the content.
CONTENT_MARGIN = 6


@dataclass(frozen=True)
class ModelGrid:
    """The grid a model sees: boxes of equal edges along RAS, around the whole scan whichever way it is stored.

    It depends on where the scan lies in space alone, so every way of storing the same scan gives the same result.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    fine: tuple[int, int, int]  # points averaged along each axis for one voxel, where the scan is finer than the grid


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before it starts."""

    model: str
    device: str
    precision: str
    grid: ModelGrid | None
    windows: int
    memory_bytes: int


@dataclass
class Segmentation:
    """Labels on the scan's grid, what they mean, and how long each part took in seconds."""

    labels: Volume
    table: LabelTable
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to run a model; see `medseg infer --help`."""

    device: str = "auto"
    precision: str = "auto"
    overlap: float = 0.5
    cleanup: bool = True


def model_grid(volume: Volume, spacing_mm: float) -> ModelGrid:
    """The grid of `spacing_mm` along RAS that covers every voxel of the scan."""
    corners = np.array([(*c, 1.0) for c in product(*((-0.5, n - 0.5) for n in volume.shape))])
    world = (volume.affine @ corners.T)[:3]
    low, high = world.min(axis=1), world.max(axis=1)
    shape = np.maximum(1, np.ceil((high - low) / spacing_mm - 1e-3)).astype(int)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (low + high) / 2 - (shape - 1) / 2 * spacing_mm
    # Along each world axis, the spacing of the voxel axis that runs closest to it says how fine the scan is there.
    directions = np.abs(volume.affine[:3, :3]) / volume.spacing_mm
    spacing_along = np.array(volume.spacing_mm)[directions.argmax(axis=1)]
    fine = np.clip(np.round(spacing_mm / spacing_along), 1, 8).astype(int)
    return ModelGrid(affine, tuple(shape.tolist()), tuple(fine.tolist()))


def to_model_grid(volume: Volume, grid: ModelGrid) -> NDArray[np.float32]:
    """The scan on the model's grid, float32: trilinear at the grid's points, averaged where the scan is finer.

    Done a few planes at a time, so that the finer grid never exists as a whole.
    """
    out = np.empty(grid.shape, np.float32)
    volume = reorient(volume, "RAS")
    fine = np.array(grid.fine)
    step = np.diag([*(1 / fine), 1.0])
    step[:3, 3] = (1 / fine - 1) / 2
    affine = grid.affine @ step
    planes = max(1, 32 // int(fine[0]))
    for x in range(0, grid.shape[0], planes):
        count = min(planes, grid.shape[0] - x)
        part = affine.copy()
        part[:3, 3] += affine[:3, 0] * x * fine[0]
        shape = np.array((count, *grid.shape[1:])) * fine
        points = resample(volume, part, tuple(shape.tolist()), order=1).data
        blocks = points.reshape(count, fine[0], grid.shape[1], fine[1], grid.shape[2], fine[2])
        out[x : x + count] = blocks.mean(axis=(1, 3, 5))
    return out


def normalise(image: NDArray[np.float32]) -> torch.Tensor:
    """Model input (1, X, Y, Z) in 0..1: the darkest voxels become 0, then the percentiles rule of training applies."""
    import torch

    from medseg.synth import scale_to_percentiles

    darkest = float(np.partition(image.ravel(), image.size // 2000)[image.size // 2000])
    return scale_to_percentiles(torch.from_numpy(np.maximum(image - darkest, 0)))[None]


def content_box(image: torch.Tensor) -> tuple[slice, slice, slice]:
    """The part of a model input (1, X, Y, Z) that is more than air, with a margin; all of it if there is only air.

    Windows are laid over this part, so that air around a head, however much of it a scan has, changes nothing: instance
    norm would otherwise see another mean with every margin.
    """
    filled = image[0] > CONTENT_ABOVE
    box = []
    for axis in range(3):
        planes = filled.sum(dim=tuple({0, 1, 2} - {axis})).nonzero()
        size = filled.shape[axis]
        first, last = (int(planes[0]), int(planes[-1])) if len(planes) else (0, size - 1)
        box.append(slice(max(0, first - CONTENT_MARGIN), min(size, last + 1 + CONTENT_MARGIN)))
    return box[0], box[1], box[2]


def _with_air(
    windows: Iterator[tuple[int, torch.Tensor]],
    box: tuple[slice, slice, slice],
    shape: tuple[int, int, int],
    classes: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Planes of logits of the `box` of a grid of `shape`, as planes of the whole grid; what is around is background."""
    import torch

    def air(planes: int) -> torch.Tensor:
        logits = torch.full((classes, planes, *shape[1:]), -1e4)
        logits[0] = 0
        return logits

    for x in range(0, box[0].start, 16):
        yield x, air(min(16, box[0].start - x))
    for first, logits in windows:
        whole = air(logits.shape[1])
        whole[:, :, box[1], box[2]] = logits.cpu()
        yield box[0].start + first, whole
    for x in range(box[0].stop, shape[0], 16):
        yield x, air(min(16, shape[0] - x))


def plan(volume: Volume, model: Checkpoint | str, settings: Settings) -> Plan:
    """What segmenting this scan will do and how much memory the process will need at its peak."""
    base = volume.data.nbytes
    if isinstance(model, str):
        return Plan(model, "cpu", "histogram", None, 0, base + 100_000_000 + 3 * volume.data.size)
    from medseg.backends import choose_device, choose_precision
    from medseg.window import window_starts

    device = choose_device(settings.device)  # type: ignore[arg-type]
    dtype = choose_precision(settings.precision, device)  # type: ignore[arg-type]
    spec = model.spec
    grid = model_grid(volume, spec.spacing_mm)
    counts = [len(window_starts(n, p, settings.overlap)) for n, p in zip(grid.shape, spec.patch)]
    memory = base + _memory(volume, grid, spec.patch, len(spec.classes), dtype.itemsize)
    precision = str(dtype).removeprefix("torch.")
    return Plan(spec.name, str(device), precision, grid, int(np.prod(counts)), memory)


def _memory(volume: Volume, grid: ModelGrid, patch: tuple[int, int, int], classes: int, itemsize: int) -> int:
    """Bytes of libraries, image, buffers and network activations; the last two dominate.

    The constants fit what `tests/benchmarks/bench_infer.py` measures.
    """
    libraries = 430_000_000
    image = 3 * 4 * int(np.prod(grid.shape))
    plane = max(grid.shape[1], patch[1]) * max(grid.shape[2], patch[2])
    # Sums of one row of windows, and three copies of the planes handed on at a time.
    buffers = 4 * classes * (patch[0] + 3 * 16) * plane
    window = int(np.prod(patch)) * itemsize * (4 * classes + 64)
    return libraries + image + buffers + window + 2 * volume.data.size


def check_memory(needed: int) -> None:
    """Raise `NotEnoughMemory` if the machine does not have `needed` bytes free (Linux; elsewhere not checked)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), needed)
    if needed > free:
        raise NotEnoughMemory(
            f"this run needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "close other programs or crop the scan"
        )


def segment(
    volume: Volume,
    model: Checkpoint | str,
    settings: Settings = Settings(),
    *,
    progress: Progress = lambda what, done, total: None,
) -> Segmentation:
    """Segment a scan with a checkpoint, a model by its name or folder, or by intensity ('otsu', 'kmeans', 'gmm').

    The labels lie on the scan's own grid: same shape, same affine. Raises `BadFile` for scans that are not images,
    `BadModel` for models that give no finite values, `NotEnoughMemory` before anything is computed.
    """
    check_image(volume)
    if isinstance(model, str) and model not in INTENSITY_MODELS:
        from medseg.checkpoint import load_checkpoint

        model = load_checkpoint(model)
    made = plan(volume, model, settings)
    check_memory(made.memory_bytes)
    if isinstance(model, str):
        start = time.perf_counter()
        function, classes = INTENSITY_MODELS[model]
        labels = function(volume, classes)
        return Segmentation(labels, intensity_table(model), made, {"network": time.perf_counter() - start})
    return _segment_with_network(volume, model, settings, made, progress)


def _segment_with_network(
    volume: Volume, model: Checkpoint, settings: Settings, made: Plan, progress: Progress
) -> Segmentation:
    from medseg.backends import BACKENDS, choose_device, choose_precision
    from medseg.window import Painter, sliding_window

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    assert made.grid is not None
    spec = model.spec
    progress("resampling", 0, 1)
    image = normalise(to_model_grid(volume, made.grid))
    lap("resample")
    device = choose_device(settings.device)  # type: ignore[arg-type]
    predict = BACKENDS["torch"](model, device, choose_precision(settings.precision, device))  # type: ignore[arg-type]
    lap("load")
    to_model = np.linalg.inv(made.grid.affine) @ volume.affine
    painter = Painter(volume.shape, to_model, made.grid.shape[0], spec.classes)
    box = content_box(image)
    windows = sliding_window(
        predict,
        image[:, *box].to(device),
        spec.patch,
        overlap=settings.overlap,
        progress=lambda done, total: progress("segmenting", done, total),
    )
    for first, logits in _with_air(windows, box, made.grid.shape, len(spec.classes)):
        lap("network")
        painter.add(first, logits)
        lap("paint")
    labels = volume.with_data(painter.labels)
    if settings.cleanup and spec.fluid:
        labels = separate_fluid(labels, volume, spec.fluid.tissue, spec.fluid.value)
        lap("refine")
    if settings.cleanup and spec.cleanup:
        progress("cleaning up", 0, 1)
        labels = clean(labels, list(spec.cleanup))
        lap("cleanup")
    return Segmentation(labels, model.table, made, seconds)


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


def structure_volumes(labels: Volume, table: LabelTable) -> list[dict[str, Any]]:
    """Voxels and volume in mL of every structure of the table, absent ones with 0."""
    counts = np.bincount(labels.data.ravel(order="K"), minlength=max(table.values, default=0) + 1)
    return [
        {
            "value": label.value,
            "name": label.name,
            "voxels": int(counts[label.value]),
            "ml": round(float(counts[label.value]) * labels.voxel_mm3 / 1000, 3),
        }
        for label in table.labels
    ]
