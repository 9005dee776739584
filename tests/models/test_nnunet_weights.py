"""Checkpoints of nnU-Net: loaded without running anything, fitted to the planned network, or
refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from making import nnunet as making
from medseg.errors import BadModel
from medseg.models import load_models
from medseg.models.nnunet import build, read_foreign
from medseg.models.nnunet_weights import load_saved


def saved_as(folder: Path, **changes: Any) -> Path:
    path = folder / "checkpoint_final.pth"
    torch.save(making.checkpoint(making.weights(making.PLAIN, 1, 3), **changes), path)
    return path


def rewritten(path: Path, change: Any) -> Path:
    """A checkpoint whose pickle is another one."""
    other = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(
                entry.filename, change(content) if entry.filename.endswith("data.pkl") else content
            )
    return other


def test_numbers_of_numpy_are_loaded_without_numpy(tmp_path):
    found = load_saved(saved_as(tmp_path, inference_allowed_mirroring_axes=(0, 2)))
    assert found.trainer == "nnUNetTrainer"
    assert found.configuration == "3d_fullres"
    assert found.mirror == (0, 2)
    want = making.weights(making.PLAIN, 1, 3)["decoder.seg_layers.0.weight"]
    torch.testing.assert_close(found.weights["decoder.seg_layers.0.weight"], want, rtol=0, atol=0)


def test_checkpoints_written_with_numpy_1_and_2_are_both_loaded(tmp_path):
    path = saved_as(tmp_path)
    content = zipfile.ZipFile(path).read("checkpoint_final/data.pkl")
    one, two = (b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.multiarray\nscalar\n")
    assert one in content or two in content
    for name in (one, two):
        other = rewritten(path, lambda text, name=name: text.replace(one, name).replace(two, name))
        assert load_saved(other).configuration == "3d_fullres"


class _Runs:
    """Unpickling it makes a folder."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.mkdir, "RAN", "mkdir"),
        (open, "RAN", "open"),
        (eval, "__import__('os').mkdir('RAN')", "eval"),
        (np.zeros, 3, "numpy"),
        (Path, "RAN", "Path"),
    ],
)
def test_a_checkpoint_that_names_anything_else_is_refused_by_name_and_nothing_runs(
    tmp_path, monkeypatch, function, argument, name
):
    arguments = (argument, "w") if function is open else (argument,)
    path = saved_as(tmp_path, logging={"a": _Runs(function, *arguments)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModel) as caught:
        load_saved(path)
    assert name in str(caught.value)
    assert not (tmp_path / "RAN").exists()


def test_arrays_of_numpy_are_refused(tmp_path):
    with pytest.raises(BadModel, match="numpy"):
        load_saved(saved_as(tmp_path, logging=np.zeros(9)))


def test_a_number_of_an_impossible_kind_is_refused(tmp_path):
    path = rewritten(saved_as(tmp_path), lambda text: text.replace(b"f8", b"O8"))
    with pytest.raises(BadModel, match="damaged"):
        load_saved(path)


def test_a_plain_pickle_is_refused_unopened(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(pickle.dumps(_Runs(os.mkdir, str(tmp_path / "RAN"))))
    with pytest.raises(BadModel, match=r"checkpoint_final\.pth"):
        load_saved(path)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, part):
    path = saved_as(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(BadModel, match="damaged"):
        load_saved(path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"network_weights": {}}, {"network_weights": {"a": 1}}]
)
def test_a_file_of_torch_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint_final.pth")
    with pytest.raises(BadModel, match=r"checkpoint_final\.pth"):
        load_saved(tmp_path / "checkpoint_final.pth")


def with_weights(folder: Path, change: Any, **changes: Any) -> Path:
    state = making.weights(making.PLAIN, 1, 3)
    return making.write_model(folder, saved={"network_weights": change(state), **changes})


def only(state: dict[str, Any], *, without: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if without not in key}


def test_wrappers_names_are_stripped(tmp_path):
    plain = build(read_foreign(making.write_model(tmp_path / "a"))).state_dict()
    for n, prefix in enumerate(("module.", "_orig_mod.", "module._orig_mod.")):
        folder = with_weights(
            tmp_path / str(n), lambda s, p=prefix: {p + k: v for k, v in s.items()}
        )
        for key, value in build(read_foreign(folder)).state_dict().items():
            torch.testing.assert_close(value, plain[key], rtol=0, atol=0)


