"""Validation shared by several processes: the same bits as one alone gives; what ends one ends
all, in one sentence.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from making import networks as tiny, phantoms, ranks
from making.configs import settings
from medseg.errors import BadConfig, NotEnoughMemory
from medseg.evaluation.scoring import evaluate, evaluation_of, score_pairs
from medseg.evaluation.summary import EvaluationOptions
from medseg.training import processes as module
from medseg.training.processes import Processes, alone
from medseg.training.scoring import _WRITING_S, _settle, rehearse
from medseg.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

HANG_S = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ranks.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made."""
    folder = tmp_path_factory.mktemp("together")
    for ran in ranks.run_ranks(2, *ranks.call("look", data, str(folder))):
        assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def one(data: Path, tmp_path: Path) -> Path:
    """What one process made."""
    ranks.look(str(data), str(tmp_path))
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_two_processes_validate_and_score_to_the_bit_as_one(one: Path, together: Path):
    first, second = (read(together / f"rank{n}.json") for n in range(2))
    single = read(one / "rank0.json")
    for kind, count in ranks.KINDS.items():
        expected = single[kind]
        assert json.dumps(first[kind]) == json.dumps(expected), kind
        assert second[kind]["curve"] == expected["curve"]
        assert second[kind]["cleanup"] == expected["cleanup"]
        assert second[kind]["scores"] is None
        assert bool(expected["curve"]) == bool(count)
        labels = sorted((one / kind / "validation").glob("*.nii.gz"))
        assert len(labels) == count
        for path in labels:
            assert (together / kind / "validation" / path.name).read_bytes() == path.read_bytes()
    assert any(0 < score < 1 for score in single["usual"]["curve"].values()), "they tell something"
    assert single["partly"]["cleanup"]
    assert first["rendered"] == second["rendered"] == single["rendered"]
    assert first["same"] == second["same"] == [[[0.0] * 3] * 2, 7], "and not the second one's"
    assert (first["gathered"], single["gathered"]) == (2, 1)


def test_a_case_that_fails_in_one_process_ends_both_in_its_sentence(
    data: Path, together: Path, tmp_path: Path
):
    """Nothing but the other processes themselves could end them here."""
    label = data / "usual" / "labelsTr" / "case_02.nii.gz"  # the second to validate
    content = label.read_bytes()
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "model").symlink_to(together / "usual" / "model")
    label.write_bytes(content[:100])
    try:
        rest, failed = ranks.run_ranks(2, *ranks.call("fail", data, str(tmp_path)))
    finally:
        label.write_bytes(content)
    assert failed.code == 3
    sentences = [line for line in failed.err.splitlines() if line.startswith("medseg: ")]
    assert len(sentences) == 1
    assert "case_02.nii.gz" in sentences[0]
    assert rest.code != 0
    assert "medseg: " not in rest.err


def test_a_run_folder_that_the_others_do_not_see_is_said_at_the_start(data: Path, tmp_path: Path):
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    program = (
        "from medseg.training import processes; processes._SEEN_S = 0.5;"
        " from medseg.cli.app import main; main()"
    )
    command = ("-c", program, "train", data / "usual", "-o", "run", "--quiet", *settings())
    both = ranks.run_ranks(2, *command, places=places)
    assert all(ran.code != 0 for ran in both)
    said = "".join(ran.err for ran in both)
    assert said.count("medseg: ") == 1, said
    assert "is not seen by 1 of 2 processes" in said
    assert not any(list(place.iterdir()) for place in places), "nothing is left"


@pytest.mark.parametrize("sight", ["nothing", "an older copy", "no settings"])
def test_data_that_the_others_do_not_see_are_said_at_the_start(
    data: Path, tmp_path: Path, sight: str
):
    """Nothing but the other processes themselves could end them here."""
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        shutil.copytree(data / "usual", place / "data")
        (place / "my.yaml").write_text("train: {seed: 3}\n")
    if sight == "nothing":
        shutil.rmtree(places[1] / "data")
        words = "data"
    elif sight == "no settings":
        (places[1] / "my.yaml").unlink()
        words = "my.yaml"
    else:
        label = places[1] / "data" / "labelsTr" / "case_02.nii.gz"
        label.write_bytes(label.read_bytes() + gzip.compress(b""))
        words = "process 1 on .* does not see the same case case_02 as the first one"
    run = tmp_path / "run"
    command = ("-m", "medseg", "train", "data", "--config", "my.yaml", "-o", run, "--quiet")
    both = ranks.run_ranks(2, *command, *settings(), places=places)
    assert all(ran.code != 0 for ran in both)
    said = [line for ran in both for line in ran.err.splitlines() if line.startswith("medseg: ")]
    assert len(said) == 1, said
    assert re.search(words, said[0])
    assert "please report" not in said[0]


