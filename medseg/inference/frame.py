"""How the array a foreign model sees lies in a scan, and what leads from its logits back to the
scan.

nnU-Net (Isensee et al. 2021; nnunetv2 2.8.1, `DefaultPreprocessor`) turns a scan to an orientation
or leaves it as it is stored, changes the order of its axes, crops it to what is not 0, scales
intensities, and only then resamples. Names in a model's recipe stand for the functions of the dicts
here, so that other programs' ways are data, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.inference.regrid import nearest_places, regrid, separate_axis
from medseg.models import ChannelScale, Recipe, Resampling
from medseg.volume import Volume, reorient, reorient_axis_by_axis

Box: TypeAlias = tuple[slice, slice, slice]
Shape: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a network's array lies; numbers run along the network's axes but for `axes`.

    turned: the first scan as it is turned. axes: the axis of the turned scan along each of the
    network's. box: what is kept of the scan. shape: of the network's array, before it is padded.
    measured: what intensities are scaled by, box or more.
    """

    scan: Volume
    turned: Volume
    axes: Shape
    box: Box
    measured: Box
    spacing_mm: tuple[float, float, float]
    target_mm: tuple[float, float, float]
    shape: Shape
    logits: Resampling

    @property
    def cropped(self) -> Shape:
        """Voxels of the scan's part that is kept."""
        a, b, c = (side.stop - side.start for side in self.box)
        return a, b, c

    def painted(self) -> Painted:
        """On which grid labels are painted before `back` brings them to the scan."""
        scheme, scan = self.logits, self.cropped
        axis = None
        if scheme.scheme != "none":
            axis = separate_axis(self.target_mm, self.spacing_mm, scheme.separate)
        nearest = [scheme.order == 0 or (axis == n and scheme.order_across == 0) for n in range(3)]
        shape = [self.shape[n] if nearest[n] else scan[n] for n in range(3)]
        matrix = np.eye(4)
        for n in range(3):
            if not nearest[n]:
                zoom = self.shape[n] / scan[n]
                matrix[n, n], matrix[n, 3] = zoom, 0.5 * zoom - 0.5
        places = [nearest_places(self.shape[n], scan[n]) if nearest[n] else None for n in range(3)]
        return Painted(shape=(shape[0], shape[1], shape[2]), to_model=matrix, places=places)

    def back(self, painted: NDArray) -> NDArray:
        """What was painted, on the scan's own grid (I, J, K); 0 outside of the box."""
        for axis, places in enumerate(self.painted().places):
            if places is not None and len(places) != painted.shape[axis]:
                painted = painted.take(places, axis)
        shape = [self.turned.shape[axis] for axis in self.axes]
        whole = np.zeros(shape, painted.dtype)
        whole[self.box] = painted
        whole = whole.transpose(np.argsort(self.axes))
        return reorient(Volume(whole, self.turned.affine), self.scan.orientation).data

    def seen(self, volume: Volume, box: Box | None = None) -> NDArray:
        """A volume on the scan's grid, turned, its axes in the network's order, and cropped (a
        view); box: `measured`, or by default `box`."""
        data = reorient(volume, self.turned.orientation).data
        return data.transpose(self.axes)[box or self.box]

    @property
    def inner(self) -> Box:
        """Where `box` lies in `measured`."""
        a, b, c = (
            slice(one.start - all_.start, one.stop - all_.start)
            for one, all_ in zip(self.box, self.measured)
        )
        return a, b, c


@dataclass(frozen=True, kw_only=True)
class Painted:
    """The grid on which a painter paints; places: what `Frame.back` takes along each axis, None:
    all as it is."""

    shape: Shape
    to_model: NDArray[np.float64]
    places: Sequence[NDArray[np.int64] | None]


def orientation_for(recipe: Recipe, asked: str = "auto", *, dicom: bool) -> str:
    """To what a scan is turned: 'stored' for as it is. DICOM has no stored order of its own; LPS is
    what most make."""
    if asked != "auto":
        return asked
    if recipe.orientation != "auto":
        return recipe.orientation
    return "LPS" if dicom else "stored"


