"""DICOM results from the command line: what is written under which name, and what is said when it
cannot be.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

import medseg
from making import networks as tiny
from making.dicom_labels import TABLE, errors, phantom, source
from medseg import io
from medseg.errors import BadOutput

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return source(tmp_path / "scan", count=8, rows=20, columns=20)[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_infer_writes_seg_rtstruct_and_sr_side_by_side(scan: Path, tmp_path: Path):
    out = tmp_path / "out" / "result.dcm"

    ran = tiny.medseg(
        "infer",
        scan,
        "-o",
        out,
        "--model",
        "otsu",
        "--also",
        "rtstruct, SR",
        "--seg-type",
        "labelmap",
    )

    assert ran.code == 0, ran.err
    assert names(out.parent) == [
        "result.dcm",
        "result.json",
        "result.labels.csv",
        "result.rtstruct.dcm",
        "result.sr.dcm",
    ]
    kinds = {
        name: pydicom.dcmread(out.parent / name).Modality
        for name in names(out.parent)
        if name.endswith(".dcm")
    }
    assert kinds == {"result.dcm": "SEG", "result.rtstruct.dcm": "RTSTRUCT", "result.sr.dcm": "SR"}
    dataset = pydicom.dcmread(out)
    assert (dataset.SegmentationType, dataset.SeriesDescription) == ("LABELMAP", "medseg otsu")
    (algorithm,) = dataset.SegmentSequence[1].SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "medseg otsu"
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Histogram Analysis"
    labels = io.read_labels(out)
    assert np.array_equal(
        io.read_labels(out.parent / "result.rtstruct.dcm", source=scan).data, labels.data
    )


def test_other_results_may_have_dicom_beside_them(scan: Path, tmp_path: Path):
    out = tmp_path / "out" / "r.nii.gz"

    ran = tiny.medseg(
        "infer", scan, "-o", out, "--model", "otsu", "--also", "seg,sr", "--deterministic"
    )

    assert ran.code == 0, ran.err
    assert names(out.parent) == ["r.json", "r.labels.csv", "r.nii.gz", "r.seg.dcm", "r.sr.dcm"]
    assert np.array_equal(io.read_labels(out).data, io.read_labels(out.parent / "r.seg.dcm").data)
    first = {name: (out.parent / name).read_bytes() for name in ("r.seg.dcm", "r.sr.dcm")}
    tiny.medseg("infer", scan, "-o", out, "--model", "otsu", "--also", "seg,sr", "--deterministic")
    assert first == {name: (out.parent / name).read_bytes() for name in first}


def test_a_structure_set_can_be_the_result(scan: Path, tmp_path: Path):
    ran = tiny.medseg(
        "infer", scan, "-o", tmp_path / "out" / "r.rtstruct.dcm", "--model", "otsu", "--deidentify"
    )

    assert ran.code == 0, ran.err
    assert names(tmp_path / "out") == ["r.json", "r.labels.csv", "r.rtstruct.dcm"]
    dataset = pydicom.dcmread(tmp_path / "out" / "r.rtstruct.dcm")
    assert (dataset.Modality, str(dataset.PatientName)) == ("RTSTRUCT", "Anonymous^")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{scan}", "-o", "x.dcm", "--also", "rtstruct,pdf"], 2, "pdf"),
        (["{scan}", "-o", "x.dcm", "--seg-type", "fractional"], 2, "fractional"),
        (["{scan}", "-o", "x.rtstruct.dcm", "--also", "sr"], 5, "--also seg,sr"),
        (["scan.nii.gz", "-o", "x.dcm"], 4, "no DICOM"),
        (["scan.nii.gz", "-o", "x.nii.gz", "--also", "seg"], 4, "no DICOM"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    scan: Path, tmp_path: Path, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    io.write(io.read(scan), "scan.nii.gz")
    before = names(tmp_path)

    ran = tiny.medseg(
        "infer", *(text.replace("{scan}", str(scan)) for text in arguments), "--model", "otsu"
    )

    assert ran.code == code
    assert words in ran.err
    assert names(tmp_path) == before


def test_convert_goes_between_all_label_forms(scan: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = phantom(io.read(scan))
    TABLE.write("table.csv")
    io.write(labels, "a.nii.gz")
    steps = [
        ("a.nii.gz", "b.dcm", "--source", scan, "--labels", "table.csv"),
        ("b.dcm", "c.seg.nrrd"),
        ("c.seg.nrrd", "d.rtstruct.dcm", "--source", scan),
        ("d.rtstruct.dcm", "e.dcm", "--source", scan, "--seg-type", "labelmap"),
        ("e.dcm", "f.mha"),
        ("d.rtstruct.dcm", "g.nii.gz", "--source", scan),
    ]
    for step in steps:
        ran = tiny.medseg("convert", *step)
        assert ran.code == 0, ran.err
        found = io.read_labels(step[1], source=scan if "rtstruct" in step[1] else None)
        assert np.array_equal(found.data, labels.data), step
        assert np.allclose(found.affine, labels.affine, atol=1e-4)
    assert io.embedded_table("e.dcm").names[5] == "Größe – 腎臓"
    assert errors(Path("e.dcm")) == []


def test_series_and_repair_are_about_the_source_of_labels(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan, grid = source(tmp_path / "scan", count=8, SeriesNumber=3)
    labels = phantom(grid)
    io.write(labels, "a.nii.gz")
    io.write(labels, "b.rtstruct.dcm", source=scan)
    io.write(labels, "c.dcm", source=scan)
    both, _ = source(tmp_path / "both", count=5, SeriesNumber=1)
    twice = tmp_path / "twice"
    twice.mkdir()
    files = sorted(scan.iterdir(), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))
    for n, file in enumerate([*files, files[2]]):
        (both / f"x{n}.dcm").write_bytes(file.read_bytes())
        (twice / f"x{n}.dcm").write_bytes(file.read_bytes())

    for folder, options in ((both, ("--series", "2", "--repair")), (twice, ("--repair",))):
        for name in ("a.nii.gz", "b.rtstruct.dcm", "c.dcm"):
            for target in ("t.nii.gz", "t.dcm", "t.rtstruct.dcm"):
                ran = tiny.medseg("convert", name, target, "--source", folder, *options)
                assert ran.code == 0, (name, target, ran.err)
                found = io.read_labels(
                    target, source=scan if target.endswith("rtstruct.dcm") else None
                )
                assert np.array_equal(found.data, labels.data), (name, target)
    ran = tiny.medseg("convert", "c.dcm", "u.nii.gz", "--source", twice)
    assert (ran.code, "--repair" in ran.err, Path("u.nii.gz").exists()) == (3, True, False)
    ran = tiny.medseg("convert", "a.nii.gz", "u.nii.gz", "--repair")
    assert (ran.code, "is no DICOM" in ran.err) == (3, True)


def test_convert_takes_single_structures_and_other_grids_when_asked(
    scan: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    labels = phantom(io.read(scan))
    io.write(labels, "a.dcm", table=TABLE, source=scan)
    assert (
        tiny.medseg("convert", "a.dcm", "one.nii.gz", "--segment", "mass", "--segment", "2").code
        == 0
    )
    assert np.unique(io.read_labels("one.nii.gz").data).tolist() == [0, 2, 41]
    ran = tiny.medseg("convert", "a.dcm", "x.nii.gz", "--segment", "nothing")
    assert (ran.code, "no segment 'nothing'" in ran.err) == (3, True)

    moved = labels.affine.copy()
    moved[:3, 3] += labels.affine[:3, 0] * 0.3
    io.write(type(labels)(labels.data, moved), "moved.nii.gz")
    ran = tiny.medseg("convert", "moved.nii.gz", "x.dcm", "--source", scan)
    assert (ran.code, "another grid" in ran.err, Path("x.dcm").exists()) == (4, True, False)
    assert tiny.medseg("convert", "moved.nii.gz", "x.dcm", "--source", scan, "--nearest").code == 0
    assert np.array_equal(io.read_labels("x.dcm").data, labels.data)
    ran = tiny.medseg("convert", "moved.nii.gz", "y.dcm")
    assert (ran.code, "--source" in ran.err) == (4, True)
    io.write(io.read(scan), "scan.nii.gz")
    ran = tiny.medseg("convert", "scan.nii.gz", "y.dcm", "--source", scan)
    assert (ran.code, "label map" in ran.err, Path("y.dcm").exists()) == (4, True, False)


def test_what_is_read_is_not_written_over(scan: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.write(phantom(io.read(scan)), "a.nii.gz")
    image = next(scan.iterdir())
    before = image.read_bytes(), Path("a.nii.gz").read_bytes()

    for options in (
        ("a.nii.gz", image, "--source", scan),
        ("a.nii.gz", "./a.nii.gz"),
        ("a.nii.gz", "a.nii.gz", "--segment", "2"),
    ):
        ran = tiny.medseg("convert", *options)
        assert (ran.code, "would be overwritten" in ran.err) == (4, True), ran.err
        with pytest.raises(BadOutput, match="overwritten"):
            medseg.convert(options[0], options[1], source=scan)
    assert (image.read_bytes(), Path("a.nii.gz").read_bytes()) == before


def test_a_structure_of_a_plain_label_map_is_written_as_the_options_say(
    scan: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    labels = phantom(io.read(scan))
    io.write(labels, "a.nii.gz")
    image = nibabel.load("a.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 9
    image.set_qform(moved, 1)
    nibabel.save(image, "b.nii.gz")
    TABLE.write("a.labels.csv")
    TABLE.write("b.labels.csv")

    for name, options in (("a.nii.gz", ()), ("b.nii.gz", ("--assume-geometry", "sform"))):
        ran = tiny.medseg("convert", name, "x.dcm", "--source", scan, "--segment", "mass", *options)
        assert ran.code == 0, ran.err
        assert np.array_equal(io.read_labels("x.dcm", source=scan).data == 41, labels.data == 41)
    medseg.convert("a.nii.gz", "y.dcm", source=scan, segment=["mass"])
    assert io.embedded_table("y.dcm").names == {41: "mass"}


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".dcm", ".rtstruct.dcm"])
def test_names_beside_a_label_map_go_with_it(scan: Path, tmp_path: Path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    io.write(phantom(io.read(scan)), "a.nii.gz")
    TABLE.write("a.labels.csv")

    assert tiny.medseg("convert", "a.nii.gz", f"x{suffix}", "--source", scan).code == 0
    medseg.convert("a.nii.gz", f"y{suffix}", source=scan)

    for name in ("x", "y"):
        assert io.embedded_table(f"{name}{suffix}").names[41] == "mass"
    Path("labels.csv").write_text("patient,outcome\n1,2\n", encoding="utf-8")
    ran = tiny.medseg("convert", "a.nii.gz", f"z{suffix}", "--source", scan)
    assert (ran.code, "names are left out" in ran.err) == (0, True), ran.err


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".dcm"])
def test_names_in_a_segmentation_are_those_of_its_surfaces(scan: Path, tmp_path: Path, suffix):
    path = tmp_path / f"a{suffix}"
    io.write(phantom(io.read(scan)), path, table=TABLE, source=scan)

    ran = tiny.medseg("export", path, "--stl", tmp_path / "out", "--structures", "mass")

    assert ran.code == 0, ran.err
    assert names(tmp_path / "out") == ["mass.stl"]


def test_a_table_of_a_file_that_is_not_there_is_not_looked_for_beside_it(tmp_path: Path):
    ran = tiny.medseg("convert", tmp_path / "a.nii.gz", tmp_path / "labels.csv")

    assert (ran.code, "there is no such file" in ran.err) == (3, True)


def test_structures_that_overlap_become_layers_of_a_slicer_segmentation(
    scan: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    masks = np.zeros((2, *io.read(scan).shape), bool)
    masks[0, 3:9, 4:9, 2:6] = masks[1, 6:12, 2:7, 3:5] = True
    for name in ("a.rtstruct.dcm", "b.rtstruct.dcm"):
        io.write(
            io.read(scan).with_data(masks["ab".index(name[0])].astype(np.uint8)), name, source=scan
        )
    dataset, other = pydicom.dcmread("a.rtstruct.dcm"), pydicom.dcmread("b.rtstruct.dcm")
    for sequence, number in (
        ("StructureSetROISequence", "ROINumber"),
        ("ROIContourSequence", "ReferencedROINumber"),
        ("RTROIObservationsSequence", "ReferencedROINumber"),
    ):
        item = other[sequence].value[0]
        setattr(item, number, 9)
        dataset[sequence].value.append(item)
    dataset.save_as("both.rtstruct.dcm")

    ran = tiny.medseg("convert", "both.rtstruct.dcm", "x.nii.gz", "--source", scan)
    assert (ran.code, ".seg.nrrd" in ran.err, Path("x.nii.gz").exists()) == (3, True, False)
    assert tiny.medseg("convert", "both.rtstruct.dcm", "x.seg.nrrd", "--source", scan).code == 0

    found = io.read_masks("x.seg.nrrd")
    assert [label.value for label, _ in found] == [1, 9]
    for (_, mask), expected in zip(found, masks, strict=True):
        assert np.array_equal(mask.data > 0, expected)


def test_info_lists_the_structures_of_dicom_labels(scan: Path, tmp_path: Path):
    io.write(phantom(io.read(scan)), tmp_path / "a.rtstruct.dcm", table=TABLE, source=scan)
    io.write(phantom(io.read(scan)), tmp_path / "a.dcm", table=TABLE, source=scan)
    for name, kind in (("a.dcm", "SEG"), ("a.rtstruct.dcm", "RTSTRUCT")):
        ran = tiny.medseg("info", tmp_path / name)
        assert ran.code == 0, ran.err
        assert f"DICOM {kind}" in ran.out
        assert "300  beyond a byte" in ran.out


def test_info_knows_models_by_name_and_files_before_them(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file in the folder is meant where one is called as a model."""
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("info", "brain-fast", "otsu", "--json")
    assert ran.code == 0, ran.err
    trained, untrained = map(json.loads, ran.out.splitlines())
    assert trained["models"][0]["labels"]["17"] == "left hippocampus"
    assert untrained["models"][0]["labels"] == {"1": "foreground"}
    assert "brain-fast: a model" in tiny.medseg("info", "brain-fast").out

    (tmp_path / "otsu").mkdir()
    ran = tiny.medseg("info", "otsu")
    assert ran.code == 3 and "otsu" in ran.err
    assert tiny.medseg("info", "no-such-model").code == 3
