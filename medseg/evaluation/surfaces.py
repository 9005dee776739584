"""Overlaps and distances of the surfaces of label maps, all labels in one pass; pure functions of
arrays.

Definitions follow Maier-Hein, Reinke et al., Metrics Reloaded (Nature Methods 2024). Two surfaces
are known:

- "surfel": corners between voxels of which some but not all of the 8 are inside, each weighted by
  the area in mm2 of the marching-cubes patch there (Nikolov et al. 2018,
  google-deepmind/surface-distance). Right for voxels of any shape; the default.
- "voxel": centres of voxels with a face to the outside, each counting 1 (MONAI, MetricsReloaded).

Distances run between elements of one kind, in mm, both ways. What lies outside the array is
background. A percentile is taken in each direction and the larger of the two is the Hausdorff
distance at that percentile: for surfels the smallest distance within which that share of the area
lies, for voxels interpolated linearly.

Method: elements of all labels are marked in one map; each looks for its label in the other map
along lattice offsets in order of length, which fills a histogram labels x offsets that holds every
percentile, mean and tolerance; the few elements beyond the offsets search the blocks of voxels that
hold their label, nearest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadGeometry
from medseg.postprocess import contiguous, is_reversed, look_up

Surface = Literal["surfel", "voxel"]
#: Labels in one pass: an element map holds a label in a byte, and 255 means several.
MAX_LABELS = 254
#: Offsets to search before an element counts as far; about 10 voxels around in isotropic data.
OFFSETS = 4096
#: A tolerance reaches this much further, so that 1 mm includes a voxel step of 1.00000001 mm from a
#: float32 header.
TOLERANCE_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances between the surfaces of one label in two maps: two weighted distributions.

    from_reference, from_prediction: (distances in mm, rising and unique; their weights as whole
    numbers). A weight is a number of voxels, or a surfel area in a unit that is the same for both
    maps. A direction is empty if that map has no such label; distances are inf if the other map has
    none.
    """

    from_reference: tuple[NDArray[np.float64], NDArray[np.int64]]
    from_prediction: tuple[NDArray[np.float64], NDArray[np.int64]]
    surface: Surface


def overlaps(
    reference: NDArray,
    prediction: NDArray,
    structures: Sequence[Sequence[int]],
    ignore: int | None = None,
) -> NDArray[np.int64]:
    """Voxels of each structure in the reference, in the prediction, and in both: (len(structures),
    3).

    A structure is the union of some labels; structures may overlap. Voxels labelled `ignore` in the
    reference count nowhere.
    """
    counts = np.zeros((len(structures), 3), np.int64)
    for rows, values, first, second in _passes(reference, prediction, structures, ignore=ignore):
        counts[rows] = _overlap(first, second)[values]
    return counts


def surface_distances(
    reference: NDArray,
    prediction: NDArray,
    spacing_mm: Sequence[float],
    structures: Sequence[Sequence[int]],
    *,
    surface: Surface = "surfel",
    ignore: int | None = None,
) -> list[SurfaceDistances]:
    """Distances between the surfaces of each structure in two label maps of one grid.

    reference, prediction: (I, J, K) integers from 0 to 65535. spacing_mm: voxel edges along (i, j,
    k). structures, ignore: as in `overlaps`. Raises `BadConfig` and `BadGeometry` for arguments
    that make no sense.
    """
    if surface not in ("surfel", "voxel"):
        raise BadConfig(f"a surface is made of surfel or voxel elements, not '{surface}'")
    spacing = np.array(spacing_mm, float)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise BadGeometry(f"a spacing is three lengths in mm, not {spacing_mm}")
    if is_reversed(reference):
        spacing = spacing[::-1].copy()
    results: dict[int, SurfaceDistances] = {}
    for rows, values, first, second in _passes(reference, prediction, structures, ignore=ignore):
        results.update(
            zip(rows, _both_ways(first, second, spacing, values=values, surface=surface))
        )
    return [results[row] for row in range(len(structures))]


def hausdorff(distances: SurfaceDistances, percentile: float = 100) -> float:
    """The larger of the two directions' percentiles, in mm; nan if both maps lack the structure,
    inf if one does.
    """
    if not 0 <= percentile <= 100:
        raise BadConfig(f"a percentile is 0 to 100, not {percentile}")
    missing = _if_missing(distances)
    if missing is not None:
        return missing
    both = (distances.from_reference, distances.from_prediction)
    return max(
        _percentile(mm, weight, percentile, surface=distances.surface) for mm, weight in both
    )


