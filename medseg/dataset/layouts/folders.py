"""Folders of images and of labels, of one case each, or side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.layouts.finding import (
    CHANNEL,
    LABEL_ENDING,
    NO_TABLE,
    SPLITS,
    channel_names,
    folders_in,
    read_rows,
    scans_in,
    table_of,
    unpaired_case,
)
from medseg.errors import BadFile
from medseg.io import strip_suffix

#: Names of folders that hold images and labels, in the order in which they are looked for.
IMAGE_FOLDERS = ("imagestr", "images", "image", "imgs", "img", "scans", "volumes", "inputs", "raw", "ct", "mr", "mri")
LABEL_FOLDERS = (
    "labelstr", "labels", "label", "lbls", "masks", "mask", "segmentations", "segmentation", "segs", "seg", "gt",
    "ground_truth", "groundtruth", "annotations", "targets", "truth",
)  # fmt: skip
_IMAGE_ENDING = re.compile(r"[-_. ]?(images?|img|scan|volume)$", re.IGNORECASE)


# Folders -------------------------------------------------------------------------------------------------------------


def find_totalsegmentator(path: Path) -> Dataset | None:
    """TotalSegmentator: a folder per case with one image and `segmentations/STRUCTURE.*`; `meta.csv` may give splits.

    Values count the structures' names in alphabetical order from 1.
    """
    if not path.is_dir():
        return None
    folders = [folder for folder in folders_in(path) if (folder / "segmentations").is_dir()]
    if not folders:
        return None
    masks = {folder: {strip_suffix(file): file for file in scans_in(folder / "segmentations")} for folder in folders}
    names = sorted({name for found in masks.values() for name in found})
    values = {name: number for number, name in enumerate(names, 1)}
    kinds = {
        folder: [file for file in scans_in(folder) if not LABEL_ENDING.search(strip_suffix(file))] for folder in folders
    }
    splits = _meta_splits(path / "meta.csv")
    cases, findings, images_named = [], [], set()
    for folder in folders:
        if not kinds[folder] or not masks[folder]:
            what = "no image" if not kinds[folder] else "no mask in segmentations/"
            findings.append(unpaired_case(folder.name, f"{folder}: holds {what}"))
            continue
        if len(kinds[folder]) > 1:
            raise BadFile(f"{folder}: holds {len(kinds[folder])} images; a case has one beside segmentations/")
        images_named.add(strip_suffix(kinds[folder][0]))
        present = tuple(values[name] for name in names if name in masks[folder])
        cases.append(
            Case(
                folder.name,
                tuple(kinds[folder]),
                None,
                tuple((values[name], masks[folder][name]) for name in names if name in masks[folder]),
                split=splits.get(folder.name),
                labelled=None if len(present) == len(names) else present,
            )
        )
    table = table_of(path, {value: name for name, value in values.items()}) if names else NO_TABLE
    channel = images_named.pop().upper() if len(images_named) == 1 else "image"
    return Dataset(path, "", path.name, tuple(cases), (channel,), table, findings=tuple(findings))


def _meta_splits(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    rows = read_rows(file)
    if not rows or not {"case", "split"} <= rows[0].keys():
        return {}
    return {row["case"]: SPLITS[row["split"].lower()] for row in rows if row["split"].lower() in SPLITS}


def find_folders(path: Path) -> Dataset | None:
    """Images in one folder and labels of the same names in another beside it, also in `train/`, `val/` and `test/`."""
    if not path.is_dir():
        return None
    pairs: list[tuple[str | None, Path, Path]] = []
    if found := _image_and_label_folders(path):
        images, labels = found
        parts = {SPLITS[part.name.lower()]: part for part in folders_in(images) if part.name.lower() in SPLITS}
        both = [(s, part, labels / part.name) for s, part in parts.items() if (labels / part.name).is_dir()]
        pairs = [*both] if both and not scans_in(images) else [(None, images, labels)]
    else:
        for part in folders_in(path):
            if part.name.lower() in SPLITS and (found := _image_and_label_folders(part)):
                pairs.append((SPLITS[part.name.lower()], *found))
    if not pairs:
        return None
    cases, findings = [], []
    for split, images, labels in pairs:
        more, odd = _pair(scans_in(images), scans_in(labels), split)
        cases += more
        findings += odd
    return Dataset(path, "", path.name, tuple(cases), _channels_of(path, cases), NO_TABLE, findings=tuple(findings))


def _image_and_label_folders(path: Path) -> tuple[Path, Path] | None:
    by_name = {folder.name.lower(): folder for folder in folders_in(path)}
    images = next((by_name[name] for name in IMAGE_FOLDERS if name in by_name), None)
    labels = next((by_name[name] for name in LABEL_FOLDERS if name in by_name), None)
    return (images, labels) if images and labels else None


def find_side_by_side(path: Path) -> Dataset | None:
    """Images and labels in one folder, `x.nii.gz` beside `x_seg.nii.gz`; or a folder per case that holds such files."""
    if not path.is_dir():
        return None
    files = scans_in(path)
    labels = [file for file in files if LABEL_ENDING.search(strip_suffix(file))]
    if labels:
        cases, findings = _pair([file for file in files if file not in labels], labels, None)
        channels = _channels_of(path, cases)
        return Dataset(path, "", path.name, tuple(cases), channels, NO_TABLE, findings=tuple(findings))
    cases, findings, kinds = [], [], []
    for folder in folders_in(path):
        files = scans_in(folder)
        labels = [file for file in files if LABEL_ENDING.search(strip_suffix(file))]
        images = [file for file in files if file not in labels]
        if len(labels) == 1 and images:
            kinds.append(tuple(_kind(folder.name, file) for file in images))
            cases.append(Case(folder.name, tuple(images), labels[0]))
        elif files:
            findings.append(
                unpaired_case(folder.name, f"{folder}: holds {len(images)} images and {len(labels)} label maps")
            )
    if not cases:
        return None
    odd = next((case for case, kind in zip(cases, kinds, strict=True) if kind != kinds[0]), None)
    if odd is not None:
        raise BadFile(f"{odd.images[0].parent}: does not hold the same kinds of images as {cases[0].images[0].parent}")
    return Dataset(path, "", path.name, tuple(cases), kinds[0], NO_TABLE, findings=tuple(findings))


def _kind(case: str, file: Path) -> str:
    """What a file of a case's folder says beside the case's name: 't1n' of BraTS-01/BraTS-01-t1n.nii.gz."""
    stem = strip_suffix(file)
    return (stem.removeprefix(case).strip("-_. ") if stem.startswith(case) else stem) or "image"


def _pair(images: Sequence[Path], labels: Sequence[Path], split: str | None) -> tuple[list[Case], list[Finding]]:
    """Cases of images and labels with the same names but for what `LABEL_ENDING` allows, or channels `_0000`."""
    stems = {strip_suffix(file): file for file in images}
    known = {strip_suffix(file): file for file in labels}
    if len(stems) < len(images) or len(known) < len(labels):
        many = next(
            f for f, n in ((f, strip_suffix(f)) for f in (*images, *labels)) if f not in (stems.get(n), known.get(n))
        )
        raise BadFile(f"{many}: there is a file of the same name in another format; keep one of them")
    numbered = {stem: found for stem in stems if (found := CHANNEL.match(stem))}
    by_channel = bool(stems) and len(numbered) == len(stems) and not (stems.keys() & known.keys())
    grouped: dict[str, list[Path]] = {}
    for stem, file in stems.items():
        key = numbered[stem]["case"] if by_channel else _IMAGE_ENDING.sub("", stem) or stem
        grouped.setdefault(key, []).append(file)
    cases, findings, used = [], [], set()
    for name, files in grouped.items():
        stem = strip_suffix(files[0])
        match = next((n for n in known if n in (name, stem) or LABEL_ENDING.sub("", n) in (name, stem)), None)
        if match is None:
            findings.append(unpaired_case(name, f"{files[0]}: has no labels of the same name"))
            continue
        used.add(match)
        group = re.match(r"sub-[0-9A-Za-z]+", name)
        cases.append(Case(name, tuple(sorted(files)), known[match], split=split, group=group[0] if group else None))
    findings += [
        unpaired_case(name, f"{file}: has no image of the same name")
        for name, file in known.items()
        if name not in used
    ]
    return cases, findings


def _channels_of(path: Path, cases: Sequence[Case]) -> tuple[str, ...]:
    widths = {len(case.images): case for case in reversed(cases)}
    if len(widths) > 1:
        least, most = widths[min(widths)], widths[max(widths)]
        raise BadFile(f"{path}: {least.name} has {len(least.images)} images, {most.name} has {len(most.images)}")
    return channel_names(next(iter(widths), 1))
