"""Segmentation by intensity alone, against exhaustive search and mixtures whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from medseg.errors import BadFile
from medseg.inference.intensity import (
    INTENSITY_MODELS,
    gmm,
    gmm_classes,
    intensity_table,
    kmeans,
    kmeans_thresholds,
    otsu,
    otsu_threshold,
)
from medseg.volume import Volume


def mixture(
    means: list[float], deviations: list[float], counts: list[int], seed: int = 0
) -> tuple[Volume, np.ndarray]:
    """A scan of normal intensities in random places, and which part of the mixture each voxel came
    from.
    """
    random = np.random.default_rng(seed)
    parts = np.repeat(np.arange(len(means)), counts)
    random.shuffle(parts)
    values = random.normal(np.array(means)[parts], np.array(deviations)[parts])
    shape = (20, 20, len(parts) // 400)
    return Volume(values.reshape(shape).astype(np.float32), np.eye(4)), parts.reshape(shape)


@given(
    counts=st.lists(st.integers(0, 50), min_size=3, max_size=30).filter(
        lambda c: sum(n > 0 for n in c) >= 2
    )
)
@settings(max_examples=200, deadline=None)
def test_otsu_threshold_separates_as_well_as_the_best_of_all_thresholds(counts: list[int]):
    weights, centres = np.array(counts, float), np.arange(len(counts)) * 2.0 + 5

    def within(threshold: float) -> float:
        """Sum of squares around the means of the two sides: what Otsu's threshold makes
        smallest.
        """
        total = 0.0
        for side in (centres <= threshold, centres > threshold):
            if weights[side].sum() > 0:
                mean = np.average(centres[side], weights=weights[side])
                total += float((weights[side] * (centres[side] - mean) ** 2).sum())
        return total

    best = min(within(t) for t in centres[:-1])
    found = otsu_threshold(weights, centres)
    assert centres[0] <= found < centres[-1]
    assert within(found) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_otsu_threshold_lies_in_the_middle_of_an_empty_valley():
    counts = np.zeros(101)
    counts[20], counts[80] = 10, 10
    assert otsu_threshold(counts, np.arange(101.0)) == pytest.approx(50, abs=1)


def test_otsu_splits_two_clear_classes_without_error():
    volume, parts = mixture([100, 200], [5, 5], [5000, 3000])
    labels = otsu(volume)
    assert labels.data.dtype == np.uint8
    assert np.array_equal(labels.data, parts)
    assert np.array_equal(labels.affine, volume.affine)


@pytest.mark.parametrize("model", [kmeans, gmm])
def test_four_clear_classes_are_recovered_from_dark_to_bright(model):
    volume, parts = mixture([-300, 20, 100, 500], [6, 6, 6, 6], [2000, 3000, 2000, 1000])
    assert (model(volume).data == parts).mean() > 0.999


def test_kmeans_thresholds_lie_halfway_between_the_means_of_their_groups():
    random = np.random.default_rng(2)
    counts, centres = random.integers(0, 100, 200).astype(float), np.linspace(-3, 9, 200)
    borders = kmeans_thresholds(counts, centres, 4)
    groups = np.digitize(centres, borders)
    means = np.array(
        [np.average(centres[groups == n], weights=counts[groups == n]) for n in range(4)]
    )
    assert borders == sorted(borders)
    assert np.allclose(borders, (means[1:] + means[:-1]) / 2, atol=0.03)  # a bin is 0.06 wide


def test_gmm_classes_split_unequal_widths_where_the_densities_cross():
    """A narrow class beside a wide one: the border lies where the weighted densities are equal, not
    halfway.
    """
    centres = np.linspace(-10, 40, 1000)
    weights, means, deviations = np.array([0.5, 0.5]), np.array([0.0, 15.0]), np.array([1.0, 6.0])
    densities = weights[:, None] * stats.norm.pdf(centres, means[:, None], deviations[:, None])
    classes = gmm_classes(densities.sum(0) * 1e5, centres, 2)
    middle = (centres > 0) & (centres < 15)
    assert (classes[middle] == densities.argmax(0)[middle]).mean() > 0.98
    halfway = centres[middle] > 7.5
    assert (classes[middle] == halfway).mean() < 0.8


@pytest.mark.parametrize("name", INTENSITY_MODELS)
def test_classes_are_numbered_from_dark_to_bright(name: str):
    function, classes = INTENSITY_MODELS[name]
    random = np.random.default_rng(5)
    volume = Volume(random.gamma(2.0, 50.0, (20, 20, 20)).astype(np.float32), np.eye(4))
    labels = function(volume, classes).data
    present = np.unique(labels)
    assert set(present) <= set(range(classes))
    assert len(present) > 1
    ranges = [(volume.data[labels == n].min(), volume.data[labels == n].max()) for n in present]
    means = [float(volume.data[labels == n].mean()) for n in present]
    assert means == sorted(means)
    # Thresholds cut the intensities into intervals; Gaussians of unequal width need not.
    if name != "gmm":
        assert all(before[1] <= after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize("name", INTENSITY_MODELS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_any_dtype_gives_the_same_classes(name: str, dtype: type):
    function, classes = INTENSITY_MODELS[name]
    values = np.random.default_rng(1).integers(0, 200, (12, 12, 12))
    expected = function(Volume(values.astype(np.float32), np.eye(4)), classes).data
    assert np.array_equal(function(Volume(values.astype(dtype), np.eye(4)), classes).data, expected)


@pytest.mark.parametrize("name", INTENSITY_MODELS)
def test_an_image_of_one_intensity_is_refused(name: str):
    function, classes = INTENSITY_MODELS[name]
    with pytest.raises(BadFile, match="one intensity"):
        function(Volume(np.full((6, 6, 6), 7.0), np.eye(4)), classes)


@pytest.mark.parametrize("name", INTENSITY_MODELS)
def test_a_single_extreme_voxel_does_not_change_the_classes_of_the_others(name: str):
    function, classes = INTENSITY_MODELS[name]
    volume, _ = mixture([0, 100, 200, 300], [9, 9, 9, 9], [4000] * 4)
    spiked = volume.data.copy()
    spiked[3, 3, 3] = 1e6
    before, after = function(volume, classes).data, function(volume.with_data(spiked), classes).data
    assert (before == after).mean() > 0.999
    assert after[3, 3, 3] == after.max()


@pytest.mark.parametrize("name", INTENSITY_MODELS)
def test_the_table_names_every_class_but_the_background(name: str):
    classes = INTENSITY_MODELS[name][1]
    assert intensity_table(name).values == tuple(range(1, classes))
