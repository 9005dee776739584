"""What each command imports: importing torch, scipy and numba takes longer than most commands take
to work.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from making import networks as tiny
from medseg.kernels.stamps import kind_of_processor

#: Packages that take from a tenth of a second to several seconds.
WATCHED = (
    "torch", "scipy", "numba", "sympy", "matplotlib", "pydicom", "nibabel", "SimpleITK", "cc3d",
    "safetensors", "yaml",
    "rich", "scipy.ndimage", "scipy.linalg", "torch._dynamo", "torch._inductor",
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
    picture = ("--preview", tmp_path / "p.png")
    loaded = loaded_by("infer", scan, "-m", model, "-o", tmp_path / "seg.nii.gz", "-q", *picture)
    assert "torch" in loaded
    others = {"matplotlib", "pydicom", "nibabel", "SimpleITK", "scipy.ndimage", "sympy"}
    assert not loaded & (others | {"torch._dynamo", "torch._inductor"})


@pytest.mark.skipif(not kind_of_processor(), reason="no code is compiled ahead here")
def test_kernels_that_are_compiled_already_load_no_linear_algebra(tmp_path: Path):
    """scipy.linalg, which numba asks for on import, takes as long as all kernels together."""
    program = (
        "import sys\nimport numpy as np\nfrom medseg.kernels.rendering import filled\n"
        "out = np.zeros(4, np.float32)\nfilled(np.float32([1, 2]), 2, out)\n"
        "print(sum(filled.stats.cache_hits.values()), 'scipy.linalg' in sys.modules)"
    )
    tiny.run_child("-c", program)  # compiles, unless that was done before
    assert tiny.run_child("-c", program).out.split() == ["1", "False"]


def test_looking_for_circles_does_not_interrupt_imports():
    """A million objects of imports are none; looking through them took a tenth of a short run."""
    program = (
        "import gc\nfrom medseg.cli.app import main\n"
        "import sys\nsys.argv = ['medseg', 'version']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(gc.isenabled(), gc.get_threshold()[0] >= 100_000)"
    )
    assert tiny.run_child("-c", program).out.split()[-2:] == ["True", "True"]


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
