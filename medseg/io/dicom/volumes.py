"""DICOM CT, MR and PET in: folders, lists of files, zips, DICOMDIRs and multi-frame files as
volumes.

What is in a source is found first (`list_volumes`); one volume of it is read. A volume is right or
refused with the reason: whatever is missing, doubled, tilted or mixed is named, and made even only
when asked to (`repair`). No value that could identify a person enters a message.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, DataWarning
from medseg.files import MAX_BYTES, inside
from medseg.io.dicom.frames import parse
from medseg.io.dicom.headers import guarded, header_values, is_dicom, is_dicomdir
from medseg.io.dicom.pixels import stored_dtype_of, stored_pixels
from medseg.io.dicom.repair import check_repair, doubles, repaired
from medseg.io.dicom.series import Found, differences, find_volumes
from medseg.io.dicom.slices import CLASSIC, Slice, read_header
from medseg.io.dicom.source import Entry, Paths, Source, name_of
from medseg.io.dicom.stack import sorted_along_normal, stack
from medseg.io.dicom.suv import suv_factor
from medseg.io.voxels import check_axes, make_volume, rescale
from medseg.volume import Volume, orientation_of, spacing_of

__all__ = [
    "Listed",
    "Paths",
    "Slice",
    "list_volumes",
    "name_of",
    "ordered_slices",
    "read_dicom",
    "read_header",
]

#: So many images, each of a series of its own, are one scan whose UIDs are wrong.
_LONE_SERIES = 3
#: Suffixes of DICOM files, by which a file that is none is noticed.
_SUFFIXES = {".dcm", ".ima", ".dicom"}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A volume in a source. What could name a person is in `folder` and `description` alone, and
    not in its `repr`.
    """

    number: str  # what `series` takes: N, or N.M for a volume of a series that holds several
    # CT, MR, PT, XA, DX, MG, OT (secondary captures), or '' for images that are no scans.
    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None  # None where it cannot be said
    orientation: str
    problem: str  # why it cannot be read as it is, or ''
    repairable: bool  # whether it can be read with `repair`
    series_number: int = 0  # Series Number in the headers, 0 if they have none
    # That holds all its files, seen from the folder given.
    folder: str = field(default="", repr=False)
    # Series Description; for the terminal of who asks, and no file.
    description: str = field(default="", repr=False)


def read_dicom(
    path: Paths,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    series: str | int | None = None,
    repair: bool = False,
    suv: bool = False,
) -> Volume:
    """One CT, MR or PET volume of a folder (with its subfolders), a list of files, a zip, a
    DICOMDIR or one file.

    series: which, where there are several: N or N.M as `list_volumes` counts, or a Series Instance
    UID. volume_index: which volume of one series, from 0, as an alternative to M. repair: make
    uneven stacks even where that is well defined (see the module `repair`), with a `DataWarning`.
    suv: PET as standardised uptake values by body weight (g/mL).

    Axes: i along the rows of a slice, j down its columns, k along the normal of the slices. Values
    are scaled slice by slice (HU in CT, Bq/mL or what else the scanner gives in PET). Padding
    pixels become the lowest value of the others. Localizers, objects that are no images, and files
    that are no DICOM are set aside, with a `DataWarning` if they look as if they should be read.
    Raises `BadFile`.
    """
    with Source(path) as source:
        scan = _choose(source, *_found(source), series=series, volume_index=volume_index)
        name = source.name
        if scan.problem and not repair:
            raise BadFile(_with_remedy(source, scan))
        slices = list(scan.slices)
        if scan.problem:
            slices = _repairable(name, scan)
        data = _values(source, slices)
        for remark in scan.remarks:
            warnings.warn(f"{name}: {remark}", DataWarning, stacklevel=3)
        if suv:
            factor = suv_factor(source, scan.slices)
            data = (
                (data.astype(np.float64) * factor).astype(np.float32)
                if factor != 1
                else data.astype(np.float32)
            )
    affine = scan.affine
    if scan.problem:
        try:
            data, affine, repairs = repaired(slices, data)
        except BadFile as error:
            raise BadFile(_sentence(name, str(error))) from None
        repairs += [scan.assumed] if scan.assumed else []
        warnings.warn(f"{name}: was repaired: {'; '.join(repairs)}", DataWarning, stacklevel=3)
    return make_volume(name, data, affine if affine is not None else np.zeros((4, 4)))


def ordered_slices(
    path: Paths, *, series: str | int | None = None, volume_index: int | None = None
) -> list[Slice]:
    """The slices of a volume in the k order of the `Volume` that `read` returns for the same
    arguments.

    For writers of DICOM objects, which need the source's instances: `Slice` says which file
    (`path`, and `member` in a zip), which `frame` of it, and where it lies; `read_header` opens it.
    Raises `BadFile`, also for volumes that can only be read with `repair`: their voxels are in none
    of the source's slices.
    """
    return ordered_volume(path, series=series, volume_index=volume_index)[0]


def ordered_volume(
    path: Paths,
    *,
    series: str | int | None = None,
    volume_index: int | None = None,
    repair: bool = False,
) -> tuple[list[Slice], NDArray[np.float64]]:
    """As `ordered_slices`, with the affine (RAS+ mm) of their grid.

    repair: slices stored twice are there once, as in the volume that `read` returns with it; what
    it resamples is refused still.
    """
    with Source(path) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # given by `read`
        scan = _choose(source, *_found(source), series=series, volume_index=volume_index)
        slices, affine = list(scan.slices), scan.affine
        if scan.problem:
            if not repair:
                raise BadFile(_sentence(source.name, scan.problem))
            slices, affine = _once_each(source, scan)
        assert affine is not None
        return slices, affine


def located(
    path: Paths,
    *,
    series: str | int | None = None,
    volume_index: int | None = None,
    repair: bool = False,
) -> tuple[NDArray[np.float64], tuple[int, int, int], str]:
    """The affine (RAS+ mm), the shape and the Frame of Reference UID of what `read` returns for the
    same arguments.

    The UID is '' where the images have none, or several. Only what has to be repaired is read as a
    whole. Raises `BadFile`.
    """
    with Source(path) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # about the images, which are not what is read
        scan = _choose(source, *_found(source), series=series, volume_index=volume_index)
        if scan.problem and not repair:
            raise BadFile(_with_remedy(source, scan))
    systems = {piece.frame_of_reference for piece in scan.slices}
    frame_of_reference = systems.pop() if len(systems) == 1 else ""
    if scan.affine is None:
        volume = read_dicom(path, series=series, volume_index=volume_index, repair=True)
        return volume.affine, volume.shape, frame_of_reference
    first = scan.slices[0]
    return scan.affine, (first.columns, first.rows, len(scan.slices)), frame_of_reference


