"""`medseg listen`: what is received, when it is complete, what is refused, and that nothing breaks
it.
"""

from __future__ import annotations

import logging
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from making.dicom_series import CT, SECRET, series

pytest.importorskip("pynetdicom", reason="a DICOM node needs pynetdicom: pip install medseg[pacs]")

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RQ

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.machine import HAS_MODES
from medseg.pacs import node as listen
from medseg.pacs.client import Limits

SEG, ECHO = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.1.1"
pytestmark = pytest.mark.usefixtures("leave_libraries_as_they_were")


class Node:
    """A listener in a thread, what it received and what it said."""

    def __init__(
        self,
        segment: Callable[[Path, Path], None] | None = None,
        deliver: Callable[[str, Sequence[Path]], None] | None = None,
        spool: Path | None = None,
        **options: object,
    ) -> None:
        self.lines: list[str] = []
        self.received: list[list[Path]] = []
        self.delivered: list[list[str]] = []
        chosen = listen.NodeOptions(**({"port": 0, "quiet_s": 0.3, "title": "MEDSEG"} | options))  # type: ignore[arg-type]
        self.listener = listen.Listener(
            chosen, segment or self.segment, deliver or self.deliver, self.lines.append, spool
        )
        self.thread = threading.Thread(target=self.listener.run)

    def segment(self, folder: Path, results: Path) -> None:
        self.received.append([dcmread(path) for path in sorted(folder.iterdir())])
        (results / "result.dcm").write_bytes(b"result")

    def deliver(self, name: str, files: Sequence[Path]) -> None:
        self.delivered.append([file.name for file in files])

    def wait(self, text: str, timeout_s: float = 15) -> None:
        end = time.monotonic() + timeout_s
        while not any(text in line for line in self.lines):
            assert time.monotonic() < end, f"{text!r} is not in {self.lines}"
            time.sleep(0.02)


@contextmanager
def running(**options: object) -> Iterator[Node]:
    node = Node(**options)  # type: ignore[arg-type]
    node.thread.start()
    try:
        assert node.listener.listening.wait(10)
        yield node
    finally:
        node.listener.stopped.set()
        node.thread.join(20)
        assert not node.thread.is_alive()


@contextmanager
def calling(
    node: Node, title: str = "MEDSEG", own: str = "SENDER", syntax: str = ExplicitVRLittleEndian
) -> Iterator:
    entity = AE(ae_title=own)
    entity.add_requested_context(ECHO)
    entity.add_requested_context(CT, syntax)
    association = entity.associate("127.0.0.1", node.listener.port, ae_title=title)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def send(node: Node, pieces: list[Dataset]) -> list[int]:
    with calling(node) as association:
        assert association.is_established
        return [association.send_c_store(piece).Status for piece in pieces]


def test_a_series_is_received_segmented_and_delivered():
    pieces = series()
    with running() as node:
        assert send(node, pieces) == [0] * 4
        node.wait("delivered")
    (got,) = node.received
    assert {str(p.SOPInstanceUID) for p in got} == {str(p.SOPInstanceUID) for p in pieces}
    assert sorted(p.PixelData for p in got) == sorted(p.PixelData for p in pieces)
    assert node.delivered == [["result.dcm"]]


def test_it_answers_c_echo():
    with running() as node, calling(node) as association:
        assert association.send_c_echo().Status == 0


def test_two_series_sent_mixed_are_taken_apart():
    first, second = series(), series(5)
    with running() as node:
        send(node, [one for pair in zip(first, second) for one in pair] + second[4:])
        node.wait("series 2: delivered")
    assert sorted(map(len, node.received)) == [4, 5]


def test_an_instance_that_is_sent_again_counts_once():
    pieces = series()
    with running() as node:
        send(node, pieces + pieces[:2])
        node.wait("delivered")
    assert len(node.received[0]) == 4


@pytest.mark.parametrize(
    ("options", "call"),
    [({}, {"title": "OTHER"}), ({"callers": ("FRIEND",)}, {}), ({"peers": ("192.0.2.1",)}, {})],
    ids=["called title", "calling title", "address"],
)
def test_who_is_not_meant_is_refused(options: dict, call: dict):
    with running(**options) as node, calling(node, **call) as association:
        assert not association.is_established
    assert not node.received


