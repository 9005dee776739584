"""The scene for 3D Slicer without Slicer: one zip, equal bytes, nothing of a patient, and what its
nodes say.
"""

from __future__ import annotations

import tempfile
import zipfile
from io import BytesIO
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest

from making import heads
from medseg import io
from medseg.errors import BadOutput
from medseg.io.slicer import read_table
from medseg.labels import LabelTable
from medseg.view.contrast import contrast_of
from medseg.view.scene import scene_xml, write_scene
from medseg.volume import Volume


@pytest.fixture
def archive(tmp_path) -> zipfile.ZipFile:
    write_scene(tmp_path / "case.mrb", *heads.head(), heads.TABLE)
    return zipfile.ZipFile(tmp_path / "case.mrb")


def nodes(xml: bytes) -> dict[str, dict[str, str]]:
    return {node.get("id"): dict(node.attrib) for node in ElementTree.parse(BytesIO(xml)).getroot()}


def test_a_scene_is_one_folder_with_what_its_nodes_name(archive):
    assert archive.testzip() is None
    assert archive.namelist() == [
        "case/case.mrml", "case/Data/scan.nrrd", "case/Data/labels.seg.nrrd",
        "case/Data/labels.ctbl",
    ]  # fmt: skip
    named = {
        node["fileName"]
        for node in nodes(archive.read("case/case.mrml")).values()
        if "fileName" in node
    }
    assert {f"case/{name}" for name in named} == set(archive.namelist()[1:])


def test_the_data_in_it_are_the_scan_the_labels_and_their_table(archive, tmp_path):
    scan, labels = heads.head()
    for name in archive.namelist()[1:]:
        (tmp_path / name.rsplit("/")[-1]).write_bytes(archive.read(name))
    for name, volume in (("scan.nrrd", scan), ("labels.seg.nrrd", labels)):
        back = io.read(tmp_path / name)
        assert np.array_equal(back.data, volume.data)
        assert np.allclose(back.affine, volume.affine, atol=1e-9)
    assert set(read_table(tmp_path / "labels.seg.nrrd").labels) == set(heads.TABLE.labels)
    assert set(LabelTable.read(tmp_path / "labels.ctbl").values) == set(heads.TABLE.values)


def test_references_lead_somewhere_and_ids_are_one_each(archive):
    root = ElementTree.parse(archive.open("case/case.mrml")).getroot()
    identifiers = [node.get("id") for node in root]
    assert len(set(identifiers)) == len(identifiers)
    for node in root:
        for reference in filter(None, node.get("references", "").split(";")):
            assert reference.split(":")[1] in identifiers


def test_the_scan_is_windowed_and_all_of_it_is_in_the_views(archive):
    scan, labels = heads.head()
    found, contrast = nodes(archive.read("case/case.mrml")), contrast_of(scan.data)
    display = found["vtkMRMLScalarVolumeDisplayNode1"]
    assert float(display["window"]) == pytest.approx(contrast.high - contrast.low, rel=1e-5)
    assert float(display["level"]) == pytest.approx((contrast.high + contrast.low) / 2, rel=1e-5)
    assert display["autoWindowLevel"] == "0"
    extent = max(n * s for n, s in zip(scan.shape, scan.spacing_mm))
    boxes = np.argwhere(labels.data)
    middle = (labels.affine @ (*((boxes.min(0) + boxes.max(0)) / 2), 1))[:3]
    for name, right_on_left in (("Red", True), ("Green", True), ("Yellow", False)):
        view = found[f"vtkMRMLSliceNode{name}"]
        assert float(view["fieldOfView"].split()[1]) >= extent
        place = np.array(view["sliceToRAS"].split(), float).reshape(4, 4)
        assert np.allclose(place[:3, 3], middle, atol=1e-4)
        across = place[:3, 0]  # where the picture runs to from left to right
        assert np.array_equal(across, (-1, 0, 0) if right_on_left else (0, -1, 0))
        assert np.abs(np.linalg.det(place[:3, :3])) == pytest.approx(1)


def test_equal_input_gives_equal_bytes(archive, tmp_path):
    write_scene(tmp_path / "again.mrb", *heads.head(), heads.TABLE)
    assert (tmp_path / "again.mrb").read_bytes() == (tmp_path / "case.mrb").read_bytes()
    assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_nothing_of_a_patient_is_in_a_scene(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "DOE^JANE").mkdir()
    image = nib.Nifti1Image(
        np.random.default_rng(0).integers(0, 99, (6, 6, 6), np.int16), np.eye(4)
    )
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"DOE^JANE"
    nib.save(image, tmp_path / "DOE^JANE/DOE^JANE.nii")
    scan = io.read(tmp_path / "DOE^JANE/DOE^JANE.nii")

    write_scene(
        tmp_path / "DOE^JANE/DOE^JANE.mrb", scan, scan.with_data((scan.data > 50).astype(np.uint8))
    )

    content = (tmp_path / "DOE^JANE/DOE^JANE.mrb").read_bytes()
    archive = zipfile.ZipFile(BytesIO(content))
    for text in (content, *(archive.read(name) for name in archive.namelist())):
        assert b"DOE" not in text
        assert str(tmp_path).encode() not in text
    assert not list((tmp_path / "temporary").iterdir())


def test_a_title_may_hold_what_xml_means_something_by():
    scan, labels = heads.head()
    xml = scene_xml(scan, labels, title='a<b & "c" > 脳')
    assert nodes(xml)["vtkMRMLScalarVolumeNode1"]["name"] == 'a<b & "c" > 脳'


def test_labels_that_are_empty_still_make_a_scene(tmp_path):
    scan, labels = heads.head()
    write_scene(tmp_path / "x.mrb", scan, labels.with_data(np.zeros_like(labels.data)), heads.TABLE)
    scene = nodes(zipfile.ZipFile(tmp_path / "x.mrb").read("case/case.mrml"))
    numbers = scene["vtkMRMLSliceNodeRed"]["sliceToRAS"].split()
    place = np.array(numbers, float).reshape(4, 4)
    middle = (scan.affine @ (*((np.array(scan.shape) - 1) / 2), 1))[:3]
    assert np.allclose(place[:3, 3], middle)


def test_surfaces_of_very_large_labels_are_left_to_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.view.scene.MAX_SURFACE_VOXELS", 100)
    write_scene(tmp_path / "x.mrb", *heads.head())
    header = zipfile.ZipFile(tmp_path / "x.mrb").read("case/Data/labels.seg.nrrd")[:1000]
    assert b"Binary labelmap|\n" in header


def test_a_scene_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(BadOutput, match="cannot be written"):
        write_scene(tmp_path / "missing/x.mrb", *heads.head())
    scan, labels = heads.head()
    with pytest.raises(BadOutput):
        write_scene(tmp_path / "x.mrb", scan, Volume(labels.data + 0.5, labels.affine))
    assert not list(tmp_path.iterdir())
