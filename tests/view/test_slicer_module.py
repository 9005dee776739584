"""The extension for 3D Slicer: what needs no Slicer against the real command line, the panels
against a stand-in for its window.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import medseg.view
from making import networks as tiny, slicer_window as window
from medseg import io
from medseg.io.slicer import read_table

EXTENSION = Path(medseg.view.__file__).parent / "slicer"
MODULE = EXTENSION / "MedSeg"
MEDSEG = [sys.executable, "-m", "medseg"]


@pytest.fixture
def lib(monkeypatch) -> Iterator[types.SimpleNamespace]:
    """The modules of MedSegLib, imported as Slicer does."""
    monkeypatch.syspath_prepend(str(MODULE))
    names = [path.stem for path in (MODULE / "MedSegLib").glob("*.py") if path.stem != "__init__"]
    yield types.SimpleNamespace(
        **{name: importlib.import_module(f"MedSegLib.{name}") for name in names}
    )
    window.forget()


@pytest.fixture
def command(lib) -> types.ModuleType:
    return lib.command


@pytest.fixture
def scan(tmp_path) -> Path:
    return tiny.save_scan(tmp_path / "scan.nii.gz")


def wait(run, seconds: float = 600) -> list[str]:
    lines: list[str] = []
    end = time.monotonic() + seconds
    while run.running and time.monotonic() < end:
        lines += run.look().lines
        time.sleep(0.02)
    assert not run.running
    return [*lines, *run.look().lines]


def python(script: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; {script}"]


# --- the extension's files ---


def test_the_extension_is_one_as_the_extensions_manager_wants_it():
    text = (EXTENSION / "CMakeLists.txt").read_text()
    facts = dict(re.findall(r'set\(EXTENSION_(\w+) "([^"]+)"\)', text))
    assert facts.keys() >= {
        "HOMEPAGE", "CATEGORY", "CONTRIBUTORS", "DESCRIPTION", "ICONURL", "SCREENSHOTURLS",
        "DEPENDS",
    }  # fmt: skip
    entry = json.loads((EXTENSION / "MedSeg.json").read_text())
    assert entry.keys() == {
        "$schema", "build_dependencies", "build_subdirectory", "category", "scm_revision",
        "scm_url", "tier",
    }  # fmt: skip
    older = dict(
        line.partition(" ")[::2]
        for line in (EXTENSION / "MedSeg.s4ext").read_text().splitlines()
        if not line.startswith("#")
    )
    assert entry["build_dependencies"] == [facts["DEPENDS"]] == [older["depends"]] == ["PyTorch"]
    assert entry["category"] == facts["CATEGORY"] == older["category"]
    assert entry["scm_url"] == older["scmurl"] == facts["HOMEPAGE"] + ".git"
    assert (older["description"], older["iconurl"]) == (facts["DESCRIPTION"], facts["ICONURL"])
    for url in (facts["ICONURL"], facts["SCREENSHOTURLS"]):
        assert url.startswith(facts["HOMEPAGE"])
        assert (EXTENSION / url.split("/raw/main/")[1]).is_file(), url
    assert "add_subdirectory(MedSeg)" in text


def test_every_file_of_the_module_is_installed_with_it():
    text = (MODULE / "CMakeLists.txt").read_text().replace("${MODULE_NAME}", "MedSeg")
    scripts = text.split("MODULE_PYTHON_SCRIPTS")[1].split(")")[0].split()
    there = [path.relative_to(MODULE).as_posix() for path in MODULE.rglob("*.py")]
    assert sorted(scripts) == sorted(there)
    resources = text.split("MODULE_PYTHON_RESOURCES")[1].split(")")[0].split()
    assert all((MODULE / name).is_file() for name in resources)
    # Slicer loads every file of the folder itself as a module.
    assert [path.name for path in MODULE.glob("*.py")] == ["MedSeg.py"]


def test_the_icon_is_what_its_program_draws(monkeypatch):
    from PIL import Image

    monkeypatch.syspath_prepend(str(EXTENSION))
    pictures = importlib.import_module("make_pictures")
    for path in pictures.ICONS:
        assert np.array_equal(np.asarray(Image.open(path)), pictures.icon())


def python_3_9_misses(tree: ast.AST) -> list[str]:
    """What of a module Python 3.9 does not have, beside its grammar."""
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            words = {word.arg for word in node.keywords}
            if name == "dataclass" and words & {"kw_only", "slots"}:
                missing.append(f"line {node.lineno}: dataclass of 3.10")
            if name == "zip" and "strict" in words:
                missing.append(f"line {node.lineno}: zip of 3.10")
            if name in ("isinstance", "issubclass") and isinstance(node.args[1], ast.BinOp):
                missing.append(f"line {node.lineno}: {name} of 3.10")
        if isinstance(node, ast.ImportFrom) and node.module in ("itertools", "typing"):
            newer = {"pairwise", "batched", "Self", "TypeAlias", "ParamSpec", "NotRequired"}
            if newer & {alias.name for alias in node.names}:
                missing.append(f"line {node.lineno}: {node.module}")
        if isinstance(node, ast.Import) and {"tomllib"} & {alias.name for alias in node.names}:
            missing.append(f"line {node.lineno}: tomllib")
    return missing


@pytest.mark.parametrize("path", sorted(MODULE.rglob("*.py")), ids=lambda path: path.stem)
def test_slicers_oldest_python_can_read_the_module(path):
    """That of Slicer 5.2 to 5.8 is 3.9."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    assert python_3_9_misses(tree) == []
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "annotations" in path.read_text(encoding="utf-8") or path.stem == "__init__"
    of_slicer = {"slicer", "qt", "ctk", "vtk", "numpy"}
    if path.parent.name == "MedSegLib":
        assert not {name.split(".")[0] for name in names if name} & of_slicer
    if path.name in ("scene.py", "work.py"):
        assert not names & {"qt", "ctk"}