def test_more_associations_than_allowed_are_refused():
    with (
        running(associations=2) as node,
        calling(node) as one,
        calling(node) as two,
        calling(node) as three,
    ):
        assert one.is_established and two.is_established and not three.is_established


def test_what_exceeds_a_limit_is_refused_and_its_series_not_used():
    for limits, why in (
        (Limits(instances=3), "more than 3 instances"),
        (Limits(total_bytes=3000), "more was sent than is allowed"),
    ):
        with running(limits=limits) as node:
            statuses = send(node, series())
            assert statuses[0] == 0 and statuses[-1] == listen.NO_ROOM
            node.wait(why)
        assert not node.received


def test_an_instance_larger_than_allowed_ends_the_connection():
    with running(limits=Limits(instance_bytes=2**20)) as node:
        big = series(1, side=2000)[0]
        with calling(node) as association:
            answer = association.send_c_store(big)
        assert "Status" not in answer or answer.Status == listen.NO_ROOM
        assert send(node, series()) == [0] * 4
        node.wait("delivered")


def test_a_series_whose_sender_breaks_off_is_not_used_unless_it_is_sent_again():
    pieces = series()
    with running() as node:
        with calling(node) as association:
            association.send_c_store(pieces[0])
            association.abort()
        node.wait("its sender broke off")
        assert send(node, pieces) == [0] * 4
        node.wait("delivered")
    assert [len(got) for got in node.received] == [4]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_files_are_named_by_us_whatever_the_uids_say(tmp_path: Path):
    pieces = series()
    for number, piece in enumerate(pieces):
        piece.SOPInstanceUID = f"/{number}/../../{tmp_path}"[:64]
        piece.file_meta.MediaStorageSOPInstanceUID = piece.SOPInstanceUID
        piece.SeriesInstanceUID = f"../../{tmp_path}"[:64]
    names = []
    with running(
        segment=lambda folder, results: names.extend(p.name for p in folder.iterdir())
    ) as node:
        with calling(node) as association:
            for piece in pieces:
                association.send_c_store(piece)
        node.wait("series 1")
        node.wait("delivered")
    assert len(names) == 4 and all(name[:6].isdecimal() and name[6:] == ".dcm" for name in names)
    assert not list(tmp_path.iterdir())


def test_a_compressed_series_arrives_as_it_was_sent():
    pieces = series()
    for piece in pieces:
        piece.compress(RLELossless, generate_instance_uid=False)
    with running() as node:
        with calling(node, syntax=RLELossless) as association:
            assert [association.send_c_store(piece).Status for piece in pieces] == [0] * 4
        node.wait("delivered")
    assert all(p.file_meta.TransferSyntaxUID == RLELossless for p in node.received[0])
    assert node.received[0][0].pixel_array.max() == 1000


def test_a_series_that_cannot_be_segmented_is_kept_in_one_line_and_the_next_one_is_served():
    def segment(folder: Path, results: Path) -> None:
        if len(list(folder.iterdir())) == 3:
            raise BadFile(f"{folder}: is bad")
        if len(list(folder.iterdir())) == 5:
            raise OSError(28, "No space left on device")

    with running(segment=segment) as node:
        for count in (3, 5, 4):
            send(node, series(count))
        node.wait("series 3: delivered")
    assert "series 1: kept: it: is bad; it is tried again at the next start" in node.lines
    assert (
        "series 2: kept: No space left on device; it is tried again at the next start" in node.lines
    )


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def part10(piece: Dataset) -> bytes:
    with BytesIO() as file:
        piece.save_as(file, enforce_file_format=True)
        return file.getvalue()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def inbox(tmp_path: Path, clock: Clock) -> listen.Inbox:
    limits = Limits(instances=6, instance_bytes=10_000, total_bytes=100_000)
    return listen.Inbox(
        tmp_path, listen.NodeOptions(port=0, quiet_s=10, series=2, limits=limits), clock
    )


