"""`medseg listen`: a DICOM node that receives series, segments them one after another, and hands on the results.

Receiving (C-STORE, PS3.4 annex B) runs in threads of pynetdicom; what arrives is counted, saved under names of our own
and never parsed further than its series. The one loop in `Listener.run` takes complete series and gives each to a child
process, so that a file that breaks a decoder breaks that child alone. No header value, title or address of a sender
enters a line of the log; pynetdicom's own log is silent.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import BadConfig, BadFile, BadOutput, Interrupted, MedsegError
from medseg.files import atomic_write, private_folder
from medseg.pacs.client import Limits, quiet_logs, series_of

#: CT, MR and PET images, one slice a file and enhanced (PS3.4 table B.5-1).
STORAGE_CLASSES = [
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130")
]
#: Uncompressed, RLE, JPEG, JPEG-LS and JPEG 2000 (PS3.5 chapter 10). Deflated is not: it unpacks to any size.
TRANSFER_SYNTAXES = [
    f"1.2.840.10008.1.2{tail}"
    for tail in (".1", "", ".2", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91")
]
#: Most bytes of one protocol data unit; we ask for 16 kB, and a peer that sends far more is not DICOM.
MAX_PDU_BYTES = 1 << 20
#: Seconds in which one instance must have arrived.
MAX_INSTANCE_S = 600.0
#: A series is given this much more time to go on while its sender is still there.
PATIENCE = 3
#: Series of which it is remembered how large they were.
MAX_REMEMBERED = 1000
#: Seconds before each attempt to reach the node that results are sent to.
RETRY_S = (0.0, 2.0, 10.0)
# Answers to C-STORE (PS3.4 table B.2-1).
STORED, NO_ROOM, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000


@dataclass(frozen=True)
class Options:
    """Where to listen, to whom, and how much to take in."""

    port: int
    host: str = "127.0.0.1"
    title: str = "MEDSEG"
    callers: tuple[str, ...] = ()  # titles that may call; none: all
    peers: tuple[str, ...] = ()  # addresses that may connect; none: all
    quiet_s: float = 10.0
    associations: int = 4
    series: int = 20  # received or waiting at one time
    limits: Limits = field(default_factory=lambda: Limits(5_000, 2**29, 8 * 2**30))


@dataclass
class Series:
    """A series on its way in."""

    number: int
    folder: Path
    last_s: float
    instances: dict[str, Path] = field(default_factory=dict)
    senders: set[Any] = field(default_factory=set)  # associations that brought something and are open
    broken: str = ""  # why it cannot be used
    cut_off: bool = False  # its last sender went without saying goodbye


class Inbox:
    """The series being received, in a folder of ours. Safe to use from several threads.

    A series of which a part was refused must not look complete: what comes with the refused part is marked as broken,
    and a series that found no room is refused until its sender begins anew.
    """

    def __init__(self, folder: Path, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._options, self._clock = folder, options, clock
        self._lock = threading.Lock()
        self._series: dict[str, Series] = {}
        self._spoiled: dict[Any, str] = {}  # associations of which something was refused, and why
        self._turned_away: dict[str, float] = {}  # series that found no room, and when they tried last
        self._taken: dict[str, int] = {}  # how many instances series had that were complete
        self._begun = self._files = self._bytes = 0

    def take(self, sender: Any, instance: str, data: bytes) -> int:
        """Save one instance, the bytes of a DICOM file; returns the status for C-STORE."""
        limits = self._options.limits
        with self._lock:
            self._files += 1
            path = self._folder / f"{self._files:06d}.dcm"
            if len(data) > limits.instance_bytes or self._bytes + len(data) > limits.total_bytes:
                self._spoil(sender, "more was sent than is allowed")
                return NO_ROOM
            self._bytes += len(data)
        status = STORED
        try:
            path.write_bytes(data)
            uid = series_of(path)
        except (OSError, BadFile) as error:
            status, uid = (NO_ROOM if isinstance(error, OSError) else NOT_UNDERSTOOD), ""
        with self._lock:
            if uid:
                status = self._sort_in(sender, instance, uid, path)
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

    def complete(self) -> Series | None:
        """The oldest series to which nothing has come for long enough; it is no longer in the inbox."""
        with self._lock:
            for uid, series in self._series.items():
                wait_s = self._options.quiet_s * (PATIENCE if series.senders else 1)
                if self._clock() - series.last_s >= wait_s:
                    del self._series[uid]
                    if len(series.instances) < self._taken.get(uid, 0):
                        series.broken = "it is the rest of a series that seemed complete; raise --quiet-s"
                    else:
                        self._taken[uid] = len(series.instances)
                    while len(self._taken) > MAX_REMEMBERED:
                        del self._taken[next(iter(self._taken))]
                    return series
        return None

    def remove(self, series: Series) -> None:
        """Delete the files of a series that is done with."""
        size = sum(path.stat().st_size for path in series.instances.values() if path.exists())
        shutil.rmtree(series.folder, ignore_errors=True)
        with self._lock:
            self._bytes -= size

    def _sort_in(self, sender: Any, instance: str, uid: str, path: Path) -> int:
        now = self._clock()
        quiet_s = self._options.quiet_s
        self._turned_away = {one: last for one, last in self._turned_away.items() if now - last < quiet_s}
        series = self._series.get(uid)
        if series is None:
            if uid in self._turned_away or len(self._series) >= self._options.series:
                self._turned_away[uid] = now
                return NO_ROOM
            self._begun += 1
            series = Series(self._begun, self._folder / f"series-{self._begun:04d}", now)
            series.folder.mkdir()
            self._series[uid] = series
        series.last_s = now
        series.senders.add(sender)
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

    def _spoil(self, sender: Any, why: str) -> None:
        self._spoiled[sender] = why
        for series in self._series.values():
            if sender in series.senders:
                series.broken = why


class Listener:
    """Receives series until told to stop, and segments each.

    segment(folder of a series, folder for results): leaves files there; raises `MedsegError` if that is impossible.
    deliver(number of the series, files): hands them on. say: gets one neutral line for each thing that happens.
    """

    def __init__(
        self,
        options: Options,
        segment: Callable[[Path, Path], None],
        deliver: Callable[[int, Sequence[Path]], None],
        say: Callable[[str], None],
    ) -> None:
        self._options, self._segment, self._deliver, self._say = options, segment, deliver, say
        self._open: set[Any] = set()  # associations
        self._released: set[Any] = set()
        self.stopped = threading.Event()
        self.listening = threading.Event()
        self.port = options.port

    def run(self) -> None:
        """Listen until `stopped` is set or an exception (a signal) arrives. Raises `BadConfig`."""
        with private_folder() as folder:
            incoming = folder / "incoming"
            incoming.mkdir()
            inbox = Inbox(incoming, self._options)
            entity, server = self._serve(inbox)
            try:
                self.port = server.server_address[1]
                self._say(f"listening on {self._options.host}, port {self.port}, as {self._options.title}")
                self.listening.set()
                while not self.stopped.wait(0.1):
                    for association in [one for one in self._open if one.ident and not one.is_alive()]:
                        self._end(inbox, association)  # it died of something that pynetdicom did not foresee
                    series = inbox.complete()
                    if series is not None:
                        self._work(series, folder / "results")
                        inbox.remove(series)
            finally:
                for association in entity.active_associations:
                    association.abort()
                socketserver.BaseServer.shutdown(server)
                server.server_close()

    def _work(self, series: Series, results: Path) -> None:
        name = f"series {series.number}"
        self._say(f"{name}: {len(series.instances)} instances received")
        if series.broken or series.cut_off:
            self._say(f"{name}: dropped: {series.broken or 'its sender broke off'}")
            return
        begun = time.perf_counter()
        try:
            results.mkdir()
            self._segment(series.folder, results)
            self._say(f"{name}: segmented in {time.perf_counter() - begun:.1f} s")
            self._deliver(series.number, sorted(results.iterdir()))
            self._say(f"{name}: delivered")
        except Interrupted:
            raise
        except MedsegError as error:
            self._say(f"{name}: dropped: {str(error).replace(str(series.folder), 'it')}")
        except OSError as error:
            self._say(f"{name}: dropped: {error.strerror or 'its results could not be kept'}")
        finally:
            shutil.rmtree(results, ignore_errors=True)

    def _serve(self, inbox: Inbox) -> tuple[Any, Any]:
        """The application entity and its running server, which fills the inbox."""
        options = self._options
        entity = application_entity(options.title)
        from pynetdicom import evt
        from pynetdicom.transport import ThreadedAssociationServer

        entity.maximum_associations = options.associations
        entity.require_called_aet = True
        entity.require_calling_aet = list(options.callers)
        entity.acse_timeout = entity.dimse_timeout = 30
        entity.network_timeout = 60
        entity.add_supported_context("1.2.840.10008.1.1")  # C-ECHO
        for storage in STORAGE_CLASSES:
            entity.add_supported_context(storage, TRANSFER_SYNTAXES)

        class Server(ThreadedAssociationServer):
            def verify_request(self, request: Any, client_address: Any) -> bool:
                # A few more than may work at a time, so that they can be told so.
                room = len(self.active_associations) < options.associations + 4
                return room and (not options.peers or client_address[0] in options.peers)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing about a connection that broke while it was being accepted."""

        handlers = [
            (evt.EVT_CONN_OPEN, self._begin),
            (evt.EVT_C_STORE, lambda event: self._store(inbox, event)),
            (evt.EVT_RELEASED, lambda event: self._released.add(event.assoc)),
            (evt.EVT_CONN_CLOSE, lambda event: self._end(inbox, event.assoc)),
        ]
        try:
            server = entity.make_server((options.host, options.port), evt_handlers=handlers, server_class=Server)
        except (OSError, OverflowError) as error:
            raise BadConfig(
                f"cannot listen on {options.host}, port {options.port}: "
                f"{getattr(error, 'strerror', None) or 'no such port'}; choose another --port or --host"
            ) from None
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return entity, server

    def _begin(self, event: Any) -> None:
        """A connection was opened: bound what it may send, and see that nothing it sends kills a thread."""
        from pynetdicom.fsm import InvalidEventError

        association = event.assoc
        self._open.add(association)
        wire, messages, machine = association.dul.socket, association.dimse, association.dul.state_machine
        read, decode, act = wire.recv, messages.receive_primitive, machine.do_action
        state = association.medseg_received = {"bytes": 0, "since_s": time.monotonic()}

        def recv(count: int) -> bytearray:
            state["bytes"] += count
            too_much = state["bytes"] > self._options.limits.instance_bytes + MAX_PDU_BYTES
            if too_much or count > MAX_PDU_BYTES or time.monotonic() - state["since_s"] > MAX_INSTANCE_S:
                raise OSError("too much")  # pynetdicom then closes the connection
            return bytearray(read(count))

        def receive_primitive(primitive: Any) -> None:
            try:
                decode(primitive)
            except Exception:  # pynetdicom lets anything out that a damaged command makes pydicom raise
                association.abort(block=False)

        def do_action(event: str) -> None:
            try:
                act(event)
            except InvalidEventError:  # what came and what was about to be sent crossed each other
                association.is_aborted, association.is_established, association._kill = True, False, True
                association.dul.kill_dul()
                wire.close()

        wire.recv, messages.receive_primitive, machine.do_action = recv, receive_primitive, do_action

    def _store(self, inbox: Inbox, event: Any) -> int:
        event.assoc.medseg_received.update(bytes=0, since_s=time.monotonic())
        try:
            instance = str(event.request.AffectedSOPInstanceUID)
            data = event.encoded_dataset()
        except (AttributeError, LookupError, TypeError, ValueError, struct.error):
            return NOT_UNDERSTOOD
        status = inbox.take(event.assoc, instance, data)
        if event.assoc not in self._open:  # it broke off while this was being saved
            inbox.ended(event.assoc, released=False)
        return status

    def _end(self, inbox: Inbox, association: Any) -> None:
        inbox.ended(association, released=association in self._released)
        if association.requestor.primitive is None:  # it would still wait for a request, and keep its place from others
            association.dul.to_user_queue.put(None)
        self._released.discard(association)
        self._open.discard(association)


