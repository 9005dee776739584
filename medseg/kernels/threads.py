"""Work shared out over threads that stay: starting them anew took longer than many a piece of work.

Callers cut an array into units or slabs; there is no numba thread pool that could hang.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

#: All that were started.
_POOLS: list[ThreadPoolExecutor] = []


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """A forked process starts its own."""
    _POOLS.append(pool := ThreadPoolExecutor(count))
    return pool


def in_parallel(work: Callable[[int], None], units: int, workers: int) -> None:
    """Runs work(0), work(1), ... on this thread and helpers, `workers` in all. Work must not share
    out work itself.
    """
    left = itertools.count()

    def run() -> None:
        while (unit := next(left)) < units:
            work(unit)

    helpers = min(workers, units) - 1
    running = [_threads(helpers, os.getpid()).submit(run) for _ in range(helpers)]
    try:
        run()
    finally:
        for helper in running:
            helper.exception()  # none may still be at work
    for helper in running:
        helper.result()


def end_threads() -> None:
    """End the threads that stay, which are idle between pieces of work."""
    for pool in _POOLS:
        pool.shutdown()
    _POOLS.clear()
    _threads.cache_clear()


#: The most threads that this process wants to use; empty: as many as there are cores.
_LIMIT: list[int] = []


def limit_threads(count: int) -> None:
    """Let loops that share out work use so many threads at most, as where several processes share
    cores.
    """
    _LIMIT[:] = [count]


def threads() -> int:
    """Processor cores this process may use, and wants to."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min([cores, *_LIMIT])


def in_slabs(
    work: Callable[[int, int], Any],
    length: int,
    slabs_per_thread: int = 4,
    *,
    workers: int | None = None,
) -> list[Any]:
    """Results of `work(start, stop)` over consecutive slabs of range(length), in order, on
    `workers` or all threads.
    """
    workers = workers or threads()
    if workers == 1 or length < 16 or not slabs_per_thread:
        return [work(0, length)]
    count = min(length, workers * slabs_per_thread)
    edges = [length * n // count for n in range(count + 1)]
    results: list[Any] = [None] * count

    def one(n: int) -> None:
        results[n] = work(edges[n], edges[n + 1])

    in_parallel(one, count, workers)
    return results
