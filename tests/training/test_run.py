"""`medseg train DATASET`: from a folder of scans to a scored model, however it is interrupted, and
what is refused.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from making import networks as tiny, phantoms
from making.configs import SMALL, settings
from making.places import CONFIGS
from medseg.dataset import read_dataset
from medseg.evaluation.scoring import evaluation_of, score_pairs
from medseg.evaluation.summary import read_scores
from medseg.io import read_labels
from medseg.models.folder import load_checkpoint
from medseg.training.request import Outcome
from medseg.training.run import _together
from medseg.training.scoring import scoring_options
from medseg.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = {
    ".lock", "config.yaml", "data.json", "metrics.jsonl", "model", "plan.json", "progress.png",
    "report.html",
    "scores.csv", "splits.json", "state-before.safetensors", "state.safetensors", "summary.json",
    "validation",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Ran]:
    run = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ran = tiny.medseg("train", data, "-o", run, *settings())
    torch.set_num_threads(threads)
    return run, ran


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def assert_same_weights(run: Path, other: Path) -> None:
    for folder in ("", "model"):
        if folder:
            one, two = ((r / "model" / "model.safetensors").read_bytes() for r in (run, other))
            assert one == two
            continue
        (tensors, facts), (expected, wanted) = (
            load_state(r / "state.safetensors") for r in (run, other)
        )
        assert facts["step"] == wanted["step"]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_a_run_ends_with_everything_that_is_documented(finished: tuple[Path, tiny.Ran]):
    run, ran = finished
    assert ran.code == 0, ran.err
    assert {path.name for path in run.iterdir()} == WRITTEN
    assert {path.name for path in (run / "model").iterdir()} == {
        "model.safetensors", "model.json", "labels.csv", "README.md",
    }  # fmt: skip
    assert ran.out.splitlines()[-1] == str(run / "model")
    assert "Phantoms (decathlon): 6 cases of MRI; body, spot" in ran.err
    for words in ("setting", "because", "model.patch", "as asked"):
        assert words in ran.err


def test_the_plan_and_the_split_are_data(finished: tuple[Path, tiny.Ran]):
    run, _ = finished
    plan = json.loads((run / "plan.json").read_text())
    assert plan["fingerprint"]["median_shape"] == [22, 24, 20]
    reasons = {choice["key"]: choice["reason"] for choice in plan["choices"]}
    assert reasons["model.patch"] == "as asked"
    assert all(reasons.values())
    splits = json.loads((run / "splits.json").read_text())
    assert sorted(splits["training"] + splits["validation"]) == [f"case_{n:02d}" for n in range(6)]
    assert len(splits["validation"]) in (1, 2)


def test_the_scores_are_those_of_the_label_maps_it_wrote(
    finished: tuple[Path, tiny.Ran], data: Path
):
    run, _ = finished
    rows = read_scores(run / "scores.csv")
    cases = json.loads((run / "splits.json").read_text())["validation"]
    assert {(row["case"], row["structure"]) for row in rows} == {
        (c, s) for c in cases for s in ("body", "spot")
    }
    for row in rows:
        found, truth = (
            read_labels(folder / f"{row['case']}.nii.gz").data
            for folder in (run / "validation", data / "labelsTr")
        )
        value = {"body": 1, "spot": 2}[row["structure"]]
        overlap = (
            2
            * ((found == value) & (truth == value)).sum()
            / ((found == value).sum() + (truth == value).sum())
        )
        assert row["dice"] == pytest.approx(overlap, abs=1e-6)


def test_it_learns(finished: tuple[Path, tiny.Ran]):
    run, _ = finished
    told = losses(run)
    assert told[-1] < told[0] - 0.5
    body = [row["dice"] for row in read_scores(run / "scores.csv") if row["structure"] == "body"]
    assert min(body) > 0.6


def test_infer_takes_the_run_folder_and_does_what_validation_did(
    finished, data: Path, tmp_path: Path
):
    run, _ = finished
    case = json.loads((run / "splits.json").read_text())["validation"][0]
    ran = tiny.medseg(
        "infer", data / "imagesTr" / f"{case}.nii.gz", "-m", run, "-o", tmp_path / "found.nii.gz",
        "--quiet",
        "--backend", "torch",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found, validated = (
        read_labels(tmp_path / "found.nii.gz"),
        read_labels(run / "validation" / f"{case}.nii.gz"),
    )
    assert np.array_equal(found.data, validated.data)
    assert np.allclose(found.affine, validated.affine)


def test_a_run_killed_after_its_last_step_is_completed(finished, data: Path, tmp_path: Path):
    """Nothing but the state stands there yet: the picture, the model, the scores and the report are
    still to come.
    """
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for name in ("model", "validation"):
        shutil.rmtree(run / name)
    for name in ("progress.png", "scores.csv", "summary.json", "report.html"):
        (run / name).unlink()
    ran = tiny.medseg("train", data, "-o", run, *settings(), "--quiet")
    assert ran.code == 0, ran.err
    assert {path.name for path in run.iterdir()} == WRITTEN
    assert_same_weights(run, finished[0])
    for name in ("progress.png", "scores.csv", "metrics.jsonl"):
        assert (run / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_finished_run_is_left_as_it_is(finished, data: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    ran = tiny.medseg("train", data, "-o", run, *settings())
    assert ran.code == 0, ran.err
    assert "is finished" in ran.err
    assert ran.out == finished[1].out.replace(str(finished[0]), str(run))
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    refused = tiny.medseg("train", data, "-o", run, *settings(), "--no-resume")
    assert refused.code == 5
    assert "holds a run" in refused.err


# Forking leaves the imports to the parent, so that a run begins in milliseconds and can be killed
# often.
KILLING = """
import os, random, signal, sys, time, json, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
from medseg.training.state import load_state
from medseg.training.run import Request, train_dataset
data, folder, overrides = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
run = folder / "run"

