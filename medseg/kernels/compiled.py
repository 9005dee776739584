"""numba's `njit` for every kernel, and the one place that decides where compiled code is kept.

Code that was compiled when medseg was installed lies in the folder `ahead` and is only read
(`medseg.kernels.build`). What is not there is compiled at its first call and kept where numba keeps
it: beside the source or in the user's cache. A package that is read-only and a home that is not
writable leave neither. Then it goes below the temporary folder into a private folder, or is not
kept at all, which costs half a minute in every run. Compiled code is a pickle: a folder of somebody
else's is never looked into. No code is used whose sources have changed.
"""

from __future__ import annotations

import stat
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.runtime import rtsys

from medseg.errors import DataWarning
from medseg.kernels.stamps import kind_of_processor, stamp_of
from medseg.machine import HAS_MODES, is_private, may_others_write, user_number

#: Where code lies that was compiled ahead.
AHEAD = Path(__file__).with_name("ahead")


def njit(*, cache: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(**options)`; with `cache`, compiled code is looked for and kept where that can be
    done safely.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if cache:
            dispatcher._cache = _Places(function)  # numba's `enable_caching` sets the same
        return dispatcher

    return compiled


class _Places(NullCache):
    """Where a kernel's code is looked for, and where it is kept. Neither is touched before its
    first call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        try:  # now: the file may be another one by the time of the first call
            self._stamp = stamp_of(function.__code__.co_filename)
        except OSError:  # a function that lies in no file
            self._stamp = ""

    @cached_property
    def _ahead(self) -> CodeAhead | None:
        kind = kind_of_processor()
        if not (self._stamp and kind and _is_ours(AHEAD)):
            return None
        return CodeAhead(self._function, self._stamp, AHEAD, kind=kind)

    @cached_property
    def _own(self) -> _Cache | None:
        if not self._stamp:
            return None
        return _usual_cache(self._function, self._stamp) or _private_cache(
            self._function, self._stamp
        )

    @property
    def cache_path(self) -> str | None:
        """Where code is kept."""
        return None if self._own is None else self._own.cache_path

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None if it has to be compiled."""
        code = None if self._ahead is None else self._ahead.load_overload(sig, target_context)
        if code is None and self._own is not None:
            code = self._own.load_overload(sig, target_context)
        return code

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if there is a place and room for it."""
        if self._own is None:
            _warn("no folder is writable for it")
        else:
            self._own.save_overload(sig, data)


class _Cache(FunctionCache):
    """A cache whose loss costs time and nothing else: damaged files, a full disk, a folder that
    went away.
    """

    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None if it has to be compiled."""
        try:
            # numba's own method also loads all that compiling needs: 55 MB and a second of CPU,
            # which code that is compiled already has no use for. A compilation loads it itself.
            rtsys.initialize(target_context)
            _spare_linear_algebra()
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


@cache
def _spare_linear_algebra() -> None:
    """Load numba's functions of arrays, which compiled code names, without scipy.linalg.

    On import they only ask whether it is there, by loading it: 0.2 s of CPU and 20 MB. medseg
    depends on scipy, and compiling what multiplies matrices asks again.
    """
    from numba.np import linalg

    asks, linalg.ensure_blas = linalg.ensure_blas, lambda: None
    try:
        import numba.np.arraymath
    finally:
        linalg.ensure_blas = numba.np.arraymath.ensure_blas = asks


class _Ahead:
    """Finds the place of code compiled ahead for numba, which asks for one by a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Ahead:
        """Always one."""
        return cls(function)

    def get_cache_path(self) -> str:
        """The folder."""
        return str(AHEAD)

    def ensure_cache_path(self) -> None:
        """It was made by who writes to it."""

    def get_source_stamp(self) -> str:
        """None: `_Cache` stamps the files itself."""
        return ""

    def get_disambiguator(self) -> str:
        """What tells functions of one name apart."""
        return str(self._line)


class _AheadFiles(FunctionCache._impl_class):
    _locator_classes = [_Ahead]  # noqa: RUF012 - as numba has it


class CodeAhead(_Cache):
    """A function's code in a folder, for one of `medseg.kernels.stamps.KINDS` of processors instead
    of this very one. `medseg.kernels.build` saves to it, and nothing else does.
    """

    _impl_class = _AheadFiles

    def __init__(self, function: Callable[..., Any], stamp: str, folder: Path, kind: str) -> None:
        super().__init__(function, stamp)
        self._kind = kind
        base = self._impl.filename_base
        self._cache_file = IndexDataCacheFile(str(folder / kind), base, stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save a compiled function. Raises `OSError`."""
        FunctionCache.save_overload(self, sig, data)

    def flush(self) -> None:
        """What was compiled ahead stays, even if damaged: somebody else may be reading it."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        of_signature, of_machine, of_code = super()._index_key(sig, codegen)
        return of_signature, (of_machine[0], self._kind), of_code


@cache
def _is_ours(folder: Path) -> bool:
    """Whether a folder belongs to this user or to whom medseg belongs, and others cannot write."""
    try:
        about = folder.stat()
    except OSError:
        return False
    owners = {user_number(), Path(__file__).stat().st_uid}
    return about.st_uid in owners and not may_others_write(about)


def _usual_cache(function: Callable[..., Any], stamp: str) -> _Cache | None:
    """The cache where numba would put it, unless others may write there: beside the source, or in
    the home.
    """
    try:
        disk_cache = _Cache(function, stamp)
        owners = {user_number(), Path(function.__code__.co_filename).stat().st_uid}
        about = Path(disk_cache.cache_path).stat()
    except (RuntimeError, OSError):  # no place, or one that went away just now
        return None
    return disk_cache if about.st_uid in owners and not may_others_write(about) else None


def _private_cache(function: Callable[..., Any], stamp: str) -> _Cache | None:
    """The cache below the temporary folder."""
    folder = private_folder()
    if folder is None:
        return None
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)  # read while a cache is made, and not after that
    try:
        return _Cache(function, stamp)
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
        place = Path(tempfile.gettempdir())
        if not (HAS_MODES or place.resolve().is_relative_to(Path.home().resolve())):
            return None
        folder = place / f"medseg-{user_number()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except (OSError, RuntimeError):  # also if there is no temporary folder, or no home, at all
        return None
    return folder if stat.S_ISDIR(about.st_mode) and is_private(about) else None


@cache
def _warn(why: str) -> None:
    """Once."""
    warnings.warn(
        f"compiled code cannot be kept ({why}), so every run takes about half a minute longer; "
        "make the home or the temporary folder writable",
        DataWarning,
        stacklevel=2,
    )
