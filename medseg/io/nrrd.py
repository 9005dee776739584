"""NRRD, `.nrrd` and `.nhdr` with its data beside it
(https://teem.sourceforge.net/nrrd/format.html).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadGeometry, BadOutput
from medseg.files import atomic_write, gzip_writer, open_file
from medseg.io.raw import Place, data_beside, listed_files, numbered_names, part_sizes, read_placed
from medseg.io.voxels import check_axes, choose_volume, digest, make_volume, slabs, stored_dtype
from medseg.volume import LPS, Volume, check_affine

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
_WRITTEN = {"i1": "int8", "u1": "unsigned char", "i2": "short", "u2": "unsigned short",
"i4": "int"} | {
    "u4": "unsigned int", "i8": "long long int", "u8": "unsigned long long int", "f4": "float",
    "f8": "double"
}  # fmt: skip
#: Space names of the format to the matrix that leads from them to RAS+.
_TO_RAS = {
    "right-anterior-superior": np.eye(4), "ras": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]), "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "left-posterior-superior": LPS, "lps": LPS,
}  # fmt: skip
#: The same with time as a fourth axis of the world.
_TO_RAS_AND_TIME = {
    (f"{name}-time" if "-" in name else f"{name}t"): matrix for name, matrix in _TO_RAS.items()
}
_UNIT_NAMES = {
    1e-6: "nm nanometer nanometers nanometre nanometres",
    1e-3: "um µm μm micron microns micrometer micrometers micrometre micrometres",
    1.0: "mm millimeter millimeters millimetre millimetres",
    10.0: "cm centimeter centimeters centimetre centimetres",
    1000.0: "m meter meters metre metres",
}
#: Names of lengths to mm. Symbols are told apart by their letters' size, words are not.
_MM_PER_UNIT = {name: mm for mm, names in _UNIT_NAMES.items() for name in names.split()}
#: Kinds of an axis along which the values of one voxel lie. 'vector' is none of them: it is what
#: ITK calls the axis of an image of several channels, which are volumes of their own.
_COLOR_KINDS = {
    "rgb-color",
    "rgba-color",
    "3-color",
    "4-color",
    "hsv-color",
    "xyz-color",
    "3-vector",
}
_COLOR_KINDS |= {"complex", "2-vector"}
_SPACE_KINDS = ("domain", "space")
#: The fields of the format, in small letters and without blanks; with ':=' every other name may be
#: a user's key.
_FIELDS = {
    "dimension", "type", "blocksize", "encoding", "endian", "content", "min", "max", "oldmin",
    "oldmax", "datafile", "file", "lineskip", "byteskip", "number", "sampleunits", "sizes",
    "spacings", "thicknesses", "axismins", "axismaxs", "centers", "centerings", "labels",
    "units", "kinds", "space", "spacedimension", "spaceunits", "spaceorigin", "spacedirections",
    "measurementframe",
}  # fmt: skip
_ASSUME = "say --assume-geometry pixdim to use its voxel size only"


@dataclass(frozen=True, kw_only=True)
class Header:
    """A parsed header.

    fields: by name (small letters, without blanks). keys: key-value pairs. start: where attached
    data begins. listed: the data files that 'data file: LIST' lists.
    """

    fields: dict[str, str]
    keys: dict[str, str]
    start: int
    listed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the data is: stored dtype, all sizes, which axis lists volumes (None if there is none),
    RAS+ mm affine.
    """

    dtype: np.dtype
    sizes: tuple[int, ...]
    list_axis: int | None
    affine: NDArray[np.float64]


def read_nrrd(
    path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None
) -> Volume:
    """A volume from `.nrrd`, or `.nhdr` whose data lies in the same folder. Raises `BadFile`.

    A list axis of length 1 is dropped; of longer ones `volume_index` chooses. Without a space in
    the header the place of the voxels is unknown; `assume_geometry='pixdim'` then uses the spacings
    along RAS+ axes.
    """
    header = parse_header(path)
    layout = parse_layout(path, header, assume_geometry)
    count = 1 if layout.list_axis is None else layout.sizes[layout.list_axis]
    index = choose_volume(path, count, volume_index)
    data = read_data(path, header, layout)
    if layout.list_axis is not None:
        data = data.take(index, axis=layout.list_axis)
    return make_volume(path, data, layout.affine)


def nrrd_files(path: str | Path) -> tuple[Path, ...]:
    """The files beside a header that hold its voxels. Raises `BadFile`."""
    header = parse_header(path)
    return _data_files(path, header, parse_layout(path, header, assume_geometry="pixdim").sizes)[0]


