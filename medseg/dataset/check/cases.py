"""Is a dataset fit to train on? `check_dataset` reads every case once and says what it found, as data.

What can be said of one case is said here: whether its files can be read, lie on one grid and hold the labels that the
dataset names. What only the group can tell (duplicates, mirrored cases, outliers) is in `check.group`. The facts
that were measured on the way are those that planning a training run needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Case, Dataset, Finding, fit, merge_masks, read_label_file
from medseg.dataset.check.group import THUMBNAIL, Portrait, compare_cases
from medseg.errors import MedsegError
from medseg.io import digest, read_as_stored, stored_sizes
from medseg.progress import Progress, silent
from medseg.volume import Volume, describe_grid, grid_distance_mm, reorient, turned_onto

#: A label whose header is off by less than this part of a voxel lies on its image's grid; --fix corrects the header.
SNAP_VOXELS = 0.1
#: Structures of fewer voxels than this are suspicious where the other cases have ten times as much.
TINY_VOXELS = 10
#: Voxels of a volume that statistics are made of, about; of larger ones only every second or third plane is looked at.
_SAMPLE_VOXELS = 1 << 21
_PERCENTILE_SAMPLE = 1 << 15
_ONE_OF_A_KIND = 200  # voxels of labels that no two cases have in exactly the same shape
_ARRANGED = 40  # with more structures than this, their places are not compared
_FOREGROUND_SAMPLE = 1024
_PERCENTILES = (0.5, 1, 25, 50, 75, 99, 99.5)


@dataclass(frozen=True, eq=False)
class Intensity:
    """Values of one channel; voxels that are not finite numbers are counted and left out of the rest.

    minimum, maximum and not_finite are of all voxels; of images of more than two million the rest is of a part of the
    planes. percentiles: the 0.5th, 1st, 25th, 50th, 75th, 99th and 99.5th. foreground: at most 1024 values from
    within the labels, evenly spread over them, in no order.
    """

    minimum: float
    maximum: float
    mean: float
    deviation: float
    percentiles: tuple[float, ...]
    roughness: float
    not_finite: int
    foreground: NDArray[np.float32] = field(repr=False)

    @property
    def low(self) -> float:
        """The 1st percentile."""
        return self.percentiles[1]

    @property
    def high(self) -> float:
        """The 99th percentile."""
        return self.percentiles[5]


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """What was measured in one case.

    shape, spacing_mm, orientation, affine: the first image's grid. dtype: as it is stored. content_shape: voxels of the
    smallest box that holds all that differs from the image's lowest value. label_shape: the same around the labels, or
    (0, 0, 0). voxels: label value to number of voxels, without background. parts: label value to the voxels of its
    connected parts, largest first.
    """

    case: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    affine: NDArray[np.float64] = field(repr=False)
    dtype: str
    channels: tuple[Intensity, ...]
    content_shape: tuple[int, int, int]
    label_shape: tuple[int, int, int]
    voxels: dict[int, int]
    parts: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Check:
    """What `check_dataset` found: findings, errors first, and facts of every case that could be read."""

    findings: tuple[Finding, ...]
    facts: tuple[CaseFacts, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that must be solved before training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """Findings and facts as plain values for JSON, without samples."""
        cases = []
        for facts in self.facts:
            content = {key: value for key, value in vars(facts).items() if key != "channels"}
            channels = [{k: v for k, v in vars(c).items() if k != "foreground"} for c in facts.channels]
            cases.append({**content, "affine": facts.affine.tolist(), "channels": channels})
        return {"errors": len(self.errors), "findings": [asdict(one) for one in self.findings], "cases": cases}


@dataclass(frozen=True, eq=False)
class _Measured:
    findings: list[Finding]
    facts: CaseFacts | None = None
    portrait: Portrait | None = None


def check_dataset(dataset: Dataset, progress: Progress = silent) -> Check:
    """Read every case of a dataset once and report what is wrong or odd with it. Never raises for a bad case."""
    cases = dataset.cases
    measured = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # unpacking releases the interpreter
        for done, (case, one) in enumerate(zip(cases, pool.map(lambda c: _measure(dataset, c), cases)), 1):
            measured.append(one)
            progress(case.name, done, len(cases))
    findings = [*dataset.findings, *(finding for one in measured for finding in one.findings)]
    facts = tuple(one.facts for one in measured if one.facts is not None)
    findings += _absent(dataset, facts, [finding for finding in findings if finding.kind == "labels"])
    findings += _islands(dataset, facts)
    findings += _shared_names(dataset)
    findings += compare_cases(dataset, [one.portrait for one in measured if one.portrait is not None])
    order = {case.name: number for number, case in enumerate(cases)}
    findings.sort(key=lambda finding: (finding.severity != "error", order.get(finding.case, -1)))
    return Check(tuple(dict.fromkeys(findings)), facts)


# One case ------------------------------------------------------------------------------------------------------------


def _measure(dataset: Dataset, case: Case) -> _Measured:
    findings: list[Finding] = []
    try:
        images = list(_channels(dataset, case, findings))
    except (MedsegError, MemoryError) as error:
        return _Measured([*findings, Finding(case.name, "unreadable", "error", str(error) or "is too large to read")])
    image = images[0]
    labels = _labels(dataset, case, image, findings)
    on_grid = labels is not None and labels.shape == image.shape
    inside = labels.data > 0 if labels is not None and on_grid else None
    channels = []
    for volume, path in zip(images, case.images * len(images)):  # of a 4-D file the one path for all
        intensity = _intensity(volume.data, inside)
        channels.append(intensity)
        findings += _about_values(case, path, volume, intensity, inside)
    counts = _counts(labels.data) if labels is not None else {}
    facts = CaseFacts(
        case.name,
        image.shape,
        image.spacing_mm,
        image.orientation,
        image.affine,
        str(image.data.dtype),
        tuple(channels),
        _box_shape(_content(image.data, channels[0].minimum)),
        _box_shape(labels.data > 0) if labels is not None else (0, 0, 0),
        counts,
        _parts(labels.data) if labels is not None else {},
    )
    findings += _about_labels(dataset, case, counts)
    portrait = _portrait(case, facts, image, labels if on_grid else None)
    return _Measured(findings, facts, portrait)


def _channels(dataset: Dataset, case: Case, findings: list[Finding]) -> Iterator[Volume]:
    """The volume of every channel as it is stored; what is wrong with their number and grids goes to `findings`."""
    expected = len(dataset.channels)
    first: Volume | None = None
    if len(case.images) not in (1, expected):
        message = f"{case.images[0].parent}: {len(case.images)} images where {expected} channels are expected"
        findings.append(Finding(case.name, "channels", "error", message))
    for path in case.images:
        inside = expected if len(case.images) == 1 else 1
        sizes = stored_sizes(path) if path.name.lower().endswith((".nii", ".nii.gz")) else ()
        held = int(np.prod(sizes[3:])) if len(sizes) > 3 else 1
        findings += _about_dimensions(case, path, sizes, held, inside)
        for index in range(min(held, inside) if sizes else inside):
            volume = read_as_stored(path, volume_index=index if max(held, inside) > 1 else None)
            turned = volume if first is None else turned_onto(volume, first)
            if first is not None and turned is None:
                findings.append(_off_grid(case, path, volume, first))
            first = first or volume
            yield turned or volume


def _about_dimensions(case: Case, path: Path, sizes: Sequence[int], held: int, expected: int) -> list[Finding]:
    if held != expected:
        wanted = "one is" if expected == 1 else f"{expected} are"
        return [Finding(case.name, "4-D", "error", f"{path}: holds {held} volumes where {wanted} expected")]
    if len(sizes) > 3 and held == 1:
        return [Finding(case.name, "4-D", "warning", f"{path}: is stored as {len(sizes)}-D with one volume", True)]
    return []


def _labels(dataset: Dataset, case: Case, image: Volume, findings: list[Finding]) -> Volume | None:
    """The label map of a case in its image's orientation, even if its grid is another one, which is a finding."""
    path = case.label if case.label is not None else case.masks[0][1]
    try:
        if case.label is None:
            labels, overlap = merge_masks(case, image)
            if overlap:
                message = f"{path.parent}: masks overlap in {overlap} voxels; the later one in the table gets them"
                findings.append(Finding(case.name, "overlap", "warning", message))
            return labels
        sizes = stored_sizes(path) if path.name.lower().endswith((".nii", ".nii.gz")) else ()
        held = int(np.prod(sizes[3:])) if len(sizes) > 3 else 1
        findings += _about_dimensions(case, path, sizes, held, 1)
        labels = read_label_file(case, volume_index=0 if held > 1 else None)
        fitted = fit(labels, image, path, case.images[0])
    except (MedsegError, MemoryError) as error:
        findings.append(Finding(case.name, "labels", "error", str(error) or f"{path}: is too large to read"))
        return None
    if fitted is None:
        findings.append(_off_grid(case, path, labels, image))
    return fitted or labels


