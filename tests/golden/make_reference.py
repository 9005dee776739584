"""Writes docs/reference.md, the public names of medseg, from their signatures and docstrings.

python tests/golden/make_reference.py
"""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import medseg.api

FILE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
HEAD = """# Public names

What `import medseg` gives, made from signatures and docstrings by `tests/golden/make_reference.py`.
Arrays are numpy's. Places in space are RAS+ mm. Every error that medseg raises on purpose is a
`MedsegError` that says in one sentence what is wrong and what to do.
"""


def _default(value: Any) -> str:
    """How a default is written in a call."""
    if inspect.isfunction(value):
        return "silent" if value.__name__ == "silent" else "..."
    if is_dataclass(value):
        return f"{type(value).__name__}()"
    return "..." if "<" in repr(value) else repr(value)


def _argument(one: inspect.Parameter) -> str:
    stars = "**" if one.kind is one.VAR_KEYWORD else "*" if one.kind is one.VAR_POSITIONAL else ""
    typed = f"{stars}{one.name}: {one.annotation}"
    return typed if one.default is one.empty else f"{typed} = {_default(one.default)}"


def signature(name: str, value: Any) -> str:
    """How something is called, an argument a line where that is longer than 100 columns."""
    parameters = list(inspect.signature(value).parameters.values())
    shown = [_argument(one) for one in parameters if one.name != "self"]
    starred = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    first_by_name = next(
        (n for n, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY and not starred),
        None,
    )
    if first_by_name is not None:
        shown.insert(first_by_name - (len(parameters) - len(shown)), "*")
    returns = inspect.signature(value).return_annotation
    gives = "" if returns in (inspect.Signature.empty, None, "None") else f" -> {returns}"
    line = f"{name}({', '.join(shown)}){gives}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){gives}"


def text_of(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "")


def members(value: type) -> list[str]:
    """A line for each public method and property of a class, in the order of the source."""
    lines = []
    for name, member in vars(value).items():
        kinds = (property, cached_property, classmethod, staticmethod, FunctionType)
        if name.startswith("_") or not isinstance(member, kinds):
            continue
        is_value = isinstance(member, property | cached_property)
        function = member if is_value else getattr(value, name)
        title = name if is_value else signature(name, function)
        lines.append(f"- `{' '.join(title.split())}`: {' '.join(text_of(function).split())}")
    return lines


def section(name: str) -> str:
    """What is said of one public name."""
    value = getattr(medseg, name)
    if inspect.ismodule(value):  # a package that has the name of what it does when it is called
        value = getattr(medseg.api, name)
    if isinstance(value, str):
        return f"## `{name}`\n\nThe version of medseg, a text.\n"
    is_called = not getattr(value, "_is_protocol", False)
    has_arguments = is_called and not (inspect.isclass(value) and issubclass(value, Exception))
    call = f"```python\n{signature(name, value)}\n```\n\n" if has_arguments else ""
    inside = members(value) if inspect.isclass(value) and has_arguments else []
    lines = "\n".join(inside) + "\n" if inside else ""
    return "\n".join([f"## `{name}`\n", f"{call}{text_of(value)}\n", lines]).rstrip() + "\n"


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(section, medseg.__all__)]).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