def test_half_precision_is_widened(tmp_path):
    folder = with_weights(tmp_path / "a", lambda s: {key: value.half() for key, value in s.items()})
    assert {value.dtype for value in build(read_foreign(folder)).state_dict().values()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: only(s, without="transpconvs"), "up.0"),
        (
            lambda s: s | {"decoder.transpconvs.0.weight": torch.zeros(6, 4, 1, 2, 2)},
            "transpconvs.0.weight",
        ),
        (lambda s: s | {"decoder.attention.weight": torch.zeros(3)}, "decoder.attention.weight"),
        (
            lambda s: s | {"decoder.seg_layers.0.bias": torch.zeros(3, dtype=torch.int64)},
            "seg_layers.0.bias",
        ),
        (
            lambda s: s | {"decoder.seg_layers.0.bias": torch.tensor([0.0, float("nan"), 0.0])},
            "not finite",
        ),
        (
            lambda s: s | {"decoder.seg_layers.0.bias": torch.tensor([0.0, float("inf"), 0.0])},
            "not finite",
        ),
        (lambda s: OrderedDict(), "network_weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_naming_a_tensor(tmp_path, change, word):
    folder = with_weights(tmp_path / "a", change)
    with pytest.raises(BadModel) as caught:
        load_models([str(folder)])
    assert word in str(caught.value)


def test_a_trainer_of_another_network_is_refused_though_its_weights_fit(tmp_path):
    for name in ("nnUNet_Primus_M_Trainer", "nnUNetTrainerUMambaEnc", "nnUNetTrainerMedNeXt_B"):
        folder = making.write_model(tmp_path / name, saved={"trainer_name": name})
        with pytest.raises(BadModel, match=name):
            read_foreign(folder)


def test_an_unknown_trainer_whose_weights_fit_is_taken_with_a_note(tmp_path):
    found = read_foreign(
        making.write_model(tmp_path / "a", saved={"trainer_name": "nnUNetTrainer_OurLoss_7epochs"})
    )
    assert "nnUNetTrainer_OurLoss_7epochs" in found.notes[0]
    for n, name in enumerate(
        ("nnUNetTrainerNoMirroring", "nnUNetTrainer_onlyMirror01", "nnUNetTrainer_250epochs")
    ):
        assert not read_foreign(
            making.write_model(tmp_path / f"k{n}", saved={"trainer_name": name})
        ).notes


def test_a_trainer_whose_name_only_sounds_like_another_network_is_taken_with_a_note(tmp_path):
    for n, name in enumerate(("nnUNetTrainer_FastUNetLoss", "nnUNetRunnerOfOurs")):
        model = making.write_model(tmp_path / f"{n}", saved={"trainer_name": name})
        assert name in read_foreign(model).notes[0]
    model = making.write_model(tmp_path / "other", saved={"trainer_name": "STUNetTrainer_small"})
    with pytest.raises(BadModel, match="STUNetTrainer_small"):
        read_foreign(model)


def test_batch_norms_are_taken_where_a_trainer_put_them(tmp_path):
    def with_batch_norm(state: dict[str, Any]) -> dict[str, Any]:
        more = {}
        for key, value in state.items():
            if key.endswith(".norm.weight") and not key.startswith("decoder.encoder"):
                more[key.replace("weight", "running_mean")] = 0.1 * torch.ones_like(value)
                more[key.replace("weight", "running_var")] = 2 * torch.ones_like(value)
                more[key.replace("weight", "num_batches_tracked")] = torch.tensor(5)
        return state | more

    folder = with_weights(tmp_path / "a", with_batch_norm, trainer_name="nnUNetTrainerBN")
    network = build(read_foreign(folder))
    norms = [module for module in network.modules() if type(module).__name__ == "BatchNorm"]
    assert len(norms) == 6
    assert float(norms[0].running_var[0]) == 2
    assert network(torch.randn(1, 1, 16, 12, 20)).shape == (1, 3, 16, 12, 20)


def test_plans_without_biases_are_those_with_biases_of_0(tmp_path):
    def plain(key: str) -> bool:  # of the outputs alone biases stay
        return "seg_layers" in key or "norm" in key or ".all_modules.1." in key

    for n, arguments in enumerate((making.PLAIN, making.RESIDUAL)):
        plan = making.plans(arguments | {"conv_bias": False})
        state = making.weights(arguments, 1, 3)
        zero = {k: v * (plain(k) or not k.endswith(".bias")) for k, v in state.items()}
        without = {k: v for k, v in state.items() if plain(k) or not k.endswith(".bias")}
        saved = {"network_weights": without}
        one = build(read_foreign(making.write_model(tmp_path / f"{n}", plan=plan, saved=saved)))
        plan, saved = making.plans(arguments), {"network_weights": zero}
        other = build(read_foreign(making.write_model(tmp_path / f"{n}b", plan=plan, saved=saved)))
        x = torch.randn(1, 1, 16, 12, 20)
        torch.testing.assert_close(one(x), other(x))
        assert not any(key.startswith("up.") and "bias" in key for key in one.state_dict())


def test_what_does_not_go_together_is_one_sentence_naming_the_file(tmp_path):
    flat = {"plan": making.plans(making.FLAT)}
    saved = {"inference_allowed_mirroring_axes": (0, 2), "init_args": {"configuration": "2d"}}
    for n, (options, words) in enumerate(
        (
            (flat | {"saved": saved}, ("checkpoint_final.pth", "2d has 2 axes")),
            (
                {"plan": making.plans(patch_size=[16, 12, 21])},
                ("plans.json", "3d_fullres", "multiples of 2"),
            ),
        )
    ):
        with pytest.raises(BadModel) as caught:
            load_models([str(making.write_model(tmp_path / f"{n}", **options))])
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)
