"""A process of a run that is gone: the others hear of it, say so once, and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from making import networks as tiny, phantoms
from making.cohort import environment
from making.configs import SMALL
from making.places import ROOT
from medseg.training import watch
from medseg.training.watch import GONE, Watch, is_about_another


class Shared:
    """A store in this process, which may stop to answer, or be gone."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.waits = threading.Event()
        self.waits.set()
        self.is_gone = False

    def add(self, key: str, amount: int) -> int:
        self.waits.wait(600)
        if self.is_gone:
            raise RuntimeError("closed by peer")
        self.numbers[key] += amount
        return self.numbers[key]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SIGN_S", 0.02)
    monkeypatch.setattr(watch, "_GONE_S", 1.0)


class Some:
    """Watches of several processes, and what each said at its end."""

    def __init__(self, size: int) -> None:
        self.store, self.words = Shared(), dict[int, str]()
        self.watches = [
            Watch(
                self.store, name="run", rank=rank, size=size,
                end=lambda text, rank=rank: self.words.update({rank: text}),
            )
            for rank in range(size)
        ]  # fmt: skip
        for one in self.watches:
            one.start()

    def wait(self, count: int) -> None:
        until = time.monotonic() + 600
        while len(self.words) < count and time.monotonic() < until:
            time.sleep(0.02)


def test_one_that_gives_no_sign_ends_the_others_and_one_says_so(quick: None):
    some = Some(3)
    some.watches[0]._over.set()  # as if its machine were gone
    some.wait(2)
    assert some.words == {1: GONE, 2: ""}


def test_one_that_leaves_as_it_should_ends_nobody(quick: None):
    some = Some(3)
    some.watches[0].stop()
    some.watches[2].stop()
    time.sleep(1.5)  # longer than a sign may be away
    assert some.words == {}
    some.watches[1].stop()
    assert some.store.numbers["run/left/1"] == 1


def test_time_in_which_all_stood_still_counts_for_nobody(
    quick: None, monkeypatch: pytest.MonkeyPatch
):
    ahead_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s[0])
    monkeypatch.setattr(watch, "time", clock)
    some = Some(2)
    time.sleep(0.2)
    ahead_s[0] = 600.0  # a job that was suspended goes on
    time.sleep(1.5)  # longer than a sign may be away
    assert some.words == {}
    some.watches[0]._over.set()
    some.wait(1)
    assert some.words == {1: GONE}


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_the_store_that_is_gone_ends_all(quick: None, how: str):
    some = Some(2)
    if how == "closed":
        some.store.is_gone = True
    else:
        some.store.waits.clear()
    some.wait(2)
    some.store.waits.set()
    assert some.words == {0: GONE, 1: GONE}  # neither knows of the other


def test_one_that_fails_ends_the_others_without_a_word_and_only_one_says_why(
    quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "_FAILED_S", 0.3)
    some = Some(3)
    assert some.watches[1].fail()
    assert not some.watches[0].fail()
    some.wait(1)
    time.sleep(1.5)  # longer than a sign may be away
    assert some.words == {2: ""}


def test_where_the_store_is_gone_one_that_fails_says_why(quick: None):
    some = Some(2)
    some.watches[0].stop()
    some.store.is_gone = True
    assert some.watches[1].fail()


def test_errors_of_pytorch_that_are_about_another_process_are_known():
    closed = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4"
    assert is_about_another(RuntimeError(closed))
    assert not is_about_another(RuntimeError("shapes do not fit"))
    assert not is_about_another(ValueError(closed))
    assert not is_about_another(None)


def test_a_killed_process_ends_the_run_in_a_sentence_and_one_alone_goes_on(tmp_path: Path):
    data, run = phantoms.dataset(tmp_path / "data"), tmp_path / "run"
    common = ["-m", "medseg", "train", str(data), "-o", str(run), "--quiet"]
    for key, value in (SMALL | {"train.steps": 300, "train.checkpoint_every": 3}).items():
        common += ["--set", f"{key}={json.dumps(value)}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "--no-python", sys.executable, *common],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 600
    while not (run / "state.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    ranks = [
        one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"
    ]
    os.kill(ranks[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert err.count(GONE) == 1
    assert "please report" not in err
    alone = tiny.run_child(*common, timeout=600)
    assert alone.code == 0, alone.err
    assert (run / "model" / "model.safetensors").is_file()
