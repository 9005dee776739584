"""Names of structures as tables: colours that tell them apart, and codes where the terminology has the name."""

from __future__ import annotations

from collections.abc import Mapping

from medseg.labels import Label, LabelTable


def table_of(names: Mapping[int, str]) -> LabelTable:
    """A label table of values and names."""
    colors = {label.value: label.color for label in LabelTable.from_values(names).labels}
    return LabelTable(tuple(Label(value, names[value], colors[value]) for value in sorted(names)))
