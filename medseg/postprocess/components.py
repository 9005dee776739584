"""Connected parts of label maps, in runs and tables: numbered, measured, chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig


def contiguous(labels: NDArray, reverse: bool | None = None) -> NDArray:
    """The labels as a C-contiguous uint8 or uint16 array, axes reversed if asked or, by default, if
    that is no copy.

    Raises `BadConfig` for anything but three dimensions of whole numbers from 0 to 65535.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise BadConfig(
            f"a label map has 3 dimensions and whole numbers, not {labels.ndim} and {labels.dtype}"
        )
    if labels.size == 0:
        raise BadConfig("a label map has voxels; this one is empty")
    array = labels.T if (is_reversed(labels) if reverse is None else reverse) else labels
    if array.dtype not in (np.uint8, np.uint16):
        if not 0 <= int(array.min()) <= int(array.max()) <= 65_535:
            raise BadConfig(f"labels are 0 to 65535, not {array.min()} to {array.max()}")
        array = array.astype(np.uint16)
    return np.ascontiguousarray(array)


def is_reversed(labels: NDArray) -> bool:
    """Whether the last axis is the slow one in memory, as in arrays from nibabel."""
    return labels.flags.f_contiguous and not labels.flags.c_contiguous


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """The connected components 1..n of a label map; row n - 1 of each array is component n.

    Ordered by label, then from large to small; of equally large ones the one whose first voxel
    comes first. label, voxels: (n,). start, stop: (n, 3) bounding box as in data[start:stop]. rank:
    (n,) place within its label.
    """

    label: NDArray[np.int64]
    voxels: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    rank: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label)


def connected_components(labels: NDArray, connectivity: int = 26) -> tuple[NDArray, Components]:
    """Every connected component of every label: the map of component numbers (0 is background) and
    their table.

    labels: (I, J, K) integers. Numbers do not depend on how the array lies in memory.
    Raises `BadConfig` for labels that are not integers or another connectivity than 6, 18, 26.
    """
    ids, table, order = find(labels, connectivity)
    number = np.zeros(len(table), ids.dtype)
    number[order] = np.arange(1, len(order) + 1)
    rows = table[order]
    parts = Components(
        label=rows[:, 0],
        voxels=rows[:, 1],
        start=rows[:, 3:6],
        stop=rows[:, 6:9],
        rank=ranks(rows[:, 0]),
    )
    return like(look_up(ids, number, ids), labels), parts


def like(array: NDArray, labels: NDArray) -> NDArray:
    """`array`, computed on `contiguous(labels)`, with the axes of `labels`."""
    return array.T if is_reversed(labels) else array


def look_up(ids: NDArray, table: NDArray, out: NDArray) -> NDArray:
    """out = table[ids], on all threads; `out` may be `ids`."""
    from medseg.kernels import components as components_module
    from medseg.kernels.threads import in_slabs

    in_slabs(
        lambda start, stop: components_module.look_up(ids[start:stop], table, out[start:stop]),
        len(ids),
    )
    return out


def _table(ids: NDArray, array: NDArray, *, count: int, reverse: bool) -> NDArray[np.int64]:
    """`kernels.components.component_table` of a whole array, in the axes of the given labels."""
    from medseg.kernels.components import component_table
    from medseg.kernels.threads import in_slabs

    steps = np.array([array.shape[1] * array.shape[2], array.shape[2], 1])
    if reverse:
        steps = np.array([1, array.shape[0], array.shape[0] * array.shape[1]])
    # A table per slab is only worth it while tables are small beside the array.
    slabs_per_thread = 2 if count < 100_000 else 0

    def table_of(start: int, stop: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = component_table(
            ids[start:stop], array[start:stop], count=count, offset=start, steps=steps
        )
        return rows

    parts = in_slabs(table_of, len(ids), slabs_per_thread)
    table = parts[0]
    for part in parts[1:]:
        np.maximum(table[:, 0], part[:, 0], out=table[:, 0])
        table[:, 1] += part[:, 1]
        np.minimum(table[:, 2:6], part[:, 2:6], out=table[:, 2:6])
        np.maximum(table[:, 6:9], part[:, 6:9], out=table[:, 6:9])
    if reverse:
        table[:, 3:6], table[:, 6:9] = table[:, 5:2:-1].copy(), table[:, 8:5:-1].copy()
    return table


def find(
    labels: NDArray, connectivity: int
) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]:
    """Component numbers as cc3d gives them, their table, and the numbers in the order that
    `Components` has.
    """
    import cc3d

    if connectivity not in (6, 18, 26):
        raise BadConfig(f"connectivity is 6, 18 or 26, not {connectivity}")
    array = contiguous(labels)
    ids, count = cc3d.connected_components(array, connectivity=connectivity, return_N=True)
    table = _table(ids, array, count=count, reverse=is_reversed(labels))
    return ids, table, 1 + np.lexsort((table[1:, 2], -table[1:, 1], table[1:, 0]))


def ranks(label: NDArray) -> NDArray[np.int64]:
    """Place of each entry within the run of equal entries it stands in."""
    first = np.searchsorted(label, label, side="left")
    return np.arange(len(label)) - first


def only(
    labels: NDArray,
    ids: NDArray,
    *,
    table: NDArray,
    keep: NDArray,
    values: Sequence[int] | None,
) -> NDArray:
    """The labels without the components that are not kept and whose label is in `values` (or
    any).
    """
    if values is not None:
        keep = keep | ~np.isin(table[:, 0], list(values))
    target = np.where(keep, table[:, 0], 0).astype(labels.dtype)
    return like(look_up(ids, target, np.empty(ids.shape, labels.dtype)), labels)
