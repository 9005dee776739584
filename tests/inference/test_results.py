"""Results are a set: they appear together or what was there stays, and a record is about the labels
beside it.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid

from making import dicom, networks as tiny
from medseg import files
from medseg.errors import BadOutput, DataWarning
from medseg.inference.existing import why_again
from medseg.inference.jobs import Extras, Job, list_jobs
from medseg.inference.record import read_record
from medseg.inference.results import check_job, describes, result_files
from medseg.inference.run import infer
from medseg.inference.settings import Settings
from medseg.io import read

EVERYTHING = ("a.labels.csv", "a.nii.gz", "a.objects.nii.gz", "a.json", "a.png")


def scan_of(path: Path, seed: int, noise: float = 20) -> Path:
    """Noise with a bright part, so that labels of two seeds differ; much noise makes many
    objects.
    """
    data = np.random.default_rng(seed).normal(100, noise, (24, 22, 20)).astype(np.float32)
    data[(slice(None),) * (seed % 3) + (slice(0, 9),)] += 300
    return tiny.save_nifti(path, data, tiny.affine_of())


def do(scan: Path, folder: Path, **extras: Any) -> Job:
    (job,) = list_jobs([scan], folder / "out" / "a.nii.gz")
    infer(
        job,
        "kmeans",
        Settings(),
        Extras(instances=True, preview=folder / "out" / "a.png", **extras),
    )
    return job


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Together or not at all ---------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", range(12))
@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_write_or_rename_that_fails_leaves_every_file_of_the_older_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, what: str
):
    """At the first, second ... flush or rename; the older set is of another scan."""
    do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    before = content(tmp_path / "out")
    assert set(before) == set(EVERYTHING)
    other = scan_of(tmp_path / "two.nii", 1)
    count = [0]
    function: Callable[..., Any] = os.fsync if what == "fsync" else Path.replace

    def failing(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == fails_at + 1:
            raise OSError(28, "No space left on device")
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files.os if what == "fsync" else Path, what, failing)
        try:
            do(other, tmp_path)
        except BadOutput as error:
            assert "disk is full" in str(error) and ".medseg-" not in str(error)
        else:
            assert count[0] <= fails_at or what == "fsync"  # flushing a folder may fail
            return
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_stop_between_two_renames_brings_the_older_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
):
    do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    before = content(tmp_path / "out")
    other = scan_of(tmp_path / "two.nii", 1)
    replace, count = Path.replace, [0]

    def stopped(path: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path / "out":
            count[0] += 1
            if count[0] == moment:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            do(other, tmp_path)
    assert count[0] >= moment
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("moment", range(1, 6))
def test_after_a_kill_between_two_renames_no_record_is_taken_for_that_of_other_labels(
    tmp_path: Path, moment: int
):
    """SIGKILL cannot be answered; what it leaves is recognised and done again."""
    scans = [scan_of(tmp_path / "one.nii", 0), scan_of(tmp_path / "two.nii", 1)]
    job = do(scans[0], tmp_path)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom medseg.cli.app import main\n"
        "replace, count = Path.replace, [0]\n"
        "def killed(path, target):\n"
        f"    count[0] += Path(target).parent == Path({str(tmp_path / 'out')!r})\n"
        f"    if count[0] == {moment}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(path, target)\n"
        "Path.replace = killed\nmain()"
    )
    ran = tiny.run_child(
        "-c", program, "infer", scans[1], "-m", "kmeans", "-o", tmp_path / "out" / "a.nii.gz",
        "--instances", "-q",
        "--preview", tmp_path / "out" / "a.png",
    )  # fmt: skip
    assert ran.code == -signal.SIGKILL
    record = read_record(tmp_path / "out" / "a.json")
    for scan in scans:
        (again,) = list_jobs([scan], tmp_path / "out" / "a.nii.gz")
        assert not describes(record, again)
        assert why_again(again, "kmeans", Settings(), Extras(instances=True)) != ""
    job = do(scans[1], tmp_path)
    assert describes(read_record(job.beside(".json")), job)


def test_a_disk_that_fills_up_at_the_record_leaves_the_older_set(tmp_path: Path):
    """A limit of file size that only the record exceeds, as on a disk that is full at the end."""
    do(scan_of(tmp_path / "one.nii", 0, noise=150), tmp_path)
    (tmp_path / "out" / "a.png").unlink()
    before = content(tmp_path / "out")
    sizes = {name: len(data) for name, data in before.items()}
    limit = (max(size for name, size in sizes.items() if name != "a.json") + sizes["a.json"]) // 2
    assert sizes["a.json"] > limit * 1.1, sizes
    other = scan_of(tmp_path / "two.nii", 1, noise=150)
    ran = tiny.run_child(
        "-m", "medseg", "infer", other, "-m", "kmeans", "--instances", "-q", "-o",
        tmp_path / "out" / "a.nii.gz",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert ran.code == 4, ran.err
    assert content(tmp_path / "out") == before


def test_folders_made_for_results_that_fail_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full"))
    )
    (job,) = list_jobs([scan_of(tmp_path / "one.nii", 0)], tmp_path / "new" / "deep" / "a.nii.gz")
    with pytest.raises(BadOutput):
        infer(job, "otsu", Settings(), Extras())
    assert [path.name for path in tmp_path.iterdir()] == ["one.nii"]


def test_a_header_and_its_data_file_appear_together(tmp_path: Path):
    for suffix in (".mhd", ".nhdr"):
        (job,) = list_jobs([scan_of(tmp_path / "one.nii", 0)], tmp_path / suffix[1:] / f"a{suffix}")
        infer(job, "otsu", Settings(), Extras())
        assert len(list(job.labels.parent.iterdir())) == 4
        assert describes(read_record(job.beside(".json")), job)


def test_a_link_to_a_result_stays_a_link(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "kept.nii.gz").write_bytes(b"old")
    (tmp_path / "out" / "a.nii.gz").symlink_to(tmp_path / "store" / "kept.nii.gz")
    do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    assert (tmp_path / "out" / "a.nii.gz").is_symlink()
    assert (tmp_path / "store" / "kept.nii.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_what_an_earlier_run_left_beside_new_labels_is_told(tmp_path: Path):
    job = do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    (same,) = list_jobs([scan_of(tmp_path / "two.nii", 1)], job.labels)
    record = infer(same, "kmeans", Settings(), Extras())
    assert record["notes"] == [
        "the file beside the labels that ends in .objects.nii.gz is of an earlier run"
    ]
    assert infer(same, "kmeans", Settings(), Extras(instances=True))["notes"] == []


# The record is about the labels -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii.gz", "a.labels.csv", "a.objects.nii.gz"])
@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_record_beside_files_of_another_run_does_not_describe_them(
    tmp_path: Path, name: str, change: str
):
    job = do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    record = read_record(job.beside(".json"))
    assert describes(record, job)
    path = tmp_path / "out" / name
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes() + b"x")
    assert not describes(record, job)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"format": "medseg-record-1"}', "\0\xff"]
)
def test_what_is_no_record_or_an_old_one_describes_nothing(tmp_path: Path, text: str):
    job = do(scan_of(tmp_path / "one.nii", 0), tmp_path)
    job.beside(".json").write_text(text, encoding="latin-1")
    assert not describes(read_record(job.beside(".json")), job)
    assert why_again(job, "kmeans", Settings(), Extras()) != ""


@pytest.mark.parametrize(
    ("settings", "extras", "reason"),
    [
        ({}, {}, ""),
        ({"batch": 4, "max_memory_bytes": 10**10}, {}, ""),
        ({"device": "cpu"}, {}, ""),
        ({"overlap": 0.25}, {}, "it was made with another overlap"),
        ({"cleanup": False}, {}, "it was made with another cleanup"),
        ({}, {"volume_index": 0}, ""),
        ({}, {"instances": True}, "a.objects.nii.gz is not there"),
    ],
)
def test_a_result_is_made_again_only_for_another_answer(
    tmp_path: Path, settings: dict[str, Any], extras: dict[str, Any], reason: str
):
    (job,) = list_jobs([scan_of(tmp_path / "one.nii", 0)], tmp_path / "a.nii.gz")
    assert why_again(job, "otsu", Settings(), Extras()) == "there is no result"
    infer(job, "otsu", Settings(), Extras())
    assert why_again(job, "otsu", Settings(**settings), Extras(**extras)) == reason
    assert why_again(job, "kmeans", Settings(), Extras()) == "it was made by another model"
    scan_of(tmp_path / "one.nii", 1)
    assert why_again(job, "otsu", Settings(), Extras()) == "it was made from another scan"


# Names that are too long --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "extras", "fits"),
    [
        ("x" * 230, {}, True),
        ("x" * 240, {}, True),
        ("x" * 241, {}, False),
        ("x" * 240, {"instances": True}, False),
        ("\N{CJK UNIFIED IDEOGRAPH-809D}" * 80, {}, True),
        ("\N{CJK UNIFIED IDEOGRAPH-809D}" * 81, {}, False),
        ("\N{LATIN SMALL LETTER O WITH DIAERESIS}" * 119, {"also": ("intracranial-mask",)}, False),
    ],
)
def test_a_name_too_long_for_what_it_becomes_is_refused_before_any_work(
    tmp_path: Path, stem: str, extras: dict[str, Any], fits: bool
):
    scan = tmp_path / f"{stem}.nii"
    scan.write_bytes(b"x")
    (job,) = list_jobs([scan], None)
    longest = max(
        len(os.fsencode(path.name)) for path in result_files(job, Settings(), Extras(**extras))
    )
    assert (longest <= 255) == fits
    if fits:
        check_job(job, Settings(), Extras(**extras))
        return
    with pytest.raises(
        BadOutput, match=r"the name of the result is too long.*give another with -o"
    ):
        check_job(job, Settings(), Extras(**extras))
    (short,) = list_jobs([scan], tmp_path / "short.nii.gz")
    check_job(short, Settings(), Extras(**extras))


@pytest.mark.parametrize("output", ["y" * 300 + ".nii.gz", "y" * 300, "a/" + "y" * 256 + "/b.mha"])
def test_an_output_longer_than_a_file_system_allows_is_refused(tmp_path: Path, output: str):
    scan = tmp_path / "scan.nii"
    scan.write_bytes(b"x")
    (job,) = list_jobs([scan], tmp_path / output)
    with pytest.raises(BadOutput, match="the name of the result is too long"):
        check_job(job, Settings(), Extras())


def test_the_record_holds_a_hash_of_every_file_but_no_name(tmp_path: Path):
    job = do(scan_of(tmp_path / "patient_name.nii", 0), tmp_path)
    record = json.loads(job.beside(".json").read_text())
    assert set(record["files_sha256"]) == {".nii.gz", ".labels.csv", ".objects.nii.gz"}
    assert "patient_name" not in json.dumps(record)


def test_a_repaired_series_gives_results_that_refer_to_it(tmp_path: Path):
    """Slices stored twice: what refers to them names one of each pair."""
    pieces = dicom.series(8, 20, 24)
    copies = copy.deepcopy([pieces[1], pieces[3]])
    for piece in copies:
        piece.SOPInstanceUID = generate_uid()
    series = dicom.save([*pieces, *copies], tmp_path / "series")
    (job,) = list_jobs([series], tmp_path / "labels.dcm")
    record = infer(job, "kmeans", Settings(), Extras(repair=True))
    assert any("2 slices stored twice were dropped" in text for text in record["warnings"])
    with pytest.warns(DataWarning, match="2 slices stored twice were dropped"):
        labels = read(job.labels, source=series, repair=True)
    assert labels.shape == dicom.truth(pieces).shape and len(np.unique(labels.data)) > 1


# What others wrote --------------------------------------------------------------------------------


def test_the_sidecar_of_a_scan_is_not_replaced_by_a_record(tmp_path: Path):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz", 0)
    sidecar = tmp_path / "sub-01_T1w.json"
    sidecar.write_text('{"RepetitionTime": 2.3}', encoding="utf-8")
    job = Job(scan=scan, labels=tmp_path / "sub-01_T1w.seg.nrrd")
    with pytest.raises(BadOutput, match="is no run record of medseg and would be overwritten"):
        check_job(job, Settings(), Extras())
    for text in ('{"format": "medseg-record-1"}', "{", ""):  # ours, of an older version or damaged
        sidecar.write_text(text, encoding="utf-8")
        check_job(job, Settings(), Extras())


def test_an_image_of_the_series_is_not_replaced_by_its_segmentation(tmp_path: Path):
    folder = dicom.save(dicom.series(), tmp_path / "series")
    image = next(path for path in sorted(folder.iterdir()) if path.suffix == ".dcm")
    with pytest.raises(BadOutput, match="is an image of the scan and would be overwritten"):
        check_job(Job(scan=folder, labels=image), Settings(), Extras())
    check_job(Job(scan=folder, labels=folder / "seg.dcm"), Settings(), Extras())
