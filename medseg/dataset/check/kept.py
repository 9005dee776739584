"""What was measured in a case as JSON and back, so that a case is measured once, by whichever
machine, and a data set is judged from what is kept of all of them.

Numbers and arrays come back to the bit, so that a check of what is kept says what
`check_dataset` says.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Finding
from medseg.dataset.check.cases import Digests, Measurement
from medseg.dataset.check.levels import Levels
from medseg.dataset.check.measures import CaseFacts, Intensity
from medseg.dataset.check.portraits import PackedLabels, Portrait


def measurement_as_json(measurement: Measurement) -> dict[str, Any]:
    """A measurement as plain values, small, without its portrait."""
    content: dict[str, Any] = _plain(asdict(replace(measurement, portrait=None)))
    del content["portrait"]
    return content


def measurement_from_json(
    content: Mapping[str, Any], portrait: Portrait | None = None
) -> Measurement:
    """The measurement of plain values. Raises `ValueError`, `KeyError`, `TypeError` for others."""
    facts, digests = content["facts"], content["digests"]
    return Measurement(
        findings=tuple(Finding(**one) for one in content["findings"]),
        facts=None if facts is None else _facts(facts),
        portrait=portrait,
        levels=tuple(Levels(**one) for one in content["levels"]),
        digests=None if digests is None else Digests(*digests),
    )


def portrait_as_json(portrait: Portrait | None) -> dict[str, Any] | None:
    """A portrait, or that there is none, as plain values: some 100 kB."""
    content: dict[str, Any] | None = None if portrait is None else _plain(asdict(portrait))
    return content


def portrait_from_json(content: Mapping[str, Any] | None) -> Portrait | None:
    """The portrait of plain values. Raises `ValueError`, `KeyError`, `TypeError` for others."""
    if content is None:
        return None
    labels, packed, digests = (content[key] for key in ("labels", "packed", "label_digests"))
    changes = {
        "thumbnail": _array(content["thumbnail"]),
        "labels": None if labels is None else _array(labels),
        "packed": None if packed is None else PackedLabels(
            content=_bytes(packed["content"]), shape=tuple(packed["shape"]), kind=packed["kind"]
        ),
        "label_digests": None if digests is None else tuple(digests),
    }  # fmt: skip
    return Portrait(**{**content, **changes})


def _facts(content: Mapping[str, Any]) -> CaseFacts:
    channels = [
        Intensity(
            **{
                **one,
                "percentiles": tuple(one["percentiles"]),
                "foreground": _array(one["foreground"]),
            }
        )
        for one in content["channels"]
    ]
    changes = {
        name: tuple(content[name])
        for name in ("shape", "spacing_mm", "content_shape", "label_shape")
    } | {
        "affine": _array(content["affine"]),
        "channels": tuple(channels),
        "voxels": {int(value): count for value, count in content["voxels"].items()},
        "parts": {int(value): tuple(sizes) for value, sizes in content["parts"].items()},
    }
    return CaseFacts(**{**content, **changes})


def _plain(value: Any) -> Any:
    """A value of dictionaries and lists, with arrays and bytes as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        # Values little end first, the last axis fastest.
        array = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        return {
            "kind": array.dtype.str,
            "shape": list(value.shape),
            "values": _plain(array.tobytes()),
        }
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.item() if isinstance(value, np.generic) else value


def _array(content: Mapping[str, Any]) -> NDArray:
    values = np.frombuffer(_bytes(content["values"]), np.dtype(content["kind"]))
    return values.reshape(content["shape"]).astype(values.dtype.newbyteorder("="))


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
