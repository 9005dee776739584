"""The loop in the module for 3D Slicer: next case, add, check, train; its commands and answers
against the real command line, its panel against a stand-in for Slicer's window.
"""

from __future__ import annotations

import importlib
import json
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
from medseg.volume import Volume

MODULE = Path(medseg.view.__file__).parent / "slicer" / "MedSeg"
LIST = "case,image,label,split,label_original\na,scans/a.nii.gz,labels/a.nii.gz,train,\n"
LIST += "b,scans/b.nii.gz,,train,labels/original/b.nii.gz\nc,scans/c.nii.gz,,train,\n"
ANSWERS = {
    "models": [{"name": "brain", "about": "a brain", "structures": 2}],
    "add": {
        "dataset": "d",
        "cases": [{"case": "my CT", "structures": ["liver"], "split": "train"}],
    },
    "check": {
        "findings": [
            {"case": "b", "kind": "x", "severity": "warning", "message": "odd", "fixable": False},
            {"case": "a", "kind": "y", "severity": "error", "message": "bad", "fixable": False},
            {"case": "", "kind": "z", "severity": "warning", "message": "few", "fixable": False},
        ]
    },
    "next": {"case": "b", "files": [], "why": "it is least sure of it"},
    "rounds": {
        "rounds": [
            {"round": "1", "run": "r/1", "training": ["a"], "finished": True, "mean_dice": 0.5},
            {"round": "2", "run": "r/2", "training": ["a", "b"], "finished": True,
             "mean_dice": 0.625},
            {"round": "3", "run": "r/3", "training": [], "finished": False, "mean_dice": None},
        ]
    },
}  # fmt: skip
#: Stands for medseg: writes down what it is asked, and answers as medseg does.
PROGRAM = """
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
words = sys.argv[1:]
with (folder / "asked").open("a") as file:
    file.write(json.dumps(words) + chr(10))
if words[0] == "train":
    run = pathlib.Path(words[words.index("--output") + 1])
    event = {{"event": "training", "share": 0.25, "step": 3, "loss": 1.5, "seconds_left": 90}}
    print(json.dumps(event), file=sys.stderr, flush=True)
    while (folder / "slow").exists():
        time.sleep(0.02)
    (run / "model").mkdir(parents=True)
    (run / "model" / "README.md").touch()
elif words[0] in ("next", "convert"):
    target = words[2] if words[0] == "convert" else words[words.index("--output") + 1]
    pathlib.Path(target).write_text("labels")
answers = json.loads((folder / "answers").read_text())
print(json.dumps(answers.get(words[0], {{}})))
sys.exit(3 if words[0] == "check" else 0)
"""


@pytest.fixture
def loop(monkeypatch) -> Iterator[types.ModuleType]:
    """MedSegLib.loop, imported as Slicer does."""
    monkeypatch.syspath_prepend(str(MODULE))
    yield importlib.import_module("MedSegLib.loop")
    window.forget()


@pytest.fixture
def data_set(tmp_path) -> Path:
    folder = tmp_path / "data set"
    for name in ("scans/a", "scans/b", "scans/c", "labels/a", "labels/original/b"):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "cases.csv").write_text(LIST)
    (folder / "labels.csv").touch()
    return folder


def run_in(data_set: Path, name: str, *, finished: bool) -> Path:
    run = data_set / "runs" / name
    (run / "model").mkdir(parents=True)
    if finished:
        (run / "model" / "README.md").touch()
    return run


def test_rounds_follow_each_other_and_go_on_where_they_were_stopped(loop, data_set):
    place = str(data_set)
    assert loop.next_run(place, go_on=False) == (data_set / "runs" / "1", "")
    first = run_in(data_set, "1", finished=True)
    run_in(data_set, "notes", finished=True)
    assert not loop.can_go_on(place)
    assert loop.next_run(place, go_on=True) == (data_set / "runs" / "2", str(first))
    for name in ("9", "10"):
        run_in(data_set, name, finished=name == "9")
    assert loop.can_go_on(place)
    assert loop.next_run(place, go_on=True) == (data_set / "runs" / "10", str(data_set / "runs/9"))
    assert loop.next_run(place, go_on=False)[0].name == "11"


