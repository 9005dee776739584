"""A CT of a bright box as pydicom data sets, with a patient who must not be found anywhere."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
SECRET = "DOE^SENTINEL"


def series(count: int = 4, side: int = 12) -> list[Dataset]:
    """A CT of a bright box, one dataset per slice, in axial planes 2 mm apart."""
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    out = []
    for number in range(count):
        piece = Dataset()
        piece.file_meta = FileMetaDataset()
        piece.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        piece.file_meta.MediaStorageSOPClassUID = piece.SOPClassUID = CT
        piece.file_meta.MediaStorageSOPInstanceUID = piece.SOPInstanceUID = generate_uid()
        piece.StudyInstanceUID, piece.SeriesInstanceUID, piece.FrameOfReferenceUID = (
            study,
            uid,
            frame,
        )
        piece.PatientName = piece.PatientID = piece.StudyID = piece.AccessionNumber = SECRET
        piece.PatientBirthDate, piece.PatientSex, piece.StudyDate, piece.StudyTime = (
            "19700101",
            "O",
            "20200101",
            "10",
        )
        piece.ReferringPhysicianName, piece.Modality, piece.Manufacturer = SECRET, "CT", SECRET
        piece.SeriesNumber, piece.InstanceNumber, piece.ImageType = (
            1,
            number + 1,
            ["ORIGINAL", "PRIMARY", "AXIAL"],
        )
        piece.Rows = piece.Columns = side
        piece.SamplesPerPixel, piece.PhotometricInterpretation = 1, "MONOCHROME2"
        piece.BitsAllocated, piece.BitsStored, piece.HighBit, piece.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        piece.PixelSpacing, piece.SliceThickness = [2, 2], 2
        piece.ImageOrientationPatient, piece.ImagePositionPatient = (
            [1, 0, 0, 0, 1, 0],
            [0, 0, 2 * number],
        )
        piece.RescaleSlope, piece.RescaleIntercept = 1, 0
        values = np.zeros((side, side), np.int16)
        values[3:8, 3:8] = 1000
        piece.PixelData = values.tobytes()
        out.append(piece)
    return out
