"""Models of MONAI from end to end: the labels that MONAI itself makes with them, to the voxel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai")

from making import monai as making
from medseg.errors import BadConfig, BadFile
from medseg.inference import Settings, segment
from medseg.inference.journey import Grid
from medseg.inference.transforms import travel
from medseg.io import read
from medseg.models import Space, StepRecipe, Turn, load_models, write_models
from medseg.volume import Volume, orientation_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]

EXACT = Settings(precision="fp32")
TURN = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
CROP = {
    "_target_": "CropForegroundd",
    "keys": "image",
    "source_key": "image",
    "margin": 2,
}
RANGE = {
    "_target_": "ScaleIntensityRanged",
    "keys": "image",
    "a_min": -20,
    "a_max": 120,
    "b_min": 0.0,
    "b_max": 1.0,
    "clip": True,
}
TUMOURS = {
    "_target_": "Lambdad",
    "keys": ["pred"],
    "func": (
        "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1,"
        " torch.where(x[[1]] > 0, 2, 0)))"
    ),
}
EXTENT = {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0}
EACH = {
    "_target_": "NormalizeIntensityd",
    "keys": "image",
    "nonzero": "True",
    "channel_wise": True,
}
WHOLE = {"_target_": "SimpleInferer"}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}


def network(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, "in_channels": 1, "out_channels": 3} | arguments


#: What is special -> the bundle's parts, and how many scans it takes.
BUNDLES: dict[str, tuple[dict[str, Any], int]] = {
    "probabilities go back": ({}, 1),
    "labels go back": ({"after": [making.ARGMAX, making.INVERT | {"nearest_interp": True}]}, 1),
    "a crop after a finer grid": (
        {
            "before": [
                {"_target_": "Spacingd", "keys": "image", "pixdim": [0.8, -1, 1.4]},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS"},
                RANGE,
                CROP,
            ]
        },
        1,
    ),
    "a crop before, Gaussian windows, largest parts": (
        {
            "before": [EACH, CROP | {"allow_smaller": True}, making.BEFORE[1], EXTENT],
            "inferer": making.INFERER | {"mode": "gaussian", "padding_mode": "replicate"},
            "after": [
                making.ARGMAX,
                {
                    "_target_": "KeepLargestConnectedComponentd",
                    "keys": "pred",
                    "applied_labels": [1],
                },
                making.INVERT | {"nearest_interp": True},
            ],
        },
        1,
    ),
    "other names, lists in lists, limits of one axis": (
        {
            "network": making.UNET | {"_target_": "monai.networks.nets.unet.Unet"},
            "before": [
                {
                    "_target_": "Compose",
                    "transforms": [
                        {"_target_": "OrientationDict", "keys": "image", "axcodes": "RAS"},
                        {
                            "_target_": "monai.transforms.spatial.dictionary.SpacingD",
                            "keys": "image",
                            "pixdim": [1.5, 1.5, 2.0],
                            "min_pixdim": 0.0,
                            "max_pixdim": [2.0],
                        },
                    ],
                },
                {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 90},
                {"_target_": "CastToTyped", "keys": "image", "dtype": "$np.float32"},
            ],
            "after": [making.INVERT, making.ARGMAX | {"to_onehot": [None], "dim": 0}],
        },
        1,
    ),
    "the nearest voxel there is the nearest back": (
        {
            "before": [
                {
                    "_target_": "Spacingd",
                    "keys": "image",
                    "pixdim": [0.8, 1.3, 1.4],
                    "mode": "nearest",
                },
                EXTENT,
            ]
        },
        1,
    ),
    "a window larger than the scan, padded": (
        {"inferer": making.INFERER | {"roi_size": [48, 48, 32], "cval": -1.0}},
        1,
    ),
    "regions of four scans become labels": (
        {
            "network": network(
                "SegResNet", in_channels=4, init_filters=8, blocks_down=[1, 1], blocks_up=[1]
            ),
            "before": [EACH],
            "inferer": making.INFERER | {"roi_size": [32, 32, 16]},
            "after": [making.SIGMOID, making.THRESHOLD, TUMOURS],
        },
        4,
    ),
    "overlapping regions go back linearly": (
        {"after": [making.SIGMOID, making.INVERT, making.THRESHOLD]},
        1,
    ),
    "labels get other values": (
        {
            "after": [
                making.SOFTMAX,
                making.INVERT,
                making.ARGMAX,
                LARGEST | {"applied_labels": [1]},
                {
                    "_target_": "MapLabelValued",
                    "keys": "pred",
                    "orig_labels": [0, 1, 2],
                    "target_labels": [0, 7, 1],
                    "dtype": "$np.uint8",
                },
                LARGEST | {"applied_labels": [1]},
            ]
        },
        1,
    ),
    "the whole image at once": (
        {"before": [EXTENT], "inferer": WHOLE, "after": [making.SOFTMAX, making.ARGMAX]},
        1,
    ),
    "DynUNet": (
        {
            "network": network(
                "DynUNet",
                spatial_dims=3,
                kernel_size=[3, [3, 3, 1], 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                filters=[8, 12, 12],
                norm_name="instance",
                deep_supervision=False,
                res_block=True,
            )
        },
        1,
    ),
    "BasicUNet": (
        {
            "network": network("BasicUNet", features=[8, 8, 8, 8, 8, 8]),
            "inferer": making.INFERER | {"roi_size": [32, 32, 16], "overlap": [0.5, 0.25, 0.0]},
        },
        1,
    ),
    "MedNeXt": (
        {
            "network": network(
                "MedNeXt",
                init_filters=8,
                kernel_size=3,
                blocks_down=[1, 1],
                blocks_bottleneck=1,
                blocks_up=[1, 1],
            )
        },
        1,
    ),
    "AttentionUnet": (
        {"network": network("AttentionUnet", spatial_dims=3, channels=[8, 12], strides=[2])},
        1,
    ),
    "UNETR": (
        {
            "network": network(
                "UNETR", img_size=[16, 16, 16], hidden_size=24, mlp_dim=32, num_heads=2
            )
        },
        1,
    ),
}


def scans_of(folder: Path, count: int, **options: Any) -> list[Path]:
    return [making.write_scan(folder / f"scan{n}.nii.gz", seed=n, **options) for n in range(count)]


def labels_of(model: Any, scans: list[Path], settings: Settings = EXACT) -> np.ndarray:
    volumes = [read(scan) for scan in scans]
    return np.asarray(segment(volumes, model, settings).labels.data)


@pytest.mark.parametrize("case", BUNDLES)
def test_labels_of_a_bundle_are_those_of_monai_to_the_voxel(tmp_path, case):
    parts, count = BUNDLES[case]
    # With parts that are not equally large, and with more than one label in both scans.
    seed = {"largest parts": 6, "MedNeXt": 1}.get(case.split(", ")[-1], 0)
    folder = making.write_bundle(tmp_path / "bundle", making.config(**parts), seed=seed)
    model = load_models([str(folder)])
    oblique = {"shape": (30, 24, 26), "spacing": (1.5, 1.0, 1.0), "turn": TURN}
    for options in ({}, oblique):
        scans = scans_of(tmp_path, count, **options)
        want = making.bundle_labels(folder, scans)
        if "whole image" in case:  # whose network adds a voxel, which is not saved
            want = want[tuple(slice(length) for length in read(scans[0]).shape)]
        if "regions of four" in case:
            assert set(np.unique(want)) <= {0, 1, 2, 4}
        if "other values" in case:
            assert set(np.unique(want)) == {0, 1, 7}
        assert len(np.unique(want)) >= 2
        np.testing.assert_array_equal(labels_of(model, scans), want)
    assert (labels_of(model, scans, Settings()) == want).mean() >= 0.999


AUTO3DSEG: dict[str, tuple[dict[str, Any], int]] = {
    "ct": ({"normalize_mode": "ct", "orientation_ras": True}, 1),
    "meanstd, trained": ({"steps": 6}, 1),
    "meanstd, sigmoid": ({"sigmoid": True}, 1),
    "three modalities, trained": (
        {
            "network": {"in_channels": 3},
            "extra_modalities": {"second": "meanstd", "third": "ct"},
            "steps": 4,
        },
        3,
    ),
    "three modalities, sigmoid": (
        {
            "network": {"in_channels": 3, "resolution": [1.0, 1.0, 3.0]},
            "extra_modalities": {"second": "meanstdtanh", "third": "pet"},
            "sigmoid": True,
        },
        3,
    ),
}


@pytest.mark.parametrize("case", AUTO3DSEG)
def test_labels_of_auto3dseg_are_those_of_monai_to_the_voxel(tmp_path, case):
    options, count = AUTO3DSEG[case]
    folder = making.write_auto3dseg(tmp_path / "model", **options)
    model = load_models([str(folder)])
    scans = scans_of(tmp_path, count)
    want = making.auto3dseg_labels(folder, scans)
    assert len(np.unique(want)) >= 2
    np.testing.assert_array_equal(labels_of(model, scans), want)
    assert (labels_of(model, scans, Settings()) == want).mean() >= 0.999


def test_a_converted_bundle_gives_the_same_labels_and_keeps_the_licence(tmp_path):
    folder = making.write_bundle(tmp_path / "bundle", half=True)
    scans = scans_of(tmp_path, 1)
    write_models(load_models([str(folder)]), tmp_path / "own")
    own = load_models([str(tmp_path / "own")])
    assert own[0].spec.card["license"].startswith("Apache License")
    assert own[0].spec.card["data_license"] == "CC BY 4.0"
    np.testing.assert_array_equal(
        labels_of(own, scans), labels_of(load_models([str(folder)]), scans)
    )


def test_probabilities_come_with_the_labels(tmp_path):
    folder = making.write_bundle(tmp_path / "bundle")
    scan = read(scans_of(tmp_path, 1)[0])
    settings = Settings(precision="fp32", probabilities=(1, 2), uncertainty=True)
    found = segment(scan, load_models([str(folder)]), settings)
    one, two = (found.maps[f"probability_{n}"].data for n in (1, 2))
    assert one.shape == scan.shape and float(one.min()) >= 0 and float(one.max()) <= 1
    np.testing.assert_array_equal(np.maximum(one, two)[found.labels.data == 0] <= 0.5, True)
    assert (found.labels.data[one > 0.51] == 1).all()
    assert float(found.maps["uncertainty"].data.min()) >= 0
    assert found.confidence.keys() <= {1, 2}


def test_options_of_nnunet_and_too_large_images_are_refused(tmp_path):
    folder = making.write_bundle(tmp_path / "bundle", making.config(inferer=WHOLE, before=[]))
    model = load_models([str(folder)])
    scan = read(scans_of(tmp_path, 1)[0])
    for settings in (Settings(orientation="RAS"), Settings(postprocess=True)):
        with pytest.raises(BadConfig, match="MONAI's"):
            segment(scan, model, settings)
    long = Volume(np.arange(1030 * 4 * 4, dtype=np.float32).reshape(1030, 4, 4), np.eye(4))
    with pytest.raises(BadFile, match="1030 voxels long"):
        segment(long, model, EXACT)


def test_very_oblique_scans_are_turned_as_nibabel_turns_them():
    random = np.random.default_rng(0)
    others = 0
    for _ in range(300):
        affine = np.eye(4)
        turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
        affine[:3, :3] = turn @ np.diag(random.choice([0.9, 1.0, 1.5, 2.6], 3))
        grid = Grid(affine, (4, 5, 6))
        grid.turn(Turn(orientation="RAS"))
        want = nib.as_closest_canonical(nib.Nifti1Image(np.zeros((4, 5, 6)), affine))
        np.testing.assert_allclose(grid.affine.numpy(), want.affine, atol=1e-9)
        others += orientation_of(affine) != "".join(nib.aff2axcodes(affine))
    assert others > 5


def test_the_middle_is_kept_where_rounding_hides_the_first_corner():
    """An oblique affine in float32, as headers store it, of which no new corner is the lowest."""
    from monai.data.utils import compute_shape_offset, zoom_affine

    from medseg.inference.journey import lay_journey

    hidden = 0
    for seed in range(12):
        turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
        affine = np.eye(4)
        affine[:3, :3] = (turn * (0.7, 0.9, 3.3)).astype(np.float32)
        affine[:3, 3] = np.float32((-101.3, 88.7, 40.1))
        volume = Volume(np.zeros((70, 60, 40), np.int16), affine)
        recipe = StepRecipe(steps=(Space(spacing_mm=(1.5, 1.5, 2.0)),), inputs=1)
        image, journey = travel([volume.with_data(volume.data + 1)], lay_journey([volume], recipe))
        matrix = zoom_affine(affine, (1.5, 1.5, 2.0), diagonal=False)
        shape, offset = compute_shape_offset(volume.shape, affine, matrix)
        assert image.shape[1:] == tuple(shape) == journey.shape
        hidden += not np.allclose(offset, affine[:3, 3])
    assert hidden > 0


def test_dicom_without_an_orientation_is_turned_to_lps():
    from medseg.inference.journey import lay_journey

    volume = Volume(np.zeros((4, 5, 6), np.int16), np.eye(4))
    plain = StepRecipe(steps=(), inputs=1)
    turned = StepRecipe(steps=(Turn(orientation="RAS"),), inputs=1)
    assert lay_journey([volume], plain, dicom=True).orientation == "LPS"
    assert lay_journey([volume], plain).orientation == "stored"
    assert lay_journey([volume], turned, dicom=True).orientation == "RAS"


@pytest.mark.parametrize("name", ["ct_unet", "ct_segresnet", "ct_swinunetr", "mr_hippocampus_unet"])
def test_fixtures_have_the_labels_that_monai_wrote(shared_data, name):
    home = shared_data / "interop_monai"
    if not (home / name).is_dir():
        pytest.skip("the bundles of MONAI are not here")
    model = load_models([str(home / name / "bundle")])
    expected = sorted((home / name / "expected").glob("*.nii.gz"))
    for file in expected[-1:] if name == "ct_segresnet" else expected:
        scan = next(home.glob(f"scans_*/{file.name.replace('_trans', '')}"))
        want = np.asarray(nib.load(file).dataobj)
        np.testing.assert_array_equal(labels_of(model, [scan]), want)


def test_what_was_taken_is_in_the_record(tmp_path):
    from medseg.inference.jobs import Extras, Job
    from medseg.inference.run import infer

    folder = making.write_bundle(tmp_path / "bundle")
    scan = scans_of(tmp_path, 1)[0]
    job = Job(scan=scan, labels=tmp_path / "labels.nii.gz")
    content = infer(job, load_models([str(folder)]), EXACT, Extras())
    assert content["model"]["license"] == "Apache License"
    assert content["model"]["data_license"] == "CC BY 4.0"
    assert "scan turned to RAS" in content["settings"]["taken"]
    assert json.dumps(content)
