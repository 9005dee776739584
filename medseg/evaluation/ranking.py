"""A comparison of methods as a picture: their ranks, and how far these can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medseg.evaluation.metrics import title_of
from medseg.files import atomic_write
from medseg.view import COLORS, INK, TEXT, cut, drawable, new_figure, plain_axes, png_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medseg.evaluation.comparison import Comparison

_WIDTH, _LINE, _AROUND = 900, 44, 110  # pixels
_NAMES = 240


def write_ranking(path: str | Path, result: Comparison) -> None:
    """Write `ranking_figure` as a PNG, whole or not at all. Raises `BadOutput`."""
    content = png_of(ranking_figure(result))
    with atomic_write(path) as handle:
        handle.write(content)


def ranking_figure(result: Comparison) -> Figure:
    """The rank of each method, the best above, with its 95 % interval; beside it the mean and how
    often it leads when cases are drawn again.
    """
    count = len(result.methods)
    height = _LINE * count + _AROUND
    figure = new_figure(_WIDTH, height)
    axes = figure.add_axes(
        (_NAMES / _WIDTH, 56 / height, 1 - (_NAMES + 220) / _WIDTH, _LINE * count / height)
    )
    plain_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    for place, one in enumerate(result.methods):
        low, high = one["rank_ci95"] or (one["rank"], one["rank"])
        axes.plot([low, high], [place, place], color=COLORS[4], linewidth=6, solid_capstyle="butt")
        axes.plot([one["rank"]], [place], marker="o", markersize=9, color=COLORS[0])
        words = [] if one["mean"] is None else [f"mean {one['mean']:.4g}"]
        if one["share_first"] is not None:
            words.append(f"first in {100 * one['share_first']:.0f} %")
        name = cut(drawable(str(one["method"]), f"method {place + 1}"), _NAMES - 40)
        for at, text, side in ((-0.02, name, "right"), (1.02, ", ".join(words), "left")):
            axes.text(
                at,
                place,
                text,
                transform=axes.get_yaxis_transform(),
                ha=side,
                va="center",
                size=10,
                color=INK,
                **TEXT,
            )
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0.8, count + 0.2)
    axes.set_xticks(range(1, count + 1) if count <= 20 else axes.get_xticks())
    axes.set_xlabel("rank, with its 95 % interval", size=9, color=INK, **TEXT)
    title = f"{title_of(result.score)}, {result.n_cases} cases"
    axes.set_title(title, loc="left", size=12, color=INK, **TEXT)
    return figure
