"""What the layouts share: looking for files, tables and names, and saying what is missing."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg import text as text_module
from medseg.dataset.cases import Finding
from medseg.errors import BadConfig, BadFile
from medseg.files import read_text
from medseg.io import is_readable_name
from medseg.labels import Label, LabelTable
from medseg.text import parse_json, read_json

#: What a label file's name may end in where its image's does not.
LABEL_ENDING = re.compile(
    r"[-_. ]?"
    r"(dseg|seg|segmentation|segmentations|labels?|labelmap|masks?|gt|ground_?truth|annotations?)$",
    re.IGNORECASE,
)
CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
SPLIT_WORDS = {
    "train": "train", "training": "train", "tr": "train", "val": "val", "valid": "val",
    "validation": "val",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
NO_TABLE = LabelTable(())
_COLUMN_NAMES = {
    "name": "case", "id": "case", "case_id": "case", "mask": "label", "seg": "label",
    "segmentation": "label",
    "labels": "label", "subject": "group", "patient": "group", "patient_id": "group",
    "subject_id": "group",
}  # fmt: skip


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a list, column names in small letters and their synonyms replaced. Raises
    `BadFile`.
    """
    text = read_text(file)
    try:
        rows = _rows_as_written(text, file.suffix.lower())
    except (ValueError, csv.Error) as error:
        raise BadFile(f"{file}: cannot be read as a list of cases: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row or None in row.values():
            raise BadFile(f"{file}: entry {number} does not have as many columns as the first line")
    return [{column_name(str(key).strip()): value for key, value in row.items()} for row in rows]


def _rows_as_written(text: str, suffix: str) -> list[Any]:
    """The lines of JSONL, or the rows of a table whose first line names the columns."""
    if suffix == ".jsonl":
        return [parse_json(line, last_wins=True) for line in text.splitlines() if line.strip()]
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    if suffix == ".tsv":
        delimiter = "\t"
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def column_name(name: str) -> str:
    """A column's name in small letters and by its usual synonym; of images, what follows is a
    channel's name.
    """
    if name.lower().startswith("image"):
        return "image" + name[len("image") :] if name.lower() != "image_id" else "case"
    return _COLUMN_NAMES.get(name.lower(), name.lower())


# What labels mean ---------------------------------------------------------------------------------


def table_of(path: Path, names: Mapping[int, str], *, keep_order: bool = False) -> LabelTable:
    """A table of named values, coloured; the background is left out. Raises `BadFile`."""
    structures = {value: name for value, name in names.items() if value != 0}
    colors = LabelTable.from_values(structures)
    values = structures if keep_order else sorted(structures)
    try:
        return LabelTable(
            tuple(Label(value, structures[value], colors[value].color) for value in values)
        )
    except BadConfig as error:
        raise BadFile(f"{path}: {error}") from None


def united_table(path: Path, tables: Sequence[LabelTable]) -> LabelTable:
    """One table of several. Raises `BadFile` if they call one value by different names."""
    labels: dict[int, Label] = {}
    for label in (label for table in tables for label in table.labels):
        before = labels.setdefault(label.value, label)
        if before.name != label.name:
            raise BadFile(
                f"{path}: label {label.value} is '{before.name}' in one case and '{label.name}' in"
                " another"
            )
    return LabelTable(tuple(labels[value] for value in sorted(labels)))


# Files --------------------------------------------------------------------------------------------


def read_description(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """`dataset.json` in a folder, or a JSON file itself, with its content."""
    file = path / "dataset.json" if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    content = read_json(file, last_wins=True)
    return (file, content) if isinstance(content, dict) else None


def numbered_values(file: Path, content: Any, key: str) -> tuple[str, ...]:
    """Names by number: {'0': 'T1', '1': 'FLAIR'} or a list."""
    if isinstance(content, list):
        return tuple(str(name) for name in content)
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, dict) or {str(number) for number in range(len(content))} != set(
        map(str, content)
    ):
        raise BadFile(f'{file}: "{key}" must name the channels by number, as in {{"0": "CT"}}')
    return tuple(str(name) for _, name in sorted(content.items(), key=lambda item: int(item[0])))


def whole_number(file: Path, what: str, value: Any) -> int:
    """A whole number that a file gives for `what`. Raises `BadFile`."""
    try:
        if isinstance(value, str):
            return text_module.whole_number(value)
        if isinstance(value, bool) or value != int(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise BadFile(f"{file}: {what} is {value!r:.40}, not a whole number") from None


def names_of_values(file: Path, labels: Mapping[str, Any]) -> dict[int, str]:
    """Value to name, of {"1": "liver"} or, as some write it, {"liver": 1}. Raises `BadFile`."""
    turned = all(
        isinstance(value, int) and not isinstance(value, bool) for value in labels.values()
    )
    pairs = [(value, name) for name, value in labels.items()] if turned else list(labels.items())
    return one_name_each(
        file, [(whole_number(file, "a label value", value), str(name)) for value, name in pairs]
    )


def one_name_each(file: Path, pairs: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Value to name. Raises `BadFile` for a value with two names: one structure would be lost in
    silence.
    """
    names: dict[int, str] = {}
    for value, name in pairs:
        if names.setdefault(value, name) != name:
            raise BadFile(
                f"{file}: the label value {value} has two names, '{names[value]}' and '{name}'; "
                "give each structure a value of its own"
            )
    return names


def is_there(file: Path) -> bool:
    """Whether a file exists; one whose name is too long to ask for does not."""
    try:
        return file.exists()
    except OSError:
        return False


def channel_names(width: int) -> tuple[str, ...]:
    """What channels are called where nothing names them."""
    return ("image",) if width == 1 else tuple(f"image_{number}" for number in range(1, width + 1))


def unpaired_case(name: str, message: str) -> Finding:
    """What is said of a case of which a part is missing."""
    return Finding(case=name, kind="unpaired", severity="warning", message=message)


def existing_folder(folder: Path) -> Path:
    """The folder. Raises `BadFile` where it is not there."""
    if not folder.is_dir():
        raise BadFile(f"{folder}: is missing; dataset.json says this is nnU-Net's layout")
    return folder


def files_in(folder: Path) -> list[Path]:
    """Files of a folder without hidden ones, sorted."""
    if not folder.is_dir():
        return []
    return sorted(
        file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file()
    )


def scans_in(folder: Path) -> list[Path]:
    """Files of a folder that a reader takes, sorted."""
    return [file for file in files_in(folder) if is_readable_name(file)]


def scans_below(folder: Path) -> list[Path]:
    """Files that a reader takes of a folder and of all folders in it."""
    return [
        *scans_in(folder),
        *(file for inner in folders_in(folder) for file in scans_below(inner)),
    ]


def folders_in(folder: Path, beginning: str = "") -> list[Path]:
    """Folders of a folder without hidden ones, sorted."""
    if not folder.is_dir():
        return []
    folders = (
        inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith(".")
    )
    return sorted(inner for inner in folders if inner.name.startswith(beginning))


def only_file(folder: Path, suffix: str, fits: Callable[[Path], bool]) -> Path | None:
    """The one file of a folder that fits. Raises `BadConfig` if several do."""
    files = [file for file in files_in(folder) if file.suffix.lower() == suffix and fits(file)]
    if len(files) > 1:
        raise BadConfig(
            f"{folder}: holds several lists of cases ({files[0].name}, {files[1].name}); give one"
            " of them"
        )
    return files[0] if files else None
