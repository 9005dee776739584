"""The layouts in which people keep annotated scans, each a function from a path to a `Dataset`; `detect` picks one.

A layout is recognised by what defines it (a `dataset.json`, a list, the names of folders), never by guessing from
voxels. Hidden files, such as the `._x` that macOS leaves, are passed over. A new layout is one function and one line in
`LAYOUTS`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.dataset import Case, Dataset, Finding, Progress, grid_tolerance_mm
from medseg.errors import BadConfig, BadFile, MedsegError
from medseg.files import read_text
from medseg.io import embedded_table, is_readable_name, read, read_labels, strip_suffix
from medseg.labels import Label, LabelTable
from medseg.volume import reorient, same_grid

#: Names of folders that hold images and labels, in the order in which they are looked for.
IMAGE_FOLDERS = ("imagestr", "images", "image", "imgs", "img", "scans", "volumes", "inputs", "raw", "ct", "mr", "mri")
LABEL_FOLDERS = (
    "labelstr", "labels", "label", "lbls", "masks", "mask", "segmentations", "segmentation", "segs", "seg", "gt",
    "ground_truth", "groundtruth", "annotations", "targets", "truth",
)  # fmt: skip
#: What a label file's name may end in where its image's does not.
LABEL_ENDING = re.compile(
    r"[-_. ]?(dseg|seg|segmentation|segmentations|labels?|labelmap|masks?|gt|ground_?truth|annotations?)$",
    re.IGNORECASE,
)
_IMAGE_ENDING = re.compile(r"[-_. ]?(images?|img|scan|volume)$", re.IGNORECASE)
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_SPLITS = {
    "train": "train", "training": "train", "tr": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
_TABLE_NAMES = ("labels.csv", "labels.ctbl", "labels.tsv", "dseg.tsv")
_NO_TABLE = LabelTable(())


def detect(path: Path, progress: Progress | None = None) -> Dataset:
    """The dataset at a path. Raises `BadFile` saying what was looked for if no layout fits."""
    if not path.exists():
        raise BadFile(f"{path}: does not exist")
    for layout, find in LAYOUTS.items():
        found = find(path)
        if found is not None:
            return _finish(replace(found, layout=layout), progress)
    if path.is_file():
        raise BadFile(
            f"{path}: is not a dataset; give a folder, a dataset.json, a MONAI datalist, or a CSV, TSV or JSONL list "
            "with the columns case, image and label"
        )
    raise BadFile(
        f"{path}: no dataset was found; looked for dataset.json, a list (CSV, TSV, JSONL, MONAI JSON) with images and "
        "labels, BIDS derivatives with *_dseg files, folders with segmentations/, images/ beside labels/, and x.nii.gz "
        "beside x_seg.nii.gz"
    )


def _finish(dataset: Dataset, progress: Progress | None) -> Dataset:
    """What is the same for all layouts: files that are missing, names used twice, the table, the splits."""
    findings = list(dataset.findings)
    cases = []
    for case in sorted(dataset.cases, key=lambda case: _natural(case.name)):
        files = [*case.images, *([case.label] if case.label else []), *(mask for _, mask in case.masks)]
        missing = [file for file in files if not file.exists()]
        if missing:
            findings.append(Finding(case.name, "missing", "error", f"{missing[0]}: is missing", True))
        else:
            cases.append(case)
    names = [case.name for case in dataset.cases]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadFile(f"{dataset.folder}: the case name '{twice}' is used twice; give every case a name of its own")
    if not cases:
        why = f"; the first problem was {findings[0].message}" if findings else ""
        raise BadFile(f"{dataset.folder}: holds no case with an image and labels ({dataset.layout} layout){why}")
    table = dataset.table
    if not len(table) and not dataset.regions:
        table = _table_beside(dataset, cases, findings) or _table_from_files(dataset, cases, progress)
    dataset = replace(dataset, cases=tuple(cases), table=table, findings=tuple(findings))
    return replace(dataset, splits=_usable(dataset.splits, names, cases) or _column_splits(cases))


def _usable(
    splits: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], names: Iterable[str], cases: Sequence[Case]
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Given splits without the cases that were left out. Raises `BadFile` for names that the dataset does not have."""
    known, kept = set(names), {case.name for case in cases}
    for side in (side for split in splits for side in split):
        strange = next((name for name in side if name not in known), None)
        if strange is not None:
            raise BadFile(f"the splits name a case '{strange}' that the dataset does not have; correct the splits")
    return tuple(
        (tuple(name for name in training if name in kept), tuple(name for name in validation if name in kept))
        for training, validation in splits
    )


