"""Structures of label maps that name them, as 3D Slicer's segmentations, DICOM SEG and RTSTRUCT do,
matched by name and not by value.

Programs number the segments of every file in the order in which they were drawn; what people give
them is a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from medseg.dataset.cases import Case, Finding
from medseg.dataset.layouts.finding import united_table
from medseg.errors import BadFile
from medseg.io import embedded_table
from medseg.labels import Label, LabelTable


def tables_in(cases: Sequence[Case]) -> dict[Path, LabelTable]:
    """The tables that label maps carry in themselves, by file: those of 3D Slicer's segmentations,
    DICOM SEG and RTSTRUCT.
    """
    tables: dict[Path, LabelTable] = {}
    for file in (case.label for case in cases if case.label is not None):
        # `medseg check`, and whoever reads it, say what is wrong with it.
        with suppress(BadFile):
            table = embedded_table(file)
            if table is not None:
                tables[file] = table
    return tables


def _plain_name(name: str) -> str:
    """A name as it is compared: large letters, blanks, hyphens and underscores make no other
    structure.
    """
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", name.casefold()).strip()


def _values_by_name(file: Path, table: LabelTable) -> dict[str, int]:
    """Plain name to value. Raises `BadFile` if a file calls two structures alike, so that names do
    not tell them.
    """
    values: dict[str, int] = {}
    for label in table.labels:
        if values.setdefault(_plain_name(label.name), label.value) != label.value:
            raise BadFile(f"{file}: calls two segments '{label.name}'; give each a name of its own")
    return values


def numbers_agree(named: Mapping[Path, LabelTable]) -> bool:
    """Whether every name has one value, or the same ones, in all files that have it."""
    values_of: dict[str, set[int]] = {}
    for table in named.values():
        own: dict[str, set[int]] = {}
        for label in table.labels:
            own.setdefault(_plain_name(label.name), set()).add(label.value)
        if any(values_of.setdefault(name, values) != values for name, values in own.items()):
            return False
    return True


def united_by_name(path: Path, named: Mapping[Path, LabelTable]) -> LabelTable:
    """One table of files that may number their structures differently, each structure being what
    its name says.

    Values are kept where all files agree on them; else the names are numbered in the order in which
    they come. That names count and not values is certain only where a name has several values:
    values are Slicer's, names are people's. Raises `BadFile` where values agree and names do not,
    and for one name in two spellings.
    """
    labels: dict[str, Label] = {}
    for label in (label for table in named.values() for label in table.labels):
        before = labels.setdefault(_plain_name(label.name), label)
        if before.name != label.name:
            both = f"'{before.name}' and '{label.name}'"
            raise BadFile(
                f"{path}: holds structures called {both}; spell a structure alike in all cases"
            )
    if numbers_agree(named):
        return united_table(path, list(named.values()))
    for file, table in named.items():
        _values_by_name(file, table)
    return LabelTable(
        tuple(replace(label, value=number) for number, label in enumerate(labels.values(), 1))
    )


def numbered_as(case: Case, named: Mapping[Path, LabelTable], table: LabelTable) -> Case:
    """A case with what its label file's own numbers are in the data set's table, found by name.

    A file that knows none of the table's names, as one with 'Segment_1', is taken by its values.
    Raises `BadFile` if it knows some, under other values, and not all: then nobody can say what the
    others are.
    """
    file, own = case.label, _own_table(case, named)
    if file is None or own is None or _is_named_alike(own, table):
        return case
    value_of = {_plain_name(label.name): label.value for label in table.labels}
    numbers = {label.value: value_of.get(_plain_name(label.name)) for label in own.labels}
    if all(after in (None, before) for before, after in numbers.items()):
        return case
    _values_by_name(file, own)
    pairs = []
    for before, after in numbers.items():
        if after is None:
            names = ", ".join(label.name for label in table.labels[:8])
            raise BadFile(
                f"{file}: names '{own[before].name}', which the data set does not know ({names}), "
                "and numbers the others differently; rename it"
            )
        pairs.append((before, after))
    return replace(case, numbers=tuple(pairs))


def _own_table(case: Case, named: Mapping[Path, LabelTable]) -> LabelTable | None:
    """The table that a case's label file carries in itself."""
    return None if case.label is None else named.get(case.label)


def _is_named_alike(own: LabelTable, table: LabelTable) -> bool:
    """Whether each value of a file has the same name in the data set's table."""
    names = table.names
    return all(
        _plain_name(names.get(label.value, "")) == _plain_name(label.name) for label in own.labels
    )


def names_lacking(
    cases: Sequence[Case], named: Mapping[Path, LabelTable], table: LabelTable
) -> list[Finding]:
    """Where structures were matched by name: warnings of files that lack one, which may have been
    misspelt there.
    """
    if not any(case.numbers for case in cases):
        return []
    findings = []
    for case in cases:
        own = _own_table(case, named)
        if own is None:
            continue
        there = {_plain_name(label.name) for label in own.labels}
        lacking = [label.name for label in table.labels if _plain_name(label.name) not in there]
        if lacking:
            message = f"{case.label}: names no '{lacking[0]}', so it counts as not there"
            message += "; check that it is not misspelt"
            findings.append(
                Finding(case=case.name, kind="names", severity="warning", message=message)
            )
    return findings
