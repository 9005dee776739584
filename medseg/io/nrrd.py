"""NRRD, `.nrrd` and `.nhdr` with its data beside it (https://teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadOutput
from medseg.files import ByteStream, atomic_write, data_file, gzip_writer, open_file
from medseg.io.voxels import check_axes, choose_volume, digest, make_volume, read_voxels, slabs, stored_dtype
from medseg.volume import LPS, Volume

if TYPE_CHECKING:
    from medseg.labels import LabelTable

#: Longest header; Slicer's with hundreds of segments stay far below.
MAX_HEADER = 1 << 22
_TYPE_NAMES = {
    "i1": "signed char|int8|int8_t",
    "u1": "unsigned char|uchar|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "unsigned short|ushort|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "unsigned int|uint|uint32|uint32_t",
    "i8": "long long|longlong|long long int|signed long long|signed long long int|int64|int64_t",
    "u8": "unsigned long long|ulonglong|unsigned long long int|uint64|uint64_t",
    "f4": "float",
    "f8": "double",
}
_TYPES = {name: np.dtype(code) for code, names in _TYPE_NAMES.items() for name in names.split("|")}
_WRITTEN = {"i1": "int8", "u1": "unsigned char", "i2": "short", "u2": "unsigned short", "i4": "int"} | {
    "u4": "unsigned int", "i8": "long long int", "u8": "unsigned long long int", "f4": "float", "f8": "double"
}  # fmt: skip
_TO_RAS = {
    "right-anterior-superior": np.eye(4), "ras": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]), "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "left-posterior-superior": LPS, "lps": LPS,
}  # fmt: skip
_COLOR_KINDS = {"rgb-color", "rgba-color", "3-color", "4-color", "hsv-color", "xyz-color", "vector", "3-vector"}
_ASSUME = "say --assume-geometry pixdim to use its voxel size only"


@dataclass(frozen=True)
class Header:
    """A parsed header: fields by name (lower case, without blanks), key-value pairs, and where attached data starts."""

    fields: dict[str, str]
    keys: dict[str, str]
    start: int


@dataclass(frozen=True)
class Layout:
    """What the data is: stored dtype, all sizes, which axis lists volumes (None if there is none), RAS+ mm affine."""

    dtype: np.dtype
    sizes: tuple[int, ...]
    list_axis: int | None
    affine: NDArray[np.float64]


def read_nrrd(path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None) -> Volume:
    """A volume from `.nrrd`, or `.nhdr` whose data lies in the same folder. Raises `BadFile`.

    A list axis of length 1 is dropped; of longer ones `volume_index` chooses. Without a space in the header the place
    of the voxels is unknown; `assume_geometry='pixdim'` then uses the spacings along RAS+ axes.
    """
    header = parse_header(path)
    layout = parse_layout(path, header, assume_geometry)
    count = 1 if layout.list_axis is None else layout.sizes[layout.list_axis]
    index = choose_volume(path, count, volume_index)
    data = read_data(path, header, layout)
    if layout.list_axis is not None:
        data = data.take(index, axis=layout.list_axis)
    return make_volume(path, data, layout.affine)


def parse_header(path: str | Path) -> Header:
    """The header of a NRRD file. Raises `BadFile`."""
    with open_file(path) as file:
        head = file.read(MAX_HEADER)
    if not re.match(rb"NRRD000[1-5]\r?\n", head):
        raise BadFile(f"{path}: is not a NRRD file, whatever its name; give the scan itself")
    end = re.search(rb"\n\r?\n", head)
    if end is None and len(head) == MAX_HEADER:
        raise BadFile(f"{path}: its header does not end; the file is damaged")
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for line in head[: end.start() if end else None].decode("utf-8", "replace").split("\n")[1:]:
        line = line.removesuffix("\r")
        name, colon, value = line.partition(":")
        if line.startswith("#") or not line:
            continue
        if not colon:
            raise BadFile(f"{path}: its header has a line that is not NRRD; the file is damaged")
        if value.startswith("="):
            keys[name] = value[1:]
            continue
        name = name.lower().replace(" ", "")
        if name in fields:
            raise BadFile(f"{path}: its header gives '{name}' twice; the file is damaged")
        fields[name] = value.strip()
    return Header(fields, keys, end.end() if end else len(head))


def parse_layout(path: str | Path, header: Header, assume_geometry: str | None = None) -> Layout:
    """What the data after the header is, checked. Raises `BadFile`."""
    fields = header.fields
    sizes = tuple(int(size) for size in _numbers(path, fields, "sizes", whole=True))
    if _numbers(path, fields, "dimension", whole=True) != [len(sizes)]:
        raise BadFile(f"{path}: its header contradicts itself about the number of dimensions; the file is damaged")
    check_axes(path, sizes)
    if len(sizes) < 3:
        raise BadFile(f"{path}: is a picture of {len(sizes)} dimensions, not a volume; give the whole scan")
    dtype = _TYPES.get(_required(path, fields, "type").lower())
    if dtype is None:
        raise BadFile(f"{path}: its voxels are of a type that medseg does not read; save it as float")
    if dtype.itemsize > 1:
        endian = _required(path, fields, "endian").lower()
        if endian not in ("little", "big"):
            raise BadFile(f"{path}: its header gives an unknown byte order; the file is damaged")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    list_axis, affine = _geometry(path, fields, len(sizes), assume_geometry)
    if list_axis is not None:
        kinds = fields.get("kinds", "").lower().split()
        kind = kinds[list_axis] if len(kinds) == len(sizes) else ""
        if sizes[list_axis] > 1 and (kind in _COLOR_KINDS or kind in ("complex", "2-vector")):
            raise BadFile(f"{path}: holds {sizes[list_axis]} values per voxel (colour or vectors); give grey values")
    return Layout(dtype, sizes, list_axis, affine)


def read_data(path: str | Path, header: Header, layout: Layout) -> NDArray:
    """All data of a file as an array of `layout.sizes`, attached or beside the header. Raises `BadFile`."""
    fields = header.fields
    encoding = _required(path, fields, "encoding").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise BadFile(f"{path}: its data is in the encoding '{encoding[:20]}'; save it with raw or gzip encoding")
    if fields.get("lineskip", "0") != "0" or fields.get("byteskip", "0") != "0":
        raise BadFile(f"{path}: its header skips parts of a foreign file; save it as one .nrrd file")
    name = fields.get("datafile", fields.get("file"))
    if name is not None and (name.split()[:1] == ["LIST"] or "%" in name):
        raise BadFile(f"{path}: its data is spread over several files; save it as one .nrrd file")
    source = path if name is None else data_file(path, name)
    start = header.start if name is None else 0
    with ByteStream(source, packing=None if encoding == "raw" else "gzip", start=start) as stream:
        data = read_voxels(stream, layout.dtype, layout.sizes)
        stream.finish()
    return data


def _geometry(
    path: str | Path, fields: dict[str, str], dimension: int, assumed: str | None
) -> tuple[int | None, NDArray[np.float64]]:
    """Which axis lists volumes, and voxel index to RAS+ mm."""
    if assumed == "pixdim" and dimension == 3:
        if "spacings" in fields:
            return None, np.diag([*_numbers(path, fields, "spacings", count=3), 1.0])
        vectors = _vectors(path, fields, "spacedirections")
        lengths = [float(np.linalg.norm(vector)) for vector in vectors if vector is not None]
        if len(lengths) != 3:
            raise BadFile(f"{path}: its header does not say how large its voxels are")
        return None, np.diag([*lengths, 1.0])
    to_ras = _TO_RAS.get(fields.get("space", "").lower())
    if to_ras is None:
        raise BadFile(f"{path}: its header does not say in which space the voxels lie; {_ASSUME}")
    units = set(re.findall(r'"([^"]*)"', fields.get("spaceunits", "")))
    if not units <= {"mm", "millimeter", "millimeters", "millimetre", ""}:
        raise BadFile(f"{path}: its lengths are not in mm; save it in mm")
    vectors = _vectors(path, fields, "spacedirections")
    lists = [axis for axis, vector in enumerate(vectors) if vector is None]
    if len(vectors) != dimension or dimension - len(lists) != 3:
        raise BadFile(f"{path}: does not have three axes in space; give one volume")
    if len(lists) > 1:
        raise BadFile(f"{path}: has {dimension} dimensions; give one volume")
    origin = _vectors(path, fields, "spaceorigin")
    if len(origin) != 1 or origin[0] is None:
        raise BadFile(f"{path}: its header gives no single origin; {_ASSUME}")
    affine = np.eye(4)
    affine[:3, :3] = np.array([vector for vector in vectors if vector is not None]).T
    affine[:3, 3] = origin[0]
    return (lists[0] if lists else None), to_ras @ affine


def _required(path: str | Path, fields: dict[str, str], name: str) -> str:
    if not fields.get(name):
        raise BadFile(f"{path}: its header lacks the field '{name}'; the file is damaged")
    return fields[name]


def _numbers(
    path: str | Path, fields: dict[str, str], name: str, *, count: int | None = None, whole: bool = False
) -> list[float]:
    words = _required(path, fields, name).split()
    try:
        numbers: list[float] = [int(word) for word in words] if whole else [float(word) for word in words]
    except ValueError:
        raise BadFile(f"{path}: the field '{name}' in its header is not made of numbers; the file is damaged") from None
    if not whole and not all(map(math.isfinite, numbers)):
        raise BadFile(f"{path}: the field '{name}' in its header holds values that are not finite; correct the header")
    if count is not None and len(numbers) != count:
        raise BadFile(f"{path}: the field '{name}' in its header does not have {count} numbers; the file is damaged")
    return numbers


def _vectors(path: str | Path, fields: dict[str, str], name: str) -> list[list[float] | None]:
    """Vectors such as `none (1,0,0) (0,1,0)`; None for 'none'."""
    if name not in fields:
        raise BadFile(f"{path}: its header does not say where the voxels lie ('{name}' is missing); {_ASSUME}")
    text = fields[name]
    if not re.fullmatch(r"\s*(?:(?:none|\([^()]*\))\s*)+", text):
        raise BadFile(f"{path}: the field '{name}' in its header is not made of vectors; the file is damaged")
    vectors: list[list[float] | None] = []
    for word in re.findall(r"none|\([^()]*\)", text):
        if word == "none":
            vectors.append(None)
            continue
        parts = {"v": word[1:-1].replace(",", " ")}
        vectors.append(_numbers(path, parts, "v", count=3))
    return vectors


def write_nrrd(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write `.nrrd`, gzipped, or `.nhdr` with its data in a second file beside it. Raises `BadOutput`.

    The data file of a `.nhdr` is named after its content, so that a header never points at half-written or other data.
    `table` is not stored in plain NRRD.
    """
    dtype = stored_dtype(volume.data)
    header = header_text(path, volume, dtype)
    if not str(path).lower().endswith(".nhdr"):
        write_attached(path, header, volume.data, dtype)
        return
    name = f"{Path(path).stem}.{digest(volume.data, dtype)}.raw.gz"
    write_attached(Path(path).with_name(name), "", volume.data, dtype)
    with atomic_write(path) as file:
        file.write(f"{header}data file: {name}\n".encode())


def write_attached(path: str | Path, header: str, data: NDArray, dtype: np.dtype) -> None:
    """A file of header, blank line and gzipped voxels; without header of gzipped voxels alone."""
    with atomic_write(path) as file:
        if header:
            file.write(f"{header}\n".encode())
        write, finish = gzip_writer(file)
        for piece in slabs(data, dtype.newbyteorder("<")):
            write(piece)
        finish()


def header_text(path: str | Path, volume: Volume, dtype: np.dtype) -> str:
    """The fields of a header, each line ended, in the order Slicer writes them. Raises `BadOutput`."""
    if dtype.str[1:] not in _WRITTEN:
        raise BadOutput(f"{path}: NRRD cannot hold values of type {dtype}")
    lps = LPS @ volume.affine
    vectors = [f"({','.join(repr(float(x)) for x in lps[:3, axis])})" for axis in range(4)]
    lines = [
        "NRRD0004",
        f"type: {_WRITTEN[dtype.str[1:]]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, volume.shape))}",
        f"space directions: {' '.join(vectors[:3])}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: {vectors[3]}",
    ]
    return "\n".join(lines) + "\n"
