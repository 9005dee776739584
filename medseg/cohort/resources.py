"""How many workers, of how many threads, within which memory: by measurement of the first cases."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medseg.machine import free_bytes

#: What is left to the system and the supervisor, as a share of what is free, and at least.
_RESERVE, _RESERVE_BYTES = 0.1, 300_000_000
#: Further processes must promise so much less time than one, since they also cost memory.
_WORTH_IT = 0.95


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the first cases took: seconds a case on all threads and on one, and to start a worker;
    bytes that a worker is forecast to hold at most.
    """

    all_threads_s: float
    one_thread_s: float
    start_s: float
    memory_bytes: int


def choose_workers(
    measured: Measured, *, cores: int, memory_bytes: int, cases_left: int
) -> tuple[int, int]:
    """(workers, threads of each) that end soonest; one worker of all threads unless more promise
    less.

    Between one thread and all, the time of a case is taken as a part that threads share out and one
    that they do not (Amdahl 1967).
    """
    fitting = min(cores, max(1, memory_bytes // max(1, measured.memory_bytes)), max(1, cases_left))
    best, best_s = (1, cores), measured.all_threads_s * cases_left
    limit_s = best_s * _WORTH_IT
    shared_s = 0.0
    if cores > 1:
        gain_s = max(0.0, measured.one_thread_s - measured.all_threads_s)
        shared_s = min(measured.one_thread_s, gain_s / (1 - 1 / cores))
    for workers in range(2, fitting + 1):
        threads = cores // workers
        case_s = measured.one_thread_s - shared_s * (1 - 1 / threads)
        total_s = measured.start_s + case_s * -(-cases_left // workers)
        if total_s < min(best_s, limit_s):
            best, best_s = (workers, threads), total_s
    return best


def usable_bytes(limit_bytes: int | None = None) -> int:
    """Memory that workers may hold together: what is free, in a job what the job may take, less a
    reserve.
    """
    free = min(free_bytes(), _free_in_group())
    reserve = max(_RESERVE_BYTES, int(free * _RESERVE))
    return max(1, min(limit_bytes or 2**62, free - reserve))


def cores_here() -> int:
    """Processor cores that this program may use, in a job those of the job."""
    from medseg.kernels.threads import threads

    return max(1, min(threads(), _quota_of_group()))


def _groups() -> list[Path]:
    """The control groups (version 2) of this process, from its own up."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            if line.startswith("0::"):
                own = Path("/sys/fs/cgroup" + line[3:])
                return [
                    place for place in (own, *own.parents) if place.is_relative_to("/sys/fs/cgroup")
                ]
    return []


def _free_in_group() -> int:
    """What is left of the memory limits of this process's control groups."""
    free = 2**62
    for place in _groups():
        with suppress(OSError, ValueError):
            most = int((place / "memory.max").read_text(encoding="ascii"))
            usage = int((place / "memory.current").read_text(encoding="ascii"))
            for line in (place / "memory.stat").read_text(encoding="ascii").splitlines():
                if line.startswith("inactive_file "):  # of files, given back when it is wanted
                    usage -= int(line.split()[1])
            free = min(free, max(0, most - usage))
    return free


def _quota_of_group() -> int:
    """Cores that the quotas of this process's control groups add up to."""
    cores = 2**31
    for place in _groups():
        with suppress(OSError, ValueError):
            quota, period = (place / "cpu.max").read_text(encoding="ascii").split()
            if quota != "max":
                cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores
