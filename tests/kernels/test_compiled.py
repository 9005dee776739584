"""Where compiled code is kept, and that a run never fails for want of a place."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numba
import pytest
from numba.core import caching

from making.notices import notices
from medseg.errors import DataWarning
from medseg.kernels import compiled
from medseg.machine import HAS_MODES

SOURCE = """
from medseg.kernels.compiled import njit

@njit(cache=True, nogil=True)
def twice(x):
    return 2 * x
"""


@pytest.fixture(autouse=True)
def nothing_decided_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test decides anew where code is kept, and has a temporary folder of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for decided in (compiled.private_folder, compiled._warn):
        decided.cache_clear()
    yield
    for decided in (compiled.private_folder, compiled._warn):
        decided.cache_clear()


def load(folder: Path, name: str = "kernel_for_a_test") -> ModuleType:
    """A module with one kernel, imported from `folder`."""
    file = folder / f"{name}.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only package without a writable home: numba's own places are refused."""
    for locator in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
        monkeypatch.setattr(locator, "from_function", classmethod(lambda cls, function, file: None))


def test_code_is_kept_beside_its_source_as_numba_does(tmp_path: Path):
    kernel = load(tmp_path).twice
    assert kernel(4) == 8
    assert kernel.stats.cache_path == str(tmp_path / "__pycache__")
    assert list((tmp_path / "__pycache__").glob("*.nbi"))
    assert load(tmp_path).twice(4) == 8
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(not HAS_MODES, reason="kept there in the home alone where modes are not told")
def test_without_numba_s_places_it_is_kept_in_a_private_folder_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nowhere(monkeypatch)
    assert load(tmp_path).twice(4) == 8
    (folder,) = (tmp_path / "temporary").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    again = load(tmp_path).twice
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    assert not numba.config.CACHE_DIR, "numba keeps other packages' code where it always did"


def somebody_else_s(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def link(folder: Path) -> None:
    folder.with_name("elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.with_name("elsewhere"))


def file(folder: Path) -> None:
    folder.write_bytes(b"")


@pytest.mark.parametrize("make", [somebody_else_s, open_to_all, link, file])
def test_a_folder_that_others_could_fill_is_not_used_and_one_warning_says_so(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if make is somebody_else_s and os.geteuid() != 0:
        pytest.skip("only root can give a folder to somebody else")
    if make in (somebody_else_s, open_to_all) and not HAS_MODES:
        pytest.skip("this system tells no modes")
    nowhere(monkeypatch)
    folder = tmp_path / "temporary" / f"medseg-{os.geteuid()}"
    make(folder)
    with pytest.warns(DataWarning, match="compiled code cannot be kept") as warned:
        assert load(tmp_path).twice(4) == 8
        assert load(tmp_path, "another_kernel").twice(4) == 8
    assert len(notices(warned)) == 1
    assert folder.is_file() or not list(folder.iterdir())


def test_no_temporary_folder_at_all_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nowhere(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.warns(DataWarning, match="cannot be kept"):
        assert load(tmp_path).twice(4) == 8


@pytest.mark.skipif(not HAS_MODES, reason="this system tells no modes")
def test_a_home_that_everybody_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """HOME=/tmp is common in containers; code there could be anybody's."""
    home = tmp_path / "home" / "numba"
    home.mkdir(parents=True)
    monkeypatch.setattr(
        caching.InTreeCacheLocator, "from_function", classmethod(lambda cls, function, file: None)
    )
    monkeypatch.setattr(caching.UserWideCacheLocator, "get_cache_path", lambda self: str(home))
    assert load(tmp_path).twice.stats.cache_path == str(home)
    home.chmod(0o777)
    assert load(tmp_path).twice.stats.cache_path.startswith(str(tmp_path / "temporary"))


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"not a pickle at all", b"cnot_a_module\nnothing\n."]
)
def test_damaged_code_is_compiled_anew_and_kept_again(tmp_path: Path, suffix: str, content: bytes):
    load(tmp_path).twice(4)
    (kept,) = (tmp_path / "__pycache__").glob(f"*.{suffix}")
    kept.write_bytes(content)
    assert load(tmp_path).twice(4) == 8
    third = load(tmp_path).twice
    assert third(4) == 8
    assert sum(third.stats.cache_hits.values()) == 1


def test_a_full_disk_costs_time_and_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: object, key: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    with pytest.warns(DataWarning, match="No space left"):
        assert load(tmp_path).twice(4) == 8


def test_every_kernel_of_the_package_is_compiled_here():
    """numba's own decorator would fail where it finds no place."""
    package = Path(sys.modules["medseg"].__file__ or "").parent
    others = [
        path.name
        for path in package.rglob("*.py")
        if "from numba import njit" in path.read_text("utf-8")
    ]
    assert not others


def test_a_read_only_package_without_a_home_compiles_and_keeps_its_code(tmp_path: Path):
    """The whole package, copied where nothing may be written to it."""
    place, package = tmp_path / "place", Path(sys.modules["medseg"].__file__ or "").parent
    shutil.copytree(
        package, place / "medseg", ignore=shutil.ignore_patterns("__pycache__", "bundled", "niivue")
    )
    (place / "home").mkdir()
    program = (
        "import numpy as np\nfrom medseg.kernels.compiled import private_folder\n"
        "from medseg.kernels.components import look_up\nout = np.zeros((1, 1, 2), np.uint8)\n"
        "look_up(np.ones((1, 1, 2), np.int64), np.array([3, 7], np.uint8), out)\n"
        "print(out.ravel().tolist(), len(list(private_folder().rglob('*.nbi'))))"
    )
    environment = {
        "HOME": str(place / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(place),
    }
    command = [sys.executable, "-c", program]
    if os.geteuid() == 0:  # who may write everywhere
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv (util-linux) to give up writing everywhere")
        command = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override", *command]
    subprocess.run(["chmod", "-R", "a-w", place], check=True)
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place)
    finally:
        subprocess.run(["chmod", "-R", "u+w", place], check=True)
    assert ran.stdout == "[7, 7] 1\n", ran.stderr
