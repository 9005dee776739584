"""Label maps for the measurements: smooth blobs, and a prediction of them with stray islands and
pin holes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blob_pair(
    shape: tuple[int, int, int] = (512, 512, 300), labels: int = 104, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reference and prediction with blobs 1..labels; the prediction is warped, with 3 islands and 3
    holes per label.
    """
    random = np.random.default_rng(seed)
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    largest = min(shape) / 6
    for label in range(1, labels + 1):
        radius = random.uniform(0.35, 1.0, 3) * largest
        centre = random.uniform(0.08, 0.92, 3) * shape
        start = np.maximum(centre - 1.5 * radius - 4, 0).astype(int)
        stop = np.minimum(centre + 1.5 * radius + 4, shape).astype(int)
        grid = np.meshgrid(
            *(np.arange(a, b, dtype=np.float32) for a, b in zip(start, stop)),
            indexing="ij",
            sparse=True,
        )
        box = tuple(slice(a, b) for a, b in zip(start, stop))
        bumps = 0.5 * _smooth(random, stop - start)
        reference[box][_square(grid, centre, radius) + bumps < 1] = label
        warped = bumps + 0.12 * _smooth(random, stop - start)
        prediction[box][_square(grid, centre + random.uniform(-1, 1, 3), radius) + warped < 1] = (
            label
        )
    for label in range(1, labels + 1):
        for _ in range(3):
            _cube(prediction, random, int(random.integers(4, 11)), label, where=0)
            _cube(prediction, random, int(random.integers(2, 4)), 0, where=label)
    return reference, prediction


def _square(grid: list[NDArray], centre: NDArray, radius: NDArray) -> NDArray[np.float32]:
    return sum(((g - np.float32(c)) / np.float32(r)) ** 2 for g, c, r in zip(grid, centre, radius))


def _smooth(random: np.random.Generator, shape: NDArray) -> NDArray[np.float32]:
    """Noise of about -1 to 1 that varies over 15 voxels: bumps of Gaussians on a coarse lattice."""
    noise = random.standard_normal([n // 15 + 2 for n in shape]).astype(np.float32)
    for n in shape:
        distance = np.arange(n)[:, None] - 15 * np.arange(n // 15 + 2)
        weights = np.exp(-((distance / 10) ** 2)).astype(np.float32)
        weights /= np.sqrt((weights**2).sum(axis=1, keepdims=True))
        noise = np.moveaxis(np.tensordot(weights, noise, (1, 0)), 0, -1)
    return noise


def _cube(labels: NDArray, random: np.random.Generator, side: int, value: int, where: int) -> None:
    """Write a cube of `value` over voxels labelled `where`, around the first random voxel that is
    one.
    """
    for _ in range(100_000):
        i, j, k = (int(random.integers(0, n - side)) for n in labels.shape)
        if labels[i + side // 2, j + side // 2, k + side // 2] == where:
            cube = labels[i : i + side, j : j + side, k : k + side]
            cube[cube == where] = value
            return
