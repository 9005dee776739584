"""NIfTI-1 and NIfTI-2 (https://nifti.nimh.nih.gov/nifti-1, nifti1.h and nifti2.h): `.nii` and
`.nii.gz`, and pairs of a header `.hdr` and its voxels `.img`, which are read and not written.

Strict on purpose: the file must hold exactly the voxels its header claims, and where the header
places the voxels in more than one way, all must agree. Fields that careless writers leave empty are
read as the format's reference library (nifti1_io.c, nifti_convert_nhdr2nim) mends them, with a
warning, and only where the voxels in the file prove it right.
"""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, DataWarning
from medseg.files import ByteStream, open_file
from medseg.io.voxels import (
    check_axes,
    choose_volume,
    finish_voxels,
    make_volume,
    read_voxels,
    rescale,
)
from medseg.stream import is_gzip
from medseg.volume import Space, Volume, spacing_of

if TYPE_CHECKING:
    pass

#: Largest distance between two placements of a corner, as a part of the volume's diagonal, that is
#: still rounding. A quaternion in float32 near half a turn is only good to 7e-4 radians.
MAX_DISAGREEMENT = 1e-3
DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_COLOR = {128: "RGB", 2304: "RGBA"}
_COMPLEX = {32, 1792, 2048}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# Offset in the header and struct code of each field used, for the two versions.
NIFTI1 = {
    "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "qform_code": (252,
    "h"),
    "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"), "srow": (280, "12f"),
}  # fmt: skip
NIFTI2 = {
    "dim": (16, "8q"), "datatype": (12, "h"), "bitpix": (14, "h"), "pixdim": (104, "8d"),
    "vox_offset": (168, "q"),
    "scl_slope": (176, "d"), "scl_inter": (184, "d"), "xyzt_units": (500, "i"), "qform_code": (344,
    "i"),
    "sform_code": (348, "i"), "quatern": (352, "3d"), "qoffset": (376, "3d"), "srow": (400, "12d"),
}  # fmt: skip

