"""A folder with one classic DICOM series: CT, MR or PET, one file per slice (DICOM PS3.3 C.7.6.2, C.7.6.3).

A series becomes a volume only if every slice agrees with every other; whatever is missing, doubled, tilted or mixed is
refused with the reason. No value that could identify a person enters a message.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, DataWarning
from medseg.io.dicom_slice import SOP_CLASSES, Slice, name_in, parse_slice, pixels_of, stored_dtype_of
from medseg.io.files import MAX_BYTES, open_file
from medseg.io.voxels import check_axes, make_volume, rescale
from medseg.volume import LPS, Volume

#: Steps between slices may differ from each other by this part of their median (rounded positions do).
MAX_STEP_DIFFERENCE = 0.01
#: A slice may lie this part of the smallest voxel edge away from where even steps would put it.
MAX_DRIFT = 0.05
#: Largest angle in radians between the stacking direction and the slices' normal that is still rounding.
MAX_TILT = 1e-3
_ENHANCED = (".2.1", ".2.2", ".4.1", ".4.3", ".4.4", ".128.1", ".130")


def read_dicom(path: str | Path, *, volume_index: int | None = None, assume_geometry: str | None = None) -> Volume:
    """The volume of a folder that holds one CT, MR or PET series, subfolders included. Raises `BadFile`.

    Axes: i along the rows of a slice, j down its columns, k along the normal of the slices. Values are rescaled slice
    by slice (HU in CT); padding pixels are left as they are. Files that are not DICOM are passed over; what is DICOM
    but no image, or looks like DICOM and is not, is passed over with a `DataWarning`.
    """
    if volume_index not in (None, 0):
        raise BadFile(f"{path}: is read as one volume, there is no volume {volume_index} in it")
    if not Path(path).is_dir():
        open_file(path).close()
        raise BadFile(f"{path}: is one DICOM file; give the folder that holds the whole series")
    slices = _slices(path)
    _check_alike(path, slices)
    ordered, affine = _stack(path, slices)
    first = ordered[0]
    check_axes(path, (first.columns, first.rows))
    if first.columns * first.rows * len(ordered) * 4 > MAX_BYTES:
        raise BadFile(f"{path}: claims more than the {MAX_BYTES / 2**30:.3g} GB allowed")
    data = np.empty((first.columns, first.rows, len(ordered)), stored_dtype_of(path, first), order="F")
    for k, piece in enumerate(ordered):
        data[..., k] = pixels_of(path, piece).T
    return make_volume(path, _rescaled(path, data, ordered), affine)


def ordered_slices(path: str | Path, *, series: str | None = None) -> list[Slice]:
    """The slices of a series in the k order of the `Volume` that `read` returns for the same arguments.

    For writers of DICOM objects, which need the source's instances: `Slice` says which file (`path`, and `member` in a
    zip), which `frame` of it, and where it lies; `dicom_slice.read_header` opens it. Raises `BadFile`.
    """
    slices = _slices(path)
    _check_alike(path, slices)
    return _stack(path, slices)[0]


def _slices(path: str | Path) -> list[Slice]:
    """What every image file below a folder says about itself."""
    files = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    if not files:
        raise BadFile(f"{path}: is an empty folder; give the folder that holds the series")
    slices, others, strange = [], 0, []
    for file in files:
        if not file.is_file() or file.stat().st_size == 0:
            strange.append(file)
            continue
        with open_file(file) as opened:
            start = opened.read(132)
        if start[128:] != b"DICM" and start[:2] not in (b"\x08\x00", b"\x02\x00"):  # files without preamble exist
            strange.append(file)
            continue
        piece = parse_slice(path, file, has_preamble=start[128:] == b"DICM")
        if piece is None:
            others += 1
        else:
            slices.append(piece)
    if not slices:
        raise BadFile(f"{path}: holds no DICOM images; give the folder that holds the series")
    if others:
        warnings.warn(f"{path}: passed over DICOM files that hold no image: {others}", DataWarning, stacklevel=4)
    like_slices = {".dcm", ".ima", ".dicom"} | {piece.path.suffix.lower() for piece in slices}
    if broken := sum(file.suffix.lower() in like_slices for file in strange):
        warnings.warn(f"{path}: passed over files named like DICOM that are not: {broken}", DataWarning, stacklevel=4)
    return slices


def _check_alike(path: str | Path, slices: list[Slice]) -> None:
    """Raise `BadFile` unless all slices are plain CT, MR or PET images of one series, size and orientation."""
    series = len({piece.series for piece in slices})
    if series > 1:
        raise BadFile(f"{path}: holds {series} series; put each into a folder of its own")
    for piece in slices:
        where = name_in(path, piece.path)
        tail = piece.sop_class.removeprefix("1.2.840.10008.5.1.4.1.1")
        if piece.frames > 1 or tail in _ENHANCED:
            raise BadFile(f"{where}: holds many slices in one file; medseg reads series of one file per slice")
        if piece.samples != 1 or not piece.photometric.startswith("MONOCHROME"):
            raise BadFile(f"{where}: is a colour image; give the original series in grey values")
        if piece.sop_class not in SOP_CLASSES:
            raise BadFile(f"{where}: is not a CT, MR or PET image; give the original series")
        if piece.localizer:
            raise BadFile(f"{where}: is a localizer, not a slice; move it out of the folder")
        if piece.photometric != "MONOCHROME2":
            raise BadFile(f"{where}: its grey values are stored inverted; give the original series")
        if piece.has_lookup:
            raise BadFile(f"{where}: its values need a lookup table, which medseg does not apply; export it again")
        if piece.position is None or piece.orientation is None or piece.spacing is None:
            raise BadFile(f"{where}: does not say where its slice lies or how large its pixels are; export it again")
        if not (piece.slope and math.isfinite(piece.slope) and math.isfinite(piece.intercept)):
            raise BadFile(f"{where}: the scaling of its values is impossible; export it again")
    same: dict[str, Callable[[Slice], object]] = {
        "kinds of image": lambda piece: piece.sop_class,
        "coordinate systems": lambda piece: piece.frame_of_reference,
        "sizes": lambda piece: (piece.rows, piece.columns),
        "pixel formats": lambda piece: piece.bits,
    }
    for what, key in same.items():
        if len({key(piece) for piece in slices}) > 1:
            raise BadFile(f"{path}: mixes slices of different {what}; put each set into a folder of its own")
    for what, values, tolerance in (
        ("orientations", np.array([piece.orientation for piece in slices]), 1e-4),
        ("pixel spacings", np.array([piece.spacing for piece in slices]), 1e-4),
    ):
        if np.ptp(values, axis=0).max() > tolerance:
            raise BadFile(f"{path}: mixes slices of different {what}; put each set into a folder of its own")
    if len(slices) < 3:  # of two, nothing confirms the distance
        raise BadFile(f"{path}: holds {len(slices)} slices, too few for a volume; give the whole series")


def _stack(path: str | Path, slices: list[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices in order along their normal, and voxel index to RAS+ mm. Raises `BadFile` for an uneven stack."""
    along_row, down_column = np.reshape(slices[0].orientation or (), (2, 3))
    gram = np.array([along_row @ along_row, down_column @ down_column, along_row @ down_column])
    if np.abs(gram - (1, 1, 0)).max() > 2e-3:
        raise BadFile(f"{path}: the directions of its slices are not at right angles; export the series again")
    normal = np.cross(along_row, down_column)
    ordered = sorted(slices, key=lambda piece: float(normal @ np.array(piece.position)))
    positions = np.array([piece.position for piece in ordered])
    steps = np.diff(positions @ normal)
    step = float(np.median(steps))
    if steps.min() < 1e-2:
        raise BadFile(
            f"{path}: several slices lie at the same place; it holds more than one volume (times, echoes, directions), "
            "give one of them"
        )
    uneven = np.abs(steps - step) > MAX_STEP_DIFFERENCE * step
    if uneven.any():
        ratios = steps[uneven] / step
        if (np.abs(ratios - np.rint(ratios)) < 0.05).all() and (ratios > 1.5).all():
            count = int(np.rint(ratios).sum() - len(ratios))
            raise BadFile(f"{path}: {count} slices are missing; export the series again")
        raise BadFile(f"{path}: the distances between its slices differ; give a series of even distances")
    whole = positions[-1] - positions[0]
    tilt = math.acos(min(1.0, float(whole @ normal / np.linalg.norm(whole) / np.linalg.norm(normal))))
    if tilt > MAX_TILT:
        raise BadFile(
            f"{path}: its slices are stacked at a slant of {math.degrees(tilt):.1f} degrees (gantry tilt); "
            "give a series that was corrected for it"
        )
    between = whole / (len(ordered) - 1)
    row_spacing, column_spacing = slices[0].spacing or (0.0, 0.0)
    even = positions[0] + np.arange(len(ordered))[:, None] * between
    drift = float(np.linalg.norm(positions - even, axis=1).max())
    if drift > MAX_DRIFT * min(row_spacing, column_spacing, step):
        raise BadFile(f"{path}: its slices do not lie on one straight line; give a series of even distances")
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = down_column * row_spacing
    affine[:3, 2] = between
    affine[:3, 3] = positions[0]
    return ordered, LPS @ affine


def _rescaled(path: str | Path, data: NDArray, ordered: list[Slice]) -> NDArray:
    scales = {(piece.slope, piece.intercept) for piece in ordered}
    if len(scales) == 1:
        return rescale(path, data, *scales.pop())
    out = np.empty(data.shape, np.float32, order="F")  # PET: every slice has its own scale
    for k, piece in enumerate(ordered):
        out[..., k] = data[..., k].astype(np.float64) * piece.slope + piece.intercept
    return out
