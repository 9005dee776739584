"""Lists of cases: what their columns mean, and what is wrong with a list in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg.cohort.lists import read_list
from medseg.errors import BadConfig, BadFile


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_rows_of_a_table_are_cases_in_the_order_of_their_names(tmp_path: Path):
    text = (
        "case,image,group,series,volume,site,age\nb,x/b.nii,p2,,,Ulm,30\na,/d/a.nii,p1,2,3,Kiel,\n"
    )
    cohort = read_list(write(tmp_path / "list.csv", text))
    a, b = cohort.cases
    assert (a.name, a.images, a.group, a.series, a.volume) == ("a", ("/d/a.nii",), "p1", "2", 3)
    assert b.images == (str(tmp_path / "x/b.nii"),)
    assert (b.series, b.volume) == ("", None)
    assert cohort.columns == ("site", "age")
    assert (a.carried, b.carried) == (("Kiel", ""), ("Ulm", "30"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_quotes_and_the_mark_of_excel_are_understood(tmp_path: Path, delimiter: str):
    rows = [["case", "image", "note"], ["a", '"a b.nii"', '"x, y; z"']]
    text = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n"
    suffix = ".tsv" if delimiter == "\t" else ".csv"
    cohort = read_list(write(tmp_path / f"list{suffix}", text))
    assert cohort.cases[0].images == (str(tmp_path / "a b.nii"),)
    assert cohort.cases[0].carried == ("x, y; z",)


def test_lines_of_json_are_cases(tmp_path: Path):
    rows = [{"case": "a", "image": "a.nii", "age": 3}, {"image": "b.nii.gz", "site": None}]
    path = write(tmp_path / "list.jsonl", "\n".join(json.dumps(row) for row in rows))
    cohort = read_list(path)
    assert [case.name for case in cohort.cases] == ["a", "b"]
    assert cohort.columns == ("age", "site")
    assert cohort.cases[0].carried == ("3", "")


def test_parquet_gives_what_csv_gives(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason='reads Parquet: pip install "medseg[parquet]"')
    from pyarrow import parquet

    table = pyarrow.table({"case": ["b", "a"], "image": ["b.nii", "a.nii"], "age": [1, None]})
    parquet.write_table(table, tmp_path / "list.parquet")
    csv = write(tmp_path / "list.csv", "case,image,age\nb,b.nii,1\na,a.nii,\n")
    assert read_list(tmp_path / "list.parquet").cases == read_list(csv).cases


def test_channels_are_found_by_the_models_names_and_by_number(tmp_path: Path):
    for header in (
        "case,image_FLAIR,image_t1",
        "case,image_1,image_0",
        "case,image_0001,image_0000",
    ):
        path = write(tmp_path / "list.csv", f"{header}\na,f.nii,t.nii\n")
        (case,) = read_list(path, ("T1", "FLAIR")).cases
        assert [Path(name).name for name in case.images] == ["t.nii", "f.nii"]


def test_a_row_without_a_file_is_a_case_with_a_problem(tmp_path: Path):
    path = write(tmp_path / "list.csv", "case,image_T1,image_FLAIR\na,t.nii,\nb,t.nii,f.nii\n")
    a, b = read_list(path, ("T1", "FLAIR")).cases
    assert "no file" in a.problem
    assert not b.problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("case,image\n", "no case"),
        ("case,file\na,b\n", "no column 'image'"),
        ("case,image\na,b,c\n", "line 2"),
        ("case,image,Case\na,b,c\n", "two columns"),
        ("case,image\na,1\na,2\n", "more than once: a"),
        ("case,image\n../a,1\n", "cannot name a case"),
        ("case,image\n.a,1\n", "cannot name a case"),
        ("case,image\na\x1b,1\n", "cannot name a case"),
        ("case,image,volume\na,1,x\n", "row 2, column 'volume'"),
        ("case,image,volume\na,1,-1\n", "row 2, column 'volume'"),
        (f"case,image\n{'a' * 200},1\n", "longer than"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_its_name(tmp_path: Path, text: str, words: str):
    path = write(tmp_path / "list.csv", text)
    with pytest.raises((BadFile, BadConfig), match=words) as caught:
        read_list(path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"case,image\n\xff,1\n")
    with pytest.raises(BadFile, match="UTF-8"):
        read_list(path)


def test_an_apostrophe_of_a_spreadsheet_is_taken_off_again(tmp_path: Path):
    path = write(tmp_path / "list.csv", "case,image,group\na,a.nii,'=1+1\n")
    assert read_list(path).cases[0].group == "=1+1"


def test_columns_that_a_spreadsheet_adds_without_a_name_are_none(tmp_path: Path):
    path = write(tmp_path / "list.csv", "case,image,,\na,a.nii,,\n")
    assert read_list(path).columns == ()
    path = write(tmp_path / "list.csv", "case,image,,\na,a.nii,,1\n")
    assert read_list(path).columns == ("",)


@pytest.mark.parametrize("header", ["case\timage\tage", '\n\ncase;image;"age, in years"'])
def test_the_delimiter_is_what_makes_columns_of_the_first_line(tmp_path: Path, header: str):
    delimiter = "\t" if "\t" in header else ";"
    path = write(tmp_path / "list.csv", f"{header}\n{delimiter.join(('a', 'a.nii', '7'))}\n")
    assert read_list(path).cases[0].carried == ("7",)


def test_json_may_hold_what_ends_a_line_elsewhere(tmp_path: Path):
    note = "x\u2028y\u0085z\x0c"
    row = json.dumps({"case": "a", "image": "a.nii", "note": note}, ensure_ascii=False)
    cohort = read_list(write(tmp_path / "list.jsonl", f"{row}\r\n"))
    assert cohort.cases[0].carried == (note,)


def test_whole_numbers_of_a_column_with_gaps_are_whole(tmp_path: Path):
    path = write(tmp_path / "list.csv", "case,image,series,volume\na,x,3.0,2.0\nb,x,1.2.0,\n")
    a, b = read_list(path).cases
    assert (a.series, a.volume) == ("3", 2)
    assert b.series == "1.2.0"  # a UID
    with pytest.raises(BadFile, match=r"2\.5"):
        read_list(write(tmp_path / "list.csv", "case,image,volume\na,x,2.5\n"))


@pytest.mark.parametrize("name", ["a\0.nii", "\ud800.nii"])
def test_what_no_file_can_be_called_is_a_case_with_a_problem(tmp_path: Path, name: str):
    rows = [{"case": "a", "image": name}, {"case": "b", "image": "b.nii"}]
    path = write(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows)))
    a, b = read_list(path).cases
    assert "no file can be called" in a.problem
    assert not Path(a.images[0]).exists()
    assert not b.problem


def test_a_column_that_is_there_twice_is_refused_in_parquet_too(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason='reads Parquet: pip install "medseg[parquet]"')
    from pyarrow import parquet

    table = pyarrow.table(
        [pyarrow.array([one]) for one in ("a", "a.nii", "b.nii")], names=["case", "image", "image"]
    )
    parquet.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(BadFile, match="two columns are called 'image'"):
        read_list(tmp_path / "list.parquet")


def test_numbers_that_are_none_are_empty_in_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason='reads Parquet: pip install "medseg[parquet]"')
    from pyarrow import parquet

    numbers = pyarrow.array([2.0, float("nan")], from_pandas=False)
    times = pyarrow.array([1, 2], pyarrow.timestamp("ns"))
    columns = {"case": ["a", "b"], "image": ["x", "x"], "volume": numbers, "at": times}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    cohort = read_list(tmp_path / "list.parquet")
    assert [case.volume for case in cohort.cases] == [2, None]
    assert cohort.cases[0].carried[0].startswith("1970-01-01")
