"""Results in BIDS form: the files that make a folder of segmentations a derivative data set.

Brain Imaging Data Structure 1.10, Derivatives: `dataset_description.json`, `dseg.tsv` once for all
by the inheritance principle, and beside each `_dseg.nii.gz` a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.cohort.cases import Case, Cohort
from medseg.cohort.places import Places
from medseg.files import atomic_write, private_folder
from medseg.labels import LabelTable
from medseg.packages import __version__

if TYPE_CHECKING:
    from medseg.inference import Segmentation

_VERSION = "1.10.0"
#: What in the folder is not BIDS.
_IGNORED = (
    "cases", "records", "attempts", "log", "pages", "cohort.json", "arithmetic.json", "labels.csv",
    "table*", "report.html",
)  # fmt: skip


def write_dataset(
    places: Places, cohort: Cohort, model: Mapping[str, Any], table: LabelTable
) -> None:
    """Write what a derivative data set has once, unless it is there. Raises `BadOutput`.

    cohort: of the raw data set. model: its name and hashes.
    """
    source = cohort.source
    description = {
        "Name": f"Segmentations of {source.resolve().name} by medseg",
        "BIDSVersion": _VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {"Name": "medseg", "Version": __version__, "Description": f"model {model['name']}"}
        ],
    }
    _write_once(places.out / "dataset_description.json", _as_json(description))
    _write_once(places.out / ".bidsignore", "\n".join(_IGNORED) + "\n")
    text = (
        "This folder was written by medseg. Each _dseg.nii.gz is a label map on its image's grid.\n"
    )
    _write_once(places.out / "README", text)
    for one in sorted({places.description(case) for case in cohort.cases if case.images}):
        write_table(table, places.out / f"desc-{one}_dseg.tsv")


def write_table(table: LabelTable, path: Path) -> None:
    """Write what the values of labels mean, unless the file says the same already: it may be that
    of another model. Raises `BadOutput`.
    """
    with private_folder() as folder:
        table.write(folder / path.name)
        if path.is_file() and path.read_bytes() == (folder / path.name).read_bytes():
            return
    table.write(path)


def write_sidecar(path: Path, *, case: Case, result: Segmentation) -> None:
    """Write the JSON file beside a label map: what it was made from, and by which model."""
    image = Path(case.images[0])
    below = [*image.parts]
    subjects = [n for n, part in enumerate(below[:-1]) if part.startswith("sub-")]
    start = subjects[-1] if subjects else len(below) - 1
    content = {
        "Sources": [f"bids:raw:{'/'.join(below[start:])}"],
        "SpatialReference": "orig",
        "Manual": False,
        "Resolution": "that of the image",
        "Model": result.plan.model,
        "Structures": {label.name: label.value for label in result.table.labels},
    }
    with atomic_write(path) as file:
        file.write(_as_json(content).encode())


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_once(path: Path, text: str) -> None:
    if path.exists():
        return
    with atomic_write(path) as file:
        file.write(text.encode())
