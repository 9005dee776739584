"""Whether the results of a job are there already: the same model, settings and scan, by the record
beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from medseg.errors import DataWarning
from medseg.inference.jobs import Extras, Job
from medseg.inference.record import read_record
from medseg.inference.results import describes, identity_of, result_files
from medseg.inference.run import (
    EXTRA_KEYS,
    FOREIGN_KEYS,
    chosen_extras,
    inputs_of,
    load_model,
    read_scans,
    settings_of,
)
from medseg.inference.settings import Model, Settings, channel_names
from medseg.inference.untrained import AUTO, CHOSEN

#: Settings that change how long a run takes and how much memory, but not its results.
_WITHOUT_EFFECT = {"batch", "max_memory_bytes"}
#: Settings that the record holds as they were chosen for 'auto', in the words of the record.
_CHOSEN: dict[str, dict[str, str]] = {
    "device": {},
    "backend": {},
    "precision": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}


def why_again(job: Job, model: Model, settings: Settings, extras: Extras) -> str:
    """Why a job must be done, in words; '' where its results are there and would be the same again.

    The scan is read for that, and every result that the record names. Raises `BadFile` for a scan
    that cannot be read.
    """
    if not job.labels.exists():
        return "there is no result"
    record = read_record(job.record_file)
    if record is None:
        return "there is no record beside the result"
    if not describes(record, job):
        return "the record beside the result is not about it"
    if model == AUTO:
        made_by = record.get("model")
        name = made_by.get("name") if isinstance(made_by, Mapping) else None
        if name not in CHOSEN:
            return "it was made by another model"
        model = load_model(name)
    if record.get("model") != identity_of(model):
        return "it was made by another model"
    missing = [path for path in result_files(job, settings, extras) if not path.exists()]
    if missing:
        return f"{missing[0].name} is not there"
    different = _different_settings(record.get("settings"), model, settings, extras=extras)
    if different:
        return f"it was made with another {different}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # they are in the record
        volumes = read_scans(job, channel_names(model), extras)
    inputs = inputs_of(volumes, model)
    if any(record.get(key) != value for key, value in inputs.items()):
        return "it was made from another scan"
    return ""


def _different_settings(before: object, model: Model, settings: Settings, extras: Extras) -> str:
    """The first setting that differs from those of a record; '' if none does."""
    if not isinstance(before, Mapping):
        return "setting"
    request = _asked(model, settings, extras, foreign="taken" in before)
    for key, value in request.items():
        if key in _CHOSEN:
            if value == "auto" or isinstance(model, str):  # by intensity there is no choice
                continue
            value = _CHOSEN[key].get(value, value)
        if key not in _WITHOUT_EFFECT and before.get(key) != value:
            return key
    return ""


def _asked(model: Model, settings: Settings, extras: Extras, *, foreign: bool) -> dict[str, Any]:
    """The settings as a record has them, but for what is chosen; foreign: by a model of another
    program.
    """
    request = {key: _as_json(value) for key, value in settings_of(settings, model).items()}
    request["roi"] = list(settings.roi) or None
    if foreign:
        request |= {key: getattr(settings, key) for key in FOREIGN_KEYS}
    if settings.tta is None:  # the model and the device decide, and they are compared
        del request["tta"]
    return request | dict.fromkeys(EXTRA_KEYS) | chosen_extras(extras)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
