"""A folder of annotated scans as people have it: `read_dataset` finds the cases, `load_case` reads
one.

Nothing is renamed, copied or resampled. The layouts (nnU-Net, Decathlon, BIDS, TotalSegmentator,
lists, plain folders) are in `medseg.dataset.layouts`; here is what all of them become.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.errors import BadFile, DataWarning
from medseg.io import is_dicom_source, is_slicer_segmentation, label_kind, read, read_labels
from medseg.labels import LabelTable
from medseg.volume import (
    Volume,
    describe_grid,
    grid_distance_mm,
    reorient,
    tolerance_mm,
    turned_onto,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about a dataset that a person should know.

    case: its name, or '' for the dataset as a whole. kind: a short word to sort by, e.g. 'grid' or
    'duplicate'. severity: 'error' must be solved before training, 'warning' should be looked at.
    fixable: `medseg check --fix` can.
    """

    case: str
    kind: str
    severity: str
    message: str
    fixable: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One annotated scan.

    images: a file (or DICOM folder) per channel, or one 4-D file whose volumes are the channels.
    label: a label map; or masks: (value, file) for each structure. split: 'train', 'val' or 'test'
    and fold, where the dataset says so. group: patient or subject; cases of one group never lie on
    both sides of a split. labelled: the values annotated here if not all of the table's are.
    numbers: (value in the label file, value in the data set), where a file that names its
    structures itself numbers them differently.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    masks: tuple[tuple[int, Path], ...] = ()
    split: str | None = None
    fold: int | None = None
    group: str | None = None
    labelled: tuple[int, ...] | None = None
    numbers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Dataset:
    """Annotated cases and what their labels mean.

    folder: where it lies; layout: a name from `reading.LAYOUTS`. cases: those with labels.
    channels: a name per image channel, e.g. ('CT',). table: the values to be learnt. regions: for
    overlapping regions, the label values that make each output, in the table's order, which is the
    order of painting; else (). ignore: the label value of voxels that do not count. splits: (names
    for training, names for validation) given by the dataset. unlabelled: cases without labels.
    findings: what was wrong with the files, each about a case that was left out. source: the file
    that lists or describes the cases, where there is one.
    """

    folder: Path
    layout: str
    name: str
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    table: LabelTable
    regions: tuple[tuple[int, ...], ...] = ()
    ignore: int | None = None
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    unlabelled: tuple[Case, ...] = ()
    findings: tuple[Finding, ...] = ()
    source: Path | None = None

    def __repr__(self) -> str:
        channels = " + ".join(self.channels)
        return (
            f"<Dataset {self.name} ({self.layout}): {len(self.cases)} cases of {channels},"
            f" {len(self.table)} structures>"
        )

    def __getitem__(self, name: str) -> Case:
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(name)

    @property
    def values(self) -> tuple[int, ...]:
        """Every label value that a voxel may have, without background and ignore, sorted."""
        parts = self.regions or tuple((value,) for value in self.table.values)
        return tuple(sorted({value for part in parts for value in part}))


def load_case(dataset: Dataset, case: Case) -> tuple[list[Volume], Volume]:
    """One `Volume` per channel, values as stored, and the labels (uint8 or uint16), all on the
    first image's grid.

    A file that stores the same grid in another orientation is turned without loss, and a cropped
    segmentation of 3D Slicer gets background around it. Where masks overlap, the later one wins,
    with a `DataWarning`. Raises `BadFile` naming the file if its grid is another one; nothing is
    resampled.
    """
    images = read_channels(dataset, case)
    return images, read_case_labels(case, images[0])


def read_channels(dataset: Dataset, case: Case) -> list[Volume]:
    """One `Volume` per channel of a case, on the first one's grid. Raises `BadFile`."""
    if len(case.images) == 1 and len(dataset.channels) > 1:
        path = case.images[0]
        return [read(path, volume_index=index) for index in range(len(dataset.channels))]
    if len(case.images) != len(dataset.channels):
        channels = f"{len(dataset.channels)} channels ({', '.join(dataset.channels)})"
        raise BadFile(
            f"{case.images[0]}: case {case.name} has {len(case.images)} images where {channels} are"
            " expected"
        )
    first = read(case.images[0])
    return [
        first,
        *(
            onto(read(path), first, path=path, image_path=case.images[0])
            for path in case.images[1:]
        ),
    ]


