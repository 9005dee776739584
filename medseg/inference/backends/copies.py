"""Copies between this process's memory and a card that go on beside other work, and work that a
card does beside its main one.

Nobody waits for such a copy when it is asked for. Until it has ended, its source must not be
written to and its target not be read; the memory of this process takes part in it only where it is
pinned (CUDA C++ Programming Guide, asynchronous concurrent execution). `Courier` keeps all of it
behind events. A `Link` is what a card must be able to do; tests give one that poisons memory until
somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

#: More is sent in pieces, so that little memory is pinned: the system cannot use it for others.
PIECE_BYTES = 64_000_000
#: Tensors that some work has made, or nothing in the place of one.
Made = TypeVar("Made", bound=Sequence[Tensor | None])


class Event(Protocol):
    """A point in the work that a card was given."""

    def wait(self) -> None:
        """Come back when the card has come there."""

    def hold(self, *tensors: Tensor) -> None:
        """Let what the card is given from here on wait for it; that work uses these tensors."""


class Link(Protocol):
    """The way to a card."""

    def pinned(self, size_bytes: int) -> Tensor:
        """(size_bytes,) uint8 of this process's memory that the card reads and writes by itself."""

    def now(self) -> Event:
        """Where the work stands that this thread gives the card."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Begin to copy as soon as the card has done what it was given so far."""

    def beside(self, work: Callable[[], Made]) -> tuple[Made, Event]:
        """What `work` gives the card, done beside its main work."""


def link_to(device: torch.device) -> Link | None:
    """The way to a card of CUDA; None to other devices, whose copies are waited for."""
    return _Cuda(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _CudaEvent:
    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        self.event.synchronize()

    def hold(self, *tensors: Tensor) -> None:
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self.event)
        for one in tensors:
            # Their memory is given away again only when this work, too, has ended.
            one.record_stream(now)


class _Cuda:
    """A stream of CUDA beside the main one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = self.now()
        for one in (target, source):
            if one.device.type == "cuda":
                one.record_stream(self.stream)
        return event

    def beside(self, work: Callable[[], Made]) -> tuple[Made, Event]:
        with torch.cuda.stream(self.stream):
            return work(), self.now()

    def now(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _CudaEvent(event, self.device)


class _Buffer:
    """Pinned memory, and the last copy that it takes part in."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.event: Event | None = None

    def like(self, tensor: Tensor, link: Link) -> Tensor:
        """Room for a tensor's numbers, once the last copy has ended."""
        if self.event is not None:
            self.event.wait()
            self.event = None
        if len(self.memory) < tensor.nbytes:
            self.memory = link.pinned(tensor.nbytes)
        return self.memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class Courier:
    """Copies to and from a device through pinned buffers, two in each direction: one fills while
    the other empties. To a CPU, and from it, nothing is copied.
    """

    def __init__(self, device: torch.device, link: Link | None = None) -> None:
        self.device = device
        self.link = link or link_to(device)
        self._there = [_Buffer(), _Buffer()]
        self._here = [_Buffer(), _Buffer()]

    def send(self, source: Tensor) -> Tensor:
        """Numbers of this process on the device, whose later work waits for them; `source` may
        change as soon as this returns.
        """
        if self.link is None or source.device.type != "cpu":
            return source.to(self.device)
        target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self._send_into(target, source, self.link)
        return target

    def _send_into(self, target: Tensor, source: Tensor, link: Link) -> None:
        if source.nbytes > PIECE_BYTES and max(source.shape) > 1:
            axis = next(axis for axis, size in enumerate(source.shape) if size > 1)
            pieces = -(-source.nbytes // PIECE_BYTES)
            for part in zip(target.chunk(pieces, axis), source.chunk(pieces, axis)):
                self._send_into(*part, link)
            return
        buffer = self._there[0]
        self._there.reverse()
        staged = buffer.like(source, link)
        staged.copy_(source)
        buffer.event = link.copy(target, staged)
        buffer.event.hold(target)

    def fetch(self, source: Tensor) -> Fetched:
        """Begin to copy a tensor of the device, which must not change until `Fetched.read`, to
        here. At most two may be on their way or read from.
        """
        if self.link is None:
            return Fetched(source.cpu(), None, None)
        free = [one for one in self._here if one.event is None]
        assert free, "two copies are on their way already"
        buffer = free[0]
        target = buffer.like(source, self.link)
        buffer.event = self.link.copy(target, source)
        return Fetched(target, source, buffer)


class Fetched:
    """A tensor on its way from a device."""

    def __init__(self, target: Tensor, source: Tensor | None, buffer: _Buffer | None) -> None:
        self._target, self._source, self._buffer = target, source, buffer

    @contextmanager
    def read(self) -> Iterator[Tensor]:
        """The tensor here, once it has come. Its memory is used again when the block has ended."""
        if self._buffer is not None and self._buffer.event is not None:
            self._buffer.event.wait()
        self._source = None
        try:
            yield self._target
        finally:
            if self._buffer is not None:
                self._buffer.event = None
