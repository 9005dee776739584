"""The pixels of DICOM slices: plain numbers are read in place, compressed frames are unpacked by a
child process.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.files import MAX_BYTES
from medseg.io.dicom.decode import SERIES_SECONDS
from medseg.io.dicom.headers import BIG_ENDIAN, NATIVE, guarded
from medseg.io.dicom.slices import Slice, plain_dtype
from medseg.io.dicom.source import Entry, Source, Unpacked, inflated
from medseg.machine import limits_processes, resident_bytes

#: Most seconds that unpacking one frame may take.
FRAME_SECONDS = 30.0
#: Seconds between two looks at the memory of a decoder that has no limit of its own.
_LOOK_S = 0.02
#: Memory that a decoder may take beyond eight times the frame it unpacks, and the largest such
#: frame.
DECODER_BYTES, MAX_FRAME_BYTES = 1 << 30, 256 << 20
#: How much smaller than its pixels a compressed frame can be; beyond that the header claims what
#: the file cannot hold.
MAX_RATIO = 4096
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
#: JPEG and its relatives, which end with an end-of-image marker.
_JPEG = ("1.2.840.10008.1.2.4.",)
_DECODER = Path(__file__).with_name("decode.py")
_SHORT = "the file is too short for what its header claims; it is damaged or incomplete"


def stored_dtype_of(where: str, piece: Slice) -> np.dtype:
    """The type of a slice's stored values. Raises `BadFile` for layouts that are not plain whole
    numbers.
    """
    dtype = plain_dtype(piece)
    if dtype is None:
        raise BadFile(f"{where}: its pixels are stored in a way that medseg does not read")
    return dtype


def stored_pixels(source: Source, slices: Iterable[Slice]) -> Iterator[NDArray]:
    """The stored values (rows, columns) of each slice in turn, unused high bits cleared. Raises
    `BadFile`.

    Slices of one file should follow each other; the file is then opened once. One child serves all
    compressed frames.
    """
    with _Decoder() as decoder:
        entry: Entry | None = None
        file: _Opened | None = None
        # The last frame read, of which a mosaic's tiles are cut.
        whole: tuple[int, NDArray] | None = None
        try:
            for piece in slices:
                where = source.where(piece.entry)
                if file is None or entry != piece.entry:
                    if file:
                        file.close()
                    entry, file, whole = piece.entry, _Opened(source, piece, where), None
                if whole is None or whole[0] != piece.frame:
                    whole = piece.frame, _frame(piece, file, decoder)
                yield _cut(whole[1], piece)
        finally:
            if file:
                file.close()


def frame_size(piece: Slice) -> tuple[int, int]:
    """Rows and columns of the picture in the file that holds a slice: larger than the slice in a
    mosaic.
    """
    return (piece.tile.rows, piece.tile.columns) if piece.tile else (piece.rows, piece.columns)


class _Opened:
    """The pixel data of one file: bytes at a place, and where each compressed frame lies."""

    def __init__(self, source: Source, piece: Slice, where: str) -> None:
        self.where = where
        self._frames: list[list[tuple[int, int]]] | None = None
        self._base = 0
        self._context: Any = None
        stored_dtype_of(where, piece)
        rows, columns = frame_size(piece)
        native = rows * columns * piece.frames * (piece.bits[0] // 8)
        if native > MAX_BYTES:
            raise BadFile(f"{where}: claims more than the {MAX_BYTES / 2**30:.3g} GB allowed")
        about = piece.pixels
        if not about.syntax:
            raise BadFile(
                f"{where}: holds no pixels where they should be; it is damaged or incomplete"
            )
        context = source.open(piece.entry)
        file: Any = context.__enter__()
        try:
            if about.deflated_from is not None:
                file = inflated(file, about.deflated_from, where)
            if isinstance(file, Unpacked):  # read to its end now, which checks its checksum
                most = native + 1 if about.length >= 0 else 2 * native + (1 << 20)
                self._base = about.offset
                self.size, self._file = about.offset, BytesIO(file.take(about.offset, most))
                self.size += len(self._file.getbuffer())
            else:
                self._file = file
                self.size = file.seek(0, 2)
        except BaseException:
            context.__exit__(*sys.exc_info())
            raise
        self._context = context

    def close(self) -> None:
        """Close the file."""
        self._context.__exit__(None, None, None)

    def bytes_at(self, place: int, count: int) -> bytes:
        """Exactly `count` bytes of the file. Raises `BadFile` if they are not there."""
        if count < 0 or place + count > self.size:
            raise BadFile(f"{self.where}: {_SHORT}")
        try:
            self._file.seek(place - self._base)
            data = self._file.read(count)
        except OSError as error:
            raise BadFile(f"{self.where}: cannot be read: {error.strerror}") from None
        if len(data) != count:
            raise BadFile(f"{self.where}: {_SHORT}")
        return bytes(data)

    def compressed(self, piece: Slice) -> bytes:
        """The compressed bytes of a slice's frame."""
        if self._frames is None:
            self._frames = self._find_frames(piece)
        return b"".join(self.bytes_at(place, length) for place, length in self._frames[piece.frame])

    def _find_frames(self, piece: Slice) -> list[list[tuple[int, int]]]:
        """The fragments (place, length) of every frame (PS3.5 A.4). Raises `BadFile` if they do not
        end properly.
        """
        items = self._items(piece.pixels.offset)
        table, fragments = items[:1], items[1:]
        count = piece.frames
        if not table or len(fragments) < count:
            raise BadFile(
                f"{self.where}: holds fewer frames than its header claims; it is damaged or"
                " incomplete"
            )
        if len(fragments) == count:
            return [[fragment] for fragment in fragments]
        if count == 1:
            return [fragments]
        starts: tuple[int, ...] = piece.pixels.offsets
        if table[0][1] == 4 * count:
            starts = struct.unpack(f"<{count}I", self.bytes_at(*table[0]))
        frames = _by_frame(fragments, starts)
        if len(frames) != count:
            raise BadFile(
                f"{self.where}: does not say which of its compressed pieces is which frame; export"
                " it again"
            )
        return frames

    def _items(self, place: int) -> list[tuple[int, int]]:
        """The items (place, length) from a place on: the offset table, then the fragments."""
        items: list[tuple[int, int]] = []
        while True:
            group, element, length = struct.unpack("<HHI", self.bytes_at(place, 8))
            place += 8
            if (group, element) == _END:
                return items
            is_item = (group, element) == _ITEM and length != 0xFFFFFFFF
            if not is_item or place + length > self.size:
                raise BadFile(
                    f"{self.where}: its compressed pixels end early or are damaged; get the file"
                    " again"
                )
            items.append((place, length))
            place += length


