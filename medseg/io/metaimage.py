"""MetaImage, `.mha` and `.mhd` with its data beside it
(https://itk.org/Wiki/ITK/MetaIO/Documentation).

The world is LPS+ mm, as ITK writes and reads it. Each row of TransformMatrix is the direction of
one voxel axis.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadOutput
from medseg.files import atomic_write, compressor, open_file
from medseg.io.raw import Place, data_beside, listed_files, numbered_names, part_sizes, read_placed
from medseg.io.voxels import check_axes, choose_volume, digest, make_volume, slabs, stored_dtype
from medseg.volume import LPS, Volume, spacing_of

if TYPE_CHECKING:
    from medseg.labels import LabelTable

MAX_HEADER = 1 << 16
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
    "MET_LONG": "i4", "MET_ULONG": "u4",  # 4 bytes in MetaIO on every platform
}  # fmt: skip
_WRITTEN = {
    code: name for name, code in reversed(_TYPES.items()) if name not in ("MET_LONG", "MET_ULONG")
}
_ALIASES = {
    "rotation": "transformmatrix", "orientation": "transformmatrix", "origin": "offset",
    "position": "offset",
    "elementbyteordermsb": "binarydatabyteordermsb",
}  # fmt: skip
#: MetaIO's DistanceUnits to mm; '?' is what it writes where nothing is known, and then all programs
#: read mm.
_MM_PER_UNIT = {"": 1.0, "?": 1.0, "mm": 1.0, "um": 1e-3, "cm": 10.0}
#: The fields that are used here, each once in a header; every other line is a user's, whatever its
#: name.
_FIELDS = {
    "objecttype", "ndims", "dimsize", "elementnumberofchannels", "elementtype", "elementspacing",
    "elementsize", "transformmatrix", "offset", "distanceunits", "binarydata",
    "binarydatabyteordermsb", "compresseddata", "headersize", "elementdatafile",
}  # fmt: skip
_ASSUME = "say --assume-geometry pixdim to use its voxel size only"


@dataclass(frozen=True, kw_only=True)
class _Header:
    """fields: by name in small letters. start: where attached data begins. listed: the files that
    LIST lists.
    """

    fields: dict[str, str]
    start: int
    listed: tuple[str, ...]


def read_metaimage(
    path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None
) -> Volume:
    """A volume from `.mha`, or `.mhd` whose data lies in the same folder. Raises `BadFile`.

    Of a 4-D file, and of one with several channels, `volume_index` chooses. Without matrix and
    offset in the header the place of the voxels is unknown; `assume_geometry='pixdim'` then uses
    the spacing along RAS+ axes.
    """
    header = _read_header(path)
    fields = header.fields
    sizes = _sizes(path, fields)
    kind = _TYPES.get(fields.get("elementtype", ""))
    if kind is None:
        raise BadFile(
            f"{path}: its voxels are of a type that medseg does not read; save it as MET_FLOAT"
        )
    dtype = np.dtype(kind).newbyteorder(
        ">" if _flag(path, fields, "binarydatabyteordermsb") else "<"
    )
    channels = _channels(path, fields, len(sizes))
    affine = _affine(path, fields, len(sizes), assumed=assume_geometry)
    count = sizes[3] if len(sizes) == 4 else 1
    index = choose_volume(path, max(channels, count), volume_index)
    if channels > 1:  # the channels of a voxel lie beside each other
        place = _place(path, header, (channels, *sizes), first=1)
        data = read_placed(path, place, dtype=dtype, sizes=(channels, *sizes))
        return make_volume(path, data[index], affine)
    place = _place(path, header, sizes)
    data = read_placed(path, place, dtype=dtype, sizes=sizes[:3], count=count, index=index)
    return make_volume(path, data, affine)


def metaimage_files(path: str | Path) -> tuple[Path, ...]:
    """The files beside a header that hold its voxels. Raises `BadFile`."""
    header = _read_header(path)
    sizes = _sizes(path, header.fields)
    channels = _channels(path, header.fields, len(sizes))
    first = int(channels > 1)
    files, _ = _data_files(path, header, (channels, *sizes)[1 - first :], first=first)
    return tuple(file for file in files if file != Path(path))


def _sizes(path: str | Path, fields: dict[str, str]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in _numbers(path, fields, "dimsize", whole=True))
    if _numbers(path, fields, "ndims", whole=True) != [len(sizes)]:
        raise BadFile(
            f"{path}: its header contradicts itself about the number of dimensions; the file is"
            " damaged"
        )
    check_axes(path, sizes)
    if len(sizes) < 3:
        raise BadFile(
            f"{path}: is a picture of {len(sizes)} dimensions, not a volume; give the whole scan"
        )
    if len(sizes) > 4:
        raise BadFile(f"{path}: has {len(sizes)} dimensions; give one volume")
    return sizes


def _channels(path: str | Path, fields: dict[str, str], dimension: int) -> int:
    """How many values a voxel has: volumes of their own, as ITK writes images of several
    channels.
    """
    if "elementnumberofchannels" not in fields:
        return 1
    channels = int(_numbers(path, fields, "elementnumberofchannels", count=1, whole=True)[0])
    check_axes(path, [channels])
    if channels in (3, 4) and fields["elementtype"] in ("MET_UCHAR", "MET_CHAR"):
        # MetaImage has no word for colours, so three or four bytes may be one.
        raise BadFile(
            f"{path}: may be a colour picture ({channels} bytes per voxel); give the scan in grey"
            " values"
        )
    if channels > 1 and dimension > 3:
        raise BadFile(
            f"{path}: has {dimension} dimensions and {channels} channels; give one volume"
        )
    return channels


def _read_header(path: str | Path) -> _Header:
    with open_file(path) as file:
        head = file.read(MAX_HEADER)
    fields, start = _fields(path, head)
    if fields.get("objecttype", "Image").lower() != "image":
        raise BadFile(f"{path}: is a MetaIO object but not an image; give the scan itself")
    files: tuple[str, ...] = ()
    if fields["elementdatafile"].split()[:1] == ["LIST"]:
        lines = head[start:].decode("utf-8", "replace").splitlines()
        files = tuple(line.strip() for line in lines if line.strip())
    return _Header(fields=fields, start=start, listed=files)


def _fields(path: str | Path, head: bytes) -> tuple[dict[str, str], int]:
    """The fields up to the one that names the data, which is the last, and where they end."""
    fields: dict[str, str] = {}
    start = 0
    of_user = False  # whether the last field was the user's, whose text may go on in the next line
    while "elementdatafile" not in fields:
        if start >= len(head):
            raise _damaged(path)
        line, newline, _ = head[start:].partition(b"\n")
        # Some editors put a byte order mark before the text.
        text = line.decode("utf-8", "replace").removeprefix("\ufeff").strip()
        name, value = _name_and_value(text)
        if start == 0 and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise BadFile(
                f"{path}: is not a MetaImage file, whatever its name; give the scan itself"
            )
        start += len(line) + len(newline)
        if name:
            key = _key(name)
            of_user = key not in _FIELDS
            if not of_user and fields.get(key, value) != value:  # alike, it may have two names
                raise BadFile(f"{path}: its header gives '{name}' twice; the file is damaged")
            fields[key] = value
        elif not of_user or _begins_with_field(text):
            raise _damaged(path)
    return fields, start


def _name_and_value(text: str) -> tuple[str, str]:
    """What stands before '=' and after it; both '' for a line that is no field."""
    name, sign, value = (part.strip() for part in text.partition("="))
    return (name, value) if sign and name else ("", "")


def _key(name: str) -> str:
    """What a field is called here, whichever of its names the header uses."""
    lower = name.lower()
    return _ALIASES.get(lower, lower)


def _begins_with_field(text: str) -> bool:
    """Whether a line without '=' begins as a field does that medseg uses."""
    return bool(text) and _key(text.split()[0]) in _FIELDS


def _damaged(path: str | Path) -> BadFile:
    return BadFile(f"{path}: its header is damaged or does not name its data; get the file again")


def _place(path: str | Path, header: _Header, sizes: tuple[int, ...], *, first: int = 0) -> Place:
    """Where the voxels are, of `sizes` of which the first `first` are no axes of the image."""
    fields = header.fields
    if not _flag(path, fields, "binarydata", default=True):
        raise BadFile(f"{path}: its voxels are written as text; save them as binary data")
    packed = _flag(path, fields, "compresseddata")
    before = _header_size(path, fields)
    if before < -1 or (before == -1 and packed):
        # Of packed data nobody knows how many bytes they are before they are found.
        raise BadFile(
            f"{path}: its header gives its data a HeaderSize that cannot be; correct the header"
        )
    files, part = _data_files(path, header, sizes, first=first)
    attached_at = header.start if fields["elementdatafile"].upper() == "LOCAL" else 0
    if 0 < before < attached_at:
        raise BadFile(
            f"{path}: its header puts the voxels into the header itself; the file is damaged"
        )
    return Place(
        files=files,
        part=part,
        packing="zlib" if packed else None,
        start=before if before > 0 else attached_at,
        foreign=before > 0,
        at_end=before == -1,
    )


def _header_size(path: str | Path, fields: dict[str, str]) -> int:
    """Bytes of another program's header before the data; 0 if there is none, -1 if it is all before
    them.
    """
    if "headersize" not in fields:
        return 0
    return int(_numbers(path, fields, "headersize", count=1, whole=True)[0])


def _data_files(
    path: str | Path, header: _Header, sizes: tuple[int, ...], *, first: int
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """The files that hold the voxels, and the sizes of what each holds, () if one holds all."""
    name = header.fields["elementdatafile"]
    words = name.split()
    if words[:1] == ["LIST"]:
        files = listed_files(path, header.listed)
        dimension = _listed_dimension(path, words[1:], first=first, dimension=len(sizes))
        return files, part_sizes(path, sizes, len(files), dimension=dimension)
    if "%" in name and len(words) == 4:
        files = listed_files(path, numbered_names(path, words[0], words[1:]))
        return files, part_sizes(path, sizes, len(files), dimension=len(sizes) - 1)
    if name.upper() != "LOCAL":
        return listed_files(path, [name]), ()
    return (Path(path),), ()


def _listed_dimension(path: str | Path, words: list[str], *, first: int, dimension: int) -> int:
    """How many of the axes each listed file has, by the words after LIST; without, all but one."""
    if not words:
        return dimension - 1
    match = re.fullmatch(r"(\d)[Dd]?", words[0]) if len(words) == 1 else None
    # Slabs of as many dimensions as the image are read differently by MetaIO itself.
    if match is None or first + int(match[1]) >= dimension:
        raise BadFile(
            f"{path}: its header lists its data files in a way that is not known; correct the"
            " header"
        )
    return first + int(match[1])


def _affine(
    path: str | Path, fields: dict[str, str], dimension: int, *, assumed: str | None
) -> NDArray[np.float64]:
    to_mm, spacing = _spacing_mm(path, fields, dimension)
    affine = np.eye(4)
    if assumed == "pixdim":
        affine[:3, :3] = np.diag(spacing)
        return affine
    if "transformmatrix" not in fields or "offset" not in fields:
        raise BadFile(f"{path}: its header does not say where the voxels lie; {_ASSUME}")
    entries = _numbers(path, fields, "transformmatrix", count=dimension**2)
    rows = np.reshape(entries, (dimension, dimension))
    offset = _numbers(path, fields, "offset", count=dimension)
    if dimension == 4 and (rows[3, :3].any() or rows[:3, 3].any()):
        raise BadFile(f"{path}: its fourth axis is mixed with space; give one volume")
    norms = np.sqrt((rows[:3, :3] ** 2).sum(axis=1))
    if not (np.abs(norms - 1) < 1e-3).all():
        raise BadFile(
            f"{path}: the directions in its header are not of length 1; the file is damaged"
        )
    affine[:3, :3] = rows[:3, :3].T * spacing
    affine[:3, 3] = np.array(offset[:3]) * to_mm
    return LPS @ affine


def _spacing_mm(
    path: str | Path, fields: dict[str, str], dimension: int
) -> tuple[float, list[float]]:
    """How many mm the header's unit of length is, and the voxel size along the first three axes."""
    if "elementspacing" not in fields and "elementsize" not in fields:
        raise BadFile(
            f"{path}: its header does not say how large its voxels are; correct the header"
        )
    name = "elementspacing" if "elementspacing" in fields else "elementsize"
    spacing = _numbers(path, fields, name, count=dimension)[:3]
    unit = fields.get("distanceunits", "")
    if unit not in _MM_PER_UNIT:
        raise BadFile(
            f"{path}: its lengths are in '{unit[:20]}', which MetaImage does not know; correct its"
            " header"
        )
    if min(spacing) <= 0:
        raise BadFile(f"{path}: its voxel size is not positive; correct the header")
    return _MM_PER_UNIT[unit], [_MM_PER_UNIT[unit] * length for length in spacing]


