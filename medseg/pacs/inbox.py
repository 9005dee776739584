"""The series that `medseg listen` has received and not yet delivered, in a private folder that
outlives the program.

An instance is on the disk before its sender is told so, and stays there until the results of its
series are delivered. A start takes up what an earlier run left: a series whose senders had all said
goodbye is segmented, another one waits for the rest. What cannot be used is kept, within the
limits, and a full folder refuses what is new.

For each series there is a folder with its instances; beside it, under the same name, `.results`
once it is segmented, and `.state`: 'whole', or 'broken: WHY'. Without a state it is on its way in.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import BadConfig, BadFile
from medseg.files import atomic_write, held
from medseg.machine import is_private
from medseg.pacs.client import Limits, uids_of

#: A series is given this much more time to go on while its sender is still there.
PATIENCE = 3
#: Series of which it is remembered how large they were.
MAX_REMEMBERED = 1000
#: Seconds after which a delivery is tried again: at first, and at most.
AGAIN_S = (60.0, 3600.0)
# Answers to C-STORE (PS3.4 table B.2-1).
STORED, NO_ROOM, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
_NAME = re.compile(r"series-(\d{4,})-[0-9a-f]{8}")
_FOREVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Where to listen, to whom, and how much to take in."""

    port: int
    host: str = "127.0.0.1"
    title: str = "MEDSEG"
    callers: tuple[str, ...] = ()  # titles that may call; none: all
    peers: tuple[str, ...] = ()  # addresses that may connect; none: all
    quiet_s: float = 10.0
    associations: int = 4
    series: int = 20  # received or waiting at one time
    limits: Limits = field(
        default_factory=lambda: Limits(instances=5_000, instance_bytes=2**29, total_bytes=8 * 2**30)
    )


@dataclass(kw_only=True)
class Series:
    """A series on its way in, or kept."""

    number: int
    folder: Path  # of its instances alone
    last_s: float
    uid: str = ""
    instances: dict[str, Path] = field(default_factory=dict)
    # Associations that brought something and are open.
    senders: set[Any] = field(default_factory=set)
    broken: str = ""  # why it cannot be used
    cut_off: bool = False  # its last sender went without saying goodbye
    before: Series | None = None  # what was kept of it, broken, when it came anew
    again_s: float = _FOREVER  # when to deliver it again
    attempts: int = 0  # to deliver it

    @property
    def results(self) -> Path:
        """The folder of its results, which is there once they are complete."""
        return self.folder.with_name(f"{self.folder.name}.results")

    @property
    def state(self) -> Path:
        """The file that says how far it is."""
        return self.folder.with_name(f"{self.folder.name}.state")

    def mark(self, state: str) -> None:
        """Write the state down; without one the series is on its way in."""
        if state:
            with atomic_write(self.state) as file:
                file.write(state.encode())
        else:
            self.state.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of its instances on the disk."""
        return sum(path.stat().st_size for path in self.instances.values() if path.exists())


@contextmanager
def spool(folder: Path) -> Iterator[Path]:
    """A folder for an `Inbox`, of this user and this process alone; gone afterwards if it is empty.

    Raises `BadConfig` if it is somebody else's, or another process uses it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or not is_private(about):
                raise BadConfig(f"{folder}: others may look into it; give another --spool")
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise BadConfig(
                f"{folder}: another medseg listen uses it; give another --spool"
            ) from None
        except OSError as error:
            raise BadConfig(
                f"{folder}: series cannot be kept there: {error.strerror}; give another --spool"
            ) from None
        try:
            yield folder
        finally:
            stack.close()
            with suppress(OSError):  # it holds series
                folder.rmdir()