#: The space of a scan whose header names none that can be trusted: 'aligned to another scan', which
#: here is the scan.
_UNNAMED = Space(qform_code=2, sform_code=2)
#: Most bytes of extensions behind the header of a pair; they are not needed.
_MAX_EXTENSIONS = 1 << 24
_TOO_SHORT = "is too short to be a NIfTI file; it is damaged or something else"


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One of the two versions of the format, which the first number of a header, its length, tells.

    magic: where the word stands that says what it is. words: that of one file, and that of a pair.
    """

    layout: dict[str, tuple[int, str]]
    magic: slice
    words: tuple[bytes, bytes]


_VERSIONS = {
    348: _Version(layout=NIFTI1, magic=slice(344, 348), words=(b"n+1\0", b"ni1\0")),
    540: _Version(
        layout=NIFTI2,
        magic=slice(4, 12),
        words=(b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Header:
    fields: dict[str, Any]
    order: Literal["<", ">"]
    single: bool  # whether it is NIfTI-1, whose numbers are float32
    voxels_at: int  # bytes of the header and its extension flag; 0 where voxels have their own file


def read_nifti(
    path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None
) -> Volume:
    """A volume from `.nii` or `.nii.gz`, values as stored or, if the header scales them, scaled.
    Raises `BadFile`.

    Of a pair, either file may be named. Of a file with several volumes, `volume_index` chooses.
    `assume_geometry` ('sform', 'qform' or 'pixdim') decides where the voxels lie if the header says
    nothing or contradicts itself.
    """
    repairs: list[str] = []
    headers, voxels = _pair(path)
    if headers != voxels:
        with ByteStream(headers, packing=_packing(headers), owner=path) as stream:
            header = _read_header(path, stream, pair=True)
            stream.finish(extra=_MAX_EXTENSIONS)
        with ByteStream(voxels, packing=_packing(voxels), owner=path) as stream:
            data, affine, space = _read(
                path,
                header,
                stream,
                volume_index=volume_index,
                assumed=assume_geometry,
                mended=repairs,
            )
    else:
        packing = _packing(path)
        # What it is, its first bytes say: the header is checked as any other.
        if packing and not is_gzip(path):
            packing = None
            repairs.append("it is not gzipped, whatever its name, and was read as it is")
        with ByteStream(path, packing=packing) as stream:
            header = _read_header(path, stream, pair=False)
            data, affine, space = _read(
                path,
                header,
                stream,
                volume_index=volume_index,
                assumed=assume_geometry,
                mended=repairs,
            )
    slope, intercept = _scaling(path, header.fields, repairs)
    for what in repairs:
        warnings.warn(f"{path}: {what}", DataWarning, stacklevel=3)
    data = rescale(path, data, slope=slope, intercept=intercept)
    volume = make_volume(path, data, affine, space=space)
    return replace(volume, header_spacing_mm=_stated_spacing(header.fields, volume))


def _read(
    path: str | Path,
    header: _Header,
    stream: ByteStream,
    *,
    volume_index: int | None,
    assumed: str | None,
    mended: list[str],
) -> tuple[NDArray, NDArray[np.float64], Space]:
    """The stored voxels that follow in a stream, their affine and its space; what was mended is
    added to `mended`.
    """
    fields = header.fields
    sizes = _sizes(path, fields["dim"], mended)
    shape, count = (sizes[0], sizes[1], sizes[2]), sizes[3] if len(sizes) > 3 else 1
    dtype = _dtype(path, fields, mended).newbyteorder(header.order)
    affine, space = _affine(path, fields, shape, assumed=assumed, single=header.single)
    offset = fields["vox_offset"]
    if not (math.isfinite(offset) and offset == int(offset) and offset >= header.voxels_at):
        raise BadFile(
            f"{path}: its header puts the voxels at an impossible place; the file is damaged"
        )
    index = choose_volume(path, count, volume_index)
    stream.check_claim(int(offset) - header.voxels_at + math.prod(shape) * count * dtype.itemsize)
    stream.skip(int(offset) - header.voxels_at)
    data = read_voxels(stream, dtype, shape, count=count, index=index)
    finish_voxels(path, stream, data, sizes=(*shape, count) if count > 1 else shape)
    return data, affine, space


def place_by_header(name: str, data: NDArray, header: bytes) -> Volume:
    """Voxels (I, J, K) where the bytes of a NIfTI header of theirs say, judged as those of a file.
    Raises `BadFile`.
    """
    for order in ("<", ">"):
        version = _VERSIONS.get(struct.unpack_from(order + "i", header)[0])
        if version is None:
            continue
        fields, is_single = _unpack(version.layout, order, header), version.layout is NIFTI1
        i, j, k = data.shape
        affine, space = _affine(name, fields, (i, j, k), assumed=None, single=is_single)
        volume = make_volume(name, data, affine, space=space)
        return replace(volume, header_spacing_mm=_stated_spacing(fields, volume))
    raise BadFile(f"{name}: its header is not that of NIfTI; give a pair (array, affine)")


def stored_sizes(path: str | Path) -> tuple[int, ...]:
    """The lengths of all axes as the header gives them, those of length 1 too. Raises `BadFile`."""
    headers, voxels = _pair(path)
    packing = _packing(headers) if is_gzip(headers) else None
    with ByteStream(headers, packing=packing) as stream:
        return _sizes(path, _read_header(path, stream, pair=headers != voxels).fields["dim"], [])


def _packing(path: str | Path) -> str | None:
    return "gzip" if str(path).lower().endswith(".gz") else None


def nifti_files(path: str | Path) -> tuple[Path, ...]:
    """The other file of a pair, where a file is one of one. Raises `BadFile`."""
    return tuple(file for file in _pair(path) if file != Path(path))


def _pair(path: str | Path) -> tuple[Path, Path]:
    """The files of the header and of the voxels, which are one but for `.hdr` and `.img`. Raises
    `BadFile`.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    ending = name[-4:]
    if ending.lower() not in (".hdr", ".img"):
        return path, path
    open_file(path).close()  # what is wrong with the file that was named comes first
    other = ".img" if ending.lower() == ".hdr" else ".hdr"
    other = other.upper() if ending.isupper() else other
    names = [f"{name[:-4]}{other}", f"{name[:-4]}{other}.gz"]
    partners = [path.with_name(one) for one in names if path.with_name(one).exists()]
    if len(partners) != 1:
        both = f"both {names[0]} and {names[1]} lie beside it; keep one"
        what = both if partners else f"{names[0]} is missing beside it"
        raise BadFile(f"{path}: is one file of a pair, and {what}")
    return (path, partners[0]) if other.lower() == ".img" else (partners[0], path)


