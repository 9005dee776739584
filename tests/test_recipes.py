"""The worked examples of docs/recipes.md, applied to a copy of medseg as they stand there, pass the
tests they name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "docs" / "recipes.md"
#: What is large and not needed to read files or to build networks; compiled loops come along.
LEFT_OUT = shutil.ignore_patterns("*.safetensors", "niivue", "benchmarks")
#: A block with a file in its first line: ```python medseg/io/plain.py
BLOCK = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Recipe -> what is run in the copy.
CHECKS = {
    "A file format": [
        "tests/io/test_formats.py",
        "tests/io/test_roundtrip.py",
        "tests/io/test_fuzz.py",
        "-k",
        "plain",
    ],
    "An architecture": ["tests/networks/test_zoo.py", "-k", "dilated"],
    "A metric": ["tests/evaluation/test_metrics.py", "-k", "empty"],
    "A backend": ["tests/inference/backends/test_opening.py", "-k", "every_backend"],
}
HANG_S = 600


def recipe(title: str) -> str:
    """The section of that title."""
    text = RECIPES.read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def changed(text: str, change: str) -> str:
    """The text after a change: lines with '+' are put in after the line before them, lines with '-'
    are taken out.
    """
    lines = text.split("\n")
    at = 0
    for line in change.rstrip("\n").split("\n"):
        sign, content = line[:1], line[1:]
        if sign == "+":
            if at == 0:  # before the first line that is named
                following = next(one[1:] for one in change.split("\n") if one[:1] == " ")
                at = lines.index(following)
            lines.insert(at, content)
            at += 1
        else:
            assert content in lines[at:], f"the recipe names a line that is not there: {content}"
            at = lines.index(content, at) + 1
            if sign == "-":
                at -= 1
                del lines[at]
    return "\n".join(lines)


def follow(title: str, copy: Path) -> list[str]:
    """Does in a copy what a recipe says; returns the files it made or changed."""
    files = []
    for language, name, content in BLOCK.findall(recipe(title)):
        path = copy / name
        assert path.exists() == (language == "diff"), name
        before = path.read_text(encoding="utf-8") if language == "diff" else ""
        path.write_text(
            changed(before, content) if language == "diff" else content, encoding="utf-8"
        )
        files.append(name)
    return files


def run(copy: Path, *arguments: str) -> str:
    """What Python says in the copy; fails if it fails."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """medseg with its tests and configs, but without weights, after the recipes; and the files of
    each recipe.
    """
    copy = tmp_path_factory.mktemp("copy")
    for name in ("medseg", "tests", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=LEFT_OUT)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy, {title: follow(title, copy) for title in CHECKS}


@pytest.mark.parametrize("title", CHECKS)
def test_a_recipe_does_what_it_says_in_the_files_it_lists(
    title: str, followed: tuple[Path, dict[str, list[str]]]
):
    copy, files = followed
    listed = re.findall(r"^\| `([\w/]+\.\w+)`", recipe(title).split("\n\n")[0], re.MULTILINE)

    assert set(files[title]) <= set(listed)
    assert all((copy / name).is_file() for name in listed)
    run(copy, "-m", "ruff", "check", *(name for name in files[title] if name.endswith(".py")))
    said = run(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *CHECKS[title])
    assert re.search(r"\d+ passed", said)


def test_the_format_of_the_first_recipe_is_read_and_written_by_its_suffix(
    followed: tuple[Path, dict[str, list[str]]],
):
    copy = followed[0]
    code = """
import numpy as np, medseg
volume = medseg.Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([-1.5, 2, 3, 1]))
medseg.write(volume, "x.plain")
back = medseg.read("x.plain")
print((back.data == volume.data).all() and (back.affine == volume.affine).all())
print(medseg.__file__)
"""
    assert run(copy, "-c", code).split() == ["True", str(copy / "medseg" / "__init__.py")]
    assert (copy / "x.plain").stat().st_size == 512 + 24 * 2


def test_the_metric_of_the_third_recipe_is_a_score_like_the_others(
    followed: tuple[Path, dict[str, list[str]]],
):
    code = """
import numpy as np
from medseg.evaluation.metrics import score
truth, found = np.zeros((2, 8, 8, 8), np.uint8)
truth[1:7, 1:7, 1:3] = 1
found[1:7, 1:7, 1:2] = 1
row = score(truth, found, (1, 1, 1), {"a": (1,), "b": (2,)}, empty="best_worst")
print(round(row["a"]["volumetric_similarity"], 6), row["b"]["volumetric_similarity"])
"""
    one = 1 - (72 - 36) / (72 + 36)
    assert run(followed[0], "-c", code).split() == [str(round(one, 6)), "1.0"]


def test_the_option_of_the_last_recipe_goes_through_three_files_that_are_there():
    titles = re.findall(r"^## (.*)$", RECIPES.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == [*CHECKS, "An option of `infer`", "Five errands"]
    named = re.findall(r"^In `(medseg/[\w/]+\.py)`", recipe("An option of `infer`"), re.MULTILINE)
    assert len(named) == 3
    assert all((ROOT / name).is_file() for name in named)
