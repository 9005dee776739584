"""What fits into a card's memory: how many windows at a time, and whether their sums lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Windows at a time where nobody says how many: the first of these that fits.
BATCHES = (4, 2, 1)
#: What cuDNN and cuBLAS take for themselves while they work.
_WORKSPACE_BYTES = 500_000_000
#: Of free memory so much may be planned with: PyTorch keeps freed blocks, which lie in pieces.
_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class OnCard:
    """batch: windows at a time. sums: whether they are added up on the card, else on the CPU, which
    takes a copy of each window. data: whether the whole image lies there, too, and labels are
    painted there. needed_bytes: of the card at the peak.
    """

    batch: int
    sums: bool
    data: bool
    needed_bytes: int


def fit_on_card(
    window_bytes: Callable[[int], int],
    *,
    weight_bytes: int,
    sums_bytes: int,
    data_bytes: int | None = None,
    free_bytes: int,
    batch: int = 0,
) -> OnCard:
    """The quickest way that fits into free memory; where none does the smallest, which steps down
    when memory is out.

    window_bytes: of so many windows at a time, everything that lives in the network at once.
    data_bytes: of image and labels; None: the CPU paints in any case. batch: what a person asked
    for; 0: `BATCHES`.
    """
    places = [(True, True, sums_bytes + (data_bytes or 0))] * (data_bytes is not None)
    places += [(True, False, sums_bytes), (False, False, 0)]
    ways = [
        OnCard(
            batch=count,
            sums=sums,
            data=data,
            needed_bytes=weight_bytes + window_bytes(count) + here_bytes + _WORKSPACE_BYTES,
        )
        for sums, data, here_bytes in places
        for count in ((batch,) if batch else BATCHES)
    ]
    return next((way for way in ways if way.needed_bytes <= _SHARE * free_bytes), ways[-1])
