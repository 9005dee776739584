"""Another system, as far as medseg can tell: what Windows or macOS lack is taken away.

Python runs this at its start where the folder is in PYTHONPATH; `TESTED_SYSTEM` says which system.
Only medseg's own modules see it. Libraries go on with the system that is there, which is Linux.

Of Windows there are also rules that hold for everybody: a file that is open, or mapped, is neither
renamed, replaced nor removed, and medseg can give no file a name that Windows does not take.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import os
import pathlib
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

PACKAGE = f"{pathlib.Path(__file__).resolve().parents[3] / 'medseg'}{os.sep}"
#: Where modules lie that do for others what is asked of them.
LIBRARY = os.path.dirname(os.__file__) + os.sep  # noqa: PTH120 - at the start of every Python
#: What there is not, by system and module (https://docs.python.org/3/library, "Availability").
MISSING: dict[str, dict[ModuleType, str]] = {
    "windows": {
        os: (
            "chown chroot confstr ctermid fchown fork forkpty getegid geteuid getgid getgroups"
            " getloadavg getpgid getpgrp getpriority getresuid getsid getuid killpg lchown lockf"
            " mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn pread preadv"
            " pwrite pwritev register_at_fork sched_getaffinity sched_setaffinity sendfile seteuid"
            " setpgid setpriority setsid setuid statvfs sync sysconf ttyname uname wait3 wait4"
            " waitid memfd_create pidfd_open copy_file_range splice O_CLOEXEC O_DIRECT O_DIRECTORY"
            " O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE WNOHANG"
        ),
        signal: (
            "SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1"
            " SIGUSR2 SIGWINCH alarm pause pthread_kill pthread_sigmask setitimer sigpending"
            " sigtimedwait sigwait siginterrupt"
        ),
        select: "poll epoll kqueue devpoll",
        socket: "AF_UNIX socketpair",
        time: "tzset clock_gettime pthread_getcpuclockid",
    },
    "macos": {
        os: (
            "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate memfd_create"
            " pidfd_open copy_file_range splice O_DIRECT O_NOATIME O_PATH O_TMPFILE"
        ),
        signal: "sigtimedwait sigwaitinfo pidfd_send_signal",
        select: "epoll devpoll",
    },
}
NO_MODULES = {
    "windows": {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"},
    "macos": {"spwd"},
}
PLATFORMS = {"windows": "win32", "macos": "darwin"}
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])(\..*)?", re.IGNORECASE)
_real_open, _real_os_open = io.open, os.open


def is_medseg(frame: FrameType) -> bool:
    """Whether what runs in a frame is medseg's own."""
    return frame.f_code.co_filename.startswith(PACKAGE)


