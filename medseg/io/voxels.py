"""What every reader does with voxels once it has their bytes: shape, scale, choose one volume,
check the values.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from medseg.errors import BadFile, BadGeometry, DataWarning
from medseg.files import ByteStream
from medseg.volume import SCANNER, Space, Volume

if TYPE_CHECKING:
    from medseg.labels import LabelTable

#: Longest axis of a volume; more is a damaged header.
MAX_AXIS = 1 << 20
#: Most bytes behind the voxels that can be padding: the largest block up to which file systems and
#: tapes are filled.
MAX_PADDING = 1 << 16
#: Values as low as this are those of air in Hounsfield units; half-way to soft tissue.
_AIR_HU = -500
#: Planes turned around at a time: as many as bytes come from memory at once.
_PLANES = 64


class SeveralVolumes(BadFile):
    """A file holds several volumes and none was chosen; `count` says how many."""

    def __init__(self, path: str | Path, count: int) -> None:
        super().__init__(
            f"{path}: holds {count} volumes; choose one with --volume N (0 to {count - 1})"
        )
        self.count = count


class Overlap(BadFile):
    """Structures of a file share voxels, so they are not one label map."""

    def __init__(self, path: str | Path, voxels: int) -> None:
        super().__init__(
            f"{path}: {voxels} voxels belong to more than one of its structures; where they "
            "overlap they are not one "
            "label map: choose with `medseg convert --segment NAME` which to take (given again, "
            "the later lies on "
            "top), or convert it to .seg.nrrd, which keeps them all"
        )


def chosen(path: str | Path, table: LabelTable, segments: Sequence[str] | None) -> list[int]:
    """The label values of segments given by name or value, in that order; all of them for None.
    Raises `BadFile`.
    """
    if segments is None:
        return list(table.values)
    values = []
    for word in segments:
        matches = [
            label.value
            for label in table.labels
            if label.name.casefold() == word.strip().casefold()
        ]
        if not matches and word.strip().isdecimal() and int(word) in table:
            matches = [int(word)]
        if len(matches) != 1:
            what = "several segments" if matches else "no segment"
            there = "; ".join(f"{label.value} {label.name}" for label in table.labels)
            there = there if len(there) <= 120 else "those that `medseg info` lists"
            raise BadFile(f"{path}: has {what} '{word}', by name or number; it has {there}")
        values += matches
    return values


def make_volume(
    path: str | Path, data: NDArray, affine: ArrayLike, space: Space = SCANNER
) -> Volume:
    """A `Volume` of what `path` held. Raises `BadFile` if the affine is not the geometry of a
    scan.
    """
    try:
        return Volume(data, np.asarray(affine, dtype=np.float64), space)
    except BadGeometry as error:
        raise BadFile(f"{path}: {error}; correct the header or export the scan again") from None


def check_axes(path: str | Path, sizes: Sequence[int]) -> None:
    """Raise `BadFile` for sizes of axes that no scan has."""
    if any(not 1 <= size <= MAX_AXIS for size in sizes):
        raise BadFile(
            f"{path}: its header gives an axis a length that no scan has; the file is damaged"
        )


def choose_volume(path: str | Path, count: int, volume_index: int | None) -> int:
    """Which of `count` volumes to read. Raises `SeveralVolumes` if there are several and none was
    chosen.
    """
    if volume_index is None and count > 1:
        raise SeveralVolumes(path, count)
    index = volume_index or 0
    if not 0 <= index < count:
        raise BadFile(f"{path}: has no volume {index}; it holds {count}, numbered from 0")
    return index


def read_voxels(
    stream: ByteStream, dtype: DTypeLike, shape: tuple[int, ...], *, count: int = 1, index: int = 0
) -> NDArray:
    """Array `index` of `count` that follow each other in a stream, first axis fastest, in this
    machine's byte order.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    stream.check_claim(size * count)
    if index:
        stream.skip(size * index)
    data = np.frombuffer(stream.read(size), dtype=kind).reshape(shape, order="F")
    if count > index + 1:
        stream.skip(size * (count - index - 1))
    if not kind.isnative:
        data.byteswap(inplace=True)
        data = data.view(kind.newbyteorder("="))
    return data


