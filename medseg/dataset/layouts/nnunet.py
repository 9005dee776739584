"""Layouts with `imagesTr` and `labelsTr`: nnU-Net and the Medical Segmentation Decathlon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.layouts.finding import (
    CHANNEL,
    existing_folder,
    files_in,
    is_there,
    names_of_values,
    numbered_values,
    one_name_each,
    read_description,
    scans_in,
    table_of,
    unpaired_case,
    whole_number,
)
from medseg.errors import BadFile
from medseg.io import is_readable_name, strip_suffix
from medseg.labels import LabelTable
from medseg.text import read_json

# nnU-Net and Decathlon ----------------------------------------------------------------------------


def find_nnunet(path: Path) -> Dataset | None:
    """nnU-Net v2 raw data: `dataset.json` with `channel_names`, `imagesTr/CASE_0000.*`,
    `labelsTr/CASE.*`.
    """
    description = read_description(path)
    if description is None or "channel_names" not in description[1]:
        return None
    file, content = description
    folder = file.parent
    channels = numbered_values(file, content["channel_names"], "channel_names")
    table, regions, ignore = _nnunet_labels(file, content)
    ending = str(content.get("file_ending", ".nii.gz"))
    entries = content.get("dataset")
    if isinstance(entries, dict):
        cases = _nnunet_listed(file, entries)
        findings: list[Finding] = []
    else:
        cases, findings = _nnunet_cases(folder, ending, len(channels))
    test_images, _ = _nnunet_images(folder / "imagesTs", ending)
    return Dataset(
        folder=folder,
        layout="",
        name=str(content.get("name") or folder.name),
        cases=tuple(cases),
        channels=channels,
        table=table,
        regions=regions,
        ignore=ignore,
        splits=_final_splits(folder),
        unlabelled=tuple(
            Case(name=name, images=tuple(files.values()), label=None, split="test")
            for name, files in test_images.items()
        ),
        findings=tuple(findings),
        source=file,
    )


def _nnunet_listed(file: Path, listed: Mapping[str, Any]) -> list[Case]:
    """The cases of a `dataset.json` that gives each its files."""
    cases = []
    for name, entry in listed.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or "label" not in entry:
            raise BadFile(
                f"{file}: 'dataset' must give every case its 'images', a list, and its 'label'; see"
                f" {name}"
            )
        paths = tuple(file.parent / str(image) for image in images)
        cases.append(Case(name=name, images=paths, label=file.parent / str(entry["label"])))
    return cases


def _by_stem(folder: Path, ending: str) -> tuple[dict[str, Path], list[Path]]:
    """Name without ending -> file, and the files that are left aside.

    A file whose ending is another one than dataset.json says is used where it is readable and alone
    of its name, for then its name says what it is. Of two files of one name the one with the right
    ending is used.
    """
    files, aside = dict[str, Path](), list[Path]()
    for file in sorted(files_in(folder), key=lambda file: not file.name.endswith(ending)):
        if file.name.endswith(ending):
            files[file.name.removesuffix(ending)] = file
        elif is_readable_name(file):
            first = files.setdefault(strip_suffix(file), file)
            aside += [file] if first is not file else []
    return files, aside


def _nnunet_images(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Case name -> channel -> file, of files named CASE_0000 and so on, and the files that are left
    aside.
    """
    files, aside = _by_stem(folder, ending)
    images: dict[str, dict[int, Path]] = {}
    for stem, file in sorted(files.items()):
        if match := CHANNEL.match(stem):
            images.setdefault(match["case"], {})[int(match["channel"])] = file
    return images, aside