def application_entity(title: str) -> Any:
    """An application entity of pynetdicom, with pynetdicom's own log silenced. Raises `BadConfig`."""
    try:
        import pydicom.config
        from pynetdicom import AE, _config
    except ImportError:
        raise BadConfig('DICOM networking needs pynetdicom; install it with: pip install "medseg[pacs]"') from None
    quiet_logs("pynetdicom", "pydicom")
    _config.LOG_HANDLER_LEVEL = "none"
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote what is not valid
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", title) or not title.strip():
        raise BadConfig("an application entity title has 1 to 16 plain characters, e.g. MEDSEG")
    return AE(ae_title=title)


def segment_in_child(arguments: Sequence[str], timeout_s: float) -> Callable[[Path, Path], None]:
    """A function for `Listener` that runs `medseg infer` with these further arguments in a process of its own."""

    def segment(series: Path, results: Path) -> None:
        # Started where medseg lies, so that the interpreter looks for it there and in no folder of anybody else.
        command = [sys.executable, "-m", "medseg", "infer", str(series), "-o", str(results / "result.dcm"), "--quiet"]
        place = Path(__file__).resolve().parents[2]
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen([*command, *arguments], cwd=place, start_new_session=True, text=True, **quiet) as child:
            try:
                _, told = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise BadFile(f"it took longer than {timeout_s:.0f} s") from None
            finally:
                child.kill()
        if child.returncode:
            lines = [line.removeprefix("medseg: ") for line in told.splitlines() if line.startswith("medseg: ")]
            raise BadFile(lines[-1] if lines else f"the program ended with code {child.returncode}")

    return segment


