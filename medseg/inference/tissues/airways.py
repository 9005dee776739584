"""The trachea and what follows it: round, dark, in the middle, one slice over the other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.inference.tissues.grid import Mask, parts_in_slices
from medseg.inference.tissues.windows import AIR_BELOW

#: A trachea's section in mm2, of infants and of adults (Breatnach et al. 1984, AJR 142:903: 10 to
#: 27 mm wide), how much longer than wide, and what part of its box it fills.
SECTION_MM2, ELONGATION, FILLING = (12.0, 700.0), 2.2, 0.55
#: It is followed over at least so many mm, and lies within so many of the middle.
LONG_MM, ASIDE_MM = 20.0, 45.0
#: A bronchus, or both where they part, has at most this section, and from slice to slice it grows
#: at most so much; more is a leak into the lung.
LARGEST_MM2, GROWTH, GROWTH_MM2 = 900.0, 1.8, 60.0
#: Bronchi are followed so far below the place where they part.
BELOW_CARINA_MM = 50.0
#: What is brighter than this is wall, or mixed with it.
AIR_IN_LUMEN = -800
#: The lumen is darker than this; lungs are brighter.
DARKEST, BRIGHTEST = -950, -880


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where to look: the scan's voxels (R, A, S), a cut-out of them, and the middle in its slices.

    hu: (R, A, S) int16, any strides. box: the cut-out. middle: (2,) voxels along R and A within it.
    inside: (R, A, S) of the cut-out, where there may be airways.
    """

    hu: NDArray[np.int16]
    box: tuple[slice, slice, slice]
    spacing_mm: NDArray[np.float64]
    inside: Mask
    middle: tuple[float, float]


def lumen_below(lung_hu: float | None) -> float:
    """The value between the lumen of an airway and the lung around it."""
    if lung_hu is None:
        return -900.0
    return float(np.clip((lung_hu - 1000) / 2, DARKEST, BRIGHTEST))


def find_airways(window: Window, below: float, bottom: int | None) -> Mask | None:
    """The lumen of trachea and main bronchi in the window's cut-out; None if there is no trachea.

    bottom: the slice that a trachea must come down to, where the lungs are known.
    """
    hu = _smooth(window.hu[window.box])
    dark = (hu < below) & window.inside
    numbers, count = parts_in_slices(dark)
    if not count:
        return None
    sections = _sections(numbers, count, window)
    links = _links(numbers)
    round_ones = sections.is_trachea(window)
    chain = _longest(
        links, round_ones, sections.slice_of, spacing_mm=window.spacing_mm[2], bottom=bottom
    )
    if not chain:
        return None
    keep = np.zeros(count + 1, bool)
    keep[chain] = True
    keep[_branches(links, chain, sections, spacing_mm=window.spacing_mm[2])] = True
    return _to_the_wall(keep[numbers], window)


def _smooth(hu: NDArray[np.int16]) -> NDArray[np.float32]:
    """Of air the mean of the air among 3x3 voxels of its slice: less noise, no wall mixed in."""
    from scipy import ndimage

    air = hu < AIR_IN_LUMEN
    share = ndimage.uniform_filter(air.astype(np.float32), (3, 3, 1))
    sums = ndimage.uniform_filter(np.where(air, hu, 0).astype(np.float32), (3, 3, 1))
    mean: NDArray[np.float32] = np.where(air, sums / np.maximum(share, 1e-3), 0)
    return mean


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """Of every part of every slice, from 1: its slice, its section in mm2, its box, its middle."""

    slice_of: NDArray[np.int64]
    mm2: NDArray[np.float64]
    sides_mm: NDArray[np.float64]
    middle: NDArray[np.float64]

    def is_trachea(self, window: Window) -> Mask:
        """Which can be the section of a trachea."""
        filling = self.mm2 / np.maximum(self.sides_mm.prod(1), 1e-9)
        elongation = self.sides_mm.max(1) / np.maximum(self.sides_mm.min(1), 1e-9)
        aside = np.abs(self.middle[:, 0] - window.middle[0]) * window.spacing_mm[0]
        result: Mask = (self.mm2 >= SECTION_MM2[0]) & (self.mm2 <= SECTION_MM2[1])
        result &= (filling >= FILLING) & (elongation <= ELONGATION) & (aside <= ASIDE_MM)
        result[0] = False
        return result


