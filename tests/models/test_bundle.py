"""Bundles of MONAI as data: what is read of a config, and that nothing of it is run."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai")

from making import monai as making
from medseg.errors import BadModel
from medseg.inference import segment
from medseg.io import read as read_scan
from medseg.models import is_model, list_models, load_models
from medseg.models.bundle import is_bundle, read_bundle
from medseg.models.bundle_config import Config

EVIL = "$__import__('os').system('touch proof')"


def write_config(folder: Path, content: Any) -> Path:
    """A bundle with a config alone: what is refused must be so before weights are read."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "configs" / "inference.json").write_text(text)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(BadModel) as caught:
        load_models([str(folder)])
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    return text


def config(tree: dict[str, Any]) -> Config:
    return Config(path="c.json", tree=tree)


# ---------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("@a", 3),
        ("@b#1", "y"),
        ("@b::0", "x"),
        ("$@a", 3),
        ("$-@a + 1", -2),
        ("$[1.5, 2] if @flag else [3, 3]", [1.5, 2]),
        ("$'m.pt' if not @flag else 'n' + '.pt'", "n.pt"),
        ("$len(@b) + len('abc')", 5),
        ("$@b + ['z']", ["x", "y", "z"]),
        ("$torch.float32", "float32"),
        ("$np.int16", "int16"),
        ("$monai.utils.CommonKeys.PRED", "pred"),
        ("$None", None),
        ("$@bundle_root + '/models/model.pt'", "./models/model.pt"),
        ("plain @ text", "plain @ text"),
        ({"k": ["@a", "$not @flag"]}, {"k": [3, False]}),
    ],
)
def test_values_mean_what_they_mean_in_monai(raw, value):
    tree = {"a": 3, "b": ["x", "y"], "flag": True, "bundle_root": "/elsewhere"}
    assert config(tree).value(raw, "here") == value


@pytest.mark.parametrize(
    "raw",
    [
        EVIL,
        "$os.system('touch proof')",
        "$eval('1')",
        "$().__class__",
        "$'a'.upper()",
        "$@a.__class__",
        "$[x for x in [1]]",
        "$lambda: 1",
        "$1 if @a else os.name",
        "$@a * 3",
        "$2 ** 99",
        "$'%s' % 1",
        "$f'{1}'",
        "$b'x'",
        "$'@a'",
        "$(x := 1)",
        "$len(@b, 1)",
        "$len(3)",
        "$@a + 'x'",
        "$-'x'",
        "$" + "(" * 3000 + ")" * 3000,
        "$" + "-" * 300 + "1",
        "$1 +",
        "%other.json#a",
        "@nowhere",
        "@a#b",
        "@",
        "@##a",
        {"_target_": "os.system"},
    ],
)
def test_everything_else_is_refused(raw):
    with pytest.raises(BadModel, match=r"^c\.json: here"):
        config({"a": 3, "b": []}).value(raw, "here")


def test_circles_and_growth_are_refused():
    with pytest.raises(BadModel, match="@a -> @b -> @a"):
        config({"a": "@b", "b": "$@a"}).value("@a", "here")
    deep: dict[str, Any] = {f"n{n}": f"@n{n + 1}" for n in range(99)}
    with pytest.raises(BadModel, match="gives up"):
        config(deep | {"n99": 1}).value("@n0", "here")
    wide: dict[str, Any] = {f"n{n}": [f"@n{n + 1}"] * 9 for n in range(30)}
    with pytest.raises(BadModel, match="gives up"):
        config(wide | {"n30": 1}).value("@n0", "here")
    with pytest.raises(BadModel, match="too long"):
        config({"a": "$@b + @b", "b": "x" * 6000}).value("@a", "here")


# ---------------------------------------------------------------- nothing is run