def test_what_python_3_9_lacks_would_be_seen():
    code = "from dataclasses import dataclass\n@dataclass(kw_only=True)\nclass A: pass\n"
    code += "isinstance(1, int | str)\nzip([], [], strict=True)\n"
    assert len(python_3_9_misses(ast.parse(code))) == 3
    with pytest.raises(SyntaxError):
        ast.parse("match 1:\n    case 1: pass", feature_version=(3, 9))


def test_the_command_line_says_where_the_module_is():
    ran = tiny.medseg("view", "--slicer-module")
    assert ran.code == 0
    assert Path(ran.out.strip()) == MODULE


# --- commands ---


def test_a_run_segments_and_says_how_far_it_is(lib, scan, tmp_path):
    chosen = lib.settings.Settings(model="otsu", device="cpu")
    result = tmp_path / "labels.seg.nrrd"
    run = lib.command.Run(
        lib.segmenting.infer_command(MEDSEG, [scan], result, chosen), tiny.environment()
    )
    lines = wait(run)
    run.finish()
    assert io.read_labels(result).data.any()
    assert any("voxels" in line for line in lines)
    assert run.look().what == "writing"
    summary = lib.segmenting.summary_of([run.output, "damaged"])
    assert [name for name, _ in summary.volumes_ml] == list(read_table(result).names.values())
    assert summary.volumes_ml[0][1] > 0 and summary.seconds > 0


def test_settings_become_options(lib):
    chosen = lib.settings.Settings(
        model="/m", structures=("left body", "right body"), device="cuda", cleanup=False,
        mirrored=True,
    )  # fmt: skip
    words = lib.segmenting.infer_command(["medseg"], [Path("a"), Path("b")], Path("o"), chosen)
    text = " ".join(words)
    assert "--channel b" in text and "--roi left body,right body" in text
    assert words[words.index("--model") + 1] == "/m"
    assert {"--no-cleanup", "--tta"} <= set(words)
    plain = lib.segmenting.infer_command(["m"], [Path("a")], Path("o"), lib.settings.Settings())
    assert not {"--model", "--roi", "--channel", "--no-cleanup", "--tta"} & set(plain)
    with pytest.raises(ValueError, match="holds a comma"):
        lib.segmenting.roi_text(["a,b"])
    assert tiny.medseg(*words[1:3]).code != 0  # a is no file, but the words are medseg's


