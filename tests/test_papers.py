"""What the papers and docstrings name is there: modules, names in them, files, links, commands and
their options.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medseg"
PAPERS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    ROOT / "sample_volumes" / "README.md",
    *sorted((PACKAGE / "bundled").glob("*/CARD.md")),
]
CODE = sorted(path for folder in ("medseg", "tests") for path in (ROOT / folder).rglob("*.py"))
#: Folders of the repository that papers and docstrings name with their path.
FOLDERS = ("medseg", "tests", "docs", "configs", "notebooks", "sample_volumes", ".github", ".ci")
PLACE = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w.*/-]*$")
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
#: Files that the recipes make.
MADE = set(
    re.findall(
        r"^\| `(\S+)` \(new\)",
        (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)


#: Groups of entry points, which look like modules.
GROUPS = set(re.findall(r'"(medseg\.\w+)"', (PACKAGE / "packages.py").read_text(encoding="utf-8")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def words(path: Path) -> Iterator[str]:
    """The words in backquotes, of papers also those in blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for _, content in FENCE.findall(text):
            yield from re.split(r"[\s\"'(),;:\[\]=]+", content)
        text = FENCE.sub("", text)
    for quoted in QUOTED.findall(text):
        yield from re.split(r"[\s\"'(),;:\[\]=]+", quoted)


def definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that statements define, with those below `if` and `try`."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            targets = [one for target in node.targets for one in ast.walk(target)]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.If | ast.Try):
            names |= definitions(node.body)
    return names


@cache
def module_names(path: Path) -> dict[str, ast.stmt]:
    return definitions(ast.parse(path.read_text(encoding="utf-8")).body)


def is_there(dotted: str) -> bool:
    """Whether medseg has a module, function, class or attribute of a class of that name; nothing is
    imported.
    """
    if f"{dotted.replace('.', '/')}.py" in MADE:
        return True
    parts = dotted.split(".")[1:]
    place = PACKAGE
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    module = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        module = place / f"{parts.pop(0)}.py"
    if not parts or not module.is_file():
        return not parts
    names = module_names(module)
    for part in parts:
        if part not in names:
            return False
        node = names[part]
        names = definitions(node.body) if isinstance(node, ast.ClassDef) else {}
    return True


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("medseg.volume", True),
        ("medseg.volume.Volume.spacing_mm", True),
        ("medseg.inference.segment", True),
        ("medseg.io.dicom.Origin", True),
        ("medseg.fast_conv", False),
        ("medseg.volume.Volume.spacing", False),
        ("medseg.inference.train", False),
    ],
)
def test_names_are_looked_up_without_importing(name: str, there: bool):
    assert is_there(name) == there


@pytest.mark.parametrize("path", [*PAPERS, *CODE], ids=name_of)
def test_modules_and_names_in_backquotes_are_there(path: Path):
    dotted = {
        word.rstrip(".")
        for word in words(path)
        if re.fullmatch(r"medseg(\.[A-Za-z_]\w*)+\.?", word)
    }
    assert [name for name in sorted(dotted - GROUPS) if not is_there(name)] == []


@pytest.mark.parametrize("path", [*PAPERS, *CODE], ids=name_of)
def test_files_in_backquotes_are_there(path: Path):
    """NAME in a path, and *, stand for any; what a recipe makes is not there yet."""
    named = {word.split("::")[0].rstrip("./") for word in words(path) if PLACE.match(word)}
    patterns = {name: re.sub(r"\b[A-Z]{2,}\b(?!\.md)", "*", name) for name in named - MADE}
    assert [
        name for name, pattern in sorted(patterns.items()) if not list(ROOT.glob(pattern))
    ] == []


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a paper."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_links_lead_somewhere(path: Path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in headings(place), target


@cache
def commands() -> dict[str, set[str]]:
    """Command -> its options, as the command line has them."""
    from typer.main import get_command

    from medseg.cli.app import make_app

    known: Any = get_command(make_app())
    return {
        name: (
            {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            | {"--help", "-h"}
        )
        for name, command in known.commands.items()
    }


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words after `medseg` of the command lines in a paper."""
    text = path.read_text(encoding="utf-8")
    lines = [line for _, content in FENCE.findall(text) for line in content.splitlines()]
    for line in (*lines, *QUOTED.findall(FENCE.sub("", text))):
        for part in line.split(" && "):
            if found := re.match(
                r"(?:\S+/bin/|torchrun .*-m )?medseg ((?:[a-zA-Z]|--).*)", part.strip()
            ):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_commands_and_their_options_exist(path: Path):
    for name, *arguments in command_lines(path):
        if name in ("COMMAND", "--help"):
            continue
        assert name in commands(), f"medseg {name}"
        for word in arguments:
            option = word.split("=")[0]
            if option.startswith("-"):
                assert option in commands()[name], f"medseg {name} {option}"


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_options_named_alone_are_those_of_some_command(path: Path):
    known = set().union(*commands().values())
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    alone = {
        quoted.split()[0].split("=")[0]
        for quoted in QUOTED.findall(text)
        if quoted.startswith("--")
    }
    assert alone <= known


def test_the_readme_and_the_page_of_commands_name_every_command():
    papers = (ROOT / "README.md", ROOT / "docs" / "commands.md")
    named = {line[0] for paper in papers for line in command_lines(paper)}
    assert set(commands()) - {"complete"} <= named  # which only shells call


def tree() -> Iterator[str]:
    """What the tree of ARCHITECTURE.md shows, as paths below medseg; 'io/*.py' where more of a kind
    may lie.
    """
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text.split("```\nmedseg/\n")[1].split("```")[0]
    parents: dict[int, str] = {0: ""}
    for line in block.splitlines():
        drawn = re.match(r"[│├└─ ]*", line)
        assert drawn
        depth = len(drawn[0]) // 4
        folder = parents[depth - 1]
        shown = []
        for token in line[len(drawn[0]) :].split():
            if not re.fullmatch(r"[\w/]*(\*|\w)(\.py|/)", token):
                break
            inner, slash, last = token.rstrip("/").rpartition("/")
            if slash:
                folder = f"{parents[depth - 1]}{inner}/"
            shown.append(f"{folder}{last}")
        assert shown, line
        yield from shown
        parents[depth] = f"{shown[0]}/"


def test_the_tree_is_the_one_that_is_there():
    shown = list(tree())
    open_folders = {name.removesuffix("*.py") for name in shown if name.endswith("*.py")}
    files = [name for name in shown if not name.endswith("*.py")]
    assert sorted(files) == sorted(set(files))
    assert [name for name in files if not (PACKAGE / name).exists()] == []
    modules = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name[:2] != "__"
    ]
    of_a_kind = {name for name in modules if f"{name.rpartition('/')[0]}/" in open_folders}
    inside_slicer = {name for name in modules if name.startswith("view/slicer/")}
    missing = sorted(set(modules) - set(files) - of_a_kind - inside_slicer)
    assert missing == [], "give these a place in the tree of ARCHITECTURE.md"


def test_the_hook_runs_what_the_readme_s_test_command_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = text.split("<!-- test command -->")[1].split("```bash\n")[1].split("\n")[0]
    install, *checks = line.split(" && ")[1:]
    assert " install " in install
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert [hook["entry"] for hook in hooks[0]["hooks"]] == checks
    assert all(
        hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks[0]["hooks"]
    )


def test_the_citation_is_of_this_version_and_licence():
    from medseg.packages import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
    assert {"cff-version", "message", "title", "authors", "type"} <= citation.keys()


def test_pictures_are_small():
    for path in (ROOT / "docs").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size < 300_000, path.name
