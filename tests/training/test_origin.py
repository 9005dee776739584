"""A run that goes on from a model of nnU-Net: its plan, its weights, and a head for the new
structures.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from making import monai as making_monai, networks as tiny, nnunet as making, phantoms
from making.configs import make_config
from medseg.config import load_config
from medseg.dataset import read_dataset
from medseg.errors import BadModel
from medseg.inference import Settings, network_input, network_labels, segment
from medseg.io import read
from medseg.labels import Label, LabelTable
from medseg.models import load_models, save_checkpoint
from medseg.networks import build_network
from medseg.training.loop import train
from medseg.training.origin import adopted, read_start, start_from
from medseg.training.state import load_state
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")

#: Outputs of the model, in order, and structures of the data, of which one is known.
LABELS = {"background": 0, "liver": 1, "Left Kidney": 2}
NEW = {"spleen": 1, "left_kidney": 2}
SHORT = [
    "--set", "train.steps=2", "--set", "train.batch=1", "--set", "train.validate_every=2",
    "--set", "train.validate_samples=1", "--set", "train.precision=fp32", "--quiet",
]  # fmt: skip


def model(folder: Path, **options: object) -> Path:
    options = {"data": making.dataset(LABELS, channels=("MRI",))} | options
    return making.write_model(folder, **options)


def test_a_run_takes_plan_and_weights_and_its_model_is_used_as_any_other(tmp_path):
    """A transposed plan with its own spacing, and mirroring, which sides forbid."""
    plan = making.plans(spacing=[1.2, 1.0, 0.9]) | {
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
    }
    folder = model(tmp_path / "m", plan=plan, saved={"inference_allowed_mirroring_axes": (0, 1)})
    data = phantoms.dataset(tmp_path / "data", 4, labels=NEW)
    run = tmp_path / "run"
    ran = tiny.medseg("train", data, "-o", run, "--finetune", folder, *SHORT)
    assert ran.code == 0, ran.err
    assert "left_kidney" in ran.err and "spleen" in ran.err
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["patch"] == [16, 12, 20]
    assert config["augment"]["mirror"] == []
    spec = json.loads((run / "model" / "model.json").read_text())
    assert spec["architecture"] == "nnunet" and spec["classes"] == [0, 1, 2]
    assert spec["recipe"]["axes"] == [1, 2, 0]
    assert spec["recipe"]["spacing_mm"] == [1.2, 1.0, 0.9]
    # Two small steps: the network is still the one that was gone on from, but for its head.
    before = load_models([str(folder)])[0].network().state_dict()
    after = load_models([str(run / "model")])[0].network().state_dict()
    for key in ("encoder.0.0.conv.weight", "up.0.weight"):
        assert (
            torch.nn.functional.cosine_similarity(
                before[key].flatten(), after[key].flatten(), dim=0
            )
            > 0.99
        )
    (validated,) = (run / "validation").glob("*.nii.gz")
    scan = read(data / "imagesTr" / validated.name)
    found = segment(scan, load_models([str(run)]), Settings(cleanup=False)).labels.data
    assert (found == read(validated).data).mean() > 0.99
    again = tiny.medseg("train", data, "-o", run, "--finetune", folder, *SHORT)
    assert again.code == 0
    other = model(tmp_path / "other", folds=("1",))
    assert tiny.medseg("train", data, "-o", run, "--finetune", other, *SHORT).code != 0


def test_outputs_of_the_same_name_keep_their_weights_and_others_begin_anew(tmp_path):
    start = read_start(str(model(tmp_path / "m")))
    torch.manual_seed(5)
    network = build_network("nnunet", 1, 4, **start.spec.options)
    fresh = network.head.weight.detach().clone()
    with pytest.warns(match="left kidney.*spleen"):
        start_from(tmp_path / "m", network, names=["left kidney", "spleen", "LIVER"], regions=False)
    old = start.network().state_dict()
    for row, former in ((0, 0), (1, 2), (3, 1)):
        torch.testing.assert_close(network.head.weight[row], old["head.weight"][former])
        torch.testing.assert_close(network.head.bias[row], old["head.bias"][former])
    torch.testing.assert_close(network.head.weight[2], fresh[2])
    torch.testing.assert_close(
        network.state_dict()["decoder.0.1.conv.weight"], old["decoder.0.1.conv.weight"]
    )
    # Numbers of classes mean nothing for regions that overlap.
    regions = build_network("nnunet", 1, 2, **start.spec.options)
    fresh = regions.head.weight.detach().clone()
    with pytest.warns(match="none"):
        start_from(tmp_path / "m", regions, names=["liver", "spleen"], regions=True)
    torch.testing.assert_close(regions.head.weight, fresh)


@pytest.mark.parametrize("architecture", ["unet", "segformer", "mask2former", "fcn"])
def test_a_network_of_medsegs_keeps_the_outputs_of_the_names_it_knows(tmp_path, architecture):
    options = {"unet": tiny.UNET_OPTIONS}.get(architecture, {})
    names = LabelTable((Label(1, "liver", (9, 9, 9)), Label(2, "spleen", (8, 8, 8))))
    torch.manual_seed(4)
    network = build_network(architecture, 1, 3, **options)
    spec = {
        "name": "m", "architecture": architecture, "options": options, "patch": [64, 64, 64],
        "spacing_mm": 1.0, "classes": [0, 1, 2],
    }  # fmt: skip
    save_checkpoint(tmp_path / "m", spec, network.state_dict(), names, half=False)
    for wanted in (["spleen", "aorta", "liver"], ["spleen", "liver"]):
        torch.manual_seed(5)
        other = build_network(architecture, 1, len(wanted) + 1, **options)
        fresh = {key: value.clone() for key, value in other.state_dict().items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start_from(tmp_path / "m", other, names=wanted, regions=False)
        assert ("aorta" in " ".join(str(one.message) for one in caught)) == ("aorta" in wanted)
        key = {"unet": "head", "segformer": "classifier", "mask2former": "classify"}
        name = key.get(architecture, "scores.1") + ".weight"
        before, after = network.state_dict()[name], other.state_dict()[name]
        each = 8 if architecture == "unet" else 1  # its stem makes cells of 2x2x2 voxels
        for row, output in enumerate(["", *wanted]):
            expected = fresh[name][each * row : each * (row + 1)]
            if output != "aorta":
                former = ["", "liver", "spleen"].index(output)
                expected = before[each * former : each * (former + 1)]
            torch.testing.assert_close(after[each * row : each * (row + 1)], expected)
        if architecture == "mask2former":  # the last row is that of no object
            torch.testing.assert_close(after[-1], before[-1])


def test_a_run_that_has_no_model_yet_gives_its_averages(tmp_path):
    config = load_config(make_config(tmp_path / "config"))
    train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    averages, _ = load_state(tmp_path / "run" / "state.safetensors")
    outputs = len(averages["average.head.bias"]) // 8  # cells of 2x2x2 voxels
    network = build_network(config.model.name, 1, outputs, **config.model.options)
    names = [f"structure {n}" for n in range(1, outputs)]
    start_from(tmp_path / "run", network, names=names, regions=False)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, averages[f"average.{key}"])


def test_a_network_sees_in_training_what_it_sees_in_inference(tmp_path):
    """And the labels lie where the image does: an image that shows its labels says so."""
    plan = making.plans(spacing=[1.5, 0.8, 1.0], normalization_schemes=["NoNormalization"]) | {
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
    }
    spec = read_start(str(model(tmp_path / "m", plan=plan))).spec
    labels = np.zeros((30, 26, 28), np.uint8)
    labels[6:20, 5:15, 8:22] = 1
    labels[12:16, 9:20, 10:18] = 2
    scan = Volume(labels.astype(np.float32) + 1, np.diag([-1.0, -1.2, 1.1, 1.0]))
    image, frame = network_input([scan], spec)
    seen = network_labels(scan.with_data(labels), frame, spec)
    assert image.shape[1:] == seen.shape == frame.shape
    assert (np.round(image[0].numpy()) - 1 == seen).mean() > 0.97
    assert (frame.back(frame_labels(seen, frame.cropped)) == labels).mean() > 0.95


def frame_labels(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The nearest of the network's voxels for each of the scan's."""
    for axis, size in enumerate(shape):
        at = (np.arange(size) + 0.5) * labels.shape[axis] / size
        labels = labels.take(at.astype(int), axis)
    return labels