def test_what_medseg_is_told_of_the_loop(loop, data_set, tmp_path):
    place = str(data_set)
    scans = [Path("a.nrrd"), Path("b.nrrd")]
    new = " ".join(
        loop.add_command(
            ["m"], str(tmp_path / "new"), "x", Path("l"), scans=scans, channels=("T1", "FLAIR")
        )
    )
    assert "a.nrrd --channel b.nrrd" in new and "--modalities T1,FLAIR" in new
    there = loop.add_command(["m"], place, "x", Path("l"), scans=scans, channels=("T1", "FLAIR"))
    assert "--modalities" not in there
    known = loop.add_command(["m"], place, "x", Path("l"))
    assert known == ["m", "add", place, "--labels", "l", "--id", "x", "--json"]
    asked = {"model": "/m", "folder": "/s", "device": "cpu"}
    assert "--model" in loop.next_command(["m"], place, Path("p"), **asked)
    run_in(data_set, "1", finished=True)
    words = loop.next_command(["m"], place, Path("p"), **asked)
    assert "--model" not in words and words[words.index("--from") + 1] == "/s"
    words = loop.train_command(["m"], place, Path("r"), start="/o", minutes=2.5, device="cpu")
    assert words[words.index("--time") + 1] == "2.5m"
    assert words[words.index("--finetune") + 1] == "/o"
    assert "--device" not in loop.train_command(
        ["m"], place, Path("r"), start="", minutes=1, device="auto"
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [("5: T1 ax/post", "5 T1 ax post"), ("Größe_1", "Größe_1"), ("../..", ""), (" - ", ""),
     ("x" * 200, "x" * 80)],
)  # fmt: skip
def test_a_case_is_called_as_its_volume_where_that_is_a_name(loop, name, case):
    assert loop.case_name(name) == case


def test_what_medseg_answers_is_read_and_damage_is_one_sentence(loop):
    text = {name: json.dumps(answer) for name, answer in ANSWERS.items()}
    found = loop.findings_in(text["check"])
    assert [(one.case, one.severity) for one in found] == [
        ("a", "error"), ("", "warning"), ("b", "warning"),
    ]  # fmt: skip
    assert loop.score_words(loop.rounds_in(text["rounds"])) == (
        "round 2: mean Dice 0.625, before 0.500"
    )
    assert loop.score_words([]) == ""
    assert loop.added_in(text["add"]) == "my CT is in the data set: liver; to train with"
    assert loop.choice_in(text["next"]).case == "b"
    for read in (loop.findings_in, loop.rounds_in, loop.added_in, loop.choice_in):
        for damaged in ("", "[]", "null"):
            with pytest.raises(loop.CommandError, match="nothing that this module understands"):
                read(damaged)


def test_the_files_of_a_case_are_those_of_the_list(loop, data_set, tmp_path):
    place = str(data_set)
    final = data_set / "labels/a.nii.gz"
    assert loop.files_of(place, "a") == ([data_set / "scans/a.nii.gz"], final)
    assert loop.files_of(place, "b")[1] == data_set / "labels/original/b.nii.gz"
    assert loop.files_of(place, "c")[1] is None
    with pytest.raises(loop.CommandError, match="no case z"):
        loop.files_of(place, "z")
    with pytest.raises(loop.CommandError, match=r"no cases\.csv"):
        loop.files_of(str(tmp_path), "a")


# --- the panel ---


