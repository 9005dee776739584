"""Cleaning up a label map: keep the largest parts, drop specks, fill holes; all labels in one
multi-label pass.

A component is a maximal set of voxels of one label connected over faces (connectivity 6), edges
(18) or corners (26). Components are found for all labels at once (cc3d, Silversmith 2021), measured
in one pass and chosen by a look-up, so the cost does not grow with the number of labels. Each
function returns a new array of the same dtype, voxel-equal to the loop over labels that its
docstring states. Label 0 is background and never a component.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig
from medseg.postprocess.components import contiguous, find, like, only, ranks
from medseg.volume import Volume


def keep_largest(
    labels: NDArray,
    values: Sequence[int] | None = None,
    *,
    count: int = 1,
    connectivity: int = 26,
    together: bool = False,
) -> NDArray:
    """The `count` largest components of each label (of `values`, or of all); the other components
    become background.

    With `together` the labels count as one: what is not in the largest components of their union
    becomes background.

    Of equally large components the one whose first voxel in (i, j, k) order comes first is kept.
    Equal to: for each label, label the mask, keep the largest components. Raises `BadConfig` for
    labels that are not integers, a count below 1, or a connectivity other than 6, 18, 26.
    """
    if not (_is_whole(count) and count >= 1):
        raise BadConfig(f"keep_largest keeps 1 component or more, not {count}")
    if together:
        union = labels != 0 if values is None else np.isin(labels, values)
        components = keep_largest(union.view(np.uint8), count=count, connectivity=connectivity)
        return np.where(union & (components == 0), labels.dtype.type(0), labels)
    ids, table, order = find(labels, connectivity)
    keep = np.ones(len(table), bool)
    keep[order] = ranks(table[order, 0]) < count
    return only(labels, ids, table=table, keep=keep, values=values)


def keep_largest_together(labels: Volume, values: Sequence[int]) -> Volume:
    """Of the union of some labels the largest component (26 neighbours) stays, of equally large
    ones all.

    As nnU-Net's `remove_all_but_largest_component_from_segmentation`; `keep_largest` keeps one of
    equal ones.
    """
    union = np.isin(labels.data, [value for value in values if value])
    if not union.any():
        return labels
    mask = union.view(np.uint8)
    ids, table, _ = find(mask, 26)
    largest = table[:, 1] == table[table[:, 0] > 0, 1].max()
    components = only(mask, ids, table=table, keep=largest, values=None)
    return labels.with_data(
        np.where(union & (components == 0), labels.data.dtype.type(0), labels.data)
    )


def drop_small(
    labels: NDArray,
    min_mm3: float,
    voxel_mm3: float,
    values: Sequence[int] | None = None,
    connectivity: int = 26,
) -> NDArray:
    """Components smaller than `min_mm3` become background; one of exactly that volume stays.

    voxel_mm3: volume of one voxel. Equal to: for each label, label the mask, remove the small
    components. Raises `BadConfig` for labels that are not integers, volumes that are not positive
    numbers, or a connectivity other than 6, 18, 26.
    """
    if not (_is_number(min_mm3) and min_mm3 >= 0 and _is_number(voxel_mm3) and voxel_mm3 > 0):
        raise BadConfig(f"drop_small needs volumes in mm3, not {min_mm3} and {voxel_mm3} per voxel")
    ids, table, _ = find(labels, connectivity)
    # A float32 header makes 0.001 mm3 of 50 mm3; a component of exactly the limit must not fall to
    # that.
    keep = table[:, 1] * voxel_mm3 >= min_mm3 * (1 - 1e-6)
    return only(labels, ids, table=table, keep=keep, values=values)


def fill_holes(
    labels: NDArray, values: Sequence[int] | None = None, overwrite: bool = False
) -> NDArray:
    """Background enclosed by one label takes that label; other labels inside stay as they are.

    A hole is background from which no path over voxel faces leads out of the array without crossing
    the label. Equal to: for each label, `scipy.ndimage.binary_fill_holes(labels == label) & (labels
    == 0)`; a hole enclosed by several labels, one inside the other, takes the innermost (the one
    that leaves it the least room; then the smaller value). With `overwrite` enclosed labels are
    replaced too, label after label in rising order, as in `labels[binary_fill_holes(labels ==
    label)] = label`. Raises `BadConfig` for labels that are not integers.
    """
    from medseg.kernels.components import regions_of_runs, rooms_within, runs_of, write_runs
    from medseg.kernels.threads import in_slabs

    array = contiguous(labels)
    parts = in_slabs(lambda start, stop: runs_of(array[start:stop]), len(array))
    first, value, rows = (np.concatenate(pieces) for pieces in zip(*parts))
    begin = np.append(0, np.cumsum(rows))
    region, table, pairs = regions_of_runs(
        first, value, begin, height=array.shape[1], width=array.shape[2]
    )
    low = (pairs >> np.uint64(32)).astype(np.int64)
    high = (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    old, voxels, outside = table.T.copy()
    new, least = old.copy(), np.full(len(old), np.iinfo(np.int64).max)
    for label in np.unique(old[1:]):
        if label == 0 or (values is not None and label not in values):
            continue
        room = rooms_within(
            low,
            high,
            label=new if overwrite else old,
            voxels=voxels,
            outside=outside,
            wall=label,
        )
        holes = (room > 0) & (overwrite | ((old == 0) & (room < least)))
        new[holes], least[holes] = label, room[holes]
    out = np.array(array, labels.dtype)
    write_runs(
        first,
        begin,
        target=new.astype(labels.dtype)[region],
        value=value,
        out=out.reshape(-1, array.shape[2]),
    )
    return like(out, labels)


#: The steps that `clean` knows and the types of their arguments; `min_mm3` is the only one without
#: a default.
STEPS: dict[str, dict[str, type]] = {
    "keep_largest": {"labels": list, "count": int, "connectivity": int, "together": bool},
    "drop_small": {"min_mm3": float, "labels": list, "connectivity": int},
    "fill_holes": {"labels": list, "overwrite": bool},
}


def steps_of(
    *,
    count: int | None = None,
    min_mm3: float | None = None,
    fill: bool = False,
    overwrite: bool = False,
    connectivity: int = 26,
) -> list[dict[str, Any]]:
    """Steps for `clean`, in the order in which they make sense: the `count` largest parts, what is
    smaller than `min_mm3` dropped, holes filled. Empty where nothing is to be done.
    """
    steps: list[dict[str, Any]] = []
    if count:
        steps.append({"step": "keep_largest", "count": count, "connectivity": connectivity})
    if min_mm3 is not None:
        steps.append({"step": "drop_small", "min_mm3": min_mm3, "connectivity": connectivity})
    if fill:
        steps.append({"step": "fill_holes", "overwrite": overwrite})
    return steps


def check_steps(steps: Sequence[dict[str, Any]]) -> None:
    """Raise `BadConfig` unless `steps` is a list of known steps with known arguments of the right
    type.
    """
    if not isinstance(steps, list | tuple):
        raise BadConfig(f"cleanup is a list of steps, not {steps!r}")
    for step in steps:
        name = step.get("step") if isinstance(step, dict) else None
        if not isinstance(name, str) or name not in STEPS:
            raise BadConfig(f"{step!r} is not a cleanup step; the steps are {', '.join(STEPS)}")
        for argument, value in step.items():
            if argument != "step":
                _check_argument(name, argument, value)
        if name == "drop_small" and "min_mm3" not in step:
            raise BadConfig("drop_small needs min_mm3")


def _check_argument(step: str, argument: str, value: object) -> None:
    """Raise `BadConfig` for an argument that a step does not have, and for a value of another
    type.
    """
    if argument not in STEPS[step]:
        raise BadConfig(f"{step} has no argument '{argument}'; it takes {', '.join(STEPS[step])}")
    if not _FITS[STEPS[step][argument]](value):
        raise BadConfig(f"{step}: {argument} cannot be {value!r}")


def clean(labels: Volume, steps: Sequence[dict[str, Any]]) -> Volume:
    """The label map after `steps`, in order, each a plain dict as in a model's JSON.

    For example [{"step": "keep_largest", "labels": [17, 53]}, {"step": "drop_small", "min_mm3":
    50}, {"step": "fill_holes"}]; without "labels" a step concerns every label. Raises `BadConfig`
    as `check_steps` does.
    """
    check_steps(steps)
    data = labels.data
    for step in steps:
        arguments = {name: value for name, value in step.items() if name not in ("step", "labels")}
        if step["step"] == "keep_largest":
            data = keep_largest(data, step.get("labels"), **arguments)
        elif step["step"] == "drop_small":
            data = drop_small(
                data, voxel_mm3=labels.voxel_mm3, values=step.get("labels"), **arguments
            )
        else:
            data = fill_holes(data, step.get("labels"), **arguments)
    return labels.with_data(data)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _are_whole(values: object) -> bool:
    return isinstance(values, list | tuple) and all(_is_whole(value) for value in values)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float | np.number)
        and not isinstance(value, bool)
        and bool(np.isfinite(value))
    )


#: Type of an argument to whether a value fits it; a JSON's true is no number here.
_FITS: dict[type, Callable[[object], bool]] = {
    list: _are_whole,
    int: _is_whole,
    float: _is_number,
    bool: lambda value: isinstance(value, bool),
}
