"""What MONAI Label's protocol says, as data: label values on the way, labels that come back, the
parts of an answer (github.com/Project-MONAI/MONAILabel, version 0.8.5, and its extension for 3D
Slicer).

3D Slicer knows labels by their place: it sorts the names of an answer by value, leaves "background"
out, and takes value k for the k-th name; a value above the number of names vanishes without a word.
So labels are numbered 1 to N on the way, and what comes back is numbered by the place of its name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medseg.errors import MedsegError
from medseg.labels import MAX_VALUE, Label, LabelTable, same_name
from medseg.text import counted, harmless, parse_json
from medseg.volume import Volume

#: Segments that the extension neither shows nor sends back.
HIDDEN = ("background", "foreground_scribbles", "background_scribbles")
#: A label map on the way is of bytes.
MAX_LABELS = 255
#: Longest name of a structure.
MAX_NAME = 200


class Refused(MedsegError):
    """A request that is not carried out; its text goes to who asked.

    status: of HTTP (RFC 9110, section 15).
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the structures of a table are called and numbered on the way: the first name is 1.

    values: in label maps of medseg, ascending; names: of each, none twice.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Name to number."""
        return {name: number for number, name in enumerate(self.names, 1)}


def naming_of(table: LabelTable) -> Naming:
    """How a table's structures are called on the way.

    What is called as another one, or as what the extension hides, gets its value behind its name.
    """
    labels = sorted(table.labels, key=lambda label: label.value)
    plain = [harmless(label.name) for label in labels]
    names: list[str] = []
    for label, name in zip(labels, plain, strict=True):
        unique = name
        while unique in names or _is_hidden(unique) or (unique != name and unique in plain):
            unique = f"{unique} ({label.value})"
        names.append(unique)
    return Naming(values=tuple(label.value for label in labels), names=tuple(names))


def _is_hidden(name: str) -> bool:
    return name.strip().casefold() in HIDDEN


def numbered(labels: Volume, naming: Naming) -> Volume:
    """Labels (I, J, K) with values 1 to N in the order of `naming`, uint8. Raises `Refused` for
    more than `MAX_LABELS` structures, and for values that the naming does not have.
    """
    if len(naming.values) > MAX_LABELS:
        raise Refused(
            400,
            f"there are {len(naming.values)} structures, and an answer holds {MAX_LABELS} at most;"
            " use medseg infer for this model",
        )
    size = max(int(labels.data.max(initial=0)), *naming.values, 0) + 1
    number_of = np.full(size, -1, np.int16)
    number_of[0] = 0
    number_of[list(naming.values)] = np.arange(1, len(naming.values) + 1)
    numbers = number_of[labels.data]
    if numbers.min(initial=0) < 0:
        value = int(labels.data[numbers < 0][0])
        raise Refused(400, f"the label map holds the value {value}, which no name belongs to")
    return labels.with_data(numbers.astype(np.uint8))


# Labels that come back ----------------------------------------------------------------------------


def names_in(params: Mapping[str, Any]) -> dict[int, str]:
    """The names of the segments of a label that comes back, by their values: their places from 1.

    `idx` is not looked at: it counts segments that were left out. Raises `Refused`.
    """
    info = params.get("label_info", [])
    if not isinstance(info, list) or not all(isinstance(one, dict) for one in info):
        raise Refused(400, "label_info is a list of objects with the name of each segment")
    names = [one.get("name") for one in info]
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
            raise Refused(400, f"a segment in label_info has no name of 1 to {MAX_NAME} characters")
    return {place: harmless(name.strip()) for place, name in enumerate(names, 1)}


def returned(
    labels: Volume, names: Mapping[int, str], structures: Mapping[str, Label]
) -> tuple[Volume, LabelTable]:
    """Labels that came back, with the values that their names have, and the table of these.

    names: of the values of `labels`, looked for even where no voxel has them. structures: what a
    name may mean, see `known_structures`; others get the next free values. Raises `Refused` for a
    value without a name, and for a structure that is there twice.
    """
    present = values_in(labels)
    unnamed = [value for value in present if value not in names]
    if unnamed:
        raise Refused(
            400,
            f"the label map holds the value {unnamed[0]}, and {counted(len(names), 'segment')}"
            f" {'is' if len(names) == 1 else 'are'} named; give each segment a name",
        )
    label_of = _labels_of(names, present, structures)
    new_value = np.zeros(max(present, default=0) + 1, np.uint16)
    for value in present:
        new_value[value] = label_of[value].value if value in label_of else 0
    data = new_value[labels.data]
    narrow = data.astype(np.uint8) if data.max(initial=0) < 256 else data
    by_value = sorted(label_of.values(), key=lambda label: label.value)
    return labels.with_data(narrow), LabelTable(tuple(by_value))


def values_in(labels: Volume) -> list[int]:
    """The values of structures that voxels have, ascending."""
    held: set[int] = set()
    for plane in np.moveaxis(labels.data, -1, 0):  # counting takes eight bytes a voxel
        held.update(np.flatnonzero(np.bincount(plane.ravel(order="K"))).tolist())
    return sorted(held - {0})


def _labels_of(
    names: Mapping[int, str], present: Sequence[int], structures: Mapping[str, Label]
) -> dict[int, Label]:
    """What each value means, but those that are background. present: the values that voxels
    have.
    """
    label_of: dict[int, Label] = {}
    known = dict(structures)
    shown = [value for value in names if not _is_hidden(names[value])]
    for value in sorted(shown, key=lambda value: value not in present):
        label = _meant(names[value], known)
        if label not in label_of.values():
            label_of[value] = label
        elif value in present:
            raise Refused(400, "two segments are the same structure by their names; rename one")
    return label_of


def _meant(name: str, known: dict[str, Label]) -> Label:
    """The structure of a name, a new one if there is none, which is then known."""
    same = same_name(name, known)
    if not same:
        value = _free_value({label.value for label in known.values()})
        same, known[name] = name, replace(LabelTable.from_values([value]).labels[0], name=name)
    return known[same]


def known_structures(own: LabelTable, others: Sequence[LabelTable]) -> dict[str, Label]:
    """The structures that a name may mean, by their names on the way: those of a data set, and
    those of models, under other values than theirs where the data set has these for something else.
    """
    structures = _by_name(own)
    homeless: list[tuple[str, Label]] = []
    for name, label in (pair for table in others for pair in _by_name(table).items()):
        if same_name(name, structures):
            continue
        if label.value in {one.value for one in structures.values()}:
            homeless.append((name, label))
        else:
            structures[name] = label
    for name, label in homeless:
        if not same_name(name, structures):
            value = _free_value({one.value for one in structures.values()})
            structures[name] = replace(label, value=value)
    return structures


def _by_name(table: LabelTable) -> dict[str, Label]:
    naming = naming_of(table)
    return {name: table[value] for name, value in zip(naming.names, naming.values, strict=True)}


def _free_value(taken: Collection[int]) -> int:
    """The value after the largest one."""
    value = max(taken, default=0) + 1
    if value > MAX_VALUE:
        raise Refused(400, "there is no free label value for a new structure")
    return value


# Requests and answers -----------------------------------------------------------------------------


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object of a text; an empty one for ''. Raises `Refused`."""
    try:
        value = parse_json(text) if text.strip() else {}
    except ValueError as error:
        raise Refused(400, f"{what} is not valid JSON: {harmless(error)}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"{what} is not a JSON object")
    return value


def multipart(params: Mapping[str, Any], content: bytes, name: str) -> tuple[bytes, str]:
    """A body of two parts (RFC 7578), `params` as JSON and `image` as a file, and its content
    type.
    """
    boundary = f"medseg-{secrets.token_hex(16)}"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{json.dumps(params)}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = b"".join((head.encode(), content, f"\r\n--{boundary}--\r\n".encode()))
    return body, f"multipart/form-data; boundary={boundary}"
