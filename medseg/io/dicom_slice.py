"""One DICOM file as slices: what its header says about each frame in it, and where the pixels lie.

All of pydicom's behaviour with headers is contained here. A file is parsed once, up to its pixels. No value that could
identify a person leaves this module, neither in a message nor in a warning.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from medseg.errors import BadFile
from medseg.io.dicom_source import Entry, Source, inflated

#: The kinds of image that are read: one slice per file, many frames per file, classic slices put into one file.
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
SOP_CLASSES = CLASSIC | ENHANCED
DICOMDIR = "1.2.840.10008.1.3.10"
IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
)  # fmt: skip
#: Transfer syntaxes whose pixels are plain numbers.
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)
#: Most pieces in which a header is read: about 60 for a frame, of a few thousand.
MAX_READS = 1 << 21
#: Most slices of one file.
MAX_FRAMES = 1 << 16
#: The tags that are read; what is not here is passed over. The last four are Siemens' own headers of mosaics.
TAGS: list[str | int] = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType", "SeriesNumber",
    "InstanceNumber", "AcquisitionNumber", "AcquisitionTime", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelSpacing", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "EchoNumbers",
    "EchoTime", "InversionTime", "FlipAngle", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue",
    "DiffusionGradientOrientation", "FrameReferenceTime", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    0x00291010, 0x00291110, 0x00291020, 0x00291120,
]  # fmt: skip
# What pydicom lets out on damaged files besides exceptions of its own, found by mutating files.
_DAMAGE = (
    AttributeError, AssertionError, EOFError, IndexError, KeyError, LookupError, NotImplementedError, OSError,
    OverflowError, RecursionError, RuntimeError, TypeError, UnicodeError, ValueError, MemoryError, struct.error,
    zlib.error,
)  # fmt: skip


class _BadTag(Exception):
    """A tag, by its name in the standard, that holds something impossible."""


@dataclass(frozen=True)
class Tile:
    """Which part of a mosaic a slice is: its number, tiles in a row of them, and the size of the whole in pixels."""

    number: int
    across: int
    rows: int
    columns: int


@dataclass(frozen=True)
class PixelData:
    """Where the pixels of a file lie, and how they are packed."""

    syntax: str
    offset: int  # of the Pixel Data element's value in the file, or in what is inflated
    length: int  # of the value in bytes; -1 for compressed pixels, which end with a delimiter
    deflated_from: int | None = None  # where the deflated part of the file begins
    words: bool = True  # VR OW: 8-bit pixels in big-endian files are then swapped in pairs
    offsets: tuple[int, ...] = ()  # Extended Offset Table: of each frame from the end of the basic offset table


@dataclass(frozen=True)
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
    #: What may tell the volumes of a series apart: echo, time, diffusion ...
    traits: Mapping[str, Any] = field(default_factory=dict)
    tile: Tile | None = None
    pixels: PixelData = PixelData("", 0, 0)
    #: Why the file cannot be read although it is an image, where that is known from its header.
    problem: str = ""

    @property
    def entry(self) -> Entry:
        """The file in its source."""
        return Entry(self.path, self.member)

    @property
    def localizer(self) -> bool:
        """Whether it is a scout view, made for planning."""
        return "LOCALIZER" in self.image_type


def parse(source: Source, entry: Entry, file: Any) -> list[Slice] | None:
    """The slices of an open DICOM file, empty if it holds no image, None for a DICOMDIR. Raises `BadFile`."""
    from medseg.io.dicom_frames import frames_of, tiles_of

    where = source.where(entry)

    def work(dicom: Any) -> list[Slice] | None:
        dataset, pixels = _dataset(dicom, file, where, TAGS)
        sop_class = sop_class_of(dataset)
        if dataset.media_class == DICOMDIR:
            return None
        if pixels is None and (not sop_class or (dataset.cut_off and sop_class in SOP_CLASSES)):
            raise BadFile(f"{where}: ends early; it is incomplete, export the series again and give its folder")
        if dataset.get("Rows") is None and sop_class not in SOP_CLASSES:
            return []
        first = _slice_of(entry, dataset, pixels)
        if first.sop_class in ENHANCED or first.frames > 1:
            return frames_of(first, dataset)
        return tiles_of(first, dataset) if "MOSAIC" in first.image_type else [first]

    found: list[Slice] | None = guarded(where, work)
    return found


def read_header(path: str | Path, piece: Slice) -> Any:
    """Everything but the pixels of the file that holds a slice, as a `pydicom.Dataset`. Raises `BadFile`.

    For those who write DICOM objects about a series; nothing of it may go anywhere else.
    """
    with Source(piece.path) as source, source.open(piece.entry) as file:
        where = source.where(piece.entry)
        return guarded(where, lambda dicom: _dataset(dicom, file, where, None)[0])


def is_dicomdir(source: Source, entry: Entry) -> bool:
    """Whether a DICOM file is a DICOMDIR, by its file meta information alone. Raises `BadFile`."""
    with source.open(entry) as file:

        def work(dicom: Any) -> bool:
            return str(_file_meta(dicom, file)[0].get("MediaStorageSOPClassUID", "")) == DICOMDIR

        found: bool = guarded(source.where(entry), work)
    return found


def header_values(source: Source, entry: Entry, tags: Sequence[str | int]) -> Any:
    """Some tags of a file as a `pydicom.Dataset`. Raises `BadFile`."""
    where = source.where(entry)
    with source.open(entry) as file:
        return guarded(where, lambda dicom: _dataset(dicom, file, where, tags)[0])


def sop_class_of(dataset: Any) -> str:
    """The SOP Class UID of a data set, or ''."""
    return str(dataset.get("SOPClassUID", ""))


def is_dicom(start: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file; files without preamble begin with group 2 or 8."""
    return start[128:132] == b"DICM" or start[:2] in (b"\x08\x00", b"\x02\x00")


def numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """The `count` numbers of a tag, None if it is absent or empty. Within `guarded`, anything else is a `BadFile`."""
    try:
        values = dataset.get(name)
        if values is None or (isinstance(values, Sequence) and len(values) == 0):
            return None
        found = tuple(float(value) for value in values)
    except _DAMAGE:
        raise _BadTag(name) from None
    if len(found) != count or not all(map(math.isfinite, found)):
        raise _BadTag(name)
    return found


def number(dataset: Any, name: str) -> float | None:
    """The number of a tag, None if it is absent or empty. Within `guarded`, anything else is a `BadFile`."""
    try:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        found = float(value)
    except _DAMAGE:
        raise _BadTag(name) from None
    if not math.isfinite(found):
        raise _BadTag(name)
    return found


def trait(dataset: Any, name: str) -> Any:
    """A number or a tuple of numbers of a tag that only helps to tell volumes apart; None for anything odd."""
    try:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(round(float(part), 6) for part in value)
        return round(float(value), 6)
    except _DAMAGE:
        return None


def echo_time(dataset: Any, name: str) -> float | None:
    """An echo time to a hundredth of a millisecond: smaller differences are rounding, not echoes."""
    value = trait(dataset, name)
    return round(value, 2) if isinstance(value, float) else None


_unheard: ContextVar[bool] = ContextVar("_unheard", default=False)


def _heard(_: logging.LogRecord) -> bool:
    return not _unheard.get()


@contextmanager
def without_remarks() -> Iterator[None]:
    """Drop what pydicom warns and logs meanwhile: it quotes values from the header, which may name the patient."""
    logging.getLogger("pydicom").addFilter(_heard)
    token = _unheard.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _unheard.reset(token)


def guarded(where: str, work: Callable[[Any], Any]) -> Any:
    """The result of work with pydicom; whatever damaged data makes it raise becomes a `BadFile`."""
    try:
        import pydicom
        import pydicom.filereader
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError:
        raise BadFile(f'{where}: reading DICOM needs pydicom; install it with: pip install "medseg[dicom]"') from None
    try:
        with without_remarks():
            return work(pydicom)
    except _BadTag as error:
        raise BadFile(f"{where}: its {error} is not what DICOM says it must be; export the series again") from None
    except (*_DAMAGE, BytesLengthException, InvalidDicomError):
        raise BadFile(f"{where}: is damaged or is not proper DICOM; export the series again") from None


def _dataset(dicom: Any, file: Any, where: str, tags: Sequence[str | int] | None) -> tuple[Any, PixelData | None]:
    """The data set up to the pixels, with `media_class`, `file_meta` and `cut_off`; and where the pixels lie."""
    meta, start = _file_meta(dicom, file)
    syntax = str(meta.get("TransferSyntaxUID", "") or "")
    deflated_from = start if syntax == DEFLATED else None
    if deflated_from is not None:  # pydicom would unpack these without a limit: a small file could take all memory
        file = inflated(file, start, where)
        start = 0
    file.seek(start)
    peek = file.read(6)
    file.seek(start)
    lettered = len(peek) == 6 and peek[4:6].isalpha() and peek[4:6].isupper()
    if not syntax:
        syntax = EXPLICIT if lettered else IMPLICIT
    little = syntax != BIG_ENDIAN
    implicit = syntax == IMPLICIT or not lettered  # some writers say explicit and mean implicit
    if syntax == IMPLICIT and lettered:
        implicit = False
    wanted = None if tags is None else _tags(tuple(tags))
    watched = _Watched(file, where)
    dataset = dicom.filereader.read_dataset(
        watched, implicit, little, stop_when=lambda tag, vr, length: tag >= 0x7FE00008, specific_tags=wanted
    )
    dataset.media_class = str(meta.get("MediaStorageSOPClassUID", ""))
    dataset.file_meta = meta
    dataset.cut_off = watched.is_cut_off()
    return dataset, _pixel_data(file, syntax, implicit, little, deflated_from)


