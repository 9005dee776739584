"""pydicom held in: headers are read up to their pixels, and what damage makes pydicom raise is a
`BadFile`.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from medseg.errors import BadFile
from medseg.io.dicom.source import Entry, Source, inflated

DICOMDIR = "1.2.840.10008.1.3.10"
IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
)  # fmt: skip
#: Transfer syntaxes whose pixels are plain numbers.
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)
#: Most pieces in which a header is read: about 60 for a frame, of a few thousand.
MAX_READS = 1 << 21
# What pydicom lets out on damaged files besides exceptions of its own, found by mutating files.
_DAMAGE = (
    AttributeError, AssertionError, EOFError, IndexError, KeyError, LookupError,
    NotImplementedError, OSError,
    OverflowError, RecursionError, RuntimeError, TypeError, UnicodeError, ValueError, MemoryError,
    struct.error,
    zlib.error,
)  # fmt: skip


class _BadTag(Exception):
    """A tag, by its name in the standard, that holds something impossible."""


@dataclass(frozen=True, kw_only=True)
class PixelData:
    """Where the pixels of a file lie, and how they are packed."""

    syntax: str
    offset: int  # of the Pixel Data element's value in the file, or in what is inflated
    length: int  # of the value in bytes; -1 for compressed pixels, which end with a delimiter
    deflated_from: int | None = None  # where the deflated part of the file begins
    words: bool = True  # VR OW: 8-bit pixels in big-endian files are then swapped in pairs
    offsets: tuple[
        int, ...
    ] = ()  # Extended Offset Table: of each frame from the end of the basic offset table


def is_dicomdir(source: Source, entry: Entry) -> bool:
    """Whether a DICOM file is a DICOMDIR, by its file meta information alone. Raises `BadFile`."""
    with source.open(entry) as file:

        def work(dicom: Any) -> bool:
            return str(file_meta(dicom, file)[0].get("MediaStorageSOPClassUID", "")) == DICOMDIR

        is_directory: bool = guarded(source.where(entry), work)
    return is_directory


def class_of_file(source: Source, entry: Entry) -> str:
    """The SOP Class UID of a DICOM file by its file meta information, or where that lacks it, by
    its data set; '' if neither says it. Raises `BadFile`.
    """
    where = source.where(entry)
    with source.open(entry) as file:

        def work(dicom: Any) -> str:
            meta = file_meta(dicom, file)[0]
            if sop_class := str(meta.get("MediaStorageSOPClassUID", "")):
                return sop_class
            return sop_class_of(dataset_of(dicom, file, where=where, tags=["SOPClassUID"])[0])

        sop_class: str = guarded(where, work)
    return sop_class


def header_values(source: Source, entry: Entry, tags: Sequence[str | int]) -> Any:
    """Some tags of a file as a `pydicom.Dataset`. Raises `BadFile`."""
    where = source.where(entry)
    with source.open(entry) as file:
        return guarded(where, lambda dicom: dataset_of(dicom, file, where=where, tags=tags)[0])


def sop_class_of(dataset: Any) -> str:
    """The SOP Class UID of a data set, or ''."""
    return str(dataset.get("SOPClassUID", ""))


def is_dicom(start: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file; files without preamble begin with
    group 2 or 8.
    """
    return start[128:132] == b"DICM" or start[:2] in (b"\x08\x00", b"\x02\x00")


def numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """The `count` numbers of a tag, None if it is absent or empty. Within `guarded`, anything else
    is a `BadFile`.
    """
    try:
        values = dataset.get(name)
        if values is None or (isinstance(values, Sequence) and len(values) == 0):
            return None
        floats = tuple(float(value) for value in values)
    except _DAMAGE:
        raise _BadTag(name) from None
    if len(floats) != count or not all(map(math.isfinite, floats)):
        raise _BadTag(name)
    return floats


def number(dataset: Any, name: str) -> float | None:
    """The number of a tag, None if it is absent or empty. Within `guarded`, anything else is a
    `BadFile`.
    """
    try:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        real = float(value)
    except _DAMAGE:
        raise _BadTag(name) from None
    if not math.isfinite(real):
        raise _BadTag(name)
    return real


def trait(dataset: Any, name: str) -> Any:
    """A number or a tuple of numbers of a tag that only helps to tell volumes apart; None for
    anything odd.
    """
    try:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(round(float(part), 6) for part in value)
        return round(float(value), 6)
    except _DAMAGE:
        return None


def length(dataset: Any, name: str) -> float | None:
    """A length in mm of a tag that only confirms others; None for anything odd."""
    value = trait(dataset, name)
    return value if isinstance(value, float) and 0 < value < math.inf else None