train_dataset(Request(data=data, run=folder / "warm", overrides=overrides))

def begin(where):
    child = os.fork()
    if child == 0:
        try:
            train_dataset(Request(data=data, run=where, overrides=overrides))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

start = time.monotonic()
assert end(begin(folder / "straight")) == 0
longest = (time.monotonic() - start) / 2
for seed in range(8):
    random.seed(seed)
    shutil.rmtree(run, ignore_errors=True)
    killed, steps, code = 0, set(), -signal.SIGKILL
    while code == -signal.SIGKILL:
        child = begin(run)
        if killed < 20:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        code = end(child)
        if code == -signal.SIGKILL:
            killed += 1
            if (run / "state.safetensors").exists():
                steps.add(load_state(run / "state.safetensors")[1]["step"])
    assert code == 0
    print(json.dumps({"killed": killed, "steps": sorted(steps)}), flush=True)
    if killed == 20 and len(steps) >= 4:
        break
    longest *= 0.7 if killed < 20 else 1.4
"""


def test_a_run_killed_twenty_times_ends_bit_for_bit_where_an_uninterrupted_one_does(
    data: Path, tmp_path: Path
):
    """Killed at random moments of planning, preparing, training, saving and scoring."""
    overrides = SMALL | {"train.steps": 150, "train.checkpoint_every": 3, "model.spacing_mm": 1.0}
    ran = tiny.run_child("-c", KILLING, data, tmp_path, json.dumps(overrides), timeout=300)
    assert ran.code == 0, ran.err
    outcome = json.loads(ran.out.splitlines()[-1])
    assert outcome["killed"] == 20
    assert len(outcome["steps"]) >= 4, "the run got on between kills"
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert_same_weights(run, straight)
    assert losses(run) == losses(straight)
    assert {p.name for p in run.iterdir()} == WRITTEN
    assert (run / "scores.csv").read_text() == (straight / "scores.csv").read_text()


@pytest.mark.parametrize("left", [(), ("plan.json",), ("plan.json", "splits.json")])
def test_a_run_killed_while_it_recorded_its_plan_begins_again(
    left: tuple[str, ...], data: Path, tmp_path: Path
):
    """config.yaml is written last; what stands there without it is written anew. Other files are
    not touched.
    """
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).write_text("{}")
    ran = tiny.medseg("train", data, "-o", run, *settings(train__steps=2), "--quiet")
    assert ran.code == 0, ran.err
    assert {path.name for path in run.iterdir()} >= WRITTEN - {"state-before.safetensors"}
    assert json.loads((run / "splits.json").read_text())["validation"]
    (run / "config.yaml").unlink()
    again = tiny.medseg("train", data, "-o", run, *settings(train__steps=2), "--quiet")
    assert again.code != 0
    assert "holds no run" in again.err


def test_two_processes_learn_what_one_does_whether_copied_or_shared_out(data: Path, tmp_path: Path):
    """The same global batch on 1 process and on 2: losses agree to rounding, weights nearly."""
    common = [
        "-m",
        "medseg",
        "train",
        data,
        *settings(train__steps=8, train__log_every=1, train__batch=2),
        "--quiet",
    ]
    alone = tiny.run_child(*common, "-o", tmp_path / "one")
    assert alone.code == 0, alone.err
    expected = losses(tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        run = tmp_path / parallel
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--no-python",
            sys.executable,
        ]
        ran = tiny.run_child(*torchrun, *common, "-o", run, "--set", f"train.parallel={parallel}")
        assert ran.code == 0, ran.err
        assert losses(run) == pytest.approx(expected, rel=2e-5)
        assert ran.out.splitlines()[-1] == str(run / "model")  # the first process alone speaks
        assert ran.out.count("body") == 1
        one, two = (load_checkpoint(str(r)).network().state_dict() for r in (tmp_path / "one", run))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=5e-3)


def test_memory_that_is_not_there_is_refused_before_anything_is_written_and_what_would_fit_fits(
    data, tmp_path
):
    big = settings(model__patch=[16, 16, 16], train__batch=4000)
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", *big, "--max-memory", "2GB")
    assert ran.code == 7
    assert len([line for line in ran.err.splitlines() if line.startswith("medseg: ")]) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()
    said = ran.err.splitlines()[-1]
    assert "2.0 GB may be used" in said
    batch = int(said.split("train.batch=")[1].split()[0])
    patch = yaml.safe_load(said.split("model.patch=")[1].split()[0])
    fits = settings(model__patch=patch, train__batch=batch, train__steps=1)
    again = tiny.medseg(
        "train", data, "-o", tmp_path / "run", *fits, "--max-memory", "2GB", "--quiet"
    )
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--time", "soon"], 2, "30m"),
        (["--set", "train.batch"], 5, "KEY=VALUE"),
        (["--set", "train.colour=red"], 5, "colour"),
        (["--set", "train.steps=0"], 5, "steps"),
        (["--model", "vnet"], 5, "vnet"),
        (["--fold", "9"], 5, "fold 9"),
        (["--finetune", "nothing"], 6, "nothing"),
        (["--config", "missing.yaml"], 5, "missing.yaml"),
        (["--track", "excel"], 5, "excel"),
    ],
)
def test_wrong_options_are_one_clear_line(
    data: Path, tmp_path: Path, options: list[str], code: int, said: str
):
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings(), *options)
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "run" / "model").exists()


def test_data_with_errors_are_refused_with_the_first_one_and_where_all_are(tmp_path: Path):
    def spoil(number: int, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if number in (2, 3, 4):
            labels = labels.copy()
            labels[3, 3, 3] = 7
        return image, labels

    data = phantoms.dataset(tmp_path / "data", change=spoil)
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    assert ran.code == 3
    assert "case_02" in ran.err
    assert f"medseg check {data}" in ran.err
    # A value that nobody named cannot be trained with, whatever is asked for.
    again = tiny.medseg("train", data, "-o", tmp_path / "again", "--quiet", *settings(), "--anyway")
    assert again.code == 3
    assert "[7]" in again.err


def test_a_case_that_is_there_twice_is_refused_or_trained_with_on_request(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data")
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(data / part / "case_00.nii.gz", data / part / "case_05.nii.gz")
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings(train__steps=2))
    assert ran.code == 3
    assert "--anyway" in ran.err
    again = tiny.medseg(
        "train", data, "-o", tmp_path / "run", "--quiet", *settings(train__steps=2), "--anyway"
    )
    assert again.code == 0, again.err


def test_a_folder_with_something_else_in_it_is_left_alone(data: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--quiet", *settings())
    assert ran.code == 5
    assert "not empty" in ran.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_one_case_is_not_enough(tmp_path: Path):
    ran = tiny.medseg(
        "train",
        phantoms.dataset(tmp_path / "data", 1),
        "-o",
        tmp_path / "run",
        "--quiet",
        *settings(),
    )
    assert ran.code == 5
    assert "one case" in ran.err


def test_a_second_process_in_the_folder_is_refused(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    arguments = [
        "-m",
        "medseg",
        "train",
        data,
        "-o",
        run,
        "--quiet",
        *settings(train__steps=100_000),
    ]
    with tiny.start(*arguments) as child:
        try:
            for _ in range(600):
                if (run / "state.safetensors").exists():
                    break
                assert child.poll() is None, child.communicate()[1]
                signal.sigtimedwait([], 0.1)
            second = tiny.medseg(
                "train", data, "-o", run, "--quiet", *settings(train__steps=100_000)
            )
            child.send_signal(signal.SIGTERM)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 143, err
    assert second.code == 5
    assert "another process is training" in second.err


def test_several_channels_regions_and_labels_to_ignore(tmp_path: Path):
    """nnU-Net's layout with two channels, a region around both structures, and an ignore label."""
    folder = tmp_path / "Dataset001_Two"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(5):
        image, labels = phantoms.phantom(number, channels=2)
        labels[:2] = 3  # to be ignored
        for channel in range(2):
            tiny.save_nifti(
                folder / "imagesTr" / f"c{number}_{channel:04d}.nii.gz",
                image[..., channel],
                np.eye(4),
            )
        tiny.save_nifti(folder / "labelsTr" / f"c{number}.nii.gz", labels, np.eye(4))
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "all": [1, 2], "spot": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    ran = tiny.medseg(
        "train", folder, "-o", tmp_path / "run", *settings(train__steps=60), "--quiet"
    )
    assert ran.code == 0, ran.err
    spec = load_checkpoint(str(tmp_path / "run")).spec
    assert (spec.channels, spec.channel_names, spec.regions, spec.classes) == (
        2,
        ("T1", "T2"),
        True,
        (0, 1, 2),
    )
    rows = read_scores(tmp_path / "run" / "scores.csv")
    assert {row["structure"] for row in rows} == {"all", "spot"}
    assert min(row["dice"] for row in rows if row["structure"] == "all") > 0.6
    scan = folder / "imagesTr" / "c0_0000.nii.gz"
    found = tiny.medseg(
        "infer", scan, "-m", tmp_path / "run", "-o", tmp_path / "found.nii.gz", "--quiet"
    )
    assert found.code == 0, found.err
    assert set(np.unique(read_labels(tmp_path / "found.nii.gz").data)) <= {0, 1, 2}


