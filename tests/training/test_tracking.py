"""Trackers beside metrics.jsonl: the real packages where they are installed, and stand-ins for what
goes wrong.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from medseg.errors import BadConfig, DataWarning
from medseg.training import tracking
from medseg.training.tracking import Trackers, open_trackers


class Noted:
    """A tracker that notes what it is told, and fails at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.ends: list[bool] = []
        self.fails_at = fails_at

    def log(self, step, numbers):
        if step == self.fails_at:
            raise ConnectionError("the server\nis away")
        self.lines.append((step, dict(numbers)))

    def pair(self):
        return self.log, self.ends.append


def test_every_tracker_gets_the_numbers_and_nothing_else():
    one, other = Noted(), Noted()
    with Trackers({"one": one.pair(), "other": other.pair()}) as track:
        track(
            5,
            {
                "loss": 0.5,
                "step": 5,
                "name": "a patient",
                "bad": float("nan"),
                "yes": True,
                "none": None,
            },
        )

    assert one.lines == other.lines == [(5, {"loss": 0.5, "step": 5.0})]
    assert one.ends == other.ends == [True]


def test_a_tracker_that_fails_does_not_end_the_run():
    away, good = Noted(fails_at=2), Noted()
    track = Trackers({"away": away.pair(), "good": good.pair()})
    track(1, {"loss": 1.0})
    with pytest.warns(
        DataWarning, match="away takes no more numbers of this run: .*Error: the server is away"
    ):
        track(2, {"loss": 2.0})
    track(3, {"loss": 3.0})
    track.close()

    assert [step for step, _ in away.lines] == [1] and away.ends == []
    assert [step for step, _ in good.lines] == [1, 2, 3] and good.ends == [True]


def test_trackers_learn_of_a_run_that_broke_off():
    noted = Noted()
    with pytest.raises(KeyboardInterrupt), Trackers({"noted": noted.pair()}):
        raise KeyboardInterrupt
    assert noted.ends == [False]


def test_unknown_and_missing_trackers_are_refused_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(BadConfig, match="no tracker 'wandb'; there are tensorboard and mlflow"):
        open_trackers(["wandb"], tmp_path)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow"):
        with pytest.raises(
            BadConfig, match=rf"{name} is not installed: pip install \"medseg\[{name}\]\""
        ):
            open_trackers([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_be_opened_is_refused_and_the_others_are_closed(
    tmp_path, monkeypatch
):
    noted = Noted()

    def broken(run, start):
        raise RuntimeError("no answer from the server")

    known = {"good": ("json", lambda run, start: noted.pair()), "broken": ("json", broken)}
    monkeypatch.setattr(tracking, "_TRACKERS", known)
    with pytest.raises(
        BadConfig, match=r"broken cannot be opened for .*: RuntimeError: no answer from the server"
    ):
        open_trackers(["good", "broken"], tmp_path)
    assert noted.ends == [False]


def test_no_trackers_are_no_trackers(tmp_path):
    with open_trackers([], tmp_path) as track:
        track(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_logged_once_across_a_resumption(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_trackers(["tensorboard"], tmp_path) as track:
        for step in (10, 20, 30):
            track(step, {"loss": step / 10, "validation/Anterior": 0.5})
    with open_trackers(["tensorboard"], tmp_path, start=20) as track:
        track(30, {"loss": 7.0})

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, 1.0),
        (20, 2.0),
        (30, 7.0),
    ]
    assert events.Tags()["scalars"] == ["loss", "validation/Anterior"]


@pytest.fixture
def no_network(monkeypatch):
    """Connections are refused and remembered."""
    asked: list[object] = []

    def connect(self, address):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return asked


def test_mlflow_keeps_the_run_in_its_folder_and_tells_nobody(tmp_path, monkeypatch, no_network):
    if tracking.find_spec("mlflow") is None:
        pytest.skip("needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "hippocampus run"
    run.mkdir()
    with open_trackers(["mlflow"], run) as track:
        track(10, {"loss": 1.5, "validation/Left (1)": 0.25})
    with open_trackers(["mlflow"], run, start=10) as track:  # goes on in the same run
        track(20, {"loss": 0.5})

    import mlflow

    client = mlflow.MlflowClient((run / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("medseg")
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(stored.info.run_id, "loss")] == [
        (10, 1.5),
        (20, 0.5),
    ]
    assert stored.data.metrics["validation/Left _1_"] == 0.25
    assert "mlflow.user" not in stored.data.tags
    assert no_network == []
    assert {path.name for path in run.iterdir()} == {"mlflow", "mlflow.txt"}


def test_mlflow_goes_where_the_user_says(tmp_path, monkeypatch):
    if tracking.find_spec("mlflow") is None:
        pytest.skip("needs the extra mlflow")
    server, run = tmp_path / "server", tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Path(server).as_uri())
    with pytest.raises(ValueError), open_trackers(["mlflow"], run) as track:
        track(1, {"loss": 1.0})
        raise ValueError

    import mlflow

    client = mlflow.MlflowClient(server.as_uri())
    (stored,) = client.search_runs([client.get_experiment_by_name("medseg").experiment_id])
    assert stored.info.status == "FAILED" and stored.data.metrics == {"loss": 1.0}
    assert {path.name for path in run.iterdir()} == {"mlflow.txt"}
