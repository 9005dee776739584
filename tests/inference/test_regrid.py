"""Arrays on other grids by the rules of scikit-image and PyTorch, against scipy and torch
themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from medseg.inference.regrid import nearest_places, regrid, separate_axis
from medseg.models import Resampling

CUBIC, LINEAR = Resampling(order=3), Resampling(order=1)
ONE = (1.0, 1.0, 1.0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def zoomed(data: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [new / old for old, new in zip(data.shape, shape)]
    out = ndimage.zoom(data.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(out, data.min(), data.max())


@pytest.mark.parametrize("shape", [(9, 20, 13), (30, 8, 17), (12, 15, 31), (1, 15, 14)])
def test_splines_are_scipys_exactly_or_to_six_digits(shape):
    data = noise(12, 15, 14)
    want = zoomed(data, shape, 3)
    exact = regrid(data, shape, CUBIC, ONE, ONE, exact=True)
    np.testing.assert_allclose(exact, want, atol=1e-6)
    fast = regrid(data, shape, CUBIC, ONE, ONE, exact=False)
    np.testing.assert_allclose(fast, want, atol=2e-5)
    assert fast.min() >= data.min()
    assert fast.max() <= data.max()


def test_nothing_is_done_where_the_size_stays():
    data = noise(5, 6, 7)
    assert regrid(data, (5, 6, 7), CUBIC, (1, 1, 9), ONE, exact=True) is data
    assert regrid(data, (9, 9, 9), Resampling(scheme="none"), ONE, ONE, exact=True) is data


@pytest.mark.parametrize(
    ("current", "new", "separate", "axis"),
    [
        ((3.0, 1.0, 1.0), ONE, None, None),  # 3 times is not more than 3 times
        ((np.nextafter(3.0, 4), 1.0, 1.0), ONE, None, 0),
        ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), None, 1),
        ((1.0, 9.0, 1.0), (5.0, 1.0, 1.0), None, 1),  # the current one is asked first
        ((9.0, 9.0, 1.0), (5.0, 1.0, 1.0), None, None),  # two share the largest: that settles it
        ((1.0, 1.0, 1.5), ONE, True, 2),
        ((9.0, 1.0, 1.0), ONE, False, None),
    ],
)
def test_the_separate_axis_is_that_of_the_first_spacing_that_is_uneven(
    current, new, separate, axis
):
    assert separate_axis(current, new, separate) == axis


@pytest.mark.parametrize(("axis", "exact"), [(0, True), (1, True), (2, False)])
def test_planes_are_resampled_on_their_own_and_the_nearest_is_taken(axis, exact):
    data = noise(6, 9, 10)
    current = tuple(5.0 if n == axis else 1.0 for n in range(3))
    shape = tuple(11 if n == axis else size + 4 for n, size in enumerate(data.shape))
    found = regrid(data, shape, CUBIC, current, ONE, exact=exact)
    planes = np.moveaxis(data, axis, 0)
    plane = tuple(size for n, size in enumerate(shape) if n != axis)
    at = (np.arange(11) + 0.5) * len(planes) / 11 - 0.5
    places = ndimage.map_coordinates(
        np.arange(len(planes), dtype=float), [at], order=0, mode="nearest"
    ).astype(int)
    want = np.stack([zoomed(planes[n], plane, 3) for n in places], axis)
    np.testing.assert_allclose(found, want, atol=1e-6 if exact else 2e-5)


@pytest.mark.parametrize(("old", "new"), [(5, 12), (12, 5), (7, 7), (1, 4), (9, 1), (3, 300)])
def test_the_nearest_places_are_scipys(old, new):
    want = zoomed(np.arange(old, dtype=float), (new,), 0)
    np.testing.assert_array_equal(nearest_places(old, new), want)


def test_of_labels_the_highest_mask_wins_and_of_equal_ones_the_nearest():
    data = np.zeros((1, 1, 4), np.float32)
    data[0, 0] = (1, 3, 3, -1)
    found = regrid(data, (1, 1, 8), LINEAR, ONE, ONE, exact=True, labels=True)
    np.testing.assert_array_equal(found[0, 0], (1, 1, 3, 3, 3, 3, -1, -1))
    # Exactly between two voxels their masks are equally high: the one that rounding chooses wins.
    between = regrid(data, (1, 1, 2), LINEAR, ONE, ONE, exact=True, labels=True)
    nearest = zoomed(data[0, 0], (2,), 0)
    np.testing.assert_array_equal(between[0, 0], nearest)


def test_labels_never_mix_into_others():
    data = np.random.default_rng(1).integers(-1, 4, (9, 8, 7)).astype(np.float32)
    for shape in ((5, 12, 7), (20, 3, 11)):
        found = regrid(data, shape, LINEAR, ONE, ONE, exact=True, labels=True)
        assert set(np.unique(found)) <= set(np.unique(data))


def test_labels_by_pytorch_are_compared_in_thousandths_of_half_precision():
    data = np.random.default_rng(2).integers(-1, 4, (9, 10, 8)).astype(np.float32)
    shape, values = (14, 13, 15), np.unique(data)
    masks = torch.from_numpy(np.stack([data == value for value in values])[None])
    shares = F.interpolate(masks.float() * 1000, shape, mode="trilinear", align_corners=False)[0]
    want = values[shares.half().float().numpy().argmax(0)]  # of equal ones the lowest value
    scheme = Resampling(scheme="linear", order=1)
    found = regrid(data, shape, scheme, ONE, ONE, exact=True, labels=True)
    np.testing.assert_array_equal(found, want)
    assert (want != values[shares.numpy().argmax(0)]).any()


def test_linear_is_pytorchs():
    data = noise(6, 9, 10)
    scheme = Resampling(scheme="linear")
    want = F.interpolate(
        torch.from_numpy(data)[None, None], (9, 5, 14), mode="trilinear", align_corners=False
    )[0, 0]
    np.testing.assert_allclose(
        regrid(data, (9, 5, 14), scheme, ONE, ONE, exact=True), want, atol=1e-6
    )
    thick = regrid(data, (9, 5, 14), scheme, (5, 1, 1), ONE, exact=True)
    planes = F.interpolate(
        torch.from_numpy(data)[:, None], (5, 14), mode="bilinear", align_corners=False
    )[:, 0]
    want = planes[[0, 1, 1, 2, 3, 3, 4, 5, 5]]
    np.testing.assert_allclose(thick, want, atol=1e-6)
