"""A CT to its label map, in one pass over blocks and one over voxels."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, DataWarning
from medseg.inference.tissues.air import Air, find_air
from medseg.inference.tissues.body import find_body
from medseg.inference.tissues.grid import Labels, Scan, scan_of, spread
from medseg.inference.tissues.solid import Solid, find_solid
from medseg.inference.tissues.windows import (
    AIR_BELOW,
    AIRWAYS,
    BONE,
    BONE_FROM,
    EMPTY_BELOW,
    FAT,
    GAS,
    LUNGS,
    METAL,
    METAL_FROM,
    MUSCLE,
    SOFT_TISSUE,
)
from medseg.kernels import tissues as kernels
from medseg.kernels.threads import in_slabs
from medseg.volume import Volume, reorient

#: A scan of whose values so many are those of dense bone is none in Hounsfield units, if air is not
#: lower than so much below 0.
_MUCH, _NEAR_ZERO = 0.2, 150
#: Marks air around the patient while labels grow; no label.
_AROUND = 255


def ct_tissues(volume: Volume) -> Volume:
    """Labels (`windows.TISSUES`) of a CT in Hounsfield units, on its own grid.

    Raises `BadFile` for a scan that cannot be in Hounsfield units.
    """
    check_hounsfield(volume)
    scan = scan_of(volume)
    spacing_mm = scan.spacing_mm
    body = find_body(scan.blocks.data, spacing_mm)
    air = find_air(scan, body)
    solid = find_solid(scan.blocks.data, body, air, spacing_mm=spacing_mm)
    outside = ~body.whole & (scan.blocks.data < AIR_BELOW)
    labels = _painted(scan, _grown(air.labels, outside), air, solid, body.whole)
    _lay_airways(labels, scan, air)
    return volume.with_data(labels.T if scan.is_reversed else labels)


def check_hounsfield(volume: Volume) -> None:
    """Raise `BadFile` for values that cannot be Hounsfield units; warn where it is not sure."""
    thin = volume.data[tuple(slice(None, None, max(1, n // 96)) for n in volume.shape)]
    lowest = float(np.nanmin(thin)) if thin.size else 0.0
    inside = thin[thin > lowest]  # padding is one value, and the lowest
    if lowest <= EMPTY_BELOW and inside.size and _has_an_offset(inside):
        raise BadFile(
            f"beside {lowest:.4g}, which is padding, hardly any value is below"
            f" {-_NEAR_ZERO}, and CT in Hounsfield units has air near -1000; it seems to be stored"
            " with an offset: take that off first"
        )
    if lowest >= 0:
        raise BadFile(
            f"no value is below 0 (the lowest is {lowest:.4g}), and CT in Hounsfield units has air"
            " near -1000 and fat near -100; if it is stored with an offset, take that off first"
        )
    if lowest > AIR_BELOW:
        warnings.warn(
            f"the lowest value is {lowest:.0f}, so that there is no air in the scan: is it a piece"
            " of CT in Hounsfield units?",
            DataWarning,
            stacklevel=3,
        )


def _has_an_offset(values: NDArray) -> bool:
    """Whether air lies near 0, and tissue where only dense bone has its values."""
    few = 0.01
    low, high = np.mean(values < -_NEAR_ZERO), np.mean((values > 700) & (values < 1600))
    return bool(low < few and high > _MUCH)


def _grown(air: Labels, outside: NDArray[np.bool_]) -> Labels:
    """What air in a block that is mostly tissue belongs to: lung first, for it has most surface."""
    anywhere = np.ones(air.shape, bool)
    lungs = spread(np.where(np.isin(air, LUNGS), air, 0).astype(np.uint8), anywhere, 2)
    names = np.where(air != 0, air, np.where(outside, _AROUND, lungs)).astype(np.uint8)
    return spread(names, anywhere, 2)


def _painted(scan: Scan, names: Labels, air: Air, solid: Solid, whole: NDArray[np.bool_]) -> Labels:
    """Labels of every voxel, in the order of memory. names: what air is called."""
    names[(names == 0) & whole] = GAS  # pockets smaller than a block
    names[names == _AROUND] = 0
    regions = np.stack([names, solid.fat, solid.lean, solid.bone, air.filled], -1)
    blocks = np.stack([scan.in_memory_order(regions[..., n]) for n in range(5)], -1)
    windows = (AIR_BELOW, *FAT, MUSCLE[1], BONE_FROM, METAL_FROM)
    values = (np.uint8(BONE), np.uint8(METAL), np.uint8(SOFT_TISSUE))
    labels = np.empty(scan.hu.shape, np.uint8)
    in_slabs(
        lambda start, stop: kernels.paint(
            scan.hu.data, scan.factors, blocks, windows, values, labels, start, stop
        ),
        len(labels),
    )
    return labels


def _lay_airways(labels: Labels, scan: Scan, air: Air) -> None:
    """Write the lumen, which was found on voxels, over what its blocks were called."""
    if air.airways is None or air.box is None:
        return
    canonical = reorient(Volume(labels, scan.hu.affine)).data  # a view
    part = canonical[air.box]
    part[air.airways & (part != 0)] = AIRWAYS
