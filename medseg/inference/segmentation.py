"""One scan in memory: from channels to labels on the scan's own grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.inference.ending import journey_way
from medseg.inference.forecast import Plan, plan
from medseg.inference.frame import Frame
from medseg.inference.journey import Journey
from medseg.inference.preprocess import ModelGrid, on_one_grid
from medseg.inference.region import region_around, region_of
from medseg.inference.result import Segmentation
from medseg.inference.settings import (
    Model,
    Scans,
    Settings,
    as_list,
    as_volumes,
    channel_names,
    check_channels,
    check_set,
    check_untrained,
    is_set,
)
from medseg.inference.stripes import Clock, paint_windows
from medseg.inference.together import Average, check_together, groups_of
from medseg.inference.untrained import UNTRAINED
from medseg.inference.ways import Way, foreign_way, own_way
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.machine import give_memory_back
from medseg.postprocess import clean, keep_largest_together, separate_fluid
from medseg.volume import Volume, crop

if TYPE_CHECKING:
    from medseg.inference.backends.predictor import Predictor
    from medseg.inference.painter import Painter
    from medseg.models import Checkpoint, ModelSet


def segment(
    scan: Scans,
    model: Model,
    settings: Settings = Settings(),
    *,
    progress: Progress = silent,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Segmentation:
    """Segment a scan with a checkpoint, or with a model by its name or folder.

    The names include those of models without weights: 'ct-tissues', 'otsu', 'kmeans', 'gmm'.

    Models of several channels take a scan for each, in the model's order and on one grid. Several
    checkpoints of one task are averaged. The labels lie on the scan's own grid: same shape, same
    affine. `announce` is told the plan before it is carried out. Raises `BadFile` for scans that
    are not images, `BadConfig` for too few or too many, `BadModel` for models that give no finite
    values or do not belong together, `NotEnoughMemory` before anything is computed.
    """
    volumes = as_volumes(scan)
    if isinstance(model, str) and model not in UNTRAINED:
        from medseg.models import load_models

        model = load_models([model])
    check_channels(volumes, model)
    volumes = _checked_channels(volumes, channel_names(model))
    region = region_around(volumes, model, settings, run=partial(segment, progress=progress))
    if region is not None:
        box, seconds = region
        settings = replace(settings, region=box)
        result = segment(volumes, model, settings, progress=progress, announce=announce)
        result.seconds["locate"] = seconds
        return result
    if is_set(model):
        return _segment_with_set(volumes, model, settings, progress=progress, announce=announce)
    if not isinstance(model, str) and as_list(model)[0].spec.locate is not None:
        return _segment_located(
            volumes, as_list(model), settings, progress=progress, announce=announce
        )
    if isinstance(model, str):
        check_untrained(model, settings)
        forecast = plan(volumes, model, settings)
        announce(forecast)
        return _only_asked(_segment_untrained(volumes[0], model, forecast), settings)
    checkpoints = as_list(model)
    groups = groups_of(checkpoints)
    if len(groups) > 1:
        return _segment_together(volumes, groups, settings, progress=progress, announce=announce)
    forecast = plan(volumes, checkpoints, settings)
    announce(forecast)
    before = _first_stage(volumes, checkpoints[0], settings, progress)
    previous = None if before is None else before.labels
    result = _segment_with_network(
        volumes, checkpoints, settings=settings, made=forecast, progress=progress, previous=previous
    )
    if before is not None:
        result.seconds["first stage"] = sum(before.seconds.values())
    return _only_asked(result, settings)


def _segment_together(
    volumes: Sequence[Volume],
    groups: Sequence[Sequence[Checkpoint]],
    settings: Settings,
    progress: Progress,
    announce: Callable[[Plan], None],
) -> Segmentation:
    """The mean of several models' probabilities; all are planned before one is run."""
    check_together(groups, settings)
    first, volume = groups[0][0], volumes[0]
    inner = replace(settings, probabilities=(), uncertainty=False, roi=(), every_output=True)
    plans = [plan(volumes, checkpoints, inner) for checkpoints in groups]
    average, seconds = Average(first.spec, volume.shape), dict[str, float]()
    for checkpoints, forecast in zip(groups, plans):
        announce(forecast)
        before = _first_stage(volumes, checkpoints[0], settings, progress)
        previous = None if before is None else before.labels
        part = _segment_with_network(
            volumes,
            checkpoints,
            settings=inner,
            made=forecast,
            progress=progress,
            previous=previous,
            average=average,
        )
        for name, duration_s in part.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + duration_s
        if before is not None:
            duration_s = sum(before.seconds.values())
            seconds["first stage"] = seconds.get("first stage", 0.0) + duration_s
    data, clock = average.labels(), Clock()
    confidence = average.confidence(data)
    labels = _cleaned(
        volume.with_data(data),
        volume,
        checkpoint=first,
        settings=settings,
        clock=clock,
        progress=progress,
    )
    maps = {name: volume.with_data(one) for name, one in average.maps(settings).items()}
    largest = max(plans, key=lambda one: one.memory_bytes)
    facts = tuple(fact for one in plans for fact in one.taken)
    forecast = replace(largest, precision="float32", backend="torch", taken=facts)
    seconds |= clock.seconds
    result = Segmentation(
        labels, first.table, plan=forecast, seconds=seconds, maps=maps, confidence=confidence
    )
    return _only(result, settings.roi) if settings.roi else result


