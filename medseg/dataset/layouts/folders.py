"""Folders of images and of labels, of one case each, or side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.layouts.finding import (
    CHANNEL,
    LABEL_ENDING,
    NO_TABLE,
    SPLIT_WORDS,
    channel_names,
    folders_in,
    read_rows,
    scans_in,
    table_of,
    unpaired_case,
)
from medseg.errors import BadFile
from medseg.io import strip_suffix
from medseg.labels import LabelTable

#: Names of folders that hold images and labels, in the order in which they are looked for.
IMAGE_FOLDERS = (
    "imagestr",
    "images",
    "image",
    "imgs",
    "img",
    "scans",
    "volumes",
    "inputs",
    "raw",
    "ct",
    "mr",
    "mri",
)
LABEL_FOLDERS = (
    "labelstr", "labels", "label", "lbls", "masks", "mask", "segmentations", "segmentation", "segs",
    "seg", "gt",
    "ground_truth", "groundtruth", "annotations", "targets", "truth",
)  # fmt: skip
_IMAGE_ENDING = re.compile(r"[-_. ]?(images?|img|scan|volume)$", re.IGNORECASE)


# Folders ------------------------------------------------------------------------------------------


def find_totalsegmentator(path: Path) -> Dataset | None:
    """TotalSegmentator: a folder per case with one image and `segmentations/STRUCTURE.*`;
    `meta.csv` may give splits.

    Values count the structures' names in alphabetical order from 1.
    """
    if not path.is_dir():
        return None
    folders = [folder for folder in folders_in(path) if (folder / "segmentations").is_dir()]
    if not folders:
        return None
    masks = {folder: _by_stem(scans_in(folder / "segmentations")) for folder in folders}
    values = {name: number for number, name in enumerate(sorted(set().union(*masks.values())), 1)}
    cases, findings = _masked_cases(masks, values, _meta_splits(path / "meta.csv"))
    table = table_of(path, {value: name for name, value in values.items()}) if values else NO_TABLE
    kinds = {strip_suffix(image) for case in cases for image in case.images}
    return _dataset_of(
        path,
        cases,
        channels=(kinds.pop().upper() if len(kinds) == 1 else "image",),
        findings=findings,
        table=table,
    )


def _masked_cases(
    masks: Mapping[Path, Mapping[str, Path]],
    values: Mapping[str, int],
    splits: Mapping[str, str],
) -> tuple[list[Case], list[Finding]]:
    """A case for each folder with an image and masks. masks: folder to mask by structure; values of
    all structures; splits by folder name.
    """
    cases, findings = [], []
    for folder, own in masks.items():
        images, _ = _images_and_labels(folder)
        if not images or not own:
            what = "no mask in segmentations/" if images else "no image"
            findings.append(unpaired_case(folder.name, f"{folder}: holds {what}"))
            continue
        image, split = _only_image(folder, images), splits.get(folder.name)
        cases.append(_masked_case(image, own, values=values, split=split))
    return cases, findings


def _only_image(folder: Path, images: Sequence[Path]) -> Path:
    if len(images) > 1:
        raise BadFile(f"{folder}: holds {len(images)} images; a case has one beside segmentations/")
    return images[0]


def _masked_case(
    image: Path, masks: Mapping[str, Path], *, values: Mapping[str, int], split: str | None
) -> Case:
    """The case of an image and the masks beside it, by structure, in the order of all `values`."""
    present = [name for name in values if name in masks]
    return Case(
        name=image.parent.name,
        images=(image,),
        label=None,
        masks=tuple((values[name], masks[name]) for name in present),
        split=split,
        labelled=None if len(present) == len(values) else tuple(values[name] for name in present),
    )


def _dataset_of(
    path: Path,
    cases: Sequence[Case],
    *,
    channels: tuple[str, ...],
    findings: Sequence[Finding],
    table: LabelTable = NO_TABLE,
) -> Dataset:
    """A data set that nothing describes but how it lies."""
    return Dataset(
        folder=path,
        layout="",
        name=path.name,
        cases=tuple(cases),
        channels=channels,
        table=table,
        findings=tuple(findings),
    )


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    return {strip_suffix(file): file for file in files}


def _images_and_labels(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder whose names do not end as those of label maps do, and the others."""
    images: list[Path] = []
    labels: list[Path] = []
    for file in scans_in(folder):
        (labels if LABEL_ENDING.search(strip_suffix(file)) else images).append(file)
    return images, labels


