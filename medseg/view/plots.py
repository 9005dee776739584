"""Plots, by matplotlib: figures that are drawn without its global state, as PNG or as SVG for a
page.

Nothing here touches `matplotlib.pyplot`, so threads can draw at the same time and a program's own
figures stay as they are. The same numbers give the same bytes: no date, no version, no random name
is in a file. matplotlib is imported when something is drawn, which takes half a second.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.view.picture import TYPEFACE, cut, drawable, png_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart also by those who see fewer.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a3ca0")
INK, GREY = "#282828", "#8c8c8c"
#: For every text of strangers: no mathematics between dollars, no TeX, whatever a user's own
#: settings of matplotlib say.
TEXT: Mapping[str, Any] = {"family": TYPEFACE, "usetex": False, "parse_math": False}
_DPI = 100
#: A colour that no plot has: a page puts the colour of its own text there, light or dark.
_PAGE_INK = "#010203"
#: Values of all structures of a plot that are drawn one by one; of more only what lies far out is.
_MOST_POINTS = 2000
_BARS = 24
#: How far a box lies below the middle of its line, where its name stands above it.
_BELOW = 0.12
#: Structures of a plot so high that its numbers stand above it, too.
_TICKS_ABOVE = 12


def new_figure(
    width: int,
    height: int,
    *,
    facecolor: str = "white",
    layout: Literal["constrained"] | None = None,
) -> Figure:
    """A figure of so many pixels. layout: "constrained" makes room for words beside axes, which
    takes longer than most plots.
    """
    return figure_class()(
        figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout=layout, facecolor=facecolor
    )


def figure_class() -> type[Figure]:
    """matplotlib's figure, imported now.

    Of a home that cannot be written, and of fonts that are looked through for the first time, its
    log says nothing to who only wants a picture.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    if "matplotlib.figure" not in sys.modules:
        logger.setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    finally:
        logger.setLevel(level)
    return Figure


def png_of(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return png_bytes(np.asarray(canvas.buffer_rgba())[..., :3])


def svg_of(figure: Figure, description: str) -> str:
    """A figure as an SVG element for a page; what it has in `_PAGE_INK` takes the page's colour.

    Letters are outlines, so that they look alike everywhere; `description` is for those who cannot
    see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    content = StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(content, metadata=metadata)
    text = content.getvalue()
    text = text[text.index("<svg") :].replace(_PAGE_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # A style would be that of the whole page, and comments hold the texts once more.
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    (box,) = re.findall(r'viewBox="([^"]*)"', text[: text.index(">")])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img"'
        f' aria-label="{escape(description)}" width="{round(figure.get_figwidth() * _DPI)}"'
        ' stroke-linejoin="round">'
    )
    content_of = text[text.index(">") + 1 :].replace("xlink:href", "href")
    content_of = re.sub(r" ?\n", " ", _with_own_names(content_of, description))
    return re.sub(r">\s+<", "><", (head + content_of).strip())


def _with_own_names(text: str, description: str) -> str:
    """The names of elements, some of which are drawn at random, as numbers; those that nothing
    refers to are left out. They begin with a number of the description, as one page holds several
    figures.
    """
    from zlib import crc32

    start = f"p{crc32(description.encode()):x}"
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([^")]+)[")]', text))
    names = {name: f"{start}-{number}" for number, name in enumerate(used)}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", text)
    return re.sub(r'(url\(|href=")#([^")]+)([")])', lambda m: f"{m[1]}#{names[m[2]]}{m[3]}", text)


def plain_axes(axes: Axes, ink: str = INK, grid: Literal["both", "x", "y"] = "both") -> None:
    """The look of all plots: a frame at the left and below, a pale grid, plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
        spine.set_alpha(0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, place: number_text(value)))
    axes.tick_params(
        labelsize=9, labelfontfamily=TYPEFACE, labelcolor=ink, color=ink, length=0, pad=4
    )
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis=grid, color=ink, alpha=0.15, linewidth=0.8, linestyle="-")


def number_text(value: float) -> str:
    """A number at an axis: 0.25, 20000, 2.5e-4, and never 0.00025 beside 5e-05."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.5e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.6g}"


def add_legend(axes: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names beside the axes, so that they never lie over what is drawn."""
    box = axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        borderaxespad=0,
        frameon=False,
        handlelength=1.6,
        prop={"family": TYPEFACE, "size": 9},
    )
    for text in box.get_texts():
        text.set(usetex=False, parse_math=False, color=INK)


# Plots of scores and volumes ----------------------------------------------------------------------