def lay_frame(
    volumes: Sequence[Volume],
    recipe: Recipe,
    orientation: str,
    *,
    region: Box | None = None,
    patch: Sequence[int] = (1, 1, 1),
) -> Frame:
    """The frame of the scans of one case on one grid.

    region: only this part of the scan is kept, and around it as much as fills a patch (voxels of
    the network's grid), so that windows see what lies there and no padding.
    """
    scan = volumes[0]
    turned_scan = scan if orientation == "stored" else reorient_axis_by_axis(scan, orientation)
    arrays = [reorient(one, turned_scan.orientation) for one in volumes]
    a, b, c = recipe.axes
    crop_box = CROPS[recipe.crop]([one.data.transpose(recipe.axes) for one in arrays])
    scan_spacing_mm = turned_scan.stated_spacing_mm
    spacing = (scan_spacing_mm[a], scan_spacing_mm[b], scan_spacing_mm[c])
    target = [own if new_mm is None else new_mm for own, new_mm in zip(spacing, recipe.spacing_mm)]
    box = crop_box
    if region is not None:
        least = [int(np.ceil(n * mm / own)) for n, mm, own in zip(patch, target, spacing)]
        box = _within(crop_box, _turned_box(scan, turned_scan, region, axes=recipe.axes), least)
    size = [side.stop - side.start for side in box]
    shape = [max(1, round(mm / new_mm * n)) for mm, new_mm, n in zip(spacing, target, size)]
    if recipe.image.scheme == "none":
        shape = size
    return Frame(
        scan=scan,
        turned=turned_scan,
        axes=recipe.axes,
        box=box,
        measured=crop_box,
        spacing_mm=spacing,
        target_mm=(target[0], target[1], target[2]),
        shape=(shape[0], shape[1], shape[2]),
        logits=recipe.logits,
    )


def _turned_box(scan: Volume, turned: Volume, region: Box, axes: Shape) -> Box:
    """A box of the scan's voxels along the network's axes."""
    inside = np.zeros(scan.shape, bool)
    inside[region] = True
    mask = reorient(scan.with_data(inside), turned.orientation).data.transpose(axes)
    return _nonzero([mask])