def put(inbox: listen.Inbox, sender: str, pieces: list[Dataset]) -> list[int]:
    return [inbox.take(sender, str(piece.SOPInstanceUID), part10(piece)) for piece in pieces]


def test_a_series_is_complete_when_it_is_quiet_and_its_sender_gone(
    inbox: listen.Inbox, clock: Clock
):
    put(inbox, "a", series())
    clock.now = 29.9
    assert inbox.complete() is None, "its sender is still there"
    inbox.ended("a", released=True)
    clock.now = 39.8
    assert inbox.complete() is None
    clock.now = 40
    found = inbox.complete()
    assert found and len(found.instances) == 4 and not found.broken and not found.cut_off
    inbox.remove(found)
    assert inbox._bytes == 0 and not list(found.folder.parent.iterdir())


def test_a_sender_that_stays_is_waited_for_three_times_as_long(inbox: listen.Inbox, clock: Clock):
    put(inbox, "a", series())
    clock.now = 30
    assert inbox.complete()


@pytest.mark.parametrize("bad", [b"no DICOM", b"x" * 10_001], ids=["unreadable", "too large"])
@pytest.mark.parametrize("when", [0, 2, 4], ids=["first", "between", "last"])
def test_a_series_of_which_a_part_was_refused_is_never_complete(
    inbox: listen.Inbox, clock: Clock, bad: bytes, when: int
):
    """Also if it is the outermost slice, whose absence nobody could see."""
    pieces = series(5)
    put(inbox, "a", pieces[:when])
    assert inbox.take("a", "1.2.3", bad) in (listen.NO_ROOM, listen.NOT_UNDERSTOOD)
    put(inbox, "a", pieces[when + 1 :])
    inbox.ended("a", released=True)
    put(inbox, "b", other := series())
    inbox.ended("b", released=True)
    clock.now = 10
    first, second = inbox.complete(), inbox.complete()
    assert first and first.broken
    assert second and not second.broken and len(second.instances) == len(other)


def test_a_series_that_finds_no_room_is_refused_as_a_whole(inbox: listen.Inbox, clock: Clock):
    third = series()
    put(inbox, "a", series())
    put(inbox, "a", series())
    assert put(inbox, "b", third[:2]) == [listen.NO_ROOM] * 2
    inbox.ended("a", released=True)
    clock.now = 5
    put(inbox, "b", third[2:3])
    clock.now = 10
    assert inbox.complete() and inbox.complete()
    assert put(inbox, "b", third[3:]) == [listen.NO_ROOM], (
        "without its first slices it would look complete"
    )
    clock.now = 20
    assert put(inbox, "b", third) == [0] * 4


def test_what_comes_too_late_is_not_taken_for_a_series(inbox: listen.Inbox, clock: Clock):
    pieces = series(6)
    put(inbox, "a", pieces[:4])
    clock.now = 30
    early = inbox.complete()
    put(inbox, "a", pieces[4:])
    clock.now = 60
    late = inbox.complete()
    put(inbox, "b", pieces)
    clock.now = 90
    again = inbox.complete()
    assert early and not early.broken
    assert late and "--quiet-s" in late.broken
    assert again and not again.broken


def test_200_malformed_files_leave_the_inbox_as_it_was(
    inbox: listen.Inbox, clock: Clock, tmp_path: Path
):
    whole = part10(series(1)[0])
    random_ = random.Random(3)
    for number in range(200):
        assert inbox.take(number, str(number), damaged(whole, random_)) in (
            0,
            listen.NO_ROOM,
            listen.NOT_UNDERSTOOD,
        )
        inbox.ended(number, released=True)
        clock.now += 11
        while found := inbox.complete():
            inbox.remove(found)
    assert inbox._bytes == 0 and not list(tmp_path.iterdir()) and not inbox._spoiled


# What was acknowledged is not lost ----------------------------------------------------------------


def stored(spool: Path) -> int:
    """Instances on the disk."""
    return len(list(spool.glob("series-*/*.dcm")))


def uids(pieces: Sequence[Dataset]) -> set[str]:
    return {str(piece.SOPInstanceUID) for piece in pieces}


