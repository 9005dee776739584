"""A CT in blocks of about 3 mm along RAS, on which it is decided what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medseg.inference.tissues.windows import CLIP
from medseg.kernels import tissues as kernels
from medseg.kernels.threads import in_slabs
from medseg.volume import Volume, reorient

#: Blocks are at most so large, in mm, unless voxels are.
BLOCK_MM = 3.0

Mask = NDArray[np.bool_]
Labels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A CT in Hounsfield units as memory holds it, and its blocks.

    hu: (A, B, C) int16, C-contiguous, with its place in space; the scan's own axes, or those
    reversed. factors: voxels of a block along them. blocks: means of blocks, along RAS.
    """

    hu: Volume
    is_reversed: bool
    factors: NDArray[np.int64]
    blocks: Volume

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Of the blocks, along R, A and S."""
        return np.array(self.blocks.spacing_mm)

    def in_memory_order(self, regions: NDArray) -> NDArray:
        """An array of the blocks (R, A, S) along the axes of `hu`."""
        volume = Volume(regions, self.blocks.affine)
        return np.ascontiguousarray(reorient(volume, self.hu.orientation).data)


def _affine_of(volume: Volume, factors: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of blocks that begin at the first voxel."""
    step = np.diag([*factors.astype(float), 1.0])
    step[:3, 3] = (factors - 1) / 2
    affine: NDArray[np.float64] = volume.affine @ step
    return affine


def scan_of(volume: Volume) -> Scan:
    """A CT, ready to be labelled. What is not finite counts as air."""
    is_reversed = bool(volume.data.flags.f_contiguous and not volume.data.flags.c_contiguous)
    data, affine = volume.data, volume.affine
    if is_reversed:
        data, affine = data.T, affine[:, [2, 1, 0, 3]]
    hu = Volume(_hounsfield(data), affine)
    factors = np.maximum(1, np.floor(BLOCK_MM / np.array(hu.spacing_mm) + 1e-6)).astype(np.int64)
    factors = np.minimum(factors, hu.shape)
    shape = [-(-n // int(f)) for n, f in zip(hu.shape, factors, strict=True)]
    means = np.empty(shape, np.int16)
    in_slabs(
        lambda start, stop: kernels.block_means(
            hu.data, factors, CLIP[0], CLIP[1], means, start, stop
        ),
        len(means),
    )
    blocks = reorient(Volume(means, _affine_of(hu, factors)))
    blocks = blocks.with_data(np.ascontiguousarray(blocks.data))
    return Scan(hu=hu, is_reversed=is_reversed, factors=factors, blocks=blocks)


def _hounsfield(data: NDArray) -> NDArray[np.int16]:
    """The values rounded to int16; itself where it is that already."""
    if data.dtype == np.int16 and data.dtype.isnative and data.flags.c_contiguous:
        return data
    hu = np.empty(data.shape, np.int16)
    for source, target in zip(data, hu, strict=True):
        if data.dtype.kind == "f":
            source = np.nan_to_num(source, nan=CLIP[0], posinf=32767, neginf=-32768).round()
        target[...] = np.clip(source, -32768, 32767)
    return hu


def distances_mm(
    target: Mask, spacing_mm: NDArray[np.float64], *, in_slices: bool = False
) -> NDArray[np.float32]:
    """From every block to the nearest of `target` (R, A, S); within axial slices with `in_slices`.

    Where there is none, a million. Beyond the array nothing is known, and nothing is a target.
    """
    slices = np.ascontiguousarray(target.transpose(2, 0, 1))  # slices first
    spacing = np.asarray(spacing_mm, np.float64)[[2, 0, 1]]
    out = np.empty(slices.shape, np.float32)
    in_slabs(
        lambda start, stop: kernels.distances_in_rows(slices, spacing, out, start, stop),
        len(slices),
    )
    if not in_slices:
        in_slabs(
            lambda start, stop: kernels.distances_across(out, float(spacing[0]), start, stop),
            slices.shape[1],
        )
    np.sqrt(out, out=out)
    return out.transpose(1, 2, 0)


def closed(mask: Mask, spacing_mm: NDArray[np.float64], mm: float, *, in_slices: bool) -> Mask:
    """Morphological closing by a ball, or by a disc in each axial slice."""
    dilation = distances_mm(mask, spacing_mm, in_slices=in_slices) <= mm
    closing: Mask = distances_mm(~dilation, spacing_mm, in_slices=in_slices) > mm
    return closing | mask


def spread(labels: Labels, allowed: Mask, steps: int) -> Labels:
    """Labels (R, A, S) grown through `allowed`, block by block, so many times at most."""
    now, allowed = np.ascontiguousarray(labels), np.ascontiguousarray(allowed)
    for _ in range(steps):
        after = np.empty_like(now)
        step = partial(kernels.spread_once, now, allowed, after)
        counts = in_slabs(step, len(now))
        now = after
        if not sum(counts):
            break
    return now


def parts_in_slices(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Face-connected parts of every axial slice on its own, numbered from 1 through all slices."""
    from scipy import ndimage

    structure = np.zeros((3, 3, 3), bool)
    structure[:, 1, 1] = structure[1, :, 1] = True
    numbers = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, structure, numbers)
    return numbers, int(count)


def parts(mask: Mask) -> tuple[NDArray, int]:
    """Face-connected parts of the whole, numbered from 1."""
    import cc3d

    numbers, count = cc3d.connected_components(
        np.ascontiguousarray(mask), connectivity=6, return_N=True
    )
    return numbers, int(count)


def on_sides(numbers: NDArray) -> NDArray:
    """The different values on the lateral faces of (R, A, S), which an axial slice ends in."""
    faces = (numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1])
    return np.unique(np.concatenate([np.unique(face) for face in faces]))
