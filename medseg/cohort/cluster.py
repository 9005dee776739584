"""The staff of a part on a Ray cluster, as the supervisor sees it, which does not know Ray.

A process of its own talks to Ray (`medseg.cohort.on_ray`), for Ray ends that when the head of the
cluster is gone. Lines of JSON go between them.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from medseg.cohort.resources import Measured
from medseg.cohort.staff import Hand, Message, Staff, command_of
from medseg.errors import BadConfig, MedsegError
from medseg.machine import apart
from medseg.text import harmless

#: Seconds that the cluster has to answer at first, and what talks to it has to end.
_REACH_S, _END_S = 90.0, 30.0
#: Seconds within which the head of a cluster must take a connection.
_LISTENS_S = 10.0
#: Further workers must promise so much less time than one.
_WORTH_IT = 0.95


def check_ray() -> None:
    """Raise `BadConfig` where Ray is not installed."""
    if find_spec("ray") is None:
        raise BadConfig('--on ray needs Ray, which is not installed: pip install "medseg[ray]"')


def check_answers(address: str) -> None:
    """Raise `BadConfig` where nobody listens at 'host:port', which Ray takes minutes to say."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isascii() and port.isdigit()):
        return  # 'auto', and what Ray alone understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENS_S).close()
    except (OSError, OverflowError, UnicodeError):
        raise BadConfig(_no_cluster(f"at {harmless(address)}")) from None


def _no_cluster(where: str) -> str:
    return (
        f"--on ray: no Ray cluster answers {where}; start it, or give the address of its head, as"
        " --on ray:HOST:PORT"
    )


