"""Bytes in: files read within limits and to their last byte.

Nothing here knows what the bytes mean. Reading allocates only what the file on disk can hold:
deflate cannot expand more than 1032 times, so a header that claims more is refused before any
memory is taken. Compressed streams are read to their end, so that their checksum is checked.
"""

from __future__ import annotations

import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medseg.errors import BadFile, DataWarning

#: Most bytes of voxels that a file may hold or claim.
MAX_BYTES = 8 * 2**30
#: Deflate's largest expansion (https://zlib.net/zlib_tech.html).
DEFLATE_RATIO = 1032
#: How files are opened: not waiting, or opening a named pipe would wait for a writer for ever, and
#: on Windows as they are, without changing line ends.
READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
#: Bytes read from disk at a time.
CHUNK = 1 << 18
#: What zlib calls the two packings (https://zlib.net/manual.html, inflateInit2).
WINDOW_BITS = {"gzip": 31, "zlib": 15}


class ByteStream:
    """The bytes of a file from `start` on, unpacked on the way if `packing` is 'gzip' or 'zlib'.

    Every failure is a `BadFile` naming `path`, and first `owner`, the file that the user gave,
    where the header in that led to this one; warnings name `owner` alone. Call `finish` after the
    last wanted byte: it reads to the end of the file, which checks the checksum and that nothing
    follows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        packing: str | None = None,
        start: int = 0,
        max_bytes: int = MAX_BYTES,
        owner: str | Path | None = None,
    ):
        self.path = path
        self.owner = path if owner is None else owner
        #: What messages call the file.
        self.name = str(path)
        if owner is not None and str(owner) != str(path):
            self.name = f"{owner}: its data file {Path(path).name}"
        self._max_bytes = max_bytes
        self._packing = packing
        self._waiting = b""  # packed bytes read from disk and not yet unpacked
        self._unpacker: Any = None
        self._members = 0  # gzip members that ended
        self._file = open_file(path)
        try:
            self._packed_size = os.fstat(self._file.fileno()).st_size - start
            self._file.seek(start)
            if packing:
                self._unpacker = _decompressor()(wbits=WINDOW_BITS[packing])
        except BaseException:
            self._file.close()
            raise
        self._taken = 0

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check_claim(self, count: int) -> None:
        """Raise `BadFile` if `count` more bytes cannot be in this file, or are more than
        allowed.
        """
        if count > self._max_bytes:
            raise BadFile(
                f"{self.name}: its header claims {count / 2**30:.3g} GB, more than the "
                f"{self._max_bytes / 2**30:.3g} GB allowed; crop the scan or check the header"
            )
        ratio = DEFLATE_RATIO if self._packing else 1
        if self._taken + count > ratio * self._packed_size:
            raise BadFile(
                f"{self.name}: the file is too short for what its header claims "
                f"({self._taken + count} bytes of data); it is damaged or incomplete, get it again"
            )

    def read(self, count: int) -> bytearray:
        """Exactly `count` bytes."""
        self.check_claim(count)
        try:
            buffer = bytearray(count)
        except MemoryError:
            raise BadFile(
                f"{self.name}: not enough memory for its {count / 2**30:.3g} GB of data"
            ) from None
        view = memoryview(buffer)
        position = 0 if self._packing else self._read_into(view)
        for piece in self._pieces(count - position):
            view[position : position + len(piece)] = piece
            position += len(piece)
        return buffer

    def skip(self, count: int) -> None:
        """Pass over exactly `count` bytes."""
        self.check_claim(count)
        for _ in self._pieces(count):
            pass

    def finish(self, *, extra: int = 0) -> None:
        """Read to the end of the file, of which at most `extra` bytes may remain."""
        self._rest(extra)

    def rest(self, max_bytes: int) -> bytes:
        """All that is left up to the end of the file, of which there may be at most `max_bytes`."""
        return b"".join(self._rest(max_bytes))

    def refuse_rest(self) -> BadFile:
        """What to raise if something follows that does not belong to the data."""
        return BadFile(
            f"{self.name}: the file holds more data than its header claims; it is damaged"
        )

    def _rest(self, max_bytes: int) -> list[bytes]:
        pieces = []
        while piece := self._some(CHUNK):
            max_bytes -= len(piece)
            if max_bytes < 0:
                raise self.refuse_rest()
            pieces.append(piece)
        return pieces

    def _pieces(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self._some(min(count, CHUNK))
            if not piece:
                raise BadFile(
                    f"{self.name}: the file ends early; it is damaged or incomplete, get it again"
                )
            self._taken += len(piece)
            count -= len(piece)
            yield piece

    def _some(self, count: int) -> bytes:
        """Between 1 and `count` bytes, or none at the end of the file."""
        if not self._packing:
            return self._from_disk(count)
        while True:
            if self._unpacker.eof and not self._next_member():
                return b""
            if not self._waiting:
                self._waiting = self._from_disk(CHUNK)
            if not self._waiting and not self._unpacker.eof:
                # A decompressor may still hold output it has not given out yet.
                if piece := self._unpack(b"", count):
                    return piece
                if self._unpacker.eof:
                    continue
                raise BadFile(
                    f"{self.name}: the compressed data ends early; it is incomplete, get the file"
                    " again"
                )
            chunk, self._waiting = self._waiting, b""
            piece = self._unpack(chunk, count)
            if piece:
                return piece

    def _unpack(self, packed: bytes, count: int) -> bytes:
        try:
            piece: bytes = self._unpacker.decompress(packed, count)
        except _unpacking_errors() as error:
            what = "checksum does not match" if "check" in str(error) else "data is damaged"
            if self._taken == 0 and not self._members and "header" in str(error).lower():
                what = f"data is not {self._packing} data at all"
            raise BadFile(f"{self.name}: its compressed {what}; get the file again") from None
        self._waiting = (
            self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
        )
        return piece

    def _next_member(self) -> bool:
        """Whether another gzip member follows; anything else but padding with zeros is refused."""
        self._members += 1
        rest = self._waiting
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._from_disk(CHUNK)):
                self._waiting = b""
                return False
        if rest in (b"\n", b"\r\n") and not self._from_disk(1):
            # Certain: the checksum has proved what comes before to be whole, and a line end is no
            # data.
            warnings.warn(
                f"{self.owner}: a line end follows its data; it was passed over",
                DataWarning,
                stacklevel=2,
            )
            self._waiting = b""
            return False
        if self._packing != "gzip" or not (rest[:2] == b"\x1f\x8b" or rest == b"\x1f"):
            raise BadFile(
                f"{self.name}: something other than compressed data follows its end; the file is"
                " damaged"
            )
        self._waiting = rest
        self._unpacker = _decompressor()(wbits=WINDOW_BITS["gzip"])
        return True

    def _read_into(self, view: memoryview) -> int:
        """Fill `view` with what follows in a file that is not packed; returns how many bytes there
        were.
        """
        try:
            length: int = self._file.readinto(view)  # type: ignore[attr-defined]
        except OSError as error:
            raise BadFile(f"{self.name}: cannot be read: {error.strerror}") from None
        self._taken += length
        return length

    def _from_disk(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except OSError as error:
            raise BadFile(f"{self.name}: cannot be read: {error.strerror}") from None


def open_file(path: str | Path) -> BinaryIO:
    """An ordinary, non-empty file opened for reading. Raises `BadFile` for anything else."""
    try:
        descriptor = os.open(path, READING)
    except FileNotFoundError:
        raise BadFile(f"{path}: there is no such file; check the name") from None
    except PermissionError:
        if os.path.isdir(path):  # noqa: PTH112 - no name raises; Windows opens no folder
            raise BadFile(f"{path}: is not an ordinary file") from None
        raise BadFile(f"{path}: may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        raise BadFile(
            f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}"
        ) from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size == 0:
        os.close(descriptor)
        raise BadFile(
            f"{path}: is empty"
            if stat.S_ISREG(about.st_mode)
            else f"{path}: is not an ordinary file"
        )
    return os.fdopen(descriptor, "rb")


def size_in_bytes(path: str | Path) -> int:
    """The length of an ordinary file. Raises `BadFile`."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def is_gzip(path: str | Path) -> bool:
    """Whether a file begins as gzip data does (RFC 1952, section 2.3.1). Raises `BadFile`."""
    with open_file(path) as file:
        return file.read(2) == b"\x1f\x8b"