def _read_header(path: str | Path, stream: ByteStream, *, pair: bool) -> _Header:
    """The header at the beginning of a stream. Raises `BadFile` naming `path` for what is none, or
    is not of a pair.
    """
    try:
        start = bytes(stream.read(348))
    except BadFile as error:
        if "too short" in str(error) or "ends early" in str(error):
            raise BadFile(f"{path}: {_TOO_SHORT}") from None
        raise
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        header = _header_in(path, stream, start, order=order, pair=pair)
        if header is not None:
            return header
    if start[:2] == b"\x1f\x8b":
        raise BadFile(f"{path}: is gzip data; name it {'.hdr.gz' if pair else '.nii.gz'}")
    raise BadFile(f"{path}: is not a NIfTI file, whatever its name; give the scan itself")


def _header_in(
    path: str | Path, stream: ByteStream, start: bytes, *, order: Literal["<", ">"], pair: bool
) -> _Header | None:
    """The header that begins with `start`, whose rest follows in the stream; None if it is none in
    this byte order.
    """
    size = struct.unpack_from(order + "i", start)[0]
    version = _VERSIONS.get(size)
    if version is None:
        return None
    magic = start[version.magic]
    if magic not in version.words:
        if size == 348 and pair:
            raise BadFile(
                f"{path}: is an Analyze file, which does not say which side of it is left; "
                "export the scan as NIfTI or DICOM from where it was made"
            )
        return None
    _check_kind(path, of_pair=magic == version.words[1], pair=pair)
    if size > len(start):
        start += bytes(stream.read(size - len(start)))
    return _Header(
        fields=_unpack(version.layout, order, start),
        order=order,
        single=version.layout is NIFTI1,
        voxels_at=0 if pair else _flagged(path, stream, size + 4),
    )


def _check_kind(path: str | Path, *, of_pair: bool, pair: bool) -> None:
    if of_pair and not pair:
        raise BadFile(
            f"{path}: is the header of a .hdr/.img pair; name it .hdr, with the voxels beside it as"
            " .img"
        )
    if pair and not of_pair:
        raise BadFile(f"{path}: says that it holds its voxels itself; name it .nii")


def _flagged(path: str | Path, stream: ByteStream, length: int) -> int:
    """Read the four bytes before `length` that tell of extensions, which are passed over with all
    up to the voxels.
    """
    try:
        stream.skip(4)
    except BadFile:
        raise BadFile(f"{path}: {_TOO_SHORT}") from None
    return length


def _unpack(layout: dict[str, tuple[int, str]], order: str, raw: bytes) -> dict[str, Any]:
    fields = {
        name: struct.unpack_from(order + code, raw, offset)
        for name, (offset, code) in layout.items()
    }
    return {name: value[0] if len(value) == 1 else value for name, value in fields.items()}


