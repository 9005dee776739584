"""`medseg view`: what it writes where, what it finds by itself, and what it refuses in one
sentence.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

import medseg
from making import networks as tiny
from medseg import io
from medseg.errors import BadGeometry
from medseg.volume import Volume


@pytest.fixture
def scan(tmp_path) -> Path:
    """A scan and, beside it, what `medseg infer` leaves: labels and their table."""
    path = tiny.save_scan(tmp_path / "SENTINEL.nii.gz")
    tiny.save_nifti(
        tmp_path / "SENTINEL_seg.nii.gz",
        (tiny.phantom() > 700).astype(np.uint8) * 2,
        tiny.affine_of(),
    )
    tiny.TABLE.write(tmp_path / "SENTINEL_seg.labels.csv")
    return path


def facts(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="facts">(.*?)</script>', text)[1]
    )


def new(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(("SENTINEL.nii", "SENTINEL_seg"))
    )


def test_a_page_is_written_beside_the_labels_with_their_names(scan, tmp_path):
    ran = tiny.medseg("view", scan)
    assert ran.code == 0, ran.err
    assert ran.out.strip() == str(tmp_path / "SENTINEL_view.html")
    assert [row["name"] for row in facts(tmp_path / "SENTINEL_view.html")["structures"]] == [
        "left body",
        "right body",
    ]
    assert "SENTINEL" not in (tmp_path / "SENTINEL_view.html").read_text(encoding="utf-8")
    assert new(tmp_path) == ["SENTINEL_view.html"]


def test_what_infer_wrote_is_found(tmp_path):
    scan = tiny.save_scan(tmp_path / "SENTINEL.nii.gz")
    assert tiny.medseg("infer", scan, "-m", "otsu", "-q").code == 0
    assert tiny.medseg("view", scan).code == 0
    rows = facts(tmp_path / "SENTINEL_view.html")["structures"]
    record = json.loads((tmp_path / "SENTINEL_seg.json").read_text())
    assert [(row["value"], row["ml"]) for row in rows] == [
        (row["value"], row["ml"]) for row in record["structures"]
    ]


@pytest.mark.parametrize("name", ["SENTINEL_seg.seg.nrrd", "SENTINEL.seg.nrrd", "SENTINEL_seg.mha"])
def test_labels_of_other_forms_are_found(tmp_path, name):
    scan = tiny.save_scan(tmp_path / "SENTINEL.nii.gz")
    labels = Volume((tiny.phantom() > 700).astype(np.uint8) * 2, tiny.affine_of())
    io.write(labels, tmp_path / name, table=tiny.TABLE)
    assert tiny.medseg("view", scan).code == 0
    assert facts(tmp_path / "SENTINEL_view.html")["structures"][0]["value"] == 2


def test_labels_table_title_and_place_can_be_said(scan, tmp_path):
    (tmp_path / "other.tsv").write_text("index\tname\n2\tspleen\n")
    arguments = ("view", scan, tmp_path / "SENTINEL_seg.nii.gz", "-o", tmp_path / "x.html")
    ran = tiny.medseg(*arguments, "--table", tmp_path / "other.tsv", "--title", "Case 1")
    assert ran.code == 0, ran.err
    assert facts(tmp_path / "x.html")["title"] == "Case 1"
    assert [row["name"] for row in facts(tmp_path / "x.html")["structures"]] == ["spleen"]


@pytest.mark.parametrize("arguments", [("--slicer",), ("--slicer", "-o", "x.mrb"), ("-o", "x.mrb")])
def test_a_scene_for_slicer(scan, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("view", scan, *arguments)
    assert ran.code == 0, ran.err
    with zipfile.ZipFile(ran.out.strip()) as archive:
        assert "case/Data/labels.seg.nrrd" in archive.namelist()
        assert not [name for name in archive.namelist() if "SENTINEL" in name]


def test_a_contact_sheet_alone_or_beside_a_page(scan, tmp_path):
    assert tiny.medseg("view", scan, "--png", tmp_path / "s.png").code == 0
    assert new(tmp_path) == ["s.png"]
    assert tiny.medseg("view", scan, "-o", tmp_path / "t.png").code == 0
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()
    ran = tiny.medseg("view", scan, "-o", tmp_path / "x.html", "--png", tmp_path / "u.png")
    assert ran.out.split() == [str(tmp_path / "x.html"), str(tmp_path / "u.png")]
    assert new(tmp_path) == ["s.png", "t.png", "u.png", "x.html"]


def test_open_opens_the_page(scan, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert tiny.medseg("view", scan, "--open").code == 0
    assert opened == [(tmp_path / "SENTINEL_view.html").as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    ran = tiny.medseg("view", scan, "--open")
    assert ran.code == 0
    assert "open it yourself" in ran.err or "yourself" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-o", "x.pdf"), 4, ".html"),
        (("--slicer", "-o", "x.html"), 4, ".mrb"),
        (("--png", "x.jpg"), 4, ".png"),
        (("--slicer", "--open"), 5, "--open"),
        (("nothing.nii.gz",), 3, "nothing.nii.gz"),
        (("SENTINEL.nii.gz",), 3, "label map"),  # the scan given as its labels
        (("-o", "missing/x.html"), 4, "missing/x.html"),
        (("--table", "SENTINEL.nii.gz"), 3, "label table"),
    ],
)
def test_what_cannot_be_is_one_sentence(scan, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg("view", scan, *arguments)
    assert ran.code == code
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
    assert new(tmp_path) == []


def test_a_scan_must_be_there_and_have_labels(tmp_path):
    assert tiny.medseg("view").code == 2
    ran = tiny.medseg("view", tmp_path / "nothing.nii.gz")
    assert (ran.code, "no such file" in ran.err) == (3, True)
    scan = tiny.save_scan(tmp_path / "a.nii.gz")
    ran = tiny.medseg("view", scan)
    assert ran.code == 3
    assert "a_seg.nii.gz" in ran.err
    assert "medseg infer" in ran.err


def test_labels_of_another_place_are_refused(scan, tmp_path):
    tiny.save_nifti(
        tmp_path / "far.nii.gz", np.ones((4, 4, 4), np.uint8), tiny.affine_of(origin=(900, 0, 0))
    )
    ran = tiny.medseg("view", scan, tmp_path / "far.nii.gz")
    assert (ran.code, new(tmp_path)) == (3, ["far.nii.gz"])
    assert "scan" in ran.err


def test_progress_can_be_lines_of_json(scan, tmp_path):
    ran = tiny.medseg(
        "infer", scan, "-m", "otsu", "-o", tmp_path / "x.nii.gz", "--progress", "json"
    )
    assert ran.code == 0, ran.err
    events = [json.loads(line) for line in ran.err.splitlines()]
    assert events[0] == {"event": "progress", "what": "reading", "done": 0, "total": 1}
    assert {event["event"] for event in events} == {"progress", "announcement"}
    assert events[-1]["what"] == "writing"
    assert tiny.medseg("infer", scan, "--progress", "loud").code == 2


def test_labels_that_lie_elsewhere_are_no_picture(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    volume = io.read(scan)
    affine = volume.affine.copy()
    affine[0, 3] += 5000
    elsewhere = Volume(np.ones(volume.shape, np.uint8), affine)
    io.write(elsewhere, tmp_path / "labels.nii.gz")
    for name in ("a.png", "a.html"):
        ran = tiny.medseg("view", scan, tmp_path / "labels.nii.gz", "-o", tmp_path / name)
        assert ran.code == 3 and "no label lies in the scan" in ran.err
        with pytest.raises(BadGeometry, match="no label lies in the scan"):
            medseg.view(scan, elsewhere, tmp_path / name)
        assert not (tmp_path / name).exists()
