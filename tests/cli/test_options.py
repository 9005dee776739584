"""Options that commands share: groups, structures by name, what is logged."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import typer
from typer.main import get_command

from making import networks as tiny
from medseg.cli.app import PANELS, make_app
from medseg.cli.command import Command, with_groups
from medseg.cli.options import Dicom, Network, OfNnunet, Reading, Results, words_of
from medseg.labels import Label, LabelTable

GROUPS = (Network, OfNnunet, Results, Reading, Dicom)
COMMANDS = [name for panel, titles in PANELS.items() if panel for name in titles]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    PANEL: ClassVar[str] = "Sizes"

    width: Annotated[int, typer.Option(metavar="MM", help="How wide.")] = 3
    is_deep: Annotated[bool, typer.Option("--deep/--flat", help="How deep.")] = True
    name: Annotated[str | None, typer.Option("--name", "-n", metavar="TEXT", help="Whose.")] = None
    other: Annotated[bool, typer.Option("--other", help="Not these.")] = False


def called_with(*words: str) -> list[Any]:
    """What a command with a group gets from a command line."""
    calls: list[Any] = []

    def command(
        scan: Annotated[str, typer.Argument(metavar="SCAN", help="A scan.")], sizes: Sizes
    ) -> None:
        """Do something."""
        calls.append((scan, sizes))

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=Command)(with_groups(command))
    app(list(words), standalone_mode=False)
    return calls


def test_a_group_is_given_as_it_was_typed():
    assert called_with("a") == [("a", Sizes())]
    assert called_with("a", "--width", "5", "--flat", "-n", "x") == [
        ("a", Sizes(width=5, is_deep=False, name="x"))
    ]


@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(width=-7), Sizes(is_deep=False, name="--deep"), Sizes(other=True)]
)
def test_the_words_of_a_group_say_the_same(sizes: Sizes):
    assert called_with("a", *words_of(sizes)) == [("a", sizes)]
    assert words_of(Sizes()) == []


@pytest.mark.parametrize("group", GROUPS)
def test_infer_and_batch_take_every_option_of_a_group(group: Any):
    commands = get_command(make_app()).commands  # type: ignore[attr-defined]
    for command in ("infer", "batch"):
        params = {one.name: one for one in commands[command].params}
        for field in fields(group):
            assert params[field.name].rich_help_panel == group.PANEL
            assert params[field.name].default == field.default


def test_listen_takes_what_the_network_does_and_hands_it_on():
    changed = Network(device="cpu", precision="fp32", overlap=0.25, tta=False, cleanup=False)
    words = words_of(changed)
    assert words == [
        "--device=cpu", "--precision=fp32", "--overlap=0.25", "--no-tta", "--no-cleanup",
    ]  # fmt: skip
    command = get_command(make_app("infer")).commands["infer"]  # type: ignore[attr-defined]
    ctx = command.make_context("infer", ["scan.nii.gz", *words])
    assert {field.name: ctx.params[field.name] for field in fields(Network)} == vars(changed)


# Structures by name -------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Label maps of 1 liver, 2 tumour and 3 tumour edge, with and without a table."""
    monkeypatch.chdir(tmp_path)
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[2:9, 2:9, 2:9], labels[4:6, 4:6, 4:6], labels[6, 6, 6], labels[14, 14, 14] = 1, 2, 3, 1
    for folder in ("named", "bare"):
        Path(folder).mkdir()
        for case in ("a", "b"):
            tiny.save_nifti(tmp_path / folder / f"{case}.nii.gz", labels, tiny.affine_of())
    names = ("liver", "tumour", "tumour edge")
    table = LabelTable(tuple(Label(n, name, (n, n, n)) for n, name in enumerate(names, 1)))
    table.write("named/labels.csv")
    table.write("table.label")
    return tmp_path


def run(line: str) -> tiny.Ran:
    return tiny.medseg(*line.split("|"))


def test_clean_takes_names(place: Path):
    ran = run("clean|named/a.nii.gz|-o|c.nii.gz|--labels|LIVER,3|--keep-largest|--json")
    assert json.loads(ran.out)["voxels_changed"] == 1
    ran = run("clean|named/a.nii.gz|-o|d.nii.gz|--labels|lever|--keep-largest")
    assert (ran.code, "did you mean liver" in ran.err) == (5, True)
    ran = run("clean|bare/a.nii.gz|-o|d.nii.gz|--labels|liver|--keep-largest")
    assert (ran.code, "no label table" in ran.err) == (5, True)
    assert not Path("d.nii.gz").exists()


@pytest.mark.parametrize("words", ["--labels|tumour edge,1", "--labels|Tumour_Edge,Liver"])
def test_evaluate_takes_names_of_structures(words: str, place: Path):
    ran = run(f"evaluate|named|named|-o|e|--json|{words}")
    assert ran.code == 0, ran.err
    assert list(json.loads(ran.out)["structures"]) == ["tumour edge", "liver"]


