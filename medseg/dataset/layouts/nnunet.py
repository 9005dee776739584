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
from medseg.documents import read_json
from medseg.errors import BadFile
from medseg.io import is_readable_name, strip_suffix
from medseg.labels import LabelTable

# nnU-Net and Decathlon -----------------------------------------------------------------------------------------------


def find_nnunet(path: Path) -> Dataset | None:
    """nnU-Net v2 raw data: `dataset.json` with `channel_names`, `imagesTr/CASE_0000.*`, `labelsTr/CASE.*`."""
    described = read_description(path)
    if described is None or "channel_names" not in described[1]:
        return None
    file, content = described
    folder = file.parent
    names = numbered_values(file, content["channel_names"], "channel_names")
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
    unlabelled, _ = _nnunet_images(folder / "imagesTs", ending)
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
        tuple(Case(name, tuple(images.values()), None, split="test") for name, images in unlabelled.items()),
        tuple(findings),
        file,
    )


def _by_stem(folder: Path, ending: str) -> tuple[dict[str, Path], list[Path]]:
    """Name without ending -> file, and the files that are left aside.

    A file whose ending is another one than dataset.json says is used where it is readable and alone of its name, for
    then its name says what it is. Of two files of one name the one with the right ending is used.
    """
    files, aside = dict[str, Path](), list[Path]()
    for file in sorted(files_in(folder), key=lambda file: not file.name.endswith(ending)):
        if file.name.endswith(ending):
            files[file.name.removesuffix(ending)] = file
        elif is_readable_name(file):
            known = files.setdefault(strip_suffix(file), file)
            aside += [file] if known is not file else []
    return files, aside


def _nnunet_images(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Case name -> channel -> file, of files named CASE_0000 and so on, and the files that are left aside."""
    files, aside = _by_stem(folder, ending)
    images: dict[str, dict[int, Path]] = {}
    for stem, file in sorted(files.items()):
        if match := CHANNEL.match(stem):
            images.setdefault(match["case"], {})[int(match["channel"])] = file
    return images, aside


def _nnunet_cases(folder: Path, ending: str, channels: int, which: str) -> tuple[list[Case], list[Finding]]:
    images, aside = _nnunet_images(existing_folder(folder / f"images{which}"), ending)
    labels, more = _by_stem(existing_folder(folder / f"labels{which}"), ending)
    cases, findings = [], [unpaired_case("", _of_two_formats(file, ending)) for file in (*aside, *more)]
    for name in sorted(images.keys() | labels.keys()):
        files, label = images.get(name, {}), labels.get(name)
        if label is None:
            first = next(iter(files.values()))
            findings.append(unpaired_case(name, f"{first}: has no labels in labels{which}/"))
        elif extra := [file for channel, file in files.items() if channel >= channels]:
            message = f"{extra[0]}: is a channel that dataset.json does not name"
            findings.append(Finding(name, "channels", "error", message, True))
        else:
            wanted = [folder / f"images{which}" / f"{name}_{number:04d}{ending}" for number in range(channels)]
            cases.append(Case(name, tuple(files.get(number, file) for number, file in enumerate(wanted)), label))
    return cases, [*findings, *_about_endings(cases, ending)]


def _of_two_formats(file: Path, ending: str) -> str:
    return f"{file}: is not used, for there is a file of the same name that ends in {ending}, as dataset.json says"


def _about_endings(cases: Sequence[Case], ending: str) -> list[Finding]:
    """Cases with files that end otherwise than dataset.json says: they are used here, and nowhere else."""
    odd = {
        case.name: file
        for case in cases
        for file in (*case.images, case.label)
        if file is not None and not file.name.endswith(ending)
    }
    if not odd:
        return []
    shown = ", ".join(list(odd)[:5]) + (" ..." if len(odd) > 5 else "")
    message = (
        f"{len(odd)} of {len(cases)} cases have files that do not end in {ending}, as dataset.json says: {shown}; they "
        "are used here, and nnU-Net would leave them out"
    )
    return [Finding("", "ending", "warning", message)]


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
        named[str(name)] = tuple(whole_number(file, f"the label '{name}'", part) for part in parts)
    one_name_each(file, [(parts[0], name) for name, parts in named.items() if len(parts) == 1])
    ignored = named.pop("ignore", None)
    if ignored is not None and len(ignored) != 1:
        raise BadFile(f"{file}: the label 'ignore' must be one value")
    ignore = ignored[0] if ignored else None
    named = {name: parts for name, parts in named.items() if parts != (0,)}
    if all(len(parts) == 1 for parts in named.values()) and "regions_class_order" not in content:
        return table_of(file, {parts[0]: name for name, parts in named.items()}), (), ignore
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(named):
        raise BadFile(f"{file}: has regions, so regions_class_order must give {len(named)} values, one for each")
    values = [whole_number(file, "regions_class_order", value) for value in order]
    table = table_of(file, dict(zip(values, named, strict=True)), keep_order=True)
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
            content = read_json(file, last_wins=True)
            try:
                return tuple((tuple(map(str, split["train"])), tuple(map(str, split["val"]))) for split in content)
            except (TypeError, KeyError):
                raise BadFile(f"{file}: is not a list of splits with 'train' and 'val'; correct or remove it") from None
    return ()


def find_decathlon(path: Path) -> Dataset | None:
    """Medical Segmentation Decathlon and nnU-Net v1: `dataset.json` with `modality`, `labels` and `training`."""
    described = read_description(path)
    if described is None or not {"modality", "labels"} <= described[1].keys():
        return None
    file, content = described
    folder = file.parent
    channels = numbered_values(file, content["modality"], "modality")
    labels = content["labels"]
    if not isinstance(labels, dict) or not labels:
        raise BadFile(f'{file}: has no labels; name them as in "labels": {{"0": "background", "1": "liver"}}')
    table = table_of(file, names_of_values(file, labels))
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
        if not Path(str(name)).name.startswith("._") and is_there(folder / str(name))
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
    return numbered if not is_there(listed) and is_there(numbered[0]) else (listed,)


def _beside_the_list(file: Path, cases: Sequence[Case], unlabelled: Sequence[Case]) -> list[Finding]:
    """Warnings of files that lie beside those listed and are not listed themselves, in order of their case names."""
    listed = {path for case in (*cases, *unlabelled) for path in (*case.images, case.label) if path is not None}
    folders = {path.parent for case in cases for path in (*case.images, case.label) if path is not None}
    extra = {
        strip_suffix(path): path
        for folder in sorted(folders)
        for path in scans_in(folder)
        if path not in listed and folder != file.parent
    }
    return [
        unpaired_case(name, f"{path}: is not listed in {file.name}, so it is not used") for name, path in extra.items()
    ]
