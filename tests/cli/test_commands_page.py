"""Every command in a block of docs/commands.md does what the page says, in its order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from making import networks as tiny
from making.places import ROOT
from medseg.labels import Label, LabelTable
from medseg.models.folder import save_checkpoint

PAGE = ROOT / "docs" / "commands.md"
LIVER = LabelTable((Label(1, "liver", (200, 80, 40)), Label(2, "tumour", (10, 90, 240))))


def command_lines() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page speaks of: scans, label maps with names, two references, a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("scan", "scans/a", "scans/b"):
        Path(name).parent.mkdir(exist_ok=True)
        tiny.save_scan(tmp_path / f"{name}.nii.gz")
    labels = np.zeros((20, 22, 18), np.uint8)
    labels[4:14, 4:14, 4:14], labels[6:9, 6:9, 6:9] = 1, 2
    for folder in ("labels", "truth"):
        Path(folder).mkdir()
        for case in ("a", "b"):
            tiny.save_nifti(tmp_path / folder / f"{case}.nii.gz", labels, tiny.affine_of())
        LIVER.write(tmp_path / folder / "labels.csv")
    network = tiny.Nearest(1, 3)
    spec = {
        "name": "liver", "architecture": "nearest", "classes": (0, 1, 2), "patch": (16, 16, 16),
        "spacing_mm": 2.0,
    }  # fmt: skip
    save_checkpoint(tmp_path / "runs" / "liver", spec, network.state_dict(), LIVER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert tiny.medseg("evaluate", "truth", "truth", "-o", "other", "-q").code == 0
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("known_networks")
def test_every_command_of_the_page_runs(place: Path):
    told = {}
    for program, *words in command_lines():
        assert program == "medseg"
        if words[0] == "batch":  # its workers do not know the networks of tests
            words = [*words[:-4], "-m", "otsu", *words[-2:]]
        ran = tiny.medseg(*words)
        assert ran.code == 0, (words, ran.err)
        told[" ".join(words)] = ran
    assert {"left", "scan", "pictures"} & {path.name for path in place.iterdir()}
    assert (
        "1 of 2 scans"
        in told["infer scans/ -o out/ -m runs/liver --roi liver --preview pictures/"].err
    )
    assert "network" in told["infer scan.nii.gz -m runs/liver --verbose"].err
    assert Path("steps.log").read_text().count("\n") > 1
    assert LabelTable.read("labels.label").names == LIVER.names
    assert LabelTable.read("scan_seg.lut.txt") == LabelTable.read("scan_seg.label") == LIVER
    assert LabelTable.read("colours.ctbl").names == LIVER.names
    assert Path("scan_seg.probability_1.nii.gz").is_file()
    assert set(np.unique(tiny.volume_of(Path("liver.nii.gz")).data)) == {0, 1}
