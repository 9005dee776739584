"""Files that hold many slices: enhanced multi-frame images (PS3.3 C.7.6.16) and Siemens mosaics."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.headers import (
    DICOMDIR,
    dataset_of,
    echo_time,
    guarded,
    length,
    number,
    numbers,
    sop_class_of,
    trait,
)
from medseg.io.dicom.slices import (
    ENHANCED,
    MAX_FRAMES,
    SOP_CLASSES,
    TAGS,
    XRAY_3D,
    Slice,
    Tile,
    slice_of,
)
from medseg.io.dicom.source import Entry, Source

_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
# Dimensions that say where a frame lies, not which volume it belongs to: In-Stack Position Number,
# Image Position.
_PLACES = (0x00209057, 0x00200032)


def frames_of(first: Slice, dataset: Any) -> list[Slice]:
    """One slice per frame: from its own functional group, else from the shared one, else from the
    top level.
    """
    count = first.frames
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None)
    if not 1 <= count <= MAX_FRAMES or len(groups) != count:
        reason = (
            "does not say where each of its frames lies; export the series again, one file per"
            " slice"
        )
        return [replace(first, problem=reason)]
    pixels = replace(first.pixels, offsets=_offset_table(dataset, count))
    kinds = [
        int(item.get("DimensionIndexPointer") or 0)
        for item in dataset.get("DimensionIndexSequence") or []
    ]
    base = replace(first, pixels=pixels)
    slices = []
    for n, own in enumerate(groups):
        slices.append(_frame(base, n, groups=_Groups(own, shared, dataset), kinds=kinds))
    return slices


class _Groups:
    """Looks tags up in a frame's functional groups."""

    def __init__(self, own: Any, shared: Any, dataset: Any) -> None:
        self._levels = [level for level in (own, shared) if level is not None]
        self.dataset = dataset

    def holder(self, sequence: str, tag: str) -> Any:
        """The data set in which `tag` stands: an item of `sequence`, or the top level if no group
        has it.
        """
        for level in self._levels:
            item = next(iter(level.get(sequence) or []), None)
            if item is not None and item.get(tag) not in (None, ""):
                return item
        return self.dataset

    def found(self, sequence: str) -> Any:
        """The item of `sequence`, the frame's own if it has one, or None."""
        items = (next(iter(level.get(sequence) or []), None) for level in self._levels)
        return next((item for item in items if item is not None), None)

    def item(self, sequence: str) -> Any:
        """The item of `sequence`, the frame's own if it has one, or an empty mapping."""
        item = self.found(sequence)
        return {} if item is None else item


