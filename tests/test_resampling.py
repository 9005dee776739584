"""Interpolation against scipy: every order, parallel and oblique grids, every way of storing, and
means of points.
"""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import ndimage

from making.strategies import SIGNED_PERMUTATIONS, rotation
from medseg.resampling import axis_operator, interpolate, spline_coefficients

few = settings(max_examples=40, deadline=None)
sides = st.tuples(*[st.integers(1, 40)] * 3)


def scan(shape: tuple[int, ...], dtype: str = "f4", seed: int = 0) -> np.ndarray:
    """Noise, the worst there is for an interpolation."""
    return np.random.default_rng(seed).normal(0, 1000, shape).astype(dtype)


def scipys(
    data: np.ndarray, step: np.ndarray, shape: tuple[int, ...], order: int, outside: float = 0
) -> np.ndarray:
    """The truth in float64."""
    at = np.einsum("rc,cijk->rijk", step[:3, :3], np.indices(shape)) + step[:3, 3].reshape(
        3, 1, 1, 1
    )
    return ndimage.map_coordinates(
        data.astype(np.float64), at, order=order, mode="constant", cval=outside
    )


def sure(
    step: np.ndarray, shape: tuple[int, ...], sizes: tuple[int, ...], halves: bool = False
) -> np.ndarray:
    """Points of which rounding does not decide whether they are inside or, with `halves`, which
    voxel is nearest.
    """
    at = np.einsum("rc,cijk->rijk", step[:3, :3], np.indices(shape)) + step[:3, 3].reshape(
        3, 1, 1, 1
    )
    ends = np.array(sizes).reshape(3, 1, 1, 1) - 1
    clear = ((np.abs(at) > 1e-5) & (np.abs(at - ends) > 1e-5)).all(0)
    return clear & (np.abs(at - np.floor(at) - 0.5) > 1e-5).all(0) if halves else clear


def steps(
    sizes: tuple[int, ...], shape: tuple[int, ...], directions: np.ndarray, zoom: float
) -> np.ndarray:
    """The output laid over the middle of the input: directions (3, 3), zoom of the voxel size."""
    step = np.eye(4)
    step[:3, :3] = directions * zoom
    step[:3, 3] = (np.array(sizes) - 1) / 2 + 0.0123 - step[:3, :3] @ ((np.array(shape) - 1) / 2)
    return step


@pytest.mark.parametrize("order", [0, 1, 3])
@given(
    sizes=sides,
    shape=sides,
    directions=st.sampled_from(SIGNED_PERMUTATIONS),
    tilt=st.sampled_from([0.0, 0.1, 0.7]),
    zoom=st.floats(0.3, 3),
)
@example(sizes=(1, 1, 1), shape=(3, 3, 3), directions=np.eye(3), tilt=0.0, zoom=0.5)
@example(sizes=(2, 1, 3), shape=(5, 3, 7), directions=np.eye(3), tilt=0.1, zoom=0.5)
@example(sizes=(64, 40, 33), shape=(70, 50, 30), directions=np.eye(3), tilt=0.0, zoom=0.9)
@few
def test_values_equal_scipys(order, sizes, shape, directions, tilt, zoom):
    step = steps(sizes, shape, rotation((1, tilt, -tilt / 2, tilt / 3)) @ directions, zoom)
    data = scan(sizes)
    ours = interpolate(data, step, shape, order=order, outside=-500)
    clear = sure(step, shape, sizes, halves=order == 0)
    bound = (1e-6 if order == 1 else 1e-5) * max(float(np.ptp(data)), 1000)
    assert ours.shape == shape and ours.dtype == np.float32
    if order == 0:
        bound = 1e-9
    assert np.abs(ours - scipys(data, step, shape, order, -500))[clear].max(initial=0) < bound


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_the_way_a_scan_lies_in_memory_changes_nothing(order: int, tilt: float):
    base = scan((17, 20, 23), "i2")
    step = steps(base.shape, (21, 18, 19), rotation((1, tilt, tilt, 0)), 0.8)
    wanted = interpolate(base, step, (21, 18, 19), order=order, outside=7)
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        turns = tuple(slice(None, None, flip) for flip in flips)
        stored = np.ascontiguousarray(base.transpose(axes)[turns])
        same = stored[turns].transpose(np.argsort(axes))
        assert np.array_equal(same, base)
        result = interpolate(same, step, (21, 18, 19), order=order, outside=7)
        assert np.abs(result - wanted).max() < 2e-6 * np.ptp(base)
    assert np.array_equal(
        wanted,
        interpolate(np.pad(base, 3)[3:-3, 3:-3, 3:-3], step, (21, 18, 19), order=order, outside=7),
    )


