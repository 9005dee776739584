"""Tables for programs: pandas where it is installed, and else what is read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from medseg.text import harmless


class Table(Protocol):
    """What a `pandas.DataFrame` and a `PlainTable` have in common."""

    @property
    def columns(self) -> Any:
        """Names of the columns, in their order."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, name: str) -> Any:
        """A column."""

    def to_dict(self, orient: Any = ...) -> Any:
        """`to_dict("records")`: the rows."""


class PlainTable:
    """Rows with the same columns; what a row has no value for is None.

    Columns are read by name, rows by `to_dict("records")`, as of a `pandas.DataFrame`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = [dict(row) for row in rows]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in their order."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._columns:
            raise KeyError(name)
        return [row.get(name) for row in self._rows]

    def to_dict(self, orient: str = "dict") -> Any:
        """`"records"`: a dict for each row; `"list"`: a list for each column; else, as pandas does,
        a dict by number of row for each column.
        """
        if orient == "records":
            return [{name: row.get(name) for name in self._columns} for row in self._rows]
        if orient == "list":
            return {name: self[name] for name in self._columns}
        return {name: dict(enumerate(self[name])) for name in self._columns}

    def __repr__(self) -> str:
        return f"<table of {len(self)} rows: {', '.join(self._columns)}>"

    def _repr_html_(self) -> str:
        return as_html(self._rows)


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as a table."""
    try:
        import pandas
    except ImportError:
        return PlainTable(rows)
    table: Table = pandas.DataFrame(list(rows))
    return table


def as_html(rows: Sequence[Mapping[str, Any]], *, title: str = "", most: int = 1000) -> str:
    """Rows as an HTML table, at most so many."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(row.get(name))}</td>" for name in columns) + "</tr>"
        for row in rows[:most]
    )
    more = f"<p>and {len(rows) - most} more</p>" if len(rows) > most else ""
    above = f"<p>{_text(title)}</p>" if title else ""
    return f"{above}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _text(value: Any) -> str:
    return "" if value is None else escape(harmless(value))
