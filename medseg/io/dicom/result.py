"""The DICOM series that results are about: its slices, its patient and study, and what every result
says of itself.

Results carry from the source what the standard requires of the Patient, Study and Frame of
Reference (types 1 and 2), the references to its images and its lossy compression, and nothing else;
`deidentify` replaces that too.
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from itertools import product
from operator import add, gt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, BadOutput, DataWarning
from medseg.files import atomic_write, open_file
from medseg.io.dicom.codes import scheme_item, text
from medseg.io.dicom.headers import (
    DEFLATED,
    class_of_file,
    file_meta,
    guarded,
    is_dicom,
    without_remarks,
)
from medseg.io.dicom.slices import Slice, read_header
from medseg.io.dicom.source import Paths, Source, inflated, name_of
from medseg.io.dicom.volumes import ordered_volume
from medseg.volume import Volume, resample

#: Attributes of the Patient and Study modules (PS3.3 C.7.1.1, C.7.2.1) that results take over; all
#: are of type 2.
CARRIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
#: A label map may lie this part of the smallest voxel edge off the source's grid and is still on
#: it.
MAX_OFFSET = 0.05
#: Most bytes that a deflated object unpacks to.
MAX_OBJECT_BYTES = 1 << 30
_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")


@dataclass(frozen=True, kw_only=True)
class DicomOptions:
    """How DICOM results are written.

    seg_type: 'binary' (a bit plane for each segment, which every viewer knows) or 'labelmap'
    (smaller, newer). deidentify: replace patient, study and all UIDs; equal UIDs are replaced
    alike. deterministic: UIDs and dates follow from the labels and the origin, so that a second run
    gives the same object. nearest: put labels of another grid on the source's by nearest neighbour
    instead of refusing them. model, version: what made the labels; without a model their origin is
    said to be unknown. family: code value of the algorithm's family in CID 7162. series,
    volume_index, repair: which volume of the source, and how to read it, as for `read`.
    """

    seg_type: str = "binary"
    deidentify: bool = False
    deterministic: bool = False
    nearest: bool = False
    model: str = ""
    version: str = ""
    family: str = "123110"
    series: str | int | None = None
    volume_index: int | None = None
    repair: bool = False


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A series as results refer to it, slices in k order; with `deidentify` all its UIDs are
    already replaced.
    """

    slices: list[Slice]
    affine: NDArray[np.float64]
    options: DicomOptions
    study: str
    series: str
    frame_of_reference: str
    has_frame_of_reference: bool  # of its own
    modality: str
    series_number: int
    carried: dict[str, str] = field(repr=False)
    position_reference: str = field(repr=False, default="")
    lossy: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (i, j, k): columns, rows, slices."""
        return self.slices[0].columns, self.slices[0].rows, len(self.slices)

    @property
    def spacing_mm(self) -> float:
        """Distance between slices."""
        return float(np.linalg.norm(self.affine[:3, 2]))

    def uid(self, uid: str) -> str:
        """A UID of the source as results may name it."""
        return derived_uid("deidentified", uid) if self.options.deidentify else uid

    def new_uid(self, *words: object) -> str:
        """A UID for a new object: random, or with `deterministic` the same for the same source and
        words.
        """
        return (
            derived_uid(self.study, self.series, *words)
            if self.options.deterministic
            else f"2.25.{uuid.uuid4().int}"
        )

    def reference(self, piece: Slice) -> Any:
        """An item that refers to the image, and where it holds several the frame, of a slice."""
        item = _instance(self, piece)
        if piece.frames > 1:
            item.ReferencedFrameNumber = piece.frame + 1
        return item

    def references(self) -> list[Any]:
        """An item for every image of the source once."""
        pieces = {piece.sop_instance: piece for piece in self.slices}
        return [_instance(self, piece) for piece in pieces.values()]


def open_origin(path: Paths, options: DicomOptions | None = None) -> Origin:
    """What results need to know about the series at `path`, read anew. Raises `BadFile`."""
    options = options or DicomOptions()
    slices, affine = ordered_volume(
        path, series=options.series, volume_index=options.volume_index, repair=options.repair
    )
    first = slices[0]
    header = read_header(first.path, first)
    name = name_of(path)
    facts: dict[str, Any] = guarded(name, lambda dicom: _facts(header))
    for tag, words in (("StudyInstanceUID", "study"), ("SeriesInstanceUID", "series")):
        if not _is_uid(facts[tag]):
            raise BadFile(
                f"{name}: does not say to which {words} it belongs; DICOM results need that, export"
                " it again"
            )
    frame_of_reference = first.frame_of_reference
    if not _is_uid(frame_of_reference):  # some tools that take out names take it out, too
        frame_of_reference = derived_uid("frame of reference", facts["SeriesInstanceUID"])
        warnings.warn(
            f"{name}: has no frame of reference; DICOM results give it one that follows from its"
            " series",
            DataWarning,
            stacklevel=2,
        )
    if not all(_is_uid(piece.sop_instance) and _is_uid(piece.sop_class) for piece in slices):
        raise BadFile(
            f"{name}: some of its images have no proper identifier to refer to; export the series"
            " again"
        )

    def uid(value: str) -> str:
        return derived_uid("deidentified", value) if options.deidentify else value

    attributes = facts["carried"]
    if options.deidentify:
        attributes = dict.fromkeys(CARRIED, "") | {
            "PatientName": "Anonymous^",
            "PatientID": (
                "ANON" + hashlib.sha256(uid(facts["StudyInstanceUID"]).encode()).hexdigest()[:12]
            ),
        }
    return Origin(
        slices=slices,
        affine=affine,
        options=options,
        study=uid(facts["StudyInstanceUID"]),
        series=uid(facts["SeriesInstanceUID"]),
        frame_of_reference=uid(frame_of_reference),
        has_frame_of_reference=frame_of_reference == first.frame_of_reference,
        modality=facts["Modality"],
        series_number=facts["SeriesNumber"],
        carried=attributes,
        position_reference="" if options.deidentify else facts["PositionReferenceIndicator"],
        lossy=facts["lossy"],
    )


def _facts(header: Any) -> dict[str, Any]:
    """What is carried, decoded; what is not valid is left out or cut short, but for the patient's
    name and number.
    """

    def value(name: str) -> str:
        raw = header.get(name)
        return "" if raw is None else str(raw).strip()

    attributes = {name: value(name) for name in CARRIED}
    for name, pattern in (("PatientBirthDate", _DATE), ("StudyDate", _DATE), ("StudyTime", _TIME)):
        if not pattern.fullmatch(attributes[name]):
            attributes[name] = ""
    for name in ("StudyID", "AccessionNumber"):
        attributes[name] = attributes[name][:16]
    if attributes["PatientSex"] not in ("M", "F", "O"):
        attributes["PatientSex"] = ""
    number = value("SeriesNumber")
    lossy: dict[str, Any] = {"LossyImageCompression": "00"}
    if value("LossyImageCompression") == "01":
        names = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
        lossy = {"LossyImageCompression": "01"} | {
            name: header[name].value for name in names if header.get(name)
        }
    modality = value("Modality")
    return {
        "StudyInstanceUID": value("StudyInstanceUID"),
        "SeriesInstanceUID": value("SeriesInstanceUID"),
        "PositionReferenceIndicator": value("PositionReferenceIndicator"),
        "Modality": modality if re.fullmatch("[A-Z]{2,8}", modality) else "OT",
        "SeriesNumber": int(number) if re.fullmatch(r"\d{1,9}", number) else 0,
        "carried": attributes,
        "lossy": lossy,
    }


def check_grid(origin: Origin, volume: Volume, path: Paths) -> None:
    """Raise `BadFile` naming `path` unless a volume read from it has the grid of its slices."""
    if volume.shape != origin.shape or np.abs(volume.affine - origin.affine).max() > 1e-3:
        raise BadFile(
            f"{name_of(path)}: was not read as its slices are, so no DICOM result can refer to them"
        )


def planes_on_source(labels: Volume, origin: Origin, path: str | Path) -> NDArray:
    """A label map as planes (slices, rows, columns) of its source; `BadOutput` naming `path`.

    Stored in any of the 48 ways, or cut out of the source's grid, it is placed exactly, voxel by
    voxel. On another grid it is refused, or with `nearest` resampled by nearest neighbour.
    """
    try:
        return planes_on_grid(labels, path, affine=origin.affine, shape=origin.shape)
    except BadOutput:
        if not origin.options.nearest:
            raise
        return _nearest(labels, origin)


def planes_on_grid(
    labels: Volume, path: str | Path, *, affine: NDArray[np.float64], shape: tuple[int, int, int]
) -> NDArray:
    """A label map as planes (K, J, I) of a grid in whose voxels its own lie; else `BadOutput`
    naming `path`.
    """
    turn, start = _whole_steps(labels, affine, path=path)
    # Voxel axis a of the grid follows voxel axis order[a] of the labels, forwards or backwards.
    order = [int(axis) for axis in np.abs(turn).argmax(axis=1)]
    signs = [int(turn[a, order[a]]) for a in range(3)]
    data = labels.data.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    low = [int(start[a]) - (0 if signs[a] > 0 else data.shape[a] - 1) for a in range(3)]
    ends = list(map(add, low, data.shape))
    if min(low) < 0 or any(map(gt, ends, shape)):
        raise BadOutput(
            f"{path}: the labels reach beyond the DICOM series; give the series they were made from"
        )
    out = np.zeros(shape[::-1], data.dtype)
    out.T[tuple(map(slice, low, ends))] = data
    return out


def _whole_steps(
    labels: Volume, affine: NDArray[np.float64], *, path: str | Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the voxels of labels lie in a grid, in its voxels: the step (3, 3) along each of their
    axes, and the first one. Raises `BadOutput` where these are not its voxels.
    """
    step = np.linalg.inv(affine) @ labels.affine
    whole = np.rint(step)
    turn = np.abs(whole[:3, :3])
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    corners = product(*((0, n - 1) for n in labels.shape))
    off = [((step - whole) @ (*corner, 1.0))[:3] * edges for corner in corners]
    far = max(float(np.linalg.norm(away)) for away in off)
    exact = (turn.sum(axis=0) == 1).all() and (turn.sum(axis=1) == 1).all()
    if not exact or far > MAX_OFFSET * edges.min():
        raise BadOutput(
            f"{path}: the labels lie on another grid than the DICOM series they should refer to; "
            "give the series they were made from, or allow nearest-neighbour resampling (--nearest)"
        )
    return whole[:3, :3], whole[:3, 3]


