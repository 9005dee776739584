"""Before a run begins: splits that lack a structure and times in which nothing can be learnt are
said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making import networks as tiny, phantoms
from making.places import ROOT
from medseg.dataset.reading import read_dataset
from medseg.io import read_labels
from medseg.models.folder import load_checkpoint
from medseg.training import beginning, step
from medseg.training.scans import Score, mean_scores
from medseg.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "train.steps": 8,
    "train.validate_every": 4,
    "train.validate_samples": 2,
    "train.precision": "fp32",
    "model.patch": [16, 16, 16],
    "model.options": {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]},
}


def settings(**changes: Any) -> list[str]:
    content = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    content = {key: value for key, value in content.items() if value is not None}
    return [
        part for key, value in content.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


def with_spot_in(*holders: int, empty: bool = False) -> Callable[[int, Any, Any], tuple[Any, Any]]:
    """Label maps of which only these hold the spot, or, if `empty`, anything."""

    def change(number: int, image: Any, labels: Any) -> tuple[Any, Any]:
        return image, labels if number in holders else labels * (0 if empty else labels == 1)

    return change


def sides(run: Path, data: Path, value: int) -> tuple[bool, bool]:
    """Whether training and validation hold a label value."""
    dataset, split = read_dataset(data), json.loads((run / "splits.json").read_text())
    held = [
        any((read_labels(dataset[name].label).data == value).any() for name in split[side])
        for side in ("training", "validation")
    ]
    return held[0], held[1]


@pytest.mark.parametrize("holders", [(0, 1), (2, 9), (5, 6)])
@pytest.mark.parametrize("empty", [False, True])
def test_what_two_cases_hold_is_trained_and_validated(
    holders: tuple[int, int], empty: bool, tmp_path: Path
):
    data = phantoms.dataset(
        tmp_path / "data", 10, shape=(16, 16, 16), change=with_spot_in(*holders, empty=empty)
    )
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    assert ran.code == 0, ran.err
    assert sides(tmp_path / "run", data, 2) == (True, True)


def test_what_one_case_holds_is_trained_with_and_that_it_is_not_scored_is_said(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 10, shape=(16, 16, 16), change=with_spot_in(4))
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    assert ran.code == 0, ran.err
    assert sides(tmp_path / "run", data, 2) == (True, False)
    said = [line for line in ran.err.splitlines() if "'spot'" in line]
    assert len(said) == 1 and "no case to validate with holds 'spot' (1 of 10 cases" in said[0]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    scored = [row["validation"] for row in rows if "validation" in row]
    assert scored and all(scores.keys() == {"body"} for scores in scored)


@pytest.mark.parametrize("given", ["training", "validation"])
def test_a_given_split_that_lacks_a_structure_is_said_or_refused(given: str, tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 6, shape=(16, 16, 16), change=with_spot_in(0, 1))
    names = [f"case_{n:02d}" for n in range(6)]
    split = (
        {"train": names[2:], "val": names[:2]}
        if given == "training"
        else {"train": names[:4], "val": names[4:]}
    )
    (data / "splits_final.json").write_text(json.dumps([split]))
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    if given == "validation":
        assert ran.code == 0 and "no case to validate with holds 'spot'" in ran.err
        return
    assert ran.code == 3
    assert "no case to train from holds 'spot' (2 of 6 cases have it, for validation)" in ran.err
    assert not (tmp_path / "run").exists()
    assert (
        tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", "--anyway", *settings()).code
        == 0
    )


def test_a_label_that_no_case_holds_is_refused_or_passed(tmp_path: Path):
    data = phantoms.dataset(
        tmp_path / "data", 6, shape=(16, 16, 16), labels={"body": 1, "spot": 2, "stone": 3}
    )
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    assert ran.code == 3 and "'stone' (no case has it)" in ran.err
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", "--anyway", *settings())
    assert ran.code == 0, ran.err


def test_of_all_folds_what_the_last_cannot_learn_is_said_before_the_first_trains(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 6, shape=(16, 16, 16), change=with_spot_in(4))
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", "--folds", "3", *settings())
    assert ran.code == 3
    assert "no case to train from holds 'spot'" in ran.err
    assert not (tmp_path / "run" / "fold0" / "config.yaml").exists()


def test_cases_whose_label_maps_would_be_one_file_are_refused(tmp_path: Path):
    names = [f"case{sign}{number}" for number in range(3) for sign in "+ "]
    data = phantoms.dataset(tmp_path / "data", 6, shape=(16, 16, 16), names=names)
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", "--folds", "2", *settings())
    assert ran.code == 5
    assert "case+0" in ran.err and "case 0" in ran.err and "case_0.nii.gz" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "run" / "fold0" / "config.yaml").exists()


def test_a_score_without_a_reference_is_not_defined_and_chooses_nothing(tmp_path: Path):
    """All structures lie in cases to train from: the weights at the end are kept, and no Dice of 0
    is told.
    """
    data = phantoms.dataset(
        tmp_path / "data", 6, shape=(16, 16, 16), change=with_spot_in(0, 1, 2, 3, empty=True)
    )
    names = [f"case_{n:02d}" for n in range(6)]
    (data / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", *settings())
    assert ran.code == 0, ran.err
    assert "validation Dice" not in ran.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    keep = next(choice for choice in plan["choices"] if choice["key"] == "train.keep")
    assert keep["value"] == "last" and "no validation scan holds a structure" in keep["reason"]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert not any("validation_dice" in row for row in rows)


def test_scores_of_structures_that_are_there_somewhere_count_what_was_invented():
    invented, right = Score(0.0, has_reference=False), Score(0.8, has_reference=True)
    assert mean_scores([{"a": invented}, {"a": invented}]) == {}
    assert mean_scores([{"a": invented}, {"a": right}]) == {"a": pytest.approx(0.4)}
    assert mean_scores([{"a": right, "b": invented}, {"b": right}]) == {
        "a": pytest.approx(0.8), "b": pytest.approx(0.4),
    }  # fmt: skip


# Little time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["1s", "3s", "9s"])
def test_a_time_in_which_nothing_can_be_learnt_is_refused_before_anything_is_written(
    time: str, tmp_path: Path
):
    data = phantoms.dataset(tmp_path / "data", 5, shape=(16, 16, 16))
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--time", time)
    assert ran.code == 5
    assert not (tmp_path / "run").exists()
    said = ran.err.splitlines()[-1]
    assert "too short" in said
    longer = said.split("give --time ")[1].split()[0]
    assert longer[-1] == "m" and int(longer[:-1]) >= 1


def test_a_large_data_set_needs_more_time_than_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step that takes ten seconds: 4 cases need 6 steps, which 30 seconds cannot hold."""
    monkeypatch.setattr(beginning, "seconds_a_step", lambda *_: 10.0)
    data = phantoms.dataset(tmp_path / "data", 5, shape=(16, 16, 16))
    ran = tiny.medseg(
        "train", data, "-o", tmp_path / "run", "--time", "60s", *settings(train__steps=None)
    )
    assert ran.code == 5
    assert "3 passes over the 4 cases" in ran.err


