"""Text from strangers: JSON and YAML read within limits, names made harmless, numbers read alike
everywhere.

What comes back of a document can be walked, printed and compared by plain recursion: nothing is
nested deeper than `MAX_DEPTH`, no number is longer than `MAX_DIGITS`, and keys are text or whole
numbers.

Names come from files: of structures, cases, models, the files themselves. A terminal obeys escape
sequences in them, direction marks turn the text around them, and a spreadsheet runs what begins
like a formula.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from medseg.errors import BadConfig, BadFile, MedsegError
from medseg.stream import read_bytes

#: Deepest nesting; models, plans and lists of cases need about ten.
MAX_DEPTH = 64
#: Longest whole number: 128 bits, as the states of random generators have.
MAX_DIGITS = 40
MAX_JSON_BYTES = 1 << 24
MAX_YAML_BYTES = 1 << 20
#: Most values of a YAML document, those that aliases repeat counted each time.
MAX_VALUES = 100_000


def read_json(
    path: str | Path,
    kind: type[MedsegError] = BadFile,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    last_wins: bool = False,
) -> Any:
    """What a JSON file (RFC 8259) of at most `max_bytes` holds; see `parse_json`. Raises `kind`
    naming the file.
    """
    try:
        return parse_json(_text(path, max_bytes), last_wins=last_wins)
    except BadFile as error:  # it names the file
        raise kind(str(error)) from None
    except ValueError as error:
        raise kind(f"{path}: is not valid JSON: {error}; correct the file") from None


def parse_json(text: str, *, last_wins: bool = False) -> Any:
    """The value of a JSON text.

    Raises `ValueError` saying what is wrong, also for a key given two values, unless the last one
    wins: for who tells of them himself.
    """
    try:
        value = json.loads(
            text, parse_int=_whole, object_pairs_hook=dict if last_wins else _mapping
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    for _ in _walk(value):
        pass
    return value


def read_yaml(path: str | Path, kind: type[MedsegError] = BadFile) -> Any:
    """What a YAML file of at most `MAX_YAML_BYTES` holds. Raises `kind` naming the file."""
    try:
        return parse_yaml(_text(path, MAX_YAML_BYTES))
    except BadFile as error:
        raise kind(str(error)) from None
    except ValueError as error:
        raise kind(f"{path}: is not YAML that medseg reads: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML 1.1 text of plain values. Raises `ValueError` saying what is wrong."""
    import yaml

    # The loader in C where there is one: a megabyte in a second instead of in twenty.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, loader))
        reader = loader(text)
        try:
            value = reader.get_single_data()
        finally:
            reader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except ValueError as error:  # a date that does not exist, a number too long for Python
        raise ValueError(str(error).partition(";")[0]) from None
    for inner in _walk(value):
        for key in inner if isinstance(inner, dict) else ():
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ValueError(f"the key {key!r:.60} is neither text nor a whole number")
    return value


def _text(path: str | Path, max_bytes: int) -> str:
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last value of a key wins in JSON, so that a slip of the pen would lose the first one in
    silence.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        for key, value in pairs:
            if mapping[key] != value or type(mapping[key]) is not type(value):
                raise ValueError(f"the key {key!r:.60} is given two values")
    return mapping


def _walk(value: Any) -> Iterator[Any]:
    """Every value inside of a value, itself first.

    Raises `ValueError` for too much depth or too long numbers.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        for one in level:
            if isinstance(one, int) and abs(one) >= 10**MAX_DIGITS:
                raise ValueError(f"it holds a number of more than {MAX_DIGITS} digits")
            yield one
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple | set) else ()


def _check_number(event: Any) -> None:
    """Raise `ValueError` for a number that YAML 1.1 (yaml.org/type/int.html) reads in a way of its
    own: 1_0 as 10, 010 as 8, 1:30 as 90.
    """
    import yaml

    text, kind = event.value, event.tag
    if not _ODD_NUMBER.fullmatch(text) or _is_no_octal(text):
        return
    if event.implicit[0]:
        kind = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))
    if kind in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        raise ValueError(
            f"YAML reads {text:.60} as another number than it looks like: write it in plain digits,"
            " or in quotes if it is text"
        )


def _is_no_octal(text: str) -> bool:
    """Whether digits that begin with a nought are the same number to the base of 8, or none."""
    digits = text.lstrip("+-")
    if not digits.isdecimal():
        return not {"_", ":"} & set(digits)
    return len(digits) > MAX_DIGITS or max(digits) > "7" or int(digits) == int(digits, 8)


def _check_events(events: Iterable[Any]) -> None:
    """Raise `ValueError` for a document too deep, or too large once aliases are expanded, before
    anything is built.
    """
    import yaml

    count = 0
    stack: list[
        tuple[str | None, int]
    ] = []  # anchors of the collections around, and the values before each
    sizes: dict[str | None, int] = {}  # values below an anchor
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(
                    f"the alias *{event.anchor:.60} stands for nothing, or for what it is a part of"
                )
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            _check_number(event)
            count += 1
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            sizes[anchor] = count - before
        if len(stack) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values, with those of aliases")


#: Joiners of letters, without which Persian and Indic words are misspelt; they do nothing else.
_JOINERS = "\u200c\u200d"
#: What spreadsheets take for the beginning of a formula
#: (owasp.org/www-community/attacks/CSV_Injection), perhaps after apostrophes of ours.
_FORMULA = re.compile(r"'*[=+\-@]")
_DEVICES = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)
#: What may be a number with underscores, colons or a leading nought.
_ODD_NUMBER = re.compile(r"[-+]?(?=.*[_:]|0[0-9])[0-9._:a-fA-FxXeE+-]+")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(
    r"[+-]?((?:[0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE
)
_UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([dhms])", re.IGNORECASE)
_TIMES = re.compile(
    rf"(?:{_TIME.pattern})+\s*|\s*(?P<minutes>[0-9]+(?:\.[0-9]+)?)\s*", re.IGNORECASE
)


def harmless(text: object) -> str:
    r"""The text with all that is not printable as visible escapes: \x1b, \x00, \u202e, a lone byte
    of a file name.

    Covered are control characters, line breaks, marks of direction (UAX 9), other invisible
    characters, and surrogates.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(character if _is_shown(character) else _escape(character) for character in plain)


