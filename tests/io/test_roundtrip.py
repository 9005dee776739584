"""Every reader and writer against each other, and against nibabel and SimpleITK."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings, strategies as st

from making.strategies import SIGNED_PERMUTATIONS, affines, volumes
from medseg import io
from medseg.volume import Volume

NIBABEL = (".nii.gz", ".nii", ".mgz", ".mgh")
ITK = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# Those need a source.
SUFFIXES = tuple(suffix for suffix in io.WRITERS if not suffix.endswith(".dcm"))
IMAGE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".seg.nrrd")
MGH_TYPES = ("u1", "i2", "i4", "f4")
ITK_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """World places in RAS mm of the first, the last and one lopsided voxel."""
    i, j, k = (n - 1 for n in shape)
    return (affine @ np.array([[0, 0, 0, 1], [i, j, k, 1], [i, 0, k, 1], [0, j, 0, 1]]).T)[:3].T


def close_in_mm(a: np.ndarray, b: np.ndarray, tolerance: float = 2e-4) -> bool:
    """Whether world places agree, by default to float32 rounding of values up to a few hundred
    mm.
    """
    return bool(np.abs(a - b).max() < tolerance)


def itk_places(image: sitk.Image, shape: tuple[int, ...]) -> np.ndarray:
    i, j, k = (n - 1 for n in shape)
    points = [
        image.TransformIndexToPhysicalPoint(index)
        for index in ((0, 0, 0), (i, j, k), (i, 0, k), (0, j, 0))
    ]
    return np.array(points) * (-1, -1, 1)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@given(data=st.data())
@few
def test_what_is_written_is_read_back(folder, suffix, data):
    dtypes = MGH_TYPES if suffix in (".mgh", ".mgz") else (*ITK_TYPES, "i8", "u8")
    volume = data.draw(volumes(dtypes=dtypes))
    path = folder / f"own{suffix}"

    io.write(volume, path)
    back = io.read(path)

    assert back.data.dtype == volume.data.dtype
    assert np.array_equal(back.data, volume.data)
    assert close_in_mm(corners(back.affine, back.shape), corners(volume.affine, volume.shape))


@pytest.mark.parametrize("suffix", NIBABEL)
@given(data=st.data())
@few
def test_nibabel_reads_what_medseg_writes(folder, suffix, data):
    volume = data.draw(volumes(dtypes=MGH_TYPES))
    path = folder / f"to_nibabel{suffix}"

    io.write(volume, path)
    image = nib.load(path)

    assert np.array_equal(np.asanyarray(image.dataobj), volume.data)
    assert close_in_mm(corners(image.affine, volume.shape), corners(volume.affine, volume.shape))
    if suffix.startswith(".nii"):
        near_half_turn = 1.3e-3 * 8 * np.linalg.norm(volume.shape)
        qform = corners(image.get_qform(), volume.shape)
        assert close_in_mm(qform, corners(volume.affine, volume.shape), near_half_turn)


@pytest.mark.parametrize("suffix", ITK)
@given(data=st.data())
@few
def test_simpleitk_reads_what_medseg_writes(folder, suffix, data):
    volume = data.draw(volumes(dtypes=ITK_TYPES))
    path = folder / f"to_itk{suffix}"

    io.write(volume, path)
    image = sitk.ReadImage(str(path))

    assert np.array_equal(sitk.GetArrayFromImage(image).T, volume.data)
    assert close_in_mm(itk_places(image, volume.shape), corners(volume.affine, volume.shape))


@pytest.mark.parametrize("suffix", NIBABEL)
@given(data=st.data())
@few
def test_medseg_reads_what_nibabel_writes(folder, suffix, data):
    volume = data.draw(volumes(dtypes=MGH_TYPES))
    path = folder / f"from_nibabel{suffix}"
    kind = nib.Nifti1Image if suffix.startswith(".nii") else nib.MGHImage

    nib.save(kind(volume.data, volume.affine), path)
    back = io.read(path)

    assert np.array_equal(back.data, volume.data)
    assert close_in_mm(corners(back.affine, back.shape), corners(volume.affine, volume.shape))


@pytest.mark.parametrize("suffix", ITK)
@pytest.mark.parametrize("compressed", [False, True])
@given(data=st.data())
@few
def test_medseg_reads_what_simpleitk_writes(folder, suffix, compressed, data):
    volume = data.draw(volumes(dtypes=ITK_TYPES))
    path = folder / f"from_itk{suffix}"
    image = sitk.GetImageFromArray(volume.data.T)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing([float(x) for x in spacing])
    image.SetDirection((volume.affine[:3, :3] / spacing * [[-1], [-1], [1]]).ravel())
    image.SetOrigin(volume.affine[:3, 3] * (-1, -1, 1))

    sitk.WriteImage(image, str(path), useCompression=compressed)
    back = io.read(path)

    assert np.array_equal(back.data, volume.data)
    assert close_in_mm(corners(back.affine, back.shape), corners(volume.affine, volume.shape))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("directions", SIGNED_PERMUTATIONS)
def test_each_orientation_survives(tmp_path, suffix, directions):
    affine = np.eye(4)
    affine[:3, :3] = directions * (1, 2, 3)
    affine[:3, 3] = -7, 11, 13
    data = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)

    io.write(Volume(data, affine), tmp_path / f"x{suffix}")
    back = io.read(tmp_path / f"x{suffix}")

    assert np.array_equal(back.data, data)
    assert np.array_equal(back.affine, affine)


@given(affine=affines())
@settings(max_examples=100, deadline=None)
def test_an_affine_that_came_from_nifti_is_written_back_bit_for_bit(folder, affine):
    first, second = folder / "first.nii", folder / "second.nii.gz"
    data = np.zeros((2, 3, 4), np.uint8)
    io.write(Volume(data, affine), first)

    scan = io.read(first)
    io.write(scan, second)

    assert np.array_equal(nib.load(second).affine, nib.load(first).affine)
    assert np.array_equal(io.read(second).affine, scan.affine)


@pytest.mark.parametrize("suffix", [".mgz", ".nii.gz"])
@given(affine=affines())
@settings(max_examples=50, deadline=None)
def test_labels_of_an_mgz_or_qform_scan_get_exactly_its_affine(folder, suffix, affine):
    path = folder / f"scan{suffix}"
    if suffix == ".mgz":
        nib.save(nib.MGHImage(np.zeros((2, 3, 4), np.uint8), affine), path)
    else:
        image = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), None)
        image.set_qform(affine, 1)
        image.set_sform(None, 0)
        nib.save(image, path)

    scan = io.read(path)
    io.write(scan, folder / "labels.nii.gz")

    assert np.array_equal(io.read(folder / "labels.nii.gz").affine, scan.affine)
    # Readers disagree about quaternions so close to half a turn that float32 cannot tell: up to
    # 1.3e-3 radians.
    tolerance = 1.3e-3 * 8 * np.linalg.norm(scan.shape) if suffix == ".nii.gz" else 2e-4
    assert close_in_mm(
        corners(scan.affine, scan.shape), corners(nib.load(path).affine, scan.shape), tolerance
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_volumes_make_equal_files(tmp_path, suffix):
    volume = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([1.0, 2, 3, 1]))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        io.write(volume, tmp_path / name / f"x{suffix}")

    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}

    assert first == second
    assert all(
        b"medseg" not in content and str(tmp_path).encode() not in content
        for content in first.values()
    )


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_view_that_is_not_contiguous_is_written_right(tmp_path, suffix):
    data = np.arange(120, dtype=np.int16).reshape(4, 5, 6).transpose(2, 0, 1)[::-1, :, ::2]
    volume = Volume(data, np.eye(4))

    io.write(volume, tmp_path / f"x{suffix}")

    assert np.array_equal(io.read(tmp_path / f"x{suffix}").data, data)
