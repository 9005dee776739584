"""JSON and YAML from strangers: an answer in a sentence, whatever they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from making import networks as tiny
from making.datasets import decathlon
from medseg.config import load_config
from medseg.dataset import read_dataset
from medseg.errors import BadConfig, BadFile, BadModel
from medseg.networks import small
from medseg.networks.zoo import NETWORKS
from medseg.text import MAX_DEPTH, parse_json, parse_yaml, read_json, read_yaml

ROOT = Path(__file__).resolve().parents[1]


def one_sentence(text: str) -> bool:
    return "\n" not in text.strip() and len(text) < 600


# YAML ---------------------------------------------------------------------------------------------


def doubling(levels: int) -> str:
    """Settings of a few hundred bytes whose aliases stand for 9 ** levels words."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE_YAML = {
    "aliases in a list": doubling(9),
    "aliases as merge keys": (
        "a: &a {k: 1, l: 2}\nb: &b {<<: [*a, *a]}\n"
        + "".join(
            f"m{n}: &m{n} {{<<: [{', '.join(['*b' if not n else f'*m{n - 1}'] * 9)}]}}\n"
            for n in range(9)
        )
    ),
    "an alias within itself": "a: &a [1, *a]",
    "lists": "a: " + "[" * 100_000,
    "maps in flow": "a: " + "{a: " * 3000 + "1" + "}" * 3000,
    "maps in block": "\n".join(" " * n + "a:" for n in range(500)),
    "hexadecimal": "a: 0x" + "f" * 5000,
    "binary": "a: 0b" + "1" * 5000,
    "sexagesimal": "a: 1" + ":59" * 3000,
    "decimal": "a: " + "9" * 4000,
    "a date that is none": "a: 2024-02-31",
    "a list as key": "? [1, 2]\n: 3",
    "a date as key": "a: {2024-01-01: 1}",
    "a fraction as key": "a: {0.5: 1}",
    "a truth value as key": "a: {yes: 1}",
    "objects of Python": "a: !!python/object/apply:os.system ['true']",
    "not text": "a: \x00",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_settings_are_refused_in_one_sentence(kind: str, tmp_path: Path):
    (tmp_path / "settings.yaml").write_text(HOSTILE_YAML[kind])
    with pytest.raises(BadConfig) as caught:
        read_yaml(tmp_path / "settings.yaml", BadConfig)
    assert one_sentence(str(caught.value)) and "settings.yaml" in str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_without_the_loader_in_c_the_same_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch):
    import yaml

    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    with pytest.raises(ValueError):
        parse_yaml(HOSTILE_YAML[kind])


def test_settings_larger_than_allowed_are_refused_unread(tmp_path: Path):
    with (tmp_path / "settings.yaml").open("wb") as file:
        file.truncate(50 * 2**20)  # zeros that take no room on the disk
    with pytest.raises(BadConfig, match="is larger than"):
        read_yaml(tmp_path / "settings.yaml", BadConfig)


@pytest.mark.parametrize(
    "text", ["1_0", "-1_000", "1_0.5", "0x1_0", "0b1_0", "010", "-010", "1:30", "12:30:00.5"]
)
def test_numbers_that_yaml_reads_in_its_own_way_are_refused(text: str):
    for document in (f"a: {text}", f"a: [{text}]", f"{text}: a"):
        with pytest.raises(ValueError, match="write it in plain digits, or in quotes") as caught:
            parse_yaml(document)
        assert text in str(caught.value)
    assert parse_yaml(f"a: '{text}'") == {"a": text}


def test_other_numbers_and_words_are_read_as_before():
    text = "[10, -1, 0, 007, 00.5, 0.5, .5, 1.0e+3, 0x10, .inf, 089, a_1, '1:30', 1_a, v1_0, -_]"
    said = [10, -1, 0, 7, 0.5, 0.5, 0.5, 1000.0, 16, float("inf"), "089"]
    assert parse_yaml(text) == [*said, "a_1", "1:30", "1_a", "v1_0", "-_"]


