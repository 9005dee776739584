"""The next batches, made by a thread while the network learns from this one.

A batch is a function of its step and its seeds, so that which thread makes it, and when, changes no
bit of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from medseg.inference import Event, Link, link_to
from medseg.training.source import Batch


def batches_ahead(device: torch.device) -> int:
    """How many batches wait for the network."""
    return 2 if device.type != "cpu" else 1


class Ahead:
    """Batches of one step after the other; as a context it ends its thread."""

    def __init__(
        self,
        make: Callable[[int], Batch],
        *,
        device: torch.device,
        count: int,
        stop: int | None = None,
        link: Link | None = None,
    ) -> None:
        """make: the batch of a step. count: how many are made before they are asked for; 0: each
        when it is. stop: the step for which none is made any more.
        """
        self._make, self._count, self._stop = make, count, stop
        self._link = link or link_to(device)
        self._waiting: deque[tuple[int, Future[tuple[Batch, Event | None]]]] = deque()
        self._thread = ThreadPoolExecutor(1, "batches") if count else None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._waiting.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of a step, on which the network may work at once. Raises what making it
        raised.
        """
        if self._thread is None:
            return self._make(step)
        while self._waiting and self._waiting[0][0] != step:
            self._waiting.popleft()[1].cancel()
        begun = self._waiting[-1][0] + 1 if self._waiting else step
        for one in range(begun, step + 1 + self._count):
            if one == step or self._stop is None or one < self._stop:
                self._waiting.append((one, self._thread.submit(self._made, one)))
        batch, event = self._waiting.popleft()[1].result()
        if event is not None:
            event.hold(*(part for part in batch if part is not None))
        return batch

    def _made(self, step: int) -> tuple[Batch, Event | None]:
        if self._link is None:
            return self._make(step), None
        return self._link.beside(lambda: self._make(step))
