"""What `medseg infer` writes, where, and that a failure or a stop leaves nothing new behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny
from making.strategies import rotation
from medseg import files
from medseg.errors import BadConfig, BadFile, BadModel, BadOutput
from medseg.inference.jobs import Extras, list_jobs
from medseg.inference.run import infer
from medseg.inference.settings import Settings
from medseg.io import WRITERS, read, read_labels, write
from medseg.labels import LabelTable
from medseg.models.folder import load_checkpoint

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")

EXACT = Settings(device="cpu", precision="fp32")
OBLIQUE = tiny.affine_of((2.0, 1.5, 2.5), (-17.25, 8.5, 31.0))
OBLIQUE[:3, :3] = (rotation((1, 0.05, -0.1, 0.02)) @ OBLIQUE[:3, :3]).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_checkpoint(str(tiny.save_known(tmp_path_factory.mktemp("model") / "known")))


#: DICOM results need a DICOM scan; they are tested in tests/io/test_dicom_out.py.
SUFFIXES = [suffix for suffix in WRITERS if not suffix.endswith(".dcm")]


def run(scan: Path, output: Path | None, model: Any, **extras: Any) -> dict[str, Any]:
    (job,) = list_jobs([scan], output)
    return infer(job, model, EXACT, Extras(**extras))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_without_an_output_the_results_lie_beside_the_scan(tmp_path: Path, model: Any):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    run(scan, None, model)
    assert names(tmp_path) == [
        "scan.nii.gz",
        "scan_seg.json",
        "scan_seg.labels.csv",
        "scan_seg.nii.gz",
    ]
    assert LabelTable.read(tmp_path / "scan_seg.labels.csv") == tiny.TABLE


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gets_the_scans_grid_and_the_same_labels(
    tmp_path: Path, model: Any, suffix: str
):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz", OBLIQUE)
    run(scan, tmp_path / "reference.nii.gz", model)
    output = tmp_path / "out" / f"result{suffix}"
    run(scan, output, model)
    source, expected = read(scan), read_labels(tmp_path / "reference.nii.gz")
    result = read_labels(output)
    assert result.shape == source.shape
    # MGH stores directions and centre as float32.
    tolerance = 1e-4 if suffix in (".mgh", ".mgz") else 1e-9
    assert np.allclose(result.affine, source.affine, rtol=0, atol=tolerance)
    assert np.array_equal(result.data, expected.data)
    assert np.array_equal(expected.affine, source.affine)
    assert (tmp_path / "out" / "result.labels.csv").is_file()
    assert (tmp_path / "out" / "result.json").is_file()


def test_nifti_results_have_the_affine_of_the_scan_as_nibabel_reads_it(tmp_path: Path, model: Any):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz", OBLIQUE)
    run(scan, None, model)
    ours, theirs = tiny.volume_of(tmp_path / "scan_seg.nii.gz"), tiny.volume_of(scan)
    assert ours.shape == theirs.shape
    assert np.array_equal(ours.affine, theirs.affine)


def test_the_record_says_what_was_done(tmp_path: Path, model: Any):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz", tiny.affine_of((2.0, 1.5, 2.5)))
    returned = run(scan, None, model)
    record = json.loads((tmp_path / "scan_seg.json").read_text())
    assert record == json.loads(json.dumps(returned))
    assert record["format"] == "medseg-record-1"
    assert record["model"] == {"name": "known", "weights_sha256": model.spec.sha256}
    assert record["input"]["shape"] == [20, 22, 18]
    assert record["input"]["spacing_mm"] == [2.0, 1.5, 2.5]
    assert record["input"]["orientation"] == "RAS"
    assert record["input"]["dtype"] == "float32"
    assert re.fullmatch("[0-9a-f]{64}", record["input"]["voxels_sha256"])
    assert record["settings"].items() >= {
        "device": "cpu", "precision": "float32", "overlap": 0.5, "cleanup": True,
        "backend": "torch", "tta": False,
    }.items()  # fmt: skip
    assert 10_000_000 < record["forecast_memory_bytes"] < 10_000_000_000
    assert record["warnings"] == []
    assert record["versions"].keys() >= {"medseg", "python", "numpy", "torch"}
    assert record["seconds"].keys() >= {"read", "network", "write"}
    assert record["peak_memory_bytes"] > 10_000_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["finished"])
    labels = tiny.volume_of(tmp_path / "scan_seg.nii.gz").data
    for row in record["structures"]:
        voxels = int((labels == row["value"]).sum())
        assert row["voxels"] == voxels
        assert row["ml"] == pytest.approx(voxels * 2.0 * 1.5 * 2.5 / 1000, abs=1e-3)
    assert {row["name"] for row in record["structures"]} == {"left body", "right body"}


def test_voxels_that_are_no_numbers_are_told_in_the_record_without_the_files_name(
    tmp_path: Path, model: Any
):
    image = tiny.phantom()
    image[0, 0, :3] = np.nan
    scan = tiny.save_nifti(tmp_path / "patient_name.nii.gz", image, tiny.affine_of())
    record = run(scan, None, model)
    assert len(record["warnings"]) == 1
    assert record["warnings"][0].startswith("the scan: 3 of ")
    assert "patient_name" not in json.dumps(record)


SENTINELS = (
    "FOLDERNAME",
    "FILENAME",
    "DESCRIPTION",
    "AUXFILE",
    "DBNAME",
    "INTENT",
    "EXTENSION",
    "MODELFOLDER",
)


def unpacked(path: Path) -> bytes:
    """The bytes of a file and all that can be unpacked from it."""
    content = path.read_bytes()
    found = [content]
    if content[:2] == b"\x1f\x8b":
        found.append(gzip.decompress(content))
    for start in (content.find(b"\n\n"), content.find(b"IDAT")):  # NRRD data; a picture's pixels
        for skip in (2, 4):
            try:
                found.append(zlib.decompressobj(47).decompress(content[start + skip :]))
            except zlib.error:
                continue
    return b"\0".join(found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_name_and_nothing_of_the_header_gets_into_any_output(tmp_path: Path, suffix: str):
    """Planted in folder and file names and in every text of the header; searched in every byte
    written.
    """
    folder = tmp_path / "FOLDERNAME"
    folder.mkdir()
    image = nib.Nifti1Image(tiny.phantom(), OBLIQUE)
    for key, text in (
        ("descrip", "DESCRIPTION"),
        ("aux_file", "AUXFILE"),
        ("db_name", "DBNAME"),
        ("intent_name", "INTENT"),
    ):
        image.header[key] = text
    image.header.set_xyzt_units("mm")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"EXTENSION of a patient"))
    image.dataobj[0, 0, 0] = np.nan  # so that there is a warning, which could name the file
    nib.save(image, folder / "FILENAME.nii.gz")
    model = tiny.save_known(tmp_path / "MODELFOLDER")
    output = tmp_path / "out" / f"result{suffix}"
    ran = tiny.medseg(
        "infer", folder / "FILENAME.nii.gz", "-o", output, "-m", model, "--instances", "--preview",
        tmp_path / "out" / "picture.png", "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    written = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(written) >= 5
    user = os.environ.get("USER") or "root"
    for path in written:
        content = unpacked(path)
        for word in (*SENTINELS, str(tmp_path), str(Path.home()), f"/{user}/"):
            assert word.encode() not in content, (path.name, word)


def test_a_folder_of_scans_gives_a_folder_of_results_and_skips_earlier_ones(
    tmp_path: Path, model: Any
):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a.nii.gz", "b.nii", "c.mha"):
        if name.endswith("mha"):
            write(read(scans / "a.nii.gz"), scans / name)
        else:
            tiny.save_scan(scans / name)
    (scans / "notes.txt").write_text("no scan")
    (scans / "sub").mkdir()
    jobs = list_jobs([scans], None)
    assert [job.scan.name for job in jobs] == ["a.nii.gz", "b.nii", "c.mha"]
    assert [job.labels for job in jobs] == [scans / f"{name}_seg.nii.gz" for name in "abc"]
    for job in jobs:
        infer(job, model, EXACT, Extras(instances=True))
    assert [job.scan for job in list_jobs([scans], None)] == [job.scan for job in jobs]
    out = list_jobs([scans], tmp_path / "labels")
    assert [job.labels for job in out] == [
        tmp_path / "labels" / f"{name}_seg.nii.gz" for name in "abc"
    ]


def test_scans_that_would_share_a_result_are_refused(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        tiny.save_scan(tmp_path / folder / "scan.nii.gz")
    tiny.save_scan(tmp_path / "one" / "scan.nii")
    with pytest.raises(BadConfig, match="two scans would both be written"):
        list_jobs([tmp_path / "one"], None)
    with pytest.raises(BadConfig, match="two scans would both be written"):
        list_jobs([tmp_path / "one"], tmp_path / "out")
    with pytest.raises(BadConfig, match="one file"):
        list_jobs(
            [tmp_path / "one" / "scan.nii", tmp_path / "two" / "scan.nii.gz"],
            tmp_path / "out.nii.gz",
        )
    assert (
        len(list_jobs([tmp_path / "one" / "scan.nii", tmp_path / "two" / "scan.nii.gz"], None)) == 2
    )


def test_a_result_never_overwrites_the_scan_it_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.nii.gz").symlink_to(scan)
    for given, output in (
        (scan, scan),
        (Path("scan.nii.gz"), scan),
        (scan, Path("scan.nii.gz")),
        (scan, Path("./x/../scan.nii.gz")),
        (scan, Path("link.nii.gz")),
        (Path("link.nii.gz"), scan),
    ):
        with pytest.raises(BadConfig, match="overwritten"):
            list_jobs([given], output)


@pytest.mark.parametrize("name", ["out.png", "out.nii.bz2", "out.txt"])
def test_a_suffix_that_cannot_be_written_is_refused(tmp_path: Path, name: str):
    with pytest.raises(BadOutput, match="does not write this format"):
        list_jobs([tiny.save_scan(tmp_path / "scan.nii.gz")], tmp_path / name)


def test_a_scan_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(BadFile, match="no such file"):
        list_jobs([tmp_path / "nothing.nii.gz"], None)


def test_objects_are_numbered_and_described_in_mm(tmp_path: Path, model: Any):
    image = np.random.default_rng(0).normal(0, 2, (24, 24, 24)).astype(np.float32)
    image[3:7, 3:8, 3:9] += 1000
    image[15:20, 15:18, 15:17] += 1000
    image[15:18, 3:6, 3:6] += 500
    scan = tiny.save_nifti(
        tmp_path / "scan.nii.gz", image, tiny.affine_of((2.0, 2.0, 2.0), (100.0, -50.0, 10.0))
    )
    record = run(scan, None, model, instances=True)
    labels = tiny.volume_of(tmp_path / "scan_seg.nii.gz").data
    objects = tiny.volume_of(tmp_path / "scan_seg.objects.nii.gz").data
    assert len(record["objects"]) == 3
    assert [row["label"] for row in record["objects"]] == [2, 41, 41]
    for row in record["objects"]:
        where = objects == row["object"]
        assert set(np.unique(labels[where])) == {row["label"]}
        assert row["voxels"] == where.sum()
        assert row["ml"] == pytest.approx(where.sum() * 8 / 1000)
    assert np.array_equal(objects > 0, labels > 0)
    by_size = {row["voxels"]: row["box_mm"] for row in record["objects"]}
    assert by_size[4 * 5 * 6] == [[105, -45, 15], [113, -35, 27]]
    assert by_size[5 * 3 * 2] == [[129, -21, 39], [139, -15, 43]]
    assert by_size[27] == [[129, -45, 15], [135, -39, 21]]


def test_a_model_that_gives_no_numbers_leaves_nothing(tmp_path: Path):
    broken = load_checkpoint(str(tiny.save_known(tmp_path / "m", "not_a_number")))
    (tmp_path / "scans").mkdir()
    scan = tiny.save_scan(tmp_path / "scans" / "scan.nii.gz")
    with pytest.raises(BadModel, match="not finite"):
        run(scan, tmp_path / "out" / "r.nii.gz", broken)
    assert names(tmp_path / "scans") == ["scan.nii.gz"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails_at", range(5))
def test_a_write_that_fails_leaves_no_new_file_and_keeps_old_ones(
    tmp_path, model, monkeypatch, fails_at: int
):
    """The disk fills up at the first, second ... of the five files that belong to a result."""
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    (tmp_path / "scan_seg.labels.csv").write_text("of an earlier run")
    before = names(tmp_path)
    count, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113 - a file, not a folder
            count[0] += 1
            if count[0] == fails_at + 1:
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(BadOutput, match="disk is full"):
        run(scan, None, model, instances=True, preview=tmp_path / "picture.png")
    assert count[0] == fails_at + 1
    assert names(tmp_path) == before
    assert (tmp_path / "scan_seg.labels.csv").read_text() == "of an earlier run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", ["network", "first write", "second write", "third write", "last write"]
)
def test_a_stop_at_any_moment_exits_with_the_signals_code_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    model = tiny.save_known(tmp_path / "model")
    before = names(tmp_path)
    if moment == "network":
        forward = tiny.Nearest.forward

        def stopped(self: tiny.Nearest, x: Any) -> Any:
            os.kill(os.getpid(), number)
            return forward(self, x)

        monkeypatch.setattr(tiny.Nearest, "forward", stopped)
    else:
        left = [["first write", "second write", "third write", "last write"].index(moment)]
        fsync = os.fsync

        def stop(descriptor: int) -> None:
            if os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113
                if left[0] == 0:
                    os.kill(os.getpid(), number)
                left[0] -= 1
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", stop)
    ran = tiny.medseg(
        "infer", scan, "-m", model, "--preview", tmp_path / "p.png", "--device", "cpu", "--quiet"
    )
    assert ran.code == 128 + number
    assert ran.out == ""
    assert ran.err.splitlines() == ["medseg: stopped; nothing was left half-written"]
    assert names(tmp_path) == before


def test_a_stopped_process_ends_by_itself_and_leaves_nothing(tmp_path: Path):
    """A real process, and a network that never ends."""
    tiny.save_scan(tmp_path / "scan.nii.gz")
    tiny.save_known(tmp_path / "model")
    program = (
        "import sys, time, pathlib; from making import networks as tiny; from medseg.networks.zoo"
        " import NETWORKS\ndef slow(self, x):\n    pathlib.Path(folder + '/begun').touch();"
        " time.sleep(60)\ntiny.Nearest.forward = slow; NETWORKS.update(tiny.KNOWN)\nfolder ="
        " sys.argv[1]\nsys.argv = ['medseg', 'infer', folder + '/scan.nii.gz', '-m', folder +"
        " '/model', '-q']\nfrom medseg.cli.app import main; main()"
    )
    with tiny.start("-c", program, tmp_path) as child:
        try:
            end = time.monotonic() + 60
            while not (tmp_path / "begun").exists():
                assert child.poll() is None, child.communicate()[1]
                assert time.monotonic() < end
                time.sleep(0.02)
            child.send_signal(signal.SIGTERM)
            out, err = child.communicate(timeout=5)
        finally:
            child.kill()
    assert (child.returncode, out) == (143, "")
    assert err.splitlines() == ["medseg: stopped; nothing was left half-written"]
    assert names(tmp_path) == [
        "begun",
        "labels.csv",
        "model",
        "model.json",
        "model.safetensors",
        "scan.nii.gz",
    ]


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_checkpoint(str(tiny.save_two_channels(tmp_path_factory.mktemp("model") / "two")))


NAMES = ("T1", "FLAIR")


def save_case(folder: Path, names: tuple[str, str], seed: int = 0) -> np.ndarray:
    """Two scans of one grid in files of these names; returns the labels a model of two channels
    gives them.
    """
    folder.mkdir(exist_ok=True)
    shape = (18, 20, 16)
    bright = [tiny.ellipsoid(shape, centre, (5, 4, 4)) for centre in ((7, 8, 7), (10, 11, 8))]
    noise = np.random.default_rng(seed).normal(0, 4, (2, *shape))
    for name, one, n in zip(names, bright, noise):
        tiny.save_nifti(folder / name, (1000.0 * one + n).astype(np.float32), tiny.affine_of())
    return np.where(bright[1], 41, np.where(bright[0], 2, 0))


def test_channels_named_one_by_one_are_read_in_their_order(tmp_path: Path, two_channels: Any):
    expected = save_case(tmp_path, ("a.nii.gz", "b.nii.gz"))
    (job,) = list_jobs([tmp_path / "a.nii.gz"], None, names=NAMES, channels=[tmp_path / "b.nii.gz"])
    record = infer(job, two_channels, EXACT, Extras())
    assert names(tmp_path) == [
        "a.nii.gz",
        "a_seg.json",
        "a_seg.labels.csv",
        "a_seg.nii.gz",
        "b.nii.gz",
    ]
    assert np.array_equal(tiny.volume_of(tmp_path / "a_seg.nii.gz").data, expected)
    assert [one["channel"] for one in record["inputs"]] == ["T1", "FLAIR"]
    assert len({one["voxels_sha256"] for one in record["inputs"]}) == 2
    first = dict(record["inputs"][0])
    assert first.pop("channel") == "T1"
    assert record["input"] == first
    assert "a.nii.gz" not in json.dumps(record)


def test_warnings_about_a_further_channel_do_not_name_its_file(tmp_path: Path, two_channels: Any):
    save_case(tmp_path, ("a.nii.gz", "jane_doe.nii.gz"))
    image = tiny.volume_of(tmp_path / "jane_doe.nii.gz").data.copy()
    image[0, 0, 0] = np.nan
    tiny.save_nifti(tmp_path / "jane_doe.nii.gz", image, tiny.affine_of())
    (job,) = list_jobs(
        [tmp_path / "a.nii.gz"], None, names=NAMES, channels=[tmp_path / "jane_doe.nii.gz"]
    )
    record = infer(job, two_channels, EXACT, Extras())
    assert record["warnings"][0].startswith("channel 2: 1 of ")
    assert "jane_doe" not in json.dumps(record)


@pytest.mark.parametrize("given", ["folder", "first", "second", "all"])
def test_files_called_case_0000_and_so_on_are_the_channels_of_one_case(
    tmp_path: Path, two_channels: Any, given: str
):
    scans = tmp_path / "imagesTs"
    cases = ["BRATS_001", "BRATS_002"] if given in ("folder", "all") else ["BRATS_002"]
    expected = [
        save_case(scans, (f"{case}_0000.nii.gz", f"{case}_0001.nii.gz"), n)
        for n, case in enumerate(cases)
    ]
    inputs = {
        "folder": [scans],
        "first": [scans / "BRATS_002_0000.nii.gz"],
        "second": [scans / "BRATS_002_0001.nii.gz"],
        "all": sorted(scans.iterdir()),
    }[given]
    found = list_jobs(inputs, tmp_path / "out", names=NAMES)
    assert [job.labels.name for job in found] == [f"{case}_seg.nii.gz" for case in cases]
    for job, labels in zip(found, expected):
        infer(job, two_channels, EXACT, Extras())
        assert np.array_equal(tiny.volume_of(job.labels).data, labels)
    # For a model of one channel these are scans of their own.
    assert len(list_jobs(inputs, tmp_path / "out")) == len(
        inputs if given != "folder" else expected * 2
    )


def test_a_case_that_lacks_a_channel_or_has_one_too_many_is_refused(tmp_path: Path):
    save_case(tmp_path, ("a_0000.nii.gz", "a_0001.nii.gz"))
    with pytest.raises(BadFile, match=r"takes 3 channels and a_0002 \(T2\) is not there"):
        list_jobs([tmp_path], None, names=(*NAMES, "T2"))
    tiny.save_scan(tmp_path / "a_0002.nii.gz")
    with pytest.raises(BadFile, match=r"takes 2 channels only: a_0000 \(T1\), a_0001 \(FLAIR\)"):
        list_jobs([tmp_path], None, names=NAMES)
    tiny.save_scan(tmp_path / "a_0001.nii")
    with pytest.raises(BadFile, match="same channel of the same case"):
        list_jobs([tmp_path], None, names=(*NAMES, "T2"))


def test_the_volumes_of_one_file_are_the_channels_where_there_are_as_many(
    tmp_path: Path, two_channels: Any, model: Any
):
    expected = save_case(tmp_path / "parts", ("a.nii.gz", "b.nii.gz"))
    both = [tiny.volume_of(tmp_path / "parts" / name).data for name in ("a.nii.gz", "b.nii.gz")]
    scan = tiny.save_nifti(tmp_path / "both.nii.gz", np.stack(both, -1), tiny.affine_of())
    (job,) = list_jobs([scan], None, names=NAMES)
    record = infer(job, two_channels, EXACT, Extras())
    assert np.array_equal(tiny.volume_of(job.labels).data, expected)
    assert len(record["inputs"]) == 2
    with pytest.raises(BadFile, match="holds 2 volumes; choose one with --volume"):
        run(scan, tmp_path / "one.nii.gz", model)
    tiny.save_nifti(scan, np.stack([*both, both[0]], -1), tiny.affine_of())
    with pytest.raises(
        BadConfig, match=r"holds 3 volumes, and the model takes 2 channels \(T1, FLAIR\)"
    ):
        infer(job, two_channels, EXACT, Extras())


def test_slices_that_are_numbered_alike_are_no_channels(tmp_path: Path):
    for n in (1, 2, 3):
        (tmp_path / f"IM_{n:04d}.dcm").write_bytes(b"\0" * 128 + b"DICM")
    first = tmp_path / "IM_0001.dcm"
    assert [job.files for job in list_jobs([tmp_path], None, names=NAMES)] == [(tmp_path,)]
    assert [job.files for job in list_jobs([first], tmp_path / "out", names=NAMES)] == [(first,)]


def test_channels_are_of_one_scan_and_are_there_and_are_not_overwritten(tmp_path: Path):
    save_case(tmp_path, ("a.nii.gz", "b.nii.gz"))
    a, b = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    with pytest.raises(BadConfig, match="--channel adds to one scan, and 2 are given"):
        list_jobs([a, b], None, names=NAMES, channels=[b])
    with pytest.raises(BadFile, match="no such file"):
        list_jobs([a], None, names=NAMES, channels=[tmp_path / "c.nii.gz"])
    with pytest.raises(BadConfig, match="overwritten"):
        list_jobs([a], b, names=NAMES, channels=[b])


def test_the_command_takes_channels_and_says_which_are_missing(tmp_path: Path):
    expected = save_case(tmp_path, ("a.nii.gz", "b.nii.gz"))
    model = tiny.save_two_channels(tmp_path / "run" / "model").parent
    command = ("infer", tmp_path / "a.nii.gz", "-m", model, "--device", "cpu")
    ran = tiny.medseg(*command, "--channel", tmp_path / "b.nii.gz")
    assert ran.code == 0, ran.err
    assert "2 channels of 18 x 20 x 16 voxels" in ran.err
    assert np.array_equal(tiny.volume_of(tmp_path / "a_seg.nii.gz").data, expected)
    ran = tiny.medseg(*command)
    assert (ran.code, ran.out) == (5, "")
    assert "takes 2 scans (T1, FLAIR) in this order and 1 is given; see --channel" in ran.err
    ran = tiny.medseg(
        "infer", tmp_path / "a.nii.gz", "-m", "otsu", "--channel", tmp_path / "b.nii.gz"
    )
    assert ran.code == 5
    assert "otsu takes 1 scan and 2 are given" in ran.err
