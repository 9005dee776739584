"""Memory that one step of a network lends to earlier ones, as it does not need it before.

A network's largest map is made last. What is large before that lies in its memory, so that the two
do not add up, and malloc is left with no hole that is too small for anything else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from medseg.networks.ops.norm import LANES


class _Room(threading.local):
    """This thread's: float32 numbers, or none, and how many of them are used."""

    memory: Tensor | None = None
    used: int = 0


_ROOM = _Room()


@contextmanager
def lent(memory: Tensor | None) -> Iterator[None]:
    """Within this block `room` is made in this memory, flat float32, in this thread. Nothing made
    so may be used after it.
    """
    before = _ROOM.memory, _ROOM.used
    _ROOM.memory, _ROOM.used = memory, 0
    try:
        yield
    finally:
        _ROOM.memory, _ROOM.used = before


@contextmanager
def borrowed() -> Iterator[None]:
    """What `room` makes within this block is needed no more after it."""
    used = _ROOM.used
    try:
        yield
    finally:
        _ROOM.used = used


def room(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of whatever numbers: in memory that is lent, where there is enough."""
    count, memory = prod(shape), _ROOM.memory
    if memory is None or dtype != memory.dtype or _ROOM.used + count > len(memory):
        return torch.empty(shape, dtype=dtype)
    start = _ROOM.used
    _ROOM.used += -(-count // LANES) * LANES
    return memory[start : start + count].view(shape)
