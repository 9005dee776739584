"""Files that hold many slices: enhanced multi-frame images (PS3.3 C.7.6.16) and Siemens mosaics."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medseg.io.dicom_slice import MAX_FRAMES, Slice, Tile, echo_time, number, numbers, trait

# Dimensions that say where a frame lies, not which volume it belongs to: In-Stack Position Number, Image Position.
_PLACES = (0x00209057, 0x00200032)


def frames_of(first: Slice, dataset: Any) -> list[Slice]:
    """One slice per frame: from its own functional group, else from the shared one, else from the top level."""
    count = first.frames
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None)
    if not 1 <= count <= MAX_FRAMES or len(groups) != count:
        reason = "does not say where each of its frames lies; export the series again, one file per slice"
        return [replace(first, problem=reason)]
    pixels = replace(first.pixels, offsets=_offset_table(dataset, count))
    kinds = [int(item.get("DimensionIndexPointer") or 0) for item in dataset.get("DimensionIndexSequence") or []]
    base = replace(first, pixels=pixels)
    return [_frame(base, n, _Groups(group, shared, dataset), kinds) for n, group in enumerate(groups)]


class _Groups:
    """Looks tags up in a frame's functional groups."""

    def __init__(self, own: Any, shared: Any, dataset: Any) -> None:
        self._levels = [level for level in (own, shared) if level is not None]
        self._dataset = dataset

    def holder(self, sequence: str, tag: str) -> Any:
        """The data set in which `tag` stands: an item of `sequence`, or the top level if no group has it."""
        for level in self._levels:
            item = next(iter(level.get(sequence) or []), None)
            if item is not None and item.get(tag) not in (None, ""):
                return item
        return self._dataset

    def item(self, sequence: str) -> Any:
        """The item of `sequence`, the frame's own if it has one, or an empty mapping."""
        for level in self._levels:
            item = next(iter(level.get(sequence) or []), None)
            if item is not None:
                return item
        return {}


def _frame(first: Slice, n: int, groups: _Groups, kinds: Sequence[int]) -> Slice:
    measures = groups.holder("PixelMeasuresSequence", "PixelSpacing")
    plane = groups.holder("PlaneOrientationSequence", "ImageOrientationPatient")
    place = groups.holder("PlanePositionSequence", "ImagePositionPatient")
    slope = groups.holder("PixelValueTransformationSequence", "RescaleSlope")
    content = groups.item("FrameContentSequence")
    diffusion = groups.item("MRDiffusionSequence")
    direction: Any = next(iter(diffusion.get("DiffusionGradientDirectionSequence") or []), {})
    frame_type = next(
        (
            tuple(str(part).upper() for part in item.get("FrameType") or ())
            for item in map(
                groups.item,
                ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"),
            )
            if item
        ),
        (),
    )
    index = content.get("DimensionIndexValues")
    values = [int(index)] if isinstance(index, int) else [int(value) for value in index or ()]
    return replace(
        first,
        frame=n,
        spacing=numbers(measures, "PixelSpacing", 2),
        orientation=numbers(plane, "ImageOrientationPatient", 6),
        position=numbers(place, "ImagePositionPatient", 3),
        slope=number(slope, "RescaleSlope"),
        intercept=number(slope, "RescaleIntercept"),
        instance_number=(first.instance_number or 0) * MAX_FRAMES + n,
        image_type=frame_type or first.image_type,
        traits={
            "stack": str(content.get("StackID") or ""),
            "echo": echo_time(groups.item("MREchoSequence"), "EffectiveEchoTime") or first.traits.get("echo"),
            "b_value": trait(diffusion, "DiffusionBValue"),
            "gradient": trait(direction, "DiffusionGradientOrientation"),
            "temporal": trait(content, "TemporalPositionIndex"),
            "trigger": trait(groups.item("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"),
            "inversion": trait(groups.item("MRModifierSequence"), "InversionTimes"),
            "flip": trait(groups.item("MRTimingAndRelatedParametersSequence"), "FlipAngle"),
            "acquisition": trait(content, "FrameAcquisitionNumber"),
            "file": (first.instance_number or 0, str(first.path), first.member or 0),
            "dimensions": tuple(value for kind, value in zip(kinds, values) if kind not in _PLACES),
        },
    )


def _offset_table(dataset: Any, count: int) -> tuple[int, ...]:
    """Extended Offset Table (PS3.3 C.7.6.3.1.8): one 64-bit offset a frame."""
    table = dataset.get("ExtendedOffsetTable")
    if not isinstance(table, bytes) or len(table) != 8 * count:
        return ()
    return struct.unpack(f"<{count}Q", table)


def tiles_of(first: Slice, dataset: Any) -> list[Slice]:
    """The slices of a Siemens mosaic, which lie side by side in one picture.

    The file's position is that of a slice as large as the whole picture, so each tile's is half the difference further
    in; the direction of the stack is `SliceNormalVector` of Siemens' own header (as in nibabel's nicom, and dcm2niix).
    """
    reason = "is a Siemens mosaic whose own header is missing or odd; convert it with dcm2niix and give the NIfTI"
    own = _csa_header(dataset)
    counts, normal = own.get("NumberOfImagesInMosaic", []), own.get("SliceNormalVector", [])
    step = number(dataset, "SpacingBetweenSlices") or next(iter(own.get("SpacingBetweenSlices", [])), None)
    count = int(counts[0]) if counts and counts[0].is_integer() else 0
    across = math.isqrt(count - 1) + 1 if count > 0 else 1
    known = first.position and first.orientation and first.spacing and step
    if not (known and count > 1 and len(normal) == 3 and first.rows % across == 0 == first.columns % across):
        return [replace(first, problem=reason)]
    along, down = np.reshape(first.orientation or (), (2, 3))
    cross = np.cross(along, down)
    direction = np.array(normal)
    if abs(abs(float(direction @ cross)) - 1) > 1e-3:
        return [replace(first, problem=reason)]
    rows, columns = first.rows // across, first.columns // across
    between_rows, between_columns = first.spacing or (0.0, 0.0)
    corner = np.array(first.position) + along * between_columns * (first.columns - columns) / 2
    corner = corner + down * between_rows * (first.rows - rows) / 2
    return [
        replace(
            first,
            rows=rows,
            columns=columns,
            position=tuple((corner + direction * float(step or 0) * n).tolist()),
            tile=Tile(n, across, first.rows, first.columns),
            traits={**first.traits, "file": (first.instance_number or 0, str(first.path), first.member or 0)},
        )
        for n in range(count)
    ]


def _csa_header(dataset: Any) -> dict[str, list[float]]:
    """The numbers in Siemens' CSA image header (0029,xx10), second layout ('SV10'), by name; empty if there is none.

    The layout is described at https://nipy.org/nibabel/dicom/siemens_csa.html.
    """
    for block in (0x10, 0x11):
        creator, data = dataset.get((0x0029, block)), dataset.get((0x0029, block << 8 | 0x10))
        if creator is not None and data is not None and str(creator.value).strip() == "SIEMENS CSA HEADER":
            value = data.value
            if isinstance(value, bytes) and value[:4] == b"SV10":
                return _csa_elements(value)
    return {}


def _csa_elements(value: bytes) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
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
            found[name] = [float(text) for text in texts if text]
        except ValueError:
            continue  # a text
    return found
