"""Which grey values are shown: CT by its units, everything else by its percentiles."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.view.contrast import CT_WINDOW, contrast_of

RANDOM = np.random.default_rng(0)


def ct() -> np.ndarray:
    data = RANDOM.normal(40, 20, (30, 30, 30))
    data[:10] = RANDOM.normal(-1000, 10, (10, 30, 30))
    data[12, 12] = 1500
    return data.astype(np.int16)


def test_ct_gets_the_soft_tissue_window():
    contrast = contrast_of(ct())
    assert (contrast.low, contrast.high) == CT_WINDOW
    assert contrast.unit == " HU"
    assert contrast.least <= -1024
    assert contrast.most >= 1500


@pytest.mark.parametrize(
    "data",
    [
        RANDOM.gamma(2, 200, (20, 30, 40)),  # MR
        RANDOM.normal(0, 1, (20, 20, 20)),  # normalised MR
        RANDOM.gamma(2, 2, (20, 20, 20)) * 5000,  # PET in Bq/mL
        ct() + 1024,  # CT stored without its intercept
    ],
)
def test_other_scans_get_percentiles(data):
    contrast = contrast_of(data)
    assert contrast.unit == ""
    assert np.isclose(
        [contrast.low, contrast.high], np.percentile(data, (1, 99.7)), rtol=0.05, atol=0.2
    ).all()
    assert contrast.least <= contrast.low < contrast.high <= contrast.most


@pytest.mark.parametrize(
    "data", [np.zeros((3, 3, 3)), np.full((2, 2, 2), 7.5), np.eye(60)[None] > 0]
)
def test_there_is_always_a_window(data):
    contrast = contrast_of(data)
    assert np.isfinite(contrast[:4]).all()
    assert contrast.least <= contrast.low < contrast.high <= contrast.most


def test_a_large_scan_is_sampled():
    data = np.broadcast_to(np.arange(300, dtype=np.int16)[:, None, None], (300, 300, 300))
    contrast = contrast_of(data)
    assert contrast.low == pytest.approx(3, abs=4)
    assert contrast.high == pytest.approx(298, abs=4)