def keep_in(folder: Path) -> Callable[[int, Sequence[Path]], None]:
    """A function for `Listener` that copies results into a folder, under names of our own."""

    def deliver(number: int, files: Sequence[Path]) -> None:
        stem = f"series-{number:04d}-{secrets.token_hex(4)}"
        for file in files:
            with atomic_write(folder / (stem + file.name.removeprefix("result"))) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target)

    return deliver


def send_to(host: str, port: int, title: str, own_title: str) -> Callable[[int, Sequence[Path]], None]:
    """A function for `Listener` that stores DICOM results in another node (C-STORE). Raises `BadOutput`."""

    def deliver(number: int, files: Sequence[Path]) -> None:
        import pydicom

        datasets = [pydicom.dcmread(file) for file in files if file.suffix == ".dcm"]
        entity = application_entity(own_title)
        entity.connection_timeout = entity.acse_timeout = 30
        for kind in {(d.SOPClassUID, d.file_meta.TransferSyntaxUID) for d in datasets}:
            entity.add_requested_context(*kind)
        for wait_s in RETRY_S:
            time.sleep(wait_s)
            association = entity.associate(host, port, ae_title=title)
            if association.is_established:
                break
        else:
            raise BadOutput("the node of --reply-to cannot be reached, or does not accept us")
        try:
            stored = [_status_of(association, dataset) for dataset in datasets]
        finally:
            association.release()
        if not all(stored):
            raise BadOutput(f"the node of --reply-to refused {stored.count(False)} of {len(stored)} results")

    return deliver


def _status_of(association: Any, dataset: Any) -> bool:
    """Whether an object was stored, if with a warning (PS3.4 table B.2-1)."""
    try:
        status = association.send_c_store(dataset).get("Status", 0xC000)
    except (RuntimeError, ValueError, AttributeError):  # not accepted, or the connection broke
        return False
    return status == 0 or 0xB000 <= status <= 0xBFFF