def after_lines(path: str | Path, *, start: int, lines: int) -> int:
    """Where a file goes on after `lines` lines, counted from byte `start`. Raises `BadFile` if it
    has fewer.
    """
    with open_file(path) as file:
        file.seek(start)
        for _ in range(lines):
            length = 0
            while not (line := file.readline(CHUNK)).endswith(b"\n"):
                if not line:
                    raise BadFile(
                        f"{path}: has fewer lines than its header says to skip; correct the header"
                    )
                length += len(line)
            start += length + len(line)
    return start


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole content of a file of at most `max_bytes`. Raises `BadFile`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise BadFile(f"{path}: is larger than the {max_bytes} bytes allowed")
        try:
            return file.read()
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
        except MemoryError:
            raise BadFile(f"{path}: not enough memory to read it") from None


def read_text(path: str | Path, *, max_bytes: int = 1 << 24) -> str:
    """The content of a UTF-8 text file, with or without a byte order mark. Raises `BadFile`."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{path}: is not a text file in UTF-8") from None


def gunzip(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole content of a gzip file, checksum checked, of at most `max_bytes` unpacked. Raises
    `BadFile`.
    """
    out = bytearray()
    with ByteStream(path, packing="gzip", max_bytes=max_bytes) as stream:
        while piece := stream._some(CHUNK):
            out += piece
            if len(out) > max_bytes:
                raise BadFile(f"{path}: unpacks to more than the {max_bytes} bytes allowed")
    return bytes(out)


def _decompressor() -> Callable[..., Any]:
    try:
        from isal import isal_zlib  # about 3 times as fast; zlib does the same
    except ImportError:
        return zlib.decompressobj
    decompressor: Callable[..., Any] = isal_zlib.decompressobj
    return decompressor


def _unpacking_errors() -> tuple[type[Exception], ...]:
    try:
        from isal import isal_zlib
    except ImportError:
        return (zlib.error,)
    fast: Any = isal_zlib.IsalError
    return (zlib.error, fast)
