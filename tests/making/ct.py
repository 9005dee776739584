"""A CT of a body made of simple shapes, on any grid, with what each voxel is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume

#: What a voxel is: the labels of `ct-tissues`, and 0 for air and the table.
AIR, LEFT, RIGHT, AIRWAYS, BONE, SUBCUTANEOUS, VISCERAL, OTHER, MUSCLE, SOFT, GAS = range(11)

#: Hounsfield units of what is no part of a label, and of the labels.
HU = {
    AIR: -1000, LEFT: -850, RIGHT: -850, AIRWAYS: -1000, BONE: 700, SUBCUTANEOUS: -100,
    VISCERAL: -100, OTHER: -100, MUSCLE: 55, SOFT: 45, GAS: -1000,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """A CT, and what each of its voxels is."""

    scan: Volume
    truth: NDArray[np.uint8]


def grid(
    *, low_mm: tuple[float, float, float], high_mm: tuple[float, float, float],
    spacing_mm: tuple[float, float, float], turn_degrees: float = 0.0,
) -> tuple[NDArray, tuple[int, int, int]]:  # fmt: skip
    """Affine and shape of a grid over a box, turned about the middle in the plane of R and S."""
    shape = tuple(
        int(np.ceil((b - a) / s)) for a, b, s in zip(low_mm, high_mm, spacing_mm, strict=True)
    )
    angle = np.deg2rad(turn_degrees)
    rotation = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing_mm)
    middle = (np.array(low_mm) + high_mm) / 2
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine, shape  # type: ignore[return-value]


def _points(affine: NDArray, shape: tuple[int, ...]) -> tuple[NDArray, NDArray, NDArray]:
    index = np.indices(shape, np.float32)
    x, y, z = (
        sum(affine[row, axis] * index[axis] for axis in range(3)) + affine[row, 3]
        for row in range(3)
    )
    return x, y, z


def _ball(x: NDArray, y: NDArray, z: NDArray, middle: tuple, radii: tuple) -> NDArray:
    parts = ((a - m) / r for a, m, r in zip((x, y, z), middle, radii, strict=True))
    inside: NDArray = sum(part**2 for part in parts) <= 1
    return inside


def _tube(x: NDArray, y: NDArray, z: NDArray, *, ends: tuple, radius: float) -> NDArray:
    """A cylinder with round ends between two points in mm."""
    a, b = np.array(ends[0], float), np.array(ends[1], float)
    along = b - a
    t = ((x - a[0]) * along[0] + (y - a[1]) * along[1] + (z - a[2]) * along[2]) / (along @ along)
    t = np.clip(t, 0, 1)
    inside: NDArray = (
        sum((c - a[n] - t * along[n]) ** 2 for n, c in enumerate((x, y, z))) <= radius**2
    )
    return inside


def trunk(
    affine: NDArray, shape: tuple[int, int, int], *, table: bool = True, noise: float = 0.0,
    emptiness: float = -850.0, seed: int = 0,
) -> Phantom:  # fmt: skip
    """Chest above (S > 0) and abdomen below, on a table: 340 x 240 mm, with fat under the skin."""
    x, y, z = _points(affine, shape)
    truth = np.zeros(shape, np.uint8)
    hu = np.full(shape, -1000.0, np.float32)

    def put(where: NDArray, what: int, value: float | None = None) -> None:
        truth[where] = what
        hu[where] = HU[what] if value is None else value

    if table:
        plate = (y > -150) & (y < -138) & (np.abs(x) < 210)
        hu[plate & ((y < -147) | (y > -141))] = 120.0
        hu[plate & (y >= -147) & (y <= -141)] = -900.0
    put(_oval(x, y, 170, 120), SOFT)
    put(_oval(x, y, 167, 117), SUBCUTANEOUS)
    put(_oval(x, y, 150, 100), MUSCLE)
    put(_oval(x, y, 136, 86) & (z < 0), VISCERAL)
    chest = _oval(x, y, 140, 90) & (z >= 0)
    put(chest, SOFT)
    ribs = _oval(x, y, 148, 98) & ~_oval(x, y, 141, 91) & (np.mod(z, 30) < 10) & (z >= -40)
    put(ribs, BONE)
    for side, what in ((-1, LEFT), (1, RIGHT)):
        lung = _ball(x, y, z, (side * 70, 0, 0), (58, 80, 190)) & (z >= 5)
        put(lung, what, emptiness)
        for height in range(30, 160, 20):  # vessels
            put(_tube(x, y, z, ends=((side * 30, 0, height), (side * 95, 0, height)), radius=1.6),
                what, 45.0)  # fmt: skip
    put(_ball(x, y, z, (-20, 30, 60), (50, 40, 55)), SOFT)
    walls = (
        (((0, -20, 320), (0, -20, 110)), 9.0),
        (((0, -20, 110), (-45, -20, 80)), 6.5),
        (((0, -20, 110), (45, -20, 80)), 6.5),
    )
    for ends, radius in walls:
        put(_tube(x, y, z, ends=ends, radius=radius + 3.5), SOFT)
    for ends, radius in walls:
        put(_tube(x, y, z, ends=ends, radius=radius), AIRWAYS)
    put(_ball(x, y, z, (70, 20, -60), (50, 60, 45)), SOFT, 60.0)
    put(_tube(x, y, z, ends=((-100, 30, -180), (-90, 30, -70)), radius=22), SOFT)
    put(_tube(x, y, z, ends=((-100, 30, -170), (-90, 30, -80)), radius=18), GAS)
    put(_ball(x, y, z, (20, 40, -120), (20, 15, 18)), SOFT)
    put(_ball(x, y, z, (20, 40, -120), (16, 11, 14)), GAS)
    back = _tube(x, y, z, ends=((0, -62, -400), (0, -62, 400)), radius=20)
    put(back, BONE)
    put(_tube(x, y, z, ends=((0, -62, -400), (0, -62, 400)), radius=17), BONE, 180.0)
    for side in (-1, 1):
        put(_tube(x, y, z, ends=((side * 34, -62, -400), (side * 34, -62, -5)), radius=12), MUSCLE)
    if noise:
        hu += np.random.default_rng(seed).normal(0, noise, shape).astype(np.float32)
    scan = Volume(np.clip(np.round(hu), -1024, 3071).astype(np.int16), affine)
    return Phantom(scan=scan, truth=truth)


def _oval(x: NDArray, y: NDArray, wide: float, deep: float) -> NDArray:
    inside: NDArray = (x / wide) ** 2 + (y / deep) ** 2 <= 1
    return inside


def legs(affine: NDArray, shape: tuple[int, int, int], *, noise: float = 0.0) -> Phantom:
    """Two thighs with femurs, fat under the skin and between the muscles."""
    x, y, _ = _points(affine, shape)
    truth = np.zeros(shape, np.uint8)
    hu = np.full(shape, -1000.0, np.float32)
    for side in (-1, 1):
        own = x - side * 88
        for radius, what in ((80, SOFT), (77, SUBCUTANEOUS), (65, MUSCLE)):
            where = own**2 + y**2 <= radius**2
            truth[where], hu[where] = what, HU[what]
        gap = (np.abs(own) < 3) & (y < -20) & (y > -50)
        truth[gap], hu[gap] = OTHER, -100.0
        for radius, value in ((15, 1200.0), (8, -60.0)):
            where = own**2 + y**2 <= radius**2
            truth[where], hu[where] = BONE, value
    if noise:
        hu += np.random.default_rng(0).normal(0, noise, shape).astype(np.float32)
    return Phantom(scan=Volume(np.round(hu).astype(np.int16), affine), truth=truth)