class Cluster(Staff):
    """The workers of one part on a Ray cluster.

    address: 'host:port' of its head, 'auto' for the cluster that this machine belongs to, '' for
    one that is started here and ended with the run. Raises `BadConfig` where there is no Ray, or no
    cluster.
    """

    start_limit_s = inf  # a cluster may be full for hours

    def __init__(
        self, hello: Mapping[str, Any], address: str = "", command: Sequence[str] | None = None
    ) -> None:
        super().__init__(hello, command or ())
        self._members: dict[str, Member] = {}
        self._need_bytes = 0
        self._lost = ""
        self._address = address
        self._process = subprocess.Popen(
            command_of("on_ray"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **apart(),
        )
        try:
            self._nodes = self._reach()
        except BaseException:
            self._process.kill()
            raise
        self._wants_gpu = _wants_gpu(hello) and any(node["gpus"] for node in self._nodes)
        threading.Thread(target=self._relay, daemon=True).start()

    def _reach(self) -> list[dict[str, Any]]:
        """The nodes of the cluster. Raises `BadConfig`."""
        self.say({"address": self._address})
        stream = self._process.stdout
        assert stream is not None
        watch = threading.Timer(_REACH_S, self._process.kill)
        watch.start()
        line = stream.readline()
        watch.cancel()
        answer = json.loads(line) if line else {}
        if "nodes" in answer:
            return list(answer["nodes"])
        where = f"at {harmless(self._address)}" if self._address else "here"
        raise BadConfig(answer.get("refused") or _no_cluster(where))

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message to what talks to Ray; that it is gone is heard of elsewhere."""
        stream = self._process.stdin
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()

    def _relay(self) -> None:
        """Messages of Ray's workers into the queue that is listened to."""
        stream = self._process.stdout
        assert stream is not None
        with suppress(OSError, ValueError):
            for line in stream:
                news = json.loads(line)
                member = self._members.get(news["from"])
                if member is None:
                    continue
                member.note(news)
                for message in news["messages"]:
                    self._said.put((member, message))
                if news["gone"]:
                    self._said.put((member, None))
        self._lost = (
            "the Ray cluster is gone: its head does not answer; what is done is done, and the same"
            " command goes on once the cluster is there again"
        )

    def listen(self, timeout_s: float) -> Iterator[tuple[Hand, dict[str, Any]]]:
        """What workers say within a time. Raises `MedsegError` where the cluster is gone."""
        yield from super().listen(timeout_s)
        if self._lost:
            raise MedsegError(self._lost)

    def _start(self, threads: int) -> Hand:
        member = Member(self, self._said)
        self._members[member.name] = member
        self.say(
            {
                "hire": member.name,
                "cpus": threads,
                "gpus": int(self._wants_gpu),
                "memory_bytes": self._need_bytes,
                "command": list(self._command),
                "cohort": _mark(self._hello["out"]),
            }
        )
        return member

    @property
    def cores(self) -> int:
        """Cores that one worker may use at most: those of the largest node."""
        return max(node["cpus"] for node in self._nodes)

    def threads_of(self, workers: int) -> int:
        """Threads of each of so many workers."""
        every = sum(node["cpus"] for node in self._nodes)
        return max(1, min(self.cores, every // workers))

    def share_bytes(self, hand: Hand, workers: int, limit_bytes: int | None) -> int:
        """What a worker may hold for a case: its share of its node, within a limit for each
        node.
        """
        assert isinstance(hand, Member)
        here = [one for one in self.hands if isinstance(one, Member) and one.node == hand.node]
        free = min((one.usable_bytes for one in here if one.usable_bytes), default=0)
        share = free + sum(one.resident_bytes() for one in here)
        return max(1, min(share, limit_bytes or share) // max(1, len(here)))

    def choose(
        self, costs: Measured, *, cases_left: int, limit_bytes: int | None, on_gpu: bool
    ) -> tuple[int, int]:
        """(workers, threads of each): one for each GPU, or as many of one thread as cores and
        memory of the nodes allow, unless one of all threads of a node promises to be as fast.
        """
        if on_gpu:
            gpus = sum(node["gpus"] for node in self._nodes) or 1
            return gpus, max(1, self.cores // max(1, *(node["gpus"] for node in self._nodes)))
        need = max(1, costs.memory_bytes)
        fitting = [
            min(node["cpus"], min(node["memory_bytes"], limit_bytes or 2**62) // need)
            for node in self._nodes
        ]
        workers = max(1, min(sum(fitting), cases_left))
        many_s = costs.start_s + costs.one_thread_s * -(-cases_left // workers)
        if many_s >= _WORTH_IT * costs.all_threads_s * cases_left:
            return 1, self.cores
        self._need_bytes = need if sum(fitting) else 0
        return workers, 1

    def close(self) -> None:
        """Let all workers go, and Ray."""
        super().close()
        stream = self._process.stdin
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Member(Hand):
    """A worker in an actor somewhere, with what was last heard of it."""

    def __init__(self, cluster: Cluster, said: queue.SimpleQueue[Message]) -> None:
        self._prepare()
        self._cluster = cluster
        self._resident_bytes = 0
        self.usable_bytes = 0
        self.node = ""
        self._status: int | None = 0
        self._words = ""

    def note(self, news: Mapping[str, Any]) -> None:
        """Take what an actor says of its worker and its node."""
        self._resident_bytes = news["resident_bytes"]
        self.usable_bytes = news["usable_bytes"]
        self.node = news["node"] or self.node
        if news["gone"]:
            self._status, self._words = news["gone"]["status"], news["gone"]["words"]

    def tell(self, **message: Any) -> None:
        """Send a message; that it is gone is heard of elsewhere."""
        self._cluster.say({"to": self.name, "message": message})

    def resident_bytes(self) -> int:
        """Memory that it held when it was last heard of."""
        return self._resident_bytes

    def end(self, why: str = "") -> None:
        """End it at once."""
        self.ended_for = why
        self._cluster.say({"end": self.name})

    def close(self) -> int | None:
        """Let it go; returns its exit status, None where its machine is gone."""
        self._cluster.say({"leave": self.name})
        return self._status

    def last_words(self) -> str:
        """The last line that it wrote to stderr."""
        return self._words


def _wants_gpu(hello: Mapping[str, Any]) -> bool:
    settings = hello["request"].get("settings", {})
    return str(settings.get("device", "auto")).startswith(("auto", "cuda"))


def _mark(out: str) -> tuple[str, str] | None:
    """A file of the output and its hash, by which a node knows that it sees the same folder; None
    for a store, which all see.
    """
    if "://" in out:
        return None
    path = Path(out) / "cohort.json"
    return str(path), sha256(path.read_bytes()).hexdigest()