class _Watched:
    """A file that notices when it ends in the middle of something, which pydicom passes over in silence."""

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where
        self._short = False
        self._reads = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise BadFile(f"{self._where}: its header has more parts than any header has; the file is damaged")
        found: bytes = self._file.read(count)
        # At the very end of a whole file, the next element is looked for (8 bytes) and there is nothing.
        self._short |= len(found) < count and not (count == 8 and not found)
        return found

    def is_cut_off(self) -> bool:
        """Whether the file ended within an element, be it one that was read or one that was passed over."""
        place = self.tell()
        self.seek(max(0, place - 1))
        missing = not self._file.read(1)
        self.seek(place)
        return self._short or missing


@cache
def _tags(names: tuple[str | int, ...]) -> list[Any]:
    from pydicom.tag import Tag

    return [Tag(name) for name in names]


def _file_meta(dicom: Any, file: Any) -> tuple[Any, int]:
    """The file meta information (group 2, always explicit little endian) and where the data set begins."""
    file.seek(0)
    start = 132 if file.read(132)[128:] == b"DICM" else 0
    file.seek(start)
    if file.read(2) != b"\x02\x00":
        return dicom.dataset.FileMetaDataset(), start
    file.seek(start)
    meta = dicom.filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    return meta, file.tell()


def _pixel_data(file: Any, syntax: str, implicit: bool, little: bool, deflated_from: int | None) -> PixelData | None:
    """Where the value of the element that a file stands before lies, if that element is Pixel Data (PS3.5 7.1)."""
    order = "<" if little else ">"
    start = file.read(12)
    if len(start) < 8 or struct.unpack(f"{order}HH", start[:4]) != (0x7FE0, 0x0010):
        return None
    if implicit:
        (length,) = struct.unpack(f"{order}I", start[4:8])
        offset = file.tell() - len(start) + 8
    else:
        (length,) = struct.unpack(f"{order}I", start[8:12])
        offset = file.tell()
    words = implicit or start[4:6] == b"OW"
    return PixelData(syntax, offset, -1 if length == 0xFFFFFFFF else length, deflated_from, words)


def _slice_of(entry: Entry, dataset: Any, pixels: PixelData | None) -> Slice:
    """What the top level of a data set says."""
    whole = {name: number(dataset, name) for name in ("NumberOfFrames", "SamplesPerPixel", "Rows", "Columns")}
    bits = [number(dataset, name) for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")]
    order, instance = trait(dataset, "SeriesNumber"), trait(dataset, "InstanceNumber")
    image_type = dataset.get("ImageType") or ()
    return Slice(
        path=entry.path,
        member=entry.member,
        frame=0,
        series=str(dataset.get("SeriesInstanceUID", "")),
        sop_class=sop_class_of(dataset),
        sop_instance=str(dataset.get("SOPInstanceUID", "")),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "")),
        image_type=tuple(
            str(part).upper() for part in ([image_type] if isinstance(image_type, str | bytes) else image_type)
        ),
        frames=int(1 if whole["NumberOfFrames"] is None else whole["NumberOfFrames"]),
        samples=int(1 if whole["SamplesPerPixel"] is None else whole["SamplesPerPixel"]),
        photometric=str(dataset.get("PhotometricInterpretation", "")),
        rows=int(whole["Rows"] or 0),
        columns=int(whole["Columns"] or 0),
        bits=tuple(-1 if value is None else int(value) for value in bits),  # type: ignore[arg-type]
        spacing=numbers(dataset, "PixelSpacing", 2),
        position=numbers(dataset, "ImagePositionPatient", 3),
        orientation=numbers(dataset, "ImageOrientationPatient", 6),
        slope=number(dataset, "RescaleSlope"),
        intercept=number(dataset, "RescaleIntercept"),
        has_lookup=bool(dataset.get("ModalityLUTSequence", None)),
        padding=_padding(dataset),
        series_number=int(order) if isinstance(order, float) else 0,
        instance_number=None if not isinstance(instance, float) else int(instance),
        traits={
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
        },
        pixels=pixels or PixelData("", 0, 0),
    )


def _padding(dataset: Any) -> tuple[int, int] | None:
    """The range of stored values that stand for no pixel (PS3.3 C.7.5.1.1.2), read with the sign of the pixels."""
    first, last = trait(dataset, "PixelPaddingValue"), trait(dataset, "PixelPaddingRangeLimit")
    if not isinstance(first, float):
        return None
    ends = [int(first), int(last) if isinstance(last, float) else int(first)]
    if trait(dataset, "PixelRepresentation") == 1:  # written unsigned by some
        ends = [end - 65536 if end > 32767 else end for end in ends]
    return min(ends), max(ends)
