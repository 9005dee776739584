"""The sliding window gives back what it is given, whatever the shapes, and holds no more than it
must.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from medseg.errors import DataWarning
from medseg.inference import window as engine
from medseg.inference.window import gaussian_weights, plan_windows, sliding_window, window_starts

pytestmark = pytest.mark.usefixtures("one_thread")


def collected(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    patch: tuple,
    overlap=0.5,
    parts=1,
    **options,
):
    """The blocks put together, (X, Y, Z, F); they must cover the image, once but for one plane
    between parts.
    """
    windows = plan_windows(image.shape[1:], patch, overlap)
    whole, seen = None, np.zeros(windows.shape[:2], int)
    for stripe in windows.stripes(parts):
        for block in sliding_window(predict, image, windows, stripe=stripe, **options):
            data = block.data
            if whole is None:
                whole = np.full((*windows.shape, data.shape[3]), np.nan, np.float32)
            assert data.dtype == np.float32 and data.shape[2] == windows.shape[2]
            assert stripe[0] <= block.y and block.y + data.shape[1] <= stripe[1]
            seen[block.x : block.x + data.shape[0], block.y : block.y + data.shape[1]] += 1
            whole[block.x : block.x + data.shape[0], block.y : block.y + data.shape[1]] = data
    assert whole is not None
    twice = [low for low, _ in windows.stripes(parts)[1:]]
    assert (np.delete(seen, twice, 1) == 1).all() and (seen[:, twice] == 2).all()
    return whole


def last(image: Tensor) -> np.ndarray:
    """An image with its channels last."""
    return image.permute(1, 2, 3, 0).numpy()


@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    patch=st.tuples(*[st.integers(1, 9)] * 3),
    overlap=st.floats(0, 0.9),
    parts=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300, deadline=None)
def test_sliding_window_with_an_identity_network_returns_the_image(
    shape, patch, overlap, parts, seed
):
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    result = collected(lambda x: x, image, patch, overlap, parts, batch=7)
    # Hundreds of windows share a voxel at the largest overlaps, and their rounding adds up.
    assert float(np.abs(result - last(image)).max()) <= (1e-6 if overlap <= 0.7 else 4e-6)


def textbook(
    predict: Callable[[Tensor], Tensor], image: Tensor, patch: tuple, overlap: float
) -> np.ndarray:
    """The form that holds everything: sum of weight times logits over sum of weights, float64,
    channels last.
    """
    weights = [
        np.maximum(np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2), 1e-3)
        for p in patch
    ]
    window = (weights[0][:, None, None] * weights[1][:, None] * weights[2])[..., None]
    shape = image.shape[1:]
    sums, total = None, np.zeros((*shape, 1))
    for x in window_starts(shape[0], patch[0], overlap):
        for y in window_starts(shape[1], patch[1], overlap):
            for z in window_starts(shape[2], patch[2], overlap):
                here = np.s_[x : x + patch[0], y : y + patch[1], z : z + patch[2]]
                out = last(predict(image[(None, slice(None), *here)])[0])
                if sums is None:
                    sums = np.zeros((*shape, out.shape[-1]))
                sums[here] += window * out
                total[here] += window
    return sums / total


def ramped(x: Tensor) -> Tensor:
    """Depends on where in the patch a voxel lies, as real networks do."""
    ramp = torch.arange(x.shape[2]).view(1, 1, -1, 1, 1) / x.shape[2]
    ramp = ramp + torch.arange(x.shape[3]).view(1, 1, 1, -1, 1) / 7 + torch.arange(x.shape[4]) / 5
    return torch.cat((x * ramp, x + ramp, -x), 1)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("parts", [1, 3])
def test_sliding_window_weights_windows_as_a_plain_sum_over_the_whole_scan_does(
    overlap: float, parts: int
):
    image = torch.rand(1, 13, 11, 9, generator=torch.Generator().manual_seed(3))
    result = collected(ramped, image, (6, 5, 4), overlap, parts)
    assert np.allclose(result, textbook(ramped, image, (6, 5, 4), overlap), rtol=0, atol=2e-5)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_give_the_same_bits_as_the_whole(parts: int):
    image = torch.rand(1, 23, 19, 17, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(
        collected(ramped, image, (8, 6, 6)), collected(ramped, image, (8, 6, 6), parts=parts)
    )


def test_threads_change_no_bit():
    image = torch.rand(1, 23, 19, 17, generator=torch.Generator().manual_seed(1))
    one = collected(ramped, image, (18, 6, 6))
    torch.set_num_threads(3)
    assert np.array_equal(collected(ramped, image, (18, 6, 6)), one)


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_sliding_window_does_not_depend_on_the_batch(batch: int):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    image = torch.rand(1, 19, 14, 11)
    with torch.inference_mode():
        one = collected(network, image, (8, 8, 8), batch=1)
        several = collected(network, image, (8, 8, 8), batch=batch)
    assert np.allclose(one, several, rtol=0, atol=1e-5)


def test_sliding_window_yields_blocks_that_are_not_written_to_again():
    image = torch.rand(1, 40, 6, 6)
    windows = plan_windows((40, 6, 6), (8, 6, 6), 0.5)
    kept, copies = [], []
    for block in sliding_window(lambda x: x * torch.rand(()), image, windows):
        kept.append(block.data)
        copies.append(block.data.copy())
    assert len(kept) > 3
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies))


def test_sliding_window_pads_with_zeros_where_the_image_is_smaller_than_the_patch():
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    image = torch.ones(1, 3, 4, 5)
    result = collected(predict, image, (8, 8, 8))
    assert np.allclose(result, last(image), rtol=0, atol=1e-6)
    assert seen[0].shape == (1, 1, 8, 8, 8)
    assert float(seen[0].sum()) == 3 * 4 * 5


@pytest.mark.parametrize("parts", [1, 2])
def test_sliding_window_tells_progress_up_to_the_number_of_windows(parts: int):
    told: list[int] = []
    seen: list[int] = []
    shape, patch = (20, 19, 9), (8, 8, 8)
    windows = plan_windows(shape, patch, 0.5)
    expected = sum(len(windows.columns(*part)) for part in windows.stripes(parts))
    expected *= len(windows.starts[0]) * len(windows.starts[2])

    def predict(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    collected(predict, torch.rand(1, *shape), patch, parts=parts, batch=3, progress=told.append)
    assert sum(told) == sum(seen) == expected
    assert expected == windows.count or parts > 1


def test_sliding_window_holds_one_column_and_what_the_next_row_adds_to():
    """The largest tensors allocated are a column as wide as a patch and a carry as deep as the
    overlap.
    """
    shape, patch, features = (64, 40, 24), (16, 8, 8), 3
    sizes = []
    real = torch.zeros

    def zeros(*arguments, **options):
        made = real(*arguments, **options)
        sizes.append(made.numel())
        return made

    with mock.patch.object(engine.torch, "zeros", zeros):
        collected(lambda x: x.expand(-1, features, -1, -1, -1), torch.rand(1, *shape), patch)
    column, carry = (
        patch[0] * patch[1] * shape[2] * features,
        patch[0] // 2 * shape[1] * shape[2] * features,
    )
    assert sorted(sizes)[-2:] == sorted((column, carry))


def test_windows_with_nothing_in_them_are_not_predicted_and_count_as_what_is_said():
    image = torch.zeros(1, 24, 16, 16)
    image[:, :8, 4:12, 4:12] = 1
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat((x, x * 0 + 2), 1)

    told: list[int] = []
    result = collected(
        predict, image, (8, 8, 8), empty=(0.1, (5.0, 6.0, 7.0)), progress=told.append
    )
    windows = plan_windows((24, 16, 16), (8, 8, 8), 0.5)
    assert 0 < len(seen) < windows.count == sum(told)
    assert all(float(x.max()) > 0.1 for x in seen)
    # No window with anything in it reaches there.
    assert np.allclose(result[16:], (5, 6, 7), atol=1e-5)
    # Predicted ones have no third feature.
    assert np.allclose(result[:4, 6:10, 6:10], (1, 2, 0), atol=1e-5)


def test_sums_made_by_torch_as_on_a_gpu_equal_those_of_the_compiled_loops():
    image = torch.rand(1, 20, 13, 9, generator=torch.Generator().manual_seed(1))
    expected = collected(ramped, image, (8, 6, 8))
    with mock.patch.object(engine, "_uses_kernels", return_value=False):
        result = collected(ramped, image, (8, 6, 8))
        sparse = collected(ramped, image * (image > 0.99), (8, 6, 8), empty=(0.5, (0.0, 1.0, 2.0)))
    assert np.allclose(result, expected, rtol=0, atol=1e-6)
    compiled = collected(ramped, image * (image > 0.99), (8, 6, 8), empty=(0.5, (0.0, 1.0, 2.0)))
    assert np.allclose(sparse, compiled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [0, 1, 17, 35])
def test_the_sums_move_to_the_cpu_when_a_gpu_has_no_room_to_add_to_them(at: int):
    image = torch.rand(1, 20, 9, 9, generator=torch.Generator().manual_seed(1))
    expected = collected(ramped, image, (8, 8, 8))
    real, calls = engine._add_in_ring, []

    def add(*arguments):
        calls.append(1)
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("full")
        return real(*arguments)

    uses = mock.patch.object(engine, "_uses_kernels", return_value=False)
    count = plan_windows((20, 9, 9), (8, 8, 8), 0.5).count
    steps_down = pytest.warns(DataWarning, match="on the CPU") if at < count else nullcontext()
    with uses, mock.patch.object(engine, "_add_in_ring", add), steps_down:
        result = collected(ramped, image, (8, 8, 8))
    assert len(calls) == min(at + 1, count)
    assert np.allclose(result, expected, rtol=0, atol=1e-6)


def test_the_sums_are_made_on_the_cpu_when_a_gpu_has_no_room_for_them():
    image = torch.rand(1, 20, 9, 9, generator=torch.Generator().manual_seed(1))
    expected = collected(ramped, image, (8, 8, 8))
    real = torch.zeros

    def zeros(*arguments, device="cpu", **options):
        if str(device) == "meta":
            raise torch.OutOfMemoryError("full")
        return real(*arguments, device=device, **options)

    full = mock.patch.object(engine.torch, "zeros", zeros)
    with full, pytest.warns(DataWarning, match="no room for the sums"):
        assert np.array_equal(collected(ramped, image, (8, 8, 8), device="meta"), expected)


@given(size=st.integers(1, 400), patch=st.integers(1, 130), overlap=st.floats(0, 0.9))
@settings(max_examples=300, deadline=None)
def test_window_starts_cover_the_axis_with_at_least_the_overlap(
    size: int, patch: int, overlap: float
):
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


@given(
    size=st.integers(1, 60),
    patch=st.integers(1, 20),
    overlap=st.floats(0, 0.9),
    parts=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_stripes_share_one_plane_and_their_columns_reach_all_of_them(size, patch, overlap, parts):
    windows = plan_windows((5, size, 5), (5, patch, 5), overlap)
    stripes = windows.stripes(parts)
    assert stripes[0][0] == 0 and stripes[-1][1] == size
    assert all(b[0] == a[1] - 1 for a, b in pairwise(stripes))
    for low, high in stripes:
        columns = windows.columns(low, high)
        touching = [
            y for y in windows.starts[1] if set(range(y, y + patch)) & set(range(low, high))
        ]
        assert list(columns) == touching


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("features", [1, 3, 16, 32])
def test_windows_in_bfloat16_are_added_as_their_values_in_float32(
    features: int, channels_last: bool
):
    image = torch.rand(1, 13, 20, 24, generator=torch.Generator().manual_seed(4))
    factors = torch.linspace(-1, 2, features).view(1, -1, 1, 1, 1)

    def predict(x: Tensor) -> Tensor:
        out = (x * factors).bfloat16()
        return out.to(memory_format=torch.channels_last_3d) if channels_last else out

    one = collected(predict, image, (8, 8, 16))
    assert np.array_equal(one, collected(lambda x: predict(x).float(), image, (8, 8, 16)))
    assert np.allclose(one[..., -1], float(factors[0, -1]) * image[0].numpy(), atol=0.01)
