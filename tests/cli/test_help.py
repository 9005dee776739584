"""The help: every command's first panel fits a screen, has an example, says its defaults."""

from __future__ import annotations

import io
import os
import shlex
from importlib import import_module
from typing import Any

import pytest
from typer.main import get_command

from making import networks as tiny
from medseg.cli.app import PANELS, command_named, make_app
from medseg.cli.help import first_sentence, is_colored

NAMES = [name for panel, titles in PANELS.items() if panel for name in titles]


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return dict(get_command(make_app()).commands)  # type: ignore[attr-defined]


def lines_of(*words: str) -> list[str]:
    ran = tiny.medseg(*words, "--help")
    assert (ran.code, ran.err) == (0, "")
    return ran.out.splitlines()


@pytest.mark.parametrize("name", ["", *NAMES])
def test_what_a_command_does_and_its_main_options_fit_a_screen(name: str):
    lines = lines_of(*[name] * bool(name))
    assert max(map(len, lines)) <= 80
    start = next((n for n, line in enumerate(lines) if line == "Options:"), 0)
    end = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    assert end <= 24 or not name


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"version"}))
def test_every_example_is_a_command_that_can_be_read(name: str, commands: dict[str, Any]):
    lines = lines_of(name)
    start = next(n for n, line in enumerate(lines) if line in ("Example:", "Examples:"))
    end = lines.index("", start)
    for line in lines[start + 1 : end]:
        program, command, *words = shlex.split(line.partition(" > ")[0])
        assert program == "medseg"
        commands[command].make_context(command, words, resilient_parsing=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_takes_what_it_does_and_its_default(
    name: str, commands: dict[str, Any]
):
    text = " ".join(" ".join(lines_of(name)).split())
    for one in commands[name].params:
        assert one.help, one.name
        takes_value = not getattr(one, "is_flag", False) and not getattr(one, "count", False)
        assert one.metavar or not takes_value, f"{name} {one.name} has no metavar"
        if takes_value and isinstance(one.default, str | int | float) and one.default != "":
            assert f"default: {one.default}" in text, f"{name} {one.name}"
        for option in one.opts if one.param_type_name == "option" else ():
            assert option in text


def test_the_list_of_commands_says_what_their_docstrings_say():
    for titles in PANELS.values():
        for name, title in titles.items():
            sentence = first_sentence(command_named(name).__doc__ or "")
            assert sentence == title or sentence.startswith(f"{title}:"), name


def test_commands_stand_in_panels_and_what_is_for_the_shell_does_not():
    lines = lines_of()
    for panel, titles in PANELS.items():
        if not panel:
            continue
        start = lines.index(f"{panel}:")
        shown = lines[start : lines.index("", start)]
        assert all(any(line.split()[:1] == [name] for line in shown) for name in titles)
    assert not any(line.split()[:1] == ["complete"] for line in lines)


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_every_way_to_ask_for_the_version_gives_it(word: str):
    assert tiny.medseg(word).out.strip() == import_module("medseg").__version__


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_bold_and_none_that_does_not_want_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert is_colored(Terminal())
    assert not is_colored(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_colored(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not is_colored(Terminal())


@pytest.mark.parametrize(("no_color", "escapes"), [("", True), ("1", False)])
def test_on_a_real_terminal_the_help_and_tables_are_bold_unless_no_color(
    no_color: str, escapes: bool
):
    import pty

    program = (
        "import sys; from medseg.cli.app import main; from medseg.cli.show import print_table\n"
        "print_table('', ('a', 'b'), [('1', '2')])\nmain()"
    )
    first, second = pty.openpty()
    environment = tiny.environment() | {"TERM": "xterm", "NO_COLOR": no_color}
    try:
        with tiny.start("-c", program, "--help", stdout=second, env=environment) as child:
            child.wait(timeout=600)
        os.close(second)
        text = b""
        while piece := _read(first):
            text += piece
    finally:
        os.close(first)
    assert b"infer" in text
    assert (b"\033[1m" in text) == escapes


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end of a pseudo-terminal is closed
        return b""
