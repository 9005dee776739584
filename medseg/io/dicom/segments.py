"""DICOM segmentations (SEG, PS3.3 A.51 and C.8.20) in: an own strict reader.

With the images a segmentation was made from, every frame lies on one of their slices. Segments that
share voxels are no
label map: `read_seg` refuses them unless told which to take, `read_segments` gives every one by
itself.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning
from medseg.files import MAX_BYTES
from medseg.io.dicom.codes import read_code, read_codes, rgb, table_of
from medseg.io.dicom.frames import parse
from medseg.io.dicom.grid import Frames, ImageGrid, Placement, open_grid, placed_on, stack_frames
from medseg.io.dicom.headers import BIG_ENDIAN, guarded, header_values
from medseg.io.dicom.pixels import stored_pixels
from medseg.io.dicom.result import planes_on_grid, read_object
from medseg.io.dicom.slices import SEG_CLASSES
from medseg.io.dicom.source import Entry, Paths, Source as PixelSource
from medseg.io.voxels import Overlap, check_axes, chosen, labels_only, make_volume
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

#: What a segmentation says of its segments, wherever they lie.
_ABOUT_SEGMENTS = (
    "SpecificCharacterSet", "SOPClassUID", "SegmentationType", "PixelPaddingValue",
    "SegmentSequence",
)  # fmt: skip
#: How a segment's description says which label value it is.
LABEL_VALUE = "Label value {}"
#: Most voxels of a grid of which less than a hundredth is in the file.
MAX_EMPTY = 1 << 28


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    """A segmentation: its segments with the label values they get, and where its frames lie."""

    dataset: Any
    frames: Frames
    table: LabelTable
    value_of: dict[int, int]  # segment number to label value, without the background
    background: int  # what stands for no segment in a label map
    segment_of: list[int]  # the segment of each frame; 0 in a label map


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """The voxels on which frames are painted."""

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    placement: Placement


def read_seg(
    path: str | Path,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    segments: Sequence[str] | None = None,
    source: Paths | None = None,
    series: str | int | None = None,
    repair: bool = False,
) -> Volume:
    """The label map of a DICOM segmentation, as uint8 or uint16. Raises `BadFile`.

    segments: only these, by name or label value, laid over each other in this order, the later over
    the earlier. Without it, segments that share voxels are refused. Of FRACTIONAL ones the voxels
    of at least one half are taken, with a `DataWarning`. Slices without a frame are background.
    Axes: i along the rows, j down the columns, k along the normal of the slices, as `read` has them
    for the images.
    source: the images it was made from, on whose whole grid it is put, `series` and `repair` as for
    `read`. What lies beyond them is left out with a `DataWarning`.
    """
    if volume_index not in (None, 0):
        raise BadFile(f"{path}: is one segmentation, there is no volume {volume_index} in it")
    segmentation = _parse(path)
    grid = None if source is None else open_grid(source, series=series, repair=repair)
    canvas = _canvas(path, segmentation, grid)
    data, shared = _painted(
        path, segmentation, canvas, values=chosen(path, segmentation.table, segments)
    )
    if shared and segments is None:
        raise Overlap(path, shared)
    return _on_grid(path, labels_only(path, make_volume(path, data, canvas.affine)), grid)


def read_segments(
    path: str | Path,
    *,
    source: Paths | None = None,
    series: str | int | None = None,
    repair: bool = False,
) -> Iterator[tuple[Label, Volume]]:
    """Every segment of a DICOM segmentation as a mask (uint8, 0 and 1) of its own, overlaps kept,
    one after the other. Raises `BadFile`.

    source, series, repair: as for `read_seg`.
    """
    segmentation = _parse(path)
    grid = None if source is None else open_grid(source, series=series, repair=repair)
    canvas = _canvas(path, segmentation, grid)

    def mask_of(label: Label) -> Volume:
        mask = _painted(path, segmentation, canvas, values=[label.value])[0] > 0
        return _on_grid(path, make_volume(path, mask.view(np.uint8), canvas.affine), grid)

    return ((label, mask_of(label)) for label in segmentation.table.labels)


def read_seg_table(path: str | Path) -> LabelTable:
    """Names, colours and codes of a DICOM segmentation, values as `read_seg` gives them. Raises
    `BadFile`.
    """
    entry = Entry(path=Path(path))
    with PixelSource(path) as source:  # without the places of frames, of which there may be many
        dataset = header_values(source, entry, _ABOUT_SEGMENTS)
    table: LabelTable = guarded(str(path), lambda dicom: _segments(path, dataset)[0])
    return table


def _canvas(path: str | Path, parsed: _Parsed, grid: ImageGrid | None) -> _Canvas:
    """The grid of the images if the frames lie on it, else the frames' own. Raises `BadFile`."""
    frames = parsed.frames
    if grid is not None:
        uid = str(parsed.dataset.get("FrameOfReferenceUID") or "")
        if uid and grid.frame_of_reference and uid != grid.frame_of_reference:
            warnings.warn(
                f"{path}: names another frame of reference than the images given with --source",
                DataWarning,
                stacklevel=5,
            )
        placement = placed_on(frames, grid)
        if placement is not None:
            return _Canvas(affine=grid.affine, shape=grid.shape, placement=placement)
    try:
        affine, k_of = stack_frames(path, frames)
    except BadFile:
        if grid is None:
            raise
        raise BadFile(
            f"{path}: its frames do not lie on slices of the series given as its source; give the "
            "series that it was made from"
        ) from None
    shape = (frames.columns, frames.rows, max(k_of) + 1)
    voxels = frames.columns * frames.rows * shape[2]
    check_axes(path, shape)
    if voxels > max(MAX_EMPTY, 100 * frames.columns * frames.rows * len(k_of)):
        raise BadFile(
            f"{path}: its frames lie too far apart to be slices of one scan; export the"
            " segmentation again"
        )
    if voxels * 2 > MAX_BYTES:
        raise BadFile(f"{path}: claims more than the {MAX_BYTES / 2**30:.3g} GB allowed")
    start = np.zeros((len(k_of), 3), np.int64)
    start[:, 2] = k_of
    return _Canvas(
        affine=affine, shape=shape, placement=Placement(turn=np.eye(2, dtype=np.int64), start=start)
    )


