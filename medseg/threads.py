"""Work shared out over threads that stay: starting them anew took longer than many a piece of work."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """A forked process starts its own."""
    return ThreadPoolExecutor(count)


def in_parallel(work: Callable[[int], None], units: int, workers: int) -> None:
    """Runs work(0), work(1), ... on this thread and helpers, `workers` in all. Work must not share out work itself."""
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
