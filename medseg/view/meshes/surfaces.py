"""Structures of a label map as smooth, closed surfaces of few triangles.

One net lies between all labels at once (`medseg.kernels.nets`): what is one structure's wall is its
neighbour's too, so that no gap can open between them. It is smoothed within the voxels that it
passes through, each label gets back the volume of its voxels, and flat parts lose triangles
(`medseg.kernels.thinning`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadGeometry
from medseg.kernels import nets, thinning
from medseg.kernels.threads import in_slabs
from medseg.labels import LabelTable
from medseg.view.meshes.closing import closed
from medseg.volume import Volume, value_counts

#: How far triangles may come to lie from the smoothed surface, in voxels.
MAX_ERROR_VOXELS = 0.25
#: How far where a number of triangles is asked for.
LARGEST_ERROR_VOXELS = 2.0
#: Rounds of smoothing, and the two steps of each (Taubin 1995, doi:10.1145/218380.218473): one
#: to the middle of the neighbours, one back, so that what is large does not shrink.
_ROUNDS, _TO, _BACK = 50, 0.63, -0.64
#: Rounds at most in which volumes are given back, and what is near enough.
_BALANCES, _NEAR = 12, 5e-4
#: Of what can be removed in a pass, the part that is: the cheapest first.
_PART, _LEAST = 0.35, 2000
_PASSES = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class Surface:
    """The closed surface of a structure.

    points: (n, 3) float32, RAS+ mm. triangles: (m, 3) int32, counterclockwise seen from outside;
    each side of one is the side of exactly one other.
    """

    value: int
    name: str
    color: tuple[int, int, int]
    points: NDArray[np.float32]
    triangles: NDArray[np.int32]

    @property
    def mm3(self) -> float:
        """The volume that the surface encloses."""
        a, b, c = self.points.astype(np.float64)[self.triangles.T]
        return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of it as JSON."""
        return {
            "value": self.value,
            "name": self.name,
            "triangles": len(self.triangles),
            "points": len(self.points),
            "ml": round(self.mm3 / 1000, 4),
        }