def parse_header(path: str | Path) -> Header:
    """The header of a NRRD file. Raises `BadFile`."""
    with open_file(path) as file:
        head = file.read(MAX_HEADER)
    if not re.match(rb"NRRD000[1-5]\r?\n", head):
        raise BadFile(f"{path}: is not a NRRD file, whatever its name; give the scan itself")
    end = re.search(rb"\n\r?\n", head)
    if end is None and len(head) == MAX_HEADER:
        raise BadFile(f"{path}: its header does not end; the file is damaged")
    start = end.end() if end else len(head)
    text = _text(head[: end.start() if end else None])
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if line.startswith("#") or not line:
            continue
        name = _add_line(path, line, fields=fields, keys=keys)
        if name == "datafile" and fields[name].split()[:1] == ["LIST"]:  # always the last field
            files = filter(None, map(str.strip, lines[number:]))
            return Header(fields=fields, keys=keys, start=len(head), listed=tuple(files))
    return Header(fields=fields, keys=keys, start=start)


def _add_line(path: str | Path, line: str, *, fields: dict[str, str], keys: dict[str, str]) -> str:
    """Add what a line says to the fields or to the keys; returns the name of the field, '' for a
    key.
    """
    name, colon, value = line.partition(":")
    name = name.lower().replace(" ", "")
    if name in _FIELDS and not value.startswith("="):
        if name in fields:
            raise BadFile(f"{path}: its header gives '{name}' twice; the file is damaged")
        fields[name] = value.strip()
        return name
    key, sign, text = line.partition(":=")
    if sign:
        keys[key] = text
    elif not colon:
        raise BadFile(f"{path}: its header has a line that is not NRRD; the file is damaged")
    return ""


def _text(head: bytes) -> str:
    """A header as text: ASCII by the format, UTF-8 as Slicer writes names; else Latin-1, in which
    older programs
    wrote the micro sign."""
    try:
        return head.decode("utf-8")
    except UnicodeDecodeError:
        return head.decode("latin-1")


def parse_layout(path: str | Path, header: Header, assume_geometry: str | None = None) -> Layout:
    """What the data after the header is, checked. Raises `BadFile`."""
    fields = header.fields
    sizes = tuple(int(size) for size in _numbers(path, fields, "sizes", whole=True))
    if _numbers(path, fields, "dimension", whole=True) != [len(sizes)]:
        raise BadFile(
            f"{path}: its header contradicts itself about the number of dimensions; the file is"
            " damaged"
        )
    check_axes(path, sizes)
    if len(sizes) < 3:
        raise BadFile(
            f"{path}: is a picture of {len(sizes)} dimensions, not a volume; give the whole scan"
        )
    dtype = _TYPES.get(_required(path, fields, "type").lower())
    if dtype is None:
        raise BadFile(
            f"{path}: its voxels are of a type that medseg does not read; save it as float"
        )
    if dtype.itemsize > 1:
        endian = _required(path, fields, "endian").lower()
        if endian not in ("little", "big"):
            raise BadFile(f"{path}: its header gives an unknown byte order; the file is damaged")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    list_axis, affine = _geometry(path, fields, len(sizes), assumed=assume_geometry)
    if list_axis is not None:
        kinds = fields.get("kinds", "").lower().split()
        kind = kinds[list_axis] if len(kinds) == len(sizes) else ""
        if sizes[list_axis] > 1 and kind in _COLOR_KINDS:
            raise BadFile(
                f"{path}: holds {sizes[list_axis]} values per voxel (colour or vectors); give grey"
                " values"
            )
    return Layout(dtype=dtype, sizes=sizes, list_axis=list_axis, affine=affine)


def read_data(path: str | Path, header: Header, layout: Layout) -> NDArray:
    """All data of a file as an array of `layout.sizes`, attached or beside the header. Raises
    `BadFile`.
    """
    fields = header.fields
    encoding = _required(path, fields, "encoding").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise BadFile(
            f"{path}: its data is in the encoding '{encoding[:20]}'; save it with raw or gzip"
            " encoding"
        )
    lines, byteskip = (_skip(path, fields, name) for name in ("lineskip", "byteskip"))
    if lines < 0 or byteskip < (-1 if encoding == "raw" else 0):
        raise BadFile(
            f"{path}: its header says to skip in a way that NRRD does not know; correct the header"
        )
    files, part = _data_files(path, header, layout.sizes)
    place = Place(
        files=files or (Path(path),),
        part=part,
        packing=None if encoding == "raw" else "gzip",
        start=0 if files else header.start,
        lines=lines,
        skipped=max(byteskip, 0),
        at_end=byteskip == -1,
    )
    return read_placed(path, place, dtype=layout.dtype, sizes=layout.sizes)


