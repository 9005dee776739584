"""Clean-up of label maps: voxel-equal to the loop over labels, whatever the values, types and
memory layouts.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from medseg.errors import BadConfig
from medseg.postprocess.cleanup import clean, drop_small, fill_holes, keep_largest
from medseg.postprocess.components import connected_components
from medseg.volume import Volume

NEAR = {6: 1, 18: 2, 26: 3}
ROOMY = 10**9


@st.composite
def label_maps(draw):
    shape = draw(st.tuples(*(st.integers(1, 16) for _ in range(3))))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density, count = draw(st.sampled_from((0.2, 0.5, 0.8))), draw(st.integers(1, 4))
    labels = (random.random(shape) < density) * random.integers(1, count + 1, shape)
    if draw(st.booleans()):
        labels = ndimage.maximum_filter(labels, 2)
    if draw(st.booleans()):
        labels = labels * np.array([0, 255, 7, 41, 9])[labels.max()] // labels.max(initial=1)
    labels = labels.astype(draw(st.sampled_from((np.uint8, np.uint16, np.int32))))
    return np.asfortranarray(labels) if draw(st.booleans()) else labels


def parts_of(labels, connectivity):
    """(label, voxel count, mask) of every component, from large to small within a label; ties by
    the first voxel.
    """
    found = []
    for value in np.unique(labels[labels > 0]):
        numbers, count = ndimage.label(
            np.ascontiguousarray(labels == value),
            ndimage.generate_binary_structure(3, NEAR[connectivity]),
        )
        masks = [numbers == n for n in range(1, count + 1)]
        found += sorted(
            ((int(value), int(mask.sum()), mask) for mask in masks),
            key=lambda p: (-p[1], np.flatnonzero(p[2].ravel())[0]),
        )
    return found


@settings(max_examples=40, deadline=None)
@given(label_maps(), st.sampled_from((6, 18, 26)), st.integers(1, 3))
def test_components_keep_and_drop_equal_the_loop(labels, connectivity, count):
    parts = parts_of(labels, connectivity)
    kept, dropped = np.zeros_like(labels), np.zeros_like(labels)
    ranks: dict[int, int] = {}
    for value, voxels, mask in parts:
        ranks[value] = ranks.get(value, 0) + 1
        kept[mask] = value if ranks[value] <= count else 0
        dropped[mask] = value if voxels * 0.5 >= 2 else 0
    before = labels.copy()
    largest = keep_largest(labels, count=count, connectivity=connectivity)
    assert largest.dtype == labels.dtype and (largest == kept).all()
    assert (drop_small(labels, 2, 0.5, connectivity=connectivity) == dropped).all()
    numbers, table = connected_components(labels, connectivity)
    assert table.label.tolist() == [p[0] for p in parts] and table.voxels.tolist() == [
        p[1] for p in parts
    ]
    for n, (_, _, mask) in enumerate(parts):
        assert ((numbers == n + 1) == mask).all()
        where = np.argwhere(mask)
        assert (where.min(0) == table.start[n]).all() and (where.max(0) + 1 == table.stop[n]).all()
    assert (labels == before).all()


def filled_by_loop(labels, values):
    """Background that a label encloses takes the label that leaves it the least room."""
    room, out = np.full(labels.shape, ROOMY), labels.copy()
    for value in values:
        inside, _ = ndimage.label(ndimage.binary_fill_holes(labels == value) & (labels != value))
        size = np.bincount(inside.ravel())[inside]
        better = (inside > 0) & (labels == 0) & (size < room)
        out[better], room[better] = value, size[better]
    return out


@settings(max_examples=40, deadline=None)
@given(label_maps())
def test_fill_holes_equals_the_loop(labels):
    values = [int(value) for value in np.unique(labels) if value]
    assert (fill_holes(labels) == filled_by_loop(labels, values)).all()
    assert (fill_holes(labels, values[:1]) == filled_by_loop(labels, values[:1])).all()
    over = labels.copy()
    for value in values:
        over[ndimage.binary_fill_holes(over == value)] = value
    assert (fill_holes(labels, overwrite=True) == over).all()


def test_nested_holes():
    labels = np.zeros((15, 15, 15), np.uint8)
    labels[1:14, 1:14, 1:14] = 1
    labels[2:13, 2:13, 2:13] = 0
    labels[4:11, 4:11, 4:11] = 2
    labels[6:9, 6:9, 6:9] = 0
    filled = fill_holes(labels)
    assert (
        filled[3, 3, 3] == 1
        and filled[7, 7, 7] == 2
        and filled[5, 5, 5] == 2
        and filled[0, 0, 0] == 0
    )
    assert fill_holes(labels, [1])[7, 7, 7] == 1  # asked for 1 alone, which encloses it too
    assert (fill_holes(labels, overwrite=True)[1:14, 1:14, 1:14] == 1).all()
    assert (fill_holes(labels, [2], overwrite=True) == np.where(filled == 2, 2, labels)).all()


def test_only_the_chosen_labels_change():
    labels = np.zeros((12, 6, 6), np.uint8)
    labels[1:4, 1:4, 1:4], labels[6:8, 1:3, 1:3] = 1, 2
    labels[10, 5, 5], labels[10, 0, 0] = 1, 2
    assert keep_largest(labels, [2])[10, 5, 5] == 1 and keep_largest(labels, [2])[10, 0, 0] == 0
    assert drop_small(labels, 10, 1, [1])[10, 5, 5] == 0
    assert (drop_small(labels, 10, 1, [1])[labels == 2] == 2).all()


def test_equally_large_parts_keep_the_first_whatever_the_memory_layout():
    labels = np.zeros((3, 3, 9), np.uint8)
    labels[0, 2, 8] = labels[2, 0, 0] = labels[2, 2, 4] = 3
    for given_labels in (
        labels,
        np.asfortranarray(labels),
        np.ascontiguousarray(labels[::-1])[::-1],
    ):
        kept = keep_largest(given_labels)
        assert np.argwhere(kept).tolist() == [[0, 2, 8]]


def test_a_part_of_exactly_the_limit_stays_for_rounded_headers():
    labels = np.zeros((9, 4, 4), np.uint8)
    labels[:5, 0, 0] = 1
    assert drop_small(labels, 5, float(np.float32(0.99999994))).any()
    assert not drop_small(labels, 5.01, 1).any()


def test_steps_from_a_model_file():
    labels = np.zeros((20, 10, 10), np.uint8)
    labels[2:8, 2:8, 2:8] = 17
    labels[4, 4, 4] = 0
    labels[12:14, 2:4, 2:4] = 17
    labels[17, 7, 7] = 53
    volume = Volume(labels, np.diag([1.0, 1.0, 2.0, 1.0]))
    steps = [
        {"step": "keep_largest", "labels": [17, 53]},
        {"step": "drop_small", "min_mm3": 50},
        {"step": "fill_holes", "labels": [17]},
    ]
    cleaned = clean(volume, steps)
    expected = np.zeros_like(labels)
    expected[2:8, 2:8, 2:8] = 17
    assert (cleaned.data == expected).all() and (cleaned.affine == volume.affine).all()
    assert (clean(volume, []).data == labels).all()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"step": "keep_largest"}, "is a list of steps"),
        (["keep_largest"], "is not a cleanup step"),
        ([{"step": "polish"}], "the steps are keep_largest, drop_small, fill_holes"),
        ([{"step": ["keep_largest"]}], "is not a cleanup step"),
        ([{"step": "keep_largest", "size": 3}], "has no argument 'size'"),
        ([{"step": "keep_largest", "count": "2"}], "count cannot be '2'"),
        ([{"step": "keep_largest", "count": True}], "count cannot be True"),
        ([{"step": "keep_largest", "count": 0}], "1 component or more"),
        ([{"step": "keep_largest", "connectivity": 8}], "6, 18 or 26"),
        ([{"step": "keep_largest", "labels": [1.5]}], "labels cannot be"),
        ([{"step": "drop_small"}], "needs min_mm3"),
        ([{"step": "drop_small", "min_mm3": float("nan")}], "min_mm3 cannot be nan"),
        ([{"step": "drop_small", "min_mm3": -1}], "volumes in mm3"),
        ([{"step": "fill_holes", "overwrite": 1}], "overwrite cannot be 1"),
    ],
)
def test_bad_steps_are_bad_config(steps, words):
    volume = Volume(np.ones((3, 3, 3), np.uint8), np.eye(4))
    with pytest.raises(BadConfig, match=words):
        clean(volume, steps)


@pytest.mark.parametrize(
    "labels",
    [
        np.ones((3, 3, 3)),
        np.ones((3, 3), np.uint8),
        np.full((3, 3, 3), -1),
        np.full((3, 3, 3), 70_000),
    ],
)
def test_what_is_no_label_map_is_bad_config(labels):
    for step in (keep_largest, fill_holes, connected_components):
        with pytest.raises(BadConfig):
            step(labels)


def test_keep_largest_together_treats_labels_as_one_piece():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:8, 2:8, 2:8], labels[8:12, 2:8, 2:8] = 3, 5  # one piece of two labels
    labels[15:18, 15:18, 15:18] = 5  # apart from it
    labels[15, 2, 2] = 7  # not concerned

    kept = keep_largest(labels, [3, 5], together=True)

    expected = labels.copy()
    expected[15:18, 15:18, 15:18] = 0
    assert (kept == expected).all()
    assert kept.dtype == labels.dtype
