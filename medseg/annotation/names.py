"""Structures known by name: the values of a label map become those of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.labels import MAX_VALUE, Label, LabelTable, same_name
from medseg.text import harmless


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A label map in the values of a data set.

    data: as the map's, uint8 or uint16. table: that of the data set, with what is new. annotated:
    the values that the map's table names, as far as the data set has them; holds: those in it.
    """

    data: NDArray
    table: LabelTable
    annotated: tuple[int, ...]
    holds: tuple[int, ...]


def joined_by_name(
    case: str, data: NDArray, own: LabelTable, table: LabelTable, *, like: LabelTable
) -> Joined:
    """A label map (I, J, K) with a table of its own in the values of a data set.

    A name of `own` that `table` has, in any case and with blanks, hyphens or underscores between
    its words, is that structure, and keeps the spelling and colour that `table` has. A new name
    with voxels gets the value that `like` has for it, or else its own, if that is free, or the next
    free one; one without voxels is not entered. Raises `BadFile` naming the case for a value
    without a name and for a name twice.
    """
    present = [int(value) for value in np.unique(data) if value]
    _check_names(case, own, present)
    labels = {label.name: label for label in table.labels}
    value_of: dict[int, int] = {}
    for label in own.labels:
        name = same_name(label.name, labels)
        if not name and label.value in present:
            name = label.name
            value = _free_value(label, {one.value for one in labels.values()}, like)
            labels[name] = replace(label, value=value)
        if name:
            labels[name] = _completed(labels[name], label)
            value_of[label.value] = labels[name].value
    new_value = np.zeros(MAX_VALUE + 1, np.uint16)
    new_value[list(value_of)] = list(value_of.values())
    joined = new_value[data]
    by_value = sorted(labels.values(), key=lambda one: one.value)
    return Joined(
        data=joined.astype(np.uint8) if joined.max(initial=0) < 256 else joined,
        table=LabelTable(tuple(by_value)),
        annotated=tuple(sorted(value_of.values())),
        holds=tuple(sorted(value_of[value] for value in present)),
    )


def _check_names(case: str, own: LabelTable, present: Sequence[int]) -> None:
    """Raise `BadFile` where a value that is present has no name, or two have one."""
    if nameless := [value for value in present if value not in own]:
        raise BadFile(
            f"the label of {case}: holds the value {nameless[0]}, which has no name; name it in the"
            " label table"
        )
    if not len(own):
        raise BadFile(f"the label of {case}: names no structure; name what was looked for")
    names = [label.name for label in own.labels]
    for number, name in enumerate(names):
        if same_name(name, names[:number]):
            raise BadFile(
                f"the label of {case}: two of its values are called '{harmless(name)}'; give each"
                " structure a name of its own"
            )


def _free_value(label: Label, taken: set[int], like: LabelTable) -> int:
    """The value that a new structure gets."""
    usual = same_name(label.name, like.names.values())
    wishes = [one.value for one in like.labels if one.name == usual] + [label.value]
    free = (value for value in (*wishes, *range(1, MAX_VALUE + 1)) if value not in taken)
    return next(free)


def _completed(label: Label, other: Label) -> Label:
    """A label with the codes of another one where it has none itself."""
    if label.category or label.type:
        return label
    return replace(
        label,
        category=other.category,
        type=other.type,
        type_modifier=other.type_modifier,
        region=other.region,
        region_modifier=other.region_modifier,
    )


def dice_by_name(
    labels: NDArray, table: LabelTable, truth: NDArray, truth_table: LabelTable
) -> dict[str, float]:
    """Dice of a label map (I, J, K) for each structure of the truth's table, matched by name; those
    that neither holds are left out.
    """
    names = {label.name: label.value for label in table.labels}
    scores = {}
    for label in truth_table.labels:
        known = same_name(label.name, names)
        there = truth == label.value
        here = labels == names[known] if known else np.zeros_like(there)
        size = int(here.sum()) + int(there.sum())
        if size:
            scores[label.name] = 2 * int((here & there).sum()) / size
    return scores
