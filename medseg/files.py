"""Files written whole or not at all, and the doors of `medseg.stream` for reading them.

Writing goes to a temporary file in the same folder, which is flushed and renamed: whoever reads the
final path sees the old file or the new one, never a part. A header may name a data file only in its
own folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from medseg.errors import BadFile, BadOutput
from medseg.machine import user_number
from medseg.stream import (
    CHUNK,
    DEFLATE_RATIO,
    MAX_BYTES,
    WINDOW_BITS,
    ByteStream,
    gunzip,
    open_file,
    read_bytes,
    read_text,
)

try:
    import fcntl
except ImportError:  # Windows, which has locks of another kind
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "DEFLATE_RATIO", "MAX_BYTES", "TEMPORARY", "ByteStream", "atomic_write", "compressor",
    "data_file", "file_hash", "file_state", "gunzip", "gzip_writer", "held", "ignores_case",
    "inside", "is_one_file", "link_or_copy", "open_file", "output_errors", "private_folder",
    "read_bytes", "read_text", "sweep", "take_lock", "write_once", "written_together",
]  # fmt: skip

#: Temporary files begin with this, so that leftovers of killed runs can be found.
TEMPORARY = ".medseg-"
#: The file that holds a folder, where the folder itself cannot be locked.
_HELD = f"{TEMPORARY}held"
#: What Windows says of a file that another program has open (winerror.h).
_SHARING_VIOLATION = 32


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """An open binary file whose content appears at `path` in one step when the block ends, or not
    at all.

    Raises `BadOutput` naming `path` if the place cannot be written; the old file then stays as it
    was.
    """
    final = Path(os.path.realpath(path))  # a link keeps pointing at the file it pointed at
    temporary = final.parent / f"{TEMPORARY}{secrets.token_hex(12)}"
    try:
        if final.exists() and not final.is_file():
            raise BadOutput(f"{path}: is not an ordinary file; choose another name")
        with temporary.open("xb") as file:
            # The lock only tells `sweep` that we are alive; some file systems have none, and
            # Windows does not remove what is open.
            if fcntl is not None:
                with suppress(OSError):
                    take_lock(file.fileno())
            _keep_permissions(final, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)  # closed, or Windows would refuse
        if not final.parent.name.startswith(TEMPORARY):  # of a private folder nothing stays
            _sync_folder(final.parent)
    except OSError as error:
        raise BadOutput(f"{path}: cannot be written: {_remedy(error, final.parent)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _keep_permissions(old: Path, new: Path) -> None:
    """Give a file that takes the place of another one that one's permissions: who kept it from
    others wants that of what comes after it as well.
    """
    with suppress(OSError):  # there is none, or the file system has none
        shutil.copymode(old, new)


@contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """What the system says against writing at a path as `BadOutput` that names it."""
    try:
        yield
    except OSError as error:
        text = _remedy(error, Path(path).parent)
        raise BadOutput(f"{path}: cannot be written: {text}") from error


def write_once(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; of several who do so at once the first one's stays.

    Raises `BadOutput`.
    """
    if path.exists():
        return
    own = path.with_name(f"{TEMPORARY}{secrets.token_hex(12)}")  # what a kill leaves is swept
    try:
        with atomic_write(own) as file:
            file.write(content)
    except BadOutput as error:
        raise BadOutput(str(error).replace(str(own), str(path))) from None
    try:
        path.hardlink_to(own)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        own.replace(path)
    own.unlink(missing_ok=True)


def sweep(folder: str | Path, *, min_age_s: float = 60) -> int:
    """Remove temporary files that killed runs left in `folder`; returns how many. Files in use are
    left alone.
    """
    count = 0
    with suppress(OSError):
        for path in Path(folder).glob(f"{TEMPORARY}*"):
            if not re.fullmatch(r"\.medseg-[0-9a-f]{24}", path.name):
                continue
            with suppress(OSError):
                if time.time() - path.stat().st_mtime >= min_age_s:
                    _remove_unused(path)
                    count += 1
    return count


def _remove_unused(path: Path) -> None:
    """Remove a file. Raises `OSError` while its writer lives."""
    if fcntl is None:
        path.unlink()
        return
    with path.open("rb") as file:
        take_lock(file.fileno())
        path.unlink()


