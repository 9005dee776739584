"""Voxels as bytes, whichever way an array lies in memory."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from medseg.io.voxels import digest, slabs


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (9, 4, 130), (64, 3, 64), (2, 3, 0)])
def test_slabs_are_the_bytes_with_i_fastest(shape: tuple[int, int, int], dtype: str):
    data = np.random.default_rng(0).integers(0, 200, shape).astype(np.int16)
    wanted = data.astype(dtype).tobytes("F")
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        turns = tuple(slice(None, None, flip) for flip in flips)
        stored = np.ascontiguousarray(data.transpose(axes)[turns])
        same = stored[turns].transpose(np.argsort(axes))
        assert b"".join(slabs(same, np.dtype(dtype))) == wanted


def test_slabs_do_not_copy_what_lies_in_memory_as_in_files():
    data = np.zeros((8, 9, 10), np.int16, order="F")
    pieces = [np.frombuffer(piece, np.int16) for piece in slabs(data, data.dtype)]
    assert all(np.shares_memory(piece, data) for piece in pieces)
    assert sum(piece.size for piece in pieces) == data.size


def test_digest_depends_on_the_voxels_and_not_on_their_order_in_memory():
    data = np.random.default_rng(0).integers(0, 9, (6, 7, 80)).astype(np.uint8)
    assert digest(data, data.dtype) == digest(np.asfortranarray(data), data.dtype)
    assert digest(data, data.dtype) != digest(data[::-1], data.dtype)
