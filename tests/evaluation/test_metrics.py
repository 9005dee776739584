"""Metrics against MONAI and surface-distance, against analytic values, and against what must hold
for any masks.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from golden import make_metrics_reference as peers
from making.places import GOLDEN
from medseg.errors import BadConfig, BadGeometry
from medseg.evaluation import metrics
from medseg.evaluation.lesions import LesionOptions, lesion_scores
from medseg.evaluation.surfaces import (
    assd,
    hausdorff,
    masd,
    overlaps,
    surface_dice,
    surface_distances,
    surfel_areas,
)

REFERENCE = json.loads((GOLDEN / "metrics_reference.json").read_text())


def values(first, second, spacing, label, surface):
    found = surface_distances(first, second, spacing, [[label]], surface=surface)[0]
    nsd = [surface_dice(found, tolerance) for tolerance in peers.TOLERANCES]
    return [hausdorff(found), hausdorff(found, 95), assd(found), *nsd]


@pytest.mark.parametrize("surface", ["surfel", "voxel"])
@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: str(case["spacing"]))
def test_stored_values_of_the_other_packages(case, surface):
    first, second = peers.unpack(case["first"]), peers.unpack(case["second"])
    together = surface_distances(
        first, second, case["spacing"], [[n] for n in peers.LABELS], surface=surface
    )
    for label, found in zip(peers.LABELS, together):
        expected = case["values"][str(label)][surface]
        assert values(first, second, case["spacing"], label, surface) == pytest.approx(
            expected, abs=1e-5
        )
        nsd = [surface_dice(found, tolerance) for tolerance in peers.TOLERANCES]
        mine = [hausdorff(found), hausdorff(found, 95), assd(found), *nsd]
        assert mine == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spacing", peers.SPACINGS, ids=str)
def test_the_other_packages_where_installed(spacing):
    pytest.importorskip("monai")
    pytest.importorskip("surface_distance")
    for seed in range(100, 104):
        first, second = peers.random_pair(seed, (30, 26, 22))
        for label in peers.LABELS:
            expected = peers.peer_values(first, second, spacing, label)
            for surface, relative in (("surfel", 0), ("voxel", 1e-5)):  # MONAI computes in float32
                wanted = pytest.approx(expected[surface], abs=1e-5, rel=relative)
                assert values(first, second, spacing, label, surface) == wanted


def plain_distances(first, second, spacing, label):
    """Directed distances between border voxels by scipy's distance transform, both ways."""
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in (first == label, second == label)]
    maps = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return np.sort(maps[1][borders[0]]), np.sort(maps[0][borders[1]])


@pytest.mark.parametrize("order", ["C", "F", "sliced"])
def test_far_islands_and_memory_layouts_against_a_distance_transform(order):
    random = np.random.default_rng(5)
    first, second = np.zeros((2, 90, 50, 60), np.uint16)
    first[5:30, 5:40, 5:30] = 700
    second[7:31, 5:38, 6:30] = 700
    for spot in random.integers(3, 45, (12, 3)):
        second[tuple(slice(s, s + 3) for s in np.add(spot, (40, 0, 0)))] = 700
        first[tuple(slice(s, s + 2) for s in spot)] = 3
    second[80:, 20:40, 50:] = 3
    if order == "F":
        first, second = np.asfortranarray(first), np.asfortranarray(second)
    if order == "sliced":
        first, second = np.flip(first.transpose(2, 0, 1), 1), np.flip(second.transpose(2, 0, 1), 1)
    spacing = (0.8, 1.0, 2.0)
    found = surface_distances(first, second, spacing, [[700], [3]], surface="voxel")
    for label, one in zip((700, 3), found):
        for expected, (mm, weight) in zip(
            plain_distances(first, second, spacing, label),
            (one.from_reference, one.from_prediction),
        ):
            assert np.repeat(mm, weight) == pytest.approx(expected, abs=1e-9)
        there, back = plain_distances(first, second, spacing, label)
        assert hausdorff(one, 95) == pytest.approx(
            max(np.percentile(there, 95), np.percentile(back, 95))
        )
        assert masd(one) == pytest.approx((there.mean() + back.mean()) / 2)