def _column_splits(cases: Sequence[Case]) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """The splits that the cases' own 'train' and 'val', or else their folds, make; () if they say nothing."""
    usable = [case for case in cases if case.split != "test"]
    folds = sorted({case.fold for case in usable if case.fold is not None})
    held_out: list[Callable[[Case], bool]] = []
    if {"train", "val"} <= {case.split for case in usable}:
        held_out = [lambda case: case.split == "val"]
    elif len(folds) > 1:
        held_out = [lambda case, fold=fold: case.fold == fold for fold in folds]  # type: ignore[misc]
    return tuple(
        (
            tuple(case.name for case in usable if not is_out(case)),
            tuple(case.name for case in usable if is_out(case)),
        )
        for is_out in held_out
    )


# nnU-Net and Decathlon -----------------------------------------------------------------------------------------------


def find_nnunet(path: Path) -> Dataset | None:
    """nnU-Net v2 raw data: `dataset.json` with `channel_names`, `imagesTr/CASE_0000.*`, `labelsTr/CASE.*`."""
    described = _described(path)
    if described is None or "channel_names" not in described[1]:
        return None
    file, content = described
    folder = file.parent
    names = _numbered(file, content["channel_names"], "channel_names")
    table, regions, ignore = _nnunet_labels(file, content)
    ending = str(content.get("file_ending", ".nii.gz"))
    cases: list[Case] = []
    findings: list[Finding] = []
    if isinstance(content.get("dataset"), dict):
        for name, entry in content["dataset"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or "label" not in entry:
                raise BadFile(
                    f"{file}: 'dataset' must give every case its 'images', a list, and its 'label'; see {name}"
                )
            images = tuple(folder / str(image) for image in entry["images"])
            cases.append(Case(name, images, folder / str(entry["label"])))
    else:
        cases, findings = _nnunet_cases(folder, ending, len(names), "Tr")
    unlabelled = _nnunet_images(folder / "imagesTs", ending) if (folder / "imagesTs").is_dir() else {}
    return Dataset(
        folder,
        "",
        str(content.get("name") or folder.name),
        tuple(cases),
        names,
        table,
        regions,
        ignore,
        _final_splits(folder),
        tuple(Case(name, images, None, split="test") for name, images in unlabelled.items()),
        tuple(findings),
        file,
    )


def _nnunet_images(folder: Path, ending: str) -> dict[str, tuple[Path, ...]]:
    """Case name to its files by channel, of files named CASE_0000 and so on."""
    found: dict[str, list[Path]] = {}
    for file in _files(folder):
        match = _CHANNEL.match(file.name.removesuffix(ending)) if file.name.endswith(ending) else None
        if match:
            found.setdefault(match["case"], []).append(file)
    return {name: tuple(sorted(files)) for name, files in found.items()}


def _nnunet_cases(folder: Path, ending: str, channels: int, which: str) -> tuple[list[Case], list[Finding]]:
    images = _nnunet_images(_existing(folder / f"images{which}"), ending)
    labels = {file.name.removesuffix(ending): file for file in _files(_existing(folder / f"labels{which}"))}
    cases, findings = [], []
    for name in sorted(images.keys() | {name for name, file in labels.items() if file.name.endswith(ending)}):
        wanted = tuple(folder / f"images{which}" / f"{name}_{channel:04d}{ending}" for channel in range(channels))
        label = labels.get(name)
        if label is None or not label.name.endswith(ending):
            findings.append(_unpaired(name, f"{images[name][0]}: has no labels in labels{which}/"))
        elif extra := [file for file in images.get(name, ()) if file not in wanted]:
            message = f"{extra[0]}: is a channel that dataset.json does not name"
            findings.append(Finding(name, "channels", "error", message, True))
        else:
            cases.append(Case(name, wanted, label))
    return cases, findings


def _nnunet_labels(
    file: Path, content: Mapping[str, Any]
) -> tuple[LabelTable, tuple[tuple[int, ...], ...], int | None]:
    """Table, regions and ignore value of nnU-Net's `labels`; see its documentation, dataset_format and region_based."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise BadFile(f'{file}: has no labels; name them as in "labels": {{"background": 0, "liver": 1}}')
    named: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        parts = value if isinstance(value, list) else [value]
        named[str(name)] = tuple(_whole(file, f"the label '{name}'", part) for part in parts)
    ignored = named.pop("ignore", None)
    if ignored is not None and len(ignored) != 1:
        raise BadFile(f"{file}: the label 'ignore' must be one value")
    ignore = ignored[0] if ignored else None
    named = {name: parts for name, parts in named.items() if parts != (0,)}
    if all(len(parts) == 1 for parts in named.values()) and "regions_class_order" not in content:
        return _table(file, {parts[0]: name for name, parts in named.items()}), (), ignore
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(named):
        raise BadFile(f"{file}: has regions, so regions_class_order must give {len(named)} values, one for each")
    values = [_whole(file, "regions_class_order", value) for value in order]
    table = _table(file, dict(zip(values, named, strict=True)), keep_order=True)
    if len(table) != len(values):
        raise BadFile(f"{file}: regions_class_order gives the same value to two regions")
    return table, tuple(named.values()), ignore


def _final_splits(folder: Path) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """nnU-Net's `splits_final.json`, beside the data or where nnU-Net keeps it."""
    places = [folder / "splits_final.json"]
    if folder.parent.name.lower() == "nnunet_raw":
        places.append(folder.parent.parent / "nnUNet_preprocessed" / folder.name / "splits_final.json")
    for file in places:
        if file.is_file():
            content = _json(file)
            try:
                return tuple((tuple(map(str, split["train"])), tuple(map(str, split["val"]))) for split in content)
            except (TypeError, KeyError):
                raise BadFile(f"{file}: is not a list of splits with 'train' and 'val'; correct or remove it") from None
    return ()


def find_decathlon(path: Path) -> Dataset | None:
    """Medical Segmentation Decathlon and nnU-Net v1: `dataset.json` with `modality`, `labels` and `training`."""
    described = _described(path)
    if described is None or not {"modality", "labels"} <= described[1].keys():
        return None
    file, content = described
    folder = file.parent
    channels = _numbered(file, content["modality"], "modality")
    labels = content["labels"]
    if not isinstance(labels, dict) or not labels:
        raise BadFile(f'{file}: has no labels; name them as in "labels": {{"0": "background", "1": "liver"}}')
    if all(isinstance(value, int) for value in labels.values()):  # written the other way round by some
        labels = {value: name for name, value in labels.items()}
    table = _table(file, {_whole(file, "a label value", value): str(name) for value, name in labels.items()})
    listed = content.get("training")
    if not isinstance(listed, list) or not listed:
        raise BadFile(f"{file}: lists no cases under 'training'")
    cases = []
    for entry in listed:
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise BadFile(f"{file}: an entry of 'training' has no image and label: {entry!r:.80}")
        if Path(str(entry["image"])).name.startswith("._"):
            continue
        label = folder / str(entry["label"])
        images = _decathlon_images(folder / str(entry["image"]), len(channels))
        cases.append(Case(strip_suffix(label), images, label))
    tests = [entry.get("image") if isinstance(entry, dict) else entry for entry in content.get("test") or ()]
    unlabelled = [
        Case(strip_suffix(str(name)), _decathlon_images(folder / str(name), len(channels)), None, split="test")
        for name in tests
        if not Path(str(name)).name.startswith("._") and (folder / str(name)).exists()
    ]
    name = str(content.get("name") or folder.name)
    findings = _beside_the_list(file, cases, unlabelled)
    splits = _final_splits(folder)
    return Dataset(
        folder, "", name, tuple(cases), channels, table, (), None, splits, tuple(unlabelled), tuple(findings), file
    )


def _decathlon_images(listed: Path, channels: int) -> tuple[Path, ...]:
    """One file, or nnU-Net v1's file for each channel that `dataset.json` names without the channel's number."""
    suffix = listed.name[len(strip_suffix(listed)) :]
    numbered = tuple(listed.with_name(f"{strip_suffix(listed)}_{channel:04d}{suffix}") for channel in range(channels))
    return numbered if not listed.exists() and numbered[0].exists() else (listed,)


def _beside_the_list(file: Path, cases: Sequence[Case], unlabelled: Sequence[Case]) -> list[Finding]:
    """Warnings of files that lie beside those listed and are not listed themselves, in order of their case names."""
    listed = {path for case in (*cases, *unlabelled) for path in (*case.images, case.label) if path is not None}
    folders = {path.parent for case in cases for path in (*case.images, case.label) if path is not None}
    extra = {
        strip_suffix(path): path
        for folder in sorted(folders)
        for path in _scans(folder)
        if path not in listed and folder != file.parent
    }
    return [_unpaired(name, f"{path}: is not listed in {file.name}, so it is not used") for name, path in extra.items()]


# Lists ---------------------------------------------------------------------------------------------------------------


def find_datalist(path: Path) -> Dataset | None:
    """A MONAI datalist: JSON with `training`, and `validation` and `testing` or `test` if there are, each a list."""
    file = path if path.is_file() else _only(path, ".json", _is_datalist)
    if file is None or file.suffix.lower() != ".json" or not _is_datalist(file):
        return None
    content = _json(file)
    cases: list[Case] = []
    unlabelled: list[Case] = []
    for key, split in (("training", None), ("validation", "val"), ("testing", "test"), ("test", "test")):
        for entry in content.get(key) or ():
            entry = entry if isinstance(entry, dict) else {"image": entry}
            case = _listed_case(file, entry, split or ("train" if content.get("validation") else None))
            (cases if case.label is not None else unlabelled).append(case)
    if without := [case for case in unlabelled if case.split != "test"]:
        raise BadFile(f"{file}: {without[0].name} is listed for training but has no label")
    width = len(cases[0].images) if cases else 1
    channels = _numbered(file, content["modality"], "modality") if "modality" in content else _channels(width)
    labels = content.get("labels")
    table = _NO_TABLE
    if isinstance(labels, dict):
        turned = {value: name for name, value in labels.items()} if _values_are_whole(labels) else labels
        table = _table(file, {_whole(file, "a label value", value): str(name) for value, name in turned.items()})
    name = str(content.get("name") or file.stem)
    return Dataset(file.parent, "", name, tuple(cases), channels, table, unlabelled=tuple(unlabelled), source=file)


def _is_datalist(file: Path) -> bool:
    try:
        content = json.loads(read_text(file))
    except (ValueError, BadFile):
        return False
    training = content.get("training") if isinstance(content, dict) else None
    return isinstance(training, list) and bool(training) and isinstance(training[0], dict) and "image" in training[0]


def find_manifest(path: Path) -> Dataset | None:
    """A CSV, TSV or JSONL list: `case,image[,image_2 ...],label,split,fold,group,labelled`, paths from its folder."""
    suffixes = (".csv", ".tsv", ".jsonl")
    file = path if path.is_file() else next((f for s in suffixes if (f := _only(path, s, _is_manifest))), None)
    if file is None or file.suffix.lower() not in suffixes or not _is_manifest(file):
        return None
    rows = _rows(file)
    image_columns = [column for column in rows[0] if re.fullmatch(r"image(_.+|\d+)?", column)]
    cases = [_listed_case(file, _manifest_entry(row, image_columns), None) for row in rows]
    unlabelled = [case for case in cases if case.label is None]
    if without := [case for case in unlabelled if case.split != "test"]:
        raise BadFile(f"{file}: case {without[0].name} has no label; only cases of the split 'test' may lack one")
    channels = tuple(column.removeprefix("image").lstrip("_") or "image" for column in image_columns)
    if len(channels) == 1:
        width = len(cases[0].images)
        channels = channels if width == 1 else _channels(width)
    labelled = tuple(case for case in cases if case.label is not None)
    return Dataset(file.parent, "", file.stem, labelled, channels, _NO_TABLE, unlabelled=tuple(unlabelled), source=file)


_COLUMN_NAMES = {
    "name": "case", "id": "case", "case_id": "case", "mask": "label", "seg": "label", "segmentation": "label",
    "labels": "label", "subject": "group", "patient": "group", "patient_id": "group", "subject_id": "group",
}  # fmt: skip


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a list, column names in small letters and their synonyms replaced. Raises `BadFile`."""
    text = read_text(file)
    try:
        if file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ";" if ";" in text.partition("\n")[0] else ","
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (ValueError, csv.Error) as error:
        raise BadFile(f"{file}: cannot be read as a list of cases: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row or None in row.values():
            raise BadFile(f"{file}: entry {number} does not have as many columns as the first line")
    return [{_column(str(key).strip()): value for key, value in row.items()} for row in rows]


def _column(name: str) -> str:
    """A column's name in small letters and by its usual synonym; of images, what follows is a channel's name."""
    if name.lower().startswith("image"):
        return "image" + name[len("image") :] if name.lower() != "image_id" else "case"
    return _COLUMN_NAMES.get(name.lower(), name.lower())


def _is_manifest(file: Path) -> bool:
    try:
        rows = _rows(file)
    except BadFile:
        return False
    return bool(rows) and any(re.fullmatch(r"image(_.+|\d+)?", column) for column in rows[0]) and "label" in rows[0]


def _manifest_entry(row: Mapping[str, Any], image_columns: Sequence[str]) -> dict[str, Any]:
    plain = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    images = [plain[column] for column in image_columns if plain.get(column)]
    return {**plain, "image": images[0] if len(images) == 1 else images}


def _listed_case(file: Path, entry: Mapping[str, Any], split: str | None) -> Case:
    """A case of a datalist or a manifest; paths count from the list's folder."""
    image = entry.get("image")
    images = [str(one) for one in (image if isinstance(image, list) else [image]) if one]
    if not images:
        raise BadFile(f"{file}: a case has no image: {dict(entry)!r:.80}")
    label = entry.get("label") or None
    if label is not None and not isinstance(label, str):
        raise BadFile(f"{file}: the label of {images[0]} is {label!r:.40}, not a file; medseg learns label maps")
    name = str(entry.get("case") or "") or strip_suffix(label or images[0])
    said = str(entry.get("split") or "").lower() or split
    if said is not None and said not in _SPLITS:
        raise BadFile(f"{file}: the split of {name} is '{said}', not train, val or test")
    fold = entry.get("fold")
    labelled = entry.get("labelled")
    if isinstance(labelled, str):
        labelled = re.split(r"[\s,;]+", labelled.strip()) if labelled.strip() else None
    elif isinstance(labelled, int):
        labelled = [labelled]
    return Case(
        name,
        tuple(file.parent / one for one in images),
        file.parent / label if label else None,
        split=_SPLITS[said] if said else None,
        fold=None if fold in (None, "") else _whole(file, f"the fold of {name}", fold),
        group=str(entry["group"]) if entry.get("group") not in (None, "") else None,
        labelled=tuple(_whole(file, f"'labelled' of {name}", value) for value in labelled) if labelled else None,
    )


# BIDS ----------------------------------------------------------------------------------------------------------------


def find_bids(path: Path) -> Dataset | None:
    """BIDS: `sub-*` folders with images, and `*_dseg` label maps in derivatives, with `dseg.tsv` by inheritance.

    Given the folder of one pipeline in `derivatives/`, only its label maps are taken.
    """
    if not path.is_dir():
        return None
    pipeline = path if path.parent.name == "derivatives" else None
    root = path.parent.parent if pipeline else path
    if not (root / "dataset_description.json").is_file() and not any(_folders(root, "sub-")):
        return None
    homes = [pipeline] if pipeline else [*_folders(root / "derivatives"), root]
    labels = [(home, file) for home in homes for file in _bids_files(home) if _entities(file)[1] == "dseg"]
    if not labels:
        return None
    kinds: set[tuple[Any, ...]] = {
        (home, *(_entities(file)[0].get(key, "") for key in ("space", "seg", "desc", "atlas"))) for home, file in labels
    }
    if len(kinds) > 1:
        told = sorted(" ".join(part for part in (kind[0].name, *kind[1:]) if part) for kind in kinds)
        raise BadConfig(
            f"{path}: holds {len(kinds)} kinds of segmentations ({'; '.join(told[:4])}); give the folder of one in "
            "derivatives/, or a list of cases as CSV"
        )
    home = labels[0][0]
    found = {file: _bids_images(root, home, file) for _, file in labels}
    lacking = [file for file, images in found.items() if not images]
    common = (
        set.intersection(*(set(images) for images in found.values() if images)) if len(lacking) < len(found) else set()
    )
    if not common:
        raise BadFile(f"{path}: no image of one kind (T1w, FLAIR ...) belongs to every segmentation")
    channels = _bids_on_grid({file: images for file, images in found.items() if images}, sorted(common))
    cases, tables = [], []
    for file, images in found.items():
        if images:
            entities = _entities(file)[0]
            name = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses", "acq", "run") if key in entities)
            subject = f"sub-{entities['sub']}"
            cases.append(Case(name, tuple(images[kind] for kind in channels), file, group=subject))
            tables.append(_bids_table(home, file))
    table = _united(path, [one for one in tables if one is not None])
    findings = [_unpaired(strip_suffix(file), f"{file}: no image belongs to it") for file in lacking]
    return Dataset(root, "", root.name, tuple(cases), tuple(channels), table, findings=tuple(findings))


def _entities(file: Path) -> tuple[dict[str, str], str]:
    """The entities of a BIDS file name and its suffix: ({'sub': '01', 'space': 'orig'}, 'dseg')."""
    *pairs, suffix = file.name.split(".")[0].split("_")
    return dict(pair.partition("-")[::2] for pair in pairs if "-" in pair), suffix


def _bids_files(home: Path) -> list[Path]:
    return [file for subject in _folders(home, "sub-") for file in _deep_scans(subject)]


def _bids_images(root: Path, home: Path, label: Path) -> dict[str, Path]:
    """Suffix (T1w ...) to the image a segmentation belongs to: of the same subject, session, run and space.

    An image may say less than the segmentation about itself, but nothing else.
    """
    wanted = {key: value for key, value in _entities(label)[0].items() if key not in ("desc", "seg", "atlas", "label")}
    if wanted.get("space", "").lower() in ("orig", "t1w", "t2w", "individual", "native"):
        wanted.pop("space")
    found: dict[str, Path] = {}
    for place in dict.fromkeys((home, root)):
        for file in _deep_scans(place / f"sub-{wanted['sub']}"):
            entities, suffix = _entities(file)
            entities.pop("desc", None)
            said = {key: value for key, value in entities.items() if key not in ("part", "echo")}
            fits = said.items() <= wanted.items() and said.get("space") == wanted.get("space")
            if fits and suffix not in ("dseg", "probseg", "mask") and suffix not in found:
                found[suffix] = file
    return found


def _bids_on_grid(found: Mapping[Path, Mapping[str, Path]], kinds: Sequence[str]) -> list[str]:
    """Those kinds of images that lie on the grid of the first segmentation; all of them if there is only one."""
    if len(kinds) == 1:
        return list(kinds)
    label, images = next(iter(found.items()))
    try:
        labels = read_labels(label)
        fitting = []
        for kind in kinds:
            image = read(images[kind])
            turned = reorient(labels, image.orientation)
            if same_grid(image, turned, grid_tolerance_mm(image)):
                fitting.append(kind)
    except MedsegError:
        return list(kinds)
    return fitting or list(kinds)


def _bids_table(home: Path, label: Path) -> LabelTable | None:
    """The nearest `dseg.tsv` that speaks of a file: in its folder or one above, saying nothing else than its name."""
    wanted = _entities(label)[0]
    folder = label.parent
    while True:
        fitting = [
            file
            for file in _files(folder)
            if file.suffix == ".tsv" and _entities(file)[1] == "dseg" and _entities(file)[0].items() <= wanted.items()
        ]
        if fitting:
            return LabelTable.read(max(fitting, key=lambda file: len(_entities(file)[0])))
        if folder == home or home not in folder.parents:
            return None
        folder = folder.parent


# Folders -------------------------------------------------------------------------------------------------------------


def find_totalsegmentator(path: Path) -> Dataset | None:
    """TotalSegmentator: a folder per case with one image and `segmentations/STRUCTURE.*`; `meta.csv` may give splits.

    Values count the structures' names in alphabetical order from 1.
    """
    if not path.is_dir():
        return None
    folders = [folder for folder in _folders(path) if (folder / "segmentations").is_dir()]
    if not folders:
        return None
    masks = {folder: {strip_suffix(file): file for file in _scans(folder / "segmentations")} for folder in folders}
    names = sorted({name for found in masks.values() for name in found})
    values = {name: number for number, name in enumerate(names, 1)}
    kinds = {
        folder: [file for file in _scans(folder) if not LABEL_ENDING.search(strip_suffix(file))] for folder in folders
    }
    splits = _meta_splits(path / "meta.csv")
    cases, findings, images_named = [], [], set()
    for folder in folders:
        if not kinds[folder] or not masks[folder]:
            what = "no image" if not kinds[folder] else "no mask in segmentations/"
            findings.append(_unpaired(folder.name, f"{folder}: holds {what}"))
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
    table = _table(path, {value: name for name, value in values.items()}) if names else _NO_TABLE
    channel = images_named.pop().upper() if len(images_named) == 1 else "image"
    return Dataset(path, "", path.name, tuple(cases), (channel,), table, findings=tuple(findings))


def _meta_splits(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    rows = _rows(file)
    if not rows or not {"case", "split"} <= rows[0].keys():
        return {}
    return {row["case"]: _SPLITS[row["split"].lower()] for row in rows if row["split"].lower() in _SPLITS}


def find_folders(path: Path) -> Dataset | None:
    """Images in one folder and labels of the same names in another beside it, also in `train/`, `val/` and `test/`."""
    if not path.is_dir():
        return None
    pairs: list[tuple[str | None, Path, Path]] = []
    if found := _image_and_label_folders(path):
        images, labels = found
        parts = {_SPLITS[part.name.lower()]: part for part in _folders(images) if part.name.lower() in _SPLITS}
        both = [(s, part, labels / part.name) for s, part in parts.items() if (labels / part.name).is_dir()]
        pairs = [*both] if both and not _scans(images) else [(None, images, labels)]
    else:
        for part in _folders(path):
            if part.name.lower() in _SPLITS and (found := _image_and_label_folders(part)):
                pairs.append((_SPLITS[part.name.lower()], *found))
    if not pairs:
        return None
    cases, findings = [], []
    for split, images, labels in pairs:
        more, odd = _pair(_scans(images), _scans(labels), split)
        cases += more
        findings += odd
    return Dataset(path, "", path.name, tuple(cases), _channels_of(path, cases), _NO_TABLE, findings=tuple(findings))


def _image_and_label_folders(path: Path) -> tuple[Path, Path] | None:
    by_name = {folder.name.lower(): folder for folder in _folders(path)}
    images = next((by_name[name] for name in IMAGE_FOLDERS if name in by_name), None)
    labels = next((by_name[name] for name in LABEL_FOLDERS if name in by_name), None)
    return (images, labels) if images and labels else None


def find_side_by_side(path: Path) -> Dataset | None:
    """Images and labels in one folder, `x.nii.gz` beside `x_seg.nii.gz`; or a folder per case that holds such files."""
    if not path.is_dir():
        return None
    files = _scans(path)
    labels = [file for file in files if LABEL_ENDING.search(strip_suffix(file))]
    if labels:
        cases, findings = _pair([file for file in files if file not in labels], labels, None)
        channels = _channels_of(path, cases)
        return Dataset(path, "", path.name, tuple(cases), channels, _NO_TABLE, findings=tuple(findings))
    cases, findings, kinds = [], [], []
    for folder in _folders(path):
        files = _scans(folder)
        labels = [file for file in files if LABEL_ENDING.search(strip_suffix(file))]
        images = [file for file in files if file not in labels]
        if len(labels) == 1 and images:
            kinds.append(tuple(_kind(folder.name, file) for file in images))
            cases.append(Case(folder.name, tuple(images), labels[0]))
        elif files:
            findings.append(
                _unpaired(folder.name, f"{folder}: holds {len(images)} images and {len(labels)} label maps")
            )
    if not cases:
        return None
    odd = next((case for case, kind in zip(cases, kinds, strict=True) if kind != kinds[0]), None)
    if odd is not None:
        raise BadFile(f"{odd.images[0].parent}: does not hold the same kinds of images as {cases[0].images[0].parent}")
    return Dataset(path, "", path.name, tuple(cases), kinds[0], _NO_TABLE, findings=tuple(findings))


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
    numbered = {stem: found for stem in stems if (found := _CHANNEL.match(stem))}
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
            findings.append(_unpaired(name, f"{files[0]}: has no labels of the same name"))
            continue
        used.add(match)
        group = re.match(r"sub-[0-9A-Za-z]+", name)
        cases.append(Case(name, tuple(sorted(files)), known[match], split=split, group=group[0] if group else None))
    findings += [_unpaired(n, f"{file}: has no image of the same name") for n, file in known.items() if n not in used]
    return cases, findings


def _channels_of(path: Path, cases: Sequence[Case]) -> tuple[str, ...]:
    widths = {len(case.images): case for case in reversed(cases)}
    if len(widths) > 1:
        least, most = widths[min(widths)], widths[max(widths)]
        raise BadFile(f"{path}: {least.name} has {len(least.images)} images, {most.name} has {len(most.images)}")
    return _channels(next(iter(widths), 1))


#: Layout to the function that finds it, in the order in which they are tried: what describes itself comes first.
LAYOUTS: dict[str, Callable[[Path], Dataset | None]] = {
    "nnunet": find_nnunet,
    "decathlon": find_decathlon,
    "datalist": find_datalist,
    "manifest": find_manifest,
    "bids": find_bids,
    "totalsegmentator": find_totalsegmentator,
    "folders": find_folders,
    "side by side": find_side_by_side,
}


# What labels mean ----------------------------------------------------------------------------------------------------


def _table(path: Path, names: Mapping[int, str], *, keep_order: bool = False) -> LabelTable:
    """A table of named values, coloured; the background is left out. Raises `BadFile`."""
    named = {value: name for value, name in names.items() if value != 0}
    colors = LabelTable.from_values(named)
    values = named if keep_order else sorted(named)
    try:
        return LabelTable(tuple(Label(value, named[value], colors[value].color) for value in values))
    except BadConfig as error:
        raise BadFile(f"{path}: {error}") from None


def _table_beside(dataset: Dataset, cases: Sequence[Case], findings: list[Finding]) -> LabelTable | None:
    """The table that lies beside the data or its labels, or None. A file of that name that is no table is a finding."""
    places = [dataset.folder, *(case.label.parent for case in cases[:1] if case.label is not None)]
    for place in dict.fromkeys(places):
        tables = [file for file in _files(place) if file.name.lower().endswith(".ctbl")]
        for file in (*(place / name for name in _TABLE_NAMES), *(tables if len(tables) == 1 else ())):
            if file.is_file() and file != dataset.source:
                try:
                    return LabelTable.read(file)
                except BadFile as error:
                    findings.append(Finding("", "table", "warning", f"{error}; names are not taken from it"))
    return None


def _table_from_files(dataset: Dataset, cases: Sequence[Case], progress: Progress | None) -> LabelTable:
    """Names that the label maps carry in themselves, or else 'label 1' for every value found in them."""
    files = [case.label for case in cases if case.label is not None]
    if all(file.name.lower().endswith(".seg.nrrd") for file in files):
        return _united(dataset.folder, [table for file in files if (table := embedded_table(file)) is not None])
    values: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for done, (file, found) in enumerate(zip(files, pool.map(_values_in, files), strict=True), 1):
            values |= found
            if progress:
                progress(done, len(files), strip_suffix(file))
    if not values - {0}:
        raise BadFile(f"{dataset.folder}: no label map holds anything but background")
    return LabelTable.from_values(values)


def _values_in(file: Path) -> set[int]:
    """The values of a label map; none for one that cannot be read, of which `medseg check` tells."""
    try:
        return {int(value) for value in np.unique(read_labels(file).data)}
    except MedsegError:
        return set()


def _united(path: Path, tables: Sequence[LabelTable]) -> LabelTable:
    """One table of several. Raises `BadFile` if they call one value by different names."""
    labels: dict[int, Label] = {}
    for label in (label for table in tables for label in table.labels):
        before = labels.setdefault(label.value, label)
        if before.name != label.name:
            raise BadFile(f"{path}: label {label.value} is '{before.name}' in one case and '{label.name}' in another")
    return LabelTable(tuple(labels[value] for value in sorted(labels)))


# Files ---------------------------------------------------------------------------------------------------------------


def _described(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """`dataset.json` in a folder, or a JSON file itself, with its content."""
    file = path / "dataset.json" if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    content = _json(file)
    return (file, content) if isinstance(content, dict) else None


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise BadFile(f"{file}: is not valid JSON: {error}") from None


def _numbered(file: Path, content: Any, key: str) -> tuple[str, ...]:
    """Names by number: {'0': 'T1', '1': 'FLAIR'} or a list."""
    if isinstance(content, list):
        return tuple(str(name) for name in content)
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, dict) or {str(number) for number in range(len(content))} != set(map(str, content)):
        raise BadFile(f'{file}: "{key}" must name the channels by number, as in {{"0": "CT"}}')
    return tuple(str(name) for _, name in sorted(content.items(), key=lambda item: int(item[0])))


def _whole(file: Path, what: str, value: Any) -> int:
    try:
        if isinstance(value, float | bool) and value != int(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise BadFile(f"{file}: {what} is {value!r:.40}, not a whole number") from None


def _values_are_whole(labels: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, int) for value in labels.values())


def _channels(width: int) -> tuple[str, ...]:
    return ("image",) if width == 1 else tuple(f"image_{number}" for number in range(1, width + 1))


def _unpaired(name: str, message: str) -> Finding:
    return Finding(name, "unpaired", "warning", message)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadFile(f"{folder}: is missing; dataset.json says this is nnU-Net's layout")
    return folder


def _files(folder: Path) -> list[Path]:
    """Files of a folder without hidden ones, sorted."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())


def _scans(folder: Path) -> list[Path]:
    return [file for file in _files(folder) if is_readable_name(file)]


def _deep_scans(folder: Path) -> list[Path]:
    return [*_scans(folder), *(file for inner in _folders(folder) for file in _deep_scans(inner))]


def _folders(folder: Path, beginning: str = "") -> list[Path]:
    if not folder.is_dir():
        return []
    found = (inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    return sorted(inner for inner in found if inner.name.startswith(beginning))


def _only(folder: Path, suffix: str, fits: Callable[[Path], bool]) -> Path | None:
    """The one file of a folder that fits. Raises `BadConfig` if several do."""
    found = [file for file in _files(folder) if file.suffix.lower() == suffix and fits(file)]
    if len(found) > 1:
        raise BadConfig(f"{folder}: holds several lists of cases ({found[0].name}, {found[1].name}); give one of them")
    return found[0] if found else None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts case_10 after case_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
