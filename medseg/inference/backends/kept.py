"""Networks that stay open from one scan to the next, where a program asks for that."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

#: What the scans before opened, by what it was opened with; None outside of `models_kept_open`.
_OPEN: ContextVar[dict[Hashable, Any] | None] = ContextVar("_OPEN", default=None)
#: What is known of networks and costs time to find out, which is small and all kept.
_FACTS: ContextVar[dict[Hashable, Any] | None] = ContextVar("_FACTS", default=None)
#: A model and the coarse one that tells it where to look.
MOST_OPEN = 2


@contextmanager
def models_kept_open(open_before: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """Within this block the same models are opened once for all scans. For one thread at a time; a
    library decides for itself.

    open_before: what such a block left open, empty at first; it goes on with that.
    """
    token = _OPEN.set({} if open_before is None else open_before)
    facts = _FACTS.set({})
    try:
        yield
    finally:
        _FACTS.reset(facts)
        _OPEN.reset(token)


def known_of(key: Hashable, ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or within `models_kept_open` what it returned for the same key before."""
    cache = _FACTS.get()
    if cache is None:
        return ask()
    if key not in cache:
        cache[key] = ask()
    return cache[key]


def kept_open(key: Hashable, opened: Callable[[], Any]) -> Any:
    """What `opened` returns, or within `models_kept_open` what it returned for an earlier scan with
    the same key.
    """
    cache = _OPEN.get()
    if cache is None:
        return opened()
    value = cache.pop(key) if key in cache else opened()
    for oldest in list(cache)[: len(cache) - MOST_OPEN + 1]:
        del cache[oldest]
    cache[key] = value  # the latest is the last
    return value
