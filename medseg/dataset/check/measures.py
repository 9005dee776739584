"""What is measured in one case: its intensities, the voxels and parts of its labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Voxels of a volume that statistics are made of, about; of larger ones only every second or third
#: plane is looked at.
SAMPLE_VOXELS = 1 << 21
_PERCENTILE_SAMPLE = 1 << 15
_FOREGROUND_SAMPLE = 1024
_PERCENTILES = (0.5, 1, 25, 50, 75, 99, 99.5)


@dataclass(frozen=True, eq=False, kw_only=True)
class Intensity:
    """Values of one channel; voxels that are not finite numbers are counted and left out of the
    rest.

    minimum, maximum and not_finite are of all voxels; of images of more than two million the rest
    is of a part of the planes. percentiles: the 0.5th, 1st, 25th, 50th, 75th, 99th and 99.5th.
    foreground: at most 1024 values from within the labels, evenly spread over them, in no order.
    """

    minimum: float
    maximum: float
    mean: float
    deviation: float
    percentiles: tuple[float, ...]
    roughness: float
    not_finite: int
    foreground: NDArray[np.float32] = field(repr=False)

    @property
    def low(self) -> float:
        """The 1st percentile."""
        return self.percentiles[1]

    @property
    def high(self) -> float:
        """The 99th percentile."""
        return self.percentiles[5]


@dataclass(frozen=True, eq=False, kw_only=True)
class CaseFacts:
    """What was measured in one case.

    shape, spacing_mm, orientation, affine: the first image's grid. dtype: as it is stored.
    content_shape: voxels of the smallest box that holds all that differs from the image's lowest
    value. label_shape: the same around the labels, or (0, 0, 0). voxels: label value to number of
    voxels, without background. parts: label value to the voxels of its connected parts, largest
    first.
    """

    case: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    affine: NDArray[np.float64] = field(repr=False)
    dtype: str
    channels: tuple[Intensity, ...]
    content_shape: tuple[int, int, int]
    label_shape: tuple[int, int, int]
    voxels: dict[int, int]
    parts: dict[int, tuple[int, ...]]


def intensity_of(data: NDArray, inside: NDArray[np.bool_] | None) -> Intensity:
    """Of a channel (X, Y, Z); inside: where its case has labels."""
    thin = data[:, :, :: 1 + data.size // SAMPLE_VOXELS]
    good = np.isfinite(data) if data.dtype.kind == "f" else None
    bad = 0 if good is None else data.size - int(good.sum())
    values = (thin if not bad else thin[np.isfinite(thin)]).ravel().astype(np.float32)
    if not values.size:
        values = np.zeros(1, np.float32)
    few = values[:: 1 + values.size // _PERCENTILE_SAMPLE]
    percentiles = tuple(float(value) for value in np.percentile(few, _PERCENTILES))
    foreground = np.zeros(0, np.float32)
    if inside is not None:
        foreground = data[inside]
        foreground = foreground[:: 1 + len(foreground) // _FOREGROUND_SAMPLE].astype(np.float32)
        foreground = foreground[np.isfinite(foreground)]
    low, high = (data, data) if not bad else (data[good], data[good])
    return Intensity(
        minimum=(
            float(low.min(initial=np.inf) if low.dtype.kind == "f" else low.min())
            if low.size
            else 0.0
        ),
        maximum=float(high.max()) if high.size else 0.0,
        mean=float(values.mean(dtype=np.float64)),
        deviation=float(values.std(dtype=np.float64)),
        percentiles=percentiles,
        roughness=_roughness(
            np.nan_to_num(thin.astype(np.float32), copy=False), percentiles[1], percentiles[5]
        ),
        not_finite=bad,
        foreground=foreground,
    )


def _roughness(data: NDArray[np.float32], low: float, high: float) -> float:
    """Mean squared difference between neighbours as a part of the variance: 2 for noise, near 0 for
    smooth images.
    """
    intensities = np.clip(data, low, high)
    variance = float(intensities.var(dtype=np.float64))
    if variance == 0:
        return 0.0
    squares = []
    for axis in range(3):
        step = np.diff(intensities, axis=axis).ravel(order="K")
        squares.append(float(np.einsum("i,i->", step, step)) / max(1, step.size))
    return float(np.mean(squares)) / variance


def count_voxels(labels: NDArray) -> dict[int, int]:
    """Label value to number of voxels, without background."""
    counts = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    for plane in labels.T:  # a plane at a time: counting makes 8 bytes of every voxel
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def content_of(data: NDArray, lowest: float) -> NDArray[np.bool_]:
    """Where an image differs from its lowest value, which is that of padding and of air that was
    cut out.
    """
    return data > lowest if np.isfinite(lowest) else np.zeros(data.shape, bool)


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds all that is true."""
    box = []
    for axis in range(3):
        planes = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(planes):
            return None
        box.append(slice(int(planes[0]), int(planes[-1]) + 1))
    return box[0], box[1], box[2]


def box_shape(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """The size of `box_of`; zeros where nothing is true."""
    box = box_of(mask)
    if box is None:
        return 0, 0, 0
    i, j, k = (part.stop - part.start for part in box)
    return i, j, k


def parts_of(labels: NDArray) -> dict[int, tuple[int, ...]]:
    """Label value to the voxels of its connected parts (26 neighbours), largest first."""
    import cc3d

    box = box_of(labels > 0)
    if box is None:
        return {}
    inner = np.asfortranarray(labels[box])
    parts = cc3d.connected_components(inner, connectivity=26)
    sizes = np.bincount(parts.ravel())
    values = np.zeros(len(sizes), labels.dtype)
    values[parts.ravel()] = inner.ravel()
    sizes_of: dict[int, list[int]] = {}
    for value, size in zip(values[1:], sizes[1:]):
        sizes_of.setdefault(int(value), []).append(int(size))
    return {value: tuple(sorted(sizes, reverse=True)) for value, sizes in sorted(sizes_of.items())}
