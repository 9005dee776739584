"""Text from strangers, made harmless before it is shown; and numbers read from text, the same
everywhere.

Names come from files: of structures, cases, models, the files themselves. A terminal obeys escape
sequences in them, direction marks turn the text around them, and a spreadsheet runs what begins
like a formula.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

#: Joiners of letters, without which Persian and Indic words are misspelt; they do nothing else.
_JOINERS = "\u200c\u200d"
#: What spreadsheets take for the beginning of a formula
#: (owasp.org/www-community/attacks/CSV_Injection), perhaps after apostrophes of ours.
_FORMULA = re.compile(r"'*[=+\-@]")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?((?:[0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE)


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
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def to_cell(value: Any) -> Any:
    """A value for a table: text harmless, and with an apostrophe before what a spreadsheet would
    take for a formula.
    """
    if not isinstance(value, str):
        return value
    shown = harmless(value)  # of a tab or line break at the beginning too
    return f"'{shown}" if _FORMULA.match(shown) else shown


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
