"""A store of prepared scans: what lies where in it, and what is known of each case.

    STORE/store.json            of what data, and with which settings asked for
    STORE/plan.json             the settings that the facts of all cases gave, and what was found
    STORE/cases/ab/CASE-abcd/   of a case:
        check.json                  facts, digests and findings
        portrait.json               what the comparison with the other cases needs
        image.npy labels.npy points.npy     or image.zarr/ and labels.zarr/
        record.json                 written last; it alone says that the arrays are there
        begun                       a byte for each attempt that has left no result yet

Nothing in it says who made it, when or where, so that stores of one job and of several are the
same to the byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medseg.dataset import (
    Case,
    Dataset,
    Measurement,
    measurement_as_json,
    measurement_from_json,
    portrait_as_json,
    portrait_from_json,
)
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.files import atomic_write, output_errors, sweep, write_once
from medseg.packages import __version__
from medseg.text import read_json
from medseg.training.prepared.arrays import hash_of, inputs_of
from medseg.training.prepared.formats import FORMATS, Raw, Zarr

FORMAT = "medseg-prepared-1"
#: The largest file of JSON that is read: the plan of some ten thousand cases.
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a case's arrays. key: of what they were made, and how. error: why there are
    none, '' where they are there. sizes: bytes of their files.
    """

    key: str
    error: str
    sizes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Store:
    """A store that was begun. about: what store.json says."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def plan(self) -> Path:
        """Where the plan lies."""
        return self.folder / "plan.json"

    def place(self, case: Case) -> Path:
        """The folder of a case."""
        digest = hashlib.sha256(case.name.encode(errors="surrogateescape")).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", case.name)[:100]
        return self.folder / "cases" / digest[:2] / f"{readable}-{digest[:8]}"

    @cached_property
    def form(self) -> Raw | Zarr:
        """How arrays lie in it. Raises `BadConfig` where the package for that is missing."""
        return FORMATS[self.about["arrays"]]()

    def files(self, case: Case) -> dict[str, Path]:
        """The files of a case's arrays."""
        return {name: self.place(case) / path for name, path in self.form.files.items()}

    def measurement(self, case: Case) -> Measurement | None:
        """What was measured in a case as it is now, without its portrait; None where nobody has."""
        content = read_content(self.place(case) / "check.json")
        with suppress(KeyError, TypeError, ValueError):
            if content["key"] == check_key(case):
                return measurement_from_json(content["measurement"])
        return None

    def with_portrait(self, case: Case, measurement: Measurement) -> Measurement:
        """The measurement with its portrait. Raises `BadFile` where that is damaged."""
        path = self.place(case) / "portrait.json"
        try:
            return replace(measurement, portrait=portrait_from_json(read_content(path)["portrait"]))
        except (KeyError, TypeError, ValueError):
            raise BadFile(
                f"{path}: is damaged; remove the folder it lies in, and prepare again"
            ) from None

    def keep_measurement(self, dataset: Dataset, case: Case, measurement: Measurement) -> None:
        """Write what was measured in a case, the facts last. Raises `BadOutput`."""
        findings = tuple(
            replace(one, message=without_folder(one.message, dataset))
            for one in measurement.findings
        )
        facts = measurement_as_json(replace(measurement, findings=findings))
        place = self.place(case)
        write_content(place / "portrait.json", {"portrait": portrait_as_json(measurement.portrait)})
        write_content(
            place / "check.json",
            {"case": case.name, "key": check_key(case), "measurement": facts},
        )

    def record(self, case: Case) -> Record | None:
        """What is known of a case's arrays, of whichever files they were made; None if nothing."""
        content = read_content(self.place(case) / "record.json")
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            sizes = {str(name): int(size) for name, size in content["bytes"].items()}
            return Record(key=str(content["key"]), error=str(content["error"]), sizes=sizes)
        return None

    def keep_record(self, case: Case, key: str, *, error: str = "") -> None:
        """Write that a case's arrays are there, or why they are not. Raises `BadOutput`."""
        sizes = {} if error else sizes_of(self.files(case))
        content = {"case": case.name, "key": key, "error": error, "bytes": sizes}
        write_content(self.place(case) / "record.json", content)

    def forget_record(self, case: Case) -> None:
        """Remove the record, before the arrays that it is about are written anew."""
        path = self.place(case) / "record.json"
        with output_errors(path):
            path.unlink(missing_ok=True)

    # Attempts -------------------------------------------------------------------------------------

    def begun(self, case: Case) -> int:
        """How many attempts at a case have begun and left no result: they took their process along,
        or are in hand.
        """
        try:
            return (self.place(case) / "begun").stat().st_size
        except OSError:
            return 0

    def begin(self, case: Case) -> None:
        """Write down that an attempt begins, in the folder of the case. Raises `BadOutput`."""
        place = self.place(case)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / "begun").open("ab") as file:
                file.write(b".")
        except OSError as error:
            raise BadOutput(f"{place}: cannot be written: {error.strerror}") from None

    def end(self, case: Case) -> None:
        """Write down that there is a result, or that the attempt was given up."""
        path = self.place(case) / "begun"
        with output_errors(path):
            path.unlink(missing_ok=True)

    def tidy(self, case: Case) -> None:
        """Remove what jobs have left of a case that were killed: the mark of one that was killed
        after there was a result, and files half-written a minute ago or longer.
        """
        mark = self.place(case) / "begun"
        if mark.exists():  # else nothing is written: a store that is done may be protected
            self.end(case)
        for folder in {self.place(case), *(path.parent for path in self.files(case).values())}:
            sweep(folder)


