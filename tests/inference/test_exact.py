"""Sums and logits in half precision, against numpy's and scipy's own, and against plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.errors import BadModel
from medseg.inference.exact import HalfPainter, HalfSums, half_weights
from medseg.inference.window import plan_windows, sliding_window
from medseg.kernels.rounding import round_half


def test_numbers_are_rounded_as_numpy_rounds_them():
    random = np.random.default_rng(0)
    numbers = np.concatenate(
        [
            random.normal(size=4000) * 10.0 ** random.integers(-9, 6, 4000),
            np.arange(-2049, 2052) + 0.5,  # halves, to even
            np.array(
                [
                    0.0,
                    2.0**-24,
                    2.0**-25,
                    1.5 * 2.0**-24,
                    65503.9,
                    65519.9,
                    65520.0,
                    -65520.0,
                    1e300,
                ]
            ),
            np.nextafter(2.0 ** np.arange(-20, 16), 0),
        ]
    )
    with np.errstate(over="ignore"):
        want = numbers.astype(np.float16).astype(float)
    np.testing.assert_array_equal([round_half(number) for number in numbers], want)


@pytest.mark.parametrize("patch", [(8, 6, 10), (5, 7, 9), (1, 12, 10)])
def test_weights_are_a_filtered_impulse_in_half_precision(patch):
    lengths = patch[1:] if patch[0] == 1 else patch
    impulse = np.zeros(lengths)
    impulse[tuple(n // 2 for n in lengths)] = 1
    want = ndimage.gaussian_filter(impulse, [n / 8 for n in lengths], mode="constant")
    want = (want / want.max() * 10).astype(np.float16)
    want[want == 0] = want[want > 0].min()
    found = half_weights(patch).numpy().reshape(lengths)
    # A last bit may differ: dividing by a tenth of the maximum is not multiplying by ten.
    np.testing.assert_allclose(found.astype(float), want.astype(float), rtol=2**-10, atol=2**-24)
    assert found.max() == 10


def halves(shape: tuple[int, int, int], patch: tuple[int, int, int], folds: int, seed: int = 0):
    """Windows over noise: (windows, image, predict, what plain loops in half precision give)."""
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    windows = plan_windows(shape, patch, 0.5, 1, "nnunet")
    mix = torch.randn(3 * folds, 1, generator=torch.Generator().manual_seed(7)) * 9
    predict = lambda patches: torch.einsum("kc,bcxyz->bkxyz", mix, patches) + patches.mean()  # noqa: E731
    weights = half_weights(patch)
    sums = torch.zeros((3 * folds, *shape), dtype=torch.half)
    count = torch.zeros(shape, dtype=torch.half)
    for x in windows.starts[0]:
        for y in windows.starts[1]:
            for z in windows.starts[2]:
                place = tuple(slice(a, a + p) for a, p in zip((x, y, z), patch))
                sums[(slice(None), *place)] += (
                    predict(image[(slice(None), *place)][None])[0] * weights
                )
                count[place] += weights
    each = (sums / count).reshape(folds, 3, *shape)
    total = each[0]
    for one in each[1:]:
        total = total + one
    return windows, image, predict, (total / folds if folds > 1 else total).float().numpy()


@pytest.mark.parametrize(
    ("shape", "patch", "folds"),
    [
        ((20, 17, 23), (8, 6, 10), 1),
        ((8, 30, 10), (8, 6, 10), 1),
        ((21, 9, 12), (8, 8, 8), 3),
        ((5, 14, 9), (1, 6, 9), 1),
    ],
)
def test_sums_are_those_of_plain_loops_to_the_last_bit(shape, patch, folds):
    windows, image, predict, want = halves(shape, patch, folds)
    make = lambda *facts: HalfSums(*facts, folds)  # noqa: E731
    for stripes in (1, 2):
        found = np.full((*shape, 3), np.nan, np.float32)
        for stripe in windows.stripes(stripes):
            for block in sliding_window(predict, image, windows, make_sums=make, stripe=stripe):
                x, y = (slice(a, a + n) for a, n in zip((block.x, block.y), block.data.shape))
                found[x, y] = block.data
        np.testing.assert_array_equal(found, want.transpose(1, 2, 3, 0))


def test_numbers_beyond_half_precision_are_an_error_and_no_labels():
    windows = plan_windows((8, 8, 8), (8, 8, 8), 0.5, 1, "nnunet")
    predict = lambda patches: torch.full((1, 2, 8, 8, 8), 1e5)  # noqa: E731
    blocks = sliding_window(
        predict, torch.zeros(1, 8, 8, 8), windows, make_sums=lambda *facts: HalfSums(*facts, 1)
    )
    with pytest.raises(BadModel, match="half precision"):
        list(blocks)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", [(15, 9, 14), (7, 20, 11), (8, 9, 10), (1, 3, 20)])
def test_labels_are_those_of_scipys_interpolation_rounded_and_compared(shape, regions):
    random = np.random.default_rng(2)
    size, outputs = (8, 9, 10), 4
    # Coarse numbers, so that there are ties for rounding to decide.
    logits = (
        random.integers(-3, 4, (*size, outputs)) / 2.0**11 + random.choice([1.0, 2.0], (*size, 1))
    ).astype(np.float16)
    if regions:
        logits = (random.integers(-2, 3, (*size, outputs)) * 2.0**-24).astype(np.float16)
    factors = [new / old for old, new in zip(size, shape)]
    wide = np.stack(
        [
            ndimage.zoom(
                logits[..., n].astype(float), factors, order=1, mode="nearest", grid_mode=True
            )
            for n in range(outputs)
        ],
        -1,
    ).astype(np.float16)
    values = (0, 3, 1, 2, 7) if regions else (0, 5, 2, 9)
    if regions:
        yes = torch.sigmoid(torch.from_numpy(wide).float()).numpy() > 0.5
        want = np.zeros(shape, np.uint8)
        for n in range(outputs):
            want[yes[..., n]] = values[n + 1]
    else:
        want = np.array(values, np.uint8)[wide.argmax(-1)]
    matrix = np.eye(4)
    for n in range(3):
        matrix[n, n], matrix[n, 3] = size[n] / shape[n], 0.5 * size[n] / shape[n] - 0.5
    for cuts in ((0, 8), (0, 3, 8), (0, 1, 7, 8)):  # blocks as windows finish them
        painter = HalfPainter(shape, matrix, size, values, regions=regions, workers=1)
        painter.begin_part()
        for low, high in pairwise(cuts):
            for first, last in ((0, 4), (4, 9)):
                painter.add(
                    low,
                    first,
                    np.ascontiguousarray(logits[low:high, first:last].astype(np.float32)),
                )
        np.testing.assert_array_equal(painter.labels, want)


def test_probabilities_are_the_softmax_of_what_was_interpolated():
    random = np.random.default_rng(3)
    logits = random.normal(size=(6, 6, 6, 3)).astype(np.float16)
    painter = HalfPainter((6, 6, 6), np.eye(4), (6, 6, 6), (0, 1, 2), wanted=[2], workers=1)
    painter.begin_part()
    painter.add(0, 0, logits.astype(np.float32))
    want = torch.softmax(torch.from_numpy(logits).float(), -1).numpy()
    np.testing.assert_allclose(painter.maps[0], want[..., 2], atol=1e-6)