def _meta_splits(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    rows = read_rows(file)
    if not rows or not {"case", "split"} <= rows[0].keys():
        return {}
    return {
        row["case"]: SPLIT_WORDS[row["split"].lower()]
        for row in rows
        if row["split"].lower() in SPLIT_WORDS
    }


def find_folders(path: Path) -> Dataset | None:
    """Images in one folder and labels of the same names in another beside it, also in `train/`,
    `val/` and `test/`.
    """
    if not path.is_dir():
        return None
    cases: list[Case] = []
    findings: list[Finding] = []
    pairs = _pairs_of_folders(path)
    for split, images, labels in pairs:
        more, odd = _pair(scans_in(images), scans_in(labels), split)
        cases += more
        findings += odd
    if not pairs:
        return None
    return _dataset_of(path, cases, channels=_channels_of(path, cases), findings=findings)


def _pairs_of_folders(path: Path) -> list[tuple[str | None, Path, Path]]:
    """(split, folder of images, folder of labels): `images/train`, or `train/images`, or
    neither.
    """
    if pair := _image_and_label_folders(path):
        images, labels = pair
        parts = _parts_of(images)
        both = [(s, part, labels / part.name) for s, part in parts if (labels / part.name).is_dir()]
        return [*both] if both and not scans_in(images) else [(None, images, labels)]
    pairs = [(split, _image_and_label_folders(part)) for split, part in _parts_of(path)]
    return [(split, *pair) for split, pair in pairs if pair]


def _parts_of(folder: Path) -> list[tuple[str, Path]]:
    """The folders in a folder that are called as a split is, each with its split."""
    inner = [part for part in folders_in(folder) if part.name.lower() in SPLIT_WORDS]
    return [(SPLIT_WORDS[part.name.lower()], part) for part in inner]


def _image_and_label_folders(path: Path) -> tuple[Path, Path] | None:
    by_name = {folder.name.lower(): folder for folder in folders_in(path)}
    images = next((by_name[name] for name in IMAGE_FOLDERS if name in by_name), None)
    labels = next((by_name[name] for name in LABEL_FOLDERS if name in by_name), None)
    return (images, labels) if images and labels else None


def find_side_by_side(path: Path) -> Dataset | None:
    """Images and labels in one folder, `x.nii.gz` beside `x_seg.nii.gz`; or a folder per case that
    holds such files.
    """
    if not path.is_dir():
        return None
    images, labels = _images_and_labels(path)
    if labels:
        cases, findings = _pair(images, labels, None)
        return _dataset_of(path, cases, channels=_channels_of(path, cases), findings=findings)
    cases, findings = [], []
    for folder in folders_in(path):
        images, labels = _images_and_labels(folder)
        if len(labels) == 1 and images:
            cases.append(Case(name=folder.name, images=tuple(images), label=labels[0]))
        elif images or labels:
            message = f"{folder}: holds {len(images)} images and {len(labels)} label maps"
            findings.append(unpaired_case(folder.name, message))
    if not cases:
        return None
    return _dataset_of(path, cases, channels=_kinds_of(cases), findings=findings)


def _kinds_of(cases: Sequence[Case]) -> tuple[str, ...]:
    """The kinds of images that lie in each case's folder. Raises `BadFile` if they differ."""
    kinds = [tuple(_kind(case.name, file) for file in case.images) for case in cases]
    for case, own in zip(cases, kinds, strict=True):
        if own != kinds[0]:
            here, there = case.images[0].parent, cases[0].images[0].parent
            raise BadFile(f"{here}: does not hold the same kinds of images as {there}")
    return kinds[0]


def _kind(case: str, file: Path) -> str:
    """What a file of a case's folder says beside the case's name: 't1n' of
    BraTS-01/BraTS-01-t1n.nii.gz.
    """
    stem = strip_suffix(file)
    return (stem.removeprefix(case).strip("-_. ") if stem.startswith(case) else stem) or "image"


def _pair(
    images: Sequence[Path], labels: Sequence[Path], split: str | None
) -> tuple[list[Case], list[Finding]]:
    """Cases of images and labels with the same names but for what `LABEL_ENDING` allows, or
    channels `_0000`.
    """
    image_files, label_files = _by_stem(images), _by_stem(labels)
    _check_one_format((*images, *labels), {*image_files.values(), *label_files.values()})
    cases, findings = [], []
    partners: set[str] = set()
    for name, files in _grouped_by_case(image_files, label_files).items():
        partner = _label_named(label_files, (name, strip_suffix(files[0])))
        if partner is None:
            findings.append(unpaired_case(name, f"{files[0]}: has no labels of the same name"))
            continue
        partners.add(partner)
        cases.append(
            Case(
                name=name,
                images=tuple(sorted(files)),
                label=label_files[partner],
                split=split,
            )
        )
    findings += [
        unpaired_case(name, f"{file}: has no image of the same name")
        for name, file in label_files.items()
        if name not in partners
    ]
    return cases, findings


def _check_one_format(files: Sequence[Path], taken: set[Path]) -> None:
    """Raise `BadFile` for a file that is not taken because another one has its name."""
    for file in files:
        if file not in taken:
            raise BadFile(
                f"{file}: there is a file of the same name in another format; keep one of them"
            )


def _grouped_by_case(
    images: Mapping[str, Path], labels: Mapping[str, Path]
) -> dict[str, list[Path]]:
    """Case name to its images, of files by stem: all are channels `_0000` and so on, or each is a
    case.
    """
    channels = {stem: CHANNEL.match(stem) for stem in images}
    are_channels = all(channels.values()) and not (images.keys() & labels.keys())
    images_of: dict[str, list[Path]] = {}
    for stem, file in images.items():
        channel = channels[stem] if are_channels else None
        name = channel["case"] if channel else _IMAGE_ENDING.sub("", stem) or stem
        images_of.setdefault(name, []).append(file)
    return images_of


def _label_named(labels: Mapping[str, Path], names: Sequence[str]) -> str | None:
    """The stem of the first label file that has one of the names, with or without an ending."""
    for stem in labels:
        if stem in names or LABEL_ENDING.sub("", stem) in names:
            return stem
    return None


def _channels_of(path: Path, cases: Sequence[Case]) -> tuple[str, ...]:
    widths = {len(case.images): case for case in reversed(cases)}
    if len(widths) > 1:
        least, most = widths[min(widths)], widths[max(widths)]
        raise BadFile(
            f"{path}: {least.name} has {len(least.images)} images, {most.name} has"
            f" {len(most.images)}"
        )
    return channel_names(next(iter(widths), 1))
