"""Make the sample volumes: synthetic heads with known answers, rendered from a label map that no
model was trained on.

python sample_volumes/make_samples.py FOLDER_OF_LABEL_MAPS

The label map (training_seg_20.nii.gz of BBillot/SynthSeg, Apache-2.0) is deformed and rendered at 1
mm with T1-like intensities by medseg/synth.py, then stored in three ways: on a straight grid, on an
oblique one, and as a DICOM series.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from medseg.config import load_config
from medseg.io import read_labels, write
from medseg.labels import LabelTable
from medseg.training.synth import load_heads, lookup, render
from medseg.volume import Volume, crop, reorient, resample

HERE = Path(__file__).parent
SEED = 20


def main(folder: Path) -> None:
    """Render the head and write every sample beside this file."""
    config = load_config(HERE.parent / "configs" / "brain.yaml", {"data": str(folder)})
    table = LabelTable.read(config.labels)
    classes = (0, *table.values)
    quiet = config.synth.model_copy(
        update={"skull_stripped": 0.0, "coarse": 0.0, "cut": 0.0, "blurred": 0.0, "noise": 0.03,
        "noise_within": 0.03,
                "bias": 0.2, "gamma": 0.1, "anywhere": 0.0, "offset_mm": 0.0,
                "rotation_degrees": 5.0, "flip": 0.0,
                "scaling": (1.0, 1.0), "dark_background": 1.0}
    )  # fmt: skip
    heads = load_heads(
        [read_labels(folder / name) for name in config.hold_out],
        [*table.values, *config.synth.merge],
    )
    known = lookup(heads.values, classes, table.mirror_pairs() | config.synth.mirror, config.synth)
    image, truth = render(
        heads, known, (184, 224, 224), 1.0, quiet, torch.Generator().manual_seed(SEED), t1_like=1.0
    )
    affine = np.eye(4)
    affine[:3, 3] = (-92, -100, -110)
    head = Volume((image.numpy() * 1000).astype(np.int16), affine)
    labels = Volume(np.array(classes, np.uint8)[truth.numpy()], affine)

    straight = np.diag([1.8, 1.8, 1.8, 1.0])
    straight[:3, 3] = affine[:3, 3]
    save("head_t1", head, labels, straight, (102, 124, 124), table, "LAS")
    turn = rotation(25, 0) @ rotation(-15, 2)
    oblique = np.eye(4)
    oblique[:3, :3] = turn * 2.0
    shape = (108, 120, 120)
    oblique[:3, 3] = (affine @ (92, 112, 112, 1))[:3] - oblique[:3, :3] @ (
        (np.array(shape) - 1) / 2
    )
    save("head_t1_oblique", head, labels, oblique, shape, table, None)
    thick = np.diag([2.0, 2.0, 4.0, 1.0])
    thick[:3, 3] = affine[:3, 3]
    scan = reorient(resample(head, thick, (92, 112, 56)), "LPS")
    write_series(HERE / "head_t1_dicom", scan.with_data(np.round(scan.data).astype(np.int16)))


def save(
    name: str, head: Volume, labels: Volume, affine: np.ndarray, shape: tuple[int, int, int],
    table: LabelTable,
    orientation: str | None,
) -> None:  # fmt: skip
    """Write the head and its labels on a grid, cut to where the head is."""
    scan, truth = resample(head, affine, shape), resample(labels, affine, shape, order=0)
    filled = [
        np.flatnonzero((scan.data > 60).sum(axis=tuple({0, 1, 2} - {a})) > 20) for a in range(3)
    ]
    start = tuple(max(0, int(f[0]) - 3) for f in filled)
    size = tuple(min(int(f[-1]) + 4, n) - s for f, n, s in zip(filled, shape, start))
    scan, truth = crop(scan, start, size), crop(truth, start, size)
    if orientation:
        scan, truth = reorient(scan, orientation), reorient(truth, orientation)
    write(scan.with_data(np.round(scan.data).astype(np.int16)), HERE / f"{name}.nii.gz")
    write(truth, HERE / f"{name}_truth.nii.gz", table=table)


def rotation(degrees: float, axis: int) -> np.ndarray:
    """(3, 3) rotation about an axis."""
    a, b = [n for n in range(3) if n != axis]
    angle, matrix = np.deg2rad(degrees), np.eye(3)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def write_series(folder: Path, scan: Volume) -> None:
    """An MR series of axial slices, one file each (PS3.3 A.4); the patient is called
    Synthetic^Head.
    """
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(exist_ok=True)
    study, series, frame = (
        generate_uid(entropy_srcs=["medseg sample", part]) for part in ("study", "series", "frame")
    )
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine
    spacing = scan.spacing_mm
    for k in range(scan.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MRImageStorage
        data.SOPInstanceUID = generate_uid(entropy_srcs=["medseg sample", str(k)])
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (
            study,
            series,
            frame,
        )
        data.PatientName, data.PatientID, data.Modality, data.SeriesNumber = (
            "Synthetic^Head",
            "SYNTHETIC",
            "MR",
            1,
        )
        data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = (
            data.AccessionNumber
        ) = ""
        (
            data.StudyID,
            data.ReferringPhysicianName,
            data.PositionReferenceIndicator,
            data.Laterality,
        ) = "1", "", "", ""
        data.Manufacturer, data.SeriesDescription = "medseg", "synthetic T1-like head"
        data.ImageType, data.ScanningSequence, data.SequenceVariant = (
            ["DERIVED", "SECONDARY"],
            "RM",
            "NONE",
        )
        data.ScanOptions, data.MRAcquisitionType, data.EchoTime, data.EchoTrainLength = (
            "",
            "3D",
            "",
            "",
        )
        data.RepetitionTime, data.InstanceNumber = "", k + 1
        data.ImageOrientationPatient = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
        data.ImagePositionPatient = [round(float(x), 6) for x in (lps @ (0, 0, k, 1))[:3]]
        data.PixelSpacing, data.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        data.Rows, data.Columns, data.SamplesPerPixel = scan.shape[1], scan.shape[0], 1
        data.PhotometricInterpretation, data.BitsAllocated, data.BitsStored, data.HighBit = (
            "MONOCHROME2",
            16,
            16,
            15,
        )
        data.PixelRepresentation = 1
        data.PixelData = np.ascontiguousarray(scan.data[:, :, k].T).astype("<i2").tobytes()
        pydicom.dcmwrite(folder / f"slice_{k + 1:03d}.dcm", data, enforce_file_format=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
