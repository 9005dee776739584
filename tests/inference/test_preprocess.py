"""What training and inference share: scans and label maps on the model's grid, intensities as
networks take them.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from making import networks as tiny
from making.strategies import affines, rotation
from medseg.errors import BadFile
from medseg.inference.preprocess import (
    labels_on_grid,
    model_grid,
    normalise,
    on_one_grid,
    prepare,
    scale_intensity,
    scan_to_grid,
    to_model_grid,
)
from medseg.models.spec import FixedScale, PercentileScale, ZScore
from medseg.volume import ORIENTATIONS, Volume, reorient

pytestmark = pytest.mark.usefixtures("one_thread")

OBLIQUE = tiny.affine_of((0.9, 1.2, 5.0), (3.3, -7.0, 11.0))
OBLIQUE[:3, :3] = rotation((1, 0.1, 0.2, -0.05)) @ OBLIQUE[:3, :3]


def scan_of(
    shape: tuple[int, int, int] = (13, 17, 9), affine: np.ndarray = OBLIQUE, seed: int = 0
) -> Volume:
    return Volume(np.random.default_rng(seed).normal(50, 500, shape).astype(np.float32), affine)


def labels_of(shape: tuple[int, int, int] = (13, 17, 9), affine: np.ndarray = OBLIQUE) -> Volume:
    return Volume(np.random.default_rng(1).integers(0, 300, shape).astype(np.uint16), affine)


def stored(volume: Volume, letters: str) -> Volume:
    """The same scan written in another orientation."""
    turned = reorient(volume, letters)
    return Volume(np.ascontiguousarray(turned.data), turned.affine)


@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_on_its_own_axes_and_spacing_a_scan_keeps_every_value_to_the_bit(letters: str):
    scan, labels = stored(scan_of(), letters), stored(labels_of(), letters)
    spacing = np.array(reorient(scan).spacing_mm) * (1, 1 + 1e-5, 1 - 1e-5)  # as rounded in headers
    grid = model_grid(scan, spacing, "scan")
    assert np.array_equal(to_model_grid(scan, grid), reorient(scan_of()).data)
    found = labels_on_grid(labels, grid)
    assert found.dtype == np.uint16
    assert np.array_equal(found, reorient(labels_of()).data)
    back = scan_to_grid(scan, grid)
    assert np.array_equal(back, np.round(back))
    # What lies at a voxel of the scan lies there on the grid, and the grid's affine says so.
    assert np.allclose(grid.affine @ back, scan.affine, atol=1e-9)


@given(
    affine=affines(),
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_a_grid_along_the_scans_axes_holds_every_voxel_and_no_more_than_it_must(
    affine, shape, spacing
):
    volume = Volume(np.zeros(shape, np.float32), affine)
    grid = model_grid(volume, spacing, "scan")
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1).T
    at = nib.affines.apply_affine(scan_to_grid(volume, grid), ends)
    drift = 0.01 + 1e-3 * max(grid.shape)  # what counts as equal spacing
    assert (at >= -0.5 - drift).all()
    assert (at <= np.array(grid.shape) - 0.5 + drift).all()
    turned = reorient(volume)
    extent = np.array(turned.shape) * turned.spacing_mm
    assert (np.array(grid.shape) * spacing < extent * (1 + 2e-3) + spacing).all()
    assert np.allclose(grid.affine @ scan_to_grid(volume, grid), volume.affine, atol=1e-6)
    letters = Volume(np.zeros((1, 1, 1)), grid.affine).orientation
    assert letters == turned.orientation == "RAS"


@pytest.mark.parametrize("kind", ["world", "scan"])
def test_a_ramp_keeps_its_values_on_unequal_spacings(kind):
    scan = scan_of((12, 14, 9))
    slope = np.array([1.5, -0.7, 0.4])
    ramp = nib.affines.apply_affine(scan.affine, np.moveaxis(np.indices(scan.shape), 0, -1)) @ slope
    grid = model_grid(scan, (1.4, 0.8, 2.5), kind)
    image = to_model_grid(Volume(ramp.astype(np.float32), scan.affine), grid)
    places = nib.affines.apply_affine(grid.affine, np.moveaxis(np.indices(grid.shape), 0, -1))
    at = nib.affines.apply_affine(np.linalg.inv(scan.affine), places)
    inside = ((at > 1) & (at < np.array(scan.shape) - 2)).all(-1)
    assert inside.sum() > 100
    assert np.allclose(image[inside], (places @ slope)[inside], atol=1e-3)


def test_between_thick_slices_and_at_the_edges_of_a_scan_no_values_are_made_up():
    """Twice as fine along the slices: a quarter of a voxel beyond the last centres, its value goes
    on.
    """
    scan = Volume(np.full((4, 5, 6), -1000.0, np.float32), tiny.affine_of((1.0, 1.0, 4.0)))
    scan.data[:, :, 3:] = 200
    image = to_model_grid(scan, model_grid(scan, (1.0, 1.0, 2.0), "scan"))
    assert image.shape == (4, 5, 12)
    assert np.array_equal(image[0, 0], [-1000] * 5 + [-700, -100] + [200] * 5)


@pytest.mark.parametrize("letters", ["RAS", "LPS", "SAR", "PIL"])
def test_labels_on_a_finer_grid_are_the_same_blocks(letters: str):
    labels = labels_of(affine=tiny.affine_of((2.0, 1.0, 6.0)))
    grid = model_grid(scan_of(affine=labels.affine), (1.0, 0.5, 2.0), "scan")
    expected = labels.data.repeat(2, 0).repeat(2, 1).repeat(3, 2)
    assert np.array_equal(labels_on_grid(stored(labels, letters), grid), expected)


def test_labels_of_another_grid_are_looked_up_where_they_lie():
    part = Volume(np.ones((3, 3, 3), np.uint8), tiny.affine_of((1.0, 1.0, 1.0), (2.0, 3.0, 4.0)))
    scan = scan_of((9, 9, 9), tiny.affine_of((1.0, 1.0, 1.0)))
    for kind in ("scan", "world"):
        found = labels_on_grid(part, model_grid(scan, 1.0, kind))
        assert found.shape == (9, 9, 9)
        assert found[2:5, 3:6, 4:7].all()
        assert found.sum() == 27


def test_a_z_score_is_that_of_the_scan_or_of_what_is_not_zero():
    scan = scan_of()
    scan.data[scan.data < -300] = 0
    grid = model_grid(scan, reorient(scan).spacing_mm, "scan")
    values = to_model_grid(scan, grid).astype(np.float64)
    found, _ = prepare([scan], reorient(scan).spacing_mm, "scan", [ZScore()])
    assert found.shape == (1, *grid.shape)
    assert found.dtype == torch.float32
    assert np.allclose(found[0], (values - values.mean()) / values.std(), atol=1e-5)
    found, _ = prepare([scan], reorient(scan).spacing_mm, "scan", [ZScore(nonzero=True)])
    inside = values != 0
    assert 0.5 < inside.mean() < 0.9
    scaled = (values - values[inside].mean()) / values[inside].std()
    assert np.allclose(found[0], np.where(inside, scaled, 0), atol=1e-5)


@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
def test_fixed_windows_clip_and_scale_as_the_training_data_said(dtype: str):
    scan = scan_of()
    scan = Volume(scan.data.round().astype(dtype), scan.affine)
    scheme = FixedScale(low=-200, high=300, mean=60, sd=120)
    found, grid = prepare([scan], reorient(scan).spacing_mm, "scan", [scheme])
    expected = (np.clip(to_model_grid(scan, grid).astype(np.float64), -200, 300) - 60) / 120
    assert np.allclose(found[0], expected, atol=1e-5)


def test_around_a_slanted_scan_it_is_as_dark_as_its_darkest_voxel():
    """A CT in which even the darkest voxel is far below 0, which would be water."""
    scan = scan_of((20, 20, 5))
    scan = Volume(np.clip(scan.data, -1000, -100), scan.affine)
    found, _ = prepare([scan], 1.0, "world", [FixedScale(low=-2000, high=2000, mean=0, sd=1)])
    assert float(found[0, 0, 0, 0]) == float(found.min()) == float(scan.data.min())
    assert float(found.max()) <= -100


def test_percentiles_are_scaled_as_the_bundled_models_know_it():
    scan = Volume(tiny.phantom(), tiny.affine_of((1.5, 2.0, 3.1)))
    for intensity in ("percentiles", [PercentileScale()]):
        found, grid = prepare([scan], 2.0, "world", intensity)
        assert torch.equal(found, normalise(to_model_grid(scan, grid)))


def test_every_channel_is_scaled_by_itself_and_lies_on_one_grid():
    first, second = scan_of(), scan_of(seed=2)
    schemes = [ZScore(), FixedScale(low=-100, high=100, mean=0, sd=10)]
    found, grid = prepare([first, stored(second, "PIR")], (1.0, 1.0, 2.0), "scan", schemes)
    assert found.shape == (2, *grid.shape)
    for volume, scheme, channel in zip((first, second), schemes, found):
        alone, _ = prepare([volume], (1.0, 1.0, 2.0), "scan", [scheme])
        assert torch.allclose(channel, alone[0], atol=1e-4)


def test_channels_on_different_grids_are_refused_by_name():
    first = scan_of()
    moved = OBLIQUE.copy()
    moved[0, 3] += 0.2
    for other in (scan_of((13, 17, 8)), scan_of(affine=moved)):
        with pytest.raises(BadFile, match=r"FLAIR lies on another grid than T1; register"):
            on_one_grid([first, other], ("T1", "FLAIR"))
        with pytest.raises(BadFile, match=r"channel 2 lies on another grid than channel 1"):
            prepare([first, other], 1.0)
    rounded = scan_of(affine=OBLIQUE.astype(np.float32).astype(float))
    assert np.array_equal(on_one_grid([first, rounded])[1].affine, first.affine)


@pytest.mark.parametrize("value", [0.0, 7.25, -1024.0, 3e7])
@pytest.mark.parametrize("nonzero", [False, True])
def test_an_image_of_one_intensity_has_no_z_score(value: float, nonzero: bool):
    scan = Volume(np.full((6, 7, 8), value, np.float32), tiny.affine_of())
    with pytest.raises(BadFile, match="FLAIR has one intensity everywhere"):
        prepare([scan], 1.0, "scan", [ZScore(nonzero=nonzero)], names=["FLAIR"])


@pytest.mark.parametrize(
    "scheme", [ZScore(), ZScore(nonzero=True), FixedScale(low=0, high=1, mean=0, sd=1)]
)
def test_voxels_that_are_no_numbers_are_refused(scheme):
    image = np.random.default_rng(0).normal(0, 1, (5, 5, 5)).astype(np.float32)
    image[2, 2, 2] = np.nan
    with pytest.raises(BadFile, match="not finite"):
        scale_intensity(image, scheme)
