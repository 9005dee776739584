"""Label maps beside their references: matched by name, laid on one grid, their structures named."""

from __future__ import annotations

import glob
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.errors import BadConfig, BadFile, BadGeometry, DataWarning
from medseg.evaluation.reading import (
    MASK_FOLDER,
    MaskedCases,
    files_of_volumes,
    masked_cases,
    table_of_masks,
)
from medseg.files import read_text
from medseg.io import (
    embedded_table,
    holds_names,
    read_labels,
    strip_suffix,
)
from medseg.labels import LabelTable, is_label_table, structure_value
from medseg.text import harmless, whole_number
from medseg.volume import Volume, describe_grid, resample, turned_onto

#: Endings that predictions and references of one case may differ by.
NAME_ENDINGS = ("_seg", "_dseg", "_labels", "_label", "_mask", "_gt", "_pred")


#: A number at the end of a name as channels have it: CASE_0000.
_NUMBERED = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


def match_cases(
    reference: str | Path, prediction: str | Path, masked: MaskedCases | None = None
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """Pairs of files by case name, sorted; cases without a prediction; cases without a reference.

    Two files are one pair whatever their names, and so are two single cases. masked: which folders
    are cases, because they hold a mask of each structure. Raises `BadFile` for folders without a
    pair and for two files of one folder that could be the same case.
    """
    reference, prediction = Path(reference), Path(prediction)
    for path in (reference, prediction):
        if not path.exists():
            raise BadFile(f"{path}: there is no such file or folder")
    sides = [_cases_of(reference, masked.reference if masked else {})]
    sides.append(_cases_of(prediction, masked.prediction if masked else {}))
    if all(side.is_single for side in sides):
        (case, file), (_, other) = (next(iter(side.cases.items())) for side in sides)
        return {case: (file, other)}, [], []
    if any(side.is_single for side in sides):
        raise BadFile(f"{reference} and {prediction}: give two files or two folders")
    ours, theirs = sides[0].cases, sides[1].cases
    _rename_certain(ours, theirs)
    pairs = {case: (ours[case], theirs[case]) for case in sorted(ours.keys() & theirs.keys())}
    if not pairs:
        raise BadFile(
            f"{reference} and {prediction}: no two files have the same case name "
            f"({len(ours)} and {len(theirs)} label maps were found{_example(ours, theirs)})"
        )
    return pairs, sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())


class _Side(NamedTuple):
    """The cases of one side; whether it is a single one, so that its name does not matter."""

    cases: dict[str, Path]
    is_single: bool


def _cases_of(path: Path, masked: Mapping[str, Path]) -> _Side:
    if not path.is_dir():
        return _Side({case_name(path): path}, True)
    if masked:
        folders = dict(masked)
        return _Side(
            folders, any(folder in (path, path / MASK_FOLDER) for folder in folders.values())
        )
    return _Side(_cases_in(path), False)


def _rename_certain(ours: dict[str, Path], theirs: dict[str, Path]) -> None:
    """Give cases of one side the names they have on the other, where that is the only possibility.

    CASE_0000 is CASE if no other number of it is there and nothing else is called CASE: the number
    is a channel's. And CASE_IMAGE, the result of an image in a case's folder, is the case that has
    such an image beside its masks.
    """
    for one, other in ((ours, theirs), (theirs, ours)):
        numbers = Counter(match["case"] for name in one if (match := _NUMBERED.fullmatch(name)))
        for name in sorted(set(one) - set(other)):
            match = _NUMBERED.fullmatch(name)
            if match and match["number"] == "0000" and numbers[match["case"]] == 1:
                _rename(one, other, name, new=match["case"])
        for case, folder in list(one.items()):
            if folder.name == MASK_FOLDER:
                for image in files_of_volumes(folder.parent):
                    _rename(other, one, f"{case}_{strip_suffix(image)}", new=case)


def _rename(cases: dict[str, Path], other: Mapping[str, Path], name: str, new: str) -> None:
    if name in cases and name not in other and new in other and new not in cases:
        cases[new] = cases.pop(name)