def _nearest(labels: Volume, origin: Origin) -> NDArray:
    """Planes of the source with the label of the nearest voxel, background beyond half a voxel
    outside.
    """
    affine = labels.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    # Points up to half a voxel outside are then between voxels.
    around = Volume(np.pad(labels.data, 1), affine)
    return np.ascontiguousarray(resample(around, origin.affine, origin.shape, order=0).data.T)


def complete(dataset: Any, origin: Origin, kind: str) -> None:
    """Give a new object its patient, study and frame of reference, its dates and what made it
    (PS3.3 C.7, C.12.1).

    kind: a word for what it is, such as 'SEG'.
    """
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import DataElement
    from pydicom.valuerep import PersonName

    from medseg.packages import __version__

    dataset.SpecificCharacterSet = "ISO_IR 192"
    for name, value in origin.carried.items():
        tag, kind_of_value = tag_for_keyword(name), dictionary_VR(name)
        words = PersonName(value) if kind_of_value == "PN" else value
        assert tag is not None
        # The patient stays the same even where the source's name or number is longer than the
        # standard allows.
        dataset.add(DataElement(tag, kind_of_value, words, validation_mode=0))
    dataset.StudyInstanceUID = origin.study
    dataset.FrameOfReferenceUID = origin.frame_of_reference
    dataset.PositionReferenceIndicator = origin.position_reference
    date, time = moment(origin)
    dataset.InstanceCreationDate = dataset.SeriesDate = date
    dataset.InstanceCreationTime = dataset.SeriesTime = time
    dataset.SeriesNumber = {"SEG": 9100, "RTSTRUCT": 9200, "SR": 9300}[
        kind
    ] + origin.series_number % 100
    dataset.SeriesDescription = text(f"medseg {origin.options.model}".strip())
    dataset.InstanceNumber = 1
    dataset.Manufacturer = dataset.ManufacturerModelName = "medseg"
    dataset.SoftwareVersions = __version__
    dataset.DeviceSerialNumber = f"medseg-{__version__}"
    dataset.ContributingEquipmentSequence = [
        _equipment(origin),
        *dataset.get("ContributingEquipmentSequence", ()),
    ]
    for item in dataset.ContributingEquipmentSequence:
        item.ContributionDateTime = date + time.ljust(6, "0")
    if origin.options.deidentify:
        dataset.PatientIdentityRemoved = "YES"
        dataset.DeidentificationMethod = "medseg: identifying attributes and UIDs replaced"
        dataset.LongitudinalTemporalInformationModified = "REMOVED"
    if _uses_private_codes(dataset):
        dataset.CodingSchemeIdentificationSequence = [scheme_item()]