def test_a_series_that_waits_at_a_stop_is_segmented_by_the_next_start(tmp_path: Path):
    pieces = series()
    with running(spool=tmp_path / "spool", quiet_s=60) as node:
        assert send(node, pieces) == [0] * 4
    assert node.lines[-1].startswith(
        "stopped: 4 instances of 1 series are kept for the next start, in "
    )
    assert stored(tmp_path / "spool") == 4
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    with running(spool=tmp_path / "spool") as node:
        node.wait("series 1: delivered")
    assert "series 1: 4 instances taken up again" in node.lines
    assert uids(node.received[0]) == uids(pieces)
    assert not (tmp_path / "spool").exists(), "nothing of a patient is left behind"


def test_a_series_that_cannot_be_segmented_is_tried_again_by_the_next_start(tmp_path: Path):
    def segment(folder: Path, results: Path) -> None:
        (results / "half").write_bytes(b"half")
        raise BadFile("no model for this")

    pieces = series()
    for _ in range(2):
        with running(segment=segment, spool=tmp_path / "spool") as node:
            if not stored(tmp_path / "spool"):
                send(node, pieces)
            node.wait("series 1: kept: no model for this")
        assert stored(tmp_path / "spool") == 4
        assert not list((tmp_path / "spool").glob("*.results*")), (
            "a part of a result would look like one"
        )
    with running(spool=tmp_path / "spool") as node:
        node.wait("series 1: delivered")
    assert uids(node.received[0]) == uids(pieces) and not stored(tmp_path / "spool")