def ball(radius, centre, spacing=(1, 1, 1), shape=(60, 60, 60)):
    grid = np.meshgrid(
        *((np.arange(n) - n // 2) * s for n, s in zip(shape, spacing)), indexing="ij"
    )
    return (sum((g - c) ** 2 for g, c in zip(grid, centre)) <= radius**2).astype(np.uint8)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 1, 5)], ids=str)
def test_two_spheres(spacing):
    # Of two spheres at distance d the surfaces are d apart at most, and d / 2 on average. Surface
    # elements sit on a lattice: distances are right to half a voxel of 1 mm, their mean to a
    # quarter of the longest voxel edge.
    shape = tuple(int(60 / s) for s in spacing)
    first, second = ball(20, (0, 0, 0), spacing, shape), ball(20, (5, 0, 0), spacing, shape)
    for surface in ("surfel", "voxel"):
        found = surface_distances(first, second, spacing, [[1]], surface=surface)[0]
        assert hausdorff(found) == pytest.approx(5, abs=0.5)
        assert hausdorff(found, 95) == pytest.approx(4.75, abs=0.5)
        assert assd(found) == pytest.approx(2.5, abs=max(0.5, spacing[2] / 4))
    row = metrics.score(first, second, spacing, {"ball": [1]})["ball"]
    assert row["volume_reference_mm3"] == pytest.approx(4 / 3 * math.pi * 20**3, rel=0.02)
    # Of two equal balls (Dice is their shared part).
    overlap = 1 - 3 * 5 / (4 * 20) + 5**3 / (16 * 20**3)
    assert row["dice"] == pytest.approx(overlap, abs=0.01)


def test_nested_spheres_and_boxes():
    found = surface_distances(ball(20, (0, 0, 0)), ball(15, (0, 0, 0)), (1, 1, 1), [[1]])[0]
    assert assd(found) == pytest.approx(5, abs=0.6) and hausdorff(found) == pytest.approx(
        5, abs=0.3
    )
    first, second = np.zeros((2, 40, 40, 40), np.uint8)
    first[5:25, 5:25, 5:25] = 1
    second[6:26, 5:25, 5:25] = 1
    for surface in ("surfel", "voxel"):
        found = surface_distances(first, second, (1, 1, 1), [[1]], surface=surface)[0]
        assert hausdorff(found) == hausdorff(found, 95) == 1
        assert assd(found) == pytest.approx(1 / 3, abs=0.01)
        assert surface_dice(found, 0.5) == pytest.approx(2 / 3, abs=0.01)
        assert surface_dice(found, 1) == 1
    row = metrics.score(first, second, (1, 1, 1), {"box": [1]})["box"]
    assert (row["dice"], row["iou"], row["precision"], row["recall"]) == (0.95, 19 / 21, 0.95, 0.95)
    assert row["volume_difference_mm3"] == 0 and row["n_both"] == 7600


def test_areas_of_a_box_add_up_to_its_surface():
    # The corners and edges of a box are cut by half a voxel, which a large box hardly notices.
    areas = surfel_areas((1, 2, 3))
    assert areas[0] == areas[255] == 0 and (areas[1:255] > 0).all()
    face, edge_z, corner = areas[0b11110000], areas[0b11000000], areas[0b10000000]
    assert face == pytest.approx(2 * 3)
    assert edge_z == pytest.approx(3 * math.hypot(1, 2) / 2)
    assert corner == pytest.approx(math.sqrt((2 * 3) ** 2 + (1 * 3) ** 2 + (1 * 2) ** 2) / 8)


def test_single_voxels_and_image_borders():
    first, second = np.zeros((2, 9, 9, 9), np.uint8)
    first[0, 0, 0], second[3, 0, 0] = 1, 1
    for surface, mean in (("surfel", 2.5), ("voxel", 3)):
        found = surface_distances(first, second, (2, 1, 1), [[1]], surface=surface)[0]
        assert hausdorff(found) == 6
        assert assd(found) == pytest.approx(2 * mean)
    first[:], second[:] = 1, 1
    second[8] = 0
    for surface in ("surfel", "voxel"):
        found = surface_distances(first, second, (1, 1, 1), [[1]], surface=surface)[0]
        assert hausdorff(found) == 1  # the border of the image is a surface
        same = surface_distances(first, first, (1, 1, 1), [[1]], surface=surface)[0]
        assert hausdorff(same) == 0 and surface_dice(same, 0) == 1