def test_partly_annotated_cases_train_and_are_scored_where_they_are_annotated(tmp_path: Path):
    """Each case has one of two structures annotated; the model finds both in every scan."""
    lines = ["case,image,label,labelled,split"]
    for number in range(8):
        image, labels = phantoms.phantom(number)
        value = 1 + number % 2
        tiny.save_nifti(tmp_path / f"i{number}.nii.gz", image, np.eye(4))
        tiny.save_nifti(
            tmp_path / f"l{number}.nii.gz", np.where(labels == value, labels, 0), np.eye(4)
        )
        split = "val" if number in (0, 1) else "train"
        lines.append(f"c{number},i{number}.nii.gz,l{number}.nii.gz,{value},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    ran = tiny.medseg(
        "train",
        tmp_path / "list.csv",
        "-o",
        tmp_path / "run",
        *settings(train__steps=80),
        "--quiet",
    )
    assert ran.code == 0, ran.err
    scored = {
        (row["case"], row["structure"]): row["dice"]
        for row in read_scores(tmp_path / "run" / "scores.csv")
    }
    assert sorted(case for case, _ in scored) == ["c0", "c1"]
    assert len({structure for _, structure in scored}) == 2
    assert min(scored.values()) > 0.6
    for number in (0, 1):
        found = read_labels(tmp_path / "run" / "validation" / f"c{number}.nii.gz").data
        _, truth = phantoms.phantom(number)
        for value in (1, 2):
            same = 2 * ((found == value) & (truth == value)).sum()
            assert same / ((found == value).sum() + (truth == value).sum()) > 0.6