def test_sigterm_keeps_the_step_and_two_go_on_with_the_run_of_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    often = settings(train__steps=1_000_000, train__checkpoint_every=4)
    command = ["train", data / "usual", "-o", run, "--quiet", *often]

    def stop(step: int, position: float, settings: Any) -> float:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.loop.learning_rate", stop)
        assert tiny.medseg(*command).code == 143
    assert load_state(run / "state.safetensors")[1]["step"] == 2
    state = (run / "state.safetensors").stat().st_mtime_ns
    process = tiny.start(*ranks.TORCHRUN, "-m", "medseg", *command)
    try:
        until = time.monotonic() + HANG_S
        while (run / "state.safetensors").stat().st_mtime_ns == state:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode != 0
    assert err.count("medseg: stopped; nothing was left half-written") == 1
    tensors, facts = load_state(run / "state.safetensors")
    assert facts["step"] >= 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) <= facts["step"]
    assert {float(value) for key, value in tensors.items() if key.endswith(".step")} == {
        float(facts["step"])
    }, "the optimiser has done as many"


def test_a_batch_that_cannot_be_shared_is_refused_with_what_to_do():
    with mock.patch.dict("os.environ", {"WORLD_SIZE": "2", "RANK": "1"}):
        processes = Processes("cpu")
    processes.check_batch(4)
    with pytest.raises(BadConfig, match=r"train\.batch=3 cannot be shared by 2 processes: start a"):
        processes.check_batch(3)


class Several(Processes):
    """Processes of which each says what this one says."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def test_the_time_that_is_kept_for_scoring_is_that_of_the_largest_share(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medseg.training.scoring.use_settled", lambda choice: None)
    processes = Several("cpu")
    source = ranks.source_of(data, "usual", tmp_path / "store", processes)
    for size, turns in ((1, 3), (2, 2), (3, 1), (8, 1)):
        processes.size = size
        seconds = rehearse(source.config, source, processes)()
        assert seconds == pytest.approx(_WRITING_S + turns * 1.2 * source.seconds_a_case)


@pytest.mark.parametrize("other", ["float32", "bfloat16"])
def test_all_processes_infer_in_one_arithmetic(other: str, monkeypatch: pytest.MonkeyPatch):
    chosen: list[Any] = []
    monkeypatch.setattr("medseg.training.scoring.use_settled", chosen.append)
    monkeypatch.setattr(
        "medseg.training.scoring.settle_auto", lambda *asked: {"precision": "bfloat16"}
    )
    processes = Several("cpu")
    monkeypatch.setattr(processes, "gather", lambda value: [value, other])
    _settle(mock.Mock(), processes)
    assert chosen == [], "one alone does as it likes"
    processes.size = 2
    _settle(mock.Mock(), processes)
    assert chosen == [{"precision": other}]


def test_each_process_has_its_part_of_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "free_bytes", lambda: 1000)
    monkeypatch.setattr(module, "resident_bytes", lambda: 70)
    assert Processes("cpu").room_bytes is None
    with mock.patch.dict("os.environ", {"LOCAL_WORLD_SIZE": "4"}):
        assert Processes("cpu").room_bytes == 70 + 1000 // 4


def test_a_scan_too_large_for_a_share_of_the_memory_says_so(data: Path, tmp_path: Path):
    processes = Processes("cpu")
    processes.room_bytes = 1000
    source = ranks.source_of(data, "usual", tmp_path / "store", processes)
    with pytest.raises(NotEnoughMemory, match="start fewer processes here"):
        rehearse(source.config, source, processes)


def test_what_is_dealt_comes_back_in_order():
    processes = Several("cpu")
    asked: list[int] = []
    assert processes.deal(3, lambda n: (asked.append(n), 10 * n)[1]) == alone(3, lambda n: 10 * n)
    assert asked == [0, 1, 2]
    processes.size = 4
    assert processes.deal(0, lambda n: n) == []


def test_cases_scored_apart_make_the_evaluation_of_all(data: Path, tmp_path: Path):
    """One of them cannot be read, one is stored turned round, one has another label."""
    options = EvaluationOptions(structures={"body": (1,), "spot": (2,)})
    folder = tmp_path / "found"
    folder.mkdir()
    truth = data / "usual" / "labelsTr"
    for number in range(3):
        _, labels = phantoms.phantom(number)
        labels[labels == 2] = 7 if number == 1 else 2
        affine, step = np.eye(4), -1 if number == 2 else 1
        affine[0, [0, 3]] = (-1, 21) if number == 2 else (1, 0)
        tiny.save_nifti(folder / f"case_{number:02d}.nii.gz", labels[::step], affine)
    (folder / "case_03.nii.gz").write_bytes(b"nothing")
    expected = evaluate(truth, folder, options=options)
    names = [f"case_{number:02d}" for number in range(4)]
    pairs = {name: (truth / f"{name}.nii.gz", folder / f"{name}.nii.gz") for name in names}
    parts = [
        score_pairs({name: pairs[name] for name in some}, options)
        for some in (names[::2], names[1::2], [])
    ]
    scored = json.loads(json.dumps(parts[0] | parts[1] | parts[2]))
    result = evaluation_of({name: scored[name] for name in names}, options)
    assert json.dumps(result.rows) == json.dumps(expected.rows)
    assert json.dumps(result.summary) == json.dumps(expected.summary)
    assert result.problems == expected.problems
    assert result.problems
