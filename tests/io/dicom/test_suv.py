"""PET as standardised uptake values."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from making.dicom import PT, change, item, save, series
from medseg import io
from medseg.errors import BadFile


def pet() -> list[Dataset]:
    """60 kg, 300 MBq of F-18 at 10:00, series from 11:00."""
    pieces = change(
        series(), SOPClassUID=PT, Modality="PT", RescaleIntercept=0, Units="BQML",
        DecayCorrection="START",
        PatientWeight="60", SeriesDate="20200102", SeriesTime="110000.00",
        AcquisitionDate="20200102",
    )  # fmt: skip
    for n, piece in enumerate(pieces):
        piece.RescaleSlope, piece.AcquisitionTime = f"{n + 0.5}", f"1105{n:02d}"
        dose = item(
            RadiopharmaceuticalStartTime="100000.00",
            RadionuclideTotalDose="300000000",
            RadionuclideHalfLife="6586.2",
        )
        piece.RadiopharmaceuticalInformationSequence = Sequence([dose])
    return pieces


def dose_of(pieces: list[Dataset]) -> list[Dataset]:
    return [piece.RadiopharmaceuticalInformationSequence[0] for piece in pieces]


def expected_factor(hours: float) -> float:
    return 60_000 / (300e6 * 0.5 ** (hours * 3600 / 6586.2))


def factor_of(pieces: list[Dataset], folder) -> float:
    save(pieces, folder)
    plain, uptake = io.read(folder), io.read(folder, suv=True)
    assert uptake.data.dtype == np.float32
    ratios = uptake.data[plain.data != 0] / plain.data[plain.data != 0]
    assert np.ptp(ratios) < 1e-5 * ratios.mean()
    return float(ratios.mean())


def test_decay_is_counted_to_the_start_of_the_series(tmp_path):
    assert factor_of(pet(), tmp_path / "s") == pytest.approx(expected_factor(1), rel=1e-5)


def test_a_start_with_date_goes_over_midnight(tmp_path):
    pieces = change(pet(), SeriesTime="003000")
    for piece, dose in zip(pieces, dose_of(pieces), strict=True):
        piece.AcquisitionTime = "003100"
        dose.RadiopharmaceuticalStartDateTime = "20200101233000.00"
    assert factor_of(pieces, tmp_path / "a") == pytest.approx(expected_factor(1), rel=1e-5)

    for dose in dose_of(pieces):
        del dose.RadiopharmaceuticalStartDateTime
        dose.RadiopharmaceuticalStartTime = "233000"
    assert factor_of(pieces, tmp_path / "b") == pytest.approx(expected_factor(1), rel=1e-5)


def test_values_corrected_to_the_injection_need_no_decay(tmp_path):
    assert factor_of(change(pet(), DecayCorrection="ADMIN"), tmp_path / "s") == pytest.approx(
        60_000 / 300e6, rel=1e-5
    )


def test_uptake_values_stay_as_they_are(tmp_path):
    assert factor_of(change(pet(), Units="GML"), tmp_path / "s") == pytest.approx(1)
    with pytest.raises(BadFile, match="not by body weight"):
        io.read(save(change(pet(), Units="GML", SUVType="BSA"), tmp_path / "t"), suv=True)


def _dose(**values: object):
    def set_dose(pieces: list[Dataset]) -> None:
        for dose in dose_of(pieces):
            for tag, value in values.items():
                setattr(dose, tag, value)

    return set_dose


def _tags(**values: object):
    return lambda pieces: change(pieces, **values)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_tags(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "is no PET"), (_tags(Units="CNTS"),
        "not in Bq/mL"),
        (_tags(Units=""), "not in Bq/mL"), (_tags(PatientWeight=None), "body weight"),
        (_tags(PatientWeight="0"), "body weight"), (_tags(PatientWeight="-1"), "body weight"),
        (_dose(RadionuclideTotalDose="300"), "not in Bq"), (_tags(PatientWeight="60000"), "in kg"),
        (_dose(RadionuclideTotalDose=None), "dose"), (_dose(RadionuclideHalfLife=None),
        "half-life"),
        (_tags(DecayCorrection="NONE"), "not corrected for decay"), (_tags(DecayCorrection=""),
        "not corrected"),
        (_tags(SeriesTime=""), "to which time"), (_tags(SeriesTime="120000"), "to which time"),
        (_tags(AcquisitionTime=None), "to which time"), (_dose(RadiopharmaceuticalStartTime=None),
        "when the dose"),
        (_dose(RadiopharmaceuticalStartDateTime="20200102120000"), "contradict"),
        (_dose(RadiopharmaceuticalStartDateTime="20191231100000"), "contradict"),
        (_tags(RadiopharmaceuticalInformationSequence=[]), "dose and half-life"),
        (_tags(PatientWeight=["1", "2"]), "PatientWeight is not what"),
    ],
)  # fmt: skip
def test_uptake_that_cannot_be_worked_out_is_refused(tmp_path, spoil, reason):
    pieces = pet()
    spoil(pieces)
    folder = save(pieces, tmp_path / "s")

    assert io.read(folder).shape == (3, 4, 5)
    with pytest.raises(BadFile, match=reason):
        io.read(folder, suv=True)


def test_real_uptake_values(shared_data):
    """Both patients' PET is stored as uptake values already (Units GML)."""
    folder = shared_data / "rtstruct/STS_002/dicom/PET/image"

    assert np.allclose(io.read(folder, suv=True).data, io.read(folder).data)