def _by_frame(
    fragments: list[tuple[int, int]], starts: tuple[int, ...]
) -> list[list[tuple[int, int]]]:
    """Fragments frame by frame; frames start at `starts`, counted from the first fragment. None if
    that is not one of them.
    """
    origin = fragments[0][0] - 8
    frames: list[list[tuple[int, int]]] = []
    for fragment in fragments:
        if fragment[0] - 8 - origin in starts:
            frames.append([])
        if not frames:
            break
        frames[-1].append(fragment)
    return frames


def _frame(piece: Slice, opened: _Opened, decoder: _Decoder) -> NDArray:
    """The stored values of the whole picture that a slice lies in."""
    dtype = stored_dtype_of(opened.where, piece)
    if piece.pixels.syntax in NATIVE:
        pixels = _native(piece, opened, dtype)
    else:
        packed = _packed(piece, opened, dtype)
        size = math.prod(frame_size(piece)) * dtype.itemsize
        unpacked = decoder.unpack(opened.where, piece, packed=packed, size=size)
        pixels = np.frombuffer(unpacked, dtype).reshape(frame_size(piece))
    # Old scanners keep overlays in the unused bits; pushing the value up and back drops them and
    # extends the sign.
    unused_bits = dtype.itemsize * 8 - piece.bits[1]
    return (pixels << unused_bits) >> unused_bits if unused_bits else pixels


def _native(piece: Slice, opened: _Opened, dtype: np.dtype) -> NDArray:
    """The pixels of a frame that are stored as plain numbers."""
    where, about = opened.where, piece.pixels
    rows, columns = frame_size(piece)
    size = rows * columns * dtype.itemsize
    spare = about.length - size * piece.frames
    if about.length < 0 or spare < 0:
        raise BadFile(f"{where}: {_SHORT}")
    if spare >= max(2, columns * dtype.itemsize):
        raise BadFile(f"{where}: holds more pixels than its header says; the file is damaged")
    data = opened.bytes_at(about.offset + size * piece.frame, size)
    if about.syntax == BIG_ENDIAN and dtype.itemsize == 1 and about.words:
        if size % 2:
            raise BadFile(f"{where}: its pixels are stored in a way that medseg does not read")
        data = np.frombuffer(data, np.uint16).byteswap().tobytes()
    kind = dtype.newbyteorder(">" if about.syntax == BIG_ENDIAN else "<")
    return np.frombuffer(data, kind).reshape(rows, columns).astype(dtype, copy=False)


def _packed(piece: Slice, opened: _Opened, dtype: np.dtype) -> bytes:
    """The compressed bytes of a frame, as many as its pixels can come from."""
    if piece.pixels.length >= 0:
        raise BadFile(
            f"{opened.where}: its pixels are not packed as its header says; the file is damaged"
        )
    data = opened.compressed(piece)
    size = math.prod(frame_size(piece)) * dtype.itemsize
    if size > MAX_RATIO * len(data) or size > MAX_FRAME_BYTES:
        raise BadFile(f"{opened.where}: {_SHORT}")
    return data