def test_the_options_are_those_that_medseg_has(lib):
    text = tiny.medseg("infer", "--help").out
    chosen = lib.settings.Settings(
        model="m", structures=("a",), device="cpu", cleanup=False, mirrored=True
    )
    words = lib.segmenting.infer_command([], [Path("a"), Path("b")], Path("o"), chosen)
    options = {word for word in words if word.startswith("--")} - {"--no-cleanup"}
    assert all(option in text for option in options)
    assert lib.segmenting.devices_in(text)[:3] == ["auto", "cpu", "cuda"]
    assert lib.segmenting.devices_in("--device auto|cpu|mps|cuda:N") == ["auto", "cpu", "mps"]
    assert lib.segmenting.devices_in("nothing") == ["auto", "cpu"]
    assert lib.segmenting.device_words("auto", "cuda:0") == "auto chose cuda:0"
    assert lib.segmenting.device_words("cpu", "cpu") == "on cpu"
    assert lib.segmenting.device_words("auto", "") == ""


def test_progress_is_a_share_and_a_time(command, monkeypatch):
    script = """import json
for done in range(5):
    event = {"event": "progress", "what": "segmenting", "done": done, "total": 4}
    print(json.dumps(event), file=sys.stderr)"""
    run = command.Run([sys.executable, "-c", f"import sys\n{script}"])
    wait(run)
    run.finish()
    state = run.look()
    assert (state.what, state.share) == ("segmenting", 1.0)
    now = iter([0.0, 10.0, 30.0])
    pace = command.Pace(lambda: next(now))
    assert pace.left_s(None) is None
    assert [pace.left_s(share) for share in (0.2, 0.4, 0.6)] == [None, 30.0, 30.0]
    words = [command.time_left(seconds) for seconds in (None, 12.4, 600, 9000)]
    assert words == ["", "about 12 s left", "about 10 min left", "about 2.5 h left"]


def test_commands_follow_each_other_and_stop_at_the_first_that_fails(command, tmp_path):
    ends = tmp_path / "ends"
    ends.mkdir()
    good = [python(f"open({str(ends / name)!r}, 'w'); print({name!r})") for name in "abc"]
    chain = command.Chain(good)
    wait(chain)
    chain.finish()
    assert chain.outputs == ["a\n", "b\n", "c\n"]
    assert sorted(path.name for path in ends.iterdir()) == ["a", "b", "c"]
    (ends / "c").unlink()
    bad = command.Chain([good[0], python("sys.exit('medseg: too bad')"), good[2]])
    wait(bad)
    with pytest.raises(command.CommandError, match="too bad"):
        bad.finish()
    assert not (ends / "c").exists()
    stopped = command.Chain([python("import time; time.sleep(600)"), good[2]])
    stopped.cancel()
    wait(stopped)
    with pytest.raises(command.CommandError, match="stopped"):
        stopped.finish()
    assert not (ends / "c").exists()
    with pytest.raises(command.CommandError, match="nothing to do"):
        command.Chain([])


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("print('[1]', file=sys.stderr); sys.exit(1)", r"\[1\]"),
        ("print('{\"event\": 5}', file=sys.stderr); sys.exit(1)", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
        ("print('RuntimeError: CUDA out of memory. 2 GB', file=sys.stderr); sys.exit(1)", "cpu"),
        ("print('No module named medseg', file=sys.stderr); sys.exit(1)", "press Install"),
        ("print('ERROR: ResolutionImpossible', file=sys.stderr); sys.exit(1)", "kept as they are"),
        ("print('medseg: a: No space left on device', file=sys.stderr); sys.exit(1)", "^a: No"),
        ("print('medseg: x.nii: is no scan; give one\\nbye', file=sys.stderr); sys.exit(3)", "x.n"),
    ],
)
def test_an_error_is_one_sentence_that_says_what_to_do(command, script, said):
    run = command.Run(python(script))
    wait(run)
    with pytest.raises(command.CommandError, match=said) as error:
        run.finish()
    assert "\n" not in str(error.value)
    assert not str(error.value).startswith("medseg:")