@pytest.mark.parametrize("surface", ["surfel", "voxel"])
def test_empty_masks(surface):
    empty, full = np.zeros((8, 9, 10), np.uint8), ball(3, (0, 0, 0), shape=(8, 9, 10))
    diagonal = math.sqrt(8**2 + 9**2 + 10**2)
    nan, inf = math.nan, math.inf
    expected = {
        # status: Dice, surface Dice, HD95, precision, recall for nan, best_worst, diagonal
        "both_empty": ((nan, nan, nan, nan, nan), (1, 1, 0, 1, 1), (1, 1, 0, 1, 1)),
        "reference_empty": ((0, 0, inf, 0, nan), (0, 0, inf, 0, 0), (0, 0, diagonal, 0, 0)),
        "prediction_empty": ((0, 0, inf, nan, 0), (0, 0, inf, 0, 0), (0, 0, diagonal, 0, 0)),
    }
    pairs = {
        "both_empty": (empty, empty),
        "reference_empty": (empty, full),
        "prediction_empty": (full, empty),
    }
    for status, pair in pairs.items():
        for rule, wanted in zip(("nan", "best_worst", "diagonal"), expected[status]):
            row = metrics.score(*pair, (1, 1, 1), {"x": [1]}, surface=surface, empty=rule)["x"]
            assert row["status"] == status
            got = [
                row[name]
                for name in ("dice", "surface_dice", "hausdorff95_mm", "precision", "recall")
            ]
            assert got == pytest.approx(list(wanted), nan_ok=True)
    assert metrics.score(full, full, (1, 1, 1), {"x": [1]})["x"]["status"] == "ok"


shapes = st.tuples(*(st.integers(2, 14) for _ in range(3)))
spacings = st.tuples(*(st.sampled_from((0.5, 0.8, 1.0, 2.0, 5.0)) for _ in range(3)))
surfaces = st.sampled_from(("surfel", "voxel"))


@st.composite
def pairs(draw):
    shape, seed = draw(shapes), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    density = draw(st.sampled_from((0.02, 0.2, 0.6)))
    first, second = (
        (random.random((2, *shape)) < density) * random.integers(1, 4, (2, *shape))
    ).astype(np.uint8)
    if draw(st.booleans()):
        first, second = ndimage.maximum_filter(first, 2), ndimage.maximum_filter(second, 2)
    return first, second


def rows(first, second, spacing, surface, labels=(1, 2, 3)):
    names = {str(label): [label] for label in labels}
    return metrics.score(
        first, second, spacing, names, surface=surface, percentiles=(50, 95), tolerance_mm=1.1
    )


SYMMETRIC = (
    "dice",
    "iou",
    "hausdorff_mm",
    "hausdorff95_mm",
    "assd_mm",
    "masd_mm",
    "surface_dice",
    "n_both",
)


def same(one, other, names=None):
    for label in one:
        assert other[label]["status"] == one[label]["status"]
        for name in names or [name for name in one[label] if name != "status"]:
            assert other[label][name] == pytest.approx(
                one[label][name], nan_ok=True, rel=1e-9, abs=1e-9
            ), (label, name)


@settings(max_examples=25, deadline=None)
@given(pairs(), spacings, surfaces)
def test_symmetry_identity_and_permutation(pair, spacing, surface):
    first, second = pair
    found = rows(first, second, spacing, surface)
    back = rows(second, first, spacing, surface)
    swapped = {"reference_empty": "prediction_empty", "prediction_empty": "reference_empty"}
    for row in back.values():
        row["status"] = swapped.get(row["status"], row["status"])
    same(found, back, SYMMETRIC)
    for row in rows(first, first, spacing, surface).values():
        if row["status"] == "ok":
            assert (
                row["dice"] == row["surface_dice"] == 1
                and row["hausdorff_mm"] == row["assd_mm"] == 0
            )
    table = np.array([0, 3, 1, 2], np.uint8)
    permuted = rows(table[first], table[second], spacing, surface, labels=(3, 1, 2))
    same(found, dict(zip(found, permuted.values())))


