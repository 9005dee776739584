"""DICOM segmentations (SEG, PS3.3 A.51 and C.8.20): written by highdicom, read by an own strict reader.

A label value is the segment's number where the object can hold that: always in LABELMAP, and in BINARY, whose segments
are numbered 1, 2, ..., where the labels are; otherwise the segment's description says it, and the reader follows it.
Segments that share voxels are no label map: `read_seg` refuses them unless told which to take, `read_segments` gives
every one by itself.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning
from medseg.files import MAX_BYTES
from medseg.io.dicom.codes import (
    category_of,
    cielab,
    code_item,
    read_code,
    read_codes,
    rgb,
    table_of,
    text,
    type_of,
)
from medseg.io.dicom.frames import parse
from medseg.io.dicom.headers import guarded
from medseg.io.dicom.pixels import stored_pixels
from medseg.io.dicom.result import (
    DicomOptions,
    Origin,
    complete,
    decimal,
    moment,
    open_origin,
    planes_on_source,
    read_object,
    save,
    without_warnings,
)
from medseg.io.dicom.source import Entry, Paths, Source as PixelSource
from medseg.io.voxels import Overlap, check_axes, chosen, labels_only, make_volume
from medseg.volume import LPS, Volume

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

#: Segmentation Storage and Label Map Segmentation Storage.
SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
#: Most voxels of a grid of which less than a hundredth is in the file.
MAX_EMPTY = 1 << 28
_CT = "1.2.840.10008.5.1.4.1.1.2"
_RLE = "1.2.840.10008.1.2.5"
_EXPLICIT = "1.2.840.10008.1.2.1"
_VALUE = "Label value {}"
#: Names of the algorithm families of CID 7162 that are used.
_FAMILIES = {"123105": "Histogram Analysis", "123107": "Cluster Analysis", "123110": "Artificial Intelligence"}


def write_seg(
    volume: Volume,
    path: str | Path,
    *,
    table: LabelTable | None = None,
    source: Paths | None = None,
    options: DicomOptions | None = None,
) -> None:
    """Write a label map as a DICOM segmentation of the series at `source`. Raises `BadOutput`, `BadFile`.

    volume: labels on the source's grid, stored in any of the 48 ways, or a block of it.
    Labels that occur become segments; of a map without any, the table's first (or label 1) becomes an empty one.
    """
    if source is None:
        raise BadOutput(f"{path}: a DICOM result refers to the series it was made from; give it with --source")
    save(seg_dataset(volume, open_origin(source, options), path, table=table), path)


def seg_dataset(volume: Volume, origin: Origin, path: str | Path, *, table: LabelTable | None = None) -> Any:
    """The segmentation as a `highdicom.seg.Segmentation`; `path` is what errors name. Raises `BadOutput`."""
    if origin.options.seg_type not in ("binary", "labelmap"):
        raise BadConfig(f"'{origin.options.seg_type}' is not a kind of segmentation; use binary or labelmap")
    try:
        labels = labels_only(path, volume)
    except BadFile as error:
        raise BadOutput(f"{error}; a DICOM segmentation holds a label map only") from None
    planes = planes_on_source(labels, origin, path)
    with without_warnings(path):
        return _dataset(planes, origin, table)


def _dataset(planes: NDArray, origin: Origin, table: LabelTable | None) -> Any:
    segments = present_labels(planes, table)
    binary = origin.options.seg_type == "binary"
    if binary:
        number_of = np.zeros(max(int(planes.max()), segments[-1].value) + 1, planes.dtype)
        number_of[[label.value for label in segments]] = np.arange(1, len(segments) + 1)
        planes = number_of[planes]
    descriptions = [
        _segment(origin, label, number if binary else label.value) for number, label in enumerate(segments, 1)
    ]
    dataset = _encode(planes, origin, descriptions, binary)
    for item in dataset.SegmentSequence:
        if item.SegmentNumber:
            _name_algorithm(item, origin.options)
    complete(dataset, origin, "SEG")
    dataset.ContentDate, dataset.ContentTime = moment(origin)
    dataset.update(origin.lossy)
    return dataset


def present_labels(planes: NDArray, table: LabelTable | None) -> list[Label]:
    """The labels that occur, by value, with what the table says of them; of none, the table's first or label 1."""
    from medseg.labels import LabelTable

    present = [int(value) for value in np.flatnonzero(np.bincount(planes.ravel())) if value]
    if not present:
        return [table.labels[0]] if table is not None and len(table) else list(LabelTable.from_values([1]).labels)
    known = {label.value: label for label in table.labels} if table is not None else {}
    plain = {label.value: label for label in LabelTable.from_values(present).labels}
    return [known.get(value, plain[value]) for value in present]


