"""The help of the program and of each command: what it does, an example, options in panels.

Written without rich, which takes longer to load than the rest of the help. A command's docstring is
its help: the first sentence stands in the list of commands, and a paragraph that begins with
`Example:` or `Examples:` is shown as it is.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

#: Widest text.
_MAX_WIDTH = 100
#: The column in which what an option does begins.
_COLUMN = 28
_OPTIONS = "Options"


def is_colored(stream: Any) -> bool:
    """Whether text may be bold: on a terminal that can, unless NO_COLOR (no-color.org) is set."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(stream.isatty()) and not is_plain


def help_of_command(command: Any, ctx: Any) -> str:
    """What a command does, with its arguments and options, most used ones first."""
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], _OPTIONS: []}
    for one in command.get_params(ctx):
        if getattr(one, "hidden", False):
            continue
        is_argument = one.param_type_name == "argument"
        panel = "Arguments" if is_argument else _panel(one)
        panels.setdefault(panel, []).append((_left(one), _right(one)))
    about_help = panels.pop("Help", [])
    panels[next(reversed(panels))] += about_help
    lines = [usage_of_command(command, ctx), ""]
    lines += _about(command.help or "")
    for title, rows in panels.items():
        lines += _panel_lines(title, rows)
    return "\n".join(lines).rstrip()


def usage_of_command(command: Any, ctx: Any) -> str:
    """How a command is called, on one line."""
    return f"Usage: {ctx.command_path} {' '.join(_pieces(command, ctx))}"


def help_of_program(program: Any, ctx: Any) -> str:
    """What the program does, and its commands in panels."""
    lines = [f"Usage: {ctx.command_path} COMMAND ...", "", *_wrapped(program.help or "", "  "), ""]
    panels: dict[str, list[tuple[str, str]]] = {}
    for name, command in program.commands.items():
        if command.hidden:
            continue
        rows = panels.setdefault(command.rich_help_panel, [])
        rows.append((name, first_sentence(command.help or "")))
    for title, rows in panels.items():
        lines += _panel_lines(title, rows, column=12)
    options = [(_left(one), _right(one)) for one in program.get_params(ctx)]
    lines += _panel_lines(_OPTIONS, options, column=17)
    lines += _wrapped(program.epilog or "", "")
    return "\n".join(lines).rstrip()


def takes_value(one: Any) -> bool:
    """Whether a parameter of a command is given a value; not None, a flag, or what is counted."""
    return (
        one is not None and not getattr(one, "is_flag", False) and not getattr(one, "count", False)
    )


def first_sentence(text: str) -> str:
    """What a command does in one sentence."""
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return paragraph.partition(": ")[0].rstrip(".")


def _panel(option: Any) -> str:
    if "--help" in option.opts:
        return "Help"
    return getattr(option, "rich_help_panel", None) or _OPTIONS


def _pieces(command: Any, ctx: Any) -> Iterator[str]:
    """How a command is called, as a person would write it."""
    for one in command.get_params(ctx):
        if one.param_type_name == "argument":
            name = one.metavar or one.name.upper()
            yield name if one.required or name.startswith("[") else f"[{name}]"
    for one in command.get_params(ctx):
        if one.param_type_name == "option" and one.required:
            yield f"{one.opts[-1]} {one.metavar}"
    yield "[OPTIONS]"


def _left(one: Any) -> str:
    """An argument or option as it is written."""
    if one.param_type_name == "argument":
        return str(one.metavar or one.name.upper())
    names = sorted(one.opts, key=len)
    text = ", ".join(names)
    if one.secondary_opts:
        text += "/" + "/".join(one.secondary_opts)
    return f"{text} {one.metavar}" if takes_value(one) else text


def _right(one: Any) -> str:
    """What an argument or option does, its default, and whether it must be given."""
    extra = _defaults(one)
    if one.param_type_name == "option" and one.required:
        extra.append("required")
    extra += _limits(one)
    return (one.help or "") + (f"  [{'; '.join(extra)}]" if extra else "")


def _defaults(one: Any) -> list[str]:
    """The default in words, if there is one; what is not given is not said."""
    if isinstance(one.default, bool):
        names = one.opts if one.default else one.secondary_opts
        return [f"default: {names[0]}"] if one.secondary_opts else []
    if not takes_value(one) or one.default in (None, "", [], ()):
        return []
    return [f"default: {one.default}"]


def _limits(one: Any) -> list[str]:
    """Between which numbers the value lies, which typer or click knows."""
    kind = getattr(one, "type", None)
    least = getattr(one, "min", None)
    most = getattr(one, "max", None)
    least = getattr(kind, "min", None) if least is None else least
    most = getattr(kind, "max", None) if most is None else most
    if getattr(one, "count", False) or (least is None and most is None):
        return []
    if most is None:
        return [] if least == 0 else [f"from {least}"]
    return [f"{least or 0} to {most}"]


def _about(text: str) -> list[str]:
    """The paragraphs of a help text; examples stay as they are."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("Example"):
            head, *rest = paragraph.splitlines()
            lines += [_title(head.rstrip(":")), *("  " + line.strip() for line in rest), ""]
        else:
            lines += [*_wrapped(paragraph, "  "), ""]
    return lines


def _panel_lines(title: str, rows: Sequence[tuple[str, str]], column: int = _COLUMN) -> list[str]:
    """A panel: its title, and what is in it in two columns."""
    if not rows:
        return []
    lines = [_title(title)]
    for left, right in rows:
        text = _wrapped(right, " " * column) or [""]
        if len(left) + 4 <= column:
            text[0] = f"  {left}".ljust(column) + text[0].lstrip()
        else:
            lines.append(f"  {left}")
        lines += text
    return [*lines, ""]


def _title(text: str) -> str:
    return f"\033[1m{text}:\033[0m" if is_colored(sys.stdout) else f"{text}:"


def _wrapped(text: str, indent: str) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, _MAX_WIDTH), 40)
    words = " ".join(text.split("\n"))
    return textwrap.wrap(
        words,
        width=width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
