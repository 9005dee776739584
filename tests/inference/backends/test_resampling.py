"""Resampling on a card, on this CPU: what the compiled loops give, but for rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from making.cards import Link
from medseg.inference.backends.copies import Courier
from medseg.inference.backends.resampling import OnCard
from medseg.resampling import interpolate, interpolated

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def scan(shape: tuple[int, ...] = (13, 9, 17), dtype: str = "f4") -> NDArray:
    data = np.random.default_rng(0).normal(200, 60, shape).clip(0, 250)
    return np.asfortranarray(data.astype(dtype))


def step_of(kind: str) -> NDArray[np.float64]:
    """(4, 4) output index to input index: finer, coarser along turned axes, or as it is."""
    step = np.diag([0.7, 0.55, 0.9, 1.0])
    step[:3, 3] = (-0.4, 0.3, 1.1)
    if kind == "turned":
        step = np.diag([1.9, -1.3, 0.8, 1.0])[[2, 0, 1, 3]]
        step[:3, 3] = (1.0, -2.0, 11.0)
    return np.eye(4) if kind == "same" else step


def both(data: NDArray, kind: str, **options: Any) -> tuple[NDArray, NDArray, Link]:
    link, shape = Link(), (11, 12, 10)
    expected = interpolate(data, step_of(kind), shape, **options)
    with interpolated(OnCard(Courier(CPU, link))):
        found = interpolate(data, step_of(kind), shape, **options)
    return expected, found, link


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("kind", ["finer", "turned", "same"])
@pytest.mark.parametrize("outside", [0, -1024, None])
def test_values_are_those_of_the_loops(order: int, kind: str, outside: float | None):
    expected, found, link = both(scan(), kind, order=order, outside=outside)
    assert link.sent_bytes > 0
    assert found.dtype == expected.dtype == np.float32
    assert found.strides == expected.strides, "and lie in memory alike"
    assert np.abs(found - expected).max() < 1e-3  # of numbers up to 1024
    if kind == "same" and order == 1:
        assert np.array_equal(found, expected), "not a bit"


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", ">i2", "i4", "f8"])
def test_scans_of_every_kind_are_resampled(dtype: str):
    expected, found, _ = both(scan(dtype=dtype), "turned", order=1, points=(1, 2, 3))
    assert np.abs(found - expected).max() < 1e-3


def test_a_voxel_that_is_no_number_touches_its_neighbours_alone():
    data = scan()
    data[5, 4, 8] = np.nan
    expected, found, link = both(data, "finer", order=1)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert link.sent_bytes == 0


def test_labels_and_slanted_grids_are_the_cpu_s_business():
    assert both(scan(dtype="u1"), "turned", order=0)[2].sent_bytes == 0
    slanted, link = step_of("finer"), Link()
    slanted[0, 1] = 0.2
    with interpolated(OnCard(Courier(CPU, link))):
        interpolate(scan(), slanted, (5, 5, 5), order=1)
    assert link.sent_bytes == 0


def test_without_room_on_the_card_the_cpu_resamples():
    class Full(Courier):
        def send(self, source: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = interpolate(scan(), step_of("finer"), (9, 9, 9), order=3)
    with interpolated(OnCard(Full(CPU))):
        found = interpolate(scan(), step_of("finer"), (9, 9, 9), order=3)
    assert np.array_equal(found, expected)
    assert np.array_equal(interpolate(scan(), step_of("finer"), (9, 9, 9), order=3), expected)
