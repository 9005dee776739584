"""Volumes of label maps that exist, in the rows of a cohort's table."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cohort.cases import short_name
from medseg.cohort.measures import add_intensities, structure_intensities
from medseg.config import BrainSpec
from medseg.errors import BadConfig, BadFile, DataWarning, MedsegError
from medseg.io import embedded_table, is_readable_name, read, read_labels, strip_suffix
from medseg.labels import LabelTable
from medseg.postprocess import anatomy, structure_volumes
from medseg.volume import turned_onto, value_counts


def list_label_maps(paths: Sequence[Path]) -> list[Path]:
    """The label maps that files and folders stand for, in order. Raises `BadFile` for what is not
    there.
    """
    label_maps: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadFile(f"{path}: there is no such file or folder; check the name")
        if not path.is_dir():
            label_maps.append(path)
            continue
        inside = sorted(one for one in path.rglob("*") if one.is_file() and is_readable_name(one))
        inside = [
            one
            for one in inside
            if not any(part.startswith(".") for part in one.relative_to(path).parts)
        ]
        if not inside:
            raise BadFile(f"{path}: holds no label map")
        results = [one for one in inside if strip_suffix(one).endswith(("_seg", "_dseg"))]
        inside = results or inside  # beside results lie their scans
        label_maps += inside
    return list(dict.fromkeys(label_maps))


def measure_label_map(
    path: Path,
    *,
    table: LabelTable | None = None,
    brain: BrainSpec | None = None,
    scan: Path | None = None,
) -> dict[str, Any]:
    """One label map as a record has it: structures with voxels, mL and intensities, and totals of a
    brain.

    table: what its values mean; without one, what lies in it or beside it, or numbers. scan: whose
    intensities are measured, on the same grid. Raises `BadFile`.
    """
    labels = read_labels(path)
    values = np.flatnonzero(value_counts(labels.data)).tolist()
    label_table = (
        table or embedded_table(path) or _table_beside(path) or LabelTable.from_values(values)
    )
    if strange := sorted(set(values) - {0, *label_table.values}):
        warnings.warn(
            f"{path}: its label table does not name {', '.join(map(str, strange))}, which were not"
            " measured",
            DataWarning,
            stacklevel=2,
        )
    structures = structure_volumes(labels, label_table)
    if scan is not None:
        image = read(scan)
        on_grid = turned_onto(image, labels)
        if on_grid is None:
            raise BadFile(f"{scan}: does not lie on the grid of {path}; give its own scan")
        add_intensities(structures, structure_intensities(on_grid, labels, label_table.values))
    content: dict[str, Any] = {
        "case": strip_suffix(path),
        "labels": str(path),
        "structures": structures,
    }
    if brain is not None:
        content["totals"] = anatomy.totals(structures, brain)
    return content


def measure_all(
    paths: Sequence[Path], scans: Sequence[Path], table: LabelTable | None, brain: BrainSpec | None
) -> Iterator[tuple[Path, dict[str, Any] | MedsegError]]:
    """Every label map with what was measured, or with what is wrong with it. Raises `BadConfig`."""
    if scans and len(scans) != len(paths):
        raise BadConfig(f"{len(paths)} label maps and {len(scans)} scans; give a --scan for each")
    names = _names_of(paths)
    for number, path in enumerate(paths):
        scan = scans[number] if scans else None
        try:
            content = measure_label_map(path, table=table, brain=brain, scan=scan)
            yield path, content | {"case": names[number]}
        except MedsegError as error:
            yield path, error


def _names_of(paths: Sequence[Path]) -> list[str]:
    """What label maps are called in the rows: by their files, those of one name with the folders
    in which they differ, as the scans of a folder tree are.
    """
    names = [strip_suffix(path) for path in paths]
    twice = {name for name, count in Counter(names).items() if count > 1}
    if not twice:
        return names
    places = [path.absolute().parent for path in paths]
    same_disk = len({place.anchor for place in places}) == 1
    common = os.path.commonpath(places) if same_disk else ""
    below = [place.relative_to(common) if common else place for place in places]
    return [
        short_name((place / name).as_posix()) if name in twice else name
        for place, name in zip(below, names)
    ]


def wide_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each label map, with the columns of a cohort's table: ml_17, mean_17,
    total_grey_matter.
    """
    rows = []
    for record in records:
        row: dict[str, Any] = {"case": record["case"], "labels": record["labels"]}
        for one in record["structures"]:
            for measure in ("ml", "mean", "sd", "median"):
                if measure in one:
                    row[f"{measure}_{one['value']}"] = one[measure]
        for one in record.get("totals", ()):
            row[f"total_{one['name'].replace(' ', '_')}"] = one["ml"]
        rows.append(row)
    return rows


def long_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each structure of each label map."""
    return [{"case": one["case"]} | row for one in records for row in one["structures"]]


def _table_beside(path: Path) -> LabelTable | None:
    """The label table that `medseg infer` writes beside its labels, or that of their folder."""
    for beside in (path.with_name(f"{strip_suffix(path)}.labels.csv"), path.parent / "labels.csv"):
        if beside.is_file():
            return LabelTable.read(beside)
    return None