def _off_grid(case: Case, path: Path, volume: Volume, image: Volume) -> Finding:
    """How a grid differs from the image's; fixable if it is the same but for a tenth of a voxel."""
    start = f"{path}: has {describe_grid(volume)}, its image {case.images[0].name} has {describe_grid(image)}"
    if volume.shape != image.shape:
        return Finding(case.name, "grid", "error", f"{start}: another grid")
    apart_mm = grid_distance_mm(image, volume)
    tiny = apart_mm <= SNAP_VOXELS * min(image.spacing_mm)
    remedy = "; --fix gives it the image's geometry" if tiny else ""
    return Finding(case.name, "geometry", "error", f"{start}: up to {apart_mm:.3g} mm apart{remedy}", tiny)


def _about_values(
    case: Case, path: Path, volume: Volume, intensity: Intensity, inside: NDArray[np.bool_] | None
) -> list[Finding]:
    if intensity.not_finite == volume.data.size or intensity.minimum == intensity.maximum:
        return [Finding(case.name, "constant", "error", f"{path}: all voxels have one value; the image is empty")]
    if not intensity.not_finite:
        return []
    bad = ~np.isfinite(volume.data)
    hit = int((bad & inside).sum()) if inside is not None else 0
    message = f"{path}: {intensity.not_finite} voxels are not finite numbers"
    if hit:
        return [Finding(case.name, "nan", "error", f"{message}, {hit} of them within the labels")]
    many = intensity.not_finite * 2 > volume.data.size
    severity = "error" if many else "warning"
    return [Finding(case.name, "nan", severity, f"{message}; they are read as 0", not many and inside is not None)]


