"""A model as ONNX: its logits are PyTorch's, the JSON beside it is enough to use it, and neither
names this machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from making import networks as tiny
from medseg.errors import BadConfig, BadModel, BadOutput
from medseg.inference import exports as exporting
from medseg.inference.exports import describe, export
from medseg.inference.segmentation import segment
from medseg.inference.settings import Settings
from medseg.inference.window import window_starts
from medseg.models.folder import Checkpoint, load_checkpoint
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
PATCH = (16, 24, 8)
THICK = {"features": [8, 16], "strides": [[1, 1, 1], [2, 2, 1]], "kernels": [[3, 3, 1], [3, 3, 3]]}
WINDOW = {"scheme": "ct", "low": 0.0, "high": 900.0, "mean": 300.0, "sd": 250.0}


@pytest.fixture(scope="module")
def thick(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A U-Net for thick slices, two channels of different schemes, on the scan's own axes."""
    folder = tmp_path_factory.mktemp("models") / "FOLDERNAME"
    tiny.save_two_channel_network(
        folder, "unet", THICK, PATCH, spacing_mm=(2.0, 2.0, 5.0), grid="scan",
        intensity=[{"scheme": "zscore"}, WINDOW], channel_names=("T1", "CT"), mirror=(0, 1),
    )  # fmt: skip
    return load_checkpoint(str(folder))


@pytest.fixture(scope="module")
def written(thick: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> exporting.Exported:
    return export(thick, tmp_path_factory.mktemp("out") / "deep" / "thick.onnx")


def logits_of(path: Path, patches: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"image": patches}
    )[0]


def test_the_network_is_valid_onnx_and_the_json_holds_its_hash(written: exporting.Exported):
    onnx.checker.check_model(onnx.load(written.network), full_check=True)
    facts = json.loads(written.description.read_text())
    assert written.description == written.network.with_suffix(".json")
    assert facts["onnx_sha256"] == hashlib.sha256(written.network.read_bytes()).hexdigest()
    assert sorted(path.name for path in written.network.parent.iterdir()) == [
        "thick.json",
        "thick.onnx",
    ]


