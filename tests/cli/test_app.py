"""The command line: what is printed where, exit codes, one line for each thing that can go wrong,
no network.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medseg
from making import configs, networks as tiny
from medseg.errors import BadConfig, BadFile, BadGeometry, BadModel, BadOutput, NotEnoughMemory
from medseg.io import embedded_table, read_labels, write
from medseg.labels import Label, LabelTable
from medseg.view.picture import png_bytes
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    return tiny.save_scan(tmp_path / "scans" / "scan.nii.gz")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_known(tmp_path / "model")


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_exit_codes_are_those_documented():
    documented = {
        BadFile: 3,
        BadGeometry: 3,
        BadOutput: 4,
        BadConfig: 5,
        BadModel: 6,
        NotEnoughMemory: 7,
    }
    assert {kind: kind.exit_code for kind in documented} == documented
    text_of_module = import_module("medseg.cli.app").__doc__ or ""
    for text in (
        "2 wrong usage",
        "3 bad input file",
        "4 output cannot be written",
        "5 bad settings",
        "6 bad model",
    ):
        assert text in " ".join(text_of_module.split())


def test_infer_prints_a_table_of_structures_and_volumes(scan: Path, model: Path):
    ran = tiny.medseg("infer", scan, "-m", model, "--device", "cpu")
    assert ran.code == 0, ran.err
    record = json.loads((scan.parent / "scan_seg.json").read_text())
    for row in record["structures"]:
        (line,) = [line for line in ran.out.splitlines() if row["name"] in line]
        assert line.split() == [str(row["value"]), *row["name"].split(), f"{row['ml']:.2f}"]
    assert "scan_seg.nii.gz" in ran.out.splitlines()[0]


def test_before_it_runs_infer_says_what_it_will_do_and_how_much_memory_it_needs(
    scan: Path, model: Path
):
    ran = tiny.medseg("infer", scan, "-m", model, "--device", "cpu")
    (line,) = [line for line in ran.err.splitlines() if "of memory" in line]
    for part in (
        "20 x 22 x 18 voxels of 2 x 2 x 2 mm",
        "RAS",
        "model known",
        "8 windows on cpu",
        "GB",
    ):
        assert part in line


def test_json_is_all_there_is_on_stdout(scan: Path, model: Path):
    ran = tiny.medseg("infer", scan, "-m", model, "--device", "cpu", "--json")
    printed = json.loads(ran.out)
    record = json.loads((scan.parent / "scan_seg.json").read_text())
    assert printed == {"labels": str(scan.parent / "scan_seg.nii.gz")} | record
    assert ran.out.count("\n") == 1


def test_quiet_prints_the_result_only_but_keeps_warnings(tmp_path: Path, scan: Path, model: Path):
    ran = tiny.medseg("infer", scan, "-m", model, "--device", "cpu", "--quiet")
    assert ran.err == ""
    assert "left body" in ran.out
    image = tiny.phantom()
    image[0, 0, 0] = np.nan
    odd = tiny.save_nifti(tmp_path / "odd.nii.gz", image, tiny.affine_of())
    ran = tiny.medseg("infer", odd, "-m", model, "--device", "cpu", "--quiet", "--json")
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith(f"warning: {odd}: the scan: 1 of ")
    assert json.loads(ran.out)["warnings"]


def test_several_scans_give_one_json_line_each_and_a_failure_does_not_stop_the_rest(
    tmp_path, scan, model
):
    (scan.parent / "broken.nii.gz").write_bytes(b"no scan")
    tiny.save_scan(scan.parent / "third.nii", seed=2)
    out = tmp_path / "labels"
    ran = tiny.medseg(
        "infer", scan.parent, "-o", out, "-m", model, "--device", "cpu", "-q", "--json"
    )
    assert ran.code == 3
    assert [Path(json.loads(line)["labels"]).name for line in ran.out.splitlines()] == [
        "scan_seg.nii.gz",
        "third_seg.nii.gz",
    ]
    first, *last = ran.err.splitlines()
    assert first.startswith("medseg: ") and "broken.nii.gz" in first
    assert last == ["medseg: 1 of 3 scans failed:", f"  {scan.parent / 'broken.nii.gz'}"]
    assert not list(out.glob("broken*"))


def test_skip_existing_leaves_results_as_they_are(tmp_path: Path, scan: Path, model: Path):
    out = tmp_path / "labels"
    tiny.save_scan(scan.parent / "other.nii.gz", seed=3)
    arguments = (
        "infer",
        scan.parent,
        "-o",
        out,
        "-m",
        model,
        "--device",
        "cpu",
        "--skip-existing",
        "--json",
    )
    assert tiny.medseg("infer", scan, "-o", out, "-m", model, "-q").code == 0
    before = everything(out)
    ran = tiny.medseg(*arguments)
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 1
    assert "skipped" in ran.err
    after = everything(out)
    assert {key: after[key] for key in before} == before
    assert after.keys() == {
        f"{name}_seg.{end}"
        for name in ("scan", "other")
        for end in ("nii.gz", "json", "labels.csv")
    }
    assert tiny.medseg(*arguments, "-q").out == ""


def test_previews_of_several_scans_go_into_a_folder(tmp_path: Path, scan: Path):
    tiny.save_scan(scan.parent / "other.nii.gz", seed=3)
    ran = tiny.medseg(
        "infer", scan.parent, "-o", tmp_path / "l", "-m", "otsu", "-q", "--preview", tmp_path / "p"
    )
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "other_seg.png",
        "scan_seg.png",
    ]


@pytest.mark.parametrize("name", ["otsu", "kmeans", "gmm"])
def test_models_by_intensity_run_through_the_same_command(scan: Path, name: str):
    ran = tiny.medseg("infer", scan, "-m", name, "--json", "-q")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["model"] == {"name": name}
    labels = tiny.volume_of(scan.parent / "scan_seg.nii.gz")
    truth = tiny.volume_of(scan)
    assert np.array_equal(labels.affine, truth.affine)
    assert np.array_equal(labels.data > 0, truth.data > 250) or name == "gmm" or name == "kmeans"
    assert [row["voxels"] for row in record["structures"]] == [
        int((labels.data == row["value"]).sum()) for row in record["structures"]
    ]
    assert (scan.parent / "scan_seg.labels.csv").is_file()


def test_no_cleanup_and_overlap_reach_the_record(scan: Path, model: Path):
    ran = tiny.medseg(
        "infer", scan, "-m", model, "--no-cleanup", "--overlap", "0.25", "--precision", "fp32",
        "--device", "cpu",
        "--json", "-q",
    )  # fmt: skip
    assert json.loads(ran.out)["settings"].items() >= {
        "device": "cpu", "precision": "float32", "overlap": 0.25, "cleanup": False,
    }.items()  # fmt: skip


def gz_of(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = tiny.save_scan(folder / "x.nii.gz")
    path.write_bytes(change(path.read_bytes()))
    return path


def wrong_crc(content: bytes) -> bytes:
    return (
        content[:-8] + struct.pack("<I", struct.unpack("<I", content[-8:-4])[0] ^ 1) + content[-4:]
    )


def make(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def colour(folder: Path) -> Path:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), kind), np.eye(4)), folder / "x.nii.gz")
    return folder / "x.nii.gz"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BAD_INPUTS: dict[str, Callable[[Path], Path]] = {
    "missing file": lambda f: f / "nothing.nii.gz",
    "text as .nii.gz": lambda f: make(f / "x.nii.gz", b"This is a letter, not a scan.\n" * 50),
    "gzipped text": lambda f: make(f / "x.nii.gz", gzip.compress(b"This is a letter.\n" * 50)),
    "empty file": lambda f: make(f / "x.nii.gz", b""),
    "truncated gz": lambda f: gz_of(f, lambda content: content[: len(content) // 2]),
    "gz without its end": lambda f: gz_of(f, lambda content: content[:-3]),
    "wrong CRC": lambda f: gz_of(f, wrong_crc),
    "empty folder": empty,
    "2-D picture": lambda f: make(f / "x.png", png_bytes(np.zeros((9, 9, 3), np.uint8))),
    "2-D NIfTI": lambda f: tiny.save_nifti(f / "x.nii.gz", np.zeros((30, 30), np.float32),
    np.eye(4)),
    "label map": lambda f: tiny.save_nifti(f / "x.nii.gz", tiny.head((30, 32, 28)),
    tiny.affine_of()),
    "colour": colour,
    "one intensity": lambda f: tiny.save_nifti(f / "x.nii.gz", np.zeros((9, 9, 9), np.float32),
    tiny.affine_of()),
    "nothing but NaN": lambda f: tiny.save_nifti(f / "x.nii.gz", np.full((9, 9, 9), np.nan, "f4"),
    tiny.affine_of()),
    "several volumes": lambda f: tiny.save_nifti(f / "x.nii.gz", np.zeros((5, 5, 5, 3), np.int16),
    tiny.affine_of()),
    "unknown kind": lambda f: make(f / "x.docx", b"PK\3\4 words"),
    "one DICOM file": lambda f: make(f / "x", bytes(128) + b"DICM" + bytes(50)),
}  # fmt: skip


def assert_refused(ran: tiny.Ran, code: int, *words: str) -> None:
    """One line on stderr that begins with medseg:, nothing on stdout, and the documented exit
    code.
    """
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("medseg: ")
    for word in words:
        assert word in ran.err


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_bad_input_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, model: Path, kind: str
):
    folder = tmp_path / "in"
    folder.mkdir()
    path = BAD_INPUTS[kind](folder)
    before = everything(tmp_path)
    for output in (("-o", tmp_path / "out"), ()):
        ran = tiny.medseg("infer", path, "-m", model, "--device", "cpu", "-q", *output)
        assert_refused(ran, 3, path.name)
    assert everything(tmp_path) == before
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_an_unknown_or_damaged_model_is_refused_in_one_line(
    tmp_path: Path, scan: Path, model: Path
):
    before = everything(scan.parent)
    assert_refused(tiny.medseg("infer", scan, "-m", "nothing", "-q"), 6, "nothing", "no model")
    (model / "model.safetensors").write_bytes(b"broken")
    assert_refused(tiny.medseg("infer", scan, "-m", model, "-q", "--device", "cpu"), 6, "weights")
    (model / "model.json").write_text("{")
    assert_refused(tiny.medseg("infer", scan, "-m", model, "-q"), 6, "model.json")
    endless = tiny.save_known(tmp_path / "endless", "not_a_number")
    assert_refused(
        tiny.medseg("infer", scan, "-m", endless, "-q", "--device", "cpu"), 6, "not finite"
    )
    assert everything(scan.parent) == before


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, scan: Path, monkeypatch
):
    monkeypatch.setattr("medseg.inference.run.infer", None)  # never reached
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x.nii.gz", tmp_path / "file" / "deep" / "x.nrrd"):
        assert_refused(
            tiny.medseg("infer", scan, "-o", output, "-m", "otsu", "-q"), 4, "cannot be written"
        )
    assert_refused(
        tiny.medseg("infer", scan, "-o", tmp_path / "x.jpeg", "-m", "otsu", "-q"), 4, "format"
    )
    assert_refused(
        tiny.medseg("infer", scan, "--preview", tmp_path / "x.gif", "-m", "otsu", "-q"), 4, ".png"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_folder_is_refused(tmp_path: Path, scan: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    ran = tiny.medseg("infer", scan, "-o", tmp_path / "closed" / "x.nii.gz", "-m", "otsu", "-q")
    assert_refused(ran, 4, "cannot be written")


def test_a_disk_that_fills_up_is_told_in_one_line_and_leaves_nothing(tmp_path: Path):
    """A process that may write 1000 bytes a file; the labels of noise need more."""
    noise = np.random.default_rng(0).normal(100, 20, (30, 30, 30)).astype(np.float32)
    scan = tiny.save_nifti(tmp_path / "scan.nii.gz", noise, tiny.affine_of())
    (tmp_path / "out").mkdir()
    program = (
        "import resource, sys; from medseg.cli.app import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); main()"
    )
    ran = tiny.run_child(
        "-c", program, "infer", scan, "-o", tmp_path / "out" / "r.nii.gz", "-m", "otsu", "-q"
    )
    assert_refused(ran, 4, "disk is full")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_memory_is_told_before_anything_is_computed(
    scan: Path, model: Path, monkeypatch
):
    monkeypatch.setattr("medseg.inference.backends.pytorch.open_torch", None)
    monkeypatch.setattr("medseg.inference.forecast.memory_needed", lambda *_, **__: 10**15)
    before = everything(scan.parent)
    assert_refused(tiny.medseg("infer", scan, "-m", model, "-q", "--device", "cpu"), 7, "GB")
    assert everything(scan.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer",),
        ("infer", "x.nii.gz", "--device", "tpu"),
        ("infer", "x.nii.gz", "--precision", "int8"),
        ("infer", "x.nii.gz", "--overlap", "1.5"),
        ("infer", "x.nii.gz", "--overlap", "half"),
        ("infer", "x.nii.gz", "--colour", "red"),
        ("infer", "x.nii.gz", "--volume", "-1"),
        ("train",),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]):
    ran = tiny.medseg(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_settings_the_machine_cannot_have_are_refused(scan: Path, model: Path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(tiny.medseg("infer", scan, "-m", model, "--device", "cuda", "-q"), 5, "CUDA")
    assert_refused(tiny.medseg("infer", scan, "-m", model, "--precision", "fp16", "-q"), 5, "fp16")


def test_convert_keeps_voxels_and_geometry(tmp_path: Path, scan: Path):
    target = tmp_path / "scan.nrrd"
    assert tiny.medseg("convert", scan, target).code == 0
    one, two = medseg.read(scan), medseg.read(target)
    assert np.array_equal(one.data, two.data)
    assert np.allclose(one.affine, two.affine, atol=1e-9)
    assert_refused(tiny.medseg("convert", scan, tmp_path / "x.png"), 4, "format")
    assert_refused(tiny.medseg("convert", tmp_path / "no.nii", target), 3, "no.nii")


def test_info_tells_grid_and_intensities(scan: Path):
    facts = json.loads(tiny.medseg("info", scan, "--json").out)
    data = tiny.volume_of(scan).data
    assert facts["shape"] == [20, 22, 18]
    assert facts["spacing_mm"] == [2, 2, 2]
    assert facts["orientation"] == "RAS"
    assert facts["minimum"] == pytest.approx(float(data.min()))
    assert facts["maximum"] == pytest.approx(float(data.max()))
    assert facts["ml"] == pytest.approx(20 * 22 * 18 * 8 / 1000)
    table = tiny.medseg("info", scan).out
    assert "20 x 22 x 18" in table


def test_models_lists_what_can_be_given_to_infer():
    rows = json.loads(tiny.medseg("models", "--json").out)
    assert {"otsu", "kmeans", "gmm"} <= {row["name"] for row in rows}
    assert all(row["structures"] >= 1 and row["about"] for row in rows)
    assert "otsu" in tiny.medseg("models").out


def test_version_is_that_of_the_package():
    assert tiny.medseg("version").out.strip() == medseg.__version__


HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "nibabel",
    "pydantic",
    "numba",
    "matplotlib",
    "PIL",
    "pydicom",
    "safetensors",
    "cc3d",
)
LOADED = f"; print('LOADED', *[name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    "program",
    [
        "import sys, medseg" + LOADED,
        "import sys\nfrom medseg.cli.app import main\nsys.argv = ['medseg', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n" + LOADED[2:],
    ],
)
def test_import_and_help_load_no_heavy_package(program: str):
    ran = tiny.run_child("-c", program)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1].split() == ["LOADED"]


def test_help_answers_at_once():
    """Processor time, because the wall clock of a busy machine says nothing about us."""
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert tiny.run_child("-m", "medseg", "--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 0.5


@pytest.mark.parametrize(
    "command", [(), ("infer",), ("train",), ("convert",), ("info",), ("models",)]
)
def test_help_explains_every_command_and_option(command: tuple[str, ...]):
    ran = tiny.medseg(*command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out
    if command == ("infer",):
        for option in (
            "--output", "--model", "--device", "--precision", "--overlap", "--no-cleanup",
            "--instances",
            "--skip-existing", "--preview", "--volume", "--assume-geometry", "--json", "--quiet",
        ):  # fmt: skip
            assert option in ran.out


WATCHED = """
import sys
opened = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        opened.append(event)
sys.addaudithook(watch)
from medseg.cli.app import main
folder = sys.argv[1]
for line in (
    "train {}/c/config.yaml -o {}/run -q",
    "infer {}/scan.nii.gz -m {}/run/model -q --preview {}/p.png --instances",
    "infer {}/scan.nii.gz -m otsu -q --json -o {}/o.seg.nrrd",
    "models",
    "info {}/scan.nii.gz",
):
    sys.argv = ["medseg", *line.replace("{}", folder).split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, line
print("OPENED", *opened)
"""


def test_training_and_inference_open_no_network_connection(tmp_path: Path):
    configs.make_config(tmp_path / "c", train__steps=3, train__validate_every=3)
    tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.run_child("-c", WATCHED, tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1].split() == ["OPENED"]
    assert (tmp_path / "scan_seg.objects.nii.gz").is_file()


def test_a_reader_that_goes_away_ends_the_command_quietly(scan: Path):
    """`medseg infer ... | head` closes our output before we have written it."""
    with tiny.start("-m", "medseg", "infer", scan, "-m", "otsu", "-q", "--json") as child:
        child.stdout.close()
        err = child.stderr.read()
        child.wait(timeout=60)
    assert "Traceback" not in err
    assert (scan.parent / "scan_seg.nii.gz").is_file()


def test_convert_and_clean_keep_the_names_that_a_slicer_segmentation_carries(tmp_path):
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[2:6, 2:6, 2:6], labels[8, 8, 8] = 7, 7
    table = LabelTable((Label(7, "left kidney", (10, 200, 30)),))
    write(Volume(labels, np.eye(4)), tmp_path / "a.seg.nrrd", table=table)

    assert tiny.medseg("convert", tmp_path / "a.seg.nrrd", tmp_path / "b.seg.nrrd").code == 0
    assert (
        tiny.medseg(
            "clean", tmp_path / "b.seg.nrrd", "-o", tmp_path / "c.seg.nrrd", "--keep-largest"
        ).code
        == 0
    )

    for name in ("b", "c"):
        assert embedded_table(tmp_path / f"{name}.seg.nrrd").names == {7: "left kidney"}
        assert embedded_table(tmp_path / f"{name}.seg.nrrd")[7].color == (10, 200, 30)
    assert read_labels(tmp_path / "c.seg.nrrd").data[8, 8, 8] == 0
