"""`medseg infer` over many scans: each fails on its own and is skipped only where its result would
be the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making import networks as tiny
from medseg.inference import run as run_module
from medseg.inference.backends import opening
from medseg.models.folder import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "known_networks")


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).normal(100, 20, (14, 12, 10)).astype(np.float32)
    data[3:9, 3 : 9 - seed % 4] += 300
    return tiny.save_nifti(path, data, tiny.affine_of())


def scans(folder: Path, *names: str) -> list[Path]:
    return [save(folder / name, seed) for seed, name in enumerate(names)]


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*_seg.nii.gz"))


# Failures of one of several -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("PATIENT"), 1, "error of its own (ValueError)"),
        (MemoryError(), 7, "not enough memory"),
        (RecursionError("PATIENT"), 1, "error of its own (RecursionError)"),
        (OSError(5, "PATIENT"), 1, "error of its own (OSError)"),
    ],
)
def test_whatever_goes_wrong_in_one_scan_is_that_scans_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
):
    scans(tmp_path / "in", "a.nii", "b.nii", "c.nii")
    segment = run_module.segment

    def failing(volumes: Any, *arguments: Any, **named: Any) -> Any:
        if calls.append(1) or len(calls) == 2:
            raise error
        return segment(volumes, *arguments, **named)

    calls: list[int] = []
    monkeypatch.setattr(run_module, "segment", failing)
    ran = tiny.medseg(
        "infer", tmp_path / "in", "-o", tmp_path / "out", "-m", "otsu", "-q", "--json"
    )
    assert ran.code == code
    assert words in ran.err and "PATIENT" not in ran.err
    assert ran.err.splitlines()[-2:] == [
        "medseg: 1 of 3 scans failed:",
        f"  {tmp_path / 'in' / 'b.nii'}",
    ]
    assert len(ran.out.splitlines()) == 2
    assert results(tmp_path / "out") == ["a_seg.nii.gz", "c_seg.nii.gz"]


@pytest.mark.parametrize(
    "kind", ["missing", "dangling", "directory of nothing", "too long", "damaged", "empty"]
)
def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, kind: str):
    one, three = scans(tmp_path / "in", "a.nii", "c.nii")
    two = tmp_path / "in" / ("b" * 250 if kind == "too long" else "b")
    two = two.with_name(f"{two.name}.nii")
    if kind == "dangling":
        two.symlink_to(tmp_path / "gone")
    elif kind == "directory of nothing":
        two.mkdir()
    elif kind in ("damaged", "empty"):
        two.write_bytes(b"no scan" if kind == "damaged" else b"")
    ran = tiny.medseg("infer", one, two, three, "-o", tmp_path / "out", "-m", "otsu", "-q")
    assert ran.code == 3
    assert ran.err.splitlines()[-2:] == ["medseg: 1 of 3 scans failed:", f"  {two}"]
    assert results(tmp_path / "out") == ["a_seg.nii.gz", "c_seg.nii.gz"]
    assert (
        sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("b"))
        == []
    )


def test_a_case_that_lacks_a_channel_does_not_stop_the_others(tmp_path: Path):
    model = tiny.save_two_channels(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0001"):
        tiny.save_scan(tmp_path / "in" / f"{name}.nii.gz", seed=int(name[-1]))
    ran = tiny.medseg(
        "infer", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-q", "--device", "cpu"
    )
    assert ran.code == 3
    assert "b_0001 (FLAIR) is not there" in ran.err
    assert ran.err.splitlines()[-2:] == [
        "medseg: 1 of 3 scans failed:",
        f"  {tmp_path / 'in' / 'b_0000.nii.gz'}",
    ]
    assert results(tmp_path / "out") == ["a_seg.nii.gz", "c_seg.nii.gz"]


def test_a_name_too_long_is_one_scans_failure_and_known_before_any_work(
    tmp_path: Path, monkeypatch
):
    long, short = scans(tmp_path / "in", "x" * 245 + ".nii", "y.nii")
    ran = tiny.medseg("infer", long, short, "-m", "otsu", "-q")
    assert ran.code == 4 and "the name of the result is too long" in ran.err
    assert results(tmp_path / "in") == ["y_seg.nii.gz"]
    monkeypatch.setattr(run_module, "segment", None)  # never reached
    ran = tiny.medseg("infer", long, "-m", "otsu", "-q")
    assert ran.code == 4 and ran.err.count("\n") == 1


# What is done again -------------------------------------------------------------------------------


def test_what_is_there_is_skipped_only_if_it_would_be_the_same(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    scans(folder, "a.nii", "b.nii", "c.nii")
    command = ("infer", folder, "-o", out, "--skip-existing", "--json")

    def done(*more: str) -> tuple[list[str], str]:
        ran = tiny.medseg(*command, *more)
        assert ran.code == 0, ran.err
        return [Path(json.loads(line)["labels"]).name for line in ran.out.splitlines()], ran.err

    every = [f"{name}_seg.nii.gz" for name in "abc"]
    assert done("-m", "otsu")[0] == every
    names, told = done("-m", "otsu")
    assert names == [] and told.count("is there, skipped") == 3
    save(folder / "b.nii", seed=9)
    names, told = done("-m", "otsu")
    assert names == ["b_seg.nii.gz"] and "made again: it was made from another scan" in told
    (out / "c_seg.nii.gz").write_bytes((out / "a_seg.nii.gz").read_bytes())
    names, told = done("-m", "otsu")
    assert (
        names == ["c_seg.nii.gz"]
        and "made again: the record beside the result is not about it" in told
    )
    (out / "a_seg.json").unlink()
    assert done("-m", "otsu")[0] == ["a_seg.nii.gz"]
    assert done("-m", "otsu", "--no-cleanup")[0] == every
    names, told = done("-m", "kmeans")
    assert names == every and told.count("made again: it was made by another model") == 3
    assert done("-m", "kmeans", "--instances")[0] == every
    assert done("-m", "kmeans", "--instances")[0] == []


def test_a_model_trained_further_makes_results_again(tmp_path: Path):
    (scan,) = scans(tmp_path / "in", "a.nii")
    model = tiny.save_known(tmp_path / "model")
    command = ("infer", scan, "-m", model, "--skip-existing", "-q", "--device", "cpu")
    assert tiny.medseg(*command).out != ""
    assert tiny.medseg(*command).out == ""
    assert tiny.medseg(*command, "--precision", "fp32").out == ""
    record = json.loads((tmp_path / "in" / "a_seg.json").read_text())
    record["model"]["weights_sha256"] = "0" * 64
    (tmp_path / "in" / "a_seg.json").write_text(json.dumps(record))
    assert tiny.medseg(*command).out != ""


# What is kept from scan to scan -------------------------------------------------------------------


def test_a_network_is_opened_once_for_many_scans_and_versions_are_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import importlib.metadata

    scans(tmp_path / "in", "a.nii", "b.nii", "c.nii")
    model = tiny.save_known(tmp_path / "model")
    opened: list[str] = []
    anew, version = opening.open_anew, importlib.metadata.version
    monkeypatch.setattr(
        opening, "open_anew", lambda *a, **k: opened.append("network") or anew(*a, **k)
    )
    alone = tiny.medseg(
        "infer", tmp_path / "in" / "b.nii", "-o", tmp_path / "one", "-m", model, "--device", "cpu"
    )
    assert alone.code == 0 and opened == ["network"]
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: opened.append("version") or version(name)
    )
    ran = tiny.medseg(
        "infer", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--device", "cpu"
    )
    assert ran.code == 0, ran.err
    assert opened == ["network", "network"]
    same = [(tmp_path / folder / "b_seg.nii.gz").read_bytes() for folder in ("one", "out")]
    assert same[0] == same[1]


def test_a_network_that_had_to_step_down_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from medseg.inference.backends import pytorch
    from medseg.inference.backends.kept import models_kept_open

    checkpoint = load_checkpoint(str(tiny.save_known(tmp_path / "model")))
    monkeypatch.setattr(pytorch, "_STEPS_DOWN", [0])
    with models_kept_open():
        first = opening.open_models([checkpoint], device="cpu")
        assert opening.open_models([checkpoint], device="cpu") is first
        assert opening.open_models([checkpoint], device="cpu", precision="fp32") is not first
        pytorch._STEPS_DOWN[0] += 1
        assert opening.open_models([checkpoint], device="cpu") is not first
    assert opening.open_models([checkpoint], device="cpu") is not opening.open_models(
        [checkpoint], device="cpu"
    )


# Names --------------------------------------------------------------------------------------------


def test_a_slash_at_the_end_makes_a_folder_whatever_its_name(tmp_path: Path):
    (scan,) = scans(tmp_path / "in", "a.nii")
    ran = tiny.medseg("infer", scan, "-o", f"{tmp_path}/results.png/", "-m", "otsu", "-q")
    assert ran.code == 0, ran.err
    assert results(tmp_path / "results.png") == ["a_seg.nii.gz"]


def test_previews_keep_the_dots_in_their_names(tmp_path: Path):
    scans(tmp_path / "in", "a.v1.nii", "a.v2.nii")
    ran = tiny.medseg("infer", tmp_path / "in", "-m", "otsu", "-q", "--preview", tmp_path / "p")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "a.v1_seg.png",
        "a.v2_seg.png",
    ]


def test_view_finds_what_infer_called_after_a_link_and_without_a_channels_number(tmp_path: Path):
    (target,) = scans(tmp_path / "annex", "MD5E-s1--0.nii")
    for name in ("link.nii", "b_0000.nii"):
        (tmp_path / name).symlink_to(target)
        assert tiny.medseg("infer", tmp_path / name, "-m", "otsu", "-q").code == 0
        ran = tiny.medseg("view", tmp_path / name)
        assert ran.code == 0, ran.err
    assert sorted(path.name for path in tmp_path.glob("*.html")) == [
        "b_0000_view.html",
        "link_view.html",
    ]
    assert results(tmp_path) == ["b_seg.nii.gz", "link_seg.nii.gz"]


def test_a_data_set_is_told_from_a_folder_of_dicom(tmp_path: Path):
    scans(tmp_path / "data" / "imagesTr", "a_0000.nii", "b_0000.nii")
    ran = tiny.medseg("infer", tmp_path / "data", "-m", "otsu", "-q")
    assert ran.code == 3 and ran.out == ""
    assert (
        "2 in imagesTr; give the folder that holds the scans, e.g."
        f" {tmp_path / 'data' / 'imagesTr'}" in ran.err
    )


def test_the_case_of_a_long_name_is_refused_before_any_work(shared_data: Path, tmp_path: Path):
    import shutil

    source = shared_data / "cases" / "files" / "long-name" / "scan.nii.gz"
    for stem in ("x" * 243, "\N{CJK UNIFIED IDEOGRAPH-809D}" * 81):
        folder = tmp_path / str(len(stem))
        folder.mkdir()
        shutil.copy(source, folder / f"{stem}.nii.gz")
        ran = tiny.medseg("infer", folder / f"{stem}.nii.gz", "-m", "otsu", "-q")
        assert ran.code == 4 and ran.out == ""
        assert ran.err.count("\n") == 1
        assert "the name of the result is too long" in ran.err and "-o" in ran.err
        assert len(list(folder.iterdir())) == 1


def test_the_case_of_mixed_results_keeps_the_older_set(shared_data: Path):
    script = shared_data / "cases" / "around" / "mixed-results-after-failed-write" / "reproduce.py"
    ran = tiny.run_child(script)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].startswith("4 ")
    assert "changed: [] unchanged:" in ran.out
