"""Voxels that a text header describes: behind bytes to pass over, at the end of a file, or in
several files.

NRRD and MetaImage both have headers for data of other programs; what the two share is here. The
rules are those of https://teem.sourceforge.net/nrrd/format.html (sections "data file" and "skip")
and of MetaIO's ElementDataFile and HeaderSize; that they are read as ITK reads them was tried with
SimpleITK.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.files import ByteStream, data_file
from medseg.io.voxels import finish_voxels, read_voxels
from medseg.stream import MAX_BYTES, after_lines, size_in_bytes

#: Most files that one volume may be spread over.
MAX_FILES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the voxels of a header are.

    files: in the order of their parts, which follow each other along the slowest axes. part: the
    sizes of each part, () if one file holds all. packing: 'gzip', 'zlib' or None. start: bytes
    before the voxels, or before the packed data, in each file. foreign: whether these are another
    program's header. lines: lines to pass over from there. skipped: bytes to pass over once
    unpacked. at_end: the voxels are the last bytes of each file, whatever comes before.
    """

    files: tuple[Path, ...]
    part: tuple[int, ...] = ()
    packing: str | None = None
    start: int = 0
    lines: int = 0
    skipped: int = 0
    foreign: bool = False
    at_end: bool = False


def read_placed(
    path: str | Path,
    place: Place,
    dtype: np.dtype,
    sizes: Sequence[int],
    *,
    count: int = 1,
    index: int = 0,
) -> NDArray:
    """Array `index` of `count` of `sizes` that follow each other at a place, first axis fastest.

    `path` is the header, which warnings name. Raises `BadFile` for files that hold less or more.
    """
    if not place.part:
        file = place.files[0]
        return _read_file(path, place, file, dtype=dtype, sizes=sizes, count=count, index=index)
    total = math.prod(sizes) * count * dtype.itemsize
    if total > MAX_BYTES:
        raise BadFile(
            f"{path}: its header claims {total / 2**30:.3g} GB, more than the "
            f"{MAX_BYTES / 2**30:.3g} GB allowed; "
            "crop the scan or check the header"
        )
    part = place.part
    for file in place.files:  # before any memory is taken
        with ByteStream(file, packing=place.packing, owner=path) as stream:
            stream.check_claim(math.prod(part) * dtype.itemsize)
    every = np.empty(math.prod(sizes) * count, dtype.newbyteorder("="))
    step = math.prod(part)
    for number, file in enumerate(place.files):
        voxels = _read_file(path, place, file, dtype=dtype, sizes=part)
        every[number * step : (number + 1) * step] = voxels.reshape(-1, order="F")
    return every.reshape((*sizes, count), order="F")[..., index]


def part_sizes(
    path: str | Path, sizes: Sequence[int], files: int, dimension: int
) -> tuple[int, ...]:
    """The sizes of what each of several files holds, if that has so many of the axes of `sizes`,
    fastest first.

    With as many axes as the whole, each file holds an equal slab along the slowest one. Raises
    `BadFile` for another number of files than that takes.
    """
    if not 1 <= dimension <= len(sizes):
        raise BadFile(
            f"{path}: its header gives its data files {dimension} dimensions; correct the header"
        )
    if dimension < len(sizes):
        part, fits = tuple(sizes[:dimension]), files == math.prod(sizes[dimension:])
    else:
        part, fits = (*sizes[:-1], sizes[-1] // files), sizes[-1] % files == 0
    if not fits:
        shape = " x ".join(map(str, sizes))
        raise BadFile(
            f"{path}: its header names {files} data files, into which {shape} voxels cannot be "
            "divided; "
            "correct the list of files"
        )
    return part


def listed_files(path: str | Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The files of these names in the header's folder. Raises `BadFile` for names that lead
    elsewhere.
    """
    if not names:
        raise BadFile(f"{path}: its header lists no data file; the file is damaged")
    if len(names) > MAX_FILES:
        raise BadFile(
            f"{path}: its header names more data files than any scan has; correct the header"
        )
    if len(set(names)) < len(names):
        raise BadFile(f"{path}: its header names one data file twice; correct the list of files")
    return tuple(data_file(path, name) for name in names)


def numbered_names(path: str | Path, pattern: str, numbers: Sequence[str]) -> list[str]:
    """The names that `slice%03d.raw` with first, last and step stands for. Raises `BadFile`.

    Only one whole number can be asked for, as C's printf would write it; nothing else of printf is
    understood.
    """
    match = re.fullmatch(r"([^%]*)%(0?)(\d{0,2})d([^%]*)", pattern)
    whole = all(re.fullmatch(r"-?\d{1,9}", number) for number in numbers)
    if match is None or len(numbers) != 3 or not whole or int(numbers[2]) == 0:
        raise BadFile(
            f"{path}: its header numbers its data files in a way that is not understood; list their"
            " names"
        )
    first, last, step = map(int, numbers)
    every = range(first, last + (1 if step > 0 else -1), step)
    if not 1 <= len(every) <= MAX_FILES:
        raise BadFile(
            f"{path}: its header numbers {len(every)} data files; correct the first, last and step"
        )
    before, zero, width, after = match.groups()
    return [f"{before}{number:{zero}{width}d}{after}" for number in every]


@contextmanager
def data_beside(header: str | Path, content: str, suffix: str) -> Iterator[Path]:
    """The data file of a header, for a block that writes both; if that fails, a data file that was
    not there before is gone.

    It is called after the header and its content, without blanks, `%`, backslashes and LIST, by
    which headers of NRRD and MetaImage mean more than a name.
    """
    stem = re.sub(r"^LIST|[\s%\\]", "_", Path(header).stem)
    data = Path(header).with_name(f"{stem}.{content}{suffix}")
    is_new = not data.exists()
    try:
        yield data
    except BaseException:
        if is_new:
            data.unlink(missing_ok=True)
        raise


def _read_file(
    path: str | Path,
    place: Place,
    file: Path,
    *,
    dtype: np.dtype,
    sizes: Sequence[int],
    count: int = 1,
    index: int = 0,
) -> NDArray:
    start = place.start
    if place.lines:
        start = after_lines(file, start=start, lines=place.lines)
    if place.at_end:
        byte_count = math.prod(sizes) * count * dtype.itemsize
        if size_in_bytes(file) - start < byte_count:
            raise BadFile(
                f"{path}: its data file {file.name} is too short for what the header claims "
                f"({byte_count} bytes of data); "
                "it is damaged or incomplete, get it again"
            )
        start = size_in_bytes(file) - byte_count
    with ByteStream(file, packing=place.packing, start=start, owner=path) as stream:
        stream.skip(place.skipped)
        data = read_voxels(stream, dtype, tuple(sizes), count=count, index=index)
        if place.skipped or place.lines or place.foreign:
            # Where the voxels begin, a person said; only if all else fits is that certain.
            stream.finish()
        else:
            every = (*sizes, count) if count > 1 else sizes
            finish_voxels(path, stream, data, sizes=every)
    return data