@pytest.mark.parametrize(("usual_s", "own_s"), [(0.2, None), (600.0, 0.2)])
def test_what_does_not_stop_is_killed(command, monkeypatch, usual_s, own_s):
    monkeypatch.setattr(command, "PATIENCE_S", usual_s)
    script = "sys.stdout = sys.stderr; import signal, time"
    script += "; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True)"
    run = command.Run(python(f"{script}; time.sleep(600)"), patience_s=own_s)
    while not run.look().lines:
        time.sleep(0.02)
    run.cancel()
    wait(run)
    with pytest.raises(command.CommandError, match="stopped"):
        run.finish()


def test_the_program_is_found_or_asked_for(command, tmp_path):
    assert command.find_command(sys.executable) == [sys.executable]
    with pytest.raises(command.CommandError, match="is not a program"):
        command.find_command(str(tmp_path / "nothing"))
    own = ["PythonSlicer", "-m", "medseg"]
    assert command.find_command(python="PythonSlicer", has_medseg=True) == own
    with mock.patch.object(command.shutil, "which", return_value=None):
        with pytest.raises(command.CommandError, match="press Install"):
            command.find_command()
        with pytest.raises(command.CommandError, match="press Install"):
            command.find_command(python="PythonSlicer", has_medseg=False)
        with mock.patch.object(command, "_answers", return_value=True):
            assert command.find_command(python="PythonSlicer") == own
    for start in (command.Run, command.ask):
        with pytest.raises(command.CommandError, match="cannot be started"):
            start([str(tmp_path / "nothing")])


def test_questions_are_answered_without_waiting_and_the_last_one_counts(lib):
    tasks, said = lib.tasks.Tasks(), []
    slow = python("import time; time.sleep(600)")
    tasks.start("a", slow, then=said.append, failed=said.append)
    tasks.start("a", python("print('new')"), then=said.append, failed=said.append)
    tasks.start("b", python("sys.exit('medseg: bad')"), then=said.append, failed=said.append)
    tasks.start("c", slow, then=said.append, failed=said.append)
    tasks.cancel("c")
    end = time.monotonic() + 600
    while any(map(tasks.at_work, "abc")) and time.monotonic() < end:
        tasks.look()
        time.sleep(0.02)
    assert sorted(said) == ["bad", "new\n", "stopped; nothing was changed"]
    tasks.start("d", slow, then=said.append, failed=said.append)
    tasks.abandon()
    assert not tasks.at_work("d") and len(said) == 3


# --- models ---


def test_models_are_those_of_the_command_line_and_those_used_last(lib, tmp_path):
    own = lib.models.list_models(MEDSEG, tiny.environment())
    assert {"brain", "brain-fast", "otsu"} <= {model.name for model in own}
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    recent = lib.models.remembered([], str(folder))
    recent = lib.models.remembered(recent, str(tmp_path / "gone"))
    assert lib.models.remembered(recent, "brain") == recent
    assert lib.models.remembered(recent, str(folder)) == [str(folder), str(tmp_path / "gone")]
    many = [f"/{number}" for number in range(50)]
    assert len(lib.models.remembered(many, "/x")) == lib.models.MOST_RECENT
    lines = lib.models.choices(own, recent)
    assert (lines[0].name, lines[0].title) == ("", "automatic")
    assert lines[-1].name == str(folder) and lines[-1].title == "run/model"
    with pytest.raises(lib.command.CommandError, match="which models"):
        lib.models.models_in('{"a": 1}')


def test_a_model_says_what_it_is_takes_and_finds(lib, tmp_path):
    folder = tiny.save_two_channels(tmp_path / "two")
    for model, channels, structures in (
        (str(folder), ("T1", "FLAIR"), ("left body", "right body")),
        ("kmeans", ("",), ("intensity class 1 of 3", "intensity class 2 of 3")),
    ):
        ran = tiny.medseg("info", model, "--json")
        facts = lib.models.facts_in(ran.out)
        assert facts.channels == channels
        assert facts.structures[: len(structures)] == structures
        assert f"finds {len(facts.structures)} structures" in facts.text
    assert (
        "2 scans (T1, FLAIR)" in lib.models.facts_in(tiny.medseg("info", folder, "--json").out).text
    )
    for text in ("", "[]", '{"file": "x", "shape": [1, 2, 3]}'):
        with pytest.raises(lib.command.CommandError, match="is no model"):
            lib.models.facts_in(text)


