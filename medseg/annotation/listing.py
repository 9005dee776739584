"""cases.csv of a data set that grows: a line for each scan, and what ids, tags and channels are
called.

It is a manifest as `medseg.dataset` reads one: case, a column for each channel, label, split, group
and labelled. Beside these it says what the final label holds, what split a scan is planned for once
it has one, and where labels under other tags lie. Columns of people stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from medseg.dataset import SPLIT_WORDS
from medseg.errors import BadConfig, BadFile
from medseg.files import atomic_write, read_text
from medseg.text import harmless, is_reserved

#: What there is of each channel: a file, or a volume.
Part = TypeVar("Part")
#: The file that says which scans there are.
LIST = "cases.csv"
#: The tag of labels that are trained with, and of what a model proposed.
FINAL, ORIGINAL = "final", "original"
#: What a scan is for. AUTO: some of those that get labels validate, as `settled_split` says.
AUTO = "auto"
SPLITS = (AUTO, "train", "val", "test")
#: One of so many labelled scans validates.
_VALIDATES = 5
_ID = re.compile(r"[^\W_][\w .+-]*")
#: Bytes of an id, so that names of files made from it fit every file system.
_MOST_BYTES = 150
_TAG = re.compile(r"[a-z][a-z0-9_]{0,31}")
_CHANNEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+-]{0,31}")
_OF_A_TAG = "label_"
_COLUMNS = ("case", "label", "split", "group", "labelled", "holds", "planned_split")


@dataclass(frozen=True, kw_only=True)
class StoredCase:
    """One scan of a data set that grows.

    images: a file per channel. labels: tag to file. split: 'train', 'val' or 'test', what it is
    once it has a final label, and 'auto' where that is settled then. group: the patient, '' where
    nobody said. annotated: the values that were looked for in its final label; others may be there
    unlabelled. holds: those found. more: what stands in further columns of its line.
    """

    id: str
    images: tuple[Path, ...]
    labels: Mapping[str, Path] = field(default_factory=dict)
    split: str = AUTO
    group: str = ""
    annotated: tuple[int, ...] = ()
    holds: tuple[int, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """'final' with a label to train with, 'proposed' with another one, or 'unlabelled'."""
        return "final" if FINAL in self.labels else "proposed" if self.labels else "unlabelled"


def check_id(text: str) -> str:
    """An id in its one spelling (NFC). Raises `BadConfig` for what is none, a path above all."""
    name = unicodedata.normalize("NFC", text)
    if not _ID.fullmatch(name) or name[-1] in " ." or len(name.encode()) > _MOST_BYTES:
        raise BadConfig(
            f"'{harmless(text):.60}' is no id: one begins with a letter or digit and holds letters,"
            f" digits, blanks and . _ + -, at most {_MOST_BYTES} bytes"
        )
    if is_reserved(name):  # everywhere, so that a data set can be copied
        raise BadConfig(f"'{name}' is no id: Windows keeps this name for a device; give another")
    return name


def stem_of(case_id: str) -> str:
    """What files of a scan are called. A list that people wrote may have ids such as sub-1/ses-1,
    which name no file.
    """
    with suppress(BadConfig):
        return check_id(case_id)
    plain = re.sub(r"[^\w +-]+", "_", case_id).strip("_ +-")[:60].strip() or "scan"
    return f"_{plain}" if is_reserved(plain) else plain


def check_tag(tag: str) -> None:
    """Raise `BadConfig` for what is no tag of a label."""
    if not _TAG.fullmatch(tag):
        raise BadConfig(f"'{harmless(tag):.40}' is no tag; one is like final or original")


def check_split(split: str) -> None:
    """Raise `BadConfig` for what is no split."""
    if split not in SPLITS:
        raise BadConfig(f"'{harmless(split):.40}' is no split; use {', '.join(SPLITS)}")


def check_channels(names: Sequence[str]) -> None:
    """Raise `BadConfig` for channels without distinct plain names."""
    plain = [name for name in names if _CHANNEL.fullmatch(name)]
    if not names or plain != list(names) or len({one.casefold() for one in names}) != len(names):
        raise BadConfig(
            f"the channels {', '.join(map(harmless, names)) or 'of nothing'} are no distinct plain"
            " names; use such as T1 and FLAIR"
        )


def in_order(parts: Sequence[Part], channels: Sequence[str], wanted: Sequence[str]) -> list[Part]:
    """A part for each channel, in the order in which somebody wants the channels: where both name
    the same ones, in any case, by name; else as they are.
    """
    have, want = ([name.casefold() for name in names] for names in (channels, wanted))
    if sorted(have) != sorted(want) or len(parts) != len(have):
        return list(parts)
    return [parts[have.index(name)] for name in want]


def settled_split(case: StoredCase, others: Iterable[StoredCase]) -> str:
    """What a scan that has just got its final label is for: 'train' or 'val', if nobody said.

    The second one and then one of five validate, for good, so that no model of any round has ever
    trained with them; but only if the scans to train with hold all that it holds. Scans of one
    patient are for the same.
    """
    if case.split != AUTO:
        return case.split
    labelled = [one for one in others if FINAL in one.labels and one.id != case.id]
    same = [one.split for one in labelled if case.group and one.group == case.group]
    if same:
        return same[0]
    training = [one for one in labelled if one.split == "train"]
    validating = sum(one.split == "val" for one in labelled)
    is_due = validating < max(1, (len(training) + validating + 1) // _VALIDATES)
    learnt = {value for one in training for value in one.holds}
    return "val" if training and is_due and set(case.holds) <= learnt else "train"


def read_channels_of(folder: Path) -> tuple[str, ...]:
    """The names of the channels, in order. Raises `BadFile`."""
    columns = _image_columns(_rows(folder / LIST)[0])
    return tuple(one.removeprefix("image_") for one in columns)


def read_list(folder: Path) -> dict[str, StoredCase]:
    """Every scan by its id, in the order of the lines. Raises `BadFile`."""
    path = folder / LIST
    rows = _rows(path)
    columns = _image_columns(rows[0])
    cases: dict[str, StoredCase] = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):  # as a table's program leaves at the end
            continue
        cells = {key: cell.strip() for key, cell in zip(rows[0], row)}
        if len(row) != len(rows[0]) or not cells["case"] or not cells[columns[0]]:
            raise BadFile(f"{path}: line {number} is not complete; correct it")
        if cells["case"] in cases:
            raise BadFile(f"{path}: line {number} names {cells['case']} again; remove one")
        cases[cells["case"]] = _case_of(folder, cells, columns)
    return cases


def write_list(folder: Path, channels: Sequence[str], cases: Iterable[StoredCase]) -> None:
    """Replace cases.csv in one step. Raises `BadOutput`."""
    rows = list(cases)
    images = [("image" if name == "image" else f"image_{name}") for name in channels]
    tags = sorted({tag for one in rows for tag in one.labels} - {FINAL})
    more = list(dict.fromkeys(key for one in rows for key in one.more))
    out = io.StringIO()
    table = csv.DictWriter(
        out,
        [_COLUMNS[0], *images, *_COLUMNS[1:], *(_OF_A_TAG + tag for tag in tags), *more],
        restval="",
        lineterminator="\n",
    )
    table.writeheader()
    table.writerows(_cells_of(folder, one, images) for one in rows)
    with atomic_write(folder / LIST) as file:
        file.write(out.getvalue().encode())


def _case_of(folder: Path, cells: Mapping[str, str], columns: Sequence[str]) -> StoredCase:
    files = {FINAL: cells["label"], **_of_other_tags(cells)}
    own = {*_COLUMNS, *columns, *(_OF_A_TAG + tag for tag in files)}
    return StoredCase(
        id=cells["case"],
        images=tuple(folder / cells[column] for column in columns if cells[column]),
        labels={tag: folder / name for tag, name in files.items() if name},
        split=_split_of(cells) or ("train" if cells["label"] else AUTO),
        group=cells.get("group", ""),
        annotated=_numbers(cells.get("labelled", "")),
        holds=_numbers(cells.get("holds", "")),
        more={key: value for key, value in cells.items() if key not in own},
    )


def _split_of(cells: Mapping[str, str]) -> str:
    """What a scan is for, in our words; '' where nothing says it. A manifest may say it in others,
    such as 'validation'.
    """
    text = next((cells[one] for one in ("planned_split", "split") if cells.get(one)), "").lower()
    return SPLIT_WORDS.get(text, text)


def _of_other_tags(cells: Mapping[str, str]) -> dict[str, str]:
    """Tag to file, '' for none."""
    tags = {key: key.removeprefix(_OF_A_TAG) for key in cells if key.startswith(_OF_A_TAG)}
    return {tag: cells[key] for key, tag in tags.items() if _TAG.fullmatch(tag)}


def _cells_of(folder: Path, case: StoredCase, images: Sequence[str]) -> dict[str, str]:
    def name(path: Path) -> str:
        inside = path.is_relative_to(folder)
        return (path.relative_to(folder) if inside else path).as_posix()

    labels = {tag: name(path) for tag, path in case.labels.items()}
    return {
        "case": case.id,
        **{column: name(path) for column, path in zip(images, case.images)},
        "label": labels.pop(FINAL, ""),
        # Who has no label must not be trained with; a manifest says so by this word.
        "split": case.split if FINAL in case.labels else "test",
        "group": case.group,
        "labelled": " ".join(map(str, case.annotated)),
        "holds": " ".join(map(str, case.holds)),
        "planned_split": case.split,
        **{_OF_A_TAG + tag: path for tag, path in labels.items()},
        **case.more,
    }


def _rows(path: Path) -> list[list[str]]:
    """The lines of the list, its head first. Raises `BadFile`."""
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise BadFile(f"{path}: cannot be read as a list of cases: {error}") from None
    if not rows or not {"case", "label"} <= set(rows[0]) or not _image_columns(rows[0]):
        raise BadFile(
            f"{path}: is not the list of a data set that grows; its first line must name the"
            " columns case, image and label"
        )
    return rows


def _image_columns(columns: Sequence[str]) -> list[str]:
    return [one for one in columns if one == "image" or one.startswith("image_")]


def _numbers(text: str) -> tuple[int, ...]:
    parts = re.split(r"[\s,;]+", text)
    return tuple(int(part) for part in parts if part.isascii() and part.isdigit())
