"""`medseg check --fix`: a copy of a dataset in which all is solved whose solution is certain;
nothing else changes.

The layout stays what it is. Cases that are left out are also left out of the files that list them.
The original is only read, and the copy appears whole or not at all.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Case, Dataset
from medseg.dataset.check.cases import SNAP_VOXELS, Check
from medseg.dataset.layouts.lists import names_of_rows
from medseg.dataset.reading import read_dataset
from medseg.errors import BadConfig, BadOutput, DataWarning, MedsegError
from medseg.files import TEMPORARY, atomic_write, read_text
from medseg.io import (
    data_files,
    embedded_table,
    is_readable_name,
    read,
    read_labels,
    strip_suffix,
    write,
)
from medseg.text import read_json
from medseg.volume import Volume, grid_distance_mm, same_grid, tolerance_mm

#: Files beside the scans that are larger than this are no description of the data and are not
#: copied.
_MAX_TEXT_BYTES = 1 << 24
#: Findings that are solved by leaving the case out.
_LEFT_OUT = ("duplicate", "missing", "channels")


def write_fixed(dataset: Dataset, check: Check, out: Path) -> list[str]:
    """Write the corrected copy of a dataset to the new folder `out`; returns a sentence for
    everything done.

    Raises `BadOutput` if `out` is not a place for a new folder, `BadConfig` if the data lies
    outside the dataset's folder.
    """
    folder = dataset.folder.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadOutput(f"{out}: is not an empty folder; --fix writes a copy to a new one")
    if out.resolve().is_relative_to(folder.resolve()):
        raise BadOutput(f"{out}: lies within the dataset; choose a place outside {dataset.folder}")
    if not out.absolute().parent.is_dir():
        raise BadOutput(f"{out}: its folder does not exist; make the folder first")
    temporary = out.absolute().parent / f"{TEMPORARY}{secrets.token_hex(12)}"
    try:
        temporary.mkdir()
        messages = _fill(dataset, check, folder=folder, out=temporary)
        read_dataset(
            temporary / dataset.source.name if _is_list(dataset) and dataset.source else temporary
        )
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        raise BadOutput(f"{out}: cannot be written: {error.strerror or 'unknown reason'}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return messages


def _is_list(dataset: Dataset) -> bool:
    return dataset.layout in ("datalist", "manifest")


def _fill(dataset: Dataset, check: Check, folder: Path, out: Path) -> list[str]:
    """Write the corrected data set into the folder `out`; returns a sentence for everything
    done.
    """
    kinds: dict[str, set[str]] = {}
    exclusions: dict[str, str] = {}
    for finding in check.findings:
        if finding.fixable:
            kinds.setdefault(finding.case, set()).add(finding.kind)
            if finding.kind in _LEFT_OUT:
                exclusions[finding.case] = finding.kind
    messages = [f"{name}: left out ({kind})" for name, kind in sorted(exclusions.items())]
    places = _places(dataset, exclusions, folder=folder, out=out)
    voxels = {
        one for case in (*dataset.cases, *dataset.unlabelled) for one in _voxels_of(_files(case))
    }
    for case in dataset.cases:
        if case.name in kinds and case.name not in exclusions:
            messages += _write_corrected(case, kinds[case.name], places)
    # Of what was written anew the voxels are there.
    root = os.path.normpath(folder)
    places |= {path: out / path.relative_to(root) for path in _voxels_of(places)}
    for path, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, place) if path.is_dir() else shutil.copyfile(path, place)
    for path in _descriptions(folder, without=voxels):
        place = out / path.relative_to(folder)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy_description(path, place, dataset=dataset, dropped=set(exclusions))
    return messages


def _places(
    dataset: Dataset, dropped: Collection[str], *, folder: Path, out: Path
) -> dict[Path, Path]:
    """Every file of the cases that stay -> its place in the copy.

    Raises `BadConfig` if a file of any case lies outside of the data set's folder.
    """
    # By name and not by where links lead: a folder of links to files elsewhere is a dataset, too.
    root = os.path.normpath(folder)
    places: dict[Path, Path] = {}
    for case in (*dataset.cases, *dataset.unlabelled):
        for path in _files(case):
            inner = Path(os.path.normpath(path.absolute()))
            if not inner.is_relative_to(root):
                remedy = "and --fix copies one folder; gather the data first"
                raise BadConfig(f"{path}: lies outside {dataset.folder}, {remedy}")
            if case.name not in dropped:
                places[path] = out / inner.relative_to(root)
    return places


def _voxels_of(files: Iterable[Path]) -> list[Path]:
    """What the headers among some files need beside them: as large as it may be. Of a header that
    cannot be read, which is another finding, all of its name.
    """
    voxels: list[Path] = []
    for path in files:
        header = Path(os.path.normpath(path.absolute()))
        try:
            voxels += data_files(header)
        except MedsegError:
            beside = header.parent.glob(f"{glob.escape(strip_suffix(header))}.*")
            voxels += [one for one in beside if not is_readable_name(one) and one.is_file()]
    return voxels


def _write_corrected(case: Case, kinds: set[str], places: dict[Path, Path]) -> Iterator[str]:
    """Write what of a case needs correction and take it from `places`; a sentence for each file."""
    for path, volume, what in _corrections(case, kinds):
        place = places.pop(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        write(volume, place, table=embedded_table(path))
        yield f"{case.name}: {path.name}: {what}"


def _files(case: Case) -> tuple[Path, ...]:
    return (
        *case.images,
        *((case.label,) if case.label is not None else ()),
        *(mask for _, mask in case.masks),
    )


def _corrections(case: Case, kinds: set[str]) -> Iterator[tuple[Path, Volume, str]]:
    """(file, corrected volume, what was done) of every file of a case that needs it."""
    with warnings.catch_warnings():
        # That a voxel is no number is what is being corrected.
        warnings.simplefilter("ignore", DataWarning)
        image = read(case.images[0])
        for number, path in enumerate(_files(case)):
            is_image = number < len(case.images)
            try:
                volume = read(path) if is_image else read_labels(path)
            except MedsegError:
                # Another finding of this case, which is not certain, says what it is.
                continue
            what = []
            if "geometry" in kinds and _nearly_on_grid(image, volume):
                volume = image.with_data(volume.data)
                what.append("given the geometry of its image")
            if "4-D" in kinds and _is_flat(path):
                what.append("stored as 3-D")
            if "nan" in kinds and is_image and _has_nan(path):
                what.append("voxels that are not numbers set to 0")
            if what:
                yield path, volume, ", ".join(what)


def _nearly_on_grid(image: Volume, volume: Volume) -> bool:
    if volume.shape != image.shape or same_grid(image, volume, tolerance_mm(image)):
        return False
    return grid_distance_mm(image, volume) <= SNAP_VOXELS * min(image.spacing_mm)


def _is_flat(path: Path) -> bool:
    from medseg.io import stored_sizes

    return path.name.lower().endswith((".nii", ".nii.gz")) and len(stored_sizes(path)) > 3


def _has_nan(path: Path) -> bool:
    import numpy as np

    from medseg.io import read_as_stored

    return not bool(np.isfinite(read_as_stored(path).data).all())


def _descriptions(folder: Path, without: Collection[Path]) -> Iterator[Path]:
    """The files of a dataset that are no scans, hidden ones left out; without those that belong to
    scans.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place) / name for name in sorted(files) if not name.startswith(".")):
            is_data = is_readable_name(path) or path.suffix.lower() in (".zip", "")
            is_data = is_data or Path(os.path.normpath(path)) in without
            if not is_data and path.is_file() and path.stat().st_size <= _MAX_TEXT_BYTES:
                yield path