def take_lock(descriptor: int) -> None:
    """Lock an open file for this process alone, until it is closed or the process is gone.

    Raises `BlockingIOError` if another process holds it, `OSError` where there are no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    windows: Any = msvcrt
    try:
        windows.locking(descriptor, windows.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(error.errno, error.strerror) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, as long as the block runs.

    Raises `BlockingIOError` if another process holds it, `OSError` where there are no locks, and
    for a link.
    """
    if fcntl is None:  # Windows opens no folders
        mark = folder / _HELD
        with mark.open("ab") as file:
            take_lock(file.fileno())
            try:
                yield
            finally:
                file.close()
                with suppress(OSError):
                    mark.unlink()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        take_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def written_together() -> Iterator[Callable[[str | Path], Path]]:
    """Files that belong together: when the block ends all of them appear, or all that was there
    stays as it was.

    The block gets a function from a file's final path to the path where the block has to write it,
    whole, before it asks for the next one. The file asked for last describes the others: its older
    version is removed first and its new one appears last, so that a kill at any moment leaves it
    missing or beside the files that it is about. Data files that a writer puts beside a header come
    along. Folders that are missing are made. Raises `BadOutput` naming the final path.
    """
    files: list[tuple[Path, Path]] = []  # where it is written, where it appears
    folders: dict[Path, Path] = {}  # of final files: the private folder in it
    new_folders: list[Path] = []
    with ExitStack() as stack:

        def stage(path: str | Path) -> Path:
            final = Path(os.path.realpath(path))  # a link keeps pointing at the file it pointed at
            home = final.parent
            try:
                if final.exists() and not final.is_file():
                    raise BadOutput(f"{path}: is not an ordinary file; choose another name")
                if home not in folders:
                    new_folders.extend(_make_folder(home))
                    folders[home] = stack.enter_context(private_folder(home))
            except OSError as error:
                raise BadOutput(f"{path}: cannot be written: {_remedy(error, home)}") from None
            files.append((folders[home] / final.name, final))
            return files[-1][0]

        try:
            yield stage
            if files:
                _appear(files, folders)
        except BadOutput as error:  # where the files were on their way tells nobody anything
            text = str(error)
            for home, folder in folders.items():
                text = text.replace(str(folder), str(home))
            raise BadOutput(text) from None
        except OSError as error:
            raise BadOutput(
                f"{files[-1][1]}: cannot be written: {_remedy(error, files[-1][1].parent)}"
            ) from None
        finally:
            stack.close()
            for folder in reversed(new_folders):
                with suppress(OSError):  # it is not empty where all went well
                    folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were not there, from above."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _appear(files: Sequence[tuple[Path, Path]], folders: Mapping[Path, Path]) -> None:
    """Rename files that are written to their final paths; if one cannot be, or on a stop, bring all
    older ones back.
    """
    files = _with_data_files(files, folders)
    older: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for number, (path, final) in enumerate(files):
            if final.exists():
                _keep_permissions(final, path)
                older.append((folders[final.parent] / f"{TEMPORARY}older-{number}", final))
                link_or_copy(final, older[-1][0])
            else:
                new.append(final)
        files[-1][1].unlink(missing_ok=True)
        for path, final in files:
            path.replace(final)
    except BaseException:
        _bring_back(older, new)
        raise
    for home in folders:
        _sync_folder(home)


def _with_data_files(
    files: Sequence[tuple[Path, Path]], folders: Mapping[Path, Path]
) -> list[tuple[Path, Path]]:
    """The files with those that were written beside them, which a header refers to and go first."""
    paths = {path for path, _ in files}
    every = list(files)
    for home, folder in folders.items():
        beside = sorted(
            path for path in folder.iterdir() if path not in paths and path.name != _HELD
        )
        every = [*((path, home / path.name) for path in beside), *every]
    return every


def _bring_back(older: Sequence[tuple[Path, Path]], new: Sequence[Path]) -> None:
    """Put older files back where they were, and remove what was not there."""
    for final in new:
        final.unlink(missing_ok=True)
    for path, final in older:
        if path.exists():
            path.replace(final)


def link_or_copy(path: Path, copy: Path) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)


def is_one_file(path: str | Path, other: str | Path) -> bool:
    """Whether two names are of one file that is there."""
    try:
        return os.path.samefile(path, other)  # noqa: PTH121 - of texts
    except OSError:  # one of them is not there yet
        return False


