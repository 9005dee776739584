"""Surfaces of structures: closed, where the voxels are, as large as they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial import cKDTree

from medseg.errors import BadConfig
from medseg.labels import LabelTable
from medseg.view import Surface, surfaces_of
from medseg.volume import Volume

TABLE = LabelTable.from_values(range(1, 9))


def turned(degrees: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """An affine turned around the axis (1, 1, 1)."""
    axis = np.ones(3) / np.sqrt(3)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing_mm)
    affine[:3, 3] = (11, -40, 7)
    return affine


AFFINES = {
    "plain": np.eye(4),
    "anisotropic": np.diag([0.7, 1.1, 2.5, 1.0]),
    "left-handed": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "oblique": turned(35, (1, 1, 1)),
    "oblique, anisotropic, left-handed": turned(100, (0.8, -1.2, 2.0)),
}


def places(volume: Volume) -> np.ndarray:
    """RAS mm of each voxel, (I, J, K, 3)."""
    indices = np.moveaxis(np.indices(volume.shape), 0, -1)
    return indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def ball(radius_mm: float, affine: np.ndarray) -> tuple[Volume, np.ndarray]:
    """A ball of label 1 in the middle of a grid, and its centre."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shape = tuple(int(n) for n in np.ceil(2 * radius_mm / spacing) + 5)
    centre = (affine @ (*(np.array(shape) - 1) / 2 + (0.2, 0.3, 0.1), 1))[:3]
    empty = Volume(np.zeros(shape, np.uint8), affine)
    far = np.linalg.norm(places(empty) - centre, axis=-1)
    return empty.with_data((far <= radius_mm).astype(np.uint8)), centre


def is_closed(surface: Surface) -> bool:
    """Whether each side of a triangle is the side of one other, which runs the other way."""
    one, two, three = surface.triangles.T
    sides = np.concatenate([np.c_[one, two], np.c_[two, three], np.c_[three, one]])
    forth = {tuple(side) for side in sides.tolist()}
    return len(forth) == len(sides) and all((b, a) in forth for a, b in forth)


def boundary(mask: np.ndarray, fine: int = 5) -> np.ndarray:
    """Points on the faces between a structure's voxels and others, in voxels."""
    padded = np.pad(mask, 1).astype(np.int8)
    steps = (np.arange(fine) + 0.5) / fine - 0.5
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    points = []
    for axis in range(3):
        faces = np.argwhere(np.diff(padded, axis=axis)) - 1.0
        faces[:, axis] += 0.5
        within = np.zeros((len(grid), 3))
        within[:, [(axis + 1) % 3, (axis + 2) % 3]] = grid
        points.append((faces[:, None] + within).reshape(-1, 3))
    return np.concatenate(points)


@pytest.mark.parametrize("name", AFFINES)
def test_a_ball_is_a_ball_wherever_the_scan_lies(name):
    volume, centre = ball(9.0, AFFINES[name])
    (surface,) = surfaces_of(volume, TABLE)
    assert is_closed(surface)
    voxels_mm3 = volume.data.sum() * volume.voxel_mm3
    assert surface.mm3 == pytest.approx(voxels_mm3, rel=0.005)  # and so it is turned outwards
    far = np.linalg.norm(surface.points - centre, axis=1)
    assert np.abs(far - 9).max() < 0.6 * max(volume.spacing_mm)
    assert far.std() < 0.15 * max(volume.spacing_mm)  # stairs of voxels have 0.29


def test_a_surface_stays_within_half_a_voxel_of_the_voxels_and_triangles_a_quarter_beyond():
    volume, _ = ball(8.0, np.eye(4))
    volume.data[:, :9] = np.where(volume.data[:, :9] > 0, 2, 0)
    for error, limit in ((1e-3, 0.55), (0.25, 0.8)):
        for surface in surfaces_of(volume, TABLE, max_error_voxels=error):
            tree = cKDTree(boundary(volume.data == surface.value))
            shares = np.random.default_rng(0).dirichlet([1, 1, 1], len(surface.triangles))
            inside = (surface.points[surface.triangles] * shares[..., None]).sum(axis=1)
            assert tree.query(np.concatenate([surface.points, inside]))[0].max() < limit


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_labels_are_each_surface_is_closed(seed):
    random = np.random.default_rng(seed)
    noise = random.integers(0, 2 + seed, (7, 8, 9)).astype(np.uint16)
    for error in (1e-3, 0.25):
        surfaces = surfaces_of(Volume(noise, np.eye(4)), TABLE, max_error_voxels=error)
        assert [surface.value for surface in surfaces] == list(range(1, 2 + seed))
        for surface in surfaces:
            assert is_closed(surface)
            assert surface.mm3 == pytest.approx((noise == surface.value).sum(), rel=0.1)
            # Files of STL know points by where they are.
            assert len(np.unique(surface.points, axis=0)) == len(surface.points)