@pytest.mark.parametrize(
    "error", [BadOutput("the node is away"), OSError(28, "No space left on device")], ids=str
)
def test_results_that_cannot_be_delivered_are_delivered_later(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the same run, and without segmenting again."""
    monkeypatch.setattr("medseg.pacs.inbox.AGAIN_S", (0.3, 0.3))
    tries: list[str] = []

    def deliver(name: str, files: Sequence[Path]) -> None:
        tries.append(name)
        if len(tries) < 3:
            raise error

    with running(deliver=deliver, spool=tmp_path / "spool") as node:
        send(node, series())
        node.wait("series 1: kept: ")
        send(node, series(5))
        node.wait("series 1: delivered")
        node.wait("series 2: delivered")
    assert sorted(map(len, node.received)) == [4, 5], "each was segmented once"
    assert not stored(tmp_path / "spool")
    assert len({name for name in tries if name.startswith("series-0001-")}) == 1, (
        "it replaces what was half delivered"
    )


def test_results_that_were_not_delivered_at_a_stop_are_delivered_by_the_next_start(tmp_path: Path):
    def away(name: str, files: Sequence[Path]) -> None:
        raise BadOutput("the node is away")

    with running(deliver=away, spool=tmp_path / "spool") as node:
        send(node, series())
        node.wait("series 1: kept: the node is away")
    with running(spool=tmp_path / "spool") as node:
        node.wait("series 1: delivered")
    assert node.delivered == [["result.dcm"]] and not node.received


def test_a_series_cut_off_by_a_stop_goes_on_when_its_sender_sends_the_rest(tmp_path: Path):
    pieces = series()
    with running(spool=tmp_path / "spool") as node, calling(node) as association:
        for piece in pieces[:2]:
            assert association.send_c_store(piece).Status == 0
        node.listener.stopped.set()
        node.thread.join(20)
    with running(spool=tmp_path / "spool") as node:
        assert "series 1: 2 instances taken up again: its sender broke off" in node.lines
        time.sleep(1)
        assert not node.received, "what lacks its last slices looks whole"
        assert send(node, pieces[2:]) == [0] * 2
        node.wait("series 1: delivered")
    assert [uids(got) for got in node.received] == [uids(pieces)]


def test_a_killed_node_loses_nothing_that_it_acknowledged(tmp_path: Path):
    """SIGKILL leaves no time for anything: what was acknowledged lies on the disk already."""
    program = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from medseg.pacs.node import Listener, NodeOptions\n"
        "options = NodeOptions(port=0, quiet_s=600)\n"
        "node = Listener(options, None, None, print, Path(sys.argv[1]))\n"
        "def tell(): node.listening.wait(); print('PORT', node.port, flush=True)\n"
        "threading.Thread(target=tell).start()\n"
        "node.run()\n"
    )
    pieces, others = series(), series(3)
    with tiny.start("-c", program, tmp_path / "spool") as child:
        try:
            assert child.stdout
            port = next(int(line.split()[1]) for line in child.stdout if line.startswith("PORT"))
            entity = AE(ae_title="SENDER")
            entity.add_requested_context(CT)
            for some, end in ((pieces, "release"), (others, "kill")):
                association = entity.associate("127.0.0.1", port, ae_title="MEDSEG")
                assert [association.send_c_store(piece).Status for piece in some] == [0] * len(some)
                if end == "release":
                    association.release()
                    until = time.monotonic() + 60
                    while not list((tmp_path / "spool").glob("*.state")):
                        assert time.monotonic() < until
                        time.sleep(0.02)
        finally:
            child.kill()
    (tmp_path / "spool" / "000099.dcm").write_bytes(
        b"half an instance whose sender was told nothing"
    )
    with running(spool=tmp_path / "spool") as node:
        node.wait("series 1: delivered")
        assert "series 2: 3 instances taken up again: its sender broke off" in node.lines
        send(node, others)
        node.wait("series 2: delivered")
    assert [uids(got) for got in node.received] == [uids(pieces), uids(others)]


def test_a_series_of_which_a_part_was_refused_is_kept_and_used_once_all_of_it_came_again(
    tmp_path: Path,
):
    pieces = series(5)
    with running(spool=tmp_path / "spool", limits=Limits(instances=3)) as node:
        assert send(node, pieces)[-1] == listen.NO_ROOM
        node.wait("series 1: kept: it has more than 3 instances")
    assert stored(tmp_path / "spool") == 3
    with running(spool=tmp_path / "spool") as node:
        assert send(node, pieces[2:]) == [0] * 3
        node.wait("only a part of it was sent again")
        assert not node.received and stored(tmp_path / "spool") == 5
        assert send(node, pieces) == [0] * 5
        node.wait("delivered")
    assert [uids(got) for got in node.received] == [uids(pieces)]
    assert not stored(tmp_path / "spool")


def test_what_is_kept_counts_for_the_limit_and_is_never_deleted_for_something_new(tmp_path: Path):
    def segment(folder: Path, results: Path) -> None:
        raise BadFile("no model for this")

    first = series()
    size = sum(len(part10(piece)) for piece in first)
    limits = Limits(total_bytes=size + 100)
    with running(segment=segment, spool=tmp_path / "spool", limits=limits) as node:
        assert send(node, first) == [0] * 4
        node.wait("series 1: kept")
        assert send(node, series()) == [listen.NO_ROOM] * 4
        node.wait("there is no room for more")
    with running(segment=segment, spool=tmp_path / "spool", limits=limits) as node:
        assert send(node, series()) == [listen.NO_ROOM] * 4
    assert stored(tmp_path / "spool") == 4
    with running(spool=tmp_path / "spool", limits=limits) as node:
        node.wait("series 1: delivered")
        assert send(node, series()) == [0] * 4
        node.wait("series 2: delivered")


def test_files_of_the_spool_that_the_disk_has_lost_make_a_series_broken(tmp_path: Path):
    with running(spool=tmp_path / "spool", quiet_s=60) as node:
        send(node, series())
    one, two, *_ = sorted((tmp_path / "spool").glob("series-*/*.dcm"))
    one.write_bytes(b"")
    with running(spool=tmp_path / "spool") as node:
        assert (
            "series 1: 3 instances taken up again: some of it cannot be read any more" in node.lines
        )
        time.sleep(1)
    assert not node.received and two.exists()


def others_may_read(spool: Path) -> None:
    spool.mkdir()
    spool.chmod(0o755)


def a_link(spool: Path) -> None:
    (spool.parent / "other").mkdir(mode=0o700)
    spool.symlink_to(spool.parent / "other")


def a_file(spool: Path) -> None:
    spool.write_bytes(b"")


@pytest.mark.parametrize("make", [others_may_read, a_link, a_file])
def test_a_spool_that_is_not_private_is_refused(make: Callable[[Path], None], tmp_path: Path):
    if make is others_may_read and not HAS_MODES:
        pytest.skip("this system tells no modes")
    make(tmp_path / "spool")
    node = Node(spool=tmp_path / "spool")
    with pytest.raises(BadConfig, match="--spool"):
        node.listener.run()


def test_two_nodes_do_not_share_a_spool(tmp_path: Path):
    with running(spool=tmp_path / "spool"), pytest.raises(BadConfig, match="another medseg listen"):
        Node(spool=tmp_path / "spool").listener.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_keeps_what_it_received_and_goes_on_with_it(number: int, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "-m",
        "medseg",
        "listen",
        "-o",
        tmp_path / "out",
        "--port",
        port,
        "--model",
        "otsu",
        "--quiet-s",
    ]
    pieces = series(3, side=32)
    for piece in pieces:
        values = np.random.default_rng(piece.InstanceNumber).normal(100, 30, (32, 32))
        values[8:20, 8:20] += 1000
        piece.PixelData = values.astype(np.int16).tobytes()
    entity = AE(ae_title="SENDER")
    entity.add_requested_context(CT)
    with tiny.start(*command, 300) as child:
        try:
            assert child.stderr and "listening" in child.stderr.readline()
            association = entity.associate("127.0.0.1", port, ae_title="MEDSEG")
            assert [association.send_c_store(piece).Status for piece in pieces] == [0] * 3
            association.release()
            time.sleep(1)
            child.send_signal(number)
            _, told = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 128 + number
    assert "stopped: 3 instances of 1 series are kept for the next start" in told
    with tiny.start(*command, 1) as child:
        try:
            assert child.stderr
            lines = []
            for line in child.stderr:
                lines.append(line)
                if "series 1: delivered" in line or "kept:" in line:
                    break
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=60)
        finally:
            child.kill()
    assert "series 1: 3 instances taken up again\n" in lines and "series 1: delivered\n" in lines
    assert len(list((tmp_path / "out").glob("series-0001-*.dcm"))) == 1
    assert not (tmp_path / "out" / ".medseg-spool").exists()


# Connections that say nothing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [(60, b""), (20, b"\x01\x00\x00"), (20, b"GET / HTTP/1.0\r\n\r\n")],
    ids=["silent", "a part", "http"],
)
def test_idle_connections_keep_no_sender_out(count: int, words: bytes):
    with running(
        associations=2, quiet_s=2
    ) as node:  # a busy machine may take a second between two instances
        idle = []
        try:
            for _ in range(count):
                idle.append(socket.create_connection(("127.0.0.1", node.listener.port), timeout=5))
                with suppress(OSError):
                    idle[-1].sendall(words)
            for number in (1, 2):
                assert send(node, series()) == [0] * 4
                node.wait(f"series {number}: delivered")
        finally:
            for connection in idle:
                connection.close()


def test_idle_senders_make_room_and_busy_ones_do_not(monkeypatch: pytest.MonkeyPatch):
    with running(associations=2) as node, calling(node) as one, calling(node) as two:
        with calling(node) as three:
            assert not three.is_established
        monkeypatch.setattr(listen, "IDLE_S", 0.5)
        time.sleep(1)
        assert two.send_c_echo().Status == 0
        assert send(node, series()) == [0] * 4
        assert two.send_c_echo().Status == 0
        assert not one.is_established, "the one that was silent for longest had to go"
        node.wait("series 1: delivered")


def associate_request(title: str = "MEDSEG") -> bytes:
    """The bytes with which a sender opens an association."""
    sent = []
    entity = AE(ae_title="FUZZ")
    entity.add_requested_context(CT)

    def drop(connection: socket.socket) -> None:
        peer, _ = connection.accept()
        sent.append(peer.recv(65536))
        peer.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drop, args=(server,))
        thread.start()
        entity.associate("127.0.0.1", server.getsockname()[1], ae_title=title)
        thread.join()
    assert A_ASSOCIATE_RQ().pdu_type == sent[0][0]
    return sent[0]


def store_request(piece: Dataset) -> list[bytes]:
    """The P-DATA-TF PDUs of a C-STORE of one instance."""
    command = Dataset()
    command.AffectedSOPClassUID, command.AffectedSOPInstanceUID = (
        piece.SOPClassUID,
        piece.SOPInstanceUID,
    )
    command.CommandField, command.MessageID, command.Priority, command.CommandDataSetType = (
        1,
        1,
        2,
        1,
    )

    def encoded(dataset: Dataset, implicit: bool) -> bytes:
        from pynetdicom.dsutils import encode

        return encode(dataset, implicit, True) or b""

    def pdu(control: int, data: bytes) -> bytes:
        item = struct.pack(">LBB", len(data) + 2, 1, control) + data
        return struct.pack(">BBL", 4, 0, len(item)) + item

    body = encoded(command, True)
    body = struct.pack("<HHLL", 0, 0, 4, len(body)) + body
    return [pdu(3, body), pdu(2, encoded(piece, True))]


def damaged(data: bytes, random_: random.Random) -> bytes:
    """Bytes cut off, changed, doubled, or with an impossible length."""
    data = bytearray(data)
    kind = random_.randrange(6)
    if kind == 0:
        del data[random_.randrange(len(data)) :]
    elif kind == 1:
        for _ in range(random_.randint(1, 20)):
            data[random_.randrange(len(data))] = random_.randrange(256)
    elif kind == 2:
        at = random_.randrange(len(data))
        data[at:at] = random_.randbytes(random_.randint(1, 300))
    elif kind == 3 and len(data) > 6:
        data[2:6] = struct.pack(">L", random_.choice([0, 1, 2**31, 2**32 - 1, len(data) * 2]))
    elif kind == 4:
        data = bytearray(random_.randbytes(random_.randint(1, 2000)))
    else:
        at = random_.randrange(len(data))
        del data[at : at + random_.randint(1, 50)]
    return bytes(data)


def assault(port: int, count: int, seed: int) -> None:
    """Connect `count` times and send something broken: at the door, in a command, in a dataset, or
    in the middle.
    """
    random_ = random.Random(seed)
    hello = associate_request()
    command, dataset = store_request(series(1)[0])
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number % 2, 0)
            )
            try:
                if number % 4 == 0:
                    connection.sendall(damaged(hello, random_))
                else:
                    connection.sendall(hello)
                    connection.recv(65536)
                    if number % 4 == 1:
                        connection.sendall(damaged(command, random_))
                    elif number % 4 == 2:
                        connection.sendall(command + damaged(dataset, random_))
                    else:  # a well-formed wrapping of a broken file
                        inner = damaged(dataset[12:], random_)
                        item = struct.pack(">LBB", len(inner) + 2, 1, 2) + inner
                        connection.sendall(command + struct.pack(">BBL", 4, 0, len(item)) + item)
                        connection.settimeout(0.05)
                        connection.recv(1000)
            except (ConnectionError, TimeoutError):
                pass


def test_it_survives_200_malformed_or_truncated_associations_and_files(
    capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Afterwards it serves as before, and neither a log line, an error nor a traceback tells of
    what was sent.
    """
    crashes: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    caplog.set_level(logging.DEBUG)
    before = threading.active_count()
    with running(associations=50, quiet_s=0.2) as node:
        assault(node.listener.port, 200, seed=1)
        assert send(node, series()) == [0] * 4
        node.wait("delivered", 30)
        end = time.monotonic() + 40
        while node.listener._open and time.monotonic() < end:
            time.sleep(0.05)
        assert not node.listener._open, "associations outlive their connection"
    assert [len(got) for got in node.received] == [4], "a series whose sender broke off was used"
    assert threading.active_count() <= before + 1
    printed = capfd.readouterr()
    everything = printed.out + printed.err + caplog.text + "\n".join(node.lines) + repr(crashes)
    assert "SENTINEL" not in everything and "Traceback" not in everything
    assert not crashes


def test_events_that_cross_end_their_association_and_no_thread_by_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    crashes: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    with running(quiet_s=0.2) as node:
        with socket.create_connection(("127.0.0.1", node.listener.port), timeout=5) as connection:
            connection.sendall(associate_request())
            connection.recv(65536)
            (association,) = node.listener._open
            association.dul.event_queue.put("Evt5")  # a connection, when there is one
            end = time.monotonic() + 20
            while node.listener._open and time.monotonic() < end:
                time.sleep(0.02)
        assert not node.listener._open
        assert send(node, series()) == [0] * 4
        node.wait("delivered", 30)
    assert not crashes


@contextmanager
def archive(refuse: bool = False) -> Iterator[tuple[int, list[Dataset]]]:
    """A node that takes segmentations, and what it got."""
    got: list[Dataset] = []

    def keep(event: evt.Event) -> int:
        got.append(event.dataset)
        return 0xA700 if refuse else 0

    entity = AE(ae_title="ARCHIVE")
    entity.require_called_aet = True
    entity.add_supported_context(SEG)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)]
    )
    try:
        yield server.server_address[1], got
    finally:
        server.shutdown()


