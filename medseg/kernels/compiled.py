"""numba's `njit` for every kernel, and the one place that decides where compiled code is kept.

numba keeps it beside the source or in the user's cache. A package that is read-only and a home that
is not writable leave neither. Then it goes below the temporary folder into a private folder, or is
not kept at all, which costs half a minute in every run. Compiled code is a pickle: a folder of
somebody else's is never looked into.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys

from medseg.errors import DataWarning


def njit(*, cache: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(**options)`; with `cache`, compiled code is kept where that can be done
    safely.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        kept = (_usual_cache(function) or _private_cache(function)) if cache else None
        if kept is not None:
            dispatcher._cache = kept  # numba's own `enable_caching` sets the same attribute
        elif cache:
            _warn("no folder is writable for it")
        return dispatcher

    return compiled


class _Cache(FunctionCache):
    """A cache whose loss costs time and nothing else: damaged files, a full disk, a folder that
    went away.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None if it has to be compiled."""
        try:
            # numba's own method also loads all that compiling needs: 55 MB and a second of CPU,
            # which code that is compiled already has no use for. A compilation loads it itself.
            rtsys.initialize(target_context)
            with self._guard_against_spurious_io_errors():
                return self._load_overload(sig, target_context)
        except Exception:  # a damaged pickle raises anything
            with suppress(OSError):  # then saving fails too, and says so
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if there is room for it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(error.strerror or "its folder cannot be written")


def _usual_cache(function: Callable[..., Any]) -> _Cache | None:
    """The cache where numba would put it, unless others may write there: beside the source, or in
    the home.
    """
    try:
        found = _Cache(function)
    except (RuntimeError, OSError):  # no place, or one that went away just now
        return None
    owners = {os.geteuid(), Path(function.__code__.co_filename).stat().st_uid}
    about = Path(found.cache_path).stat()
    return found if about.st_uid in owners and not about.st_mode & stat.S_IWOTH else None


def _private_cache(function: Callable[..., Any]) -> _Cache | None:
    """The cache below the temporary folder."""
    folder = private_folder()
    if folder is None:
        return None
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)  # read while a cache is made, and not after that
    try:
        return _Cache(function)
    except (RuntimeError, OSError):
        return None
    finally:
        numba.config.CACHE_DIR = before


@cache
def private_folder() -> Path | None:
    """A folder of this user's alone below the temporary folder, which stays; None if there can be
    none.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"medseg-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError:  # also if there is no temporary folder at all
        return None
    ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()
    return folder if ours and not about.st_mode & 0o077 else None


@cache
def _warn(why: str) -> None:
    """Once."""
    warnings.warn(
        f"compiled code cannot be kept ({why}), so every run takes about half a minute longer; "
        "make the home or the temporary folder writable",
        DataWarning,
        stacklevel=2,
    )
