"""Codes of structures by their names: DICOM's own, and none where a name is not known."""

from __future__ import annotations

import pytest

from medseg.labels import Code
from medseg.models.anatomy import CODES, codes_of, table_of


def test_names_with_and_without_a_side_are_known():
    assert codes_of("Liver") == (Code("SCT", "10200004", "Liver"), None)
    kidney = Code("SCT", "64033007", "Kidney")
    for name in ("kidney_left", "left kidney", "Kidney left"):
        assert codes_of(name) == (kidney, Code("SCT", "7771000", "Left"))
    assert codes_of("lung_upper_lobe_right")[1] == Code("SCT", "24028007", "Right")
    for name in ("liver_tumor", "left", "front", "kidney_cyst_left"):
        assert codes_of(name) == (None, None)


def test_every_code_is_one_of_dicoms_with_its_meaning():
    concepts = pytest.importorskip("pydicom.sr._concepts_dict").concepts["SCT"]
    known = {(code, meaning) for entry in concepts.values() for code, (meaning, _) in entry.items()}
    assert len(CODES) > 60
    assert set(CODES.values()) <= known


def test_a_table_keeps_names_it_does_not_know():
    table = table_of({2: "liver", 1: "something else"})
    assert table.names == {1: "something else", 2: "liver"}
    assert table[1].type is None
    assert table[2].type == Code("SCT", "10200004", "Liver")
    assert len({label.color for label in table.labels}) == 2
