"""A model written as a bundle of MONAI is run there by MONAI's own transforms, and gives the labels
that medseg gives; what a bundle cannot say is refused.
"""

from __future__ import annotations

import json
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
from medseg.models import ZScore, load_checkpoint, load_models, monai_recipe

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
    config = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    steps = config["postprocessing"]["transforms"]
    config["postprocessing"]["transforms"] = [s for s in steps if "Map" not in s["_target_"]]
    (tmp_path / "bundle" / "configs" / "inference.json").write_text(json.dumps(config))
    back = segment(volumes, load_models([str(tmp_path / "bundle")]), settings).labels.data
    values = np.array(checkpoint.spec.classes)
    assert (values[back] == own).all() and len(np.unique(own)) > 1


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