def test_planes_of_a_flat_network_stay_planes(tmp_path):
    data = phantoms.dataset(tmp_path / "data", 4, labels=NEW)
    folder = model(tmp_path / "m", plan=making.plans(making.FLAT))
    settings = adopted(read_start(str(folder)), read_dataset(data), {})
    assert settings["augment.rotation_degrees"][1:] == [0.0, 0.0]
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--finetune", folder, *SHORT)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["patch"][0] == 1


def test_an_archive_is_gone_on_from_by_its_own_name(tmp_path):
    model(tmp_path / "m" / "nnUNetTrainer__nnUNetPlans__3d_fullres", folds=("0", "1"))
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "m"))
    data = phantoms.dataset(tmp_path / "data", 4, labels=NEW)
    ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--finetune", archive, *SHORT)
    assert ran.code == 0, ran.err


def test_what_cannot_be_gone_on_from_is_refused_by_name(tmp_path):
    for n in (1, 2):
        part = tmp_path / "set" / f"Dataset29{n}_T_part{n}_x"
        model(part / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    plan = making.plans()
    plan["configurations"]["3d_lowres"] = plan["configurations"]["3d_fullres"]
    plan["configurations"]["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    saved = {"init_args": {"configuration": "3d_cascade_fullres"}}
    model(tmp_path / "cascade", plan=plan, saved=saved, previous=2)
    for name, word in (("set", "one of them"), ("cascade", "cascade")):
        with pytest.raises(BadModel, match=word):
            read_start(str(tmp_path / name))
    data = phantoms.dataset(tmp_path / "data", 4, labels=NEW, modalities=("T1", "T2"))
    ran = tiny.medseg(
        "train", data, "-o", tmp_path / "run", "--finetune", model(tmp_path / "m"), *SHORT
    )
    assert ran.code == 6 and "takes 1 channels" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_trained_model_of_nnunet_is_gone_on_from_with_real_scans(shared_data, tmp_path):
    """The hippocampus model on three scans of its own data set: it still finds what it knew."""
    source = shared_data / "hippocampus"
    listed = json.loads((source / "dataset.json").read_text())
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / part).mkdir(parents=True)
    names = [f"hippocampus_{n:03d}.nii.gz" for n in (1, 3, 4)]
    for name in names:
        for part in ("imagesTr", "labelsTr"):
            shutil.copy(source / part / name, tmp_path / "data" / part / name)
    listed["training"] = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    listed |= {"numTraining": 3, "test": [], "numTest": 0}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(listed))
    start = load_models([str(shared_data / "nnunet_model" / "model")])[0]
    assert {"anterior", "posterior"} <= {name.casefold() for name in start.table.names.values()}
    run = tmp_path / "run"
    ran = tiny.medseg(
        "train", tmp_path / "data", "-o", run, "--finetune",
        shared_data / "nnunet_model" / "model", *SHORT, "--set", "train.learning_rate=1e-6",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "new outputs" not in ran.err
    (validated,) = (run / "validation").glob("*.nii.gz")
    found = read(validated).data
    want = read(shared_data / "nnunet_model" / "cases" / "plain" / validated.name).data
    for value in (1, 2):  # what nnU-Net itself finds with the weights that were gone on from
        both = ((found == value) & (want == value)).sum()
        assert 2 * both / ((found == value).sum() + (want == value).sum()) > 0.98


def swin_encoder(path: Path, *, channels: int = 1, feature_size: int = 12) -> Path:
    """A file as MONAI's self-supervised training of a Swin UNETR writes it."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    torch.manual_seed(3)
    encoder = SwinTransformer(
        channels, feature_size, (4, 4, 4), (2, 2, 2), (1, 1, 1, 1), (1, 2, 3, 4)
    )
    state = encoder.state_dict(prefix="module.")
    torch.save({"state_dict": {k.replace("linear", "fc"): v for k, v in state.items()}}, path)
    return path


def small_swin(feature_size: int = 12, channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(4)
    return build_network(
        "swin_unetr", channels, 2, feature_size=feature_size, depths=[1, 1, 1, 1],
        num_heads=[1, 2, 3, 4], window_size=4,
    )  # fmt: skip


def test_an_encoder_is_taken_and_what_begins_anew_is_named(tmp_path):
    pytest.importorskip("monai")
    path = swin_encoder(tmp_path / "model_swinvit.pt")
    tensors, network = read_start(str(path)).tensors, small_swin()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    taken = f"{len(tensors)} of {len(before)} tensors were taken"
    with pytest.warns(match=rf"{taken} from .*model_swinvit\.pt; new are .*encoder1"):
        start_from(path, network, names=["liver"], regions=False)
    for key, value in network.state_dict().items():
        assert torch.equal(value, tensors.get(key, before[key])), key


def test_what_does_not_fit_of_an_encoder_begins_anew_and_one_of_another_size_is_refused(tmp_path):
    pytest.importorskip("monai")
    path, network = swin_encoder(tmp_path / "model_swinvit.pt"), small_swin(channels=2)
    first = "network.swinViT.patch_embed.proj.weight"  # which looks at each channel
    before = network.state_dict()[first].clone()
    with pytest.warns(match=r"new are .*patch_embed\.proj\.weight"):
        start_from(path, network, names=["liver"], regions=False)
    assert torch.equal(network.state_dict()[first], before)
    table = "network.swinViT.layers1.0.blocks.0.attn.qkv.weight"
    assert torch.equal(network.state_dict()[table], read_start(str(path)).tensors[table])
    with pytest.raises(BadModel, match=r"do not fit .*12 x 1 x 2 x 2 x 2, and 24 x 1 x 2 x 2 x 2"):
        start_from(path, small_swin(24), names=["liver"], regions=False)


def test_an_encoder_says_which_network_of_which_size_is_trained(tmp_path):
    pytest.importorskip("monai")
    start = read_start(str(swin_encoder(tmp_path / "model_swinvit.pt")))
    data = read_dataset(phantoms.dataset(tmp_path / "data", 3))
    sizes = {"feature_size": 12, "depths": [1] * 4, "num_heads": [1, 2, 3, 4], "window_size": 4}
    expected = {"model.name": "swin_unetr", "model.options": sizes}
    assert adopted(start, data, {}) == adopted(start, data, expected) == expected
    with pytest.raises(BadModel, match=r"swin_unetr, not of a unetr; --model swin_unetr"):
        adopted(start, data, {"model.name": "unetr"})


def test_the_patch_of_a_unetr_is_the_one_whose_places_it_knows_unless_another_is_asked_for(
    tmp_path,
):
    from monai.networks.nets import ViT

    data = read_dataset(phantoms.dataset(tmp_path / "data", 3))
    for hidden, name in ((64, "one.pth"), (48, "other.pth")):
        made = ViT(1, (32, 32, 32), (16, 16, 16), hidden, 64, 12, hidden // 16)
        torch.save(made.state_dict(), tmp_path / name)
    start = read_start(str(tmp_path / "one.pth"))
    options = {"hidden_size": 64, "mlp_dim": 64, "num_heads": 1, "patch": [32, 32, 32]}
    assert adopted(start, data, {}) == {"model.name": "unetr", "model.options": options}
    asked = adopted(start, data, {"model.patch": [16, 32, 16]})
    assert asked["model.options"]["patch"] == [16, 32, 16]
    other = read_start(str(tmp_path / "other.pth"))
    with pytest.raises(BadModel, match=r"how many heads its 48 .*model\.options\.num_heads"):
        adopted(other, data, {})
    assert "num_heads" not in adopted(other, data, {"model.options.num_heads": 3})["model.options"]


def test_a_run_begins_with_an_encoder_and_goes_on_with_the_same_one_only(tmp_path):
    pytest.importorskip("monai")
    path = swin_encoder(tmp_path / "model_swinvit.pt")
    data, run = phantoms.dataset(tmp_path / "data", 4, labels=NEW), tmp_path / "run"
    ran = tiny.medseg("train", data, "-o", run, "--finetune", path, *SHORT)
    assert ran.code == 0, ran.err
    assert "tensors were taken from" in ran.err and "swinvit" in ran.err
    spec = json.loads((run / "model" / "model.json").read_text())
    assert spec["architecture"] == "swin_unetr" and spec["options"]["feature_size"] == 12
    key = "network.swinViT.layers2.0.blocks.0.attn.qkv.weight"
    before = read_start(str(path)).tensors[key]
    after = load_models([str(run / "model")])[0].network().state_dict()[key]
    assert float((after - before).norm()) < 0.1 * float(before.norm())
    assert tiny.medseg("train", data, "-o", run, "--finetune", path, *SHORT).code == 0
    other = swin_encoder(tmp_path / "other.pt", channels=2)
    again = tiny.medseg("train", data, "-o", run, "--finetune", other, *SHORT)
    assert again.code == 5 and "another model" in again.err
    wrong = tiny.medseg(
        "train", data, "-o", tmp_path / "no", "--finetune", path, "--model", "unetr", *SHORT
    )
    assert wrong.code == 6 and "swin_unetr" in wrong.err and not (tmp_path / "no").exists()


#: Networks of bundles that are medseg's own, windows, and what the checkpoint holds of them.
BUNDLES = {
    "SegResNetDS": {"init_filters": 8, "blocks_down": [1, 1, 2], "norm": "INSTANCE", "dsdepth": 2},
    "SwinUNETR": {
        "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2,
        "use_checkpoint": True,
    },
    "UNETR": {"img_size": 32, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "MedNeXt": {
        "init_filters": 8, "kernel_size": 3, "blocks_down": [1, 1], "blocks_bottleneck": 1,
        "blocks_up": [1, 1], "use_residual_connection": True,
    },
}  # fmt: skip


def monai_bundle(folder: Path, name: str, **more: object) -> Path:
    """A bundle of random weights that keeps the largest part of its second label."""
    network = {"_target_": name, "in_channels": 1, "out_channels": 3} | BUNDLES.get(name, {}) | more
    largest = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [2]}
    content = making_monai.config(
        network=network,
        inferer=making_monai.INFERER | {"roi_size": [32, 32, 64 if name == "SwinUNETR" else 32]},
        after=[making_monai.SOFTMAX, making_monai.INVERT, making_monai.ARGMAX, largest],
    )
    return making_monai.write_bundle(folder, content, names={"1": "liver", "2": "left kidney"})


@pytest.mark.parametrize("name", sorted(BUNDLES))
def test_a_bundle_with_a_network_of_medsegs_is_the_same_network_there(tmp_path, name):
    pytest.importorskip("monai")
    folder = monai_bundle(tmp_path / "bundle", name)
    (run_there,), start = load_models([str(folder)]), read_start(str(folder))
    assert start.spec.architecture != run_there.spec.architecture == "bundle"
    image = torch.randn(1, 1, *start.spec.patch, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = run_there.network()(image), start.network()(image)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())
    settings = adopted(start, read_dataset(phantoms.dataset(tmp_path / "data", 3, labels=NEW)), {})
    assert settings["model.recipe"]["ending"]["outer"] == []  # label 2 is another structure now


def test_a_run_goes_on_from_a_bundle_and_from_a_checkpoint_of_auto3dseg(tmp_path):
    pytest.importorskip("monai")
    data = phantoms.dataset(tmp_path / "data", 4, labels={"Part 1": 1, "liver": 2})
    starts = {
        "bundle": (monai_bundle(tmp_path / "bundle", "SegResNetDS"), "knows liver"),
        "auto": (making_monai.write_auto3dseg(tmp_path / "auto3dseg"), "knows Part 1"),
    }
    for name, (start, told) in starts.items():
        run = tmp_path / f"run from {name}"
        plain = [*SHORT, "--set", "cleanup=[]"]
        ran = tiny.medseg("train", data, "-o", run, "--finetune", start, *plain)
        assert ran.code == 0, ran.err
        assert told in ran.err
        spec = json.loads((run / "model" / "model.json").read_text())
        assert spec["architecture"] == "segresnet" and spec["recipe"]["steps"]
        before = read_start(str(start)).network().state_dict()
        after = load_models([str(run / "model")])[0].network().state_dict()
        key = "network.encoder.conv_init.weight"
        assert float((after[key] - before[key]).norm()) < 0.2 * float(before[key].norm())
        (validated,) = (run / "validation").glob("*.nii.gz")
        scan = read(data / "imagesTr" / validated.name)
        found = segment(scan, load_models([str(run)]), Settings(cleanup=False)).labels.data
        assert (found == read(validated).data).mean() > 0.99


@pytest.mark.parametrize(
    ("name", "more", "word"),
    [
        ("UNet", {"channels": [8, 12], "strides": [2]}, "network UNet, which medseg runs"),
        ("SwinUNETR", {"downsample": "mergingv2"}, "has downsample 'mergingv2'"),
        ("MedNeXt", {"use_residual_connection": False}, "has use_residual_connection False"),
    ],
)
def test_a_bundle_with_another_network_is_run_and_not_trained(tmp_path, name, more, word):
    pytest.importorskip("monai")
    if name == "UNet":
        more = making_monai.UNET | more
    folder = monai_bundle(tmp_path / "bundle", name, **more)
    with pytest.raises(BadModel, match=word):
        read_start(str(folder))


def test_regions_of_a_model_of_classes_get_an_activation_of_their_own(tmp_path):
    pytest.importorskip("monai")
    start = read_start(str(monai_bundle(tmp_path / "bundle", "SegResNetDS")))
    data = read_dataset(phantoms.dataset(tmp_path / "data", 3, labels=NEW))
    for regions, activation in (({"all": (1, 2)}, "sigmoid"), ({}, "softmax")):
        settings = adopted(start, replace(data, regions=regions), {})
        assert settings["model.recipe"]["ending"]["activation"] == activation
