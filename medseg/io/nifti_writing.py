"""Writing NIfTI (https://nifti.nimh.nih.gov/nifti-1, nifti1.h and nifti2.h): `.nii`, `.nii.gz`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadOutput
from medseg.files import atomic_write, gzip_writer
from medseg.io.nifti import DTYPES, NIFTI1, NIFTI2, place_of_quaternion
from medseg.io.voxels import slabs, stored_dtype
from medseg.volume import Space, Volume, spacing_of

if TYPE_CHECKING:
    from medseg.labels import LabelTable


def write_nifti(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write `.nii` or `.nii.gz`, in the space of the volume. Raises `BadOutput`. `table` is not
    stored in NIfTI.

    NIfTI-1, whose affine is float32; NIfTI-2 only where an axis is longer than NIfTI-1 allows. The
    matrices are both written, whichever code is 0.
    """
    dtype = stored_dtype(volume.data)
    codes = {kind: code for code, kind in DTYPES.items()}
    if dtype.str[1:] not in codes:
        raise BadOutput(f"{path}: NIfTI cannot hold values of type {dtype}")
    header = _header_bytes(volume, codes[dtype.str[1:]], dtype.itemsize)
    with atomic_write(path) as file:
        if not str(path).lower().endswith(".gz"):
            for piece in _pieces(header, volume.data, dtype):
                file.write(piece)
            return
        write, finish = gzip_writer(file)
        for piece in _pieces(header, volume.data, dtype):
            write(piece)
        finish()


def _pieces(header: bytes, data: NDArray, dtype: np.dtype) -> Iterator[bytes | memoryview]:
    yield header
    yield from slabs(data, dtype.newbyteorder("<"))


def _header_bytes(volume: Volume, datatype: int, itemsize: int) -> bytes:
    two = max(volume.shape) > 32767
    layout, length = (NIFTI2, 544) if two else (NIFTI1, 352)
    affine = volume.affine if two else volume.affine.astype(np.float32).astype(np.float64)
    spacing = spacing_of(affine)
    quaternion, handedness = _quaternion(affine)
    codes = volume.space
    if codes.sform_code == 0:
        exact = None if two else _exact_qform(affine, quaternion, spacing, handedness=handedness)
        if (
            exact is None
        ):  # then only the sform can say where the voxels lie, and it leads to the same space
            codes = Space(qform_code=codes.qform_code, sform_code=codes.qform_code)
        else:
            quaternion, spacing = exact
    fields: dict[str, tuple[float, ...]] = {
        "dim": (3, *volume.shape, 1, 1, 1, 1),
        "datatype": (datatype,),
        "bitpix": (itemsize * 8,),
        "pixdim": (handedness, *spacing, 0, 0, 0, 0),
        "vox_offset": (length,),
        "scl_slope": (1,),
        "xyzt_units": (2,),  # mm
        "qform_code": (codes.qform_code,),
        "sform_code": (codes.sform_code,),
        "quatern": quaternion,
        "qoffset": tuple(affine[:3, 3]),
        "srow": tuple(affine[:3].ravel()),
    }
    raw = bytearray(length)
    raw[:4] = struct.pack("<i", 540 if two else 348)
    raw[4:12] = b"n+2\0\r\n\x1a\n" if two else raw[4:12]
    raw[344:348] = raw[344:348] if two else b"n+1\0"
    for name, values in fields.items():
        offset, code = layout[name]
        data = struct.pack("<" + code, *values)
        raw[offset : offset + len(data)] = data
    return bytes(raw)


def _quaternion(affine: NDArray) -> tuple[tuple[float, float, float], float]:
    """(b, c, d) of the rotation nearest to an affine, and 1 or -1 for its handedness."""
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing_of(affine))
    rotation = left @ right
    handedness = 1.0 if np.linalg.det(rotation) > 0 else -1.0
    r = rotation * (1, 1, handedness)
    # The quaternion is the eigenvector of the largest eigenvalue of this matrix (Bar-Itzhack 2000):
    # stable everywhere.
    m = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r[0, 0] + r[1, 1] + r[2, 2]],
        ]
    )
    b, c, d, a = np.linalg.eigh(m, UPLO="L")[1][:, -1]
    sign = -1.0 if a < 0 else 1.0
    return (sign * b, sign * c, sign * d), handedness


def _exact_qform(
    affine: NDArray,
    quaternion: tuple[float, float, float],
    spacing: tuple[float, float, float],
    *,
    handedness: float,
) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """(b, c, d) and spacing in float32 from which a reader gets an affine of float32 values to the
    bit, or None.

    An affine that came from a qform is made by numbers that lie at most one step beside those
    computed from it, so these few are tried; nearly always one fits (of 800 random ones, all but
    6).
    """

    def near(value: float) -> list[float]:
        middle = np.float32(value)
        return [
            float(np.nextafter(middle, np.float32(end))) if end else float(middle)
            for end in (0, -np.inf, np.inf)
        ]

    def directions(b: float, c: float, d: float) -> NDArray:
        fields = {"quatern": (b, c, d), "pixdim": (handedness, 1, 1, 1), "qoffset": (0, 0, 0)}
        return place_of_quaternion("", fields)[:3, :3]

    def fits(column: NDArray, length: float, wanted: NDArray) -> bool:
        return bool(((column * length).astype(np.float32) == wanted).all())

    for b, c, d in product(*map(near, quaternion)):
        if b * b + c * c + d * d > 1 + 1e-6:
            continue
        rotation = directions(b, c, d)
        lengths = [
            next(
                (
                    one
                    for one in near(spacing[axis])
                    if fits(rotation[:, axis], one, affine[:3, axis])
                ),
                None,
            )
            for axis in range(3)
        ]
        x, y, z = lengths
        if x is not None and y is not None and z is not None:
            return (b, c, d), (x, y, z)
    return None
