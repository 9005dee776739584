"""Where a run stands between 0 and 1, the learning rate there, and when it is time to save and to
validate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from medseg.config import TrainConfig

#: Seconds between two states, in a run that is given a time, and between two pictures of its
#: curves.
SAVE_EVERY_S = 60.0
#: Into how many parts validation divides a run that is given a time.
VALIDATIONS = 8


class RunClock:
    """Where a run stands between its beginning, 0, and its end, 1: by its steps, or by the time
    that is left.

    With a time the position moves by the share of the remaining time that a step takes, so that the
    learning rate comes down when the time is over, however the machine's speed changes.
    """

    def __init__(
        self,
        *,
        settings: TrainConfig,
        facts: dict[str, Any],
        began: float,
        reserve: Callable[[], float],
    ) -> None:
        """Where the facts say that a run stands; began, reserve: as `loop.train` has them."""
        self.settings, self.reserve, self.before = settings, reserve, float(facts["seconds"])
        self.began, self.first, self.start = began, int(facts["step"]), time.monotonic()
        self.last, self.pace, self.apart = self.start, 0.0, 0.0
        self.saved = self.drawn = self.start
        if settings.steps is not None:
            facts["position"] = min(1.0, facts["step"] / settings.steps)
        elif facts["position"] >= 1 and (settings.time_s or 0.0) > facts.get("time_s", np.inf):
            # Its time was over, and now it has more: it stands where its seconds are in the whole.
            facts["position"] = min(1.0, self.before / (settings.time_s or np.inf))

    def seconds(self) -> float:
        """Spent on this run, in earlier processes too."""
        return self.before + time.monotonic() - self.began

    def after(self, done: int, position: float) -> float:
        """The new position, `done` steps being done."""
        now = time.monotonic()
        step_s, self.last = now - self.last - self.apart, now
        self.apart = 0.0
        # The first step of a process also waits for files and memory; it counts until there are
        # others.
        self.pace = step_s if done - self.first <= 2 else 0.9 * self.pace + 0.1 * step_s
        if self.settings.steps is not None:
            return min(1.0, done / self.settings.steps)
        assert self.settings.time_s is not None
        left = self.settings.time_s - self.seconds() - self.reserve()
        return 1.0 if left <= self.pace else position + (1 - position) * min(1.0, self.pace / left)

    def is_due(self, done: int) -> bool:
        """Whether the state should be saved: every so many steps, or once a minute."""
        if self.settings.steps is not None:
            return done % self.settings.checkpoint_every == 0
        due = time.monotonic() - self.saved > SAVE_EVERY_S
        self.saved = time.monotonic() if due else self.saved
        return due

    def is_time_to_draw(self) -> bool:
        """Whether the picture is old."""
        old = time.monotonic() - self.drawn > SAVE_EVERY_S
        self.drawn = time.monotonic() if old else self.drawn
        return old

    def seconds_left(self, done: int, position: float) -> float:
        """How much longer the loop will take."""
        if self.settings.steps is not None:
            return self.pace * (self.settings.steps - done)
        assert self.settings.time_s is not None
        return max(0.0, self.settings.time_s - self.seconds() - self.reserve())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Something that is no step and does not count into the pace."""
        start_s = time.monotonic()
        yield
        self.apart += time.monotonic() - start_s


def is_time_to_validate(settings: TrainConfig, done: int, *, before: float, after: float) -> bool:
    """Whether a run validates now that it went from the share `before` to `after`, with `done`
    steps.
    """
    if settings.steps is not None:
        return done % settings.validate_every == 0 or after >= 1
    # At the end only where weights are chosen by it: all validation scans are scored then anyway.
    return (
        int(before * VALIDATIONS)
        < int(after * VALIDATIONS)
        < VALIDATIONS + (settings.keep == "best")
    )


def learning_rate(step: int, position: float, settings: TrainConfig) -> float:
    """The learning rate as a share of the largest: warm-up, then as `schedule` says.

    linear: constant, then a fall to zero over the last `decay` steps (of a run by time: over its
    last third). Until the fall begins it does not depend on `steps`, so a run can be prolonged and
    still be one run.
    """
    warm = min(1.0, (step + 1) / settings.warmup)
    if settings.schedule == "poly":
        return warm * (1 - position) ** 0.9
    if settings.schedule == "cosine":
        return (
            warm
            * 0.5
            * (1 + float(torch.cos(torch.tensor(torch.pi * position, dtype=torch.float64))))
        )
    if settings.steps is None:
        return min(warm, 3 * (1 - position))
    decay = min(settings.decay, max(1, settings.steps // 2))
    return min(warm, (settings.steps - step) / decay)