@pytest.mark.parametrize(
    "line",
    [
        "named|named|--lesions|tumour|--ignore|tumour edge",
        "named|named|--lesions|2|--ignore|3",
        "bare|bare|--table|table.label|--lesions|TUMOUR|--ignore|Tumour-edge",
        "bare|bare|--labels|tumour=2,rest=1+3|--lesions|Tumour|--ignore|3",
        "bare|bare|--labels|tumour=2,rest=1+3|--lesions|2|--ignore|3",
    ],
)
def test_evaluate_takes_names_and_numbers_of_lesions_and_what_to_ignore(line: str, place: Path):
    ran = run(f"evaluate|{line}|-o|e|--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["options"]["lesions"] == ["tumour"]
    assert summary["options"]["ignore"] == 3
    assert summary["structures"]["tumour"]["lesion_f1"]["mean"] == 1


def test_without_names_structures_are_called_by_their_numbers(place: Path):
    ran = run("evaluate|bare|bare|-o|e|--json|--lesions|2|--tolerance|1=2|--tolerance|1")
    summary = json.loads(ran.out)
    assert summary["options"]["lesions"] == ["label 2"]
    assert summary["options"]["tolerance_mm"] == {"label 1": 2, "": 1}
    assert "lesion_f1" in summary["structures"]["label 2"]


@pytest.mark.parametrize("words", ["--ignore|spleen", "--lesions|spleen", "--tolerance|spleen=1"])
def test_evaluate_refuses_names_that_are_not_there(words: str, place: Path):
    for folder in ("named", "bare"):
        ran = run(f"evaluate|{folder}|{folder}|-o|e|{words}")
        assert ran.code == 5
        assert "spleen" in ran.err
        assert not Path("e").exists()


@pytest.mark.parametrize(("asked", "code"), [("Tumour_edge", 0), ("spleen", 5), ("9", 5)])
def test_compare_takes_names(asked: str, code: int, place: Path):
    for name in ("x", "y"):
        assert run(f"evaluate|named|named|-o|{name}|-q").code == 0
    ran = run(f"compare|x/scores.csv|y/scores.csv|--json|--structure|{asked}")
    assert ran.code == code
    assert ("it has liver, tumour" in ran.err) == bool(code)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("named/a.nii.gz|--segment|Tumour", {0, 2}),
        ("named/a.nii.gz|--segment|tumour edge|--segment|1", {0, 1, 3}),
        ("bare/a.nii.gz|--segment|3", {0, 3}),
        ("bare/a.nii.gz|--segment|LIVER|--labels|table.label", {0, 1}),
    ],
)
def test_convert_takes_names(words: str, left: set[int], place: Path):
    path, *rest = words.split("|")
    ran = tiny.medseg("convert", path, "o.nii.gz", *rest)
    assert ran.code == 0, ran.err
    assert set(np.unique(tiny.volume_of(Path("o.nii.gz")).data)) == left
    assert run("convert|named/a.nii.gz|s.seg.nrrd").code == 0


def test_convert_refuses_names_that_are_not_there(place: Path):
    for words in ("named/a.nii.gz|--segment|spleen", "bare/a.nii.gz|--segment|9"):
        path, *rest = words.split("|")
        ran = tiny.medseg("convert", path, "o.nii.gz", *rest)
        assert ran.code == 5
        assert not Path("o.nii.gz").exists()


@pytest.mark.usefixtures("known_networks", "one_thread")
@pytest.mark.parametrize("option", ["--roi", "--probabilities"])
def test_infer_takes_names_and_says_what_is_near(option: str, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "s.nii.gz")
    model = tiny.save_known(tmp_path / "model")
    words = ("infer", scan, "-m", model, "--device", "cpu", "--json", "-q")
    ran = tiny.medseg(*words, option, "Right_Body")
    assert ran.code == 0, ran.err
    key = "roi" if option == "--roi" else "probabilities"
    assert json.loads(ran.out)["settings"][key] == [41]
    refused = tiny.medseg(*words, option, "body")
    assert refused.code == 5
    assert option in refused.err
    assert "left body or right body" in refused.err


@pytest.mark.usefixtures("known_networks", "one_thread")
def test_a_table_that_is_not_the_one_of_before_makes_infer_do_it_again(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "s.nii.gz")
    model = tiny.save_known(tmp_path / "model")
    table = tmp_path / "names.label"
    table.write_text('2 9 8 7 1 1 1 "links"\n', encoding="utf-8")
    words = ("infer", scan, "-m", model, "--device", "cpu", "--skip-existing", "--table", table)
    assert tiny.medseg(*words).code == 0
    written = LabelTable.read(tmp_path / "s_seg.labels.csv")
    assert written.names == {2: "links", 41: "right body"}
    assert written[2].color == (9, 8, 7)
    assert "skipped" in tiny.medseg(*words).err
    table.write_text('2 9 8 7 1 1 1 "sinistra"\n', encoding="utf-8")
    assert "another table" in tiny.medseg(*words).err
    assert LabelTable.read(tmp_path / "s_seg.labels.csv").names[2] == "sinistra"


# What is logged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"version", "schema", "completion"}))
def test_every_command_that_works_can_be_listened_to(command: str):
    params = get_command(make_app(command)).commands[command].params  # type: ignore[attr-defined]
    assert {"--verbose", "--log"} <= {name for one in params for name in one.opts}


def test_a_log_says_what_was_done_and_how_it_ended(place: Path):
    assert run("convert|bare/a.nii.gz|b.nrrd|--log|l.txt").code == 0
    assert run("convert|nowhere.nii.gz|b.nrrd|--log|l.txt").code == 3
    lines = Path("l.txt").read_text().splitlines()
    assert any("convert begins" in line for line in lines)
    assert any("convert ends well" in line for line in lines)
    assert "convert ends with BadFile" in lines[-1]
    assert not any("nowhere" in line for line in lines)
    silent = run("convert|bare/a.nii.gz|c.nrrd")
    assert (silent.out, silent.err) == ("", "")


def test_a_log_that_cannot_be_written_is_an_output_that_cannot_be(place: Path):
    ran = run("convert|bare/a.nii.gz|b.nrrd|--log|nowhere/l.txt")
    assert ran.code == 4
    assert "nowhere/l.txt" in ran.err
    assert not Path("b.nrrd").exists()
