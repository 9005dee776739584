"""What this machine has and its system can: memory in bytes, what its processor is good at, how
programs are started and stopped.

Linux says most of it in /proc, which costs nothing to read; psutil says it of macOS and Windows.
"""

from __future__ import annotations

import mmap
import os
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Signals that ask a program to stop. Windows has no SIGHUP; SIGBREAK is its Ctrl-Break.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)
#: Whether files have an owner and a mode that say who may do what. On Windows lists do, which
#: Python does not show; what lies in the home there is for its user alone.
HAS_MODES = hasattr(os, "geteuid")
#: CREATE_NEW_PROCESS_GROUP of Windows (winbase.h).
_NEW_PROCESS_GROUP = 0x200


def peak_memory_bytes() -> int:
    """Largest resident size of this program so far."""
    # Getrusage would also count what started this process, before it did.
    peak = _from_proc("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return int(_process(os.getpid()).memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes() -> int:
    """Memory that programs may still take."""
    free = _from_proc("/proc/meminfo", "MemAvailable")
    if free is not None:
        return free
    import psutil

    return int(psutil.virtual_memory().available)


def resident_bytes(process: int | None = None) -> int:
    """Memory that a process, this one by default, holds now; 0 for one that is gone."""
    with suppress(OSError, ValueError):
        text = Path(f"/proc/{process or 'self'}/statm").read_text(encoding="ascii")
        return int(text.split()[1]) * mmap.PAGESIZE
    import psutil

    with suppress(psutil.Error):
        return int(_process(process or os.getpid()).memory_info().rss)
    return 0


def family_bytes(process: int) -> int:
    """Memory that a process and those that it started hold now; 0 where that cannot be known."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
        children = [int(one) for one in text.split()]
    except (OSError, ValueError):
        import psutil

        children = []
        with suppress(psutil.Error):
            children = [child.pid for child in _process(process).children()]
    return sum(resident_bytes(one) for one in (process, *children))


def _process(number: int) -> Any:
    import psutil

    return psutil.Process(number)


def _from_proc(path: str, key: str) -> int | None:
    """Bytes that Linux tells; None elsewhere."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def user_number() -> int:
    """The number that files of this user have as their owner; on Windows all have 0."""
    return os.geteuid() if HAS_MODES else 0


def may_others_write(about: os.stat_result) -> bool:
    """Whether the mode of a file or folder lets everybody write to it."""
    return HAS_MODES and bool(about.st_mode & stat.S_IWOTH)


def is_private(about: os.stat_result) -> bool:
    """Whether a folder is this user's and its mode lets nobody else in."""
    return about.st_uid == user_number() and not (HAS_MODES and stat.S_IMODE(about.st_mode) & 0o077)


def limits_processes() -> bool:
    """Whether a process can limit its own memory: macOS takes the limit and does not keep it, and
    Windows has none.
    """
    return sys.platform not in ("win32", "darwin")


def apart() -> dict[str, Any]:
    """Arguments of `subprocess.Popen` for a process that Ctrl-C does not reach: it is for us, who
    then tell it.
    """
    if sys.platform == "win32":
        return {"creationflags": _NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def keep_memory() -> None:
    """Let this process keep freed memory: large activations are then reused instead of being
    faulted in again.

    Measured 1.3 to 1.8 times faster networks on a CPU. glibc only; elsewhere nothing happens. And
    OpenMP's threads wait for work less eagerly, before torch is loaded: they were in the way of
    medseg's own (a tenth). A library must not do this to its host, so only the command line does.
    """
    import ctypes

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
    import gc

    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return to the system what malloc keeps of freed memory. glibc only."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def convolves_bfloat16() -> bool:
    """Whether oneDNN convolves bfloat16 on this CPU; PyTorch for macOS comes without oneDNN."""
    import torch

    query = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(query is not None and query())


def has_matrix_units() -> bool:
    """Whether this CPU has AMX tiles, with which oneDNN convolves bfloat16 several times faster
    than float32.
    """
    import torch

    query = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, so it may go
    return bool(query is not None and query())
