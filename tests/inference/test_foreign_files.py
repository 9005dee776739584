"""Models of nnU-Net through the command line: DICOM, 3D Slicer, channels, memory, maps."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from making import dicom, networks as tiny, nnunet as making
from medseg.inference import Settings, segment
from medseg.inference.forecast import plan
from medseg.io import read, read_labels
from medseg.models import load_models
from medseg.volume import Volume, reorient

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """It finds what is bright, as liver."""
    plan = making.plans(spacing=[2.0, 1.0, 1.0], normalization_schemes=["CTNormalization"])
    return making.write_model(
        tmp_path / "model",
        plan=plan,
        data=making.dataset(channels=("CT",)),
        make_weights=making.bright_weights,
    )


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """An oblique CT of noise with a bright block off the middle, 2.5 mm between slices."""
    pieces = dicom.series(18, 30, 26)
    random = np.random.default_rng(0)
    for number, piece in enumerate(sorted(pieces, key=lambda one: one.InstanceNumber)):
        values = random.integers(1000, 1040, (30, 26)).astype(np.int16)
        if 3 <= number < 10:
            values[4:13, 14:22] = 1600
        piece.PixelData = values.tobytes()
    return dicom.save(pieces, tmp_path / "ct")


def infer(*arguments: object) -> tiny.Ran:
    return tiny.medseg("infer", *arguments, "--quiet")


def test_dicom_in_and_dicom_out_with_maps_beside_it(tmp_path, model, ct):
    out = tmp_path / "out.dcm"
    ran = infer(ct, "-o", out, "-m", model, "--also", "rtstruct,sr", "--uncertainty")
    assert ran.code == 0, ran.err
    found = segment(read(ct), load_models([str(model)]), Settings(from_dicom=True)).labels
    assert set(np.unique(found.data)) == {0, 1}
    stored = read_labels(out)
    back = reorient(stored, found.orientation)
    np.testing.assert_array_equal(back.data > 0, found.data == 1)
    np.testing.assert_allclose(back.affine, found.affine, atol=1e-3)
    segments = pydicom.dcmread(out).SegmentSequence
    assert [str(one.SegmentLabel) for one in segments] == ["liver"]
    assert "Liver" in str(segments[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning)
    regions = pydicom.dcmread(tmp_path / "out.rtstruct.dcm")
    assert [str(one.ROIName) for one in regions.StructureSetROISequence] == ["liver"]
    assert (tmp_path / "out.sr.dcm").exists()
    unsure = nib.load(tmp_path / "out.uncertainty.nii.gz").get_fdata()
    assert unsure.min() >= 0 and 0.05 < unsure.max() <= 1
    record = json.loads((tmp_path / "out.json").read_text())
    assert "scan turned to LPS" in record["settings"]["taken"]


def test_dicom_is_seen_as_the_orientation_that_is_asked_for(tmp_path, ct):
    """Random weights see another anatomy when it is mirrored; what is seen is that of a file."""
    folder = making.write_model(tmp_path / "random", plan=making.plans(spacing=[2.5, 1.0, 1.0]))
    for letters in ("LPS", "RAS"):
        out = tmp_path / f"{letters}.nii.gz"
        assert infer(ct, "-o", out, "-m", folder, "--orientation", letters).code == 0
        turned = reorient(read(ct), letters)
        tiny.save_nifti(tmp_path / "scan.nii.gz", turned.data, turned.affine)
        same = tmp_path / "same.nii.gz"
        assert infer(tmp_path / "scan.nii.gz", "-o", same, "-m", folder).code == 0
        one, other = (reorient(read_labels(path), letters).data for path in (out, same))
        assert (one != other).mean() < 2e-3  # the spacing of a file is rounded to float32
    first, second = (read_labels(tmp_path / f"{n}.nii.gz").data for n in ("LPS", "RAS"))
    assert (first != second).mean() > 0.01


def test_slicer_gets_names(tmp_path, model, ct):
    out = tmp_path / "out.seg.nrrd"
    ran = infer(ct, "-o", out, "-m", model, "--probabilities", "1")
    assert ran.code == 0, ran.err
    header = out.read_bytes()[:6000].decode("latin-1")
    assert "Name:=liver" in header
    labels = read_labels(out)
    likely = nib.load(tmp_path / "out.probability_1.nii.gz").get_fdata()
    assert labels.data.any() and likely.shape == labels.shape
    assert likely[labels.data == 1].min() > 0.49


def test_a_set_writes_one_dicom_object_with_the_names_of_all(tmp_path, ct):
    for n, names in ((1, {"background": 0, "liver": 1}), (2, {"background": 0, "kidney_left": 1})):
        making.write_model(
            tmp_path
            / "set"
            / f"Dataset29{n}_T_part{n}_x"
            / "nnUNetTrainer__nnUNetPlans__3d_fullres",
            plan=making.plans(spacing=[2.0, 1.0, 1.0]),
            data=making.dataset(names, channels=("CT",)),
            make_weights=making.bright_weights,
        )
    out = tmp_path / "out.dcm"
    assert infer(ct, "-o", out, "-m", tmp_path / "set", "--uncertainty").code == 0
    segments = pydicom.dcmread(out).SegmentSequence
    assert [str(one.SegmentLabel) for one in segments] == ["kidney_left"]  # it lies on the liver
    assert infer(ct, "-o", out, "-m", tmp_path / "set", "--roi", "liver").code == 0
    segments = pydicom.dcmread(out).SegmentSequence
    assert [str(one.SegmentLabel) for one in segments] == ["liver"]


def test_several_channels_come_by_name_or_one_by_one(tmp_path):
    plan = making.plans(
        normalization_schemes=["ZScoreNormalization", "NoNormalization"],
        use_mask_for_norm=[True, False],
    )
    folder = making.write_model(
        tmp_path / "model", plan=plan, data=making.dataset(channels=("T1", "FLAIR"))
    )
    random = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for n in range(2):
        data = random.normal(100, 30, (20, 18, 22)).astype(np.float32)
        data[:3] = 0
        tiny.save_nifti(tmp_path / "scans" / f"a_{n:04d}.nii.gz", data, np.diag([1.0, 1.2, 0.9, 1]))
    ran = infer(tmp_path / "scans", "-o", tmp_path / "out", "-m", folder, "--uncertainty")
    assert ran.code == 0, ran.err
    first, second = (tmp_path / "scans" / f"a_{n:04d}.nii.gz" for n in range(2))
    one = tmp_path / "one.nii.gz"
    assert infer(first, "--channel", second, "-o", one, "-m", folder).code == 0
    (together,) = (tmp_path / "out").glob("*_seg.nii.gz")
    np.testing.assert_array_equal(read_labels(one).data, read_labels(together).data)
    assert len(np.unique(read_labels(one).data)) > 1
    alone = first.rename(tmp_path / "alone.nii.gz")
    ran = infer(alone, "-o", tmp_path / "none.nii.gz", "-m", folder)
    assert ran.code != 0 and "T1" in ran.err and "FLAIR" in ran.err


def test_little_memory_means_stripes_and_the_same_labels(tmp_path, monkeypatch):
    folder = making.write_model(tmp_path / "model")
    random = np.random.default_rng(0)
    scan = Volume(random.normal(100, 30, (20, 44, 24)).astype(np.float32), np.eye(4))
    models = load_models([str(folder)])
    monkeypatch.setattr("medseg.inference.forecast.resident_bytes", lambda: 0)
    for exact in (False, True):
        plain = Settings(exact=exact)
        needed = plan(scan, models, plain).memory_bytes
        little = Settings(exact=exact, max_memory_bytes=needed - 1)
        told = []
        found = segment(scan, models, little, announce=told.append).labels.data
        assert told[0].stripes > 1 and told[0].memory_bytes < needed
        np.testing.assert_array_equal(found, segment(scan, models, plain).labels.data)
    path = tiny.save_nifti(tmp_path / "scan.nii.gz", scan.data, scan.affine)
    ran = infer(path, "-o", tmp_path / "o.nii.gz", "-m", folder, "--max-memory", "1MB")
    assert ran.code != 0 and "memory" in ran.err
    assert not (tmp_path / "o.nii.gz").exists()
