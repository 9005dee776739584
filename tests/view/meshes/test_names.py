"""Names that every system and format can hold."""

from __future__ import annotations

import re

import pytest

from medseg.view.meshes.names import plain_names


def test_names_become_plain():
    names = ["left hippocampus", "3rd ventricle", "Größe <b>&amp;", "WM-hypointensities"]
    assert plain_names(list(enumerate(names, 1))) == [
        "left_hippocampus",
        "3rd_ventricle",
        "Grosse_b_amp",
        "WM-hypointensities",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["liver", "Liver", "LIVER"],
        ["脳", "心臓", "../../etc/passwd", "..", "/", "a\nb", "\x1b[31m", "\u202e"],
        ["CON", "nul", "com1", "lpt9.txt", "aux"],
        ["a", "a", "a_2", "a_1"],
        ["x" * 300, "x" * 301, " ", "-", "_"],
        ["label 2", "脳"],
    ],
)
def test_names_are_safe_and_differ(names):
    plain = plain_names(list(enumerate(names, 1)))
    assert len({name.lower() for name in plain}) == len(names)
    for name in plain:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name)
        assert not re.fullmatch(r"(?i)con|prn|aux|nul|(com|lpt)[0-9]", name)
