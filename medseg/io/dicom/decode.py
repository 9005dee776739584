"""Run as a program: unpack compressed frames for `medseg.io.dicom.pixels`, within limits of memory
and time.

Decoders are written in C and meet files from strangers here. What crashes, hangs or eats memory is
this process, not medseg. It imports nothing of medseg, reads no file and writes none.

Over stdin and stdout, for each frame: the length of a JSON description and of the frame (two
little-endian 64-bit numbers), both; back come a 64-bit length and as many bytes of pixels,
little-endian, or the length 0 for a failure.
"""

from __future__ import annotations

import json
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

#: Most seconds of computing for all frames of a series.
SERIES_SECONDS = 1200


def main(memory_bytes: int) -> None:
    """Serve frames until stdin ends, in at most `memory_bytes` beyond what the decoders need to be
    loaded.
    """
    import numpy  # noqa: F401  (loaded before memory is limited, as are the two below)
    import pydicom.encaps
    import pydicom.pixels  # noqa: F401

    warnings.simplefilter("ignore")
    out = sys.stdout.buffer
    _limit(memory_bytes)
    while (description := _message(sys.stdin.buffer)) is not None:
        about, frame = description
        try:
            pixels = _pixels(about, frame)
        except Exception:  # whatever it is, the parent says that the file is damaged
            pixels = b""
        out.write(struct.pack("<Q", len(pixels)))
        out.write(pixels)
        out.flush()


def _limit(memory_bytes: int) -> None:
    """No more memory than given, no files, no core dump; the time of one frame is kept by the
    parent, and where there is no such limit the memory, too.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        if sys.platform == "linux"
        else 0
    )
    most = pages * resource.getpagesize() + memory_bytes
    for what, value in (
        (resource.RLIMIT_AS, most if pages else resource.RLIM_INFINITY),
        (resource.RLIMIT_CPU, SERIES_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))


def _message(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    start = stream.read(16)
    if len(start) < 16:
        return None
    about_length, frame_length = struct.unpack("<QQ", start)
    about = json.loads(stream.read(about_length))
    return about, stream.read(frame_length)


def _pixels(about: dict[str, Any], frame: bytes) -> bytes:
    """The pixels of one frame as little-endian numbers of `about["dtype"]`; raises whatever the
    decoder raises.
    """
    import numpy as np
    import pydicom.encaps
    import pydicom.pixels

    options = {
        key: about[key]
        for key in ("rows", "columns", "bits_allocated", "bits_stored", "pixel_representation")
    }
    array, _ = pydicom.pixels.get_decoder(about["syntax"]).as_array(
        pydicom.encaps.encapsulate([frame]),
        index=0,
        raw=True,
        number_of_frames=1,
        samples_per_pixel=1,
        photometric_interpretation=about["photometric"],
        pixel_keyword="PixelData",
        **options,
    )
    dtype = np.dtype(about["dtype"])
    if array.shape != (about["rows"], about["columns"]) or array.dtype.kind != dtype.kind:
        return b""
    return bytes(array.astype(dtype, casting="same_kind").tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]))