def _once_each(source: Source, found: Found) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices of an uneven volume that are the voxels of the repaired one, and its affine.
    Raises `BadFile`.
    """
    name = source.name
    slices = _repairable(name, found)
    if not _can_be_repaired(source, found):
        raise BadFile(_sentence(name, found.problem))
    copies = {second for _, second in doubles(slices)}
    try:
        return stack([piece for n, piece in enumerate(slices) if n not in copies])
    except BadFile:
        raise BadFile(
            f"{_sentence(name, found.problem)}; with --repair its voxels are none of its images',"
            " so no DICOM result can refer to them: choose another suffix"
        ) from None


def list_volumes(path: Paths) -> list[Listed]:
    """What `read_dicom` finds in a source. Raises `BadFile` only if there is no DICOM image in it.

    Files that are damaged are passed over with a `DataWarning`; `read_dicom` refuses them.
    """
    with Source(path) as source:
        volumes, errors = _found(source)
        if errors:
            warnings.warn(
                f"{source.name}: passed over damaged files: {len(errors)}",
                DataWarning,
                stacklevel=2,
            )
        return [_listed(source, volume) for volume in volumes]


def _listed(source: Source, volume: Found) -> Listed:
    first = volume.slices[0]
    affine = volume.affine
    repairable = bool(volume.problem) and _can_be_repaired(source, volume)
    return Listed(
        number=volume.number,
        modality=volume.modality,
        shape=(first.columns, first.rows, len(volume.slices)),
        spacing_mm=None if affine is None else spacing_of(affine),
        orientation="" if affine is None else orientation_of(affine),
        problem=_sentence(source.name, volume.problem) if volume.problem else "",
        repairable=repairable,
        series_number=first.series_number,
        folder=_folder(source, volume),
        description=first.description,
    )


def _folder(source: Source, volume: Found) -> str:
    """The folder that holds a volume's files, seen from the one that was given; '' for it itself,
    zips and lists.
    """
    if not source.is_folder:
        return ""
    inner = os.path.commonpath([piece.path.parent for piece in volume.slices])
    folder = os.path.relpath(inner, source.name)
    return "" if folder == os.curdir else folder


def _found(source: Source) -> tuple[list[Found], list[BadFile]]:
    """The volumes of a source, and what is wrong with the files of it that are damaged."""
    slices, errors = _slices(source)
    volumes, aside = find_volumes(source, slices)
    if aside:
        warnings.warn(
            f"{source.name}: set aside localizers and images that are no CT, MR or PET: {aside}",
            DataWarning,
            stacklevel=4,
        )
    return volumes, errors


def _slices(source: Source) -> tuple[list[Slice], list[BadFile]]:
    """What every image file of a source says about itself, and what is wrong with the damaged
    ones.
    """
    name = source.name
    _follow_dicomdir(source)
    content = _content(source)
    if not content.slices:
        if content.damaged:
            raise content.damaged[0]
        remedy = "give the folder that holds the series"
        if content.without_image and not source.is_file:
            remedy = f"only other objects; {remedy}, or a structure set by the name of its own file"
            raise BadFile(f"{name}: holds no DICOM images, {remedy}")
        raise BadFile(f"{name}: holds no DICOM images; {remedy}")
    if content.without_image:
        warnings.warn(
            f"{name}: passed over DICOM files that hold no image: {content.without_image}",
            DataWarning,
            stacklevel=5,
        )
    like_slices = _SUFFIXES | {source.suffix(piece.entry) for piece in content.slices}
    if count := sum(source.suffix(entry) in like_slices for entry in content.strange):
        warnings.warn(
            f"{name}: passed over files named like DICOM that are not: {count}",
            DataWarning,
            stacklevel=5,
        )
    return content.slices, content.damaged


@dataclass(kw_only=True)
class _Content:
    """What the files of a source are: slices of images, DICOM without an image, something else, or
    damaged.
    """

    slices: list[Slice] = field(default_factory=list)
    without_image: int = 0
    strange: list[Entry] = field(default_factory=list)
    damaged: list[BadFile] = field(default_factory=list)


def _content(source: Source) -> _Content:
    """Every file of a source, looked into. Raises `BadFile` for one of a list that is no file."""
    content = _Content()
    for entry in source.entries:
        if source.is_folder and not (entry.path.is_file() and entry.path.stat().st_size):
            content.strange.append(entry)
            continue
        try:
            _add_file(content, source, entry)
        except BadFile as error:
            if not source.is_folder and entry.member is None and not entry.path.is_file():
                raise
            content.damaged.append(error)
    return content


def _add_file(content: _Content, source: Source, entry: Entry) -> None:
    with source.open(entry) as file:
        if not is_dicom(file.read(132)):
            content.strange.append(entry)
            return
        pieces = parse(source, entry, file)
        content.slices += pieces or []
        content.without_image += pieces == []


def _follow_dicomdir(source: Source) -> None:
    """If the source is one DICOMDIR, make its entries the files that it refers to (PS3.3 F.3).
    Raises `BadFile`.
    """
    if len(source.entries) != 1 or source.entries[0].member is not None:
        return
    path = source.entries[0].path
    with source.open(source.entries[0]) as file:
        if not is_dicom(file.read(132)):
            return
    if not is_dicomdir(source, source.entries[0]):
        return
    header = header_values(source, source.entries[0], ["DirectoryRecordSequence"])
    if header.cut_off:
        raise BadFile(f"{path}: ends early; give the folder that holds the series")

    def names(dicom: object) -> list[str]:
        files = []
        for record in header.get("DirectoryRecordSequence") or []:
            parts = record.get("ReferencedFileID")
            if not parts and str(record.get("DirectoryRecordType") or "IMAGE") == "IMAGE":
                raise ValueError("an image without a file")
            if parts:
                files.append(
                    parts if isinstance(parts, str) else "/".join(str(part) for part in parts)
                )
        return files

    entries = []
    for name in guarded(str(path), names):
        try:
            entries.append(Entry(path=inside(path.parent, name)))
        except BadFile:
            raise BadFile(
                f"{path}: refers to a file that is missing or lies outside its folder; give the"
                " folder that holds the series"
            ) from None
    if not entries:
        raise BadFile(
            f"{path}: is a DICOMDIR that refers to no files; give the folder that holds the series"
        )
    source.entries = sorted(set(entries), key=lambda entry: str(entry.path))


def _choose(
    source: Source,
    found: Sequence[Found],
    damaged: Sequence[BadFile],
    *,
    series: str | int | None,
    volume_index: int | None,
) -> Found:
    """The one volume that is meant. Raises `BadFile` if that is not sure."""
    name = source.name
    if damaged:  # it may have been a slice of any volume
        raise damaged[0]
    volumes = list(found) if series is None else _of_series(name, found, str(series).strip())
    if volume_index is not None and len({volume.series for volume in volumes}) == 1:
        if not 0 <= volume_index < len(volumes):
            raise BadFile(
                f"{name}: has no volume {volume_index}; it holds {len(volumes)}, numbered from 0"
            )
        volumes = [volumes[volume_index]]
    if len(volumes) > 1:
        raise _ambiguous(source, volumes)
    if source.is_file and _is_lone_slice(volumes[0]):
        raise BadFile(
            f"{name}: is one DICOM file with one slice; give the folder that holds the whole series"
        )
    return volumes[0]


def _of_series(name: str, found: Sequence[Found], wanted: str) -> list[Found]:
    """The volume of a number, or those of a series by number or UID. Raises `BadFile` if there is
    none.
    """
    if volumes := [volume for volume in found if volume.number == wanted]:
        return volumes
    for volume in found:
        if wanted in (volume.number.split(".")[0], volume.series):
            volumes.append(volume)
    if not volumes:
        numbers = ", ".join(volume.number for volume in found[:20])
        raise BadFile(f"{name}: has no such series; it holds {numbers} (medseg info lists them)")
    return volumes


def _ambiguous(source: Source, volumes: Sequence[Found]) -> BadFile:
    """What to raise for several volumes: it names those that can be read, if any can."""
    sound = [volume for volume in volumes if not volume.problem]
    sound = sound or [volume for volume in volumes if _can_be_repaired(source, volume)]
    if not sound:
        return _no_choice(source.name, volumes)
    numbers = [volume.number for volume in sound]
    some = ", ".join(numbers[:10]) + (", ..." if len(numbers) > 10 else "")
    what = f"{source.name}: {differences(volumes)}"
    return BadFile(f"{what}; choose one with --series ({some}; medseg info lists them)")


def _no_choice(name: str, volumes: Sequence[Found]) -> BadFile:
    """What to raise for several volumes of which none can be read."""
    count = sum(len(volume.slices) for volume in volumes)
    if len({volume.series for volume in volumes}) == count >= _LONE_SERIES:
        return BadFile(  # careless anonymisers do it
            f"{name}: each of its {count} images has a Series Instance UID of its own, so they are"
            " no volume; export the series again"
        )
    what = differences(volumes)
    return BadFile(f"{name}: {what}, none of which can be read; medseg info says why of each")


def _is_lone_slice(volume: Found) -> bool:
    """Whether a volume is one classic slice with nothing else wrong with it."""
    if len(volume.slices) != 1 or volume.problem_of_slice:
        return False
    return volume.slices[0].sop_class in CLASSIC


def _sentence(name: str, problem: str) -> str:
    """A problem as a whole sentence: with the source's name, unless it names a file already."""
    return problem if problem.startswith(name) else f"{name}: {problem}"