def test_structures_are_in_the_order_of_their_values_and_licences_are_told(lib):
    model = {
        "name": "x", "about": "y", "channels": 1, "labels": {"10": "ten", "9": "nine"},
        "spacing_mm": [1.5, 1.5, 2], "license": "CC BY", "notes": ["careful"], "made_by": "MONAI",
    }  # fmt: skip
    one = lib.models.facts_in(json.dumps({"models": [model]}))
    assert one.structures == ("nine", "ten")
    assert all(word in one.text for word in ("CC BY", "careful", "1.5 x 1.5 x 2 mm", "MONAI"))
    several = {"models": [model, model], "labels": {"2": "two", "1": "one"}}
    assert lib.models.facts_in(json.dumps(several)).structures == ("one", "two")


# --- settings ---


def test_settings_are_kept_in_the_scene_and_between_sessions(lib):
    kept, node = window.Kept(), window.ParameterNode()
    store = lib.store.Store(kept)
    assert store.read() == lib.settings.Settings()
    store.use(node)
    chosen = lib.settings.Settings(
        model="/m", structures=("Größe", 'a "b"'), device="cpu", cleanup=False, show_3d=True,
        program="/p", package="x.whl", box_mm=33.5, recent=("/m", "/n"), data_set="/d", minutes=2.0,
    )  # fmt: skip
    store.write(chosen)
    assert lib.store.Store(kept).read() == chosen
    other = lib.store.Store(window.Kept())
    other.use(node)
    assert (other.read().model, other.read().structures) == ("/m", ("Größe", 'a "b"'))


def test_a_scene_of_a_stranger_says_nothing_of_what_is_run_here(lib):
    node = window.ParameterNode(program="/evil", package="evil", recent='["/evil"]', data_set="/e")
    store = lib.store.Store(window.Kept())
    store.use(node)
    assert store.read() == lib.settings.Settings()
    store.write(lib.settings.Settings(program="/mine"))
    assert node["program"] == "/evil" and store.read().program == "/mine"


@pytest.mark.parametrize(
    "damaged",
    [{"box_mm": "wide"}, {"box_mm": "-3"}, {"box_mm": "nan"}, {"cleanup": "perhaps"},
     {"structures": "liver"}, {"structures": '{"a": 1}'}, {"recent": "[1, 2]"}, {"minutes": "inf"}],
)  # fmt: skip
def test_damaged_settings_are_as_they_are_at_first(lib, damaged):
    assert lib.settings.from_texts(damaged.get) == lib.settings.Settings()


# --- installing ---


def test_an_old_python_is_told_in_one_sentence(lib):
    text = lib.installing.python_problem((3, 9, 10))
    assert (
        "3.9" in text and "3.11" in text and "Slicer 5.10" in text and "choose its program" in text
    )
    assert lib.installing.python_problem((3, 12, 1)) == ""
    assert lib.installing.python_problem() == ""
    assert lib.installing.versions_text((3, 12, 1)).startswith("Python 3.12.1, medseg ")
    assert lib.installing.versions(["no-such-package"]) == {}


def test_pip_is_told_to_exchange_nothing_of_slicers(lib, tmp_path):
    lines = lib.installing.constraints(
        [("torch", "2.5.1+cu121"), ("SimpleITK", "2.4"), ("medseg", "0.1"), ("", "1")]
    )
    assert lines == "SimpleITK==2.4\ntorch==2.5.1+cu121\n"
    assert f"numpy=={np.__version__}\n" in lib.installing.constraints()
    assert "medseg==" not in lib.installing.constraints()
    kept = tmp_path / "kept.txt"
    wheel = tmp_path / "medseg-1-py3-none-any.whl"
    wheel.touch()
    for package in ("medseg", "medseg==0.2", "medseg[dicom]>=0.1", str(wheel)):
        words = lib.installing.pip_command("P", package, kept)
        assert words[:4] == ["P", "-m", "pip", "install"] and words[-1] == package
        assert words[words.index("--constraint") + 1] == str(kept)
    for package in ("--index-url=http://x", "", "a b", "medseg; rm", str(tmp_path / "none.whl")):
        with pytest.raises(ValueError, match="neither a package nor a file"):
            lib.installing.pip_command("P", package, kept)
    assert "kept" in lib.installing.question(True, False)
    assert "extension PyTorch first" in lib.installing.question(False, True)
    assert "may be large" in " ".join(lib.installing.question(False, False).split())


