"""A card that is a CPU: a copy has done nothing before somebody waits for it, and whoever does not
wait finds what is no number, or is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor


class Link:
    """A `Link` of `inference.backends.copies` whose copies are poison until their event is waited
    for. sent_bytes: of all copies so far. moments, held: how often it was asked where it stands,
    and how often somebody waited for that.
    """

    def __init__(self) -> None:
        self.unfinished: list[Copy] = []
        self.lock = Lock()
        self.sent_bytes = self.moments = self.held = 0

    def now(self) -> Moment:
        """Where the main work stands."""
        self.moments += 1
        return Moment(self)

    def pinned(self, size_bytes: int) -> Tensor:
        """Memory like any other."""
        return spoilt(torch.empty(size_bytes, dtype=torch.uint8))

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Nothing yet."""
        self.check()
        self.sent_bytes += source.nbytes
        made = Copy(target, source, self)
        with self.lock:  # one thread asks for copies while another waits for them
            self.unfinished.append(made)
        return made

    def beside(
        self, work: Callable[[], Sequence[Tensor | None]]
    ) -> tuple[Sequence[Tensor | None], Work]:
        """Work done at once, whose result is poison for all who do not wait."""
        made = work()
        return made, Work([one for one in made if one is not None])

    def check(self) -> None:
        """Whether nobody has written to what is being copied."""
        for one in [*self.unfinished]:
            one.check()


class Moment:
    """The event behind the main work; counts who waits for it."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def hold(self, *tensors: Tensor) -> None:
        """Somebody waits."""
        self.link.held += 1

    def wait(self) -> None:
        """Somebody waits."""
        self.link.held += 1


class Copy:
    """The event behind a copy."""

    def __init__(self, target: Tensor, source: Tensor, link: Link) -> None:
        self.target, self.source, self.link = target, source, link
        self.content = source.clone()
        spoilt(target)

    def check(self) -> None:
        """Whether the source is as it was when the copy began."""
        assert is_same(self.source, self.content), "written to while it was copied"

    def hold(self, *tensors: Tensor) -> None:
        """What the card does from here on finds the target there; the source is still read from."""
        self.target.copy_(self.content)

    def wait(self) -> None:
        """The copy ends."""
        self.check()
        self.target.copy_(self.content)
        with self.link.lock:
            self.link.unfinished = [one for one in self.link.unfinished if one is not self]


class Work:
    """The event behind work."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.contents = [one.clone() for one in tensors]
        for one in tensors:
            spoilt(one)

    def hold(self, *tensors: Tensor) -> None:
        """The results are there for what the card does from here on."""
        for one, content in zip(self.tensors, self.contents):
            one.copy_(content)

    wait = hold


def spoilt(tensor: Tensor) -> Tensor:
    """A tensor full of what nobody wants to find, in place."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 113)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return torch.equal(*(part.contiguous().view(torch.uint8) for part in (one, other)))
