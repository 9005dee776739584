"""Run as a program: what talks to Ray (https://docs.ray.io), the only file that knows it.

An actor holds one worker process, passes on what is said, and tells what memory it holds. Ray is
asked to start nothing again and to repeat nothing, since records and attempts decide; a worker has
one case at a time, and none waits in Ray.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from medseg.cohort.cluster import check_ray
from medseg.cohort.resources import cores_here, usable_bytes
from medseg.cohort.staff import COMMAND, Hand, Message
from medseg.errors import BadConfig
from medseg.packages import __version__
from medseg.text import harmless

#: Seconds that an actor waits for what its worker says, and that an idle one is left alone.
_POLL_S, _IDLE_S = 0.25, 2.0
#: Seconds that an actor which does not answer has until it is ended.
_ANSWER_S = 20.0
#: Objects that go through Ray are some kilobytes; this is the least that it takes.
_STORE_BYTES = 80_000_000
#: Ray reports nothing about its use.
_SILENT = {"RAY_USAGE_STATS_ENABLED": "0"}
_NO_MEDSEG = "No module named 'medseg'"


def main() -> None:
    """Serve the supervisor until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)  # what Ray prints must not stand between messages
    os.environ.update(_SILENT)
    address = json.loads(sys.stdin.readline())["address"]
    lock = threading.Lock()

    def say(message: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(message) + "\n")
            out.flush()

    try:
        say({"nodes": _join(address)})
    except BadConfig as error:
        say({"refused": str(error)})
        os._exit(0)
    _pass_on(sys.stdin, say)
    import ray

    ray.shutdown()
    os._exit(0)


