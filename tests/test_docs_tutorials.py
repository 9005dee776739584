"""Every command of the tutorials runs, word for word and in its order, in a shell of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg
from making import networks as tiny
from making.places import ROOT, SAMPLES
from medseg.errors import BadConfig

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HANG_S = 600
pytestmark = pytest.mark.skipif(
    os.name == "nt" or not shutil.which("bash"), reason="the tutorials are for bash"
)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, file and text of the blocks of a page; without a file they are run, or shown."""
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))


def do(page: str, folder: Path) -> str:
    """Write the files of a page and run its commands, as in a clone of medseg; what was printed."""
    (folder / "sample_volumes").symlink_to(SAMPLES)
    programs = folder / "programs"
    programs.mkdir()
    for name, words in (("medseg", "-m medseg "), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        program.chmod(0o755)
    usual = tiny.environment()
    path = os.pathsep.join((str(programs), usual["PATH"]))
    told = ""
    for language, file, text in blocks(page):
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        elif language == "sh":
            ran = subprocess.run(
                ["bash", "-e", "-c", text], cwd=folder, env=usual | {"PATH": path},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                timeout=HANG_S, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"{text}\n{ran.stdout}"
            told += ran.stdout
    return told


def need(*packages: str, ports: tuple[int, ...] = ()) -> None:
    """Skip where a package is not installed, or a port is taken by another program."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install medseg[dev]")
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"another program listens on port {port} here")


def test_the_tutorial_of_a_cohort_ends_with_a_row_for_each_subject(tmp_path: Path):
    do("tutorial-cohort", tmp_path)
    with (tmp_path / "study-seg" / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["site"]) for row in rows] == [
        ("done", "Graz"),
        ("done", "Linz"),
    ]
    for row, subject in zip(rows, ("sub-01", "sub-02")):
        name = f"{subject}_desc-brainfast_dseg.nii.gz"
        labels = medseg.read(tmp_path / "study-seg" / subject / "anat" / name)
        ml = float((labels.data == 17).sum() * np.prod(labels.spacing_mm) / 1000)
        assert float(row["ml_17"]) == pytest.approx(ml, abs=0.001) and ml > 0
    assert (tmp_path / "study-seg" / "report.html").stat().st_size > 0


def test_the_tutorial_of_dicom_ends_with_segmentations(tmp_path: Path):
    need("pydicom", "highdicom", "pynetdicom", ports=(11117,))
    do("tutorial-orthanc", tmp_path)
    (result,) = (tmp_path / "results").glob("*.dcm")
    table = medseg.read(result), medseg.read(tmp_path / "head.seg.nrrd")
    assert (table[0].data > 0).sum() == (table[1].data > 0).sum() > 1000


def test_orthanc_and_systemd_are_told_what_listen_understands():
    files = {file: text for _, file, text in blocks("tutorial-orthanc") if file}
    modality = json.loads(files["orthanc.json"])["DicomModalities"]["medseg"]
    assert modality == ["MEDSEG", "127.0.0.1", 11112]
    assert 'SendToModality(series, "medseg")' in files["autoroute.lua"]
    (line,) = re.findall(r"^ExecStart=(.*)$", files["medseg-listen.service"], re.MULTILINE)
    _, *words = shlex.split(line)
    known: dict[str, Any] = {}

    def listener(*arguments: Any, **more: Any) -> Any:
        known.update(options=arguments[0], spool=more["spool"])
        raise BadConfig("as far as this is tested")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg.pacs.node.Listener", listener)
        ran = tiny.medseg(*words)
    assert "as far as this is tested" in ran.err
    assert (known["options"].title, "127.0.0.1", known["options"].port) == tuple(modality)
    assert known["spool"] == Path("/var/lib/medseg/spool")


def test_the_tutorial_of_slicer_ends_with_a_model_and_a_scene(tmp_path: Path):
    told = do("tutorial-slicer", tmp_path)
    assert "nothing found" in told
    scores = json.loads((tmp_path / "report" / "summary.json").read_text(encoding="utf-8"))
    assert scores
    assert list(tmp_path.rglob("*.mrb")) or list(tmp_path.rglob("*.mrml"))
    assert set(medseg.load(tmp_path / "runs" / "liver").table.names.values()) == {"liver", "cyst"}


def test_the_tutorial_of_a_service_answers_with_volumes_and_labels(tmp_path: Path):
    need("fastapi", "uvicorn", "httpx", "multipart", ports=(8647,))
    told = do("tutorial-service", tmp_path)
    assert re.search(r"foreground \d+\.\d+ mL", told)
    own = medseg.segment(tmp_path / "sample_volumes" / "head_t1.nii.gz", "otsu").labels
    sent = medseg.read(tmp_path / "labels.seg.nrrd")
    assert (sent.data > 0).sum() == (own.data > 0).sum()