@pytest.mark.parametrize(
    "voxels",
    [
        [(2, 2, 2)],
        [(2, 2, 2), (3, 3, 2)],
        [(2, 2, 2), (3, 3, 3)],
        [(2, 2, 2), (3, 3, 2), (2, 3, 3), (3, 2, 3)],
        [(0, 0, 0)],
        [(4, 4, 4), (4, 4, 3), (3, 4, 4)],
    ],
    ids=["one", "at an edge", "at a corner", "crossed", "at the border", "in the corner"],
)
def test_single_voxels_become_small_closed_surfaces(voxels):
    data = np.zeros((5, 5, 5), np.uint8)
    data[tuple(np.transpose(voxels))] = 3
    (surface,) = surfaces_of(Volume(data, np.eye(4)), TABLE)
    assert is_closed(surface)
    assert surface.mm3 == pytest.approx(len(voxels), rel=0.05)
    low, high = np.min(voxels, axis=0) - 0.75, np.max(voxels, axis=0) + 0.75
    assert (surface.points >= low).all()
    assert (surface.points <= high).all()


def test_a_structure_that_fills_the_volume_is_closed():
    (surface,) = surfaces_of(Volume(np.ones((6, 7, 8), np.uint8), np.eye(4)), TABLE)
    assert is_closed(surface)
    assert surface.mm3 == pytest.approx(6 * 7 * 8, rel=0.005)


@pytest.mark.parametrize("box", [(1, 1, 20), (1, 20, 20), (2, 2, 20)])
def test_what_is_thin_does_not_vanish(box):
    data = np.zeros([n + 6 for n in box], np.uint8)
    data[tuple(slice(3, 3 + n) for n in box)] = 1
    (surface,) = surfaces_of(Volume(data, np.eye(4)), TABLE)
    assert is_closed(surface)
    assert surface.mm3 == pytest.approx(np.prod(box), rel=0.02)
    extent = np.ptp(surface.points, axis=0)
    assert (extent > np.array(box) - 0.9).all()
    assert (extent > 0.5).all()


def test_neighbours_share_their_wall():
    data = np.zeros((16, 14, 14), np.uint8)
    data[2:8, 2:12, 2:12] = 1
    data[8:14, 2:12, 2:12] = 2
    data[7:9, 5:8, 5:8] = 3
    for error in (1e-3, 0.25):
        surfaces = surfaces_of(Volume(data, np.eye(4)), TABLE, max_error_voxels=error)
        one, two, three = ({tuple(point) for point in s.points.tolist()} for s in surfaces)
        wall = {point for point in one if abs(point[0] - 7.5) < 0.3 and 3 < point[1] < 10}
        assert len(wall) > 4
        assert wall <= two | three
        assert three <= one | two
        assert sum(surface.mm3 for surface in surfaces) == pytest.approx(1200, rel=0.002)


def test_fewer_triangles_where_they_are_asked_for():
    volume, _ = ball(12.0, np.eye(4))
    (many,) = surfaces_of(volume, TABLE, max_error_voxels=1e-3)
    (some,) = surfaces_of(volume, TABLE)
    (few,) = surfaces_of(volume, TABLE, max_triangles=400)
    assert len(many.triangles) > len(some.triangles) > len(few.triangles)
    assert 380 <= len(few.triangles) <= 400
    assert is_closed(few)
    assert few.mm3 == pytest.approx(volume.data.sum(), rel=0.005)
    (least,) = surfaces_of(volume, TABLE, max_triangles=4)
    assert is_closed(least)


def test_only_what_is_asked_for_and_there_has_a_surface():
    data = np.zeros((8, 8, 8), np.uint16)
    data[1:4, 1:4, 1:4], data[5:7, 5:7, 5:7] = 2, 5
    volume = Volume(data, np.eye(4))
    assert [s.value for s in surfaces_of(volume, TABLE)] == [2, 5]
    assert [s.value for s in surfaces_of(volume, TABLE, (5, 3, 5))] == [5]
    assert [(s.name, s.color) for s in surfaces_of(volume, TABLE, (2,))] == [
        (TABLE[2].name, TABLE[2].color)
    ]
    assert surfaces_of(volume, TABLE, (3,)) == []
    with pytest.raises(BadConfig, match="no label 77"):
        surfaces_of(volume, TABLE, (77,))


def test_equal_labels_give_equal_surfaces():
    volume, _ = ball(7.0, AFFINES["oblique"])
    (one,), (other,) = surfaces_of(volume, TABLE), surfaces_of(volume, TABLE)
    assert np.array_equal(one.points, other.points)
    assert np.array_equal(one.triangles, other.triangles)


def test_kernels_are_called_as_they_are_compiled_ahead():
    """Another layout of an array would have them compiled at the first call, for seconds."""
    program = """
import numpy as np
from medseg.kernels import nets, thinning
from medseg.kernels.signatures import SIGNATURES, types_of
from medseg.view.meshes.surfaces import walls_of
from medseg.volume import Volume

data = np.zeros((9, 9, 9), np.uint8)
data[2:7, 2:7, 2:4], data[2:7, 2:7, 4:7] = 1, 2
walls_of(Volume(data, np.eye(4)), [1, 2], max_triangles=60)
for name, signatures in SIGNATURES.items():
    module, _, function = name.partition(".")
    if module in ("nets", "thinning"):
        called = getattr({"nets": nets, "thinning": thinning}[module], function).signatures
        assert set(called) == {types_of(text) for text in signatures}, name
print("as listed")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False
    )
    assert ran.stdout.strip() == "as listed", ran.stderr