# --- the panels ---


@pytest.fixture
def module(lib, scan, tmp_path, monkeypatch) -> Iterator[types.SimpleNamespace]:
    """MedSeg.py with a stand-in for Slicer's window, whose volumes all are `scan`."""
    kept = window.Kept()
    (tmp_path / "temporary").mkdir()
    with (
        mock.patch.dict(sys.modules, window.stand_ins(kept, tiny.environment())),
        mock.patch("tempfile.tempdir", str(tmp_path / "temporary")),
    ):
        made = importlib.import_module("MedSeg")
        scenes = importlib.import_module("MedSegApp.scene")
        panel = importlib.import_module("MedSegApp.install_panel")
        monkeypatch.setattr(
            scenes, "export_volume", lambda scene, node, path: io.write(io.read(scan), path)
        )
        loaded: list[set[str]] = []

        def load(scene: object, path: Path, volume: object, name: str) -> mock.MagicMock:
            loaded.append(set(read_table(path).names.values()))
            node = mock.MagicMock()
            node.GetName.return_value = name
            node.GetSegmentation.return_value.GetNumberOfSegments.return_value = len(loaded[-1])
            return node

        monkeypatch.setattr(scenes, "load_segmentation", load)
        monkeypatch.setattr(panel, "find_command", lambda *words, **named: MEDSEG)
        monkeypatch.setattr(made, "find_command", lambda *words, **named: MEDSEG)
        yield types.SimpleNamespace(
            MedSeg=made, slicer=sys.modules["slicer"], kept=kept, loaded=loaded, scenes=scenes,
            temporary=tmp_path / "temporary", panel=panel,
        )  # fmt: skip


def opened(module) -> window.Base:
    widget = module.MedSeg.MedSegWidget()
    widget.setup()
    settle(widget)
    return widget


def settle(widget, seconds: float = 600) -> None:
    """Let all that runs end, as Slicer's timer does."""
    end = time.monotonic() + seconds
    names = ("models", "devices", "facts", "pip")
    while time.monotonic() < end:
        widget.look()
        busy = any(map(widget.tasks.at_work, names)) or not widget.segment.apply_button.enabled
        if not busy:
            return
        time.sleep(0.02)
    raise AssertionError("something did not end")


def test_the_logic_is_for_scripts(module, tmp_path):
    logic = module.MedSeg.MedSegLogic()
    assert "brain" in {model.name for model in logic.models()}
    logic.start(window.VolumeNode(), "otsu")
    wait(logic)
    logic.finish()
    assert module.loaded == [{"foreground"}]
    logic.start(window.VolumeNode("my CT"), str(tmp_path / "no model"))
    wait(logic)
    with pytest.raises(module.MedSeg.CommandError, match="no model"):
        logic.finish()
    with pytest.raises(module.MedSeg.CommandError, match="same volume"):
        logic.start([window.VolumeNode(), window.VolumeNode()], "otsu")
    assert not list(module.temporary.iterdir())


def test_an_error_names_the_volume_and_not_a_temporary_file(module):
    logic = module.MedSeg.MedSegLogic()
    logic.start([window.VolumeNode("T1"), window.VolumeNode("FLAIR")], "otsu")
    wait(logic)
    with pytest.raises(module.MedSeg.CommandError) as error:
        logic.finish()
    assert str(module.temporary) not in str(error.value)


def test_what_is_abandoned_leaves_nothing(module, monkeypatch):
    slow = python("import time; time.sleep(600)")
    monkeypatch.setattr(module.MedSeg, "find_command", lambda *words, **named: slow)
    logic = module.MedSeg.MedSegLogic()
    logic.start(window.VolumeNode(), "otsu")
    with pytest.raises(module.MedSeg.CommandError, match="at work already"):
        logic.start(window.VolumeNode(), "otsu")
    logic.abandon()
    wait(logic)
    assert logic.cancelled
    assert not list(module.temporary.iterdir())


