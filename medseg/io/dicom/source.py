"""Where DICOM files come from: a folder, a list of files, a zip, a DICOMDIR or one file. Bytes
only, no pydicom.

A zip is read in place: nothing is written anywhere, so no name in it can point anywhere, and every
byte is counted as it is unpacked. What a DICOMDIR refers to must lie inside its own folder.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from medseg.errors import BadFile
from medseg.files import MAX_BYTES, open_file
from medseg.stream import CHUNK

#: What `read` takes for DICOM: one path, or the files of a series.
Paths = str | Path | Sequence[str | Path]
#: Most entries of a zip, and most bytes of its directory (which the standard library reads before
#: it counts entries).
MAX_ENTRIES = 10_000
MAX_DIRECTORY_BYTES = 4 << 20
#: Most bytes before the pixels of one file.
MAX_HEADER_BYTES = 64 << 20
_MAGIC = b"PK\x03\x04"
_DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError,
    ValueError, struct.error,
    IndexError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of a source: a path, or entry number `member` of the zip at that path."""

    path: Path
    member: int | None = None


class Source:
    """The files that a user named together. A context manager; `entries` are in the order of their
    names.
    """

    def __init__(self, paths: Paths) -> None:
        self.name = name_of(paths)  # for messages
        self.is_file = self.is_folder = False
        self._zip: zipfile.ZipFile | None = None
        self._unpacked = 0
        if not isinstance(paths, str | Path):
            self.entries = [Entry(path=Path(path)) for path in paths]
            if not self.entries:
                raise BadFile("the list of files is empty; give the files of one series")
            return
        path = Path(paths)
        if path.is_dir():
            self.is_folder = True
            self.entries = _files_in(path)
            return
        with open_file(path) as file:
            start = file.read(4)
        if start == _MAGIC or path.suffix.lower() == ".zip":
            self._zip = _open_zip(path)
            self.entries = _members(path, self._zip)
        else:
            self.is_file = True
            self.entries = [Entry(path=path)]

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip:
            self._zip.close()

    def where(self, entry: Entry) -> str:
        """How to name a file in a message: as the user gave it, without the names that stand in a
        zip.
        """
        if entry.member is not None:
            return f"{self.name} (entry {entry.member + 1})"
        return str(entry.path)

    def suffix(self, entry: Entry) -> str:
        """The suffix of a file's name in lower case."""
        name = (
            self._zip.infolist()[entry.member].filename
            if self._zip and entry.member is not None
            else entry.path
        )
        return Path(name).suffix.lower()

    @contextmanager
    def open(self, entry: Entry) -> Iterator[BinaryIO]:
        """The bytes of a file; those of a zip can be read forwards, and backwards within what was
        read.

        Raises `BadFile` for what is no ordinary file, and for a zip that is damaged or unpacks to
        too much.
        """
        if entry.member is None:
            with open_file(entry.path) as file:
                yield file
            return
        if self._zip is None:
            raise BadFile(f"{self.where(entry)}: is not open")
        member = self._zip.infolist()[entry.member]
        if member.flag_bits & 1:
            raise BadFile(f"{self.where(entry)}: is encrypted; unpack the zip and give the folder")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadFile(
                f"{self.where(entry)}: is packed in an unusual way; unpack the zip and give the"
                " folder"
            )
        try:
            with self._zip.open(member) as stream:
                yield cast(
                    BinaryIO, Unpacked(self._pieces(stream, self.where(entry)), self.where(entry))
                )
        except _DAMAGED_ZIP:
            raise BadFile(f"{self.where(entry)}: is damaged in the zip; get it again") from None

    def _pieces(self, stream: IO[bytes], where: str) -> Iterator[bytes]:
        while piece := stream.read(CHUNK):
            self._unpacked += len(piece)
            if self._unpacked > MAX_BYTES:
                raise BadFile(
                    f"{where}: the zip unpacks to more than the {MAX_BYTES >> 30} GB allowed"
                )
            yield piece


