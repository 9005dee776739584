"""`medseg train --prepared`: the same model as without, from a store that nobody writes into; and
what is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import medseg
from making import networks as tiny, phantoms
from making.configs import SMALL
from medseg.dataset.check import cases
from medseg.dataset.reading import read_dataset
from medseg.errors import BadConfig
from medseg.training.prepared import arrays
from medseg.training.prepared.reading import open_prepared
from medseg.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"train.steps": 6, "train.validate_every": 6, "train.checkpoint_every": 2}
OWN = {
    "model.spacing_mm": [1.0, 1.0, 1.0],
    "model.grid": "scan",
    "model.intensity": [{"scheme": "zscore", "nonzero": False}],
}


def train(data: Path, run: Path, *options: object, **changes: Any) -> tiny.Ran:
    content = SMALL | STEPS | changes
    words = [part for key, one in content.items() for part in ("--set", f"{key}={json.dumps(one)}")]
    return tiny.medseg("train", data, "-o", run, "--quiet", *words, *options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_state(run / "state.safetensors")[0]


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = weights(run), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = [folder / "model" / "model.safetensors" for folder in (run, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.dataset(tmp_path_factory.mktemp("prepared") / "data", 4)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "store"
    for part in ("0/2", "1/2", "0/2"):
        tiny.medseg("prepare", data, "-o", folder, "--shard", part, "--quiet")
    return folder


def test_a_store_gives_the_same_weights_as_training_without_one_and_stays_as_it_is(
    data: Path, store: Path, tmp_path: Path
):
    before = tree(store)
    with (
        mock.patch.object(cases, "measure_case", side_effect=AssertionError),
        mock.patch.object(arrays.Preparation, "arrays", side_effect=AssertionError),
    ):
        ran = train(data, tmp_path / "with", "--prepared", store)
    assert ran.code == 0, ran.err
    assert tree(store) == before
    ran = train(data, tmp_path / "without", **OWN)
    assert ran.code == 0, ran.err
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    names = {path.name for path in (tmp_path / "with").iterdir()}
    assert names == {path.name for path in (tmp_path / "without").iterdir()}
    assert "prepared" not in names
    for name in ("data.json", "splits.json", "scores.csv"):
        one, other = (tmp_path / run / name for run in ("with", "without"))
        assert one.read_bytes() == other.read_bytes()


def test_a_run_goes_on_with_the_store_and_without_it(data: Path, store: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert train(data, run, "--prepared", store).code == 0
    whole = weights(run)
    shutil.copytree(run, tmp_path / "again")
    for name in ("model", "validation"):
        shutil.rmtree(tmp_path / "again" / name)
    for name in ("state.safetensors", "state-before.safetensors"):
        (tmp_path / "again" / name).unlink()
    assert train(data, tmp_path / "again").code == 0
    assert all(torch.equal(one, whole[name]) for name, one in weights(tmp_path / "again").items())


def test_from_python_it_is_two_calls(data: Path, tmp_path: Path):
    first = medseg.prepare(data, tmp_path / "store", part=(1, 2))
    assert (first.total, first.done, first.waiting, first.unchecked) == (2, 0, 2, 2)
    assert medseg.prepare(data, tmp_path / "store", part=(0, 2)).exit_code == 0
    assert medseg.prepare(data, tmp_path / "store", part=(1, 2), workers=2).exit_code == 0
    outcome = medseg.train(
        data, tmp_path / "run", changes=SMALL | STEPS, prepared=tmp_path / "store"
    )
    assert (outcome.run / "model" / "model.safetensors").is_file()
    with pytest.raises(BadConfig, match="parts are numbered from 0"):
        medseg.prepare(data, tmp_path / "store", part=(2, 2))


def test_a_store_that_does_not_fit_is_refused_in_a_sentence(
    data: Path, store: Path, tmp_path: Path
):
    tiny.medseg("prepare", data, "-o", tmp_path / "half", "--shard", "0/2", "--quiet")
    half = tmp_path / "part"
    shutil.copytree(store, half)
    (next(half.rglob("case_01-*/record.json"))).unlink()
    cut = tmp_path / "cut"
    shutil.copytree(store, cut)
    image = next(cut.rglob("case_02-*/image.npy"))
    image.write_bytes(image.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    tables = phantoms.dataset(tmp_path / "tables", 4, labels={"liver": 1, "cyst": 2})
    more = phantoms.dataset(tmp_path / "more", 5)
    for place, source, changes, code, sentence in (
        (tmp_path / "half", data, {}, 5, "is not prepared yet, some cases were not even checked"),
        (half, data, {}, 3, "case case_01 is not prepared yet; run medseg prepare"),
        (cut, data, {}, 3, "case case_02 is damaged in it; run medseg prepare"),
        (tmp_path / "empty", data, {}, 5, "holds no prepared scans; medseg prepare"),
        (tmp_path / "missing", data, {}, 5, "holds no prepared scans"),
        (store, tables, {}, 5, "was prepared from other data: its labels are"),
        (store, more, {}, 3, "case case_00 (and 4 more of 5) has changed since"),
        (store, data, {"model.spacing_mm": 2}, 5, "is prepared with model.spacing_mm=[1.0, 1.0"),
        (store, data, {"model.grid": "world"}, 5, 'model.grid="scan", not "world"'),
    ):
        ran = train(source, tmp_path / "run", "--prepared", place, **changes)
        assert ran.code == code, (place, ran.err)
        assert sentence in " ".join(ran.err.split()), ran.err
        assert ran.err.count("\n") == 1, ran.err
    agreed = open_prepared(store).agreed({"model.spacing_mm": 1, "train.batch": 2})
    assert (agreed["model.spacing_mm"], agreed["train.batch"]) == ([1.0, 1.0, 1.0], 2)


def test_a_case_that_changed_since_is_named(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 4)
    store, run = tmp_path / "store", tmp_path / "run"
    assert tiny.medseg("prepare", data, "-o", store, "--quiet").code == 0
    os.utime(data / "labelsTr" / "case_03.nii.gz", (1, 1))
    ran = train(data, run, "--prepared", store)
    assert ran.code == 3 and not run.exists()
    assert "case case_03 has changed since it was prepared" in ran.err
    assert "run medseg prepare DATASET -o" in ran.err
    assert tiny.medseg("prepare", data, "-o", store, "--quiet").code == 0
    assert len(open_prepared(store).check(read_dataset(data)).facts) == 4


def test_a_model_to_go_on_from_must_see_scans_as_they_are_prepared(
    data: Path, store: Path, tmp_path: Path
):
    model = tiny.save_unet(tmp_path / "model")  # of 2 mm, along RAS, by percentiles
    refused = train(data, tmp_path / "run", "--prepared", store, "--finetune", model)
    assert refused.code == 5
    assert "is prepared with model.spacing_mm=[1.0, 1.0, 1.0], not [2.0" in refused.err
    options = ("--finetune", model, "--quiet")
    assert tiny.medseg("prepare", data, "-o", tmp_path / "store", *options).code == 0
    settings = open_prepared(tmp_path / "store").settings
    assert settings["model.spacing_mm"] == [2.0, 2.0, 2.0]
    assert (settings["model.grid"], settings["model.intensity"]) == ("world", "percentiles")
