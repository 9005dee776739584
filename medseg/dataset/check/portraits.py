"""A case, small: what can be kept of all cases of a data set, to compare them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Case
from medseg.dataset.check.measures import (
    SAMPLE_VOXELS,
    CaseFacts,
    Intensity,
    box_of,
    count_voxels,
)
from medseg.io import digest
from medseg.volume import Volume, reorient

#: Cells of a thumbnail along each axis.
THUMBNAIL = 24
_ONE_OF_A_KIND = 200  # voxels of labels that no two cases have in exactly the same shape
_ARRANGED = 40  # with more structures than this, their places are not compared


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedLabels:
    """A label map along RAS, thinned and compressed: so small that those of all cases can be
    kept.
    """

    content: bytes
    shape: tuple[int, int, int]
    kind: str

    def unpacked(self) -> NDArray:
        """The label map (X, Y, Z)."""
        flat = np.frombuffer(zlib.decompress(self.content), self.kind)
        return flat.reshape(self.shape, order="F")


@dataclass(frozen=True, eq=False, kw_only=True)
class Portrait:
    """A case, small.

    thumbnail: (24, 24, 24) means of the first channel along RAS, clipped to its 1st and 99th
    percentile. labels: the same of the labels, coded, in a box around their centroid; None without
    labels. packed: those labels themselves. label_digests: names for the label map as it is stored
    and along RAS. shape_digest: a name for the labels wherever they lie, '' if they are too few to
    be one of a kind. features: what may be compared between cases.
    """

    case: str
    thumbnail: NDArray[np.float32]
    labels: NDArray[np.float32] | None = None
    packed: PackedLabels | None = None
    label_digests: tuple[str, str] | None = None
    shape_digest: str = ""
    features: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> frozenset[int]:
        """The label values that the case holds."""
        return frozenset(
            int(name.split()[1]) for name in self.features if name.startswith("volume ")
        )

    def reduced_to(self, values: Collection[int]) -> Portrait:
        """The same case as if its labels held these values alone; without labels if it holds none
        of them.
        """
        if self.packed is None or self.held <= set(values):
            return self
        labels = self.packed.unpacked()
        labels = np.where(np.isin(labels, sorted(values)), labels, 0)
        rest = {
            name: one
            for name, one in self.features.items()
            if not name.startswith(("arrangement ", "place "))
        }
        if not labels.any():
            return replace(self, labels=None, features=rest)
        thumbnail, places = _drawn(labels)
        return replace(self, labels=thumbnail, features=rest | places)


def portrait_of(
    case: Case, facts: CaseFacts, image: Volume, labels: Volume | None
) -> Portrait | None:
    """What the comparison with the other cases needs, small enough to keep for all; None for empty
    images.
    """
    first = facts.channels[0]
    spread = _spread(first)
    if spread is None:
        return None
    step = 1 + int((image.data.size / SAMPLE_VOXELS) ** (1 / 3))
    ras = reorient(image, "RAS")
    thin = ras.data[::step, ::step, ::step].astype(np.float32)
    intensities = np.clip(np.nan_to_num(thin, nan=first.low), first.low, first.low + spread)
    features = _image_features(image, ras, intensity=first, spread=spread)
    thumbnail = _shrink(intensities, [(0.0, float(n)) for n in intensities.shape])
    if labels is None or not facts.voxels:
        return Portrait(case=case.name, thumbnail=thumbnail, features=features)
    features |= _label_features(facts, voxel_mm3=image.voxel_mm3, spread=spread)
    labels_ras = reorient(Volume(labels.data, image.affine), "RAS").data
    whole = digest(labels.data, labels.data.dtype), digest(labels_ras, labels_ras.dtype)
    content = box_of(labels_ras > 0) or (slice(0), slice(0), slice(0))
    is_one_of_a_kind = sum(facts.voxels.values()) >= _ONE_OF_A_KIND
    shape = digest(labels_ras[content], labels_ras.dtype) if is_one_of_a_kind else ""
    labels_ras = labels_ras[::step, ::step, ::step]
    label_thumbnail, places = _drawn(labels_ras)
    payload = zlib.compress(labels_ras.tobytes(order="F"), 1)
    return Portrait(
        case=case.name,
        thumbnail=thumbnail,
        labels=label_thumbnail,
        packed=PackedLabels(content=payload, shape=labels_ras.shape, kind=labels_ras.dtype.str),
        label_digests=whole,
        shape_digest=shape,
        features=features | places,
    )


def _spread(intensity: Intensity) -> float | None:
    """From the 1st to the 99th percentile, or of all values where those are one; None for an empty
    image.
    """
    for spread in (intensity.high - intensity.low, intensity.maximum - intensity.minimum):
        if spread > 0:
            return spread
    return None


def _image_features(
    image: Volume, ras: Volume, *, intensity: Intensity, spread: float
) -> dict[str, float]:
    """What an image, which along RAS is `ras`, has to be compared by; spread: of its
    intensities.
    """
    low, high = intensity.low, intensity.high
    shape_mm = np.array(ras.shape) * ras.spacing_mm
    centre = image.affine @ (*(np.array(image.shape) - 1) / 2, 1.0)
    return {
        "scale": float(np.log10(spread)),
        "offset": float(np.arcsinh(low / spread)),
        "median": (intensity.percentiles[3] - low) / spread,
        "quartiles": (intensity.percentiles[4] - intensity.percentiles[2]) / spread,
        "highest": float(np.log1p(max(0.0, intensity.maximum - high) / spread)),
        "lowest": float(np.log1p(max(0.0, low - intensity.minimum) / spread)),
        "roughness": float(np.log(intensity.roughness + 1e-3)),
        **{f"size {axis}": float(np.log(size)) for axis, size in zip("xyz", shape_mm)},
        **{f"position {axis}": float(place) for axis, place in zip("xyz", centre)},
        **{f"spacing {axis}": float(np.log(size)) for axis, size in zip("xyz", ras.spacing_mm)},
    }


def _label_features(facts: CaseFacts, *, voxel_mm3: float, spread: float) -> dict[str, float]:
    """What labels have to be compared by, but for their places; spread: of the image's
    intensities.
    """
    first = facts.channels[0]
    inside = first.foreground
    brightness = contrast = 0.0
    if inside.size:
        brightness = (float(inside.mean()) - first.percentiles[3]) / spread
        contrast = float(np.log(float(inside.std()) / spread + 1e-3))
    volumes = {f"volume {value}": float(np.log(n * voxel_mm3)) for value, n in facts.voxels.items()}
    return {"brightness of labels": brightness, "contrast in labels": contrast, **volumes}


def _drawn(labels: NDArray) -> tuple[NDArray[np.float32], dict[str, float]]:
    """The thumbnail of a label map along RAS, and where in the image and among each other its
    structures lie.
    """
    codes, box = _code(labels)
    places = {
        f"place {axis}": (start + stop) / 2 / size
        for axis, (start, stop), size in zip("xyz", box, codes.shape)
    }
    return _shrink(codes, box), _arrangement(labels, box) | places


def _code(labels: NDArray) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """Labels as numbers between 0.5 and 1.5 that tell them apart, and a box of 2.5 deviations
    around their centroid.

    Such a box does not depend on where the labels lie, nor on single stray voxels.
    """
    inner = box_of(labels > 0) or (slice(None), slice(None), slice(None))
    top = int(labels.max(initial=0))
    # The golden ratio spreads any run of values evenly.
    weights = 0.5 + np.arange(top + 1) * 0.618034 % 1.0
    weights[0] = 0
    codes = np.zeros(labels.shape, np.float32)
    codes[inner] = weights.astype(np.float32)[labels[inner]]
    box = []
    for axis in range(3):
        along = (
            (labels > 0)
            .sum(axis=tuple(other for other in range(3) if other != axis))
            .astype(np.float64)
        )
        places = np.arange(len(along)) + 0.5
        middle = (along * places).sum() / along.sum()
        deviation = max(0.5, float(np.sqrt((along * (places - middle) ** 2).sum() / along.sum())))
        box.append((middle - 2.5 * deviation, middle + 2.5 * deviation))
    return codes, box


def _arrangement(labels: NDArray, box: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Where each structure lies among all, along RAS from the common centroid, in the deviations
    that the box is of.
    """
    inner = box_of(labels > 0) or (slice(0), slice(0), slice(0))
    cut = labels[inner]
    counts = count_voxels(cut)
    if not 1 < len(counts) <= _ARRANGED:
        return {}
    features = {}
    for axis, (start, stop) in enumerate(box):
        planes = np.moveaxis(cut, axis, 0)
        sums = np.array([np.bincount(plane.ravel(), minlength=max(counts) + 1) for plane in planes])
        places = np.arange(len(planes)) + inner[axis].start + 0.5
        for value, voxels in counts.items():
            middle = float(places @ sums[:, value]) / voxels
            features[f"arrangement {value} {'xyz'[axis]}"] = (
                (middle - (start + stop) / 2) / (stop - start) * 5
            )
    return features


def _shrink(data: NDArray[np.float32], box: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """The mean values of `THUMBNAIL` cells along each axis of a box in voxels; what lies outside
    the array is 0.

    By differences of running sums and not by products of matrices, which would start threads within
    threads.
    """
    cells: NDArray = data
    for axis, (start, stop) in enumerate(box):
        cells = np.moveaxis(cells, axis, 0)
        sums = np.zeros((len(cells) + 1, *cells.shape[1:]))
        np.cumsum(cells, axis=0, dtype=np.float64, out=sums[1:])
        edges = np.clip(np.linspace(start, stop, THUMBNAIL + 1), 0, len(cells))
        below = np.minimum(edges.astype(np.intp), len(cells) - 1)
        share = (edges - below)[:, None, None]
        until = sums[below] * (1 - share) + sums[below + 1] * share
        cells = np.moveaxis(np.diff(until, axis=0) * (THUMBNAIL / (stop - start)), 0, axis)
    return np.ascontiguousarray(cells, np.float32)
