"""Zips of models of other programs, unpacked to private folders that are gone when the process
ends."""

from __future__ import annotations

import atexit
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from medseg.errors import BadModel
from medseg.files import private_folder

#: Largest number of bytes taken out of one archive, and of its entries.
MAX_ARCHIVE_BYTES, MAX_ENTRIES = 24_000_000_000, 100_000

_HELD = ExitStack()
atexit.register(_HELD.close)
_OPENED: dict[tuple[Path, int, int], Path] = {}


def unpacked(
    path: Path,
    *,
    is_needed: Callable[[tuple[str, ...]], bool],
    nothing: Callable[[Sequence[str], Path], BadModel | None],
) -> Path:
    """A private folder with what is needed of a zip. Raises `BadModel` for one that is damaged,
    too large, or leads out of its folder.

    is_needed: told the parts of an entry's name; what it does not want, pickles first of all,
    stays packed. nothing: told the names of what is needed and of all else, says what is missing.
    """
    try:
        state = path.stat()
        key = (path.resolve(), state.st_mtime_ns, state.st_size)
        if key in _OPENED:
            return _OPENED[key]
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path, is_needed, nothing)
            folder = _HELD.enter_context(private_folder())
            left = MAX_ARCHIVE_BYTES
            for entry in members:
                left -= _extract(archive, entry, folder, most=left)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError):
        raise BadModel(f"{path}: is damaged or no zip; fetch the model again") from None
    except OSError as error:
        raise BadModel(f"{path}: cannot be read or unpacked ({error.strerror})") from None
    _OPENED[key] = folder
    return folder


def names_in(path: Path) -> list[str]:
    """The names of a zip's entries; none where it is no zip that can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return []


def _members(
    archive: zipfile.ZipFile,
    path: Path,
    is_needed: Callable[[tuple[str, ...]], bool],
    nothing: Callable[[Sequence[str], Path], BadModel | None],
) -> list[zipfile.ZipInfo]:
    """The entries that are needed. Raises `BadModel` if any entry of the archive is not what it
    should be."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise BadModel(f"{path}: holds {len(entries)} files, more than the {MAX_ENTRIES} allowed")
    for entry in entries:
        _check_entry(entry, path)
    members = [
        entry
        for entry in entries
        if _parts(entry) and not entry.is_dir()  # a damaged one may have no name
        if _parts(entry)[0] != "__MACOSX" and is_needed(_parts(entry))
    ]
    names = [entry.filename for entry in entries if _parts(entry)[:1] != ("__MACOSX",)]
    missing = nothing(names, path)
    if missing is not None:
        inner = [entry.filename for entry in entries if entry.filename.lower().endswith(".zip")]
        raise (
            missing
            if not inner
            else BadModel(
                f"{path}: holds the archive {inner[0]!r:.120}; unpack the outer one and give that"
            )
        )
    if sum(entry.file_size for entry in members) > MAX_ARCHIVE_BYTES:
        raise BadModel(f"{path}: unpacks to more than the {MAX_ARCHIVE_BYTES / 1e9:.0f} GB allowed")
    return members


def _parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    return PurePosixPath(entry.filename).parts


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    """Raise `BadModel` for an entry that would lie elsewhere, is a link, or is encrypted."""
    name = entry.filename
    odd = "\\" in name or "\0" in name or ":" in name.split("/", 1)[0]
    if odd or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BadModel(
            f"{path}: holds {name!r:.120}, which would lie outside its folder; it is not unpacked"
        )
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise BadModel(f"{path}: holds the link {name!r:.120}; it is not unpacked")
    if entry.flag_bits & 1:
        raise BadModel(f"{path}: is encrypted; unpack it first")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, most: int) -> int:
    """Unpack one entry; returns how many bytes it held, whatever it claimed."""
    target = folder.joinpath(*PurePosixPath(entry.filename).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with archive.open(entry) as source, target.open("xb") as sink:
        while piece := source.read(1 << 20):
            count += len(piece)
            if count > most:
                raise BadModel(
                    f"{archive.filename}: unpacks to more than the {MAX_ARCHIVE_BYTES / 1e9:.0f} GB"
                    " allowed"
                )
            sink.write(piece)
    return count
