"""Results of a BIDS data set are a derivative data set, as the public validator sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from medseg.labels import LabelTable


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw data set of three images, segmented."""
    root = tmp_path_factory.mktemp("bids") / "raw"
    names = ("sub-01_ses-a_run-1", "sub-01_ses-b", "sub-02")
    for number, name in enumerate(names):
        folders = [part for part in name.split("_") if part.startswith(("sub", "ses"))]
        path = root.joinpath(*folders, "anat", f"{name}_T1w.nii.gz")
        path.parent.mkdir(parents=True)
        data = np.random.default_rng(number).normal(100, 20, (16, 16, 16)).astype(np.float32)
        tiny.save_nifti(path, data, tiny.affine_of())
    description = {"Name": "raw", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    model = tiny.save_unet(root.parent / "model")
    out = root / "derivatives" / "medseg"
    ran = tiny.medseg("batch", root, "-o", out, "-m", model, "--workers", 1)
    assert ran.code == 0
    assert tiny.medseg("gather", out).code == 0
    return out


def test_label_maps_are_called_and_lie_as_bids_wants_it(derivatives: Path):
    names = sorted(
        path.relative_to(derivatives).as_posix() for path in derivatives.rglob("*.nii.gz")
    )
    assert names == [
        "sub-01/ses-a/anat/sub-01_ses-a_run-1_desc-tiny_dseg.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_desc-tiny_dseg.nii.gz",
        "sub-02/anat/sub-02_desc-tiny_dseg.nii.gz",
    ]
    sidecar = json.loads((derivatives / names[2].replace(".nii.gz", ".json")).read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-02/anat/sub-02_T1w.nii.gz"]
    description = json.loads((derivatives / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "medseg"


def test_the_names_of_structures_are_there_once_for_all(derivatives: Path):
    (table,) = derivatives.rglob("*_dseg.tsv")
    assert table.parent == derivatives
    assert LabelTable.read(table).names == tiny.TABLE.names


def test_the_public_validator_finds_no_error(derivatives: Path):
    program = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("the validator is not here: pip install bids-validator-deno")
    ran = subprocess.run(
        [program, str(derivatives), "--json"], capture_output=True, text=True, timeout=600
    )
    issues = json.loads(ran.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert errors == []
