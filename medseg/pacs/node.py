"""`medseg listen`: a DICOM node that receives series, segments them one after another, and hands on
the results.

Receiving (C-STORE, PS3.4 annex B) runs in threads of pynetdicom; what arrives is counted, saved
under names of our own and never parsed further than its series. The one loop in `Listener.run`
takes complete series and gives each to a child process, so that a file that breaks a decoder breaks
that child alone. No header value, title or address of a sender enters a line of the log;
pynetdicom's own log is silent.
"""

from __future__ import annotations

import re
import shutil
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg import logs
from medseg.errors import BadConfig, BadFile, BadOutput, Interrupted, MedsegError
from medseg.files import atomic_write, private_folder
from medseg.machine import apart
from medseg.pacs.client import Limits, quiet_logs
from medseg.pacs.inbox import NO_ROOM, NOT_UNDERSTOOD, STORED, Inbox, NodeOptions, Series, spool

__all__ = [
    "NOT_UNDERSTOOD",
    "NO_ROOM",
    "STORED",
    "Inbox",
    "Limits",
    "Listener",
    "NodeOptions",
    "Series",
    "application_entity",
    "keep_in",
    "segment_in_child",
    "send_to",
]  # fmt: skip

#: CT, MR and PET images, one slice a file and enhanced (PS3.4 table B.5-1).
STORAGE_CLASSES = [
    f"1.2.840.10008.5.1.4.1.1.{tail}"
    for tail in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130")
]
#: Uncompressed, RLE, JPEG, JPEG-LS and JPEG 2000 (PS3.5 chapter 10). Deflated is not: it unpacks to
#: any size.
_SYNTAX_TAILS = [".1", "", ".2", ".5", ".4.50", ".4.51", ".4.57", ".4.70"]
_SYNTAX_TAILS += [".4.80", ".4.81", ".4.90", ".4.91"]
TRANSFER_SYNTAXES = [f"1.2.840.10008.1.2{tail}" for tail in _SYNTAX_TAILS]
#: Most bytes of one protocol data unit; we ask for 16 kB, and a peer that sends far more is not
#: DICOM.
MAX_PDU_BYTES = 1 << 20
#: Seconds in which one instance must have arrived.
MAX_INSTANCE_S = 600.0
#: Seconds before each attempt to reach the node that results are sent to.
RETRY_S = (0.0, 2.0, 10.0)
#: Seconds of silence after which a sender has to make room for another one.
IDLE_S = 10.0
#: Connections that may wait to ask for something; one more, and the oldest of them goes.
MAX_ASKING = 8