def codestream_size(packed: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream itself says it has, or None if it
    says nothing.

    Sources: ITU-T T.81 B.2.2, T.87 C.2.2 (frame headers), T.800 A.5.1 (image and tile size).
    """
    try:
        if packed[:4] == b"\xff\x4f\xff\x51":
            right, bottom, left, top = struct.unpack_from(">IIII", packed, 8)
            return bottom - top, right - left
        place = 2 if packed[:2] == b"\xff\xd8" else len(packed)
        while packed[place] == 0xFF:
            marker, length = struct.unpack_from(">BH", packed, place + 1)
            if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                rows, columns = struct.unpack_from(">HH", packed, place + 5)
                return rows, columns
            place += 1 if marker == 0xFF else 2 + length
    except (IndexError, struct.error):
        pass
    return None


def _cut(picture: NDArray, piece: Slice) -> NDArray:
    if piece.tile is None:
        return picture
    down, right = divmod(piece.tile.number, piece.tile.across)
    return picture[
        down * piece.rows : (down + 1) * piece.rows,
        right * piece.columns : (right + 1) * piece.columns,
    ]


class _Decoder:
    """The child that unpacks compressed frames; started with the first of them. A context
    manager.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._most_bytes, self._left_s = 0, float(SERIES_SECONDS)

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child:
            with suppress(OSError):
                self._stream("stdin").close()
            self._child.kill()
            self._child.wait()
            self._stream("stdout").close()

    def unpack(self, where: str, piece: Slice, *, packed: bytes, size: int) -> bytes:
        """The `size` bytes of a frame's pixels, little-endian. Raises `BadFile` whatever happens to
        the child.
        """
        syntax = piece.pixels.syntax
        guarded(where, lambda dicom: _check_decoder(dicom, where, syntax))
        rows, columns = frame_size(piece)
        if syntax.startswith(_JPEG):
            # FF fills up, too.
            if not packed[-64:].rstrip(b"\0").endswith((b"\xff\xd9", b"\xff\xd9\xff")):
                raise BadFile(
                    f"{where}: its compressed pixels end early; it is incomplete, get the file"
                    " again"
                )
            if codestream_size(packed) != (rows, columns):
                raise BadFile(
                    f"{where}: its compressed pixels are not of the size that its header says; get"
                    " it again"
                )
        allocated, stored, _, signed = piece.bits
        about = {
            "syntax": syntax, "photometric": piece.photometric, "rows": rows, "columns": columns,
            "bits_allocated": allocated, "bits_stored": stored, "pixel_representation": signed,
            "dtype": f"<{'i' if signed else 'u'}{allocated // 8}",
        }  # fmt: skip
        if self._child is None:
            self._most_bytes = DECODER_BYTES + 8 * size
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_DECODER), str(self._most_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        with self._limits():
            data = self._exchange(json.dumps(about).encode(), packed, size)
        if len(data) != size:
            raise BadFile(
                f"{where}: its compressed pixels are damaged, or of a kind that no installed"
                " decoder reads; get it again, or decompress the series, e.g. with dcmdjpeg or"
                " gdcmconv --raw"
            )
        return data

    @contextmanager
    def _limits(self) -> Iterator[None]:
        """Kill the child if the block takes longer than a frame may, and where it cannot limit
        itself, if it takes too much memory or time in all.
        """
        child = self._child
        assert child is not None
        allowed_s = FRAME_SECONDS if limits_processes() else min(FRAME_SECONDS, self._left_s)
        timer = threading.Timer(allowed_s, child.kill)
        timer.daemon = True
        over = threading.Event()
        if not limits_processes():
            watch = (child, self._most_bytes, over)
            threading.Thread(target=_watch_memory, args=watch, daemon=True).start()
        start_s = time.perf_counter()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            over.set()
            self._left_s -= time.perf_counter() - start_s

    def _exchange(self, about: bytes, packed: bytes, size: int) -> bytes:
        """What the child answers; nothing if it failed or is no more."""
        try:
            stdin, stdout = self._stream("stdin"), self._stream("stdout")
            stdin.write(struct.pack("<QQ", len(about), len(packed)) + about + packed)
            stdin.flush()
            start = stdout.read(8)
            if len(start) == 8 and struct.unpack("<Q", start)[0] == size:
                return stdout.read(size)
        except OSError:
            pass
        return b""

    def _stream(self, name: str) -> BinaryIO:
        stream: BinaryIO = getattr(self._child, name)
        return stream


def _watch_memory(child: subprocess.Popen[bytes], most_bytes: int, over: threading.Event) -> None:
    """Kill the child once it holds more, until it is over."""
    while not over.wait(_LOOK_S):
        if resident_bytes(child.pid) > most_bytes:
            child.kill()


def _check_decoder(dicom: Any, where: str, syntax: str) -> None:
    import pydicom.pixels

    uid = dicom.uid.UID(syntax)
    try:
        available = pydicom.pixels.get_decoder(uid).is_available
    except NotImplementedError:
        raise BadFile(
            f"{where}: its pixels are packed in a way that is not known; decompress the series"
        ) from None
    if not available:
        raise BadFile(
            f"{where}: its pixels are compressed ({uid.name}) and no decoder for that is installed;"
            ' pip install "medseg[dicom-codecs]", or decompress the series, e.g. with gdcmconv'
            " --raw"
        )
