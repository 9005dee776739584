"""medseg on Windows and macOS: its main errands without what these systems lack, and what is never
written because some system has it not.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml

from making import networks as tiny, phantoms
from making.elsewhere import sitecustomize as elsewhere
from making.places import ROOT
from medseg.cohort.cases import check_name, short_name
from medseg.cohort.lists import read_list
from medseg.errors import BadConfig
from medseg.files import ignores_case
from medseg.inference.jobs import list_jobs
from medseg.io.dicom import pixels
from medseg.text import alike_but_for_case, is_reserved

SOURCES = sorted((ROOT / "medseg").rglob("*.py"))
SHIM = ROOT / "tests" / "making" / "elsewhere"
#: Runs commands one after another as they are run by people, and tells how each of them ended.
PROGRAM = """
import json, sys
def run(words):
    from medseg.cli.app import main
    sys.argv = ["medseg", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
codes = {" ".join(words[:1]): run(words) for words in json.loads(sys.argv[1])}
from medseg import files, machine
facts = {"codes": codes, "has_fcntl": files.fcntl is not None, "has_modes": machine.HAS_MODES,
         "memory": [machine.peak_memory_bytes(), machine.resident_bytes(), machine.free_bytes()]}
print(json.dumps(facts))
"""
STEPS = {
    "train.steps": 4, "train.warmup": 1, "train.log_every": 2, "train.validate_every": 4,
    "train.validate_samples": 1, "train.checkpoint_every": 1, "train.precision": "fp32",
    "model.patch": [16, 16, 16], "model.options": tiny.UNET_OPTIONS,
}  # fmt: skip


def environment_of(system: str) -> dict[str, str]:
    """That of a child process to which this machine looks like another system."""
    usual = tiny.environment()
    path = os.pathsep.join((str(SHIM), usual["PYTHONPATH"]))
    return usual | {"TESTED_SYSTEM": system, "PYTHONPATH": path}


def child_of(system: str, program: str, *words: object) -> str:
    """What a program prints there; it must end well."""
    ran = tiny.run_child("-c", program, *words, env=environment_of(system), timeout=600)
    assert ran.code == 0, ran.err
    return ran.out


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_main_errands_run_there(system: str, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    model = tiny.save_unet(tmp_path / "model")
    data = phantoms.dataset(tmp_path / "data")
    listed = tmp_path / "list.csv"
    listed.write_text("case,image\none,scan.nii.gz\ntwo,scan.nii.gz\n", encoding="utf-8")
    steps = [
        word for name, value in STEPS.items() for word in ("--set", f"{name}={json.dumps(value)}")
    ]
    errands = [
        ["--help"],
        ["version"],
        ["info", str(scan)],
        ["infer", str(scan), "-m", str(model), "-o", str(tmp_path / "out.nrrd"), "-q"],
        ["convert", str(scan), str(tmp_path / "scan.mha")],
        ["check", str(data)],
        ["batch", str(listed), "-o", str(tmp_path / "all"), "-m", "otsu", "--workers", "2", "-q"],
        ["train", str(data), "-o", str(tmp_path / "run"), "--quiet", *steps],
    ]  # fmt: skip
    told = child_of(system, PROGRAM, json.dumps(errands))
    facts = json.loads(told.splitlines()[-1])
    assert set(facts["codes"].values()) == {0}, told
    assert facts["has_fcntl"] == facts["has_modes"] == (system == "macos")
    assert all(1e7 < amount < 1e14 for amount in facts["memory"])
    records = (tmp_path / "all" / "records").rglob("*.json")
    states = [json.loads(path.read_text(encoding="utf-8"))["status"] for path in records]
    assert states == ["done", "done"]
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 0
    assert not list(tmp_path.rglob(".medseg-*")), "something temporary stayed"


HOLDERS = """
import os, sys, time
from pathlib import Path
from medseg import files
place = Path(sys.argv[1])
said = []
with files.private_folder(place) as own, files.atomic_write(place / "x.txt") as file:
    file.write(b"whole")
    file.flush()
    for path in place.iterdir():
        os.utime(path, (0, 0))
    said += [files.sweep(place, min_age_s=0), files.sweep_folders(place, min_age_s=0), own.is_dir()]
said += [own.exists(), (place / "x.txt").read_bytes() == b"whole"]
(place / f".medseg-{'0' * 24}").write_bytes(b"left by a killed run")
left = place / f".medseg-{'1' * 24}"
left.mkdir()
(left / "inside").write_bytes(b"left, too")
said += [files.sweep(place, min_age_s=0), files.sweep_folders(place, min_age_s=0)]
(place / "held").mkdir()
with files.held(place / "held"):
    try:
        with files.held(place / "held"):
            said.append("twice")
    except BlockingIOError:
        said.append("once")
said += [sorted(path.name for path in place.rglob("*"))]
print(said)
"""


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_what_is_in_use_stays_and_what_was_left_goes_there(system: str, tmp_path: Path):
    said = ast.literal_eval(child_of(system, HOLDERS, tmp_path))
    assert said == [0, 0, True, False, True, 1, 1, "once", ["held", "x.txt"]]


def test_what_is_taken_away_is_away_for_medseg_alone(tmp_path: Path):
    program = (
        "import os, signal, sys, subprocess, fcntl\n"
        "from medseg import machine\n"
        "print(sys.platform, hasattr(os, 'geteuid'), hasattr(signal, 'SIGHUP'))\n"
        "print(machine.HAS_MODES, 'SIGHUP' in str(machine.STOP_SIGNALS), machine.apart())"
    )
    here, there = child_of("windows", program).splitlines()
    assert here == "linux True True"
    assert there == "False False {'creationflags': 512}"


# What is not written -----------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """The calls in a file with the last part of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func).rpartition(".")[2]


