"""What this machine has: memory in bytes, and what its processor is good at."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory_bytes() -> int:
    """Largest resident size of this program so far."""
    # Getrusage would also count what started this process, before it did.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def free_bytes() -> int:
    """Memory that programs may still take (Linux; elsewhere as good as unlimited)."""
    return _from_proc("/proc/meminfo", "MemAvailable", 2**62)


def resident_bytes() -> int:
    """Memory this process holds now."""
    return _from_proc("/proc/self/status", "VmRSS", 400_000_000)


def _from_proc(path: str, key: str, otherwise: int) -> int:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return otherwise
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), otherwise)


def keep_memory() -> None:
    """Let this process keep freed memory: large activations are then reused instead of being
    faulted in again.

    Measured 1.3 to 1.8 times faster networks on a CPU. glibc only; elsewhere nothing happens. And
    OpenMP's threads wait for work less eagerly, before torch is loaded: they were in the way of
    medseg's own (a tenth). A library must not do this to its host, so only the command line does.
    """
    import ctypes
    import os

    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def give_memory_back() -> None:
    """Return freed memory to the system, between models that reuse little of each other's: what
    `keep_memory` keeps lies in pieces, and grew from one to the next. glibc only.
    """
    import ctypes
    import gc

    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def has_matrix_units() -> bool:
    """Whether this CPU has AMX tiles, with which oneDNN convolves bfloat16 several times faster
    than float32.
    """
    import torch

    query = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, so it may go
    return bool(query is not None and query())
