"""Label tables: reading, writing, mirror partners, and the bundled table of the brain model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import medseg.labels
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.labels import Code, Label, LabelTable, is_lateral

BRAIN = Path(medseg.labels.__file__).parent / "bundled/brain/labels.csv"
BRAIN_VALUES = [
    2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28,
    41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60,
]  # fmt: skip
KIDNEY = Label(
    3,
    "left kidney",
    (185, 102, 83),
    category=Code("SCT", "123037004", "Anatomical Structure"),
    type=Code("SCT", "64033007", "Kidney"),
    type_modifier=Code("SCT", "7771000", "Left"),
)
TABLE = LabelTable(
    (Label(1, "liver", (221, 130, 101)), KIDNEY, Label(300, 'odd, "name"', (0, 0, 255)))
)

words = st.text(
    st.characters(whitelist_categories=("L", "N"), max_codepoint=0x2FF), min_size=1, max_size=8
)
labels = st.builds(
    Label,
    value=st.integers(1, 65535),
    name=st.lists(words, min_size=1, max_size=3).map(" ".join),
    color=st.tuples(*[st.integers(0, 255)] * 3),
)
tables = st.lists(labels, min_size=1, max_size=8, unique_by=lambda label: label.value).map(
    lambda found: LabelTable(tuple(found))
)


def test_a_table_answers_by_value():
    assert TABLE[3] == KIDNEY
    assert TABLE.values == (1, 3, 300)
    assert TABLE.names[1] == "liver"
    assert 3 in TABLE
    assert 0 not in TABLE
    with pytest.raises(KeyError):
        TABLE[2]


def test_csv_keeps_everything(tmp_path):
    TABLE.write(tmp_path / "t.csv")

    assert LabelTable.read(tmp_path / "t.csv") == TABLE


@pytest.mark.parametrize("suffix", [".csv", ".ctbl", ".txt", ".tsv"])
@given(table=tables)
def test_each_form_keeps_values_names_and_colours(tmp_path_factory, suffix, table):
    path = tmp_path_factory.mktemp("t") / f"t{suffix}"

    table.write(path)

    assert LabelTable.read(path) == table


def test_csv_has_the_columns_of_slicer_and_a_transparent_background(tmp_path):
    TABLE.write(tmp_path / "t.csv")

    first, second, *_ = (tmp_path / "t.csv").read_text().splitlines()

    parts = ("CodingScheme", "CodeValue", "CodeMeaning")
    codes = [
        f"{what}_{p}"
        for what in ("Category", "Type", "TypeModifier", "Region", "RegionModifier")
        for p in parts
    ]
    assert first.split(",") == [
        "LabelValue",
        "Name",
        "Color_R",
        "Color_G",
        "Color_B",
        "Color_A",
        *codes,
    ]
    assert second.split(",")[:6] == ["0", "Background", "0", "0", "0", "0"]


def test_freesurfer_tables_are_read(tmp_path):
    path = tmp_path / "lut.txt"
    path.write_text(
        "#$Id: a comment\n\n0   Unknown       0 0 0 0\n17  Left-Hippocampus  220 216 20  0\n"
    )

    assert LabelTable.read(path) == LabelTable((Label(17, "Left-Hippocampus", (220, 216, 20)),))


def test_bids_tables_are_read_without_colours_and_in_any_column_order(tmp_path):
    path = tmp_path / "dseg.tsv"
    path.write_text(
        "name\tabbreviation\tindex\tcolor\nGray Matter\tGM\t1\t#ff8000\nWhite Matter\tWM\t2\tn/a\n"
    )

    table = LabelTable.read(path)

    assert table.names == {1: "Gray Matter", 2: "White Matter"}
    assert table[1].color == (255, 128, 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "LabelValue,Name\n1,liver\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\nx,liver,1,2,3\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2,256\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2,0.5\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2,nan\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,liver,1,2,inf\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,a,1,2,3\n1,b,1,2,3\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n-1,a,1,2,3\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n65536,a,1,2,3\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n1,,1,2,3\n"),
        ("t.csv", "LabelValue,Name,Color_R,Color_G,Color_B\n0,Background,1,2,3\n"),
        ("t.csv", "\0\0\0"),
        ("t.csv", ""),
        ("t.ctbl", "1 two words 1 2 3\n"),
        ("t.ctbl", "one name 1 2 3 4\n"),
        ("t.tsv", "index\tcolor\n1\t#000000\n"),
        ("t.tsv", "index\tname\tcolor\n1\ta\tred\n"),
        ("t.tsv", "index\tname\n1\n"),
        ("t.json", "{}"),
    ],
)
def test_what_is_no_table_is_refused_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)

    with pytest.raises(BadFile, match=name):
        LabelTable.read(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"LabelValue,Name\xff\xfe")

    with pytest.raises(BadFile, match="text"):
        LabelTable.read(tmp_path / "t.csv")


def test_an_unknown_suffix_is_not_written(tmp_path):
    with pytest.raises(BadOutput, match=r"t\.json"):
        TABLE.write(tmp_path / "t.json")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0, -1, 65536])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(BadConfig):
        LabelTable((Label(value, "x", (0, 0, 0)),))


def test_unknown_labels_get_names_and_colours_that_differ():
    table = LabelTable.from_values([5, 0, 3, 3, *range(10, 60)])

    assert table.values[:2] == (3, 5)
    assert table[3].name == "label 3"
    assert len({label.color for label in table.labels}) == len(table)
    assert LabelTable.from_values([3])[3] == table[3]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left thalamus", "right thalamus"),
        ("Left-Thalamus", "Right-Thalamus"),
        ("kidney_left", "kidney_right"),
        ("ctx-lh-insula", "ctx-rh-insula"),
        ("Hippocampus L", "Hippocampus R"),
    ],
)
def test_mirror_pairs_are_found_by_name_in_both_directions(left, right):
    table = LabelTable(
        (Label(4, left, (0, 0, 0)), Label(9, "liver", (0, 0, 1)), Label(7, right, (0, 0, 2)))
    )

    assert table.mirror_pairs() == {4: 7, 7: 4}
    assert is_lateral(left)
    assert is_lateral(right)


@pytest.mark.parametrize(
    "name", ["liver", "vertebrae L1", "brightness", "cleft", "3rd ventricle", "rib"]
)
def test_other_names_have_no_side(name):
    assert not is_lateral(name)


def test_a_structure_whose_partner_is_missing_has_none():
    assert (
        LabelTable(
            (Label(1, "left lung", (0, 0, 0)), Label(2, "right kidney", (0, 0, 0)))
        ).mirror_pairs()
        == {}
    )


def test_the_brain_table_names_the_structures_and_pairs_of_freesurfer():
    table = LabelTable.read(BRAIN)

    assert sorted(table.values) == BRAIN_VALUES
    pairs = table.mirror_pairs()
    assert len(pairs) == 28
    assert all(pairs[other] == value for value, other in pairs.items())
    # FreeSurfer: of a pair, the right value is 39 above the left below 10, 36 above around 17, 32
    # above 26 and 28.
    assert {value: other - value for value, other in pairs.items() if value < 41} == {
        **dict.fromkeys((2, 3, 4, 5, 7, 8, 10, 11, 12, 13), 39), 17: 36, 18: 36, 26: 32, 28: 32
    }  # fmt: skip
    assert {value for value in table.values if not is_lateral(table[value].name)} == {
        14,
        15,
        16,
        24,
    }


def test_the_codes_of_the_brain_table_are_those_of_the_dicom_standard():
    codes = pytest.importorskip("pydicom.sr.codedict").codes
    table = LabelTable.read(BRAIN)
    known = {
        (code.scheme_designator, code.value): code.meaning
        for group in (codes.CID7140, codes.CID7153, codes.CID244)
        for code in (getattr(group, name) for name in group.dir())
    }

    for label in table.labels:
        assert label.category is not None
        assert label.type is not None
        assert known[label.type.scheme, label.type.value].lower() == label.type.meaning.lower()
        side = label.type_modifier.meaning.lower() if label.type_modifier else ""
        assert label.name.split()[0] == side if side else not is_lateral(label.name)
        if label.type_modifier:
            assert (
                known[label.type_modifier.scheme, label.type_modifier.value]
                == label.type_modifier.meaning
            )


#: What is left of red, green and blue light without one kind of cones (Machado, Oliveira and
#: Fernandes 2009, doi:10.1109/TVCG.2009.113, severity 1.0).
EYES = {
    "all cones": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def cielab(colors: np.ndarray, eyes: object) -> np.ndarray:
    """sRGB colours (n, 3) of 0 to 255 as such eyes see them, in CIELAB under D65 (CIE 15)."""
    shares = colors / 255
    light = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    seen = np.clip(light @ np.array(eyes).T, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175],
         [0.0193339, 0.119192, 0.9503041]]
    )  # fmt: skip
    xyz = seen @ to_xyz.T / (0.95047, 1, 1.08883)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(("count", "least"), [(8, 30), (12, 25), (24, 14)])
def test_colours_of_structures_without_any_stay_apart_for_all_eyes(eyes, count, least):
    table = LabelTable.from_values(range(1, count + 1))
    places = cielab(np.array([label.color for label in table.labels]), EYES[eyes])
    away = np.linalg.norm(places[:, None] - places[None], axis=-1)
    assert away[~np.eye(count, dtype=bool)].min() > least
    assert places[:, 0].min() > 30  # none is lost on black