def _checked_channels(volumes: Sequence[Volume], names: Sequence[str]) -> list[Volume]:
    """The channels on the grid of the first. Raises `BadFile` for one that is not an image."""
    volumes = on_one_grid(volumes, names if all(names) else ())
    for volume, name in zip(volumes, names):
        try:
            check_image(volume)
        except BadFile as error:
            several = name and len(volumes) > 1
            raise BadFile(f"{name}: {error}" if several else str(error)) from None
    return volumes


def _segment_untrained(volume: Volume, model: str, made: Plan) -> Segmentation:
    start = time.perf_counter()
    method = UNTRAINED[model]
    labels = method.run(volume)
    seconds = {"network": time.perf_counter() - start}
    return Segmentation(labels, method.table, made, seconds=seconds)


def _first_stage(
    volumes: Sequence[Volume], checkpoint: Checkpoint, settings: Settings, progress: Progress
) -> Segmentation | None:
    """What the first stage of a cascade finds; None where the model is none."""
    recipe = checkpoint.spec.recipe
    if recipe is None or not recipe.previous:
        return None
    plain = replace(
        settings,
        probabilities=(),
        uncertainty=False,
        postprocess=False,
        roi=(),
        region=None,
        every_output=False,
    )
    return segment(volumes, checkpoint.first_stage(), plain, progress=progress)


def _only_asked(result: Segmentation, settings: Settings) -> Segmentation:
    """The segmentation with the labels that the settings ask for."""
    return _only(result, settings.roi) if settings.roi else result


def _only(result: Segmentation, values: Sequence[int]) -> Segmentation:
    """The segmentation without labels other than `values`."""
    data = np.where(
        np.isin(result.labels.data, values), result.labels.data, result.labels.data.dtype.type(0)
    )
    table = LabelTable(tuple(label for label in result.table.labels if label.value in values))
    confidence = {value: share for value, share in result.confidence.items() if value in values}
    return replace(result, labels=result.labels.with_data(data), table=table, confidence=confidence)


def _segment_with_set(
    volumes: Sequence[Volume],
    models: ModelSet,
    settings: Settings,
    progress: Progress,
    announce: Callable[[Plan], None],
) -> Segmentation:
    """Every model of a set on its own; what a later one finds covers what an earlier one found."""
    models = models.only(settings.roi) if settings.roi else models
    check_set(models, settings)
    settings = replace(settings, roi=())
    labels = np.zeros(
        volumes[0].shape, np.uint8 if max(models.table.values) < 256 else np.uint16, order="F"
    )
    seconds: dict[str, float] = {}
    maps: dict[str, Volume] = {}
    confidence: dict[int, float] = {}
    plans: list[Plan] = []
    for checkpoints, values in zip(models.models, models.labels):
        own = {out: value for value, out in values.items()}
        part = replace(
            settings, probabilities=tuple(own[v] for v in settings.probabilities if v in own)
        )
        if plans:
            give_memory_back()
        segmentation = segment(volumes, checkpoints, part, progress=progress, announce=announce)
        table = np.zeros(max(checkpoints[0].spec.classes) + 1, labels.dtype)
        table[list(values)] = list(values.values())
        _lay_over(labels, segmentation.labels.data, table)
        for name, duration_s in segmentation.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + duration_s
        _add_maps(maps, segmentation.maps, values)
        confidence |= {
            values[value]: share
            for value, share in segmentation.confidence.items()
            if value in values
        }
        plans.append(segmentation.plan)
    largest = max(plans, key=lambda one: one.memory_bytes)
    return Segmentation(
        labels=volumes[0].with_data(labels),
        table=models.table,
        plan=replace(largest, model=models.name),
        seconds=seconds,
        maps=maps,
        confidence=confidence,
    )