def is_for_medseg(depth: int = 2) -> bool:
    """Whether it is medseg that has this done, by itself or through the standard library."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and not is_medseg(frame):
        name = frame.f_code.co_filename
        is_library = name.startswith(("<frozen", LIBRARY)) and "site-packages" not in name
        if name != __file__ and not is_library:
            return False
        frame = frame.f_back
    return frame is not None


def hide(module: ModuleType, names: Iterable[str]) -> None:
    """Let medseg find no such names in a module."""

    def hidden(name: str) -> property:
        def get(self: ModuleType) -> Any:
            if is_medseg(sys._getframe(1)) or name not in vars(self):
                raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
            return vars(self)[name]

        def put(self: ModuleType, value: Any) -> None:
            vars(self)[name] = value

        return property(get, put)

    members = {name: hidden(name) for name in names if hasattr(module, name)}
    module.__class__ = type("Elsewhere", (module.__class__,), members)


def tell_platform(system: str) -> None:
    """Let medseg read another `sys.platform`."""
    real = sys.platform

    def get(self: ModuleType) -> str:
        return PLATFORMS[system] if is_medseg(sys._getframe(1)) else real

    sys.__class__ = type("Elsewhere", (sys.__class__,), {"platform": property(get)})


def hide_modules(system: str) -> None:
    """Let medseg import no module that the system has not."""
    real = builtins.__import__
    locks = ModuleType("msvcrt")
    vars(locks).update(LK_NBLCK=2, locking=_locking)

    def import_(name: str, names: Any = None, *rest: Any, **more: Any) -> Any:
        if names and str(names.get("__file__")).startswith(PACKAGE):
            if name in NO_MODULES[system]:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            if name == "msvcrt" and system == "windows":
                return locks
        module = real(name, names, *rest, **more)
        if name == "psutil" and system == "windows":
            _tell_peak(module)
        return module

    builtins.__import__ = import_


def _tell_peak(psutil: Any) -> None:
    """Let `memory_info` tell what it tells on Windows alone."""
    real = psutil.Process.memory_info
    if real.__name__ != "memory_info":
        return

    def with_peak(self: Any) -> Any:
        return SimpleNamespace(rss=real(self).rss, peak_wset=real(self).rss)

    psutil.Process.memory_info = with_peak


def _locking(descriptor: int, mode: int, count: int) -> None:
    """`msvcrt.locking`, which takes no lock that another handle has."""
    assert mode == 2 and count == 1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def hide_places(system: str) -> None:
    """Let medseg open nothing in /proc, and on Windows no folder and no file of a wrong name."""

    def check(path: Any, makes: bool) -> None:
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        text = os.fsdecode(text)
        if text.startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", text)
        if system == "windows" and makes:
            check_names(text)

    def open_(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if is_for_medseg():
            check(file, makes=any(letter in mode for letter in "wxa+"))
        return _real_open(file, mode, *rest, **more)

    def os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if is_for_medseg():
            check(path, makes=bool(flags & os.O_CREAT))
            is_folder = pathlib.Path(path).is_dir()
            if system == "windows" and is_folder and is_medseg(sys._getframe(1)):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            flags |= os.O_NONBLOCK  # Windows has no named pipes among its files, to wait for
        return _real_os_open(path, flags, *rest, **more)

    builtins.open = io.open = open_
    os.open = os_open

    class Library(ctypes.CDLL):
        def __init__(self, name: Any, *rest: Any, **more: Any) -> None:
            if is_medseg(sys._getframe(1)):
                raise OSError(f"{name}: there is no such library")
            super().__init__(name, *rest, **more)

    ctypes.CDLL = Library  # type: ignore[misc]


def check_names(path: str) -> None:
    """Refuse a path with a name that Windows does not take."""
    for name in path.split("/"):
        odd = re.search(r'[<>:"|?*\x00-\x1f\\]', name) or DEVICES.fullmatch(name)
        if name not in ("", ".", "..") and (odd or name.endswith((".", " "))):
            raise OSError(errno.EINVAL, f"Windows takes no such name: {name!r}", path)


def keep_what_is_open() -> None:
    """Let nobody rename, replace or remove a file that somebody has open, as on Windows."""

    def guarded(real: Callable[..., Any], paths: int, makes: int) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            places = [place(one, more) for one in arguments[:paths]]
            for one in places:
                if one is not None and is_open(one):
                    error = PermissionError(errno.EACCES, "it is open elsewhere", one)
                    error.winerror = 32  # type: ignore[attr-defined]
                    raise error
            if makes >= 0 and is_for_medseg():
                check_names(os.fsdecode(arguments[makes]))
            return real(*arguments, **more)

        return call

    def place(path: Any, more: dict[str, Any]) -> str | None:
        if isinstance(path, int):
            return None
        folder = more.get("dir_fd", more.get("src_dir_fd"))
        whole = pathlib.Path(os.fsdecode(path)).absolute()
        if folder is not None:
            whole = pathlib.Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path)
        return f"{os.path.realpath(whole.parent)}/{whole.name}"

    for name, paths, makes in (
        ("unlink", 1, -1), ("remove", 1, -1), ("rename", 2, 1), ("replace", 2, 1), ("mkdir", 0, 0),
    ):  # fmt: skip
        setattr(os, name, guarded(getattr(os, name), paths, makes))


def is_open(path: str) -> bool:
    """Whether a file, or a file in a folder, is open or mapped: here, or if it is one of medseg's
    temporary ones, in any process.
    """
    everybody = path.rpartition("/")[2].startswith(".medseg-")
    inside = f"{path}/"
    opened = (one for one in open_files("*" if everybody else "self"))
    return any(one == path or one.startswith(inside) for one in opened)


def open_files(process: str) -> Iterator[str]:
    """The files that a process has open, or those of all for '*'."""
    everybody = (one for one in pathlib.Path("/proc").iterdir() if one.name.isdigit())
    for one in everybody if process == "*" else [pathlib.Path("/proc", process)]:
        try:
            for link in (one / "fd").iterdir():
                try:
                    if stat.S_ISREG(link.stat().st_mode):
                        yield str(link.readlink())
                except OSError:
                    continue
            with _real_open(one / "maps", encoding="utf-8", errors="replace") as lines:
                yield from {line.split(maxsplit=5)[5].rstrip() for line in lines if "/" in line}
        except OSError:
            continue


def start_apart() -> None:
    """Let a process group of Windows be a session."""
    real = subprocess.Popen.__init__

    def init(self: Any, *rest: Any, creationflags: int = 0, **more: Any) -> None:
        if creationflags:
            more["start_new_session"] = True
        real(self, *rest, **more)

    subprocess.Popen.__init__ = init  # type: ignore[method-assign]


def count_in_bytes() -> None:
    """Let medseg read the largest memory in bytes, as macOS tells it."""
    real = resource.getrusage

    def usage(who: int) -> Any:
        values = list(real(who))
        if is_medseg(sys._getframe(1)):
            values[2] *= 1024
        return resource.struct_rusage(values)

    resource.getrusage = usage


def move_to(system: str) -> None:
    """Let this process be on another system from now on; once."""
    if type(sys).__name__ == "Elsewhere":
        return
    for module, names in MISSING[system].items():
        hide(module, names.split())
    tell_platform(system)
    hide_modules(system)
    hide_places(system)
    if system == "windows":
        keep_what_is_open()
        start_apart()
    else:
        count_in_bytes()


if os.environ.get("TESTED_SYSTEM"):
    move_to(os.environ["TESTED_SYSTEM"])
