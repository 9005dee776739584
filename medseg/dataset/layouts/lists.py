"""Cases named by a list: MONAI's datalist in JSON, or a manifest in CSV or TSV."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.layouts.finding import (
    NO_TABLE,
    SPLIT_WORDS,
    channel_names,
    names_of_values,
    numbered_values,
    only_file,
    read_rows,
    table_of,
    whole_number,
)
from medseg.errors import BadFile
from medseg.io import strip_suffix
from medseg.labels import LabelTable
from medseg.text import read_json

# Lists --------------------------------------------------------------------------------------------


def find_datalist(path: Path) -> Dataset | None:
    """A MONAI datalist: JSON with `training`, and `validation` and `testing` or `test` if there
    are, each a list.
    """
    file = path if path.is_file() else only_file(path, ".json", _is_datalist)
    if file is None or file.suffix.lower() != ".json" or not _is_datalist(file):
        return None
    content = read_json(file, last_wins=True)
    cases = _datalist_cases(file, content)
    labelled, unlabelled = _by_label(cases)
    if without := [case for case in unlabelled if case.split != "test"]:
        raise BadFile(f"{file}: {without[0].name} is listed for training but has no label")
    channels = channel_names(len(labelled[0].images) if labelled else 1)
    if "modality" in content:
        channels = numbered_values(file, content["modality"], "modality")
    return Dataset(
        folder=file.parent,
        layout="",
        name=str(content.get("name") or file.stem),
        cases=labelled,
        channels=channels,
        table=_datalist_table(file, content.get("labels")),
        unlabelled=unlabelled,
        source=file,
    )


def _datalist_cases(file: Path, content: Mapping[str, Any]) -> list[Case]:
    """The cases of all lists of a datalist; those of `training` are split from the others only
    where some are listed for validation.
    """
    split_of = {
        "training": "train" if content.get("validation") else None,
        "validation": "val",
        "testing": "test",
        "test": "test",
    }
    cases = []
    for key, split in split_of.items():
        for entry in content.get(key) or ():
            entry = entry if isinstance(entry, dict) else {"image": entry}
            cases.append(_listed_case(file, entry, split))
    return cases


def _by_label(cases: Sequence[Case]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases with a label, and those without."""
    labelled = tuple(case for case in cases if case.label is not None)
    return labelled, tuple(case for case in cases if case.label is None)


def _datalist_table(file: Path, labels: Any) -> LabelTable:
    """The table of `labels`, which map values to names or, in some lists, names to values."""
    if not isinstance(labels, dict):
        return NO_TABLE
    return table_of(file, names_of_values(file, labels))


def _is_datalist(file: Path) -> bool:
    try:
        content = read_json(file, last_wins=True)
    except BadFile:
        return False
    training = content.get("training") if isinstance(content, dict) else None
    return (
        isinstance(training, list)
        and bool(training)
        and isinstance(training[0], dict)
        and "image" in training[0]
    )


def find_manifest(path: Path) -> Dataset | None:
    """A CSV, TSV or JSONL list: `case,image[,image_2 ...],label,split,fold,group,labelled`, paths
    from its folder.
    """
    file = path if path.is_file() else _only_manifest(path)
    if file is None or file.suffix.lower() not in _MANIFEST_SUFFIXES or not _is_manifest(file):
        return None
    rows = read_rows(file)
    image_columns = _image_columns(rows[0])
    cases = _cases_of_rows(file, rows)
    findings = _about_empty_columns(file, rows, cases)
    lacking = {finding.case for finding in findings}
    labelled, unlabelled = _by_label([case for case in cases if case.name not in lacking])
    if without := [case for case in unlabelled if case.split != "test"]:
        raise BadFile(
            f"{file}: case {without[0].name} has no label; only cases of the split 'test' may"
            " lack one"
        )
    return Dataset(
        folder=file.parent,
        layout="",
        name=file.resolve().parent.name if file.stem == _PLAIN_NAME else file.stem,
        cases=labelled,
        channels=_manifest_channels(image_columns, len(cases[0].images)),
        table=NO_TABLE,
        unlabelled=unlabelled,
        findings=tuple(findings),
        source=file,
    )


def names_of_rows(file: Path) -> list[str]:
    """What the case of each row of a manifest is called. Raises `BadFile`."""
    return [case.name for case in _cases_of_rows(file, read_rows(file))]


