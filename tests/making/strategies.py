"""Hypothesis strategies for what medseg works on: affines and volumes."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import strategies as st

from medseg.volume import Volume

#: The 48 ways to store an array along the axes of the body, as 3 x 3 matrices.
SIGNED_PERMUTATIONS = [
    np.eye(3)[:, order] * signs
    for order in permutations(range(3))
    for signs in product((1.0, -1.0), repeat=3)
]
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4")


def rotation(quaternion: tuple[float, float, float, float]) -> np.ndarray:
    """The 3 x 3 rotation of a quaternion (w, x, y, z) that need not have length 1."""
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any orientation of the 48, straight, slightly tilted or turned anyhow, with unequal spacings,
    anywhere.
    """
    directions = SIGNED_PERMUTATIONS[draw(st.integers(0, 47))]
    small, any_part = st.floats(-0.2, 0.2), st.floats(-1, 1)
    turn = draw(
        st.one_of(
            st.just((1.0, 0.0, 0.0, 0.0)),
            st.tuples(st.just(1.0), small, small, small),
            st.tuples(any_part, any_part, any_part, any_part).filter(
                lambda q: np.linalg.norm(q) > 0.1
            ),
        )
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation(turn) @ directions * [draw(st.floats(0.2, 8)) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine


@st.composite
def volumes(
    draw: st.DrawFn, dtypes: tuple[str, ...] = (*INTEGERS, "f4"), min_side: int = 1
) -> Volume:
    """A small volume of random voxels, every axis of any length from `min_side` to 6."""
    shape = tuple(draw(st.integers(min_side, 6)) for _ in range(3))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if dtype.kind == "f":
        data = random.normal(0, 1000, shape).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        data = random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return Volume(data, draw(affines()))