def _segment(origin: Origin, label: Label, number: int) -> Any:
    """An item of the Segment Sequence (PS3.3 C.8.20.4)."""
    from highdicom.seg import SegmentDescription

    category, kind = code_item(category_of(label)), code_item(type_of(label))
    if label.type_modifier is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [code_item(label.type_modifier)]
    item = SegmentDescription(
        segment_number=number,
        segment_label=text(label.name),
        segmented_property_category=_concept(category),
        segmented_property_type=_concept(kind),
        algorithm_type="MANUAL",  # asks for nothing; `_name_algorithm` says what is true
        tracking_uid=origin.new_uid("tracking", label.value, label.name),
        tracking_id=text(f"{label.value} {label.name}"),
    )
    item.SegmentedPropertyCategoryCodeSequence = [category]
    item.SegmentedPropertyTypeCodeSequence = [kind]
    if label.region is not None:
        region = code_item(label.region)
        if label.region_modifier is not None:
            region.AnatomicRegionModifierSequence = [code_item(label.region_modifier)]
        item.AnatomicRegionSequence = [region]
    item.SegmentDescription = _VALUE.format(label.value)
    item.RecommendedDisplayCIELabValue = cielab(label.color)
    return item


def _name_algorithm(item: Any, options: DicomOptions) -> None:
    item.SegmentAlgorithmType = "AUTOMATIC" if options.model else "SEMIAUTOMATIC"
    item.SegmentAlgorithmName = text(f"medseg {options.model}") if options.model else "unknown (converted by medseg)"
    if options.model:
        item.SegmentationAlgorithmIdentificationSequence = [algorithm_item(options)]


def algorithm_item(options: DicomOptions) -> Any:
    """An item that identifies the algorithm (PS3.3 10.16)."""
    from pydicom.dataset import Dataset

    from medseg.labels import Code
    from medseg.version import __version__

    item = Dataset()
    item.AlgorithmFamilyCodeSequence = [code_item(Code("DCM", options.family, _FAMILIES[options.family]))]
    item.AlgorithmName = text(f"medseg {options.model}")
    item.AlgorithmVersion = text(f"{__version__} {options.version[:16]}")
    item.AlgorithmSource = "medseg"
    return item


def _concept(item: Any) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept.from_dataset(item)


def _encode(planes: NDArray, origin: Origin, descriptions: list[Any], binary: bool) -> Any:
    """The multi-frame image itself: geometry and references from the source's slices, pixels from `planes`.

    highdicom is given slices that carry nothing of the patient, so that nothing of a patient can get into what it
    copies or says. Frames without a voxel of their segment are left out, but for the first and the last slice, which
    the first segment always has: so every reader finds the whole grid of the source.
    """
    from highdicom.seg import Segmentation

    content = _digest(planes, descriptions)
    series_uid, instance_uid = (origin.new_uid(word, origin.options.seg_type, content) for word in ("series", "SEG"))
    empty_ends = [k for k in {0, len(planes) - 1} if binary and not planes[k].any()]
    if empty_ends:
        planes = planes.copy()
        planes[empty_ends, 0, 0] = 1  # keeps highdicom from leaving the frame out; taken back below
    dataset = Segmentation(
        source_images=[_skeleton(origin, k) for k in range(len(planes))],
        pixel_array=planes,
        segmentation_type="BINARY" if binary else "LABELMAP",
        segment_descriptions=descriptions,
        series_instance_uid=series_uid,
        series_number=1,
        sop_instance_uid=instance_uid,
        instance_number=1,
        manufacturer="medseg",
        manufacturer_model_name="medseg",
        software_versions="0",
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description="Segmentation by medseg",
        transfer_syntax_uid=_EXPLICIT,
        omit_empty_frames=binary,
    )
    if not binary:
        _compress(dataset)
    for k in empty_ends:
        _clear_first_bit(dataset, k)
    _refer(dataset, origin)
    if origin.options.deterministic:
        uid = origin.new_uid("dimensions", content)
        for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
            item.DimensionOrganizationUID = uid
    return dataset


