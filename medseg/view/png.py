"""Pictures as PNG files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write


def write_png(path: str | Path, picture: NDArray[np.uint8]) -> None:
    """Write an RGB picture (rows, columns, 3) as PNG (ISO/IEC 15948), whole or not at all."""
    with atomic_write(path) as handle:
        handle.write(png_bytes(picture))


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """An RGB picture (rows, columns, 3) as the bytes of a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = picture.shape
    lines = np.hstack([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)])
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(lines.tobytes(), 6)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )
