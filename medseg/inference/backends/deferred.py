"""Maps whose norm and activation are left for whoever reads them next."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from medseg.networks.ops.norm import LANES, numbers, settle


@dataclass(eq=False)
class Source:
    """A channels-last map and what is still to be done to it: x · scale + shift, then (leaky) ReLU
    by `slope`.
    """

    map: Tensor
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    slope: float = 1.0

    def arguments(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, float]:
        """As `kernels.winograd.convolve_unit` takes it."""
        batch, channels = self.map.shape[:2]
        scale = np.ones(batch * channels, np.float32) if self.scale is None else self.scale
        shift = np.zeros(batch * channels, np.float32) if self.shift is None else self.shift
        return numbers(self.map), channels, scale, shift, self.slope

    def settle(self) -> Tensor:
        """The map after norm and activation, which are done in place the first time."""
        if self.scale is not None:
            self.settle_into(self.map, 0)
            self.scale = self.shift = None
            self.slope = 1.0
        return self.map

    def settle_into(self, out: Tensor, channel: int) -> None:
        """Write the map after norm and activation to the channels of `out` from `channel` on."""
        if self.scale is None or self.shift is None:
            out[:, channel : channel + self.map.shape[1]] = self.map
            return
        settle(self.map, self.scale, self.shift, self.slope, out, channel)


class Deferred(Tensor):
    """Maps that will be normalised, activated and joined along the channels when something needs
    them.

    A `FastConv` reads the sources as they are; every other operation gets the tensor that they
    stand for.
    """

    sources: list[Source]

    @staticmethod
    def __new__(cls, sources: list[Source]) -> Deferred:  # noqa: D102
        first = sources[0].map
        shape = (first.shape[0], sum(source.map.shape[1] for source in sources), *first.shape[2:])
        strides = (
            torch.empty(shape, device="meta").to(memory_format=torch.channels_last_3d).stride()
        )
        tensor: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=first.dtype
        )
        tensor.sources = sources
        return tensor

    def settle(self) -> Tensor:
        """The tensor that this stands for."""
        if len(self.sources) > 1:
            tensor = empty_map(
                self.shape[0], self.shape[1], tuple(self.shape[2:]), dtype=self.dtype
            )
            channel = 0
            for source in self.sources:
                source.settle_into(tensor, channel)
                channel += source.map.shape[1]
            self.sources = [Source(tensor)]
        return self.sources[0].settle()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Done here and not left to __torch_dispatch__, on the way to which PyTorch imports half a
        # second of modules.
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(function, "__name__", "") == "__get__":  # shape, dtype and the like
                return function(*args, **(kwargs or {}))
            if function is torch.cat and (tensor := _joined(*args, **(kwargs or {}))) is not None:
                return tensor
            return function(*tree_map(settled, args), **tree_map(settled, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*tree_map(settled, args), **tree_map(settled, kwargs or {}))


def _joined(tensors: Any, dim: int = 0, **others: Any) -> Deferred | None:
    """Maps joined along the channels, all float32 or all bfloat16; None for what else `torch.cat`
    may be asked.
    """
    if dim != 1 or others:
        return None
    sources = [source for x in tensors for source in sources_of(x)]
    kinds = {source.map.dtype for source in sources}
    return Deferred(sources) if kinds in ({torch.float32}, {torch.bfloat16}) else None


def sources_of(x: Tensor) -> list[Source]:
    """What a map consists of, channels innermost."""
    return (
        x.sources
        if isinstance(x, Deferred)
        else [Source(x.contiguous(memory_format=torch.channels_last_3d))]
    )


def settled(x: Any) -> Any:
    """What it is, with nothing left to be done to it."""
    return x.settle() if isinstance(x, Deferred) else x


def empty_map(
    batch: int, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """A channels-last map that begins at a cache line, as the kernels need it; PyTorch allocates
    so.
    """
    y = torch.empty((batch, channels, *size), dtype=dtype, memory_format=torch.channels_last_3d)
    assert y.data_ptr() % (4 * LANES) == 0
    return y


def kept_apart(numbers: np.ndarray) -> np.ndarray:
    """A copy of float32 numbers that stay, in memory of its own: what malloc keeps would hold all
    that lies below it. In huge pages where there are any.
    """
    memory = _mapped(numbers.nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, np.float32)
    copy[:] = numbers.ravel()
    return copy


def apart(count: int) -> np.ndarray:
    """So many float32 numbers in memory of its own, which is had when it is first written to and
    given back when nobody holds it: malloc keeps it between windows, beside all that comes before.
    """
    return np.frombuffer(_mapped(4 * count), np.float32)


def _mapped(size_bytes: int) -> mmap.mmap:
    """Memory from the system itself, all noughts. Shared memory would have no huge pages."""
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    return mmap.mmap(-1, size_bytes, **private)