def _compress(dataset: Any) -> None:
    """Pack the frames of a label map by RLE (PS3.5 Annex G); the encoders that highdicom may choose can end a process.

    Every run of equal bytes becomes two bytes, a run of one byte too; no run goes on into the next row.
    """
    from pydicom.encaps import encapsulate

    pixels = np.frombuffer(dataset.PixelData, np.dtype(f"<u{dataset.BitsAllocated // 8}"))
    frames = pixels[: dataset.NumberOfFrames * dataset.Rows * dataset.Columns].reshape(
        -1, dataset.Rows, dataset.Columns
    )
    dataset.PixelData = encapsulate([_packed(frame) for frame in frames])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = _RLE


def _packed(frame: NDArray) -> bytes:
    parts = []
    for shift in range(8 * (frame.itemsize - 1), -1, -8):  # the high bytes come first
        rows = (frame >> shift).astype(np.uint8)
        change = np.ones(rows.shape, bool)
        change[:, 1:] = rows[:, 1:] != rows[:, :-1]
        starts = np.flatnonzero(change)
        lengths = np.diff(np.append(starts, rows.size))
        pieces = -(-lengths // 128)  # no run is longer than 128
        value = np.repeat(rows.ravel()[starts], pieces)
        length = np.full(len(value), 128)
        last = np.cumsum(pieces) - 1
        length[last] = lengths - 128 * (pieces - 1)
        parts.append(np.stack([(1 - length).astype(np.uint8), value], axis=1).tobytes())
    offsets = np.cumsum([64, *map(len, parts)])[:-1]
    header = np.zeros(16, "<u4")
    header[0], header[1 : 1 + len(parts)] = len(parts), offsets
    return header.tobytes() + b"".join(parts)


def _skeleton(origin: Origin, k: int) -> Any:
    """A slice of the source as far as its place goes; `_refer` puts the real references in."""
    from pydicom.dataset import Dataset

    piece = origin.slices[k]
    assert piece.spacing and piece.position and piece.orientation
    step = decimal(origin.spacing_mm, 9)
    slice_ = Dataset()
    slice_.SOPClassUID, slice_.SOPInstanceUID = _CT, f"1.2.{k}"
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID = origin.study, origin.series
    slice_.FrameOfReferenceUID = origin.frame_of_reference
    for name in (
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
        "StudyTime", "ReferringPhysicianName",
    ):  # fmt: skip
        setattr(slice_, name, None)
    slice_.Modality = origin.modality
    slice_.Rows, slice_.Columns = piece.rows, piece.columns
    slice_.PixelSpacing = [decimal(edge, 12) for edge in piece.spacing]
    slice_.SliceThickness = slice_.SpacingBetweenSlices = step
    slice_.ImageOrientationPatient = [decimal(part, 13) for part in origin.slices[0].orientation or ()]
    slice_.ImagePositionPatient = [decimal(part, 12) for part in piece.position]
    return slice_


def _plane_of(frame: Any) -> int:
    """The slice of the skeleton that a frame refers to."""
    return int(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID.rsplit(".", 1)[1])


def _clear_first_bit(dataset: Any, k: int) -> None:
    frame = next(n for n, item in enumerate(dataset.PerFrameFunctionalGroupsSequence) if _plane_of(item) == k)
    at = frame * dataset.Rows * dataset.Columns
    pixels = bytearray(dataset.PixelData)
    pixels[at // 8] &= ~(1 << at % 8) & 0xFF
    dataset.PixelData = bytes(pixels)


def _refer(dataset: Any, origin: Origin) -> None:
    """Let every frame refer to the image, and the frame of it, that it was made from."""
    frames = dataset.PerFrameFunctionalGroupsSequence
    for frame, k in zip(
        frames, [_plane_of(frame) for frame in frames]
    ):  # first all k: frames of a plane share the item
        frame.DerivationImageSequence[0].SourceImageSequence[0].update(origin.reference(origin.slices[k]))
    referenced = dataset.ReferencedSeriesSequence[0]
    referenced.SeriesInstanceUID = origin.series
    referenced.ReferencedInstanceSequence = origin.references()
    dataset.SourceImageSequence = origin.references()


def _digest(planes: NDArray, descriptions: list[Any]) -> str:
    state = hashlib.sha256(planes.tobytes())
    for item in descriptions:
        state.update(f"{item.SegmentNumber}\0{item.SegmentDescription}\0{item.SegmentLabel}\0".encode())
    return state.hexdigest()


@dataclass(frozen=True)
class _Parsed:
    """A segmentation: its grid, its segments with the label values they get, and where its frames belong."""

    dataset: Any
    affine: NDArray[np.float64]
    table: LabelTable
    value_of: dict[int, int]  # segment number to label value, without the background
    background: int  # what stands for no segment in a label map
    k_of: list[int]  # the slice of each frame
    segment_of: list[int]  # the segment of each frame; 0 in a label map

    @property
    def shape(self) -> tuple[int, int, int]:
        return int(self.dataset.Columns), int(self.dataset.Rows), max(self.k_of) + 1


def read_seg(
    path: str | Path,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """The label map of a DICOM segmentation, as uint8 or uint16. Raises `BadFile`.

    segments: only these, by name or label value, laid over each other in this order, the later over the earlier.
    Without it, segments that share voxels are refused. Of FRACTIONAL ones the voxels of at least one half are taken,
    with a `DataWarning`. Slices without a frame are background. Axes: i along the rows, j down the columns, k along
    the normal of the slices, as `read` has them for the images.
    """
    if volume_index not in (None, 0):
        raise BadFile(f"{path}: is one segmentation, there is no volume {volume_index} in it")
    parsed = _parse(path)
    data, shared = _painted(path, parsed, chosen(path, parsed.table, segments))
    if shared and segments is None:
        raise Overlap(path, shared)
    return labels_only(path, make_volume(path, data, parsed.affine))


def read_segments(path: str | Path) -> list[tuple[Label, Volume]]:
    """Every segment of a DICOM segmentation as a mask (uint8, 0 and 1) of its own, overlaps kept. Raises `BadFile`."""
    parsed = _parse(path)
    masks = [(label, _painted(path, parsed, [label.value])[0] > 0) for label in parsed.table.labels]
    return [(label, make_volume(path, mask.astype(np.uint8), parsed.affine)) for label, mask in masks]


def read_seg_table(path: str | Path) -> LabelTable:
    """Names, colours and codes of a DICOM segmentation, values as `read_seg` gives them. Raises `BadFile`."""
    return _parse(path).table


def _painted(path: str | Path, parsed: _Parsed, values: list[int]) -> tuple[NDArray, int]:
    """The chosen labels (I, J, K), later ones over earlier ones, and how many voxels were painted twice."""
    out = np.zeros(parsed.shape, np.uint16, order="F")
    shared = 0

    def paint(dicom: Any) -> None:
        nonlocal shared
        for k, plane in _planes(path, parsed, values):
            target, here = out[..., k].T, plane > 0
            shared += int((here & (target > 0)).sum())
            target[here] = plane[here]

    guarded(str(path), paint)
    return out, shared


def _planes(path: str | Path, parsed: _Parsed, values: list[int]) -> Iterator[tuple[int, NDArray]]:
    """Slice number and label values (rows, columns) of every frame of the chosen labels, label by label."""
    frame = _frames(path, parsed.dataset)
    kind = parsed.dataset.SegmentationType
    if kind == "LABELMAP":
        known = np.zeros(65536, bool)
        known[[0, parsed.background, *parsed.value_of]] = True
        wanted = np.zeros(65536, np.uint16)
        wanted[values] = values
        for number, k in enumerate(parsed.k_of):
            pixels = frame(number)
            if not known[pixels].all():
                raise BadFile(f"{path}: holds label values that it does not name; export the segmentation again")
            yield k, wanted[pixels]
        return
    half = int(parsed.dataset.MaximumFractionalValue) / 2 if kind == "FRACTIONAL" else 0.5
    for value in values:
        for number, k in enumerate(parsed.k_of):
            if parsed.value_of[parsed.segment_of[number]] == value:
                yield k, (frame(number) >= half) * np.uint16(value)


def _frames(path: str | Path, dataset: Any) -> Callable[[int], NDArray]:
    """A function that gives the pixels (rows, columns) of a frame."""
    rows, columns, count = int(dataset.Rows), int(dataset.Columns), len(dataset.PerFrameFunctionalGroupsSequence)
    size, bits = rows * columns, int(dataset.BitsAllocated)
    if bits not in (1, 8, 16) or dataset.get("SamplesPerPixel", 1) != 1 or dataset.get("PixelRepresentation", 0) != 0:
        raise BadFile(f"{path}: its pixels are stored in a way that medseg does not read")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        if bits == 1:
            raise BadFile(
                f"{path}: its bit planes are compressed, which medseg does not unpack; use gdcmconv --raw first"
            )
        unpacked = np.stack(list(_unpacked(path)))
        if unpacked.shape != (count, rows, columns):
            raise BadFile(f"{path}: its pixels are not what its header says; the file is damaged")
        return lambda number: unpacked[number]
    pixels = dataset.PixelData
    if len(pixels) * 8 < size * count * bits:
        raise BadFile(f"{path}: the file is too short for what its header claims; it is damaged or incomplete")
    if bits > 1:
        kind = np.dtype(np.uint8 if bits == 8 else "<u2" if syntax.is_little_endian else ">u2")
        stored = np.frombuffer(pixels, kind, size * count).reshape(count, rows, columns)
        return lambda number: stored[number]
    packed = np.frombuffer(pixels, np.uint8)

    def unpack(number: int) -> NDArray:
        start, end = number * size, (number + 1) * size  # frames follow each other bit by bit, without padding
        whole = np.unpackbits(packed[start // 8 : -(-end // 8)], bitorder="little")
        return whole[start % 8 :][:size].reshape(rows, columns)

    return unpack


def _unpacked(path: str | Path) -> Iterator[NDArray]:
    """The frames of a compressed segmentation, unpacked as those of every other DICOM file are."""
    with PixelSource(path) as source:
        entry = Entry(Path(path), None)
        with source.open(entry) as file:
            slices = parse(source, entry, file)
        yield from stored_pixels(source, slices or [])


def _parse(path: str | Path) -> _Parsed:
    """What a segmentation says. Raises `BadFile` for what is damaged, or no volume."""
    parsed: _Parsed = guarded(str(path), lambda dicom: _parsed(path, read_object(path, dicom)))
    if parsed.dataset.SegmentationType == "FRACTIONAL":
        warnings.warn(
            f"{path}: is a fractional segmentation; voxels of at least one half were taken", DataWarning, stacklevel=4
        )
    return parsed


def _parsed(path: str | Path, dataset: Any) -> _Parsed:
    if str(dataset.get("SOPClassUID")) not in SEG_CLASSES:
        raise BadFile(f"{path}: is no DICOM segmentation")
    kind = str(dataset.SegmentationType)
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise BadFile(f"{path}: is a kind of segmentation that medseg does not know")
    background = int(dataset.get("PixelPaddingValue") or 0) if kind == "LABELMAP" else 0
    table, value_of = _table(path, dataset, background, kind)
    shared, frames = dataset.SharedFunctionalGroupsSequence[0], dataset.get("PerFrameFunctionalGroupsSequence")
    if not frames or len(frames) != int(dataset.NumberOfFrames):
        raise BadFile(f"{path}: does not say where its frames lie; it is tiled, or damaged")

    def group(frame: Any, name: str) -> Any:
        found = frame.get(name) or shared.get(name)
        return found[0] if found else {}

    segment_of = [0] * len(frames)
    if kind != "LABELMAP":
        segment_of = [int(group(frame, "SegmentIdentificationSequence").ReferencedSegmentNumber) for frame in frames]
        if not set(segment_of) <= set(value_of):
            raise BadFile(f"{path}: has frames of segments that it does not describe; export the segmentation again")
    places = [group(frame, "PlanePositionSequence").get("ImagePositionPatient") for frame in frames]
    turns = [group(frame, "PlaneOrientationSequence").get("ImageOrientationPatient") for frame in frames]
    sizes = [group(frame, "PixelMeasuresSequence") for frame in frames]
    edges = [size.get("PixelSpacing") for size in sizes]
    if not (all(places) and all(turns) and all(edges)):
        raise BadFile(f"{path}: does not lie in a patient's space, so it is no volume")
    apart = sizes[0].get("SpacingBetweenSlices")
    thick = sizes[0].get("SliceThickness")
    affine, k_of = stack_frames(
        path,
        np.array(places, np.float64),
        np.array(turns, np.float64),
        np.array(edges, np.float64),
        float(apart) if apart else None,
        float(thick) if thick else None,
    )
    columns, rows, planes = int(dataset.Columns), int(dataset.Rows), max(k_of) + 1
    check_axes(path, (columns, rows, planes))
    if columns * rows * planes > max(MAX_EMPTY, 100 * columns * rows * len(frames)):
        raise BadFile(f"{path}: its frames lie too far apart to be slices of one scan; export the segmentation again")
    if columns * rows * planes * 2 > MAX_BYTES:
        raise BadFile(f"{path}: claims more than the {MAX_BYTES / 2**30:.3g} GB allowed")
    return _Parsed(dataset, affine, table, value_of, background, k_of, segment_of)


def _table(path: str | Path, dataset: Any, background: int, kind: str) -> tuple[LabelTable, dict[int, int]]:
    """The label table of a segmentation, and the label value of each segment number."""
    items = list(dataset.SegmentSequence)
    if kind == "LABELMAP":
        items = [item for item in items if not _is_background(path, item, background)]
    numbers = [int(item.SegmentNumber) for item in items]
    told = [re.fullmatch(_VALUE.format(r"(\d+)"), str(item.get("SegmentDescription") or "")) for item in items]
    values = [int(match[1]) for match in told if match]
    if kind == "LABELMAP" or len(values) != len(items) or len(set(values)) != len(values):
        values = numbers
    if len(set(numbers)) != len(numbers) or not items:
        raise BadFile(f"{path}: two of its segments have the same number, or it has none; export it again")
    try:
        table = table_of(
            values,
            [str(item.get("SegmentLabel") or "") for item in items],
            [rgb(item.get("RecommendedDisplayCIELabValue")) for item in items],
            [
                read_codes(
                    item.get("SegmentedPropertyCategoryCodeSequence"),
                    item.get("SegmentedPropertyTypeCodeSequence"),
                    item.get("AnatomicRegionSequence"),
                )
                for item in items
            ],
        )
    except BadConfig as error:
        raise BadFile(f"{path}: {error}; export the segmentation again") from None
    return table, dict(zip(numbers, values))


def _is_background(path: str | Path, item: Any, background: int) -> bool:
    """Whether a segment of a label map is none: what pads it (PS3.3 C.8.20.2.4), or number 0 if coded so."""
    number = int(item.SegmentNumber)
    code = read_code(item.SegmentedPropertyTypeCodeSequence)
    if number == 0 != background and (code is None or code[:2] != ("DCM", "125040")):
        raise BadFile(f"{path}: uses the number 0 for a structure, which no label map can; export it again")
    return number in (0, background)


def stack_frames(
    path: str | Path,
    places: NDArray[np.float64],
    turns: NDArray[np.float64],
    edges: NDArray[np.float64],
    apart: float | None,
    thick: float | None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Voxel index to RAS+ mm of frames (F) in space, and the slice of each; frames may be missing and be doubled.

    places: (F, 3) LPS mm; turns: (F, 6); edges: (F, 2) mm; apart, thick: distance and thickness of slices, if known.
    Raises `BadFile` if they are not slices of one regular grid.
    """
    if np.ptp(turns, axis=0).max() > 1e-4 or np.ptp(edges, axis=0).max() > 1e-4:
        raise BadFile(f"{path}: its frames differ in orientation or pixel spacing, so they are no volume")
    along_row, down_column = turns[0].reshape(2, 3)
    normal = np.cross(along_row, down_column)
    depth = places @ normal
    sorted_depth = np.sort(depth)
    gaps = np.diff(sorted_depth)
    smallest = min(gaps[gaps > 0.01], default=0.0)
    if apart is None or apart <= 0 or not _fits(depth - sorted_depth[0], apart):
        apart = smallest or thick
    if not apart or not _fits(depth - sorted_depth[0], apart):
        raise BadFile(f"{path}: the distances between its slices differ, or are not given, so they are no volume")
    count = int(np.rint((sorted_depth[-1] - sorted_depth[0]) / apart))
    first, last = places[depth.argmin()], places[depth.argmax()]
    between = (last - first) / count if count else normal * apart
    k_of = np.rint((depth - sorted_depth[0]) / apart)
    drift = np.linalg.norm(places - (first + k_of[:, None] * between), axis=1).max()
    if drift > 0.05 * min(*edges[0], apart) or np.linalg.norm(np.cross(between, normal)) > 1e-3 * apart:
        raise BadFile(f"{path}: its slices do not lie straight above each other, so they are no volume")
    affine = np.eye(4)
    affine[:3, 0] = along_row * edges[0][1]
    affine[:3, 1] = down_column * edges[0][0]
    affine[:3, 2] = between
    affine[:3, 3] = first
    return LPS @ affine, [int(k) for k in k_of]


def _fits(depth: NDArray[np.float64], step: float) -> bool:
    """Whether depths are whole multiples of a step, up to rounding."""
    return bool(np.abs(depth / step - np.rint(depth / step)).max() < 0.1)
