"""Code that is compiled ahead: what is listed is there, is used, and is never used for other
sources.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import types

from making import datasets, networks as tiny, nnunet
from medseg.errors import BadConfig, BadOutput
from medseg.kernels import compiled, stamps
from medseg.kernels.build import build
from medseg.kernels.signatures import SIGNATURES, types_of
from medseg.kernels.stamps import KINDS, kind_of_processor, kinds_of_machine, stamp_of

PACKAGE = Path(compiled.__file__).parents[1]
KIND = kind_of_processor()
#: A kernel that is compiled within a second, and a program that calls it and says how it came to
#: its code: found ahead, found where numba keeps it, or compiled.
MODULE, KERNEL = "rendering", "filled"
PROGRAM = """
import numpy as np
from medseg.kernels import compiled
from medseg.kernels.rendering import filled
out = np.zeros(6, np.float32)
filled(np.float32([1, 2, 3]), 2, out)
asked = "elsewhere" if "_own" in vars(filled._cache) else "ahead"
print(asked if sum(filled.stats.cache_hits.values()) else "compiled", out.tolist())
"""

needs_a_kind = pytest.mark.skipif(not KIND, reason="no code is compiled ahead for this processor")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of medseg, with the code of one module compiled ahead."""
    place = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__", "bundled", "niivue", "ahead")
    shutil.copytree(PACKAGE, place / "medseg", ignore=ignored)
    if KIND:
        ahead = place / "medseg" / "kernels" / "ahead"
        command = [sys.executable, "-m", "medseg.kernels.build", "--into", str(ahead)]
        command += ["--kind", KIND, "--modules", MODULE]
        subprocess.run(command, env=environment(place), check=True, capture_output=True)
    return place


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """A copy of that copy, which a test may change."""
    shutil.copytree(installed, tmp_path / "copy")
    return tmp_path / "copy"


