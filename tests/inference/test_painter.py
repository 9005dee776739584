"""Painting equals interpolating every class of the whole scan, whatever the blocks, the head and
the orientation.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from making.strategies import affines
from medseg.inference.painter import Head, Painter, Slopes
from medseg.inference.window import plan_windows, sliding_window
from medseg.networks.layers import unfold_cells

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(features: np.ndarray, random: np.random.Generator | None = None):
    """(x, y, block with features last) row by row; all in one, or cut at random places."""
    cuts = []
    for size in features.shape[1:3]:
        inner = (
            random.choice(np.arange(1, size), random.integers(0, size), replace=False)
            if random is not None
            else []
        )
        cuts.append([0, *sorted(int(cut) for cut in inner), size])
    for x, x_end in zip(cuts[0], cuts[0][1:]):
        for y, y_end in zip(cuts[1], cuts[1][1:]):
            yield x, y, np.ascontiguousarray(np.moveaxis(features[:, x:x_end, y:y_end], 0, -1))


def paint(features, to_model, shape, values, random=None, **options) -> Painter:
    painter = Painter(shape, to_model, features.shape[1:], list(values), **options)
    for x, y, block in blocks_of(features, random):
        painter.add(x, y, block)
    return painter


def smooth_logits(classes: int, shape: tuple, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack(
        [ndimage.gaussian_filter(random.normal(size=shape), 1.0) for _ in range(classes)]
    ).astype(np.float32)


def interpolated(logits: np.ndarray, to_model: np.ndarray, shape: tuple) -> np.ndarray:
    """Every class at every voxel of the scan, by scipy, in float64."""
    indices = np.indices(shape).reshape(3, -1)
    at = to_model[:3, :3] @ indices + to_model[:3, 3:]
    limits = np.array(logits.shape[1:])[:, None] - 1.0
    # The nearest point of the grid, exactly as mode "nearest" but without its rounding.
    at = np.clip(at, 0, limits)
    values = [
        ndimage.map_coordinates(one.astype(np.float64), at, order=1, mode="nearest")
        for one in logits
    ]
    return np.stack(values).reshape(len(logits), *shape)


def assert_painted(
    labels: np.ndarray, logits: np.ndarray, to_model: np.ndarray, values: np.ndarray
) -> None:
    """Each label belongs to the largest interpolated logit; where two are equal up to rounding,
    either will do.
    """
    mixed = interpolated(logits, to_model, labels.shape)
    index = {int(value): n for n, value in enumerate(values)}
    chosen = np.vectorize(index.__getitem__)(labels)
    got = np.take_along_axis(mixed, chosen[None], 0)[0]
    assert float((mixed.max(0) - got).max()) <= 1e-5


def placed(affine, grid, shape, random) -> np.ndarray:
    """Scan index to model index for a scan that reaches beyond the grid on some sides."""
    to_model = np.array(affine)
    to_model[:3, :3] *= random.uniform(0.2, 1.2) / np.linalg.norm(affine[:3, :3], axis=0).mean()
    middle = (np.array(grid) - 1) / 2 + random.uniform(-1, 1, 3)
    to_model[:3, 3] = middle - to_model[:3, :3] @ ((np.array(shape) - 1) / 2)
    return to_model


def with_background(random: np.random.Generator, count: int) -> np.ndarray:
    """Label values of background and `count` structures."""
    return np.concatenate([[0], random.choice(np.arange(1, 200), count, replace=False)])


some_grids = {
    "affine": affines(),
    "grid": st.tuples(*[st.integers(1, 9)] * 3),
    "shape": st.tuples(*[st.integers(1, 10)] * 3),
    "classes": st.integers(2, 6),
    "seed": st.integers(0, 2**16),
}


@given(**some_grids)
@settings(max_examples=200, deadline=None)
def test_painter_equals_interpolating_every_class_for_any_affine_and_any_blocks(
    affine, grid, shape, classes, seed
):
    random = np.random.default_rng(seed)
    logits = smooth_logits(classes, grid, seed)
    to_model, values = placed(affine, grid, shape, random), with_background(random, classes - 1)
    whole = paint(logits, to_model, shape, values).labels
    assert_painted(whole, logits, to_model, values)
    assert np.array_equal(paint(logits, to_model, shape, values, random).labels, whole)


@given(**some_grids, width=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_head_applied_last_gives_what_it_gives_applied_first(
    affine, grid, shape, classes, seed, width
):
    random = np.random.default_rng(seed)
    features = smooth_logits(width, grid, seed)
    head = Head(
        random.normal(size=(classes, width)).astype(np.float32),
        random.normal(size=classes).astype(np.float32),
    )
    logits = np.einsum("kf,fxyz->kxyz", head.weights, features) + head.bias[:, None, None, None]
    to_model, values = placed(affine, grid, shape, random), with_background(random, classes - 1)
    painter = paint(features, to_model, shape, values, random, head=head)
    assert_painted(painter.labels, logits, to_model, values)


@given(**some_grids)
@settings(max_examples=100, deadline=None)
def test_of_regions_the_last_above_zero_is_painted(affine, grid, shape, classes, seed):
    random = np.random.default_rng(seed)
    logits = smooth_logits(classes, grid, seed)
    to_model, values = placed(affine, grid, shape, random), with_background(random, classes)
    labels = paint(logits, to_model, shape, values, random, regions=True).labels
    mixed = interpolated(logits, to_model, shape)
    expected = np.zeros(shape, int)
    for value, one in zip(values[1:], mixed):
        expected[one > 0] = value
    sure = np.abs(mixed).min(0) > 1e-5
    assert np.array_equal(labels[sure], expected[sure])


@given(**some_grids, regions=st.booleans())
@settings(max_examples=60, deadline=None)
def test_maps_are_interpolated_probabilities_and_entropy(
    affine, grid, shape, classes, seed, regions
):
    random = np.random.default_rng(seed)
    logits = 4 * smooth_logits(classes, grid, seed)
    to_model, values = (
        placed(affine, grid, shape, random),
        with_background(random, classes - (not regions)),
    )
    wanted = [classes - 1, 0]
    maps = paint(logits, to_model, shape, values, random, regions=regions, wanted=wanted).maps
    exact = logits.astype(np.float64)
    if regions:
        p = 1 / (1 + np.exp(-exact))
        entropy = (-(p * np.log2(p) + (1 - p) * np.log2(1 - p))).max(0)
    else:
        p = np.exp(exact) / np.exp(exact).sum(0)
        entropy = -(p * np.log(p)).sum(0) / np.log(classes)
    expected = interpolated(np.stack((*p[wanted], entropy)), to_model, shape)
    assert maps.dtype == np.float32
    assert np.abs(maps - expected).max() < 1e-4


def test_nothing_is_painted_beyond_the_limits():
    logits = np.full((2, 4, 4, 4), -1.0, np.float32)
    logits[1] = 1
    to_model = np.eye(4)
    to_model[:3, 3] = -2
    limits = [(0.0, np.inf), (-np.inf, 2.5), (-np.inf, np.inf)]
    labels = paint(logits, to_model, (8, 8, 8), [0, 7], limits=limits).labels
    expected = np.zeros((8, 8, 8), np.uint8)
    expected[2:, :5] = 7
    assert np.array_equal(labels, expected)


def test_painter_on_its_own_grid_gives_the_largest_class():
    logits = smooth_logits(5, (6, 7, 8), 1)
    values = np.array([0, 4, 9, 17, 250])
    labels = paint(logits, np.eye(4), (6, 7, 8), values, np.random.default_rng(0)).labels
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, values[logits.argmax(0)])


def test_painter_gives_uint16_where_label_values_need_it():
    logits = smooth_logits(3, (4, 4, 4), 2)
    values = np.array([0, 256, 65535])
    labels = paint(logits, np.eye(4), (4, 4, 4), values).labels
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, values[logits.argmax(0)])


def test_painter_with_more_than_255_classes_tells_them_apart():
    random = np.random.default_rng(0)
    logits = random.normal(size=(400, 3, 3, 3)).astype(np.float32)
    values = np.concatenate([[0], random.permutation(np.arange(1, 400)) * 100])
    labels = paint(logits, np.eye(4), (3, 3, 3), values, random).labels
    assert np.array_equal(labels, values[logits.argmax(0)])
    half = np.eye(4) * [0.5, 0.5, 0.5, 1]
    assert_painted(paint(logits, half, (5, 5, 5), values, random).labels, logits, half, values)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_painter_and_window_together_equal_painting_the_whole(parts: int):
    """The blocks a window hands on, of whatever number, paint what the whole stack of logits
    paints.
    """
    image = torch.from_numpy(smooth_logits(4, (21, 19, 10), 5))
    to_model = np.array([[0.0, 0.9, 0, 0.4], [-0.4, 0, 0, 8.2], [0, 0, 0.7, 0], [0, 0, 0, 1]])
    shape, values = (20, 22, 13), np.array([0, 3, 2, 1])
    windows = plan_windows((21, 19, 10), (8, 6, 6), 0.5)
    painter = Painter(shape, to_model, (21, 19, 10), values.tolist(), wanted=[1])
    for stripe in windows.stripes(parts):
        painter.begin_part()
        for block in sliding_window(lambda x: x, image, windows, stripe=stripe):
            painter.add(block.x, block.y, block.data)
    assert_painted(painter.labels, image.numpy(), to_model, values)
    p = torch.softmax(image, 0).numpy()
    assert np.abs(painter.maps[:1] - interpolated(p[1:2], to_model, shape)).max() < 1e-4


@given(
    classes=st.sampled_from([15, 16, 17, 25, 31, 32, 40]),
    seed=st.integers(0, 100),
    straight=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_many_classes_are_painted_as_few_are(classes, seed, straight):
    random = np.random.default_rng(seed)
    logits = smooth_logits(classes, (4, 5, 6), seed)
    to_model = np.diag([0.6, 0.7, 0.55, 1.0])
    if not straight:
        to_model[:3, :3] += random.uniform(-0.1, 0.1, (3, 3))
    painter = paint(logits, to_model, (6, 7, 11), range(classes), random)
    assert_painted(painter.labels, logits, to_model, np.arange(classes))
    assert len(np.unique(painter.labels)) > 5


def linear(layer: Head | Slopes, cells: np.ndarray) -> np.ndarray:
    return np.einsum("kf,fxyz->kxyz", layer.weights, cells) + layer.bias[:, None, None, None]


@pytest.mark.parametrize("size", [(7, 9, 6), (8, 8, 8), (5, 1, 3)])
@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize("sloped", [False, True])
def test_cells_are_painted_as_the_voxels_that_their_head_makes_of_them(size, classes, sloped):
    random = np.random.default_rng(classes)
    width = 13 if sloped else 5
    cells = random.normal(size=(width, *(-(-n // 2) for n in size))).astype(np.float32)
    weights, bias = random.normal(size=(classes * 8, width)), random.normal(size=classes * 8)
    head = Head(weights.astype("f4"), bias.astype("f4"))
    logits = linear(head, cells)
    if sloped:
        weights, bias = random.normal(size=(classes, width)), random.normal(size=classes)
        slopes = Slopes(weights.astype("f4"), bias.astype("f4"), 4)
        head = Head(head.weights, head.bias, slopes)
        logits = logits + (linear(slopes, cells)[:, None] * cells[4:12]).reshape(logits.shape)
    logits = unfold_cells(torch.from_numpy(logits)[None], 2)[
        0, :, : size[0], : size[1], : size[2]
    ].numpy()
    to_model = np.diag([0.7, 0.9, 0.6, 1.0])
    for attempt in range(4):
        painter = Painter((9, 11, 10), to_model, size, list(range(classes)), head=head, cell=2)
        for x, y, block in blocks_of(cells, random if attempt else None):
            painter.add(x, y, block)
        assert_painted(painter.labels, logits, to_model, np.arange(classes))


@pytest.mark.parametrize("size", [(21, 19, 11), (20, 18, 12), (9, 40, 9)])
@pytest.mark.parametrize("parts", [1, 2])
def test_windows_of_cells_cover_an_image_of_any_size_once(size, parts):
    """What says of each cell the mean of its voxels gives that, wherever the windows lie; beyond
    the image is 0.
    """
    image = torch.rand(1, *size)
    windows = plan_windows(size, (8, 12, 8), 0.5, cell=2)
    padded = torch.nn.functional.pad(image, [n for one in size[::-1] for n in (0, one % 2)])
    expected = torch.nn.functional.avg_pool3d(padded, 2)[0].numpy()
    found, seen = np.full(expected.shape, np.nan, np.float32), np.zeros(expected.shape, int)
    for stripe in windows.stripes(parts):
        for block in sliding_window(
            lambda x: torch.nn.functional.avg_pool3d(x, 2), image, windows, stripe=stripe, cell=2
        ):
            x, y = block.x, block.y
            place = (slice(x, x + block.data.shape[0]), slice(y, y + block.data.shape[1]))
            found[place], seen[place] = block.data[..., 0], seen[place] + 1
    assert seen.min() == 1 and seen.max() <= parts
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("classes", [3, 16, 25, 118])
def test_of_equal_logits_the_first_class_is_taken(classes):
    logits = np.zeros((classes, 3, 3, 3), np.float32)
    assert not paint(logits, np.diag([0.5, 0.5, 0.5, 1]), (5, 5, 5), range(classes)).labels.any()
    logits[[1, classes - 1]] = 2
    assert (paint(logits, np.diag([0.5, 0.5, 0.5, 1]), (5, 5, 5), range(classes)).labels == 1).all()
    logits[classes - 1, 1:] = 3
    labels = paint(logits, np.diag([0.5, 0.5, 0.5, 1]), (5, 5, 5), range(classes)).labels
    assert (labels[0] == 1).all() and (labels[1:] == classes - 1).all()


@pytest.mark.parametrize("regions", [False, True])
def test_confidence_is_the_mean_probability_of_what_was_chosen(regions):
    logits = 6 * smooth_logits(4, (12, 14, 16), 3)
    painter = paint(
        logits, np.eye(4), logits.shape[1:], range(4 + regions), regions=regions, certain=True
    )
    best = painter.labels
    if regions:
        chances = np.concatenate((np.zeros((1, *best.shape)), 1 / (1 + np.exp(-logits))))
    else:
        chances = np.exp(logits) / np.exp(logits).sum(0)
    assert set(painter.confidence()) == set(np.unique(best)) - {0}
    for value, found in painter.confidence().items():
        expected = chances[value][best == value].mean()
        assert abs(found - expected) < 0.06  # of every eighth voxel
    assert (
        paint(logits, np.eye(4), best.shape, range(4 + regions), regions=regions).confidence() == {}
    )