def _on_grid(path: str | Path, labels: Volume, grid: ImageGrid | None) -> Volume:
    """Labels on the grid of the images, if there is one. Raises `BadFile`."""
    if grid is None or labels.affine is grid.affine:
        return labels
    if labels.shape == grid.shape and np.array_equal(labels.affine, grid.affine):
        return labels
    try:
        planes = planes_on_grid(labels, path, affine=grid.affine, shape=grid.shape)
    except BadOutput:
        raise BadFile(
            f"{path}: lies on another grid than the series given as its source; leave that out to"
            " keep its grid"
        ) from None
    return Volume(planes.T, grid.affine)


def _painted(
    path: str | Path, parsed: _Parsed, canvas: _Canvas, *, values: list[int]
) -> tuple[NDArray, int]:
    """The chosen labels (I, J, K), later ones over earlier ones, and how many voxels were painted
    twice.
    """
    out = np.zeros(canvas.shape, np.uint16, order="F")
    shared = beyond = 0

    def paint(dicom: Any) -> None:
        nonlocal shared, beyond
        for number, frame in _labelled(path, parsed, values):
            target, plane = canvas.placement.put(number, frame, out)
            here = plane > 0
            if plane.size < frame.size:
                beyond += int((frame > 0).sum()) - int(here.sum())
            shared += int((here & (target > 0)).sum())
            target[here] = plane[here]

    guarded(str(path), paint)
    if beyond and not out.any():
        raise BadFile(
            f"{path}: lies beyond the images given with --source; give the series that it was made"
            " from"
        )
    if beyond:
        warnings.warn(
            f"{path}: labelled pixels beyond the images, left out: {beyond}",
            DataWarning,
            stacklevel=4,
        )
    return out, shared


def _labelled(
    path: str | Path, parsed: _Parsed, values: list[int]
) -> Iterator[tuple[int, NDArray]]:
    """Number and label values (rows, columns) of the frames of chosen labels, label by label."""
    frame = _frames(path, parsed.dataset)
    kind = parsed.dataset.SegmentationType
    if kind == "LABELMAP":
        is_named = np.zeros(65536, bool)
        is_named[[0, parsed.background, *parsed.value_of]] = True
        new_value = np.zeros(65536, np.uint16)
        new_value[values] = values
        for number in range(len(parsed.segment_of)):
            pixels = frame(number)
            if not is_named[pixels].all():
                raise BadFile(
                    f"{path}: holds label values that it does not name; export the segmentation"
                    " again"
                )
            yield number, new_value[pixels]
        return
    half = int(parsed.dataset.MaximumFractionalValue) / 2 if kind == "FRACTIONAL" else 0.5
    for value in values:
        for number, segment in enumerate(parsed.segment_of):
            if parsed.value_of[segment] == value:
                yield number, (frame(number) >= half) * np.uint16(value)