def read_case_labels(case: Case, image: Volume) -> Volume:
    """The label map of a case on its image's grid, masks merged into one. Raises `BadFile`."""
    if case.label is not None:
        labels = read_label_file(case)
        return onto(labels, image, path=case.label, image_path=case.images[0])
    label_map, overlap = merge_masks(case, image)
    if overlap:
        warnings.warn(
            f"{case.masks[0][1].parent}: masks overlap in {overlap} voxels, which went to the"
            " later one",
            DataWarning,
            stacklevel=2,
        )
    return label_map


def read_label_file(case: Case, *, volume_index: int | None = None) -> Volume:
    """The label file of a case on its own grid, with the values that the data set gives its
    structures.
    """
    if case.label is None:
        raise BadFile(f"{case.images[0]}: has no label file")
    image = case.images[0]
    # Contours have a grid by their images alone, and a SEG may leave out slices that are empty.
    source = image if label_kind(case.label) and is_dicom_source(image) else None
    labels = read_labels(case.label, volume_index=volume_index, source=source)
    if not case.numbers:
        return labels
    new_value = np.arange(65536, dtype=np.uint16)
    new_value[[before for before, _ in case.numbers]] = [after for _, after in case.numbers]
    data = new_value[labels.data]
    return labels.with_data(data.astype(np.uint8) if data.max() <= 255 else data)


def merge_masks(case: Case, image: Volume) -> tuple[Volume, int]:
    """The masks of a case as one label map on its image's grid, later ones over earlier; and voxels
    in several masks.

    Raises `BadFile` for another grid and for a mask that holds more than one value beside 0.
    """
    top = max((value for value, _ in case.masks), default=0)
    labels = np.zeros(image.shape, np.uint8 if top <= 255 else np.uint16, order="F")
    overlap = 0
    for value, path in case.masks:
        mask = onto(read_labels(path), image, path=path, image_path=case.images[0]).data
        high = int(mask.max(initial=0))
        inside = mask > 0
        if high > 1 and (mask[inside] != high).any():
            raise BadFile(
                f"{path}: holds several values, so it is a label map and not the mask of one"
                " structure"
            )
        overlap += int((inside & (labels > 0)).sum())
        labels[inside] = value
    return image.with_data(labels), overlap


def onto(volume: Volume, image: Volume, path: Path, image_path: Path) -> Volume:
    """A volume on the grid of its image, turned if it is stored in another orientation. Raises
    `BadFile` otherwise.
    """
    on_grid = fit(volume, image, path=path, image_path=image_path)
    if on_grid is not None:
        return on_grid
    raise BadFile(
        f"{path}: has {describe_grid(volume)}, but its image {image_path.name} has"
        f" {describe_grid(image)}; put both on one grid (medseg check says more)"
    )


def fit(volume: Volume, image: Volume, path: Path, image_path: Path) -> Volume | None:
    """A volume on the grid of its image, or None if its grid is another one.

    It may be stored in another orientation. Of 3D Slicer's segmentations it may be a part: Slicer
    crops them to what is in them. That what was cropped is background is certain, because the
    format says so and nothing else is; a label map of another format that is too small may as well
    not be finished. Raises `BadFile` for labels outside the image.
    """
    along_image = turned_onto(volume, image)
    if along_image is not None:
        return image.with_data(along_image.data)
    if not is_slicer_segmentation(path):
        return None
    along_image = reorient(volume, image.orientation)
    start = np.rint((np.linalg.inv(image.affine) @ along_image.affine)[:3, 3]).astype(int)
    affine = image.affine.copy()
    affine[:3, 3] = (image.affine @ (*start, 1.0))[:3]
    if grid_distance_mm(along_image, Volume(along_image.data, affine)) > tolerance_mm(image):
        return None
    whole = np.zeros(image.shape, along_image.data.dtype, order="F")
    low, high = np.maximum(start, 0), np.minimum(start + along_image.shape, image.shape)
    if (high > low).all():
        here = tuple(slice(a, b) for a, b in zip(low, high))
        there = tuple(slice(a, b) for a, b in zip(low - start, high - start))
        whole[here] = along_image.data[there]
    outside = int(np.count_nonzero(along_image.data)) - int(np.count_nonzero(whole))
    if outside:
        where = f"lie outside its image {image_path.name}"
        raise BadFile(
            f"{path}: {outside} voxels of its labels {where}; crop the segmentation to that"
        )
    return image.with_data(whole)