def test_the_real_chain_from_slices_to_a_segmentation_in_an_archive(tmp_path: Path):
    """A child process segments, the result is kept in a folder and sent on."""
    pieces = series()
    segment = listen.segment_in_child(["--model", "otsu"], 120)
    with archive() as (port, got), running(segment=segment) as node:
        keep, send_on = (
            listen.keep_in(tmp_path),
            listen.send_to("127.0.0.1", port, "ARCHIVE", "MEDSEG"),
        )
        node.listener._deliver = lambda name, files: (keep(name, files), send_on(name, files))
        send(node, pieces)
        node.wait("series 1: delivered", 60)
        gap = series(6)
        send(node, gap[:2] + gap[4:])
        node.wait("series 2: kept", 60)
    (result,) = got
    assert result.Modality == "SEG" and result.StudyInstanceUID == pieces[0].StudyInstanceUID
    assert result.PatientName == SECRET
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition(".")[2] for name in kept] == ["dcm", "json", "labels.csv"]
    assert all(name.startswith("series-0001-") for name in kept)
    assert any(line.startswith("series 2: kept: it: ") for line in node.lines)
    assert node.lines[-1] == "stopped: 4 instances of 1 series are thrown away"
    assert "SENTINEL" not in "".join(node.lines)


def test_a_series_that_takes_too_long_is_given_up(tmp_path: Path):
    with pytest.raises(BadFile, match="longer than"):
        listen.segment_in_child([], 0.05)(tmp_path, tmp_path)