def _lay_over(labels: NDArray, found: NDArray, table: NDArray) -> None:
    """Write what was found over `labels` (X, Y, Z), but for background; table: of each value found
    the set's.
    """
    for k in range(labels.shape[2]):  # plane by plane: no second map of the scan's size
        out = table[found[..., k]]
        np.copyto(labels[..., k], out, where=out != 0)


def _add_maps(
    maps: dict[str, Volume], found: Mapping[str, Volume], values: Mapping[int, int]
) -> None:
    """Add the maps of one model to those of a set; values: of each of its labels the set's."""
    for name, volume_map in found.items():
        if name != "uncertainty":
            name = f"probability_{values[int(name.rpartition('_')[2])]}"
        if name in maps:  # how unsure: the least sure of all
            np.maximum(maps[name].data, volume_map.data, out=maps[name].data)
        else:
            maps[name] = volume_map


def _segment_located(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    progress: Progress,
    announce: Callable[[Plan], None],
) -> Segmentation:
    """Find the region with the coarse model that the model names, and segment only that; the rest
    is background.

    A coarse model of one channel looks at the first scan.
    """
    from medseg.models import load_checkpoint

    locate = checkpoints[0].spec.locate
    assert locate is not None
    coarse = load_checkpoint(str(checkpoints[0].folder / locate.folder))
    plain = replace(settings, tta=False, probabilities=(), uncertainty=False)
    coarse_segmentation = segment(
        volumes[: 1 if coarse.spec.channels == 1 else None], coarse, plain, progress=progress
    )
    volume = volumes[0]
    box = region_of(
        coarse_segmentation.labels, locate.labels or coarse.spec.classes[1:], locate.margin_mm
    )
    start = (box[0].start, box[1].start, box[2].start)
    parts = [crop(one, start, tuple(side.stop - side.start for side in box)) for one in volumes]
    forecast = plan(parts, checkpoints, settings)
    announce(forecast)
    result = _segment_with_network(parts, checkpoints, settings, made=forecast, progress=progress)
    result.seconds["locate"] = sum(coarse_segmentation.seconds.values())
    for name, inside in {"": result.labels, **result.maps}.items():
        whole = np.zeros(volume.shape, inside.data.dtype)
        whole[box] = inside.data
        if name:
            result.maps[name] = volume.with_data(whole)
        else:
            result.labels = volume.with_data(whole)
    return result


#: Kind of a model's grid -> what makes the network's input on it, and the way back.
WAYS: dict[type, Callable[..., Way]] = {
    ModelGrid: own_way,
    Frame: foreign_way,
    Journey: journey_way,
}


def _segment_with_network(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    made: Plan,
    progress: Progress,
    previous: Volume | None = None,
    *,
    average: Average | None = None,
) -> Segmentation:
    """average: gets the probabilities of every output."""
    clock, volume = Clock(), volumes[0]
    progress("resampling", 0, 1)
    with clock("resample"), _resampling(made):
        way = WAYS[type(made.grid)](volumes, checkpoints, settings, made, previous)
    with clock("load"):
        predictor = _opened(checkpoints, settings, made)
    painter = _painted(
        predictor, way=way, checkpoint=checkpoints[0], made=made, clock=clock, progress=progress
    )
    with clock("paint"):
        labels = volume.with_data(way.back(painter.labels))
    if average is not None:
        average.add(painter.maps[:-1], way.back)
        return Segmentation(labels, checkpoints[0].table, made, seconds=clock.seconds)
    labels = _cleaned(
        labels, volume, checkpoint=checkpoints[0], settings=settings, clock=clock, progress=progress
    )
    names = [f"probability_{value}" for value in settings.probabilities] + [
        "uncertainty"
    ] * settings.uncertainty
    maps = {name: volume.with_data(way.back(data)) for name, data in zip(names, painter.maps)}
    made = replace(made, precision=predictor.precision, backend=predictor.backend)
    return Segmentation(
        labels,
        checkpoints[0].table,
        plan=made,
        seconds=clock.seconds,
        maps=maps,
        confidence=painter.confidence(),
    )


