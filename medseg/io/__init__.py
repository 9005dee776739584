"""Any reader in, any writer out: `read`, `read_labels` and `write` choose by the suffix of the name.

A new format is one module and one line in `READERS` and `WRITERS`. Readers return what the file holds; the checks of
the values that all formats share are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import BadFile, BadOutput
from medseg.io.dicom import read_dicom
from medseg.io.files import open_file, sweep
from medseg.io.metaimage import read_metaimage, write_metaimage
from medseg.io.mgh import read_mgh, write_mgh
from medseg.io.nifti import read_nifti, write_nifti
from medseg.io.nrrd import read_nrrd, write_nrrd
from medseg.io.slicer import read_seg_nrrd, read_table, write_seg_nrrd
from medseg.io.voxels import finite, labels_only
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.labels import LabelTable

__all__ = ["READERS", "WRITERS", "embedded_table", "is_readable_name", "read", "read_labels", "strip_suffix", "write"]

#: Suffix to reader: `reader(path, volume_index=None, assume_geometry=None) -> Volume`. Longer suffixes come first.
#: A folder is a DICOM series, whatever its name.
READERS: dict[str, Callable[..., Volume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".seg.nrrd": read_seg_nrrd,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".mgh": read_mgh,
    ".mgz": read_mgh,
    ".dcm": read_dicom,
}
#: Suffix to writer: `writer(volume, path, table=None)`.
WRITERS: dict[str, Callable[..., None]] = {
    ".nii.gz": write_nifti,
    ".nii": write_nifti,
    ".seg.nrrd": write_seg_nrrd,
    ".nrrd": write_nrrd,
    ".nhdr": write_nrrd,
    ".mha": write_metaimage,
    ".mhd": write_metaimage,
    ".mgh": write_mgh,
    ".mgz": write_mgh,
}
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read(path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None) -> Volume:
    """A scan from a file or from a folder with one DICOM series. Raises `BadFile`, never guesses.

    volume_index: which volume of a file that holds several, from 0.
    assume_geometry: 'sform', 'qform' or 'pixdim': what to trust if a header contradicts itself or says nothing.
    Warns with `DataWarning` if voxels were not finite numbers and were replaced.
    """
    return finite(path, _raw(path, volume_index, assume_geometry))


def read_labels(path: str | Path, *, volume_index: int | None = None) -> Volume:
    """A label map as uint8 or uint16. Raises `BadFile` if a voxel is not a whole number from 0 to 65535."""
    return labels_only(path, _raw(path, volume_index, None))


def write(volume: Volume, path: str | Path, *, table: LabelTable | None = None) -> None:
    """Write a volume in the format its suffix names, whole or not at all. Raises `BadOutput`.

    table: names, colours and codes of a label map, for the formats that can hold them (`.seg.nrrd`).
    """
    suffix = _suffix(path, WRITERS)
    if suffix is None:
        raise BadOutput(f"{path}: medseg does not write this format; use one of {_listed(WRITERS)}")
    sweep(Path(path).parent)
    WRITERS[suffix](volume, path, table=table)


def embedded_table(path: str | Path) -> LabelTable | None:
    """The names and colours that a label map carries in itself (`.seg.nrrd`), or None if its format has none."""
    return read_table(path) if _suffix(path, READERS) == ".seg.nrrd" else None


def strip_suffix(path: str | Path) -> str:
    """The name of a file or folder without its folder and without its known, possibly double, suffix."""
    name = Path(path).name
    suffix = _suffix(path, READERS) or _suffix(path, WRITERS) or ""
    return name[: len(name) - len(suffix)]


def is_readable_name(path: str | Path) -> bool:
    """Whether `read` has a reader for a file of this name."""
    return _suffix(path, READERS) is not None


def _raw(path: str | Path, volume_index: int | None, assume_geometry: str | None) -> Volume:
    suffix = _suffix(path, READERS)
    reader = read_dicom if Path(path).is_dir() else READERS.get(suffix or "")
    if reader is None:
        raise _unknown(path)
    try:
        return reader(path, volume_index=volume_index, assume_geometry=assume_geometry)
    except MemoryError:
        raise BadFile(f"{path}: there is not enough memory to read it; crop the scan or use a larger machine") from None


def _suffix(path: str | Path, known: dict[str, Callable]) -> str | None:
    name = Path(path).name.lower()
    return next((suffix for suffix in known if name.endswith(suffix) and len(name) > len(suffix)), None)


def _listed(known: dict[str, Callable]) -> str:
    return ", ".join(sorted(known))


def _unknown(path: str | Path) -> BadFile:
    """Why a name without a reader cannot be read."""
    with open_file(path) as file:
        start = file.read(132)
    if Path(path).suffix.lower() in _PICTURES:
        return BadFile(f"{path}: is a 2-D picture, not a scan; give the volume it was made from")
    if start[128:] == b"DICM":
        return BadFile(f"{path}: is one DICOM file; give the folder that holds the whole series")
    return BadFile(f"{path}: medseg does not read this kind of file; give a DICOM folder or one of {_listed(READERS)}")