@pytest.mark.parametrize("tilt", [0.0, 0.2])
@pytest.mark.parametrize("points", [(2, 2, 2), (1, 3, 2), (8, 1, 1)])
@pytest.mark.parametrize("order", [1, 3])
def test_points_are_the_mean_of_a_finer_grid(order: int, points: tuple[int, int, int], tilt: float):
    data, shape = scan((20, 24, 22), "i2"), (9, 8, 10)
    step = steps(data.shape, shape, rotation((1, tilt, 0, -tilt)), 2.7)
    many = np.array(points)
    fine = np.diag([*(1 / many), 1.0])
    fine[:3, 3] = (1 / many - 1) / 2
    finer = interpolate(data, step @ fine, tuple(np.array(shape) * many), order=order, outside=-3)
    blocks = finer.reshape(9, many[0], 8, many[1], 10, many[2]).mean((1, 3, 5))
    ours = interpolate(data, step, shape, order=order, outside=-3, points=points)
    assert (finer == -3).any()
    assert np.abs(ours - blocks).max() < 2e-6 * np.ptp(data)


@pytest.mark.parametrize("order", [1, 3])
def test_the_same_grid_gives_the_same_voxels_to_the_last_plane(order: int):
    data = scan((9, 10, 11), "i2")
    nudged = np.eye(4)
    nudged[:3, 3] = (1e-9, -1e-9, 1e-12)  # rounding, as affines have it
    assert (
        np.abs(interpolate(data, nudged, data.shape, order=order, outside=9999) - data).max() < 0.01
    )


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "i8", "f8", "f4", ">i2"])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_every_dtype_is_interpolated(dtype: str, tilt: float):
    data = np.clip(scan((8, 9, 10)) / 20, -100, 100)
    data = (data if dtype[-2] == "i" or dtype[0] == "f" else np.abs(data)).astype(dtype)
    step = steps(data.shape, (7, 7, 7), rotation((1, tilt, 0, 0)), 0.7)
    assert (
        np.abs(interpolate(data, step, (7, 7, 7), order=1) - scipys(data, step, (7, 7, 7), 1)).max()
        < 1e-3
    )


@pytest.mark.parametrize("size", [2, 3, 5, 31, 32, 33, 70])
def test_spline_coefficients_are_scipys(size: int):
    data = scan((size, 4, size))
    wanted = ndimage.spline_filter(data.astype(np.float64), 3, mode="mirror")
    assert np.abs(spline_coefficients(data) - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_an_axis_operator_sums_to_one_inside_and_to_nothing_outside():
    operator = axis_operator(10, 40, 0.5, -3.0, 3)
    at = 0.5 * np.arange(40) - 3
    inside = (at >= 0) & (at <= 9)
    assert np.allclose(operator.weights.sum(1), inside, atol=1e-6)
    assert np.array_equal(operator.inside, inside)
    assert operator.first.min() >= 0 and (operator.first + operator.weights.shape[1]).max() <= 10


def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="order 2"):
        interpolate(scan((3, 3, 3)), np.eye(4), (3, 3, 3), order=2)
