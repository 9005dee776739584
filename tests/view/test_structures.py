"""Which structures are fluid of the brain, and which somebody asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.places import ROOT
from medseg.labels import Code, Label, LabelTable
from medseg.view.structures import is_fluid


def test_fluid_of_the_embedded_model_is_what_its_json_calls_fluid():
    for folder in sorted(Path(ROOT, "medseg", "bundled").glob("*/labels.csv")):
        table = LabelTable.read(folder)
        fluid = {label.value for label in table.labels if is_fluid(label)}
        assert fluid == {4, 5, 14, 15, 24, 43, 44}


@pytest.mark.parametrize(
    "name",
    ["CSF", "csf_outer", "Left-Lateral-Ventricle", "Left-Inf-Lat-Vent", "3rd ventricle",
     "Fourth_Ventricle", "cerebrospinal fluid"],
)  # fmt: skip
def test_names_of_fluid(name):
    assert is_fluid(Label(1, name, (0, 0, 0)))


@pytest.mark.parametrize(
    "name", ["left ventricle", "heart ventricle right", "cortex", "CSFish", "bladder", "ventral DC"]
)
def test_names_of_others(name):
    assert not is_fluid(Label(1, name, (0, 0, 0)))


def test_a_code_counts_more_than_a_name():
    heart = Code("SCT", "87878005", "Left ventricle of heart")
    assert not is_fluid(Label(1, "lateral ventricle", (0, 0, 0), type=heart))