def box_plot(
    values: Mapping[str, Sequence[float]], *, title: str, most: float | None = None
) -> str:
    """Quartiles, whiskers to the last value within 1.5 interquartile ranges, and all values, per
    structure, as SVG; "" where there is no finite value.

    Names stand above their boxes, so that it is narrow enough for a phone. most: where the axis
    ends; None for the largest value.
    """
    finite = {name: _finite(some) for name, some in values.items()}
    if not any(len(some) for some in finite.values()):
        return ""
    end = most or max(float(some.max()) for some in finite.values() if len(some)) or 1.0
    count, width, line = len(finite), 350, 38
    above = 24 if count > _TICKS_ABOVE else 6
    height = line * count + 28 + above
    figure = new_figure(width, height, facecolor="none")
    axes = figure.add_axes((0.02, 28 / height, 0.96, 1 - (28 + above) / height))
    plain_axes(axes, ink=_PAGE_INK, grid="x")
    axes.spines["left"].set_visible(False)
    for number, (name, some) in enumerate(finite.items(), 1):
        place = count - number + 1
        text = cut(drawable(name, f"structure {number}"), width - 40, 11)
        axes.text(
            0, place + 0.32, text, size=8, color=_PAGE_INK, va="center", clip_on=False, **TEXT
        )
        if not len(some):
            words: dict[str, Any] = {"size": 8, "color": GREY, "va": "center", **TEXT}
            axes.text(0.01 * end, place - _BELOW, "no finite value", **words)
    _boxes(axes, list(finite.values()))
    axes.set_xlim(-0.02 * end, 1.03 * end)
    axes.set_ylim(0.4, count + 0.6)
    axes.set_yticks([])
    axes.tick_params(labeltop=count > _TICKS_ABOVE)
    return svg_of(figure, f"Box plot: {title}")


def _boxes(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """A box for each structure, from top to bottom.

    Not by `Axes.boxplot`, which reads all settings of matplotlib and so imports pyplot, which looks
    for a screen.
    """
    places = len(values) - np.arange(len(values)) - _BELOW
    places = np.array([place for place, some in zip(places, values) if len(some)])
    there = [some for some in values if len(some)]
    low, middle, high = np.array([np.percentile(some, (25, 50, 75)) for some in there]).T
    reach = 1.5 * (high - low)
    within = [
        some[(some >= first) & (some <= last)]
        for some, first, last in zip(there, low - reach, high + reach)
    ]
    least = np.array([some.min() for some in within])
    most = np.array([some.max() for some in within])
    line: dict[str, Any] = {"colors": _PAGE_INK, "linewidth": 1.2}
    axes.hlines(places, least, low, **line)
    axes.hlines(places, high, most, **line)
    for ends in (least, most):
        axes.vlines(ends, places - 0.08, places + 0.08, **line)
    axes.barh(
        places, high - low, 0.3, left=low, facecolor=COLORS[4], edgecolor=_PAGE_INK, alpha=0.75
    )
    axes.vlines(middle, places - 0.15, places + 0.15, colors=_PAGE_INK, linewidth=2.2)
    if sum(map(len, there)) > _MOST_POINTS:
        there = [
            some[(some < first) | (some > last)] for some, first, last in zip(there, least, most)
        ]
    style: dict[str, Any] = {
        "marker": "o",
        "markersize": 4,
        "markerfacecolor": COLORS[1],
        "alpha": 0.6,
    }
    rows = np.repeat(places, [len(some) for some in there])
    axes.plot(np.concatenate(there), rows, linestyle="none", markeredgecolor="none", **style)


def histogram(values: Sequence[float] | NDArray[np.float64], description: str) -> str:
    """How often values fall into each of 24 equal parts between the least and the largest, as a
    small SVG; "" where there is no finite value.
    """
    some = _finite(values)
    if not len(some):
        return ""
    low, high = float(some.min()), float(some.max())
    counts, edges = np.histogram(some, _BARS, (low, high if high > low else low + 1))
    figure = new_figure(220, 84, facecolor="none")
    axes = figure.add_axes((0.01, 0.25, 0.98, 0.73))
    plain_axes(axes, ink=_PAGE_INK, grid="y")
    axes.spines["left"].set_visible(False)
    axes.stairs(counts, edges, fill=True, color=COLORS[4], alpha=0.9)
    axes.set_yticks([])
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, float(counts.max()))
    axes.set_xticks(
        [edges[0], edges[-1]], [number_text(float(f"{edge:.3g}")) for edge in (edges[0], edges[-1])]
    )
    first, second = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    second.set_horizontalalignment("right")
    return svg_of(figure, description)


def _finite(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(values, float)
    return array[np.isfinite(array)]
