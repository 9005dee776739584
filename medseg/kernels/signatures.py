"""The types of arrays and numbers that `medseg infer`, `evaluate`, `train`, `view` and `export`
give to each kernel that they call.

A line is a call: `int64`, `float32`; `uint8[3]`, an array of three axes, the last one densest;
`(int64 float64)`, a tuple. `medseg.kernels.build` compiles them ahead; for what is not listed a
kernel is compiled at its first call.
"""

from __future__ import annotations

import re
from typing import Any

#: A map as `kernels.winograd.convolve_unit` takes it.
_MAP = "(float32[1] int64 float32[1] float32[1] float64)"
#: Module and name of each kernel, and its calls.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "components.component_table": (
        "uint16[3] uint8[3] int64 int64 int64[1]",
        "uint16[3] uint16[3] int64 int64 int64[1]",
        "uint32[3] uint8[3] int64 int64 int64[1]",
    ),
    "components.look_up": (
        "uint16[3] uint16[1] uint16[3]",
        "uint16[3] uint8[1] uint8[3]",
        "uint32[3] uint8[1] uint8[3]",
    ),
    "components.overlap": ("uint8[3] uint8[3] int64[2]",),
    "components.regions_of_runs": ("int32[1] uint8[1] int64[1] int64 int64",),
    "components.rooms_within": ("int64[1] int64[1] int64[1] int64[1] int64[1] int64",),
    "components.runs_of": ("uint8[3]",),
    "components.write_runs": ("int32[1] int64[1] uint8[1] uint8[1] uint8[2]",),
    "depthwise.correlate": ("float32[1] float32[1] int64[1] float64[1]",),
    "interpolation.apply_operators": (
        "float32[3] int64[1] float32[2] int64[1] float32[2] int64[1] float32[2] float32[3]",
    ),
    "interpolation.linear_points": (
        "float32[3] float64[2] int64[1] float32 int64 int64 float32[3]",
        "int16[3] float64[2] int64[1] float32 int64 int64 float32[3]",
        "uint16[3] float64[2] int64[1] float32 int64 int64 float32[3]",
    ),
    "interpolation.linear_patch": (
        "float32[4] int8[3] float64[2] float32[4] float32[1] int64 int64 float32[4] int8[3]",
    ),
    "interpolation.multiply_rows": ("int64 int64 float32[2] float32[2] float32[2]",),
    "nets.count_net": ("uint16[3]",),
    "nets.fill_net": ("uint16[3] int32[2] int32[2] float32[2] int32[2] uint16[2]",),
    "nets.measure": ("float32[2] int32[2] uint16[2] float64[1] float64[1]",),
    "nets.push": ("float32[2] int32[2] uint16[2] float64[1] float64[2]",),
    "nets.relax": ("float32[2] int32[2] int32[2] float32[2] float32 float32[2] int64 int64",),
    "norms.measure_voxels": (
        "float32[1] int64 int64 int64 float64[1]",
        "uint16[1] int64 int64 int64 float64[1]",
    ),
    "norms.settle_voxels": (
        "float32[1] int64 int64 int64 float32[1] float32[1] int64 float64 float32[1] int64 int64",
        "uint16[1] int64 int64 int64 float32[1] float32[1] int64 float64 uint16[1] int64 int64",
    ),
    "outputs.choose_outputs": ("int64 int64 float32[4] bool float64 uint16[3]",),
    "outputs.count_outputs": ("float32[4] uint16[3] bool bool float64[2]",),
    "outputs.paint_outputs": (
        "int64 int64 int64 int64 uint8[3] float32[4] float64[2] float32[4] uint16[3] int64[1] "
        "int64[1] float64[1] float64[1] bool float64 bool int64[1] uint8[1]",
    ),
    "painting.agree": ("int64 int64 uint16[3] uint16[3]",),
    "painting.certainty": (
        "int64 int64 float32[4] float32[2] float32[1] bool bool uint16[3] int64",
    ),
    "painting.choose": ("int64 int64 float32[4] float32[2] float32[1] bool bool uint16[3]",),
    "painting.confidence": (
        "int64 int64 float32[4] float32[2] float32[1] bool bool int64[1] float32[4]",
    ),
    "painting.paint": (
        "int64 int64 int64 int64 uint8[3] float32[4] float64[2] float32[4] uint16[3] "
        "uint16[3] float32[4] int64[1] int64[1] float64[2] float32[2] float32[1] bool "
        "bool uint8[1]",
    ),
    "painting.unfold": (
        "int64 int64 float32[4] float32[3] float32[2] float32[2] float32[1] int64 int64 float32[4]",
    ),
    "rendering.filled": ("float32[1] int64 float32[1]",),
    "residual.add_few": (
        "float32[1] int64 int64 int64 float32[1] float32[1] float32[1] int64 float32[1] int64 "
        "float64",
    ),
    "residual.add_voxels": (
        "float32[1] int64 int64 int64 float32[1] float32[1] float32[1] float32[1] int64 float64",
    ),
    "residual.point_voxels": (
        "(float32[1] int64) (float32[1] int64) int64 int64 float32[1] float32[1] float32[1] "
        "float32[1]",
    ),
    "rounding.paint_rounded": (
        "int64 int64 int64 int64 uint8[3] float32[4] float64[1] float32[4] uint16[3] int64[1] "
        "int64[1] bool bool int64[1] uint8[1] bool",
    ),
    "rounding.planes_last": ("int64 int64 float32[4] float32[4]",),
    "rounding.sure_classes": ("int64 int64 float32[4] bool uint16[3]",),
    "surfaces.corner_map": ("uint8[3] int64 int64 uint8[3]",),
    "surfaces.nearest": (
        "uint8[3] uint8[3] uint8[3] uint8[3] uint64[4] int64[1] int64[2] int64[1] int64 int64 "
        "int64[2]",
    ),
    "surfaces.nearest_far": (
        "int64[1] uint8 int64[2] int64[2] int64[1] uint8[3] uint8[3] float64[1]",
    ),
    "surfaces.presence": ("uint8[3] uint8[3] int64[1] int64 int64 uint64[4]",),
    "thinning.join": (
        "int64[1] int32[1] float32[1] int32[2] int32[1] int32[1] bool[1] float32[1] int64",
    ),
    "thinning.judge": (
        "float32[2] int32[2] int32[1] int32[1] bool[1] float32[1] float32 int32[1] float32[1] "
        "float32[1] int64 int64",
    ),
    "thinning.stars": ("int32[2] int64",),
    "tissues.block_means": ("int16[3] int64[1] int64 int64 int16[3] int64 int64",),
    "tissues.distances_across": ("float32[3] float64 int64 int64",),
    "tissues.distances_in_rows": ("bool[3] float64[1] float32[3] int64 int64",),
    "tissues.paint": (
        "int16[3] int64[1] uint8[4] (int64 int64 int64 int64 int64 int64) (uint8 uint8 "
        "uint8) uint8[3] int64 int64",
    ),
    "tissues.spread_once": ("uint8[3] bool[3] uint8[3] int64 int64",),
    "windows.add_halves": (
        "int64 int64 float32[3] int64 uint16[3] float32[1] float32[1] float32[1] int64",
    ),
    "windows.add_some": (
        "int64 int64 float32[4] int64 float32[4] float32[1] float32[1] float32[1] int64",
    ),
    "windows.add_window": (
        "int64 int64 float32[3] int64 float32[3] float32[1] float32[1] float32[1] int64",
    ),
    "windows.finish": (
        "int64 int64 float32[3] int64 float32[3] int64 int64 float32[1] float32[1] "
        "float32[1] int64 float32[3]",
    ),
    "winograd.convolve_rows": (
        "float32[1] int64 int64 (int64 int64 int64) int64 int64 int64 float32[1] "
        "float32[1] int64 float32[1] float32[1]",
        "float32[1] int64 int64 (int64 int64 int64) int64 int64 int64 float32[1] "
        "float32[1] int64 uint16[1] float32[1]",
    ),
    "winograd.convolve_unit": (
        f"int64 int64 (int64 int64 int64) {_MAP} {_MAP} float32[1] float32[1] int64 "
        "float32[1] float32[2] float32[1]",
    ),
    "winograd.double_voxels": (
        f"{_MAP} (int64 int64 int64) int64 int64 int64 int64 float32[1] float32[1] "
        "int64 float32[1] float32[1]",
    ),
}


def types_of(signature: str) -> tuple[Any, ...]:
    """Numba's types of a line."""
    words = re.findall(r"[()]|[^\s()]+", signature)
    taken = _taken(words)
    assert not words, f"a bracket too many in {signature}"
    return taken


def _taken(words: list[str]) -> tuple[Any, ...]:
    """The types up to the end or the closing bracket; `words` loses them."""
    from numba import types

    taken = []
    while words and (word := words.pop(0)) != ")":
        if word == "(":
            taken.append(types.BaseTuple.from_types(_taken(words)))
            continue
        name, _, axes = word.partition("[")
        kind = types.boolean if name == "bool" else getattr(types, name)
        taken.append(types.Array(kind, int(axes[:-1]), "C") if axes else kind)
    return tuple(taken)
