"""What follows from the labels of a brain, on heads built here, and what is said of results that
cannot be right.
"""

from __future__ import annotations

import csv

import numpy as np
import pytest

from medseg.config import BrainSpec
from medseg.models.folder import load_checkpoint
from medseg.postprocess import anatomy
from medseg.postprocess.volumes import structure_volumes
from medseg.volume import ORIENTATIONS, Volume, reorient

CHECKPOINT = load_checkpoint("brain")
SPEC, TABLE = CHECKPOINT.spec.brain, CHECKPOINT.table
assert SPEC is not None
#: Of the labels that the head built here has.
FEW = BrainSpec(csf=(4, 43), grey=(3, 42, 8, 47), white=(2, 41, 16), around=(24,))
MM = 2.0


def implausible(labels: Volume, spec: BrainSpec) -> list[str]:
    return anatomy.implausible(labels, TABLE, spec, structure_volumes(labels, TABLE))


def ball(shape, centre_mm, radii_mm) -> np.ndarray:
    """An ellipsoid in a grid of cubes of `MM` whose middle is at 0."""
    at = np.indices(shape).astype(float)
    offset = [(a - (n - 1) / 2) * MM - c for a, n, c in zip(at, shape, centre_mm)]
    return sum((o / r) ** 2 for o, r in zip(offset, radii_mm)) <= 1


@pytest.fixture(scope="module")
def head() -> Volume:
    """Left and right cortex around white matter and a ventricle, a cerebellum below and behind,
    fluid around; RAS.
    """
    shape = (90, 110, 90)
    data = np.zeros(shape, np.uint8)
    data[ball(shape, (0, 0, 0), (74, 92, 76))] = 24
    left = np.arange(shape[0])[:, None, None] < shape[0] // 2
    for radii, values in (
        ((66, 82, 62), (3, 42)),
        ((54, 68, 50), (2, 41)),
        ((14, 30, 12), (4, 43)),
    ):
        inside = ball(shape, (0, 0, 8), radii)
        data[inside & left], data[inside & ~left] = values
    below = ball(shape, (0, -50, -55), (45, 28, 20))
    data[below & left], data[below & ~left] = 8, 47
    data[ball(shape, (0, -18, -55), (12, 12, 22))] = 16
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Volume(data, affine)


def test_every_label_but_background_is_in_one_part():
    parts = SPEC.csf + SPEC.grey + SPEC.white + SPEC.around
    assert sorted(parts) == sorted(CHECKPOINT.spec.classes[1:])


def test_the_mask_is_the_brain_without_the_fluid_around_it_and_without_holes(head):
    data = head.data.copy()
    data[30:33, 50:53, 50:53] = 0  # a hole inside
    mask = anatomy.brain_mask(head.with_data(data), SPEC)
    assert mask.data.dtype == np.uint8
    assert np.array_equal(mask.data > 0, (head.data > 0) & (head.data != 24))
    with_fluid = anatomy.brain_mask(head.with_data(data), SPEC, with_fluid=True)
    assert np.array_equal(with_fluid.data > 0, head.data > 0)


@pytest.mark.parametrize(("dtype", "outside"), [(np.int16, -5), (np.uint8, 0), (np.float32, -2.5)])
def test_the_stripped_scan_keeps_its_type_and_the_brain(head, dtype, outside):
    random = np.random.default_rng(0)
    scan = head.with_data((random.random(head.shape) * 100 + 20).astype(dtype))
    scan.data[0, 0, 0] = outside
    mask = anatomy.brain_mask(head, SPEC)
    found = anatomy.stripped(scan, mask)
    inside = mask.data > 0
    assert found.data.dtype == dtype
    assert np.array_equal(found.data[inside], scan.data[inside])
    assert (found.data[~inside] == outside).all()


def test_tissue_is_fluid_grey_and_white(head):
    found = anatomy.tissue(head, SPEC)
    assert (found.data[np.isin(head.data, (4, 43, 24))] == 1).all()
    assert (found.data[np.isin(head.data, (3, 42, 8, 47))] == 2).all()
    assert (found.data[np.isin(head.data, (2, 41, 16))] == 3).all()
    assert (found.data[head.data == 0] == 0).all()
    assert [label.value for label in anatomy.TISSUES.labels] == [1, 2, 3]


def test_the_table_of_volumes_adds_up(head, tmp_path):
    structures = structure_volumes(head, TABLE)
    anatomy.write_volumes(tmp_path / "volumes.csv", structures, SPEC)
    with (tmp_path / "volumes.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    ml = {row["name"]: float(row["ml"]) for row in rows}
    assert [row["value"] for row in rows[: len(structures)]] == [
        str(row["value"]) for row in structures
    ]
    voxel = MM**3 / 1000
    assert ml["intracranial"] == pytest.approx((head.data > 0).sum() * voxel, abs=0.05)
    assert ml["brain with ventricles"] == pytest.approx(
        np.isin(head.data, (0, 24), invert=True).sum() * voxel, abs=0.05
    )
    assert ml["grey matter"] + ml["white matter"] + ml["ventricles"] == pytest.approx(
        ml["brain with ventricles"], abs=0.01
    )


def test_a_head_is_plausible_in_every_storage_order(head):
    assert (
        900
        < sum(row["ml"] for row in anatomy.totals(structure_volumes(head, TABLE), SPEC)[:3])
        < 1700
    )
    for orientation in ORIENTATIONS:
        assert implausible(reorient(head, orientation), FEW) == []


def turned_header(head: Volume, axes: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same voxels under a header that names other directions."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for n, (axis, sign) in enumerate(zip(axes, signs)):
        matrix[axis, n] = sign * MM
    return Volume(head.data, matrix)


@pytest.mark.parametrize(
    ("axes", "signs", "word"),
    [
        ((0, 1, 2), (-1, 1, 1), "other side"),
        ((0, 1, 2), (1, -1, 1), "behind"),
        ((0, 1, 2), (1, 1, -1), "below"),
        ((0, 2, 1), (1, 1, -1), "lie"),
        ((2, 1, 0), (1, 1, 1), "lie"),
        ((0, 2, 1), (1, 1, 1), "rather than below"),
    ],
)
def test_a_header_with_wrong_directions_is_noticed(head, axes, signs, word):
    told = " ".join(implausible(turned_header(head, axes, signs), FEW))
    assert word in told and "medseg info" in told


def test_what_is_no_whole_head_is_noticed(head):
    small = Volume(head.data, np.diag([0.5, 0.5, 0.5, 1.0]))
    assert "mL" in implausible(small, FEW)[0]
    assert "0 mL" in implausible(head.with_data(np.zeros_like(head.data)), FEW)[0]
    half = head.data.copy()
    half[:30] = 0
    assert "one side" in implausible(head.with_data(half), FEW)[0]


def test_structures_that_every_brain_has_are_missed(head):
    told = implausible(head, SPEC)
    assert len(told) == 1 and "such as left inferior lateral ventricle" in told[0]