def test_a_run_whose_time_was_over_too_early_leaves_no_model_and_goes_on(
    tmp_path: Path, monkeypatch
):
    """The loop is slower than planned: what follows it needs all the time but for one step."""
    data, run = phantoms.dataset(tmp_path / "data", 9, shape=(16, 16, 16)), tmp_path / "run"
    quick = settings(train__steps=None)
    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.run.rehearse", lambda *_: lambda: 899.9)
        patch.setattr("medseg.training.run._check_time_left", lambda *_, **__: None)
        ran = tiny.medseg("train", data, "-o", run, "--time", "15m", "--quiet", *quick)
        assert ran.code == 5
        assert (
            "step of training fitted into the time" in ran.err
            or "steps of training fitted" in ran.err
        )
        assert "no model was written" in ran.err
        assert not (run / "model").exists()
        again = tiny.medseg("train", data, "-o", run, "--time", "15m", "--quiet", *quick)
        assert again.code == 5 and "no model was written" in again.err
    # With more time than that the same command goes on and ends with a model.
    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.run.rehearse", lambda *_: lambda: 960.0 - 35.0)
        ran = tiny.medseg("train", data, "-o", run, "--time", "16m", "--quiet", *quick)
    assert ran.code == 0, ran.err
    assert (run / "model" / "README.md").exists()


