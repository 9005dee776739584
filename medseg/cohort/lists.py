"""A cohort as a list: CSV, TSV, JSONL or Parquet, a row for each case."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.cohort.cases import Case, Cohort, make_cohort
from medseg.errors import BadConfig, BadFile
from medseg.files import read_bytes
from medseg.inference import given_name
from medseg.text import from_cell, harmless, parse_json, whole_number

#: Endings of lists.
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
#: Columns with a meaning; those of images are 'image' and 'image_NAME' besides.
_KNOWN = ("case", "group", "series", "volume")
#: What makes an address of a name.
_ADDRESS = "://"
MAX_LIST_BYTES = 1 << 30
#: What may stand between the cells of a .csv; of those that do as well the first.
_DELIMITERS = (",", ";", "\t")
#: Letters within which the first line is looked for.
_HEADER = 1 << 16
#: A whole number as pandas writes it where another row of the column has none: 2.0.
_FLOAT = re.compile(r"([0-9]{1,9})\.0")


def read_list(path: Path, channels: Sequence[str] = ("",)) -> Cohort:
    """The cohort of a list. channels: the model's, '' where it does not name them.

    Columns are `case` (without it, the name of the first file), `image`, or `image_T1`,
    `image_FLAIR` ... as the model names its channels (or image_0, image_1 ... in its order), and
    where wanted `group`, `series` and `volume`; others are carried along. Files are named seen from
    the list's folder. Raises `BadFile`, `BadConfig`.
    """
    rows = _rows(path)
    header = next(rows)
    if not all(name.strip() for name in header):
        header, *rest = _without_empty_columns([header, *rows])
        rows = iter(rest)
    places = _columns(path, header)
    images = _image_columns(path, header, channels)
    extra_columns = [n for n, name in enumerate(header) if n not in (*places.values(), *images)]
    cases = [
        _case(path, number, row, places=places, images=images, carried=extra_columns)
        for number, row in enumerate(rows, 2)
    ]
    names = tuple(harmless(header[n].strip()) for n in extra_columns)
    return make_cohort(path, "list", cases, columns=names)


def _rows(path: Path) -> Iterator[list[str]]:
    """The names of the columns, then the values of each row."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    try:
        text = read_bytes(path, max_bytes=MAX_LIST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{path}: is not text in UTF-8; save the list as UTF-8") from None
    return _json_rows(path, text) if suffix == ".jsonl" else _table_rows(path, text)


def _without_empty_columns(rows: Sequence[list[str]]) -> list[list[str]]:
    """The rows without columns that have neither a name nor a value, as spreadsheets add them."""
    kept = [n for n in range(len(rows[0])) if any(row[n].strip() for row in rows)]
    return [[row[n] for n in kept] for row in rows]


def _delimiter(path: Path, text: str) -> str:
    """What stands between the cells: of a .csv what splits its first line into the most names."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = next((line for line in text[:_HEADER].splitlines() if line.strip()), "")
    return max(_DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one))))


def _table_rows(path: Path, text: str) -> Iterator[list[str]]:
    delimiter = _delimiter(path, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    width = 0
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            width = width or len(row)
            if len(row) != width:
                raise BadFile(
                    f"{path}: line {reader.line_num} has {len(row)} columns and the first {width}; "
                    "put quotes around a value that holds the delimiter"
                )
            yield row
    except csv.Error as error:
        raise BadFile(f"{path}: line {reader.line_num} cannot be read: {error}") from None
    if not width:
        raise BadFile(f"{path}: is empty; its first line names the columns: case,image")


def _json_rows(path: Path, text: str) -> Iterator[list[str]]:
    records: list[dict[str, Any]] = []
    # Not by `splitlines`: in strings of JSON there may be what it, too, takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise BadFile(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadFile(f'{path}: line {number} is no JSON object; write {{"case": ...}}')
        records.append(record)
    if not records:
        raise BadFile(f"{path}: holds no row")
    names = list(dict.fromkeys(str(key) for record in records for key in record))
    yield names
    for record in records:
        yield [_as_text(record.get(name)) for name in names]


def _parquet_rows(path: Path) -> Iterator[list[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadConfig(
            f'{path}: to read Parquet, pip install "medseg[parquet]", or give the list as CSV'
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
        # Column by column, for a mapping would lose one of two that are called the same.
        columns = [_values(column) for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(f"{path}: cannot be read as Parquet: {harmless(error)[:200]}") from None
    if not table.num_rows:
        raise BadFile(f"{path}: holds no row")
    yield list(table.column_names)
    for row in zip(*columns):
        yield [_as_text(value) for value in row]


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except ValueError:  # times of nanoseconds, which Python does not have
        return list(column.cast("string").to_pylist())


def _as_text(value: Any) -> str:
    """A value as a cell of CSV has it: nothing for none, and for what is not a number."""
    return "" if value is None or value != value else str(value)


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """Where the columns with a meaning stand."""
    names = [name.strip().lower() for name in header]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadFile(f"{path}: two columns are called '{harmless(twice[0])}'; rename one of them")
    return {name: names.index(name) for name in _KNOWN if name in names}


def _image_columns(path: Path, header: Sequence[str], channels: Sequence[str]) -> list[int]:
    """Where the columns of the model's channels stand, in its order."""
    places = {name.strip().lower(): n for n, name in enumerate(header)}
    if "image" in places and not any(name.startswith("image_") for name in places):
        return [places["image"]]
    columns = []
    for number, channel in enumerate(channels):
        names = [f"image_{channel.lower()}", f"image_{number}", f"image_{number:04d}"]
        matches = [places[name] for name in names if name in places]
        if len(channels) == 1 and not matches:
            matches = [places[name] for name in ("image", *sorted(places)) if name in places]
            matches = [n for n in matches if header[n].strip().lower().startswith("image")]
            if len(matches) > 1 and "image" not in places:
                matches = []
        if not matches:
            name = f"image_{channel}" if len(channels) > 1 and channel else "image"
            raise BadFile(
                f"{path}: has no column '{name}' with the scans; its columns are "
                f"{', '.join(harmless(one) for one in header)[:200]}"
            )
        columns.append(matches[0])
    return columns


def _case(
    path: Path,
    number: int,
    row: Sequence[str],
    *,
    places: Mapping[str, int],
    images: Sequence[int],
    carried: Sequence[int],
) -> Case:
    """The case of a row."""
    values = {name: from_cell(row[n]).strip() for name, n in places.items()}
    names = [row[n].strip() for n in images]
    files = tuple(_located(path.parent, name) for name in names)
    problem = "" if all(names) else f"row {number} of the list names no file for every channel"
    name = values.get("case") or (given_name(Path(files[0])) if names[0] else "")
    if not name:
        raise BadFile(f"{path}: row {number} has neither a name nor a file")
    if not problem and not all(map(_can_be_a_path, names)):
        problem = f"row {number} of the list names a file that no file can be called"
        files = tuple(map(harmless, files))
    return Case(
        name=name,
        images=files,
        group=values.get("group", ""),
        series=_whole(values.get("series", "")),
        volume=_volume(path, number, values.get("volume", "")),
        carried=tuple(row[n] for n in carried),
        problem=problem,
    )


def _can_be_a_path(name: str) -> bool:
    """Whether a system can be asked for a file of this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair of UTF-16
        return False


def _whole(text: str) -> str:
    """A number without the .0 that it did not have before."""
    match = _FLOAT.fullmatch(text)
    return match[1] if match else text


def _located(folder: Path, name: str) -> str:
    """A file of a list, seen from the list's folder; an address as it is. Of Windows' backslashes
    there may be some where no file has any in its name.
    """
    if _ADDRESS in name:
        return name
    path = folder / name
    if "\\" in name and os.sep == "/" and not path.exists():
        path = folder / name.replace("\\", "/")
    return str(path)


def _volume(path: Path, number: int, text: str) -> int | None:
    if not text:
        return None
    try:
        value = whole_number(_whole(text))
    except ValueError as error:
        raise BadFile(
            f"{path}: row {number}, column 'volume': {error}; it says which volume of a 4-D file,"
            " so rename it if it means something else"
        ) from None
    if value < 0:
        raise BadFile(f"{path}: row {number}, column 'volume': volumes are numbered from 0")
    return value
