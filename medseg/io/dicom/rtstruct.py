"""DICOM radiotherapy structure sets (RTSTRUCT, PS3.3 A.19 and C.8.8.5): contours from label maps,
and back.

Written contours run halfway between the centres of the pixels inside and outside, on the planes of
the source's slices and no others; a hole is joined to the outline around it by a keyhole, a channel
of no width, as CLOSED_PLANAR contours have it: every rule of filling then gives the same pixels.
Read contours fill the pixels whose centres they enclose, by the even-odd rule over all contours of
a structure in one plane, so that holes drawn as contours of their own (XOR) are holes as well.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning
from medseg.io.dicom.codes import category_of, code_item, read_codes, table_of, text, type_of
from medseg.io.dicom.grid import ImageGrid, open_grid
from medseg.io.dicom.headers import guarded
from medseg.io.dicom.outlines import outlines
from medseg.io.dicom.result import (
    DicomOptions,
    Origin,
    complete,
    decimal,
    digits_for,
    moment,
    open_origin,
    planes_on_source,
    read_object,
    save,
    without_warnings,
)
from medseg.io.dicom.seg import algorithm_item, present_labels
from medseg.io.dicom.slices import RTSTRUCT_CLASS
from medseg.io.dicom.source import Paths
from medseg.io.voxels import Overlap, chosen, labels_only, make_volume
from medseg.volume import Volume, value_counts

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_IMPLICIT = (  # explicit lengths of decimal strings end at 64 kB, which is 2,000 points
    "1.2.840.10008.1.2"
)
#: Group, element and length of an element in implicit VR, little endian.
_HEAD = struct.Struct("<HHI")
#: A contour may lie this part of the distance between slices off the plane of a slice.
MAX_OFF_PLANE = 0.1
#: Most crossings of contours and rows that are looked at together, which bounds the memory that
#: takes.
MAX_CROSSINGS = 1 << 20


def write_rtstruct(
    volume: Volume,
    path: str | Path,
    *,
    table: LabelTable | None = None,
    source: Paths | None = None,
    options: DicomOptions | None = None,
) -> None:
    """Write a label map as the structure set of the series at `source`. Raises `BadOutput`,
    `BadFile`.

    volume: labels on the source's grid, stored in any of the 48 ways, or a block of it. Labels that
    occur become structures; of a map without any, the table's first (or label 1) becomes one
    without contours.
    """
    if source is None:
        raise BadOutput(
            f"{path}: a DICOM result refers to the series it was made from; give it with --source"
        )
    save(rtstruct_dataset(volume, open_origin(source, options), path, table=table), path)


def rtstruct_dataset(
    volume: Volume, origin: Origin, path: str | Path, *, table: LabelTable | None = None
) -> Any:
    """The structure set as a dataset; `path` is what errors name. Raises `BadOutput`."""
    try:
        labels = labels_only(path, volume)
    except BadFile as error:
        raise BadOutput(f"{error}; a structure set holds a label map only") from None
    planes = planes_on_source(labels, origin, path)
    with without_warnings(path):
        return _dataset(planes, origin, present_labels(planes, table))


def _dataset(planes: NDArray, origin: Origin, labels: list[Label]) -> Any:
    from scipy import ndimage

    boxes = dict(enumerate(ndimage.find_objects(planes), 1))
    dataset = _file(origin, planes, labels)
    date, time = moment(origin)
    dataset.Modality = "RTSTRUCT"
    dataset.OperatorsName = ""
    dataset.StructureSetLabel = "medseg"
    dataset.StructureSetName = text(f"medseg {origin.options.model}".strip())
    dataset.StructureSetDate, dataset.StructureSetTime = date, time
    dataset.ReferencedFrameOfReferenceSequence = [_referenced(origin)]
    mm3 = abs(float(np.linalg.det(origin.affine[:3, :3])))
    counts = value_counts(planes)
    dataset.StructureSetROISequence = [
        _roi(origin, label, mm3 * (counts[label.value] if label.value < len(counts) else 0))
        for label in labels
    ]
    dataset.ROIContourSequence = [
        _contours(planes, origin, label, box=boxes.get(label.value)) for label in labels
    ]
    dataset.RTROIObservationsSequence = [
        _observation(number, label) for number, label in enumerate(labels, 1)
    ]
    dataset.ApprovalStatus = "UNAPPROVED"
    complete(dataset, origin, "RTSTRUCT")
    _as_it_is(dataset)
    return dataset


def _file(origin: Origin, planes: NDArray, labels: list[Label]) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset

    content = hashlib.sha256(planes.tobytes() + repr(labels).encode()).hexdigest()
    dataset = Dataset()
    dataset.SOPClassUID = RTSTRUCT_CLASS
    dataset.SOPInstanceUID = origin.new_uid("RTSTRUCT", content)
    dataset.SeriesInstanceUID = origin.new_uid("series", "RTSTRUCT", content)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = _IMPLICIT
    dataset.file_meta.MediaStorageSOPClassUID = RTSTRUCT_CLASS
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _referenced(origin: Origin) -> Any:
    from pydicom.dataset import Dataset

    series = Dataset()
    series.SeriesInstanceUID = origin.series
    series.ContourImageSequence = origin.references()
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, origin.study
    study.RTReferencedSeriesSequence = [series]
    item = Dataset()
    item.FrameOfReferenceUID = origin.frame_of_reference
    item.RTReferencedStudySequence = [study]
    return item


def _roi(origin: Origin, label: Label, mm3: float) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ROINumber = label.value
    item.ReferencedFrameOfReferenceUID = origin.frame_of_reference
    item.ROIName = text(label.name)
    item.ROIVolume = decimal(mm3 / 1000, 6)  # cm³
    item.ROIGenerationAlgorithm = "AUTOMATIC" if origin.options.model else ""
    if origin.options.model:
        item.ROIDerivationAlgorithmIdentificationSequence = [algorithm_item(origin.options)]
    return item


def _observation(number: int, label: Label) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ObservationNumber = number
    item.ReferencedROINumber = label.value
    category, kind = category_of(label), code_item(type_of(label))
    if label.type_modifier is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [code_item(label.type_modifier)]
    item.SegmentedPropertyCategoryCodeSequence = [code_item(category)]
    item.RTROIIdentificationCodeSequence = [kind]
    if label.region is not None:
        item.AnatomicRegionSequence = [code_item(label.region)]
        if label.region_modifier is not None:
            item.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [
                code_item(label.region_modifier)
            ]
    item.RTROIInterpretedType = "ORGAN" if category[:2] == ("SCT", "123037004") else ""
    item.ROIInterpreter = ""
    return item


def _contours(
    planes: NDArray, origin: Origin, label: Label, *, box: tuple[slice, ...] | None
) -> Any:
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag

    item = Dataset()
    item.ReferencedROINumber = label.value
    item.ROIDisplayColor = list(label.color)
    contours: list[bytes] = []
    for k in range(box[0].start, box[0].stop) if box else ():
        assert box is not None
        for outline in outlines(planes[k][box[1:]] == label.value):
            outline += (box[1].start, box[2].start)
            contours.append(_contour(origin, k, outline, number=len(contours) + 1))
    if contours:
        value = b"".join(contours)
        tag = Tag("ContourSequence")
        item[tag] = RawDataElement(
            tag=tag,
            VR="SQ",
            length=len(value),
            value=value,
            value_tell=0,
            is_implicit_VR=True,
            is_little_endian=True,
        )
    _as_it_is(item)
    return item


def _as_it_is(dataset: Any) -> None:
    """Let pydicom write what a dataset holds as bytes as those bytes, instead of making objects of
    every number.
    """
    dataset.set_original_encoding(True, True, dataset._character_set)


def _contour(origin: Origin, k: int, outline: NDArray[np.float64], *, number: int) -> bytes:
    """An item of the Contour Sequence for an outline (P, 2) of rows and columns on slice k, in
    implicit VR.

    Written out here because there may be tens of thousands with hundreds of points each.
    """
    piece = origin.slices[k]
    assert piece.position and piece.spacing
    along_row, down_column = np.reshape(origin.slices[0].orientation or (), (2, 3))
    points = piece.position + outline[:, 1:] * (along_row * piece.spacing[1])
    points = points + outline[:, :1] * (down_column * piece.spacing[0])
    digits = digits_for(min(piece.spacing))
    reference = _element(0x0008, 0x1150, piece.sop_class, padding="\0")
    reference += _element(0x0008, 0x1155, origin.uid(piece.sop_instance), padding="\0")
    if piece.frames > 1:
        reference += _element(0x0008, 0x1160, str(piece.frame + 1))
    return _item(
        _element(0x3006, 0x0016, _item(reference))
        + _element(0x3006, 0x0042, "CLOSED_PLANAR")
        + _element(0x3006, 0x0046, str(len(outline)))
        + _element(0x3006, 0x0048, str(number))
        + _element(
            0x3006, 0x0050, "\\".join(decimal(number, digits) for number in points.ravel().tolist())
        )
    )


def _element(group: int, element: int, value: str | bytes, *, padding: str = " ") -> bytes:
    """An element in implicit VR, little endian (PS3.5 7.1.3)."""
    if isinstance(value, str):
        value = (value + padding * (len(value) % 2)).encode("ascii")
    return _HEAD.pack(group, element, len(value)) + value


def _item(content: bytes) -> bytes:
    return _HEAD.pack(0xFFFE, 0xE000, len(content)) + content


def read_rtstruct(
    path: str | Path,
    *,
    source: Paths | None = None,
    series: str | int | None = None,
    repair: bool = False,
    volume_index: int | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """The label map of a structure set on the grid of the series at `source`, as uint8 or uint16.
    Raises `BadFile`.

    series, repair: which volume of the source, and how to read it, as for `read`. segments: only
    these structures, by name or label value, laid over each other in this order. Without it,
    structures that share voxels are refused. A pixel belongs to a structure if an odd number of its
    contours in that plane are around the pixel's centre; a centre on a contour counts where the
    structure lies right of it or below. A contour that is stored twice counts once, and contours
    beyond the images are left out, each with a `DataWarning`; those between two slices are refused.
    """
    if volume_index not in (None, 0):
        raise BadFile(f"{path}: is one structure set, there is no volume {volume_index} in it")
    grid, layers, table = _layers(path, source, series=series, repair=repair, segments=segments)
    out = np.zeros(grid.shape, np.uint16, order="F")
    shared = 0
    for value in chosen(path, table, segments):
        for k, plane in layers.get(value, {}).items():
            target = out[..., k].T
            shared += int((plane & (target > 0)).sum())
            target[plane] = value
    if shared and segments is None:
        raise Overlap(path, shared)
    return labels_only(path, make_volume(path, out, grid.affine))


def read_structures(
    path: str | Path, *, source: Paths | None, series: str | int | None = None, repair: bool = False
) -> Iterator[tuple[Label, Volume]]:
    """Every structure as a mask of its own (uint8, 0 and 1) on the grid of `source`, overlaps kept,
    one after the other.
    """
    grid, layers, table = _layers(path, source, series=series, repair=repair)

    def mask_of(label: Label) -> Volume:
        mask = np.zeros(grid.shape, np.uint8, order="F")
        for k, plane in layers.get(label.value, {}).items():
            mask[..., k] = plane.T
        return make_volume(path, mask, grid.affine)

    return ((label, mask_of(label)) for label in table.labels)


def read_rtstruct_table(path: str | Path) -> LabelTable:
    """Names, colours and codes of a structure set, values as `read_rtstruct` gives them. Raises
    `BadFile`.
    """
    table: LabelTable = guarded(str(path), lambda dicom: _table(path, _structures(path, dicom))[0])
    return table


#: Slice to the pixels (rows, columns) that a structure fills there.
_Layers = dict[int, NDArray[np.bool_]]
_OPEN = "contours that enclose nothing"
_ASIDE = "contours that reach beyond the images, cut off there"
_BEYOND = "contours beyond the first or the last image, left out"
_AGAIN = "contours stored twice, counted once"


def _layers(
    path: str | Path,
    source: Paths | None,
    *,
    series: str | int | None,
    repair: bool,
    segments: Sequence[str] | None = None,
) -> tuple[ImageGrid, dict[int, _Layers], LabelTable]:
    """The grid of the images, the filled planes of every wanted label by slice, and the table of
    all.
    """
    if source is None:
        raise BadFile(
            f"{path}: holds contours, which only make sense on their images; give the series with"
            " --source"
        )
    grid = open_grid(source, series=series, repair=repair)
    losses = Counter({_OPEN: 0, _ASIDE: 0, _BEYOND: 0, _AGAIN: 0})

    def work(dicom: Any) -> Any:
        dataset = _structures(path, dicom)
        table, value_of = _table(path, dataset)
        values = set(chosen(path, table, segments))
        numbers = {number for number, value in value_of.items() if value in values}
        _check_frames(path, dataset, grid, numbers=numbers)
        contours: dict[int, list[Any]] = {}
        for item in dataset.get("ROIContourSequence") or ():
            value = value_of.get(int(item.ReferencedROINumber))
            if value is None:
                raise BadFile(
                    f"{path}: has contours of a structure that it does not name; export it again"
                )
            if value in values:  # some list a structure in several items
                contours.setdefault(value, []).extend(item.get("ContourSequence") or ())
        layers = {
            value: _filled(path, grid, those, lost=losses) for value, those in contours.items()
        }
        return layers, table

    layers, table = guarded(str(path), work)
    if losses[_BEYOND] and not any(layers.values()):
        raise BadFile(
            f"{path}: its contours do not lie on slices of the series, but all beyond its first or"
            " last one; give the series that they were drawn on"
        )
    for what, count in losses.items():
        if count:
            warnings.warn(f"{path}: {what}: {count}", DataWarning, stacklevel=4)
    return grid, layers, table


def _check_frames(path: str | Path, dataset: Any, grid: ImageGrid, *, numbers: set[int]) -> None:
    """Raise `BadFile` if structures of these numbers were drawn in another frame of reference than
    the images'.

    A structure that names none is in that of the whole set; if that names none either, nothing
    contradicts the images, and that contours lie on the planes of slices is looked at anyway.
    """
    if not grid.frame_of_reference:
        return
    frame_of = _frame_of(dataset, grid.frame_of_reference)
    with_contours = {
        int(item.ReferencedROINumber) for item in dataset.get("ROIContourSequence") or ()
    }
    foreign = {
        number for number in numbers if frame_of[number] not in ("", grid.frame_of_reference)
    }
    if not foreign:
        return
    if foreign >= numbers:
        raise BadFile(
            f"{path}: was drawn in another frame of reference; give the series that it was drawn on"
        )
    if foreign & with_contours:
        raise BadFile(
            f"{path}: some of its structures were drawn in another frame of reference than the"
            " others; choose those of the series given with --segment (all but number"
            f" {', '.join(map(str, sorted(foreign)[:10]))})"
        )


def _frame_of(dataset: Any, of_images: str) -> dict[int, str]:
    """The frame of reference of each structure by number, '' where neither it nor the set names
    one.

    of_images: that of the images, which the set may name beside others.
    """
    items = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    whole = {str(item.get("FrameOfReferenceUID") or "") for item in items}
    of_set = "" if of_images in whole else next(iter(sorted(whole - {""})), "")
    return {
        int(item.ROINumber): str(item.get("ReferencedFrameOfReferenceUID") or of_set)
        for item in dataset.StructureSetROISequence
    }


def _structures(path: str | Path, dicom: Any) -> Any:
    dataset = read_object(path, dicom)
    if str(dataset.get("SOPClassUID")) != RTSTRUCT_CLASS:
        raise BadFile(f"{path}: is no DICOM structure set")
    if not dataset.get("StructureSetROISequence"):
        raise BadFile(f"{path}: holds no structure")
    return dataset


def _table(path: str | Path, dataset: Any) -> tuple[LabelTable, dict[int, int]]:
    """The label table of a structure set, and the label value of each ROI number: itself where a
    label can have it.
    """
    from medseg.labels import MAX_VALUE

    items = list(dataset.StructureSetROISequence)
    numbers = [int(item.ROINumber) for item in items]
    if len(set(numbers)) != len(numbers):
        raise BadFile(f"{path}: two of its structures have the same number; export it again")
    fit = all(1 <= number <= MAX_VALUE for number in numbers)
    values = numbers if fit else list(range(1, len(numbers) + 1))
    colors = _colors(dataset, numbers)
    observations = dataset.get("RTROIObservationsSequence") or ()
    observation_of = {int(item.ReferencedROINumber): item for item in observations}
    try:
        table = table_of(
            values,
            names=[str(item.get("ROIName") or "") for item in items],
            colors=colors,
            codes=[
                _codes(observation_of[number]) if number in observation_of else {}
                for number in numbers
            ],
        )
    except BadConfig as error:
        raise BadFile(f"{path}: {error}; export it again") from None
    return table, dict(zip(numbers, values))


def _colors(dataset: Any, numbers: Sequence[int]) -> list[Any]:
    """The colour of each structure, None where the set gives none of three parts."""
    color_of: dict[int, tuple[int, ...]] = {}
    for item in dataset.get("ROIContourSequence") or ():
        number = int(item.ReferencedROINumber)
        color_of[number] = tuple(int(part) for part in item.get("ROIDisplayColor") or ())
    colors = [color_of.get(number, ()) for number in numbers]
    return [color if len(color) == 3 else None for color in colors]


def _codes(observation: Any) -> dict[str, Any]:
    """The codes of a structure from what was observed of it."""
    return read_codes(
        observation.get("SegmentedPropertyCategoryCodeSequence"),
        observation.get("RTROIIdentificationCodeSequence"),
        observation.get("AnatomicRegionSequence"),
    )


def _filled(path: str | Path, grid: ImageGrid, contours: Any, *, lost: Counter[str]) -> _Layers:
    """Slice to the pixels (rows, columns) that the contours of one structure fill; what is not
    filled is counted.
    """
    columns, rows, count = grid.shape
    edges: dict[int, list[NDArray[np.float64]]] = {}
    seen: set[bytes] = set()
    for contour in contours:
        is_closed = contour.ContourGeometricType in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
        points = _points(contour) if is_closed else np.zeros((0, 3))
        if len(points) < 3:
            lost[_OPEN] += 1
            continue
        # Twice the same is a copy, and no hole as large as the structure itself.
        same = np.sort(points.view("f8,f8,f8"), axis=0).tobytes()
        if same in seen:
            lost[_AGAIN] += 1
            continue
        seen.add(same)
        voxels = points @ grid.to_voxels[:3, :3].T + grid.to_voxels[:3, 3]
        if _is_beyond(voxels[:, 2], count):
            lost[_BEYOND] += 1
            continue
        k = int(np.rint(voxels[:, 2].mean()))
        if (
            not np.abs(voxels).max() < 1e6
            or np.abs(voxels[:, 2] - k).max() > MAX_OFF_PLANE
            or not 0 <= k < count
        ):
            raise BadFile(
                f"{path}: some contours do not lie on slices of the series; give the series that"
                " they were drawn on"
            )
        across, down = voxels[:, 0], voxels[:, 1]
        outside = (
            (across < -0.51) | (across > columns - 0.49) | (down < -0.51) | (down > rows - 0.49)
        )
        lost[_ASIDE] += bool(outside.any())
        start = voxels[:, :2]
        edges.setdefault(k, []).append(np.concatenate([start, np.roll(start, -1, axis=0)], axis=1))
    return {k: _inside(np.concatenate(pieces), rows, columns) for k, pieces in edges.items()}


def _points(contour: Any) -> NDArray[np.float64]:
    """The points (P, 3) of a contour in LPS mm."""
    numbers = contour.get_item(
        "ContourData"
    ).value  # as bytes: pydicom would make an object of every number
    texts = numbers.decode("ascii").split("\\") if isinstance(numbers, bytes) else list(numbers)
    return np.array(texts, np.float64).reshape(-1, 3)


def _is_beyond(k: NDArray[np.float64], count: int) -> bool:
    """Whether all points of a contour lie beyond the first or the last of `count` slices, by more
    than half a step.

    Certain: what lies there is in no voxel. Nearer than that it could belong to the slice at the
    end.
    """
    return bool(np.abs(k).max() < 1e6 and (k.max() < -0.5 or k.min() > count - 0.5))


def _inside(edges: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.bool_]:
    """The pixels whose centres closed contours go around an odd number of times.

    edges: (E, 4) from column, row to column, row. In every row of centres, each edge that crosses
    it turns over all pixels right of it.
    """
    crossings = np.zeros((rows, columns + 1), np.uint32)
    step = max(1, MAX_CROSSINGS // rows)
    for start in range(0, len(edges), step):
        x1, y1, x2, y2 = edges[start : start + step].T
        first = np.clip(np.ceil(np.minimum(y1, y2)), 0, rows).astype(int)
        stop = np.clip(np.ceil(np.maximum(y1, y2)), 0, rows).astype(int)
        spans = stop - first
        edge = np.repeat(np.arange(len(spans)), spans)
        row = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans) + first[edge]
        at = x1[edge] + (row - y1[edge]) / (y2[edge] - y1[edge]) * (x2[edge] - x1[edge])
        column = np.clip(np.ceil(at), 0, columns).astype(int)
        np.add.at(crossings, (row, column), 1)
    inside: NDArray[np.bool_] = np.cumsum(crossings[:, :columns], axis=1) % 2 == 1
    return inside
