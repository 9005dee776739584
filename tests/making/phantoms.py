"""Little data sets of made-up scans for training tests: two ellipsoids in noise, in Decathlon's
layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from making import networks as tiny


def phantom(
    seed: int, shape: tuple[int, int, int] = (22, 24, 20), channels: int = 1
) -> tuple[NDArray, NDArray]:
    """An image (X, Y, Z[, channels]) float32 and its labels: 1 is a large bright body, 2 a smaller
    one beside it.
    """
    random = np.random.default_rng(seed)
    at = np.indices(shape).astype(float)
    labels = np.zeros(shape, np.uint8)
    for value, place, radius in ((1, (0.35, 0.5, 0.5), 0.24), (2, (0.7, 0.5, 0.5), 0.18)):
        centre = (np.array(place) + random.uniform(-0.06, 0.06, 3)) * shape
        radii = radius * np.array(shape) * random.uniform(0.85, 1.15, 3)
        far = sum(((x - c) / r) ** 2 for x, c, r in zip(at, centre, radii))
        labels[far < 1] = value
    levels = np.array([0.0, 3.0, 6.0])
    images = [levels[labels] * (-1) ** n + random.normal(0, 0.5, shape) for n in range(channels)]
    image = (random.uniform(10, 1000) * np.stack(images, -1)).astype(np.float32)
    return (image[..., 0] if channels == 1 else image), labels


def dataset(
    folder: Path,
    cases: int = 6,
    *,
    labels: dict[str, int] | None = None,
    modalities: tuple[str, ...] = ("MRI",),
    shape: tuple[int, int, int] = (22, 24, 20),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    change: Any = None,
    names: Sequence[str] = (),
) -> Path:
    """A Decathlon folder of phantoms. change(case number, image, labels) may replace both.
    names: of the cases, case_00 and so on if none are given.
    """
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(cases):
        image, truth = phantom(number, shape, len(modalities))
        if change:
            image, truth = change(number, image, truth)
        affine = np.diag([*spacing_mm, 1.0])
        name = f"{names[number] if names else f'case_{number:02d}'}.nii.gz"
        tiny.save_nifti(folder / "imagesTr" / name, image, affine)
        tiny.save_nifti(folder / "labelsTr" / name, truth, affine)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    structures = {"0": "background"} | {
        str(value): name for name, value in (labels or {"body": 1, "spot": 2}).items()
    }
    content = {
        "name": "Phantoms",
        "modality": {str(n): name for n, name in enumerate(modalities)},
        "labels": structures,
        "training": listed,
    }
    (folder / "dataset.json").write_text(
        json.dumps(content | {"numTraining": cases, "tensorImageSize": "3D"})
    )
    return folder
