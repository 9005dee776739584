"""The config of a MONAI bundle as data: references followed, a few expressions worked out, nothing
run.

MONAI imports whatever `_target_` names and evaluates every text that begins with `$` as Python.
Here an expression is parsed, and walked only if each of its parts is one of a short list; any other
is refused by name. What is not asked for is never looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import BadModel
from medseg.text import harmless, read_json, read_yaml

#: How deep references and values may lead, how many may be followed, how long a text or list gets.
_MAX_DEPTH, _MAX_VALUES, _MAX_LENGTH = 40, 20_000, 10_000
#: Largest config: the zoo's have 15 kB.
MAX_CONFIG_BYTES = 4_000_000
#: Longest expression that is parsed.
_MAX_EXPRESSION = 4_000
_NAMES = ("inference.json", "inference.yaml", "inference.yml")
_REFERENCE = re.compile(r"@(\w+(?:(?:#|::)\w+)*)")
#: What stands for a reference in an expression that is parsed.
_PLACE = "reference_"
_TYPES = ("float16", "float32", "float64", "int16", "int32", "int64", "long", "uint8")
#: Dotted names that an expression may hold -> the text that they mean.
_KNOWN_NAMES = {f"{home}.{name}": name for home in ("torch", "numpy", "np") for name in _TYPES} | {
    f"{home}CommonKeys.{key}": text
    for home in ("monai.utils.", "monai.utils.enums.", "")
    for key, text in (("IMAGE", "image"), ("PRED", "pred"), ("LABEL", "label"))
}
#: MONAI's other names of the same classes.
_ALIASES = {
    "BasicUnet": "BasicUNet", "Basicunet": "BasicUNet", "basicunet": "BasicUNet",
    "DynUnet": "DynUNet", "Dynunet": "DynUNet", "MedNext": "MedNeXt", "Unet": "UNet",
}  # fmt: skip
#: Part of a config -> where what runs the bundle refers to it.
_PLACES = {
    "preprocessing": ("dataset", "transform"),
    "inferer": ("evaluator", "inferer"),
    "postprocessing": ("evaluator", "postprocessing"),
}
#: Keys of a component that are about it, and no arguments of it.
_ABOUT = ("_target_", "_disabled_", "_requires_", "_desc_", "_mode_")


@dataclass(frozen=True, kw_only=True)
class Component:
    """What a config wants built. name: the last part of its class. where: in the config, for
    people."""

    name: str
    arguments: Mapping[str, Any]  # as they stand in the config
    where: str


@dataclass(kw_only=True)
class Config:
    """A config that was read; `path` is named in messages."""

    path: str
    tree: Mapping[str, Any]
    _left: int = field(default=_MAX_VALUES)

    def part(self, name: str) -> Any:
        """What the config runs under the name of one of its parts, as it stands there; None for
        nothing.

        MONAI runs what the evaluator, or of scans their dataset, refers to. Usually that is the
        part of this name at the top; nothing but such a reference is looked at.
        """
        *way, last = _PLACES[name]
        node: Any = self.tree
        for key in (*way, last):
            node = node.get(key) if isinstance(node, dict) else None
        match = _REFERENCE.fullmatch(node.strip()) if isinstance(node, str) else None
        if match is not None or (isinstance(node, dict) and not self.has(name)):
            return node
        return self.tree.get(name)

    def refuse(self, what: str) -> BadModel:
        """The error for something that this config says."""
        return BadModel(f"{self.path}: {harmless(what)}")

    def has(self, name: str) -> bool:
        """Whether the config has something of this name at its top."""
        return name in self.tree

    def value(self, raw: Any, where: str, stack: tuple[str, ...] = (), depth: int = 0) -> Any:
        """The plain value that `raw` means: numbers, truths, texts, None, and lists and dicts of
        them.

        Raises `BadModel` for what is not understood, and for what would have to be built or run.
        """
        self._count(where, depth)
        if isinstance(raw, str):
            return self._text(raw, where, stack, depth)
        if isinstance(raw, list):
            return [self.value(one, f"{where}#{n}", stack, depth + 1) for n, one in enumerate(raw)]
        if isinstance(raw, dict):
            if "_target_" in raw:
                raise self.refuse(f"{where} wants {raw['_target_']!s:.80}, which is no plain value")
            return {
                key: self.value(one, f"{where}#{key}", stack, depth + 1)
                for key, one in raw.items()
                if key not in _ABOUT
            }
        return raw

    def followed(self, raw: Any, where: str) -> Any:
        """What a reference means, unlike `value` not worked out any further; other things as they
        are."""
        stack: tuple[str, ...] = ()
        while isinstance(raw, str):
            self._count(where, len(stack))
            text = raw.strip()
            match = _REFERENCE.fullmatch(text.removeprefix("$").strip())
            if match is None or not text.startswith(("@", "$")):
                break
            raw, stack = self._referred(match[1], where, stack)
        return raw

    def component(
        self, raw: Any, where: str, known: Collection[str], homes: Sequence[str]
    ) -> Component | None:
        """What is to be built, one of `known`; None where it is disabled. Raises `BadModel` for
        others.

        homes: what may stand before its name.
        """
        raw = self.followed(raw, where)
        if not isinstance(raw, dict) or "_target_" not in raw:
            raise self.refuse(f"{where} is {_shown(raw)} where a class with its settings is needed")
        disabled, mode = raw.get("_disabled_", False), raw.get("_mode_", "default")
        if type(disabled) is not bool:
            raise self.refuse(
                f"{where} is disabled by {_shown(disabled)}, which medseg does not run"
            )
        if disabled:
            return None
        target = raw["_target_"]
        plain = target if isinstance(target, str) else ""
        last = plain.rpartition(".")[2]
        bare = plain.removesuffix(last)
        name = plain_class(last) if not bare or bare in homes else plain
        if name not in known:
            names = ", ".join(sorted(known))
            raise self.refuse(
                f"{where} wants {_shown(target)}, which medseg does not run; it knows {names}"
            )
        if mode != "default":
            raise self.refuse(f"{where} has the mode {_shown(mode)}; medseg knows only default")
        arguments = {key: one for key, one in raw.items() if key not in _ABOUT}
        return Component(name=name, arguments=arguments, where=where)

    def _count(self, where: str, depth: int) -> None:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise self.refuse(
                f"{where} leads through more values than any model needs; medseg gives up"
            )

    def _text(self, raw: str, where: str, stack: tuple[str, ...], depth: int) -> Any:
        if raw.startswith("%"):
            raise self.refuse(f"{where} takes its text from elsewhere ({raw:.80}); medseg does not")
        if raw.startswith("$"):
            return self._expression(raw[1:], where, stack, depth=depth)
        match = _REFERENCE.fullmatch(raw.strip())
        if match is None:
            if raw.startswith("@"):
                raise self.refuse(f"{where} refers to {raw:.80}, which medseg does not understand")
            return raw
        return self._reference(match[1], where, stack, depth=depth)

    def _reference(self, name: str, where: str, stack: tuple[str, ...], depth: int) -> Any:
        target, stack = self._referred(name, where, stack)
        return self.value(target, name, stack, depth + 1)

    def _referred(
        self, name: str, where: str, stack: tuple[str, ...]
    ) -> tuple[Any, tuple[str, ...]]:
        """What lies at a place of the tree, and the references that led there."""
        name = name.replace("::", "#")
        if name == "bundle_root":  # whatever the config says: the bundle is where it is
            return ".", stack
        if name in stack:
            circle = " -> ".join(f"@{one}" for one in (*stack[stack.index(name) :], name))
            raise self.refuse(f"{where} refers to itself: {circle:.200}")
        node: Any = self.tree
        for part in name.split("#"):
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and _is_index(part) and int(part) < len(node):
                node = node[int(part)]
            else:
                raise self.refuse(f"{where} refers to @{name:.80}, and there is no such place")
        return node, (*stack, name)

    def _expression(self, text: str, where: str, stack: tuple[str, ...], depth: int) -> Any:
        names: list[str] = []

        def placed(found: re.Match[str]) -> str:
            names.append(found[1])
            return f"{_PLACE}{len(names) - 1}"

        tree = parsed(_REFERENCE.sub(placed, text), text, self.refuse, where=where)
        expression = _Allowed(
            shown=text, where=where, refuse=self.refuse, names=names, config=self, stack=stack
        )
        expression.check(tree)
        return expression.worked_out(tree, depth + 1)


def parsed(text: str, shown: str, refuse: Callable[[str], BadModel], where: str) -> ast.expr:
    """An expression as a tree that nobody runs. Raises what `refuse` makes for one that is none."""
    if len(text) > _MAX_EXPRESSION:
        raise refuse(f"{where} has an expression of {len(text)} characters; medseg does not run it")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refuse(f"{where} has the expression {shown!r:.80}, which is none") from None


@dataclass(frozen=True, kw_only=True)
class _Allowed:
    """The expressions that are worked out; all others are refused by what they do."""

    shown: str
    where: str
    refuse: Callable[[str], BadModel]
    names: Sequence[str]
    config: Config
    stack: tuple[str, ...]

    def check(self, node: ast.expr, depth: int = 0) -> None:
        """Raise `BadModel` for a part that is not one of the few that are known."""
        if depth > _MAX_DEPTH:
            raise self._no("nests too deep")
        if isinstance(node, ast.Constant):
            if type(node.value) not in (int, float, str, bool, type(None)):
                raise self._no("holds a constant of another kind")
            if isinstance(node.value, str) and _PLACE in node.value:
                raise self._no("has a reference inside of a text")
            return
        if isinstance(node, ast.Name | ast.Attribute):
            self._check_name(node)
            return
        for part in self._parts(node):
            self.check(part, depth + 1)

    def _check_name(self, node: ast.expr) -> None:
        name = _dotted(node)
        if name is None or not (self._number(name) is not None or name in _KNOWN_NAMES):
            what = "attribute" if isinstance(node, ast.Attribute) else "name"
            raise self._no(f"uses the {what} {name or ast.unparse(node)!s:.60}")

    def _number(self, name: str) -> int | None:
        number = name.removeprefix(_PLACE)
        if name == number or not number.isdecimal() or int(number) >= len(self.names):
            return None
        return int(number)

    def _parts(self, node: ast.expr) -> list[ast.expr]:
        """What an allowed part is made of."""
        if isinstance(node, ast.List):
            return list(node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            return [node.operand]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [node.left, node.right]
        if isinstance(node, ast.IfExp):
            return [node.test, node.body, node.orelse]
        if isinstance(node, ast.Call):
            is_len = isinstance(node.func, ast.Name) and node.func.id == "len"
            if is_len and len(node.args) == 1 and not node.keywords:
                return list(node.args)
            raise self._no(f"calls {ast.unparse(node.func)!s:.60}")
        raise self._no(f"holds {type(node).__name__}")

    def _no(self, why: str) -> BadModel:
        return self.refuse(
            f"{self.where} has the expression {self.shown!r:.80}, which {why}; medseg runs no code"
        )

    def worked_out(self, node: ast.expr, depth: int) -> Any:
        """The value of a checked expression."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name | ast.Attribute):
            name = str(_dotted(node))
            number = self._number(name)
            if number is None:
                return _KNOWN_NAMES[name]
            return self.config._reference(self.names[number], self.where, self.stack, depth=depth)
        if isinstance(node, ast.List):
            return [self.worked_out(one, depth) for one in node.elts]
        if isinstance(node, ast.UnaryOp):
            return self._unary(node, depth)
        if isinstance(node, ast.BinOp):
            return self._sum(self.worked_out(node.left, depth), self.worked_out(node.right, depth))
        if isinstance(node, ast.IfExp):
            branch = node.body if self.worked_out(node.test, depth) else node.orelse
            return self.worked_out(branch, depth)
        assert isinstance(node, ast.Call)
        argument = self.worked_out(node.args[0], depth)
        if not isinstance(argument, str | list | dict):
            raise self._no("measures what has no length")
        return len(argument)

    def _unary(self, node: ast.UnaryOp, depth: int) -> Any:
        value = self.worked_out(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return not value
        if type(value) not in (int, float):
            raise self._no("negates what is no number")
        return -value

    def _sum(self, left: Any, right: Any) -> Any:
        kinds = {type(left), type(right)}
        if kinds not in ({str}, {list}, {int}):
            raise self._no("adds what are not two texts, two lists or two whole numbers")
        total = left + right
        if not isinstance(total, int) and len(total) > _MAX_LENGTH:
            raise self._no("makes a text or list too long")
        return total


def _dotted(node: ast.expr) -> str | None:
    """A name with dots; None for an attribute of something else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else None


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def plain_class(name: str) -> str:
    """The name of a class by which it is known here: `SpacingD` and `SpacingDict` are
    `Spacingd`."""
    for end in ("Dict", "D"):
        if name.endswith(end) and len(name) > len(end):
            return f"{name.removesuffix(end)}d"
    return _ALIASES.get(name, name)


def _shown(raw: Any) -> str:
    return repr(raw)[:80] if not isinstance(raw, str) else f"{raw:.80}"


def config_file(folder: Path) -> Path | None:
    """The config of a bundle's inference, if the folder has one."""
    return next(
        (folder / "configs" / n for n in _NAMES if (folder / "configs" / n).is_file()), None
    )


def read_config(path: Path) -> Config:
    """The config of a file. Raises `BadModel` for one that is damaged, too deep, or too large."""
    read = read_json if path.suffix == ".json" else read_yaml
    limits = {"max_bytes": MAX_CONFIG_BYTES} if path.suffix == ".json" else {}
    tree = read(path, BadModel, **limits)
    if not isinstance(tree, dict):
        raise BadModel(f"{path}: is no tree of settings; fetch the bundle again")
    return Config(path=str(path), tree={str(key): value for key, value in tree.items()})
