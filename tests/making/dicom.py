"""Synthetic DICOM for tests: classic series, enhanced multi-frame files, and what the standard says
they are.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from medseg.volume import LPS, Volume

CT, MR, PT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4.1"
NAME = "SECRET^PATIENT"
# Columns: along rows, down columns, normal.
OBLIQUE = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])


def empty(sop_class: str = CT) -> Dataset:
    """A data set with file meta information, new instance UID and nothing else."""
    piece = Dataset()
    piece.file_meta = FileMetaDataset()
    piece.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    piece.file_meta.MediaStorageSOPClassUID = piece.SOPClassUID = sop_class
    piece.file_meta.MediaStorageSOPInstanceUID = piece.SOPInstanceUID = generate_uid()
    piece.PatientName, piece.PatientID = NAME, NAME
    return piece


def series(
    count: int = 5, rows: int = 4, columns: int = 3, step_mm: float = 2.5, seed: int = 1
) -> list[Dataset]:
    """An oblique CT of random voxels, one dataset per slice."""
    values = (
        np.random.default_rng(seed).integers(-1000, 2000, (count, rows, columns)).astype(np.int16)
    )
    uid, frame = generate_uid(), generate_uid()
    out = []
    for number in range(count):
        piece = empty()
        piece.SeriesInstanceUID, piece.FrameOfReferenceUID, piece.StudyInstanceUID = (
            uid,
            frame,
            frame,
        )
        piece.Modality = "CT"
        piece.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        piece.Rows, piece.Columns, piece.SamplesPerPixel = rows, columns, 1
        piece.PhotometricInterpretation = "MONOCHROME2"
        piece.BitsAllocated, piece.BitsStored, piece.HighBit, piece.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        piece.PixelSpacing = [0.9, 0.7]
        piece.ImageOrientationPatient = [float(x) for x in OBLIQUE[:, :2].T.ravel()]
        piece.ImagePositionPatient = place(number * step_mm)
        piece.RescaleSlope, piece.RescaleIntercept, piece.InstanceNumber = 1, -1024, 100 - number
        piece.PixelData = values[number].tobytes()
        out.append(piece)
    return out


def place(along_normal_mm: float, along_row_mm: float = 0, down_column_mm: float = 0) -> list[str]:
    """The Image Position of a slice of `series`."""
    position = np.array([-10.0, 20, 30]) + OBLIQUE @ (along_row_mm, down_column_mm, along_normal_mm)
    return [f"{x:.6f}" for x in position]


def change(pieces: list[Dataset], **values: object) -> list[Dataset]:
    """Set tags of all slices; the file meta information follows the SOP class."""
    for piece in pieces:
        for tag, value in values.items():
            setattr(piece, tag, value)
        piece.file_meta.MediaStorageSOPClassUID = piece.get("SOPClassUID", "") or CT
    return pieces


def as_mr(pieces: list[Dataset]) -> list[Dataset]:
    """The same slices as MR, which has no scaling of its own."""
    change(pieces, SOPClassUID=MR, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "SE"])
    for piece in pieces:
        del piece.RescaleSlope, piece.RescaleIntercept
    return pieces


def another(pieces: list[Dataset], seed: int, **values: object) -> list[Dataset]:
    """The same slices again with other voxels and instance UIDs, and some tags changed."""
    chance = np.random.default_rng(seed)
    out = copy.deepcopy(pieces)
    for piece in out:
        piece.file_meta.MediaStorageSOPInstanceUID = piece.SOPInstanceUID = generate_uid()
        shape = (piece.Rows, piece.Columns)
        piece.PixelData = chance.integers(-1000, 2000, shape).astype(np.int16).tobytes()
    return change(out, **values)


def save(pieces: list[Dataset], folder: Path, seed: int = 0) -> Path:
    """Save under shuffled names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = random.Random(seed).sample(range(1000), len(pieces))
    for name, piece in zip(names, pieces, strict=True):
        piece.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)
    return folder


def content_of(piece: Dataset) -> bytes:
    """The bytes of the file."""
    buffer = pydicom.filebase.DicomBytesIO()
    piece.save_as(buffer, enforce_file_format=True)
    return bytes(buffer.getvalue())