def test_the_panel_segments_with_what_is_chosen_and_keeps_it(module):
    widget = opened(module)
    panel = widget.segment
    titles = [title for title, _ in panel.model.items]
    assert titles[:3] == ["automatic", "brain", "brain-fast"]
    panel.apply_button.press()
    module.slicer.util.errorDisplay.assert_called_once_with(
        "Load a scan and choose it as the volume."
    )
    panel.channels[0].setCurrentNode(window.VolumeNode())
    panel.model.currentIndex = titles.index("kmeans")
    settle(widget)
    assert "k-means" in panel.about.text and "finds 3 structures" in panel.about.text
    assert panel.structures.list.count == 3
    panel.device.currentText = "cpu"
    panel.apply_button.press()
    assert not panel.apply_button.enabled and panel.cancel_button.enabled
    settle(widget)

    assert len(module.loaded) == 1
    assert "labels: 3 structures" in panel.status.text
    assert panel.output.currentNode().GetName() == "CT labels"
    assert any("mL" in line for line in widget.install.log.lines)
    widget.cleanup()
    again = opened(module)
    assert again.segment.model.currentText == "kmeans"
    assert again.segment.chosen().device == "cpu"
    again.cleanup()


def test_structures_are_chosen_by_name_and_found_by_words(module):
    widget = opened(module)
    panel = widget.segment
    panel.model.currentIndex = panel.model.findText("brain-fast")
    settle(widget)
    assert panel.structures.list.count == 32 and panel.structures.chosen() == ()
    panel.structures.none.press()
    panel.channels[0].setCurrentNode(window.VolumeNode())
    panel.apply_button.press()
    assert "Tick the structures" in module.slicer.util.errorDisplay.call_args.args[0]
    panel.structures.narrow("HIPPO left")
    shown = [one.text() for one in panel.structures.list.lines if not one.isHidden()]
    assert shown == ["left hippocampus"]
    panel.structures.all.press()
    assert panel.chosen().structures == ("left hippocampus",)
    assert json.loads(module.kept["MedSeg/structures"]) == ["left hippocampus"]
    widget.cleanup()


def test_a_structure_here_needs_a_name_and_a_place(module, monkeypatch):
    widget = opened(module)
    panel = widget.segment
    panel.channels[0].setCurrentNode(window.VolumeNode())
    panel.here_button.press()
    assert "Mark the line" in module.slicer.util.errorDisplay.call_args.args[0]
    panel.model.currentIndex = panel.model.findText("kmeans")
    settle(widget)
    panel.structures.list.marked = panel.structures.list.lines[1]
    monkeypatch.setattr(module.scenes, "slice_position", lambda scene: None)
    panel.here_button.press()
    assert "Show the slices" in module.slicer.util.errorDisplay.call_args.args[0]
    monkeypatch.setattr(module.scenes, "slice_position", lambda scene: (1.0, 2.0, 3.0))
    asked = mock.MagicMock()
    monkeypatch.setattr(panel.work, "start", asked)
    panel.here_button.press()
    box = asked.call_args.kwargs["box"]
    assert (box.low, box.high) == ((-39.0, -38.0, -37.0), (41.0, 42.0, 43.0))
    assert asked.call_args.args[2].structures == ("intensity class 2 of 3",)
    roi = mock.MagicMock()
    roi.GetRASBounds.side_effect = lambda bounds: bounds.__setitem__(
        slice(None), [1, 2, 3, 4, 5, 6]
    )
    panel.roi.setCurrentNode(roi)
    panel.show_running(False)
    panel.here_button.press()
    assert asked.call_args.kwargs["box"].high == (2, 4, 6)
    widget.cleanup()


def test_a_model_of_two_channels_asks_for_two_volumes_by_name(module, tmp_path):
    folder = tiny.save_two_channels(tmp_path / "two")
    widget = opened(module)
    panel = widget.segment
    panel.use_model(str(folder))
    settle(widget)
    assert len(panel.channels) == 2
    assert panel.model.currentText == "two"
    panel.channels[0].setCurrentNode(window.VolumeNode("T1"))
    panel.apply_button.press()
    assert "for every scan" in module.slicer.util.errorDisplay.call_args.args[0]
    panel.model.currentIndex = panel.model.findText("otsu")
    settle(widget)
    assert len(panel.channels) == 1 and panel.channels[0].currentNode().GetName() == "T1"
    assert json.loads(module.kept["MedSeg/recent"]) == [str(folder)]
    widget.cleanup()


