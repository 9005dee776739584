"""Run as a program: a worker of a cohort, which does one case after the other until its stdin ends.

Lines of JSON come in: first what is asked of every case, then the settled arithmetic, then tasks;
lines of JSON go out: that it is ready, and what became of each task. Signals that are meant for the
program that supervises it are ignored; when that program is gone, so is the worker, and its part
files.
"""

from __future__ import annotations

import _thread
import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from medseg.cohort.request import request_from_json
from medseg.cohort.stores import Store, is_store
from medseg.cohort.work import Worker, do, task_of
from medseg.errors import DeviceFailed, Interrupted, MedsegError
from medseg.machine import STOP_SIGNALS, keep_memory
from medseg.stream import READING

#: Seconds that a worker has to clean up once its supervisor is gone.
_GRACE_S = 20.0
#: What the main thread is told to leave by. Windows has no SIGUSR1, and sends nobody a SIGTERM.
_LEAVE = getattr(signal, "SIGUSR1", signal.SIGTERM)
Messages = queue.Queue[dict[str, Any] | None]


def main() -> None:
    """Serve tasks until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)  # what a library prints must not stand between messages
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(_LEAVE, _interrupt)
    warnings.simplefilter("ignore")
    messages: Messages = queue.Queue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    with suppress(Interrupted):
        try:
            _serve(messages, out)
        except DeviceFailed:  # another worker does the case again
            os._exit(1)
        except MedsegError as error:
            if isinstance(error, Interrupted):
                raise
            _say(out, event="refused", error=str(error), exit_code=error.exit_code)
    out.flush()
    os._exit(0)  # threads of libraries have nothing left to do


def _serve(messages: Messages, out: TextIO) -> None:
    from medseg.inference import (
        limit_threads,
        load_model,
        models_kept_open,
        settle_auto,
        use_settled,
    )

    hello = messages.get()
    if hello is None:
        return
    keep_memory()
    request = request_from_json(hello["request"])
    limit_threads(hello["threads"])
    model = load_model(*request.models, folds=request.folds, checkpoint=request.checkpoint)
    own_choice = settle_auto(model, request.settings, hello["settled"])
    _say(out, event="ready", settled=own_choice)
    message = messages.get()
    if message is None:
        return
    choice = message["settled"]
    use_settled(choice)
    backend = "torch" if request.settings.backend == "auto" else request.settings.backend
    device = choice.get("device", request.settings.device)
    if request.settings.device == "auto":
        request = replace(request, settings=replace(request.settings, device=device))
    request = replace(request, settings=replace(request.settings, backend=backend))
    worker = Worker(
        name=hello["name"],
        out=Path(hello["out"]),
        store=Store(hello["out"]) if is_store(hello["out"]) else None,
        request=request,
        model=model,
        device=device_name(device),
    )
    idle_since = time.perf_counter()
    with models_kept_open():
        while (message := messages.get()) is not None:
            if "threads" in message:
                limit_threads(message["threads"])
                continue
            _read_ahead(message.get("next", ()))
            wait_s = time.perf_counter() - idle_since
            outcome = do(task_of(message["task"]), worker, wait_s)
            _say(out, event="ended", **asdict(outcome))
            idle_since = time.perf_counter()


def device_name(device: str) -> str:
    """The model of the processor or GPU, for the record."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    import platform

    return platform.processor() or platform.machine()


def _listen(messages: Messages) -> None:
    """Messages into the queue; at the end of stdin the main thread is told to stop."""
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(None)
    main_thread = threading.main_thread().ident
    if main_thread is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, _LEAVE)
    else:
        _thread.interrupt_main(_LEAVE)
    time.sleep(_GRACE_S)
    os._exit(1)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


def _say(out: TextIO, **message: Any) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _read_ahead(names: Sequence[str]) -> None:
    """Ask the system, where it can be asked, to have the next case's files in memory by the time
    they are read.
    """
    for name in names if hasattr(os, "posix_fadvise") else ():
        with suppress(OSError, ValueError):
            descriptor = os.open(name, READING)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