def _frame(first: Slice, n: int, *, groups: _Groups, kinds: Sequence[int]) -> Slice:
    measures = groups.holder("PixelMeasuresSequence", "PixelSpacing")
    plane = groups.holder("PlaneOrientationSequence", "ImageOrientationPatient")
    # A position at the top level is that of one frame, and nothing says of which, unless there is
    # but one.
    place = groups.holder("PlanePositionSequence", "ImagePositionPatient")
    place = {} if place is groups.dataset and first.frames > 1 else place
    slope, intercept = _scale_of(groups)
    content = groups.item("FrameContentSequence")
    diffusion = groups.item("MRDiffusionSequence")
    direction: Any = next(iter(diffusion.get("DiffusionGradientDirectionSequence") or []), {})
    frame_type = _frame_type(groups)
    dimensions = _dimensions(content, kinds)
    return replace(
        first,
        frame=n,
        spacing=numbers(measures, "PixelSpacing", 2),
        step_mm=length(measures, "SpacingBetweenSlices") or first.step_mm,
        thickness_mm=length(measures, "SliceThickness") or first.thickness_mm,
        orientation=numbers(plane, "ImageOrientationPatient", 6),
        position=numbers(place, "ImagePositionPatient", 3),
        slope=slope,
        intercept=intercept,
        instance_number=(first.instance_number or 0) * MAX_FRAMES + n,
        image_type=frame_type or first.image_type,
        traits={
            "stack": str(content.get("StackID") or ""),
            "echo": _effective_echo(groups) or first.traits.get("echo"),
            "b_value": trait(diffusion, "DiffusionBValue"),
            "gradient": trait(direction, "DiffusionGradientOrientation"),
            "temporal": trait(content, "TemporalPositionIndex"),
            "trigger": trait(
                groups.item("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"
            ),
            "inversion": trait(groups.item("MRModifierSequence"), "InversionTimes"),
            "flip": trait(groups.item("MRTimingAndRelatedParametersSequence"), "FlipAngle"),
            "acquisition": trait(content, "FrameAcquisitionNumber"),
            "file": _file_key(first),
            "dimensions": dimensions,
        },
    )


def _scale_of(groups: _Groups) -> tuple[float | None, float | None]:
    """Slope and intercept of a frame; 0 and 0, which is refused later, where they lack one."""
    transformation = groups.found("PixelValueTransformationSequence")
    scaling = groups.dataset if transformation is None else transformation
    slope, intercept = number(scaling, "RescaleSlope"), number(scaling, "RescaleIntercept")
    if transformation is not None and None in (slope, intercept):  # both are required there
        return 0.0, 0.0
    return slope, intercept


def _frame_type(groups: _Groups) -> tuple[str, ...]:
    """The Frame Type from the sequence of the kind of scan, () if there is none."""
    item: Any = next(filter(None, map(groups.item, _FRAME_TYPES)), {})
    return tuple(str(part).upper() for part in item.get("FrameType") or ())


def _dimensions(content: Any, kinds: Sequence[int]) -> tuple[int, ...]:
    """The dimension indices of a frame but for those that say where it lies."""
    index = content.get("DimensionIndexValues")
    values = [index] if isinstance(index, int) else list(map(int, index or ()))
    return tuple(value for kind, value in zip(kinds, values) if kind not in _PLACES)


def _effective_echo(groups: _Groups) -> Any:
    return echo_time(groups.item("MREchoSequence"), "EffectiveEchoTime")


def _file_key(first: Slice) -> tuple[int, str, int]:
    """What tells the files of a series apart, in the order of their Instance Numbers."""
    return first.instance_number or 0, str(first.path), first.member or 0


def _offset_table(dataset: Any, count: int) -> tuple[int, ...]:
    """Extended Offset Table (PS3.3 C.7.6.3.1.8): one 64-bit offset a frame."""
    table = dataset.get("ExtendedOffsetTable")
    if not isinstance(table, bytes) or len(table) != 8 * count:
        return ()
    return struct.unpack(f"<{count}Q", table)


def tiles_of(first: Slice, dataset: Any) -> list[Slice]:
    """The slices of a Siemens mosaic, which lie side by side in one picture.

    The file's position is that of a slice as large as the whole picture, so each tile's is half the
    difference further in (as in nibabel's nicom, and dcm2niix). Number and direction of the slices
    are `SliceNormalVector` of Siemens' own header or, without that, the places of the slices in the
    protocol.
    """
    reason = (
        "is a Siemens mosaic whose own header is missing or odd; convert it with dcm2niix and give"
        " the NIfTI"
    )
    whole = [replace(first, problem=reason)]
    if not (first.position and first.orientation and first.spacing):
        return whole
    own, centres = _csa_header(dataset), _protocol_centres(dataset)
    count = _tile_count(own, centres)
    across = math.isqrt(count - 1) + 1 if count > 0 else 1
    if not 2 <= count <= MAX_FRAMES or first.rows % across or first.columns % across:
        return whole
    step = _tile_step(own, dataset)
    along, down = np.reshape(first.orientation, (2, 3))
    rows, columns = first.rows // across, first.columns // across
    to_next_row, to_next_column = down * first.spacing[0], along * first.spacing[1]
    corner = np.array(first.position) + to_next_column * (first.columns - columns) / 2
    corner = corner + to_next_row * (first.rows - rows) / 2
    centre = corner + to_next_column * columns / 2 + to_next_row * rows / 2
    direction = _stacking_direction(own, centres, count=count, centre=centre)
    if direction is None or step <= 0:
        return whole
    if abs(abs(float(direction @ np.cross(along, down))) - 1) > 1e-3:
        return whole
    return [
        replace(
            first,
            rows=rows,
            columns=columns,
            position=tuple((corner + direction * step * n).tolist()),
            tile=Tile(number=n, across=across, rows=first.rows, columns=first.columns),
            traits={**first.traits, "file": _file_key(first)},
        )
        for n in range(count)
    ]


def _tile_count(own: dict[str, list[float]], centres: NDArray) -> int:
    """How many slices a mosaic holds, by Siemens' own header or else by the protocol."""
    counts = own.get("NumberOfImagesInMosaic", [])
    return int(counts[0]) if counts and counts[0].is_integer() else len(centres)


def _tile_step(own: dict[str, list[float]], dataset: Any) -> float:
    """How far the slices of a mosaic lie apart in mm; 0 where nothing says."""
    step = number(dataset, "SpacingBetweenSlices")
    return float(step or next(iter(own.get("SpacingBetweenSlices", [])), 0.0))


def _stacking_direction(
    own: dict[str, list[float]], centres: NDArray, *, count: int, centre: NDArray
) -> NDArray[np.float64] | None:
    """Where the slices of a mosaic follow the first one, whose centre is `centre`; None if nothing
    says.
    """
    normal = own.get("SliceNormalVector", [])
    if len(normal) == 3:
        return np.array(normal)
    return _from_first(centres, centre) if len(centres) == count else None


def _from_first(centres: NDArray, centre: NDArray) -> NDArray[np.float64]:
    """The direction in which slices follow the one at `centre`, which is at one end of the
    protocol's; else zero.
    """
    sequence = (
        centres
        if np.linalg.norm(centres[0] - centre) < np.linalg.norm(centres[-1] - centre)
        else centres[::-1]
    )
    step = sequence[1] - sequence[0]
    length = float(np.linalg.norm(step))
    if length == 0 or np.linalg.norm(sequence[0] - centre) > length / 4:
        return np.zeros(3)
    return np.asarray(step / length, dtype=np.float64)


def _protocol_centres(dataset: Any) -> NDArray[np.float64]:
    """Where the protocol in Siemens' series header (0029,xx20) puts the centres of the slices, LPS
    mm (N, 3).
    """
    for block in (0x10, 0x11):
        element = dataset.get((0x0029, block << 8 | 0x20))
        value = element.value if element is not None else None
        if isinstance(value, bytes) and (
            size := re.search(rb"sSliceArray\.lSize\s*=\s*(\d{1,4})\b", value)
        ):
            count = min(int(size[1]), 1000)
            centres = np.zeros((count, 3))  # what is not written is 0
            pattern = (
                rb"sSliceArray\.asSlice\[(\d{1,3})\]\.sPosition\.d(Sag|Cor|Tra)"
                rb"\s*=\s*(-?[\d.]{1,20}(?:e[-+]?\d{1,2})?)"
            )
            for n, axis, text in re.findall(pattern, value):
                if int(n) < count:
                    centres[int(n), (b"Sag", b"Cor", b"Tra").index(axis)] = float(text)
            return centres
    return np.zeros((0, 3))


def _csa_header(dataset: Any) -> dict[str, list[float]]:
    """The numbers in Siemens' CSA image header (0029,xx10), second layout ('SV10'), by name; empty
    if there is none.

    The layout is described at https://nipy.org/nibabel/dicom/siemens_csa.html.
    """
    # Anonymisers drop the private creator, so the layout's own mark has to do.
    for block in (
        0x10,
        0x11,
    ):
        element = dataset.get((0x0029, block << 8 | 0x10))
        value = element.value if element is not None else None
        if isinstance(value, bytes) and value[:4] == b"SV10":
            return _csa_elements(value)
    return {}


def _csa_elements(value: bytes) -> dict[str, list[float]]:
    elements: dict[str, list[float]] = {}
    (count,) = struct.unpack_from("<I", value, 8)
    place = 16
    for _ in range(min(count, 1000)):
        name = value[place : place + 64].split(b"\0")[0].decode("ascii", "replace")
        items = struct.unpack_from("<i", value, place + 76)[0]
        place += 84
        texts = []
        for _ in range(min(max(items, 0), 1000)):
            (length,) = struct.unpack_from("<i", value, place + 4)
            texts.append(value[place + 16 : place + 16 + max(length, 0)].split(b"\0")[0].strip())
            place += 16 + (max(length, 0) + 3) // 4 * 4
        try:
            elements[name] = [float(text) for text in texts if text]
        except ValueError:
            continue  # a text
    return elements


def _slices_in(first: Slice, dataset: Any) -> list[Slice]:
    """The slices of a file: frames, tiles of a mosaic, or the one at its top level."""
    many = first.sop_class in ENHANCED | XRAY_3D or first.frames > 1
    if many or (first.position is None and dataset.get("PerFrameFunctionalGroupsSequence")):
        return frames_of(first, dataset)
    return tiles_of(first, dataset) if "MOSAIC" in first.image_type else [first]


def parse(source: Source, entry: Entry, file: Any) -> list[Slice] | None:
    """The slices of an open DICOM file, empty if it holds no image, None for a DICOMDIR. Raises
    `BadFile`.
    """
    where = source.where(entry)

    def work(dicom: Any) -> list[Slice] | None:
        dataset, pixels = dataset_of(dicom, file, where=where, tags=TAGS)
        sop_class = sop_class_of(dataset)
        if dataset.media_class == DICOMDIR:
            return None
        unsure = not sop_class or (dataset.cut_off and sop_class in SOP_CLASSES)
        if pixels is None and unsure:
            raise BadFile(
                f"{where}: ends early; it is incomplete, export the series again and give its"
                " folder"
            )
        if dataset.get("Rows") is None and sop_class not in SOP_CLASSES:
            return []
        return _slices_in(slice_of(entry, dataset, pixels), dataset)

    slices: list[Slice] | None = guarded(where, work)
    return slices