@pytest.fixture
def panel(loop, data_set, tmp_path, monkeypatch) -> Iterator[types.SimpleNamespace]:
    """The module's panel with a stand-in for Slicer's window, and one for medseg."""
    for name in ("temporary", "medseg"):
        (tmp_path / name).mkdir()
    (tmp_path / "medseg" / "answers").write_text(json.dumps(ANSWERS))
    script = tmp_path / "medseg" / "program.py"
    script.write_text(PROGRAM.format(folder=str(tmp_path / "medseg")))
    parts = window.stand_ins(window.Kept(), tiny.environment())
    parts["qt"].QPixmap = lambda path: path
    with (
        mock.patch.dict(sys.modules, parts),
        mock.patch("tempfile.tempdir", str(tmp_path / "temporary")),
    ):
        made = importlib.import_module("MedSeg")
        scenes = importlib.import_module("MedSegApp.scene")
        install = importlib.import_module("MedSegApp.install_panel")
        program = [sys.executable, str(script)]
        monkeypatch.setattr(install, "find_command", lambda *words, **named: program)
        loaded: list[str] = []
        monkeypatch.setattr(
            scenes, "load_volume", lambda scene, path: window.VolumeNode(loaded_name(loaded, path))
        )
        monkeypatch.setattr(
            scenes, "load_segmentation",
            lambda scene, path, volume, name: window.VolumeNode(loaded_name(loaded, path, name)),
        )  # fmt: skip
        for name in ("export_volume", "save_segmentation"):
            monkeypatch.setattr(scenes, name, lambda scene, node, path: path.touch())
        widget = made.MedSegWidget()
        widget.setup()
        widget.loop.data_set.currentPath = str(data_set)
        widget.loop.data_set.emit("currentPathChanged", str(data_set))
        yield types.SimpleNamespace(
            widget=widget, loop=widget.loop, loaded=loaded, folder=tmp_path / "medseg",
            temporary=tmp_path / "temporary", slicer=parts["slicer"], data_set=data_set,
        )  # fmt: skip
        widget.cleanup()


def loaded_name(loaded: list[str], path: Path, name: str = "") -> str:
    assert path.is_file()
    loaded.append(name or path.name)
    return loaded[-1]


def settle(panel, *names: str) -> None:
    """Let what runs end, as Slicer's timer does."""
    end = time.monotonic() + 600
    every = names or ("add", "check", "train", "next", "rounds", "show", "models", "facts")
    while any(map(panel.widget.tasks.at_work, every)):
        assert time.monotonic() < end
        panel.widget.look()
        time.sleep(0.02)
    panel.loop.show_running()


def asked(panel) -> list[list[str]]:
    return [json.loads(line) for line in (panel.folder / "asked").read_text().splitlines()]


def of(panel, name: str) -> list[list[str]]:
    return [words for words in asked(panel) if words[0] == name]


def test_a_corrected_case_goes_into_the_data_set_and_is_known_then(panel):
    settle(panel)
    panel.loop.add_button.press()
    assert "Choose the volume" in panel.slicer.util.errorDisplay.call_args.args[0]
    volume = window.VolumeNode("my: CT")
    panel.widget.segment.channels[0].setCurrentNode(volume)
    panel.widget.segment.output.setCurrentNode(window.VolumeNode("labels"))
    panel.loop.add_button.press()
    assert not panel.loop.add_button.enabled and panel.loop.stop_button.enabled
    settle(panel)

    (words,) = of(panel, "add")
    assert words[1] == str(panel.data_set) and words[2].endswith("scan_0.nrrd")
    assert words[words.index("--id") + 1] == "my CT"
    assert panel.loop.status.text == "my CT is in the data set: liver; to train with"
    assert not list(panel.temporary.iterdir())
    panel.loop.add_button.press()
    settle(panel)
    again = of(panel, "add")[1]
    assert again[2] == "--labels" and again[again.index("--id") + 1] == "my CT"
    panel.loop.data_set.currentPath = str(panel.data_set.parent / "other")
    panel.loop.add_button.press()
    settle(panel)
    assert of(panel, "add")[2][2].endswith("scan_0.nrrd")