def finish_voxels(
    path: str | Path, stream: ByteStream, data: NDArray, sizes: Sequence[int]
) -> None:
    """Read a stream to its end behind voxels of `sizes`, of which `data` are those read.

    Zeros or one line end behind them are passed over with a `DataWarning` that names `path`;
    anything else is a `BadFile`. That they are no voxels is certain only if no axis that is longer
    than the header says would explain how many there are, and if the voxels did not move: zeros
    that are less than a voxel may be the end of the last one, and a transfer as text puts a byte
    before every line end.
    """
    rest = stream.rest(MAX_PADDING)
    if not rest:
        return
    total = math.prod(sizes) * data.dtype.itemsize
    longer = any(len(rest) % (total // size) == 0 for size in sizes)
    zeros = rest.count(0) == len(rest) >= data.dtype.itemsize
    padding = zeros or rest in (b"\n", b"\r\n")
    if longer or not padding or _as_text(data):
        raise stream.refuse_rest()
    what = (
        "zeros follow its voxels and belong"
        if zeros
        else "a line end follows its voxels and belongs"
    )
    warnings.warn(f"{path}: {what} to nothing; passed over", DataWarning, stacklevel=3)


def _as_text(data: NDArray) -> bool:
    """Whether every line feed in the voxels comes after a carriage return, as a transfer as text
    leaves them.
    """
    content = data.tobytes("F")
    feeds = content.count(b"\n")
    return 0 < feeds == content.count(b"\r\n")


def rescale(path: str | Path, data: NDArray, slope: float, intercept: float) -> NDArray:
    """`data * slope + intercept`: whole numbers stay exact whole numbers, everything else becomes
    float32.

    Slope 1 with intercept 0 returns the data as it is.
    """
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise BadFile(f"{path}: the scaling of its values is not a number; correct the header")
    if slope == 1 and intercept == 0:
        return data
    if data.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        whole = _rescaled_whole(data, int(slope), int(intercept))
        if whole is not None:
            return whole
    out = np.empty(data.shape, np.float32, order="F")
    with np.errstate(over="ignore"):
        # Slab by slab: the float64 in between would double the memory.
        for k in range(data.shape[2]):
            out[..., k] = data[..., k].astype(np.float64) * slope + intercept
    return out


def _rescaled_whole(data: NDArray, slope: int, intercept: int) -> NDArray | None:
    """`data * slope + intercept` in the smallest type that holds every value, None if none does."""
    ends = [int(value) * slope + intercept for value in (data.min(), data.max())]
    for dtype in (np.int16, np.int32, np.int64):
        if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
            # The sum of the parts is within range at every voxel, so wrap-around in between cancels
            # out.
            factor: NDArray = np.array(slope).astype(dtype)
            shift: NDArray = np.array(intercept).astype(dtype)
            return data.astype(dtype) * factor + shift
    return None


def finite(path: str | Path, volume: Volume) -> Volume:
    """The volume with NaN replaced by 0 and infinities by the largest finite value of their sign,
    with a warning. Where values go as low as those of air in CT, 0 is water, and NaN, which there
    fills what lies outside of the scan, becomes the lowest value.

    Raises `BadFile` if more than half of the voxels are not finite.
    """
    if volume.data.dtype.kind != "f":
        return volume
    flat = volume.data.reshape(-1, order="A")
    with np.errstate(all="ignore"):
        # One quick pass: a sum is finite only if all parts are.
        if math.isfinite(float(flat.sum(dtype=np.float64))):
            return volume
    good = np.isfinite(volume.data)
    bad = volume.data.size - int(good.sum())
    if not bad:
        return volume
    if bad * 2 > volume.data.size:
        raise BadFile(
            f"{path}: {bad} of {volume.data.size} voxels are not numbers; export the scan again"
        )
    low, high = (
        volume.data.min(where=good, initial=np.inf),
        volume.data.max(where=good, initial=-np.inf),
    )
    empty = float(low) if low <= _AIR_HU else 0.0
    data = np.nan_to_num(volume.data, nan=empty, posinf=float(high), neginf=float(low))
    warnings.warn(
        f"{path}: {bad} of {volume.data.size} voxels are not finite numbers; NaN was read as"
        f" {empty:g}, infinities as the largest and smallest value",
        DataWarning,
        stacklevel=3,
    )
    return volume.with_data(data)


def labels_only(path: str | Path, volume: Volume) -> Volume:
    """A label map as uint8, or uint16 if a value is above 255. Raises `BadFile` for values that are
    no labels.
    """
    data = volume.data
    remedy = "give a label map, not a scan"
    if data.dtype.kind == "f":
        for plane in data.T:  # a plane at a time stays in the processor's cache
            if not np.isfinite(plane).all():
                raise BadFile(
                    f"{path}: some voxels are not numbers, so it is not a label map; {remedy}"
                )
            if (plane != np.rint(plane)).any():
                raise BadFile(
                    f"{path}: some voxels are not whole numbers, so it is not a label map; {remedy}"
                )
    low, high = data.min(), data.max()
    if low < 0:
        raise BadFile(f"{path}: some voxels are negative, so it is not a label map; {remedy}")
    if high > 65535:
        raise BadFile(f"{path}: some voxels are above 65535, too many for a label map; {remedy}")
    return volume.with_data(data.astype(np.uint8 if high <= 255 else np.uint16, copy=False))


def stored_dtype(data: NDArray) -> np.dtype:
    """The dtype in which an array is written: truth values as uint8, half precision as float32,
    others as they are.
    """
    if data.dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if data.dtype == np.float16 else data.dtype.newbyteorder("=")


def slabs(data: NDArray, dtype: np.dtype) -> Iterator[memoryview]:
    """The voxels as bytes of `dtype`, i fastest, a few k at a time so that no second copy of the
    volume is made.

    Where they lie in memory like that already, they are not copied at all.
    """
    planes = data.T  # (k, j, i)
    if planes.flags.c_contiguous:
        for plane in planes:
            yield np.ascontiguousarray(plane, dtype).reshape(-1).view(np.uint8).data
        return
    for k in range(0, len(planes), _PLANES):
        part = planes[k : k + _PLANES]
        block = np.empty(part.shape, dtype)
        # Line by line, so that what is read once from memory is still near when needed.
        for j in range(part.shape[1]):
            block[:, j] = part[:, j]
        yield block.reshape(-1).view(np.uint8).data


def digest(data: NDArray, dtype: np.dtype) -> str:
    """A short name for the voxels: equal for equal voxels, different for others."""
    state = hashlib.sha256(repr((dtype.str, data.shape)).encode())
    for piece in slabs(data, dtype):
        state.update(piece)
    return state.hexdigest()[:16]