def _frames(path: str | Path, dataset: Any) -> Callable[[int], NDArray]:
    """A function that gives the pixels (rows, columns) of a frame."""
    rows, columns, count = (
        int(dataset.Rows),
        int(dataset.Columns),
        len(dataset.PerFrameFunctionalGroupsSequence),
    )
    size, bits = rows * columns, int(dataset.BitsAllocated)
    if (
        bits not in (1, 8, 16)
        or dataset.get("SamplesPerPixel", 1) != 1
        or dataset.get("PixelRepresentation", 0) != 0
    ):
        raise BadFile(f"{path}: its pixels are stored in a way that medseg does not read")
    syntax = dataset.file_meta.get("TransferSyntaxUID")  # old files may have no such header
    if syntax and syntax.is_encapsulated:
        if bits == 1:
            raise BadFile(
                f"{path}: its bit planes are compressed, which medseg does not unpack; use gdcmconv"
                " --raw first"
            )
        return _unpacked(path, (count, rows, columns)).__getitem__
    pixels = dataset.PixelData
    if len(pixels) * 8 < size * count * bits:
        raise BadFile(
            f"{path}: the file is too short for what its header claims; it is damaged or incomplete"
        )
    if bits > 1:
        kind = np.dtype(f"{'>' if syntax == BIG_ENDIAN else '<'}u{bits // 8}")
        array = np.frombuffer(pixels, kind, size * count).reshape(count, rows, columns)
        return array.__getitem__
    raw = np.frombuffer(pixels, np.uint8)
    if syntax == BIG_ENDIAN and dataset["PixelData"].VR == "OW":  # the bytes of words, in pairs
        raw = raw.view(np.uint16).byteswap().view(np.uint8)
    return partial(_bit_plane, raw, rows, columns)


