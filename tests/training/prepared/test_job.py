"""`medseg prepare`: however many jobs prepare a data set, in whichever order and however often they
are killed, the store is the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import numpy as np
import pytest

from making import networks as tiny, phantoms
from medseg.cli.schema import schema_of
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.reading import read_dataset
from medseg.training import plan
from medseg.training.prepared.reading import open_prepared

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepare(data: Path, store: Path, *options: object) -> tiny.Ran:
    return tiny.medseg("prepare", data, "-o", store, "--quiet", *options)


def result_of(data: Path, store: Path, *options: object) -> dict[str, Any]:
    ran = prepare(data, store, "--json", *options)
    content: dict[str, Any] = json.loads(ran.out)
    jsonschema.Draft202012Validator(schema_of("prepare")).validate(content)
    assert ran.code == (0 if content["counts"]["done"] == content["total"] else 3), ran.err
    return content


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.dataset(tmp_path_factory.mktemp("prepared") / "data", 9)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data prepared by one job that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    assert result_of(data, folder)["counts"] == {"done": 9, "failed": 0, "waiting": 0}
    return folder


def test_parts_in_any_order_make_the_same_store_and_none_waits_for_another(
    data: Path, store: Path, tmp_path: Path
):
    parts = [f"{number}/4" for number in (2, 0, 3, 1)]
    first = [result_of(data, tmp_path / "store", "--shard", part) for part in parts]
    assert [one["unchecked"] for one in first] == [7, 4, 2, 0]
    assert [one["counts"]["waiting"] for one in first] == [2, 3, 2, 0]
    said = prepare(data, tmp_path / "other", "--shard", "0/4")
    assert said.code == 3
    assert "6 cases of other parts are not checked yet; run the same command again" in said.out
    again = [result_of(data, tmp_path / "store", "--shard", part) for part in parts]
    assert [one["counts"]["done"] for one in again] == [2, 3, 2, 2]
    assert tree(tmp_path / "store") == tree(store)


def test_data_that_lie_elsewhere_and_more_workers_make_the_same_store(
    data: Path, store: Path, tmp_path: Path
):
    shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copy2)
    assert prepare(tmp_path / "moved", tmp_path / "store", "--workers", 2).code == 0
    assert tree(tmp_path / "store") == tree(store)


def test_a_dry_run_says_what_is_to_be_done_and_writes_nothing(
    data: Path, store: Path, tmp_path: Path
):
    def outlook(folder: Path, *options: object) -> tuple[int, int, int]:
        ran = prepare(data, folder, "--dry-run", "--json", *options)
        assert ran.code == 0, ran.err
        content = json.loads(ran.out)
        jsonschema.Draft202012Validator(schema_of("prepare-plan")).validate(content)
        return content["total"], content["to_check"], content["to_prepare"]

    assert outlook(tmp_path / "new", "--shard", "0/2") == (5, 5, 5)
    assert not (tmp_path / "new").exists()
    before = tree(store)
    assert outlook(store) == (9, 0, 0)
    assert tree(store) == before
    assert prepare(data, tmp_path / "half", "--shard", "0/2").code == 3
    assert outlook(tmp_path / "half", "--shard", "0/2") == (5, 0, 5)
    said = prepare(data, tmp_path / "half", "--dry-run").out
    assert "of 9 cases 4 are to be checked and 9 to be prepared; nothing was written" in said
    refused = prepare(data, store, "--dry-run", "--set", "model.grid=world")
    assert refused.code == 5 and "begun with other settings" in refused.err


#: A process that starts others, which kill themselves before the n-th file is there, or after it,
#: until one comes to its end.
KILLED = """
import os, random, signal, sys
from pathlib import Path
import medseg.inference, medseg.dataset
from medseg.training import Request, prepare_dataset
from medseg.training.prepared import arrays, job, store

