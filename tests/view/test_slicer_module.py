"""The module for 3D Slicer: what needs no Slicer against the real command line, the rest against a
stand-in.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import medseg.view
from making import networks as tiny
from medseg import io
from medseg.io.slicer import read_table

FOLDER = Path(medseg.view.__file__).parent / "slicer"
MEDSEG = [sys.executable, "-m", "medseg"]


@pytest.fixture
def command(monkeypatch) -> Iterator[types.ModuleType]:
    """MedSegLib.command, imported as Slicer does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("MedSegLib.command")
    for name in [name for name in sys.modules if name.startswith("MedSegLib")]:
        del sys.modules[name]


@pytest.fixture
def scan(tmp_path) -> Path:
    return tiny.save_scan(tmp_path / "scan.nii.gz")


def wait(run, seconds: float = 60) -> list[str]:
    lines: list[str] = []
    end = time.monotonic() + seconds
    while run.running and time.monotonic() < end:
        lines += run.look().lines
        time.sleep(0.02)
    assert not run.running
    return [*lines, *run.look().lines]


def test_models_are_those_of_the_command_line(command):
    models = {model.name: model for model in command.list_models(MEDSEG, tiny.environment())}
    assert models["brain"].structures == 32
    assert models["otsu"].about


def test_a_run_segments_and_says_how_far_it_is(command, scan, tmp_path):
    arguments = command.infer_command(MEDSEG, scan, tmp_path / "labels.seg.nrrd", "otsu")
    run = command.Run(arguments, tiny.environment())
    lines = wait(run)
    run.finish()
    assert io.read_labels(tmp_path / "labels.seg.nrrd").data.any()
    assert len(read_table(tmp_path / "labels.seg.nrrd")) > 0
    assert any("voxels" in line for line in lines)
    assert run.look().what == "writing"


def test_progress_is_a_share(command):
    script = """import json, sys
for done in range(5):
    event = {"event": "progress", "what": "segmenting", "done": done, "total": 4}
    print(json.dumps(event), file=sys.stderr)"""
    run = command.Run([sys.executable, "-c", script])
    wait(run)
    run.finish()
    state = run.look()
    assert (state.what, state.share) == ("segmenting", 1.0)


def test_an_error_is_one_sentence(command, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"not a scan")
    run = command.Run(
        command.infer_command(MEDSEG, tmp_path / "scan.nii.gz", tmp_path / "x.seg.nrrd", "otsu")
    )
    wait(run)
    with pytest.raises(command.CommandError) as error:
        run.finish()
    assert str(tmp_path / "scan.nii.gz") in str(error.value)
    assert "\n" not in str(error.value)
    assert not str(error.value).startswith("medseg:")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import sys; print('[1]', file=sys.stderr); sys.exit(1)", "[1]"),
        ("import sys; print('{\"event\": 5}', file=sys.stderr); sys.exit(1)", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
def test_a_program_that_is_not_medseg_is_no_crash(command, script, said):
    run = command.Run([sys.executable, "-c", script])
    wait(run)
    with pytest.raises(command.CommandError, match=said.replace("[", r"\[")):
        run.finish()


def test_cancel_stops_it(command):
    run = command.Run([sys.executable, "-c", "import time; time.sleep(60)"])
    run.cancel()
    wait(run, 10)
    with pytest.raises(command.CommandError, match="stopped"):
        run.finish()


def test_what_does_not_stop_is_killed(command, monkeypatch):
    monkeypatch.setattr(command, "PATIENCE_S", 0.2)
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x',"
        " flush=True); time.sleep(60)"
    )
    run = command.Run([sys.executable, "-c", f"import sys; sys.stdout = sys.stderr; {script}"])
    while not run.look().lines:
        time.sleep(0.02)
    run.cancel()
    wait(run, 10)


def test_the_program_is_found_or_asked_for(command, tmp_path):
    assert command.find_command(sys.executable) == [sys.executable]
    with pytest.raises(command.CommandError, match="is not a program"):
        command.find_command(str(tmp_path / "nothing"))
    with mock.patch.object(command.shutil, "which", return_value=None):
        with pytest.raises(command.CommandError, match="was not found"):
            command.find_command()
        with mock.patch.object(command, "_answers", return_value=True):
            assert command.find_command(python="PythonSlicer") == ["PythonSlicer", "-m", "medseg"]
    with pytest.raises(command.CommandError, match="cannot be started"):
        command.Run([str(tmp_path / "nothing")])
    with pytest.raises(command.CommandError, match="cannot be started"):
        command.list_models([str(tmp_path / "nothing")])


