"""Whether what a network says is finite, asked of a card one batch later, so that it need not wait
for the question.

By then the numbers have been added to others. A scan whose numbers are not finite is therefore done
again from its beginning, in float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from medseg.inference.backends.copies import Courier, Fetched


class NotFinite(Exception):
    """What a network said some batches ago is not finite. remedy: to be called before the scan is
    done again; raises where there is none.
    """

    def __init__(self, remedy: Callable[[], None]) -> None:
        self.remedy = remedy


class Checks:
    """Questions to a card that are not yet answered."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._waiting: deque[tuple[Fetched, Callable[[], None]]] = deque()

    def takes(self, features: Tensor) -> bool:
        """Whether features lie where the answer would have to be waited for."""
        return features.device.type == self._courier.device.type

    def add(self, features: Tensor, remedy: Callable[[], None]) -> None:
        """Ask. Raises `NotFinite` if the answer to an earlier question is no."""
        # A sum needs no copy, and NaN and Inf survive it.
        answer = torch.isfinite(features.sum(dtype=torch.float32)).reshape(1)
        self._waiting.append((self._courier.fetch(answer), remedy))
        if len(self._waiting) > 1:
            self._hear()

    def settle(self) -> None:
        """Wait for all answers. Raises `NotFinite`."""
        while self._waiting:
            self._hear()

    def _hear(self) -> None:
        answer, remedy = self._waiting.popleft()
        with answer.read() as here:
            is_finite = bool(here)
        if not is_finite:
            raise NotFinite(remedy)


#: Where networks ask in this context; None: each answer is waited for.
_CHECKS: ContextVar[Checks | None] = ContextVar("_CHECKS", default=None)


@contextmanager
def checked_later(courier: Courier) -> Iterator[None]:
    """Within this block networks on the courier's card are asked one batch later; at its end all
    answers are there. Raises `NotFinite`.
    """
    if courier.link is None:
        yield
        return
    checks = Checks(Courier(courier.device, courier.link))
    token = _CHECKS.set(checks)
    try:
        yield
        checks.settle()
    finally:
        _CHECKS.reset(token)


def checks_of(features: Tensor) -> Checks | None:
    """What takes the question about features; None if it is asked at once."""
    checks = _CHECKS.get()
    return checks if checks is not None and checks.takes(features) else None
