"""CT by rules: phantoms whose every voxel is known, and real CTs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from making.ct import (
    AIR,
    AIRWAYS,
    BONE,
    GAS,
    LEFT,
    MUSCLE,
    OTHER,
    RIGHT,
    SUBCUTANEOUS,
    VISCERAL,
    Phantom,
    grid,
    legs,
    trunk,
)
from medseg.errors import BadFile, DataWarning
from medseg.inference.segmentation import segment
from medseg.inference.settings import Settings, labels_named
from medseg.inference.tissues.model import ct_tissues
from medseg.inference.tissues.windows import LUNGS, METAL, TISSUES
from medseg.io import read
from medseg.volume import ORIENTATIONS, Volume, reorient

WHOLE = {"low_mm": (-225, -180, -180), "high_mm": (225, 150, 230)}


def made(spacing: float = 3.0, *, turn: float = 0.0, noise: float = 0.0, **more: object) -> Phantom:
    box = {**WHOLE, **{k: more.pop(k) for k in ("low_mm", "high_mm") if k in more}}
    affine, shape = grid(spacing_mm=(spacing,) * 3, turn_degrees=turn, **box)  # type: ignore[arg-type]
    return trunk(affine, shape, noise=noise, **more)  # type: ignore[arg-type]


def beyond_a_layer(found: NDArray, truth: NDArray, value: int) -> int:
    """Voxels of a label that are wrong and more than one layer from the true surface."""
    want, cube = truth == value, np.ones((3, 3, 3), bool)
    inner = ndimage.binary_erosion(want, cube, border_value=1)
    outer = ndimage.binary_dilation(want, cube)
    return int((inner & (found != value)).sum() + ((found == value) & ~outer).sum())


def share_right(found: NDArray, truth: NDArray, value: int) -> float:
    """Dice."""
    both = ((found == value) & (truth == value)).sum()
    return float(2 * both / ((found == value).sum() + (truth == value).sum()))


@pytest.fixture(scope="module")
def body() -> Phantom:
    return made()


@pytest.fixture(scope="module")
def labels(body: Phantom) -> NDArray[np.uint8]:
    return ct_tissues(body.scan).data


@pytest.mark.parametrize("value", [LEFT, RIGHT, AIRWAYS, BONE, SUBCUTANEOUS, GAS, AIR])
def test_a_phantom_is_labelled_to_one_layer_of_voxels(
    body: Phantom, labels: NDArray[np.uint8], value: int
):
    assert (body.truth == value).sum() > 1000
    assert beyond_a_layer(labels, body.truth, value) == 0


def test_fat_within_the_muscles_of_the_trunk_is_visceral(body: Phantom, labels: NDArray[np.uint8]):
    assert share_right(labels, body.truth, VISCERAL) > 0.95
    assert not (labels[body.truth == VISCERAL] == SUBCUTANEOUS).any()
    wall = (body.truth == MUSCLE) & (reorient(body.scan).data > 0)
    assert (labels[wall] == MUSCLE).mean() > 0.95


def test_the_table_is_no_part_of_the_body(body: Phantom, labels: NDArray[np.uint8]):
    table = (body.truth == AIR) & (body.scan.data > 0)
    assert table.sum() > 1000
    assert not labels[table].any()


@pytest.mark.parametrize(
    ("name", "phantom"),
    [
        ("noise", {"noise": 30.0}),
        ("tilt", {"turn": 12.0}),
        ("no table", {"table": False}),
        ("emphysema", {"emptiness": -930.0, "noise": 20.0}),
        ("dense lungs", {"emptiness": -650.0}),
    ],
)
def test_lungs_and_airways_are_found_in_scans_of_many_kinds(name: str, phantom: dict[str, float]):
    case = made(4.0, **phantom)  # type: ignore[arg-type]
    found = ct_tissues(case.scan).data
    for value in LUNGS:
        assert share_right(found, case.truth, value) > 0.98, name
    assert share_right(found, case.truth, AIRWAYS) > 0.85, name
    assert not np.isin(found[case.truth == GAS], LUNGS).any()


def test_thick_slices_and_voxels_of_any_shape_are_labelled_alike():
    affine, shape = grid(spacing_mm=(1.4, 2.4, 8.0), **WHOLE)
    case = trunk(affine, shape, noise=15)
    found = ct_tissues(case.scan).data
    for value in (LEFT, RIGHT, BONE, SUBCUTANEOUS):
        assert share_right(found, case.truth, value) > 0.97


@pytest.mark.parametrize("orientation", ["LPS", "IPL"])
def test_labels_do_not_depend_on_how_a_scan_is_stored(
    body: Phantom, labels: NDArray[np.uint8], orientation: str
):
    assert orientation in ORIENTATIONS
    for order in "CF":
        stored = reorient(body.scan, orientation)
        stored = stored.with_data(np.asarray(stored.data, order=order))
        again = reorient(ct_tissues(stored), "RAS").data
        assert (again == labels).mean() > 0.999  # blocks begin at the first voxel in memory


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_labels_do_not_depend_on_the_type_of_numbers(
    body: Phantom, labels: NDArray[np.uint8], dtype: type
):
    scan = body.scan.with_data(body.scan.data.astype(dtype))
    assert (ct_tissues(scan).data == labels).all()


def test_padding_and_values_that_are_not_finite_are_air(body: Phantom, labels: NDArray[np.uint8]):
    x, y, _ = np.indices(body.scan.shape)
    middle = np.array(body.scan.shape) / 2
    corner = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 > 72**2
    for padding in (-3024.0, np.nan):
        data = np.where(corner & (body.truth == AIR), padding, body.scan.data)
        assert (ct_tissues(body.scan.with_data(data.astype(np.float32))).data == labels).all()


def test_nothing_is_called_lung_in_abdomen_or_legs():
    abdomen = made(2.5, noise=20, low_mm=(-225, -180, -190), high_mm=(225, 150, -10))
    found = ct_tissues(abdomen.scan).data
    assert not np.isin(found, (*LUNGS, AIRWAYS)).any()
    assert beyond_a_layer(found, abdomen.truth, GAS) <= 20
    affine, shape = grid(low_mm=(-190, -100, 0), high_mm=(190, 100, 90), spacing_mm=(2.5, 2.5, 3.0))
    thighs = legs(affine, shape, noise=15)
    found = ct_tissues(thighs.scan).data
    assert not np.isin(found, (*LUNGS, AIRWAYS, GAS, VISCERAL)).any()
    for value in (BONE, SUBCUTANEOUS, MUSCLE, OTHER):
        assert share_right(found, thighs.truth, value) > 0.95


def test_lungs_that_touch_are_told_apart():
    case = made(low_mm=(-225, -180, 0), noise=10.0)
    x = np.arange(case.scan.shape[0]) * 3.0 - 223.5
    bridge = (np.abs(x)[:, None, None] < 20) & (np.abs(np.arange(110) - 60) < 4)[None, :, None]
    bridge = bridge & (np.abs(np.arange(case.scan.shape[2]) - 20) < 4)[None, None, :]
    scan = case.scan.with_data(np.where(bridge, -850, case.scan.data).astype(np.int16))
    found = ct_tissues(scan).data
    for value in LUNGS:
        assert share_right(found, case.truth, value) > 0.97


def test_a_piece_of_a_chest_has_its_lungs():
    case = made(2.5, noise=15, low_mm=(-100, -90, 10), high_mm=(160, 90, 180))
    found = ct_tissues(case.scan).data
    for value in LUNGS:
        assert share_right(found, case.truth, value) > 0.95


def test_contrast_medium_is_no_bone_and_metal_is_metal(body: Phantom):
    data, truth = body.scan.data.copy(), body.truth
    place = np.indices(data.shape)
    middle = np.argwhere(truth == VISCERAL).mean(0)
    from_middle = np.sqrt(sum((p - m) ** 2 for p, m in zip(place, middle, strict=True)))
    vessel = (from_middle < 5) & (truth == VISCERAL)
    data[vessel] = 320
    found = ct_tissues(body.scan.with_data(data)).data
    assert vessel.sum() > 200 and not (found[vessel] == BONE).any()
    data[vessel] = 3071
    found = ct_tissues(body.scan.with_data(data)).data
    assert (found[vessel] == METAL).all()


def test_what_cannot_be_hounsfield_units_is_refused_and_a_piece_without_air_warns():
    random = np.random.default_rng(0)
    positive = Volume(random.integers(0, 2000, (20, 20, 20)).astype(np.int16), np.eye(4))
    with pytest.raises(BadFile, match="no value is below 0"):
        ct_tissues(positive)
    piece = positive.with_data(random.integers(-120, 80, (20, 20, 20)).astype(np.int16))
    with pytest.warns(DataWarning, match="no air"):
        assert (ct_tissues(piece).data > 0).all()


def test_tiny_and_flat_scans_are_labelled():
    for shape in ((3, 3, 3), (64, 1, 48), (1, 1, 40)):
        data = np.full(shape, -1000, np.int16)
        data[..., shape[2] // 2 :] = 40
        assert ct_tissues(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0]))).data.shape == shape


def test_every_label_has_a_code_and_lungs_mirror_each_other():
    assert all(label.type is not None and label.category is not None for label in TISSUES.labels)
    assert TISSUES.mirror_pairs() == {LEFT: RIGHT, RIGHT: LEFT}


def test_it_is_a_model_by_its_name(body: Phantom):
    lungs = labels_named("ct-tissues", ["left lung", "Right Lung"])
    assert len(np.unique(body.scan.data)) < 20  # as few values as a label map has, but below 0
    found = segment(body.scan, "ct-tissues", Settings(roi=lungs))
    assert lungs == LUNGS and set(np.unique(found.labels.data)) == {0, *LUNGS}
    assert found.table.values == LUNGS and found.plan.precision == "rules"


def test_real_scans_of_thigh_and_shoulder_have_no_lungs(shared_data: Path):
    for path in sorted((shared_data / "rtstruct").glob("*/dicom/CT/image")):
        scan = read(path)
        found = ct_tissues(scan).data
        assert not np.isin(found, (*LUNGS, AIRWAYS)).any(), path
        bright = ndimage.binary_erosion(scan.data > 500)
        assert (found[bright] == BONE).mean() > 0.95, path
        fat = ndimage.binary_erosion((scan.data > -130) & (scan.data < -60))
        assert np.isin(found[fat], (SUBCUTANEOUS, VISCERAL, OTHER)).mean() > 0.99, path


def test_real_lungs_agree_with_their_own_outline_found_another_way(shared_data: Path):
    """Three slices through the bases of both lungs. The other way: the large dark parts at full
    resolution that do not touch the edge.
    """
    scan = read(shared_data / "dicom_seg" / "ct-3slice")
    found = reorient(ct_tissues(scan), "RAS").data
    image = reorient(scan, "RAS").data
    numbers, count = ndimage.label(image < -600)
    size = np.bincount(numbers.ravel(), minlength=count + 1)
    size[np.unique(numbers[[0, -1]])] = 0
    size[0] = 0
    other = np.isin(numbers, np.flatnonzero(size * scan.voxel_mm3 > 5000))
    other = ndimage.binary_closing(other, np.ones((3, 3, 1)), iterations=2)
    mine = np.isin(found, LUNGS)
    assert 2 * (mine & other).sum() / (mine.sum() + other.sum()) > 0.97
    middle = found.shape[0] // 2
    assert not (found[: middle - 20] == RIGHT).any() and not (found[middle + 20 :] == LEFT).any()


@pytest.mark.parametrize(("low", "high"), [(0, 225), (-225, 0), (-70, 225), (-150, 225)])
def test_lungs_are_of_their_own_side_where_a_cut_goes_through_the_body(low: int, high: int):
    """The middle of what is left of a body is not the middle of the body."""
    phantom = made(5.0, low_mm=(low, -180, 0), high_mm=(high, 150, 200), noise=15)
    found = ct_tissues(phantom.scan).data
    for side, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        own = phantom.truth == side
        assert (found[own] == other).sum() <= 0.02 * own.sum()
        assert not own.any() or share_right(found, phantom.truth, side) > 0.9


def test_one_lung_alone_between_two_cuts_is_not_certain():
    phantom = made(5.0, low_mm=(0, -180, 0), high_mm=(150, 150, 200))
    with pytest.warns(DataWarning, match="whether it is the left or the right one"):
        ct_tissues(phantom.scan)


def test_padding_does_not_hide_that_values_have_an_offset(body: Phantom):
    raw = body.scan.data.astype(np.int32) + 1024
    raw[:8] = -2000
    with pytest.raises(BadFile, match="stored with an offset"):
        ct_tissues(body.scan.with_data(raw.astype(np.int16)))
    padded = body.scan.data.copy()
    padded[:8] = -2000
    ct_tissues(body.scan.with_data(padded))
