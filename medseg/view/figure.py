"""A scan and its labels as a figure of matplotlib: three planes and a legend."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.labels import LabelTable
from medseg.view.contrast import contrast_of
from medseg.view.picture import TYPEFACE, YELLOW, largest, name_in_picture
from medseg.view.plots import TEXT, figure_class, png_of
from medseg.view.preview import PLANES, slices_that_matter
from medseg.volume import Volume, plane_of, reorient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Structures that the legend names, the largest first.
_NAMED = 20


def draw_figure(scan: Volume, labels: Volume, table: LabelTable) -> Figure:
    """The slice that matters most of each plane, labels over the scan, in radiological
    convention.
    """
    image, mask = reorient(scan, "RAS"), reorient(labels, "RAS")
    low, high = contrast_of(image.data)[:2]
    figure = _shown()(figsize=(11, 4), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(PLANES))
    for one, (name, plane) in zip(axes, PLANES.items()):
        _draw_plane(one, image, mask, table=table, plane=plane, limits=(low, high))
        one.set_title(name, size=10, **TEXT)
    _add_legend(figure, mask.data, table)
    return figure


@cache
def _shown() -> type[Figure]:
    class Shown(figure_class()):  # type: ignore[misc]
        """A figure that a notebook shows without a backend of matplotlib."""

        def _repr_png_(self) -> bytes:
            return png_of(self)

    return Shown


def _draw_plane(
    axes: Any,
    image: Volume,
    mask: Volume,
    *,
    table: LabelTable,
    plane: tuple[int, int, int, str],
    limits: tuple[float, float],
) -> None:
    from matplotlib.patheffects import withStroke

    axis, across, up, letters = plane
    at = slices_that_matter(mask.data, axis, 1)[0]
    grey, here = (plane_of(one.data, axis, at) for one in (image, mask))
    if across > up:
        grey, here = grey.T, here.T
    spacing = image.spacing_mm
    shape = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
    high = max(limits[1], limits[0] + 1e-6)
    axes.imshow(
        grey.T, cmap="gray", vmin=limits[0], vmax=high, interpolation="antialiased", **shape
    )
    axes.imshow(_colours(here.T, table), interpolation="nearest", **shape)
    axes.invert_xaxis()  # index 0 is left or posterior, which belong on the right
    axes.set_xticks([])
    axes.set_yticks([])
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(letters, places, sides):
        place = {"transform": axes.transAxes, "ha": ha, "va": va}
        word = axes.text(x, y, letter, color=_share_of(YELLOW), size=10, **place, **TEXT)
        word.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _colours(here: NDArray[Any], table: LabelTable) -> NDArray[np.float32]:
    """(rows, columns, 4): colours half through which the scan is seen; of the background none."""
    colours = np.zeros((max([int(here.max()), *table.values]) + 1, 4), np.float32)
    for label in table.labels:
        colours[label.value] = (*_share_of(label.color), 0.5)
    return colours[here]


def _add_legend(figure: Figure, mask: NDArray[Any], table: LabelTable) -> None:
    from matplotlib.patches import Patch

    labels, more = largest(mask, table, _NAMED)
    patches = [
        Patch(color=_share_of(label.color), label=name_in_picture(label)) for label in labels
    ]
    if more:
        patches.append(Patch(alpha=0, label=f"and {more} more"))
    if patches:
        box = figure.legend(
            handles=patches,
            loc="outside right center",
            frameon=False,
            prop={"family": TYPEFACE, "size": 7},
        )
        for text in box.get_texts():
            text.set(usetex=False, parse_math=False)


def _share_of(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """A colour as matplotlib takes it."""
    red, green, blue = (part / 255 for part in color)
    return red, green, blue
