"""What is asked of every case of a cohort: model, settings, and the key by which a result is known.

It is written to `OUT/cohort.json` with the list, so that workers, later runs and `medseg gather`
read the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from medseg.cohort.cases import Case, Cohort, as_row, from_row
from medseg.cohort.places import Places
from medseg.errors import BadFile
from medseg.files import atomic_write, file_state, write_once
from medseg.inference import Extras, Settings
from medseg.io import DicomOptions
from medseg.packages import __version__
from medseg.text import read_json

FORMAT = "medseg-cohort-1"
#: The largest `cohort.json` that is read: of some millions of cases.
_MAX_BYTES = 1 << 32
#: Settings that change how long a case takes and how much memory, and not its labels.
_WITHOUT_EFFECT = ("batch", "max_memory_bytes", "from_dicom", "device", "precision", "backend")
#: What 'auto' may mean, as it is settled, and the precision to ask for then.
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is done with every case.

    models: names and folders as `infer --model` takes them. model: name and hashes of what they
    are. pictures: whether each case gets one for the report.
    """

    models: tuple[str, ...]
    model: Mapping[str, Any]
    folds: tuple[str, ...] = ()
    checkpoint: str = "final"
    settings: Settings = field(default_factory=Settings)
    extras: Extras = field(default_factory=Extras)
    pictures: bool = True
    layout: str = "cases"
    several: bool = False
    verify: bool = False

    def places(self, out: Path) -> Places:
        """Where the results of this request lie."""
        name = "".join(filter(str.isalnum, str(self.model.get("name", "")))) or "medseg"
        return Places(out=out, bids=name if self.layout == "bids" else "", several=self.several)

    def key(
        self, case: Case, arithmetic: str, states: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """A hash of all that the result of a case depends on.

        Those are its name, the name, size and time of its files (or with `verify` their content
        instead of the last two), the model, the settings that change labels, the arithmetic and the
        version of medseg. states: of scans in a store, what `states_of` says.
        """
        identity = [case.name, case.series, case.volume, _inputs(case, self.verify, states)]
        identity.append(case.problem)  # once it is solved the case is another one
        text = json.dumps([*identity, self._settings_text, arithmetic, __version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def arithmetic(self, settled: Mapping[str, str]) -> str | None:
        """Device and precision in words, None where 'auto' is not settled yet."""
        settings = self.settings
        device = settled.get("device") if settings.device == "auto" else settings.device
        precision = _PRECISIONS.get(settings.precision, settled.get("precision"))
        if device is None or precision is None:
            return None
        exact = " exact" if settings.precision == "fp32" else ""
        backend = "torch" if settings.backend == "auto" else settings.backend
        return f"{device} {precision}{exact} {backend}"

    @property
    def settings_sha256(self) -> str:
        """Of the model and the settings that change results."""
        return hashlib.sha256(self._settings_text.encode()).hexdigest()

    @cached_property
    def _settings_text(self) -> str:
        settings = {k: v for k, v in asdict(self.settings).items() if k not in _WITHOUT_EFFECT}
        extras = asdict(self.extras)
        about = [dict(self.model), self.checkpoint, self.folds, settings, extras, self.layout]
        return json.dumps(about, sort_keys=True, default=str)


def request_as_json(request: Request) -> dict[str, Any]:
    """The request as values for JSON; `request_from_json` reads them."""
    values = {one.name: getattr(request, one.name) for one in fields(request)}
    return values | {"settings": asdict(request.settings), "extras": asdict(request.extras)}


def request_from_json(values: Mapping[str, Any]) -> Request:
    """The request of `request_as_json`. Raises `TypeError` for other values."""
    values = dict(values)
    settings = {k: _tuples(v) for k, v in values.pop("settings").items()}
    extras = {k: _tuples(v) for k, v in values.pop("extras").items()}
    dicom = DicomOptions(**extras.pop("dicom"))
    plain = {key: _tuples(value) for key, value in values.items()}
    return Request(**plain, settings=Settings(**settings), extras=Extras(**extras, dicom=dicom))


def write_cohort(places: Places, cohort: Cohort, request: Request) -> None:
    """Write what was asked for, unless the file says the same already. Raises `BadOutput`."""
    content = {
        "format": FORMAT,
        "medseg": __version__,
        "list_sha256": cohort.sha256,
        "kind": cohort.kind,
        "request": request_as_json(request),
        "columns": list(cohort.columns),
    }
    rows = ",\n".join(json.dumps(as_row(case)) for case in cohort.cases)
    head = json.dumps(content, indent=1, default=str).removesuffix("\n}")
    text = f'{head},\n "cases": [\n{rows}\n ]\n}}\n'.encode()
    if places.cohort.is_file() and places.cohort.read_bytes() == text:
        return
    with atomic_write(places.cohort) as file:
        file.write(text)


def read_cohort(out: Path, address: str = "") -> tuple[Cohort, Request]:
    """What was asked for in this folder. address: what a message calls it.

    Raises `BadFile` for one that is no cohort's output.
    """
    path = Places(out=out).cohort
    if not path.is_file():
        raise BadFile(
            f"{address or out}: holds no cohort.json; give the folder that medseg batch wrote to"
            " with -o"
        )
    content = read_json(path, max_bytes=_MAX_BYTES)
    try:
        if content["format"] != FORMAT:
            raise ValueError
        cases = tuple(from_row(row) for row in content["cases"])
        columns = tuple(map(str, content["columns"]))
        cohort = Cohort(source=path, kind=str(content["kind"]), cases=cases, columns=columns)
        return cohort, request_from_json(content["request"])
    except (AttributeError, KeyError, TypeError, ValueError):
        where = f"{address}/cohort.json" if address else path
        raise BadFile(f"{where}: is not what this version of medseg writes there") from None


def settled_arithmetic(places: Places, found: Mapping[str, str] | None = None) -> dict[str, str]:
    """Device and precision that 'auto' means in this cohort, {} where nobody has tried yet.

    found: what was found here and now; it is kept unless another worker was first.
    """
    path = places.arithmetic
    if not path.is_file() and found is not None:
        write_once(path, (json.dumps(dict(found)) + "\n").encode())
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadFile(f"{path}: is not what medseg writes there; remove it")
    return {str(key): str(value) for key, value in content.items()}


def _inputs(case: Case, verify: bool, states: Mapping[str, Any]) -> list[Any]:
    """Name, size and time of a case's files, or their hashes; of a folder those of all in it.

    Files of one archive have one time, and without compression often one size.
    """
    return [
        [
            name.rstrip("/").rpartition("/")[2] if "://" in name else Path(name).name,
            states.get(name) if "://" in name else file_state(Path(name), verify=verify),
        ]
        for name in case.images
    ]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