def _with_remedy(source: Source, found: Found) -> str:
    text = _sentence(source.name, found.problem)
    if not _can_be_repaired(source, found):
        return text
    return f"{text}, or let --repair {'read them as one' if found.assumed else 'resample it'}"


def _can_be_repaired(source: Source, found: Found) -> bool:
    """Whether `repair` would work: the positions say so, and slices at one place hold the same
    pixels.
    """
    try:
        slices = _repairable(source.name, found)
        pairs = [slices[n] for pair in doubles(slices) for n in pair]
        pixels = stored_pixels(source, pairs)
        if not all(np.array_equal(one, other) for one, other in zip(pixels, pixels)):
            return False
    except BadFile:
        return False
    return True


def _repairable(name: str, found: Found) -> list[Slice]:
    """The slices in order along their normal. Raises `BadFile` if something other than their places
    is wrong.
    """
    if found.problem_of_slice:
        raise BadFile(_sentence(name, found.problem))
    try:
        check_repair(found.slices)
    except BadFile as error:
        raise BadFile(_sentence(name, str(error))) from None
    return sorted_along_normal(found.slices)[0]


def _values(source: Source, slices: Sequence[Slice]) -> NDArray:
    """The scaled values (I, J, K) of slices of one size and pixel format. Raises `BadFile`."""
    first = slices[0]
    check_axes(source.name, (first.columns, first.rows))
    if first.columns * first.rows * len(slices) * 4 > MAX_BYTES:
        raise BadFile(f"{source.name}: claims more than the {MAX_BYTES / 2**30:.3g} GB allowed")
    # Whose meaning is the same once they are scaled.
    formats = {piece.bits: piece for piece in slices}
    dtype = np.result_type(
        *[stored_dtype_of(source.where(piece.entry), piece) for piece in formats.values()]
    )
    # Memory is touched only as slices arrive, so a header that claims too much meets the end of its
    # file first.
    data = np.empty((first.columns, first.rows, len(slices)), dtype, order="F")
    inverted = first.photometric == "MONOCHROME1"
    order = sorted(
        range(len(slices)),
        key=lambda k: (str(slices[k].path), slices[k].member or 0, slices[k].frame, k),
    )
    for k, pixels in zip(order, stored_pixels(source, [slices[k] for k in order])):
        data[..., k] = pixels.T
    padding = _is_padding(data, slices)
    if inverted:
        # As GDCM does: the value that is as far from the top of the stored range as this one is
        # from the bottom.
        data = _turned_over(data, first)
        warnings.warn(
            f"{source.name}: its grey values are stored inverted (MONOCHROME1) and were turned"
            " over",
            DataWarning,
            stacklevel=4,
        )
    data = _scaled(source.name, data, slices)
    if padding is not None:
        data[padding] = data.min(where=~padding, initial=data.max())
    return data


