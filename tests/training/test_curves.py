"""The picture of a training run: the numbers it was drawn from can be found in it again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from making.configs import make_config
from medseg.config import load_config
from medseg.errors import DataWarning
from medseg.training import curves
from medseg.training.curves import curves_figure, draw_curves
from medseg.training.loop import train
from medseg.view import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_rows(folder: Path, rows: list[dict], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def figure_of(folder: Path, rows: list[dict]) -> Figure:
    return curves_figure(write_rows(folder, rows))


def legend_of(axes: Axes) -> list[str]:
    box = axes.get_legend()
    return [text.get_text() for text in box.get_texts()] if box else []


def test_a_curve_lies_where_its_values_are(tmp_path: Path):
    rows = [
        {"step": step, "loss": 2 - step / 100, "dice": step / 100, "learning_rate": 1e-3}
        for step in range(0, 101, 5)
    ]

    loss, dice, rate, _ = figure_of(tmp_path, rows).axes

    steps = np.arange(0, 101, 5)
    for axes, values in ((loss, 2 - steps / 100), (dice, steps / 100), (rate, 0 * steps + 1e-3)):
        assert np.allclose(axes.lines[0].get_xdata(), steps)
        assert np.allclose(axes.lines[0].get_ydata(), values)
        low, high = axes.get_ylim()
        assert low < values.min() and values.max() <= high
    assert dice.get_ylim()[1] == pytest.approx(1.01)


def test_the_line_is_in_the_picture_in_its_colour(tmp_path: Path):
    rows = [{"step": step, "loss": 2 - step / 100} for step in range(0, 101, 5)]

    draw_curves(write_rows(tmp_path, rows), tmp_path / "progress.png")

    picture = np.asarray(Image.open(tmp_path / "progress.png")).astype(int)
    assert picture.shape == (curves._HEIGHT, curves._WIDTH, 3)
    blue = [int(COLORS[0][place : place + 2], 16) for place in (1, 3, 5)]
    rows_of, columns = np.nonzero(np.abs(picture - blue).max(-1) < 20)
    assert len(columns) > 300
    assert np.corrcoef(rows_of, columns)[0, 1] > 0.99  # it falls from left to right


def test_what_a_run_writes_is_named_with_its_latest_values(tmp_path: Path):
    rows = [
        {"step": 100, "loss": 1.5, "dice": 0.25, "learning_rate": 2e-4, "seconds_a_step": 0.375},
        {"step": 200, "loss": 0.75, "dice": 0.5, "learning_rate": 5e-5, "seconds_a_step": 0.25},
        {
            "step": 200,
            "validation_dice": 0.625,
            "validation": {"Anterior": 0.75, "Postérieur": 0.5, "step": 0.125, "$x$": 0.1},
        },
    ]

    figure = figure_of(tmp_path, rows)

    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "Loss, now 0.75 (0.25 s a step)"
    assert titles[1:] == ["Dice", "Learning rate, now 5e-5", "Dice in validation"]
    assert legend_of(figure.axes[1]) == ["training 0.500", "validation 0.625"]
    names = ["Anterior 0.750", "Postérieur 0.500", "step 0.125", "$x$ 0.100"]
    assert legend_of(figure.axes[3]) == names
    texts = figure.axes[3].get_legend().get_texts()
    assert not any(text.get_parse_math() or text.get_usetex() for text in texts)


def test_of_many_structures_the_best_the_worst_and_the_mean_are_named(tmp_path: Path):
    names = [f"vertebra with a rather long name {n:03d}" for n in range(118)]
    rows = [
        {"step": step, "validation": {name: n / 118 for n, name in enumerate(names)}}
        for step in (1, 2)
    ]

    axes = figure_of(tmp_path, rows).axes[3]

    legend = legend_of(axes)
    assert len(legend) == 8
    ends = ["117 0.992", "116 0.983", "115 0.975", "mean 0.496", "002 0.017", "001 0.008"]
    assert [text[-len(end) :] for text, end in zip(legend, ends)] == ends
    assert legend[-1] == "and 112 between them"
    assert len({line.get_color() for line in axes.lines[112:119]}) == 7
    assert sum(len(line.get_xdata()) > 0 for line in axes.lines) == 118 + 1


def test_names_do_not_lie_over_one_another_or_over_the_curves(tmp_path: Path):
    names = ["a", "left cerebellum white matter of somebody", "肝脏"]
    rows = [{"step": step, "validation": dict.fromkeys(names, 0.1 * step)} for step in range(1, 9)]
    figure = figure_of(tmp_path, rows)
    figure.draw_without_rendering()

    axes = figure.axes[3]
    boxes = [text.get_window_extent() for text in axes.get_legend().get_texts()]
    assert all(one.y0 >= other.y1 for one, other in pairwise(boxes))
    assert all(box.x0 > axes.bbox.x1 and box.x1 < figure.bbox.x1 for box in boxes)
    assert legend_of(axes)[2] == "structure 3 0.800"  # the typeface has no such letters


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
        [{"step": 1, "loss": 10**400}, {"step": 10**400}, {"step": 2, "loss": 1e300}],
        [{"loss": 1}, {"step": None}, {"step": 5, "validation": {"": 0.5, "a\nb": 0.1}}],
        [{"step": 3, "validation": {"$\\frac{": 0.5, "\\input{/etc/passwd}": 0.1}}],
    ],
)
def test_a_picture_comes_of_whatever_there_is(tmp_path: Path, rows: list[dict]):
    metrics = write_rows(tmp_path, rows, tail='[1]\n"text"\n{"step": 3, "lo')

    draw_curves(metrics, tmp_path / "progress.png")

    assert Image.open(tmp_path / "progress.png").size == (curves._WIDTH, curves._HEIGHT)


def test_what_is_not_there_yet_is_said(tmp_path: Path):
    for axes in figure_of(tmp_path, []).axes:
        assert [text.get_text() for text in axes.texts] == ["nothing yet"]


def test_long_runs_are_thinned(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [{"step": step, "loss": 1 + rng.normal(0, 0.2)} for step in range(20_000)]

    (line,) = figure_of(tmp_path, rows).axes[0].lines

    # The mean of many numbers is drawn, not all of them.
    assert len(line.get_xdata()) == 500
    assert 0.01 < np.std(line.get_ydata()) < 0.06


def test_the_same_run_gives_the_same_file(tmp_path: Path):
    metrics = write_rows(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    for name in ("one.png", "two.png"):
        draw_curves(metrics, tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.png").read_bytes()
    assert b"tEXt" not in content and b"matplotlib" not in content


@pytest.mark.usefixtures("one_thread")
def test_a_run_logs_the_learning_rate_of_its_steps_and_outlives_its_picture(tmp_path: Path):
    config = load_config(
        make_config(tmp_path / "maps", train__steps=6, train__learning_rate=2e-4, train__decay=3)
    )
    shown = []
    with (
        mock.patch("medseg.training.step.draw_curves", side_effect=ValueError("no ink")),
        pytest.warns(DataWarning, match="not be drawn, and the run goes on: ValueError: no ink"),
    ):
        train(config, tmp_path / "run", progress=lambda share, facts: shown.append(facts))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [row["learning_rate"] for row in map(json.loads, lines) if "loss" in row]
    # Warm-up over 2 steps, then 3 of 6 steps of decay: steps 2, 4 and 6 use all, 3/3 and 1/3.
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4 / 3], rel=1e-5)
    assert [one["learning_rate"] for one in shown if "loss" in one] == rates
