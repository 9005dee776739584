"""Training that a client starts, follows and stops; what trains is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from making import networks as tiny
from making.serving import Served, save_scans, served
from medseg.annotation import lessons
from medseg.annotation.teaching import Teaching

pytestmark = pytest.mark.usefixtures("one_thread")
#: Stands for a process that trains: it says what it is told, and ends when it hears 'end CODE'.
CHILD = """
import sys
for line in sys.stdin:
    if line.startswith("end"):
        sys.exit(int(line.split()[1]))
    sys.stderr.write(line)
    sys.stderr.flush()
"""


class Child:
    """The process of a run, steered by a test. words: with what it was started; runs: the folders
    in which it was.
    """

    def __init__(self) -> None:
        self.words: dict[str, Any] = {}
        self.runs: list[str] = []
        self.process: subprocess.Popen[str]

    def start(self, store: Any, run: Path, **words: Any) -> Teaching:
        """What the server calls in the place of `medseg.annotation.teaching.start`."""
        self.words = words
        self.runs.append(run.name)
        run.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return Teaching(self.process, run)

    def say(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()


@pytest.fixture
def child() -> Iterator[Child]:
    one = Child()
    with mock.patch.object(lessons, "start", one.start):
        yield one
    one.process.kill()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Served]:
    """Two scans, one with a label; a model that can be trained and one that cannot."""
    save_scans(tmp_path / "studies", "a", "b")
    with served(tmp_path, tiny.save_unet(tmp_path / "organs"), "otsu") as one:
        label(one, tmp_path)
        yield one


def label(here: Served, folder: Path) -> None:
    scan = tiny.volume_of(here.store.case("a").images[0])
    path = tiny.save_nifti(
        folder / "l.nii.gz", np.ones(scan.shape, np.uint8), np.array(scan.affine)
    )
    assert here.save_label("a", path, ["left body"]).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_a_run_is_started_followed_and_its_model_offered(here: Served, child: Child):
    client = here.client
    info = client.get("/info/").json()
    assert list(info["trainers"]) == ["tiny"] and info["train_stats"] == {}
    config = info["trainers"]["tiny"]["config"]
    assert all(isinstance(one, str) for choices in config.values() for one in choices)
    assert client.get("/train/").status_code == 404
    task = client.post(
        "/train/tiny", json={"time": "30m", "device": "cpu", "client_id": "me"}
    ).json()
    assert task["status"] == "RUNNING" and task["id"] and task["start_ts"]
    assert child.words["time_s"] == 1800 and child.words["options"] == ("--device", "cpu")
    assert Path(child.words["model"]).name == "organs"
    assert client.get("/train/?check_if_running=true").status_code == 200
    assert client.post("/train/tiny", json={}).status_code == 429
    child.say(
        json.dumps({"event": "training", "share": 0.4, "step": 7, "loss": 0.5, "seconds_left": 9}),
        json.dumps({"event": "validation", "step": 7, "dice": {"mean": 0.625}}),
    )
    until(lambda: client.get("/info/").json()["train_stats"]["tiny"]["best_metric"] == 0.625)
    stats = client.get("/info/").json()["train_stats"]["tiny"]
    assert (stats["epoch"], stats["total_epochs"]) == (40, 100) and "total_time" not in stats
    details = client.get("/train/").json()["details"]
    assert details and "40 % of the time, step 7, loss 0.500, Dice 0.625" in details[-1]
    run = here.store.folder / "runs" / "1"
    tiny.save_unet(run / "model")
    (run / "summary.json").write_text(json.dumps({"mean_over_structures": {"dice": 0.625}}))
    child.say("end 0")
    until(lambda: client.get("/train/").status_code == 404)
    assert "is done" in client.get("/train/").json()["detail"]
    info = client.get("/info/").json()
    assert "total_time" in info["train_stats"]["tiny"]
    assert "Dice 0.625" in info["models"]["round-1"]["description"]
    assert list(info["trainers"]) == ["tiny", "round-1"]
    assert here.infer("round-1", "image=a").status_code == 200
    assert "round-1: the new model is offered" in here.told


def test_a_run_is_stopped(here: Served, child: Child):
    assert here.client.delete("/train/").status_code == 404
    here.client.post("/train/", json={})  # as OHIF asks: the first that can be trained
    task = here.client.delete("/train/").json()
    assert task["status"] == "STOPPED" and task["details"] and task["end_ts"]
    assert here.client.get("/train/?check_if_running=true").status_code == 404
    assert child.process.poll() is not None


def stop(here: Served, name: str) -> None:
    """Stop a run, which leaves what `medseg train` would have left."""
    (here.store.folder / "runs" / name / "config.yaml").write_text("name: tiny\n")
    here.client.delete("/train/")


def test_a_run_that_was_stopped_goes_on_when_the_same_is_asked_for(here: Served, child: Child):
    here.client.post("/train/tiny", json={"time": "30m"})
    stop(here, "1")
    here.client.post("/train/tiny", json={"time": "30m"})
    assert child.runs == ["1", "1"]
    assert "tiny: training goes on, 1800 s" in here.told


@pytest.mark.parametrize("change", ["time", "label", "damage", "failure"])
def test_what_is_not_the_same_is_a_new_run(here: Served, child: Child, tmp_path: Path, change: str):
    here.client.post("/train/tiny", json={"time": "30m"})
    if change == "failure":
        child.say("end 5")
        until(lambda: here.client.get("/train/").status_code == 404)
    stop(here, "1")
    if change == "label":
        label(here, tmp_path)
    if change == "damage":
        (here.store.folder / ".asked.json").write_text('["{')
    here.client.post("/train/tiny", json={"time": "2h" if change == "time" else "30m"})
    assert child.runs == ["1", "2"]
    assert not [line for line in here.told if "goes on" in line]


def test_why_a_run_failed_is_told_without_its_places(here: Served, child: Child, tmp_path: Path):
    here.client.post("/train/tiny", json={})
    child.say(f"medseg: {here.store.folder}/runs/1: there is too little time", "end 5")
    until(lambda: here.client.get("/train/").status_code == 404)
    detail = here.client.get("/train/").json()["detail"]
    assert "the last training is failed" in detail and "there is too little time" in detail
    assert str(tmp_path) not in detail
    assert list(here.client.get("/info/").json()["models"]) == ["tiny", "otsu"]


def test_scans_are_segmented_on_the_cpu_while_a_model_is_trained(here: Served, child: Child):
    here.client.post("/train/tiny", json={})
    assert here.infer("otsu", "image=a").status_code == 200
    busy = here.infer("tiny", "image=a", device="cuda")
    assert busy.status_code == 429 and "on the GPU" in busy.json()["detail"]


@pytest.mark.parametrize(
    ("address", "config", "status"),
    [
        ("/train/none", {}, 404),
        ("/train/otsu", {}, 400),
        ("/train/tiny", {"time": "soon"}, 400),
        ("/train/tiny", {"time": 600}, 400),
        ("/train/tiny", {"time": "99999h"}, 400),
        ("/train/tiny", {"device": "abacus"}, 400),
        ("/train/tiny", {"device": 1}, 400),
        ("/train/tiny", {"device": "cpu --set x"}, 400),
    ],
)
def test_what_cannot_be_trained_is_refused(
    here: Served, address: str, config: dict[str, Any], status: int
):
    with mock.patch.object(lessons, "start", side_effect=AssertionError):
        assert here.client.post(address, json=config).status_code == status


def test_without_a_label_there_is_nothing_to_learn(tmp_path: Path):
    save_scans(tmp_path / "studies", "a")
    with served(tmp_path, tiny.save_unet(tmp_path / "organs")) as here:
        answer = here.client.post("/train/tiny", json={})
        assert answer.status_code == 400 and "no scan has a final label" in answer.json()["detail"]


def test_the_scan_of_most_doubt_comes_already_segmented(here: Served):
    assert "uncertain" in here.client.get("/info/").json()["strategies"]
    sample = here.client.post("/activelearning/uncertain", json={}).json()
    assert sample["id"] == "b"  # a has its label
    listed = here.client.get("/datastore/?output=all").json()["objects"]["b"]["labels"]
    names = listed["original"]["info"]["params"]["label_names"]
    assert names == {"left body": 1, "right body": 2}
    assert here.client.get("/datastore/label?label=b&tag=original").status_code == 200
    assert here.client.get("/info/").json()["datastore"]["completed"] == 1


def test_models_without_doubts_have_no_such_strategy(tmp_path: Path):
    save_scans(tmp_path / "studies", "a")
    with served(tmp_path, "otsu") as here:
        assert list(here.client.get("/info/").json()["strategies"]) == ["first", "random"]
        assert here.client.post("/activelearning/uncertain", json={}).status_code == 404


def test_a_server_that_ends_takes_its_training_along(here: Served, child: Child):
    here.client.post("/train/tiny", json={})
    process = child.process
    assert process.poll() is None
    here.server.close()
    assert process.poll() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