def _is_shown(character: str) -> bool:
    return (
        character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def spelling(name: str) -> str:
    """What names have in common that a disk which ignores the case of letters takes for one, as
    those of Windows and macOS do: in one case, accents as part of their letters.
    """
    return unicodedata.normalize("NFC", name).casefold()


def alike_but_for_case(names: Iterable[str]) -> tuple[str, str] | None:
    """Two different names that some disks take for one; None where there are no such two."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(spelling(name), name)
        if other != name:
            return other, name
    return None


def is_reserved(name: str) -> bool:
    """Whether Windows keeps a name for a device, or changes it: CON, NUL.nii.gz, a dot at the end
    (Naming Files, Paths, and Namespaces; Microsoft).
    """
    return bool(_DEVICES.fullmatch(name.partition(".")[0].rstrip())) or name.endswith((".", " "))


def counted(count: int, thing: str) -> str:
    """'1 case', '2 cases'."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def to_cell(value: Any) -> Any:
    """A value for a table: text harmless, and with an apostrophe before what a spreadsheet would
    take for a formula.
    """
    if not isinstance(value, str):
        return value
    cell = harmless(value)  # of a tab or line break at the beginning too
    return f"'{cell}" if _FORMULA.match(cell) else cell


def from_cell(text: str) -> str:
    """What `to_cell` was given, but for characters that were made visible."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def whole_number(text: str) -> int:
    """A whole number in decimal digits.

    Raises `ValueError`, also for 1_0, which Python's `int` takes for 10.
    """
    if not _WHOLE.fullmatch(text.strip(" \t")) or len(text) > 100:
        raise ValueError(f"'{text:.40}' is not a whole number")
    return int(text)


def decimal_number(text: str) -> float:
    """A number such as -1.5e-3, nan or inf.

    Raises `ValueError`, also for 1_0, which Python's `float` takes for 10.
    """
    if not _DECIMAL.fullmatch(text.strip(" \t")):
        raise ValueError(f"'{text:.40}' is not a number")
    return float(text)


def seconds_of(text: str) -> float:
    """Seconds of a time such as 30m, 1.5h, 90s or 1h30m, or of a number of minutes.

    Raises `ValueError`.
    """
    whole = _TIMES.fullmatch(text)
    total = float(whole["minutes"]) * 60 if whole and whole["minutes"] else 0.0
    if not total:
        total = sum(float(one[1]) * _UNITS_S[one[2].lower()] for one in _TIME.finditer(text))
    if not whole or total <= 0:
        raise ValueError(f"'{text:.40}' is not a time such as 30m, 8h or 1h30m")
    return total


# What programs give ------------------------------------------------------------------------------


def as_whole(value: Any, name: str, *, least: int = 0, most: int | None = None) -> int:
    """A whole number that a program gives, also one of numpy. Raises `BadConfig`, which says what
    is called `name`.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    is_whole = is_number and math.isfinite(value) and int(value) == value
    if not is_whole or value < least or (most is not None and value > most):
        end = "on" if most is None else f"to {most}"
        raise BadConfig(f"{name} is a whole number from {least} {end}, and {_given(value)}")
    return int(value)


def as_number(value: Any, name: str, *, least: float = 0.0, most: float = math.inf) -> float:
    """A finite number that a program gives, also one of numpy. Raises `BadConfig`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or math.isinf(value):
        end = "on" if math.isinf(most) else f"to {most:g}"
        raise BadConfig(f"{name} is a number from {least:g} {end}, and {_given(value)}")
    number: float = value.item() if hasattr(value, "item") else value
    return number


def _given(value: object) -> str:
    return f"{harmless(f'{value!r:.40}')} was given"


def as_names(value: object, name: str, *, allowed: Collection[str] = ()) -> tuple[str, ...]:
    """The texts of a list that a program gives, each one of `allowed` where there are such. Raises
    `BadConfig`, for a text alone above all: its letters are no names.
    """
    if isinstance(value, str):
        raise BadConfig(f"{name} is a list of texts; give [{harmless(f'{value!r:.40}')}] for one")
    is_list = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)
    names = tuple(value) if is_list else (None,)  # type: ignore[arg-type]
    for one in names:
        if not isinstance(one, str) or (allowed and one not in allowed):
            words = f", of {', '.join(allowed)}" if allowed else ""
            raise BadConfig(f"{name} is a list of texts{words}, and {_given(value)}")
    return names  # type: ignore[return-value]


def as_mapping(value: object, name: str) -> dict[str, Any]:
    """A mapping that a program gives, as a dict; an empty one of None. Raises `BadConfig`."""
    if value is not None and not isinstance(value, Mapping):
        raise BadConfig(f"{name} are a mapping of names to values, and {_given(value)}")
    return dict(value or {})


def reason_of(error: BaseException) -> str:
    """The kind of a library's error and what it says, on one line that is not long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
