"""One DICOM file as slices: what its header says about each frame in it, and where the pixels lie.

A file is parsed once, up to its pixels. No value that could identify a person leaves this module,
neither in a message nor in a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.io.dicom.headers import (
    PixelData,
    dataset_of,
    echo_time,
    guarded,
    length,
    number,
    numbers,
    sop_class_of,
    trait,
    words,
)
from medseg.io.dicom.source import Entry, Source

#: The kinds of image that are read: one slice per file, many frames per file, classic slices put
#: into one file.
CLASSIC = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
}
ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
}
#: Angiography, craniofacial scans and breasts, reconstructed from X-ray projections.
XRAY_3D = {
    "1.2.840.10008.5.1.4.1.1.13.1.1": "XA",
    "1.2.840.10008.5.1.4.1.1.13.1.2": "DX",
    "1.2.840.10008.5.1.4.1.1.13.1.3": "MG",
}
SOP_CLASSES = CLASSIC | ENHANCED | XRAY_3D
#: Secondary captures in grey values, of one frame and of many: scans only where they say where
#: every frame lies.
CAPTURES = dict.fromkeys(
    ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3"),
    "OT",
)
#: Objects that hold labels: Segmentation Storage and Label Map Segmentation Storage, and RT
#: Structure Set Storage.
SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
#: Most slices of one file.
MAX_FRAMES = 1 << 16
#: The tags that are read; what is not here is passed over. The last four are Siemens' own headers
#: of mosaics.
TAGS: list[str | int] = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType",
    "SeriesNumber",
    "InstanceNumber", "AcquisitionNumber", "AcquisitionTime", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation",
    "PixelSpacing", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "SliceThickness", "SeriesDescription",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit", "EchoNumbers",
    "EchoTime", "InversionTime", "FlipAngle", "TemporalPositionIdentifier", "TriggerTime",
    "DiffusionBValue",
    "DiffusionGradientOrientation", "FrameReferenceTime", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    0x00291010, 0x00291110, 0x00291020, 0x00291120,
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Which part of a mosaic a slice is: its number, tiles in a row of them, and the size of the
    whole in pixels.
    """

    number: int
    across: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What a file says about one slice, or one frame, in it; None where the tag is absent."""

    path: Path  # the file, or the zip that holds it
    member: int | None  # which entry of the zip
    frame: int  # which frame of the file, from 0
    series: str
    sop_class: str
    sop_instance: str
    frame_of_reference: str
    image_type: tuple[str, ...]
    frames: int
    samples: int
    photometric: str
    rows: int
    columns: int
    bits: tuple[int, int, int, int]  # allocated, stored, high bit, signed
    spacing: tuple[float, ...] | None  # between rows, between columns
    position: tuple[float, ...] | None  # LPS mm of the first pixel's centre
    orientation: tuple[float, ...] | None  # LPS directions along a row, along a column
    slope: float | None
    intercept: float | None
    has_lookup: bool
    padding: tuple[int, int] | None = None  # first and last stored value that means "no pixel"
    series_number: int = 0
    instance_number: int | None = None
    step_mm: float | None = None  # Spacing Between Slices
    thickness_mm: float | None = None
    #: What the scanner's operator called the series; may name a person, so it is only for the
    #: terminal.
    description: str = field(default="", repr=False)
    #: What may tell the volumes of a series apart: echo, time, diffusion ...
    traits: Mapping[str, Any] = field(default_factory=dict)
    tile: Tile | None = None
    pixels: PixelData = PixelData(syntax="", offset=0, length=0)  # noqa: RUF009 (it is frozen)
    #: Why the file cannot be read although it is an image, where that is known from its header.
    problem: str = ""

    @property
    def entry(self) -> Entry:
        """The file in its source."""
        return Entry(path=self.path, member=self.member)

    @property
    def localizer(self) -> bool:
        """Whether it is a scout view, made for planning."""
        return "LOCALIZER" in self.image_type

    @property
    def placed(self) -> bool:
        """Whether it says where it lies, how it is turned and how large its pixels are."""
        return (
            self.position is not None and self.orientation is not None and self.spacing is not None
        )


def plain_dtype(piece: Slice) -> np.dtype | None:
    """The type of a slice's stored values; None for layouts that are not plain whole numbers."""
    allocated, stored, high, signed = piece.bits
    is_plain = allocated in (8, 16, 32) and 1 <= stored <= allocated
    if not is_plain or high != stored - 1 or signed not in (0, 1):
        return None
    return np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")