def _about_labels(dataset: Dataset, case: Case, counts: dict[int, int]) -> list[Finding]:
    findings = []
    path = case.label if case.label is not None else case.masks[0][1].parent
    allowed = {*dataset.values, *(() if dataset.ignore is None else (dataset.ignore,))}
    if strange := sorted(counts.keys() - allowed):
        told = ", ".join(f"{value} ({counts[value]} voxels)" for value in strange[:5])
        known = ", ".join(str(value) for value in sorted(allowed)[:20])
        message = f"{path}: holds the label value {told}, which the dataset does not name; it names {known}"
        findings.append(Finding(case.name, "value", "error", message))
    if case.labelled is not None and (extra := sorted((counts.keys() & set(dataset.values)) - set(case.labelled))):
        message = f"{path}: holds label {extra[0]}, which is not among those said to be labelled in this case"
        findings.append(Finding(case.name, "value", "error", message))
    return findings


def _intensity(data: NDArray, inside: NDArray[np.bool_] | None) -> Intensity:
    thin = data[:, :, :: 1 + data.size // _SAMPLE_VOXELS]
    good = np.isfinite(data) if data.dtype.kind == "f" else None
    bad = 0 if good is None else data.size - int(good.sum())
    values = (thin if not bad else thin[np.isfinite(thin)]).ravel().astype(np.float32)
    if not values.size:
        values = np.zeros(1, np.float32)
    few = values[:: 1 + values.size // _PERCENTILE_SAMPLE]
    percentiles = tuple(float(value) for value in np.percentile(few, _PERCENTILES))
    foreground = np.zeros(0, np.float32)
    if inside is not None:
        foreground = data[inside]
        foreground = foreground[:: 1 + len(foreground) // _FOREGROUND_SAMPLE].astype(np.float32)
        foreground = foreground[np.isfinite(foreground)]
    low, high = (data, data) if not bad else (data[good], data[good])
    return Intensity(
        float(low.min(initial=np.inf) if low.dtype.kind == "f" else low.min()) if low.size else 0.0,
        float(high.max()) if high.size else 0.0,
        float(values.mean(dtype=np.float64)),
        float(values.std(dtype=np.float64)),
        percentiles,
        _roughness(np.nan_to_num(thin.astype(np.float32), copy=False), percentiles[1], percentiles[5]),
        bad,
        foreground,
    )


def _roughness(data: NDArray[np.float32], low: float, high: float) -> float:
    """Mean squared difference between neighbours as a part of the variance: 2 for noise, near 0 for smooth images."""
    clipped = np.clip(data, low, high)
    variance = float(clipped.var(dtype=np.float64))
    if variance == 0:
        return 0.0
    squares = []
    for axis in range(3):
        step = np.diff(clipped, axis=axis).ravel(order="K")
        squares.append(float(np.einsum("i,i->", step, step)) / max(1, step.size))
    return float(np.mean(squares)) / variance


def _counts(labels: NDArray) -> dict[int, int]:
    counts = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    for plane in labels.T:  # a plane at a time: counting makes 8 bytes of every voxel
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def _content(data: NDArray, lowest: float) -> NDArray[np.bool_]:
    """Where an image differs from its lowest value, which is that of padding and of air that was cut out."""
    return data > lowest if np.isfinite(lowest) else np.zeros(data.shape, bool)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds all that is true."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(filled):
            return None
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return box[0], box[1], box[2]


def _box_shape(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    box = _box(mask)
    if box is None:
        return 0, 0, 0
    i, j, k = (part.stop - part.start for part in box)
    return i, j, k


def _parts(labels: NDArray) -> dict[int, tuple[int, ...]]:
    import cc3d

    box = _box(labels > 0)
    if box is None:
        return {}
    inner = np.asfortranarray(labels[box])
    parts = cc3d.connected_components(inner, connectivity=26)
    sizes = np.bincount(parts.ravel())
    values = np.zeros(len(sizes), labels.dtype)
    values[parts.ravel()] = inner.ravel()
    found: dict[int, list[int]] = {}
    for value, size in zip(values[1:], sizes[1:]):
        found.setdefault(int(value), []).append(int(size))
    return {value: tuple(sorted(sizes, reverse=True)) for value, sizes in sorted(found.items())}


# All cases -----------------------------------------------------------------------------------------------------------


def _absent(dataset: Dataset, facts: Sequence[CaseFacts], unreadable: Sequence[Finding] = ()) -> list[Finding]:
    """Label maps and structures that are empty or tiny where nearly all other cases have them, and values of few."""
    filled = [one for one in facts if one.voxels]
    findings = []
    for one in facts:
        if not one.voxels and not any(finding.case == one.case for finding in unreadable):
            # Scans without a lesion are good examples; one lone scan without the organ that all others have is not.
            alone = len(facts) >= 5 and len(filled) >= 0.98 * (len(facts) - 1)
            rest = f", while {len(filled)} of {len(facts)} cases have labels" if alone else ""
            message = f"holds nothing but background{rest}"
            findings.append(Finding(one.case, "empty", "error" if alone else "warning", message))
    if len(facts) < 5:
        return findings
    labelled = {case.name: case.labelled for case in dataset.cases}
    unnamed = all(label.name == f"label {label.value}" for label in dataset.table.labels)
    for value in dataset.values:
        said = [one for one in filled if labelled[one.case] is None or value in (labelled[one.case] or ())]
        having = [one.voxels[value] * float(np.prod(one.spacing_mm)) for one in said if value in one.voxels]
        name = dataset.table.names.get(value, str(value))
        usual_mm3 = float(np.median(having)) if having else 0.0
        if unnamed and len(facts) >= 10 and 0 < len(having) <= max(1, 0.02 * len(facts)):
            message = f"label value {value} occurs in {len(having)} of {len(facts)} cases only; is it meant?"
            findings += [Finding(one.case, "value", "warning", message) for one in said if value in one.voxels]
            continue
        for one in said:
            voxels = one.voxels.get(value, 0)
            if not voxels and len(having) >= 0.9 * len(said):
                message = f"has no {name} (label {value}), which {len(having)} of {len(said)} cases have"
                findings.append(Finding(one.case, "absent", "warning", message))
            elif 0 < voxels < TINY_VOXELS and voxels * float(np.prod(one.spacing_mm)) < 0.1 * usual_mm3:
                message = f"has {voxels} voxels of {name} (label {value}), others have about {usual_mm3:.4g} mm³"
                findings.append(Finding(one.case, "tiny", "warning", message))
    return findings


def _islands(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Small separate parts of structures that are in one piece in nearly all cases."""
    findings = []
    for value in dataset.values:
        having = [one for one in facts if value in one.parts]
        whole = [one for one in having if len(one.parts[value]) == 1]
        if len(having) < 5 or len(whole) < 0.8 * len(having):
            continue
        name = dataset.table.names.get(value, str(value))
        for one in having:
            if rest := one.parts[value][1:]:
                message = (
                    f"{name} (label {value}) has {len(rest)} separate part{'s' if len(rest) > 1 else ''} of "
                    f"{', '.join(map(str, rest[:5]))} voxels; in {len(whole)} of {len(having)} cases it is one piece"
                )
                findings.append(Finding(one.case, "island", "warning", message))
    return findings


def _shared_names(dataset: Dataset) -> list[Finding]:
    """Cases and groups that lie on both sides of a split of the dataset's own."""
    groups = {case.name: case.group for case in dataset.cases}
    findings = []
    for number, (training, validation) in enumerate(dataset.splits):
        both = set(training) & set(validation)
        findings += [
            Finding(name, "leak", "error", f"is in training and in validation of split {number}")
            for name in sorted(both)
        ]
        known = {groups.get(name) for name in training} - {None}
        findings += [
            Finding(name, "leak", "error", f"{groups[name]} is in training and in validation of split {number}")
            for name in validation
            if groups.get(name) in known and name not in both
        ]
    tested = {case.group for case in dataset.cases if case.split == "test" and case.group}
    findings += [
        Finding(case.name, "leak", "error", f"{case.group} is also among the cases set aside for testing")
        for case in dataset.cases
        if case.split != "test" and case.group in tested
    ]
    return findings


# Portraits -----------------------------------------------------------------------------------------------------------


def _portrait(case: Case, facts: CaseFacts, image: Volume, labels: Volume | None) -> Portrait | None:
    """What the comparison with the other cases needs, small enough to keep for all; None for empty images."""
    first = facts.channels[0]
    spread = first.high - first.low
    if not spread > 0:
        spread = first.maximum - first.minimum
    if not spread > 0:
        return None
    step = 1 + int((image.data.size / _SAMPLE_VOXELS) ** (1 / 3))
    ras = reorient(image, "RAS")
    thin = ras.data[::step, ::step, ::step]
    clipped = np.clip(np.nan_to_num(thin.astype(np.float32), nan=first.low), first.low, first.low + spread)
    shape_mm = np.array(ras.shape) * ras.spacing_mm
    centre = image.affine @ (*(np.array(image.shape) - 1) / 2, 1.0)
    features: dict[str, float] = {
        "scale": float(np.log10(spread)),
        "offset": float(np.arcsinh(first.low / spread)),
        "median": (first.percentiles[3] - first.low) / spread,
        "quartiles": (first.percentiles[4] - first.percentiles[2]) / spread,
        "highest": float(np.log1p(max(0.0, first.maximum - first.high) / spread)),
        "lowest": float(np.log1p(max(0.0, first.low - first.minimum) / spread)),
        "roughness": float(np.log(first.roughness + 1e-3)),
        **{f"size {axis}": float(np.log(size)) for axis, size in zip("xyz", shape_mm)},
        **{f"position {axis}": float(place) for axis, place in zip("xyz", centre)},
        **{f"spacing {axis}": float(np.log(size)) for axis, size in zip("xyz", ras.spacing_mm)},
    }
    thumbnail = _shrink(clipped, [(0.0, float(n)) for n in clipped.shape])
    if labels is None or not facts.voxels:
        return Portrait(case.name, thumbnail, None, features=features)
    turned = reorient(Volume(labels.data, image.affine), "RAS").data
    inside = first.foreground
    features["brightness of labels"] = (float(inside.mean()) - first.percentiles[3]) / spread if inside.size else 0.0
    features["contrast in labels"] = float(np.log(float(inside.std()) / spread + 1e-3)) if inside.size else 0.0
    voxel_mm3 = image.voxel_mm3
    features |= {f"volume {value}": float(np.log(n * voxel_mm3)) for value, n in facts.voxels.items()}
    whole = digest(labels.data, labels.data.dtype), digest(turned, turned.dtype)
    content = _box(turned > 0) or (slice(0), slice(0), slice(0))
    shape = digest(turned[content], turned.dtype) if sum(facts.voxels.values()) >= _ONE_OF_A_KIND else ""
    turned = turned[::step, ::step, ::step]
    coded, box = _code(turned)
    features |= _arrangement(turned, box)
    for axis, (start, stop) in zip("xyz", box):
        features[f"place {axis}"] = (start + stop) / 2 / coded.shape["xyz".index(axis)]
    return Portrait(case.name, thumbnail, _shrink(coded, box), whole, shape, features)


def _code(labels: NDArray) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """Labels as numbers between 0.5 and 1.5 that tell them apart, and a box of 2.5 deviations around their centroid.

    Such a box does not depend on where the labels lie, nor on single stray voxels.
    """
    inner = _box(labels > 0) or (slice(None), slice(None), slice(None))
    top = int(labels.max(initial=0))
    weights = 0.5 + np.arange(top + 1) * 0.618034 % 1.0  # the golden ratio spreads any run of values evenly
    weights[0] = 0
    coded = np.zeros(labels.shape, np.float32)
    coded[inner] = weights.astype(np.float32)[labels[inner]]
    box = []
    for axis in range(3):
        along = (labels > 0).sum(axis=tuple(other for other in range(3) if other != axis)).astype(np.float64)
        places = np.arange(len(along)) + 0.5
        middle = (along * places).sum() / along.sum()
        deviation = max(0.5, float(np.sqrt((along * (places - middle) ** 2).sum() / along.sum())))
        box.append((middle - 2.5 * deviation, middle + 2.5 * deviation))
    return coded, box


def _arrangement(labels: NDArray, box: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Where each structure lies among all, along RAS from the common centroid, in the deviations that the box is of."""
    inner = _box(labels > 0) or (slice(0), slice(0), slice(0))
    cut = labels[inner]
    counts = _counts(cut)
    if not 1 < len(counts) <= _ARRANGED:
        return {}
    found = {}
    for axis, (start, stop) in enumerate(box):
        planes = np.moveaxis(cut, axis, 0)
        sums = np.array([np.bincount(plane.ravel(), minlength=max(counts) + 1) for plane in planes])
        places = np.arange(len(planes)) + inner[axis].start + 0.5
        for value, voxels in counts.items():
            middle = float(places @ sums[:, value]) / voxels
            found[f"arrangement {value} {'xyz'[axis]}"] = (middle - (start + stop) / 2) / (stop - start) * 5
    return found


def _shrink(data: NDArray[np.float32], box: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """The mean values of `THUMBNAIL` cells along each axis of a box in voxels; what lies outside the array is 0.

    By differences of running sums and not by products of matrices, which would start threads within threads.
    """
    cells: NDArray = data
    for axis, (start, stop) in enumerate(box):
        cells = np.moveaxis(cells, axis, 0)
        sums = np.zeros((len(cells) + 1, *cells.shape[1:]))
        np.cumsum(cells, axis=0, dtype=np.float64, out=sums[1:])
        edges = np.clip(np.linspace(start, stop, THUMBNAIL + 1), 0, len(cells))
        below = np.minimum(edges.astype(np.intp), len(cells) - 1)
        share = (edges - below)[:, None, None]
        until = sums[below] * (1 - share) + sums[below + 1] * share
        cells = np.moveaxis(np.diff(until, axis=0) * (THUMBNAIL / (stop - start)), 0, axis)
    return np.ascontiguousarray(cells, np.float32)