def test_findings_stand_in_a_table_and_a_click_shows_the_case(panel):
    settle(panel)
    panel.loop.check_button.press()
    settle(panel)
    assert panel.loop.table.texts() == [
        ["a", "error", "bad"], ["", "warning", "few"], ["b", "warning", "odd"],
    ]  # fmt: skip
    assert panel.loop.status.text.startswith("3 findings")
    panel.loop.table.emit("cellClicked", 0, 0)
    settle(panel)
    assert panel.loaded == ["a.nii.gz", "a labels"]
    (words,) = of(panel, "convert")
    assert words[1] == str(panel.data_set / "labels/a.nii.gz")
    assert words[words.index("--labels") + 1] == str(panel.data_set / "labels.csv")
    panel.loop.table.emit("cellClicked", 1, 0)
    assert "as a whole" in panel.loop.status.text
    assert panel.widget.segment.channels[0].currentNode().GetName() == "a.nii.gz"
    assert not list(panel.temporary.iterdir())


def test_channels_are_those_of_their_names_in_the_data_set_and_in_the_model(loop, tmp_path):
    (tmp_path / "cases.csv").write_text("case,image_FLAIR,image_T1,label\n")
    place, scans = str(tmp_path), [Path("t1.nrrd"), Path("flair.nrrd")]
    assert loop.channels_of(place) == ["FLAIR", "T1"]
    words = loop.add_command(
        ["medseg"], place, "a", Path("l.seg.nrrd"), scans=scans, channels=("T1", "FLAIR")
    )
    assert words[3:6] == ["flair.nrrd", "--channel", "t1.nrrd"]
    words = loop.add_command(
        ["medseg"], place, "a", Path("l.seg.nrrd"), scans=scans, channels=("", "")
    )
    assert words[3:6] == ["t1.nrrd", "--channel", "flair.nrrd"]
    assert loop.in_order("ab", ["flair", "T1"], ("T1", "FLAIR")) == ["b", "a"]
    assert loop.channels_of(str(tmp_path / "nowhere")) == []


def test_what_a_model_proposed_keeps_its_own_names(loop, data_set):
    """Its values may mean something else in the data set's table."""
    proposal, target = data_set / "labels/original/b.seg.nrrd", data_set / "o.seg.nrrd"
    words = loop.convert_command(["medseg"], str(data_set), proposal, target)
    assert words == ["medseg", "convert", str(proposal), str(target)]


def test_training_that_is_stopped_has_time_to_end_its_step(panel, monkeypatch):
    started = []
    real = panel.loop._tasks.start

    def start(name, *arguments, **options):
        started.append((name, options.get("patience_s")))
        real(name, *arguments, **options)

    monkeypatch.setattr(panel.loop._tasks, "start", start)
    settle(panel)
    panel.loop.train_button.press()
    settle(panel)
    panel.loop.check_button.press()
    settle(panel)
    patience = dict(started)
    assert patience["train"] >= 60 and patience["check"] is None


def test_the_next_case_is_loaded_with_its_proposal(panel):
    settle(panel)
    scan = panel.data_set / "scans" / "b.nii.gz"
    answers = ANSWERS | {"next": ANSWERS["next"] | {"files": [str(scan)]}}
    (panel.folder / "answers").write_text(json.dumps(answers))
    panel.loop.scans.currentPath = "/more"
    panel.loop.next_button.press()
    settle(panel)
    assert panel.loaded == ["b.nii.gz", "b labels"]
    assert panel.loop.status.text == "b: it is least sure of it. Correct it, then press Add."
    (words,) = of(panel, "next")
    assert words[words.index("--from") + 1] == "/more"
    panel.loop.add_button.press()
    settle(panel)
    (words,) = of(panel, "add")
    assert words[words.index("--id") + 1] == "b" and words[2] == "--labels"


