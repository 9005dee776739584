"""What a data set's own description says twice, or otherwise than its files: doubled keys, and how
many cases.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Dataset, Finding
from medseg.dataset.layouts.finding import column_name
from medseg.errors import BadFile
from medseg.files import read_text
from medseg.text import read_json


def about_description(dataset: Dataset) -> list[Finding]:
    """What is odd with the file that lists or describes the cases, and with the splits beside
    it.
    """
    findings: list[Finding] = []
    for file in (dataset.source, dataset.folder / "splits_final.json"):
        if file is not None and file.is_file():
            findings += _about_keys(file)
    return findings + _about_count(dataset)


def _about_keys(file: Path) -> Iterator[Finding]:
    """A key that is there twice: readers take the last one and say nothing, and which is meant is
    not certain.
    """
    for key, values in _doubled(file):
        texts = ", ".join(f"{json.dumps(value):.30}" for value in values[:3])
        same = all(value == values[0] for value in values)
        severity = "warning" if same else "error"
        message = (
            f"{file}: has the key '{key:.60}' {len(values)} times ({texts}); keep the one that is"
            " meant"
        )
        yield Finding(case="", kind="doubled key", severity=severity, message=message)


def _doubled(file: Path) -> list[tuple[str, list[Any]]]:
    """(key, its values) of every key that one JSON object, or the first line of a list, has more
    than once.
    """
    duplicates: list[tuple[str, list[Any]]] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, list[Any]] = {}
        for key, value in pairs:
            values.setdefault(key, []).append(value)
        duplicates.extend((key, many) for key, many in values.items() if len(many) > 1)
        return dict(pairs)

    text, suffix = read_text(file), file.suffix.lower()
    if suffix in (".json", ".jsonl"):
        for piece in text.splitlines() if suffix == ".jsonl" else [text]:
            if piece.strip():
                _parse(file, piece, note)
    elif suffix in (".csv", ".tsv"):
        first = text.partition("\n")[0]
        delimiter = "\t" if suffix == ".tsv" else ";" if ";" in first else ","
        names = next(csv.reader([first], delimiter=delimiter), [])
        note([(column_name(name.strip()), name.strip()) for name in names if name.strip()])
    return duplicates


def _parse(file: Path, text: str, note: Any) -> None:
    try:
        json.loads(text, object_pairs_hook=note)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{file}: is not valid JSON: {error}") from None


def _about_count(dataset: Dataset) -> list[Finding]:
    """`numTraining` of dataset.json beside the cases that are there."""
    file = dataset.source
    if file is None or file.name != "dataset.json":
        return []
    content = read_json(file, last_wins=True)
    count = content.get("numTraining") if isinstance(content, dict) else None
    if not isinstance(count, int) or count == len(dataset.cases):
        return []
    message = (
        f"{file}: says numTraining {count}, and {len(dataset.cases)} cases with an image and labels"
        " are here"
    )
    return [Finding(case="", kind="count", severity="warning", message=message)]
