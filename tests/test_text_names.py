"""Names from strangers do nothing to a terminal, a table or a page; numbers are plain."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from medseg.config import BrainSpec
from medseg.errors import BadConfig, BadFile
from medseg.evaluation import compare, parse_structures, read_scores
from medseg.evaluation.summary import scores_csv
from medseg.labels import Label, LabelTable
from medseg.postprocess.anatomy import write_volumes
from medseg.text import decimal_number, from_cell, harmless, seconds_of, to_cell, whole_number

#: What may be in a name, and must not reach a terminal or a page as it is.
ODD = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "one-byte escape": "\x9b31m",
    "NUL": "a\x00b",
    "bell and backspace": "a\x07\x08b",
    "right to left": "a\u202egpj.exe",
    "isolate": "a\u2066b\u2069",
    "mark": "\u200fa\u061cb\u200e",
    "line break": "one\ntwo",
    "carriage return": "one\rtwo",
    "line separators": "a\u2028b\u2029c\x85d\x0bd\x0ce",
    "invisible": "a\u200bb\ufeffc\u00ad\U000e0041",
    "a byte of no text": "a\udcffb",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_printable_becomes_visible(kind: str):
    shown = harmless(ODD[kind])
    assert shown.isprintable() and "\\" in shown
    assert shown.encode("unicode_escape")  # can be encoded
    assert harmless(shown) == shown


@pytest.mark.parametrize(
    "name", ["liver", "Hjärnbarken, vänster", "肝臓", "مخ", "می\u200cخواهم", "a\u00a0b", "🧠", ""]
)
def test_names_of_all_languages_stay_as_they_are(name: str):
    assert harmless(name) == name


def test_escapes_are_those_of_python():
    assert harmless("\x1b[0m\x00\u202e\n") == r"\x1b[0m\x00\u202e\n"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-", "\n=1"]
)
def test_a_formula_becomes_text_and_comes_back(text: str):
    cell = to_cell(text)
    assert cell[0] not in "=+-@\t\r\n"
    assert from_cell(cell) == harmless(text)
    assert from_cell(to_cell(from_cell(cell))) == harmless(text)


@pytest.mark.parametrize("value", ["liver", "'quoted'", "a=b", "", -1.5, 3, None])
def test_other_cells_stay_as_they_are(value: object):
    assert to_cell(value) == value
    if isinstance(value, str):
        assert from_cell(value) == value


# Commands -----------------------------------------------------------------------------------------

FORBIDDEN = [chr(n) for n in (*range(9), 11, 12, 13, *range(14, 32), *range(127, 160))]
FORBIDDEN += ["\u202e", "\u2066", "\u2069", "\u200e", "\u200f", "\u061c", "\u2028", "\u200b"]


def is_clean(text: str) -> bool:
    return not any(one in text for one in FORBIDDEN)


@pytest.fixture
def odd_model(tmp_path: Path) -> Path:
    """A model whose name and whose first structure's name hold what they should not."""
    folder = tiny.save_unet(tmp_path / "model")
    name = "\x1b[31mRED\x1b]0;title\x07\u202eevil\x00"
    tiny.edit_json(folder, name=f"m\x1b[2J{name}")
    rows = list(csv.reader(io.StringIO((folder / "labels.csv").read_text())))
    rows[2][1] = name
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    (folder / "labels.csv").write_text(text.getvalue())
    return folder


