"""The run record: what was done to get a result, with nothing in it that could name a person or a
place.

No file names, no paths, nothing from image headers: the input is identified by a hash of its voxels
and geometry.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import BadFile
from medseg.files import atomic_write, read_text
from medseg.volume import Volume

#: What a record says it is.
FORMAT = "medseg-record-1"
#: Planes that are hashed at a time: where they are not as they lie in memory, sixteen are turned
#: several times faster than one by one.
_PLANES = 16


def voxel_hash(volume: Volume) -> str:
    """SHA-256 of dtype, shape, affine and voxels in (i, j, k) order, little-endian: equal for equal
    scans.
    """
    digest = hashlib.sha256(f"{volume.data.dtype.name} {volume.shape}".encode())
    digest.update(volume.affine.astype("<f8").tobytes())
    little_endian = volume.data.dtype.newbyteorder("<")
    for first in range(0, volume.shape[0], _PLANES):
        planes = volume.data[first : first + _PLANES]
        digest.update(np.ascontiguousarray(planes, little_endian).data)
    return digest.hexdigest()


def describe(volume: Volume) -> dict[str, Any]:
    """The input by its grid and its hash."""
    return {
        "voxels_sha256": voxel_hash(volume),
        "shape": list(volume.shape),
        "spacing_mm": [round(s, 6) for s in volume.spacing_mm],
        "orientation": volume.orientation,
        "dtype": volume.data.dtype.name,
    }


def found_objects(labels: Volume) -> tuple[Volume, list[dict[str, Any]]]:
    """Connected components (26-neighbours) of every label as objects 1, 2, ...: the map and a row
    for each.

    A row holds the object's number, its label, voxels, volume in mL and bounding box in RAS mm
    (edges of voxels).
    """
    from medseg.postprocess import connected_components

    numbers, parts = connected_components(labels.data)
    rows = []
    for n in range(len(parts)):
        box = (
            np.array([(*c, 1.0) for c in product(*zip(parts.start[n] - 0.5, parts.stop[n] - 0.5))])
            @ labels.affine.T
        )
        rows.append(
            {
                "object": n + 1,
                "label": int(parts.label[n]),
                "voxels": int(parts.voxels[n]),
                "ml": round(float(parts.voxels[n]) * labels.voxel_mm3 / 1000, 4),
                "box_mm": [
                    np.round(box.min(0)[:3], 3).tolist(),
                    np.round(box.max(0)[:3], 3).tolist(),
                ],
            }
        )
    kind = np.uint16 if len(parts) < 65536 else np.uint32
    return labels.with_data(numbers.astype(kind)), rows


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record in a file; None where there is none, or something else."""
    try:
        content = json.loads(read_text(path))
    except (BadFile, ValueError, RecursionError):
        return None
    is_record = isinstance(content, dict) and content.get("format") == FORMAT
    return content if is_record else None


def is_of_others(path: str | Path) -> bool:
    """Whether a file is JSON that another program wrote; damaged JSON may be a record."""
    try:
        content = json.loads(read_text(path))
    except (BadFile, ValueError, RecursionError):
        return False
    is_ours = isinstance(content, dict) and str(content.get("format", "")).startswith("medseg-")
    return bool(content) and not is_ours


def finished_now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    with atomic_write(path) as handle:
        handle.write((json.dumps(record, indent=1) + "\n").encode())