class Base:
    """Stands for Slicer's base classes."""

    def __init__(self, *arguments: object) -> None:
        self.layout = mock.MagicMock()

    def setup(self) -> None:
        """Slicer's own part."""


@pytest.fixture
def module(command, scan, tmp_path) -> Iterator[types.ModuleType]:
    """MedSeg.py with a stand-in for Slicer whose volume is `scan`."""
    slicer = mock.MagicMock()
    slicer.util.exportNode.side_effect = lambda node, path, options: (
        io.write(io.read(scan), path) or True
    )
    slicer.util.startupEnvironment.return_value = tiny.environment()
    base = types.ModuleType("slicer.ScriptedLoadableModule")
    for name in (
        "ScriptedLoadableModule",
        "ScriptedLoadableModuleLogic",
        "ScriptedLoadableModuleWidget",
    ):
        setattr(base, name, Base)
    stand_in = {
        "slicer": slicer,
        "slicer.ScriptedLoadableModule": base,
        "qt": mock.MagicMock(),
        "ctk": mock.MagicMock(),
    }
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with mock.patch.dict(sys.modules, stand_in), mock.patch("tempfile.tempdir", str(temporary)):
        yield importlib.import_module("MedSeg")


def test_the_logic_hands_over_runs_loads_and_tidies(module, tmp_path):
    slicer = sys.modules["slicer"]
    loaded: list[set[str]] = []
    slicer.util.loadSegmentation.side_effect = lambda path: (
        loaded.append(set(read_table(path).names.values())) or mock.MagicMock()
    )
    volume = mock.MagicMock()
    logic = module.MedSegLogic()
    with mock.patch.object(module, "find_command", return_value=MEDSEG):
        assert "brain" in {model.name for model in logic.models()}
        logic.start(volume, "otsu")
        while logic.running:
            logic.look()
            time.sleep(0.02)
        node = logic.finish()
    assert loaded
    assert loaded[0]
    node.SetReferenceImageGeometryParameterFromVolumeNode.assert_called_once_with(volume)
    node.SetAndObserveTransformNodeID.assert_called_once_with(volume.GetTransformNodeID())
    exported = slicer.util.exportNode.call_args.args[1]
    assert Path(exported).name == "scan.nrrd"
    assert not list((tmp_path / "temporary").iterdir())


def test_the_logic_tidies_after_a_failure_and_says_one_sentence(module, tmp_path):
    logic = module.MedSegLogic()
    with mock.patch.object(module, "find_command", return_value=MEDSEG):
        logic.start(mock.MagicMock(), str(tmp_path / "no model"))
        while logic.running:
            time.sleep(0.02)
        with pytest.raises(module.CommandError, match="no model"):
            logic.finish()
        sys.modules["slicer"].util.exportNode.side_effect = lambda *arguments: False
        with pytest.raises(module.CommandError, match="could not be handed over"):
            logic.start(mock.MagicMock(), "otsu")
        with pytest.raises(module.CommandError, match="choose a model"):
            logic.start(mock.MagicMock(), " ")
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_abandoned_leaves_nothing(module, tmp_path):
    logic = module.MedSegLogic()
    with mock.patch.object(
        module, "find_command", return_value=[sys.executable, "-c", "import time; time.sleep(60)"]
    ):
        logic.start(mock.MagicMock(), "otsu")
    with pytest.raises(module.CommandError, match="at work already"):
        logic.start(mock.MagicMock(), "otsu")
    logic.abandon()
    wait(logic._run, 20)
    assert logic.cancelled
    assert not list((tmp_path / "temporary").iterdir())


def test_the_panel_can_be_built_and_shows_errors(module):
    slicer = sys.modules["slicer"]
    with mock.patch.object(
        module, "find_command", side_effect=module.CommandError("medseg was not found")
    ):
        widget = module.MedSegWidget()
        widget.setup()
        assert widget.status.text == "medseg was not found"
        widget.model.currentText = "brain"
        widget.start()
    slicer.util.errorDisplay.assert_called_once_with("medseg was not found")
    widget.cleanup()


def test_the_command_line_says_where_the_module_is():
    ran = tiny.medseg("view", "--slicer-module")
    assert ran.code == 0
    assert (Path(ran.out.strip()) / "MedSeg.py").is_file()
    # Slicer loads them all.
    assert sorted(path.name for path in Path(ran.out.strip()).glob("*.py")) == ["MedSeg.py"]
