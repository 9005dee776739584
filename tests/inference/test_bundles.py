"""A model written as a bundle of MONAI is run there by MONAI's own transforms, and gives the labels
that medseg gives; what a bundle cannot say is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from making import networks as tiny, phantoms
from medseg.errors import BadModel, BadOutput
from medseg.inference import Settings, segment
from medseg.inference.bundles import write_bundle, write_torchscript
from medseg.io import read
from medseg.models import ZScore, bundle_metadata, load_checkpoint, load_models, monai_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = {"features": [8, 16]}
SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1]}
PATCH = (16, 24, 16)
SPACING = (2.0, 2.5, 2.0)


def model(folder: Path, architecture: str, options: dict, **changes: object) -> Path:
    """A random network of two channels that sees scans along their own axes."""
    fields = {"grid": "scan", "intensity": [{"scheme": "zscore"}] * 2} | changes
    return tiny.save_two_channel_network(
        folder, architecture, options, PATCH, spacing_mm=SPACING, **fields
    )


def scans(folder: Path) -> list[Path]:
    """Two channels on an oblique grid that is not the model's."""
    random = np.random.default_rng(4)
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [4, -7, 11], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-1.8, 2.1, 2.4])
    affine[:3, 3] = 20, -30, 7
    paths = []
    for channel in range(2):
        data = tiny.bumps((26, 30, 22), seed=channel) * 300 + random.normal(0, 5, (26, 30, 22))
        name = folder / f"scan_{channel:04d}.nii.gz"
        paths.append(tiny.save_nifti(name, data.astype(np.float32), affine))
    return paths


@pytest.mark.parametrize(("architecture", "options"), [("unet", UNET), ("segresnet", SEGRESNET)])
def test_a_model_for_monais_way_has_the_same_labels_there(tmp_path: Path, architecture, options):
    pytest.importorskip("monai")
    recipe = monai_recipe(SPACING, (ZScore(), ZScore())).model_dump(mode="json")
    folder = model(tmp_path / "model", architecture, options, recipe=recipe)
    written = write_bundle(load_checkpoint(str(folder)), tmp_path / "bundle", [scans(tmp_path)])
    assert written.promised and written.scans == 1 and written.equal == 1
    assert "100.0000% of the voxels" in (tmp_path / "bundle" / "docs" / "README.md").read_text()
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["num_channels"] == len(outputs["channel_def"])
    assert outputs["channel_def"]["0"] == "background"


def test_a_bundle_with_a_network_of_monais_is_read_back(tmp_path: Path):
    pytest.importorskip("monai")
    recipe = monai_recipe(SPACING, (ZScore(), ZScore())).model_dump(mode="json")
    folder = model(tmp_path / "model", "segresnet", SEGRESNET, recipe=recipe)
    checkpoint = load_checkpoint(str(folder))
    write_bundle(checkpoint, tmp_path / "bundle")
    paths = scans(tmp_path)
    volumes = [read(path) for path in paths]
    settings = Settings(precision="fp32", cleanup=False)
    own = segment(volumes, [checkpoint], settings).labels.data
    (read_back,) = load_models([str(tmp_path / "bundle")])
    assert read_back.spec.classes == checkpoint.spec.classes == (0, 2, 41)
    assert read_back.table.names == checkpoint.table.names
    assert (segment(volumes, read_back, settings).labels.data == own).all()
    assert len(np.unique(own)) > 1


#: What MONAI's schema of 2024-07-25 asks of `metadata.json`, and of each input and output.
_TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task")
_MORE_TEXTS = ("description", "authors", "copyright")
_TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "format", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
_SIDES = {"type": "object", "minProperties": 1, "additionalProperties": _TENSOR}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [*_TEXTS, *_MORE_TEXTS, "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in (*_TEXTS, *_MORE_TEXTS, "intended_use")},
        **{
            name: {"type": "object"}
            for name in ("changelog", "required_packages_version", "supported_apps")
        },
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": _SIDES, "outputs": _SIDES},
        },
    },
}


@pytest.mark.parametrize("names", [("T1", "T2"), ("CT", "CT")])
def test_what_a_bundle_says_of_itself_fits_monais_schema(tmp_path: Path, names):
    jsonschema = pytest.importorskip("jsonschema")
    recipe = monai_recipe(SPACING, (ZScore(), ZScore())).model_dump(mode="json")
    folder = model(tmp_path / "model", "unet", UNET, recipe=recipe, channel_names=names)
    metadata = bundle_metadata(load_checkpoint(str(folder)))
    jsonschema.validate(metadata, SCHEMA)
    (image,) = metadata["network_data_format"]["inputs"].values()
    kind = ("hounsfield", "CT") if names[0] == "CT" else ("magnitude", "n/a")
    assert (image["format"], image["modality"]) == kind
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({k: v for k, v in metadata.items() if k != "task"}, SCHEMA)