def environment(place: Path) -> dict[str, str]:
    """That of a user whose home and temporary folder lie beside the package."""
    for name in ("home", "temporary"):
        (place / name).mkdir(exist_ok=True)
    places = {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary")}
    return places | {"PYTHONPATH": str(place), "PATH": os.environ.get("PATH", "")}


def called(place: Path, *before: str, **others: str) -> str:
    """What `PROGRAM` says about the package in `place`."""
    command = [*before, sys.executable, "-c", PROGRAM]
    ran = subprocess.run(
        command, env=environment(place) | others, capture_output=True, text=True, cwd=place
    )
    assert ran.returncode == 0 and "cannot be kept" not in ran.stderr, ran.stderr
    return ran.stdout


def files_of_code(place: Path) -> list[Path]:
    return sorted((place / "medseg" / "kernels" / "ahead").rglob("*.nb?"))


@needs_a_kind
def test_code_compiled_ahead_is_used_and_nothing_is_written(copy: Path):
    content = {path: path.read_bytes() for path in files_of_code(copy)}
    assert len(content) == 2
    assert called(copy).startswith("ahead")
    assert {path: path.read_bytes() for path in files_of_code(copy)} == content
    others = [path for path in copy.rglob("*.nbi") if "ahead" not in path.parts]
    assert not others


@needs_a_kind
def test_a_file_that_is_only_touched_keeps_its_code(copy: Path):
    source = copy / "medseg" / "kernels" / f"{MODULE}.py"
    os.utime(source, (1, 1))
    assert called(copy).startswith("ahead")


@needs_a_kind
@pytest.mark.parametrize("name", ["rendering", "compiled"])
def test_code_of_a_source_that_has_changed_is_not_used(copy: Path, name: str):
    """The source, or one that it imports, with the same length and time."""
    source = copy / "medseg" / "kernels" / f"{name}.py"
    about, text = source.stat(), source.read_text("utf-8")
    changed = text.replace("the", "The", 1)
    assert changed != text
    source.write_text(changed, "utf-8")
    os.utime(source, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert called(copy).startswith("compiled")
    assert called(copy).startswith("elsewhere")


@needs_a_kind
def test_code_of_another_numba_is_not_used(copy: Path):
    (index,) = (path for path in files_of_code(copy) if path.suffix == ".nbi")
    version = numba.__version__.encode()
    index.write_bytes(index.read_bytes().replace(version, b"9" * len(version), 1))
    assert called(copy).startswith("compiled")


@needs_a_kind
def test_code_for_another_kind_of_processor_is_not_used(copy: Path):
    ahead = copy / "medseg" / "kernels" / "ahead"
    (ahead / KIND).rename(ahead / "another")
    assert called(copy).startswith("compiled")


@needs_a_kind
def test_whoever_tells_numba_another_processor_gets_code_for_that(copy: Path):
    said = called(copy, NUMBA_CPU_NAME="generic")
    assert not said.startswith("ahead")


@needs_a_kind
@pytest.mark.parametrize("content", [b"", b"not a pickle at all"])
def test_damaged_code_is_compiled_anew_and_left_as_it_is(copy: Path, content: bytes):
    for path in files_of_code(copy):
        path.write_bytes(content)
    assert called(copy).startswith("compiled")
    assert all(path.read_bytes() == content for path in files_of_code(copy))


@needs_a_kind
def test_a_folder_that_others_may_write_to_is_not_looked_into(copy: Path):
    (copy / "medseg" / "kernels" / "ahead").chmod(0o777)
    said = called(copy)
    assert not said.startswith("ahead")


@needs_a_kind
def test_a_read_only_installation_without_a_home_uses_its_code(copy: Path):
    before: list[str] = []
    if os.geteuid() == 0:  # who may write everywhere
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv (util-linux) to give up writing everywhere")
        before = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]
    environment(copy)
    subprocess.run(["chmod", "-R", "a-w", copy], check=True)
    try:
        assert called(copy, *before).startswith("ahead")
    finally:
        subprocess.run(["chmod", "-R", "u+w", copy], check=True)


def test_results_of_code_compiled_ahead_are_those_of_code_compiled_here(copy: Path):
    ahead = called(copy)
    shutil.rmtree(copy / "medseg" / "kernels" / "ahead", ignore_errors=True)
    here = called(copy)
    assert here.startswith("compiled") and here.split(" ", 1)[1] == ahead.split(" ", 1)[1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_listed_is_a_kernel_and_fits_its_arguments(name: str):
    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"medseg.kernels.{module}"), function)
    count = len(inspect.signature(kernel.py_func).parameters)
    lines = SIGNATURES[name]
    assert len(set(lines)) == len(lines)
    assert [len(types_of(line)) for line in lines] == [count] * len(lines)


def test_a_line_of_types_is_read_as_numba_types_the_call():
    array, number = np.zeros((2, 3, 4), np.uint8), np.float32(1)
    call = (array, 3, 0.5, number, True, (1, 2), (array[0], 1))
    line = "uint8[3] int64 float64 float32 bool (int64 int64) (uint8[2] int64)"
    assert types_of(line) == tuple(numba.typeof(value) for value in call)
    assert types_of("bool[1]") == (types.Array(types.boolean, 1, "C"),)


def an_oblique_scan(folder: Path) -> list[str]:
    """The bundled model, at its smallest, on a scan that lies obliquely."""
    affine = tiny.affine_of(spacing=(4.0, 4.0, 4.0))
    turn = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    scan = tiny.save_scan(folder / "scan.nii.gz", turn @ affine)
    return ["infer", str(scan), "-m", "brain-fast", "-o", f"{folder}/"]


def a_model_of_nnunet(folder: Path) -> list[str]:
    """Computed as nnU-Net does."""
    scan = datasets.put(datasets.make_case(0)[0], folder / "scan.nii.gz")
    nnunet.write_model(folder / "model")
    return ["infer", str(scan), "-m", f"{folder}/model", "--exact", "-o", f"{folder}/"]


