"""A structured report of the volumes of a segmentation: TID 1500 of PS3.16 as a Comprehensive 3D
SR, by highdicom.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.io.dicom.codes import category_of, code_item, type_of
from medseg.io.dicom.result import CARRIED, Origin, complete, derived_uid, moment, without_warnings

if TYPE_CHECKING:
    from medseg.labels import Code, Label, LabelTable

#: Left, right, both: modifiers that say a side (CID 244).
_SIDES = ("7771000", "24028007", "51440002")
_MILLILITRE = ("UCUM", "mL", "mL")


def report_dataset(
    segmentation: Any,
    origin: Origin,
    millilitres: dict[int, float],
    path: str | Path,
    *,
    table: LabelTable,
) -> Any:
    """A report of the volume of every segment, referring to the segmentation; made by a device,
    verified by nobody.

    segmentation: what `seg.seg_dataset` gave for `origin` and `table`. millilitres: label value to
    volume. path: what errors name. Raises `BadOutput`.
    """
    with without_warnings(path):
        return _report(segmentation, origin, millilitres, table=table)


def _report(
    segmentation: Any, origin: Origin, millilitres: dict[int, float], *, table: LabelTable
) -> Any:
    from highdicom.sr import (
        Comprehensive3DSR,
        DeviceObserverIdentifyingAttributes as DeviceObserver,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
    )
    from pydicom.sr.codedict import codes

    segments = {item.get("SegmentDescription"): item for item in segmentation.SegmentSequence}
    groups = []
    for label in table.labels:
        segment = segments.get(f"Label value {label.value}")
        if segment is not None:
            ml = millilitres[label.value]
            groups.append(_measured(segmentation, origin, label, segment=segment, ml=ml))
    device = DeviceObserver(
        derived_uid("device", "medseg"),
        name="medseg",
        manufacturer_name="medseg",
        model_name="medseg",
    )
    content = MeasurementReport(
        ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device)),
        codes.cid100.ImagingProcedure,
        groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    dataset = Comprehensive3DSR(
        evidence=[_without_patient(segmentation)],
        content=content[0],
        series_instance_uid=origin.new_uid("series", "SR", segmentation.SOPInstanceUID),
        series_number=1,
        sop_instance_uid=origin.new_uid("SR", segmentation.SOPInstanceUID),
        instance_number=1,
        manufacturer="medseg",
        is_complete=True,
    )
    complete(dataset, origin, "SR")
    for name in ("FrameOfReferenceUID", "PositionReferenceIndicator"):  # reports have none
        delattr(dataset, name)
    dataset.ContentDate, dataset.ContentTime = moment(origin)
    if "ObservationDateTime" in dataset:
        del dataset.ObservationDateTime
    return dataset


def _measured(segmentation: Any, origin: Origin, label: Label, *, segment: Any, ml: float) -> Any:
    """The measurement group of one segment (TID 1411)."""
    from highdicom.sr import (
        AlgorithmIdentification,
        FindingSite,
        Measurement,
        ReferencedSegment,
        SourceSeriesForSegmentation,
        TrackingIdentifier,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom.sr.codedict import codes

    from medseg.labels import Code

    options = origin.options
    algorithm = AlgorithmIdentification(segment.SegmentAlgorithmName, _version(options.version))
    sites = []
    where = label.region or (label.type if category_of(label)[:2] == ("SCT", "123037004") else None)
    if where is not None:
        side = next(
            (m for m in (label.type_modifier, label.region_modifier) if m and m.value in _SIDES),
            None,
        )
        sites = [FindingSite(_concept(where), laterality=_concept(side) if side else None)]
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(segment.TrackingUID, segment.TrackingID),
        referenced_segment=ReferencedSegment(
            segmentation.SOPClassUID,
            segmentation.SOPInstanceUID,
            int(segment.SegmentNumber),
            source_series=SourceSeriesForSegmentation(origin.series),
        ),
        finding_category=_concept(category_of(label)),
        finding_type=_concept(type_of(label)),
        finding_sites=sites,
        algorithm_id=algorithm,
        measurements=[Measurement(codes.SCT.Volume, round(ml, 6), _concept(Code(*_MILLILITRE)))],
    )


def _version(weights: str) -> str:
    from medseg.packages import __version__

    return f"{__version__} {weights[:16]}".strip()


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept.from_dataset(code_item(code))


def _without_patient(segmentation: Any) -> Any:
    """The segmentation as evidence: its identity, and nothing of the patient, so that highdicom
    sees none of it.
    """
    from pydicom.dataset import Dataset

    evidence = Dataset()
    for name in (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
    ):
        setattr(evidence, name, getattr(segmentation, name))
    for name in CARRIED:
        setattr(evidence, name, None)
    return evidence