def _painted(
    predictor: Predictor,
    *,
    way: Way,
    checkpoint: Checkpoint,
    made: Plan,
    clock: Clock,
    progress: Progress,
) -> Painter:
    """What has painted all windows; a second time in float32 where numbers were too large."""
    from medseg.inference.backends.checks import NotFinite

    while True:
        painter = way.painter(predictor)
        try:
            paint_windows(
                painter,
                predictor,
                way=way,
                checkpoint=checkpoint,
                made=made,
                clock=clock,
                progress=progress,
            )
            return painter
        except NotFinite as error:
            remedy = error.remedy
        remedy()


def _resampling(made: Plan) -> AbstractContextManager[None]:
    """Where scans are resampled: on the card, if the image will lie there."""
    if not made.data_on_card:
        return nullcontext()
    import torch

    from medseg.inference.backends.copies import Courier
    from medseg.inference.backends.resampling import OnCard
    from medseg.resampling import interpolated

    return interpolated(OnCard(Courier(torch.device(made.device))))


def _opened(checkpoints: Sequence[Checkpoint], settings: Settings, made: Plan) -> Predictor:
    from medseg.inference.backends.opening import open_apart, open_models

    mirror = made.mirror
    # Each fold's logits are rounded on their own before they are averaged.
    if made.half or (made.plain and len(checkpoints) == 1):
        return open_apart(
            checkpoints,
            device=settings.device,
            mirror=mirror,
            exact=settings.exact or made.plain,
        )
    chosen = settings.precision == "auto" and made.precision == "float32" and bool(made.taken)
    return open_models(
        checkpoints,
        backend=settings.backend,
        device=settings.device,
        precision="fp32" if chosen else settings.precision,  # type: ignore[arg-type]
        mirror=mirror,
        windows=made.windows,
        exact=made.plain if chosen else None,
    )


def _cleaned(
    labels: Volume,
    volume: Volume,
    checkpoint: Checkpoint,
    settings: Settings,
    clock: Clock,
    progress: Progress,
) -> Volume:
    """The labels after what the model's JSON says, and after a foreign model's postprocessing where
    it is asked for.
    """
    spec = checkpoint.spec
    if settings.cleanup and spec.fluid:
        with clock("refine"):
            labels = separate_fluid(labels, volume, spec.fluid.tissue, fluid=spec.fluid.value)
    if settings.cleanup and spec.cleanup:
        progress("cleaning up", 0, 1)
        with clock("cleanup"):
            labels = clean(labels, list(spec.cleanup))
    if settings.postprocess:
        progress("cleaning up", 0, 1)
        with clock("cleanup"):
            for group in checkpoint.postprocessing():
                labels = keep_largest_together(labels, group)
    return labels


def check_image(volume: Volume) -> None:
    """Raise `BadFile` if the voxels are not an image: one value everywhere, or a label map given by
    mistake.
    """
    data = volume.data
    # The middle of the scan tells, and is quick to look at.
    sample = data[tuple(slice(max(0, n // 2 - 48), n // 2 + 48) for n in data.shape)]
    lowest = data.min() if data.size else 0
    if data.size and lowest == data.max():
        raise BadFile("has one intensity everywhere; there is nothing to segment")
    if sample.size < 1000 or lowest < -1:  # -1 is what some leave out; no label is lower
        return
    whole = np.issubdtype(sample.dtype, np.integer) or bool((sample == np.round(sample)).all())
    if whole and _piecewise_constant(sample):
        raise BadFile("looks like a label map, not an image; give the scan it was made from")


def _piecewise_constant(sample: NDArray) -> bool:
    """Whether most neighbours along every axis are equal, the most frequent value left out: so are
    label maps.
    """
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
