"""The sliding window gives back what it is given, and painting equals interpolating every class of the whole scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fixtures_main import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from strategies import affines
from torch import Tensor

from medseg.window import Painter, gaussian_weights, sliding_window, window_starts


def collected(predict: Callable[[Tensor], Tensor], image: Tensor, patch: tuple, **options) -> Tensor:
    """The planes of the window put together; they must come in order and cover the image once."""
    parts, expected = [], 0
    for first, logits in sliding_window(predict, image, patch, **options):
        assert first == expected
        assert logits.dtype == torch.float32
        expected += logits.shape[1]
        parts.append(logits)
    assert expected == image.shape[1]
    return torch.cat(parts, 1)


@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    patch=st.tuples(*[st.integers(1, 9)] * 3),
    overlap=st.floats(0, 0.9),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300, deadline=None)
def test_sliding_window_with_an_identity_network_returns_the_image(shape, patch, overlap, seed):
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    result = collected(lambda x: x, image, patch, overlap=overlap, batch=7)
    assert result.shape == image.shape
    # Hundreds of windows share a voxel at the largest overlaps, and their rounding adds up.
    assert float((result - image).abs().max()) <= (1e-6 if overlap <= 0.7 else 4e-6)


def test_sliding_window_weights_windows_as_a_plain_sum_over_the_whole_scan_does():
    """Against the textbook form that holds everything: sum of weight times logits over sum of weights."""
    random = torch.Generator().manual_seed(3)
    image = torch.rand(1, 13, 11, 9, generator=random)
    patch, overlap = (6, 5, 4), 0.5
    weights = [np.maximum(np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2), 1e-3) for p in patch]
    window = weights[0][:, None, None] * weights[1][:, None] * weights[2]

    def predict(x: Tensor) -> Tensor:  # depends on where in the patch a voxel lies, as real networks do
        ramp = torch.arange(x.shape[2]).view(1, 1, -1, 1, 1) / x.shape[2]
        return torch.cat((x * ramp, x + ramp, -x), 1)

    sums, total = np.zeros((3, 13, 11, 9)), np.zeros((13, 11, 9))
    for x in window_starts(13, 6, overlap):
        for y in window_starts(11, 5, overlap):
            for z in window_starts(9, 4, overlap):
                here = np.s_[x : x + 6, y : y + 5, z : z + 4]
                sums[(slice(None), *here)] += window * predict(image[(None, slice(None), *here)])[0].numpy()
                total[here] += window
    result = collected(predict, image, patch, overlap=overlap)
    assert np.allclose(result.numpy(), sums / total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_sliding_window_does_not_depend_on_the_batch(batch: int):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    image = torch.rand(1, 19, 14, 11)
    with torch.inference_mode():
        one = collected(network, image, (8, 8, 8), batch=1)
        several = collected(network, image, (8, 8, 8), batch=batch)
    assert torch.allclose(one, several, rtol=0, atol=1e-5)


def test_sliding_window_yields_planes_that_are_not_written_to_again():
    image = torch.rand(1, 40, 6, 6)
    kept, copies = [], []
    for _, logits in sliding_window(lambda x: x * torch.rand(()), image, (8, 6, 6)):
        kept.append(logits)
        copies.append(logits.clone())
    assert len(kept) > 3
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_sliding_window_pads_with_zeros_where_the_image_is_smaller_than_the_patch():
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    image = torch.ones(1, 3, 4, 5)
    result = collected(predict, image, (8, 8, 8))
    assert torch.allclose(result, image, rtol=0, atol=1e-6)
    assert seen[0].shape == (1, 1, 8, 8, 8)
    assert float(seen[0].sum()) == 3 * 4 * 5


def test_sliding_window_tells_progress_up_to_the_number_of_windows():
    told: list[tuple[int, int]] = []
    shape, patch = (20, 9, 9), (8, 8, 8)
    count = int(np.prod([len(window_starts(n, p, 0.5)) for n, p in zip(shape, patch)]))
    collected(
        lambda x: x, torch.rand(1, *shape), patch, batch=3, progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (count, count)


def test_sliding_window_holds_no_more_planes_than_a_patch():
    image = torch.rand(1, 64, 8, 8)
    sizes = [logits.shape[1] for _, logits in sliding_window(lambda x: x, image, (8, 8, 8))]
    assert sum(sizes) == 64
    assert max(sizes) <= 8


@given(size=st.integers(1, 400), patch=st.integers(1, 130), overlap=st.floats(0, 0.9))
@settings(max_examples=300, deadline=None)
def test_window_starts_cover_the_axis_with_at_least_the_overlap(size: int, patch: int, overlap: float):
    starts = window_starts(size, patch, overlap)
    if size <= patch:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] == size - patch
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert steps.max() <= max(1, patch * (1 - overlap)) + 1  # starts are whole voxels
    assert steps.max() <= patch  # no voxel is left out


@pytest.mark.parametrize("patch", [1, 2, 7, 16, 96])
def test_gaussian_weights_are_even_positive_and_largest_in_the_middle(patch: int):
    weights = gaussian_weights(patch)
    assert weights.shape == (patch,)
    assert torch.equal(weights, weights.flip(0))
    assert float(weights.min()) >= 1e-3 * float(weights.max()) * (1 - 1e-6)
    assert int(weights.argmax()) in (patch // 2, (patch - 1) // 2)


def smooth_logits(classes: int, shape: tuple, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([ndimage.gaussian_filter(random.normal(size=shape), 1.0) for _ in range(classes)]).astype(
        np.float32
    )


def interpolated(logits: np.ndarray, to_model: np.ndarray, shape: tuple) -> np.ndarray:
    """Every class at every voxel of the scan, by scipy, in float64."""
    indices = np.indices(shape).reshape(3, -1)
    at = to_model[:3, :3] @ indices + to_model[:3, 3:]
    limits = np.array(logits.shape[1:])[:, None] - 1.0
    at = np.clip(at, 0, limits)  # the nearest point of the grid, exactly as mode "nearest" but without its rounding
    values = [ndimage.map_coordinates(one.astype(np.float64), at, order=1, mode="nearest") for one in logits]
    return np.stack(values).reshape(len(logits), *shape)


def assert_painted(labels: np.ndarray, logits: np.ndarray, to_model: np.ndarray, values: np.ndarray) -> None:
    """Each label belongs to the largest interpolated logit; where two are equal up to rounding, either will do."""
    mixed = interpolated(logits, to_model, labels.shape)
    index = {int(value): n for n, value in enumerate(values)}
    chosen = np.vectorize(index.__getitem__)(labels)
    got = np.take_along_axis(mixed, chosen[None], 0)[0]
    assert float((mixed.max(0) - got).max()) <= 1e-5


def paint(logits: np.ndarray, to_model: np.ndarray, shape: tuple, values: np.ndarray, blocks: list[int]) -> np.ndarray:
    painter = Painter(shape, to_model, logits.shape[1], values.tolist())
    first = 0
    for size in blocks:
        painter.add(first, torch.from_numpy(logits[:, first : first + size]))
        first += size
    assert first == logits.shape[1]
    return painter.labels


def split(planes: int, random: np.random.Generator) -> list[int]:
    blocks = []
    while planes:
        blocks.append(int(random.integers(1, planes + 1)))
        planes -= blocks[-1]
    return blocks


@given(
    affine=affines(),
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    shape=st.tuples(*[st.integers(1, 10)] * 3),
    classes=st.integers(2, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_painter_equals_interpolating_every_class_for_any_affine_and_any_blocks(affine, grid, shape, classes, seed):
    random = np.random.default_rng(seed)
    logits = smooth_logits(classes, grid, seed)
    to_model = np.array(affine)
    to_model[:3, :3] *= random.uniform(0.2, 1.2) / np.linalg.norm(affine[:3, :3], axis=0).mean()
    middle = (np.array(grid) - 1) / 2 + random.uniform(-1, 1, 3)  # the scan reaches beyond the grid on some sides
    to_model[:3, 3] = middle - to_model[:3, :3] @ ((np.array(shape) - 1) / 2)
    values = np.sort(random.choice(np.arange(1, 200), classes - 1, replace=False))
    values = np.concatenate([[0], values])
    whole = paint(logits, to_model, shape, values, [grid[0]])
    assert_painted(whole, logits, to_model, values)
    for blocks in ([1] * grid[0], split(grid[0], random)):
        assert np.array_equal(paint(logits, to_model, shape, values, blocks), whole)


def test_painter_on_its_own_grid_gives_the_largest_class():
    logits = smooth_logits(5, (6, 7, 8), 1)
    values = np.array([0, 4, 9, 17, 250])
    labels = paint(logits, np.eye(4), (6, 7, 8), values, [2, 1, 3])
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, values[logits.argmax(0)])


def test_painter_gives_uint16_where_label_values_need_it():
    logits = smooth_logits(3, (4, 4, 4), 2)
    values = np.array([0, 256, 65535])
    labels = paint(logits, np.eye(4), (4, 4, 4), values, [4])
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, values[logits.argmax(0)])


def test_painter_with_more_than_255_classes_tells_them_apart():
    random = np.random.default_rng(0)
    logits = random.normal(size=(400, 3, 3, 3)).astype(np.float32)
    values = np.concatenate([[0], random.permutation(np.arange(1, 400)) * 100])
    labels = paint(logits, np.eye(4), (3, 3, 3), values, [1, 2])
    assert np.array_equal(labels, values[logits.argmax(0)])
    half = np.eye(4) * [0.5, 0.5, 0.5, 1]
    assert_painted(paint(logits, half, (5, 5, 5), values, [1, 1, 1]), logits, half, values)


def test_painter_and_window_together_equal_painting_the_whole():
    """The planes a window hands on, of whatever number, paint what the whole stack of logits paints."""
    image = torch.from_numpy(smooth_logits(4, (21, 9, 10), 5))
    to_model = np.array([[0.0, 0.9, 0, 0.4], [-0.4, 0, 0, 8.2], [0, 0, 0.7, 0], [0, 0, 0, 1]])
    shape, values = (20, 22, 13), np.array([0, 3, 2, 1])
    painter = Painter(shape, to_model, 21, values.tolist())
    for first, logits in sliding_window(lambda x: x, image, (8, 6, 6)):
        painter.add(first, logits)
    assert_painted(painter.labels, image.numpy(), to_model, values)