def _example(ours: Mapping[str, Path], theirs: Mapping[str, Path]) -> str:
    """A name of each side, for a message."""
    names = [repr(min(side)) for side in (ours, theirs) if side]
    return f", such as {' and '.join(names)}" if names else ""


def numbered(
    scans: Mapping[str, Path],
    pairs: Mapping[str, tuple[Path, Path]],
    missing: list[str],
    extra: list[str],
) -> tuple[dict[str, Path], dict[str, tuple[Path, Path]], list[str], list[str]]:
    """The scans of cases, and what `match_cases` found, with numbers in the order of the names
    instead of names.
    """
    names = sorted([*pairs, *missing, *extra])
    numbers = {name: f"case {n:0{len(str(len(names)))}d}" for n, name in enumerate(names, start=1)}
    return (
        {numbers[name]: scan for name, scan in scans.items()},
        {numbers[name]: paths for name, paths in pairs.items()},
        [numbers[m] for m in missing],
        [numbers[e] for e in extra],
    )


def without_names(text: str, reference: Path, prediction: Path) -> str:
    """An error with other words for the files, whose paths have no place in results."""
    return text.replace(str(reference), "the reference").replace(str(prediction), "the prediction")


def case_name(path: str | Path) -> str:
    """The name of a file without its suffix and one of `NAME_ENDINGS`."""
    name = strip_suffix(path)
    ending = next(
        (
            ending
            for ending in NAME_ENDINGS
            if name.lower().endswith(ending) and len(name) > len(ending)
        ),
        "",
    )
    return name[: len(name) - len(ending)]


def _cases_in(folder: Path) -> dict[str, Path]:
    cases: dict[str, Path] = {}
    for path in files_of_volumes(folder):
        case = case_name(path)
        if case in cases:
            raise BadFile(
                f"{folder}: {cases[case].name} and {path.name} could both be case '{case}'; keep"
                " one of them"
            )
        cases[case] = path
    return cases


def parse_structures(text: str, table: LabelTable | None = None) -> dict[str, tuple[int, ...]]:
    """Structures from "1,2", "liver=1,tumour=1+2+3" or names of `table`. Raises `BadConfig`."""
    names = scored_names(table) if table else {}
    values = {name: value for value, name in names.items()}
    structures: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, union = (piece.strip() for piece in part.partition("="))
        try:
            parts = (union if equals else name).split("+")
            labels = tuple(values[one] if one in values else _value(one, table) for one in parts)
        except ValueError:
            raise BadConfig(
                f"'{part.strip()}' is no structure; write 3, liver=1 or tumour=1+2+3"
            ) from None
        except BadConfig as error:
            raise BadConfig(f"'{part.strip()}': {error}") from None
        if not all(0 <= label <= 65_535 for label in labels):
            raise BadConfig(f"'{part.strip()}' has a label that is not 0 to 65535")
        if not equals and len(labels) == 1:
            name = names.get(labels[0], f"label {labels[0]}")
        if name in structures:
            raise BadConfig(f"the structure '{name}' is given twice")
        structures[name] = labels
    return structures


def scored_names(table: LabelTable) -> dict[int, str]:
    """What scores call each value of a table: its name, with the value behind where several have
    one name.
    """
    names = table.names
    counts = Counter(names.values())
    return {
        value: f"{name} ({value})" if counts[name] > 1 else name for value, name in names.items()
    }


def _value(text: str, table: LabelTable | None) -> int:
    """The value that a number or a name stands for. Raises `ValueError`, `BadConfig`."""
    try:
        return whole_number(text)
    except ValueError:
        if table is None or not text:
            raise
    return table.value_of(text)