def _skip(path: str | Path, fields: dict[str, str], name: str) -> int:
    return int(_numbers(path, fields, name, count=1, whole=True)[0]) if name in fields else 0


def _data_files(
    path: str | Path, header: Header, sizes: tuple[int, ...]
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """The data files that a header names, () if the data follows it, and the sizes each holds if
    there are several.
    """
    name = header.fields.get("datafile", header.fields.get("file"))
    if name is None:
        return (), ()
    words = name.split()
    if words[:1] == ["LIST"]:
        names, more = list(header.listed), words[1:]
    elif len(words) in (4, 5) and "%" in words[0]:
        names, more = numbered_names(path, words[0], words[1:4]), words[4:]
    else:
        return listed_files(path, [name]), ()
    if len(more) > 1 or not all(word.isdecimal() for word in more):
        raise BadFile(
            f"{path}: its header lists its data files in a way that NRRD does not know; correct the"
            " header"
        )
    files = listed_files(path, names)
    dimension = int(more[0]) if more else len(sizes) - 1
    return files, part_sizes(path, sizes, len(files), dimension=dimension)


def _geometry(
    path: str | Path, fields: dict[str, str], dimension: int, *, assumed: str | None
) -> tuple[int | None, NDArray[np.float64]]:
    """Which axis lists volumes, and voxel index to RAS+ mm."""
    if assumed == "pixdim":
        return _voxel_size_only(path, fields, dimension)
    to_ras, world = _space(path, fields, dimension)
    if "spacedirections" not in fields:
        what = "does not say where the voxels lie ('space directions' is missing)"
        raise _unplaced(path, fields, dimension, what=what)
    list_axis, vectors = _axes(path, fields, dimension, world=world)
    origin = _vectors(path, fields, "spaceorigin", length=world) if "spaceorigin" in fields else []
    if len(origin) != 1 or origin[0] is None:
        raise _unplaced(path, fields, dimension, what="gives no single origin")
    affine = np.eye(4)
    affine[:3, :3] = vectors
    units = _unit_names(path, fields, "spaceunits", count=world)[:3]
    affine[:3, 3] = np.array(origin[0][:3]) * _mm_per_unit(path, units)
    return list_axis, to_ras @ affine


def _space(
    path: str | Path, fields: dict[str, str], dimension: int
) -> tuple[NDArray[np.float64], int]:
    """What leads from the header's space to RAS+, and how many axes that space has: 3, or 4 with
    time.
    """
    name = fields.get("space", "").lower()
    if name in _TO_RAS:
        return _TO_RAS[name], 3
    if name in _TO_RAS_AND_TIME:
        return _TO_RAS_AND_TIME[name], 4
    kinds = fields.get("kinds", "").lower().split()
    if not name and fields.get("spacedimension") == "4" and kinds == ["domain"] * 4:
        # Certain: the format has a name for three axes in space alone, so ITK leaves it out of
        # images of four, which it writes with just these fields; the first three of its axes are
        # always LPS.
        return LPS, 4
    what = "does not say in which space the voxels lie"
    raise _unplaced(path, fields, dimension, what=what)


def _unplaced(path: str | Path, fields: dict[str, str], dimension: int, *, what: str) -> BadFile:
    """What to raise where the place of the voxels is unknown; `pixdim` is advised only where it
    works.
    """
    try:
        check_affine(_voxel_size_only(path, fields, dimension)[1])
    except (BadFile, BadGeometry):
        return BadFile(f"{path}: its header {what}; correct the header, which is text")
    return BadFile(f"{path}: its header {what}; {_ASSUME}")


def _voxel_size_only(
    path: str | Path, fields: dict[str, str], dimension: int
) -> tuple[int | None, NDArray[np.float64]]:
    """Which axis lists volumes, and an affine of the voxel size along RAS+ axes."""
    if "spacings" not in fields:
        return _length_of_directions(path, fields, dimension)
    spacings = _numbers(path, fields, "spacings", count=dimension, or_nan=True)
    lists = _axes_beyond_space(fields, spacings)
    in_space = [axis for axis in range(dimension) if axis not in lists]
    if len(in_space) != 3 or len(lists) > 1:
        raise BadFile(
            f"{path}: does not say which three of its {dimension} axes lie in space; give one"
            " volume"
        )
    if not all(spacings[axis] > 0 for axis in in_space):
        raise BadFile(f"{path}: its voxel size is not positive; correct the header")
    names = _spacing_units(path, fields, dimension, in_space=in_space)
    lengths = np.array(spacings)[in_space] * _mm_per_unit(path, names)
    return (lists[0] if lists else None), np.diag([*lengths, 1.0])


def _length_of_directions(
    path: str | Path, fields: dict[str, str], dimension: int
) -> tuple[int | None, NDArray[np.float64]]:
    """As `_voxel_size_only`, from the lengths of the space directions."""
    if "spacedirections" not in fields:
        raise BadFile(
            f"{path}: its header does not say how large its voxels are; correct the header"
        )
    first = re.search(r"\(([^()]*)\)", fields["spacedirections"])
    world = first[1].count(",") + 1 if first else 3
    list_axis, vectors = _axes(path, fields, dimension, world=world)
    return list_axis, np.diag([*np.linalg.norm(vectors, axis=0), 1.0])


def _axes_beyond_space(fields: dict[str, str], spacings: Sequence[float]) -> list[int]:
    """The axes that are none of space, by their kinds and by spacings that are no numbers."""
    kinds = fields.get("kinds", "").lower().split()
    if len(kinds) != len(spacings):
        kinds = ["domain"] * len(spacings)
    axes = range(len(spacings))
    return [axis for axis in axes if math.isnan(spacings[axis]) or kinds[axis] not in _SPACE_KINDS]


def _spacing_units(
    path: str | Path, fields: dict[str, str], dimension: int, *, in_space: Sequence[int]
) -> list[str]:
    """The unit of the spacing of each axis in space, as the header names it; '' if it does not."""
    if "units" in fields:
        names = _unit_names(path, fields, "units", count=dimension)
        return [names[axis] for axis in in_space]
    # Of the axes of space; which of the file's axes each is does not matter if all are alike.
    names = _unit_names(path, fields, "spaceunits", count=3)
    if len(set(names)) > 1:
        raise BadFile(
            f"{path}: its header does not say in which unit its spacings are; correct the header"
        )
    return names


def _axes(
    path: str | Path, fields: dict[str, str], dimension: int, *, world: int
) -> tuple[int | None, NDArray[np.float64]]:
    """Which axis lists volumes, and the other three in mm as the columns of a (3, 3) matrix."""
    vectors = _vectors(path, fields, "spacedirections", length=world)
    if world == 4:
        vectors = _without_time(path, vectors)
    lists = [axis for axis, vector in enumerate(vectors) if vector is None]
    if len(vectors) != dimension or dimension - len(lists) != 3:
        raise BadFile(f"{path}: does not have three axes in space; give one volume")
    if len(lists) > 1:
        raise BadFile(f"{path}: has {dimension} dimensions; give one volume")
    columns = np.array([vector for vector in vectors if vector is not None]).T
    units = _unit_names(path, fields, "spaceunits", count=world)[:3]
    return (lists[0] if lists else None), columns * _mm_per_unit(path, units)[:, None]


def _without_time(
    path: str | Path, vectors: Sequence[list[float] | None]
) -> list[list[float] | None]:
    """Vectors in space and time as those in space alone; None for the one axis that is time."""
    in_time = [axis for axis, vector in enumerate(vectors) if vector is not None and vector[3]]
    if len(in_time) != 1 or any((vectors[in_time[0]] or [])[:3]):
        raise BadFile(f"{path}: its fourth axis is mixed with space; give one volume")
    in_space = [None if vector is None else vector[:3] for vector in vectors]
    in_space[in_time[0]] = None
    return in_space


def _unit_names(path: str | Path, fields: dict[str, str], name: str, *, count: int) -> list[str]:
    """The unit of each of `count` axes from 'space units' or 'units', as the header names it; '' if
    it does not.
    """
    text = fields.get(name, "")
    words = [
        word.strip() for word in (re.findall(r'"([^"]*)"', text) if '"' in text else text.split())
    ]
    words = ["" if word == "???" else word for word in words]  # both mean that nothing is known
    if not any(words):
        return [""] * count
    if len(words) != count:
        raise BadFile(
            f"{path}: its header does not give one unit for each of {count} axes; correct the"
            " header"
        )
    return words


def _mm_per_unit(path: str | Path, names: Sequence[str]) -> NDArray[np.float64]:
    """How many mm the units of axes in space are; 1 where none is named, as all programs read such
    files.

    Raises `BadFile` for units that are unknown, and where only some are named and those are not mm.
    """
    sizes = [
        _MM_PER_UNIT.get(name, _MM_PER_UNIT.get(name.lower() if len(name) > 2 else ""))
        for name in names
    ]
    for name, size in zip(names, sizes):
        if name and size is None:
            raise BadFile(
                f"{path}: its lengths are in '{name[:20]}', which is no unit that medseg knows; "
                "write them in mm into its header, which is text"
            )
    units_mm = {size for size in sizes if size is not None}
    if None in sizes and not units_mm <= {1.0}:
        raise BadFile(
            f"{path}: its header names a unit for some of its axes only; correct the header"
        )
    return np.array([1.0 if size is None else size for size in sizes])


def _required(path: str | Path, fields: dict[str, str], name: str) -> str:
    if not fields.get(name):
        raise BadFile(f"{path}: its header lacks the field '{name}'; the file is damaged")
    return fields[name]


def _numbers(
    path: str | Path,
    fields: dict[str, str],
    name: str,
    *,
    count: int | None = None,
    whole: bool = False,
    or_nan: bool = False,
) -> list[float]:
    words = _required(path, fields, name).split()
    try:
        numbers: list[float] = (
            [int(word) for word in words] if whole else [float(word) for word in words]
        )
    except ValueError:
        raise BadFile(
            f"{path}: the field '{name}' in its header is not made of numbers; the file is damaged"
        ) from None
    if not whole and not all(
        math.isfinite(number) or (or_nan and math.isnan(number)) for number in numbers
    ):
        raise BadFile(
            f"{path}: the field '{name}' in its header holds values that are not finite; correct"
            " the header"
        )
    if count is not None and len(numbers) != count:
        raise BadFile(
            f"{path}: the field '{name}' in its header does not have {count} numbers; the file is"
            " damaged"
        )
    return numbers


def _vectors(
    path: str | Path, fields: dict[str, str], name: str, *, length: int
) -> list[list[float] | None]:
    """Vectors of `length` such as `none (1,0,0) (0,1,0)`; None for 'none'."""
    text = fields[name]
    if not re.fullmatch(r"\s*(?:(?:none|\([^()]*\))\s*)+", text):
        raise BadFile(
            f"{path}: the field '{name}' in its header is not made of vectors; the file is damaged"
        )
    vectors: list[list[float] | None] = []
    for word in re.findall(r"none|\([^()]*\)", text):
        if word == "none":
            vectors.append(None)
            continue
        parts = {name: word[1:-1].replace(",", " ")}
        vectors.append(_numbers(path, parts, name, count=length))
    return vectors


def write_nrrd(
    volume: Volume,
    path: str | Path,
    *,
    table: LabelTable | None = None,
    compress: bool = True,
) -> None:
    """Write `.nrrd`, gzipped, or `.nhdr` with its data in a second file beside it. Raises
    `BadOutput`.

    The data file of a `.nhdr` is named after its content, so that a header never points at
    half-written or other data. `table` is not stored in plain NRRD. compress: only a `.nrrd` can be
    written without.
    """
    dtype = stored_dtype(volume.data)
    header = header_text(path, volume, dtype)
    if not compress:
        with atomic_write(path) as file:
            file.write(f"{header.replace('encoding: gzip', 'encoding: raw')}\n".encode())
            file.writelines(slabs(volume.data, dtype.newbyteorder("<")))
        return
    if not str(path).lower().endswith(".nhdr"):
        write_attached(path, header, volume.data, dtype=dtype)
        return
    with data_beside(path, digest(volume.data, dtype), ".raw.gz") as data:
        write_attached(data, "", volume.data, dtype=dtype)
        with atomic_write(path) as file:
            file.write(f"{header}data file: {data.name}\n".encode())


def write_attached(path: str | Path, header: str, data: NDArray, *, dtype: np.dtype) -> None:
    """A file of header, blank line and gzipped voxels; without header of gzipped voxels alone."""
    with atomic_write(path) as file:
        if header:
            file.write(f"{header}\n".encode())
        write, finish = gzip_writer(file)
        for piece in slabs(data, dtype.newbyteorder("<")):
            write(piece)
        finish()


def header_text(path: str | Path, volume: Volume, dtype: np.dtype) -> str:
    """The fields of a header, each line ended, in the order Slicer writes them. Raises
    `BadOutput`.
    """
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
