"""Small made-up datasets in every layout; a head with one bright ear, so that left is never
right.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.io import write
from medseg.volume import Volume

SHAPE = (24, 20, 16)


def make_case(seed: int, *, affine: NDArray | None = None) -> tuple[Volume, Volume]:
    """An image and its labels 1 and 2: a bright ball in front of a dark one, both left of the
    middle.
    """
    rng = np.random.default_rng(seed)
    shape = np.array(SHAPE) + rng.integers(-1, 2, 3)
    i, j, k = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    jitter = rng.normal(0, 0.01, (4, 3))

    def ball(x: float, y: float, z: float, size: float, number: int) -> NDArray:
        dx, dy, dz = jitter[number]
        return ((i - x - dx) / size) ** 2 + ((j - y - dy) / size) ** 2 + (
            (k - z - dz) / (1.4 * size)
        ) ** 2 < 1

    head = ball(0.5, 0.5, 0.5, 0.45, 0)
    labels = np.zeros(shape, np.uint8)
    labels[ball(0.3, 0.35, 0.55, 0.16, 1)] = 2
    labels[ball(0.36, 0.62, 0.5, 0.16, 2)] = 1
    data = (
        30.0 * head * (1 + k)
        + 30 * (labels == 1)
        - 20 * (labels == 2)
        + 25 * ball(0.75, 0.3, 0.3, 0.12, 3)
    )
    # Texture of some voxels' size, so that no two cases are alike beyond their anatomy.
    coarse = (
        rng.normal(0, 9, (6, 5, 4))
        .repeat(5, 0)
        .repeat(5, 1)
        .repeat(5, 2)[: shape[0], : shape[1], : shape[2]]
    )
    data = data + head * coarse + rng.normal(0, 2, shape)
    affine = np.diag([1.0, 1.2, 1.5, 1.0]) if affine is None else affine
    return Volume(np.asfortranarray(data, np.float32), affine), Volume(
        np.asfortranarray(labels), affine
    )


def put(volume: Volume, path: Path) -> Path:
    """Write a volume, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(volume, path)
    return path


def put_json(content: object, path: Path) -> Path:
    """Write JSON, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def decathlon(folder: Path, count: int = 4, first: int = 0) -> Path:
    """A dataset as the Medical Segmentation Decathlon has them, cases case_0 and so on."""
    names = [f"case_{number}" for number in range(count)]
    for number, name in enumerate(names):
        image, labels = make_case(first + number)
        put(image, folder / "imagesTr" / f"{name}.nii.gz")
        put(labels, folder / "labelsTr" / f"{name}.nii.gz")
    listed = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    content = {
        "name": "Balls",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "numTraining": count,
        "training": listed,
        "test": [],
    }
    put_json(content, folder / "dataset.json")
    return folder
