"""Readers and writers of installed packages, held to what medseg's own are held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from medseg import packages
from medseg.errors import BadFile, BadOutput, MedsegError
from medseg.io.voxels import check_axes
from medseg.labels import LabelTable
from medseg.volume import Volume


class Reader(Protocol):
    """What reads a format: a function, or an object of a subclass of this.

    An installed package adds it by an entry point of the group 'medseg.readers' whose name is the
    suffix.
    """

    def __call__(
        self,
        path: str | Path,
        *,
        volume_index: int | None = None,
        assume_geometry: str | None = None,
    ) -> Volume:
        """The volume in a file, right, or a `BadFile` with one sentence that names the file."""


class Writer(Protocol):
    """What writes a format: a function, or an object of a subclass of this.

    An installed package adds it by an entry point of the group 'medseg.writers' whose name is the
    suffix.
    """

    def __call__(
        self, volume: Volume, path: str | Path, *, table: LabelTable | None = None
    ) -> None:
        """Write a volume, whole or not at all. table: what labels mean, where they are labels."""


def added_suffixes(group: str) -> tuple[str, ...]:
    """The suffixes that installed packages add, longer ones first."""
    suffixes = (name for name in packages.added(group) if name.startswith("."))
    return tuple(sorted(suffixes, key=lambda name: (-len(name), name)))


def added_reader(suffix: str) -> Callable[..., Volume]:
    """The reader that a package adds for a suffix. Raises `BadConfig` if it cannot be loaded."""
    return partial(_read, suffix)


def added_writer(suffix: str) -> Callable[..., None]:
    """The writer that a package adds for a suffix. Raises `BadConfig` if it cannot be loaded."""
    return partial(_write, suffix)


@cache
def _made(group: str, suffix: str) -> Callable[..., Any]:
    """What the package adds; of a class an object."""
    loaded = packages.load(group, suffix)
    made: Callable[..., Any] = loaded() if isinstance(loaded, type) else loaded
    return made


def _read(suffix: str, path: str | Path, **options: Any) -> Volume:
    package = packages.package_of(packages.READERS, suffix)
    try:
        volume = _made(packages.READERS, suffix)(path, **options)
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # its code is not ours
        raise BadFile(
            f"{path}: the reader of {package} stopped with {type(error).__name__}; the file is"
            " damaged, or the reader is"
        ) from error
    if not isinstance(volume, Volume):
        kind = type(volume).__name__
        raise BadFile(f"{path}: the reader of {package} gave {kind} and no medseg.Volume")
    check_axes(path, volume.shape)
    if volume.data.dtype.kind not in "buif":
        raise BadFile(f"{path}: the reader of {package} gave {volume.data.dtype}, not numbers")
    return volume


def _write(suffix: str, volume: Volume, path: str | Path, **options: Any) -> None:
    package = packages.package_of(packages.WRITERS, suffix)
    try:
        _made(packages.WRITERS, suffix)(volume, path, **options)
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # its code is not ours
        raise BadOutput(
            f"{path}: the writer of {package} stopped with {type(error).__name__}"
        ) from error
