"""Arrays on other grids as PyTorch's `grid_sample` finds them, which MONAI uses: to the last bit,
some planes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Voxels that are looked up at a time.
_VOXELS_AT_A_TIME = 1 << 21


def resampled(
    array: NDArray,
    theta: NDArray[np.float64],
    shape: Sequence[int],
    *,
    nearest: bool = False,
    single: bool = False,
) -> NDArray:
    """An array (X, Y, Z) on another grid, whose indices `theta` (4, 4) leads to the array's.

    Outside it takes the nearest voxel. What PyTorch's `affine_grid` and `grid_sample` compute in
    float64, or with `single` in float32, some planes at a time.
    """
    import torch
    from torch.nn import functional as F

    dtype = torch.float64 if single is False else torch.float32
    source = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)[None, None]
    normal = _normalised(theta, array.shape, shape, dtype=dtype)
    # What is kept is what went in, but that interpolated values are float32.
    out = np.empty(tuple(shape), array.dtype if nearest else np.float32)
    target = torch.from_numpy(out)
    for first, places in _places(normal, shape, torch.get_num_threads()):
        several = source.expand(len(places), *source.shape[1:])
        samples = F.grid_sample(
            several,
            places,
            mode="nearest" if nearest else "bilinear",
            padding_mode="border",
            align_corners=False,
        )
        planes = samples[:, 0].flatten(0, 1)
        target[first : first + len(planes)] = planes.to(target.dtype)
    return out


def _normalised(
    theta: NDArray[np.float64], old: Sequence[int], new: Sequence[int], *, dtype: torch.dtype
) -> Tensor:
    """(3, 4) of the grids' -1 to 1, axes backwards, as `affine_grid` wants it."""
    import torch

    # MONAI rounds to the number type of the voxels before it normalises.
    matrix = torch.from_numpy(theta).to(dtype)[None]
    there, here = (_to_unit(size).to(dtype) for size in (old, new))
    back = torch.from_numpy(np.linalg.inv(here.numpy())).to(dtype)
    normal = (there @ matrix @ back).clone()
    normal[:, :3] = normal[:, [2, 1, 0]]
    normal[:, :, :3] = normal[:, :, [2, 1, 0]]
    return normal[0, :3]


def _to_unit(shape: Sequence[int]) -> Tensor:
    """(1, 4, 4) from indices of a grid to -1 to 1, the outer edges of its outer voxels."""
    import torch

    size = torch.tensor(list(shape), dtype=torch.float64)
    matrix = torch.diag(torch.cat((2.0 / size, torch.ones(1, dtype=torch.float64))))
    matrix[:-1, -1] = 1.0 / size - 1.0
    return matrix[None]


def _places(normal: Tensor, shape: Sequence[int], parts: int) -> Iterator[tuple[int, Tensor]]:
    """(first plane, places (parts, planes, Y, Z, 3)) of all planes of a grid, as `affine_grid`."""
    import torch

    depth, height, width = shape
    base = [_unit_line(n, normal.dtype) for n in (width, height)]
    along = _unit_line(depth, normal.dtype)
    most = max(1, _VOXELS_AT_A_TIME // (height * width))
    first = 0
    while first < depth:
        count = min(most, depth - first)
        several = parts if count % parts == 0 else 1
        grid = torch.empty((count, height, width, 4), dtype=normal.dtype)
        grid[..., 0], grid[..., 1] = base[0], base[1][:, None]
        grid[..., 2], grid[..., 3] = along[first : first + count, None, None], 1
        places = grid.view(1, -1, 4).bmm(normal.T[None])
        yield first, places.view(several, count // several, height, width, 3)
        first += count


def _unit_line(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) the middles of so many cells between -1 and 1."""
    import torch

    if count <= 1:
        return torch.zeros(count, dtype=dtype)
    return torch.linspace(-1, 1, count, dtype=dtype) * (count - 1) / count
