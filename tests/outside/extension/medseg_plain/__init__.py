"""A format of text, a network and a model, for medseg."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import medseg


class PlainReader(medseg.Reader):
    """JSON: voxels and affine."""

    def __call__(
        self,
        path: str | Path,
        *,
        volume_index: int | None = None,
        assume_geometry: str | None = None,
    ) -> medseg.Volume:
        """The volume in a file."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        data = np.array(content["voxels"], dtype=content["dtype"])
        return medseg.Volume(data, np.array(content["affine"]))


def write_plain(
    volume: medseg.Volume, path: str | Path, *, table: medseg.LabelTable | None = None
) -> None:
    """Write a volume as JSON."""
    content = {
        "dtype": volume.data.dtype.name,
        "voxels": volume.data.tolist(),
        "affine": volume.affine.tolist(),
    }
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def model_folder() -> Path:
    """The folder of the model that comes with this package."""
    return Path(__file__).parent / "model"
