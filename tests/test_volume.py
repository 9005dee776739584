"""Grids in space: orientation, cropping, resampling, and which affines are refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from making.strategies import affines, rotation, volumes
from medseg.errors import BadGeometry
from medseg.volume import (
    ORIENTATIONS,
    Volume,
    check_affine,
    crop,
    grid_distance_mm,
    orientation_of,
    plane_of,
    reorient,
    resample,
    same_grid,
    turned_onto,
    value_counts,
)

many = settings(max_examples=300, deadline=None)
few = settings(max_examples=60, deadline=None)


def world_of(volume: Volume) -> dict[int, np.ndarray]:
    """Where each voxel lies in mm, by its value; the values must differ."""
    indices = np.argwhere(np.ones(volume.shape, bool))
    places = nib.affines.apply_affine(volume.affine, indices)
    return dict(zip(volume.data[tuple(indices.T)].tolist(), places))


def numbered(shape: tuple[int, int, int], affine: np.ndarray) -> Volume:
    return Volume(np.arange(np.prod(shape)).reshape(shape), affine)


def test_orientations_are_the_48_that_nibabel_knows():
    assert len(set(ORIENTATIONS)) == 48 == len(ORIENTATIONS)
    for letters in ORIENTATIONS:
        nib.orientations.axcodes2ornt(letters)


@given(volume=volumes(), orientation=st.sampled_from(ORIENTATIONS))
@many
def test_reorient_there_and_back_gives_the_same_voxels_and_affine(volume: Volume, orientation: str):
    there = reorient(volume, orientation)
    back = reorient(there, volume.orientation)
    assert there.orientation == orientation
    assert there.data.dtype == volume.data.dtype
    assert np.array_equal(back.data, volume.data)
    assert np.allclose(back.affine, volume.affine, rtol=0, atol=1e-9)


@given(
    affine=affines(),
    sides=st.tuples(*[st.integers(1, 5)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
)
@many
def test_reorient_leaves_every_voxel_at_its_place(
    affine: np.ndarray, sides: tuple, orientation: str
):
    volume = numbered(sides, affine)
    before, after = world_of(volume), world_of(reorient(volume, orientation))
    assert before.keys() == after.keys()
    assert max(np.abs(before[value] - after[value]).max() for value in before) < 1e-9


@given(volume=volumes(), orientation=st.sampled_from(ORIENTATIONS))
@few
def test_reorient_agrees_with_nibabel(volume: Volume, orientation: str):
    letters = volume.orientation
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(letters), nib.orientations.axcodes2ornt(orientation)
    )
    expected = nib.orientations.apply_orientation(volume.data, turn)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)
    ours = reorient(volume, orientation)
    assert np.array_equal(ours.data, expected)
    assert np.allclose(ours.affine, affine, rtol=0, atol=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_orientation_between_two_others_is_the_same_however_the_scan_is_stored(orientation: str):
    """With half a turn about the diagonal of the world, two of the 48 are equally close."""
    affine = np.eye(4)
    affine[:3, :3] = np.full((3, 3), 2 / 3) - np.eye(3)
    volume = numbered((2, 3, 4), affine)
    assert reorient(volume, orientation).orientation == orientation


def test_reorient_is_a_view():
    volume = numbered((3, 4, 5), np.diag([1.0, 2, 3, 1]))
    assert np.shares_memory(reorient(volume, "PSL").data, volume.data)


@pytest.mark.parametrize("letters", ["RAR", "ras", "", "RA", "RASS", "XYZ"])
def test_reorient_to_letters_that_are_no_orientation_is_refused(letters: str):
    with pytest.raises(BadGeometry, match="not an orientation"):
        reorient(numbered((2, 2, 2), np.eye(4)), letters)


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1),
    degrees=st.floats(0, 30),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
)
@many
def test_orientation_is_nibabels_where_each_axis_has_a_clear_direction(
    orientation, axis, degrees, spacing
):
    matrix = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(orientation), (4, 5, 6))
    half = np.deg2rad(degrees) / 2
    turn = rotation((np.cos(half), *(np.sin(half) * np.array(axis) / np.linalg.norm(axis))))
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix[:3, :3] * spacing
    assert orientation_of(affine) == "".join(nib.aff2axcodes(affine))


@given(affine=affines())
@many
def test_orientation_uses_each_axis_of_the_body_once_however_oblique(affine: np.ndarray):
    assert orientation_of(affine) in ORIENTATIONS


@given(affine=affines(), shift=st.tuples(*[st.floats(-3, 3)] * 3))
@few
def test_grid_distance_is_the_largest_distance_of_equal_indices(affine: np.ndarray, shift: tuple):
    moved = np.array(affine)
    moved[:3, 3] += shift
    a, b = numbered((2, 3, 4), affine), numbered((2, 3, 4), moved)
    assert grid_distance_mm(a, b) == pytest.approx(np.linalg.norm(shift), abs=1e-9)


def test_grid_distance_grows_with_a_difference_in_spacing():
    a = numbered((11, 2, 2), np.eye(4))
    b = numbered((11, 2, 2), np.diag([1.01, 1, 1, 1]))
    assert grid_distance_mm(a, b) == pytest.approx(0.1)


def test_same_grid_needs_the_same_shape_and_place():
    a = numbered((4, 4, 4), np.eye(4))
    near, far = np.eye(4), np.eye(4)
    near[0, 3], far[0, 3] = 5e-4, 5e-3
    assert same_grid(a, a.with_data(np.zeros((4, 4, 4))))
    assert same_grid(a, numbered((4, 4, 4), near))
    assert not same_grid(a, numbered((4, 4, 4), far))
    assert not same_grid(a, numbered((4, 4, 5), np.eye(4)))
    assert same_grid(a, numbered((4, 4, 4), far), tolerance_mm=0.01)


@given(
    affine=affines(),
    start=st.tuples(*[st.integers(0, 3)] * 3),
    sides=st.tuples(*[st.integers(1, 3)] * 3),
)
@few
def test_crop_keeps_voxels_at_their_places(affine: np.ndarray, start: tuple, sides: tuple):
    volume = numbered((6, 6, 6), affine)
    part = crop(volume, start, sides)
    whole, places = world_of(volume), world_of(part)
    assert part.shape == sides
    assert part.data[0, 0, 0] == volume.data[start]
    assert max(np.abs(whole[value] - places[value]).max() for value in places) < 1e-9


@pytest.mark.parametrize("order", [0, 1])
@given(
    volume=volumes(dtypes=("f4", "i2"), min_side=2),
    other=affines(),
    sides=st.tuples(*[st.integers(1, 6)] * 3),
)
@few
def test_resample_equals_scipy_at_the_same_places(
    order: int, volume: Volume, other: np.ndarray, sides: tuple
):
    grid = np.array(other)
    # So that the two grids overlap.
    grid[:3, 3] = volume.affine[:3, 3] + grid[:3, :3] @ (
        0.3,
        -0.2,
        0.1,
    )
    indices = np.indices(sides).reshape(3, -1).T
    at = nib.affines.apply_affine(
        np.linalg.inv(volume.affine), nib.affines.apply_affine(grid, indices)
    ).T
    # Rounding decides at the edges of the grid, and half-way between two voxels.
    at_border = (np.abs(at) < 1e-6) | (np.abs(at - np.array(volume.shape)[:, None] + 1) < 1e-6)
    if order == 0:
        at_border |= np.abs(at - np.floor(at) - 0.5) < 1e-6
    sure = ~at_border.any(0)
    expected = ndimage.map_coordinates(
        volume.data.astype(np.float64), at, order=order, mode="constant", cval=-7
    )
    ours = resample(volume, grid, sides, order=order, outside=-7)
    assert ours.shape == sides
    assert np.array_equal(ours.affine, grid)
    assert ours.data.dtype == (volume.data.dtype if order == 0 else np.float32)
    assert np.allclose(ours.data.reshape(-1)[sure], expected[sure], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("order", [1, 3])
@given(affine=affines(), other=affines(), slope=st.tuples(*[st.floats(-2, 2)] * 3))
@few
def test_resample_of_a_linear_ramp_gives_the_ramp_at_the_new_places(order, affine, other, slope):
    shape = (7, 8, 9)
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    ramp = Volume((places @ slope).astype(np.float64), affine)
    fine = np.array(other)
    fine[:3, :3] *= 0.25 * min(ramp.spacing_mm) / max(np.linalg.norm(other[:3, :3], axis=0))
    fine[:3, 3] = nib.affines.apply_affine(affine, (3, 3.5, 4)) - fine[:3, :3] @ (2, 2, 2)
    result = resample(ramp, fine, (5, 5, 5), order=order)
    wanted = nib.affines.apply_affine(fine, np.moveaxis(np.indices((5, 5, 5)), 0, -1)) @ slope
    size = max(1.0, float(np.abs(ramp.data).max()))
    # Cubic splines take the voxels beyond the edge for a mirror, so only trilinear is exact for a
    # ramp.
    assert np.allclose(result.data, wanted, rtol=0, atol=(2e-6 if order == 1 else 0.02) * size)


def test_resample_far_outside_gives_the_outside_value():
    away = np.eye(4)
    away[:3, 3] = 1000
    result = resample(
        Volume(np.ones((3, 3, 3), np.float32), np.eye(4)), away, (2, 2, 2), outside=-5
    )
    assert (result.data == -5).all()


def test_resample_of_labels_makes_no_new_values():
    labels = np.random.default_rng(0).choice(np.array([0, 3, 7, 500], np.uint16), (6, 6, 6))
    tilted = np.eye(4)
    tilted[:3, :3] = rotation((1, 0.1, 0.2, 0.05)) * 0.7
    result = resample(Volume(labels, np.eye(4)), tilted, (8, 8, 8), order=0)
    assert result.data.dtype == np.uint16
    assert set(np.unique(result.data)) <= {0, 3, 7, 500}


def changed(row: int, column: int, value: float) -> np.ndarray:
    affine = np.eye(4)
    affine[row, column] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.eye(3), "4x4"),
        (np.zeros((4, 4, 4)), "4x4"),
        (changed(0, 0, np.nan), "not finite"),
        (changed(1, 3, np.inf), "not finite"),
        (changed(3, 0, 0.5), "last row"),
        (changed(3, 3, 2.0), "last row"),
        (changed(0, 0, 0.0), "spacing"),
        (changed(2, 2, 5e-4), "spacing"),
        (changed(2, 2, 2e3), "spacing"),
        (changed(2, 2, 1e200), "spacing"),
        (changed(0, 1, 0.01), "shear"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "shear"),
        (np.array([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1e-2, 0], [0, 0, 0, 1]]), "shear"),
    ],
)
def test_check_affine_refuses_what_is_no_geometry_of_a_scan(affine: np.ndarray, reason: str):
    with pytest.raises(BadGeometry, match=reason):
        check_affine(affine)


@given(affine=affines())
@few
def test_check_affine_returns_a_read_only_copy(affine: np.ndarray):
    given_affine = np.array(affine)
    checked = check_affine(given_affine)
    assert np.array_equal(checked, given_affine)
    given_affine[0, 0] += 1
    assert checked[0, 0] == affine[0, 0]
    with pytest.raises(ValueError, match="read-only"):
        checked[0, 0] = 1


def test_check_affine_forgives_shear_of_the_size_of_rounding():
    affine = np.eye(4)
    affine[0, 1] = 9e-4
    assert np.array_equal(check_affine(affine), affine)


@given(affine=affines())
@few
def test_spacing_and_voxel_volume_follow_from_the_affine(affine: np.ndarray):
    volume = numbered((2, 2, 2), affine)
    assert volume.spacing_mm == pytest.approx(nib.affines.voxel_sizes(affine))
    assert volume.voxel_mm3 == pytest.approx(np.prod(nib.affines.voxel_sizes(affine)), rel=1e-5)


@pytest.mark.parametrize("dimensions", [2, 4])
def test_a_volume_of_other_than_three_dimensions_is_refused(dimensions: int):
    with pytest.raises(BadGeometry, match="3 dimensions"):
        Volume(np.zeros((2,) * dimensions), np.eye(4))


def test_with_data_of_another_shape_is_refused():
    with pytest.raises(BadGeometry, match="does not fit"):
        numbered((2, 2, 2), np.eye(4)).with_data(np.zeros((2, 2, 3)))


@pytest.mark.parametrize("orientation", ["LPS", "PIR", "SAR"])
def test_the_same_grid_stored_along_other_axes_is_turned_and_nothing_else_is(orientation: str):
    affine = np.diag([1.5, 2, 3, 1])
    grid = Volume(np.arange(60).reshape(3, 4, 5), affine)
    other = reorient(grid, orientation)
    along_x = np.zeros((4, 4))
    along_x[0, 3] = 1
    rounded = Volume(other.data, other.affine + 0.004 * along_x)
    moved = Volume(other.data, other.affine + 0.02 * along_x)

    for near in (other, rounded):
        turned = turned_onto(near, grid)
        assert turned is not None and (turned.data == grid.data).all()
    assert turned_onto(moved, grid) is None
    assert turned_onto(grid, grid) is grid


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory that Python and NumPy held while something ran."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_planes_are_views_and_voxels_are_counted_without_a_copy(axes: tuple[int, int, int]):
    labels = np.random.default_rng(0).integers(0, 300, (90, 80, 100), np.uint16).transpose(axes)
    for axis in range(3):
        plane = plane_of(labels, axis, 7)
        assert (plane == np.take(labels, 7, axis)).all() and np.shares_memory(plane, labels)
    counts = value_counts(labels[::-1], 400)
    assert len(counts) == 400
    assert counts.tolist() == np.bincount(labels.ravel(), minlength=400).tolist()
    assert value_counts(labels % 5).tolist() == np.bincount((labels % 5).ravel()).tolist()
    assert peak_bytes(lambda: value_counts(labels)) < labels.nbytes / 2
