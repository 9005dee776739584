"""progress.png: how a training run went, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write
from medseg.text import parse_json
from medseg.view import (
    COLORS,
    GREY,
    INK,
    TEXT,
    add_legend,
    cut,
    drawable,
    new_figure,
    number_text,
    plain_axes,
    png_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a curve: steps and values.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

_WIDTH, _HEIGHT = 1400, 840
#: Points of a curve that are drawn, and that are marked; a plot is not wider.
_POINTS, _MARKED = 500, 60
#: Structures whose curves all have a name; of more the best and the worst so many.
_NAMED, _ENDS = len(COLORS), 3
_PALE = "#c4c4c4"
_ROOM = 150  # pixels of a name in a legend
#: What no loss and no step is, and what no axis can be made of.
_ABSURD = 1e100


class _Line(NamedTuple):
    """A curve as it is drawn; without a name it is not in the legend."""

    curve: Curve
    name: str
    color: str
    width: float = 1.8
    style: str = "-"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw `curves_figure` as a PNG, written whole or not at all. Raises `OSError` if the metrics
    cannot be read, `BadOutput` if the picture cannot be written.
    """
    content = png_of(curves_figure(metrics))
    with atomic_write(picture) as handle:
        handle.write(content)


def curves_figure(metrics: Path) -> Figure:
    """Loss, Dice of training and validation, learning rate, and Dice of each structure.

    metrics: lines of JSON objects with `step` and some of `loss`, `dice`, `learning_rate`,
    `seconds_a_step`, `validation_dice` and `validation` (structure to Dice); what is not such a
    line, or not a finite number, is left out. Raises `OSError` if it cannot be read.
    """
    rows = _rows(metrics)
    scores = [(row["step"], _mapping(row.get("validation"))) for row in rows]
    structures = list(dict.fromkeys(name for _, score in scores for name in score))
    each = {name: _curve((step, score.get(name)) for step, score in scores) for name in structures}
    loss, dice, validation, rate, pace = (
        _curve((row["step"], row.get(key)) for row in rows)
        for key in ("loss", "dice", "validation_dice", "learning_rate", "seconds_a_step")
    )
    figure = new_figure(_WIDTH, _HEIGHT, layout="constrained")
    panels = figure.subplots(2, 2)
    last = max([1, *(row["step"] for row in rows)])
    speed = f" ({pace[1][-1]:.2f} s a step)" if len(pace[1]) else ""
    title = f"Loss{_now(loss)}{speed}"
    _panel(panels[0, 0], title, [_Line(loss, "", COLORS[0])], last=last)
    both = [_Line(dice, "training", COLORS[0]), _Line(validation, "validation", COLORS[1])]
    _panel(panels[0, 1], "Dice", both, last=last, is_dice=True)
    _panel(panels[1, 0], f"Learning rate{_now(rate)}", [_Line(rate, "", COLORS[2])], last=last)
    lines = _lines_of_structures(each)
    _panel(panels[1, 1], "Dice in validation", lines, last=last, is_dice=True)
    return figure


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _ABSURD and not math.isnan(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _curve(points: Iterable[tuple[float, object]]) -> Curve:
    finite = np.array([point for point in points if _is_number(point[1])], float).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]


def _now(curve: Curve) -> str:
    return f", now {number_text(float(f'{curve[1][-1]:.3g}'))}" if len(curve[1]) else ""


def _lines_of_structures(each: Mapping[str, Curve]) -> list[_Line]:
    """A line of each structure; of many the mean, and the best and worst now, have a name."""
    curves = {
        drawable(name, f"structure {number}"): curve
        for number, (name, curve) in enumerate(each.items(), 1)
        if len(curve[0])
    }
    if len(curves) <= _NAMED:
        return [_Line(curve, name, color) for (name, curve), color in zip(curves.items(), COLORS)]
    order = sorted(curves, key=lambda name: (-curves[name][1][-1], name))
    best, worst = order[:_ENDS], order[-_ENDS:]
    lines = [_Line(curves[name], "", _PALE, width=0.6) for name in order[_ENDS:-_ENDS]]
    lines += [
        _Line(curves[name], name, color)
        for name, color in zip(best, (COLORS[2], COLORS[4], COLORS[0]))
    ]
    lines.append(_Line(_mean(list(curves.values())), "mean", INK, width=2.6))
    lines += [
        _Line(curves[name], name, color, style="--")
        for name, color in zip(worst, (COLORS[5], COLORS[3], COLORS[1]))
    ]
    others = len(order) - 2 * _ENDS
    nothing = (np.empty(0), np.empty(0))
    return [*lines, _Line(nothing, f"and {others} between them", _PALE, width=0.6)]


def _mean(curves: list[Curve]) -> Curve:
    """The mean of curves at every step at which there is one."""
    steps, place = np.unique(np.concatenate([steps for steps, _ in curves]), return_inverse=True)
    values = np.concatenate([values for _, values in curves])
    return steps, np.bincount(place, values) / np.bincount(place)


def _panel(
    axes: Axes, title: str, lines: list[_Line], *, last: float, is_dice: bool = False
) -> None:
    """One plot: title, axes, curves, and beside it their names with the latest values."""
    plain_axes(axes)
    axes.set_title(title, loc="left", size=11, color=INK, **TEXT)
    axes.set_xlim(0, last)
    axes.set_xlabel("step", size=9, color=INK, **TEXT)
    if not any(len(line.curve[0]) for line in lines):
        axes.set_yticks([])
        style: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "nothing yet", size=11, color=GREY, **style, **TEXT)
        return
    handles = []
    for line in lines:
        steps, values = (_thinned(numbers) for numbers in line.curve)
        marker = "o" if len(steps) <= _MARKED and line.width > 1 else "none"
        handles += axes.plot(
            steps,
            values,
            color=line.color,
            linewidth=line.width,
            linestyle=line.style,
            marker=marker,
            markersize=3.5,
        )
    if is_dice:
        axes.set_ylim(top=1.01)
    legend = [(handle, _entry(line)) for handle, line in zip(handles, lines) if line.name]
    if legend:
        add_legend(axes, *zip(*legend))


def _entry(line: _Line) -> str:
    """What the legend says of a curve: its name and its latest value."""
    name = cut(line.name, _ROOM)
    return f"{name} {line.curve[1][-1]:.3f}" if len(line.curve[1]) else name


def _thinned(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most so many numbers, means of neighbours."""
    parts = np.array_split(numbers, min(len(numbers), _POINTS)) if len(numbers) else []
    return np.array([part.mean() for part in parts])