def _sections(numbers: NDArray[np.int32], count: int, window: Window) -> _Sections:
    from scipy import ndimage

    size = np.bincount(numbers.ravel(), minlength=count + 1)
    slice_of = np.zeros(count + 1, np.int64)
    sides, middle = np.zeros((count + 1, 2)), np.zeros((count + 1, 2))
    for n, box in enumerate(ndimage.find_objects(numbers), 1):
        slice_of[n] = box[2].start
        for axis in (0, 1):
            sides[n, axis] = box[axis].stop - box[axis].start
            middle[n, axis] = (box[axis].stop + box[axis].start - 1) / 2
    flat_mm = window.spacing_mm[:2]
    return _Sections(
        slice_of=slice_of, mm2=size * flat_mm.prod(), sides_mm=sides * flat_mm, middle=middle
    )


def _links(numbers: NDArray[np.int32]) -> dict[int, set[int]]:
    """Of every part those of the next lower slice that it lies over."""
    upper, lower = numbers[:, :, 1:].ravel(), numbers[:, :, :-1].ravel()
    both = (upper != 0) & (lower != 0)
    pairs = np.unique(np.stack([upper[both], lower[both]]), axis=1)
    links: dict[int, set[int]] = defaultdict(set)
    for one, other in pairs.T.tolist():
        links[one].add(other)
    return links


def _longest(
    links: dict[int, set[int]],
    good: Mask,
    slice_of: NDArray[np.int64],
    spacing_mm: float,
    bottom: int | None,
) -> list[int]:
    """The longest chain of good parts, from the top down; empty if it is too short.

    bottom: the slice that it must come down to. A throat above a shut glottis may be the longer.
    """
    length: dict[int, int] = {}
    following: dict[int, int] = {}
    lowest: dict[int, int] = {}
    for n in sorted(np.flatnonzero(good).tolist(), key=lambda n: int(slice_of[n])):
        below = [one for one in links.get(n, ()) if good[one]]
        best = max(below, key=lambda one: length[one], default=0)
        length[n] = 1 + (length[best] if best else 0)
        lowest[n] = lowest[best] if best else int(slice_of[n])
        following[n] = best
    reaching = [n for n, low in lowest.items() if bottom is None or low <= bottom]
    if not reaching:
        return []
    now = max(reaching, key=lambda n: length[n])
    if length[now] * spacing_mm < LONG_MM:
        return []
    chain = []
    while now:
        chain.append(now)
        now = following[now]
    return chain


def _branches(
    links: dict[int, set[int]], chain: list[int], sections: _Sections, spacing_mm: float
) -> list[int]:
    """What follows the trachea downwards until it leaks into the lung or is far enough."""
    branches: list[int] = []
    front = [chain[-1]]
    usual = float(np.median(sections.mm2[chain]))
    largest = min(LARGEST_MM2, 3 * usual)
    for _ in range(round(BELOW_CARINA_MM / spacing_mm)):
        below: dict[int, float] = {}
        for n in front:
            for one in links.get(n, ()):
                below[one] = max(below.get(one, 0.0), float(sections.mm2[n]))
        front = [
            one
            for one, above in below.items()
            if sections.mm2[one] <= min(largest, GROWTH * above + GROWTH_MM2)
        ]
        branches += front
        if not front:
            break
    return branches


def _to_the_wall(lumen: Mask, window: Window) -> Mask:
    """The lumen with the voxels that it shares with its wall."""
    from scipy import ndimage

    steps = max(1, round(1.0 / float(window.spacing_mm[:2].min())))
    cross = ndimage.generate_binary_structure(3, 1)
    cross[1, 1, [0, 2]] = False
    air = window.hu[window.box] < AIR_BELOW
    mask: Mask = ndimage.binary_dilation(lumen, cross, iterations=steps, mask=air | lumen)
    return mask
