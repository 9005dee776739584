"""Label maps beside their references: matched by name, laid on one grid, their structures named."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from medseg.errors import BadConfig, BadFile, BadGeometry
from medseg.files import read_text
from medseg.io import is_readable_name, is_slicer_segmentation, read_table, strip_suffix
from medseg.labels import LabelTable
from medseg.plain_text import whole_number
from medseg.volume import Volume, describe_grid, resample, turned_onto

#: Endings that predictions and references of one case may differ by.
NAME_ENDINGS = ("_seg", "_dseg", "_labels", "_label", "_mask", "_gt", "_pred")


def match_cases(
    reference: str | Path, prediction: str | Path
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """Pairs of files by case name, sorted; cases without a prediction; cases without a reference.

    Two files are one pair whatever their names. Raises `BadFile` for folders without a pair and for two files of one
    folder that could be the same case.
    """
    reference, prediction = Path(reference), Path(prediction)
    for path in (reference, prediction):
        if not path.exists():
            raise BadFile(f"{path}: there is no such file or folder")
    if not reference.is_dir() and not prediction.is_dir():
        return {case_name(reference): (reference, prediction)}, [], []
    if reference.is_dir() != prediction.is_dir():
        raise BadFile(f"{reference} and {prediction}: give two files or two folders")
    ours, theirs = _cases_in(reference), _cases_in(prediction)
    pairs = {case: (ours[case], theirs[case]) for case in sorted(ours.keys() & theirs.keys())}
    if not pairs:
        raise BadFile(
            f"{reference} and {prediction}: no two files have the same case name "
            f"({len(ours)} and {len(theirs)} label maps were found)"
        )
    return pairs, sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())


def numbered(
    pairs: dict[str, tuple[Path, Path]], missing: list[str], extra: list[str]
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """What `match_cases` found, with numbers in the order of the names instead of names."""
    names = sorted([*pairs, *missing, *extra])
    numbers = {name: f"case {n:0{len(str(len(names)))}d}" for n, name in enumerate(names, start=1)}
    return (
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
    ending = next((ending for ending in NAME_ENDINGS if name.lower().endswith(ending) and len(name) > len(ending)), "")
    return name[: len(name) - len(ending)]


def _cases_in(folder: Path) -> dict[str, Path]:
    cases: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not is_readable_name(path):
            continue
        case = case_name(path)
        if case in cases:
            raise BadFile(f"{folder}: {cases[case].name} and {path.name} could both be case '{case}'; keep one of them")
        cases[case] = path
    return cases


def parse_structures(text: str, table: LabelTable | None = None) -> dict[str, tuple[int, ...]]:
    """Structures from "1,2", "liver=1,tumour=1+2+3" or names of `table`. Raises `BadConfig`."""
    names = table.names if table else {}
    values = {name: value for value, name in names.items()}
    structures: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, union = (piece.strip() for piece in part.partition("="))
        try:
            parts = (union if equals else name).split("+")
            labels = tuple(values[one] if one in values else whole_number(one) for one in parts)
        except ValueError:
            raise BadConfig(f"'{part.strip()}' is no structure; write 3, liver=1 or tumour=1+2+3") from None
        if not all(0 <= label <= 65_535 for label in labels):
            raise BadConfig(f"'{part.strip()}' has a label that is not 0 to 65535")
        if not equals and len(labels) == 1:
            name = names.get(labels[0], f"label {labels[0]}")
        if name in structures:
            raise BadConfig(f"the structure '{name}' is given twice")
        structures[name] = labels
    return structures


def on_grid_of(reference: Volume, prediction: Volume, may_resample: bool = False) -> tuple[Volume, str]:
    """The prediction on the reference's grid, and what was done to it in words ("" for nothing).

    The same grid stored along other axes is turned, which loses nothing. Raises `BadGeometry` naming both grids if they
    differ, unless nearest-neighbour resampling was asked for.
    """
    turned = turned_onto(prediction, reference)
    if turned is prediction:
        return prediction, ""
    if turned is not None:
        note = f"the prediction is stored as {prediction.orientation}; it was turned to {reference.orientation}"
        return turned, f"{note} without loss"
    grids = f"the prediction has {describe_grid(prediction)}, the reference {describe_grid(reference)}"
    if not may_resample:
        raise BadGeometry(f"{grids}; these are different grids, and --resample compares them nevertheless")
    moved = resample(prediction, reference.affine, reference.shape, order=0)
    return moved, f"{grids}; the prediction was resampled to the nearest voxel"


def find_table(path: str | Path | None, reference: Path, prediction: Path) -> LabelTable | None:
    """The label table at `path`; or else what the references or predictions come with, or none.

    These are labels.csv in their folder, the tables that `medseg infer` writes beside its results if they all say the
    same, and the segments of a single .seg.nrrd.
    """
    if path is not None:
        return LabelTable.read(path)
    for place in (reference, prediction):
        if is_slicer_segmentation(place):
            return read_table(place)
        folder, pattern = (
            (place, "*.labels.csv") if place.is_dir() else (place.parent, f"{strip_suffix(place)}.labels.csv")
        )
        if (folder / "labels.csv").is_file():
            return LabelTable.read(folder / "labels.csv")
        found = sorted(file for file in folder.glob(glob.escape(pattern) if place.is_file() else pattern))
        if found and len({read_text(file) for file in found}) == 1:
            return LabelTable.read(found[0])
    return None


def listed(names: Iterable[object]) -> str:
    """Names with commas between them."""
    return ", ".join(str(name) for name in names)
