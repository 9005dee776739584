"""What people and their scripts rely on stays as it is: help texts, public names, the keys of JSON
files.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def loaded(name: str) -> Any:
    """A program of `golden/` as a module."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return loaded("make_interface").interface()


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return json.loads((GOLDEN / "interface.json").read_text(encoding="utf-8"))


def test_every_command_says_the_same_of_itself(now: dict[str, Any], before: dict[str, Any]):
    assert sorted(now["help"]) == sorted(before["help"])
    for name, text in before["help"].items():
        assert now["help"][name] == text, name


@pytest.mark.parametrize(
    "part", ["public", "record", "record of an intensity model", "model", "export", "summary"]
)
def test_names_and_keys_are_the_same(part: str, now: dict[str, Any], before: dict[str, Any]):
    assert now[part] == before[part]


def test_the_reference_says_what_the_docstrings_say():
    maker = loaded("make_reference")
    assert maker.FILE.read_text(encoding="utf-8") == maker.reference()
