"""Cases named by a list: MONAI's datalist in JSON, or a manifest in CSV or TSV."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Case, Dataset
from medseg.dataset.layouts.finding import (
    NO_TABLE,
    SPLITS,
    channel_names,
    names_of_values,
    numbered_values,
    only_file,
    read_rows,
    table_of,
    whole_number,
)
from medseg.documents import read_json
from medseg.errors import BadFile
from medseg.io import strip_suffix

# Lists ---------------------------------------------------------------------------------------------------------------


def find_datalist(path: Path) -> Dataset | None:
    """A MONAI datalist: JSON with `training`, and `validation` and `testing` or `test` if there are, each a list."""
    file = path if path.is_file() else only_file(path, ".json", _is_datalist)
    if file is None or file.suffix.lower() != ".json" or not _is_datalist(file):
        return None
    content = read_json(file, last_wins=True)
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
    channels = numbered_values(file, content["modality"], "modality") if "modality" in content else channel_names(width)
    labels = content.get("labels")
    table = NO_TABLE
    if isinstance(labels, dict):
        table = table_of(file, names_of_values(file, labels))
    name = str(content.get("name") or file.stem)
    return Dataset(file.parent, "", name, tuple(cases), channels, table, unlabelled=tuple(unlabelled), source=file)


def _is_datalist(file: Path) -> bool:
    try:
        content = read_json(file, last_wins=True)
    except BadFile:
        return False
    training = content.get("training") if isinstance(content, dict) else None
    return isinstance(training, list) and bool(training) and isinstance(training[0], dict) and "image" in training[0]


def find_manifest(path: Path) -> Dataset | None:
    """A CSV, TSV or JSONL list: `case,image[,image_2 ...],label,split,fold,group,labelled`, paths from its folder."""
    suffixes = (".csv", ".tsv", ".jsonl")
    file = path if path.is_file() else next((f for s in suffixes if (f := only_file(path, s, _is_manifest))), None)
    if file is None or file.suffix.lower() not in suffixes or not _is_manifest(file):
        return None
    rows = read_rows(file)
    image_columns = [column for column in rows[0] if re.fullmatch(r"image(_.+|\d+)?", column)]
    cases = [_listed_case(file, _manifest_entry(row, image_columns), None) for row in rows]
    unlabelled = [case for case in cases if case.label is None]
    if without := [case for case in unlabelled if case.split != "test"]:
        raise BadFile(f"{file}: case {without[0].name} has no label; only cases of the split 'test' may lack one")
    channels = tuple(column.removeprefix("image").lstrip("_") or "image" for column in image_columns)
    if len(channels) == 1:
        width = len(cases[0].images)
        channels = channels if width == 1 else channel_names(width)
    labelled = tuple(case for case in cases if case.label is not None)
    return Dataset(file.parent, "", file.stem, labelled, channels, NO_TABLE, unlabelled=tuple(unlabelled), source=file)


def _is_manifest(file: Path) -> bool:
    try:
        rows = read_rows(file)
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
    if said is not None and said not in SPLITS:
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
        split=SPLITS[said] if said else None,
        fold=None if fold in (None, "") else whole_number(file, f"the fold of {name}", fold),
        group=str(entry["group"]) if entry.get("group") not in (None, "") else None,
        labelled=tuple(whole_number(file, f"'labelled' of {name}", value) for value in labelled) if labelled else None,
    )
