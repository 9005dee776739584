"""Real series: those of dicom2nifti against its results, CT, MR and PET of patients against their
NIfTI.
"""

from __future__ import annotations

import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest

from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.volume import Volume, reorient

ONE = [
    "anatomical/001", "anatomical/001_implicit", "ge/anatomical/001", "ge/anatomical/001_implicit",
    "generic/anatomical/001", "generic/anatomical/001_implicit",
    "generic/anatomical/002_non_isotropic",
    "generic/compressed/001", "generic/compressed_j2k/001", "generic/compressed_jpeg/001",
    "generic/compressed_jpegls/001", "generic/compressed_rle/001", "hitachi/anatomical/001",
    "hitachi/anatomical/001_implicit", "hyperfine/anatomical/001",
    "siemens_multiframe/anatomical/001",
]  # fmt: skip
SEVERAL = {
    "ge/dti/001": 2,
    "ge/dti/001_implicit": 2,
    "ge/dti/002": 4,
    "ge/fmri/001": 2,
    "ge/fmri/001_implicit": 2,
}
REFUSED = {
    "failing/gantrytilting/001": r"slant of 14\.0 degrees \(gantry tilt\).*--repair",
    "failing/notavolume/001": "4 slices all lie at the same place",
    "failing/slicecount/001": "2 slices, too few",
    "failing/sliceincrement/001": "1 slices are missing.*--repair",
    "failing/sliceincrement/002": "1 slices are missing.*--repair",
    "failing/sliceorientation/001": "different orientations",
    "ge/anatomical/001_single_slice": "1 slices, too few",
    "generic/rgb/001": "colour",
}


def expected_of(folder, name: str, index: int = 0) -> Volume:
    image = nib.load(folder / "dicom" / f"{name}_ground_truth.nii.gz")
    data = np.asanyarray(image.dataobj)
    return reorient(Volume(data[..., index] if data.ndim == 4 else data, image.affine))


def same(found: Volume, expected: Volume) -> bool:
    found = reorient(found)
    voxels = np.allclose(found.data, expected.data, rtol=1e-6, atol=1e-5)
    return bool(voxels and np.allclose(found.affine, expected.affine, atol=1e-4))


@pytest.mark.parametrize("name", ONE)
def test_series_of_one_volume(shared_data, name):
    assert same(io.read(shared_data / "dicom" / name), expected_of(shared_data, name))


@pytest.mark.parametrize("name", SEVERAL)
def test_series_of_several_volumes(shared_data, name):
    folder = shared_data / "dicom" / name

    with pytest.raises(BadFile, match=f"holds {SEVERAL[name]} volumes"):
        io.read(folder)
    for index in range(SEVERAL[name]):
        expected = expected_of(shared_data, name, index)
        assert same(io.read(folder, series=f"1.{index + 1}"), expected)
        assert same(io.read(folder, volume_index=index), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_series_that_are_no_volume(shared_data, name):
    with pytest.raises(BadFile, match=REFUSED[name]):
        io.read(shared_data / "dicom" / name)


def test_everything_in_one_zip(shared_data, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for name in (
            "hitachi/anatomical/001",
            "generic/compressed_j2k/001",
            "hyperfine/anatomical/001",
        ):
            for path in sorted((shared_data / "dicom" / name).iterdir()):
                file.write(path, f"{name}/{path.name}")

    found = io.list_volumes(tmp_path / "all.zip")

    names = {(64, 64, 4): "hitachi/anatomical/001", (256, 256, 4): "generic/compressed_j2k/001"}
    names[(112, 138, 8)] = "hyperfine/anatomical/001"
    assert sorted(volume.shape for volume in found) == sorted(names)
    for volume in found:
        expected = expected_of(shared_data, names[volume.shape])
        assert same(io.read(tmp_path / "all.zip", series=volume.number), expected)


@pytest.mark.parametrize("patient", ["STS_002", "STS_012"])
def test_ct_pet_and_mr_of_patients(shared_data, tmp_path, patient):
    folder = shared_data / "rtstruct" / patient
    shutil.copytree(folder / "dicom", tmp_path / "all")

    with pytest.warns(DataWarning, match="hold no image: 3"):
        found = io.list_volumes(tmp_path / "all")

    assert sorted(volume.modality for volume in found) == ["CT", "MR", "PT"]
    for volume in found:
        kind = {"CT": "CT", "MR": "MR_T1", "PT": "PET"}[volume.modality]
        expected = reorient(io.read(folder / "nifti" / f"{kind}_image.nii.gz"))
        with pytest.warns(DataWarning, match="hold no image: 3"):
            together = reorient(io.read(tmp_path / "all", series=volume.number))
        alone = reorient(io.read(folder / "dicom" / kind / "image"))
        for scan in (together, alone):
            assert np.allclose(scan.affine, expected.affine, atol=1e-4)
            assert np.allclose(
                scan.data,
                expected.data,
                rtol=1e-5 if kind == "PET" else 0,
                atol=0 if kind != "PET" else 1e-9,
            )
