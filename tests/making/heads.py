"""Small scans for the tests of what is shown: which side is which is known by construction."""

from __future__ import annotations

import numpy as np

from medseg.labels import Code, Label, LabelTable
from medseg.volume import Volume, reorient

RIGHT, LEFT, FRONT, ABSENT = 7, 300, 12, 5
PURE = {RIGHT: (255, 0, 0), LEFT: (0, 255, 0), FRONT: (0, 0, 255), ABSENT: (90, 90, 90)}
_SIDE = {"right": Code("SCT", "24028007", "Right"), "left": Code("SCT", "7771000", "Left")}
TABLE = LabelTable(
    tuple(
        Label(
            value,
            name,
            PURE[value],
            category=Code("SCT", "123037004", "Anatomical Structure"),
            type=Code("SCT", "64033007", "Kidney"),
            type_modifier=_SIDE.get(name.split()[0]),
        )
        for value, name in (
            (ABSENT, "absent"),
            (RIGHT, "right kidney"),
            (FRONT, "front Größe <b>&amp; 脳"),
            (LEFT, "left kidney"),
        )
    )
)


def head(orientation: str = "LAS", degrees: float = 0.0) -> tuple[Volume, Volume]:
    """A body with a box at the patient's right and up, one at the left and down, and one in front;
    1.5 x 1.5 x 2 mm.

    `degrees` turns the grid around the foot-to-head axis.
    """
    shape = (48, 56, 40)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    image = np.where((at**2).sum(-1) < 0.8, 400, 0) + np.random.default_rng(0).integers(
        0, 20, shape
    )
    labels = np.zeros(shape, np.uint16)
    labels[32:41, 22:34, 20:31] = RIGHT  # the grid runs to RAS
    labels[9:14, 24:32, 8:16] = LEFT
    labels[20:30, 45:51, 16:24] = FRONT
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    affine[:3, 3] = (-31, -44, -37)
    turn = np.eye(4)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = turn @ affine
    pair = Volume(image.astype(np.int16), affine), Volume(labels, affine)
    return reorient(pair[0], orientation), reorient(pair[1], orientation)


def centre_mm(labels: Volume, value: int) -> np.ndarray:
    """RAS+ mm of the middle of a structure."""
    voxels = np.argwhere(labels.data == value)
    return (np.c_[voxels, np.ones(len(voxels))] @ labels.affine.T)[:, :3].mean(axis=0)