def moment(origin: Origin) -> tuple[str, str]:
    """Date (DA) and time (TM) of creation; with `deterministic` those of the study, or a dummy
    where it has none.
    """
    if origin.options.deterministic:
        return origin.carried["StudyDate"] or "19000101", origin.carried["StudyTime"] or "000000"
    now = datetime.now()
    return now.strftime("%Y%m%d"), now.strftime("%H%M%S")


def _equipment(origin: Origin) -> Any:
    """An item that says what medseg did (PS3.3 C.12.1.1.5)."""
    from pydicom.dataset import Dataset

    from medseg.packages import __version__

    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = (
        "109102",
        "DCM",
        "Processing Equipment",
    )
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer = item.ManufacturerModelName = "medseg"
    item.SoftwareVersions = __version__
    process = (
        f"segmented with model {origin.options.model}"
        if origin.options.model
        else "converted from a label map"
    )
    weights = f", weights {origin.options.version}" if origin.options.version else ""
    item.ContributionDescription = text(process + weights, 1024)
    return item


def _uses_private_codes(dataset: Any) -> bool:
    from medseg.io.dicom.codes import PRIVATE_SCHEME

    return any(item.get("CodingSchemeDesignator") == PRIVATE_SCHEME for item in _items(dataset))


def _items(dataset: Any) -> Iterator[Any]:
    """Every item of every sequence below a dataset, but for frames and contours, of which there may
    be thousands.
    """
    for element in dataset:
        if element.VR == "SQ" and element.keyword not in (
            "PerFrameFunctionalGroupsSequence",
            "ContourSequence",
        ):
            for item in element.value:
                yield item
                yield from _items(item)