def test_time_that_is_over_before_the_first_step_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = phantoms.dataset(tmp_path / "data", 5, shape=(16, 16, 16))
    monkeypatch.setattr("medseg.training.run.rehearse", lambda *_: lambda: 2000.0)
    ran = tiny.medseg(
        "train", data, "-o", tmp_path / "run", "--time", "15m", *settings(train__steps=None)
    )
    assert ran.code == 5
    assert "the time was over before the first step" in ran.err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("steps", "batch", "few"), [(1, 2, True), (3, 2, True), (8, 2, False), (3, 8, False)]
)
def test_steps_that_a_person_chose_are_trained_and_that_they_are_few_is_said(
    steps: int, batch: int, few: bool, tmp_path: Path
):
    """Of 5 cases 4 are trained from: 8 steps of 2 samples are 4 passes over them."""
    data = phantoms.dataset(tmp_path / "data", 5, shape=(16, 16, 16))
    options = settings(train__steps=steps, train__batch=batch)
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *options)
    assert ran.code == 0, ran.err
    assert ("too few to have learnt" in ran.err) == few
    card = (load_checkpoint(str(tmp_path / "run")).folder / "README.md").read_text()
    assert ("Hardly trained" in card) == few


def test_minutes_are_whole_and_enough():
    assert [step.in_minutes(seconds) for seconds in (0.1, 60, 61, 3599)] == [
        "1m",
        "1m",
        "2m",
        "60m",
    ]


# Cases as people had them -------------------------------------------------------------------------


def make(shared_data: Path, case: str, folder: Path) -> Path:
    script = shared_data / "cases/work" / case / "make.py"
    subprocess.run([sys.executable, script, shared_data, folder], check=True, cwd=ROOT, timeout=600)
    return folder


@pytest.mark.parametrize("name", ["training_empty", "validation_empty"])
def test_the_case_of_a_fold_without_foreground(name: str, shared_data: Path, tmp_path: Path):
    data = make(shared_data, "fold-without-foreground", tmp_path / "sets") / name
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings(train__steps=24))
    assert ran.code == 0, ran.err
    for value in (1, 2):
        assert sides(tmp_path / "run", data, value) == (True, True)


@pytest.mark.parametrize("time", ["3s", "1s", "12s"])
def test_the_case_of_too_short_a_time(time: str, shared_data: Path, tmp_path: Path):
    """Refused with a remedy and without a model; only 12 s may be enough on a machine that is fast
    for three passes.
    """
    data = make(shared_data, "time-too-short", tmp_path / "sets") / "data"
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--time", time, "--quiet")
    if ran.code == 0:
        assert time == "12s"
        _, facts = load_state(tmp_path / "run" / "state.safetensors")
        assert facts["step"] * 2 >= 3 * 4
        return
    assert ran.code == 5
    assert "--time" in ran.err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def test_labels_of_the_made_sets_are_as_said(tmp_path: Path):
    data = phantoms.dataset(
        tmp_path / "data", 4, shape=(16, 16, 16), change=with_spot_in(1, empty=True)
    )
    held = [np.unique(read_labels(case.label).data).tolist() for case in read_dataset(data).cases]
    assert held == [[0], [0, 1, 2], [0], [0]]
