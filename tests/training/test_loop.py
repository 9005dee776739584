"""Training: interrupted anywhere it ends where an uninterrupted run does, and what it leaves can be
used.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from making import networks as tiny
from making.configs import CONFIG, STEPS, make_config
from medseg.config import Config, load_config
from medseg.errors import BadConfig, BadModel, DataWarning, Interrupted
from medseg.models.folder import change_spec, load_checkpoint
from medseg.networks.zoo import build_network
from medseg.training import step as step_module
from medseg.training.clock import learning_rate
from medseg.training.loop import train
from medseg.training.precision import THIN, choose_training_precision, thinnest_map
from medseg.training.rendered import RenderedSource
from medseg.training.state import changed_settings, load_state, record_config, save_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(make_config(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, run)
    torch.set_num_threads(threads)
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds_a_step"} for row in rows]


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, averages, optimiser and exported model bit for bit; metrics line for line."""
    (tensors, facts), (expected, wanted) = (
        load_state(folder / "state.safetensors") for folder in (run, other)
    )
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key
    assert facts["step"] == wanted["step"]
    for name in ("model.safetensors", "model.json", "labels.csv"):
        assert (run / "model" / name).read_bytes() == (other / "model" / name).read_bytes()
    assert metrics(run) == metrics(other)


def test_a_run_logs_every_interval_once_and_validates(finished: Path):
    rows = metrics(finished)
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, STEPS + 1, 2))
    assert [row["step"] for row in rows if "validation_dice" in row] == [8, 16, 24]
    for row in rows:
        assert 0 <= row.get("dice", row.get("validation_dice")) <= 1


def test_training_lowers_the_loss_and_moves_the_average(
    config: Config, finished: Path, tmp_path: Path
):
    losses = [row["loss"] for row in metrics(finished) if "loss" in row]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    tensors, _ = load_state(finished / "state.safetensors")
    key = next(key for key in tensors if key.startswith("average."))
    assert not torch.equal(tensors[key], tensors[key.replace("average.", "network.")])


def test_another_seed_gives_other_weights(config: Config, finished: Path, tmp_path: Path):
    other = config.model_copy(
        update={"train": config.train.model_copy(update={"seed": 6, "steps": 2})}
    )
    train(other, tmp_path / "run")
    one, two = (
        load_state(folder / "state.safetensors")[0] for folder in (tmp_path / "run", finished)
    )
    assert not torch.equal(one["network.head.weight"], two["network.head.weight"])


def test_the_folder_of_a_finished_run_holds_what_is_documented_and_no_leftovers(finished: Path):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock", "config.yaml", "data.json", "metrics.jsonl", "model", "progress.png",
        "state-before.safetensors",
        "state.safetensors",
    ]  # fmt: skip


def test_a_model_says_in_which_precision_it_was_trained(finished: Path, tmp_path: Path):
    """And one that does not, as those of earlier versions, is stored without the word."""
    spec = load_checkpoint(str(finished)).spec
    assert spec.trained_precision == "fp32"
    copy = tmp_path / "model"
    shutil.copytree(finished / "model", copy)
    change_spec(copy, trained_precision=None)
    assert "trained_precision" not in json.loads((copy / "model.json").read_text())
    assert load_checkpoint(str(copy)).spec.trained_precision is None


