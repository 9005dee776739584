"""Training in a child process: followed while it runs, stopped so that it goes on, and its errors
in a sentence.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from making.datasets import make_case
from making.places import ROOT
from medseg.annotation import (
    Progress,
    Store,
    lessons,
    newest_models,
    next_run,
    rounds,
    rounds_of,
    runs_of,
    start,
)
from medseg.annotation.teaching import followed, is_finished
from medseg.errors import BadConfig
from medseg.labels import Label, LabelTable

TABLE = LabelTable((Label(1, "front", (10, 20, 30)), Label(2, "back", (200, 30, 40))))
#: A network and a run so small that a step takes milliseconds.
SMALL = {
    "train.warmup": 2,
    "train.log_every": 1,
    "train.validate_every": 8,
    "train.validate_samples": 1,
    "train.checkpoint_every": 4,
    "train.precision": "fp32",
    "model.patch": [16, 16, 16],
    "model.options": {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]},
}
#: For hangs only.
PATIENCE_S = 600


def options(steps: int) -> list[str]:
    content = SMALL | {"train.steps": steps}
    pairs = [f"{key}={json.dumps(value)}" for key, value in content.items()]
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = Store.create(tmp_path / "set")
    for number in range(3):
        image, labels = make_case(number)
        store.add_volumes(f"case_{number}", [image], labels=labels, table=TABLE)
    return store


def test_a_run_is_followed_stopped_and_goes_on_to_its_end(store: Store):
    run = next_run(store)
    assert run == store.folder / "runs" / "1" and newest_models(store) == []
    teaching = start(store, run, options=options(100_000))
    until = time.monotonic() + PATIENCE_S
    while not teaching.progress.validation and time.monotonic() < until:
        assert teaching.progress.state == "running", teaching.lines
        time.sleep(0.1)
    stopped = teaching.stop(PATIENCE_S)
    assert stopped.state == "stopped" and stopped.message == ""
    assert 0 < stopped.share < 1 and stopped.step >= 8
    assert stopped.loss is not None and stopped.what == "training"
    assert {"front", "back", "mean"} == set(stopped.validation)
    assert runs_of(store) == [run] and not is_finished(run)
    assert [one.finished for one in rounds_of(store)[0]] == [False]
    again = start(store, run, options=options(stopped.step + 4))
    done = again.wait(PATIENCE_S)
    assert done.state == "done", again.lines
    assert done.share == 1 and done.step == stopped.step + 4
    assert newest_models(store) == [run] and next_run(store).name == "2"


def test_what_cannot_be_trained_fails_with_a_sentence(store: Store, tmp_path: Path):
    with pytest.raises(BadConfig, match="no scan has a final label yet"):
        start(Store.create(tmp_path / "empty"), tmp_path / "run")
    teaching = start(store, next_run(store), model="nowhere", options=options(4))
    failed = teaching.wait(PATIENCE_S)
    assert failed.state == "failed"
    assert failed.message.startswith("nowhere") or "nowhere" in failed.message
    assert runs_of(store) == []


def test_events_of_training_say_where_it_stands():
    before = Progress()
    reading = followed(before, {"event": "progress", "what": "checking", "done": 1, "total": 3})
    assert (reading.what, reading.share) == ("checking", 0.0)
    facts = {"share": 0.25, "step": 7, "loss": 0.5, "seconds_left": 90.5}
    training = followed(reading, {"event": "training", **facts})
    assert (training.share, training.step, training.dice) == (0.25, 7, None)
    scored = followed(training, {"event": "validation", "step": 7, "dice": {"mean": 0.75}})
    assert scored.validation == {"mean": 0.75} and scored.step == 7
    assert followed(scored, {"event": "message", "text": "hello"}) == scored


def test_a_process_that_dies_is_told_as_such(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed = start(store, next_run(store)).wait(PATIENCE_S)
    assert (failed.state, failed.message) == ("failed", "training ended with code 1")


def test_only_plain_numbers_are_rounds(tmp_path: Path):
    """A folder may be called by a digit of another script, which `int` does not take."""
    store = Store.create(tmp_path / "data")
    for name in ("2", "²", "old"):
        (store.folder / "runs" / name).mkdir(parents=True)
        (store.folder / "runs" / name / "config.yaml").touch()
    assert next_run(store).name == "3"
    assert [run.name for run in runs_of(store)] == ["2", "old", "²"]


@pytest.mark.parametrize(
    "damaged",
    [
        "[]", "{", "1", '{"w": []}', '{"w": {"a": []}}', '{"w": {"a": {"stamp": 1}}}',
        '{"w": {"a": {"dice": []}}}', '{"w": {"a": {"dice": {"liver": "good"}}}}',
    ],
)  # fmt: skip
def test_scores_that_were_kept_and_are_damaged_are_none(tmp_path: Path, damaged: str):
    store = Store.create(tmp_path / "set")
    (store.folder / ".scores.json").write_text(damaged)
    assert not any(rounds._kept(store).values())


@pytest.mark.parametrize("damaged", ["[]", "{", "1", "null", '"run"', '{"runs": 1}'])
def test_what_was_asked_for_and_is_damaged_begins_anew(tmp_path: Path, damaged: str):
    store = Store.create(tmp_path / "set")
    (store.folder / ".asked.json").write_text(damaged)
    asked = lessons.Lessons(
        store, finished=lambda lesson: None, tell=lambda text: None, without=lambda text: text
    )
    assert asked._stopped_run({}) is None