def _copy_description(path: Path, place: Path, dataset: Dataset, dropped: set[str]) -> None:
    """A copy of a file; if it lists cases that are left out, without them."""
    is_list = dataset.source is not None and _key(path) == _key(dataset.source)
    if not dropped or not (is_list or path.name == "splits_final.json"):
        shutil.copyfile(path, place)
        return
    if path.suffix.lower() == ".json":
        content = read_json(path)
        text = json.dumps(_without(content, dropped, dataset=dataset, path=path), indent=1) + "\n"
    else:
        text = _rows_without(path, dropped)
    with atomic_write(place) as file:
        file.write(text.encode())


def _without(content: Any, dropped: set[str], dataset: Dataset, path: Path) -> Any:
    """`splits_final.json`, `dataset.json` or a datalist without some cases."""
    if isinstance(content, list):
        return [_split_without(split, dropped) for split in content]
    entries = content.get("dataset")
    if isinstance(entries, dict):
        content["dataset"] = {name: entry for name, entry in entries.items() if name not in dropped}
    files = _ListedFiles.of(dataset, dropped)
    for key in ("training", "validation", "testing"):
        if isinstance(content.get(key), list):
            content[key] = [entry for entry in content[key] if files.is_kept(path, entry)]
    if "numTraining" in content:
        content["numTraining"] = _count_of_training(content, dropped, dataset)
    return content


