"""Is a dataset fit to train on? `check_dataset` reads every case once and says what it found, as
data.

What can be said of one case is said here: whether its files can be read, lie on one grid and hold
the labels that the dataset names. What only the group can tell (duplicates, mirrored cases,
outliers) is in `check.group`. The facts that were measured on the way are those that planning a
training run needs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Case, Dataset, Finding, fit, merge_masks, read_label_file
from medseg.dataset.check.group import compare_cases
from medseg.dataset.check.levels import Levels, about_levels, levels_of
from medseg.dataset.check.measures import (
    CaseFacts,
    Intensity,
    box_shape,
    content_of,
    count_voxels,
    intensity_of,
    parts_of,
)
from medseg.dataset.check.portraits import Portrait, portrait_of
from medseg.dataset.check.structures import absent_structures, separate_parts, shared_names
from medseg.errors import MedsegError
from medseg.io import digest, read_as_stored, stored_sizes
from medseg.logs import Progress, silent
from medseg.text import counted
from medseg.volume import Volume, describe_grid, grid_distance_mm, turned_onto

#: A label whose header is off by less than this part of a voxel lies on its image's grid; --fix
#: corrects the header.
SNAP_VOXELS = 0.1


class Digests(NamedTuple):
    """Names for the voxels of a case's images and of its labels, with their place: equal for equal
    ones.
    """

    image: str = ""
    labels: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Check:
    """What `check_dataset` found: findings, errors first, facts of every case that could be read,
    and its digests.
    """

    findings: tuple[Finding, ...]
    facts: tuple[CaseFacts, ...]
    digests: Mapping[str, Digests] = field(default_factory=dict)

    def __repr__(self) -> str:
        errors, warnings = len(self.errors), len(self.findings) - len(self.errors)
        found = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
        return f"<Check of {counted(len(self.facts), 'case')}: {found}>"

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that must be solved before training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """Findings and facts as plain values for JSON, without samples."""
        cases = []
        for facts in self.facts:
            content = {key: value for key, value in vars(facts).items() if key != "channels"}
            channels = [
                {k: v for k, v in vars(c).items() if k != "foreground"} for c in facts.channels
            ]
            cases.append({**content, "affine": facts.affine.tolist(), "channels": channels})
        return {
            "errors": len(self.errors),
            "findings": [asdict(one) for one in self.findings],
            "cases": cases,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """What one case tells: findings about it, and of one that can be read what is measured in it.

    portrait: what the comparison with the other cases needs.
    """

    findings: Sequence[Finding]
    facts: CaseFacts | None = None
    portrait: Portrait | None = None
    levels: tuple[Levels, ...] = ()
    digests: Digests | None = None


def check_dataset(dataset: Dataset, progress: Progress = silent) -> Check:
    """Read every case of a dataset once and report what is wrong or odd with it. Never raises for a
    bad case.
    """
    return conclude(dataset, _measure_all(dataset, progress))


def conclude(dataset: Dataset, measurements: Sequence[Measurement]) -> Check:
    """What the measurements of all cases of a dataset, in their order, say together."""
    facts = tuple(one.facts for one in measurements if one.facts is not None)
    portraits = [one.portrait for one in measurements if one.portrait is not None]
    findings = list(dataset.findings)
    levels: list[Levels] = []
    for one in measurements:
        findings += one.findings
        levels += one.levels
    unreadable = [finding for finding in findings if finding.kind == "labels"]
    findings += absent_structures(dataset, facts, unreadable)
    findings += separate_parts(dataset, facts)
    findings += about_levels(dataset, levels)
    findings += shared_names(dataset)
    findings += compare_cases(dataset, portraits)
    order = {case.name: number for number, case in enumerate(dataset.cases)}
    findings.sort(key=lambda finding: (finding.severity != "error", order.get(finding.case, -1)))
    digests = {
        case.name: one.digests
        for case, one in zip(dataset.cases, measurements, strict=True)
        if one.digests is not None
    }
    return Check(findings=tuple(dict.fromkeys(findings)), facts=facts, digests=digests)


def _measure_all(dataset: Dataset, progress: Progress) -> list[Measurement]:
    cases = dataset.cases
    measurements = []
    with ThreadPoolExecutor(
        min(8, os.cpu_count() or 1)
    ) as pool:  # unpacking releases the interpreter
        results = pool.map(lambda case: measure_case(dataset, case), cases)
        for number, (case, one) in enumerate(zip(cases, results), 1):
            measurements.append(one)
            progress(case.name, number, len(cases))
    return measurements


# One case -----------------------------------------------------------------------------------------


def measure_case(dataset: Dataset, case: Case) -> Measurement:
    """Read one case of a dataset and say what is wrong with it. Never raises for a bad one."""
    findings: list[Finding] = []
    try:
        images = list(_channels(dataset, case, findings))
    except (MedsegError, MemoryError) as error:
        return Measurement(
            findings=[
                *findings,
                Finding(
                    case=case.name,
                    kind="unreadable",
                    severity="error",
                    message=str(error) or "is too large to read",
                ),
            ]
        )
    image = images[0]
    labels = _labels(dataset, case, image=image, findings=findings)
    on_grid = labels is not None and labels.shape == image.shape
    inside = _structures_in(dataset, labels) if labels is not None and on_grid else None
    channels = []
    # Of a 4-D file the one path for all.
    for volume, path in zip(images, case.images * len(images)):
        intensity = intensity_of(volume.data, inside)
        channels.append(intensity)
        findings += _about_values(case, path, volume=volume, intensity=intensity, inside=inside)
    counts = count_voxels(labels.data) if labels is not None else {}
    facts = CaseFacts(
        case=case.name,
        shape=image.shape,
        spacing_mm=image.spacing_mm,
        orientation=image.orientation,
        affine=image.affine,
        dtype=str(image.data.dtype),
        channels=tuple(channels),
        content_shape=box_shape(content_of(image.data, channels[0].minimum)),
        label_shape=box_shape(labels.data > 0) if labels is not None else (0, 0, 0),
        voxels=counts,
        parts=parts_of(labels.data) if labels is not None else {},
    )
    findings += _about_labels(dataset, case, counts)
    portrait = portrait_of(case, facts, image=image, labels=labels if on_grid else None)
    levels = tuple(
        levels_of(case.name, name, one.data) for name, one in zip(dataset.channels, images)
    )
    return Measurement(
        findings=findings,
        facts=facts,
        portrait=portrait,
        levels=levels,
        digests=_digests(images, labels),
    )


def _structures_in(dataset: Dataset, labels: Volume) -> NDArray[np.bool_]:
    """Where structures are: what is to be ignored may be anything, and tells nothing of them."""
    return (labels.data > 0) & (labels.data != (dataset.ignore or 0))


def digest_case(dataset: Dataset, case: Case) -> Digests:
    """The digests of a case as `check_dataset` makes them; empty for one that cannot be read."""
    try:
        images = list(_channels(dataset, case, []))
    except (MedsegError, MemoryError):
        return Digests()
    return _digests(images, _labels(dataset, case, image=images[0], findings=[]))


def _digests(images: Sequence[Volume], labels: Volume | None) -> Digests:
    """Whatever type and compression they are stored in."""
    place = ",".join(f"{number:.3f}" for number in np.round(images[0].affine[:3], 3).ravel() + 0.0)
    voxels = [digest(image.data, np.dtype("<f4")) for image in images]
    image = hashlib.sha256(" ".join([place, *voxels]).encode()).hexdigest()[:16]
    return Digests(image, digest(labels.data, np.dtype("<u2")) if labels is not None else "")


def _channels(dataset: Dataset, case: Case, findings: list[Finding]) -> Iterator[Volume]:
    """The volume of every channel as it is stored; what is wrong with their number and grids goes
    to `findings`.
    """
    channels = len(dataset.channels)
    first: Volume | None = None
    if len(case.images) not in (1, channels):
        message = (
            f"{case.images[0].parent}: {len(case.images)} images where {channels} channels are"
            " expected"
        )
        findings.append(Finding(case=case.name, kind="channels", severity="error", message=message))
    inside = channels if len(case.images) == 1 else 1
    for path in case.images:
        sizes, volumes = _volumes_in(path)
        findings += _about_dimensions(case, path, sizes=sizes, held=volumes, expected=inside)
        for index in range(min(volumes, inside) if sizes else inside):
            volume = read_as_stored(path, volume_index=index if max(volumes, inside) > 1 else None)
            along_first = volume if first is None else turned_onto(volume, first)
            if first is not None and along_first is None:
                findings.append(_off_grid(case, path, volume=volume, image=first))
            first = first or volume
            yield along_first or volume


def _volumes_in(path: Path) -> tuple[Sequence[int], int]:
    """(sizes of all dimensions, how many volumes) of a NIfTI file; (), 1 of another."""
    sizes = stored_sizes(path) if path.name.lower().endswith((".nii", ".nii.gz")) else ()
    return sizes, int(np.prod(sizes[3:])) if len(sizes) > 3 else 1


def _about_dimensions(
    case: Case, path: Path, sizes: Sequence[int], held: int, expected: int
) -> list[Finding]:
    if held != expected:
        expectation = "one is" if expected == 1 else f"{expected} are"
        return [
            Finding(
                case=case.name,
                kind="4-D",
                severity="error",
                message=f"{path}: holds {held} volumes where {expectation} expected",
            )
        ]
    if len(sizes) > 3 and held == 1:
        return [
            Finding(
                case=case.name,
                kind="4-D",
                severity="warning",
                message=f"{path}: is stored as {len(sizes)}-D with one volume",
                fixable=True,
            )
        ]
    return []


def _labels(dataset: Dataset, case: Case, image: Volume, findings: list[Finding]) -> Volume | None:
    """The label map of a case in its image's orientation, even if its grid is another one, which is
    a finding.
    """
    path = case.label if case.label is not None else case.masks[0][1]
    try:
        if case.label is None:
            labels, overlap = merge_masks(case, image)
            if overlap:
                message = (
                    f"{path.parent}: masks overlap in {overlap} voxels; the later one in the table"
                    " gets them"
                )
                findings.append(
                    Finding(case=case.name, kind="overlap", severity="warning", message=message)
                )
            return labels
        sizes, volumes = _volumes_in(path)
        findings += _about_dimensions(case, path, sizes=sizes, held=volumes, expected=1)
        labels = read_label_file(case, volume_index=0 if volumes > 1 else None)
        on_grid = fit(labels, image, path=path, image_path=case.images[0])
    except (MedsegError, MemoryError) as error:
        findings.append(
            Finding(
                case=case.name,
                kind="labels",
                severity="error",
                message=str(error) or f"{path}: is too large to read",
            )
        )
        return None
    if on_grid is None:
        findings.append(_off_grid(case, path, volume=labels, image=image))
    return on_grid or labels


def _off_grid(case: Case, path: Path, volume: Volume, image: Volume) -> Finding:
    """How a grid differs from the image's; fixable if it is the same but for a tenth of a voxel."""
    start = (
        f"{path}: has {describe_grid(volume)}, its image {case.images[0].name} has"
        f" {describe_grid(image)}"
    )
    if volume.shape != image.shape:
        return Finding(
            case=case.name, kind="grid", severity="error", message=f"{start}: another grid"
        )
    apart_mm = grid_distance_mm(image, volume)
    tiny = apart_mm <= SNAP_VOXELS * min(image.spacing_mm)
    remedy = "; --fix gives it the image's geometry" if tiny else ""
    return Finding(
        case=case.name,
        kind="geometry",
        severity="error",
        message=f"{start}: up to {apart_mm:.3g} mm apart{remedy}",
        fixable=tiny,
    )