def _sizes(path: str | Path, dim: tuple[int, ...], mended: list[str]) -> tuple[int, ...]:
    """The lengths of all axes, at least three and of more than four only such as hold one
    volume.
    """
    if not 1 <= dim[0] <= 7:
        raise BadFile(f"{path}: its header gives {dim[0]} dimensions; it is damaged")
    sizes = [int(size) for size in dim[1 : dim[0] + 1]]
    if any(size < 1 for size in sizes[3:]):
        # Certain: the reference library reads these as 1, and the file must hold exactly the voxels
        # that this makes.
        mended.append("its header gives an axis beyond the third no length, which was read as 1")
        sizes = [*sizes[:3], *(max(size, 1) for size in sizes[3:])]
    check_axes(path, sizes)
    if len(sizes) < 3:
        raise BadFile(
            f"{path}: is a picture of {len(sizes)} dimensions, not a volume; give the whole scan"
        )
    if math.prod(sizes[4:]) > 1:
        raise BadFile(
            f"{path}: has {len(sizes)} dimensions (vectors or matrices per voxel), not one value"
            " per voxel"
        )
    return tuple(sizes)


def _scaling(path: str | Path, fields: dict[str, Any], mended: list[str]) -> tuple[float, float]:
    """Slope and intercept of the values, 1 and 0 where they are not scaled. Raises `BadFile` if
    they may be.
    """
    slope, intercept = fields["scl_slope"], fields["scl_inter"]
    if slope == 0 or (math.isnan(slope) and math.isnan(intercept)):  # both mean "not scaled"
        return 1.0, 0.0
    if not math.isfinite(slope) and not (math.isfinite(intercept) and intercept != 0):
        # Certain: to the reference library a number that is none is 0, and a slope of 0 says "not
        # scaled". Beside an intercept something was scaled, and nobody knows by what.
        mended.append("the scaling of its values is not a number, so they were read as stored")
        return 1.0, 0.0
    return slope, intercept


def _dtype(path: str | Path, fields: dict[str, Any], mended: list[str]) -> np.dtype:
    kind = fields["datatype"]
    if kind in _COLOR:
        raise BadFile(f"{path}: is a colour image ({_COLOR[kind]}); give the scan in grey values")
    if kind in _COMPLEX:
        raise BadFile(f"{path}: holds complex numbers; save the magnitude image first")
    if kind not in DTYPES:
        raise BadFile(
            f"{path}: its voxels are of type {kind}, which medseg does not read; save it as float32"
        )
    dtype = np.dtype(DTYPES[kind])
    if fields["bitpix"] == 0:
        # Certain: it only repeats what the type says, and the file must hold exactly so many bytes.
        mended.append(
            "its header leaves out the size of a voxel value, which follows from the type"
        )
    elif fields["bitpix"] != dtype.itemsize * 8:
        raise BadFile(
            f"{path}: its header contradicts itself about the size of a voxel value; the file is"
            " damaged"
        )
    return dtype


def _affine(
    path: str | Path,
    fields: dict[str, Any],
    shape: tuple[int, int, int],
    *,
    assumed: str | None,
    single: bool,
) -> tuple[NDArray[np.float64], Space]:
    """Voxel index to RAS+ mm, and in which space. All that the header says must agree, unless
    `assumed` decides.
    """
    to_mm = _MM_PER_UNIT.get(fields["xyzt_units"] & 7)
    if to_mm is None:
        raise BadFile(f"{path}: its header gives an unknown unit of length; correct the header")
    scale = np.array([to_mm, to_mm, to_mm, 1.0])[:, None]
    make = {"sform": _sform, "qform": place_of_quaternion, "pixdim": _pixdim}
    if assumed is not None:
        if assumed not in make:
            raise BadFile(
                f"{path}: the geometry can be assumed from sform, qform or pixdim, not from"
                f" '{assumed}'"
            )
        affine = make[assumed](path, fields)
        space = _space_of_one(assumed, fields.get(f"{assumed}_code", 0))
        warnings.warn(
            f"{path}: the geometry was assumed from its {assumed}", DataWarning, stacklevel=4
        )
    else:
        codes = {name: fields[f"{name}_code"] for name in ("sform", "qform")}
        if not all(0 <= code <= 5 for code in codes.values()):
            raise BadFile(f"{path}: its header gives an unknown kind of geometry; {_ASSUME}")
        affines = {name: make[name](path, fields) for name, code in codes.items() if code > 0}
        if not affines:
            raise BadFile(f"{path}: its header does not say where the voxels lie; {_ASSUME}")
        affine = next(iter(affines.values()))
        space = Space(qform_code=codes["qform"], sform_code=codes["sform"])
        _check_agreement(path, affines, fields, shape=shape)
    affine = scale * affine
    # NIfTI-1 stores float32: rounded to it here, every affine read can be written back exactly.
    return (affine.astype(np.float32).astype(np.float64) if single else affine), space


