"""A scan and its labels as a figure of matplotlib: three planes and a legend."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig
from medseg.labels import Label, LabelTable
from medseg.text import harmless
from medseg.view.contrast import contrast_of
from medseg.view.preview import PLANES, slices_that_matter
from medseg.volume import Volume, reorient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Structures that the legend names, the largest first.
_NAMED = 20


def draw_figure(scan: Volume, labels: Volume, table: LabelTable) -> Figure:
    """The slice that matters most of each plane, labels over the scan, in radiological convention.

    Raises `BadConfig` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadConfig(
            "a plot needs matplotlib, which is not here: pip install medseg[plot]"
        ) from None

    class Shown(Figure):
        """A figure that a notebook shows without a backend of matplotlib."""

        def _repr_png_(self) -> bytes:
            content = BytesIO()
            self.savefig(content, format="png", dpi=100)
            return content.getvalue()

    image, mask = reorient(scan, "RAS"), reorient(labels, "RAS")
    low, high = contrast_of(image.data)[:2]
    figure = Shown(figsize=(11, 4), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(PLANES))
    for one, (name, plane) in zip(axes, PLANES.items()):
        _draw_plane(one, image, mask, table=table, plane=plane, limits=(low, high))
        one.set_title(name, fontsize=10)
    _add_legend(figure, mask.data, table)
    return figure


def _draw_plane(
    axes: Any,
    image: Volume,
    mask: Volume,
    *,
    table: LabelTable,
    plane: tuple[int, int, int, str],
    limits: tuple[float, float],
) -> None:
    axis, across, up, letters = plane
    at = slices_that_matter(mask.data, axis, 1)[0]
    grey, here = (np.take(one.data, at, axis) for one in (image, mask))
    if across > up:
        grey, here = grey.T, here.T
    spacing = image.spacing_mm
    shape = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
    axes.imshow(grey.T, cmap="gray", vmin=limits[0], vmax=max(limits[1], limits[0] + 1e-6), **shape)
    axes.imshow(_colours(here.T, table), interpolation="nearest", **shape)
    axes.invert_xaxis()  # index 0 is left or posterior, which belong on the right
    axes.set_xticks([])
    axes.set_yticks([])
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(letters, places, sides):
        axes.text(x, y, letter, transform=axes.transAxes, color="#ffdc00", ha=ha, va=va, fontsize=9)


def _colours(here: NDArray[Any], table: LabelTable) -> NDArray[np.float32]:
    """(rows, columns, 4): colours half through which the scan is seen; of the background none."""
    colours = np.zeros((max([int(here.max()), *table.values]) + 1, 4), np.float32)
    for label in table.labels:
        colours[label.value] = (*(part / 255 for part in label.color), 0.5)
    return colours[here]


def _add_legend(figure: Figure, mask: NDArray[Any], table: LabelTable) -> None:
    from matplotlib.patches import Patch

    def _patch(label: Label) -> Patch:
        name = harmless(label.name).replace("$", r"\$")  # between two of them is mathematics
        return Patch(color=[part / 255 for part in label.color], label=name)

    counts = np.bincount(mask.ravel(), minlength=max(table.values, default=0) + 1)
    there = sorted(
        (one for one in table.labels if counts[one.value]), key=lambda one: -counts[one.value]
    )
    patches = [
        Patch(
            color=[part / 255 for part in one.color], label=harmless(one.name).replace("$", r"\$")
        )
        for one in there[:_NAMED]
    ]
    if len(there) > _NAMED:
        patches.append(Patch(alpha=0, label=f"and {len(there) - _NAMED} more"))
    if patches:
        figure.legend(handles=patches, loc="outside right center", fontsize=7, frameon=False)
