"""progress.png: how a training run went, drawn from its metrics.jsonl without a plotting
library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write
from medseg.text import parse_json
from medseg.view import letters, png_bytes, write_text

Color = tuple[int, int, int]
#: Points of a curve: steps and values.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

_WIDTH, _HEIGHT = 1280, 840
# Around each plot: numbers, title and legend, air, steps.
_LEFT, _TOP, _RIGHT, _BOTTOM = (
    84,
    62,
    20,
    44,
)
_INK, _GREY, _GRID = (40, 40, 40), (120, 120, 120), (228, 228, 228)
#: Okabe and Ito's colours, told apart also by those who see fewer.
_COLORS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (90, 60, 160),
)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw loss, Dice of training and validation, that of each structure, and learning rate as a
    PNG.

    metrics: lines of JSON objects with `step` and some of `loss`, `dice`, `lr`, `seconds_a_step`,
    `validation_dice` and `validation` (structure to Dice); what is not such a line, or not a finite
    number, is left out. The picture is written whole or not at all. Raises `OSError` if the metrics
    cannot be read, `BadOutput` if it cannot be written.
    """
    rows = _rows(metrics)
    scores = [(row["step"], _mapping(row.get("validation"))) for row in rows]
    structures = list(dict.fromkeys(name for _, score in scores for name in score))
    each = {name: _curve((step, score.get(name)) for step, score in scores) for name in structures}
    loss, dice, validation, rate, pace = (
        _curve((row["step"], row.get(key)) for row in rows)
        for key in ("loss", "dice", "validation_dice", "lr", "seconds_a_step")
    )
    title = f"Loss ({pace[1][-1]:.2f} s a step)" if len(pace[1]) else "Loss"
    panels: list[tuple[str, Mapping[str, Curve], bool]] = [
        (title, {"training": loss}, False),
        ("Dice", {"training": dice, "validation": validation}, True),
        ("Learning rate", {"": rate}, False),
        ("Dice in validation", each, True),
    ]
    last = max([1, *(row["step"] for row in rows)])
    canvas = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    for n, (name, curves, is_dice) in enumerate(panels):
        part = canvas[n // 2 * _HEIGHT // 2 :, n % 2 * _WIDTH // 2 :][: _HEIGHT // 2, : _WIDTH // 2]
        _panel(part, name, curves=curves, last=last, is_dice=is_dice)
    with atomic_write(picture) as handle:
        handle.write(png_bytes(canvas))


def _rows(metrics: Path) -> list[dict[str, Any]]:
    rows = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # the last line of a run that was ended
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _curve(points: Iterable[tuple[float, object]]) -> Curve:
    finite = np.array([point for point in points if _is_number(point[1])], float).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]


def _panel(
    part: NDArray[np.uint8], title: str, curves: Mapping[str, Curve], last: float, is_dice: bool
) -> None:
    """One plot into its part of the picture: title, legend with the latest values, axes and
    curves.
    """
    write_text(part, 10, column=_LEFT, text=title, color=_INK)
    _legend(part, curves, ".3f" if is_dice else ".3g")
    plot = part[_TOP:-_BOTTOM, _LEFT:-_RIGHT]
    height, width = plot.shape[:2]
    values = np.concatenate([curve[1] for curve in curves.values()] or [np.empty(0)])
    if not len(values):
        plot[:] = 248
        write_text(plot, height // 2 - 7, column=width // 2 - 70, text="nothing yet", color=_GREY)
        return
    low, high = float(values.min()), 1.0 if is_dice else float(values.max())
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    for tick in ticks:
        row = round((high - tick) / (high - low) * (height - 1))
        plot[row] = _GRID
        text = f"{tick:.3g}"
        write_text(
            part, _TOP + row - 7, column=_LEFT - 8 - letters(text).shape[1], text=text, color=_GREY
        )
    for tick in _ticks(0, last):
        column = round(tick / last * (width - 1))
        if column < width:
            plot[:, column] = _GRID
            text = f"{tick:g}"
            at = _LEFT + column - letters(text).shape[1] // 2
            write_text(
                part,
                part.shape[0] - _BOTTOM + 8,
                column=min(at, part.shape[1] - letters(text).shape[1]),
                text=text,
                color=_GREY,
            )
    for n, curve in enumerate(curves.values()):
        if len(curve[0]):
            steps, values = (_thinned(numbers) for numbers in curve)
            _line(
                plot,
                steps / last * (width - 1),
                rows=(high - values) / (high - low) * (height - 1),
                color=_color(n),
            )


def _color(n: int) -> Color:
    return _COLORS[n] if n < len(_COLORS) else _GREY


def _legend(part: NDArray[np.uint8], curves: Mapping[str, Curve], digits: str) -> None:
    """Names in the colours of their curves with their latest values, on one line; more structures
    are counted.
    """
    column = _LEFT
    for n, (name, curve) in enumerate(curves.items()):
        text = f"{name[:16]} {curve[1][-1]:{digits}}".strip() if len(curve[1]) else name[:16]
        more = f"+{len(curves) - n}"
        width = letters(text).shape[1] + (24 + letters(more).shape[1]) * (n + 1 < len(curves))
        if n >= len(_COLORS) or column + width > part.shape[1]:
            write_text(part, 36, column=column, text=more, color=_GREY)
            return
        column = write_text(part, 36, column=column, text=text, color=_color(n)) + 24


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about five of them."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, final + 1)]


def _thinned(numbers: NDArray[np.float64], most: int = 500) -> NDArray[np.float64]:
    """At most so many numbers, means of neighbours: a plot is not wider."""
    return np.array([part.mean() for part in np.array_split(numbers, min(len(numbers), most))])


def _line(plot: NDArray[np.uint8], columns: NDArray, rows: NDArray, color: Color) -> None:
    """A line through points, two pixels wide with soft edges; few points are marked."""
    lengths = np.maximum(
        1, np.ceil(2 * np.maximum(abs(np.diff(columns)), abs(np.diff(rows))))
    ).astype(int)
    at = np.concatenate(
        [[0.0], np.repeat(np.arange(len(lengths)), lengths) + 1.0 - _countdown(lengths)]
    )
    along = np.arange(len(columns))
    x, y = np.interp(at, along, columns), np.interp(at, along, rows)
    _stamp(plot, x, y=y, radius=1.0, color=color)
    if len(columns) <= 60:
        _stamp(plot, columns, y=rows, radius=3.0, color=color)


def _countdown(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each of the parts of every length the share of it that is left: 2/3, 1/3, 0 for a length
    of 3.
    """
    total = int(lengths.sum())
    ends = np.repeat(np.cumsum(lengths), lengths)
    return (ends - 1 - np.arange(total)) / np.repeat(lengths, lengths)


def _stamp(plot: NDArray[np.uint8], x: NDArray, y: NDArray, radius: float, color: Color) -> None:
    """Discs at points into the plot, darkest where they overlap most."""
    height, width = plot.shape[:2]
    cover = np.zeros((height, width))
    reach = math.ceil(radius) + 1
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            row, column = np.round(y).astype(int) + dy, np.round(x).astype(int) + dx
            near = np.clip(radius + 0.5 - np.hypot(row - y, column - x), 0, 1)
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            np.maximum.at(cover, (row[inside], column[inside]), near[inside])
    plot[:] = np.round(plot + cover[..., None] * (np.array(color) - plot))