def two_label_maps(folder: Path) -> list[str]:
    names = ("a.nii.gz", "b.nii.gz")
    maps = [datasets.put(datasets.make_case(0)[1], folder / name) for name in names]
    return ["evaluate", *map(str, maps), "-o", f"{folder}/scores"]


def a_training(folder: Path) -> list[str]:
    data = datasets.decathlon(folder / "data")
    return ["train", str(data), "-o", f"{folder}/run", "--set", "train.steps=1"]


@pytest.mark.parametrize("make", [an_oblique_scan, a_model_of_nnunet, two_label_maps, a_training])
def test_no_kernel_is_called_that_is_not_listed(tmp_path: Path, make: Callable[[Path], list[str]]):
    program = f"""
import sys
from numba.core.dispatcher import Dispatcher
from medseg.cli.app import main
from medseg.kernels.signatures import SIGNATURES, types_of
first_call, rows = Dispatcher._compile_for_args, []
def recorded(kernel, *arguments):
    result = first_call(kernel, *arguments)
    name = kernel.py_func.__module__.rpartition(".")[2] + "." + kernel.py_func.__name__
    listed = list(kernel.overloads)[-1] in [types_of(line) for line in SIGNATURES.get(name, ())]
    rows.append((listed, name, list(kernel.overloads)[-1]))
    return result
Dispatcher._compile_for_args = recorded
sys.argv = ["medseg", *{make(tmp_path)!r}]
try: main()
except SystemExit as stop: assert not stop.code, stop.code
for row in rows:  # only now: lines that threads print get mixed up
    print("CALLED", *row)
"""
    ran = tiny.run_child("-c", program)
    assert ran.code == 0, ran.err
    rows = [line.split(" ", 2)[1:] for line in ran.out.splitlines() if line.startswith("CALLED")]
    assert len(rows) >= 4
    assert not [row for listed, row in rows if listed != "True"]


def test_a_kind_that_such_machines_are_not_of_is_refused(tmp_path: Path):
    other = next(kind for kind in KINDS if kind not in kinds_of_machine())
    with pytest.raises(BadConfig, match=f"{other} cannot be compiled here"):
        build(tmp_path, [other])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    kinds = kinds_of_machine()[-1:]
    if not kinds:
        pytest.skip("no code is compiled ahead for such machines")
    with pytest.raises(BadOutput, match="file: cannot be written"):
        build(tmp_path / "file", kinds)


def test_a_stamp_is_of_the_text_of_a_file_and_of_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in {"one": "from medseg.kernels.two import x", "two": "x = 1"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(stamps, "__file__", str(tmp_path / "stamps.py"))
    one, two = str(tmp_path / "one.py"), tmp_path / "two.py"
    first = stamp_of(one)
    two.write_text("x = 22")
    assert stamp_of(one) != first
    two.write_text("x = 1")
    assert stamp_of(one) == first


@pytest.mark.parametrize("compiles", [True, False])
def test_a_wheel_gets_what_was_compiled(
    compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("hatchling", reason="needs hatchling: pip install medseg[dev]")
    from medseg.kernels.hatch_build import CompiledKernels

    asked: list[tuple[str, ...]] = []

    def compiled(self: Any, folder: Path, *options: str) -> bool:
        asked.append(options)
        (folder / "code.nbc").write_bytes(b"code")
        return compiles

    monkeypatch.setattr(CompiledKernels, "_compiled", compiled)
    hook = CompiledKernels(str(tmp_path), {}, None, None, str(tmp_path), "wheel")
    content: dict[str, Any] = {"force_include": {}}
    hook.initialize("standard", content)
    assert asked == [("--all",)]
    places = list(content["force_include"].items())
    if compiles:
        ((folder, place),) = places
        assert place == "medseg/kernels/ahead" and (Path(folder) / "code.nbc").is_file()
        assert content["pure_python"] is False and content["infer_tag"] is True
    else:
        assert places == [] and "pure_python" not in content
    hook.finalize("standard", content, "")
    assert not any(Path(folder).exists() for folder, _ in places)
