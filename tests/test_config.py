"""Configs are data: what is unknown, of the wrong type or out of range is refused by name, and no
code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg.config import load_config
from medseg.errors import BadConfig

ROOT = Path(__file__).resolve().parents[1]
MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "data": "maps",
    "labels": "labels.csv",
    "model": {"name": "unet", "patch": [16, 16, 16], "spacing_mm": 2},
    "train": {"steps": 5},
}


def saved(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def with_change(dotted: str, value: Any) -> dict[str, Any]:
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = dotted.split(".")
    branch = content
    for key in parents:
        branch = branch.setdefault(key, {})
    branch[last] = value
    return content


def test_a_minimal_config_loads_with_paths_counted_from_its_folder(tmp_path: Path):
    config = load_config(saved(tmp_path, MINIMAL))
    assert config.data == tmp_path / "maps"
    assert config.labels == tmp_path / "labels.csv"
    assert config.train.steps == 5
    assert config.model.patch == (16, 16, 16)


WHOLE = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if "\ndata:" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_the_configs_that_come_with_medseg_load(path: Path):
    config = load_config(path)
    assert config.labels.is_file()
    assert config.train.steps > 0


def test_the_brain_config_predicts_the_structures_of_its_table():
    from medseg.labels import LabelTable

    config = load_config(ROOT / "configs" / "brain.yaml")
    table = LabelTable.read(config.labels)
    assert len(table) >= 31
    assert set(config.synth.merge.values()) <= {*table.values, 0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stesp", 3),
        ("train.step", 3),
        ("model.patchsize", 3),
        ("synth.blurr", 3),
        ("train.steps", "many"),
        ("train.steps", 0),
        ("train.steps", 2.5),
        ("train.learning_rate", -1),
        ("train.learning_rate", float("nan")),
        ("train.ema", 1.0),
        ("train.batch", 0),
        ("train.precision", "fp8"),
        ("train.checkpoint_every", 0),
        ("model.patch", [16, 16]),
        ("model.patch", [16, 16, 0]),
        ("model.patch", [16, 16, -8]),
        ("model.spacing_mm", 0),
        ("model.spacing_mm", 100),
        ("synth.flip", 1.5),
        ("synth.rotation_degrees", 400),
        ("synth.merge", {"a": 2}),
        ("synth.merge", [1]),
        ("synth.scaling", [0, 1]),
        ("synth.t1_share", [0, 2]),
        ("synth.deformation_mm", [[0, 1]]),
        ("name", "../outside"),
        ("name", "Two Words"),
        ("name", ""),
        ("hold_out", "one.nii.gz"),
        ("cleanup", "largest"),
        ("model", "unet"),
        ("train", None),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path: Path, key: str, value: Any):
    with pytest.raises(BadConfig, match=key.split(".")[-1]) as caught:
        load_config(saved(tmp_path, with_change(key, value)))
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize("key", ["name", "data", "model", "train"])
def test_a_missing_setting_is_refused_by_name(tmp_path: Path, key: str):
    with pytest.raises(BadConfig, match=rf"{key}: "):
        load_config(saved(tmp_path, {k: v for k, v in MINIMAL.items() if k != key}))


def test_label_maps_need_a_table_and_every_run_an_end(tmp_path: Path):
    """Without `synth` a config trains from scans, whose data set names the labels."""
    scans = {key: value for key, value in MINIMAL.items() if key != "labels"}
    assert load_config(saved(tmp_path, scans)).labels is None
    with pytest.raises(BadConfig, match="needs labels"):
        load_config(saved(tmp_path, scans | {"synth": {}}))
    with pytest.raises(BadConfig, match=r"train\.steps or train\.time_s"):
        load_config(saved(tmp_path, MINIMAL | {"train": {"batch": 1}}))


def test_dotted_overrides_replace_settings_and_make_groups_that_are_missing(tmp_path: Path):
    path = saved(tmp_path, MINIMAL)
    config = load_config(
        path, {"train.steps": 9, "synth.flip": 0, "model.options.stem": 2, "name": "other"}
    )
    assert (config.train.steps, config.synth.flip, config.model.options, config.name) == (
        9,
        0,
        {"stem": 2},
        "other",
    )
    assert load_config(path).train.steps == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", "x"),
        ("train.stesp", 1),
        ("nothing", 1),
        ("name.first", 1),
        ("train.steps.a", 1),
    ],
)
def test_a_wrong_override_is_refused_by_name(tmp_path: Path, key: str, value: Any):
    with pytest.raises(BadConfig, match=key.split(".")[0]):
        load_config(saved(tmp_path, MINIMAL), {key: value})


def test_an_overridden_data_folder_counts_from_where_the_user_is(tmp_path: Path):
    assert load_config(saved(tmp_path, MINIMAL), {"data": "elsewhere"}).data == Path("elsewhere")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch SENTINEL']",
        (
            "name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path"
            " ['SENTINEL']]"
        ),
        "data: !!python/name:os.system",
        "name: !!python/object/new:os.system ['touch SENTINEL']",
    ],
)
def test_code_in_a_config_is_refused_and_not_run(tmp_path: Path, text: str):
    sentinel = tmp_path / "was_run"
    with pytest.raises(BadConfig, match="not YAML"):
        load_config(saved(tmp_path, text.replace("SENTINEL", str(sentinel))))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "just words", "3", "{", "a: b: c", "name: [", "\x00", "? [1]: 2"]
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str):
    with pytest.raises(BadConfig, match=r"config\.yaml"):
        load_config(saved(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8name")
    with pytest.raises(BadConfig, match="not YAML"):
        load_config(path)


def test_a_missing_config_is_refused(tmp_path: Path):
    with pytest.raises(BadConfig, match="there is no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_a_config_cannot_be_changed_once_loaded(tmp_path: Path):
    config = load_config(saved(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3
