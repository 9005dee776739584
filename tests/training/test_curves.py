"""The picture of a training run: the numbers it was drawn from can be found in it again."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import fftconvolve

from medseg.training import curves
from medseg.training.curves import draw_curves
from medseg.view.lettering import letters as lettering, write_text

WHITE = (255, 255, 255)


def decoded(path: Path) -> np.ndarray:
    """The pixels of a PNG of the kind medseg writes, read without it: unfiltered 8-bit RGB."""
    content, at, data = path.read_bytes(), 8, b""
    while at < len(content):
        (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    return (
        np.frombuffer(zlib.decompress(data), np.uint8)
        .reshape(height, 1 + 3 * width)[:, 1:]
        .reshape(height, -1, 3)
    )


def drawn(folder: Path, rows: list[dict], tail: str = "") -> np.ndarray:
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8"
    )
    draw_curves(folder / "metrics.jsonl", folder / "progress.png")
    assert (folder / "progress.png").stat().st_size < 150_000
    return decoded(folder / "progress.png")


def panel(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    return picture[row * height :, column * width :][
        curves._TOP : height - curves._BOTTOM, curves._LEFT : width - curves._RIGHT
    ]


def reads(picture: np.ndarray, text: str) -> bool:
    """Whether a text stands somewhere in the picture, by its dots and the gaps between them."""
    ink = np.where((picture < 200).any(-1), 1.0, -1.0)
    dots = np.where(lettering(text), 1.0, -1.0)
    return bool(fftconvolve(ink, dots[::-1, ::-1], "valid").max() > dots.size - 0.5)


def test_a_curve_lies_where_its_values_are(tmp_path):
    rows = [
        {"step": step, "loss": 2 - step / 100, "dice": step / 100, "lr": 1e-3}
        for step in range(0, 101, 5)
    ]

    picture = drawn(tmp_path, rows)

    color = np.array(curves._COLORS[0])
    for part, rises in ((panel(picture, 0, 0), False), (panel(picture, 0, 1), True)):
        height, width = part.shape[:2]
        mine = (part == color).all(-1)
        columns = np.arange(10, width - 10)
        middle = np.array([np.flatnonzero(mine[:, column]).mean() for column in columns])
        # The axes run from 0 to 1 and, for the loss, from 1 to 2: a line from corner to corner.
        share = columns / (width - 1)
        expected = (1 - share if rises else share) * (height - 1)
        assert np.abs(middle - expected).max() < 1.5


def test_what_a_run_writes_is_named_with_its_latest_values(tmp_path):
    rows = [
        {"step": 100, "loss": 1.5, "dice": 0.25, "lr": 0.5, "seconds_a_step": 0.375},
        {"step": 200, "loss": 0.75, "dice": 0.5, "lr": 0.25, "seconds_a_step": 0.25},
        {
            "step": 200,
            "validation_dice": 0.625,
            "validation": {"Anterior": 0.75, "Postérieur": 0.5, "step": 0.125},
        },
    ]

    picture = drawn(tmp_path, rows)

    for text in (
        "training 0.75",
        "training 0.500",
        "validation 0.625",
        "Anterior 0.750",
        "Posterieur 0.500",
    ):
        assert reads(picture, text), text
    for text in (
        "Loss (0.25 s a step)",
        "Learning rate",
        "Dice in validation",
        "step 0.125",
        "200",
    ):
        assert reads(picture, text), text
    assert not reads(picture, "training 1.5")


def test_many_structures_are_drawn_and_counted(tmp_path):
    names = [f"Vertebra with a long name {n}" for n in range(30)]
    rows = [
        {"step": step, "validation": {name: n / 30 for n, name in enumerate(names)}}
        for step in (1, 2)
    ]

    picture = drawn(tmp_path, rows)

    assert reads(picture, "+29")
    part = panel(picture, 1, 1)
    grey = (part[:, 3 * part.shape[1] // 4] == curves._GREY).all(-1)
    assert grey.any()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 3}],
        [{"step": 0, "loss": 0.0}, {"step": 0, "dice": 1}],
        [
            {"step": 1, "loss": float("nan"), "dice": float("inf")},
            {"step": 2, "loss": None, "dice": "x"},
        ],
        [
            {"step": 1, "loss": -1e30},
            {"step": 10**9, "loss": 1e30, "validation": [1], "validation_dice": True},
        ],
        [{"loss": 1}, {"step": None}, {"step": 5, "validation": {"": 0.5, "a\nb": 0.1}}],
    ],
)
def test_a_picture_comes_of_whatever_there_is(tmp_path, rows):
    picture = drawn(tmp_path, rows, tail='[1]\n"text"\n{"step": 3, "lo')

    assert picture.shape == (curves._HEIGHT, curves._WIDTH, 3)
    empty = not any(isinstance(row.get("lr"), float) for row in rows)
    assert reads(picture, "nothing yet") == empty


def test_ticks_are_round_and_enclose():
    for low, high in ((0, 1), (0.31, 0.92), (-7e4, -2e4), (5, 5), (0, 0), (1e-9, 3e-9), (-1, 1e6)):
        ticks = curves._ticks(low, high)
        assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high)
        assert 3 <= len(ticks) <= 8
        steps = np.diff(ticks)
        assert np.allclose(steps, steps[0])
        assert float(f"{steps[0]:.6e}"[0]) in (1, 2, 5)


def test_letters_are_told_apart_and_fit():
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,-+/:()%=_"
    shapes = {lettering(letter, 1).tobytes() for letter in letters}
    assert len(shapes) == len(letters)
    assert lettering("中", 1).all(0).all() or lettering("中", 1)[:7].all()
    assert np.array_equal(lettering("é"), lettering("e"))
    picture = np.full((20, 40, 3), 255, np.uint8)
    assert write_text(picture, 15, 30, "Wide text", (0, 0, 0)) > 40  # cut off at the edge
    assert (picture[15:, 30:] == 0).any() and (picture[:15] == 255).all()


def test_long_runs_are_thinned(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"step": step, "loss": 1 + rng.normal(0, 0.2)} for step in range(20_000)]

    part = panel(drawn(tmp_path, rows), 0, 0)

    mine = np.flatnonzero((part == curves._COLORS[0]).all(-1).any(1))
    # The mean of many numbers is drawn, not all of them.
    assert 2 < np.ptp(mine) < part.shape[0] / 4
