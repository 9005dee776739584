"""Going on with a run: what is not as it was begun with is named and refused, and what only moved
is not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny, phantoms
from making.places import ROOT
from medseg.training.state import load_state, save_state

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "train.steps": 6,
    "train.checkpoint_every": 2,
    "train.validate_samples": 1,
    "train.precision": "fp32",
    "model.patch": [16, 16, 16],
    "model.options": {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]},
}


def settings(**changes: Any) -> list[str]:
    content = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        part for key, value in content.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


def trained(data: Path, run: Path, *options: object, **changes: Any) -> tiny.Ran:
    return tiny.medseg("train", data, "-o", run, "--quiet", *settings(**changes), *options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.dataset(tmp_path_factory.mktemp("data") / "set", shape=(16, 16, 16))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    ran = trained(data, run)
    assert ran.code == 0, ran.err
    return run


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """A run as it stands after a checkpoint: without a model, and not at its end."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("model", "validation"):
        shutil.rmtree(run / name)
    for name in ("scores.csv", "summary.json", "report.html"):
        (run / name).unlink()
    tensors, facts = load_state(run / "state.safetensors")
    save_state(run / "state.safetensors", tensors, facts | {"position": 0.5, "step": 3})
    return run


def content_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nib.load(path)
    tiny.save_nifti(path, change(np.asarray(image.dataobj)), image.affine)


def renamed(folder: Path) -> None:
    change_json(folder / "dataset.json", labels={"0": "background", "1": "trunk", "2": "spot"})


def swapped(folder: Path) -> None:
    change_json(folder / "dataset.json", labels={"0": "background", "1": "spot", "2": "body"})
    for path in (folder / "labelsTr").iterdir():
        rewrite(path, lambda labels: np.array([0, 2, 1], np.uint8)[labels.astype(int)])


def renumbered(folder: Path) -> None:
    change_json(folder / "dataset.json", labels={"0": "background", "7": "body", "9": "spot"})
    for path in (folder / "labelsTr").iterdir():
        rewrite(path, lambda labels: np.array([0, 7, 9], np.uint8)[labels.astype(int)])


def another_structure(folder: Path) -> None:
    change_json(
        folder / "dataset.json", labels={"0": "background", "1": "body", "2": "spot", "3": "third"}
    )
    rewrite(folder / "labelsTr" / "case_01.nii.gz", lambda labels: np.where(labels == 2, 3, labels))


def other_channel(folder: Path) -> None:
    change_json(folder / "dataset.json", modality={"0": "FLAIR"})


def one_voxel_of_labels(folder: Path) -> None:
    def change(labels: np.ndarray) -> np.ndarray:
        labels = labels.copy()
        labels[0, 0, 0] = 1
        return labels

    rewrite(folder / "labelsTr" / "case_03.nii.gz", change)


def brighter(folder: Path) -> None:
    rewrite(folder / "imagesTr" / "case_04.nii.gz", lambda image: image * np.float32(1.5))


def elsewhere(folder: Path) -> None:
    path = folder / "imagesTr" / "case_02.nii.gz"
    image = nib.load(path)
    for each in (path, folder / "labelsTr" / "case_02.nii.gz"):
        moved = image.affine.copy()
        moved[0, 3] += 5
        tiny.save_nifti(each, np.asarray(nib.load(each).dataobj), moved)


def list_cases(folder: Path, names: list[str]) -> None:
    listed = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    change_json(folder / "dataset.json", training=listed, numTraining=len(names))


def case_more(folder: Path) -> None:
    image, labels = phantoms.phantom(77, (16, 16, 16))
    tiny.save_nifti(folder / "imagesTr" / "case_77.nii.gz", image, np.eye(4))
    tiny.save_nifti(folder / "labelsTr" / "case_77.nii.gz", labels, np.eye(4))
    list_cases(folder, [*(f"case_{n:02d}" for n in range(6)), "case_77"])


def case_less(folder: Path) -> None:
    list_cases(folder, [f"case_{n:02d}" for n in range(5)])