def _bit_plane(raw: NDArray[np.uint8], rows: int, columns: int, number: int) -> NDArray:
    """Frame `number` of bit planes, which follow each other bit by bit, without padding."""
    start, end = number * rows * columns, (number + 1) * rows * columns
    whole = np.unpackbits(raw[start // 8 : -(-end // 8)], bitorder="little")
    return whole[start % 8 :][: end - start].reshape(rows, columns)


def _unpacked(path: str | Path, shape: tuple[int, int, int]) -> NDArray:
    """The frames (count, rows, columns) of a compressed segmentation, unpacked as those of every
    other DICOM file are. Raises `BadFile`.
    """
    with PixelSource(path) as source:
        entry = Entry(path=Path(path))
        with source.open(entry) as file:
            slices = parse(source, entry, file)
        frames = np.stack(list(stored_pixels(source, slices or [])))
    if frames.shape != shape:
        raise BadFile(f"{path}: its pixels are not what its header says; the file is damaged")
    return frames


def _parse(path: str | Path) -> _Parsed:
    """What a segmentation says. Raises `BadFile` for what is damaged, or no volume."""
    segmentation: _Parsed = guarded(
        str(path), lambda dicom: _parsed(path, read_object(path, dicom))
    )
    if segmentation.dataset.SegmentationType == "FRACTIONAL":
        warnings.warn(
            f"{path}: is a fractional segmentation; voxels of at least one half were taken",
            DataWarning,
            stacklevel=4,
        )
    return segmentation


def _parsed(path: str | Path, dataset: Any) -> _Parsed:
    table, value_of, background = _segments(path, dataset)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if not frames or len(frames) != int(dataset.NumberOfFrames):
        raise BadFile(f"{path}: does not say where its frames lie; it is tiled, or damaged")
    segment_of = [0] * len(frames)
    if dataset.SegmentationType != "LABELMAP":
        items = _groups("SegmentIdentificationSequence", frames, shared)
        segment_of = [int(item.ReferencedSegmentNumber) for item in items]
        if not set(segment_of) <= set(value_of):
            raise BadFile(
                f"{path}: has frames of segments that it does not describe; export the segmentation"
                " again"
            )
    return _Parsed(
        dataset=dataset,
        frames=_frames_in_space(path, dataset, shared),
        table=table,
        value_of=value_of,
        background=background,
        segment_of=segment_of,
    )


def _segments(path: str | Path, dataset: Any) -> tuple[LabelTable, dict[int, int], int]:
    """The label table of a segmentation, the label value of each segment number, and what stands
    for no segment in a label map.
    """
    if str(dataset.get("SOPClassUID")) not in SEG_CLASSES:
        raise BadFile(f"{path}: is no DICOM segmentation")
    kind = str(dataset.SegmentationType)
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise BadFile(f"{path}: is a kind of segmentation that medseg does not know")
    background = int(dataset.get("PixelPaddingValue") or 0) if kind == "LABELMAP" else 0
    return *_table(path, dataset, background=background, kind=kind), background


def _groups(name: str, frames: Any, shared: Any) -> list[Any]:
    """The functional group of a name for each frame: its own, else the shared one, else {}."""
    groups = []
    for frame in frames:
        items = frame.get(name) or shared.get(name)
        groups.append(items[0] if items else {})
    return groups


def _frames_in_space(path: str | Path, dataset: Any, shared: Any) -> Frames:
    """Where the frames of a segmentation lie. Raises `BadFile` if it does not say it of all."""
    frames = dataset.PerFrameFunctionalGroupsSequence
    positions = _groups("PlanePositionSequence", frames, shared)
    places = [item.get("ImagePositionPatient") for item in positions]
    orientations = _groups("PlaneOrientationSequence", frames, shared)
    turns = [item.get("ImageOrientationPatient") for item in orientations]
    sizes = _groups("PixelMeasuresSequence", frames, shared)
    edges = [size.get("PixelSpacing") for size in sizes]
    if not (all(places) and all(turns) and all(edges)):
        raise BadFile(f"{path}: does not lie in a patient's space, so it is no volume")
    apart, thick = sizes[0].get("SpacingBetweenSlices"), sizes[0].get("SliceThickness")
    columns, rows = int(dataset.Columns), int(dataset.Rows)
    check_axes(path, (columns, rows))
    return Frames(
        places=np.array(places, np.float64),
        turns=np.array(turns, np.float64),
        edges=np.array(edges, np.float64),
        rows=rows,
        columns=columns,
        step_mm=float(apart) if apart else None,
        thickness_mm=float(thick) if thick else None,
    )


def _table(
    path: str | Path, dataset: Any, *, background: int, kind: str
) -> tuple[LabelTable, dict[int, int]]:
    """The label table of a segmentation, and the label value of each segment number."""
    items = list(dataset.SegmentSequence)
    if kind == "LABELMAP":
        items = _structures(path, items, background)
    numbers = [int(item.SegmentNumber) for item in items]
    values = _described_values(items)
    if kind == "LABELMAP" or not values:
        values = numbers
    if len(set(numbers)) != len(numbers) or not items:
        raise BadFile(
            f"{path}: two of its segments have the same number, or it has none; export it again"
        )
    try:
        table = table_of(
            values,
            names=[str(item.get("SegmentLabel") or "") for item in items],
            colors=[rgb(item.get("RecommendedDisplayCIELabValue")) for item in items],
            codes=[_codes(item) for item in items],
        )
    except BadConfig as error:
        raise BadFile(f"{path}: {error}; export the segmentation again") from None
    return table, dict(zip(numbers, values))


def _structures(path: str | Path, items: Sequence[Any], background: int) -> list[Any]:
    """The segments of a label map without what stands for no structure."""
    return [item for item in items if not _is_background(path, item, background)]


def _described_values(items: Sequence[Any]) -> list[int]:
    """The label value that each segment's description gives; none unless all do, and different
    ones.
    """
    pattern = LABEL_VALUE.format(r"(\d+)")
    texts = [str(item.get("SegmentDescription") or "") for item in items]
    matches = filter(None, (re.fullmatch(pattern, text) for text in texts))
    values = [int(match[1]) for match in matches]
    return values if len(values) == len(items) == len(set(values)) else []


def _codes(item: Any) -> dict[str, Any]:
    """The codes of a segment."""
    return read_codes(
        item.get("SegmentedPropertyCategoryCodeSequence"),
        item.get("SegmentedPropertyTypeCodeSequence"),
        item.get("AnatomicRegionSequence"),
    )


def _is_background(path: str | Path, item: Any, background: int) -> bool:
    """Whether a segment of a label map is none: what pads it (PS3.3 C.8.20.2.4), or number 0 if
    coded so.
    """
    number = int(item.SegmentNumber)
    code = read_code(item.SegmentedPropertyTypeCodeSequence)
    if number == 0 != background and (code is None or code[:2] != ("DCM", "125040")):
        raise BadFile(
            f"{path}: uses the number 0 for a structure, which no label map can; export it again"
        )
    return number in (0, background)