def _join(address: str) -> list[dict[str, Any]]:
    """Be part of a cluster, or start one here; its nodes."""
    check_ray()
    import ray

    own: dict[str, Any] = {}
    if not address:
        address = "local"
        own = {"num_cpus": cores_here(), "object_store_memory": _STORE_BYTES}
        own |= {"include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **own)
    except Exception as error:
        kind = type(error).__name__
        raise BadConfig(
            f"--on ray: the Ray cluster at {harmless(address)} cannot be joined ({kind}); give the"
            " address of its head, as --on ray:HOST:PORT, with the same versions of Ray and Python"
        ) from None
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise BadConfig("--on ray: the cluster has no node with a core for a worker")
    return [
        {
            "cpus": int(node["Resources"]["CPU"]),
            "gpus": int(node["Resources"].get("GPU", 0)),
            "memory_bytes": int(node["Resources"].get("memory", 0)),
        }
        for node in nodes
    ]


def _pass_on(orders: TextIO, say: Any) -> None:
    """What the supervisor says, to the thread of each worker."""
    inboxes: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
    for line in orders:
        order = json.loads(line)
        name = order.get("hire") or order.get("to") or order.get("end") or order.get("leave")
        if "hire" in order:
            inboxes[name] = queue.SimpleQueue()
            relay = Relay(order, inboxes[name], say)
            threading.Thread(target=relay.run, daemon=True).start()
        elif name in inboxes:
            inboxes[name].put(order)


class Relay:
    """What goes between the supervisor and one actor, in a thread of its own."""

    def __init__(
        self, order: Mapping[str, Any], inbox: queue.SimpleQueue[dict[str, Any]], say: Any
    ) -> None:
        self._name, self._inbox, self._say = order["hire"], inbox, say
        self._order = order
        self._messages: list[dict[str, Any]] = []
        self._is_ended = self._is_left = False

    def run(self) -> None:
        """Until the worker is gone, or let go."""
        import ray

        news: dict[str, Any] = {"messages": [], "resident_bytes": 0, "usable_bytes": 0, "node": ""}
        actor = self._make()
        is_busy = True  # until it has said that it is ready
        try:
            while True:
                self._look(0.0 if is_busy else _IDLE_S)
                if self._is_left:
                    ray.wait([actor.leave.remote()], timeout=_ANSWER_S)
                    return
                messages, self._messages = self._messages, []
                is_busy |= any("task" in one for one in messages)
                answer = actor.exchange.remote(messages, self._is_ended, is_busy * _POLL_S)
                if not self._wait(answer):
                    raise TimeoutError
                news = ray.get(answer)
                events = [one["event"] for one in news["messages"]]
                is_busy &= not any(one in ("ready", "ended") for one in events)
                self._say({"from": self._name} | news)
                if news["gone"]:
                    return
        except Exception as error:  # Ray's errors, of which each means that the actor is gone
            messages = [_refusal(error)] if _NO_MEDSEG in str(error) else []
            gone = {"status": None, "words": type(error).__name__}
            self._say({"from": self._name} | news | {"messages": messages, "gone": gone})
        finally:
            with suppress(Exception):
                ray.kill(actor)

    def _make(self) -> Any:
        import ray

        order = self._order
        options: dict[str, Any] = {"num_cpus": order["cpus"], "num_gpus": order["gpus"]}
        if order["memory_bytes"]:
            options["memory"] = order["memory_bytes"]
        kind = ray.remote(Post).options(max_restarts=0, max_task_retries=0, **options)
        return kind.remote(__version__, order["command"] or list(COMMAND), order["cohort"])

    def _look(self, wait_s: float) -> None:
        """Take what the supervisor said meanwhile."""
        try:
            order = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                if "message" in order:
                    self._messages.append(order["message"])
                self._is_ended |= "end" in order
                self._is_left |= "leave" in order
                order = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _wait(self, answer: Any) -> bool:
        """Wait for an answer, which takes long while there is no room for the actor; False where it
        is to end and does not answer.
        """
        import ray

        since = time.monotonic()
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            self._look(0.0)
            if not (self._is_ended or self._is_left):
                since = time.monotonic()
            if self._is_left or time.monotonic() - since > _ANSWER_S:
                return False
        return True


def _refusal(error: Exception) -> dict[str, Any]:
    return {
        "event": "refused",
        "error": "a node of the Ray cluster has no medseg; install there what is installed here",
        "exit_code": BadConfig.exit_code,
    }


class Post:
    """The actor: it holds one worker process on its node.

    version: of the medseg that asks. cohort: a file of the output and its hash, None where it is in
    a store.
    """

    def __init__(
        self, version: str, command: Sequence[str], cohort: tuple[str, str] | None
    ) -> None:
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._problem = _why_not(version, cohort)
        self._hand = None if self._problem else Hand(command, self._said)

    def exchange(self, messages: Sequence[dict[str, Any]], end: bool, wait_s: float) -> Any:
        """Pass messages to the worker, and return what it says within a time."""
        if self._hand is None:
            refused = {"event": "refused", "error": self._problem, "exit_code": 5}
            return self._news([refused], {"status": 5, "words": ""})
        for message in messages:
            self._hand.tell(**message)
        if end:
            self._hand.end()
        heard: list[dict[str, Any]] = []
        gone = None
        with suppress(queue.Empty):
            said = self._said.get(timeout=max(0.01, wait_s))[1]
            while said is not None:
                heard.append(said)
                said = self._said.get_nowait()[1]
            gone = {"status": self._hand.close(), "words": self._hand.last_words()}
        return self._news(heard, gone)

    def _news(self, heard: list[dict[str, Any]], gone: dict[str, Any] | None) -> dict[str, Any]:
        import ray

        resident = self._hand.resident_bytes() if self._hand and not gone else 0
        return {
            "messages": heard,
            "gone": gone,
            "resident_bytes": resident,
            "usable_bytes": usable_bytes(),
            "node": ray.get_runtime_context().get_node_id(),
        }

    def leave(self) -> None:
        """Let the worker end."""
        if self._hand is not None:
            self._hand.close()


def _why_not(version: str, cohort: tuple[str, str] | None) -> str:
    """Why this node cannot work on the cohort, '' where it can."""
    if version != __version__:
        return (
            f"a node of the Ray cluster has medseg {__version__} and this one is {version}; install"
            " the same everywhere"
        )
    if cohort is None:
        return ""
    path, digest = cohort
    with suppress(OSError):
        if sha256(Path(path).read_bytes()).hexdigest() == digest:
            return ""
    return (
        f"a node of the Ray cluster does not see the output folder {Path(path).parent}; give one"
        " that every node sees, or a store such as s3://bucket/out"
    )