# A store as a whole -------------------------------------------------------------------------------


def about_store(dataset: Dataset, settings: Mapping[str, Any], arrays: str) -> dict[str, Any]:
    """What store.json says of a store. settings: those asked for, dotted. arrays: one of `FORMATS`.
    Raises `BadConfig` where its package is missing.
    """
    FORMATS[arrays]()
    asked = json.loads(json.dumps(dict(settings)))
    return {
        "format": FORMAT,
        "medseg": __version__,
        **_about_data(dataset),
        "settings": asked,
        "arrays": arrays,
    }


def find_store(folder: Path, about: Mapping[str, Any]) -> Store | None:
    """The store in a folder, None where it may be begun. about: what it is to be.

    Raises `BadConfig` for a folder that holds something else, and for a store of other data or
    settings, `BadOutput` for a file.
    """
    if folder.exists() and not folder.is_dir():
        raise BadOutput(f"{folder}: is a file; give a folder with -o")
    if not (folder / "store.json").exists():
        if folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir()):
            raise BadConfig(f"{folder} is not empty and holds no prepared scans; choose another -o")
        return None
    store = open_store(folder)
    for key, value in about.items():
        if key != "medseg" and store.about.get(key) != value:
            was, now = (_short(one) for one in (store.about.get(key), value))
            raise BadConfig(
                f"{folder} was begun with other {key} ({was}, now {now}); choose another -o"
            )
    return store


def begin_store(folder: Path, about: Mapping[str, Any]) -> Store:
    """The store in a folder, begun if it is not there yet. Raises what `find_store` does, and
    `BadOutput` where nothing can be written.
    """
    if find_store(folder, about) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOutput(
                f"{folder}: cannot be made: {error.strerror}; choose another with -o"
            ) from None
        write_once(folder / "store.json", as_text(about))
    sweep(folder)
    store = find_store(folder, about)  # another job may have been the first
    assert store is not None
    return store


def open_store(folder: Path) -> Store:
    """The store in a folder. Raises `BadConfig` if there is none, `BadFile` if it is damaged."""
    path = folder / "store.json"
    if not path.is_file():
        raise BadConfig(f"{folder}: holds no prepared scans; medseg prepare DATASET -o makes some")
    about = read_json(path, max_bytes=_MAX_BYTES)
    is_ours = isinstance(about, dict) and about.get("format") == FORMAT
    if not is_ours or about.get("arrays") not in FORMATS:
        raise BadConfig(f"{path}: is not what this version of medseg prepares; prepare anew")
    return Store(folder=folder, about=about)


def check_same_data(store: Store, dataset: Dataset) -> None:
    """Raises `BadConfig` where a store was prepared from data of other channels or labels."""
    for key, value in _about_data(dataset).items():
        if store.about.get(key) != value:
            was, now = (_short(one) for one in (store.about.get(key), value))
            raise BadConfig(
                f"{store.folder} was prepared from other data: its {key} are {was}, those of"
                f" {dataset.folder} {now}"
            )


def _about_data(dataset: Dataset) -> dict[str, Any]:
    """What the cases of a data set have in common, as values for JSON."""
    return {
        "channels": list(dataset.channels),
        "labels": [[label.value, label.name] for label in dataset.table.labels],
        "regions": [list(part) for part in dataset.regions],
        "ignore": dataset.ignore,
    }


def check_key(case: Case) -> str:
    """A hash of what the facts of a case depend on."""
    return hash_of([inputs_of(case), case.labelled])


def facts_key(dataset: Dataset, measurements: Sequence[Measurement]) -> str:
    """A hash of what a plan follows from: the cases, and which of them could be read.
    measurements: of all cases, in their order.
    """
    pairs = zip(dataset.cases, measurements, strict=True)
    return hash_of([[check_key(case), one.facts is not None] for case, one in pairs])


def sizes_of(paths: Mapping[str, Path]) -> dict[str, int]:
    """The bytes of files; of those that are not there -1."""
    return {name: path.stat().st_size if path.is_file() else -1 for name, path in paths.items()}


def without_folder(text: str, dataset: Dataset) -> str:
    """A sentence without the folder of the data set, which may lie elsewhere on each machine."""
    folder = str(dataset.folder)
    return text if folder == "." else text.replace(f"{folder}/", "").replace(f"{folder}\\", "")


def read_content(path: Path) -> dict[str, Any]:
    """What a file of the store says; nothing where it is missing or damaged."""
    try:
        content = read_json(path, max_bytes=_MAX_BYTES)
    except BadFile:
        return {}
    return content if isinstance(content, dict) else {}


def write_content(path: Path, content: Any) -> None:
    """Write a file of JSON whole or not at all."""
    with atomic_write(path) as file:
        file.write(as_text(content))


def as_text(content: Any) -> bytes:
    """Values as JSON in bytes."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
