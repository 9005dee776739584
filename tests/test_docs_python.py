"""The examples of docs/python.md run, one after another, as they stand there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg
from making import datasets, networks as tiny
from making.ct import grid, trunk
from making.places import ROOT

PAGE = ROOT / "docs" / "python.md"
NEEDED = ("nibabel", "SimpleITK", "matplotlib", "fastapi")


def examples() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples read, in the folder where they run."""
    affine, shape = grid(low_mm=(-190, -150, -60), high_mm=(190, 140, 60), spacing_mm=(6, 6, 6))
    medseg.write(trunk(affine, shape, noise=15).scan, tmp_path / "scan.nii.gz")
    datasets.decathlon(tmp_path / "dataset", count=2)
    listed = tiny.save_scan(tmp_path / "one.nii.gz")
    (tmp_path / "list.csv").write_text(f"case,image_0\none,{listed}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_do_what_the_page_says(folder: Path, capsys: pytest.CaptureFixture[str]):
    for package in NEEDED:
        pytest.importorskip(package, reason=f"needs {package}: pip install medseg[dev]")
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    names: dict[str, Any] = {}
    try:
        for example in examples():
            exec(compile(example, str(PAGE), "exec"), names)
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
    printed = capsys.readouterr().out
    assert "<Segmentation by ct-tissues in" in printed
    assert (
        "there is no device 'gpu'; use auto, cpu, cuda, cuda:N for one of several, or mps"
        in printed
    )
    assert "'done': 1" in printed and "<Evaluation of 1 case, " in printed
    assert names["found"].errors == ()
    for name in ("scan_seg.nii.gz", "scan_seg.json", "planes.png", "page.html", "scan.nrrd"):
        assert (folder / name).stat().st_size > 0, name
    one, other = names["results"]
    assert np.array_equal(one.labels.data, other.labels.data)
    assert names["volumes"]((folder / "scan.nii.gz").read_bytes()) == one.structures
