"""The table of a cohort: a row for every case of its list, made anew from the records each time."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import attempts
from medseg.cohort.cases import Case, Cohort
from medseg.cohort.places import Places
from medseg.cohort.records import load, outcome_of
from medseg.cohort.request import Request
from medseg.files import atomic_write
from medseg.labels import LabelTable
from medseg.text import harmless, to_cell

#: Texts of a row beside those of the list.
TEXTS = (
    "status", "error", "error_kind", "worker", "part", "device", "started", "finished",
    "input_sha256", "shape", "spacing_mm", "orientation", "model", "model_sha256",
    "settings_sha256", "medseg", "torch", "precision", "backend", "labels", "labels_sha256",
    "warnings",
)  # fmt: skip
#: Numbers of a row beside those of structures.
NUMBERS = (
    "attempts", "read_s", "wait_s", "resample_s", "load_s", "network_s", "paint_s", "clean_s",
    "write_s", "total_s", "peak_memory_bytes", "n_warnings",
)  # fmt: skip
#: Of these numbers those that are whole.
_WHOLE = ("attempts", "peak_memory_bytes", "n_warnings")
#: What is known of each structure, as columns such as ml_17.
MEASURES = ("ml", "confidence", "mean", "sd", "median")
#: Rows that are written at a time.
_ROWS = 1000
#: Columns of structures and of totals.
_OF_STRUCTURES = re.compile(rf"(?:{'|'.join(MEASURES)})_[0-9]+|total_.*")
#: A number as a list may have it.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
#: What is said of a file that should be a record.
_DAMAGED = ": is damaged; remove it, and run medseg batch again"
#: Between the warnings of a row.
_BETWEEN = " | "


@dataclass(kw_only=True)
class Table:
    """The rows of a cohort, column by column, so that 40,000 are some ten megabytes.

    texts: column to a text a case. numbers: column to (cases) float64, NaN where nothing is known.
    structures: (measure, value) to the same. totals: name to mL. names: of structures by value.
    """

    cases: tuple[Case, ...]
    carried: tuple[str, ...]
    texts: dict[str, list[str]]
    numbers: dict[str, NDArray[np.float64]]
    structures: dict[tuple[str, int], NDArray[np.float64]]
    names: dict[int, str]
    totals: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def values(self) -> list[int]:
        """The values of all structures."""
        return sorted(self.names)

    def columns(self) -> Iterator[tuple[str, Cells]]:
        """The name of every column, with what gives its cells for the rows from one to another."""
        yield "case", _texts([case.name for case in self.cases])
        yield "group", _texts([case.group for case in self.cases])
        for place, name in enumerate(self.carried):
            yield name, _texts([case.carried[place] for case in self.cases], _as_it_is)
        for name, some in self.texts.items():
            yield name, _texts(some)
        for name, numbers in self.numbers.items():
            yield name, partial(_cells, numbers, name in _WHOLE)
        for (measure, value), numbers in sorted(self.structures.items(), key=_by_measure):
            yield f"{measure}_{value}", partial(_cells, numbers, False)
        for name, numbers in self.totals.items():
            yield f"total_{name.replace(' ', '_')}", partial(_cells, numbers, False)


#: The cells of a column for the rows from one to another, without that.
Cells: TypeAlias = Callable[[int, int], list[Any]]


def _texts(texts: Sequence[Any], write: Callable[[Any], Any] = to_cell) -> Cells:
    def cells(start: int, stop: int) -> list[Any]:
        some = texts[start:stop]
        known = {text: write(text) for text in set(some)}  # mostly the same in many rows
        return [known[text] for text in some]

    return cells


def _as_it_is(text: str) -> str:
    """A text of the list as a cell: a number, which may be negative, is no formula."""
    return text if _NUMBER.fullmatch(text) else str(to_cell(text))


def _cells(numbers: NDArray[np.float64], whole: bool, start: int, stop: int) -> list[Any]:
    """Numbers as cells: '' for NaN."""
    some = numbers[start:stop].tolist()
    if whole:
        return ["" if one != one else int(one) for one in some]
    return ["" if one != one else one for one in some]


def _by_measure(item: tuple[tuple[str, int], Any]) -> tuple[int, int]:
    (measure, value), _ = item
    return MEASURES.index(measure), value


def read_table(cohort: Cohort, request: Request, places: Places) -> Table:
    """The table of all cases, from their records alone."""
    count = len(cohort.cases)
    label_table = LabelTable.read(places.table) if places.table.is_file() else LabelTable(())
    names = {label.value: label.name for label in label_table.labels}
    values = sorted(names)
    block = np.full((count, len(values) * len(MEASURES)), np.nan)
    columns = [(measure, value) for value in values for measure in MEASURES]
    table = Table(
        cases=cohort.cases,
        carried=_own_names(cohort.columns),
        texts={name: [""] * count for name in TEXTS},
        numbers={name: np.full(count, np.nan) for name in NUMBERS},
        structures={key: block[:, place] for place, key in enumerate(columns)},
        names=names,
    )
    for row, case in enumerate(cohort.cases):
        record = load(f"{places.out}/{places.record_below(case.name)}")
        outcome = None if record is None else outcome_of(record)
        if record is None or outcome is None:
            table.texts["status"][row] = "waiting"
            history = attempts.history(places.attempts(case.name), "")
            table.numbers["attempts"][row] = history.begun
            if record is None and places.record(case.name).exists():
                table.texts["error"][row] = f"{places.record_below(case.name)}{_DAMAGED}"
            continue
        status = outcome.status
        if status == "done" and record.get("settings_sha256") != request.settings_sha256:
            status = "skipped"
        try:
            _fill(table, row, record, status)
            structures = record.get("structures") or ()
            if status == "skipped":
                structures = _called_so(structures, label_table.names)
            if [one.get("value") for one in structures] == values:  # as nearly always, and faster
                block[row] = [one.get(m, np.nan) for one in structures for m in MEASURES]
            else:
                _fill_structures(table, row, structures)
        except (AttributeError, KeyError, TypeError, ValueError):  # no record of ours
            _empty(table, row)
            table.texts["error"][row] = f"{places.record_below(case.name)}{_DAMAGED}"
            continue
        labels = places.labels_below(case) if outcome.status == "done" else ""
        if status == "done" or (labels and places.has(places.out / labels)):
            table.texts["labels"][row] = labels
    return table


def _called_so(
    structures: Iterable[Mapping[str, Any]], names: Mapping[int, str]
) -> list[Mapping[str, Any]]:
    """Structures of another model without those whose value means something else here."""
    same = []
    for one in structures:
        name = harmless(one["name"])
        if name.split() == names.get(one["value"], name).split():
            same.append(one)
    return same


def _empty(table: Table, row: int) -> None:
    """Let a row say nothing but that its record is none."""
    for texts in table.texts.values():
        texts[row] = ""
    for numbers in (*table.numbers.values(), *table.structures.values(), *table.totals.values()):
        numbers[row] = np.nan
    table.texts["status"][row] = "waiting"


def _fill(table: Table, row: int, record: Mapping[str, Any], status: str) -> None:
    """Put what a record says into a row."""
    model, scan = _part(record, "model"), _part(record, "input")
    versions, settings = _part(record, "versions"), _part(record, "settings")
    warnings = record.get("warnings") or []
    facts = {
        "status": status,
        "device": record.get("device_name"),
        "input_sha256": scan.get("voxels_sha256"),
        "shape": scan.get("shape"),
        "spacing_mm": scan.get("spacing_mm"),
        "orientation": scan.get("orientation"),
        "model": model.get("name"),
        "model_sha256": model.get("weights_sha256"),
        "medseg": versions.get("medseg"),
        "torch": versions.get("torch"),
        "precision": settings.get("precision"),
        "backend": settings.get("backend"),
        "warnings": _BETWEEN.join(map(str, warnings)),
    }
    plain = ("error", "error_kind", "worker", "part", "started", "finished")
    facts |= {name: record.get(name) for name in (*plain, "settings_sha256", "labels_sha256")}
    for name, value in facts.items():
        table.texts[name][row] = _as_text(value)
    _fill_numbers(table, row, record, n_warnings=len(warnings))
    for one in record.get("totals") or ():
        if one["name"] not in table.totals:
            table.totals[one["name"]] = np.full(len(table), np.nan)
        table.totals[one["name"]][row] = one["ml"]


def _fill_structures(table: Table, row: int, structures: Iterable[Mapping[str, Any]]) -> None:
    """Structures that are others than those of the model's table, or in another order."""
    for one in structures:
        value: Any = one.get("value")
        if value not in table.names:
            _add_structure(table, value, str(one.get("name", value)))
        for measure in MEASURES:
            if measure in one:
                table.structures[measure, value][row] = one[measure]


