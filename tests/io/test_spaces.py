"""The space of a scan, as NIfTI's codes name it, stays with its labels; without headers in a
`Volume`.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings

from making import networks as tiny
from making.strategies import SIGNED_PERMUTATIONS, affines
from medseg import io
from medseg.errors import BadFile, BadGeometry, DataWarning
from medseg.volume import SCANNER, Space, Volume, crop, reorient, resample

STRAIGHT = np.array([[0, -2.0, 0, 10], [1.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
TURNED = np.eye(4)
TURNED[:3, :3] = np.linalg.qr(np.array([[1, 0.2, 0.1], [-0.3, 1, 0.4], [0.1, -0.5, 1]]))[0] * (
    0.7,
    0.9375,
    1.2,
)
TURNED[:3, 3] = -91.3, 126.01, -72.7
CODES = [(q, s) for q in range(6) for s in range(6) if (q, s) != (0, 0)]


def save(path, affine, qform_code, sform_code):
    image = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), None)
    image.set_qform(affine, qform_code)
    image.set_sform(affine if sform_code else None, sform_code)
    nib.save(image, path)
    return path


def codes(path):
    header = nib.load(path).header
    return int(header["qform_code"]), int(header["sform_code"])


@pytest.mark.parametrize("affine", [STRAIGHT, TURNED], ids=["straight", "turned"])
@pytest.mark.parametrize("given_codes", CODES)
def test_labels_have_the_codes_and_the_affine_of_their_scan(tmp_path, affine, given_codes):
    path = save(tmp_path / "scan.nii.gz", affine, *given_codes)
    scan = io.read(path)

    io.write(scan.with_data((scan.data > 9).astype(np.uint8)), tmp_path / "labels.nii.gz")

    assert codes(tmp_path / "labels.nii.gz") == given_codes
    labels = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(
        labels.affine.astype(np.float32), nib.load(path).affine.astype(np.float32)
    )
    assert np.array_equal(io.read(tmp_path / "labels.nii.gz").affine, scan.affine)


@given(affine=affines())
@settings(max_examples=60, deadline=None)
def test_a_scan_with_a_qform_alone_gets_labels_with_exactly_its_affine(tmp_path_factory, affine):
    folder = tmp_path_factory.mktemp("x")
    scan = io.read(save(folder / "scan.nii", affine, 3, 0))

    io.write(scan, folder / "labels.nii")

    assert np.array_equal(io.read(folder / "labels.nii").affine, scan.affine)
    # Where no quaternion of float32 numbers gives the affine to the bit, the sform does, and says
    # the same of space.
    assert codes(folder / "labels.nii") in ((3, 0), (3, 3))


@pytest.mark.parametrize("directions", SIGNED_PERMUTATIONS[::5])
def test_along_the_body_a_qform_alone_stays_alone(tmp_path, directions):
    affine = np.eye(4)
    affine[:3, :3] = directions * (0.9375, 1.2, 0.33)

    io.write(io.read(save(tmp_path / "scan.nii", affine, 1, 0)), tmp_path / "labels.nii")

    assert codes(tmp_path / "labels.nii") == (1, 0)


def test_nifti_2_keeps_its_codes(tmp_path):
    image = nib.Nifti2Image(np.zeros((40000, 1, 1), np.uint8), TURNED)
    image.set_qform(TURNED, 0)
    image.set_sform(TURNED, 4)
    nib.save(image, tmp_path / "scan.nii.gz")

    io.write(io.read(tmp_path / "scan.nii.gz"), tmp_path / "labels.nii.gz")

    assert codes(tmp_path / "labels.nii.gz") == (0, 4)


@pytest.mark.parametrize(
    ("assumed", "given_codes", "kept"),
    [
        ("sform", (1, 4), (0, 4)),
        ("qform", (1, 4), (1, 0)),
        ("sform", (0, 0), (2, 2)),
        ("pixdim", (1, 4), (2, 2)),
    ],
)
def test_of_an_assumed_geometry_only_the_space_that_was_assumed_is_kept(
    tmp_path, assumed, given_codes, kept
):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), None)
    image.set_qform(STRAIGHT, given_codes[0])
    moved = STRAIGHT.copy()
    moved[:3, 3] += 50
    image.set_sform(moved, given_codes[1])
    nib.save(image, tmp_path / "scan.nii")
    with pytest.raises(BadFile, match="assume-geometry"):
        io.read(tmp_path / "scan.nii")

    with pytest.warns(DataWarning, match=assumed):
        scan = io.read(tmp_path / "scan.nii", assume_geometry=assumed)
    io.write(scan, tmp_path / "labels.nii")

    assert codes(tmp_path / "labels.nii") == kept
    assert np.array_equal(io.read(tmp_path / "labels.nii").affine, scan.affine)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz", ".seg.nrrd"])
def test_what_comes_from_other_formats_is_the_scanners(tmp_path, suffix):
    scan = io.read(save(tmp_path / "scan.nii", STRAIGHT, 0, 4))

    io.write(scan, tmp_path / f"x{suffix}")
    io.write(io.read(tmp_path / f"x{suffix}"), tmp_path / "back.nii")

    assert codes(tmp_path / "back.nii") == (1, 1)


def test_a_volume_hands_its_space_on():
    volume = Volume(np.zeros((4, 5, 6), np.uint8), np.eye(4), Space(qform_code=0, sform_code=4))

    made = [
        volume.with_data(np.ones((4, 5, 6))),
        reorient(volume, "LPI"),
        crop(volume, (1, 1, 1), (2, 2, 2)),
        resample(volume, np.diag([2.0, 2, 2, 1]), (2, 2, 3), order=0),
    ]

    assert {one.space for one in made} == {volume.space}
    assert Volume(volume.data, volume.affine).space == SCANNER


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 1), (1, 6), (7, 0)])
def test_codes_that_name_no_space_are_refused(wrong):
    with pytest.raises(BadGeometry, match="space"):
        Space(qform_code=wrong[0], sform_code=wrong[1])


def test_infer_and_convert_keep_the_space_of_the_scan(tmp_path):
    data = np.random.default_rng(0).integers(0, 60, (24, 20, 16)).astype(np.int16)
    data[8:16, 6:12, 4:10] += 800
    image = nib.Nifti1Image(data, TURNED)
    image.set_qform(TURNED, 0)
    image.set_sform(TURNED, 4)
    nib.save(image, tmp_path / "scan.nii.gz")

    ran = tiny.medseg(
        "infer", tmp_path / "scan.nii.gz", "--model", "otsu", "--instances", "--quiet"
    )
    assert ran.code == 0, ran.err
    assert tiny.medseg("convert", tmp_path / "scan.nii.gz", tmp_path / "copy.nii").code == 0

    for name in ("scan_seg.nii.gz", "scan_seg.objects.nii.gz", "copy.nii"):
        assert codes(tmp_path / name) == (0, 4), name
        assert np.array_equal(nib.load(tmp_path / name).affine, image.affine)


@pytest.mark.parametrize(
    ("name", "kept"), [("q0_s4", (0, 4)), ("q1_s0", (1, 0)), ("q1_s4", (1, 4)), ("q2_s2", (2, 2))]
)
def test_the_four_scans_of_one_geometry_keep_their_codes(shared_data, tmp_path, name, kept):
    path = shared_data / f"cases/files/nifti-codes/{name}.nii.gz"

    io.write(io.read(path), tmp_path / "labels.nii.gz")

    assert codes(tmp_path / "labels.nii.gz") == kept
    assert np.array_equal(nib.load(tmp_path / "labels.nii.gz").affine, nib.load(path).affine)