def test_results_that_an_archive_refuses_are_an_error(tmp_path: Path):
    piece = series(1)[0]
    piece.SOPClassUID = piece.file_meta.MediaStorageSOPClassUID = SEG
    piece.save_as(tmp_path / "result.dcm", enforce_file_format=True)
    with archive(refuse=True) as (port, _), pytest.raises(BadOutput, match="refused 1 of 1"):
        listen.send_to("127.0.0.1", port, "ARCHIVE", "MEDSEG")("a", [tmp_path / "result.dcm"])


def test_an_archive_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listen, "RETRY_S", (0, 0.01))
    series(1)[0].save_as(tmp_path / "result.dcm", enforce_file_format=True)
    with pytest.raises(BadOutput, match="cannot be reached"):
        listen.send_to("127.0.0.1", 9, "ARCHIVE", "MEDSEG")("a", [tmp_path / "result.dcm"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where results go"),
        (["-o", "out", "--host", "0.0.0.0"], "--peer"),
        (["--reply-to", "nowhere"], "HOST:PORT:TITLE"),
        (["--reply-to", "host:0:X"], "HOST:PORT:TITLE"),
        (["-o", "out", "--title", "x" * 17], "1 to 16"),
        (["-o", "out", "--model", "nothing"], "nothing"),
        (["-o", "out", "--also", "pdf"], "--also pdf"),
    ],
)
def test_wrong_use_is_refused_at_once(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("listen", *arguments)
    assert ran.code in (5, 6) and message in ran.err


def test_a_port_in_use_is_said_so(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = tiny.medseg(
            "listen", "-o", tmp_path, "--port", other.getsockname()[1], "--model", "otsu"
        )
    assert ran.code == 5 and "choose another --port" in ran.err