def _about_values(
    case: Case, path: Path, volume: Volume, intensity: Intensity, inside: NDArray[np.bool_] | None
) -> list[Finding]:
    if intensity.not_finite == volume.data.size or intensity.minimum == intensity.maximum:
        return [
            Finding(
                case=case.name,
                kind="constant",
                severity="error",
                message=f"{path}: all voxels have one value; the image is empty",
            )
        ]
    if not intensity.not_finite:
        return []
    bad = ~np.isfinite(volume.data)
    hit = int((bad & inside).sum()) if inside is not None else 0
    message = f"{path}: {intensity.not_finite} voxels are not finite numbers"
    if hit:
        return [
            Finding(
                case=case.name,
                kind="nan",
                severity="error",
                message=f"{message}, {hit} of them within the labels",
            )
        ]
    many = intensity.not_finite * 2 > volume.data.size
    severity = "error" if many else "warning"
    return [
        Finding(
            case=case.name,
            kind="nan",
            severity=severity,
            message=f"{message}; they are read as 0, or as the lowest value of CT",
            fixable=not many and inside is not None,
        )
    ]


def _about_labels(dataset: Dataset, case: Case, counts: dict[int, int]) -> list[Finding]:
    findings = []
    path = case.label if case.label is not None else case.masks[0][1].parent
    values = {*dataset.values, *(() if dataset.ignore is None else (dataset.ignore,))}
    if strange := sorted(counts.keys() - values):
        examples = ", ".join(f"{value} ({counts[value]} voxels)" for value in strange[:5])
        listing = ", ".join(str(value) for value in sorted(values)[:20])
        message = (
            f"{path}: holds the label value {examples}, which the dataset does not name; it names"
            f" {listing}"
        )
        findings.append(Finding(case=case.name, kind="value", severity="error", message=message))
    if case.labelled is not None and (
        extra := sorted((counts.keys() & set(dataset.values)) - set(case.labelled))
    ):
        message = (
            f"{path}: holds label {extra[0]}, which is not among those said to be labelled in this"
            " case"
        )
        findings.append(Finding(case=case.name, kind="value", severity="error", message=message))
    return findings
