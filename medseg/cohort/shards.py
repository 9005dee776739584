"""Which part of a cohort a job does: as it is told, or as its scheduler numbers it."""

from __future__ import annotations

import os
import re

from medseg.errors import BadConfig


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) with 0 <= i < n of `i/n`, or of `auto` what SLURM or Kubernetes say. Raises
    `BadConfig`.

    SLURM numbers the tasks of an array from SLURM_ARRAY_TASK_MIN on, in steps; several tasks of one
    job step are numbered by SLURM_PROCID. A Kubernetes Indexed Job has JOB_COMPLETION_INDEX, and no
    variable of its own for how many there are: the template sets JOB_COMPLETIONS.
    """
    if text.strip().lower() == "auto":
        return _of_scheduler()
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
    if not match:
        raise BadConfig(f"--shard {text}: write i/n, such as 3/100, or auto")
    number, count = int(match[1]), int(match[2])
    if number >= count:
        raise BadConfig(f"--shard {text}: parts are numbered from 0 to {max(0, count - 1)}")
    return number, count


def _of_scheduler() -> tuple[int, int]:
    """The part by the variables of the scheduler."""
    if (task := _number("SLURM_ARRAY_TASK_ID")) is not None:
        first, last = _number("SLURM_ARRAY_TASK_MIN"), _number("SLURM_ARRAY_TASK_MAX")
        count = _number("SLURM_ARRAY_TASK_COUNT")
        if first is None or last is None or count is None:
            raise BadConfig(
                "--shard auto: SLURM does not say how many tasks the array has; write i/n"
            )
        step = (last - first) // max(1, count - 1) if count > 1 else 1
        is_even = step >= 1 and last - first == step * (count - 1)
        if not is_even or (task - first) % step or not 0 <= (task - first) // step < count:
            raise BadConfig("--shard auto: the array's tasks are not numbered evenly; write i/n")
        return (task - first) // step, count
    if (index := _number("JOB_COMPLETION_INDEX")) is not None:
        count = _number("JOB_COMPLETIONS")
        if count is None or index >= count:
            raise BadConfig(
                "--shard auto: set JOB_COMPLETIONS to the job's completions, or write i/n"
            )
        return index, count
    rank, ranks = _number("SLURM_PROCID"), _number("SLURM_NTASKS")
    if rank is not None and ranks is not None and rank < ranks:
        return rank, ranks
    raise BadConfig(
        "--shard auto: this is no task of a SLURM array nor of a Kubernetes Indexed Job; write i/n"
    )


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