def _space_of_one(name: str, code: int) -> Space:
    """The space of an affine that was taken from the qform or the sform alone; what the other says
    is not of it.
    """
    if not 1 <= code <= 5:
        return _UNNAMED
    return Space(**{"qform_code": 0, "sform_code": 0, f"{name}_code": code})


_ASSUME = "say which to trust with --assume-geometry sform, qform or pixdim"


def _check_agreement(
    path: str | Path,
    placed: dict[str, NDArray],
    fields: dict[str, Any],
    *,
    shape: tuple[int, int, int],
) -> None:
    first = next(iter(placed.values()))
    if not all(np.isfinite(affine).all() for affine in placed.values()):
        raise BadFile(f"{path}: its qform or sform holds values that are not finite; {_ASSUME}")
    with np.errstate(all="ignore"):
        diagonal = float(np.linalg.norm(first[:3, :3] @ shape))
        corners = np.array(
            [[i, j, k, 1.0] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])]
        ).T
        for other in placed.values():
            distance = float(np.linalg.norm(((other - first) @ corners)[:3], axis=0).max())
            if not distance <= MAX_DISAGREEMENT * diagonal:
                raise BadFile(
                    f"{path}: its qform and sform place the scan {distance:.3g} mm apart; {_ASSUME}"
                )
        spacing, pixdim = np.array(spacing_of(first)), np.abs(fields["pixdim"][1:4])
        if not (np.abs(spacing - pixdim) <= MAX_DISAGREEMENT * spacing).all():
            raise BadFile(f"{path}: its geometry and its voxel size (pixdim) disagree; {_ASSUME}")


def _stated_spacing(fields: dict[str, Any], volume: Volume) -> tuple[float, float, float] | None:
    """The header's voxel size in mm, if the affine agrees with it up to rounding; nothing where one
    was assumed.
    """
    to_mm = _MM_PER_UNIT[fields["xyzt_units"] & 7]
    i, j, k = (abs(size) * to_mm for size in fields["pixdim"][1:4])
    agrees = np.allclose((i, j, k), volume.spacing_mm, rtol=MAX_DISAGREEMENT, atol=0)
    return (i, j, k) if agrees else None


def _sform(path: str | Path, fields: dict[str, Any]) -> NDArray[np.float64]:
    return np.vstack([np.reshape(fields["srow"], (3, 4)), (0.0, 0.0, 0.0, 1.0)])


def place_of_quaternion(path: str | Path, fields: dict[str, Any]) -> NDArray[np.float64]:
    """The affine that the fields of the qform say (nifti1.h, method 2). Raises `BadFile`."""
    b, c, d = fields["quatern"]
    handedness = fields["pixdim"][0]
    rest = 1.0 - (b * b + c * c + d * d)
    if not rest >= -1e-5 or handedness not in (-1, 0, 1):
        raise BadFile(f"{path}: the rotation in its qform is impossible; {_ASSUME}")
    # Near half a turn the rounding of b, c, d to float32 hides a; taken as 0 there, half turns are
    # exact.
    a = math.sqrt(rest) if rest > np.finfo(np.float32).eps else 0.0
    rotation = np.array(  # nifti1.h, method 2
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    spacing = np.abs(fields["pixdim"][1:4]) * (1, 1, -1 if handedness == -1 else 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = fields["qoffset"]
    return affine


def _pixdim(path: str | Path, fields: dict[str, Any]) -> NDArray[np.float64]:
    return np.diag([*np.abs(fields["pixdim"][1:4]), 1.0])  # nifti1.h, method 1, read as RAS