@settings(max_examples=20, deadline=None)
@given(pairs(), spacings, surfaces, st.sampled_from((0.1, 3.0)))
def test_axes_scale_and_padding(pair, spacing, surface, factor):
    first, second = pair
    found = rows(first, second, spacing, surface)
    axes = (2, 0, 1)
    turned = rows(
        first.transpose(axes), second.transpose(axes)[:, ::1], [spacing[a] for a in axes], surface
    )
    same(found, turned)
    same(found, rows(*(np.pad(one, 3) for one in pair), spacing, surface))
    scaled = rows(first, second, np.multiply(spacing, factor), surface)
    for label in found:
        for name in ("hausdorff_mm", "hausdorff95_mm", "assd_mm", "masd_mm"):
            expected = found[label][name] * factor
            assert scaled[label][name] == pytest.approx(expected, nan_ok=True, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(shapes, spacings, surfaces, st.integers(0, 2), st.integers(1, 30))
def test_a_box_moved_by_n_voxels_is_n_spacings_away(sides, spacing, surface, axis, n):
    shape = [side + 2 for side in sides]
    shape[axis] += n
    first = np.zeros(shape, np.uint8)
    first[tuple(slice(1, 1 + side) for side in sides)] = 1
    moved = np.roll(first, n, axis)
    found = surface_distances(first, moved, spacing, [[1]], surface=surface)[0]
    assert hausdorff(found) == pytest.approx(n * spacing[axis])


@settings(max_examples=20, deadline=None)
@given(pairs(), spacings)
def test_unions_and_many_labels_equal_one_at_a_time(pair, spacing):
    first, second = pair
    sets = [[1], [1, 2], [3], [2, 3], [0]]
    together = surface_distances(first, second, spacing, sets)
    counts = overlaps(first, second, sets)
    for labels, found, count in zip(sets, together, counts):
        masks = np.isin(first, labels), np.isin(second, labels)
        alone = surface_distances(*masks, spacing, [[1]])[0]
        assert count.tolist() == [masks[0].sum(), masks[1].sum(), (masks[0] & masks[1]).sum()]
        for percentile in (0, 50, 95, 100):
            assert hausdorff(found, percentile) == pytest.approx(
                hausdorff(alone, percentile), nan_ok=True
            )
        assert assd(found) == pytest.approx(assd(alone), nan_ok=True)


def test_more_labels_than_a_byte_and_the_label_255():
    random = np.random.default_rng(0)
    first = random.integers(0, 600, (20, 20, 20)).astype(np.uint16)
    second = np.where(random.random(first.shape) < 0.3, 5, first).astype(np.uint16)
    sets = [[label] for label in range(1, 600)]
    counts = overlaps(first, second, sets)
    assert counts[:, 0].tolist() == np.bincount(first.ravel(), minlength=600)[1:].tolist()
    assert counts[:, 2].tolist() == np.bincount(first[first == second], minlength=600)[1:].tolist()
    small = ball(5, (0, 0, 0), shape=(15, 15, 15))
    for label in (254, 255):
        assert (
            metrics.score(small * label, small * label, (1, 1, 1), {"x": [label]})["x"][
                "hausdorff_mm"
            ]
            == 0
        )
    absent = metrics.score(small, small, (1, 1, 1), {"x": [255], "y": [1]})
    assert absent["x"]["status"] == "both_empty" and absent["y"]["dice"] == 1


def test_ignored_voxels_count_nowhere():
    first, second = np.zeros((2, 12, 12, 12), np.uint8)
    first[2:8, 2:8, 2:8], second[2:8, 2:8, 2:11] = 1, 1
    first[:, :, 8:] = 7
    row = metrics.score(first, second, (1, 1, 1), {"x": [1]}, ignore=7)["x"]
    assert row["dice"] == 1 and row["hausdorff_mm"] == 0 and row["n_prediction"] == 216


def test_lesions_by_hand():
    first, second = np.zeros((2, 40, 20, 20), bool)
    first[2:6, 2:6, 2:6] = True  # found exactly
    first[12:16, 2:6, 2:6] = True  # found in two halves, half a voxel layer missing
    first[25:28, 2:5, 2:5] = True  # missed
    first[35, 15, 15] = True  # too small to count
    second[2:6, 2:6, 2:6] = True
    second[12, 2:6, 2:6], second[14:16, 2:6, 2:6] = True, True
    second[30:34, 12:16, 12:16] = True  # invented
    options = LesionOptions(min_mm3=5, penalty_mm=100)
    row = lesion_scores(first, second, (1, 1, 1), options, surface="voxel")
    assert [
        row[f"lesions_{name}"]
        for name in ("reference", "prediction", "found", "missed", "invented")
    ] == [
        3,
        4,
        2,
        1,
        1,
    ]
    assert row["lesion_f1"] == pytest.approx(2 / (2 + 0.5 + 0.5))
    half = 2 * 48 / (64 + 48)
    assert row["lesion_dice"] == pytest.approx((1 + half) / 4)
    assert row["lesion_sq"] == pytest.approx((1 + 0.75) / 2)
    assert row["lesion_pq"] == pytest.approx(row["lesion_f1"] * row["lesion_sq"])
    assert row["lesion_hausdorff95_mm"] == pytest.approx((0 + 1 + 100 + 100) / 4)
    second[34, 14, 14] = True  # touches the lesion that is too small
    assert lesion_scores(first, second, (1, 1, 1), options)["lesions_invented"] == 1
    strict = LesionOptions(matching="iou", min_iou=0.5, min_mm3=5, penalty_mm=100)
    row = lesion_scores(first, second, (1, 1, 1), strict)
    # The larger half has an IoU of 0.5 with the lesion; the other half is now invented.
    assert [row[f"lesions_{name}"] for name in ("found", "missed", "invented")] == [2, 1, 2]
    assert row["lesion_sq"] == pytest.approx((1 + 0.5) / 2)


def test_lesions_near_each_other_and_none_at_all():
    first, second = np.zeros((2, 20, 12, 12), bool)
    first[2:5, 2:5, 2:5], first[7:10, 2:5, 2:5] = True, True
    second[2:5, 2:5, 2:5] = True
    apart = lesion_scores(first, second, (1, 1, 1))
    joined = lesion_scores(first, second, (1, 1, 1), LesionOptions(dilation=1))
    assert (apart["lesions_reference"], apart["lesions_missed"], apart["lesion_dice"]) == (
        2,
        1,
        0.5,
    )
    assert (joined["lesions_reference"], joined["lesions_missed"]) == (1, 0)
    assert joined["lesion_dice"] == pytest.approx(2 * 27 / (54 + 27))
    none = lesion_scores(first & False, first & False, (1, 1, 1))
    assert (
        none["lesions_reference"] == 0
        and math.isnan(none["lesion_f1"])
        and math.isnan(none["lesion_dice"])
    )
    invented = lesion_scores(first & False, second, (1, 1, 1))
    assert (invented["lesion_f1"], invented["lesion_dice"], invented["lesion_hausdorff95_mm"]) == (
        0,
        0,
        374,
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"surface": "mesh"}, BadConfig),
        ({"empty": "zero"}, BadConfig),
        ({"percentiles": (101,)}, BadConfig),
        ({"tolerance_mm": -1.0}, BadConfig),
        ({"structures": {"x": []}}, BadConfig),
        ({"structures": {"x": [70_000]}}, BadConfig),
        ({"spacing_mm": (1, 1)}, BadGeometry),
        ({"spacing_mm": (1, 0, 1)}, BadGeometry),
        ({"prediction": np.zeros((4, 4, 5), np.uint8)}, BadGeometry),
        ({"prediction": np.zeros((4, 4, 4))}, BadConfig),
        ({"prediction": np.full((4, 4, 4), -1)}, BadConfig),
    ],
)
def test_arguments_that_make_no_sense(change, error):
    labels = np.ones((4, 4, 4), np.uint8)
    arguments = {
        "reference": labels,
        "prediction": labels,
        "spacing_mm": (1, 1, 1),
        "structures": {"x": [1]},
    }
    with pytest.raises(error):
        metrics.score(**(arguments | change))


@pytest.mark.parametrize(
    "change",
    [
        {"min_iou": 0}, {"min_iou": 1.5}, {"min_mm3": math.nan}, {"penalty_mm": math.inf},
        {"dilation": 1.5}, {"connectivity": 7}, {"matching": "touch"},
    ],
)  # fmt: skip
def test_lesion_options_that_make_no_sense(change):
    with pytest.raises(BadConfig):
        LesionOptions(**change)


def test_importing_medseg_does_not_import_the_compiler():
    modules = (
        "medseg, medseg.evaluation.metrics, medseg.postprocess.cleanup, medseg.evaluation.scoring"
    )
    code = f"import sys, {modules}; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