def _cases_of_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    columns = _image_columns(rows[0])
    return [_listed_case(file, _manifest_entry(row, columns), None) for row in rows]


def _about_empty_columns(
    file: Path, rows: Sequence[Mapping[str, Any]], cases: Sequence[Case]
) -> list[Finding]:
    """Cases that lack a channel which others have. Where none has all, one 4-D file holds them."""
    columns = _image_columns(rows[0])
    if all(len(case.images) < len(columns) for case in cases):
        return []
    return [
        Finding(
            case=case.name,
            kind="missing",
            severity="error",
            message=f"{file}: case {case.name} has no file in the column {column}",
            fixable=True,
        )
        for row, case in zip(rows, cases, strict=True)
        for column in [one for one in columns if not str(row.get(one) or "").strip()][:1]
    ]


def _manifest_channels(image_columns: Sequence[str], width: int) -> tuple[str, ...]:
    """Channels by their columns; of one column that holds lists of `width` files, by number."""
    if len(image_columns) == 1 and width > 1:
        return channel_names(width)
    return tuple(column.removeprefix("image").lstrip("_") or "image" for column in image_columns)


#: A list of this name says no more than that it is one; its folder's name is that of the data set.
_PLAIN_NAME = "cases"
_MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl")


def _only_manifest(folder: Path) -> Path | None:
    """The one list of a folder, of the first format of which there is one."""
    for suffix in _MANIFEST_SUFFIXES:
        if file := only_file(folder, suffix, _is_manifest):
            return file
    return None


def _image_columns(row: Mapping[str, Any]) -> list[str]:
    return [column for column in row if re.fullmatch(r"image(_.+|\d+)?", column)]


def _is_manifest(file: Path) -> bool:
    try:
        rows = read_rows(file)
    except BadFile:
        return False
    return bool(rows) and "label" in rows[0] and bool(_image_columns(rows[0]))


def _manifest_entry(row: Mapping[str, Any], image_columns: Sequence[str]) -> dict[str, Any]:
    plain = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    images = [plain[column] for column in image_columns if plain.get(column)]
    return {**plain, "image": images[0] if len(images) == 1 else images}


def _listed_case(file: Path, entry: Mapping[str, Any], split: str | None) -> Case:
    """A case of a datalist or a manifest; paths count from the list's folder."""
    images = _listed_images(file, entry)
    label = entry.get("label") or None
    if label is not None and not isinstance(label, str):
        raise BadFile(
            f"{file}: the label of {images[0]} is {label!r:.40}, not a file; medseg learns label"
            " maps"
        )
    name = str(entry.get("case") or "") or strip_suffix(label or images[0])
    group = entry.get("group")
    return Case(
        name=name,
        images=tuple(file.parent / image for image in images),
        label=file.parent / label if label else None,
        split=_listed_split(file, name, str(entry.get("split") or "").lower() or split),
        fold=_listed_fold(file, name, entry.get("fold")),
        group=None if group in (None, "") else str(group),
        labelled=_listed_values(file, name, entry.get("labelled")),
    )


def _listed_images(file: Path, entry: Mapping[str, Any]) -> list[str]:
    image = entry.get("image")
    images = [str(one) for one in (image if isinstance(image, list) else [image]) if one]
    if not images:
        raise BadFile(f"{file}: a case has no image: {dict(entry)!r:.80}")
    return images


def _listed_split(file: Path, case: str, split: str | None) -> str | None:
    if split is None:
        return None
    if split not in SPLIT_WORDS:
        raise BadFile(f"{file}: the split of {case} is '{split}', not train, val or test")
    return SPLIT_WORDS[split]


def _listed_fold(file: Path, case: str, fold: Any) -> int | None:
    return None if fold in (None, "") else whole_number(file, f"the fold of {case}", fold)


def _listed_values(file: Path, case: str, labelled: Any) -> tuple[int, ...] | None:
    """The values that are annotated: one, a list, or text with blanks or commas between; None for
    all.
    """
    if isinstance(labelled, int):
        labelled = [labelled]
    if isinstance(labelled, str):
        text = labelled.strip()
        labelled = re.split(r"[\s,;]+", text) if text else None
    if not labelled:
        return None
    return tuple(whole_number(file, f"'labelled' of {case}", value) for value in labelled)