def assd(distances: SurfaceDistances) -> float:
    """Average symmetric surface distance in mm: the mean over both surfaces; nan and inf as
    `hausdorff`.
    """
    missing = _if_missing(distances)
    if missing is not None:
        return missing
    (mm, weight), (mm_back, weight_back) = distances.from_reference, distances.from_prediction
    return float((mm @ weight + mm_back @ weight_back) / (weight.sum() + weight_back.sum()))


def masd(distances: SurfaceDistances) -> float:
    """Mean average surface distance in mm: the mean of the means of the directions; nan and inf as
    `hausdorff`.
    """
    missing = _if_missing(distances)
    if missing is not None:
        return missing
    both = (distances.from_reference, distances.from_prediction)
    return float(sum(mm @ weight / weight.sum() for mm, weight in both) / 2)


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Share of both surfaces within the tolerance of the other (Nikolov et al. 2018): 0 to 1.

    nan if both maps lack the structure, 0 if one does.
    """
    if not tolerance_mm >= 0:
        raise BadConfig(f"a tolerance is a length in mm, not {tolerance_mm}")
    both = (distances.from_reference, distances.from_prediction)
    total = sum(int(weight.sum()) for _, weight in both)
    limit = tolerance_mm * (1 + TOLERANCE_SLACK)
    return (
        float(sum(int(weight[mm <= limit].sum()) for mm, weight in both) / total)
        if total
        else float("nan")
    )


def _if_missing(distances: SurfaceDistances) -> float | None:
    """nan if no map has the structure, inf if one map, None if both have it."""
    there = sum(len(mm) > 0 for mm, _ in (distances.from_reference, distances.from_prediction))
    return (float("nan"), float("inf"), None)[there]


def _percentile(mm: NDArray, weight: NDArray, percentile: float, surface: Surface) -> float:
    total = np.cumsum(weight)
    if surface == "voxel":
        place = percentile / 100 * (total[-1] - 1)
        below, above = mm[np.searchsorted(total, [np.floor(place), np.ceil(place)], side="right")]
        return float(below + (above - below) * (place % 1))
    # Weights are whole numbers, so only the product can be off by rounding.
    return float(mm[np.searchsorted(total, total[-1] * (percentile / 100) * (1 - 1e-12))])


def _passes(
    reference: NDArray, prediction: NDArray, structures: Sequence[Sequence[int]], ignore: int | None
) -> Iterator[tuple[list[int], list[int], NDArray[np.uint8], NDArray[np.uint8]]]:
    """Pairs of uint8 maps in which structures are single labels, with the numbers and labels of
    these structures.

    Structures that share a label, or are too many for a byte, go to different pairs.
    """
    if reference.shape != prediction.shape:
        raise BadGeometry(
            f"label maps of {reference.shape} and {prediction.shape} voxels cannot be compared"
        )
    reverse = is_reversed(reference)
    first, second = contiguous(reference, reverse), contiguous(prediction, reverse)
    sets = [frozenset(int(value) for value in structure) for structure in structures]
    if not sets:
        return
    if any(not values or min(values) < 0 or max(values) > 65_535 for values in sets):
        raise BadConfig("a structure is one label or more from 0 to 65535")
    plain = (
        all(len(values) == 1 for values in sets)
        and len(set(sets)) == len(sets)
        and frozenset({0}) not in sets
    )
    if (
        plain
        and ignore is None
        and first.dtype == second.dtype == np.uint8
        and max(first.max(), second.max()) < 255
    ):
        # The maps are as they should be: no copy.
        rows = [row for row, values in enumerate(sets) if max(values) < 255]
        if rows:
            yield rows, [max(sets[row]) for row in rows], first, second
        absent = [row for row, values in enumerate(sets) if max(values) == 255]
        if absent:
            yield absent, [MAX_LABELS], np.zeros_like(first), np.zeros_like(second)
        return
    waiting = list(range(len(sets)))
    while waiting:
        rows, pass_values = [], set[int]()
        for row in waiting:
            if len(rows) < MAX_LABELS and not pass_values & sets[row]:
                rows.append(row)
                pass_values |= sets[row]
        waiting = [row for row in waiting if row not in rows]
        table = np.zeros(65_536, np.uint8)
        for label, row in enumerate(rows, start=1):
            table[list(sets[row])] = label
        maps = [
            look_up(labels, table, np.empty(first.shape, np.uint8)) for labels in (first, second)
        ]
        if ignore is not None:
            for target in maps:
                target[first == ignore] = 0
        yield rows, list(range(1, len(rows) + 1)), maps[0], maps[1]


def _overlap(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Voxels of each of 256 labels in the first map, in the second, in both."""
    from medseg.kernels.components import overlap
    from medseg.kernels.threads import in_slabs

    def count(start: int, stop: int) -> NDArray[np.int64]:
        counts = np.zeros((256, 3), np.int64)
        overlap(first[start:stop], second[start:stop], counts)
        return counts

    return np.sum(in_slabs(count, len(first)), axis=0)


