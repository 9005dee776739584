"""DICOM segmentations (SEG, PS3.3 A.51 and C.8.20) out, by highdicom; `segments` reads them.

A label value is the segment's number where the object can hold that: always in LABELMAP, and in
BINARY, whose segments are numbered 1, 2, ..., where the labels are; otherwise the segment's
description says it, and the reader follows it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.io.dicom.codes import category_of, cielab, code_item, text, type_of
from medseg.io.dicom.result import (
    DicomOptions,
    Origin,
    complete,
    decimal,
    moment,
    open_origin,
    planes_on_source,
    save,
    without_warnings,
)
from medseg.io.dicom.segments import LABEL_VALUE, read_seg, read_seg_table, read_segments
from medseg.io.dicom.source import Paths
from medseg.io.voxels import labels_only
from medseg.volume import Volume, value_counts

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

__all__ = [
    "algorithm_item",
    "present_labels",
    "read_seg",
    "read_seg_table",
    "read_segments",
]
__all__ += ["seg_dataset", "write_seg"]

_CT = "1.2.840.10008.5.1.4.1.1.2"
_RLE = "1.2.840.10008.1.2.5"
_EXPLICIT = "1.2.840.10008.1.2.1"
#: Names of the algorithm families of CID 7162 that are used.
_FAMILIES = {
    "123105": "Histogram Analysis",
    "123107": "Cluster Analysis",
    "123110": "Artificial Intelligence",
}


def write_seg(
    volume: Volume,
    path: str | Path,
    *,
    table: LabelTable | None = None,
    source: Paths | None = None,
    options: DicomOptions | None = None,
) -> None:
    """Write a label map as a DICOM segmentation of the series at `source`. Raises `BadOutput`,
    `BadFile`.

    volume: labels on the source's grid, stored in any of the 48 ways, or a block of it. Labels that
    occur become segments; of a map without any, the table's first (or label 1) becomes an empty
    one.
    """
    if source is None:
        raise BadOutput(
            f"{path}: a DICOM result refers to the series it was made from; give it with --source"
        )
    save(seg_dataset(volume, open_origin(source, options), path, table=table), path)


def seg_dataset(
    volume: Volume, origin: Origin, path: str | Path, *, table: LabelTable | None = None
) -> Any:
    """The segmentation as a `highdicom.seg.Segmentation`; `path` is what errors name. Raises
    `BadOutput`.
    """
    if origin.options.seg_type not in ("binary", "labelmap"):
        raise BadConfig(
            f"'{origin.options.seg_type}' is not a kind of segmentation; use binary or labelmap"
        )
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
        _segment(origin, label, number if binary else label.value)
        for number, label in enumerate(segments, 1)
    ]
    dataset = _encode(planes, origin, descriptions, binary=binary)
    for item in dataset.SegmentSequence:
        if item.SegmentNumber:
            _name_algorithm(item, origin.options)
    complete(dataset, origin, "SEG")
    dataset.ContentDate, dataset.ContentTime = moment(origin)
    dataset.update(origin.lossy)
    return dataset


def present_labels(planes: NDArray, table: LabelTable | None) -> list[Label]:
    """The labels that occur, by value, with what the table says of them; of none, the table's first
    or label 1.
    """
    from medseg.labels import LabelTable

    present = [int(value) for value in np.flatnonzero(value_counts(planes)) if value]
    if not present:
        return (
            [table.labels[0]]
            if table is not None and len(table)
            else list(LabelTable.from_values([1]).labels)
        )
    label_of = {label.value: label for label in table.labels} if table is not None else {}
    plain = {label.value: label for label in LabelTable.from_values(present).labels}
    return [label_of.get(value, plain[value]) for value in present]


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
    item.SegmentDescription = LABEL_VALUE.format(label.value)
    item.RecommendedDisplayCIELabValue = cielab(label.color)
    return item


def _name_algorithm(item: Any, options: DicomOptions) -> None:
    item.SegmentAlgorithmType = "AUTOMATIC" if options.model else "SEMIAUTOMATIC"
    item.SegmentAlgorithmName = (
        text(f"medseg {options.model}") if options.model else "unknown (converted by medseg)"
    )
    if options.model:
        item.SegmentationAlgorithmIdentificationSequence = [algorithm_item(options)]


def algorithm_item(options: DicomOptions) -> Any:
    """An item that identifies the algorithm (PS3.3 10.16)."""
    from pydicom.dataset import Dataset

    from medseg.labels import Code
    from medseg.packages import __version__

    item = Dataset()
    item.AlgorithmFamilyCodeSequence = [
        code_item(Code("DCM", options.family, _FAMILIES[options.family]))
    ]
    item.AlgorithmName = text(f"medseg {options.model}")
    item.AlgorithmVersion = text(f"{__version__} {options.version[:16]}")
    item.AlgorithmSource = "medseg"
    return item


def _concept(item: Any) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept.from_dataset(item)


def _encode(planes: NDArray, origin: Origin, descriptions: list[Any], *, binary: bool) -> Any:
    """The multi-frame image itself: geometry and references from the source's slices, pixels from
    `planes`.

    highdicom is given slices that carry nothing of the patient, so that nothing of a patient can
    get into what it copies or says. Frames without a voxel of their segment are left out, but for
    the first and the last slice, which the first segment always has: so every reader finds the
    whole grid of the source.
    """
    from highdicom.seg import Segmentation

    content = _digest(planes, descriptions)
    series_uid, instance_uid = (
        origin.new_uid(word, origin.options.seg_type, content) for word in ("series", "SEG")
    )
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
    """Pack the frames of a label map by RLE (PS3.5 Annex G); the encoders that highdicom may choose
    can end a process.

    Every run of equal bytes becomes two bytes, a run of one byte too; no run goes on into the next
    row.
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
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
        "StudyDate",
        "StudyTime", "ReferringPhysicianName",
    ):  # fmt: skip
        setattr(slice_, name, None)
    slice_.Modality = origin.modality
    slice_.Rows, slice_.Columns = piece.rows, piece.columns
    slice_.PixelSpacing = [decimal(edge, 12) for edge in piece.spacing]
    slice_.SliceThickness = slice_.SpacingBetweenSlices = step
    slice_.ImageOrientationPatient = [
        decimal(part, 13) for part in origin.slices[0].orientation or ()
    ]
    slice_.ImagePositionPatient = [decimal(part, 12) for part in piece.position]
    return slice_