def rewritten(piece: Dataset, syntax: UID) -> bytes:
    """The bytes of the file in another native transfer syntax, which swaps the pixels of big-endian
    ones.
    """
    piece = copy.deepcopy(piece)
    if syntax == pydicom.uid.ExplicitVRBigEndian:
        # Of words, also 8-bit pairs.
        piece.PixelData = np.frombuffer(piece.PixelData, np.uint16).byteswap().tobytes()
    piece.file_meta.TransferSyntaxUID = syntax
    piece["PixelData"].VR = "OW"
    buffer = pydicom.filebase.DicomBytesIO()
    options = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
    pydicom.dcmwrite(
        buffer, piece, enforce_file_format=True, **({} if syntax.is_deflated else options)
    )
    return bytes(buffer.getvalue())


def truth(pieces: list[Dataset]) -> Volume:
    """What the standard says the series is (PS3.3 C.7.6.2.1.1), for slices in order along their
    normal.
    """
    first, last = pieces[0], pieces[-1]
    along, down = np.reshape([float(x) for x in first.ImageOrientationPatient], (2, 3))
    start, end = (
        np.array([float(x) for x in piece.ImagePositionPatient]) for piece in (first, last)
    )
    affine = np.eye(4)
    affine[:3, 0] = along * float(first.PixelSpacing[1])
    affine[:3, 1] = down * float(first.PixelSpacing[0])
    affine[:3, 2] = (end - start) / (len(pieces) - 1)
    affine[:3, 3] = start
    shape = (first.Rows, first.Columns)
    slope, intercept = int(first.get("RescaleSlope", 1)), int(first.get("RescaleIntercept", 0))
    slices = [np.frombuffer(p.PixelData, np.int16).reshape(shape).T * slope for p in pieces]
    return Volume(np.stack(slices, axis=2) + intercept, LPS @ affine)


def enhanced(
    volumes: list[list[Dataset]], sop_class: str = ENHANCED_MR, shuffle: int = 3
) -> Dataset:
    """Classic slices as one enhanced file, frames in shuffled order, a temporal position for each
    volume.
    """
    first = volumes[0][0]
    out = empty(sop_class)
    for tag in ("SeriesInstanceUID", "FrameOfReferenceUID", "StudyInstanceUID", "ImageType", "Rows",
    "Columns",
                "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
                "HighBit",
                "PixelRepresentation"):  # fmt: skip
        setattr(out, tag, first.get(tag))
    out.InstanceNumber = 1
    frames = [
        (time, n, piece)
        for time, volume in enumerate(volumes, 1)
        for n, piece in enumerate(volume, 1)
    ]
    random.Random(shuffle).shuffle(frames)
    out.NumberOfFrames = len(frames)
    out.DimensionIndexSequence = Sequence(
        [item(DimensionIndexPointer=0x00209128, FunctionalGroupPointer=0x00209111),
         item(DimensionIndexPointer=0x00209057, FunctionalGroupPointer=0x00209111)]
    )  # fmt: skip
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence(
        [item(PixelSpacing=first.PixelSpacing, SliceThickness="2.5")]
    )
    shared.PlaneOrientationSequence = Sequence(
        [item(ImageOrientationPatient=first.ImageOrientationPatient)]
    )
    if "RescaleSlope" in first:
        shared.PixelValueTransformationSequence = Sequence(
            [
                item(
                    RescaleSlope=first.RescaleSlope,
                    RescaleIntercept=first.RescaleIntercept,
                    RescaleType="US",
                )
            ]
        )
    out.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for time, n, piece in frames:
        group = Dataset()
        group.FrameContentSequence = Sequence(
            [
                item(
                    StackID="1",
                    InStackPositionNumber=n,
                    TemporalPositionIndex=time,
                    DimensionIndexValues=[time, n],
                )
            ]
        )
        group.PlanePositionSequence = Sequence(
            [item(ImagePositionPatient=piece.ImagePositionPatient)]
        )
        groups.append(group)
    out.PerFrameFunctionalGroupsSequence = Sequence(groups)
    out.PixelData = b"".join(piece.PixelData for _, _, piece in frames)
    return out


def item(**values: Any) -> Dataset:
    """An item of a sequence."""
    out = Dataset()
    for tag, value in values.items():
        setattr(out, tag, value)
    return out