def test_starting_a_finished_run_again_changes_nothing(
    config: Config, finished: Path, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert train(config, run) == run / "model"
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_the_exported_model_segments_a_scan(finished: Path, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg("infer", scan, "--model", finished / "model", "--quiet", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["model"]["name"] == "tiny"
    labels = tiny.volume_of(tmp_path / "scan_seg.nii.gz")
    assert labels.shape == (20, 22, 18)
    assert set(np.unique(labels.data)) <= set(tiny.CLASSES)


def test_the_exported_model_is_the_average_of_the_weights_without_deep_heads(finished: Path):
    tensors, _ = load_state(finished / "state.safetensors")
    exported = load_checkpoint(str(finished / "model")).network().state_dict()
    assert not any(key.startswith("deep_heads") for key in exported)
    for key, value in exported.items():
        assert torch.equal(value, tensors[f"average.{key}"].half().float())


# Forking leaves the imports of torch to the parent, so that a run begins in milliseconds and can be
# killed often.
KILLING = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from medseg.training.state import load_state
from medseg.config import load_config
from medseg.errors import BadModel
from medseg.training.loop import train

KILLS = 20
config, folder = load_config(Path(sys.argv[1])), Path(sys.argv[2])
run = folder / "run"
one_step = {"train": config.train.model_copy(update={"steps": 1})}
train(config.model_copy(update=one_step), folder / "warm")

def begin(where):
    child = os.fork()
    if child == 0:
        try:
            train(config, where)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def step():
    try:
        return load_state(run / "state.safetensors")[1]["step"]
    except BadModel:
        assert not (run / "state.safetensors").exists()  # whatever is there can be read
        return 0

start = time.monotonic()
assert end(begin(folder / "straight")) == 0
longest = (time.monotonic() - start) / 4
# A machine that becomes faster or slower may end the run too early, or never let it begin.
for seed in range(8):
    random.seed(seed)
    shutil.rmtree(run, ignore_errors=True)
    killed, steps, code = 0, [], -signal.SIGKILL
    while code == -signal.SIGKILL:
        child = begin(run)
        if killed < KILLS:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        code = end(child)
        if code == -signal.SIGKILL:
            killed += 1
            steps.append(step())
    assert code == 0
    assert steps == sorted(steps)
    print(json.dumps({"killed": killed, "steps": steps}), flush=True)
    if killed == KILLS and len(set(steps)) >= 4:
        break
    longest *= 0.7 if killed < KILLS else 1.4
"""


def test_a_run_killed_twenty_times_ends_bit_for_bit_where_an_uninterrupted_one_does(
    config: Config, tmp_path: Path
):
    """Kills at random moments, of loading and saving too; then on to the end."""
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 120})})
    ran = tiny.run_child("-c", KILLING, save_config(longer, tmp_path), tmp_path)
    assert ran.code == 0, ran.err
    outcome = json.loads(ran.out.splitlines()[-1])
    assert outcome["killed"] == 20
    assert len(set(outcome["steps"])) >= 4, "the run got on between kills"
    assert_same_end(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("steps", [1, 5, 7, 10])
def test_a_run_stopped_between_two_checkpoints_goes_on_as_if_it_had_not(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    """A request to stop saves the state at whatever step it comes, also in the middle of an
    interval of the log.
    """
    run, asked, rate = tmp_path / "run", [], learning_rate

    def ask_once(step: int, position: float, settings: Any) -> float:
        if step == steps - 1 and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, position, settings)

    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.loop.learning_rate", ask_once)
        with pytest.raises(Interrupted) as stop:
            train(config, run)
    assert stop.value.exit_code == 143
    assert load_state(run / "state.safetensors")[1]["step"] == steps
    train(config, run)
    assert_same_end(run, finished)


@pytest.mark.parametrize("step", [8, 24])
@pytest.mark.parametrize("where", ["validating", "saving"])
def test_a_run_killed_while_it_validates_has_kept_the_step_and_goes_on_as_if_it_had_not(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str,
    step: int,
):  # fmt: skip
    """Validation may take longer than who stops a run waits. saving: killed between the scores in
    metrics.jsonl and the state that goes with them.
    """
    run, validate, save = tmp_path / "run", RenderedSource.validate, step_module.save_run
    looks: list[int] = []

    def killed_validating(*arguments: Any, **how: Any) -> dict[str, float]:
        looks.append(0)
        if where == "validating" and 8 * len(looks) == step:
            raise MemoryError
        return validate(*arguments, **how)

    def killed_saving(folder: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        if where == "saving" and 8 * len(looks) == step and not facts.get("look"):
            raise MemoryError
        save(folder, facts, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(RenderedSource, "validate", killed_validating)
        patch.setattr(step_module, "save_run", killed_saving)
        with pytest.raises(MemoryError):
            train(config, run)
    assert load_state(run / "state.safetensors")[1]["step"] == step
    scored = [row["step"] for row in metrics(run) if "validation_dice" in row]
    assert scored.count(step) == (where == "saving")
    train(config, run)
    assert_same_end(run, finished)


def save_config(config: Config, folder: Path) -> Path:
    path = folder / "saved.yaml"
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return path


def wait_for(path: Path, child: Any, seconds: float = 60) -> None:
    """Wait until a file is there; fail if the child ends before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sigterm_of_the_command_saves_the_state_and_exits_143(config: Config, tmp_path: Path):
    run = tmp_path / "run"
    path = save_config(config, tmp_path)
    arguments = ("-m", "medseg", "train", path, "-o", run, "--quiet", "--set", "train.steps=100000")
    with tiny.start(*arguments) as child:
        try:
            wait_for(run / "state.safetensors", child)
            other = tiny.medseg("train", path, "-o", run, "--quiet", "--set", "train.steps=100000")
            child.send_signal(signal.SIGTERM)
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 143
    assert out == ""
    assert err.splitlines() == ["medseg: stopped; nothing was left half-written"]
    assert load_state(run / "state.safetensors")[1]["step"] >= 3
    assert not list(run.glob(".medseg-*"))
    # A second process in the same folder was refused meanwhile.
    assert other.code == 5
    assert "another process is training" in other.err
    assert len(other.err.splitlines()) == 1


def test_a_damaged_state_falls_back_to_the_one_before_and_ends_the_same(config, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    path = run / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(DataWarning, match="damaged"):
        train(config, run)
    assert_same_end(run, finished)


def test_a_run_whose_states_are_all_damaged_is_refused_and_left_alone(config, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("state.safetensors", "state-before.safetensors"):
        (run / name).write_bytes(b"broken")
    metrics = (run / "metrics.jsonl").read_bytes()

    with pytest.raises(BadModel, match="every training state"), pytest.warns(DataWarning):
        train(config, run)

    assert (run / "state.safetensors").read_bytes() == b"broken"
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_damaged_state_never_takes_the_place_of_the_sound_one_before(
    config, finished, tmp_path, monkeypatch
):
    """Killed while it saves for the first time after falling back, a run still has a sound
    state.
    """
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "state.safetensors").write_bytes(b"broken")

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.state.save_state", killed)
        with pytest.raises(Killed), pytest.warns(DataWarning):
            train(config, run)
    sound = []
    for name in ("state.safetensors", "state-before.safetensors"):
        try:
            sound.append(load_state(run / name)[1]["step"])
        except BadModel:
            continue
    assert sound
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        train(config, run)
    assert_same_end(run, finished)


def test_changed_settings_are_refused_by_name_and_the_run_is_left_as_it_was(
    config, finished, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = config.model_copy(update={"synth": config.synth.model_copy(update={"flip": 0.25})})
    with pytest.raises(BadConfig, match=r"synth\.flip"):
        train(changed, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_may_be_prolonged_and_its_data_may_move(config, finished, tmp_path):
    """More steps, all before the rate falls, are the same run; where the maps lie is no setting."""
    run, moved = tmp_path / "run", make_config(tmp_path / "elsewhere")
    # With a decay of one step the rate is constant until the last step, which then has the full
    # rate too.
    straight = config.model_copy(update={"train": config.train.model_copy(update={"decay": 1})})
    short = straight.model_copy(
        update={"train": straight.train.model_copy(update={"steps": STEPS - 6})}
    )
    train(short, run)
    train(load_config(moved, {"train.decay": 1}), run)
    train(straight, tmp_path / "straight")
    (ours, _), (theirs, _) = (
        load_state(folder / "state.safetensors") for folder in (run, tmp_path / "straight")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_in_bfloat16_goes_on_to_the_same_bits(config: Config, tmp_path: Path):
    model = config.model.model_copy(
        update={"options": {"features": [16, 32], "deep_supervision": True}}
    )
    changed = config.model_copy(
        update={
            "model": model,
            "train": config.train.model_copy(update={"precision": "bf16", "steps": 6}),
        }
    )
    train(changed, tmp_path / "whole")
    # The rate of the first steps does not depend on how many there will be.
    train(
        changed.model_copy(update={"train": changed.train.model_copy(update={"steps": 3})}),
        tmp_path / "parts",
    )
    train(changed, tmp_path / "parts")
    once, again = (
        load_state(tmp_path / name / "state.safetensors")[0] for name in ("whole", "parts")
    )
    assert once.keys() == again.keys()
    assert all(torch.equal(once[key], again[key]) for key in once)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_that_leaves_blocks_out_at_random_goes_on_to_the_same_bits(
    config: Config, tmp_path: Path, stop: int
):
    """What a network does at random follows from the step, too, and not from what ran before it."""
    options = {"width": 12, "depth": 4, "heads": 1, "decoder": [8, 8], "drop_path": 0.6}
    model = config.model.model_copy(update={"name": "primus", "options": options})

    def steps(count: int) -> Config:
        settings = config.train.model_copy(update={"steps": count, "decay": 1})
        return config.model_copy(update={"model": model, "train": settings})

    train(steps(5), tmp_path / "whole")
    train(steps(stop), tmp_path / "parts")
    torch.manual_seed(stop)  # a process that begins anew, or one that has done something else
    train(steps(5), tmp_path / "parts")
    once, again = (
        load_state(tmp_path / name / "state.safetensors")[0] for name in ("whole", "parts")
    )
    assert once.keys() == again.keys()
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_both_precisions_train(config: Config, tmp_path: Path):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    ends = {}
    for precision in ("fp32", "bf16"):
        changed = config.train.model_copy(
            update={"precision": precision, "steps": 8, "validate_every": 8}
        )
        train(config.model_copy(update={"train": changed}), tmp_path / precision)
        ends[precision] = metrics(tmp_path / precision)
        tensors, _ = load_state(tmp_path / precision / "state.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}
    losses = {key: [row["loss"] for row in rows if "loss" in row] for key, rows in ends.items()}
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_remedy(config: Config, tmp_path: Path):
    wild = config.train.model_copy(update={"learning_rate": 1e30, "warmup": 1})
    with pytest.raises(BadConfig, match="learning_rate"):
        train(config.model_copy(update={"train": wild}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "nowhere"}, "no label maps"),
        ({"hold_out": ["a.nii.gz", "b.nii.gz", "c.nii.gz"]}, "no label maps"),
        ({"hold_out": ["d.nii.gz"]}, "hold_out"),
        ({"labels": "nothing.csv"}, "nothing.csv"),
        ({"model__name": "vnet"}, "vnet"),
        ({"model__patch": [17, 16, 16]}, "patch"),
        ({"model__options": {"width": 9}}, "width"),
        ({"cleanup": [{"step": "nothing"}]}, "nothing"),
    ],
)
def test_a_run_that_cannot_begin_is_refused_with_one_line(
    tmp_path: Path, changes: dict, reason: str
):
    path = make_config(tmp_path / "c", **changes)
    ran = tiny.medseg("train", path, "-o", tmp_path / "run", "--quiet")
    assert ran.code in (3, 5, 6)
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith("medseg: ")
    assert reason in ran.err
    assert not (tmp_path / "run" / "model").exists()


def test_label_maps_without_the_structures_are_refused(tmp_path: Path):
    path = make_config(tmp_path)
    tiny.save_nifti(tmp_path / "maps" / "b.nii.gz", np.zeros((8, 8, 8), np.uint8), tiny.affine_of())
    with pytest.raises(BadConfig, match="none of the structures"):
        train(load_config(path), tmp_path / "run")


def test_progress_is_told_loss_dice_and_time_left(config: Config, tmp_path: Path):
    told: list[tuple[float, Any]] = []
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    train(short, tmp_path / "run", progress=lambda share, facts: told.append((share, facts)))
    steps = [(share, facts) for share, facts in told if "validation" not in facts]
    assert [(share, facts["step"]) for share, facts in steps] == [(0.5, 2), (1.0, 4)]
    assert steps[-1][1]["seconds_left"] == 0
    assert all(facts.keys() >= {"loss", "dice", "seconds_left"} for _, facts in steps)
    assert [facts["step"] for _, facts in told if "validation" in facts] == [4]


def test_the_metrics_beyond_the_state_are_cut_when_a_run_goes_on(config, finished, tmp_path):
    """Lines written just before a kill, and half a line, are written again and not twice."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tensors, facts = load_state(run / "state-before.safetensors")
    save_state(run / "state.safetensors", tensors, facts)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 0.1}\n{"step": 3')
    train(config, run)
    assert_same_end(run, finished)


def test_a_run_that_starts_from_another_begins_with_its_averaged_weights(finished, tmp_path):
    changes = {
        "start_from": str(finished),
        "train__steps": 1,
        "train__learning_rate": 1e-12,
        "train__weight_decay": 0,
    }
    config = load_config(make_config(tmp_path / "config", **changes))

    train(config, tmp_path / "run")

    before, _ = load_state(finished / "state.safetensors")
    after, _ = load_state(tmp_path / "run" / "state.safetensors")
    averages = [key for key in before if key.startswith("average.")]
    assert averages
    for key in averages:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)


def test_a_run_that_starts_from_another_network_is_refused(finished, tmp_path):
    options = {**CONFIG["model"]["options"], "features": [2, 4]}
    path = make_config(tmp_path / "config", start_from=str(finished), model__options=options)

    with pytest.raises(BadModel, match="do not fit this network"):
        train(load_config(path), tmp_path / "run")


def test_a_run_that_starts_from_a_folder_without_a_run_is_refused(tmp_path):
    path = make_config(tmp_path / "config", start_from=str(tmp_path / "nothing"))

    with pytest.raises(BadModel, match="nothing"):
        train(load_config(path), tmp_path / "run")


def test_thin_maps_are_trained_in_float32_where_bfloat16_has_wrong_gradients(monkeypatch, tmp_path):
    """Where there are no matrix units; two levels below a map of 8 voxels it has 2, below one of 12
    it has 3.
    """
    monkeypatch.setattr("medseg.training.precision.has_matrix_units", lambda: False)
    config = load_config(make_config(tmp_path), {"train.precision": "auto"})
    network, cpu = build_network("unet", 1, 2, features=(4, 4, 4)), torch.device("cpu")
    assert thinnest_map(network, 1, (8, 12, 12), cpu) == 2
    assert thinnest_map(network, 1, (12, 12, 16), cpu) == THIN == 3
    assert choose_training_precision(config, cpu, 2) == "fp32"


def test_a_run_of_an_earlier_version_knew_no_newer_settings_and_goes_on(
    config: Config, tmp_path: Path
):
    """What config.yaml does not say is as it always was; another device is no other run."""
    record_config(config, tmp_path)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert not {"betas", "device"} & recorded["train"].keys()
    assert "recipe" not in recorded["model"]
    other = config.train.model_copy(update={"device": "cuda:1"})
    assert changed_settings(config.model_copy(update={"train": other}), tmp_path) == []
    other = config.train.model_copy(update={"betas": (0.9, 0.98)})
    assert changed_settings(config.model_copy(update={"train": other}), tmp_path) == ["train.betas"]
