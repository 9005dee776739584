"""Label tables: what each value of a label map means, its colour and its code, and which structures
mirror which.

Slicer's `labels.csv` is the main form (https://slicer.readthedocs.io, Colors module). Slicer's
colour table (`.ctbl`), FreeSurfer's lookup table (`.txt`, FreeSurferColorLUT.txt in
https://github.com/freesurfer/freesurfer), ITK-SNAP's label description file (`.label`, as ITK-SNAP
3 and 4 write it) and BIDS `dseg.tsv` are read and written too. Value 0 is the background and is no
structure.
"""

from __future__ import annotations

import colorsys
import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.files import atomic_write, read_text
from medseg.text import decimal_number, from_cell, harmless, to_cell, whole_number

#: Largest label value a table or a label map may hold.
MAX_VALUE = 65535
#: Labels that `repr` names.
_SHOWN = 4
_CODE_COLUMNS = {  # field of Label -> Slicer's column prefix
    "category": "Category",
    "type": "Type",
    "type_modifier": "TypeModifier",
    "region": "Region",
    "region_modifier": "RegionModifier",
}
#: The same columns as tables of MONAIAuto3DSeg and TotalSegmentator in Slicer call them.
_DICOM_COLUMNS = {
    "category": "SegmentedPropertyCategoryCodeSequence",
    "type": "SegmentedPropertyTypeCodeSequence",
    "type_modifier": "SegmentedPropertyTypeModifierCodeSequence",
    "region": "AnatomicRegionSequence",
    "region_modifier": "AnatomicRegionModifierSequence",
}
_CODE_PARTS = ("CodingScheme", "CodeValue", "CodeMeaning")
_COLUMNS = ["LabelValue", "Name", "Color_R", "Color_G", "Color_B", "Color_A"] + [
    f"{prefix}_{part}" for prefix in _CODE_COLUMNS.values() for part in _CODE_PARTS
]
_OTHER_SIDE = {"left": "right", "right": "left", "lh": "rh", "rh": "lh", "l": "r", "r": "l"}


class Code(NamedTuple):
    """A coded concept, e.g. ('SCT', '7771000', 'Left')."""

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Label:
    """One structure: its value in label maps, name, colour (0-255), and what it is in a terminology
    if known.
    """

    value: int
    name: str
    color: tuple[int, int, int]
    category: Code | None = None
    type: Code | None = None
    type_modifier: Code | None = None
    region: Code | None = None
    region_modifier: Code | None = None


def _check_label(label: Label) -> None:
    """Raise `BadConfig` for a label that no table may hold."""
    if not 1 <= label.value <= MAX_VALUE:
        raise BadConfig(f"label value {label.value} is not between 1 and {MAX_VALUE}")
    if not label.name.strip():
        raise BadConfig(f"label {label.value} has no name")
    if len(label.color) != 3 or not all(0 <= part <= 255 for part in label.color):
        raise BadConfig(f"label {label.value} has a colour that is not three numbers from 0 to 255")


