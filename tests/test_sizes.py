"""How large things may be: what a reader keeps in mind at once. Where a limit is in the way, a
reason stands here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from making.places import ROOT

PACKAGE = ROOT / "medseg"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
#: Lines of a file; compiled loops come in families that are read side by side.
FILE, FILE_OF_LOOPS = 600, 650
#: Lines of a function, and of what a command does once its options are there.
FUNCTION, COMMAND = 60, 40
#: Functions that may be longer.
LONGER: dict[str, str] = {}
#: Decisions of a function (McCabe 1976, as radon counts them), and the share of functions that may
#: have more.
COMPLEXITY, SHARE_ABOVE = 12, 0.02


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_command(path: Path, node: ast.FunctionDef) -> bool:
    """Whether a function is a command: its arguments are the options that `--help` shows."""
    return path.parent.name == "cli" and "typer." in ast.unparse(node.args)


def test_few_rooms_lie_directly_in_the_package():
    files = list(PACKAGE.glob("*.py"))
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(files) <= 13, sorted(path.name for path in files)
    assert len(packages) <= 15, sorted(path.name for path in packages)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_longer_than_can_be_read_at_once(path: Path):
    limit = FILE_OF_LOOPS if path.parent.name == "kernels" else FILE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_longer_than_a_screen(path: Path):
    if path.parent.name == "kernels":
        return
    for node in functions(path):
        name = f"{name_of(path)}.{node.name}"
        first, limit = (
            (node.body[1].lineno, COMMAND) if is_command(path, node) else (node.lineno, FUNCTION)
        )
        assert node.end_lineno is not None
        lines = node.end_lineno - first + 1
        assert lines <= limit or name in LONGER, f"{name} has {lines} lines"


def test_exceptions_are_needed():
    long = {
        f"{name_of(path)}.{node.name}"
        for path in SOURCES
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION
    }
    assert set(LONGER) <= long


def test_few_functions_decide_more_than_a_reader_can_follow():
    radon = pytest.importorskip(
        "radon.complexity", reason="radon counts decisions: pip install medseg[dev]"
    )

    def flat(blocks: list) -> Iterator[tuple[str, int, int]]:
        for block in blocks:
            if hasattr(block, "methods"):
                yield from flat(block.methods)
            else:
                yield block.name, block.lineno, block.complexity
                yield from flat(block.closures)

    counted = {
        (name_of(path), name, line): decisions
        for path in SOURCES
        if path.parent.name != "kernels"
        for name, line, decisions in flat(radon.cc_visit(path.read_text(encoding="utf-8")))
    }
    above = {".".join(map(str, key)): count for key, count in counted.items() if count > COMPLEXITY}
    assert len(above) <= SHARE_ABOVE * len(counted), sorted(
        above.items(), key=lambda item: -item[1]
    )
