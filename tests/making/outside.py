"""A clean environment with medseg from a wheel, as a stranger has it, and what its scripts read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from making import networks as tiny
from making.ct import grid, trunk
from making.places import ROOT
from medseg.io import write
from medseg.models import save_checkpoint

SCRIPTS = ROOT / "tests" / "outside"
#: Runs the scripts it is given one after another, and says of each what went wrong.
RUNNER = """
import json, runpy, sys, traceback
import medseg
folder, *scripts = sys.argv[1:]
told = {"home": medseg.__file__}
for script in scripts:
    sys.argv = [script, folder]
    try:
        runpy.run_path(script, run_name="__main__")
        told[script] = ""
    except BaseException:
        told[script] = traceback.format_exc()
print(json.dumps(told))
"""


def environment() -> dict[str, str]:
    """That of a stranger: nothing points to this checkout; one thread, as tests share the cores."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | threads


def run(*command: object, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, to its end. more: variables of its environment."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=environment() | more, capture_output=True, text=True, timeout=600
    )


def make_environment(folder: Path) -> Path:
    """A virtual environment with wheels of medseg and of the package that extends it, without
    network; its Python. Skips where wheels cannot be built.
    """
    for package in ("hatchling", "pip"):
        if find_spec(package) is None:
            pytest.skip(f"wheels are built by hatchling and pip; pip install {package}")
    extension = folder / "extension"
    shutil.copytree(SCRIPTS / "extension", extension)
    spec: dict[str, Any] = {
        "name": "brightness", "architecture": "brightness", "classes": tiny.CLASSES,
        "patch": (16, 16, 16), "spacing_mm": 2.0,
    }  # fmt: skip
    network = tiny.Nearest(1, len(tiny.CLASSES))
    save_checkpoint(extension / "medseg_plain" / "model", spec, network.state_dict(), tiny.TABLE)
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    built = run(
        sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", folder / "wheels",
        ROOT, extension, folder=folder, HATCH_BUILD_NO_HOOKS="1",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (home,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    # What medseg depends on is taken from here; `.pth` files there are not read, so that no other
    # medseg is.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (home / "dependencies.pth").write_text("\n".join(others), encoding="utf-8")
    wheels = sorted((folder / "wheels").glob("*.whl"))
    installed = run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
        "--no-index", "--disable-pip-version-check", *wheels, folder=folder,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    _keep_compiled(home / "medseg" / "kernels")
    return python


def _keep_compiled(kernels: Path) -> None:
    """Give the copy what was compiled here: of the same source it is the same, and compiling takes
    a minute. numba knows a source by its time and size.
    """
    for source in (ROOT / "medseg" / "kernels").glob("*.py"):
        about = source.stat()
        os.utime(kernels / source.name, ns=(about.st_atime_ns, about.st_mtime_ns))
    ahead = ROOT / "medseg" / "kernels" / "ahead"
    if ahead.is_dir():
        shutil.copytree(ahead, kernels / "ahead")
    (kernels / "__pycache__").mkdir(exist_ok=True)
    for compiled in (ROOT / "medseg" / "kernels" / "__pycache__").glob("*.nb*"):
        shutil.copy(compiled, kernels / "__pycache__")


def make_data(folder: Path) -> Path:
    """A folder with scans, models and the labels that the command line finds."""
    folder.mkdir()
    affine, shape = grid(
        low_mm=(-190, -150, -60), high_mm=(190, 140, 60), spacing_mm=(6.0, 6.0, 6.0)
    )
    write(trunk(affine, shape, noise=15).scan, folder / "ct.nii.gz")
    place = tiny.affine_of()
    scan = tiny.save_scan(folder / "scan.nii.gz", place)
    other = tiny.phantom(seed=5)[::-1].copy()
    tiny.save_nifti(folder / "flair.nii.gz", other, place)
    model = tiny.save_unet(folder / "model")
    tiny.save_two_channel_network(
        folder / "two_channels", "unet", tiny.UNET_OPTIONS, (16, 16, 16),
        channel_names=("T1", "FLAIR"),
    )  # fmt: skip
    ran = tiny.medseg("infer", scan, "-m", model, "-o", folder / "expected.nii.gz", "-q")
    assert ran.code == 0, ran.err
    return folder