def mode_of(call: ast.Call) -> str:
    """How a file is opened; 'b' where that is no text or cannot be told."""
    named = {word.arg: word.value for word in call.keywords}
    is_method = isinstance(call.func, ast.Attribute) and ast.unparse(call.func) != "os.fdopen"
    places = call.args[0 if is_method else 1 :]
    mode = named.get("mode", places[0] if places else ast.Constant("r"))
    is_known = isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    return str(mode.value) if is_known and set(str(mode.value)) <= set("rwaxtb+") else "b"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_has_its_encoding_and_line_ends_named(path: Path):
    """Else Windows reads it in an encoding of its own, and writes other line ends."""
    wrong = []
    for call, name in calls(path):
        words = {word.arg for word in call.keywords}
        whole = ast.unparse(call.func)
        if whole in ("os.open", "webbrowser.open") or "open(source" in ast.unparse(call):
            continue
        reads = name == "read_text" and isinstance(call.func, ast.Attribute)
        reads = reads and not whole.startswith(("files.", "stream.", "distribution("))
        opens = name in ("open", "fdopen") and "b" not in mode_of(call)
        opens = opens and not (
            name == "open" and call.args and not isinstance(call.args[0], ast.Constant)
        )
        writes = name == "write_text" and isinstance(call.func, ast.Attribute)
        runs = "text" in words and name in ("run", "Popen", "check_output")
        if (reads or opens or writes or runs) and "encoding" not in words:
            wrong.append(f"{call.lineno}: encoding")
        changes = writes or (opens and not set(mode_of(call)) <= set("rt"))
        if changes and "newline" not in words and "/proc/" not in whole:
            wrong.append(f"{call.lineno}: newline")
    assert wrong == []


#: What Windows or macOS lack and medseg names nevertheless, and what it does without.
GUARDED = {
    ("files", "O_DIRECTORY"): "locks of folders, only where there is fcntl",
    ("files", "O_NOFOLLOW"): "the same",
    ("machine", "geteuid"): "HAS_MODES",
    ("kernels/threads", "sched_getaffinity"): "os.cpu_count",
    ("cohort/worker", "pthread_kill"): "_thread.interrupt_main",
    ("cohort/worker", "posix_fadvise"): "nothing is read ahead",
    ("cohort/worker", "POSIX_FADV_WILLNEED"): "nothing is read ahead",
}
MODULES = {"files": "fcntl", "machine": "resource", "io/dicom/decode": "resource"}