def _within(whole: Box, part: Box, least: Sequence[int]) -> Box:
    """The part, grown to at least so many voxels along each axis, as far as the whole allows."""
    box = []
    for all_, one, length in zip(whole, part, least):
        start, stop = max(one.start, all_.start), min(one.stop, all_.stop)
        if start >= stop:  # what is looked for lies where there is nothing
            start, stop = all_.start, all_.stop
        start = max(all_.start, min(start - (length - (stop - start)) // 2, start))
        stop = min(all_.stop, max(stop, start + length))
        start = max(all_.start, min(start, stop - length))
        box.append(slice(start, stop))
    return box[0], box[1], box[2]


def _nonzero(arrays: Sequence[NDArray]) -> Box:
    """The box around what is not 0 in any channel; everything where all is 0. Holes change nothing
    about it."""
    box = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        planes = np.zeros(arrays[0].shape[axis], bool)
        for array in arrays:
            planes |= array.any(axis=others)
        indices = np.flatnonzero(planes)
        box.append(
            slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, len(planes))
        )
    return box[0], box[1], box[2]


def _all(arrays: Sequence[NDArray]) -> Box:
    a, b, c = arrays[0].shape
    return slice(0, a), slice(0, b), slice(0, c)


#: Name in a recipe -> the box that is kept of the channels (A, B, C) of a case.
CROPS: dict[str, Callable[[Sequence[NDArray]], Box]] = {"nonzero": _nonzero, "none": _all}


def content_mask(channels: Sequence[NDArray]) -> NDArray[np.bool_]:
    """Where any of the cropped channels is not 0, its holes (6 neighbours) filled."""
    import cc3d

    mask = channels[0] != 0
    for channel in channels[1:]:
        mask |= channel != 0
    parts, count = cc3d.connected_components(~mask, connectivity=6, return_N=True)
    if count:
        outside = np.zeros(count + 1, bool)
        for axis in range(3):
            for side in (0, -1):
                outside[np.unique(parts.take(side, axis))] = True
        outside[0] = True
        mask |= ~outside[parts]
    return mask


def prepare_frame(
    volumes: Sequence[Volume],
    recipe: Recipe,
    frame: Frame,
    *,
    exact: bool,
    previous: Volume | None = None,
) -> NDArray[np.float32]:
    """The network's input (C, A, B, C) float32 of the scans of one case: scaled, then resampled.

    previous: the labels of a first stage, whose structures count as content of the scan.
    """
    out = np.empty((len(volumes), *frame.shape), np.float32)
    views = [frame.seen(volume, frame.measured) for volume in volumes]
    masked = any(channel.masked for channel in recipe.channels)
    mask = content_mask(views) if masked else None
    if mask is not None and previous is not None:
        mask |= frame.seen(previous, frame.measured) > 0
    for view, channel, target in zip(views, recipe.channels, out):
        # A copy in any case: scaling is done in place, and the scan must stay as it is.
        image = np.array(view, dtype=np.float32, order="C")
        SCALES[channel.scheme](image, channel, mask if channel.masked else None)
        if not np.isfinite(image.sum(dtype=np.float64)):
            raise BadFile("holds voxels that are not finite numbers; check the scan")
        if frame.box != frame.measured:
            image = np.ascontiguousarray(image[frame.inner])
        target[:] = regrid(
            image,
            frame.shape,
            recipe.image,
            current=frame.spacing_mm,
            new=frame.target_mm,
            exact=exact,
        )
    return out


def _scale_fixed(
    image: NDArray[np.float32], channel: ChannelScale, mask: NDArray[np.bool_] | None
) -> None:
    np.clip(image, channel.low, channel.high, out=image)
    image -= channel.mean
    image /= max(channel.sd, 1e-8)


def _scale_zscore(
    image: NDArray[np.float32], channel: ChannelScale, mask: NDArray[np.bool_] | None
) -> None:
    # In float32, summed pairwise, as numpy does: float64 would differ in the seventh digit.
    if mask is not None:
        inside = image[mask]
        image[mask] = (inside - inside.mean()) / max(inside.std(), 1e-8)
        return
    mean, sd = image.mean(), image.std()
    image -= mean
    image /= max(sd, 1e-8)


def _scale_range(
    image: NDArray[np.float32], channel: ChannelScale, mask: NDArray[np.bool_] | None
) -> None:
    image -= image.min()
    image /= np.clip(image.max(), 1e-8, None)


def _scale_bytes(
    image: NDArray[np.float32], channel: ChannelScale, mask: NDArray[np.bool_] | None
) -> None:
    image /= 255.0


def _keep(
    image: NDArray[np.float32], channel: ChannelScale, mask: NDArray[np.bool_] | None
) -> None:
    """Leave the intensities as they are."""


#: Name in a recipe -> what scales one channel (A, B, C) in place; mask: where mean and deviation
#: are taken.
SCALES: dict[str, Callable[[NDArray[np.float32], ChannelScale, NDArray[np.bool_] | None], None]] = {
    "fixed": _scale_fixed,
    "zscore": _scale_zscore,
    "range": _scale_range,
    "bytes": _scale_bytes,
    "none": _keep,
}


def one_hot(
    labels: Volume, values: Sequence[int], recipe: Recipe, frame: Frame, mask: NDArray[np.bool_]
) -> NDArray:
    """The channels (N, A, B, C) of 0 and 1 that a first stage's labels make for the second (section
    7)."""
    array = frame.seen(labels).astype(np.float32)
    array[(array == 0) & ~mask] = -1
    on_grid = regrid(
        array,
        frame.shape,
        recipe.labels,
        current=frame.spacing_mm,
        new=frame.target_mm,
        exact=True,
        labels=True,
    )
    return np.stack([on_grid == value for value in values]).astype(np.float32)
