"""A contact sheet: slices of a scan in three planes, plain and with its labels over it, and the
names of the labels, as one PNG.

Radiological convention, as in 3D Slicer: the patient's right is on the left of axial and coronal
pictures, anterior on the left of sagittal ones. Letters at the edges of the first picture of each
plane say so.
"""

from __future__ import annotations

import warnings
from base64 import b64decode
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DataWarning, MedsegError
from medseg.files import atomic_write
from medseg.labels import LabelTable
from medseg.text import reason_of
from medseg.view.contrast import contrast_of
from medseg.view.picture import NAMED, Word, largest, legend, lettered, png_bytes, write_png
from medseg.volume import Volume, plane_of, reorient

_TILE, _GAP = 220, 6  # pixels
#: A PNG of one black pixel.
_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
#: Plane -> (axis it cuts, axis across the picture, axis up it, letters left, right, top, bottom).
PLANES = {"axial": (2, 0, 1, "RLAP"), "coronal": (1, 0, 2, "RLSI"), "sagittal": (0, 1, 2, "APSI")}


def contact_sheet(
    scan: Volume, labels: Volume, table: LabelTable, columns: int = 5
) -> NDArray[np.uint8]:
    """(rows, columns, 3) RGB picture: for each plane a row of slices that matter and the same with
    labels over them.
    """
    rows = []
    for name, plain, over in _tiles(scan, labels, table, columns):
        title = Word(text=name, place=(4, 4), color=(225, 225, 225))
        words = direction_words(plain[0].shape, PLANES[name][3])
        plain[0] = lettered(plain[0], [title, *words])
        rows += [np.hstack(plain), np.hstack(over)]
    return np.vstack(rows)


def preview(scan: Volume, labels: Volume, table: LabelTable) -> NDArray[np.uint8]:
    """`contact_sheet` with the names of the structures below it, the largest first."""
    sheet = contact_sheet(scan, labels, table)
    names = legend(*largest(labels.data, table, NAMED), width=sheet.shape[1])
    return np.vstack([sheet, names])


def _tiles(
    scan: Volume, labels: Volume, table: LabelTable, columns: int
) -> Iterator[tuple[str, list[NDArray[np.uint8]], list[NDArray[np.uint8]]]]:
    """Of each plane its name, and its slices without and with labels over them."""
    image, mask = reorient(scan, "RAS"), reorient(labels, "RAS")
    most = max([int(mask.data.max(initial=0)), *table.values])  # labels may be others by now
    colors = np.zeros((most + 1, 3), np.float32)
    for label in table.labels:
        colors[label.value] = label.color
    low, high = contrast_of(image.data)[:2]
    for name, (axis, across, up, _) in PLANES.items():
        plain: list[NDArray[np.uint8]] = []
        over: list[NDArray[np.uint8]] = []
        for at in slices_that_matter(mask.data, axis, columns):
            show = [
                _turned(plane_of(volume.data, axis, at), across, up, image.spacing_mm)
                for volume in (image, mask)
            ]
            rgb = grey_picture(show[0], low, high)
            here = show[1][..., None] != 0
            tint = np.where(here, 0.5 * rgb + 0.5 * colors[show[1]], rgb)
            for tile, row in ((rgb, plain), (tint, over)):
                row.append(_centred(tile.astype(np.uint8)))
        yield name, plain, over


def grey_picture(plane: NDArray, low: float, high: float) -> NDArray[np.float32]:
    """(rows, columns, 3) from 0 to 255 of a slice: black at `low`, white at `high`."""
    grey = np.clip((plane.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(grey[..., None], 3, axis=2)


def slices_that_matter(mask: NDArray, axis: int, count: int) -> list[int]:
    """`count` slices of a label map (I, J, K) across `axis`, in order, spread over where labels
    are.

    Of each of `count` equal parts of that stretch the slice with most structures in it, of those
    the one with most labelled voxels; of a part without labels the middle.
    """
    content = np.zeros((mask.shape[axis], 2), np.int64)
    for at, plane in enumerate(np.moveaxis(mask, axis, 0)):
        voxels = np.bincount(plane.ravel(order="K"))[1:]
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
    """Write `preview` as a PNG, whole or not at all. Raises `BadOutput`."""
    write_png(path, preview(scan, labels, table))


def write_beside(path: Path, draw: Callable[[Path], None]) -> None:
    """Write a picture by `draw` beside results that must not be lost with it.

    Where it cannot be drawn there is a warning, and a picture of one black pixel in its place.
    Raises `BadOutput` where it cannot be written.
    """
    try:
        draw(path)
    except MedsegError:
        raise
    except Exception as error:  # whatever a library says
        reason = reason_of(error)
        warnings.warn(f"{path.name} could not be drawn: {reason}", DataWarning, stacklevel=2)
        with atomic_write(path) as handle:
            handle.write(b64decode(_PIXEL))


def write_strip(path: str | Path, scan: Volume, labels: Volume, table: LabelTable) -> None:
    """Write `strip` as a small PNG. Raises `BadOutput`."""
    write_png(path, strip(scan, labels, table), level=1)  # thousands are written


def strip_png(scan: Volume, labels: Volume, table: LabelTable) -> bytes:
    """`strip` as the bytes of a PNG."""
    return png_bytes(strip(scan, labels, table))


def strip(scan: Volume, labels: Volume, table: LabelTable) -> NDArray[np.uint8]:
    """One slice of each plane with labels over it, side by side, as RGB (rows, columns, 3)."""
    gap = np.zeros((_TILE, _GAP, 3), np.uint8)
    parts: list[NDArray[np.uint8]] = []
    for name, _, over in _tiles(scan, labels, table, columns=1):
        words = direction_words(over[0].shape, PLANES[name][3])
        parts += [lettered(over[0], words), gap]
    return np.hstack(parts[:-1])


def upright(plane: NDArray, across: int, up: int) -> NDArray:
    """A slice of a volume along RAS as a picture has it, rows running down.

    Index 0 of `across` and `up` is left, posterior or inferior: all three belong on the right or at
    the bottom.
    """
    return (plane.T if across > up else plane)[::-1, ::-1].T


def _turned(
    plane: NDArray, across: int, up: int, spacing_mm: tuple[float, float, float]
) -> NDArray:
    """A slice as a picture with square pixels, nearest neighbour, no larger than a tile."""
    plane = upright(plane, across, up)
    extent = np.array([plane.shape[0] * spacing_mm[up], plane.shape[1] * spacing_mm[across]])
    size = np.maximum(1, np.round(extent / extent.max() * _TILE)).astype(int)
    row, column = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, plane.shape))
    return plane[np.ix_(row, column)]


def _centred(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    canvas = np.zeros((_TILE, _TILE, 3), np.uint8)
    top, left = ((_TILE - n) // 2 for n in tile.shape[:2])
    canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def direction_words(shape: tuple[int, ...], letters: str, size: int = 13) -> list[Word]:
    """The letters of directions in the middle of the left, right, top and bottom edges of a
    picture.
    """
    rows, columns = shape[:2]
    places = ((rows / 2, 4), (rows / 2, columns - 4), (4, columns / 2), (rows - 4, columns / 2))
    return [
        Word(text=letter, place=place, anchor=anchor, size=size)
        for letter, place, anchor in zip(letters, places, ("lm", "rm", "mt", "mb"))
    ]