def on_grid_of(
    reference: Volume, prediction: Volume, may_resample: bool = False
) -> tuple[Volume, str]:
    """The prediction on the reference's grid, and what was done to it in words ("" for nothing).

    The same grid stored along other axes is turned, which loses nothing. Raises `BadGeometry`
    naming both grids if they differ, unless nearest-neighbour resampling was asked for.
    """
    volume = turned_onto(prediction, reference)
    if volume is prediction:
        return prediction, ""
    if volume is not None:
        note = (
            f"the prediction is stored as {prediction.orientation}; it was turned to"
            f" {reference.orientation}"
        )
        return volume, f"{note} without loss"
    grids = (
        f"the prediction has {describe_grid(prediction)}, the reference {describe_grid(reference)}"
    )
    if not may_resample:
        raise BadGeometry(
            f"{grids}; these are different grids, and --resample compares them nevertheless"
        )
    on_grid = resample(prediction, reference.affine, reference.shape, order=0)
    return on_grid, f"{grids}; the prediction was resampled to the nearest voxel"


def find_table(path: str | Path | None, reference: Path, prediction: Path) -> LabelTable | None:
    """The label table at `path`; or else what the references or predictions come with, or none.

    These are the names that a single .seg.nrrd or DICOM file holds, labels.csv in their folder, and
    the tables that `medseg infer` writes beside its results if they all say the same. Where
    references and predictions are folders with a mask of each structure, they are the names of the
    masks, numbered in their order as for training.
    """
    if path is not None:
        return LabelTable.read(path)
    for place in (reference, prediction):
        if (embedded := embedded_table(place)) is not None:
            return embedded
        folder, pattern = (
            (place, "*.labels.csv")
            if place.is_dir()
            else (place.parent, f"{strip_suffix(place)}.labels.csv")
        )
        if (folder / "labels.csv").is_file():
            return LabelTable.read(folder / "labels.csv")
        files = sorted(
            file for file in folder.glob(glob.escape(pattern) if place.is_file() else pattern)
        )
        if files and len({read_text(file) for file in files}) == 1:
            return LabelTable.read(files[0])
    if reference.is_dir() and prediction.is_dir():
        masks = masked_cases(reference, prediction, None)
        if masks.sides == 2:
            return table_of_masks(masks.names, None)
    return None


def table_for(path: Path, target: Path) -> LabelTable | None:
    """The label table that lies beside a label map without one in itself, if the format of `target`
    holds names; else None. Warns with `DataWarning` of a file of that name that is none.
    """
    if not holds_names(target) or embedded_table(path) is not None:
        return None
    try:
        return find_table(None, path, path)
    except (BadConfig, BadFile) as error:  # nobody asked for it
        warnings.warn(f"{error}; names are left out", DataWarning, stacklevel=2)
        return None


def table_in(path: Path) -> LabelTable:
    """The label table that a file is, or holds, or that lies beside a label map. Raises
    `BadFile`.
    """
    if is_label_table(path):
        return LabelTable.read(path)
    table = find_table(None, path, path)
    if table is None and not path.exists():
        raise BadFile(f"{path}: there is no such file; check the name")
    if table is None:
        raise BadFile(f"{path}: holds no label table, and none lies beside it; give one")
    return table


def chosen_labels(
    path: Path,
    names: Sequence[str],
    table: LabelTable | None = None,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    option: str = "segment",
) -> tuple[Volume, LabelTable | None]:
    """The structures of a plain label map that are named, by a table or by what lies beside it, and
    that table. Raises `BadConfig` for one that it has not; option: how its message calls `names`.
    """
    labels = read_labels(path, volume_index=volume_index, assume_geometry=assume_geometry)
    table = table or find_table(None, path, path)
    values = [structure_value(name, table, option) for name in names]
    for name, value in zip(names, values):
        if not (labels.data == value).any():
            raise BadConfig(f"{path}: holds no voxel of {harmless(name)}; leave it out")
    kept = np.where(np.isin(labels.data, values), labels.data, labels.data.dtype.type(0))
    return labels.with_data(kept), table


def listed(names: Iterable[object]) -> str:
    """Names with commas between them."""
    return ", ".join(str(name) for name in names)