class Inbox:
    """The series being received and those kept, in a folder of ours. Safe to use from several
    threads.

    A series of which a part was refused must not look complete: what comes with the refused part is
    marked as broken, and a series that found no room is refused until its sender begins anew.
    """

    def __init__(
        self, folder: Path, options: NodeOptions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._options, self._clock = folder, options, clock
        self._lock = threading.Lock()
        self._series: dict[str, Series] = {}
        self._kept: dict[str, Series] = {}  # received, and of no use until something happens
        self._spoiled: dict[Any, str] = {}  # associations of which something was refused, and why
        self._turned_away: dict[str, float] = {}  # series without room, and when they tried last
        self._taken: dict[str, int] = {}  # how many instances series had that were complete
        self._begun = self._files = self._bytes = 0
        self.is_full = False  # something was refused because there was no room for it
        self._take_up()

    def take(self, sender: Any, instance: str, data: bytes) -> int:
        """Save one instance, the bytes of a DICOM file; returns the status for C-STORE."""
        limits = self._options.limits
        with self._lock:
            self._files += 1
            path = self._folder / f"{self._files:06d}.dcm"
            self.is_full = self._bytes + len(data) > limits.total_bytes
            if len(data) > limits.instance_bytes or self.is_full:
                self._spoil(sender, "more was sent than is allowed")
                return NO_ROOM
            self._bytes += len(data)
        status = STORED
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # who is told that it is stored may delete it
            uid, _ = uids_of(path)
        except (OSError, BadFile) as error:
            status, uid = (NO_ROOM if isinstance(error, OSError) else NOT_UNDERSTOOD), ""
        with self._lock:
            if uid:
                status = self._sort_in(sender, instance, uid, path=path)
            else:
                status = status or NOT_UNDERSTOOD
                self._spoil(sender, "some of what was sent with it could not be read")
            if status != STORED:
                self._bytes -= len(data)
                with suppress(OSError):
                    path.unlink()
        return status

    def ended(self, sender: Any, *, released: bool) -> None:
        """An association is over; `released` if its sender said so."""
        with self._lock:
            self._spoiled.pop(sender, None)
            for series in self._series.values():
                if sender in series.senders:
                    series.senders.discard(sender)
                    series.last_s = self._clock()
                    series.cut_off = not released
                    usable = not series.broken and series.before is None
                    if released and usable and not series.senders:
                        series.mark("whole")

    def complete(self) -> Series | None:
        """The oldest series to which nothing has come for long enough, or whose results are due; it
        is taken out.
        """
        with self._lock:
            now = self._clock()
            for uid, series in self._series.items():
                patience = PATIENCE if series.senders else 1
                if now - series.last_s >= self._options.quiet_s * patience:
                    del self._series[uid]
                    self._judge(series)
                    return series
            due = next((series for series in self._kept.values() if now >= series.again_s), None)
            return self._kept.pop(due.uid) if due else None

    def keep(self, series: Series, *, deliver: bool = False) -> None:
        """Put a series back that could not be used, or whose results could not be delivered."""
        with self._lock:
            if series.broken:
                series.mark(f"broken: {series.broken}")
            if deliver:
                series.again_s = self._clock() + min(AGAIN_S[1], AGAIN_S[0] * 2**series.attempts)
                series.attempts += 1
            if other := self._kept.get(series.uid):
                self._merge(other, series)
            self._kept[series.uid] = series

    def remove(self, series: Series) -> None:
        """Delete the files of a series that is done with."""
        size = series.size()
        self._delete(series)
        with self._lock:
            self._bytes -= size

    def held(self) -> list[Series]:
        """All series that are here."""
        with self._lock:
            return [*self._series.values(), *self._kept.values()]

    def _judge(self, series: Series) -> None:
        """Decide whether a series to which nothing came any more is all there."""
        before, series.before = series.before, None
        if before is not None:
            missing = before.instances.keys() - series.instances.keys()
            self._merge(before, series)
            if missing and not series.broken:
                series.broken = "it was broken before and only a part of it was sent again"
        if len(series.instances) < self._taken.get(series.uid, 0):
            series.broken = "it is the rest of a series that seemed complete; raise --quiet-s"
        else:
            self._taken[series.uid] = len(series.instances)
        while len(self._taken) > MAX_REMEMBERED:
            del self._taken[next(iter(self._taken))]
        if not series.broken and not series.cut_off:
            series.mark("whole")

    def _merge(self, old: Series, new: Series) -> None:
        """Move what only `old` has to `new`, and delete the rest of `old`."""
        for instance, path in old.instances.items():
            if instance in new.instances:
                self._bytes -= path.stat().st_size
            else:
                new.instances[instance] = path.replace(new.folder / path.name)
        self._delete(old)

    def _delete(self, series: Series) -> None:
        """Delete what is on the disk, the folder in one step: a part of it must never be taken for
        a series.
        """
        trash = self._folder / f"gone-{series.folder.name}"
        with suppress(OSError):
            series.folder.replace(trash)
        for folder in (trash, series.results):
            shutil.rmtree(folder, ignore_errors=True)
        series.state.unlink(missing_ok=True)

    def _sort_in(self, sender: Any, instance: str, uid: str, path: Path) -> int:
        now = self._clock()
        quiet_s = self._options.quiet_s
        self._turned_away = {
            one: last for one, last in self._turned_away.items() if now - last < quiet_s
        }
        series = self._series.get(uid)
        if series is None:
            if uid in self._turned_away or len(self._series) >= self._options.series:
                self._turned_away[uid] = now
                return NO_ROOM
            series = self._series[uid] = self._begin(uid)
        series.last_s = now
        series.senders.add(sender)
        series.mark("")
        series.broken = series.broken or self._spoiled.get(sender, "")
        old = series.instances.get(instance)
        if old is None and len(series.instances) >= self._options.limits.instances:
            series.broken = f"it has more than {self._options.limits.instances} instances"
            return NO_ROOM
        if old is not None:  # sent again
            self._bytes -= old.stat().st_size
        series.instances[instance] = old or series.folder / path.name
        path.replace(series.instances[instance])
        return STORED

    def _begin(self, uid: str) -> Series:
        """A series of which the first instance, or after it was kept another one, has come.

        What was cut off, or could not be segmented or delivered, goes on: nothing of it was
        refused. What was broken lacks something that nobody can name, so all of it has to come
        again.
        """
        predecessor = self._kept.pop(uid, None)
        if predecessor is not None and not predecessor.broken:
            shutil.rmtree(predecessor.results, ignore_errors=True)
            predecessor.again_s, predecessor.attempts = _FOREVER, 0
            return predecessor
        self._begun += 1
        name = f"series-{self._begun:04d}-{secrets.token_hex(4)}"
        series = Series(
            number=self._begun,
            folder=self._folder / name,
            last_s=self._clock(),
            uid=uid,
            before=predecessor,
        )
        series.folder.mkdir()
        return series

    def _spoil(self, sender: Any, why: str) -> None:
        self._spoiled[sender] = why
        for series in self._series.values():
            if sender in series.senders:
                series.broken = why

    def _take_up(self) -> None:
        """Find what an earlier run left, and delete what it had begun: its senders were not told
        that it is stored.
        """
        for path in sorted(self._folder.iterdir()):
            if match := _NAME.fullmatch(path.name):
                self._begun = max(self._begun, int(match[1]))
                self._load(Series(number=int(match[1]), folder=path, last_s=self._clock()))
            elif path.is_dir() and (path.suffix == ".part" or path.name.startswith("gone-")):
                shutil.rmtree(path, ignore_errors=True)
            elif re.fullmatch(r"\d{6,}\.dcm|\.medseg-[0-9a-f]{24}", path.name):
                path.unlink()

    def _load(self, series: Series) -> None:
        for path in sorted(series.folder.iterdir()):
            try:
                series.uid, instance = uids_of(path)
            except BadFile:  # the disk has lost it
                series.broken = "some of it cannot be read any more"
                continue
            self._files = max(self._files, int(path.stem))
            series.instances[instance] = path
        if not series.instances:
            self.remove(series)
            return
        self._bytes += series.size()
        state = series.state.read_text(encoding="utf-8") if series.state.exists() else ""
        series.broken = series.broken or state.partition("broken: ")[2]
        series.cut_off = not state
        if earlier := self._series.pop(series.uid, None) or self._kept.pop(series.uid, None):
            series.before = earlier
            self._judge(series)
        (self._kept if series.broken or series.cut_off else self._series)[series.uid] = series
