"""`medseg batch` as a whole: real workers, a tiny network, and what lies in the output."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny
from making.cohort import environment
from making.places import ROOT


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scans of 16^3 and one that is cut off, and a list of them."""
    folder = tmp_path_factory.mktemp("cohort")
    tiny.save_unet(folder / "model")
    rows = ["case,image,site"]
    for number in range(4):
        data = np.random.default_rng(number).normal(100, 20, (16, 16, 16)).astype(np.float32)
        tiny.save_nifti(folder / f"scan{number}.nii.gz", data, tiny.affine_of())
        rows.append(f"c{number},scan{number}.nii.gz,Ulm")
    whole = (folder / "scan0.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    rows += ["cut,cut.nii.gz,Kiel", "gone,gone.nii.gz,Kiel"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def done(scans: Path) -> tiny.Ran:
    """The cohort done by two workers."""
    return batch(scans, "--workers", 2)


def batch(scans: Path, *options: object, out: str = "out") -> tiny.Ran:
    return tiny.medseg(
        "batch", scans / "list.csv", "-o", scans / out, "-m", scans / "model", *options
    )


def of(scans: Path, kind: str, name: str, out: str = "out") -> Path:
    (path,) = (scans / out / kind).glob(f"*/{name}")
    return path


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_failed_is_named_at_the_end_with_a_sentence_each(scans: Path, done: tiny.Ran):
    assert done.code == 3
    lines = done.out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("of 6 cases 4 done, 2 failed")
    assert lines[1].startswith("  cut: failed: the scan: ")
    assert "  gone: failed: the scan: there is no such file" in lines[2]
    assert str(scans) not in "".join(lines[1:])


def test_labels_are_those_of_a_plain_run_to_the_bit(scans: Path, done: tiny.Ran):
    names = [scans / f"scan{number}.nii.gz" for number in range(4)]
    assert tiny.medseg("infer", *names, "-o", scans / "plain/", "-m", scans / "model").code == 0
    for number in range(4):
        ours = of(scans, "cases", f"c{number}/c{number}_seg.nii.gz")
        assert digest(ours) == digest(scans / "plain" / f"scan{number}_seg.nii.gz")


def test_a_record_says_what_was_done_and_measured(scans: Path, done: tiny.Ran):
    record = json.loads(of(scans, "records", "c1.json").read_text())
    assert (record["case"], record["status"], record["attempt"]) == ("c1", "done", 1)
    assert record["files_sha256"][".nii.gz"] == digest(of(scans, "cases", "c1/c1_seg.nii.gz"))
    data = load(scans / "scan1.nii.gz")
    labels = load(of(scans, "cases", "c1/c1_seg.nii.gz"))
    for row in record["structures"]:
        inside = data[labels == row["value"]]
        assert row["voxels"] == inside.size
        assert row["mean"] == pytest.approx(inside.mean(), rel=1e-4)
        assert row["sd"] == pytest.approx(inside.std(), rel=1e-4)
        assert row["median"] == pytest.approx(np.median(inside), rel=1e-4)
    failed = json.loads(of(scans, "records", "cut.json").read_text())
    assert (failed["status"], failed["error_kind"]) == ("failed", "BadFile")
    assert str(scans) not in json.dumps([record, failed])


def test_the_output_holds_what_it_should_and_nothing_half_written(scans: Path, done: tiny.Ran):
    out = scans / "out"
    assert of(scans, "cases", "c0/c0.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "labels.csv").is_file()
    assert json.loads((out / "arithmetic.json").read_text())["device"] == "cpu"
    assert not list(out.rglob(".medseg-*"))
    assert sorted(path.name for path in (out / "records").rglob("*.json")) == [
        "c0.json", "c1.json", "c2.json", "c3.json", "cut.json", "gone.json",
    ]  # fmt: skip
    dry = batch(scans, "--dry-run")
    assert "to do: 0; kept: 4 done, 2 failed" in dry.out


def test_a_dry_run_writes_nothing_and_counts_what_is_missing(scans: Path):
    ran = batch(scans, "--dry-run", out="dry")
    assert ran.code == 0
    assert "to do: 6" in ran.out
    assert "files that are not there: 1" in ran.out
    assert "the largest file, c" in ran.out
    assert " GB in a worker" in ran.out
    assert not (scans / "dry").exists()


def test_a_dry_run_forecasts_what_its_largest_case_is_planned_to_need(scans: Path, done: tiny.Ran):
    largest = json.loads(batch(scans, "--dry-run", "--json", out="dry").out)["largest"]
    sizes = {n: (scans / f"scan{n}.nii.gz").stat().st_size for n in range(4)}
    assert largest["case"] == f"c{max(sizes, key=lambda n: sizes[n])}"
    assert largest["error"] is None
    assert largest["windows"] > 0
    assert 50e6 < largest["memory_bytes"] < 5e9


def test_a_run_says_few_lines_whatever_fails(scans: Path):
    rows = [f"c{n:02},gone{n}.nii.gz" for n in range(60)]
    (scans / "gone.csv").write_text("\n".join(["case,image", *rows]))
    ran = tiny.medseg("batch", scans / "gone.csv", "-o", scans / "gone", "-m", scans / "model")
    assert ran.code == 3
    lines = ran.out.splitlines()
    assert len(lines) <= 20
    assert "48 more" in lines[-1]


def test_a_killed_run_goes_on_where_it_was(scans: Path, done: tiny.Ran):
    """The supervisor is killed in the middle; its worker ends by itself, and nothing is lost."""
    arguments = ("batch", scans / "list.csv", "-o", scans / "killed", "-m", scans / "model")
    command = [sys.executable, "-m", "medseg", *map(str, arguments), "--workers", "1"]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while time.monotonic() < until and not list((scans / "killed").glob("records/*/*.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = batch(scans, "--workers", 1, out="killed")
    assert again.out.splitlines()[0].endswith("of 6 cases 4 done, 2 failed")
    for number in range(4):
        name = f"c{number}/c{number}_seg.nii.gz"
        assert digest(of(scans, "cases", name, "killed")) == digest(of(scans, "cases", name))
    begun = [path.read_text().count('"begun"') for path in (scans / "killed").glob("attempts/*/*")]
    assert len(begun) == 6
    assert sum(begun) <= 7
    assert not list((scans / "killed").rglob(".medseg-*"))


def test_a_disk_that_fills_stops_the_run_at_once_and_the_same_command_goes_on(scans: Path):
    """The system lets no file grow beyond 4 kB, which pictures do and records do not."""
    arguments = ("batch", scans / "list.csv", "-o", scans / "full", "-m", scans / "model")
    command = [sys.executable, "-m", "medseg", *map(str, arguments), "--workers", "1"]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *command],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert limited.returncode == 4
    assert "the disk is full or a size limit is reached" in limited.stderr
    assert len(list((scans / "full").glob("attempts/*/*"))) == 1
    assert not list((scans / "full").glob("records/*/*.json"))
    assert not list((scans / "full").rglob(".medseg-*"))
    again = batch(scans, "--workers", 1, out="full")
    assert again.out.splitlines()[0].endswith("of 6 cases 4 done, 2 failed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shard", "3/3"), "numbered from 0 to 2"),
        (("--shard", "auto"), "no task of a SLURM array"),
        (("--retry", "some"), "not one of"),
        (("--max-failed", "x"), "a number of cases such as 20"),
        (("--workers", "0"), "not a number from 1"),
        (("--case-time", "soon"), "is not a time"),
        (("--filter", "ses=1"), "leave out --suffix, --filter"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_done(scans: Path, options, words):
    ran = batch(scans, *options, out="refused")
    assert ran.code not in (0, 3)
    assert words in ran.err
    assert not (scans / "refused").exists()
