"""Label maps as they are scored: a file, or a folder with a mask of each structure (as
TotalSegmentator has them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medseg.dataset import Case, read_case_labels
from medseg.errors import BadConfig, BadFile
from medseg.io import (
    SeveralVolumes,
    describe_no_dicom,
    is_readable_name,
    read_as_stored,
    read_labels,
    strip_suffix,
)
from medseg.labels import MAX_VALUE, Label, LabelTable
from medseg.volume import Volume

#: The folder of a case that holds its masks, in TotalSegmentator's data sets.
MASK_FOLDER = "segmentations"
#: More volumes than this are not looked at to say what they are.
_MOST_CLASSES = 256


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """How the label maps of an evaluation are read.

    values: of each structure's name the value it gets in a map that is put together from masks.
    volume_index: which volume of a file that holds several.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    volume_index: int | None = None

    def read(self, path: Path) -> Volume:
        """The label map of a file, or of a folder of masks, put together as for training: later
        ones over earlier.

        Raises `BadFile`.
        """
        if not path.is_dir():
            return read_label_map(path, self.volume_index)
        masks = masks_in(path)
        if not masks:
            raise BadFile(f"{path}: holds no masks")
        pairs = tuple(sorted((self.values[name], file) for name, file in masks.items()))
        first = read_labels(pairs[0][1])
        case = Case(name=path.name, images=(pairs[0][1],), label=None, masks=pairs)
        return read_case_labels(case, first)


def read_label_map(path: str | Path, volume_index: int | None = None) -> Volume:
    """A label map from a file. Raises `BadFile`, in words that fit what was found instead.

    volume_index: which volume, where the file holds several; a file of one volume needs none.
    """
    try:
        return read_labels(path)
    except SeveralVolumes as several:
        if volume_index is not None:
            return read_labels(path, volume_index=volume_index)
        if not _look_like_classes(path, several.count):
            raise
        raise BadFile(
            f"{path}: holds {several.count} volumes that look like a mask or probability of each"
            " class, and a label map is one volume; make one of them first, in which the largest"
            " value wins (numpy.argmax over the volumes), or choose one with --volume N"
        ) from None


def refuse_folder(path: Path) -> None:
    """Raise `BadFile` for a folder that holds no DICOM, where one label map is meant."""
    if path.is_dir() and (content := describe_no_dicom(path)):
        raise BadFile(f"{path}: is a folder, which holds {content}; give one label map at a time")


def _look_like_classes(path: str | Path, count: int) -> bool:
    """Whether every value of all volumes lies between 0 and 1, as of masks and of probabilities."""
    if count > _MOST_CLASSES:
        return False
    for index in range(count):
        data = read_as_stored(path, volume_index=index).data
        # Also where one is no number.
        if not data.size or not (data.min() >= 0 and data.max() <= 1 + 1e-6):
            return False
    return True


# Folders of masks ---------------------------------------------------------------------------------


def masks_in(folder: Path) -> dict[str, Path]:
    """The masks in a folder by the names of their structures, sorted. Raises `BadFile` for two of
    one name.
    """
    masks: dict[str, Path] = {}
    for path in files_of_volumes(folder):
        name = strip_suffix(path)
        if name in masks:
            raise BadFile(
                f"{folder}: {masks[name].name} and {path.name} are masks of one structure; keep one"
                " of them"
            )
        masks[name] = path
    return dict(sorted(masks.items()))


def files_of_volumes(folder: Path) -> list[Path]:
    """The files in a folder that a reader takes, sorted; hidden ones are none of them."""
    paths = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in paths if is_readable_name(path) and path.is_file()]


def mask_folders(path: Path) -> dict[str, Path]:
    """Folders that may hold a mask of each structure, by case; none where the folder itself holds
    label maps.

    A case's folder with `segmentations` in it holds them there, and so does the path itself if it
    is a case.
    """
    if not path.is_dir():
        return {}
    if (path / MASK_FOLDER).is_dir():
        return {path.resolve().name: path / MASK_FOLDER}
    if files_of_volumes(path):
        return {}
    inside = sorted(
        inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith(".")
    )
    return {
        inner.name: inner / MASK_FOLDER if (inner / MASK_FOLDER).is_dir() else inner
        for inner in inside
    }


@dataclass(frozen=True, kw_only=True)
class MaskedCases:
    """The cases of both sides that are folders of masks, by name, and the structures these are
    named after.
    """

    reference: dict[str, Path]
    prediction: dict[str, Path]
    names: set[str]

    @property
    def sides(self) -> int:
        """How many of the two sides are folders of masks."""
        return bool(self.reference) + bool(self.prediction)


def masked_cases(reference: Path, prediction: Path, table: LabelTable | None) -> MaskedCases:
    """The folders of masks among references and predictions.

    Certain are folders called `segmentations`. Others hold masks if their files are named like
    structures that are known: from those, from the table, or because both sides have files of these
    names. `prediction` may also be a single folder of masks, or `reference`, where the other side
    is a single case.
    """
    sides = [mask_folders(reference), mask_folders(prediction)]
    for number, (path, other) in enumerate(((reference, prediction), (prediction, reference))):
        is_single = not other.is_dir() or (other / MASK_FOLDER).is_dir()
        if not sides[number] and path.is_dir() and is_single:
            sides[number] = {path.resolve().name: path}
    masks = [{case: masks_in(folder) for case, folder in side.items()} for side in sides]
    certain: set[str] = set(table.names.values()) if table else set()
    possible: list[set[str]] = [set(), set()]
    for number, side in enumerate(sides):
        for case, folder in side.items():
            (certain if folder.name == MASK_FOLDER else possible[number]).update(
                masks[number][case]
            )
    structures = certain | (possible[0] & possible[1])
    folders = [
        {
            case: folder
            for case, folder in side.items()
            if folder.name == MASK_FOLDER or structures & set(masks[number][case])
        }
        for number, side in enumerate(sides)
    ]
    names = {
        name for number, side in enumerate(folders) for case in side for name in masks[number][case]
    }
    return MaskedCases(reference=folders[0], prediction=folders[1], names=names)


def table_of_masks(names: Iterable[str], table: LabelTable | None) -> LabelTable:
    """A value for each structure that masks are named after: that of the table, or else, as for
    training, counted in the order of the names; what a table does not know comes after it. Raises
    `BadConfig` for too many.
    """
    labels = list(table.labels) if table else []
    table_names = {label.name for label in labels}
    first = max((label.value for label in labels), default=0) + 1
    values = dict(enumerate(sorted(set(names) - table_names), first))
    if max(values, default=0) > MAX_VALUE:
        raise BadConfig("there are more structures than a label map can hold values")
    colors = LabelTable.from_values(values)
    labels += [
        Label(value=value, name=name, color=colors[value].color) for value, name in values.items()
    ]
    return LabelTable(tuple(labels))
