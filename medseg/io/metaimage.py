"""MetaImage, `.mha` and `.mhd` with its data beside it (https://itk.org/Wiki/ITK/MetaIO/Documentation).

The world is LPS+ mm, as ITK writes and reads it. Each row of TransformMatrix is the direction of one voxel axis.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadOutput
from medseg.files import ByteStream, atomic_write, compressor, data_file, open_file
from medseg.io.voxels import check_axes, choose_volume, digest, make_volume, read_voxels, slabs, stored_dtype
from medseg.volume import LPS, Volume, spacing_of

if TYPE_CHECKING:
    from medseg.labels import LabelTable

MAX_HEADER = 1 << 16
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
    "MET_LONG": "i4", "MET_ULONG": "u4",  # 4 bytes in MetaIO on every platform
}  # fmt: skip
_WRITTEN = {code: name for name, code in reversed(_TYPES.items()) if name not in ("MET_LONG", "MET_ULONG")}
_ALIASES = {
    "rotation": "transformmatrix", "orientation": "transformmatrix", "origin": "offset", "position": "offset",
    "elementbyteordermsb": "binarydatabyteordermsb",
}  # fmt: skip
_ASSUME = "say --assume-geometry pixdim to use its voxel size only"


def read_metaimage(path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None) -> Volume:
    """A volume from `.mha`, or `.mhd` whose data lies in the same folder. Raises `BadFile`.

    Of a 4-D file `volume_index` chooses. Without matrix and offset in the header the place of the voxels is unknown;
    `assume_geometry='pixdim'` then uses the spacing along RAS+ axes.
    """
    fields, start = _read_header(path)
    sizes = [int(size) for size in _numbers(path, fields, "dimsize", whole=True)]
    if _numbers(path, fields, "ndims", whole=True) != [len(sizes)]:
        raise BadFile(f"{path}: its header contradicts itself about the number of dimensions; the file is damaged")
    check_axes(path, sizes)
    if len(sizes) < 3:
        raise BadFile(f"{path}: is a picture of {len(sizes)} dimensions, not a volume; give the whole scan")
    if len(sizes) > 4:
        raise BadFile(f"{path}: has {len(sizes)} dimensions; give one volume")
    if fields.get("elementnumberofchannels", "1") != "1":
        raise BadFile(f"{path}: holds several values per voxel (colour or vectors); give the scan in grey values")
    kind = _TYPES.get(fields.get("elementtype", ""))
    if kind is None:
        raise BadFile(f"{path}: its voxels are of a type that medseg does not read; save it as MET_FLOAT")
    dtype = np.dtype(kind).newbyteorder(">" if _flag(path, fields, "binarydatabyteordermsb") else "<")
    affine = _affine(path, fields, len(sizes), assume_geometry)
    count = sizes[3] if len(sizes) == 4 else 1
    index = choose_volume(path, count, volume_index)
    with _open_data(path, fields, start) as stream:
        data = read_voxels(stream, dtype, tuple(sizes[:3]), count=count, index=index)
        stream.finish()
    return make_volume(path, data, affine)


def _read_header(path: str | Path) -> tuple[dict[str, str], int]:
    """The fields by lower-case name, and where the data starts if it is in the same file."""
    with open_file(path) as file:
        head = file.read(MAX_HEADER)
    fields: dict[str, str] = {}
    start = 0
    while "elementdatafile" not in fields:
        line, newline, _ = head[start:].partition(b"\n") if start < len(head) else (b"", b"", b"")
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(.*?)\s*", line.decode("utf-8", "replace"))
        if match is None:
            if start == 0:
                raise BadFile(f"{path}: is not a MetaImage file, whatever its name; give the scan itself")
            raise BadFile(f"{path}: its header is damaged or does not name its data; get the file again")
        name = _ALIASES.get(match[1].lower(), match[1].lower())
        if name in fields:
            raise BadFile(f"{path}: its header gives '{match[1]}' twice; the file is damaged")
        fields[name] = match[2]
        start += len(line) + len(newline)
    if fields.get("objecttype", "Image").lower() != "image":
        raise BadFile(f"{path}: is a MetaIO object but not an image; give the scan itself")
    return fields, start


def _open_data(path: str | Path, fields: dict[str, str], start: int) -> ByteStream:
    name = fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise BadFile(f"{path}: its data is spread over several files; save it as one .mha file")
    if fields.get("headersize", "0") != "0":
        raise BadFile(f"{path}: its header skips parts of a foreign file; save it as one .mha file")
    if not _flag(path, fields, "binarydata", default=True):
        raise BadFile(f"{path}: its voxels are written as text; save them as binary data")
    packing = "zlib" if _flag(path, fields, "compresseddata") else None
    if name.upper() == "LOCAL":
        return ByteStream(path, packing=packing, start=start)
    return ByteStream(data_file(path, name), packing=packing)


def _affine(path: str | Path, fields: dict[str, str], dimension: int, assumed: str | None) -> NDArray[np.float64]:
    if "elementspacing" not in fields and "elementsize" not in fields:
        raise BadFile(f"{path}: its header does not say how large its voxels are; correct the header")
    spacing = _numbers(path, fields, "elementspacing" if "elementspacing" in fields else "elementsize", count=dimension)
    affine = np.eye(4)
    if assumed == "pixdim":
        affine[:3, :3] = np.diag(spacing[:3])
        return affine
    if "transformmatrix" not in fields or "offset" not in fields:
        raise BadFile(f"{path}: its header does not say where the voxels lie; {_ASSUME}")
    rows = np.reshape(_numbers(path, fields, "transformmatrix", count=dimension**2), (dimension, dimension))
    offset = _numbers(path, fields, "offset", count=dimension)
    if dimension == 4 and (rows[3, :3].any() or rows[:3, 3].any()):
        raise BadFile(f"{path}: its fourth axis is mixed with space; give one volume")
    norms = np.sqrt((rows[:3, :3] ** 2).sum(axis=1))
    if not (np.abs(norms - 1) < 1e-3).all():
        raise BadFile(f"{path}: the directions in its header are not of length 1; the file is damaged")
    if min(spacing[:3]) <= 0:
        raise BadFile(f"{path}: its voxel size is not positive; correct the header")
    affine[:3, :3] = rows[:3, :3].T * spacing[:3]
    affine[:3, 3] = offset[:3]
    return LPS @ affine


def _numbers(
    path: str | Path, fields: dict[str, str], name: str, *, count: int | None = None, whole: bool = False
) -> list[float]:
    words = fields.get(name, "").split()
    try:
        numbers: list[float] = [int(word) for word in words] if whole else [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise BadFile(f"{path}: the field '{name}' in its header is missing or damaged; get the file again")
    if not whole and not all(map(math.isfinite, numbers)):
        raise BadFile(f"{path}: the field '{name}' in its header holds values that are not finite; correct the header")
    return numbers


def _flag(path: str | Path, fields: dict[str, str], name: str, *, default: bool = False) -> bool:
    text = fields.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise BadFile(f"{path}: the field '{name}' in its header is neither True nor False; the file is damaged")
    return text in ("true", "1")


def write_metaimage(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write `.mha`, compressed, or `.mhd` with its data in a second file beside it. Raises `BadOutput`.

    The data file of a `.mhd` is named after its content, so that a header never points at half-written or other data.
    `table` is not stored in MetaImage.
    """
    dtype = stored_dtype(volume.data)
    if dtype.str[1:] not in _WRITTEN:
        raise BadOutput(f"{path}: MetaImage cannot hold values of type {dtype}")
    packer = compressor("zlib")
    packed = [packer.compress(piece) for piece in slabs(volume.data, dtype.newbyteorder("<"))]
    packed.append(packer.flush())  # in memory, because the header gives its size
    name = "LOCAL"
    if str(path).lower().endswith(".mhd"):
        name = f"{Path(path).stem}.{digest(volume.data, dtype)}.zraw"
        with atomic_write(Path(path).with_name(name)) as file:
            file.writelines(packed)
    with atomic_write(path) as file:
        file.write(_header_text(volume, _WRITTEN[dtype.str[1:]], sum(map(len, packed)), name).encode())
        if name == "LOCAL":
            file.writelines(packed)


def _header_text(volume: Volume, kind: str, packed_size: int, name: str) -> str:
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
        f"ElementDataFile = {name}",
    ]
    return "\n".join(lines) + "\n"