def test_training_shows_where_it_is_and_can_be_stopped_and_gone_on_with(panel):
    settle(panel)
    (panel.folder / "slow").touch()
    panel.loop.minutes.value = 2.0
    panel.loop.train_button.press()
    run = panel.data_set / "runs" / "1"
    run.mkdir(parents=True)
    (run / "progress.png").touch()
    panel.loop.curves.setPixmap = seen = mock.MagicMock()
    end = time.monotonic() + 600
    while panel.loop.bar.value != 25 and time.monotonic() < end:
        panel.widget.look()
        time.sleep(0.02)
    assert panel.loop.bar.format == "training %p% about 2 min left"
    seen.assert_called_with(str(run / "progress.png"))
    panel.loop.stop_button.press()
    settle(panel)
    assert panel.loop.status.text == "stopped; what was learnt is kept, and Go on goes on with it"
    (panel.folder / "slow").unlink()
    assert panel.loop.go_on_button.enabled
    panel.loop.go_on_button.press()
    settle(panel)

    first, second = of(panel, "train")
    assert first == second
    assert first[first.index("--output") + 1] == str(run)
    assert first[first.index("--time") + 1] == "2m" and "--finetune" not in first
    assert panel.loop.status.text == "round 2: mean Dice 0.625, before 0.500"
    assert "round 1, 1 cases: mean Dice 0.500" in panel.widget.install.log.lines
    assert panel.widget.segment.chosen().model == str(run)
    assert not panel.loop.go_on_button.enabled


def test_an_answer_that_is_none_is_one_sentence(panel):
    settle(panel)
    (panel.folder / "answers").write_text('{"check": {"found": 1}, "next": []}')
    panel.loop.check_button.press()
    settle(panel)
    assert "damaged" in panel.loop.status.text
    panel.loop.next_button.press()
    settle(panel)
    assert "nothing that this module understands" in panel.loop.status.text
    assert not list(panel.temporary.iterdir())


def test_without_a_data_set_nothing_but_add_can_be_pressed(panel):
    panel.loop.data_set.currentPath = ""
    panel.loop.show_running()
    buttons = ("add", "next", "check", "train", "go_on", "stop")
    assert not any(getattr(panel.loop, f"{name}_button").enabled for name in buttons)
    panel.loop.data_set.currentPath = "/new"
    panel.loop.show_running()
    enabled = [name for name in buttons if getattr(panel.loop, f"{name}_button").enabled]
    assert enabled == ["add"]


# --- the real command line ---


def test_the_loop_of_the_module_is_that_of_the_command_line(loop, tmp_path):
    if tiny.medseg("add", "--help").code != 0:
        pytest.skip("this medseg has no command add")
    place = str(tmp_path / "grows")
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    image = io.read(scan)
    labels = Volume((image.data > image.data.mean()).astype(np.uint8), image.affine)
    io.write(labels, tmp_path / "labels.seg.nrrd")
    command = ["medseg"]

    words = loop.add_command(
        command, place, "first", tmp_path / "labels.seg.nrrd", scans=[scan], channels=("T1",)
    )
    ran = tiny.medseg(*words[1:])
    assert ran.code == 0, ran.err
    assert loop.added_in(ran.out).startswith("first is in the data set: label 1")
    assert loop.is_data_set(place)
    again = tiny.medseg(
        *loop.add_command(command, place, "first", tmp_path / "labels.seg.nrrd")[1:]
    )
    assert again.code == 0, again.err
    scans, final = loop.files_of(place, "first")
    assert scans[0].is_file() and final is not None and final.is_file()
    assert (Path(place) / loop.TABLE).is_file()
    found = tiny.medseg(*loop.check_command(command, place)[1:])
    assert isinstance(loop.findings_in(found.out), list)
    rounds = tiny.medseg(*loop.rounds_command(command, place, "cpu")[1:])
    assert rounds.code == 0, rounds.err
    assert loop.rounds_in(rounds.out) == []
    (tmp_path / "more").mkdir()
    other = tiny.save_scan(tmp_path / "more" / "other.nii.gz", seed=3)
    folder = tiny.save_unet(tmp_path / "model")
    chosen = tiny.medseg(
        *loop.next_command(
            command, place, tmp_path / "p.seg.nrrd", model=str(folder), folder=str(other.parent),
            device="cpu",
        )[1:]
    )  # fmt: skip
    assert chosen.code == 0, chosen.err
    choice = loop.choice_in(chosen.out)
    assert choice.case == "other" and Path(choice.files[0]).is_file()
    assert (tmp_path / "p.seg.nrrd").is_file()
    options = loop.train_command(command, place, Path("r"), start="m", minutes=1, device="cpu")
    text = tiny.medseg("train", "--help").out
    assert all(word in text for word in options if word.startswith("--"))