def _count_of_training(content: dict[str, Any], dropped: set[str], dataset: Dataset) -> int:
    if "training" in content:
        return len(content["training"])
    before = sum(case.split != "test" for case in dataset.cases)
    return before - sum(case.name in dropped for case in dataset.cases)


def _split_without(split: dict[str, list[str]], dropped: set[str]) -> dict[str, list[str]]:
    return {key: _names_without(names, dropped) for key, names in split.items()}


def _names_without(names: list[str], dropped: set[str]) -> list[str]:
    return [name for name in names if name not in dropped]


@dataclass(frozen=True, kw_only=True)
class _ListedFiles:
    """The keys of what a list of cases may name.

    kept: images of the cases that stay. images: those of all cases. labels: labels of the cases
    that go.
    """

    kept: frozenset[str]
    images: frozenset[str]
    labels: frozenset[str]

    @classmethod
    def of(cls, dataset: Dataset, dropped: Collection[str]) -> _ListedFiles:
        """Of a data set of which some cases are left out."""
        kept, gone = set[str](), set[str]()
        labels = set[str]()
        for case in dataset.cases:
            is_gone = case.name in dropped
            (gone if is_gone else kept).update(map(_key, case.images))
            if is_gone and case.label is not None:
                labels.add(_key(case.label))
        return cls(kept=frozenset(kept), images=frozenset(kept | gone), labels=frozenset(labels))

    def is_kept(self, path: Path, entry: Any) -> bool:
        """Whether an entry of the list `path` is of a case that stays.

        One that is no case, or lacks its files, does not.
        """
        if not isinstance(entry, dict):
            return True
        image = entry.get("image")
        images = image if isinstance(image, list) else [image]
        places = {_key(path.parent / str(one)) for one in images}
        if places & self.kept:
            return True
        if entry.get("label") and _key(path.parent / str(entry["label"])) in self.labels:
            return False
        return not places & self.images and all(Path(place).exists() for place in places)


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _rows_without(path: Path, dropped: set[str]) -> str:
    """The lines of a CSV, TSV or JSONL list without some cases, by the names that reading gives
    them.
    """
    text, kept = read_text(path), [name not in dropped for name in names_of_rows(path)]
    if path.suffix.lower() == ".jsonl":
        lines = filter(str.strip, text.splitlines())
        return "\n".join(itertools.compress(lines, kept)) + "\n"
    delimiter = _delimiter(path, text)
    header, *rows = filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *itertools.compress(rows, kept)])
    return out.getvalue()


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in text.partition("\n")[0] else ","