def _plane_of(frame: Any) -> int:
    """The slice of the skeleton that a frame refers to."""
    return int(
        frame.DerivationImageSequence[0]
        .SourceImageSequence[0]
        .ReferencedSOPInstanceUID.rsplit(".", 1)[1]
    )


def _clear_first_bit(dataset: Any, k: int) -> None:
    frame = next(
        n for n, item in enumerate(dataset.PerFrameFunctionalGroupsSequence) if _plane_of(item) == k
    )
    at = frame * dataset.Rows * dataset.Columns
    pixels = bytearray(dataset.PixelData)
    pixels[at // 8] &= ~(1 << at % 8) & 0xFF
    dataset.PixelData = bytes(pixels)


def _refer(dataset: Any, origin: Origin) -> None:
    """Let every frame refer to the image, and the frame of it, that it was made from."""
    frames = dataset.PerFrameFunctionalGroupsSequence
    # First all k: frames of a plane share the item.
    for frame, k in zip(frames, [_plane_of(frame) for frame in frames]):
        frame.DerivationImageSequence[0].SourceImageSequence[0].update(
            origin.reference(origin.slices[k])
        )
    series_item = dataset.ReferencedSeriesSequence[0]
    series_item.SeriesInstanceUID = origin.series
    series_item.ReferencedInstanceSequence = origin.references()
    dataset.SourceImageSequence = origin.references()


def _digest(planes: NDArray, descriptions: list[Any]) -> str:
    state = hashlib.sha256(planes.tobytes())
    for item in descriptions:
        state.update(
            f"{item.SegmentNumber}\0{item.SegmentDescription}\0{item.SegmentLabel}\0".encode()
        )
    return state.hexdigest()
