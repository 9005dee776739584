"""`medseg export` of a label map: what it writes, and what it refuses in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import medseg
from making import networks as tiny
from making.places import ROOT
from medseg.errors import BadConfig, BadOutput
from medseg.labels import Label, LabelTable

TABLE = LabelTable(
    (
        Label(1, "left lung", (10, 20, 30)),
        Label(2, "Liver", (200, 0, 0)),
        Label(3, "cyst", (0,) * 3),
    )
)


@pytest.fixture
def labels(tmp_path) -> Path:
    """A label map of two structures and its table, as `medseg infer` leaves them."""
    data = np.zeros((16, 14, 12), np.uint8)
    data[2:7, 3:11, 2:9], data[7:14, 3:11, 2:9] = 1, 2
    tiny.save_nifti(tmp_path / "a_seg.nii.gz", data, tiny.affine_of())
    TABLE.write(tmp_path / "a_seg.labels.csv")
    return tmp_path / "a_seg.nii.gz"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("a_seg"))


def test_each_format_is_written(labels, tmp_path):
    out = tmp_path / "out"
    ran = tiny.medseg(
        "export", labels, "--stl", out / "stl", "--obj", out / "a.obj", "--gltf", out / "a.glb"
    )
    assert ran.code == 0, ran.err
    assert [Path(line) for line in ran.out.splitlines()] == [
        out / "stl" / "left_lung.stl",
        out / "stl" / "Liver.stl",
        out / "a.obj",
        out / "a.mtl",
        out / "a.glb",
    ]
    assert all(Path(line).stat().st_size for line in ran.out.splitlines())
    assert "2 structures" in ran.err
    assert names(out) == ["a.glb", "a.mtl", "a.obj", "stl"]


def test_structures_are_chosen_by_name_or_number(labels, tmp_path):
    for text, expected in (("LIVER", ["Liver.stl"]), ("2,1", ["Liver.stl", "left_lung.stl"])):
        out = tmp_path / text.replace(",", "_")
        ran = tiny.medseg("export", labels, "--stl", out, "--structures", text, "--quiet")
        assert ran.code == 0, ran.err
        assert names(out) == sorted(expected)
        assert ran.err == ""


def test_json_says_what_was_written(labels, tmp_path):
    ran = tiny.medseg("export", labels, "--gltf", tmp_path / "a.glb", "--triangles", 200, "--json")
    facts = json.loads(ran.out)
    assert facts["files"] == [str(tmp_path / "a.glb")]
    one, two = facts["structures"]
    assert (one["value"], one["name"], two["name"]) == (1, "left lung", "Liver")
    voxel_ml = abs(np.linalg.det(tiny.affine_of()[:3, :3])) / 1000
    assert one["ml"] == pytest.approx(5 * 8 * 7 * voxel_ml, rel=0.01)
    assert two["ml"] == pytest.approx(7 * 8 * 7 * voxel_ml, rel=0.01)
    assert one["triangles"] + two["triangles"] <= 200


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--structures", "spleen", "--stl", "o"], 5, "no structure 'spleen'"),
        (["--structures", "cyst", "--stl", "o"], 5, "no voxel of the label map is cyst (3)"),
        (["--structures", ",", "--stl", "o"], 5, "no structure is named"),
        (["--structures", "Liver"], 5, "--structures goes with --stl, --obj or --gltf"),
        (["--triangles", "100"], 5, "--triangles goes with"),
        (["--stl", "o", "--torchscript"], 5, "--torchscript is for a model"),
        (["--stl", "o", "-o", "a.onnx"], 5, "-o is for a model"),
        (["--obj", "a.txt"], 4, "a.txt"),
        (["--gltf", "a.obj"], 4, "a.obj"),
        (["--obj", "a.glb"], 4, "a.glb"),
        (["--stl", "o.stl"], 4, "one structure, and this would be 2"),
        (["--gltf", "a.glb", "--triangles", "3"], 2, "greater than or equal to 4"),
        ([], 5, "--gltf FILE"),
    ],
)
def test_what_makes_no_sense_is_refused(labels, tmp_path, monkeypatch, options, code, said):
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("export", labels.name, *options)
    assert ran.code == code, ran.err
    assert said in " ".join(ran.err.split())
    assert names(tmp_path) == []


def test_the_commands_of_the_page_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.zeros((8, 8, 8), np.uint8)
    data[2:6, 2:6, 2:4], data[2:6, 2:6, 4:6] = 1, 2
    (tmp_path / "labels").mkdir()
    tiny.save_nifti(tmp_path / "labels" / "a.nii.gz", data, np.eye(4))
    TABLE.over(LabelTable.from_values([1, 2])).write(tmp_path / "labels" / "labels.csv")
    page = (ROOT / "docs" / "surfaces.md").read_text(encoding="utf-8")
    lines = re.findall(r"^medseg .*", page, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        ran = tiny.medseg(*line.split()[1:])
        assert ran.code == 0, ran.err


def test_what_is_no_label_map_is_refused(labels, tmp_path):
    ran = tiny.medseg("export", tmp_path / "none.nii.gz", "--stl", tmp_path / "o")
    assert ran.code == 3
    assert "there is no such file" in ran.err
    tiny.save_nifti(tmp_path / "empty.nii.gz", np.zeros((4, 4, 4), np.uint8), np.eye(4))
    ran = tiny.medseg("export", tmp_path / "empty.nii.gz", "--stl", tmp_path / "o")
    assert ran.code == 5
    assert "empty.nii.gz: the label map holds no structure" in ran.err
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4)
    tiny.save_nifti(tmp_path / "grey.nii.gz", grey, np.eye(4))
    assert tiny.medseg("export", tmp_path / "grey.nii.gz", "--stl", tmp_path / "o").code == 3
    assert not (tmp_path / "o").exists()


def test_the_same_from_python(labels, tmp_path):
    assert medseg.export(labels, tmp_path / "a.glb") == [tmp_path / "a.glb"]
    ran = tiny.medseg("export", labels, "--gltf", tmp_path / "b.glb")
    assert ran.code == 0
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    volume = medseg.read_labels(labels)
    paths = medseg.export(volume, tmp_path / "stl", table=TABLE, structures=["Liver"])
    assert paths == [tmp_path / "stl" / "Liver.stl"]
    with pytest.raises(BadOutput, match="give such a name"):
        medseg.export(volume, tmp_path / "a.ply")
    with pytest.raises(BadConfig, match="list of names"):
        medseg.export(volume, tmp_path / "a.glb", structures="Liver")
    with pytest.raises(BadConfig, match="about surfaces"):
        medseg.export("brain", tmp_path / "a.onnx", structures=["Liver"])
    with pytest.raises(BadConfig, match="name or the folder of a model"):
        medseg.export(volume, tmp_path / "a.onnx")