def ignores_case(folder: Path) -> bool:
    """Whether names that differ in the case of their letters alone are one in a folder, or in the
    next one above that is there. Raises `BadOutput` where nothing can be written.
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    with private_folder(place) as probe:
        return probe.with_name(probe.name.upper()).exists()


@contextmanager
def private_folder(place: Path | None = None) -> Iterator[Path]:
    """A new folder that only this user may enter, gone with all it holds when the block ends,
    however it ends.

    place: the folder it lies in; without one that for temporary files. Its name is random and says
    nothing. What a killed process left behind is removed by the next one.
    """
    place = place or Path(tempfile.gettempdir())
    sweep_folders(place)
    folder = place / f"{TEMPORARY}{secrets.token_hex(12)}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise BadOutput(
            f"{place}: no folder for temporary files can be made in it: {_remedy(error, place)}"
        ) from None
    try:
        with ExitStack() as stack:
            with suppress(OSError):  # as in `atomic_write`
                stack.enter_context(held(folder))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:  # a second signal may have stopped the first attempt, and Windows keeps what is held
        shutil.rmtree(folder, ignore_errors=True)


def sweep_folders(place: str | Path, *, min_age_s: float = 60) -> int:
    """Remove private folders that killed processes of this user left in `place`; returns how
    many.
    """
    count = 0
    with suppress(OSError):
        for path in Path(place).glob(f"{TEMPORARY}*"):
            if not re.fullmatch(r"\.medseg-[0-9a-f]{24}", path.name):
                continue
            with suppress(OSError):
                about = path.lstat()
                is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == user_number()
                if is_ours and time.time() - about.st_mtime >= min_age_s:
                    with held(path):  # fails while its owner lives
                        shutil.rmtree(path, ignore_errors=True)
                    shutil.rmtree(path, ignore_errors=True)
                    count += not path.exists()
    return count


def gzip_writer(file: BinaryIO) -> tuple[Callable[[bytes | memoryview], None], Callable[[], None]]:
    """Two functions, `write` and `finish`, that gzip into an open file.

    The header carries no time and no file name, so equal data gives equal bytes and no name leaks.
    """
    packer = compressor("gzip")

    def write(data: bytes | memoryview) -> None:
        file.write(packer.compress(data))

    def finish() -> None:
        file.write(packer.flush())

    return write, finish


def compressor(packing: str) -> Any:
    """A new compressor to 'gzip' or 'zlib' data, with `compress` and `flush` as `zlib.compressobj`
    has them.

    isal's level 2 packs as well as zlib's level 1 and 4 to 15 times as fast; where there is no
    isal, zlib does it.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.compressobj(1, zlib.DEFLATED, WINDOW_BITS[packing])
    return isal_zlib.compressobj(2, isal_zlib.DEFLATED, WINDOW_BITS[packing])


def inside(folder: str | Path, name: str) -> Path:
    """The path of the ordinary file `name`, which a header names, if it lies in `folder`; else
    `BadFile`.

    Absolute names, "..", URLs, and links that lead out of the folder are refused: a header must not
    be able to make medseg open anything else on the machine.
    """
    odd = not name or any(part in name for part in ("\0", "://", "\\"))
    if odd or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadFile(
            "its data file is named as lying outside its folder; put the data beside its header"
        )
    path = Path(folder) / name
    try:
        target, home = path.resolve(strict=True), Path(folder).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise BadFile(f"its data file '{path.name}' is missing; put it beside its header") from None
    if not target.is_relative_to(home):
        raise BadFile(
            f"its data file '{path.name}' is a link out of its folder; put the data beside its"
            " header"
        )
    if not target.is_file():
        raise BadFile(
            f"its data file '{path.name}' is not an ordinary file; put the data beside its header"
        )
    return path


def data_file(header: str | Path, name: str) -> Path:
    """The data file that a header names, if it lies in the header's folder. Raises `BadFile` naming
    the header.
    """
    try:
        return inside(Path(header).parent, name)
    except BadFile as error:
        raise BadFile(f"{header}: {error}") from None


def _remedy(error: OSError, folder: Path) -> str:
    if getattr(error, "winerror", None) == _SHARING_VIOLATION:
        return "another program has it open; close it there"
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        return "its folder does not exist; make the folder first"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "its folder is write-protected; choose another folder with -o"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            "the disk is full or a size limit is reached; free some space or choose another folder"
            " with -o"
        )
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long"
    return error.strerror or "unknown reason"


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def file_state(path: Path, *, verify: bool = False) -> Any:
    """Size and time of change in ns of a file, or with `verify` its hash, as a value for JSON; of a
    folder those of all in it, with their names. None for what is not there.
    """
    try:
        state = path.stat()
        if path.is_dir():
            with os.scandir(path) as entries:
                inside = sorted(entry.name for entry in entries)
            return [[name, file_state(path / name, verify=verify)] for name in inside]
    except OSError:
        return None
    return file_hash(path) if verify else [state.st_size, state.st_mtime_ns]