def test_infer_prints_no_name_as_it_is(odd_model: Path, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    out = tmp_path / "out.nii.gz"
    ran = tiny.medseg("infer", scan, "-m", odd_model, "-o", out)
    assert ran.code == 0
    assert is_clean(ran.out) and is_clean(ran.err)
    assert r"\x1b[31mRED" in ran.out and r"\x1b[2J" in ran.err
    assert is_clean((tmp_path / "out.labels.csv").read_text())
    ran = tiny.medseg("infer", scan, "-m", odd_model, "-o", out, "--json", "-q")
    assert is_clean(ran.out) and json.loads(ran.out)["labels"]


def test_view_shows_no_name_as_it_is(odd_model: Path, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    tiny.medseg("infer", scan, "-m", odd_model, "-o", tmp_path / "out.nii.gz", "-q")
    ran = tiny.medseg(
        "view",
        scan,
        tmp_path / "out.nii.gz",
        "-o",
        tmp_path / "p.html",
        "--title",
        "\x1b[31m\u202et",
    )
    assert ran.code == 0, ran.err
    page = (tmp_path / "p.html").read_text()
    head = page[: page.index("<script")]
    assert is_clean(head) and r"\x1b[31m\u202et" in head
    facts = json.loads(page[page.index('id="facts"') :].partition(">")[2].partition("</script>")[0])
    assert all(is_clean(row["name"]) for row in facts["structures"]) and is_clean(facts["title"])


@pytest.mark.parametrize("odd", ["\x1b[31mx", "a\u202eb", "a\rb", "a\nb"], ids=ascii)
@pytest.mark.parametrize("command", ["info", "infer", "convert"])
def test_errors_and_results_name_odd_files_harmlessly(command: str, odd: str, tmp_path: Path):
    (tmp_path / f"{odd}.nii").write_bytes(b"no image")
    rest = (
        [tmp_path / "out.nii.gz"]
        if command == "convert"
        else ["-m", "otsu"]
        if command == "infer"
        else []
    )
    ran = tiny.medseg(command, tmp_path / f"{odd}.nii", *rest)
    assert ran.code == 3 and is_clean(ran.err) and ran.err.count("\n") == 1
    tiny.save_scan(tmp_path / "s.nii.gz").rename(tmp_path / f"{odd}.nii.gz")
    rest = [tmp_path / f"{odd}{odd}.nii.gz"] if command == "convert" else rest
    ran = tiny.medseg(command, tmp_path / f"{odd}.nii.gz", *rest)
    assert ran.code == 0 and is_clean(ran.out) and is_clean(ran.err)


def test_a_file_name_of_bytes_that_are_no_text_is_told(tmp_path: Path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.nii")
    try:
        Path(name).write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes no such names")
    ran = tiny.run_child("-m", "medseg", "info", name)
    assert ran.code == 3 and r"a\udcff.nii" in ran.err and "Traceback" not in ran.err


def labelled(folder: Path, case: str) -> None:
    folder.mkdir(exist_ok=True)
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    tiny.save_nifti(folder / "x.nii.gz", labels, tiny.affine_of())
    (folder / "x.nii.gz").rename(folder / f"{case}.nii.gz")


def test_evaluate_writes_names_that_neither_a_terminal_nor_a_spreadsheet_obeys(tmp_path: Path):
    for case in ("=cmd|' C'!A0", "\x1b[31mred", "-plain", "a\u202eb"):
        for side in ("truth", "mine"):
            labelled(tmp_path / side, case)
    labelled(tmp_path / "truth", "@missing\x07")
    table = LabelTable((Label(1, "+liver\x1b]0;x\x07", (1, 2, 3)),))
    table.write(tmp_path / "t.csv")
    ran = tiny.medseg(
        "evaluate",
        tmp_path / "truth",
        tmp_path / "mine",
        "-o",
        tmp_path / "out",
        "--table",
        tmp_path / "t.csv",
    )
    assert ran.code == 0, ran.err
    assert is_clean(ran.out) and is_clean(ran.err)
    assert is_clean((tmp_path / "out" / "report.html").read_text())
    text = (tmp_path / "out" / "scores.csv").read_text()
    assert is_clean(text)
    for row in csv.reader(io.StringIO(text)):
        assert not any(cell[:1] in ("=", "+", "@") for cell in row[:3]) and row[0][:1] != "-"
    assert {row["case"] for row in read_scores(tmp_path / "out" / "scores.csv")} == {
        "=cmd|' C'!A0", r"\x1b[31mred", "-plain", r"a\u202eb",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".ctbl"])
@pytest.mark.parametrize("name", ["=1+1", "-liver", "+x", "@x", "'=x", "plain"])
def test_label_tables_come_back_and_hold_no_formula(suffix: str, name: str, tmp_path: Path):
    table = LabelTable((Label(1, name, (1, 2, 3)),))
    table.write(tmp_path / f"t{suffix}")
    assert LabelTable.read(tmp_path / f"t{suffix}").names == {1: name}
    if suffix != ".ctbl":  # which no spreadsheet opens
        row = (tmp_path / f"t{suffix}").read_text().splitlines()[-1]
        assert f",{name}," not in row.replace("\t", ",") or name == "plain"


def test_volumes_hold_no_formula(tmp_path: Path):
    rows = [{"value": 1, "name": "=1+1", "ml": 1.0}, {"value": 2, "name": "a\x1bb", "ml": 2.0}]
    write_volumes(tmp_path / "v.csv", rows, BrainSpec(csf=(), grey=(1,), white=(2,)))
    text = (tmp_path / "v.csv").read_text()
    assert "1,'=1+1,1.0" in text and r"2,a\x1bb,2.0" in text


# Numbers ------------------------------------------------------------------------------------------

NO_NUMBERS = ["1_0", "1_000.5", "_1", "１", "٣", "0x10", "1e", "", "1 0", "1\n", "--1", "²", "1,5"]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_people_do_not_write_for_a_number_is_none(text: str):
    for read in (whole_number, decimal_number):
        with pytest.raises(ValueError):
            read(text)


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("-3", -3), ("+7", 7), (" 4", 4), ("007", 7)]
)
def test_whole_numbers_are_read(text: str, value: int):
    assert whole_number(text) == value == decimal_number(text)