def test_a_model_is_refined_with_its_plan_and_a_new_head(finished, tmp_path: Path):
    """Another set with one structure: the network's body is taken over, the head is new, and that
    is told.
    """
    data = phantoms.dataset(
        tmp_path / "data",
        4,
        labels={"both": 1},
        change=lambda n, image, labels: (image, (labels > 0).astype(np.uint8)),
    )
    short = ["--set", "train.steps=4", "--set", "train.precision=fp32"]
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--finetune", finished[0], *short)
    assert ran.code == 0, ran.err
    assert "new outputs, which begin at random, are both" in ran.err
    before, after = (load_checkpoint(str(path)) for path in (finished[0], tmp_path / "run"))
    for name in ("architecture", "options", "patch", "spacing_mm", "grid", "intensity"):
        assert getattr(after.spec, name) == getattr(before.spec, name)
    key = next(key for key in before.network().state_dict() if key.startswith("encoder"))
    change = (after.network().state_dict()[key] - before.network().state_dict()[key]).abs().mean()
    assert 0 < float(change) < 0.1 * float(before.network().state_dict()[key].abs().mean())


def test_all_folds_make_a_model_each_and_scores_of_every_case(data: Path, tmp_path: Path):
    ran = tiny.medseg(
        "train",
        data,
        "-o",
        tmp_path / "run",
        "--folds",
        "3",
        *settings(train__steps=6, train__validate_every=6),
        "--quiet",
    )
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-3:] == [
        str(tmp_path / "run" / f"fold{n}" / "model") for n in range(3)
    ]
    rows = read_scores(tmp_path / "run" / "scores.csv")
    assert sorted(row["case"] for row in rows if row["structure"] == "body") == [
        f"case_{n:02d}" for n in range(6)
    ]
    # Interrupted after the first fold, the same command scores all of them together.
    shutil.rmtree(tmp_path / "run" / "fold2")
    (tmp_path / "run" / "scores.csv").unlink()
    options = settings(train__steps=6, train__validate_every=6)
    again = tiny.medseg("train", data, "-o", tmp_path / "run", "--folds", "3", *options, "--quiet")
    assert again.code == 0, again.err
    assert again.out == ran.out
    models = [part for n in range(3) for part in ("-m", tmp_path / "run" / f"fold{n}")]
    together = tiny.medseg(
        "infer",
        data / "imagesTr" / "case_00.nii.gz",
        *models,
        "-o",
        tmp_path / "found.nii.gz",
        "--quiet",
    )
    assert together.code == 0, together.err


