"""Models of nnU-Net in medseg's own form give the same labels; what is said and listed of
models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from making import nnunet as making
from medseg.cli.app import make_app
from medseg.errors import BadModel, BadOutput
from medseg.inference import Settings, segment
from medseg.models import is_model, list_models, load_models, write_models
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")


def scan() -> Volume:
    data = np.random.default_rng(1).normal(100, 30, (24, 20, 22)).astype(np.float32)
    return Volume(data, np.diag([1.2, 1.0, 0.9, 1.0]))


def labels(path: Path) -> np.ndarray:
    return np.asarray(segment(scan(), load_models([str(path)]), Settings(exact=True)).labels.data)


def models_to_convert(folder: Path) -> dict[str, Path]:
    plan = making.plans()
    plan["configurations"]["3d_lowres"] = plan["configurations"]["3d_fullres"] | {
        "spacing": [2.0, 2.0, 2.0]
    }
    plan["configurations"]["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    stages = {
        name: f"nnUNetTrainer__nnUNetPlans__{name}" for name in ("3d_lowres", "3d_cascade_fullres")
    }
    for name, place in stages.items():
        making.write_model(
            folder / "cascade" / place,
            plan=plan,
            saved={"init_args": {"configuration": name}},
            previous=2 if "cascade" in name else 0,
        )
    for n in (1, 2):
        making.write_model(
            folder / "set" / f"Dataset29{n}_T_part{n}_x" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        )
    return {
        "one": making.write_model(folder / "one"),
        "folds": making.write_model(folder / "folds", folds=("0", "2")),
        "residual": making.write_model(folder / "residual", plan=making.plans(making.RESIDUAL)),
        "cascade": folder / "cascade" / stages["3d_cascade_fullres"],
        "set": folder / "set",
    }


def test_a_converted_model_gives_the_same_labels_to_the_voxel(tmp_path):
    for name, path in models_to_convert(tmp_path / "in").items():
        target = tmp_path / "out" / name
        write_models(load_models([str(path)]), target)
        assert is_model(target)
        assert not [
            file
            for file in target.rglob("*")
            if file.suffix not in ("", ".json", ".safetensors", ".csv")
        ]
        np.testing.assert_array_equal(labels(target), labels(path), err_msg=name)


def test_nothing_is_written_over_and_nothing_half(tmp_path):
    model = making.write_model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(BadOutput, match="there already"):
        write_models(load_models([str(model)]), tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


def test_a_damaged_set_is_refused(tmp_path):
    path = models_to_convert(tmp_path / "in")["set"]
    write_models(load_models([str(path)]), tmp_path / "out")
    file = tmp_path / "out" / "set.json"
    good = json.loads(file.read_text())
    for change in (
        {"models": ["../in"]},
        {"labels": [{}]},
        {"labels": [{"1": 99}, {"1": 3}]},
        {"models": 3},
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(BadModel, match=r"set\.json"):
            load_models([str(tmp_path / "out")])


def test_the_command_line_converts_describes_and_lists(tmp_path):
    model = making.write_model(tmp_path / "models" / "mine", folds=("0", "1"))
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "plans.json").write_text("{")
    (tmp_path / "models" / "broken" / "dataset.json").write_text("{}")
    run = CliRunner()
    assert (
        run.invoke(make_app(), ["convert", str(model), str(tmp_path / "models" / "own")]).exit_code
        == 0
    )
    said = json.loads(run.invoke(make_app(), ["info", str(model), "--json"]).stdout)
    assert said["kind"] == "model"
    assert said["models"][0]["folds"] == ["0", "1"]
    assert said["models"][0]["labels"] == {"1": "liver", "2": "spleen"}
    rows = json.loads(run.invoke(make_app(), ["models", str(tmp_path / "models"), "--json"]).stdout)
    assert {row["path"] for row in rows} == {"mine", "own", "broken"}
    assert next(row for row in rows if row["path"] == "broken")["about"].startswith(
        "cannot be used"
    )
    with pytest.raises(BadModel, match="no model"):
        list_models(model / "fold_0")
