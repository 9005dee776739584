"""What other libraries hold in memory is where it is in space, or refused; and is named by what it
is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from making import networks as tiny
from medseg.errors import BadConfig, BadFile, BadGeometry, DataWarning
from medseg.io import (
    as_labels,
    as_path,
    as_volume,
    as_volumes,
    read,
    to_nibabel,
    to_sitk,
    what_is,
    write,
)
from medseg.volume import ORIENTATIONS, Volume, reorient

sitk = pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install medseg[dev]")
AFFINE = tiny.affine_of()


def oblique(dtype: str = "int16", shape: tuple[int, int, int] = (7, 8, 9)) -> Volume:
    """Numbers that are all different, on a grid that is turned in space."""
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0],
                     [0, 0, 1]])  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = turn * (1.0, 2.0, 2.5)
    affine[:3, 3] = (-30, 12.5, 7)
    data = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return Volume(data, affine.astype(np.float32).astype(np.float64))


def same(one: Volume, other: Volume, *, mm: float = 1e-4) -> bool:
    return np.array_equal(one.data, other.data) and np.allclose(one.affine, other.affine, atol=mm)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_images_of_other_libraries_are_what_medseg_reads(
    orientation: str, dtype: str, tmp_path: Path
):
    path = tmp_path / "scan.nii.gz"
    write(reorient(oblique(dtype), orientation), path)
    volume = read(path)
    for image in (nib.load(path), sitk.ReadImage(str(path))):
        taken = as_volume(image)
        assert same(taken, volume)
        assert taken.data.dtype == volume.data.dtype


def test_a_scaled_image_of_nibabel_has_the_numbers_that_medseg_reads(tmp_path: Path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    image.header.set_slope_inter(0.1, -3)
    nib.save(image, tmp_path / "scaled.nii")
    volume = read(tmp_path / "scaled.nii")
    taken = as_volume(nib.load(tmp_path / "scaled.nii"))
    assert same(taken, volume) and taken.data.dtype == volume.data.dtype


def test_the_space_and_unit_of_a_nifti_image_are_kept():
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([0.002, 0.002, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    image.set_sform(image.affine, 4)
    taken = as_volume(image)
    assert np.allclose(taken.spacing_mm, 2)
    assert taken.space.sform_code == 4


def test_numbers_with_an_affine_are_a_scan():
    volume = oblique("float32")
    rows = [[float(x) for x in row] for row in volume.affine]
    for array in (volume.data, torch.from_numpy(volume.data.copy())):
        for affine in (volume.affine, rows, torch.from_numpy(volume.affine.copy())):
            assert same(as_volume((array, affine)), volume)
    half = as_volume((torch.ones(3, 4, 5, dtype=torch.bfloat16), AFFINE))
    assert half.data.dtype == np.float32 and (half.data == 1).all()
    mask = as_volume((np.ones((3, 4, 5), bool), AFFINE))
    assert mask.data.dtype == np.uint8


def test_a_tensor_of_monai_knows_its_place():
    monai = pytest.importorskip("monai.data", reason="needs MONAI: pip install medseg[monai]")
    volume = oblique("float32")
    data, affine = torch.from_numpy(volume.data.copy()), torch.from_numpy(volume.affine.copy())
    tensor = monai.MetaTensor(data[None], affine=affine)
    assert same(as_volume(tensor), volume)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    turned = monai.MetaTensor(data[None], affine=torch.from_numpy(lps), meta={"space": "LPS"})
    assert same(as_volume(turned), volume)
    odd = monai.MetaTensor(data[None], affine=affine, meta={"space": "scanner"})
    with pytest.raises(BadFile, match="a space called scanner"):
        as_volume(odd)
    assert len(as_volumes(monai.MetaTensor(torch.cat((data[None],) * 3), affine=affine))) == 3


def test_images_of_several_volumes_are_several(tmp_path: Path):
    data = np.arange(120, dtype=np.int16).reshape(3, 4, 5, 2)
    image = nib.Nifti1Image(data, AFFINE)
    assert [one.data.tolist() for one in as_volumes(image)] == [
        data[..., n].tolist() for n in (0, 1)
    ]
    with pytest.raises(BadConfig, match="an image of nibabel holds 2 volumes"):
        as_volume(image)
    assert as_volume(nib.Nifti1Image(data[..., :1], AFFINE)).shape == (3, 4, 5)
    vectors = sitk.GetImageFromArray(data.transpose(2, 1, 0, 3), isVector=True)
    assert [one.data.tolist() for one in as_volumes(vectors)] == [
        data[..., n].tolist() for n in (0, 1)
    ]


def unplaced() -> nib.Nifti1Image:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), AFFINE)
    image.header["sform_code"] = image.header["qform_code"] = 0
    return image


def contradictory() -> nib.Nifti1Image:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), AFFINE)
    other = AFFINE.copy()
    other[0, 3] += 50
    image.header.set_qform(other, 1)
    image.header["sform_code"] = 1
    return image


def moved() -> nib.Nifti1Image:
    """The header was changed after the image was made of it."""
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), AFFINE)
    image.header["srow_x"] = image.header["srow_x"] * -1
    return image


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (unplaced, "does not say where the voxels lie"),
        (contradictory, "apart|disagree"),
        (moved, "another affine than its header"),
        (lambda: nib.AnalyzeImage(np.zeros((3, 4, 5), np.uint8), AFFINE), "which side of it"),
        (lambda: sitk.Image(4, 5, sitk.sitkUInt8), "has 2 dimensions"),
        (lambda: (np.zeros((3, 4, 5), complex), AFFINE), "complex128, not numbers"),
        (lambda: (np.array([[["a"]]]), AFFINE), "not numbers"),
        (lambda: (np.zeros((3, 4, 0)), AFFINE), "holds no voxels"),
        (lambda: (np.zeros((3, 4, 5)), np.zeros((4, 4))), "an affine that places no scan"),
        (lambda: (np.full((3, 4, 5), np.nan), AFFINE), "are not numbers"),
    ],
)
def test_what_is_not_certain_is_refused(image: Any, says: str):
    with pytest.raises(BadFile, match=says):
        as_volume(image())


def test_numbers_that_are_not_finite_are_replaced_with_a_warning():
    data = np.ones((3, 4, 5), np.float32)
    data[0, 0, 0] = np.nan
    with pytest.warns(DataWarning, match="a pair of an array and an affine: 1 of 60"):
        assert as_volume((data, AFFINE)).data[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (None, r"nothing \(None\)"),
        (3, "a number"),
        (True, "a truth value"),
        (b"abc", "bytes"),
        ({"T1": 1}, "a dict of 1 entries"),
        ([], "an empty list"),
        ([1, 2], "a list of 2 numbers"),
        (["a.nii", "b.nii"], "a list of 2 paths"),
        (("brain", "otsu"), "a tuple of 2 texts"),
        ([Path("a"), 3], "a list of 2 things"),
        (np.zeros((2, 3)), r"an array of shape \(2, 3\).*give a pair \(array, affine\)"),
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\).*give a pair"),
        (io.BytesIO(), "an open file"),
        (iter([]), "an iterator"),
        (Volume, "the class Volume"),
        (print, "builtin_function_or_method"),
        (object(), "an object"),
        ((np.zeros((3, 4, 5)), None), r"an affine is .* and this is nothing \(None\)"),
        ((np.zeros((3, 4, 5)), np.eye(3)), r"and this is an array of shape \(3, 3\)"),
        (np, "a module"),
    ],
)
def test_what_is_no_scan_is_named_by_what_it_is(thing: Any, words: str):
    with pytest.raises(BadConfig, match=words):
        as_volume(thing)


def test_a_pair_is_no_list_of_two_channels():
    array = np.zeros((4, 4, 4))
    assert what_is((array, AFFINE)) == "a pair of an array and an affine"
    assert what_is([array, array]) == "a list of 2 arrays"


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_volumes_go_to_other_libraries_and_come_back(orientation: str, tmp_path: Path):
    volume = reorient(oblique("uint8", (4, 5, 6)), orientation)
    assert same(as_volume(to_nibabel(volume)), volume)
    assert same(as_volume(to_sitk(volume)), volume)
    nib.save(to_nibabel(volume), tmp_path / "nibabel.nii.gz")
    sitk.WriteImage(to_sitk(volume), str(tmp_path / "sitk.nrrd"))
    assert same(read(tmp_path / "nibabel.nii.gz"), volume)
    assert same(read(tmp_path / "sitk.nrrd"), volume)


def test_only_whole_numbers_are_labels():
    labels = as_labels((np.full((3, 4, 5), 300.0), AFFINE))
    assert labels.data.dtype == np.uint16
    with pytest.raises(BadFile, match="not whole numbers, so it is not a label map"):
        as_labels((np.full((3, 4, 5), 0.5), AFFINE))


def test_tensors_of_every_layout_and_precision_are_numbers_or_named():
    dense = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5) / 8
    parts = torch.stack([torch.zeros_like(dense), dense], -1)
    for one in (
        dense.to_sparse(),
        dense.to(torch.float8_e5m2).float().to(torch.float8_e5m2),
        torch.view_as_complex(parts).imag,
        -torch.view_as_complex(parts).conj().imag,
        dense.clone().requires_grad_(),
    ):
        plain = one.to_dense() if one.layout != torch.strided else one
        expected = plain.detach().float().resolve_neg().numpy()
        assert np.array_equal(as_volume((one, AFFINE)).data, expected)
    for pair in ((dense.to("meta"), AFFINE), (dense, torch.eye(4, device="meta"))):
        with pytest.raises(BadFile, match="is on the device meta, where there are no numbers"):
            as_volume(pair)


def test_values_that_an_array_hides_are_asked_for():
    data = np.arange(60.0, dtype=np.float32).reshape(3, 4, 5)
    hidden = np.ma.masked_less(data, 10)
    with pytest.raises(BadFile, match=r"hides some of its values.*give array\.filled\(value\)"):
        as_volume((hidden, AFFINE))
    assert np.array_equal(as_volume((hidden.filled(0), AFFINE)).data, hidden.filled(0))
    assert np.array_equal(as_volume((np.ma.masked_less(data, -1), AFFINE)).data, data)


def test_a_label_map_object_of_simpleitk_is_refused_before_it_ends_the_process():
    labels = sitk.Cast(sitk.GetImageFromArray(np.ones((3, 4, 5), np.uint8)), sitk.sitkLabelUInt8)
    with pytest.raises(BadFile, match="holds a LabelMap, which has no voxels"):
        as_labels(labels)
    assert as_labels(sitk.Cast(labels, sitk.sitkUInt16)).data.all()


def test_an_image_without_a_place_is_told_what_helps_an_image():
    for image in (unplaced(), contradictory()):
        with pytest.raises(BadFile, match=r"give a pair \(array, affine\) if you know") as caught:
            as_volume(image)
        assert "--" not in str(caught.value)


def test_an_affine_that_comes_first_is_told_so():
    with pytest.raises(BadConfig, match="the array comes first and the affine second"):
        as_volume((AFFINE, np.zeros((3, 4, 5))))


@pytest.mark.parametrize("dtype", ["bool", "float16", ">i2", ">f4", "float64", "uint16"])
def test_volumes_of_any_type_go_to_other_libraries(dtype: str):
    data = (np.arange(60).reshape(3, 4, 5) % 7).astype(dtype)
    volume = Volume(data, AFFINE)
    assert np.array_equal(np.asarray(to_nibabel(volume).dataobj), data)
    assert np.array_equal(sitk.GetArrayFromImage(to_sitk(volume)), data.transpose(2, 1, 0))


def test_what_is_no_volume_is_named_where_one_is_written_or_handed_on(tmp_path: Path):
    image: Any = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), AFFINE)
    for call in (to_nibabel, to_sitk):
        with pytest.raises(BadConfig, match=r"takes a medseg\.Volume, and this is an image of nib"):
            call(image)
    with pytest.raises(
        BadConfig, match=r"what is written is a medseg\.Volume, and this is of type N"
    ):
        write(image, tmp_path / "a.nii.gz")
    with pytest.raises(BadConfig, match="an array of numpy, and this is a tensor"):
        as_volume(Volume(torch.zeros(3, 4, 5), AFFINE))  # type: ignore[arg-type]
    with pytest.raises(BadGeometry, match="are an array, and this is of type list"):
        Volume([[[1]]], AFFINE)  # type: ignore[arg-type]
    for path in (3, None, image):
        with pytest.raises(BadConfig, match="a file is given by its path, and this is of type"):
            read(path)
    assert not list(tmp_path.iterdir())


def test_an_empty_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # which an empty path would be
    for name in ("", "a\0b"):
        with pytest.raises(BadFile, match="names no file or folder"):
            read(name)
        with pytest.raises(BadConfig, match="names no file or folder"):
            as_path(name, "output")