def test_ordinary_aliases_and_merge_keys_are_read():
    text = (
        "usual: &u {patch: [1, 2], n: 1}\nmine: {<<: *u, n: 2}\nagain: *u\nby_value: {1: a, -2: b}"
    )
    assert parse_yaml(text) == {
        "usual": {"patch": [1, 2], "n": 1},
        "mine": {"patch": [1, 2], "n": 2},
        "again": {"patch": [1, 2], "n": 1},
        "by_value": {1: "a", -2: "b"},
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_settings_that_come_with_medseg_are_read_as_pyyaml_reads_them(path: Path):
    import yaml

    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", ["1", "2024-01-01", "null", "1.5"])
def test_a_setting_whose_name_is_no_text_is_refused_by_the_command(key: str, tmp_path: Path):
    decathlon(tmp_path / "data")
    (tmp_path / "c.yaml").write_text(f"{key}: 2")
    ran = tiny.medseg(
        "train", tmp_path / "data", "-o", tmp_path / "run", "--config", tmp_path / "c.yaml", "-q"
    )
    assert ran.code == 5 and "c.yaml" in ran.err and one_sentence(ran.err)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+999", "9" * 39])
@pytest.mark.parametrize("key", ["learning_rate", "gradient_clip", "weight_decay"])
def test_a_setting_that_is_no_finite_number_of_sensible_size_is_refused(
    key: str, value: str, tmp_path: Path
):
    base = (
        "name: a\ndata: d\nlabels: l.csv\nmodel: {name: unet, patch: [16, 16, 16], spacing_mm: 2}\n"
    )
    (tmp_path / "c.yaml").write_text(base + f"train: {{steps: 5, {key}: {value}}}")
    if value.isdigit():  # finite, so it is somebody's wish
        assert getattr(load_config(tmp_path / "c.yaml").train, key) == 1e39
        return
    with pytest.raises(BadConfig, match=key):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["alias-in-name", "deep", "big-integer", "number-as-key"])
def test_the_settings_that_were_found_to_hang_or_to_crash_are_refused(
    name: str, shared_data: Path, tmp_path: Path
):
    decathlon(tmp_path / "data")
    path = shared_data / "cases" / "around" / "yaml-bombs" / f"{name}.yaml"
    ran = tiny.run_child(
        "-m",
        "medseg",
        "train",
        tmp_path / "data",
        "-o",
        tmp_path / "run",
        "--config",
        path,
        "-q",
        timeout=600,
    )
    assert ran.code == 5 and f"{name}.yaml" in ran.err and one_sentence(ran.err)


# JSON ---------------------------------------------------------------------------------------------

HOSTILE_JSON = {
    "lists": "[" * 100_000,
    "lists that end": "[" * 3000 + "]" * 3000,
    "maps": '{"a":' * 100_000,
    "deeper than allowed": "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "a long number": "[" + "9" * 5000 + "]",
    "a number as long as 41 digits": "1" * 41,
    "two values": '{"a": 1, "a": 2}',
    "true and one": '{"a": 1, "a": true}',
    "nothing": " ",
    "broken": '{"a": ',
}


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_hostile_json_is_refused_in_one_sentence(kind: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(HOSTILE_JSON[kind])
    with pytest.raises(BadFile) as caught:
        read_json(tmp_path / "x.json")
    assert one_sentence(str(caught.value)) and "x.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", None], ids=["UTF-16", "empty", "missing"])
def test_a_file_that_is_no_text_names_itself(content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadModel, match=r"x\.json"):
        read_json(tmp_path / "x.json", BadModel)


def test_what_is_written_by_others_is_read():
    nested = 1
    for _ in range(MAX_DEPTH):
        nested = [nested]
    for value in (nested, {"a": [1, 2.5, None, True, "ä"]}, 2**128 - 1):
        assert parse_json(json.dumps(value)) == value
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "which", ["dataset.json", "splits_final.json", "list.jsonl", "datalist.json"]
)
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 3000, "9" * 5000], ids=["lists", "maps", "number"]
)
def test_descriptions_of_data_sets_are_refused_in_one_sentence(
    which: str, content: str, tmp_path: Path
):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    given = tmp_path
    if which == "splits_final.json":
        labels = {"background": 0, "a": 1}
        description = {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "file_ending": ".nii.gz",
            "numTraining": 0,
        }
        (tmp_path / "dataset.json").write_text(json.dumps(description))
    elif which != "dataset.json":
        given = tmp_path / which
    (tmp_path / which).write_text(content)
    ran = tiny.medseg("check", given)
    assert ran.code == 3 and one_sentence(ran.err)
    assert which in ran.err or which == "datalist.json"


