"""Any reader in, any writer out: `read`, `read_labels` and `write` choose by the suffix of the
name.

A new format is one module and one line in `READERS` and `WRITERS`. Readers return what the file
holds; the checks of the values that all formats share are made here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg import logs, packages
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.files import open_file, sweep
from medseg.io.added import added_reader, added_suffixes, added_writer
from medseg.io.dicom.headers import is_dicom
from medseg.io.dicom.result import DicomOptions, class_of
from medseg.io.dicom.rtstruct import (
    read_rtstruct,
    read_rtstruct_table,
    read_structures,
    write_rtstruct,
)
from medseg.io.dicom.seg import (
    read_seg,
    read_seg_table,
    read_segments as read_dicom_segments,
    write_seg,
)
from medseg.io.dicom.slices import CAPTURES, RTSTRUCT_CLASS, SEG_CLASSES, SOP_CLASSES
from medseg.io.dicom.volumes import Paths, list_volumes, name_of, read_dicom
from medseg.io.metaimage import metaimage_files, read_metaimage, write_metaimage
from medseg.io.mgh import read_mgh, write_mgh
from medseg.io.nifti import nifti_files, read_nifti
from medseg.io.nifti_writing import write_nifti
from medseg.io.nrrd import nrrd_files, read_nrrd, write_nrrd
from medseg.io.slicer import (
    names_segments,
    read_seg_nrrd,
    read_segments as read_slicer_segments,
    read_table,
    write_seg_nrrd,
)
from medseg.io.voxels import Overlap, SeveralVolumes, finite, labels_only
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

__all__ = [
    "READERS", "WRITERS", "DicomOptions", "Overlap", "Paths", "SeveralVolumes", "data_files",
    "embedded_table",
    "holds_names", "is_dicom_source",
    "is_readable_name", "is_slicer_segmentation", "label_kind", "list_volumes", "read",
    "read_as_stored", "read_labels", "read_masks", "strip_suffix", "write", "written_suffixes",
]  # fmt: skip

#: Suffix to reader: `reader(path, volume_index=None, assume_geometry=None) -> Volume`. Longer
#: suffixes come first. A folder is DICOM, whatever its name; so is a file of another name that
#: begins as DICOM does.
READERS: dict[str, Callable[..., Volume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".hdr.gz": read_nifti,
    ".hdr": read_nifti,
    ".img.gz": read_nifti,
    ".img": read_nifti,
    ".seg.nrrd": read_seg_nrrd,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".mgh": read_mgh,
    ".mgz": read_mgh,
    ".rtstruct.dcm": read_dicom,
    ".seg.dcm": read_dicom,
    ".dcm": read_dicom,
    ".zip": read_dicom,
}
#: Suffix to writer: `writer(volume, path, table=None)`; those of DICOM also take `source` and
#: `options`.
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
    ".rtstruct.dcm": write_rtstruct,
    ".seg.dcm": write_seg,
    ".dcm": write_seg,
}
#: Files of these names hold voxels whose header is another file, by which the pair is known; DICOM
#: uses the name, too.
_VOXELS_ONLY = (".img", ".img.gz")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read(
    path: Paths,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    series: str | int | None = None,
    repair: bool = False,
    suv: bool = False,
    source: Paths | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """A scan from a file or from DICOM (folder, list of files, zip, DICOMDIR). Raises `BadFile`,
    never guesses.

    Segmentations (DICOM SEG, 3D Slicer's NRRD) and DICOM structure sets are read as label maps.

    volume_index: which volume of a file that holds several, from 0.
    assume_geometry: 'sform', 'qform' or 'pixdim': what to trust if a header contradicts itself or
        says nothing.
    series: which DICOM volume, if there are several, as `list_volumes` numbers them, or a Series
        Instance UID.
    repair: resample uneven or slanted DICOM stacks to an even grid where that is well defined.
        For a segmentation or structure set both are about its `source`.
    suv: DICOM PET as standardised uptake values by body weight.
    source: the DICOM images that a structure set was drawn on; a DICOM segmentation is put on their
        whole grid.
    segments: which structures of a segmentation or structure set, by name or value, later over
        earlier.
    Raises `SeveralVolumes`, a `BadFile`, where a file holds several and none is chosen.
    Warns with `DataWarning` if voxels were not finite numbers and were replaced, and of what
    `repair` did.
    """
    path = _path_of(path)
    dicom = {
        key: value for key, value in (("series", series), ("repair", repair), ("suv", suv)) if value
    }
    if kind := label_kind(path):
        return _dicom_labels(
            kind,
            str(path),
            volume_index=volume_index,
            segments=segments,
            source=source,
            series=series,
            repair=repair,
        )
    volume = _raw(
        path,
        volume_index=volume_index,
        assume_geometry=assume_geometry,
        dicom=dicom,
        segments=segments,
    )
    volume = finite(name_of(path), volume)
    logs.debug(__name__, "read %r", volume)
    return volume


def _path_of(path: Any) -> Any:
    """A path, or the paths of DICOM files, as all else here takes them. Raises `BadConfig` for what
    is none, `BadFile` for a name that no file has.
    """
    if isinstance(path, os.PathLike) and not isinstance(path, Path):
        path = os.fsdecode(path)
    if isinstance(path, list | tuple):
        return [_path_of(one) for one in path]
    if not isinstance(path, str | Path):
        raise BadConfig(f"a file is given by its path, and this is of type {type(path).__name__}")
    if not str(path) or "\0" in str(path):
        raise BadFile(f"{str(path)!r} names no file or folder; check the name")
    return path


def read_as_stored(path: Paths, *, volume_index: int | None = None) -> Volume:
    """A scan with all voxels as its file holds them, also those that are not finite numbers. Raises
    `BadFile`.
    """
    return _raw(path, volume_index=volume_index)


def read_labels(
    path: str | Path,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    source: Paths | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """A label map as uint8 or uint16. Raises `BadFile` if a voxel is not a whole number from 0 to
    65535.

    assume_geometry, source, segments: as for `read`.
    """
    path = _path_of(path)
    if kind := label_kind(path):
        return _dicom_labels(
            kind, path, volume_index=volume_index, segments=segments, source=source
        )
    how: dict[str, Any] = {"volume_index": volume_index, "assume_geometry": assume_geometry}
    return labels_only(path, _raw(path, segments=segments, **how))


def write(
    volume: Volume,
    path: str | Path,
    *,
    table: LabelTable | None = None,
    source: Paths | None = None,
    options: DicomOptions | None = None,
) -> None:
    """Write a volume in the format its suffix names, whole or not at all. Raises `BadOutput`.

    table: names, colours and codes of a label map, for the formats that can hold them (`.seg.nrrd`,
    `.dcm`). source, options: for `.dcm`, the DICOM images the labels were made from, and how to
    write.
    """
    if not isinstance(volume, Volume):
        raise BadConfig(
            f"what is written is a medseg.Volume, and this is of type {type(volume).__name__}; of a"
            " result that is its labels, of other objects medseg.as_volume(...)"
        )
    path = _path_of(path)
    suffix = _suffix(path, WRITERS)
    if suffix is None:
        listed = ", ".join(sorted(written_suffixes()))
        raise BadOutput(f"{path}: medseg does not write this format; use one of {listed}")
    if suffix.endswith(".dcm"):
        _check_no_image(path)
    sweep(Path(path).parent)
    dicom = {"source": source, "options": options} if suffix.endswith(".dcm") else {}
    writer = WRITERS.get(suffix) or added_writer(suffix)
    writer(volume, path, table=table, **dicom)
    logs.debug(__name__, "wrote %r as %s", volume, suffix)


def holds_names(path: str | Path) -> bool:
    """Whether the format of a name holds what the values of a label map are called."""
    return WRITERS.get(_suffix(path, WRITERS) or "") in (write_seg_nrrd, write_seg, write_rtstruct)


def _check_no_image(path: str | Path) -> None:
    """Raise `BadOutput` where labels would take the place of a DICOM image, such as one of those
    that they are about.
    """
    try:
        is_image = Path(path).is_file() and class_of(path) in SOP_CLASSES | CAPTURES
    except BadFile:  # what is damaged is no image any more
        return
    if is_image:
        raise BadOutput(f"{path} is a DICOM image and would be overwritten; choose another name")


def embedded_table(path: str | Path) -> LabelTable | None:
    """The names and colours that a label map carries in itself (Slicer's NRRD, DICOM), or None if
    it has none.
    """
    if kind := label_kind(path):
        return read_seg_table(path) if kind == "SEG" else read_rtstruct_table(path)
    return read_table(path) if is_slicer_segmentation(path) else None


def is_slicer_segmentation(path: Paths) -> bool:
    """Whether a file is a segmentation of 3D Slicer: by its name `.seg.nrrd`, or NRRD whose header
    names segments.
    """
    suffix = _suffix(path, READERS) if isinstance(path, str | Path) else None
    return suffix == ".seg.nrrd" or (suffix in (".nrrd", ".nhdr") and names_segments(str(path)))


def data_files(path: str | Path) -> tuple[Path, ...]:
    """The files beside a scan without which it cannot be read: those that its header names, or the
    other one of a pair. None where one file holds all. Raises `BadFile`.
    """
    reader = READERS.get(_suffix(path, READERS) or "")
    files_of = {
        read_nifti: nifti_files, read_metaimage: metaimage_files, read_nrrd: nrrd_files,
        read_seg_nrrd: nrrd_files,
    }.get(reader)  # type: ignore[arg-type]  # fmt: skip
    return () if files_of is None or not Path(path).is_file() else files_of(path)


def strip_suffix(path: str | Path) -> str:
    """The name of a file or folder without its folder and without its known, possibly double,
    suffix.
    """
    name = Path(path).name
    suffix = _suffix(path, READERS) or _suffix(path, WRITERS) or ""
    return name[: len(name) - len(suffix)]


def is_readable_name(path: str | Path) -> bool:
    """Whether a file of this name in a folder of scans is one: `read` has a reader for it, and it
    is no archive.

    Of a pair of header and voxels, the header is the scan.
    """
    return _suffix(path, READERS) not in (None, ".zip", *_VOXELS_ONLY)


def is_dicom_source(path: Paths) -> bool:
    """Whether `read` would read a path as DICOM: a list, a folder, a zip, or a file named or
    beginning like DICOM.
    """
    if not isinstance(path, str | Path) or Path(path).is_dir():
        return True
    suffix = _suffix(path, READERS)
    if suffix and suffix not in _VOXELS_ONLY:
        return READERS.get(suffix) is read_dicom
    with open_file(path) as file:
        start = file.read(132)
    # Old files have no preamble.
    return start[128:] == b"DICM" or (not Path(path).suffix and is_dicom(start))


def label_kind(path: Paths) -> str:
    """'SEG' or 'RTSTRUCT' for a DICOM file that holds such an object, else ''."""
    if not isinstance(path, str | Path) or not Path(path).is_file() or not is_dicom_source(path):
        return ""
    sop_class = class_of(path)
    return "SEG" if sop_class in SEG_CLASSES else "RTSTRUCT" if sop_class == RTSTRUCT_CLASS else ""


def read_masks(
    path: str | Path,
    *,
    source: Paths | None = None,
    series: str | int | None = None,
    repair: bool = False,
) -> list[tuple[Label, Volume]]:
    """Every structure of a Slicer segmentation, DICOM SEG or RTSTRUCT as a mask (uint8, 0 and 1),
    overlaps kept.

    source, series, repair: the DICOM images that a SEG or structure set is about, as for `read`.
    Raises `BadFile`.
    """
    return list(each_mask(path, source=source, series=series, repair=repair))


def each_mask(
    path: str | Path, *, source: Paths | None, series: str | int | None, repair: bool
) -> Iterator[tuple[Label, Volume]]:
    """As `read_masks`, one after the other: all together may be larger than memory."""
    kind = label_kind(path)
    if kind == "RTSTRUCT":
        return read_structures(path, source=source, series=series, repair=repair)
    if kind == "SEG":
        return read_dicom_segments(path, source=source, series=series, repair=repair)
    if not is_slicer_segmentation(path):
        raise BadFile(f"{path}: names no structures; give a .seg.nrrd, DICOM SEG or RTSTRUCT")
    return read_slicer_segments(path)


def _dicom_labels(kind: str, path: str | Path, **options: Any) -> Volume:
    """A DICOM SEG or RTSTRUCT; options are those of `read_seg` and `read_rtstruct` alike."""
    return (read_rtstruct if kind == "RTSTRUCT" else read_seg)(path, **options)


def _raw(
    path: Paths,
    *,
    volume_index: int | None,
    assume_geometry: str | None = None,
    dicom: dict[str, Any] | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """As a file holds it. `dicom`: what `read_dicom` alone understands."""
    options = {"volume_index": volume_index, "assume_geometry": assume_geometry}
    reader: Callable[..., Volume]
    if is_slicer_segmentation(path) and not dicom:
        reader = partial(read_seg_nrrd, segments=segments or None)
        return _read_with(reader, path, options)
    if segments:
        raise BadFile(f"{name_of(path)}: names no structures; leave out --segment")
    if is_dicom_source(path):
        reader = partial(read_dicom, **(dicom or {}))
    else:
        suffix = _suffix(str(path), READERS)
        if suffix is None:
            raise _unknown(str(path))
        if dicom:
            flags = ", ".join(f"--{name}" for name in dicom)
            raise BadFile(f"{path}: is no DICOM, for which alone {flags} is meant; leave it out")
        reader = READERS.get(suffix) or added_reader(suffix)
    return _read_with(reader, path, options)


def _read_with(reader: Callable[..., Volume], path: Paths, options: dict[str, Any]) -> Volume:
    try:
        return reader(path, **options)
    except MemoryError:
        path = name_of(path)
        raise BadFile(
            f"{path}: there is not enough memory to read it; crop the scan or use a larger machine"
        ) from None


def written_suffixes() -> tuple[str, ...]:
    """The suffixes of all formats that are written."""
    return (*WRITERS, *added_suffixes(packages.WRITERS))


def _suffix(path: str | Path, known: dict[str, Callable]) -> str | None:
    """The suffix of a name among medseg's own, or else among those of installed packages."""
    name = Path(path).name.lower()
    own = _ending(name, known)
    if own is not None:
        return own
    return _ending(name, added_suffixes(packages.READERS if known is READERS else packages.WRITERS))


def _ending(name: str, suffixes: Iterable[str]) -> str | None:
    return next(
        (one for one in suffixes if name.endswith(one.lower()) and len(name) > len(one)), None
    )


def _unknown(path: str | Path) -> BadFile:
    """Why a name without a reader cannot be read."""
    open_file(path).close()
    if Path(path).suffix.lower() in _PICTURES:
        return BadFile(f"{path}: is a 2-D picture, not a scan; give the volume it was made from")
    return BadFile(
        f"{path}: medseg does not read this kind of file; give a DICOM folder or one of"
        f" {', '.join(sorted((*READERS, *added_suffixes(packages.READERS))))}"
    )