@contextmanager
def without_warnings(path: str | Path) -> Iterator[None]:
    """Work with highdicom, which is not there or has only developers' remarks. Raises `BadOutput`
    if not there.
    """
    try:
        with without_remarks():
            yield
    except ImportError:
        raise BadOutput(
            f'{path}: writing DICOM needs highdicom; install it with: pip install "medseg[dicom]"'
        ) from None


def save(dataset: Any, path: str | Path) -> None:
    """Write an object as a DICOM file with an empty preamble, whole or not at all. Raises
    `BadOutput`.
    """
    dataset.preamble = bytes(128)
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def decimal(number: float, digits: int) -> str:
    """A number as a decimal string (DS) of at most 16 characters with at most `digits` after the
    point.
    """
    for places in range(digits, -1, -1):
        words = f"{number:.{places}f}"
        if len(words) <= 16:
            words = words.rstrip("0").rstrip(".") if "." in words else words
            return "0" if words in ("-0", "") else words
    return f"{number:.9e}"


def digits_for(spacing_mm: float) -> int:
    """Digits after the point that place a point within a ten-thousandth of a voxel, at least 4."""
    return max(4, min(9, 4 - math.floor(math.log10(spacing_mm))))


def derived_uid(*words: object) -> str:
    """A UID that follows from words: a UUID under 2.25 (PS3.5 B.2) of their hash."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def _is_uid(value: str) -> bool:
    return len(value) <= 64 and bool(re.fullmatch(r"\d+(\.\d+)+", value))


def _instance(origin: Origin, piece: Slice) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = piece.sop_class
    item.ReferencedSOPInstanceUID = origin.uid(piece.sop_instance)
    return item


def class_of(path: str | Path) -> str:
    """What kind of object a DICOM file says it holds (a SOP class UID), or '' for what is no DICOM
    file.
    """
    with open_file(path) as file:
        if not is_dicom(file.read(132)):
            return ""
    with Source(path) as source:
        return class_of_file(source, source.entries[0])


def read_object(path: str | Path, dicom: Any) -> Any:
    """A whole DICOM object as a dataset; `dicom` is the pydicom module. Raises `BadFile` for
    deflated files that unpack to too much.
    """
    with open_file(path) as file:
        meta, start = file_meta(dicom, file)
        if meta.get("TransferSyntaxUID", "") != DEFLATED:
            # Old files lack what should stand before the data set; what this is, was looked at.
            return dicom.dcmread(path, force=True)
        # pydicom would unpack it without a limit: a small file could take all memory.
        content = inflated(file, start, str(path)).take(0, MAX_OBJECT_BYTES + 1)
    if len(content) > MAX_OBJECT_BYTES:
        raise BadFile(f"{path}: unpacks to more than the {MAX_OBJECT_BYTES >> 30} GB allowed")
    dataset = dicom.filereader.read_dataset(BytesIO(content), False, True)
    dataset.file_meta = meta
    return dataset