class Listener:
    """Receives series until told to stop, and segments each.

    segment(folder of a series, folder for results): leaves files there; raises `MedsegError` if
    that is impossible.
    deliver(name of the series, files): hands them on; the same name again replaces what it left.
    say: gets one neutral line for each thing that happens.
    spool: where series lie until they are delivered (`medseg.pacs.inbox`); without it nothing
    outlives `run`.
    """

    def __init__(
        self,
        options: NodeOptions,
        segment: Callable[[Path, Path], None],
        deliver: Callable[[str, Sequence[Path]], None],
        say: Callable[[str], None],
        spool: Path | None = None,
    ) -> None:
        self._options, self._segment, self._deliver, self._say = options, segment, deliver, say
        self._spool = spool
        self._open: set[Any] = set()  # associations
        self._released: set[Any] = set()
        self.stopped = threading.Event()
        self.listening = threading.Event()
        self.port = options.port

    def run(self) -> None:
        """Listen until `stopped` is set or an exception (a signal) arrives. Raises `BadConfig`."""
        with private_folder() if self._spool is None else spool(self._spool) as folder:
            inbox = Inbox(folder, self._options)
            for series in inbox.held():
                count = f"{len(series.instances)} instances"
                self._say(f"series {series.number}: {count} taken up again{_of(series)}")
            server = self._serve(inbox)
            try:
                self.port = server.server_address[1]
                self._say(
                    f"listening on {self._options.host}, port {self.port}, as {self._options.title}"
                )
                self.listening.set()
                self._loop(inbox)
            finally:
                for association in server.active_associations:
                    association.abort()
                socketserver.BaseServer.shutdown(server)
                server.server_close()
                self._say_what_is_left(inbox)

    def _loop(self, inbox: Inbox) -> None:
        was_full = False
        while not self.stopped.wait(0.1):
            # Those that died of something that pynetdicom did not foresee.
            for association in [one for one in self._open if one.ident and not one.is_alive()]:
                self._end(inbox, association)
            if inbox.is_full and not was_full:
                self._say(
                    "there is no room for more: deliver or remove what is kept, or raise --max-gb"
                )
            was_full = inbox.is_full
            series = inbox.complete()
            if series is not None:
                self._work(inbox, series)

    def _say_what_is_left(self, inbox: Inbox) -> None:
        rest = inbox.held()
        count = sum(len(series.instances) for series in rest)
        if rest and self._spool is None:
            self._say(f"stopped: {count} instances of {len(rest)} series are thrown away")
        elif rest:
            state = f"kept for the next start, in {self._spool}"
            self._say(f"stopped: {count} instances of {len(rest)} series are {state}")

    def _work(self, inbox: Inbox, series: Series) -> None:
        """Segment and deliver a series; what comes in the way of that is said, and it is kept."""
        name = f"series {series.number}"
        segmented = series.results.exists()
        if not segmented:
            self._say(f"{name}: {len(series.instances)} instances received")
        if series.broken or series.cut_off:
            inbox.keep(series)
            self._say(f"{name}: kept{_of(series)}")
            return
        try:
            if not segmented:
                self._make_results(series)
            self._deliver(series.folder.name, sorted(series.results.iterdir()))
        except Interrupted:
            inbox.keep(series)
            raise
        except (MedsegError, OSError) as error:
            undelivered = series.results.exists()
            inbox.keep(series, deliver=undelivered)
            why = (
                str(error)
                if isinstance(error, MedsegError)
                else error.strerror or "its results could not be kept"
            )
            again = (
                "the delivery is tried again later"
                if undelivered
                else "it is tried again at the next start"
            )
            self._say(f"{name}: kept: {why.replace(str(series.folder), 'it')}; {again}")
            logs.warning(__name__, "%s: kept after %s; %s", name, type(error).__name__, again)
            return
        inbox.remove(series)
        self._say(f"{name}: delivered")
        logs.info(__name__, "%s: delivered", name)

    def _make_results(self, series: Series) -> None:
        start_s = time.perf_counter()
        part = series.results.with_name(f"{series.results.name}.part")
        try:
            part.mkdir()
            self._segment(series.folder, part)
            part.replace(series.results)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        spent_s = time.perf_counter() - start_s
        self._say(f"series {series.number}: segmented in {spent_s:.1f} s")
        logs.info(__name__, "series %d: segmented in %.1f s", series.number, spent_s)

    def _serve(self, inbox: Inbox) -> Any:
        """The running server, which fills the inbox."""
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

        make_room = self._make_room

        class Server(ThreadedAssociationServer):
            def verify_request(self, request: Any, client_address: Any) -> bool:
                welcome = not options.peers or client_address[0] in options.peers
                return welcome and make_room(self.active_associations)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing about a connection that broke while it was being accepted."""

        handlers = [
            (evt.EVT_CONN_OPEN, self._begin),
            (evt.EVT_C_STORE, lambda event: self._store(inbox, event)),
            (evt.EVT_RELEASED, lambda event: self._released.add(event.assoc)),
            (evt.EVT_CONN_CLOSE, lambda event: self._end(inbox, event.assoc)),
        ]
        try:
            server = entity.make_server(
                (options.host, options.port), evt_handlers=handlers, server_class=Server
            )
        except (OSError, OverflowError) as error:
            raise BadConfig(
                f"cannot listen on {options.host}, port {options.port}:"
                f" {getattr(error, 'strerror', None) or 'no such port'}; choose another --port or"
                " --host"
            ) from None
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return server

    def _make_room(self, associations: Sequence[Any]) -> bool:
        """Whether one more connection may be accepted, for which one that only keeps others out may
        have to go.
        """

        def last_s(association: Any) -> float:
            return getattr(association, "medseg_received", {}).get("last_s", now)

        now = time.monotonic()
        oldest_first = sorted(
            (one for one in associations if not hasattr(one, "medseg_gone")), key=last_s
        )
        # Connected, and said nothing yet.
        asking = [one for one in oldest_first if one.requestor.primitive is None]
        working = [one for one in oldest_first if one.requestor.primitive is not None]
        going = asking[:1] if len(asking) >= MAX_ASKING else []
        if len(working) >= self._options.associations:
            going += [one for one in working[:1] if now - last_s(one) > IDLE_S]
        for association in going:
            association.medseg_gone = True
            association.dul.socket.socket.shutdown(2)  # as if the other side had hung up
        return len(associations) < self._options.associations + 8 * MAX_ASKING

    def _begin(self, event: Any) -> None:
        """A connection was opened: bound what it may send, and see that nothing it sends kills a
        thread.
        """
        from pynetdicom.fsm import InvalidEventError

        association = event.assoc
        self._open.add(association)
        wire, messages, machine = (
            association.dul.socket,
            association.dimse,
            association.dul.state_machine,
        )
        read, decode, act = wire.recv, messages.receive_primitive, machine.do_action
        state = association.medseg_received = {
            "bytes": 0,
            "since_s": time.monotonic(),
            "last_s": time.monotonic(),
        }

        def recv(count: int) -> bytearray:
            state["bytes"] += count
            state["last_s"] = time.monotonic()
            too_much = state["bytes"] > self._options.limits.instance_bytes + MAX_PDU_BYTES
            if (
                too_much
                or count > MAX_PDU_BYTES
                or time.monotonic() - state["since_s"] > MAX_INSTANCE_S
            ):
                raise OSError("too much")  # pynetdicom then closes the connection
            return bytearray(read(count))

        def receive_primitive(primitive: Any) -> None:
            try:
                decode(primitive)
            except Exception:
                # pynetdicom lets anything out that a damaged command makes pydicom raise.
                association.abort(block=False)

        def do_action(event: str) -> None:
            try:
                act(event)
            except InvalidEventError:  # what came and what was about to be sent crossed each other
                association.is_aborted, association.is_established, association._kill = (
                    True,
                    False,
                    True,
                )
                association.dul.kill_dul()
                wire.close()

        wire.recv, messages.receive_primitive, machine.do_action = (
            recv,
            receive_primitive,
            do_action,
        )

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
        # It would still wait for a request, and keep its place from others.
        if association.requestor.primitive is None:
            association.dul.to_user_queue.put(None)
        self._released.discard(association)
        self._open.discard(association)


def _of(series: Series) -> str:
    """Why a series cannot be used, to be appended to what is said of it."""
    return f": {series.broken or 'its sender broke off'}" if series.broken or series.cut_off else ""


def application_entity(title: str) -> Any:
    """An application entity of pynetdicom, with pynetdicom's own log silenced.

    Raises `BadConfig`.
    """
    try:
        import pydicom.config
        from pynetdicom import AE, _config
    except ImportError:
        raise BadConfig(
            'DICOM networking needs pynetdicom; install it with: pip install "medseg[pacs]"'
        ) from None
    quiet_logs("pynetdicom", "pydicom")
    _config.LOG_HANDLER_LEVEL = "none"
    # Its warnings quote what is not valid.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", title) or not title.strip():
        raise BadConfig("an application entity title has 1 to 16 plain characters, e.g. MEDSEG")

    class Entity(AE):
        @property
        def active_associations(self) -> list[Any]:
            """Those that count: connections that asked for nothing, or that have to go, keep nobody
            out.
            """
            associations = [
                one for one in super().active_associations if one.requestor.primitive is not None
            ]
            return [one for one in associations if not hasattr(one, "medseg_gone")]

    return Entity(ae_title=title)


def segment_in_child(arguments: Sequence[str], timeout_s: float) -> Callable[[Path, Path], None]:
    """A function for `Listener` that runs `medseg infer` with these further arguments in a process
    of its own.
    """

    def segment(series: Path, results: Path) -> None:
        # Started where medseg lies, so that the interpreter looks for it there and in no folder of
        # anybody else.
        command = [
            sys.executable,
            "-X",
            "utf8",
            "-m",
            "medseg",
            "infer",
            str(series),
            "-o",
            str(results / "result.dcm"),
            "--quiet",
        ]
        place = Path(__file__).resolve().parents[2]
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
        }
        with subprocess.Popen(
            [*command, *arguments],
            cwd=place,
            encoding="utf-8",
            errors="replace",
            **apart(),
            **quiet,
        ) as child:
            try:
                _, stderr = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise BadFile(f"it took longer than {timeout_s:.0f} s") from None
            finally:
                child.kill()
        if child.returncode:
            lines = [
                line.removeprefix("medseg: ")
                for line in stderr.splitlines()
                if line.startswith("medseg: ")
            ]
            raise BadFile(lines[-1] if lines else f"the program ended with code {child.returncode}")

    return segment


def keep_in(folder: Path) -> Callable[[str, Sequence[Path]], None]:
    """A function for `Listener` that copies results into a folder, under the name of the series."""

    def deliver(name: str, files: Sequence[Path]) -> None:
        for file in files:
            with (
                atomic_write(folder / (name + file.name.removeprefix("result"))) as target,
                file.open("rb") as source,
            ):
                shutil.copyfileobj(source, target)

    return deliver


def send_to(
    host: str, port: int, title: str, own_title: str
) -> Callable[[str, Sequence[Path]], None]:
    """A function for `Listener` that stores DICOM results in another node (C-STORE).

    Raises `BadOutput`.
    """

    def deliver(name: str, files: Sequence[Path]) -> None:
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
            raise BadOutput(
                f"the node of --reply-to refused {stored.count(False)} of {len(stored)} results"
            )

    return deliver


def _status_of(association: Any, dataset: Any) -> bool:
    """Whether an object was stored, if with a warning (PS3.4 table B.2-1)."""
    try:
        status = association.send_c_store(dataset).get("Status", 0xC000)
    except (RuntimeError, ValueError, AttributeError):  # not accepted, or the connection broke
        return False
    return status == 0 or 0xB000 <= status <= 0xBFFF
