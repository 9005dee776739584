"""Object stores: scans that lie in one, and outputs of cohorts. The only file that knows fsspec
(https://filesystem-spec.readthedocs.io).

Credentials come from where each store's library looks for them (environment, configuration, the
role of the machine), are never part of an address, and what a library says is never repeated, since
it may quote them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.text import harmless

#: Stores by the beginning of their addresses, and the package that each needs. fsspec knows many
#: more kinds of addresses, of which some run code or read any file of this machine.
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "abfss": "adlfs", "memory": "fsspec",
}  # fmt: skip
#: Stores whose addresses name an account behind an @.
_WITH_ACCOUNT = ("abfs", "abfss")
#: From so many scans below one place on, it is listed instead of asking for each.
_LISTED = 50
#: Objects asked for at a time, and bytes read at a time.
_THREADS, _PIECE = 16, 1 << 20
#: Small objects that are read at a time.
_BATCH = 500
#: What a store tells of an object's content or its time, the best first.
_MARKS = (
    "ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime",
    "created",
)  # fmt: skip
#: What fsspec takes for a pattern of names.
_MAGIC = re.compile(r"[*?\[]")
#: Headers whose voxels lie in a file beside them.
_HEADERS = (".hdr", ".img", ".mhd", ".nhdr")


def is_store(text: str | os.PathLike[str]) -> bool:
    """Whether a text is the address of an object store."""
    kind, separator, _ = str(text).partition("://")
    return bool(separator) and kind.lower() in PACKAGES


def check_address(address: str) -> None:
    """Raise `BadConfig` for an address with what does not belong there."""
    kind, _, rest = address.partition("://")
    kind, bucket = kind.lower(), rest.partition("/")[0]
    before, at, _ = bucket.rpartition("@")
    if at and (":" in before or kind not in _WITH_ACCOUNT):
        raise BadConfig(
            f"an address of {kind}:// holds credentials; leave them out, they come from the"
            " environment or the configuration of the store's library"
        )
    if "?" in address or "#" in address or not bucket:
        raise BadConfig(
            f"an address of {kind}:// is not plain; write it as {kind}://bucket/folder, without ?"
            " and #"
        )


class Store:
    """A place in an object store. Raises `BadConfig` where its library is missing."""

    def __init__(self, address: str) -> None:
        check_address(address)
        self.address = address.rstrip("/")
        self._fs, path = _opened(self.address)
        self._root = path.rstrip("/")

    def names(self) -> list[str]:
        """The names of all objects below the place. Raises `BadFile`."""
        self._fs.invalidate_cache()
        try:
            paths = self._fs.find(self._root)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise BadFile(_sentence(error, self.address)) from None
        begin = f"{self._root}/"
        return [path.removeprefix(begin) for path in paths if path.startswith(begin)]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Small objects with their content, in any order; without those that are gone. Raises
        `BadFile`.
        """
        paths = [self._path(name) for name in names]
        for start in range(0, len(paths), _BATCH):
            some = paths[start : start + _BATCH]
            # What `cat` would take for a pattern is asked for by itself.
            plain = [path for path in some if not _MAGIC.search(path)]
            try:
                contents = self._fs.cat(plain, on_error="return") if plain else {}
                contents |= {one: self._content(one) for one in some if one not in plain}
            except Exception as error:
                raise BadFile(_sentence(error, self.address)) from None
            for path in some:
                content = contents.get(path)
                if isinstance(content, bytes):
                    yield path.removeprefix(f"{self._root}/"), content
                elif not isinstance(content, FileNotFoundError):
                    raise BadFile(_sentence(content, self.address))

    def _content(self, path: str) -> bytes | FileNotFoundError:
        try:
            return bytes(self._fs.cat_file(path))
        except FileNotFoundError as error:
            return error

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, whole or not at all. Raises `BadOutput`."""
        try:
            self._fs.pipe_file(self._path(name), content)
        except Exception as error:
            raise BadOutput(_sentence(error, self.address)) from error

    def write_once(self, name: str, content: bytes) -> bytes:
        """Write an object that is not there yet; returns what is there then. Raises `BadOutput`.

        Where the store cannot refuse to overwrite, what is written is read again, so that of two
        who write at the same moment both get the later one, unless the earlier was read before.
        """
        path = self._path(name)
        try:
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                pass
            except (TypeError, ValueError, NotImplementedError):
                if not self._fs.exists(path):
                    self._fs.pipe_file(path, content)
            return bytes(self._fs.cat_file(path))
        except Exception as error:
            raise BadOutput(_sentence(error, self.address)) from error

    def put(self, file: Path, name: str) -> None:
        """Upload a file, which appears whole or not at all. Raises `BadOutput`."""
        try:
            self._fs.put_file(str(file), self._path(name))
        except Exception as error:
            raise BadOutput(_sentence(error, self.address)) from error

    def remove(self, name: str) -> None:
        """Remove an object, if it is there. Raises `BadOutput`."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            pass
        except Exception as error:
            raise BadOutput(_sentence(error, self.address)) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def fetch(address: str, folder: Path) -> Path:
    """An object or what lies below a place, whole, in a local folder; returns its path there.

    Headers come with what is beside them under the same name. Raises `BadFile`, `BadConfig`.
    """
    check_address(address)
    files, path = _opened(address.rstrip("/"))
    name = _plain_name(PurePosixPath(path).name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        sizes = _inside(files, path)
        for one, size in sizes.items():
            below = PurePosixPath(one).relative_to(path)
            target = folder / name if one == path else folder.joinpath(name, *below.parts)
            _get(files, one, target, size=size)
        if path in sizes and PurePosixPath(path).suffix.lower() in _HEADERS:
            for one in _companions(files, path):
                _get(files, one, folder / _plain_name(PurePosixPath(one).name), size=None)
    except MedsegError:
        raise
    except Exception as error:
        raise BadFile(_sentence(error, address)) from None
    return folder / name


def states_of(addresses: Sequence[str], *, verify: bool = False) -> dict[str, Any]:
    """What is known of each scan in a store, to see whether it is the same as before: size and what
    the store tells of its content (or its time), with `verify` its hash; None for what is not
    there. Raises `BadConfig` where a store cannot be asked.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for address in addresses:
        check_address(address)
        groups[address.rstrip("/").rpartition("/")[0]].append(address)
    states: dict[str, Any] = {}
    singles: list[str] = []
    for parent, some in groups.items():
        listed = _list(parent) if len(some) >= _LISTED and not verify else {}
        for address in some:
            info = listed.get(address.rstrip("/").rpartition("/")[2])
            if info is None or info["type"] == "directory":
                singles.append(address)
            else:
                states[address] = _state(info)
    with ThreadPoolExecutor(_THREADS) as pool:
        for address, state in zip(singles, pool.map(lambda one: _ask(one, verify), singles)):
            states[address] = state
    return states


def _opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and its path in it. Raises `BadConfig`."""
    kind, _, rest = address.partition("://")
    files = _file_system(kind.lower())
    return files, str(files._strip_protocol(f"{kind.lower()}://{rest}"))


def _file_system(kind: str) -> Any:
    """fsspec's file system of a kind of address. Raises `BadConfig`."""
    try:
        import fsspec

        return fsspec.filesystem(kind, **_options(kind))
    except ImportError:
        package = PACKAGES[kind]
        raise BadConfig(
            f'{kind}:// needs {package}, which is not installed: pip install "medseg[stores]"'
            + ("" if package in ("s3fs", "fsspec") else f" {package}")
        ) from None
    except Exception as error:
        raise BadConfig(_sentence(error, f"{kind}://")) from None


def _options(kind: str) -> dict[str, Any]:
    return {"use_listings_cache": False} if kind not in ("memory", "local") else {}


def _inside(files: Any, path: str) -> Mapping[str, int | None]:
    """The objects that an address stands for, with their sizes."""
    info = files.info(path)
    if info["type"] != "directory":
        return {path: info.get("size")}
    inside = {one: about.get("size") for one, about in files.find(path, detail=True).items()}
    if not inside:
        raise FileNotFoundError
    return inside


def _companions(files: Any, path: str) -> list[str]:
    """What lies beside a header under its name."""
    place = PurePosixPath(path)
    begin = f"{place.stem.lower()}."
    paths = [one["name"] for one in files.ls(str(place.parent), detail=True)]
    return [
        one for one in paths if one != path and PurePosixPath(one).name.lower().startswith(begin)
    ]


def _get(files: Any, path: str, target: Path, size: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if any(part in ("", ".", "..") for part in PurePosixPath(path).parts[1:]):
        raise BadFile("an object in the store has a name that no file can have; rename it")
    files.get_file(path, str(target))
    if size is not None and target.stat().st_size != size:
        raise BadFile("the store sent less than it has of the scan; try again")


def _plain_name(name: str) -> str:
    """The name of an object as that of a file. Raises `BadFile`."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BadFile(f"'{harmless(name)}' cannot be the name of a file; rename the object")
    return name


def _list(parent: str) -> dict[str, Any]:
    """What lies in a place, by name; nothing where it cannot be listed."""
    files, path = _opened(parent)
    try:
        entries = files.ls(path, detail=True)
    except (FileNotFoundError, PermissionError):
        return {}
    except Exception as error:
        raise BadConfig(_sentence(error, parent)) from None
    return {PurePosixPath(one["name"]).name: one for one in entries}


def _ask(address: str, verify: bool) -> Any:
    files, path = _opened(address.rstrip("/"))
    try:
        info = files.info(path)
        if info["type"] != "directory":
            return _hash(files, path) if verify else _state(info)
        inside = sorted(files.find(path, detail=True).items())
        return [
            [one.removeprefix(f"{path}/"), _hash(files, one) if verify else _state(about)]
            for one, about in inside
        ]
    except (FileNotFoundError, PermissionError):
        return None  # its case says so
    except Exception as error:
        raise BadConfig(_sentence(error, address)) from None


def _state(info: Mapping[str, Any]) -> list[Any]:
    mark = next((info[name] for name in _MARKS if info.get(name)), "")
    return [info.get("size"), str(mark)]


def _hash(files: Any, path: str) -> str:
    digest = hashlib.sha256()
    with files.open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _sentence(error: object, address: str) -> str:
    """What is told of an error of a store, which is never what its library says."""
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{address}: there is no such bucket or object; check the address"
    if isinstance(error, PermissionError) or "Credential" in kind or "Auth" in kind:
        return (
            f"{address}: the store denies access; give medseg credentials that may use it, in the"
            " environment or the configuration of the store's library"
        )
    return f"{address}: the store does not answer as it should ({kind}); try again"