def test_logits_are_those_of_pytorch_for_any_number_of_patches(
    thick: Checkpoint, written: exporting.Exported
):
    assert written.any_batch
    assert 0 <= written.difference < 1e-4
    for count in (1, 3):
        patches = torch.randn(count, 2, *PATCH, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = thick.network()(patches).numpy()
        found = logits_of(written.network, patches.numpy())
        assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_installed_runs_it_and_says_how_close_it_is(thick: Checkpoint, written, name: str):
    pytest.importorskip(name)
    content = written.network.read_bytes()
    with mock.patch.object(exporting, "RUNTIMES", (name,)):
        runtime, difference = exporting._compare(content, thick.network(), thick)
        assert runtime == name
        assert 0 < difference < 1e-4
        other = thick.network()
        with torch.no_grad():
            other.head.bias[0] += 1
        assert exporting._compare(content, other, thick)[1] > 0.01
    with mock.patch.object(exporting, "RUNTIMES", ()):
        assert exporting._compare(content, thick.network(), thick) == ("", 0.0)


TINY: dict[str, dict] = {
    "segformer": {
        "widths": [8, 16], "strides": [2, 2], "depths": [1, 1], "heads": [1, 2], "reductions": [2,
        1], "decoder": 8,
    },
    "primus": {"width": 24, "depth": 2, "heads": 2, "decoder": [8, 8]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("architecture", TINY)
def test_transformers_and_networks_of_monai_are_written_too(tmp_path: Path, architecture: str):
    if architecture == "segresnet":
        pytest.importorskip("monai")
    folder = tiny.save_two_channel_network(
        tmp_path / "m", architecture, TINY[architecture], (8, 16, 8)
    )
    checkpoint = load_checkpoint(str(folder))
    done = export(checkpoint, tmp_path / "m.onnx")
    patches = torch.randn(1, 2, 8, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = checkpoint.network()(patches).numpy()
    assert np.abs(logits_of(done.network, patches.numpy()) - expected).max() < 1e-4 * np.ptp(
        expected
    )


def test_the_json_is_enough_to_segment_a_scan_without_medseg(
    thick: Checkpoint, written: exporting.Exported
):
    """A second implementation in numpy, from the JSON and the network alone, on a scan of the
    model's spacing.
    """
    shape = (40, 30, 20)
    scans = [tiny.phantom(shape, seed=n) for n in (1, 2)]
    affine = tiny.affine_of((2.0, 2.0, 5.0))
    expected = segment(
        [Volume(scan, affine) for scan in scans], thick, Settings("cpu", "fp32")
    ).labels.data

    facts = json.loads(written.description.read_text())
    assert facts["grid"]["kind"] == "scan"
    assert facts["grid"]["spacing_mm"] == [2.0, 2.0, 5.0]
    image = []
    for scan, scheme in zip(scans, facts["intensity"]):
        if scheme["scheme"] == "zscore":
            image.append((scan - scan.mean()) / scan.std())
        else:
            image.append(
                (np.clip(scan, scheme["low"], scheme["high"]) - scheme["mean"]) / scheme["sd"]
            )
    image = np.stack(image).astype(np.float32)
    windows = facts["windows"]
    padding = [(0, max(0, p - n)) for p, n in zip(windows["patch"], shape)]
    image = np.pad(image, [(0, 0), *padding], constant_values=windows["padding"])
    weights = np.einsum("i,j,k->ijk", *windows["weights"])
    sums, total = (
        np.zeros((len(facts["output"]["labels"]), *image.shape[1:])),
        np.zeros(image.shape[1:]),
    )
    starts = [
        window_starts(n, p, windows["overlap"]) for n, p in zip(image.shape[1:], windows["patch"])
    ]
    for corner in product(*starts):
        at = tuple(slice(s, s + p) for s, p in zip(corner, windows["patch"]))
        sums[(slice(None), *at)] += (
            weights * logits_of(written.network, image[(None, slice(None), *at)])[0]
        )
        total[at] += weights
    labels = np.array(facts["output"]["labels"])[(sums / total).argmax(0)]
    assert len(np.unique(expected)) == 3
    assert (labels[tuple(slice(0, n) for n in shape)] == expected).mean() > 0.999


def test_the_json_tells_what_the_model_knows(thick: Checkpoint, tmp_path: Path):
    facts = describe(thick)
    assert facts["input"]["channels"] == ["T1", "CT"]
    assert facts["input"]["shape"] == [None, 2, *PATCH]
    assert facts["output"]["labels"] == [0, 2, 41]
    assert facts["output"]["activation"] == "softmax"
    assert facts["intensity"][1].items() >= ({"channel": "CT"} | WINDOW).items()
    assert facts["labels"][0] == {"value": 2, "name": "left body", "color": [200, 30, 30]}
    assert facts["windows"]["mirror_axes"] == [1]  # left and right would change sides
    assert [len(one) for one in facts["windows"]["weights"]] == list(PATCH)
    assert facts["content"] is None
    assert facts["locate"] is None


def test_the_json_tells_of_regions_cleanup_and_where_to_look(tmp_path: Path):
    more = {
        "cleanup": ({"step": "keep_largest"},),
        "locate": {"margin_mm": 5},
        "skip_empty": True,
        "regions": True,
    }
    with mock.patch.object(tiny, "CLASSES", (2, 41)):  # a region has no output for the background
        folder = tiny.save_known(tmp_path / "m", **(more | {"classes": (0, 2, 41)}))
    facts = describe(load_checkpoint(str(folder)))
    assert facts["regions"] is True
    assert facts["output"]["labels"] == [2, 41]
    assert facts["output"]["activation"] == "sigmoid"
    assert facts["cleanup"] == [{"step": "keep_largest"}]
    assert facts["locate"]["margin_mm"] == 5
    assert facts["windows"]["skip_empty"] is True
    assert facts["content"] == {"above": 0.1, "margin_voxels": 6}


def test_nothing_in_the_files_names_this_machine(written: exporting.Exported):
    for path in (written.network, written.description):
        content = path.read_bytes()
        for word in (
            "FOLDERNAME",
            str(written.network.parent),
            str(Path.home()),
            "site-packages",
            "medseg/models",
        ):
            assert word.encode() not in content, (path.name, word)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    thick: Checkpoint, tmp_path: Path, monkeypatch
):
    with pytest.raises(BadOutput, match=r"ends in \.onnx"):
        export(thick, tmp_path / "model.pt")
    with (
        mock.patch.object(exporting, "MAX_BYTES", 1000),
        pytest.raises(BadOutput, match="too large"),
    ):
        export(thick, tmp_path / "model.onnx")
    made = mock.patch.object(exporting, "_onnx", return_value=(b"", True))
    differs = mock.patch.object(exporting, "_compare", return_value=("onnxruntime", 0.02))
    with (
        made,
        differs,
        pytest.raises(BadModel, match=r"other values in onnxruntime .* 2\.0% .* not written"),
    ):
        export(thick, tmp_path / "model.onnx")
    fails = mock.patch(
        "torch.onnx.export",
        side_effect=torch.onnx.errors.OnnxExporterError("no operator\nfor this"),
    )
    with (
        fails,
        pytest.raises(BadModel, match=r"'unet' of tiny cannot be written as ONNX: no operator$"),
    ):
        export(thick, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with (
        mock.patch.object(exporting, "find_spec", return_value=None),
        pytest.raises(BadConfig, match="pip install"),
    ):
        export(thick, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.save_known(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("export", "run", "--json")
    assert ran.code == 0, ran.err
    printed = json.loads(ran.out)
    assert (printed["network"], printed["description"]) == ("known.onnx", "known.json")
    assert json.loads((tmp_path / "known.json").read_text())["name"] == "known"
    ran = tiny.medseg("export", "run", "-o", tmp_path / "out" / "a.onnx")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        str(tmp_path / "out" / "a.onnx"),
        str(tmp_path / "out" / "a.json"),
    ]
    assert "checked with" in ran.err or "not run" in ran.err
    ran = tiny.medseg("export", "run", "-o", tmp_path / "a.txt")
    assert (ran.code, ran.out) == (4, "")