data, folder = map(Path, sys.argv[1:])
draw = random.Random(4)
kills = 0
for number in range(200):
    left = draw.randint(1, 13)
    child = os.fork()
    if not child:
        of = {"fsync": os.fsync, "replace": Path.replace}
        name = draw.choice(("fsync", "replace"))
        def counted(*arguments):
            global left
            left -= 1
            if left == 0 and name == "fsync":
                os.kill(os.getpid(), signal.SIGKILL)
            of[name](*arguments)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        setattr(*((os, "fsync") if name == "fsync" else (Path, "replace")), counted)
        part = (number % 2, 2)
        result = prepare_dataset(Request(data=data), folder, part=part, workers=1 + number % 2,
                                 retry=draw.random() < 0.3)
        os._exit(result.exit_code)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    for path in folder.rglob(".medseg-*"):  # as if a minute had passed
        os.utime(path, (0, 0))
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows starts processes in another way")
def test_a_store_whose_jobs_were_killed_again_and_again_is_the_same(
    data: Path, store: Path, tmp_path: Path
):
    ran = tiny.run_child("-c", KILLED, data, tmp_path / "store", timeout=600)
    assert ran.code == 0, ran.err
    assert int(ran.out) > 10
    for _ in range(2):
        assert prepare(data, tmp_path / "store", "--retry").code == 0
    assert tree(tmp_path / "store") == tree(store)