def _nnunet_cases(folder: Path, ending: str, channels: int) -> tuple[list[Case], list[Finding]]:
    """The cases of `imagesTr/` and `labelsTr/`, and what is said of those that lack a part."""
    image_folder = existing_folder(folder / "imagesTr")
    images, aside = _nnunet_images(image_folder, ending)
    labels, more = _by_stem(existing_folder(folder / "labelsTr"), ending)
    cases, findings = (
        [],
        [unpaired_case("", _of_two_formats(file, ending)) for file in (*aside, *more)],
    )
    for name in sorted(images.keys() | labels.keys()):
        files, label = images.get(name, {}), labels.get(name)
        extra = [file for channel, file in files.items() if channel >= channels]
        if label is None:
            first = next(iter(files.values()))
            findings.append(unpaired_case(name, f"{first}: has no labels in labelsTr/"))
        elif extra:
            message = f"{extra[0]}: is a channel that dataset.json does not name"
            findings.append(
                Finding(case=name, kind="channels", severity="error", message=message, fixable=True)
            )
        else:
            defaults = [image_folder / f"{name}_{number:04d}{ending}" for number in range(channels)]
            paths = tuple(files.get(number, file) for number, file in enumerate(defaults))
            cases.append(Case(name=name, images=paths, label=label))
    return cases, [*findings, *_about_endings(cases, ending)]


def _of_two_formats(file: Path, ending: str) -> str:
    return (
        f"{file}: is not used, for there is a file of the same name that ends in {ending}, as"
        " dataset.json says"
    )


def _about_endings(cases: Sequence[Case], ending: str) -> list[Finding]:
    """Cases with files that end otherwise than dataset.json says: they are used here, and nowhere
    else.
    """
    odd = [
        case.name
        for case in cases
        if any(
            file is not None and not file.name.endswith(ending)
            for file in (*case.images, case.label)
        )
    ]
    if not odd:
        return []
    examples = ", ".join(odd[:5]) + (" ..." if len(odd) > 5 else "")
    message = (
        f"{len(odd)} of {len(cases)} cases have files that do not end in {ending}, as dataset.json"
        f" says: {examples}; they are used here, and nnU-Net would leave them out"
    )
    return [Finding(case="", kind="ending", severity="warning", message=message)]


#: Table, regions and ignore value.
_Labels = tuple[LabelTable, tuple[tuple[int, ...], ...], int | None]


def _nnunet_labels(file: Path, content: Mapping[str, Any]) -> _Labels:
    """Table, regions and ignore value of nnU-Net's `labels`; see its documentation, dataset_format
    and region_based.
    """
    parts_of = _nnunet_parts(file, content.get("labels"))
    ignore_values = parts_of.pop("ignore", None)
    if ignore_values is not None and len(ignore_values) != 1:
        raise BadFile(f"{file}: the label 'ignore' must be one value")
    ignore = ignore_values[0] if ignore_values else None
    parts_of = {name: parts for name, parts in parts_of.items() if parts != (0,)}
    single = all(len(parts) == 1 for parts in parts_of.values())
    if single and "regions_class_order" not in content:
        return table_of(file, {parts[0]: name for name, parts in parts_of.items()}), (), ignore
    table = _table_of_regions(file, list(parts_of), content.get("regions_class_order"))
    return table, tuple(parts_of.values()), ignore


def _nnunet_parts(file: Path, labels: Any) -> dict[str, tuple[int, ...]]:
    """Name to the values that it is made of: one, or those of a region."""
    if not isinstance(labels, dict) or not labels:
        raise BadFile(
            f'{file}: has no labels; name them as in "labels": {{"background": 0, "liver": 1}}'
        )
    parts_of: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        parts = value if isinstance(value, list) else [value]
        what = f"the label '{name}'"
        parts_of[str(name)] = tuple(whole_number(file, what, part) for part in parts)
    single = [(parts[0], name) for name, parts in parts_of.items() if len(parts) == 1]
    one_name_each(file, single)
    return parts_of


def _table_of_regions(file: Path, names: Sequence[str], order: Any) -> LabelTable:
    """The table of regions with the values of `regions_class_order`, in the order of painting."""
    if not isinstance(order, list) or len(order) != len(names):
        raise BadFile(
            f"{file}: has regions, so regions_class_order must give {len(names)} values, one for"
            " each"
        )
    values = [whole_number(file, "regions_class_order", value) for value in order]
    table = table_of(file, dict(zip(values, names, strict=True)), keep_order=True)
    if len(table) != len(values):
        raise BadFile(f"{file}: regions_class_order gives the same value to two regions")
    return table


