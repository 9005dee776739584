"""Where labels in DICOM lie: on the slices of the images they were made from, or on a grid of their
own.

With the images nothing is worked out: a frame lies on a slice of theirs, or beyond them, or it is
refused. Without them frames may be far apart, and the gap between two of them is no distance
between slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.source import Paths
from medseg.io.dicom.volumes import located
from medseg.volume import LPS

#: A pixel may lie this part of a voxel off the images it belongs to: where the headers of slices
#: wobble, no less is asked of the images themselves.
MAX_OFF_VOXELS = 0.1
#: Frames at most this many slice thicknesses apart are neighbours; gaps of a tenth are usual in MR.
_TOUCHING = 1.11


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """The voxels of a DICOM volume."""

    affine: NDArray[np.float64]  # voxel index to RAS+ mm
    shape: tuple[int, int, int]
    frame_of_reference: str  # '' where the images have none, or several

    @property
    def to_voxels(self) -> NDArray[np.float64]:
        """LPS mm to voxel index."""
        return np.asarray(np.linalg.inv(LPS @ self.affine), dtype=np.float64)


def open_grid(
    source: Paths,
    *,
    series: str | int | None = None,
    volume_index: int | None = None,
    repair: bool = False,
) -> ImageGrid:
    """The grid of the volume that `read` returns for the same arguments. Raises `BadFile`."""
    affine, shape, frame_of_reference = located(
        source, series=series, volume_index=volume_index, repair=repair
    )
    return ImageGrid(affine=affine, shape=shape, frame_of_reference=frame_of_reference)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames of one size in space (F of them), as their headers have it."""

    places: NDArray[np.float64]  # (F, 3) LPS mm of the first pixel's centre
    turns: NDArray[np.float64]  # (F, 6) directions along a row, along a column
    edges: NDArray[np.float64]  # (F, 2) mm between rows, between columns
    rows: int
    columns: int
    step_mm: float | None = None  # Spacing Between Slices
    thickness_mm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where pixels of frames lie in a volume: pixel (row, column) of frame f is voxel start[f] +
    turn @ (column, row).

    A frame whose `start` lies outside the volume along k has no voxels.
    """

    turn: NDArray[np.int64]  # (2, 2): i and j for a step along a row, along a column; 0, 1 and -1
    start: NDArray[np.int64]  # (F, 3)

    def put(self, number: int, values: NDArray, volume: NDArray) -> tuple[NDArray, NDArray]:
        """The part of a volume (I, J, K) that frame `number` covers, as a view, and the frame's
        values there.

        values: (rows, columns). Both are empty where the frame lies outside.
        """
        i, j, k = (int(n) for n in self.start[number])
        along_rows = bool(self.turn[0, 0])  # whether i follows the columns of the frame
        picture = values.T if along_rows else values
        steps = (self.turn[0].sum(), self.turn[1].sum())
        inside = []
        for axis, (at, step) in enumerate(zip((i, j), steps)):
            size = picture.shape[axis]
            if step < 0:
                picture = np.flip(picture, axis)
                at -= size - 1
            inside.append((max(at, 0), min(at + size, volume.shape[axis]), at))
        (i0, i1, i), (j0, j1, j) = inside
        if not 0 <= k < volume.shape[2] or i0 >= i1 or j0 >= j1:
            return volume[:0, :0, 0], picture[:0, :0]
        return volume[i0:i1, j0:j1, k], picture[i0 - i : i1 - i, j0 - j : j1 - j]


def placed_on(frames: Frames, grid: ImageGrid) -> Placement | None:
    """Where frames lie on images, each by itself; None if they do not lie on slices of the images
    or beyond them.
    """
    columns = np.concatenate(
        [frames.turns[:, :3] * frames.edges[:, 1:], frames.turns[:, 3:] * frames.edges[:, :1]], 1
    )
    steps = columns.reshape(-1, 2, 3) @ grid.to_voxels[:3, :3].T  # (F, along row and column, ijk)
    starts = frames.places @ grid.to_voxels[:3, :3].T + grid.to_voxels[:3, 3]
    if not (np.abs(steps).max() < 1e3 and np.abs(starts).max() < 1e6):
        return None
    turn, start = np.rint(steps[0]), np.rint(starts)
    in_plane = np.abs(turn[:, :2])
    if turn[:, 2].any() or (in_plane.sum(axis=0) != 1).any() or (in_plane.sum(axis=1) != 1).any():
        return None
    beyond = (starts[:, 2] < -0.5) | (starts[:, 2] > grid.shape[2] - 0.5)
    for right, down in (
        (0, 0),
        (frames.columns - 1, 0),
        (0, frames.rows - 1),
        (frames.columns - 1, frames.rows - 1),
    ):
        exact = starts + right * steps[:, 0] + down * steps[:, 1]
        off = np.abs(exact - (start + right * turn[0] + down * turn[1]))
        # Beyond the images nothing has to lie on a slice, as there is none.
        if off[:, :2].max() > MAX_OFF_VOXELS or off[~beyond, 2].max(initial=0.0) > MAX_OFF_VOXELS:
            return None
    return Placement(turn=turn[:, :2].T.astype(np.int64), start=start.astype(np.int64))


def stack_frames(path: str | Path, frames: Frames) -> tuple[NDArray[np.float64], list[int]]:
    """Voxel index to RAS+ mm of frames in space, and the slice of each; frames may be missing and
    be doubled.

    Raises `BadFile` if they are not slices of one regular grid, or if it cannot be said how far its
    slices lie apart.
    """
    if np.ptp(frames.turns, axis=0).max() > 1e-4 or np.ptp(frames.edges, axis=0).max() > 1e-4:
        raise BadFile(
            f"{path}: its frames differ in orientation or pixel spacing, so they are no volume"
        )
    along_row, down_column = frames.turns[0].reshape(2, 3)
    normal = np.cross(along_row, down_column)
    depth = frames.places @ normal
    depth = depth - depth.min()
    step = _step_of(path, frames, np.sort(depth))
    first, last = frames.places[depth.argmin()], frames.places[depth.argmax()]
    count = int(np.rint(depth.max() / step))
    between = (last - first) / count if count else normal * step
    k_of = np.rint(depth / step)
    drift = np.linalg.norm(frames.places - (first + k_of[:, None] * between), axis=1).max()
    if (
        drift > 0.05 * min(*frames.edges[0], step)
        or np.linalg.norm(np.cross(between, normal)) > 1e-3 * step
    ):
        raise BadFile(
            f"{path}: its slices do not lie straight above each other, so they are no volume"
        )
    affine = np.eye(4)
    affine[:3, 0] = along_row * frames.edges[0][1]
    affine[:3, 1] = down_column * frames.edges[0][0]
    affine[:3, 2] = between
    affine[:3, 3] = first
    return LPS @ affine, [int(k) for k in k_of]


def _step_of(path: str | Path, frames: Frames, depth: NDArray[np.float64]) -> float:
    """The distance between slices in mm; frames lie at `depth` (in order, the first at 0)."""
    step_mm, thick = frames.step_mm, frames.thickness_mm
    if step_mm and step_mm > 0 and _fits(depth, step_mm):
        return step_mm
    gaps = np.diff(depth)
    smallest = float(min(gaps[gaps > 0.01], default=0.0))
    if not smallest and thick and thick > 0:  # frames at one place, as deep as they are thick
        return thick
    if smallest and not _fits(depth, smallest):
        raise BadFile(
            f"{path}: the distances between its slices differ, so they are no volume; give the "
            "images it was made from with --source"
        )
    if smallest and _is_step(smallest, frames):
        return smallest
    raise BadFile(
        f"{path}: does not say how far its slices lie apart, and the gaps between its frames do "
        "not either; give the images it was made from with --source"
    )


def _is_step(gap: float, frames: Frames) -> bool:
    """Whether the smallest gap between frames is the distance between slices.

    Certain where neighbouring frames touch, as no slice fits between them, or lie as far apart as
    the file says but for rounding that adds up. A wider gap is one slice or several.
    """
    step_mm, thick = frames.step_mm, frames.thickness_mm
    touching = thick is not None and gap <= _TOUCHING * thick
    confirmed = step_mm is not None and abs(gap - step_mm) <= 0.01 * step_mm
    return touching or confirmed


def _fits(depth: NDArray[np.float64], step: float) -> bool:
    """Whether depths are whole multiples of a step, up to rounding."""
    return bool(np.abs(depth / step - np.rint(depth / step)).max() < 0.1)