@pytest.mark.parametrize("length", [256, 5000, 100_000])
def test_a_name_too_long_for_a_file_is_a_missing_file(length: int, tmp_path: Path):
    decathlon(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["training"][0]["image"] = f"./imagesTr/{'x' * length}.nii.gz"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    ran = tiny.medseg("check", tmp_path)
    assert ran.code == 3 and " missing " in ran.out and "Traceback" not in ran.err


# Two names for one value --------------------------------------------------------------------------


def described(folder: Path, labels: object, decathlons: bool = False) -> Path:
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    content: dict[str, object] = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "file_ending": ".nii.gz",
    }
    if decathlons:
        content = {
            "modality": {"0": "CT"},
            "labels": labels,
            "training": [{"image": "a", "label": "b"}],
        }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("labels", "decathlons"),
    [
        ({"background": 0, "a": 1, "b": 1}, False),
        ({"background": 0, "air": 0, "b": 1}, False),
        ({"background": 0, "a": 2, "ignore": 2}, False),
        ({"0": "background", "1": "a", "01": "b"}, True),
        ({"background": 0, "a": 1, "b": 1}, True),
        ({"background": 0, "a": 1, "b": 2, "c": 2}, True),
    ],
)
def test_two_names_for_one_label_value_are_both_named(
    labels: dict, decathlons: bool, tmp_path: Path
):
    with pytest.raises(BadFile, match=r"two names, '.+' and '.+'") as caught:
        read_dataset(described(tmp_path, labels, decathlons))
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize("value", [True, "1_0", "１", 1.5, 1e400, None, [1, True], "1.0"])
def test_a_label_value_that_is_no_plain_whole_number_is_refused(value: object, tmp_path: Path):
    with pytest.raises(BadFile, match="not a whole number"):
        read_dataset(described(tmp_path, {"background": 0, "a": value}))


# Models -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_unet(tmp_path / "model")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def nothing(path: Path) -> None:
    path.touch()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def to_a_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may only be short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("make", [fifo, device, directory, hole, nothing, loop, to_a_socket])
@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "labels.csv"])
def test_a_model_whose_files_are_no_files_is_refused_at_once(
    make, name: str, folder: Path, tmp_path: Path
):
    (folder / name).unlink()
    make(folder / name)
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.run_child(
        "-m", "medseg", "infer", scan, "-m", folder, "-o", tmp_path / "out.nii.gz", timeout=600
    )
    assert ran.code == 6 and one_sentence(ran.err)
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": [1, 1, 1]},
        {"patch": [15, 17, 16]},
        {"patch": [2, 16, 16]},
        {"patch": [1024, 1024, 1023]},
        {"architecture": "fcn", "options": {}},
        {"architecture": "segformer", "options": {}},
        {"options": {"features": [4, 8, 8]}},
        {"channels": 2},
        {"classes": [0, 2]},
    ],
    ids=str,
)
def test_a_model_whose_patch_or_options_do_not_fit_is_refused_in_one_sentence(
    changes: dict, folder: Path, tmp_path: Path
):
    tiny.edit_json(folder, **changes)
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg("infer", scan, "-m", folder, "-o", tmp_path / "out.nii.gz", "-q")
    assert ran.code in (5, 6) and one_sentence(ran.err), ran.err
    if "patch" in changes:
        assert ran.code == 6 and "patch" in ran.err


ODD_OPTIONS = [
    10**9,
    10**6,
    5000,
    -1,
    0,
    10**30,
    "x",
    None,
    0.5,
    float("nan"),
    True,
    [1] * 100_000,
    {"a": 1},
]


def odd(options: dict) -> list[dict]:
    """The options with one of them, or one number of one of them, exchanged for something odd."""
    places = [(key,) for key in options]
    places += [(key, 0) for key, value in options.items() if isinstance(value, list) and value]
    made = []
    for place in places:
        for value in ODD_OPTIONS:
            changed = json.loads(json.dumps(options))
            branch = changed
            for key in place[:-1]:
                branch = branch[key]
            branch[place[-1]] = value
            made.append(changed)
    return made


MEASURED = """
import json, resource, sys
import torch
from medseg.networks import build_network
from medseg.errors import BadModel
name, variants = sys.argv[1], json.load(open(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
with torch.device("meta"):
    build_network(name, 1, 3, **variants.pop(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for options in variants:
    try:
        with torch.device("meta"):
            build_network(name, 1, 3, **options)
    except BadModel:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_options_of_any_network_end_soon_in_a_network_or_an_error_of_ours(
    name: str, tmp_path: Path
):
    options = small(name, (32, 32, 32))
    (tmp_path / "options.json").write_text(json.dumps([options, *odd(options)]))
    ran = tiny.run_child("-c", MEASURED, name, tmp_path / "options.json", timeout=600)
    assert ran.code == 0, ran.err
    assert int(ran.out) < 300, "megabytes"