def _is_padding(data: NDArray, slices: Sequence[Slice]) -> NDArray | None:
    """Which voxels stand for no pixel, or None if none or all do. A value of 0 is the scanner's own
    background.
    """
    if all(piece.padding in (None, (0, 0)) for piece in slices):
        return None
    padding = np.zeros(data.shape, bool, order="F")
    for k, piece in enumerate(slices):
        if piece.padding not in (None, (0, 0)):
            low, high = piece.padding or (0, 0)
            padding[..., k] = (data[..., k] >= low) & (data[..., k] <= high)
    return padding if padding.any() and not padding.all() else None


def _turned_over(data: NDArray, first: Slice) -> NDArray:
    _, stored, _, signed = first.bits
    top = np.array((1 << stored) - 1).astype(data.dtype) if not signed else np.array(-1, data.dtype)
    return top - data


def _scaled(name: str, data: NDArray, slices: Sequence[Slice]) -> NDArray:
    scales = {_scale(piece) for piece in slices}
    if len(scales) == 1:
        slope, intercept = scales.pop()
        if slope == 1 and intercept.is_integer() and data.dtype.itemsize == 2:
            ends = int(data.min()) + int(intercept), int(data.max()) + int(intercept)
            if ends[0] >= -32768 and ends[1] <= 32767:  # in place: a CT needs its memory once
                values = data.view(np.int16)
                # Wraps around to what is right.
                values += np.array(int(intercept)).astype(np.int16)
                return values
        return rescale(name, data, slope=slope, intercept=intercept)
    out = np.empty(data.shape, np.float32, order="F")  # PET: every slice has its own scale
    for k, piece in enumerate(slices):
        slope, intercept = _scale(piece)
        out[..., k] = data[..., k].astype(np.float64) * slope + intercept
    return out


def _scale(piece: Slice) -> tuple[float, float]:
    return (1.0 if piece.slope is None else piece.slope), (
        0.0 if piece.intercept is None else piece.intercept
    )