def _fill_numbers(table: Table, row: int, record: Mapping[str, Any], n_warnings: int) -> None:
    seconds = _part(record, "seconds")
    numbers = table.numbers
    for name, duration_s in seconds.items():
        if f"{name}_s" in numbers:
            numbers[f"{name}_s"][row] = duration_s
    numbers["total_s"][row] = seconds.get("total", sum(seconds.values()))
    numbers["attempts"][row] = record.get("attempt", np.nan)
    numbers["n_warnings"][row] = n_warnings
    for name in ("wait_s", "peak_memory_bytes"):
        if name in record:
            numbers[name][row] = record[name]


def _add_structure(table: Table, value: int, name: str) -> None:
    """Columns for a structure that the table of the model does not have."""
    table.names[value] = name
    for measure in MEASURES:
        table.structures[measure, value] = np.full(len(table), np.nan)


def write_wide(table: Table, path: Path, more: Mapping[str, Sequence[Any]]) -> None:
    """A CSV of a row for each case. more: further columns. Raises `BadOutput`."""
    columns = [*table.columns(), *((name, _texts(some)) for name, some in more.items())]
    with _csv_writer(path) as writer:
        writer.writerow([to_cell(name) for name, _ in columns])
        for start, stop in _pieces(len(table)):
            writer.writerows(zip(*(cells(start, stop) for _, cells in columns)))