def own_splits(folder: Path) -> None:
    names = [f"case_{n:02d}" for n in range(6)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a structure has another name": (renamed, ("1 body", "1 trunk")),
    "structures have changed places": (swapped, ("1 body, 2 spot", "1 spot, 2 body")),
    "structures have other values": (renumbered, ("1 body, 2 spot", "7 body, 9 spot")),
    "there is one structure more": (another_structure, ("3 third",)),
    "the channel is another one": (other_channel, ("MRI", "FLAIR")),
    "one voxel of a label map": (one_voxel_of_labels, ("case_03", "labels")),
    "an image": (brighter, ("case_04", "image")),
    "where a case lies": (elsewhere, ("case_02", "image")),
    "a case more": (case_more, ("case_77",)),
    "a case less": (case_less, ("case_05",)),
    "splits of the data's own": (own_splits, ("splits",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_by_name(change: str, data: Path, interrupted: Path, tmp_path: Path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    spoil, words = CHANGES[change]
    spoil(other)
    before = content_of(interrupted)
    ran = trained(other, interrupted)
    assert ran.code == 5, ran.err
    said = ran.err.splitlines()[-1]
    assert said.startswith(f"medseg: {interrupted} was begun") and "choose another -o" in said
    assert all(word in said for word in words), said
    assert content_of(interrupted) == before


@pytest.mark.parametrize(
    "change", ["structures have changed places", "one voxel of a label map", "a case more"]
)
def test_a_finished_run_is_not_finished_for_other_data(
    change: str, data: Path, finished: Path, tmp_path: Path
):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    CHANGES[change][0](other)
    ran = trained(other, finished)
    assert ran.code == 5
    assert ran.out == ""


def test_data_that_moved_or_were_packed_otherwise_are_the_same(
    data: Path, interrupted: Path, tmp_path: Path
):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    for path in (
        moved / "labelsTr"
    ).iterdir():  # another type and another compression, the same voxels
        rewrite(path, lambda labels: labels.astype(np.int16))
    ran = trained(moved, interrupted)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        (["--fold", "2"], {}, "fold 0, not 2"),
        (["--folds", "3", "--fold", "0"], {}, "5 folds, not 3"),
        (["--seed", "9"], {}, "train.seed"),
        (["--model", "segresnet"], {}, "model.name"),
        ([], {"train__batch": 1}, "train.batch"),
        ([], {"model__patch": [8, 16, 16]}, "model.patch"),
    ],
)
@pytest.mark.parametrize("stage", ["finished", "interrupted"])
def test_other_folds_seeds_and_models_are_refused(
    stage: str,
    options: list[str],
    changes: dict[str, Any],
    said: str,
    data: Path,
    request: pytest.FixtureRequest,
):
    run = request.getfixturevalue(stage)
    ran = trained(data, run, *options, **changes)
    assert ran.code == 5, ran.err
    assert said in ran.err


@pytest.mark.parametrize(
    "changes", [{"train__steps": 12}, {"cleanup": []}, {"card": {"site": "here"}}]
)
def test_a_finished_run_asked_for_something_else_is_refused(
    changes: dict[str, Any], data: Path, finished: Path
):
    ran = trained(data, finished, **changes)
    assert ran.code == 5
    assert "was finished with other settings" in ran.err
    assert next(iter(changes)).replace("__", ".") in ran.err
    again = trained(data, finished)
    assert again.code == 0, again.err


def test_a_run_that_begins_from_a_model_keeps_to_it(data: Path, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    short = ["--set", "train.steps=2", "--set", "train.precision=fp32", "--quiet"]
    ran = tiny.medseg("train", data, "-o", run, *short, "--finetune", finished)
    assert ran.code == 0, ran.err
    assert tiny.medseg("train", data, "-o", run, *short, "--finetune", finished).code == 0
    other = tmp_path / "other"
    assert trained(data, other, "--seed", "5").code == 0
    ran = tiny.medseg("train", data, "-o", run, *short, "--finetune", other)
    assert ran.code == 5 and "from another model" in ran.err
    # As a run stopped before its first checkpoint.
    for name in (
        "state.safetensors",
        "state-before.safetensors",
    ):
        (run / name).unlink(missing_ok=True)
    ran = tiny.medseg("train", data, "-o", run, *short)
    assert ran.code == 5 and "--finetune" in ran.err
    ran = trained(data, finished, "--finetune", other)
    assert ran.code == 5 and "from no other model" in ran.err


def test_a_run_of_an_older_version_goes_on_and_what_it_says_is_compared(
    data: Path, interrupted: Path, finished: Path, tmp_path: Path
):
    old = Path(shutil.copytree(interrupted, tmp_path / "old"))
    (old / "data.json").unlink()
    more = Path(shutil.copytree(data, tmp_path / "more"))
    case_more(more)
    ran = trained(more, old)
    assert ran.code == 5 and "case_77" in ran.err
    ran = trained(data, old, "--fold", "3")
    assert ran.code == 5 and "another fold" in ran.err
    ran = trained(data, old)
    assert ran.code == 0, ran.err
    for folder in ("model/model.safetensors",):
        assert (old / folder).exists()
    done = Path(shutil.copytree(finished, tmp_path / "done"))
    (done / "data.json").unlink()
    other = Path(shutil.copytree(data, tmp_path / "other"))
    renamed(other)
    ran = trained(other, done)
    assert ran.code == 5 and "1 trunk" in ran.err
    assert trained(data, done).code == 0


def test_a_state_of_another_network_is_one_sentence(data: Path, interrupted: Path, tmp_path: Path):
    """Of an older version nothing else tells that there is one structure more."""
    (interrupted / "data.json").unlink()
    other = Path(shutil.copytree(data, tmp_path / "other"))
    another_structure(other)
    ran = trained(other, interrupted)
    assert ran.code == 5
    assert "another network" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("damage", ["", "[]", '{"cases": 3}', '{"cases": {}, "more": 1}'])
def test_a_damaged_record_is_one_sentence(damage: str, data: Path, interrupted: Path):
    (interrupted / "data.json").write_text(damage)
    ran = trained(data, interrupted)
    assert ran.code == 5
    assert "data.json is damaged" in ran.err


def test_the_case_of_other_labels(shared_data: Path, tmp_path: Path):
    """Begun with `data` and stopped, a run does not go on with `corrected`, `renumbered` and
    `swapped`.
    """
    make = shared_data / "cases/work/resume-other-labels/make.py"
    subprocess.run([sys.executable, make, shared_data, tmp_path], check=True, cwd=ROOT, timeout=600)
    run = tmp_path / "run"
    ran = trained(tmp_path / "data", run)
    assert ran.code == 0, ran.err
    for name, said in (
        ("corrected", "labels of case hippo_002"),
        ("renumbered", "200 a, 210 b"),
        ("swapped", "1 posterior, 2 anterior"),
    ):
        ran = trained(tmp_path / name, run)
        assert ran.code == 5, ran.err
        assert said in ran.err
    assert trained(tmp_path / "data", run).code == 0
