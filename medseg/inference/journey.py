"""A scan on its way through a MONAI model's transforms to what the network sees, and labels on
their way back.

The arithmetic is that of MONAI 1.6 (`monai.transforms`), operation by operation and in its number
types: where a new grid begins, and to which side a voxel half way between two others falls, is
decided by the last digits of float64, and another order of the same sums changes voxels in a
thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medseg.inference.sampling import resampled
from medseg.models import Crop, Space, StepRecipe, Turn
from medseg.volume import Volume, orientation_axis_by_axis

Shape: TypeAlias = tuple[int, int, int]

#: Affines and grids that differ by less count as equal in MONAI, which then leaves the voxels as
#: they are: of numbers (atol), and in parts of them (rtol).
_SAME_ATOL, _SAME_RTOL = 1e-3, 1e-5
#: Two new corners are at one place within this (numpy's own tolerance, which MONAI leaves as it
#: is).
_SAME_CORNER = 1e-8


@dataclass(frozen=True, kw_only=True)
class Turned:
    """An array's axes changed places: `order` are the old axes, of which some run backwards."""

    order: Shape
    flips: tuple[bool, bool, bool]  # of the old axes
    before: Shape

    @property
    def after(self) -> Shape:
        """The shape that comes out."""
        a, b, c = (self.before[axis] for axis in self.order)
        return a, b, c

    def undone(self, array: NDArray) -> NDArray:
        """An array of the new axes along the old ones (a view)."""
        view = array.transpose(np.argsort(self.order))
        return view[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


@dataclass(frozen=True, kw_only=True)
class Spaced:
    """An array changed grids. affine: (4, 4) of the old grid. same: nothing was changed.

    theta: (4, 4) from the old grid's indices to the new one's, as the way back computes it.
    """

    before: Shape
    after: Shape
    affine: NDArray[np.float64]
    single: bool
    same: bool = False
    theta: NDArray[np.float64] | None = None

    def undone(self, array: NDArray) -> NDArray:
        """An array of the new grid on the old one, by the nearest voxel."""
        if self.same:
            return array
        assert self.theta is not None
        return resampled(array, self.theta, self.before, nearest=True, single=self.single)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Of an array a box was kept: from `start` on, which may lie outside; `after` voxels of it."""

    start: Shape
    before: Shape
    after: Shape

    def undone(self, array: NDArray) -> NDArray:
        """An array of the box in one of the old shape, 0 around it."""
        whole = np.zeros(self.before, array.dtype)
        inside = tuple(
            slice(max(0, first), min(size, first + count))
            for first, count, size in zip(self.start, self.after, self.before)
        )
        here = tuple(
            slice(side.start - first, side.stop - first) for side, first in zip(inside, self.start)
        )
        whole[inside] = array[here]
        return whole


Move: TypeAlias = Turned | Spaced | Cut


@dataclass(frozen=True, kw_only=True)
class Target:
    """The grid that outputs are interpolated to, its axes in the order of the network's.

    matrix: (4, 4) from its indices to those of the network's array. low, high: (3,) between which
    of the latter the grid before a crop lies; beyond them its outer voxels count. axes: of each of
    the network's axes the grid's.
    """

    shape: Shape
    matrix: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    axes: Shape


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Where a network's array lies in a scan. shape: its own, at most, until `travel` has been
    there.

    moves: what was done to the array's grid, in order, ready to be undone. affine: (4, 4) from the
    network's indices to RAS mm, of a journey that was gone.
    """

    scan: Volume
    steps: tuple[Any, ...]
    inputs: int
    shape: Shape
    moves: tuple[Move, ...] = ()
    affine: NDArray[np.float64] | None = None

    @property
    def orientation(self) -> str:
        """What the scan is turned to, 'stored' where it is not."""
        return next((s.orientation for s in self.steps if isinstance(s, Turn)), "stored")

    def back(self, array: NDArray) -> NDArray:
        """An array of the network's on the scan's own grid, by the nearest voxel."""
        return self._undone(array, self.moves)

    def _undone(self, array: NDArray, moves: Sequence[Move]) -> NDArray:
        for move in reversed(moves):
            array = move.undone(array)
        return np.asarray(array)

    def _split(self) -> int:
        """How many of the moves come before the change of grids, or the first of all where there
        is none."""
        changes = [n for n, m in enumerate(self.moves) if isinstance(m, Spaced) and not m.same]
        return changes[0] if changes else 0

    def target(self) -> Target:
        """The grid that outputs are interpolated to: the scan's, but for what is undone exactly."""
        moves = self.moves[self._split() :]
        shape = size = moves[0].before if moves else self.shape
        matrix = np.eye(4)
        first = moves[0] if moves else None
        if isinstance(first, Spaced) and not first.same:
            assert first.theta is not None
            matrix, size, moves = first.theta.copy(), first.after, moves[1:]
        low, high, axes = np.zeros(3), np.array(size) - 1.0, [0, 1, 2]
        for move in moves:
            if isinstance(move, Turned):
                order = list(move.order)
                matrix[:3], low, high = matrix[order], low[order], high[order]
                axes = [axes[axis] for axis in order]
                for n, old in enumerate(order):
                    if move.flips[old]:
                        last = move.before[old] - 1
                        matrix[n] *= -1
                        matrix[n, 3] += last
                        low[n], high[n] = last - high[n], last - low[n]
            elif isinstance(move, Cut):
                matrix[:3, 3] -= move.start
                low, high = low - move.start, high - move.start
        matrix[:, :3] = matrix[:, axes]
        a, b, c = axes
        return Target(
            shape=(shape[a], shape[b], shape[c]), matrix=matrix, low=low, high=high, axes=(a, b, c)
        )

    def back_from_target(self, array: NDArray) -> NDArray:
        """What was painted on the target's grid on the scan's own."""
        order = np.argsort(self.target().axes)
        return self._undone(array.transpose(order), self.moves[: self._split()])


# ---------------------------------------------------------------- there


def lay_journey(volumes: Sequence[Volume], recipe: StepRecipe, *, dicom: bool = False) -> Journey:
    """The journey of the scans of one case as far as their voxels do not decide it.

    A box around what is above 0 is not known yet: the shape is the largest that can be. dicom: the
    scan has no stored order of its own; it is turned to LPS unless a step turns it.
    """
    scan = volumes[0]
    steps: tuple[Any, ...] = recipe.steps
    if dicom and not any(isinstance(step, Turn) for step in steps):
        steps = (Turn(orientation="LPS"), *steps)
    grid = Grid(scan.affine, scan.shape)
    for step in steps:
        if isinstance(step, Turn):
            grid.turn(step)
        elif isinstance(step, Space):
            grid.space(step)
        elif isinstance(step, Crop) and step.beyond:
            a, b, c = (n + 2 * margin for n, margin in zip(grid.shape, step.margin))
            grid.shape = (a, b, c)
    return Journey(scan=scan, steps=steps, inputs=len(volumes), shape=grid.shape)


class Grid:
    """The grid of an array on its way: affine (4, 4) torch.float64, shape, and what was done."""

    def __init__(self, affine: NDArray[np.float64], shape: Shape) -> None:
        import torch

        self.affine = torch.from_numpy(np.array(affine, np.float64))
        self.shape = shape
        self.moves: list[Move] = []

    def move(self, made: Move, step: NDArray[np.float64]) -> None:
        """Keep a move. step: (4, 4) from the new indices to the old ones."""
        import torch

        self.moves.append(made)
        self.affine = self.affine @ torch.from_numpy(step)
        self.shape = made.after

    def turn(self, step: Turn) -> Turned:
        """Turn the axes."""
        now = orientation_axis_by_axis(self.affine.numpy())
        places = ["RL", "AP", "SI"]
        kinds = [next(n for n, pair in enumerate(places) if letter in pair) for letter in now]
        new_kinds = [
            next(n for n, p in enumerate(places) if letter in p) for letter in step.orientation
        ]
        order = [kinds.index(kind) for kind in new_kinds]
        flips = [now[old] != letter for old, letter in zip(order, step.orientation)]
        back = [flips[order.index(axis)] for axis in range(3)]
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for new, old in enumerate(order):
            matrix[old, new] = -1 if back[old] else 1
            matrix[old, 3] = self.shape[old] - 1 if back[old] else 0
        move = Turned(
            order=(order[0], order[1], order[2]),
            flips=(back[0], back[1], back[2]),
            before=self.shape,
        )
        self.move(move, matrix)
        return move

    def space(self, step: Space) -> tuple[Spaced, NDArray[np.float64]]:
        """Change the spacing: the move, and (4, 4) from the new indices to the old ones."""
        import torch

        affine, before = self.affine.numpy().copy(), self.shape
        spacing = _spacing(affine, step)
        matrix = _zoomed(affine, spacing)
        shape, offset = _shape_and_offset(before, affine, matrix)
        matrix[:3, 3] = offset
        theta = np.linalg.solve(affine, matrix)
        same = before == shape and (_alike(affine, matrix) or _alike(theta, np.eye(4)))
        move = Spaced(before=before, after=shape, affine=affine, single=step.single, same=same)
        self.moves.append(move)
        self.shape = shape
        if not same:
            self.affine = self.affine @ torch.from_numpy(theta)
        return move, theta

    def cut(self, start: Shape, after: Shape) -> Cut:
        """Keep a box, part of which may lie outside: first what is inside, then zeros around."""
        move = Cut(start=start, before=self.shape, after=after)
        first, second = np.eye(4), np.eye(4)
        first[:3, 3] = [max(0, n) for n in start]
        second[:3, 3] = [min(0, n) for n in start]
        self.move(move, first)
        import torch

        self.affine = self.affine @ torch.from_numpy(second)
        return move


def _alike(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(np.allclose(a, b, rtol=_SAME_RTOL, atol=_SAME_ATOL))


def _spacing(affine: NDArray[np.float64], step: Space) -> NDArray[np.float64]:
    """The new spacing along each axis in mm: what is asked for, or the old one where that will
    do."""
    old = np.sqrt(np.sum(affine[:3, :3] * affine[:3, :3], axis=0))
    new = np.array([own if mm is None else mm for mm, own in zip(step.spacing_mm, old)])
    for axis in range(3):
        low = high = new[axis]
        if step.low_mm is not None:
            low = min(step.low_mm[axis], low)
        if step.high_mm is not None:
            high = max(step.high_mm[axis], high)
        if low - _SAME_ATOL <= old[axis] <= high + _SAME_ATOL:
            new[axis] = old[axis]
    return new


def _zoomed(affine: NDArray[np.float64], spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) the old axes' directions with new spacings, and no translation."""
    directions = affine[:3, :3]
    scale = np.linalg.cholesky(directions.T @ directions).T
    rotation = directions @ np.linalg.inv(scale)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ np.diag(np.sign(np.diag(scale)) * np.abs(spacing))
    return matrix


def _shape_and_offset(
    shape: Shape, old: NDArray[np.float64], new: NDArray[np.float64]
) -> tuple[Shape, NDArray[np.float64]]:
    """How many voxels the new grid has, and where in mm the first lies (`compute_shape_offset`).

    The first of the old corners from which all others lie ahead in the new grid; where rounding
    leaves none, the middles are laid on each other, counted as half the sizes.
    """
    ends = [(0.0, n - 1.0) for n in shape]
    corners = np.array(list(product(*ends))).T
    corners = np.concatenate((corners, np.ones_like(corners[:1])))
    new_corners = np.linalg.solve(new, old) @ corners
    world = old @ corners
    indices = new_corners[:-1] / new_corners[-1]
    size = np.round(np.ptp(indices, axis=1) + 1.0)
    offset = None
    for n in range(corners.shape[1]):
        least = np.min(new_corners[:-1] - new_corners[:-1, n : n + 1], 1)
        if np.allclose(least, 0.0, rtol=0, atol=_SAME_CORNER):
            offset = world[:-1, n]
            break
    if offset is None:
        middle = np.array(shape, float) / 2.0
        offset = old[:3, :3] @ middle + old[:3, 3] - new[:3, :3] @ (size / 2.0)
    a, b, c = (int(n) for n in size)
    return (a, b, c), offset


def ready(grid: Grid) -> tuple[Move, ...]:
    """The moves with what the way back needs: MONAI computes it from the affine that it has arrived
    at."""
    import torch

    affine = grid.affine
    ready: list[Move] = []
    for move in reversed(grid.moves):
        if isinstance(move, Spaced):
            now = affine.numpy()
            theta = np.linalg.solve(now, move.affine)
            same = move.before == move.after and (
                _alike(now, move.affine) or _alike(theta, np.eye(4))
            )
            ready.append(replace(move, theta=theta, same=same))
            if not same:
                affine = affine @ torch.from_numpy(theta)
            continue
        if isinstance(move, Cut):
            for shift in ([-min(0, n) for n in move.start], [-max(0, n) for n in move.start]):
                matrix = np.eye(4)
                matrix[:3, 3] = shift
                affine = affine @ torch.from_numpy(matrix)
        else:
            matrix = np.zeros((4, 4))
            matrix[3, 3] = 1
            for new, old in enumerate(move.order):
                matrix[new, old] = -1 if move.flips[old] else 1
                matrix[new, 3] = move.before[old] - 1 if move.flips[old] else 0
            affine = affine @ torch.from_numpy(matrix)
        ready.append(move)
    return tuple(reversed(ready))
