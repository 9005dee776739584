"""A contact sheet: slices of a scan in three planes, plain and with its labels over it, as one PNG.

Radiological convention, as in 3D Slicer: the patient's right is on the left of axial and coronal
pictures, anterior on the left of sagittal ones. Letters at the edges say so.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.labels import LabelTable
from medseg.view.contrast import contrast_of
from medseg.view.lettering import write_text
from medseg.view.png import png_bytes, write_png
from medseg.volume import Volume, reorient

_TILE = 220  # pixels
#: Plane -> (axis it cuts, axis across the picture, axis up it, letters left, right, top, bottom).
PLANES = {"axial": (2, 0, 1, "RLAP"), "coronal": (1, 0, 2, "RLSI"), "sagittal": (0, 1, 2, "APSI")}


def contact_sheet(
    scan: Volume, labels: Volume, table: LabelTable, columns: int = 5
) -> NDArray[np.uint8]:
    """(rows, columns, 3) RGB picture: for each plane a row of slices that matter and the same with
    labels over them.
    """
    image, mask = reorient(scan, "RAS"), reorient(labels, "RAS")
    colors = np.zeros((max(table.values, default=0) + 1, 3), np.float32)
    for label in table.labels:
        colors[label.value] = label.color
    low, high = contrast_of(image.data)[:2]
    rows = []
    for axis, across, up, letters in PLANES.values():
        plain: list[NDArray] = []
        over: list[NDArray] = []
        for at in slices_that_matter(mask.data, axis, columns):
            show = [
                _turned(np.take(volume.data, at, axis), across, up, image.spacing_mm)
                for volume in (image, mask)
            ]
            grey = np.clip((show[0].astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
            rgb = np.repeat(grey[..., None], 3, axis=2)
            here = show[1][..., None] != 0
            tint = np.where(here, 0.5 * rgb + 0.5 * colors[show[1]], rgb)
            for tile, row in ((rgb, plain), (tint, over)):
                row.append(_lettered(_centred(tile.astype(np.uint8)), letters))
        rows += [np.hstack(plain), np.hstack(over)]
    return np.vstack(rows)


def slices_that_matter(mask: NDArray, axis: int, count: int) -> list[int]:
    """`count` slices of a label map (I, J, K) across `axis`, in order, spread over where labels
    are.

    Of each of `count` equal parts of that stretch the slice with most structures in it, of those
    the one with most labelled voxels; of a part without labels the middle.
    """
    content = np.zeros((mask.shape[axis], 2), np.int64)
    for at, plane in enumerate(np.moveaxis(mask, axis, 0)):
        voxels = np.bincount(plane.ravel())[1:]
        content[at] = np.count_nonzero(voxels), voxels.sum()
    indices = np.flatnonzero(content[:, 1])
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, len(content) - 1)
    edges = np.linspace(first, last + 1, count + 1)
    slices = []
    for low, high in pairwise(edges):
        middle = (low + high - 1) / 2
        part = range(round(low), round(high)) or [min(last, int(low))]
        slices.append(max(part, key=lambda at: (*content[at].tolist(), -abs(at - middle))))
    return slices


def write_preview(path: str | Path, scan: Volume, labels: Volume, table: LabelTable) -> None:
    """Write `contact_sheet` as a PNG, whole or not at all. Raises `BadOutput`."""
    write_png(path, contact_sheet(scan, labels, table))


def write_strip(path: str | Path, scan: Volume, labels: Volume, table: LabelTable) -> None:
    """Write `strip` as a small PNG. Raises `BadOutput`."""
    write_png(path, strip(scan, labels, table))


def strip_png(scan: Volume, labels: Volume, table: LabelTable) -> bytes:
    """`strip` as the bytes of a PNG."""
    return png_bytes(strip(scan, labels, table))


def strip(scan: Volume, labels: Volume, table: LabelTable) -> NDArray[np.uint8]:
    """One slice of each plane with labels over it, side by side, as RGB (rows, columns, 3)."""
    sheet = contact_sheet(scan, labels, table, columns=1)
    tiles = sheet.reshape(-1, _TILE, _TILE, 3)
    return np.hstack(list(tiles[1::2]))


def _turned(
    plane: NDArray, across: int, up: int, spacing_mm: tuple[float, float, float]
) -> NDArray:
    """A slice as a picture with square pixels, nearest neighbour, no larger than a tile; rows run
    down.
    """
    if across > up:
        plane = plane.T
    # Index 0 of `across` and `up` is left, posterior or inferior: all three belong on the right or
    # at the bottom.
    plane = plane[::-1, ::-1].T
    extent = np.array([plane.shape[0] * spacing_mm[up], plane.shape[1] * spacing_mm[across]])
    size = np.maximum(1, np.round(extent / extent.max() * _TILE)).astype(int)
    row, column = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, plane.shape))
    return plane[np.ix_(row, column)]


def _centred(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    canvas = np.zeros((_TILE, _TILE, 3), np.uint8)
    top, left = ((_TILE - n) // 2 for n in tile.shape[:2])
    canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def _lettered(tile: NDArray[np.uint8], letters: str) -> NDArray[np.uint8]:
    """Direction letters in the middle of the left, right, top and bottom edges."""
    middle = _TILE // 2
    for letter, (top, left) in zip(
        letters, ((middle, 2), (middle, -14), (2, middle), (-16, middle))
    ):
        write_text(tile, top % _TILE, left % _TILE, text=letter, color=(255, 220, 0))
    return tile