def _both_ways(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    spacing: NDArray,
    values: list[int],
    surface: Surface,
) -> list[SurfaceDistances]:
    """Surface distances of the labels `values` of two uint8 maps."""
    from medseg.kernels.surfaces import border_map, corner_map
    from medseg.kernels.threads import in_slabs

    offsets, length = _offsets(spacing)
    areas = surfel_areas(spacing) if surface == "surfel" else np.zeros(256)[:0]
    weights = (
        np.round(areas * (2.0**31 / areas.max())).astype(np.int64)
        if len(areas)
        else areas.astype(np.int64)
    )
    margin = 1 if surface == "surfel" else 0
    mark = corner_map if surface == "surfel" else border_map
    maps = [np.empty([n + margin for n in first.shape], np.uint8) for _ in range(2)]
    for labels, elements in zip((first, second), maps):
        in_slabs(partial(_mark, mark, labels, elements), len(elements))
    there = _one_way(
        maps[0],
        first,
        others=maps[1],
        other_labels=second,
        spacing=spacing,
        offsets=offsets,
        length=length,
        weights=weights,
        values=values,
    )
    back = _one_way(
        maps[1],
        second,
        others=maps[0],
        other_labels=first,
        spacing=spacing,
        offsets=offsets,
        length=length,
        weights=weights,
        values=values,
    )
    return [SurfaceDistances(one, other, surface) for one, other in zip(there, back)]


def _mark(kernel: Any, labels: NDArray, elements: NDArray, start: int, stop: int) -> None:
    kernel(labels, start, stop, elements)


