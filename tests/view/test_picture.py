"""Pictures of pixels: PNG that others read alike, words that stay where they are put, legends."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from medseg.errors import BadOutput, DataWarning
from medseg.labels import Label, LabelTable
from medseg.view.picture import (
    Word,
    cut,
    drawable,
    font_of,
    largest,
    legend,
    lettered,
    name_in_picture,
    png_bytes,
)
from medseg.view.preview import _PIXEL, write_beside


@pytest.mark.parametrize("shape", [(13, 17), (13, 17, 3), (13, 17, 4)])
def test_png_bytes_hold_exactly_the_picture(shape: tuple):
    picture = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    content = png_bytes(picture)
    assert np.array_equal(np.asarray(Image.open(BytesIO(content))), picture)
    assert content == png_bytes(picture.copy()) and b"tEXt" not in content


def test_words_are_in_the_one_typeface_and_have_a_rim():
    assert isinstance(font_of(13), ImageFont.FreeTypeFont)
    assert font_of(13).getname() == ("DejaVu Sans", "Book")
    for ground in (0, 255):
        picture = np.full((30, 60, 3), ground, np.uint8)
        words = lettered(picture, [Word(text="L", place=(15, 30), anchor="mm")])
        assert (words == (255, 220, 0)).all(-1).any() and (words == 0).all(-1).any()
        assert np.array_equal(words[:5], picture[:5]) and np.array_equal(
            words[:, :20], picture[:, :20]
        )
        assert (picture == ground).all()


def test_words_at_the_edge_are_cut_off():
    picture = np.zeros((20, 40, 3), np.uint8)
    words = lettered(picture, [Word(text="a wide text", place=(4, 30), rim=0)])
    assert words.shape == picture.shape and words[:, 30:].any() and not words[:, :29].any()


@pytest.mark.parametrize(
    "text, drawn",
    [("Kleinhirn, weiße Substanz", True), ("νωτιαίος", True), ("肝脏", False), ("ok 肝", False)],
)
def test_names_that_the_typeface_lacks_letters_of_are_replaced(text: str, drawn: bool):
    assert drawable(text, "label 3") == (text if drawn else "label 3")
    assert "\x1b" not in drawable("a\x1b[31mb", "label 3")


def test_long_names_keep_both_ends():
    name = "left cerebellar white matter of lobule IX"
    short = cut(name, 120)
    assert font_of(13).getlength(short) <= 120
    first, _, last = short.partition("…")
    assert name.startswith(first) and name.endswith(last) and last.endswith("IX")
    assert cut("liver", 120) == "liver"


def test_a_legend_names_the_largest_and_counts_the_others():
    table = LabelTable(tuple(Label(n, f"part {n}", (n, 0, 0)) for n in range(1, 31)))
    mask = np.repeat(np.arange(31), np.arange(31)).astype(np.uint8).reshape(1, 5, -1)
    labels, more = largest(mask, table, 10)
    assert [label.value for label in labels] == list(range(30, 21, -1)) and more == 21
    assert largest(mask, table, 30)[1] == 0
    assert largest(mask * 0, table, 10) == ([], 0)


def test_every_named_structure_has_its_colour_beside_its_name():
    labels = [
        Label(1, "left one", (255, 0, 0)), Label(2, "two", (0, 255, 0)), Label(9, "肝", (0, 0, 255))
    ]  # fmt: skip
    picture = legend(labels, 21, 800, columns=2).astype(int)
    places = []
    for label in labels:
        rows, columns = np.nonzero((picture == label.color).all(-1))
        assert np.ptp(rows) == np.ptp(columns) == 13
        beside = picture[rows.min() : rows.max(), columns.max() + 4 : columns.max() + 60]
        assert beside.min(-1).max() > 150  # letters
        places.append((columns.min(), rows.min()))
    assert places == sorted(places)
    assert places[0][0] == places[1][0] < places[2][0]
    assert name_in_picture(labels[2]) == "label 9"
    assert legend([], 0, 800).shape == (0, 800, 3)


def test_a_picture_that_cannot_be_drawn_does_not_take_results_with_it(tmp_path: Path):
    def broken(path: Path) -> None:
        raise ZeroDivisionError("no ink")

    with pytest.warns(DataWarning, match=r"p\.png could not be drawn: ZeroDivisionError: no ink"):
        write_beside(tmp_path / "p.png", broken)
    assert Image.open(tmp_path / "p.png").size == (1, 1)
    assert np.asarray(Image.open(BytesIO(b64decode(_PIXEL)))).tolist() == [[0]]

    def full(path: Path) -> None:
        raise BadOutput(f"{path}: cannot be written")

    with pytest.raises(BadOutput):
        write_beside(tmp_path / "q.png", full)