def test_cancel_and_errors_leave_the_panel_as_it_was(module, monkeypatch):
    widget = opened(module)
    panel = widget.segment
    panel.channels[0].setCurrentNode(window.VolumeNode())
    monkeypatch.setattr(
        module.panel, "find_command", lambda *w, **n: python("import time; time.sleep(600)")
    )
    panel.apply_button.press()
    widget.look()
    panel.cancel_button.press()
    settle(widget)
    assert panel.status.text == "stopped; nothing was changed"
    module.slicer.util.errorDisplay.assert_not_called()
    monkeypatch.setattr(
        module.panel, "find_command", lambda *w, **n: python("sys.exit('medseg: bad')")
    )
    panel.apply_button.press()
    settle(widget)
    module.slicer.util.errorDisplay.assert_called_once_with("bad")
    assert panel.apply_button.enabled and not panel.cancel_button.enabled
    widget.cleanup()


def test_without_medseg_the_panel_says_what_to_do(module, monkeypatch):
    def none(*words: object, **named: object) -> list[str]:
        raise module.MedSeg.CommandError("medseg was not found; press Install")

    monkeypatch.setattr(module.panel, "find_command", none)
    widget = opened(module)
    assert widget.segment.status.text == "medseg was not found; press Install"
    assert [title for title, _ in widget.segment.model.items] == ["automatic"]
    monkeypatch.setattr(module.panel, "python_problem", lambda: "This Slicer's Python is 3.9.")
    widget.refresh()
    assert widget.segment.status.text == "This Slicer's Python is 3.9."
    assert not widget.install.install_button.enabled
    widget.cleanup()


def test_install_asks_first_keeps_torch_and_shows_what_pip_says(module, monkeypatch):
    widget = opened(module)
    panel = widget.install
    kept: list[str] = []

    def pip(python_: str, package: str, file: Path, upgrade: bool = False) -> list[str]:
        kept.append(file.read_text())
        return python(f"print('Collecting', file=sys.stderr); print('done {package}')")

    monkeypatch.setattr(module.panel, "pip_command", pip)
    module.slicer.util.confirmOkCancelDisplay.return_value = False
    panel.install_button.press()
    assert not kept and not widget.tasks.at_work("pip")
    module.slicer.util.confirmOkCancelDisplay.return_value = True
    panel.install_button.press()
    assert widget.tasks.at_work("pip") and panel.stop_button.enabled
    settle(widget)
    assert "torch==" in kept[0]
    assert {"Collecting", "done medseg", "medseg is installed."} <= set(panel.log.lines)
    assert not list(module.temporary.iterdir())
    question = module.slicer.util.confirmOkCancelDisplay.call_args.args[0]
    assert "is kept" in question and "network" in question
    panel.package.text = "--index-url=evil"
    monkeypatch.undo()
    widget.cleanup()


def test_install_lets_the_extension_pytorch_come_first(module, monkeypatch):
    widget = opened(module)
    monkeypatch.setattr(module.panel, "versions", lambda names: {})
    utilities = types.ModuleType("PyTorchUtils")
    utilities.PyTorchUtilsLogic = mock.MagicMock()
    utilities.PyTorchUtilsLogic.return_value.installTorch.return_value = None
    monkeypatch.setitem(sys.modules, "PyTorchUtils", utilities)
    widget.install.install()
    utilities.PyTorchUtilsLogic.return_value.installTorch.assert_called_once()
    assert not widget.tasks.at_work("pip")
    assert "PyTorch was not installed, so medseg was not either." in widget.install.log.lines
    widget.cleanup()


def test_another_scene_shows_its_choice(module):
    widget = opened(module)
    widget.logic.parameters.SetParameter("model", "otsu")
    widget.logic.parameters.SetParameter("device", "cpu")
    widget.use_scene()
    assert widget.segment.model.currentText == "otsu"
    assert widget.segment.device.currentText == "cpu"
    widget.cleanup()
