"""plans.json and dataset.json of nnU-Net: what is read, and what is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from making import nnunet as making
from medseg.errors import BadModel
from medseg.models.nnunet_plans import (
    Configuration,
    Outputs,
    configuration,
    read_outputs,
    read_plans,
)


def planned(
    folder: Path, plan: dict[str, Any], name: str = "3d_fullres", channels: int = 1
) -> Configuration:
    (folder / "plans.json").write_text(json.dumps(plan))
    return configuration(read_plans(folder / "plans.json"), name, channels)


def outputs(folder: Path, content: Any) -> Outputs:
    (folder / "dataset.json").write_text(json.dumps(content))
    return read_outputs(folder / "dataset.json")


def test_old_and_new_plans_of_one_network_are_read_alike(tmp_path):
    new = making.plans()
    old = json.loads(json.dumps(new))
    raw = old["configurations"]["3d_fullres"]
    del raw["architecture"]
    raw |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 6,
        "n_conv_per_stage_encoder": [2, 2], "n_conv_per_stage_decoder": [2],
        "conv_kernel_sizes": [[3, 3, 3]] * 2, "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
    }  # fmt: skip
    assert planned(tmp_path, old) == planned(tmp_path, new)


def test_one_number_stands_for_every_stage_and_axis(tmp_path):
    short = making.PLAIN | {
        "kernel_sizes": 3,
        "strides": [1, 2],
        "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2,
    }
    assert planned(tmp_path, making.plans() | _with(short)) == planned(tmp_path, making.plans())


def _with(arguments: dict[str, Any]) -> dict[str, Any]:
    plan = making.plans()
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = arguments
    return {"configurations": plan["configurations"]}


def test_flat_networks_get_a_first_axis_of_ones(tmp_path):
    found = planned(tmp_path, making.plans(making.FLAT), "2d")
    assert found.patch == (1, 16, 12)
    assert found.spacing_mm == (None, 1.0, 1.0)
    assert found.network.kernels == ((1, 3, 3), (1, 3, 3))
    assert found.network.strides == ((1, 1, 1), (1, 2, 2))


def test_a_configuration_inherits_and_its_own_keys_win(tmp_path):
    plan = making.plans()
    plan["configurations"]["middle"] = {"inherits_from": "3d_fullres", "spacing": [2.0, 2.0, 2.0]}
    plan["configurations"]["last"] = {"inherits_from": "middle", "previous_stage": "3d_lowres"}
    found = planned(tmp_path, plan, "last")
    assert found.spacing_mm == (2.0, 2.0, 2.0)
    assert found.previous_stage == "3d_lowres"
    assert found.patch == (16, 12, 20)


def test_what_a_plan_leaves_out_is_nnunets_default(tmp_path):
    plan = making.plans()
    raw = plan["configurations"]["3d_fullres"]
    for key in [
        key for key in raw if key.startswith("resampling_fn") or key == "preprocessor_name"
    ]:
        del raw[key]
    found = planned(tmp_path, plan)
    assert [found.image.order, found.labels.order, found.logits.order] == [3, 1, 1]
    assert {found.image.order_across, found.logits.order_across} == {0}
    assert found.image.separate is None


def test_what_a_set_of_options_leaves_out_is_the_functions_own(tmp_path):
    functions = {
        "resampling_fn_data_kwargs": {},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_torch_fornnunet",
        "resampling_fn_probabilities_kwargs": {
            "mode": "linear",
            "memefficient_seg_resampling": True,  # of labels, which are none here
            "separate_z_anisotropy_threshold": 3,
        },
    }
    read = planned(tmp_path, making.plans(**functions))
    assert (read.image.order, read.image.order_across, read.image.separate) == (3, 0, False)
    assert (read.labels.order, read.labels.separate) == (1, False)
    assert (read.logits.scheme, read.logits.separate) == ("linear", None)
    with pytest.raises(BadModel, match="resamples data"):
        planned(tmp_path, making.plans(resampling_fn_data_kwargs={"order_z": 9}))


def test_older_names_of_the_intensities_are_known(tmp_path):
    plan = making.plans(normalization_schemes=["CTNormalization"])
    plan["foreground_intensity_properties_by_modality"] = plan.pop(
        "foreground_intensity_properties_per_channel"
    )
    channel = planned(tmp_path, plan).channels[0]
    assert (channel.low, channel.high, channel.mean, channel.sd) == (-50.0, 250.0, 80.0, 40.0)


def _configuration(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["configurations"]["3d_fullres"].update(changes)


def _arguments(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        changes
    )


def _network(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["configurations"]["3d_fullres"]["architecture"].update(
        network_class_name=name
    )


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "mamba": (_network("nets.UMambaBot"), "UMambaBot"),
    "primus": (_network("dynamic_network_architectures.architectures.primus.Primus"), "Primus"),
    "mednext": (_network("mednext.MedNeXt"), "MedNeXt"),
    "bottleneck": (_arguments(block="dna.building_blocks.residual.BottleneckD"), "BottleneckD"),
    "squeeze": (_arguments(squeeze_excitation=True), "squeeze_excitation"),
    "unheard of": (_arguments(attention_heads=4), "attention_heads"),
    "activation first": (_arguments(nonlin_first=True), "nonlin_first"),
    "gelu": (_arguments(nonlin="torch.nn.GELU"), "GELU"),
    "flat convolutions": (_arguments(conv_op="torch.nn.modules.conv.Conv2d"), "Conv2d"),
    "a stride too few": (_arguments(strides=[[1, 1, 1]]), "strides"),
    "strided first": (_arguments(strides=[[2, 2, 2], [2, 2, 2]]), "first stage"),
    "even kernels": (_arguments(kernel_sizes=[[2, 2, 2], [3, 3, 3]]), "kernels"),
    "a million features": (_arguments(features_per_stage=[10**6, 6]), "features_per_stage"),
    "preprocessor": (_configuration(preprocessor_name="ResampleLater"), "ResampleLater"),
    "normalisation": (_configuration(normalization_schemes=["Histogram"]), "Histogram"),
    "two normalisations": (
        _configuration(normalization_schemes=["NoNormalization"] * 2),
        "2 channels",
    ),
    "resampling": (_configuration(resampling_fn_probabilities="lanczos"), "lanczos"),
    "order": (_configuration(resampling_fn_data_kwargs={"order": 9}), "resamples data"),
    "resampling by a list": (_configuration(resampling_fn_seg=["a"]), "resamples by"),
    "another threshold": (
        _configuration(resampling_fn_data_kwargs={"separate_z_anisotropy_threshold": 5}),
        "separate_z_anisotropy_threshold",
    ),
    "another axis": (
        _configuration(
            resampling_fn_probabilities="resample_torch_fornnunet",
            resampling_fn_probabilities_kwargs={"aniso_axis_mode": "linear"},
        ),
        "aniso_axis_mode",
    ),
    "scans as labels": (_configuration(resampling_fn_data_kwargs={"is_seg": True}), "is_seg"),
    "an option of no function": (
        _configuration(resampling_fn_data_kwargs={"sharpen": 2}),
        "sharpen",
    ),
    "a cascade's labels": (
        _configuration(
            previous_stage="3d_lowres",
            resampling_fn_seg="resample_torch_fornnunet",
            resampling_fn_seg_kwargs={"memefficient_seg_resampling": True},
        ),
        "memefficient_seg_resampling",
    ),
    "normalisation by a list": (_configuration(normalization_schemes=[["a"]]), "normalises by"),
    "a mask in words": (_configuration(use_mask_for_norm=["no"]), "use_mask_for_norm"),
    "activation in words": (_arguments(nonlin_kwargs="inplace"), "nonlin_kwargs"),
    "bias in words": (_arguments(conv_bias="no"), "conv_bias"),
    "a spacing beyond all numbers": (_configuration(spacing=[1.0, 1.0, 10**400]), "spacing"),
    "patch": (_configuration(patch_size=[16, 12, 0]), "patch_size"),
    "text patch": (_configuration(patch_size="16"), "patch_size"),
    "spacing": (_configuration(spacing=[1.0, 1.0, float("nan")]), "spacing"),
    "circle": (_configuration(inherits_from="3d_fullres"), "inherits from itself"),
    "unknown parent": (_configuration(inherits_from="3d_midres"), "3d_midres"),
    "photographs": (
        lambda plan: plan.update(image_reader_writer="NaturalImage2DIO"),
        "NaturalImage2DIO",
    ),
    "tiff": (lambda plan: plan.update(image_reader_writer="Tiff3DIO"), "Tiff3DIO"),
    "label manager": (lambda plan: plan.update(label_manager="MyLabels"), "MyLabels"),
    "axes": (lambda plan: plan.update(transpose_forward=[0, 0, 1]), "transpose_forward"),
    "way back": (lambda plan: plan.update(transpose_forward=[2, 0, 1]), "transpose_backward"),
    "no configurations": (lambda plan: plan.pop("configurations"), "no configurations"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_medseg_does_not_know_is_refused_by_name(tmp_path, case):
    change, word = REFUSED[case]
    plan = making.plans()
    change(plan)
    with pytest.raises(BadModel) as caught:
        planned(tmp_path, plan)
    assert word in str(caught.value)
    assert "plans.json" in str(caught.value)


def test_a_longer_circle_ends_at_once(tmp_path):
    plan = making.plans()
    plan["configurations"] |= {
        "a": {"inherits_from": "b"},
        "b": {"inherits_from": "c"},
        "c": {"inherits_from": "a"},
    }
    with pytest.raises(BadModel, match="inherits from itself"):
        planned(tmp_path, plan, "a")


LFS = "version https://git-lfs.github.com/spec/v1\nsize 9\n"


@pytest.mark.parametrize("content", ["", "[1]", "{", LFS, "[" * 9**6])
def test_files_that_are_no_plans_are_refused(tmp_path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(BadModel, match=r"plans\.json"):
        read_plans(tmp_path / "plans.json")


def test_labels_in_their_usual_form(tmp_path):
    found = outputs(
        tmp_path, making.dataset({"background": 0, "spleen": 2, "liver": 1, "ignore": 3})
    )
    assert found.values == (0, 1, 2)
    assert found.names == {1: "liver", 2: "spleen"}
    assert found.foreground == (1, 2)


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "liver", "2": "spleen"},
        {"background": "0", "liver": "1", "spleen": "2"},
        {"background": 0, "liver": [1], "spleen": [2]},
    ],
)
def test_labels_exchanged_or_as_text_or_in_lists_mean_the_same(tmp_path, labels):
    assert outputs(tmp_path, making.dataset(labels)).names == {1: "liver", 2: "spleen"}


def test_regions_are_laid_over_each_other_in_their_order(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3, "ignore": 4}
    found = outputs(tmp_path, making.dataset(labels, regions_class_order=[2, 1, 3]))
    assert found.regions
    assert found.values == (0, 2, 1, 3)
    assert found.names == {2: "whole", 1: "core", 3: "active"}
    assert found.foreground == (1, 2, 3)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (making.dataset({"background": 0, "a": 1, "b": 5}), "without gaps"),
        (making.dataset({"a": 1, "b": 2}), "without gaps"),
        (making.dataset({"background": 0, "a": "one"}), "one"),
        (making.dataset({"background": 0, "a": -1}), "-1"),
        (making.dataset({"background": 0, "a": 1.5}), "1.5"),
        (making.dataset({"background": 0, "a": "9" * 5000}), "label"),
        (making.dataset({"background": 0, "all": [1, 2], "some": [2]}), "regions_class_order"),
        (
            making.dataset({"background": 0, "all": [1, 2], "b": [2]}, regions_class_order=[1, 1]),
            "twice",
        ),
        (making.dataset() | {"channel_names": {"0": "T1", "2": "T2"}}, "channels"),
        (making.dataset() | {"channel_names": {}}, "channels"),
        (making.dataset() | {"labels": []}, "labels"),
    ],
)
def test_a_dataset_json_that_leaves_labels_uncertain_is_refused(tmp_path, content, word):
    with pytest.raises(BadModel) as caught:
        outputs(tmp_path, content)
    assert word in str(caught.value)
    assert "dataset.json" in str(caught.value)


def test_published_plans_are_read_or_refused_with_a_sentence(shared_data):
    read = 0
    for path in sorted((shared_data / "nnunet_plans").rglob("plans.json")):
        try:
            plans = read_plans(path)
        except BadModel as error:
            assert "Git LFS" in str(error)
            continue
        for name in plans.content["configurations"]:
            configuration(plans, name, 1)
            read += 1
    assert read >= 10
