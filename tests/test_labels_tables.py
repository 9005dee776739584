"""FreeSurfer's lookup table and ITK-SNAP's label file, and structures by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import BadConfig, BadFile
from medseg.labels import Label, LabelTable, same_name

FREESURFER = """\
#$Id: FreeSurferColorLUT.txt,v 1.70 2012/08/27 17:20:08 somebody Exp $

#No. Label Name:                            R   G   B   A

0   Unknown                                 0   0   0   0
2   Left-Cerebral-White-Matter              245 245 245 0
17  Left-Hippocampus                        220 216 20  0   3
1035    ctx-lh-insula                       255 192 32  0

# Below is another part
11101  ctx_lh_G_and_S_frontomargin          23  220  60   0
11101  ctx_lh_G_and_S_frontomargin          23  220  60   0
2147483  Of-no-voxel                        1 2 3 0
"""
ITKSNAP = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
    1   255    0    0        1  1  1    "Label 1"
   12     0   51  255      0.5  1  0    "tumour (core), #2"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_lookup_table_of_freesurfer_keeps_names_and_colours(tmp_path: Path):
    table = LabelTable.read(write(tmp_path / "FreeSurferColorLUT.txt", FREESURFER))
    assert [(label.value, label.name, label.color) for label in table.labels] == [
        (2, "Left-Cerebral-White-Matter", (245, 245, 245)),
        (17, "Left-Hippocampus", (220, 216, 20)),
        (1035, "ctx-lh-insula", (255, 192, 32)),
        (11101, "ctx_lh_G_and_S_frontomargin", (23, 220, 60)),
    ]
    table.write(tmp_path / "again.txt")
    assert LabelTable.read(tmp_path / "again.txt") == table


@pytest.mark.parametrize("name", ["labels.label", "labels.txt"])
def test_a_label_file_of_itksnap_keeps_names_and_colours(name: str, tmp_path: Path):
    table = LabelTable.read(write(tmp_path / name, ITKSNAP))
    assert [(label.value, label.name, label.color) for label in table.labels] == [
        (1, "Label 1", (255, 0, 0)),
        (12, "tumour (core), #2", (0, 51, 255)),
    ]
    table.write(tmp_path / "again.label")
    assert LabelTable.read(tmp_path / "again.label") == table


NAMES = ("left hippocampus", "ctx_lh_insula", "Left-Amygdala", "über 50 %", "a-b c")


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".label", ".tsv"])
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:3], NAMES[2:]])
def test_names_come_back_as_they_were(suffix: str, names: tuple[str, ...], tmp_path: Path):
    table = LabelTable(tuple(Label(n, name, (n, 255 - n, 7)) for n, name in enumerate(names, 1)))
    table.write(tmp_path / f"table{suffix}")
    assert LabelTable.read(tmp_path / f"table{suffix}") == table


def test_what_freesurfer_reads_has_five_words_after_the_number(tmp_path: Path):
    """Its own reader splits lines at blanks."""
    table = LabelTable(
        (Label(1, "left hippocampus", (1, 2, 3)), Label(2, "ctx_lh_insula", (4, 5, 6)))
    )
    table.write(tmp_path / "t.txt")
    lines = (tmp_path / "t.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert rows == [
        ["0", "Unknown", "0", "0", "0", "0"],
        ["1", "left-hippocampus", "1", "2", "3", "0"],
        ["2", "ctx_lh_insula", "4", "5", "6", "0"],
    ]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("t.txt", FREESURFER.replace("245 245 245", "245"), 6),
        ("t.txt", FREESURFER.replace("245 245 245", "245 245 256"), 6),
        ("t.txt", FREESURFER.replace("17  Left", "x17  Left"), 7),
        ("t.txt", FREESURFER + "17 Right-Hippocampus 1 2 3 0\n", 14),
        ("t.label", ITKSNAP.replace('1    "Label 1"', "1    Label 1"), 7),
        ("t.label", ITKSNAP.replace("255    0    0", "255    0    -1"), 7),
        ("t.label", ITKSNAP.replace("0.5  1  0", "half  1  0"), 8),
        ("t.label", ITKSNAP + '1 1 2 3 1 1 1 "again"\n', 9),
        ("t.label", "12\n", 1),
        ("t.ctbl", "# Color table file\n1 liver 1 2\n", 2),
        ("t.tsv", "index\tname\tcolor\n1\tliver\tred\n", 2),
        ("t.tsv", "index\tname\n1\tliver\n1.5\tspleen\n", 3),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2,3\n2,x,1,2,blue\n", 3),
    ],
)
def test_a_line_that_is_none_is_named_with_its_number(
    name: str, text: str, line: int, tmp_path: Path
):
    path = write(tmp_path / name, text)
    with pytest.raises(BadFile, match=rf"line {line}\b") as caught:
        LabelTable.read(path)
    assert str(path) in str(caught.value)


TABLE = LabelTable(
    (
        Label(17, "left hippocampus", (1, 1, 1)),
        Label(53, "Right-Hippocampus", (1, 1, 1)),
        Label(3, "42", (1, 1, 1)),
        Label(5, "lesion", (1, 1, 1)),
        Label(6, "Lesion", (1, 1, 1)),
        Label(7, "LESION ", (1, 1, 1)),
    )
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("17", 17), ("left hippocampus", 17), ("Left_Hippocampus", 17), (" LEFT-hippocampus ", 17),
        ("right hippocampus", 53), ("42", 3), ("lesion", 5), ("Lesion", 6),
    ],
)  # fmt: skip
def test_a_structure_is_found_by_its_number_or_name(text: str, value: int):
    assert TABLE.value_of(text) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hipocampus left", "left hippocampus|Right-Hippocampus"),
        ("hippocampus", "left hippocampus or Right-Hippocampus"),
        ("18", "there is no structure '18'"),
        ("lesioN", "several"),
        ("", "there is no structure"),
        ("spleen\x1b[2J", r"there are left hippocampus"),
    ],
)
def test_a_structure_that_is_not_there_is_refused_with_what_is_near(text: str, told: str):
    with pytest.raises(BadConfig, match=told) as caught:
        TABLE.value_of(text)
    assert "\x1b" not in str(caught.value)


def test_one_table_lies_over_another():
    own = LabelTable((Label(1, "liver", (1, 2, 3)), Label(2, "spleen", (4, 5, 6))))
    other = LabelTable((Label(2, "Milz", (7, 8, 9)), Label(9, "Niere", (7, 8, 9))))
    assert other.over(own).names == {1: "liver", 2: "Milz"}
    assert other.over(own)[2].color == (7, 8, 9)


def test_the_same_name_is_certain_or_none():
    assert same_name("a b", ["A-B", "c"]) == "A-B"
    assert same_name("a b", ["A-B", "a_b"]) == ""
    assert same_name("a_b", ["A-B", "a_b"]) == "a_b"
    assert same_name("d", ["A-B"]) == ""
