"""How arrays lie on a disk: raw, mapped into memory, or as compressed chunks of Zarr.

Zarr 3 (https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html) with all chunks of an array
in one file (its codec sharding_indexed), so that a case is a handful of files, and a patch reads
only the chunks that it touches.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import BadConfig, BadFile
from medseg.files import atomic_write, output_errors

#: The arrays of a case, the one that is written last at the end.
NAMES = ("image", "labels", "points")
#: Voxels of a chunk along each axis: about a patch, so that one touches few chunks and unpacks
#: little beside itself.
CHUNK = 64
#: Of Zstandard, without bytes sorted by their place before: values of a scan that is not resampled
#: come again and again, all four bytes of them.
_LEVEL = 3


class Stored:
    """An array on a disk of which only what is asked for is read and unpacked."""

    device = torch.device("cpu")

    def __init__(self, array: Any, file: Path) -> None:
        """array: of the library. file: that holds its chunks."""
        self._array, self._file = array, file
        self.shape: tuple[int, ...] = array.shape
        self.dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        self.nbytes = int(np.prod(self.shape)) * int(array.dtype.itemsize)

    def __getitem__(self, box: Any) -> Tensor:
        """A part of it; `[...]` is the whole. Raises `BadFile` where it is damaged."""
        try:
            self._file.stat()  # chunks of a file that is not there count as zeros
            return torch.from_numpy(np.ascontiguousarray(self._array[box]))
        except (OSError, ValueError, RuntimeError):
            raise damaged(self._file) from None


class Raw:
    """NumPy's .npy: a file an array."""

    files: Mapping[str, str] = {name: f"{name}.npy" for name in NAMES}

    def write(self, folder: Path, arrays: Mapping[str, NDArray]) -> None:
        """Write the arrays of a case, each whole or not at all, the points last."""
        for name in NAMES:
            write_npy(folder / self.files[name], arrays[name])

    def open(self, folder: Path, name: str) -> Tensor | Stored:
        """An array, mapped into memory. Raises `BadFile`."""
        return torch.from_numpy(map_npy(folder / self.files[name]))


class Zarr:
    """Image and labels as Zarr, the points, which are few, as they are."""

    files: Mapping[str, str] = {
        "image": "image.zarr/c/0/0/0/0",
        "image.json": "image.zarr/zarr.json",
        "labels": "labels.zarr/c/0/0/0",
        "labels.json": "labels.zarr/zarr.json",
        "points": "points.npy",
    }

    def __init__(self) -> None:
        try:
            import zarr
        except ImportError:
            raise BadConfig(
                'compressed scans need the package zarr: pip install "medseg[zarr]"'
            ) from None
        self._zarr = zarr

    def write(self, folder: Path, arrays: Mapping[str, NDArray]) -> None:
        """Write the arrays of a case, each file whole or not at all, the points last."""
        for name in ("image", "labels"):
            for file, content in self._packed(arrays[name]).items():
                path = folder / f"{name}.zarr" / file
                with output_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as handle:
                    handle.write(content)
        write_npy(folder / self.files["points"], arrays["points"])

    def _packed(self, array: NDArray) -> dict[str, bytes]:
        """The files of an array by their names: what it is, and its chunks in one."""
        chunks = tuple(
            min(CHUNK, size) if axis >= array.ndim - 3 else size
            for axis, size in enumerate(array.shape)
        )
        memory: dict[str, Any] = {}
        packed = self._zarr.create_array(
            store=self._zarr.storage.MemoryStore(memory),
            zarr_format=3,
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            shards=tuple(-(-n // size) * size for n, size in zip(array.shape, chunks)),
            compressors=self._zarr.codecs.ZstdCodec(level=_LEVEL, checksum=True),
            fill_value=0,
            config={"write_empty_chunks": True},  # or an array of zeros had no file
        )
        packed[...] = array
        return {name: buffer.to_bytes() for name, buffer in sorted(memory.items())}

    def open(self, folder: Path, name: str) -> Tensor | Stored:
        """An array, of which nothing is read yet. Raises `BadFile`."""
        if name == "points":
            return torch.from_numpy(map_npy(folder / self.files[name]))
        path = folder / f"{name}.zarr"
        try:
            # Version 3 alone: of version 2 there are arrays that are unpickled.
            array = self._zarr.open_array(path, mode="r", zarr_format=3)
            return Stored(array, folder / self.files[name])
        except (OSError, ValueError, KeyError, TypeError):
            raise damaged(path) from None


#: What `--format` may be.
FORMATS: dict[str, type[Raw] | type[Zarr]] = {"npy": Raw, "zarr": Zarr}


def check_room(folder: Path, size_bytes: int) -> None:
    """Raise `BadConfig` where there is no room for a case and another one."""
    if shutil.disk_usage(folder).free < 2 * size_bytes:
        raise BadConfig(
            f"{folder}: the disk is full; prepared scans need {size_bytes >> 20} MB more a case"
        )


def write_npy(path: Path, array: NDArray) -> None:
    """Write an array whole or not at all. Raises `BadOutput`."""
    with atomic_write(path) as handle:
        np.lib.format.write_array(handle, np.ascontiguousarray(array), allow_pickle=False)


def map_npy(path: Path) -> NDArray:
    """An array, mapped into memory; writes to it, which do not happen, would not reach the disk.
    Raises `BadFile`.
    """
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        raise damaged(path) from None


def damaged(path: Path) -> BadFile:
    """What is said of an array that cannot be read."""
    return BadFile(f"{path}: is missing or damaged; run medseg prepare again, and go on")
