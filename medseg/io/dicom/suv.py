"""Standardised uptake values of PET by body weight.

SUVbw = activity concentration [Bq/mL] * body weight [g] / injected dose [Bq], the dose decayed to
the time to which the images are decay-corrected. Which time that is follows the vendor-neutral
pseudo-code of the Quantitative Imaging Biomarkers Alliance
(https://qibawiki.rsna.org/index.php/Standardized_Uptake_Value_(SUV)) and PS3.3 C.8.9.1.1.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

from medseg.errors import BadFile
from medseg.io.dicom.headers import guarded, header_values, number
from medseg.io.dicom.slices import SOP_CLASSES, Slice
from medseg.io.dicom.source import Source

_TAGS = [
    "Units", "SUVType", "DecayCorrection", "PatientWeight", "SeriesDate", "SeriesTime",
    "AcquisitionDate",
    "AcquisitionTime", "RadiopharmaceuticalInformationSequence",
]  # fmt: skip
#: Longest time from injection to scan; more is a wrong clock.
_MAX_DELAY = timedelta(hours=24)
#: A dose below this in Bq was written in MBq, as nuclear medicine has it; a weight above this in kg
#: in grams. Mice get a few MBq.
_LEAST_DOSE_BQ, _MOST_WEIGHT_KG = 1e5, 1e3


def suv_factor(source: Source, slices: tuple[Slice, ...]) -> float:
    """What the values of a PET series in Bq/mL are multiplied by to become SUV by body weight in
    g/mL.

    Raises `BadFile` if the series is no PET, is not in Bq/mL, or does not say weight, dose,
    half-life and times.
    """
    name = source.name
    if SOP_CLASSES.get(slices[0].sop_class) != "PT":
        raise BadFile(f"{name}: is no PET, so it has no uptake values; leave --suv out")
    headers = [
        header_values(source, piece.entry, _TAGS) for piece in {p.entry: p for p in slices}.values()
    ]

    def work(dicom: Any) -> float:
        if all(_units(header) == "GML" for header in headers):  # uptake values already
            _check_by_body_weight(name, headers)
            return 1.0
        if any(_units(header) != "BQML" for header in headers):
            raise BadFile(
                f"{name}: its values are not in Bq/mL, so SUV cannot be worked out; export it in"
                " BQML"
            )
        return _factor(name, headers)

    factor: float = guarded(name, work)
    return factor


def _units(header: Any) -> str:
    return str(header.get("Units", "")).upper()


def _check_by_body_weight(name: str, headers: list[Any]) -> None:
    """Raise `BadFile` for uptake values by anything else, such as lean body mass."""
    if {str(header.get("SUVType") or "BW").upper() for header in headers} != {"BW"}:
        raise BadFile(
            f"{name}: its uptake values are not by body weight; leave --suv out to read them as"
            " they are"
        )


def _factor(name: str, headers: list[Any]) -> float:
    """What Bq/mL are multiplied by. Raises `BadFile` for headers that lack what it takes."""
    first = headers[0]
    weight = number(first, "PatientWeight")
    item: Any = next(iter(first.get("RadiopharmaceuticalInformationSequence") or []), {})
    dose, half_life = number(item, "RadionuclideTotalDose"), number(item, "RadionuclideHalfLife")
    quantities = {"body weight": weight, "dose": dose, "half-life": half_life}
    lacking = [what for what, value in quantities.items() if not value or value <= 0]
    if lacking or not (weight and dose and half_life):
        lack = " and ".join(lacking)
        raise BadFile(f"{name}: does not say the {lack} that SUV needs; leave --suv out")
    _check_units(name, dose, weight)
    kind = str(first.get("DecayCorrection", "")).upper()
    if kind not in ("START", "ADMIN"):
        raise BadFile(
            f"{name}: is not corrected for decay, so SUV cannot be worked out; leave --suv out"
        )
    if kind == "START":
        delay = _reference_time(name, headers) - _injection_time(name, first, item)
        if not timedelta(0) <= delay <= _MAX_DELAY:
            raise BadFile(
                f"{name}: its times of injection and scan contradict each other; leave --suv out"
            )
        dose *= math.exp(-math.log(2) * delay.total_seconds() / half_life)
    return weight * 1000 / dose


def _check_units(name: str, dose: float, weight: float) -> None:
    """Raise `BadFile` for a dose and a body weight that cannot be in Bq and kg."""
    if dose < _LEAST_DOSE_BQ or weight > _MOST_WEIGHT_KG:
        raise BadFile(
            f"{name}: its dose is not in Bq, or its body weight not in kg, as DICOM has them; leave"
            " --suv out"
        )


def _reference_time(name: str, headers: list[Any]) -> datetime:
    """The start of the series, if no slice was acquired before it: else the series was made later
    from another.
    """
    series = _moment(headers[0], "SeriesDate", "SeriesTime")
    moments = [_moment(header, "AcquisitionDate", "AcquisitionTime") for header in headers]
    times = [moment for moment in moments if moment is not None]
    if series is None or not times or series > min(times):
        raise BadFile(
            f"{name}: does not say to which time it is corrected for decay; leave --suv out"
        )
    return series


def _injection_time(name: str, header: Any, item: Any) -> datetime:
    text = str(item.get("RadiopharmaceuticalStartDateTime") or "")
    if text:
        return datetime.strptime(text[:14], "%Y%m%d%H%M%S")
    moment = _at(
        str(header.get("SeriesDate") or ""), str(item.get("RadiopharmaceuticalStartTime") or "")
    )
    if moment is None:
        raise BadFile(
            f"{name}: does not say when the dose was given, which SUV needs; leave --suv out"
        )
    series = _moment(header, "SeriesDate", "SeriesTime")
    # Injected before midnight.
    return moment - timedelta(days=1) if series and moment > series else moment


def _moment(header: Any, date: str, time: str) -> datetime | None:
    return _at(str(header.get(date) or ""), str(header.get(time) or ""))


def _at(date: str, time: str) -> datetime | None:
    if len(date) < 8 or len(time) < 6:
        return None
    return datetime.strptime(date[:8] + time[:6], "%Y%m%d%H%M%S")
