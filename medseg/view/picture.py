"""Pictures of pixels: PNG files, words in them, and legends.

Words are set by Pillow in DejaVu Sans, which matplotlib brings along: the typeface of all pictures
of medseg. Its font file is found without importing matplotlib, which takes half a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write
from medseg.labels import Label, LabelTable
from medseg.text import harmless
from medseg.volume import value_counts

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

Color = tuple[int, int, int]

TYPEFACE = "DejaVu Sans"
#: Letters of directions: seen on black and on white, as they have a black rim.
YELLOW: Color = (255, 220, 0)
_INK: Color = (225, 225, 225)
#: Of a legend: the height of a line, the width of a column and of the field of colour, in pixels.
_LINE, _COLUMN, _FIELD = 22, 270, 14
#: Structures that a legend names at most.
NAMED = 24


@dataclass(frozen=True, kw_only=True)
class Word:
    """A line of text in a picture. place: (row, column). anchor: which point of the text lies
    there, as Pillow names it: l, m or r, and then a (top), m or s (baseline). rim: of its outline,
    in pixels.
    """

    text: str
    place: tuple[float, float]
    anchor: str = "la"
    color: Color = YELLOW
    size: int = 13
    rim: int = 1


def write_png(path: str | Path, picture: NDArray[np.uint8], *, level: int = 6) -> None:
    """Write a picture as PNG, whole or not at all. Raises `BadOutput`."""
    content = png_bytes(picture, level=level)
    with atomic_write(path) as handle:
        handle.write(content)


def png_bytes(picture: NDArray[np.uint8], *, level: int = 6) -> bytes:
    """A picture (rows, columns), or with 3 or 4 channels behind, as the bytes of a PNG file: always
    the same for the same picture. level: how hard it is packed, from 1 to 9.
    """
    from PIL import Image

    content = BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(content, "PNG", compress_level=level)
    return content.getvalue()


def lettered(picture: NDArray[np.uint8], words: Iterable[Word]) -> NDArray[np.uint8]:
    """An RGB picture (rows, columns, 3) with words in it; what does not fit is cut off."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(np.ascontiguousarray(picture))
    draw = ImageDraw.Draw(image)
    fonts: dict[int, FreeTypeFont | ImageFont] = {}
    for word in words:
        if word.size not in fonts:
            fonts[word.size] = font_of(word.size)
        draw.text(
            (word.place[1], word.place[0]),
            word.text,
            fill=word.color,
            font=fonts[word.size],
            anchor=word.anchor,
            stroke_width=word.rim,
            stroke_fill=(0, 0, 0),
        )
    return np.array(image)


def font_of(size: int) -> FreeTypeFont | ImageFont:
    """The typeface in a size, in pixels; a new one for each caller, as threads cannot share it."""
    from PIL import ImageFont

    path = _font_file()
    if path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _font_file() -> str | None:
    spec = find_spec("matplotlib")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0] if places else "", "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
    return str(path) if path.is_file() else None


def drawable(text: str, instead: str) -> str:
    """A stranger's text for a picture: made harmless; `instead` where the typeface lacks letters
    of it, as of Chinese.
    """
    plain = harmless(text)
    font = font_of(20)
    lacking = _shape(font, "\U0010fffd")
    return instead if any(_shape(font, letter) == lacking for letter in set(plain)) else plain


def _shape(font: FreeTypeFont | ImageFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def largest(mask: NDArray, table: LabelTable, most: int) -> tuple[list[Label], int]:
    """The structures of a label map, the largest first, and how many more there are.

    At most `most` lines come of them, the one that counts the others included.
    """
    counts = value_counts(mask, max(table.values, default=0) + 1)
    labels = [label for label in table.labels if counts[label.value]]
    labels.sort(key=lambda label: (-counts[label.value], label.value))
    if len(labels) <= most:
        return labels, 0
    return labels[: most - 1], len(labels) - most + 1


def name_in_picture(label: Label) -> str:
    """What a picture calls a structure."""
    return drawable(label.name, f"label {label.value}")


def legend(
    labels: Sequence[Label], more: int, width: int, columns: int | None = None
) -> NDArray[np.uint8]:
    """(rows, width, 3): names beside fields of their colours, in columns from top to bottom."""
    columns = columns or max(1, width // _COLUMN)
    entries: list[tuple[str, Color | None]] = [
        (name_in_picture(label), label.color) for label in labels
    ]
    if more:
        entries.append((f"and {more} more", None))
    lines = -(-len(entries) // columns)
    picture = np.zeros((lines * _LINE + _LINE if lines else 0, width, 3), np.uint8)
    words = []
    room = width // columns - _FIELD - 24
    for number, (name, color) in enumerate(entries):
        top = _LINE // 2 + number % lines * _LINE
        left = 8 + number // lines * (width // columns)
        if color is not None:
            picture[top + 4 : top + 4 + _FIELD, left : left + _FIELD] = color
        place = (top + _LINE / 2, left + _FIELD + 8)
        words.append(Word(text=cut(name, room), place=place, anchor="lm", color=_INK, rim=0))
    return lettered(picture, words) if lines else picture


def cut(text: str, room: float, size: int = 13) -> str:
    """A text that is no wider than `room` pixels: an ellipsis stands for its middle, as names often
    differ in their ends.
    """
    font = font_of(size)
    if font.getlength(text) <= room:
        return text
    kept = len(text) - 1
    while kept > 1 and font.getlength(_without_middle(text, kept)) > room:
        kept -= 1
    return _without_middle(text, kept)


def _without_middle(text: str, kept: int) -> str:
    last = kept // 2
    return f"{text[: kept - last].rstrip()}…{text[len(text) - last :].lstrip()}"