class Unpacked:
    """Unpacked bytes as a file that is read forwards; what was read, at most `MAX_HEADER_BYTES`,
    can be read again.
    """

    def __init__(self, pieces: Iterator[bytes], where: str) -> None:
        self._pieces, self._where = pieces, where
        self._kept = bytearray()
        self._place = 0

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place counted from the beginning or from here."""
        if whence == os.SEEK_END:
            raise OSError("the end of a packed file is not known")
        self._place = offset + (self._place if whence == os.SEEK_CUR else 0)
        return self._place

    def read(self, count: int) -> bytes:
        """At most `count` bytes, fewer at the end."""
        if count < 0 or self._place + count > MAX_HEADER_BYTES:
            raise BadFile(
                f"{self._where}: its header is larger than any header is; the file is damaged"
            )
        while len(self._kept) < self._place + count and (piece := next(self._pieces, b"")):
            self._kept += piece
        data = bytes(self._kept[self._place : self._place + count])
        self._place += len(data)
        return data

    def forwards(self) -> Iterator[bytes]:
        """All bytes from the beginning. Nothing can be read afterwards."""
        yield bytes(self._kept)
        yield from self._pieces

    def take(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, fewer at the end. The rest is unpacked too: that checks
        the checksum.
        """
        out = bytearray()
        place = 0
        for piece in self.forwards():
            if place + len(piece) > start and len(out) < count:
                out += piece[max(0, start - place) :][: count - len(out)]
            place += len(piece)
        return bytes(out)


def inflated(file: Any, start: int, where: str) -> Unpacked:
    """The rest of a file from `start` on, which is raw deflate (PS3.5 A.5), unpacked. Raises
    `BadFile`.
    """
    file.seek(start)
    return Unpacked(_inflate(file, where), where)


def _inflate(file: Any, where: str) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    total = 0
    try:
        while not unpacker.eof:
            chunk = unpacker.unconsumed_tail or file.read(CHUNK)
            piece = unpacker.decompress(chunk, CHUNK)
            if not chunk and not piece:
                raise BadFile(
                    f"{where}: its compressed data ends early; it is incomplete, get the file again"
                )
            total += len(piece)
            if total > MAX_BYTES:
                raise BadFile(f"{where}: unpacks to more than the {MAX_BYTES >> 30} GB allowed")
            if piece:
                yield piece
    except zlib.error:
        raise BadFile(f"{where}: its compressed data is damaged; get the file again") from None


def name_of(paths: Paths) -> str:
    """How messages name a source: the path as it was given, or the first of several files."""
    if isinstance(paths, str | Path):
        return str(paths)
    return (
        f"{paths[0]} and {len(paths) - 1} more"
        if len(paths) > 1
        else str(paths[0])
        if paths
        else "the list"
    )


def _files_in(folder: Path) -> list[Entry]:
    """All files of a folder and its subfolders. Raises `BadFile` if there is none."""
    names = sorted(Path(inner) / name for inner, _, files in os.walk(folder) for name in files)
    if not names:
        raise BadFile(f"{folder}: is an empty folder; give the folder that holds the series")
    return [Entry(path=name) for name in names]


def _members(path: Path, opened: zipfile.ZipFile) -> list[Entry]:
    """The files of a zip in the order of their names. Raises `BadFile` if there is none."""
    members = opened.infolist()
    order = sorted(range(len(members)), key=lambda n: members[n].filename)
    entries = [Entry(path=path, member=n) for n in order if not members[n].is_dir()]
    if not entries:
        raise BadFile(f"{path}: is an empty zip; give one that holds the series")
    return entries


def _open_zip(path: Path) -> zipfile.ZipFile:
    """A zip whose directory is small enough. Raises `BadFile`."""
    remedy = "unpack it and give the folder"
    try:
        with open_file(path) as file:
            if _directory_bytes(file) > MAX_DIRECTORY_BYTES:
                raise BadFile(f"{path}: holds more than the {MAX_ENTRIES} files allowed; {remedy}")
        archive = zipfile.ZipFile(path)
    except _DAMAGED_ZIP:
        raise BadFile(f"{path}: is damaged or is no zip; get the file again") from None
    if len(archive.infolist()) > MAX_ENTRIES:
        archive.close()
        raise BadFile(f"{path}: holds more than the {MAX_ENTRIES} files allowed; {remedy}")
    return archive


def _directory_bytes(file: BinaryIO) -> int:
    """How long a zip says its directory is
    (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14-16).
    """
    size = file.seek(0, os.SEEK_END)
    tail_start = max(0, size - 65557 - 20)
    file.seek(tail_start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise zipfile.BadZipFile
    # Zip64: the real numbers stand elsewhere.
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        (place,) = struct.unpack("<Q", tail[end - 12 : end - 4])
        file.seek(min(place, size))
        record = file.read(56)
        if record[:4] == b"PK\x06\x06":
            return int(struct.unpack("<Q", record[40:48])[0])
    return int(struct.unpack("<I", tail[end + 12 : end + 16])[0])
