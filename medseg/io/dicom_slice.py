"""One DICOM file as a slice: what its header says, and its pixels. All of pydicom's behaviour is contained here.

No value that could identify a person leaves this module, neither in a message nor in a warning.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.files import DEFLATE_RATIO, open_file

#: The kinds of image that are read.
SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
}
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence",
]  # fmt: skip
# What pydicom lets out on damaged files besides exceptions of its own, found by mutating files.
_DAMAGE = (
    AttributeError, AssertionError, EOFError, IndexError, KeyError, LookupError, NotImplementedError, OSError,
    OverflowError, RecursionError, RuntimeError, TypeError, UnicodeError, ValueError, MemoryError, struct.error,
    zlib.error,
)  # fmt: skip


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
    localizer: bool
    frames: int
    samples: int
    photometric: str
    rows: int
    columns: int
    bits: tuple[int, int, int, int]  # allocated, stored, high bit, signed
    spacing: tuple[float, ...] | None  # between rows, between columns
    position: tuple[float, ...] | None  # LPS mm of the first pixel's centre
    orientation: tuple[float, ...] | None  # LPS directions along a row, along a column
    slope: float
    intercept: float
    has_lookup: bool


def parse_slice(path: str | Path, file: Path, *, has_preamble: bool) -> Slice | None:
    """What a DICOM file says about its slice, or None if it holds no image."""
    where = name_in(path, file)

    def parse(dicom: Any) -> Slice | None:
        if has_preamble and dicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID", "") == _DEFLATED:
            # pydicom unpacks these without a limit: a small file could take all memory.
            raise BadFile(f"{where}: is deflated DICOM, which medseg does not unpack; use gdcmconv --raw first")
        options = {"stop_before_pixels": True, "specific_tags": _TAGS, "force": not has_preamble}
        return _slice_of(file, dicom.dcmread(file, **options))

    piece: Slice | None = _guarded(where, parse)
    return piece


def _slice_of(file: Path, dataset: Any) -> Slice | None:
    sop_class = str(dataset.get("SOPClassUID", ""))
    media_class = str(getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID", ""))
    if _DICOMDIR in (sop_class, media_class) or (dataset.get("Rows") is None and sop_class not in SOP_CLASSES):
        return None

    def numbers(name: str, count: int) -> tuple[float, ...] | None:
        values = dataset.get(name)
        if values is None or (isinstance(values, Sequence) and len(values) == 0):
            return None
        found = tuple(float(value) for value in values)
        if len(found) != count or not all(map(math.isfinite, found)):
            raise ValueError("wrong count")
        return found

    def number(name: str, missing: float) -> float:
        value = dataset.get(name)
        return missing if value is None or value == "" else float(value)

    return Slice(
        path=file,
        member=None,
        frame=0,
        series=str(dataset.get("SeriesInstanceUID", "")),
        sop_class=sop_class,
        sop_instance=str(dataset.get("SOPInstanceUID", "")),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "")),
        localizer="LOCALIZER" in [str(part).upper() for part in dataset.get("ImageType", None) or ()],
        frames=int(number("NumberOfFrames", 1)),
        samples=int(number("SamplesPerPixel", 1)),
        photometric=str(dataset.get("PhotometricInterpretation", "")),
        rows=int(number("Rows", 0)),
        columns=int(number("Columns", 0)),
        bits=(
            int(number("BitsAllocated", 0)),
            int(number("BitsStored", 0)),
            int(number("HighBit", -1)),
            int(number("PixelRepresentation", -1)),
        ),
        spacing=numbers("PixelSpacing", 2),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        slope=number("RescaleSlope", 1.0),
        intercept=number("RescaleIntercept", 0.0),
        has_lookup=bool(dataset.get("ModalityLUTSequence", None)),
    )


def read_header(path: str | Path, piece: Slice) -> Any:
    """Everything but the pixels of the file that holds a slice, as a `pydicom.Dataset`. Raises `BadFile`.

    For those who write DICOM objects about a series; nothing of it may go anywhere else.
    """
    return _guarded(name_in(path, piece.path), lambda dicom: dicom.dcmread(piece.path, stop_before_pixels=True))


def stored_dtype_of(path: str | Path, piece: Slice) -> np.dtype:
    """The type of a slice's stored values. Raises `BadFile` for layouts that are not plain whole numbers."""
    allocated, stored, high, signed = piece.bits
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        raise BadFile(f"{name_in(path, piece.path)}: its pixels are stored in a way that medseg does not read")
    return np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")


def pixels_of(path: str | Path, piece: Slice) -> NDArray:
    """The stored values of one slice (rows, columns), unused high bits cleared."""
    where = name_in(path, piece.path)
    allocated, stored, _, _ = piece.bits
    if piece.rows * piece.columns * allocated // 8 > DEFLATE_RATIO * piece.path.stat().st_size:
        raise BadFile(f"{where}: the file is too short for what its header claims; it is damaged or incomplete")

    def decode(dicom: Any) -> NDArray:
        with open_file(piece.path) as opened:
            has_preamble = opened.read(132)[128:] == b"DICM"
        dataset = dicom.dcmread(piece.path, force=not has_preamble)
        if "TransferSyntaxUID" not in dataset.file_meta:  # only possible without a preamble; then this is the default
            dataset.file_meta.TransferSyntaxUID = dicom.uid.ImplicitVRLittleEndian
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_encapsulated and not dicom.pixels.get_decoder(syntax).is_available:
            raise BadFile(
                f"{where}: its pixels are compressed ({syntax.name}) and no decoder for that is installed; "
                'pip install "pylibjpeg[openjpeg]" pyjpegls python-gdcm, or decompress it, e.g. with gdcmconv --raw'
            )
        return np.asarray(dataset.pixel_array)

    pixels: NDArray = _guarded(where, decode)
    if pixels.shape != (piece.rows, piece.columns) or pixels.dtype.kind not in "iu":
        raise BadFile(f"{where}: its pixels are not what its header says; the file is damaged")
    # Old scanners keep overlays in the unused bits; pushing the value up and back drops them and extends the sign.
    unused = pixels.dtype.itemsize * 8 - stored
    return (pixels << unused) >> unused if unused > 0 and pixels.dtype.itemsize * 8 == allocated else pixels


def _guarded(where: str, work: Callable[[Any], Any]) -> Any:
    """The result of work with pydicom; whatever damaged data makes it raise becomes a `BadFile`.

    Its warnings are dropped: they quote values from the header, which may name the patient.
    """
    try:
        import pydicom
        import pydicom.pixels
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError:
        raise BadFile(f'{where}: reading DICOM needs pydicom; install it with: pip install "medseg[dicom]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work(pydicom)
    except (*_DAMAGE, BytesLengthException, InvalidDicomError):
        raise BadFile(f"{where}: is damaged or is not proper DICOM; export the series again") from None


def name_in(path: str | Path, file: Path) -> str:
    """The name of a file in a folder, as the user gave the folder."""
    return str(Path(path) / file.relative_to(path))
