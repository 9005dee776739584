"""What each command imports: importing torch, scipy and numba takes longer than most commands take
to work.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from making import networks as tiny

#: Packages that take from a tenth of a second to several seconds.
WATCHED = (
    "torch", "scipy", "numba", "sympy", "matplotlib", "pydicom", "nibabel", "SimpleITK", "cc3d",
    "safetensors", "yaml",
    "rich", "scipy.ndimage",
)  # fmt: skip


def loaded_by(*arguments: object) -> set[str]:
    """The watched packages that a command of medseg imports."""
    program = (
        "import sys\nfrom medseg.cli.app import main\n"
        f"sys.argv = ['medseg', *{[str(a) for a in arguments]!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('LOADED', *[name for name in {WATCHED!r} if name in sys.modules])"
    )
    ran = tiny.run_child("-c", program)
    assert ran.code == 0, ran.err
    return set(ran.out.splitlines()[-1].split()) - {"LOADED"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_scan(tmp_path_factory.mktemp("startup") / "scan.nii.gz")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".mgz", ".nii"])
def test_convert_imports_nothing_but_numpy(scan: Path, tmp_path: Path, suffix: str):
    assert loaded_by("convert", scan, tmp_path / f"out{suffix}") == set()


def test_info_imports_nothing_but_numpy_and_what_draws_tables(scan: Path):
    assert loaded_by("info", scan) <= {"rich"}
    assert loaded_by("info", scan, "--json") == set()


def test_infer_imports_no_package_that_it_does_not_use(scan: Path, tmp_path: Path):
    model = tiny.save_unet(tmp_path / "model")
    loaded = loaded_by("infer", scan, "-m", model, "-o", tmp_path / "seg.nii.gz", "--quiet")
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "pydicom", "nibabel", "SimpleITK", "scipy.ndimage"}


def test_loading_weights_imports_no_algebra(tmp_path: Path):
    model = tiny.save_unet(tmp_path / "model")
    program = (
        "import sys\nfrom medseg.models.folder import"
        f" load_checkpoint\nload_checkpoint({str(model)!r}).network()\nprint('torch' in"
        " sys.modules, 'sympy' in sys.modules)"
    )
    assert tiny.run_child("-c", program).out.split() == ["True", "False"]


@pytest.mark.parametrize("command", ["infer", "convert", "info", "train", "evaluate"])
def test_the_help_of_a_command_imports_nothing(command: str):
    assert loaded_by(command, "--help") == set()
