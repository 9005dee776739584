"""Density, emphysema and totals of a CT's tissues, worked out by hand; the table on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from making.ct import LEFT, RIGHT, SUBCUTANEOUS, VISCERAL, grid, trunk
from medseg.inference.tissues.measures import measure
from medseg.inference.tissues.windows import TISSUES
from medseg.io import write
from medseg.postprocess import structure_volumes
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")


def test_density_and_emphysema_are_those_of_the_voxels():
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[0], labels[1] = LEFT, RIGHT
    data = np.full(labels.shape, 40.0)
    data[0], data[1] = -800, -900
    data[0, 0], data[0, 1, :3] = -951, -950  # six voxels below -950, three at it
    scan = Volume(data, np.diag([2.0, 2, 2, 1]))
    label_map = scan.with_data(labels)
    rows = structure_volumes(label_map, TISSUES)
    totals = {row["name"]: row for row in measure(scan, label_map, rows)}
    by_value = {row["value"]: row for row in rows}
    assert by_value[LEFT]["laa_950_percent"] == 20.0
    assert by_value[RIGHT]["laa_950_percent"] == 0.0
    assert by_value[LEFT]["mean_hu"] == round((6 * -951 + 3 * -950 + 21 * -800) / 30, 1)
    assert "mean_hu" not in by_value[SUBCUTANEOUS]
    assert totals["lungs"] == {
        "name": "lungs",
        "ml": 0.48,
        "mean_hu": round((6 * -951 + 3 * -950 + 21 * -800 + 30 * -900) / 60, 1),
        "laa_950_percent": 10.0,
    }
    assert totals["body"]["ml"] == 0.48 and totals["fat"] == {"name": "fat", "ml": 0.0}


def test_the_command_writes_a_table_of_volumes_and_areas(tmp_path: Path):
    affine, shape = grid(
        low_mm=(-225, -180, -120), high_mm=(225, 150, 150), spacing_mm=(4.0, 4.0, 4.0)
    )
    case = trunk(affine, shape, noise=10)
    write(case.scan, tmp_path / "ct.nii.gz")
    ran = tiny.medseg(
        "infer", tmp_path / "ct.nii.gz", "-m", "ct-tissues", "--at=-61", "--also", "volumes",
        "--json", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    slice_number = int(np.argmin(np.abs(affine[2, 3] + 4.0 * np.arange(shape[2]) + 61)))
    (level,) = record["levels"]
    assert level["slice"] == slice_number and abs(level["mm"] + 61) <= 2
    areas = {row["value"]: row["cm2"] for row in level["structures"]}
    for value in (SUBCUTANEOUS, VISCERAL):
        true_cm2 = (case.truth[..., slice_number] == value).sum() * 0.16
        assert areas[value] == pytest.approx(true_cm2, rel=0.12)
    with (tmp_path / "ct_seg.volumes.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["left lung"]["mean_hu"]) == pytest.approx(-850, abs=10)
    assert float(rows["lungs"]["laa_950_percent"]) < 1 and rows["lungs"]["value"] == ""
    column = f"cm2 at {level['mm']:g} mm"
    assert float(rows["visceral fat"][column]) == areas[VISCERAL]
    assert record["settings"]["at_mm"] == [-61.0] and record["model"] == {"name": "ct-tissues"}


def test_heights_outside_the_scan_or_no_numbers_are_refused(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "s.nii.gz")
    ran = tiny.medseg("infer", scan, "-m", "otsu", "--at", "5000", "-q")
    assert ran.code == 5 and "--at 5000" in ran.err and ran.err.count("\n") == 1
    for text in ("a", "1,,2", "nan", "1e9"):
        assert tiny.medseg("infer", scan, "-m", "otsu", "--at", text, "-q").code == 2
    assert not list(tmp_path.glob("*_seg*"))