def with_part(place: str, value: Any) -> dict[str, Any]:
    content = json.loads(json.dumps(making.config()))
    here: Any = content
    *way, last = place.split("#")
    for part in way:
        here = here[int(part) if part.isdecimal() else part]
    here[int(last) if last.isdecimal() else last] = value
    return content


STEP = "preprocessing#transforms#4"
HOSTILE: dict[str, Any] = {
    "os.system": with_part("network_def#_target_", "os.system"),
    "builtins.eval": with_part(f"{STEP}#_target_", "builtins.eval"),
    "subprocess.run": with_part("inferer", {"_target_": "subprocess.run", "args": ["touch"]}),
    "scripts.x.Y": with_part("network_def#_target_", "scripts.x.Y"),
    "ConfigWorkflow": with_part(STEP, {"_target_": "monai.bundle.ConfigWorkflow", "keys": "image"}),
    "a step after the network": with_part("postprocessing#transforms#0#_target_", "os.system"),
    "an expression as network": with_part("network_def", EVIL),
    "an expression as argument": with_part("network_def#channels", EVIL),
    "an expression in a step": with_part(f"{STEP}#keys", EVIL),
    "an expression that disables": with_part(f"{STEP}#_disabled_", EVIL),
    "an expression as window": with_part("inferer#roi_size", EVIL),
    "an attribute": with_part("network_def#channels", "$().__class__"),
    "a call": with_part("inferer#overlap", "$float('0.5')"),
    "a lambda": with_part(
        "postprocessing#transforms",
        [
            making.SIGMOID,
            making.THRESHOLD,
            {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: open('proof', 'w')"},
        ],
    ),
    "load_path runs": with_part("checkpointloader#load_path", EVIL),
    "load_path leads out": with_part("checkpointloader#load_path", "../../x.pt"),
    "load_path is elsewhere": with_part("checkpointloader#load_path", "/etc/passwd"),
    "a circle": making.config(a="@b", b="@a", network="@a") | {"network_def": "@a"},
    "depth 1000": "[" * 1000 + "]" * 1000,
    "depth 100,000": '{"network_def": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "no tree": "[]",
    "no network": {"inferer": {}},
    "another mode": with_part("network_def#_mode_", "callable"),
    "a macro": with_part("inferer#overlap", "%train.json#overlap"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_one_sentence_and_nothing_is_imported(tmp_path, monkeypatch, case):
    folder = write_config(tmp_path / "bundle", HOSTILE[case])
    monkeypatch.chdir(tmp_path)
    load_models([str(making.write_bundle(tmp_path / "warm"))])  # imports what any bundle needs
    before, opened = set(sys.modules), []
    real = builtins.open

    low = os.open

    def watched(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.extend([] if isinstance(file, int) else [str(file)])
        return real(file, *arguments, **options)

    def watched_low(file: Any, *arguments: Any, **options: Any) -> int:
        opened.append(str(file))
        return low(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(io, "open", watched)
    monkeypatch.setattr(os, "open", watched_low)
    monkeypatch.setattr(os, "system", lambda command: opened.append(f"system {command}"))
    text = refused(folder)
    assert str(folder) in text
    assert set(sys.modules) == before
    assert all("configs" in name for name in opened), opened
    assert not (tmp_path / "proof").exists()


def test_what_is_ignored_may_hold_anything_and_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = making.config(
        imports=[EVIL], initialize=[EVIL], run=[EVIL], evaluator=EVIL, dataset={"_target_": "os"}
    )
    folder = making.write_bundle(tmp_path / "bundle", content)
    assert load_models([str(folder)])[0].spec.outputs == 3
    assert not (tmp_path / "proof").exists()


def test_a_huge_config_is_refused_by_its_size(tmp_path):
    folder = write_config(tmp_path / "bundle", "{}")
    with (folder / "configs" / "inference.json").open("wb") as file:
        file.truncate(50_000_000)
    assert "larger than" in refused(folder)


RENAME = {
    "_target_": "MapLabelValued",
    "keys": "pred",
    "orig_labels": [1, 2],
    "target_labels": [4, 5],
}


def test_every_argument_is_known_by_name_or_refused(tmp_path):
    for place, value, word in (
        (f"{STEP}#divisor", 3, "divisor"),
        (f"{STEP}#surprise", 3, "surprise"),
        ("preprocessing#transforms#3#diagonal", True, "diagonal"),
        ("preprocessing#transforms#3#mode", "bicubic", "bicubic"),
        ("inferer#roi_weight_map", [1], "roi_weight_map"),
        ("inferer#overlap", 1, "overlap"),
        ("network_def#spatial_dims", 2, "2 dimensions"),
        ("network_def#in_channels", "many", "in_channels"),
        ("postprocessing#transforms#2#to_onehot", 3, "to_onehot"),
        ("postprocessing#transforms#1#transform", "@inferer", "transform"),
        ("postprocessing#transforms#2", RENAME | {"target_labels": [1, 2]}, "orig_labels"),
        *(
            ("postprocessing#transforms", [making.INVERT, making.ARGMAX, RENAME | change], word)
            for change, word in (
                ({"target_labels": [5]}, "orig_labels"),
                ({"orig_labels": [1, 1]}, "orig_labels"),
                ({"orig_labels": [0, 1]}, "target_labels"),
                ({"target_labels": [2, 2]}, "target_labels"),
                ({"target_labels": [0, 5]}, "target_labels"),
                ({"target_labels": [0.5, 5]}, "target_labels"),
                ({"target_labels": ["a", "b"]}, "target_labels"),
                ({"target_labels": [70000, 5]}, "target_labels"),
            )
        ),
        ("preprocessing#transforms#3#pixdim", [1.5, None, 2], "pixdim"),
        ("preprocessing#transforms#3#min_pixdim", ["2"], "min_pixdim"),
        ("preprocessing#transforms#1#dtype", "$np.int16", "dtype"),
        ("inferer#roi_size", [16, 16], "roi_size"),
        ("inferer#roi_size", [16, 16, 16, 16], "roi_size"),
        ("inferer#overlap", [0.5], "overlap"),
        ("inferer#overlap", "$" + "9" * 400, "overlap"),
        ("inferer#overlap", "@network_def#channels#" + "9" * 4400, "no such place"),
        ("postprocessing#transforms#2", making.THRESHOLD | {"threshold": "$" + "9" * 400}, "thr"),
        ("postprocessing#transforms#2#dim", 1, "dim"),
        ("network_def#_target_", "monai.transforms.UNet", "monai.transforms.UNet"),
        ("preprocessing", None, "has no preprocessing"),
        ("preprocessing#transforms#0", "@preprocessing", "too often"),
        ("evaluator", {"inferer": "@postprocessing"}, "inferer wants Compose"),
        ("postprocessing#transforms", [], "does not say how outputs become labels"),
        ("postprocessing#transforms", [making.ARGMAX], "bring labels back"),
    ):
        assert word in refused(write_config(tmp_path / "bundle", with_part(place, value))), place


def test_the_parts_are_those_that_the_evaluator_and_the_dataset_refer_to(tmp_path):
    plain = load_models([str(making.write_bundle(tmp_path / "plain"))])[0].spec
    content = making.config()
    for name in ("preprocessing", "inferer", "postprocessing"):
        content[f"our_{name}"] = content.pop(name)
    after = content["our_postprocessing"]["transforms"]
    after[1] = making.INVERT | {"transform": "@our_preprocessing"}
    content["inferer"] = {"_target_": "SimpleInferer"}  # of another use
    content["evaluator"] = {
        "_target_": "os.system",
        "inferer": "@our_inferer",
        "postprocessing": "@our_postprocessing",
    }
    content["dataset"] = {"_target_": "Dataset", "transform": "@our_preprocessing"}
    folder = making.write_bundle(tmp_path / "bundle", content)
    assert load_models([str(folder)])[0].spec == plain.model_copy(update={"name": "A made bundle"})
    content["dataset"] = {"transform": content.pop("our_preprocessing")}
    after[1] = making.INVERT | {"transform": "@dataset#transform"}
    folder = making.write_bundle(tmp_path / "bundle", content)
    assert load_models([str(folder)])[0].spec.recipe == plain.recipe


def test_a_network_that_cannot_be_built_is_one_sentence_naming_the_config(tmp_path):
    folder = making.write_bundle(tmp_path / "bundle")
    text = refused(write_config(folder, with_part("network_def#norm", "none")))
    assert "inference.json: network_def" in text
    assert "Available options" in text
    text = refused(write_config(folder, with_part("checkpointloader#load_path", "x" * 900)))
    assert "leads out" in text


def test_weights_lie_where_a_loader_that_is_not_disabled_says(tmp_path):
    content = making.config()
    loader = content.pop("checkpointloader")
    content["checkpointloader"] = loader | {"load_path": "elsewhere.pt", "_disabled_": True}
    content["handlers"] = [
        {"_target_": "StatsHandler"},
        loader | {"_disabled_": EVIL, "load_dict": {"average": "@network", "optimizer": "@x"}},
    ]
    folder = making.write_bundle(tmp_path / "bundle", content)
    file = folder / "models" / "model.pt"
    state = torch.load(file, weights_only=True)["model"]
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": other, "average": state}, file)
    model = load_models([str(folder)])[0]
    for key, value in model.weights.items():
        torch.testing.assert_close(value, state[key.removeprefix("network.")])


def test_what_0_outside_of_a_crop_would_mark_is_said(tmp_path):
    crop = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
    for after, noted in (
        ([making.INVERT, making.SIGMOID, making.THRESHOLD], True),
        ([making.SIGMOID, making.INVERT, making.THRESHOLD], False),
        ([making.INVERT, making.SIGMOID, making.THRESHOLD | {"threshold": 0.6}], False),
    ):
        for before, cropped in (([crop, *making.BEFORE], True), (making.BEFORE, False)):
            content = making.config(before=before, after=after)
            folder = making.write_bundle(tmp_path / "bundle", content)
            notes = load_models([str(folder)])[0].spec.card["notes"]
            assert bool(notes) == (noted and cropped)


def test_a_bundle_that_crops_twice_is_refused(tmp_path):
    crop = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
    content = making.config(before=[crop, *making.BEFORE, crop])
    assert "twice" in refused(making.write_bundle(tmp_path / "bundle", content))


def test_a_network_whose_outputs_are_no_map_of_its_window_is_refused(tmp_path):
    scan = making.write_scan(tmp_path / "scan.nii.gz", (14, 14, 12))
    coarse = {
        "_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3,
        "kernel_size": [3, 3, 3], "strides": [2, 2, 2], "upsample_kernel_size": [2, 2],
        "filters": [8, 8, 8],
    }  # fmt: skip
    for parts, word in (
        ({"network": coarse}, "outputs of 8 x 8 x 8 voxels of a window of 16 x 16 x 16"),
        ({"inferer": making.INFERER | {"roi_size": [15, 16, 16]}}, "outputs of 16 x 16 x 16"),
        ({"network": making.UNET | {"strides": [0]}}, "cannot take its patch"),
    ):
        folder = making.write_bundle(tmp_path / "bundle", making.config(**parts))
        with pytest.raises(BadModel, match=word):
            segment(read_scan(scan), load_models([str(folder)]))


def test_the_zoo_s_bundles_with_code_of_their_own_are_refused_by_name(tmp_path):
    for target in (
        "scripts.networks.unest.UNesT",
        "monai.networks.nets.vista3d132",
        "DiNTS",
        "FlexibleUNet",
    ):
        text = refused(write_config(tmp_path / "bundle", with_part("network_def#_target_", target)))
        assert target in text


# ---------------------------------------------------------------- weights and archives


class Proof:
    """Pickled, this would make a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch proof",)


def test_weights_are_plain_tensors_or_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = making.write_bundle(tmp_path / "bundle")
    file = folder / "models" / "model.pt"
    state = torch.load(file, weights_only=True)["model"]
    torch.save({"model": state, "more": Proof()}, file)
    assert "system" in refused(folder)
    file.write_bytes(pickle.dumps(Proof()))
    assert "nothing of it was run" in refused(folder)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(file))
    assert "TorchScript" in refused(folder)
    key = next(iter(state))
    for change, word in (
        ({key: state[key][:1]}, "is needed"),
        ({"surprise": torch.zeros(1)}, "has no place"),
        ({key: torch.full_like(state[key], torch.nan)}, "not finite"),
    ):
        torch.save(state | change, file)
        assert word in refused(folder)
    torch.save({name: value for name, value in state.items() if name != key}, file)
    assert "is missing" in refused(folder)
    file.unlink()
    assert "is missing" in refused(folder)
    assert not (tmp_path / "proof").exists()


def zipped(path: Path, folder: Path, *more: tuple[Any, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, Path("top") / file.relative_to(folder))
        for name, content in more:
            archive.writestr(name, content)
    return path


def test_a_zip_is_read_and_one_that_leads_out_is_not(tmp_path):
    folder = making.write_bundle(tmp_path / "bundle")
    good = zipped(tmp_path / "good.zip", folder)
    assert is_bundle(good) and is_model(good)
    first, second = (load_models([str(path)])[0] for path in (good, folder))
    assert first.spec == second.spec
    assert "outside" in refused(zipped(tmp_path / "out.zip", folder, ("../x", b"")))
    link = zipfile.ZipInfo("top/models/link.pt")
    link.external_attr = 0o120777 << 16
    assert "link" in refused(zipped(tmp_path / "link.zip", folder, (link, b"/etc/passwd")))


def test_what_a_bundle_says_of_itself_is_kept(tmp_path):
    names = {"0": "Background", "1": "Left Kideny", "2": "spleen"}
    folder = making.write_bundle(tmp_path / "models" / "bundle", names=names)
    model = load_models([str(folder)])[0]
    assert model.table.names == {1: "Left Kideny", 2: "spleen"}
    assert model.table[2].type is not None and model.table[2].type.value == "78961009"
    assert model.spec.card["version"] == "0.1.0"
    assert model.spec.card["license"].startswith("Apache License")
    assert model.spec.name == "A made bundle"
    rows = list_models(tmp_path / "models")
    assert [row["name"] for row in rows] == ["A made bundle"]
    making.write_bundle(folder, names={"0": "liver", "1": "a", "2": "b"})
    assert "0 means background" in refused(folder)


def test_swin_unetr_is_read_with_the_argument_that_monai_dropped(tmp_path):
    network = {
        "_target_": "monai.networks.nets.SwinUNETR",
        "spatial_dims": 3,
        "img_size": 96,
        "in_channels": 1,
        "out_channels": 14,
        "feature_size": 48,
        "use_checkpoint": True,
    }
    folder = write_config(tmp_path / "bundle", making.config(network=network))
    (folder / "models").mkdir()
    (folder / "models" / "model.pt").touch()
    read = read_bundle(folder)
    assert read.network.arguments == {"feature_size": 48, "use_checkpoint": True}


def test_a_config_in_yaml_is_the_same(tmp_path):
    import yaml

    folder = making.write_bundle(tmp_path / "bundle")
    plain = load_models([str(folder)])[0].spec
    file = folder / "configs" / "inference.json"
    (folder / "configs" / "inference.yaml").write_text(yaml.safe_dump(json.loads(file.read_text())))
    file.unlink()
    assert load_models([str(folder)])[0].spec == plain