@dataclass(frozen=True, repr=False)
class LabelTable:
    """The structures of a label map, without the background. Raises `BadConfig` for values twice or
    out of range.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(label, Label) for label in self.labels):
            raise BadConfig(
                "a label table is made of labels: LabelTable((Label(1, 'liver', ...),))"
            )
        values = [label.value for label in self.labels]
        for label in self.labels:
            _check_label(label)
        if len(set(values)) != len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise BadConfig(f"label value {twice} is used twice")

    def __repr__(self) -> str:
        some = ", ".join(f"{one.value} {harmless(one.name)}" for one in self.labels[:_SHOWN])
        more = ", ..." if len(self) > _SHOWN else ""
        return f"<LabelTable of {len(self)}: {some}{more}>"

    def __getitem__(self, value: int) -> Label:
        for label in self.labels:
            if label.value == value:
                return label
        raise KeyError(value)

    def __contains__(self, value: object) -> bool:
        return any(label.value == value for label in self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def values(self) -> tuple[int, ...]:
        """The label values, in the table's order."""
        return tuple(label.value for label in self.labels)

    @property
    def names(self) -> dict[int, str]:
        """Value to name."""
        return {label.value: label.name for label in self.labels}

    def value_of(self, text: str) -> int:
        """The value of a structure by its number or its name, in any case and with blanks, hyphens
        or underscores between its words. Raises `BadConfig` for what is not there, or there twice.
        """
        plain = text.strip()
        if plain.isascii() and plain.isdigit() and int(plain) in self:
            return int(plain)
        for same in (str, _loosely):
            values = [label.value for label in self.labels if same(label.name) == same(plain)]
            if len(values) == 1:
                return values[0]
            if values:
                told = ", ".join(map(str, values))
                raise BadConfig(f"several labels are called '{harmless(plain)}': {told}; give one")
        raise BadConfig(f"there is no structure '{harmless(plain)}'; {self._near(plain)}")

    def _near(self, text: str) -> str:
        """The structures that may have been meant, in words."""
        names = {_loosely(label.name): label.name for label in self.labels}
        near = difflib.get_close_matches(_loosely(text), names, 3, 0.6)
        near += [one for one in names if _loosely(text) in one and one not in near][: 3 - len(near)]
        if near:
            return f"did you mean {' or '.join(harmless(names[one]) for one in near)}?"
        some = ", ".join(harmless(label.name) for label in self.labels[:8])
        return f"there are {some}" + (" ..." if len(self) > 8 else "")

    def over(self, other: LabelTable) -> LabelTable:
        """Another table, with the names and colours of this one where it has the value; codes stay
        those of the other, for they say what a value means.
        """
        mine = {label.value: label for label in self.labels}
        return LabelTable(
            tuple(
                replace(label, name=mine[label.value].name, color=mine[label.value].color)
                if label.value in mine
                else label
                for label in other.labels
            )
        )

    def mirror_pairs(self) -> dict[int, int]:
        """Value to value of the same structure on the other side, both ways, for names that differ
        only in the side.
        """
        by_name = {_words(label.name): label.value for label in self.labels}
        partners = {
            label.value: by_name.get(_mirrored(_words(label.name))) for label in self.labels
        }
        return {
            value: other
            for value, other in partners.items()
            if other is not None and other != value
        }

    @classmethod
    def from_values(cls, values: Iterable[int]) -> LabelTable:
        """A table for values whose meaning is unknown: 'label 3', with colours that tell them
        apart.
        """
        foreground = sorted({int(value) for value in values} - {0})
        return cls(
            tuple(Label(value, f"label {value}", _distinct_color(value)) for value in foreground)
        )

    @classmethod
    def read(cls, path: str | Path) -> LabelTable:
        """A table from Slicer's `.csv` or `.ctbl`, FreeSurfer's `.txt`, ITK-SNAP's `.label` or
        BIDS' `.tsv`. Raises `BadFile`, which names the line.
        """
        parse = _PARSERS.get(Path(path).suffix.lower())
        if parse is None:
            raise BadFile(
                f"{path}: is not a label table; a table ends in .csv, .ctbl, .txt, .label or .tsv"
            )
        text = read_text(path)
        try:
            labels = tuple(label for label in parse(text) if label.value != 0)
            table = cls(labels)
        except (BadConfig, ValueError, csv.Error) as error:
            raise BadFile(f"{path}: is not a label table medseg understands: {error}") from None
        if not labels:
            raise BadFile(f"{path}: names no structure")
        return table

    def write(self, path: str | Path) -> None:
        """Write Slicer's `.csv` or `.ctbl`, FreeSurfer's `.txt`, ITK-SNAP's `.label` or a BIDS
        `.tsv`, whole or not at all.
        """
        form = _FORMS.get(Path(path).suffix.lower())
        if form is None:
            raise BadOutput(f"{path}: a label table ends in .csv, .ctbl, .txt, .label or .tsv")
        with atomic_write(path) as file:
            file.write(form(self.labels).encode())


def structure_value(text: str, table: LabelTable | None, option: str) -> int:
    """The label value of a structure by its name in a table, or by its number, which needs none.
    Raises `BadConfig`.
    """
    try:
        return whole_number(text.strip())
    except ValueError:
        if table is None:
            raise BadConfig(
                f"{option} {harmless(text)}: no label table says what it is; give its number, or a"
                " labels.csv beside the labels"
            ) from None
    try:
        return table.value_of(text)
    except BadConfig as error:
        raise BadConfig(f"{option}: {error}") from None


def is_lateral(name: str) -> bool:
    """Whether a structure's name says left or right."""
    return _mirrored(_words(name)) != _words(name)


def is_label_table(path: str | Path) -> bool:
    """Whether a file is called as label tables are."""
    return Path(path).suffix.lower() in _PARSERS


def same_name(text: str, names: Iterable[str]) -> str:
    """The one of names that is the same, else the only one that is but for case and what stands
    between its words; '' where there is none or are several.
    """
    every = list(names)
    if text in every:
        return text
    same = [name for name in every if _loosely(name) == _loosely(text)]
    return same[0] if len(same) == 1 else ""


