"""One HTML page of an evaluation: tables, box plots and pictures of the worst cases, in a file that
needs nothing else.

Plots are SVG and pictures are PNG inside it; no script, no network.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape as escape_html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.metrics import plotted_columns
from medseg.text import harmless
from medseg.view import box_plot, png_bytes
from medseg.volume import reorient

if TYPE_CHECKING:
    from medseg.evaluation.reading import LabelReader
    from medseg.evaluation.summary import Evaluation, EvaluationOptions

#: Cases that get pictures.
WORST_CASES = 3
#: Colours that the colour-blind can tell apart: agreement, reference only, prediction only, other
#: structures.
COLORS = {
    "both": (200, 200, 200),
    "reference": (0, 114, 178),
    "prediction": (230, 119, 0),
    "other": (62, 62, 62),
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}th{position:sticky;top:0;background:#fff}
.wide{overflow-x:auto}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;vertical-align:top}
figcaption{font-size:13px;max-width:22rem}
img{image-rendering:pixelated;background:#000}
.key span{padding:.1rem .5rem;margin-right:.5rem;color:#fff}
"""


def report_html(
    result: Evaluation,
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    reader: LabelReader,
) -> str:
    """The page as text. `pairs`: files of the scored cases, of which the worst are read again for
    the pictures.
    """
    cases = result.summary["cases"]
    parts = [
        f"<p>{len(cases['scored'])} cases were scored; {len(cases['without_prediction'])} have no"
        f" prediction, {len(cases['without_reference'])} have no reference, {len(cases['failed'])}"
        " could not be scored.</p>"
    ]
    if result.problems:
        parts.append(
            "<h2>To know</h2><ul>"
            + "".join(f"<li>{escape(p)}</li>" for p in result.problems)
            + "</ul>"
        )
    parts.append("<h2>Scores</h2>" + _summary_table(result.summary["structures"]))
    for name in plotted_columns():
        plot = _box_plot(result.rows, name)
        if plot:
            parts.append(f"<h2>{escape(name)}</h2>{plot}")
    parts.append(_worst(result.rows, pairs, options, reader=reader))
    parts.append("<h2>All cases</h2>" + _case_table(result.rows))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>medseg evaluation</title>'
        f"<style>{_STYLE}</style><h1>Evaluation</h1>{''.join(parts)}</html>\n"
    )


def escape(text: object) -> str:
    """Text for HTML, in an element or between quotes."""
    return escape_html(harmless(text))


def _summary_table(structures: Mapping[str, Mapping[str, Any]]) -> str:
    head = (
        "structure",
        "score",
        "mean",
        "95 % interval",
        "sd",
        "median",
        "quartiles",
        "n",
        "excluded",
        "infinite",
    )
    rows = []
    for structure, scores in structures.items():
        for name, one in scores.items():
            if name == "status" or name.startswith("volume_"):
                continue
            ends = one["ci95"]
            rows.append(
                (
                    structure,
                    name,
                    _number(one["mean"]),
                    f"{_number(ends[0])} to {_number(ends[1])}" if ends else "",
                    _number(one["sd"]),
                    _number(one["median"]),
                    "" if one["q1"] is None else f"{_number(one['q1'])} to {_number(one['q3'])}",
                    one["n"],
                    one["n_excluded"],
                    one["n_inf"],
                )
            )
    return _table(head, rows)


def _case_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        name
        for name in ("case", "structure", "status", *plotted_columns())
        if any(name in row for row in rows)
    ]
    return _table(columns, [[_number(row.get(column, "")) for column in columns] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _box_plot(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A column of scores of each structure, as SVG; "" where nothing can be drawn."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["structure"], []).append(row.get(name, math.nan))
    plot = box_plot(values, title=name, most=None if name.endswith("_mm") else 1.0)
    return f'<div class="wide">{plot}</div>' if plot else ""


def _worst(
    rows: Sequence[Mapping[str, Any]],
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    reader: LabelReader,
) -> str:
    """Pictures of the cases of least mean Dice, through the structure of least Dice of each."""
    from medseg.evaluation.pairs import on_grid_of

    means: dict[str, float] = {}
    for case in pairs:
        dice = [row["dice"] for row in rows if row["case"] == case and math.isfinite(row["dice"])]
        if dice:
            means[case] = float(np.mean(dice))
    figures = []
    for case in sorted(means, key=lambda case: (means[case], case))[:WORST_CASES]:
        mine = [row for row in rows if row["case"] == case and math.isfinite(row["dice"])]
        row = min(mine, key=lambda row: row["dice"])
        structure = row["structure"]
        labels = (options.structures or {}).get(structure) or (int(structure.split()[1]),)
        reference = reader.read(pairs[case][0])
        prediction, _ = on_grid_of(reference, reader.read(pairs[case][1]), options.resample)
        # As radiologists look at a patient: from the feet, the left side on the right, the front
        # up.
        reference, prediction = reorient(reference, "LAS"), reorient(prediction, "LAS")
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            picture, place = _overlay(
                reference.data, prediction.data, labels, axis=axis, spacing_mm=reference.spacing_mm
            )
            at_mm = float((reference.affine @ [*(place * (a == axis) for a in range(3)), 1])[axis])
            source = base64.b64encode(png_bytes(picture)).decode()
            direction = "RAS"[axis]
            caption = (
                f"{case}: {structure}, Dice {_number(row['dice'])}, {plane} slice at {direction}"
                f" {at_mm:.1f} mm"
            )
            figures.append(
                f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{source}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    names = {
        "both": "both",
        "reference": "reference only",
        "prediction": "prediction only",
        "other": "other structure",
    }
    key = "".join(
        f'<span style="background:rgb{COLORS[k]}">{text}</span>' for k, text in names.items()
    )
    return f'<h2>Worst cases</h2><p class="key">{key}</p>{"".join(figures)}' if figures else ""


def _overlay(
    reference: NDArray,
    prediction: NDArray,
    labels: Sequence[int],
    axis: int,
    spacing_mm: Sequence[float],
) -> tuple[NDArray[np.uint8], int]:
    """The slice across `axis` where masks differ most, as (height, width, 3), and its index."""
    ours, theirs = np.isin(reference, labels), np.isin(prediction, labels)
    others = tuple(a for a in range(3) if a != axis)
    differing = (ours != theirs).sum(axis=others)
    place = int(np.argmax(differing if differing.any() else ours.sum(axis=others)))
    a, b, rest = (np.take(one, place, axis) for one in (ours, theirs, reference))
    picture = np.zeros((*a.shape, 3), np.uint8)
    picture[(rest != 0)] = COLORS["other"]
    picture[a & b], picture[a & ~b], picture[b & ~a] = (
        COLORS["both"],
        COLORS["reference"],
        COLORS["prediction"],
    )
    # Pixels are repeated so that a mm is as long both ways; the second axis goes up.
    size = [spacing_mm[one] * n for one, n in zip(others, a.shape)]
    pixels = [max(1, round(300 * s / max(size))) for s in size]
    rows, columns = ((np.arange(p) * n) // p for p, n in zip(pixels, a.shape))
    return picture[rows][:, columns].swapaxes(0, 1)[::-1], place