@dataclass(kw_only=True)
class _Net:
    """Walls between labels 0 to n, in voxels of a cropped grid.

    points: (n, 3) float32. low, high: (n, 3) float32, between which each may move. triangles: (m,
    3) int32, their normals leading from the first of sides (m, 2) uint16 to the second. to_ras: (4,
    4), from these voxels to RAS+ mm.
    """

    to_ras: NDArray[np.float64]

    points: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    triangles: NDArray[np.int32]
    sides: NDArray[np.uint16]

    @property
    def is_mirrored(self) -> bool:
        """Whether what is counterclockwise in voxels is clockwise in mm."""
        return bool(np.linalg.det(self.to_ras[:3, :3]) < 0)

    def in_mm(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Points (n, 3) in RAS+ mm."""
        places = points.astype(np.float64) @ self.to_ras[:3, :3].T + self.to_ras[:3, 3]
        return places.astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Walls:
    """All surfaces at once: what two structures share is there once.

    points: (n, 3) float32, RAS+ mm. triangles: (m, 3) int32, their normals leading from the first
    to the second of sides (m, 2) uint16: 0 outside, n in the n-th of the structures asked for.
    """

    points: NDArray[np.float32]
    triangles: NDArray[np.int32]
    sides: NDArray[np.uint16]


def surfaces_of(
    labels: Volume,
    table: LabelTable,
    values: Sequence[int] | None = None,
    *,
    max_error_voxels: float | None = None,
    max_triangles: int | None = None,
) -> list[Surface]:
    """The surfaces of the structures `values` of a label map, in the table's order; of all that the
    table names without them. What is not in the label map has none.

    max_error_voxels: how far triangles may lie from the smoothed surface, as a share of the
    shortest edge of a voxel. max_triangles: how many there are about, of all together; then
    `max_error_voxels` may be `LARGEST_ERROR_VOXELS`. Raises `BadConfig` for values that the table
    does not name, and `BadGeometry` where there are too many structures.
    """
    wanted = table.values if values is None else tuple(dict.fromkeys(values))
    for value in wanted:
        if value not in table:
            raise BadConfig(f"there is no label {value}")
    net = _thinned(labels, wanted, max_error_voxels, max_triangles)
    if net is None:
        return []
    return [
        _surface(net, number, table=table, value=value)
        for number, value in enumerate(wanted, 1)
        if (net.sides == number).any()
    ]


def walls_of(labels: Volume, values: Sequence[int], *, max_triangles: int) -> Walls:
    """The walls of structures of a label map, about `max_triangles` with those of two structures
    counted twice.
    """
    net = _thinned(labels, tuple(values), None, max_triangles)
    if net is None:
        nothing = np.zeros((0, 3))
        return Walls(
            points=nothing.astype(np.float32),
            triangles=nothing.astype(np.int32),
            sides=np.zeros((0, 2), np.uint16),
        )
    vertices, inverse = np.unique(net.triangles, return_inverse=True)
    triangles = inverse.reshape(-1, 3).astype(np.int32)
    return Walls(
        points=net.in_mm(net.points[vertices]),
        triangles=triangles[:, ::-1] if net.is_mirrored else triangles,
        sides=net.sides,
    )


def _thinned(
    labels: Volume,
    values: Sequence[int],
    max_error_voxels: float | None,
    max_triangles: int | None,
) -> _Net | None:
    """The net of structures, numbered in their order, with few triangles; None if none is there."""
    if max_error_voxels is None:
        max_error_voxels = MAX_ERROR_VOXELS if max_triangles is None else LARGEST_ERROR_VOXELS
    counts = value_counts(labels.data, max([0, *values]) + 1)
    if not counts[list(values)].any():
        return None
    if len(values) >= np.iinfo(np.uint16).max:
        raise BadGeometry("there are too many structures for surfaces")
    grid, start = _cropped(labels, values)
    to_ras = labels.affine.copy()
    to_ras[:3, 3] += to_ras[:3, :3] @ (start - 0.5)
    spacing = np.array(labels.spacing_mm, np.float32)
    net = _net(grid, spacing, to_ras)
    del grid
    voxels = np.array([0, *(counts[value] for value in values)], np.float64)
    _balance(net, voxels)
    _thin(net, spacing, max_error_voxels, max_triangles)
    _balance(net, voxels)
    return net


def _cropped(labels: Volume, values: Sequence[int]) -> tuple[NDArray[np.uint16], NDArray]:
    """The box of structures, numbered 1, 2, ... in their order, with a border of 0 around it; and
    the voxel it begins at, border included.
    """
    numbers = np.zeros(max(int(labels.data.max()), *values) + 1, np.uint16)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    inside = (numbers > 0)[labels.data]
    box = []
    for axis in range(3):
        there = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(int(there[0]), int(there[-1]) + 1))
    del inside
    part = labels.data[tuple(box)]
    grid = np.zeros([n + 2 for n in part.shape], np.uint16)
    grid[1:-1, 1:-1, 1:-1] = numbers[part]
    return grid, np.array([side.start - 1 for side in box])


def _net(
    grid: NDArray[np.uint16], spacing: NDArray[np.float32], to_ras: NDArray[np.float64]
) -> _Net:
    """The smoothed net of a cropped label map."""
    vertices, faces = nets.count_net(grid)
    corners, around = np.empty((vertices, 3), np.int32), np.empty((vertices, 6), np.int32)
    reach = np.empty((vertices, 3), np.float32)
    quads, sides = np.empty((faces, 4), np.int32), np.empty((faces, 2), np.uint16)
    nets.fill_net(grid, corners, around, reach, quads, sides)
    offsets, other = np.zeros((vertices, 3), np.float32), np.empty((vertices, 3), np.float32)
    for _ in range(_ROUNDS):
        for share, old, new in ((_TO, offsets, other), (_BACK, other, offsets)):
            in_slabs(
                partial(nets.relax, old, corners, around, reach, np.float32(share), new), vertices
            )
    del around, other
    place = corners.astype(np.float32)
    points = place + offsets
    # Of the two diagonals of a face the shorter one, which folds less.
    ends = [((points[quads[:, n]] - points[quads[:, n + 2]]) * spacing) ** 2 for n in (0, 1)]
    is_first = ends[0].sum(axis=1) <= ends[1].sum(axis=1)
    one = np.where(is_first[:, None], quads[:, [0, 1, 2]], quads[:, [1, 2, 3]])
    two = np.where(is_first[:, None], quads[:, [0, 2, 3]], quads[:, [1, 3, 0]])
    return _Net(
        to_ras=to_ras,
        points=points,
        low=place - reach,
        high=place + reach,
        triangles=np.ascontiguousarray(np.concatenate([one, two])),
        sides=np.concatenate([sides, sides]),
    )


def _balance(net: _Net, voxels: NDArray[np.float64]) -> None:
    """Give each label the volume of its voxels (labels + 1,), as if it were a gas: where it has too
    little, its pressure pushes all its walls.

    The pressures are those by which all volumes come right at once, for what one label gets another
    loses: a system of linear equations, with the areas of the walls as its matrix.
    """
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    count = len(voxels)
    there = np.flatnonzero(voxels)
    first, second = net.sides[:, 0].astype(np.int64), net.sides[:, 1].astype(np.int64)
    for _ in range(_BALANCES):
        volumes, walls = np.zeros(count), np.empty(len(net.triangles))
        nets.measure(net.points, net.triangles, net.sides, volumes, walls)
        if (np.abs(voxels - volumes)[1:] <= _NEAR * voxels[1:]).all():
            break
        places = np.concatenate([first, second]), np.concatenate([second, first])
        between = sparse.coo_array((np.concatenate([walls, walls]), places), (count, count)).tocsr()
        matrix = sparse.diags_array(between.sum(axis=1)) - between
        pressures = np.zeros(count)
        pressures[there] = spsolve(
            matrix.tocsr()[there][:, there].tocsc(), (voxels - volumes)[there]
        )
        moves = np.zeros(net.points.shape)
        nets.push(net.points, net.triangles, net.sides, pressures, moves)
        np.clip(net.points + moves, net.low, net.high, out=net.points)


def _thin(
    net: _Net, spacing: NDArray[np.float32], max_error_voxels: float, max_triangles: int | None
) -> None:
    """Take triangles away as long as the surface stays where it is."""
    points = net.points * spacing
    count = len(points)
    errors, gaps = np.zeros(count, np.float32), np.zeros(count, np.float32)
    targets, costs = np.full(count, -1, np.int32), np.zeros(count, np.float32)
    stale = np.ones(count, np.bool_)
    most = np.float32(max_error_voxels * float(spacing.min()))
    for _ in range(_PASSES):
        starts, members = thinning.stars(net.triangles, count)
        judge = partial(thinning.judge, points, net.triangles, starts, members, stale, errors, most)
        in_slabs(partial(judge, targets, costs, gaps), count)
        candidates = np.flatnonzero(targets >= 0)
        # A wall between two structures is a triangle of both.
        shared = np.count_nonzero(net.sides) / len(net.sides)
        goal = int((max_triangles or 0) / shared)
        if not len(candidates) or len(net.triangles) <= goal:
            break
        cheapest = candidates[np.argsort(costs[candidates], kind="stable")]
        cheapest = cheapest[: max(_LEAST, int(_PART * len(cheapest)))]
        gone = thinning.join(
            cheapest,
            targets,
            gaps,
            net.triangles,
            starts,
            members,
            stale,
            errors,
            len(net.triangles) - goal,
        )
        kept = net.triangles[:, 0] >= 0
        net.triangles, net.sides = net.triangles[kept], net.sides[kept]
        if gone < 0.002 * len(kept):
            break


def _surface(net: _Net, number: int, *, table: LabelTable, value: int) -> Surface:
    """One label's walls as a surface of its own, in mm."""
    is_first, is_second = net.sides[:, 0] == number, net.sides[:, 1] == number
    triangles = np.concatenate([net.triangles[is_first], net.triangles[is_second][:, ::-1]])
    vertices, triangles = np.unique(triangles, return_inverse=True)
    points, triangles = closed(net.points[vertices], triangles.reshape(-1, 3).astype(np.int32))
    label = table[value]
    return Surface(
        value=value,
        name=label.name,
        color=label.color,
        points=net.in_mm(points),
        triangles=np.ascontiguousarray(triangles[:, ::-1] if net.is_mirrored else triangles),
    )
