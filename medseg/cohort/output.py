"""The output of a cohort: a folder, or a place in an object store.

A store has neither renaming nor locks. What holds there: an object appears whole or not at all, and
the record, which is put last, says that a case is done. Each attempt is an object of its own
(CASE.1, CASE.2 ...). What is read often is kept in a private folder here, in the form that an
output on a disk has.
"""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medseg.cohort.attempts import lines_of
from medseg.cohort.places import Places, shelf
from medseg.cohort.records import names_on_shelves
from medseg.cohort.request import Request
from medseg.cohort.stores import Store, is_store
from medseg.errors import BadOutput
from medseg.files import TEMPORARY, private_folder

#: What `gather` makes.
_TABLES = ("table.csv", "table_long.csv", "table.parquet")
_REPORT = "report.html"


class Output:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        """What a worker is told of where results go."""
        return str(self.folder.absolute())

    def make(self) -> None:
        """Make the folder. Raises `BadOutput`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOutput(
                f"{self.folder}: cannot be made: {error.strerror}; choose another with -o"
            ) from None

    def places(self, request: Request) -> Places:
        """Where the results of a request lie."""
        return request.places(self.folder)

    def names(self, kind: str) -> set[str]:
        """Names of the files of a kind, 'records' or 'attempts'."""
        return set(names_on_shelves(self.folder / kind))

    def bring_records(self, names: Iterable[str]) -> None:
        """Have the records of these cases in the folder."""

    def bring_attempts(self, names: Iterable[str]) -> None:
        """Have the attempts at these cases in the folder."""

    def keep(self, path: Path) -> None:
        """Let a file that was written into the folder last. Raises `BadOutput`."""

    def keep_attempt(self, path: Path, number: int) -> None:
        """Let what was written of an attempt last. Raises `BadOutput`."""

    def keep_top(self) -> None:
        """Let what lies on top of the folder last. Raises `BadOutput`."""

    def keep_log(self, path: Path) -> None:
        """Let a log last."""

    def keep_report(self, pages: int) -> None:
        """Let tables and the report last, of so many pages. Raises `BadOutput`."""

    def agree(self, path: Path) -> None:
        """Of a file that others write too, have the first one's. Raises `BadOutput`."""


class StoreOutput(Output):
    """A place in a store; folder: where what is read and written here lies meanwhile."""

    def __init__(self, address: str, folder: Path) -> None:
        super().__init__(folder)
        self._store = Store(address)
        self._names = frozenset(self._store.names())
        self._top: dict[str, bytes] = {}
        top = [name for name in self._names if "/" not in name and name not in (*_TABLES, _REPORT)]
        for name, content in self._store.read(top):
            self._top[name] = content
            (folder / name).write_bytes(content)

    @property
    def address(self) -> str:
        """What a worker is told of where results go."""
        return self._store.address

    def places(self, request: Request) -> Places:
        """Where the results of a request lie."""
        return replace(request.places(self.folder), names=self._names)

    def names(self, kind: str) -> set[str]:
        """Names of the files of a kind, 'records' or 'attempts'."""
        names = {name.rpartition("/")[2] for name in self._names if name.startswith(f"{kind}/")}
        return {name.rpartition(".")[0] for name in names} if kind == "attempts" else names

    def bring_records(self, names: Iterable[str]) -> None:
        """Have the records of these cases in the folder."""
        paths = (f"records/{shelf(name)}/{name}.json" for name in names)
        for name, content in self._store.read(one for one in paths if one in self._names):
            self._write(name, content)

    def bring_attempts(self, names: Iterable[str]) -> None:
        """Have the attempts at these cases in the folder."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for name in self._names:
            case, _, number = name.rpartition(".")
            if name.startswith("attempts/") and number.isdigit():
                numbers[case].append(int(number))
        cases = [f"attempts/{shelf(name)}/{name}" for name in names]
        paths = [f"{one}.{number}" for one in cases for number in sorted(numbers[one])]
        contents = dict(self._store.read(paths))
        for one in cases:
            parts = [contents.get(f"{one}.{number}", b"") for number in sorted(numbers[one])]
            if parts:
                self._write(one, b"".join(parts))

    def keep(self, path: Path) -> None:
        """Upload a file. Raises `BadOutput`."""
        self._store.put(path, path.relative_to(self.folder).as_posix())

    def keep_attempt(self, path: Path, number: int) -> None:
        """Write the object of an attempt: its lines of the file. Raises `BadOutput`."""
        lines = [
            json.dumps(line)
            for line in lines_of(path)
            if number in (line.get("begun"), line.get("ended"))
        ]
        name = f"{path.relative_to(self.folder).as_posix()}.{number}"
        self._store.write(name, "".join(f"{line}\n" for line in lines).encode())

    def keep_top(self) -> None:
        """Upload what lies on top of the folder and changed. Raises `BadOutput`."""
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(TEMPORARY):  # what holds the folder, on Windows
                continue
            if path.is_file() and self._top.get(path.name) != (content := path.read_bytes()):
                self._store.write(path.name, content)
                self._top[path.name] = content

    def keep_log(self, path: Path) -> None:
        """Upload a log under a name of its own, for objects do not grow."""
        if path.is_file():
            name = f"log/{path.stem}-{secrets.token_hex(4)}{path.suffix}"
            self._store.put(path, name)

    def keep_report(self, pages: int) -> None:
        """Upload tables and pages, the first page last; remove pages of a longer list."""
        files = [self.folder / name for name in _TABLES]
        files += [self.folder / "pages" / f"{number}.html" for number in range(1, pages + 1)]
        for path in (*files, self.folder / _REPORT):
            if path.is_file():
                self.keep(path)
        number = pages + 1
        while (name := f"pages/{number}.html") in self._names:
            self._store.remove(name)
            number += 1

    def agree(self, path: Path) -> None:
        """Of a file that others write too, have the first one's. Raises `BadOutput`."""
        content = self._store.write_once(path.name, path.read_bytes())
        self._top[path.name] = content
        path.write_bytes(content)

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def open_output(out: Path | str) -> Iterator[Output]:
    """The output at a path or an address, as long as the block runs. Raises `BadConfig` for a store
    whose library is missing, `BadFile` where it cannot be read.
    """
    if not is_store(out):
        yield Output(Path(out))
        return
    with private_folder() as folder:
        yield StoreOutput(str(out), folder)


def put_case(store: Store, folder: Path, record: str) -> None:
    """Upload what a worker wrote of a case into a folder of its own, the record last and after the
    older one is gone, so that a record is never beside files that it is not about.

    record: its path below the folder. Raises `BadOutput`.
    """
    files = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(TEMPORARY)]
    names = [path.relative_to(folder).as_posix() for path in files if path.is_file()]
    names = [name for name in names if name != record]
    if names:
        store.remove(record)
    for name in names:
        store.put(folder / name, name)
    store.put(folder / record, record)