def write_long(table: Table, path: Path) -> None:
    """A CSV of a row for each structure of each case that has labels. Raises `BadOutput`."""
    with _csv_writer(path) as writer:
        writer.writerow(("case", "value", "name", *MEASURES))
        for start, stop in _pieces(len(table)):
            cases = [to_cell(case.name) for case in table.cases[start:stop]]
            structures = [
                (
                    value,
                    to_cell(name),
                    *tuple(
                        _cells(table.structures[m, value], False, start, stop=stop)
                        for m in MEASURES
                    ),
                )
                for value, name in sorted(table.names.items())
            ]
            writer.writerows(
                (case, value, name, ml[row], sure[row], mean[row], sd[row], median[row])
                for row, case in enumerate(cases)
                for value, name, ml, sure, mean, sd, median in structures
                if ml[row] != ""  # no volume, no labels
            )


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """Some rows at a time, so that no second table is held."""
    for start in range(0, count, _ROWS):
        yield start, min(count, start + _ROWS)


@contextmanager
def _csv_writer(path: Path) -> Iterator[Any]:
    """What writes rows into a file that appears whole or not at all."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        try:
            yield csv.writer(text, lineterminator="\n")
            text.flush()
        finally:
            text.detach()


def write_parquet(table: Table, path: Path, more: Mapping[str, Sequence[Any]]) -> bool:
    """The same as Parquet, names of structures in its metadata; False where there is no pyarrow.

    Raises `BadOutput`.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    arrays: dict[str, Any] = {
        name: [None if one == "" else one for one in cells(0, len(table))]
        for name, cells in table.columns()
    }
    arrays |= {name: list(some) for name, some in more.items()}
    names = json.dumps({str(value): name for value, name in sorted(table.names.items())})
    arrow_table = pyarrow.table(arrays).replace_schema_metadata({"medseg_structures": names})
    with atomic_write(path) as file:
        parquet.write_table(arrow_table, file, compression="zstd")
    return True


def _own_names(columns: Sequence[str]) -> tuple[str, ...]:
    """The names of carried columns, with list_ before those that are columns of ours, or that are
    there already.
    """
    names = {"case", "group", "suspicion", "why", *TEXTS, *NUMBERS}
    own_names = []
    for name in columns:
        own = name
        while own.lower() in names or _OF_STRUCTURES.fullmatch(own.lower()):
            own = f"list_{own}"
        names.add(own.lower())
        own_names.append(own)
    return tuple(own_names)


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _as_text(value: Any) -> str:
    """A value in a cell: axes joined by x, several hashes by +."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ("+" if value and isinstance(value[0], str) else "x").join(f"{one}" for one in value)
    return str(value)