def _with_neighbours(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What lies in each block or in one of the 26 around it, a bit a label."""
    reach = bits.copy()
    for axis in range(3):
        before, spread = np.moveaxis(reach.copy(), axis, 0), np.moveaxis(reach, axis, 0)
        spread[1:] |= before[:-1]
        spread[:-1] |= before[1:]
    return reach


def _one_way(
    elements: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    others: NDArray[np.uint8],
    other_labels: NDArray[np.uint8],
    spacing: NDArray,
    offsets: NDArray[np.int64],
    length: NDArray,
    weights: NDArray[np.int64],
    values: list[int],
) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """For each label the distances in mm of its elements to those in the other map, rising, and
    their weights.
    """
    from medseg.kernels.surfaces import nearest, nearest_far, presence
    from medseg.kernels.threads import in_slabs, threads

    block = np.maximum(np.abs(offsets).max(axis=0), 1)
    bits = np.zeros((*(-(-n // size) for n, size in zip(others.shape, block)), 4), np.uint64)
    in_slabs(
        lambda start, stop: presence(others, other_labels, block, start, stop, bits), len(bits)
    )
    highest = max(int(labels.max()), *values) + 1
    reach = _with_neighbours(bits)

    def search(start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        histogram = np.zeros((highest, len(offsets)), np.int64)
        far = nearest(
            elements, labels, others, other_labels, reach, block, offsets, weights, start, stop,
            histogram,
        )  # fmt: skip
        return histogram, far

    parts = in_slabs(search, len(elements))
    steps = np.flatnonzero(np.diff(length, prepend=-1) > 1e-9 * length)
    histogram = np.add.reduceat(sum(part for part, _ in parts), steps, axis=1)
    far = np.concatenate([part for _, part in parts])

    def distribution(value: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        rows = far[far[:, 0] == value]
        groups, blocks = _blocks_with(bits, value)
        # One memory layout, so that one version is compiled.
        numbers = np.ascontiguousarray(rows[:, 1])
        distance = nearest_far(
            numbers, np.uint8(value), groups, blocks, block, others, other_labels, spacing
        )
        mm, place = np.unique(distance, return_inverse=True)
        weight = np.zeros(len(mm), np.int64)
        np.add.at(weight, place, rows[:, 2])
        near = histogram[value] > 0
        return np.append(length[steps][near], mm), np.append(histogram[value][near], weight)

    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(distribution, values))


def _blocks_with(
    bits: NDArray[np.uint64], value: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The blocks with a label as `surfaces.nearest_far` takes them: groups (g, 8) of up to 4³, and
    blocks (n, 3).
    """
    blocks = np.argwhere(bits[..., value // 64] & np.uint64(1 << value % 64))
    cell = blocks // 4 @ (1 << np.array([42, 21, 0]))
    order = np.argsort(cell, kind="stable")
    blocks = blocks[order]
    first = np.flatnonzero(np.diff(cell[order], prepend=-1))
    if not len(first):
        return np.zeros((0, 8), np.int64), blocks
    box = np.minimum.reduceat(blocks, first), np.maximum.reduceat(blocks, first) + 1
    return np.column_stack((first, np.append(first[1:], len(blocks)), *box)), blocks


def _offsets(spacing: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The shortest steps between voxels, at most `OFFSETS`, all or none of one length: (n, 3), and
    lengths in mm.
    """
    radius = 1.1 * float(3 * OFFSETS * spacing.prod() / (4 * np.pi)) ** (1 / 3)
    axes = [np.arange(-int(radius / s), int(radius / s) + 1) for s in spacing]
    steps = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    length = np.sqrt(((steps * spacing) ** 2).sum(axis=1))
    order = np.argsort(length, kind="stable")
    order = order[length[order] <= radius]
    if len(order) > OFFSETS:
        order = order[length[order] < length[order[OFFSETS]] * (1 - 1e-9)]
    return steps[order].astype(np.int64), length[order]


#: Marching-cubes patches by which of 8 voxels are inside, up to rotation, mirroring and exchange of
#: inside and outside: voxels inside as digits 4 i + 2 j + k; how many triangles that cut off a
#: corner; quarters of a diagonal plane along i, j, k; and halves of a square across i, j, k. The
#: triangulation is that of Nikolov et al. 2018 (surface-distance).
PATCHES: tuple[tuple[str, int, tuple[int, int, int], tuple[int, int, int]], ...] = (
    ("7", 1, (0, 0, 0), (0, 0, 0)),
    ("67", 0, (0, 0, 2), (0, 0, 0)),
    ("56", 2, (0, 0, 0), (0, 0, 0)),
    ("567", 3, (0, 0, 0), (1, 0, 0)),
    ("4567", 0, (0, 0, 0), (2, 0, 0)),
    ("356", 3, (0, 0, 0), (0, 0, 0)),
    ("3567", 6, (0, 0, 0), (0, 0, 0)),
    ("34", 2, (0, 0, 0), (0, 0, 0)),
    ("347", 1, (2, 0, 0), (0, 0, 0)),
    ("3467", 4, (1, 1, 0), (0, 0, 0)),
    ("3456", 4, (0, 0, 0), (1, 0, 0)),
    ("2345", 0, (0, 0, 4), (0, 0, 0)),
    ("1247", 4, (0, 0, 0), (0, 0, 0)),
)


def surfel_areas(spacing_mm: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Area in mm2 of the surface at a corner, by which of its 8 voxels are inside (bit 4 i + 2 j +
    k): (256,).

    Sums of triangles with corners half-way between voxels; 0 for none or all inside.
    """
    x, y, z = (float(s) for s in spacing_mm)
    across = np.array([y * z, x * z, x * y])
    corner = np.sqrt((across**2).sum()) / 8
    along = np.sqrt((across**2).sum() - across**2) / 4
    areas = np.zeros(256)
    for inside, corners, pieces, halves in PATCHES:
        cube = np.zeros(8, bool)
        cube[[int(digit) for digit in inside]] = True
        for axes in permutations(range(3)):
            block = cube.reshape(2, 2, 2).transpose(axes)
            area = (
                corners * corner
                + along @ np.take(pieces, axes)
                + across @ np.take(halves, axes) / 2
            )
            for flips in product((1, -1), repeat=3):
                bits = block[:: flips[0], :: flips[1], :: flips[2]].ravel()
                code = int(bits @ (1 << np.arange(8)))
                areas[code] = areas[255 - code] = area
    return areas
