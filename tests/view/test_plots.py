"""Plots for pages: what is drawn is where the numbers are, without a trace of global state."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from medseg.view.plots import COLORS, box_plot, histogram, number_text

SVG = "{http://www.w3.org/2000/svg}"


def paths_of(svg: str, color: str) -> list[np.ndarray]:
    """The points of every path that is filled with a colour."""
    shapes = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: {color}" in path.get("style", ""):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))
            shapes.append(np.array(numbers, float).reshape(-1, 2))
    return shapes


def test_a_box_spans_the_quartiles_on_the_axis():
    values = {"all": [0.0, 1.0], "some": [0.2, 0.3, 0.5, 0.6, 0.9]}
    svg = box_plot(values, title="Dice", most=1.0)
    whole, part = paths_of(svg, COLORS[4])
    # Quartiles of 0 and 1 are 0.25 and 0.75: they give the scale.
    scale = np.ptp(whole[:, 0]) / 0.5
    zero = whole[:, 0].min() - 0.25 * scale
    edges = (part[:, 0].min() - zero) / scale, (part[:, 0].max() - zero) / scale
    assert edges == pytest.approx((0.3, 0.6), abs=1e-4)
    assert part[:, 1].mean() > whole[:, 1].mean()  # below the first


def test_undefined_and_infinite_scores_are_left_out_and_named():
    nothing, endless = float("nan"), float("inf")
    assert box_plot({"a": [nothing], "b": [endless]}, title="Dice") == ""
    assert box_plot({}, title="Dice") == ""
    assert histogram([nothing, endless], "volumes") == ""
    svg = box_plot({"a": [nothing], "b": [0.5, endless]}, title="Dice")
    assert len(paths_of(svg, COLORS[4])) == 1


def test_svg_is_whole_quiet_and_takes_the_colour_of_its_page():
    names = {"<b>&": [0.1, 0.2], "${x}$": [0.3], "a" * 200: [0.4], "肝脏": [0.5]}
    svg = box_plot(names, title='"><script>', most=1.0)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'Box plot: "><script>'
    assert "currentColor" in svg and "#010203" not in svg
    assert "<script" not in svg and "http://" not in svg.replace("http://www.w3.org/", "")
    identities = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(identities) == len(set(identities))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    assert used == set(identities)
    assert not used & set(re.findall(r'id="([^"]+)"', box_plot(names, title="Other")))


def test_the_same_numbers_give_the_same_picture_on_every_thread():
    values = {name: np.random.default_rng(0).random(20) for name in "abcd"}
    with ThreadPoolExecutor(4) as pool:
        pictures = set(pool.map(lambda _: box_plot(values, title="Dice", most=1.0), range(8)))
        bars = set(pool.map(lambda _: histogram(values["a"], "a"), range(8)))
    assert len(pictures) == len(bars) == 1


def test_many_values_are_drawn_by_those_far_out():
    values = {f"structure {n}": np.random.default_rng(n).random(200) for n in range(15)}
    values["structure 0"] = np.append(values["structure 0"] / 10 + 0.9, 0.1)
    svg = box_plot(values, title="Dice", most=1.0)
    assert svg.count("<use") < 1000  # letters
    assert len(paths_of(svg, COLORS[4])) == 15
    assert len(svg) < 150_000


def test_a_histogram_has_a_bar_for_each_part():
    svg = histogram([0.0] * 3 + [24.0], "volumes")
    (outline,) = paths_of(svg, COLORS[4])
    heights = np.unique(outline[:, 1].round(2))
    assert len(heights) == 3  # three, one and none
    assert (heights[2] - heights[1]) / (heights[2] - heights[0]) == pytest.approx(1 / 3, rel=1e-2)
    assert histogram([5.0], "one value")


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.25, "0.25"), (20000, "20000"), (2.5e-4, "2.5e-4"), (1e-5, "1e-5"),
     (3e7, "3e7"), (-0.5, "-0.5"), (-2e-7, "-2e-7")],
)  # fmt: skip
def test_numbers_at_axes_are_short(value: float, text: str):
    assert number_text(value) == text


def test_drawing_leaves_no_trace_and_is_silent_in_a_home_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "home").write_text("")
    program = (
        "import os, sys\n"
        "for name in ('MPLCONFIGDIR', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME'):\n"
        "    os.environ.pop(name, 0)\n"
        f"os.environ['HOME'] = os.environ['USERPROFILE'] = {str(tmp_path / 'home')!r}\n"
        "from medseg.view import box_plot\n"
        "assert box_plot({'a': [1.0, 2.0]}, title='x')\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
        "from matplotlib import rcParams, rcParamsDefault\n"
        "names = sorted(rcParamsDefault.keys() - {'backend'})\n"
        "print([name for name in names if rcParams[name] != rcParamsDefault[name]])"
    )
    ran = tiny.run_child("-c", program)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.split("\n")[:2] == ["False", "[]"]
