"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

#: Called with what is being done (a step, or the name of a case), how much of it is done, and how
#: much there is.
Progress: TypeAlias = Callable[[str, int, int], None]
#: Called by a training run with the share of it that is done, and with the facts of the newest
#: step.
Report: TypeAlias = Callable[[float, Mapping[str, Any]], None]


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""
