"""Scripts of Python developers, run and typed from outside: medseg is installed from a wheel in an
environment of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from making import outside

SCRIPTS = sorted(outside.SCRIPTS.glob("*.py"))
EXTENSION = outside.SCRIPTS / "extension" / "medseg_plain"
#: What a script needs beside what medseg does.
NEEDS = {
    "service": ("fastapi", "httpx"),
    "notebook": ("nbformat", "nbclient", "ipykernel", "matplotlib"),
    "from_nibabel": ("nibabel",),
    "from_channels": ("nibabel",),
    "from_sitk": ("SimpleITK",),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts read."""
    return outside.make_data(tmp_path_factory.mktemp("scripts") / "data")


@pytest.fixture(scope="module")
def python(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of the environment; made after the data, for which kernels were compiled here."""
    return outside.make_environment(tmp_path_factory.mktemp("outside"))


def missing(script: Path) -> list[str]:
    return [name for name in NEEDS.get(script.stem, ()) if find_spec(name) is None]


@pytest.fixture(scope="module")
def told(python: Path, data: Path) -> dict[str, str]:
    """What came of each script."""
    scripts = [script for script in SCRIPTS if not missing(script)]
    ran = outside.run(python, "-c", outside.RUNNER, data, *scripts, folder=data.parent)
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def test_medseg_is_the_one_from_the_wheel(told: dict[str, str], python: Path):
    assert Path(told["home"]).is_relative_to(python.parents[1])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_does_what_it_says(script: Path, told: dict[str, str]):
    if missing(script):
        pytest.skip(f"needs {', '.join(missing(script))}: pip install medseg[dev]")
    assert told[str(script)] == ""


#: Types of these are not looked into, which takes minutes; medseg's own are.
MYPY = """[mypy]
strict = true
[mypy-torch.*,scipy.*,numba.*,pandas.*,matplotlib.*,SimpleITK.*,pydantic.*,nbformat.*,nbclient.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_mypy_finds_no_fault_in_strict_mode(python: Path, tmp_path: Path):
    pytest.importorskip("mypy", reason="types are checked by mypy: pip install medseg[dev]")
    (tmp_path / "mypy.ini").write_text(MYPY, encoding="utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import medseg\nreveal_type(medseg.segment)\nmedseg.segment(7)\n"
        "medseg.segment('a.nii', device=3)\nmedseg.segment('a.nii').labels.shapes\n",
        encoding="utf-8",
    )
    ran = outside.run(
        sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir",
        tmp_path / "cache", "--python-executable", python, *SCRIPTS, *EXTENSION.glob("*.py"),
        wrong, folder=tmp_path,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    faults = [line for line in lines if ": error:" in line]
    assert all(line.startswith("wrong.py:") for line in faults), ran.stdout
    assert [int(line.split(":")[1]) for line in faults] == [3, 4, 5], ran.stdout + ran.stderr
    revealed = next(line for line in lines if "Revealed type" in line)
    assert "-> medseg.inference.result.Segmentation" in revealed


def test_pyright_finds_no_fault(python: Path, tmp_path: Path):
    found = shutil.which("pyright") or shutil.which("basedpyright")
    beside = Path(sys.executable).with_name("basedpyright")
    program = found or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("pyright is not here: pip install basedpyright")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    ran = outside.run(
        program, "--outputjson", "--pythonpath", python, "-p", tmp_path, folder=tmp_path
    )
    report = json.loads(ran.stdout)
    errors = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    assert errors == []
    assert report["summary"]["filesAnalyzed"] == len(SCRIPTS)
