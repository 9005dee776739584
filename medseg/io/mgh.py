"""FreeSurfer's MGH, `.mgh` and gzipped `.mgz`
(https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat).
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadOutput, DataWarning
from medseg.files import ByteStream, atomic_write, gzip_writer
from medseg.io.voxels import (
    check_axes,
    choose_volume,
    make_volume,
    read_voxels,
    slabs,
    stored_dtype,
)
from medseg.stream import is_gzip
from medseg.volume import Volume, spacing_of

if TYPE_CHECKING:
    from medseg.labels import LabelTable

# Version, 4 sizes, type, degrees of freedom, good geometry, spacing, directions, centre.
_HEADER = ">7ih15f"
_DATA_START = 284
#: Most bytes of scan parameters and tags that may follow the voxels; they are not needed.
MAX_TAGS = 1 << 24
_DTYPES = {0: "u1", 1: "i4", 3: "f4", 4: "i2", 10: "u2"}


def read_mgh(
    path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None
) -> Volume:
    """A volume from `.mgh` or `.mgz`. Raises `BadFile`.

    Of a file with several frames, `volume_index` chooses. If the header says that its geometry is
    not valid, `assume_geometry='pixdim'` uses the voxel size along RAS+ axes.
    """
    packing = "gzip" if str(path).lower().endswith(("z", ".gz")) else None
    packed = is_gzip(path)
    if packed and not packing:
        raise BadFile(f"{path}: is gzip data; name it .mgz")
    if packing and not packed:  # what it is, its version says, which is checked as in any other
        packing = None
    with ByteStream(path, packing=packing) as stream:
        header = struct.unpack_from(_HEADER, stream.read(_DATA_START))
        version, i, j, k, frames, kind = header[:6]
        if version != 1:
            raise BadFile(f"{path}: is not an MGH file, whatever its name; give the scan itself")
        check_axes(path, (i, j, k, frames))
        if kind not in _DTYPES:
            raise BadFile(
                f"{path}: its voxels are of type {kind}, which medseg does not read; save it as"
                " float"
            )
        affine = _affine(path, header[7:], (i, j, k), assumed=assume_geometry)
        index = choose_volume(path, frames, volume_index)
        data = read_voxels(
            stream, np.dtype(_DTYPES[kind]).newbyteorder(">"), (i, j, k), count=frames, index=index
        )
        stream.finish(extra=MAX_TAGS)
    if not packed and str(path).lower().endswith(("z", ".gz")):
        warnings.warn(
            f"{path}: it is not gzipped, whatever its name, and was read as it is",
            DataWarning,
            stacklevel=3,
        )
    return make_volume(path, data, affine)


def _affine(
    path: str | Path,
    geometry: tuple[float, ...],
    shape: tuple[int, int, int],
    *,
    assumed: str | None,
) -> NDArray[np.float64]:
    good, spacing = geometry[0], np.array(geometry[1:4])
    if not np.isfinite(geometry).all():
        raise BadFile(
            f"{path}: its header holds a geometry that is not finite; the file is damaged"
        )
    if not (spacing > 0).all():
        raise BadFile(f"{path}: its voxel size is not positive; the file is damaged")
    if assumed == "pixdim":
        return np.diag([*spacing, 1.0])
    directions = np.reshape(geometry[4:13], (3, 3)).T  # stored axis by axis
    if good != 1:
        raise BadFile(
            f"{path}: its header says that its geometry is not valid; say --assume-geometry pixdim"
            " to use it"
        )
    if not (np.abs(np.sqrt((directions**2).sum(axis=0)) - 1) < 1e-3).all():
        raise BadFile(
            f"{path}: the directions in its header are not of length 1; the file is damaged"
        )
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = np.array(geometry[13:16]) - affine[:3, :3] @ (np.array(shape) / 2)
    # The header is float32: rounded to it, the affine can be written to NIfTI and read back
    # exactly.
    return affine.astype(np.float32).astype(np.float64)


def write_mgh(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write `.mgh` or `.mgz`. Raises `BadOutput`. `table` is not stored in MGH.

    MGH holds uint8, int16, int32 and float32; other whole numbers are stored as the smallest of
    these that fits.
    """
    code, dtype = _stored(path, volume.data)
    spacing = spacing_of(volume.affine)
    directions = volume.affine[:3, :3] / spacing
    centre = volume.affine[:3, :3] @ (np.array(volume.shape) / 2) + volume.affine[:3, 3]
    numbers = (1, *volume.shape, 1, code, 0, 1, *spacing, *directions.T.ravel(), *centre)
    header = struct.pack(_HEADER, *numbers)
    with atomic_write(path) as file:
        pieces = slabs(volume.data, dtype.newbyteorder(">"))
        if not str(path).lower().endswith(("z", ".gz")):
            file.write(header.ljust(_DATA_START, b"\0"))
            file.writelines(pieces)
            return
        write, finish = gzip_writer(file)
        write(header.ljust(_DATA_START, b"\0"))
        for piece in pieces:
            write(piece)
        finish()


def _stored(path: str | Path, data: NDArray) -> tuple[int, np.dtype]:
    dtype = stored_dtype(data)
    codes = {"u1": 0, "i2": 4, "i4": 1, "f4": 3}
    if dtype.str[1:] in codes:
        return codes[dtype.str[1:]], dtype
    if dtype.kind in "iu":
        for name in ("u1", "i2", "i4"):
            limits = np.iinfo(name)
            if limits.min <= data.min() and data.max() <= limits.max:
                return codes[name], np.dtype(name)
    if dtype.kind == "f" and not (data.astype(np.float32) != data).any():
        return codes["f4"], np.dtype(np.float32)
    raise BadOutput(f"{path}: MGH cannot hold these values of type {dtype}; use .nii.gz")