def test_nothing_that_a_system_lacks_is_named_without_a_substitute():
    missing = {
        module.__name__: set(names.split())
        for module, names in elsewhere.MISSING["windows"].items()
    }
    for module, names in elsewhere.MISSING["macos"].items():
        missing[module.__name__] |= set(names.split())
    missing["os"] |= {"POSIX_FADV_WILLNEED"}
    named, imported = set(), {}
    for path in SOURCES:
        home = path.relative_to(ROOT / "medseg").with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if is_of_module and node.attr in missing.get(node.value.id, ()):
                named.add((home, node.attr))
            for alias in node.names if isinstance(node, ast.Import) else ():
                if alias.name in elsewhere.NO_MODULES["windows"]:
                    imported[home] = alias.name
    assert named == set(GUARDED)
    assert imported == MODULES


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["con", "AUX", "nul.x", "Com1", "LPT9.nii", "a.", "a ", "com¹"])
def test_names_that_windows_keeps_name_no_case(name: str):
    assert is_reserved(name)
    with pytest.raises(BadConfig, match="cannot name a case"):
        check_name(Path("list.csv"), name)
    assert not is_reserved(short_name(name))


@pytest.mark.parametrize("name", ["console", "auxiliary_1", "com10", "a.b", "nul_1", "lpt"])
def test_names_that_only_begin_like_those_are_names(name: str):
    assert not is_reserved(name)
    check_name(Path("list.csv"), name)
    assert short_name(name) == name


def test_names_are_alike_where_letters_differ_in_case_or_in_how_accents_are_stored():
    assert alike_but_for_case(["b", "A1", "a1"]) == ("A1", "a1")
    assert alike_but_for_case(["e\u0301", "\u00e9"]) == ("e\u0301", "\u00e9")
    assert alike_but_for_case(["a", "b", "a"]) is None


def test_two_scans_that_a_disk_takes_for_one_are_refused(tmp_path: Path):
    for folder, name in (("one", "Head"), ("two", "head")):
        (tmp_path / folder).mkdir()
        tiny.save_scan(tmp_path / folder / f"{name}.nii.gz")
    scans = [tmp_path / "one" / "Head.nii.gz", tmp_path / "two" / "head.nii.gz"]
    if not ignores_case(tmp_path):
        assert len(list_jobs(scans, tmp_path / "out")) == 2
    with (
        mock.patch("medseg.inference.jobs.ignores_case", return_value=True),
        pytest.raises(BadConfig, match="takes Head and head for one name"),
    ):
        list_jobs(scans, tmp_path / "out")
    assert list(tmp_path.glob(".medseg-*")) == []


def test_a_scan_is_not_overwritten_under_its_name_in_other_letters(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    other = tmp_path / "SCAN.nii.gz"
    if not other.exists():  # as if the disk took both for one
        other.hardlink_to(scan)
    with pytest.raises(BadConfig, match="is an input and would be overwritten"):
        list_jobs([scan], other)


def test_a_list_made_on_windows_names_files_here(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    scan = tiny.save_scan(tmp_path / "sub" / "a.nii.gz")
    listed = tmp_path / "list.csv"
    listed.write_text("case,image\none,sub\\a.nii.gz\n", encoding="utf-8")
    assert Path(read_list(listed).cases[0].images[0]) == scan


# Limits ------------------------------------------------------------------------------------------


def test_a_decoder_that_cannot_limit_itself_is_ended_when_it_takes_too_much():
    program = "held = bytearray(400_000_000)\nimport time\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        over = threading.Event()
        watch = threading.Thread(target=pixels._watch_memory, args=(child, 200_000_000, over))
        watch.start()
        try:
            assert child.wait(600) != 0
        finally:
            over.set()
            child.kill()
            watch.join()


def test_results_in_an_encoding_without_some_letters_are_told_all_the_same(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "höhe→.nii.gz")
    usual = tiny.environment() | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    ran = tiny.run_child("-m", "medseg", "info", scan, env=usual, encoding="cp1252")
    assert ran.code == 0, ran.err
    assert "\\u2192" in ran.out


# The runs elsewhere ------------------------------------------------------------------------------


def test_the_workflow_runs_the_commands_of_the_readme_on_all_systems():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["system"]} == {
        "ubuntu", "windows", "macos",
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [name.rpartition(" ")[2] for name in project["classifiers"] if ":: 3." in name]
    assert job["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = readme.split("<!-- test command -->")[1].split("```bash\n")[1].split("\n")[0]
    commands = [part.replace(".venv/bin/", "") for part in line.split(" && ")[1:]]
    steps = [step["run"].replace("python -m pip", "pip") for step in job["steps"][3:]]
    assert steps == commands
