"""A data set as it lies: which layout it has, its cases, its label table and its splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.description import about_description
from medseg.dataset.layouts.bids import find_bids
from medseg.dataset.layouts.finding import files_in, is_there
from medseg.dataset.layouts.folders import find_folders, find_side_by_side, find_totalsegmentator
from medseg.dataset.layouts.lists import find_datalist, find_manifest
from medseg.dataset.layouts.nnunet import find_decathlon, find_nnunet
from medseg.dataset.names import (
    names_lacking,
    numbered_as,
    numbers_agree,
    tables_in,
    united_by_name,
)
from medseg.errors import BadFile, MedsegError
from medseg.io import read_labels, strip_suffix
from medseg.labels import LabelTable
from medseg.logs import Progress, silent


def read_dataset(path: str | Path, progress: Progress = silent) -> Dataset:
    """The dataset in a folder, or described by a JSON, CSV, TSV or JSONL file; its layout is
    detected.

    Where nothing names the labels, every label map is read to find the values; `progress` then
    shows how far that is. Raises `BadFile` or `BadConfig` with one sentence that says what was
    looked for.
    """
    return detect(Path(path), progress)


_TABLE_NAMES = ("labels.csv", "labels.ctbl", "labels.tsv", "dseg.tsv")


def detect(path: Path, progress: Progress = silent) -> Dataset:
    """The dataset at a path. Raises `BadFile` saying what was looked for if no layout fits."""
    if not path.exists():
        raise BadFile(f"{path}: does not exist")
    for layout, find in LAYOUTS.items():
        dataset = find(path)
        if dataset is not None:
            return complete(replace(dataset, layout=layout), progress)
    if path.is_file():
        raise BadFile(
            f"{path}: is not a dataset; give a folder, a dataset.json, a MONAI datalist, or a CSV,"
            " TSV or JSONL list with the columns case, image and label"
        )
    raise BadFile(
        f"{path}: no dataset was found; looked for dataset.json, a list (CSV, TSV, JSONL, MONAI"
        " JSON) with images and labels, BIDS derivatives with *_dseg files, folders with"
        " segmentations/, images/ beside labels/, and x.nii.gz beside x_seg.nii.gz"
    )


def complete(dataset: Dataset, progress: Progress = silent) -> Dataset:
    """A data set of which cases and files are known, with what is the same for all layouts: files
    that are missing, names used twice, the table, the splits. Raises `BadFile`.
    """
    cases, incomplete = _with_all_files(dataset.cases)
    findings = [*dataset.findings, *about_description(dataset), *incomplete]
    names = [case.name for case in dataset.cases]
    _check_names(dataset.folder, names)
    if not cases:
        why = f"; the first problem was {findings[0].message}" if findings else ""
        raise BadFile(
            f"{dataset.folder}: holds no case with an image and labels ({dataset.layout}"
            f" layout){why}"
        )
    table, tables = dataset.table, tables_in(cases)
    if not len(table) and not dataset.regions:
        table = _table_beside(dataset, cases, findings) or _table_from_files(
            dataset, cases, named=tables, progress=progress
        )
    if not dataset.regions:
        cases = [_all_or_some(numbered_as(case, tables, table), table) for case in cases]
        findings += names_lacking(cases, tables, table)
    cases = [_of_subject(case) for case in cases]
    dataset = replace(dataset, cases=tuple(cases), table=table, findings=tuple(findings))
    return replace(dataset, splits=_usable(dataset.splits, names, cases) or _column_splits(cases))


def _of_subject(case: Case) -> Case:
    """A case whose name begins as BIDS names subjects (sub-01_ses-2) is of that group, if no other
    one is said.
    """
    subject = re.match(r"sub-[0-9A-Za-z]+", case.name) if case.group is None else None
    return replace(case, group=subject[0]) if subject else case


def _all_or_some(case: Case, table: LabelTable) -> Case:
    """A case whose list of annotated values is that of all values counts as annotated wholly."""
    whole = case.labelled is not None and set(table.values) <= set(case.labelled)
    return replace(case, labelled=None) if whole else case


def _with_all_files(cases: Sequence[Case]) -> tuple[list[Case], list[Finding]]:
    """The cases whose files are all there, in the order people count them, and of each of the
    others the first file that is missing.
    """
    complete, findings = [], []
    for case in sorted(cases, key=lambda case: _natural(case.name)):
        missing = next((file for file in _files_of(case) if not is_there(file)), None)
        if missing is None:
            complete.append(case)
            continue
        message = f"{missing}: is missing"
        findings.append(
            Finding(case=case.name, kind="missing", severity="error", message=message, fixable=True)
        )
    return complete, findings


def _files_of(case: Case) -> list[Path]:
    labels = [case.label] if case.label else []
    return [*case.images, *labels, *(mask for _, mask in case.masks)]


def _check_names(folder: Path, names: Sequence[str]) -> None:
    """Raise `BadFile` for a name that two cases have."""
    if len(set(names)) == len(names):
        return
    twice = next(name for name in names if names.count(name) > 1)
    raise BadFile(
        f"{folder}: the case name '{twice}' is used twice; give every case a name of its own"
    )


#: Names for training and names for validation, and of every fold such a pair.
_Split = tuple[tuple[str, ...], tuple[str, ...]]
_Splits = tuple[_Split, ...]


def _usable(splits: _Splits, names: Iterable[str], cases: Sequence[Case]) -> _Splits:
    """Given splits without the cases that were left out. Raises `BadFile` for names that the
    dataset does not have.
    """
    all_names, there = set(names), {case.name for case in cases}
    for name in chain.from_iterable(chain.from_iterable(splits)):
        if name not in all_names:
            raise BadFile(
                f"the splits name a case '{name}' that the dataset does not have; correct the"
                " splits"
            )
    return tuple(
        (_only(training, there), _only(validation, there)) for training, validation in splits
    )


def _only(names: Iterable[str], wanted: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in wanted)


def _column_splits(cases: Sequence[Case]) -> _Splits:
    """The splits that the cases' own 'val', all others being trained from, or else their folds
    make; () if they say nothing.
    """
    usable = [case for case in cases if case.split != "test"]
    validation = {case.name for case in usable if case.split == "val"}
    held_out = [validation] if 0 < len(validation) < len(usable) else _names_by_fold(usable)
    every = [case.name for case in usable]
    return tuple((_only(every, set(every) - names), _only(every, names)) for names in held_out)


def _names_by_fold(cases: Sequence[Case]) -> list[set[str]]:
    """The names of the cases of each fold; none where there are fewer than two folds."""
    by_fold: dict[int, set[str]] = {}
    for case in cases:
        if case.fold is not None:
            by_fold.setdefault(case.fold, set()).add(case.name)
    return [by_fold[fold] for fold in sorted(by_fold)] if len(by_fold) > 1 else []


#: Layout to the function that finds it, in the order in which they are tried: what describes itself
#: comes first.
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


def _table_beside(
    dataset: Dataset, cases: Sequence[Case], findings: list[Finding]
) -> LabelTable | None:
    """The table that lies beside the data or its labels, or None. A file of that name that is no
    table is a finding.
    """
    places = [dataset.folder, *(case.label.parent for case in cases[:1] if case.label is not None)]
    for place in dict.fromkeys(places):
        tables = [file for file in files_in(place) if file.name.lower().endswith(".ctbl")]
        for file in (
            *(place / name for name in _TABLE_NAMES),
            *(tables if len(tables) == 1 else ()),
        ):
            if file.is_file() and file != dataset.source:
                try:
                    return LabelTable.read(file)
                except BadFile as error:
                    message = f"{error}; names are not taken from it"
                    findings.append(
                        Finding(case="", kind="table", severity="warning", message=message)
                    )
    return None


def _table_from_files(
    dataset: Dataset,
    cases: Sequence[Case],
    *,
    named: Mapping[Path, LabelTable],
    progress: Progress,
) -> LabelTable:
    """Names that the label maps carry in themselves, or else 'label 1' for every value found in
    them.
    """
    files = [case.label for case in cases if case.label is not None]
    if files and all(file in named for file in files):
        return united_by_name(dataset.folder, named)
    if not numbers_agree(named):
        nameless = next(file for file in files if file not in named)
        raise BadFile(
            f"{dataset.folder}: its segmentations number their structures differently, and "
            f"{nameless.name} names none; "
            "give all label maps as segmentations with names"
        )
    values: set[int] = set()
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: _values_in(file, named.get(file)), files)
        for number, (file, file_values) in enumerate(zip(files, found, strict=True), 1):
            values |= file_values
            progress(strip_suffix(file), number, len(files))
    if not values - {0}:
        raise BadFile(f"{dataset.folder}: no label map holds anything but background")
    return LabelTable.from_values(values)


def _values_in(file: Path, own: LabelTable | None) -> set[int]:
    """The values of a label map, those of its own table where it has one; none for one that cannot
    be read, of which `medseg check` tells.
    """
    if own is not None:
        return set(own.values)
    try:
        return {int(value) for value in np.unique(read_labels(file).data)}
    except MedsegError:
        return set()


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts case_10 after case_9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
