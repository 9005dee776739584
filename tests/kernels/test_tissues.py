"""Loops of tissues in CT against scipy and numpy, which do the same in other ways."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg.inference.tissues.grid import closed, distances_mm, scan_of, spread
from medseg.volume import Volume

SPACING = np.array([0.7, 1.3, 2.9])


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_scipy(seed: int):
    target = np.random.default_rng(seed).random((23, 17, 31)) < 0.01
    right = ndimage.distance_transform_edt(~target, sampling=SPACING)
    assert np.allclose(distances_mm(target, SPACING), right, rtol=1e-5)
    for k in range(target.shape[2]):
        found = distances_mm(target, SPACING, in_slices=True)[..., k]
        if target[..., k].any():
            plane = ndimage.distance_transform_edt(~target[..., k], sampling=SPACING[:2])
            assert np.allclose(found, plane, rtol=1e-5)
        else:
            assert (found > 1e5).all()


def test_closing_fills_gaps_narrower_than_twice_its_radius_and_no_others():
    mask = np.zeros((60, 40, 3), bool)
    mask[10:20], mask[26:36], mask[50:] = True, True, True
    found = closed(mask, np.ones(3), 4.0, in_slices=True)
    assert found[20:26].all() and not found[36:50].any() and not found[:10].any()


def test_labels_spread_step_by_step_through_what_is_allowed():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1, 4, 4], labels[7, 4, 4] = 3, 5
    allowed = np.zeros(labels.shape, bool)
    allowed[:, 4, 4] = True
    assert spread(labels, allowed, 1)[:, 4, 4].tolist() == [3, 3, 3, 0, 0, 0, 5, 5, 5]
    assert spread(labels, allowed, 99)[:, 4, 4].tolist() == [3, 3, 3, 3, 5, 5, 5, 5, 5]
    assert spread(labels, ~allowed, 99)[2, 4, 4] == 0


def test_blocks_are_means_of_clipped_voxels_and_know_their_place():
    data = np.random.default_rng(0).integers(-3000, 4000, (7, 9, 5)).astype(np.int16)
    scan = scan_of(Volume(data, np.diag([1.0, 1.0, 1.5, 1.0])))
    assert scan.factors.tolist() == [3, 3, 2]
    assert scan.blocks.shape == (3, 3, 3)
    means = np.clip(data, -1024, 3071)[3:6, 6:9, 4:].mean()
    assert abs(int(scan.blocks.data[1, 2, 2]) - means) <= 0.5
    assert scan.blocks.affine[:3, 3].tolist() == [1.0, 1.0, 0.75]
