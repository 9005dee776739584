"""Model folders and training states: what was saved comes back, and nothing damaged or hostile gets
in.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from making import networks as tiny
from medseg.errors import BadModel
from medseg.models.folder import BUNDLED, bundled_models, load_checkpoint, save_checkpoint
from medseg.models.spec import FixedScale, PercentileScale, ZScore
from medseg.networks.unet import UNet
from medseg.networks.zoo import build_network
from medseg.training.state import load_state, save_state

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_unet(tmp_path / "model")


def replace_weights(folder: Path, content: bytes) -> None:
    """Put other bytes where the weights are, and their hash into the JSON, as an attacker would."""
    (folder / "model.safetensors").write_bytes(content)
    tiny.edit_json(folder, sha256=hashlib.sha256(content).hexdigest())


def test_a_saved_model_comes_back_with_weights_in_half_precision(tmp_path: Path):
    torch.manual_seed(3)
    network = build_network("unet", 1, 3, **tiny.UNET_OPTIONS)
    spec: dict[str, Any] = {
        "name": "round-trip",
        "description": "words",
        "architecture": "unet",
        "options": tiny.UNET_OPTIONS,
        "classes": tiny.CLASSES,
        "patch": (16, 24, 32),
        "spacing_mm": 1.5,
        "cleanup": ({"step": "drop_small", "min_mm3": 3},),
        "card": {"licence": "Apache-2.0"},
    }
    save_checkpoint(tmp_path / "m", spec, network.state_dict(), tiny.TABLE)
    loaded = load_checkpoint(str(tmp_path / "m"))
    for key, value in spec.items():
        assert getattr(loaded.spec, key) == value
    assert loaded.table == tiny.TABLE
    again = loaded.network()
    assert not again.training
    state = network.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].half().float()), key
    with torch.inference_mode():
        x = torch.randn(1, 1, 16, 16, 16)
        network.load_state_dict({key: value.half().float() for key, value in state.items()})
        assert torch.equal(again(x), network.eval()(x))


def test_the_weights_on_disk_are_half_precision_safetensors(folder: Path):
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert json.loads((folder / "model.json").read_text())["sha256"] == (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "labels.csv",
        "model.json",
        "model.safetensors",
    ]


def test_saving_the_same_model_twice_gives_the_same_bytes(tmp_path: Path):
    one, two = (tiny.save_unet(tmp_path / name) for name in "ab")
    for name in ("labels.csv", "model.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "labels.csv"])
def test_a_model_without_one_of_its_files_is_refused(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(BadModel, match=r"there is no model|incomplete"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["", "nothing", "../brain", "/", "brain/../brain", "labels.csv"])
def test_an_unknown_model_is_refused(name: str):
    with pytest.raises(BadModel, match="no model"):
        load_checkpoint(name)


def test_bundled_models_are_complete_and_known_by_name():
    for name in bundled_models():
        model = load_checkpoint(name)
        assert model.folder == BUNDLED / name
        model.network()


def test_changed_weights_are_noticed_by_their_hash(folder: Path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for _ in range(20):
        position, bit = int(random.integers(len(content))), 1 << int(random.integers(8))
        content[position] ^= bit
        path.write_bytes(content)
        with pytest.raises(BadModel, match="not those its"):
            load_checkpoint(str(folder)).network()
        content[position] ^= bit


@pytest.mark.parametrize("length", [0, 1, 8, 100, 3000, -1])
def test_truncated_weights_are_refused_even_with_a_fitting_hash(folder: Path, length: int):
    content = (folder / "model.safetensors").read_bytes()[:length]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadModel, match=r"not those its|is empty"):
        load_checkpoint(str(folder)).network()
    replace_weights(folder, content)
    with pytest.raises(BadModel, match=r"cannot be read|is empty"):
        load_checkpoint(str(folder)).network()


def header_of(tensors: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty header": header_of({}),
    "header longer than the file": header_of({}, length=10**12),
    "negative length": header_of({}, length=2**64 - 1),
    "header of no JSON": struct.pack("<Q", 5) + b"nope!",
    "overlapping tensors": header_of(
        {n: {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]} for n in ("a", "b")}, bytes(4)
    ),
    "a hole": header_of({"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}}, bytes(8)),
    "a shape larger than its data": header_of(
        {"a": {"dtype": "F16", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "an unknown type": header_of(
        {"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "metadata that is no text": header_of({"__metadata__": {"a": 3}}),
    "a pickle": pickle.dumps({"weight": [1.0, 2.0]}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors_are_refused(folder: Path, kind: str):
    replace_weights(folder, HOSTILE[kind])
    with pytest.raises(BadModel):
        load_checkpoint(str(folder)).network()


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, old form"])
def test_a_pickled_checkpoint_under_another_name_is_refused_and_not_run(
    tmp_path: Path, folder: Path, form: str
):
    canary = tmp_path / "canary"
    path = folder / "model.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save(
            {"weight": Payload(canary)}, path, _use_new_zipfile_serialization=form == "torch"
        )
    replace_weights(folder, path.read_bytes())
    with pytest.raises(BadModel):
        load_checkpoint(str(folder)).network()
    assert not canary.exists()


def resaved(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    replace_weights(folder, save(state))


def test_weights_of_swapped_shapes_missing_or_added_are_refused_by_name(folder: Path):
    original = (folder / "model.safetensors").read_bytes()
    key = next(
        key for key, value in load_file(folder / "model.safetensors").items() if value.ndim == 5
    )

    def transpose(state: dict) -> None:
        state[key] = state[key].transpose(0, 1).flatten(2).contiguous()

    changes = (
        transpose,
        lambda state: state.pop(key),
        lambda state: state.update({f"{key}2": torch.zeros(2)}),
    )
    for change in changes:
        replace_weights(folder, original)
        resaved(folder, change)
        with pytest.raises(BadModel, match=key):
            load_checkpoint(str(folder)).network()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float):
    def spoil(state: dict) -> None:
        next(iter(state.values())).view(-1)[0] = value

    resaved(folder, spoil)
    with pytest.raises(BadModel, match="not finite"):
        load_checkpoint(str(folder)).network()


@pytest.mark.parametrize("kind", ["int64", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_a_strange_type_are_refused(folder: Path, kind: str):
    resaved(
        folder,
        lambda state: state.update(
            {key: value.to(getattr(torch, kind)) for key, value in state.items()}
        ),
    )
    with pytest.raises(BadModel, match="16 or 32 bits"):
        load_checkpoint(str(folder)).network()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_weights_of_other_floating_types_are_read(folder: Path, kind: str):
    resaved(
        folder,
        lambda state: state.update(
            {key: value.to(getattr(torch, kind)) for key, value in state.items()}
        ),
    )
    network = load_checkpoint(str(folder)).network()
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


JSON_FAULTS: dict[str, dict[str, Any]] = {
    "unknown key": {"trust_me": True},
    "another format": {"format": "medseg-model-99"},
    "architecture": {"architecture": "vnet"},
    "architecture of code": {"architecture": "os.system"},
    "option": {"options": {"width": 3}},
    "option that is an argument": {"options": {"channels": 3}},
    "option that is our argument": {"options": {"name": "x"}},
    "options": {"options": [1]},
    "other features": {"options": tiny.UNET_OPTIONS | {"features": [4, 16]}},
    "no classes": {"classes": []},
    "only background": {"classes": [0]},
    "background not first": {"classes": [2, 0, 41]},
    "class without a name": {"classes": [0, 2, 7]},
    "class twice": {"classes": [0, 2, 2]},
    "more classes": {"classes": [0, 2, 41, 41]},
    "negative class": {"classes": [0, 2, -1]},
    "channels": {"channels": 3},
    "no channels": {"channels": 0},
    "patch of two": {"patch": [16, 16]},
    "patch of zero": {"patch": [16, 0, 16]},
    "negative patch": {"patch": [16, -16, 16]},
    "huge patch": {"patch": [10**9, 16, 16]},
    "uneven patch": {"patch": [17, 16, 16]},
    "smallest patch": {"patch": [4, 4, 4]},
    "no spacing": {"spacing_mm": 0},
    "infinite spacing": {"spacing_mm": float("inf")},
    "spacing of text": {"spacing_mm": "two"},
    "intensity": {"intensity": "eval"},
    "too many channels": {"channels": 65},
    "names of other channels": {"channel_names": ["T1", "T2"]},
    "spacing of two": {"spacing_mm": [1, 1]},
    "one bad spacing": {"spacing_mm": [1, 1, 0]},
    "grid": {"grid": "voxels"},
    "intensity of two channels": {"intensity": [{"scheme": "zscore"}, {"scheme": "zscore"}]},
    "no intensity": {"intensity": []},
    "scheme": {"intensity": [{"scheme": "histogram"}]},
    "intensity without a scheme": {"intensity": [{}]},
    "key of another scheme": {"intensity": [{"scheme": "zscore", "low": 0}]},
    "window without a mean": {"intensity": [{"scheme": "ct", "low": 0, "high": 1, "sd": 1}]},
    "window upside down": {
        "intensity": [{"scheme": "ct", "low": 1, "high": 0, "mean": 0, "sd": 1}]
    },
    "window of no spread": {
        "intensity": [{"scheme": "ct", "low": 0, "high": 1, "mean": 0, "sd": 0}]
    },
    "empty windows without dark air": {"intensity": [{"scheme": "zscore"}], "skip_empty": True},
    "cleanup step": {"cleanup": [{"step": "remove_everything"}]},
    "cleanup argument": {"cleanup": [{"step": "drop_small", "min_mm3": "a lot"}]},
    "cleanup": {"cleanup": "keep_largest"},
    "hash": {"sha256": "abc"},
    "hash of other weights": {"sha256": "0" * 64},
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_a_model_whose_json_is_wrong_is_refused(folder: Path, fault: str):
    tiny.edit_json(folder, **JSON_FAULTS[fault])
    with pytest.raises(BadModel) as caught:
        load_checkpoint(str(folder)).network()
    assert "\n" not in str(caught.value)


def test_channels_spacings_grids_and_intensities_are_kept(tmp_path: Path):
    window = {"scheme": "ct", "low": -100.0, "high": 300.0, "mean": 80.0, "sd": 90.0}
    fields = {
        "channels": 3,
        "channel_names": ("T1", "T2", "CT"),
        "spacing_mm": (0.5, 1.0, 6.0),
        "grid": "scan",
        "intensity": ({"scheme": "percentiles"}, {"scheme": "zscore", "nonzero": True}, window),
    }
    network = UNet(3, 3, **tiny.UNET_OPTIONS)
    with mock.patch.object(tiny, "build_network", return_value=network):
        spec = load_checkpoint(str(tiny.save_unet(tmp_path / "model", **fields))).spec
    assert (spec.channels, spec.channel_names, spec.grid) == (3, ("T1", "T2", "CT"), "scan")
    assert spec.spacing == spec.spacing_mm == (0.5, 1.0, 6.0)
    assert spec.intensities == (PercentileScale(), ZScore(nonzero=True), FixedScale(**window))
    assert not spec.dark_air


def test_the_json_of_earlier_models_says_one_channel_cubes_along_ras_and_percentiles(folder: Path):
    content = json.loads((folder / "model.json").read_text())
    for key in ("channels", "channel_names", "grid", "intensity"):
        del content[key]
    (folder / "model.json").write_text(json.dumps(content))
    spec = load_checkpoint(str(folder)).spec
    assert (spec.channels, spec.grid, spec.dark_air) == (1, "world", True)
    assert spec.spacing == (spec.spacing_mm,) * 3
    assert spec.intensities == (PercentileScale(),)


def test_the_folder_of_a_training_run_stands_for_its_model(tmp_path: Path):
    tiny.save_unet(tmp_path / "run" / "model")
    assert load_checkpoint(str(tmp_path / "run")).folder == tmp_path / "run" / "model"


@pytest.mark.parametrize(
    "key", ["name", "architecture", "classes", "patch", "spacing_mm", "sha256"]
)
def test_a_model_whose_json_lacks_a_key_is_refused(folder: Path, key: str):
    path = folder / "model.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(BadModel, match=key):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"{" * 5000,
        b"[" * 100_000,
        b" " * 2_000_000,
    ],
)
def test_a_model_whose_json_is_malformed_is_refused(folder: Path, content: bytes):
    (folder / "model.json").write_bytes(content)
    with pytest.raises(BadModel):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"words", b"LabelValue,Name\n2", b"\xff\xfe", b"\x00"])
def test_a_model_whose_label_table_is_malformed_is_refused(folder: Path, content: bytes):
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(BadModel):
        load_checkpoint(str(folder))


HUGE = [
    {"features": [10**9]},
    {"features": [10**9, 10**9]},
    {"features": [10**30]},
    {"features": [4096] * 10},
    {"features": [4] * 100_000},
    {"features": [4, 8], "encoder_blocks": [10**9, 1]},
    {"features": [4, 8], "decoder_blocks": [10**12]},
    {"features": [4, 8], "stem": 10**6},
]
MEASURE = """
import json, resource, sys, time
import torch
from medseg.models.folder import load_checkpoint
from medseg.errors import BadModel
torch.set_num_threads(1)
load_checkpoint(sys.argv[1]).network()
folder = sys.argv[2]
text = open(folder + "/model.json").read()
for options in json.load(open(sys.argv[3])):
    with open(folder + "/model.json", "w") as file:
        file.write(json.dumps(json.loads(text) | {"options": options}))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load_checkpoint(folder).network()
        outcome = "loaded"
    except BadModel:
        outcome = "refused"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(outcome, grown // 1024, time.process_time() - start)
"""


def test_a_model_of_huge_options_is_refused_at_once_and_without_memory(
    tmp_path: Path, folder: Path
):
    (tmp_path / "huge.json").write_text(json.dumps(HUGE))
    ran = tiny.run_child(
        "-c", MEASURE, tiny.save_unet(tmp_path / "sound"), folder, tmp_path / "huge.json"
    )
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    assert len(rows) == len(HUGE)
    for options, (outcome, megabytes, seconds) in zip(HUGE, rows):
        assert outcome == "refused", options
        assert int(megabytes) < 200, options
        assert float(seconds) < 1, options


def test_weights_larger_than_allowed_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medseg.models.folder.MAX_WEIGHTS", 100)
    with pytest.raises(BadModel, match="more than the 100 allowed"):
        load_checkpoint(str(folder))


def test_a_training_state_comes_back_bit_for_bit(tmp_path: Path):
    tensors = {
        "network.weight": torch.randn(3, 4, 5),
        "optimizer.0.step": torch.tensor(7.0),
        "average.weight": torch.randn(3, 4).t(),
        "whole": torch.arange(5),
    }
    facts = {"step": 12, "loss": 0.1 + 0.2, "words": "ä"}
    save_state(tmp_path / "state.safetensors", tensors, facts)
    again, read = load_state(tmp_path / "state.safetensors")
    assert read == facts
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype
        assert torch.equal(again[key], value)


def test_a_damaged_training_state_is_refused(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.randn(10)}, {"step": 1})
    content = path.read_bytes()
    damaged = [content[:n] for n in (0, 10, 32, 40, len(content) - 1)] + [
        content + b"\0",
        content[1:],
    ]
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(BadModel, match="damaged"):
            load_state(path)


def test_a_training_state_without_our_facts_is_refused(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    content = path.read_bytes()
    path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(BadModel, match="damaged"):
        load_state(path)


def test_a_missing_training_state_is_refused(tmp_path: Path):
    with pytest.raises(BadModel, match="cannot be read"):
        load_state(tmp_path / "nothing")