def _loosely(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", name.lower()))


def _mirrored(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_OTHER_SIDE.get(word, word) for word in words)


#: Colours that stay apart for eyes without red or green cones, too: chosen one after the other as
#: far as can be from those before, in CIELAB as such eyes see it (Machado, Oliveira and Fernandes
#: 2009, doi:10.1109/TVCG.2009.113). Any two of the first twelve are 25 or more apart.
_PALETTE = (
    "0fc3a5", "9600ff", "f0e100", "b41e00", "3c5a96", "c3f096", "c3a5ff", "963c4b",
    "d2961e", "2dffff", "78a55a", "c35aff", "0f8796", "a5f0c3", "9600c3", "e1f069",
    "8778d2", "a5c35a", "4b782d", "e178c3", "d26978", "c32d78", "ff003c", "78d287",
)  # fmt: skip


def _distinct_color(value: int) -> tuple[int, int, int]:
    if 1 <= value <= len(_PALETTE):
        red, green, blue = bytes.fromhex(_PALETTE[value - 1])
        return red, green, blue
    # Steps of the golden ratio around the colour circle never come close to each other; brightness
    # alternates.
    hue = value * 0.618033988749895 % 1
    shares = colorsys.hsv_to_rgb(hue, 0.75 - 0.25 * (value % 2), 0.95 - 0.2 * (value // 2 % 2))
    red, green, blue = (round(share * 255) for share in shares)
    return red, green, blue


def _color_part(text: str) -> int:
    number = decimal_number(text)
    if not number.is_integer():
        raise ValueError(f"the colour '{text}' is not a whole number from 0 to 255")
    return int(number)


def _parse_csv(text: str) -> list[Label]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = list(rows.fieldnames or [])
    # Slicer's tables of models call their codes as DICOM does, and leave colours to Slicer.
    of_dicom = any(f"{prefix}.CodeValue" in names for prefix in _DICOM_COLUMNS.values())
    colored = "Color_R" in names or not of_dicom
    missing = [column for column in _COLUMNS[: 5 if colored else 2] if column not in names]
    if missing:
        raise ValueError(f"the column '{missing[0]}' is missing")
    labels = []
    for row in rows:
        if None in row.values() or None in row:
            raise ValueError(
                f"line {rows.line_num} does not have as many columns as the first line"
            )
        with _line(rows.line_num):
            value = whole_number(row["LabelValue"])
            color = _distinct_color(value)
            if colored:
                color = _color(*(row[f"Color_{part}"] for part in "RGB"))
        codes = {
            field: _code(row, prefix) or _dicom_code(row, _DICOM_COLUMNS[field])
            for field, prefix in _CODE_COLUMNS.items()
        }
        labels.append(Label(value, from_cell(row["Name"].strip()), color, **codes))
    return labels


def _code(row: dict[str, str], prefix: str) -> Code | None:
    code = Code(*(from_cell(row.get(f"{prefix}_{part}", "").strip()) for part in _CODE_PARTS))
    return code if code.value else None


def _dicom_code(row: dict[str, str], prefix: str) -> Code | None:
    parts = ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")
    code = Code(*(from_cell(row.get(f"{prefix}.{part}", "").strip()) for part in parts))
    return code if code.value else None


def _format_csv(labels: tuple[Label, ...]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(_COLUMNS)
    rows.writerow([0, "Background", 0, 0, 0, 0] + [""] * (len(_COLUMNS) - 6))
    for label in labels:
        codes = [part for field in _CODE_COLUMNS for part in getattr(label, field) or ("", "", "")]
        rows.writerow([label.value, to_cell(label.name), *label.color, 255, *map(to_cell, codes)])
    return out.getvalue()


@contextmanager
def _line(number: int) -> Iterator[None]:
    """What is wrong inside is wrong with this line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _color(red: str, green: str, blue: str) -> tuple[int, int, int]:
    color = _color_part(red), _color_part(green), _color_part(blue)
    if not all(0 <= part <= 255 for part in color):
        raise ValueError(f"the colour {red} {green} {blue} is not three numbers from 0 to 255")
    return color


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a table that are neither empty nor a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _parse_ctbl(text: str) -> list[Label]:
    labels = []
    for number, line in _rows(text):
        words = line.split()
        with _line(number):
            if len(words) not in (5, 6):
                raise ValueError("it is not 'value name R G B A'")
            # Slicer writes blanks in names as underscores and reads them back as blanks.
            name = words[1].replace("_", " ")
            labels.append(Label(whole_number(words[0]), name, _color(*words[2:5])))
    return labels


def _format_ctbl(labels: tuple[Label, ...]) -> str:
    lines = ["# Color table file", "0 Background 0 0 0 0"]
    for label in labels:
        red, green, blue = label.color
        name = "_".join(harmless(label.name).split())
        lines.append(f"{label.value} {name} {red} {green} {blue} 255")
    return "\n".join(lines) + "\n"


def _parse_txt(text: str) -> list[Label]:
    """FreeSurfer's lookup table; or one of the others that are called .txt too."""
    if text.startswith("# Color table file"):
        return _parse_ctbl(text)
    first = next((line for _, line in _rows(text)), "")
    if '"' in first:
        return _parse_label(text)
    has_blanks = text.startswith(_WITH_BLANKS)
    labels: dict[int, Label] = {}
    for number, line in _rows(text):
        words = line.partition(" #")[0].split()
        with _line(number):
            if len(words) not in (5, 6, 7):  # 7: with the type of tissue
                raise ValueError("it is not 'value name R G B A'")
            name = words[1].replace("_", " ") if has_blanks else words[1]
            label = Label(whole_number(words[0]), name, _color(*words[2:5]))
            _add(labels, label)
    return list(labels.values())


def _add(labels: dict[int, Label], label: Label) -> None:
    """Add a line of a table that other programs maintain: the same again is no harm, and a value
    that no label map holds is of no use.
    """
    if label.value > MAX_VALUE:
        return
    if labels.setdefault(label.value, label) != label:
        raise ValueError(f"the value {label.value} is there twice, with another name or colour")


#: The first line of a table in FreeSurfer's form whose names had blanks, which it cannot hold.
_WITH_BLANKS = "# Blanks in names are written as underscores."


def _format_txt(labels: tuple[Label, ...]) -> str:
    names = [" ".join(harmless(label.name).split()) for label in labels]
    blanks = any(" " in name for name in names)
    # Where some names have underscores of their own, hyphens stand for blanks, as in FreeSurfer.
    is_marked = blanks and not any("_" in name for name in names)
    lines = [_WITH_BLANKS] if is_marked else []
    lines += [f"#No. {'Label Name:':<48}R   G   B   A", f"{0:<5}{'Unknown':<48}0   0   0   0"]
    for label, name in zip(labels, names):
        red, green, blue = label.color
        told = name.replace(" ", "_" if is_marked else "-")
        # The last number is 0 in all of FreeSurfer's tables, and means that nothing shines through.
        lines.append(f"{label.value:<5} {told:<47} {red:<3} {green:<3} {blue:<3} 0")
    return "\n".join(lines) + "\n"


_ITKSNAP = re.compile(r'(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s+([01])\s+([01])\s+"(.*)"')


def _parse_label(text: str) -> list[Label]:
    labels: dict[int, Label] = {}
    for number, line in _rows(text):
        match = _ITKSNAP.fullmatch(line)
        with _line(number):
            if match is None:
                raise ValueError("it is not 'value R G B A visible mesh \"name\"'")
            decimal_number(match[5])
            color = _color(match[2], match[3], match[4])
            _add(labels, Label(whole_number(match[1]), match[8].strip(), color))
    return list(labels.values())


def _format_label(labels: tuple[Label, ...]) -> str:
    rule = "#" * 48
    lines = [
        rule,
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        rule,
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for label in labels:
        red, green, blue = label.color
        name = " ".join(harmless(label.name).replace('"', "'").split())
        lines.append(
            f'{label.value:>5}   {red:>3}  {green:>3}  {blue:>3}        1  1  1    "{name}"'
        )
    return "\n".join(lines) + "\n"


def _parse_tsv(text: str) -> list[Label]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    for column in ("index", "name"):
        if column not in (rows.fieldnames or []):
            raise ValueError(f"the column '{column}' is missing")
    labels = []
    for row in rows:
        if row["index"] is None or row["name"] is None:
            raise ValueError(
                f"line {rows.line_num} does not have as many columns as the first line"
            )
        with _line(rows.line_num):
            value, color = whole_number(row["index"]), row.get("color") or ""
            if color in ("", "n/a"):
                parts = _distinct_color(value)
            elif re.fullmatch("#[0-9a-fA-F]{6}", color):
                parts = (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16))
            else:
                raise ValueError(f"the colour '{color}' is not of the form #rrggbb")
        labels.append(Label(value, from_cell(row["name"].strip()), parts))
    return labels


def _format_tsv(labels: tuple[Label, ...]) -> str:
    lines = ["index\tname\tcolor"]
    for label in labels:
        red, green, blue = label.color
        name = to_cell(" ".join(label.name.split()))
        lines.append(f"{label.value}\t{name}\t#{red:02x}{green:02x}{blue:02x}")
    return "\n".join(lines) + "\n"


_PARSERS = {
    ".csv": _parse_csv,
    ".ctbl": _parse_ctbl,
    ".txt": _parse_txt,
    ".label": _parse_label,
    ".tsv": _parse_tsv,
}
_FORMS = {
    ".csv": _format_csv,
    ".ctbl": _format_ctbl,
    ".txt": _format_txt,
    ".label": _format_label,
    ".tsv": _format_tsv,
}