def words(dataset: Any, name: str) -> str:
    """A text that can be shown on a terminal: printable characters alone, as those of control could
    steer it.
    """
    try:
        value = dataset.get(name)
    except _DAMAGE:
        return ""
    return "".join(character for character in str(value or "") if character.isprintable())[:64]


def echo_time(dataset: Any, name: str) -> float | None:
    """An echo time to a hundredth of a millisecond: smaller differences are rounding, not
    echoes.
    """
    value = trait(dataset, name)
    return round(value, 2) if isinstance(value, float) else None


_unheard: ContextVar[bool] = ContextVar("_unheard", default=False)


def _heard(_: logging.LogRecord) -> bool:
    return not _unheard.get()


@contextmanager
def without_remarks() -> Iterator[None]:
    """Drop what pydicom warns and logs meanwhile: it quotes values from the header, which may name
    the patient.
    """
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
        raise BadFile(
            f'{where}: reading DICOM needs pydicom; install it with: pip install "medseg[dicom]"'
        ) from None
    try:
        with without_remarks():
            return work(pydicom)
    except _BadTag as error:
        raise BadFile(
            f"{where}: its {error} is not what DICOM says it must be; export the series again"
        ) from None
    except (*_DAMAGE, BytesLengthException, InvalidDicomError):
        raise BadFile(
            f"{where}: is damaged or is not proper DICOM; export the series again"
        ) from None


def dataset_of(
    dicom: Any, file: Any, *, where: str, tags: Sequence[str | int] | None
) -> tuple[Any, PixelData | None]:
    """The data set up to the pixels, with `media_class`, `file_meta` and `cut_off`; and where the
    pixels lie.
    """
    meta, start = file_meta(dicom, file)
    syntax = str(meta.get("TransferSyntaxUID", "") or "")
    deflated_from = start if syntax == DEFLATED else None
    # Pydicom would unpack these without a limit: a small file could take all memory.
    if deflated_from is not None:
        file = inflated(file, start, where)
        start = 0
    file.seek(start)
    peek = file.read(6)
    file.seek(start)
    lettered = len(peek) == 6 and peek[4:6].isalpha() and peek[4:6].isupper()
    implicit = not lettered  # some writers say explicit and mean implicit, or the other way round
    if not syntax:
        syntax = IMPLICIT if implicit else EXPLICIT
    little = syntax != BIG_ENDIAN
    tag_numbers = None if tags is None else _tags(tuple(tags))
    reader = _Watched(file, where)
    dataset = dicom.filereader.read_dataset(
        reader,
        implicit,
        little,
        stop_when=lambda tag, vr, length: tag >= 0x7FE00008,
        specific_tags=tag_numbers,
    )
    dataset.media_class = str(meta.get("MediaStorageSOPClassUID", ""))
    dataset.file_meta = meta
    dataset.cut_off = reader.is_cut_off()
    pixels = _pixel_data(file, syntax=syntax, implicit=implicit, little=little)
    return dataset, pixels and replace(pixels, deflated_from=deflated_from)


class _Watched:
    """A file that notices when it ends in the middle of something, which pydicom passes over in
    silence.
    """

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where
        self._short = False
        self._reads = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise BadFile(
                f"{self._where}: its header has more parts than any header has; the file is damaged"
            )
        data: bytes = self._file.read(count)
        # At the very end of a whole file, the next element is looked for (8 bytes) and there is
        # nothing.
        self._short |= len(data) < count and not (count == 8 and not data)
        return data

    def is_cut_off(self) -> bool:
        """Whether the file ended within an element, be it one that was read or one that was passed
        over.
        """
        place = self.tell()
        self.seek(max(0, place - 1))
        missing = not self._file.read(1)
        self.seek(place)
        return self._short or missing


@cache
def _tags(names: tuple[str | int, ...]) -> list[Any]:
    from pydicom.tag import Tag

    return [Tag(name) for name in names]


def file_meta(dicom: Any, file: Any) -> tuple[Any, int]:
    """The file meta information (group 2, always explicit little endian) and where the data set
    begins.
    """
    file.seek(0)
    start = 132 if file.read(132)[128:] == b"DICM" else 0
    file.seek(start)
    if file.read(2) != b"\x02\x00":
        return dicom.dataset.FileMetaDataset(), start
    file.seek(start)
    meta = dicom.filereader.read_dataset(
        file, False, True, stop_when=lambda tag, vr, length: tag.group != 2
    )
    return meta, file.tell()


def _pixel_data(file: Any, *, syntax: str, implicit: bool, little: bool) -> PixelData | None:
    """Where the value of the element that a file stands before lies, if that element is Pixel Data
    (PS3.5 7.1).
    """
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
    return PixelData(
        syntax=syntax,
        offset=offset,
        length=-1 if length == 0xFFFFFFFF else length,
        words=implicit or start[4:6] == b"OW",
    )