def _numbers(
    path: str | Path,
    fields: dict[str, str],
    name: str,
    *,
    count: int | None = None,
    whole: bool = False,
) -> list[float]:
    words = fields.get(name, "").split()
    try:
        numbers: list[float] = (
            [int(word) for word in words] if whole else [float(word) for word in words]
        )
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise BadFile(
            f"{path}: the field '{name}' in its header is missing or damaged; get the file again"
        )
    if not whole and not all(map(math.isfinite, numbers)):
        raise BadFile(
            f"{path}: the field '{name}' in its header holds values that are not finite; correct"
            " the header"
        )
    return numbers


def _flag(path: str | Path, fields: dict[str, str], name: str, *, default: bool = False) -> bool:
    text = fields.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise BadFile(
            f"{path}: the field '{name}' in its header is neither True nor False; the file is"
            " damaged"
        )
    return text in ("true", "1")


def write_metaimage(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write `.mha`, compressed, or `.mhd` with its data in a second file beside it. Raises
    `BadOutput`.

    The data file of a `.mhd` is named after its content, so that a header never points at
    half-written or other data. `table` is not stored in MetaImage.
    """
    dtype = stored_dtype(volume.data)
    if dtype.str[1:] not in _WRITTEN:
        raise BadOutput(f"{path}: MetaImage cannot hold values of type {dtype}")
    packer = compressor("zlib")
    pieces = [packer.compress(piece) for piece in slabs(volume.data, dtype.newbyteorder("<"))]
    pieces.append(packer.flush())  # in memory, because the header gives its size
    kind, packed_size = _WRITTEN[dtype.str[1:]], sum(map(len, pieces))
    if str(path).lower().endswith(".mhd"):
        with data_beside(path, digest(volume.data, dtype), ".zraw") as data:
            text = _header_text(volume, kind=kind, packed_size=packed_size, data_file=data.name)
            with atomic_write(data) as file:
                file.writelines(pieces)
            with atomic_write(path) as file:
                file.write(text.encode())
        return
    text = _header_text(volume, kind=kind, packed_size=packed_size, data_file="LOCAL")
    with atomic_write(path) as file:
        file.write(text.encode())
        file.writelines(pieces)


def _header_text(volume: Volume, *, kind: str, packed_size: int, data_file: str) -> str:
    lps = LPS @ volume.affine
    spacing = spacing_of(lps)
    directions = lps[:3, :3] / spacing

    def plain(values: NDArray | tuple[float, ...]) -> str:
        return " ".join(repr(float(value)) for value in np.ravel(values))

    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {packed_size}",
        f"TransformMatrix = {plain(directions.T)}",
        f"Offset = {plain(lps[:3, 3])}",
        "CenterOfRotation = 0 0 0",
        f"ElementSpacing = {plain(spacing)}",
        f"DimSize = {' '.join(map(str, volume.shape))}",
        f"ElementType = {kind}",
        f"ElementDataFile = {data_file}",
    ]
    return "\n".join(lines) + "\n"