def test_what_is_kept_of_a_data_set_says_what_its_check_says(tmp_path: Path):
    def change(number: int, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, labels = (image[::-1], labels[::-1]) if number == 2 else (image, labels)
        return (image, labels) if number != 5 else phantoms.phantom(4)

    data = phantoms.dataset(tmp_path / "data", 10, change=change, modalities=("MRI",))
    assert prepare(data, tmp_path / "store").code == 0
    dataset = read_dataset(data)
    kept, check = open_prepared(tmp_path / "store").check(dataset), check_dataset(dataset)
    assert check.findings, "the duplicate is seen"
    named = [(one.case, one.kind, one.severity) for one in check.findings]
    assert [(one.case, one.kind, one.severity) for one in kept.findings] == named
    assert str(data) not in "".join(one.message for one in kept.findings)
    assert kept.digests == check.digests
    assert kept.as_dict()["cases"] == check.as_dict()["cases"]
    for one, other in zip(kept.facts, check.facts, strict=True):
        for a, b in zip(one.channels, other.channels, strict=True):
            assert np.array_equal(a.foreground, b.foreground)


def test_the_plan_follows_from_the_data_and_not_from_the_speed_of_a_machine(
    data: Path, tmp_path: Path
):
    with mock.patch.object(plan, "seconds_a_voxel", side_effect=AssertionError):
        assert prepare(data, tmp_path / "own").code == 0
        options = ("--set", "model.spacing_mm=2", "--set", "model.grid=world")
        assert prepare(data, tmp_path / "asked", *options).code == 0
        recipe = ("--set", "model.recipe=monai")  # which fits the grid that is planned
        assert prepare(data, tmp_path / "monai", *recipe).code == 0
    assert open_prepared(tmp_path / "monai").settings["model.recipe"] == "monai"
    own, asked = (open_prepared(tmp_path / name).settings for name in ("own", "asked"))
    assert own["model.spacing_mm"] == [1.0, 1.0, 1.0]
    assert own["model.grid"] == "scan"
    assert (asked["model.spacing_mm"], asked["model.grid"]) == (2.0, "world")
    file = next((tmp_path / "asked").rglob("image.npy"))
    assert np.load(file).shape == (1, 11, 12, 10)


def test_a_case_that_cannot_be_read_is_told_and_the_others_are_done(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 4)
    bad = data / "imagesTr" / "case_02.nii.gz"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    content = result_of(data, tmp_path / "store")
    assert content["counts"] == {"done": 3, "failed": 1, "waiting": 0}
    (failure,) = content["failures"]
    assert failure["case"] == "case_02"
    assert "case_02.nii.gz: " in failure["error"] and str(data) not in failure["error"]
    assert "case_02: " in prepare(data, tmp_path / "store").out
    refused = tiny.medseg("train", data, "-o", tmp_path / "run", "--prepared", tmp_path / "store")
    assert refused.code == 3
    assert "case_02" in refused.err and not (tmp_path / "run").exists()
    bad.write_bytes(good)
    os.utime(bad, (1, 1))
    assert result_of(data, tmp_path / "store")["counts"]["done"] == 4


def test_a_case_that_takes_its_process_along_comes_last_and_is_given_up_in_the_end(
    data: Path, store: Path, tmp_path: Path
):
    shutil.copytree(store, tmp_path / "store")
    (place,) = (tmp_path / "store" / "cases").glob("*/case_03-*")
    for name in ("check.json", "record.json"):
        (place / name).unlink()
    (tmp_path / "store" / "plan.json").unlink()
    (place / "begun").write_bytes(b"...")
    content = result_of(data, tmp_path / "store")
    assert content["counts"] == {"done": 8, "failed": 1, "waiting": 0}
    assert "3 attempts" in content["failures"][0]["error"]
    assert result_of(data, tmp_path / "store")["counts"]["failed"] == 1
    assert json.loads((tmp_path / "store" / "plan.json").read_text())["fingerprint"]["cases"] == 8
    assert result_of(data, tmp_path / "store", "--retry")["counts"]["failed"] == 0
    assert tree(tmp_path / "store") == tree(store)


def test_what_changed_since_is_prepared_anew_and_the_rest_is_left(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 4)
    assert prepare(data, tmp_path / "store").code == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.npy")}
    left = next(iter(times)).with_name(f".medseg-{'0' * 24}")  # by a job that was killed
    left.write_bytes(b"half of an array")
    os.utime(left, (1, 1))
    assert prepare(data, tmp_path / "store").code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times and not left.exists()
    image, _ = phantoms.phantom(77)
    changed = data / "imagesTr" / "case_01.nii.gz"
    tiny.save_nifti(changed, image, np.eye(4))
    (tmp_path / "store" / "plan.json").write_text("{")  # as a disk that failed leaves it
    cut = next((tmp_path / "store").rglob("case_00-*/labels.npy"))
    cut.write_bytes(cut.read_bytes()[:-9])
    assert prepare(data, tmp_path / "store").code == 0
    anew = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert {path.parent.name[:7] for path in anew} == {"case_00", "case_01"}
    assert prepare(data, tmp_path / "other").code == 0
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_what_cannot_be_prepared_is_refused_in_a_sentence(data: Path, store: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").mkdir()
    tables = phantoms.dataset(tmp_path / "tables", 3, labels={"liver": 1, "cyst": 2})
    for words, code, sentence in (
        ((data, "-o", tmp_path / "other"), 5, "is not empty and holds no prepared scans"),
        ((data, "-o", tmp_path / "file"), 4, "is a file; give a folder"),
        ((tables, "-o", store), 5, "was begun with other labels"),
        ((data, "-o", store, "--set", "model.spacing_mm=3"), 5, "begun with other settings"),
        ((data, "-o", store, "--set", "train.batch=4"), 5, "give it to medseg train"),
        ((data, "-o", tmp_path / "s", "--set", "model.grid=moon"), 5, "model.grid"),
        ((data, "-o", tmp_path / "s", "--set", "model.intensity=[{scheme: odd}]"), 5, "intensity"),
        ((data, "-o", tmp_path / "s", "--shard", "4/4"), 5, "numbered from 0 to 3"),
        ((data, "-o", tmp_path / "s", "--shard", "soon"), 5, "write i/n"),
        ((data, "-o", tmp_path / "s", "--workers", "0"), 2, "--workers"),
        ((tmp_path / "nothing", "-o", tmp_path / "s"), 3, "no dataset was found"),
        ((tmp_path / "missing", "-o", tmp_path / "s"), 3, "does not exist"),
        (("configs/unet.yaml", "-o", tmp_path / "s"), 5, "is a config; give the data set"),
    ):
        ran = tiny.medseg("prepare", *words)
        assert ran.code == code, (words, ran.err)
        assert sentence in " ".join(ran.err.split()), (sentence, ran.err)
    assert not (tmp_path / "s").exists()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_full_disk_stops_the_part_and_the_same_command_goes_on(
    data: Path, store: Path, tmp_path: Path
):
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        ran = prepare(data, tmp_path / "store")
    assert ran.code == 5 and "the disk is full" in ran.err
    assert prepare(data, tmp_path / "store").code == 0
    assert tree(tmp_path / "store") == tree(store)