def _final_splits(folder: Path) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """nnU-Net's `splits_final.json`, beside the data or where nnU-Net keeps it."""
    places = [folder / "splits_final.json"]
    if folder.parent.name.lower() == "nnunet_raw":
        places.append(
            folder.parent.parent / "nnUNet_preprocessed" / folder.name / "splits_final.json"
        )
    for file in places:
        if file.is_file():
            content = read_json(file, last_wins=True)
            try:
                return tuple(
                    (tuple(map(str, split["train"])), tuple(map(str, split["val"])))
                    for split in content
                )
            except (TypeError, KeyError):
                raise BadFile(
                    f"{file}: is not a list of splits with 'train' and 'val'; correct or remove it"
                ) from None
    return ()


def find_decathlon(path: Path) -> Dataset | None:
    """Medical Segmentation Decathlon and nnU-Net v1: `dataset.json` with `modality`, `labels` and
    `training`.
    """
    description = read_description(path)
    if description is None or not {"modality", "labels"} <= description[1].keys():
        return None
    file, content = description
    folder = file.parent
    channels = numbered_values(file, content["modality"], "modality")
    table = _decathlon_table(file, content["labels"])
    cases = _decathlon_training(file, content.get("training"), len(channels))
    test_cases = _decathlon_tests(folder, content.get("test") or (), len(channels))
    return Dataset(
        folder=folder,
        layout="",
        name=str(content.get("name") or folder.name),
        cases=tuple(cases),
        channels=channels,
        table=table,
        splits=_final_splits(folder),
        unlabelled=tuple(test_cases),
        findings=tuple(_beside_the_list(file, cases, test_cases)),
        source=file,
    )


def _decathlon_table(file: Path, labels: Any) -> LabelTable:
    if not isinstance(labels, dict) or not labels:
        raise BadFile(
            f'{file}: has no labels; name them as in "labels": {{"0": "background", "1": "liver"}}'
        )
    return table_of(file, names_of_values(file, labels))


def _decathlon_training(file: Path, listed: Any, channels: int) -> list[Case]:
    """The cases under 'training', without what macOS leaves in archives (`._*`)."""
    if not isinstance(listed, list) or not listed:
        raise BadFile(f"{file}: lists no cases under 'training'")
    cases = []
    for entry in listed:
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise BadFile(f"{file}: an entry of 'training' has no image and label: {entry!r:.80}")
        image, label = (file.parent / str(entry[key]) for key in ("image", "label"))
        if not image.name.startswith("._"):
            images = _decathlon_images(image, channels)
            cases.append(Case(name=strip_suffix(label), images=images, label=label))
    return cases


def _decathlon_tests(folder: Path, listed: Sequence[Any], channels: int) -> list[Case]:
    """The cases under 'test' whose files are there: names, or as under 'training'."""
    names = [str(entry.get("image") if isinstance(entry, dict) else entry) for entry in listed]
    files = [folder / name for name in names]
    return [
        Case(
            name=strip_suffix(file),
            images=_decathlon_images(file, channels),
            label=None,
            split="test",
        )
        for file in files
        if not file.name.startswith("._") and is_there(file)
    ]


def _decathlon_images(listed: Path, channels: int) -> tuple[Path, ...]:
    """One file, or nnU-Net v1's file for each channel that `dataset.json` names without the
    channel's number.
    """
    suffix = listed.name[len(strip_suffix(listed)) :]
    channel_files = tuple(
        listed.with_name(f"{strip_suffix(listed)}_{channel:04d}{suffix}")
        for channel in range(channels)
    )
    return channel_files if not is_there(listed) and is_there(channel_files[0]) else (listed,)


def _beside_the_list(
    file: Path, cases: Sequence[Case], unlabelled: Sequence[Case]
) -> list[Finding]:
    """Warnings of files that lie beside those listed and are not listed themselves, in order of
    their case names.
    """
    paths = {
        path
        for case in (*cases, *unlabelled)
        for path in (*case.images, case.label)
        if path is not None
    }
    folders = {
        path.parent for case in cases for path in (*case.images, case.label) if path is not None
    }
    extra = {
        strip_suffix(path): path
        for folder in sorted(folders)
        for path in scans_in(folder)
        if path not in paths and folder != file.parent
    }
    return [
        unpaired_case(name, f"{path}: is not listed in {file.name}, so it is not used")
        for name, path in extra.items()
    ]