def test_every_architecture_trains_and_infers_by_the_same_two_commands(tmp_path: Path):
    from medseg.networks.zoo import NETWORKS

    pytest.importorskip("monai")
    data = phantoms.dataset(tmp_path / "data", 3, shape=(16, 16, 16))
    for name in NETWORKS:
        run = tmp_path / name
        steps = [
            "--set",
            "train.steps=2",
            "--set",
            "train.precision=fp32",
            "--set",
            "train.validate_samples=0",
        ]
        ran = tiny.medseg(
            "train",
            data,
            "-o",
            run,
            "--model",
            name,
            *steps,
            "--folds",
            "3",
            "--fold",
            "1",
            "--quiet",
        )
        assert ran.code == 0, (name, ran.err)
        assert load_checkpoint(str(run)).spec.architecture == name
        scan = data / "imagesTr" / "case_00.nii.gz"
        ran = tiny.medseg("infer", scan, "-m", run, "-o", tmp_path / f"{name}.nii.gz", "--quiet")
        assert ran.code == 0, (name, ran.err)
        assert read_labels(tmp_path / f"{name}.nii.gz").shape == (16, 16, 16)


def test_deterministic_mode_changes_nothing_on_a_cpu_and_is_off_afterwards(
    finished, data: Path, tmp_path: Path
):
    ran = tiny.medseg(
        "train", data, "-o", tmp_path / "run", *settings(), "--deterministic", "--quiet"
    )
    assert ran.code == 0, ran.err
    assert_same_weights(tmp_path / "run", finished[0])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_config_for_scans_alone_says_how_it_is_used(tmp_path: Path):
    ran = tiny.medseg("train", CONFIGS / "unet.yaml", "-o", tmp_path / "run")
    assert ran.code == 5
    assert "medseg train DATASET --config" in ran.err


def test_what_is_said_of_the_cases_of_any_fold_is_said_of_all(data: Path, tmp_path: Path):
    dataset = read_dataset(data)
    options = scoring_options(dataset)
    labels = {case.name: case.label for case in dataset.cases[:4]}
    folds = []
    for fold, names in enumerate((list(labels)[:2], list(labels)[2:])):
        pairs = {name: (labels[name], labels[name]) for name in names}
        pairs[names[1]] = (labels[names[1]], tmp_path / "gone.nii.gz")
        evaluation = evaluation_of(score_pairs(pairs, options), options)
        folds.append(Outcome(run=tmp_path / f"fold{fold}", models=(), evaluation=evaluation))
    outcome = _together(folds, dataset, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = list(labels)
    assert summary["cases"]["scored"] == [names[0], names[2]]
    assert sorted(summary["cases"]["failed"]) == [names[1], names[3]]
    assert summary["problems"] == outcome.evaluation.problems
    assert len(summary["problems"]) == 2