@pytest.mark.parametrize("text", ["1.5", "-.5", "2.", "1e-3", "1E+3", "inf", "-Infinity", "nan"])
def test_decimal_numbers_are_read_as_python_reads_them(text: str):
    assert decimal_number(text) == pytest.approx(float(text), nan_ok=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "x.nii", "--batch", "1_0"),
        ("infer", "x.nii", "--overlap=0.2_5"),
        ("infer", "x.nii", "--volume", "1_0"),
        ("evaluate", "a", "b", "--percentile", "9_5"),
        ("evaluate", "a", "b", "--percentile", "50", "--percentile", "9_5"),
        ("listen", "-o", "x", "--port", "1_1112"),
        ("clean", "a.nii", "-o", "b.nii", "--min-mm3", "1_0"),
    ],
    ids=" ".join,
)
def test_options_take_no_underscores_in_numbers(arguments: tuple[str, ...], tmp_path: Path):
    ran = tiny.medseg(*arguments)
    assert ran.code == 2 and "_" in ran.err and "number" in ran.err


def test_texts_of_options_may_look_like_such_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tiny.save_scan(tmp_path / "1_0.nii.gz")
    assert tiny.medseg("infer", "1_0.nii.gz", "-m", "otsu", "-o", "2_0", "-q").code == 0


@pytest.mark.parametrize("text", ["1_0", "a=1_0", "a=1+2_0", "１"])
def test_structures_take_plain_numbers(text: str):
    with pytest.raises(BadConfig, match="is no structure"):
        parse_structures(text)


@pytest.mark.parametrize(
    ("suffix", "line"), [(".csv", "1_0,a,1,2,3"), (".csv", "1,a,1_0,2,3"), (".tsv", "1_0\ta")]
)
def test_label_tables_take_plain_numbers(suffix: str, line: str, tmp_path: Path):
    head = "index\tname" if suffix == ".tsv" else "LabelValue,Name,Color_R,Color_G,Color_B"
    (tmp_path / f"t{suffix}").write_text(f"{head}\n{line}\n")
    with pytest.raises(BadFile, match="1_0"):
        LabelTable.read(tmp_path / f"t{suffix}")


def scores(path: Path, values: list[str], column: str = "dice") -> Path:
    lines = [f"case_{n},liver,ok,{value}" for n, value in enumerate(values)]
    path.write_text(f"case,structure,status,{column}\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("text", ["0.9_1", "0,9", "0x1", "９"])
def test_scores_take_plain_numbers(text: str, tmp_path: Path):
    with pytest.raises(BadFile, match="which is no number"):
        read_scores(scores(tmp_path / "scores.csv", ["0.5", f'"{text}"']))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("dice", "87.3"),
        ("dice", "-0.1"),
        ("dice", "inf"),
        ("surface_dice", "1.5"),
        ("iou", "1e30"),
        ("lesion_f1", "2"),
        ("hausdorff95_mm", "-3"),
        ("assd_mm", "-inf"),
        ("lesions_missed", "-1"),
    ],
)
def test_scores_that_cannot_be_are_named_with_their_file_and_case(
    column: str, value: str, tmp_path: Path
):
    good = scores(tmp_path / "good.csv", ["0.5", "0.6", "0.7"], column)
    absurd = scores(tmp_path / "absurd.csv", ["0.5", value, "0.7"], column)
    with pytest.raises(BadFile, match="case_1") as caught:
        compare([good, absurd], score=column)
    assert "absurd.csv" in str(caught.value) and column in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value"), [("dice", "nan"), ("hausdorff_mm", "inf"), ("dice", "1.0000001")]
)
def test_scores_that_can_be_are_compared(column: str, value: str, tmp_path: Path):
    files = [scores(tmp_path / f"{n}.csv", ["0.5", "0.6", "0.7", value], column) for n in "ab"]
    assert compare(files, score=column).n_cases >= 3


def test_two_rows_of_one_case_and_structure_are_named(tmp_path: Path):
    files = [scores(tmp_path / f"{n}.csv", ["0.5", "0.6", "0.7"]) for n in "ab"]
    with files[1].open("a") as file:
        file.write("case_1,liver,ok,0.9\n")
    with pytest.raises(BadFile, match="two rows of case_1, liver"):
        compare(files)


def test_what_is_written_is_read_back(tmp_path: Path):
    rows = [{"case": "=a", "structure": "-b", "status": "ok", "dice": 0.5}]
    (tmp_path / "scores.csv").write_text(scores_csv(rows))
    assert read_scores(tmp_path / "scores.csv") == rows


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("1.5h", 5400), ("90s", 90), ("1h30m", 5400), ("7", 420), (" 2 h 5 M ", 7500)],
)
def test_a_time_is_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "0", "0m", "-3m", "1h x", "\u0663m", "1_0m", "3m 5"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="not a time"):
        seconds_of(text)