@pytest.mark.parametrize("architecture", ["unet", "segresnet"])
def test_monais_own_command_runs_a_trained_model_and_finds_its_network_as_told(
    tmp_path: Path, architecture: str
):
    """`python -m monai.bundle run` as the bundle's README says, in a process without medseg."""
    for package in ("monai", "fire", "ignite"):
        pytest.importorskip(package)
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    data = phantoms.dataset(
        tmp_path / "data", 4, labels={"spleen": 1, "liver": 5}, spacing_mm=(1.5, 1.0, 2.0),
        change=lambda n, image, labels: (image, np.where(labels == 2, 5, labels)),
    )  # fmt: skip
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    settings = {
        "model.recipe": "monai", "model.patch": "[16,16,16]", "train.steps": 12, "train.batch": 2,
        "train.validate_every": 12, "train.precision": "fp32", "train.warmup": 2,
        "train.keep": "last", "cleanup": "[]", "train.learning_rate": 0.01,
    } | ({"model.options": json.dumps(UNET)} if architecture == "unet" else {})  # fmt: skip
    more = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    ran = tiny.medseg("train", data, "-o", run, "--model", architecture, *more, "--quiet")
    assert ran.code == 0, ran.err
    (held_out,) = (run / "validation").glob("*.nii.gz")
    (tmp_path / "scans").mkdir()
    scan = tmp_path / "scans" / held_out.name
    scan.write_bytes((data / "imagesTr" / held_out.name).read_bytes())
    ran = tiny.medseg("export", run, "--monai-bundle", bundle, "--scan", scan)
    assert ran.code == 0, ran.err
    assert "100.0000% of the voxels" in (bundle / "docs" / "README.md").read_text()
    config, meta = (str(bundle / "configs" / f"{n}.json") for n in ("inference", "metadata"))
    found = tmp_path / "found"
    command = [
        sys.executable, "-m", "monai.bundle", "run", "run", "--bundle_root", bundle,
        "--config_file", config, "--meta_file", meta, "--dataset_dir", scan.parent,
        "--output_dir", found,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False,
        cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    (written,) = found.rglob("*.nii.gz")
    own = tmp_path / "own.nii.gz"
    ran = tiny.medseg("infer", scan, "-m", run, "-o", own, "--precision", "fp32", "--quiet")
    assert ran.code == 0, ran.err
    labels = read(own).data
    assert (read(written).data == labels).all() and set(np.unique(labels)) >= {0, 5}
    verify_net_in_out("network", meta_file=meta, config_file=config, device="cpu",
                      bundle_root=str(bundle))  # fmt: skip
    workflow = ConfigWorkflow(config, meta, workflow_type="infer", bundle_root=str(bundle))
    workflow.initialize()
    assert not workflow.check_properties()


def test_another_models_share_is_measured_and_not_promised(tmp_path: Path):
    pytest.importorskip("monai")
    checkpoint = load_checkpoint(str(model(tmp_path / "model", "unet", UNET)))
    written = write_bundle(checkpoint, tmp_path / "bundle", [scans(tmp_path)])
    assert not written.promised and written.equal is not None and 0.3 < written.equal < 1
    assert any("model.recipe=monai" in note for note in written.notes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"grid": "world"}, "grid 'world'"),
        ({"intensity": "percentiles"}, "percentiles"),
        ({"intensity": "percentiles", "skip_empty": True}, "windows of air"),
        (
            {"intensity": [{"scheme": "zscore"}, {"scheme": "zscore", "nonzero": True}]},
            "several",
        ),
    ],
)
def test_what_a_bundle_cannot_say_is_refused(tmp_path: Path, changes: dict, word: str):
    checkpoint = load_checkpoint(str(model(tmp_path / "model", "unet", UNET, **changes)))
    with pytest.raises(BadModel, match=word):
        write_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_nothing_that_is_there_is_written_over(tmp_path: Path):
    checkpoint = load_checkpoint(str(model(tmp_path / "model", "unet", UNET)))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("")
    with pytest.raises(BadOutput, match="is there already"):
        write_bundle(checkpoint, tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["mine"]


def test_torchscript_takes_any_number_of_patches(tmp_path: Path):
    checkpoint = load_checkpoint(str(model(tmp_path / "model", "unet", UNET)))
    difference = write_torchscript(checkpoint, tmp_path / "tiny.ts")
    assert difference < 1e-4
    traced = torch.jit.load(tmp_path / "tiny.ts")
    patches = torch.randn(3, 2, *PATCH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(traced(patches), checkpoint.network()(patches))
    with pytest.raises(BadOutput, match=r"\.ts"):
        write_torchscript(checkpoint, tmp_path / "tiny.zip")


def test_a_run_trained_for_monais_way_has_its_recipe(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 4, labels={"spleen": 1, "liver": 2})
    run = tmp_path / "run"
    ran = tiny.medseg(
        "train", data, "-o", run, "--set", "model.recipe=monai", "--set", "train.steps=2",
        "--set", "train.batch=1", "--set", "train.validate_every=2", "--set",
        "train.validate_samples=1", "--set", "train.precision=fp32", "--quiet",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    spec = json.loads((run / "model" / "model.json").read_text())
    assert [step["step"] for step in spec["recipe"]["steps"]] == ["turn", "space", "standard"]
    (validated,) = (run / "validation").glob("*.nii.gz")
    scan = read(data / "imagesTr" / validated.name)
    labels = segment(scan, load_models([str(run)]), Settings(cleanup=False)).labels.data
    assert (labels == read(validated).data).mean() > 0.99
    ran = tiny.medseg(
        "train", data, "-o", tmp_path / "other", "--set", "model.recipe=monai", "--set",
        "model.grid=world", "--set", "train.steps=2", "--quiet",
    )  # fmt: skip
    assert ran.code == 5 and "model.grid=scan" in ran.err