def read_header(path: str | Path, piece: Slice) -> Any:
    """Everything but the pixels of the file that holds a slice, as a `pydicom.Dataset`. Raises
    `BadFile`.

    For those who write DICOM objects about a series; nothing of it may go anywhere else.
    """
    with Source(piece.path) as source, source.open(piece.entry) as file:
        where = source.where(piece.entry)
        return guarded(where, lambda dicom: dataset_of(dicom, file, where=where, tags=None)[0])


def slice_of(entry: Entry, dataset: Any, pixels: PixelData | None) -> Slice:
    """What the top level of a data set says."""
    names = ("NumberOfFrames", "SamplesPerPixel", "Rows", "Columns")
    frames, samples, rows, columns = (number(dataset, name) for name in names)
    layout = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    bits = [number(dataset, name) for name in layout]
    order, instance = trait(dataset, "SeriesNumber"), trait(dataset, "InstanceNumber")
    image_type = _image_type(dataset)
    return Slice(
        path=entry.path,
        member=entry.member,
        frame=0,
        series=str(dataset.get("SeriesInstanceUID", "")),
        sop_class=sop_class_of(dataset),
        sop_instance=str(dataset.get("SOPInstanceUID", "")),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "")),
        image_type=image_type,
        frames=_whole(frames, missing=1),
        samples=_whole(samples, missing=1),
        photometric=str(dataset.get("PhotometricInterpretation", "")),
        rows=_whole(rows, missing=0),
        columns=_whole(columns, missing=0),
        bits=tuple(_whole(value, missing=-1) for value in bits),  # type: ignore[arg-type]
        spacing=numbers(dataset, "PixelSpacing", 2),
        position=numbers(dataset, "ImagePositionPatient", 3),
        orientation=numbers(dataset, "ImageOrientationPatient", 6),
        slope=number(dataset, "RescaleSlope"),
        intercept=number(dataset, "RescaleIntercept"),
        has_lookup=bool(dataset.get("ModalityLUTSequence", None)),
        padding=_padding(dataset),
        series_number=int(order) if isinstance(order, float) else 0,
        instance_number=int(instance) if isinstance(instance, float) else None,
        step_mm=length(dataset, "SpacingBetweenSlices"),
        thickness_mm=length(dataset, "SliceThickness"),
        description=words(dataset, "SeriesDescription"),
        traits=_traits(dataset),
        pixels=pixels or PixelData(syntax="", offset=0, length=0),
    )


def _whole(value: float | None, *, missing: int) -> int:
    return missing if value is None else int(value)


def _image_type(dataset: Any) -> tuple[str, ...]:
    values = dataset.get("ImageType") or ()
    parts = [values] if isinstance(values, str | bytes) else values
    return tuple(str(part).upper() for part in parts)


def _traits(dataset: Any) -> dict[str, Any]:
    """What may tell the volumes of a series apart."""
    return {
        "echo": trait(dataset, "EchoNumbers") or echo_time(dataset, "EchoTime"),
        "inversion": trait(dataset, "InversionTime"),
        "flip": trait(dataset, "FlipAngle"),
        "b_value": trait(dataset, "DiffusionBValue"),
        "gradient": trait(dataset, "DiffusionGradientOrientation"),
        "temporal": trait(dataset, "TemporalPositionIdentifier"),
        "trigger": trait(dataset, "TriggerTime"),
        "frame_time": trait(dataset, "FrameReferenceTime"),
        "acquisition": trait(dataset, "AcquisitionNumber"),
        "acquisition_time": trait(dataset, "AcquisitionTime"),
    }


def _padding(dataset: Any) -> tuple[int, int] | None:
    """The range of stored values that stand for no pixel (PS3.3 C.7.5.1.1.2), read with the sign of
    the pixels.
    """
    first, last = trait(dataset, "PixelPaddingValue"), trait(dataset, "PixelPaddingRangeLimit")
    if not isinstance(first, float):
        return None
    ends = [int(first), int(last) if isinstance(last, float) else int(first)]
    if trait(dataset, "PixelRepresentation") == 1:  # written unsigned by some
        ends = [end - 65536 if end > 32767 else end for end in ends]
    return min(ends), max(ends)
