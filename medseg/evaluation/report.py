"""One HTML page of an evaluation: tables, box plots and pictures of the worst cases, in a file that
needs nothing else.

Plots are SVG and pictures are PNG inside it. A few lines of script sort and search its tables; no
network, which the page itself forbids. Nothing in it names a file or a folder.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from html import escape as escape_html
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.evaluation.metrics import main_columns, metric_of, title_of
from medseg.evaluation.pictures import COLORS, LINES, ErrorPicture, error_pictures
from medseg.evaluation.provenance import maker_of, origins, software
from medseg.evaluation.summary import score_columns
from medseg.text import counted, harmless, reason_of
from medseg.view import PAGE_STYLE, TABLE_SCRIPT, box_plot

if TYPE_CHECKING:
    from medseg.evaluation.reading import LabelReader
    from medseg.evaluation.summary import Evaluation, EvaluationOptions

Rows = Sequence[Mapping[str, Any]]
#: Rows of the table of all scores, which a browser has to hold; scores.csv has all.
_MOST_ROWS = 5000


def report_html(
    result: Evaluation,
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    reader: LabelReader,
    scans: Mapping[str, Path] | None = None,
) -> str:
    """The page as text.

    pairs: files of the scored cases, of which the worst are read again for the pictures. scans:
    those of the cases, to be shown under the errors. What cannot be drawn is said in its place.
    """
    columns = main_columns(score_columns(result.rows))
    problems: list[str] = []
    worst = _drawn(
        lambda: _worst(result.rows, pairs, options, reader, scans=scans or {}, problems=problems)
    )
    cases = result.summary["cases"]
    missing = [
        (len(cases["without_prediction"]), "no prediction"),
        (len(cases["without_reference"]), "no reference"),
    ]
    scored = len(cases["scored"])
    lead = (
        f"{counted(scored, 'case')} {'was' if scored == 1 else 'were'} scored;"
        f" {', '.join(f'{count} have {what}' for count, what in missing)},"
        f" {len(cases['failed'])} could not be scored."
    )
    notes = [*result.problems, *problems]
    parts = [
        f'<p class="lead">{lead}</p>',
        f"<h2>To know</h2><ul>{''.join(f'<li>{escape(one)}</li>' for one in notes)}</ul>"
        if notes
        else "",
        "<h2>Scores</h2>" + _means(result.summary["structures"], columns, options),
        _plots(result.rows, columns, options),
        worst,
        "<h2>Cases</h2>" + _cases(result.rows, columns),
        _all_scores(result.rows, columns),
        "<h2>Provenance</h2>" + _provenance(result, pairs, options, scans or {}),
    ]
    return _page("Evaluation", "".join(parts))


def escape(text: object) -> str:
    """Text for HTML, in an element or between quotes."""
    return escape_html(harmless(text))


def _page(title: str, content: str) -> str:
    inside = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy = f"default-src 'none'; img-src data:; {inside}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>medseg {title.lower()}</title><style>{PAGE_STYLE}</style>"
        f"<main><h1>{title}</h1>{content}</main><script>{TABLE_SCRIPT}</script></html>\n"
    )


def _drawn(draw: Callable[[], str]) -> str:
    """What is drawn, or why it cannot be: scores must not be lost with a picture."""
    try:
        return draw()
    except Exception as error:  # whatever the plotting library says
        reason = reason_of(error)
        return f'<p class="note">A picture could not be drawn: {escape(reason)}</p>'


# Tables -------------------------------------------------------------------------------------------


def _means(
    structures: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    options: EvaluationOptions,
) -> str:
    """A row of each structure with the means of the main scores; below it, closed, all statistics
    of all scores.
    """
    rows = []
    for structure, scores in structures.items():
        cells = [_interval(scores.get(name)) for name in columns]
        there = [scores[name] for name in columns if name in scores]
        left_out = max((one["n_excluded"] + one["n_inf"] for one in there), default=0)
        rows.append([_text(structure), *cells, _cell(sum(scores["status"].values()))])
        rows[-1].append(_cell(left_out))
    head = ["structure", *(_title(name, options) for name in columns), "cases", "left out"]
    note = (
        '<p class="note">Means over cases, with 95 % intervals from resampling the cases. Left out'
        " are cases in which a score is not defined or infinite.</p>"
    )
    return _table(head, rows) + note + _statistics(structures, options)


def _statistics(structures: Mapping[str, Mapping[str, Any]], options: EvaluationOptions) -> str:
    head = (
        "structure", "score", "mean", "95 % interval", "standard deviation", "median", "quartiles",
        "cases", "undefined", "infinite",
    )  # fmt: skip
    rows = []
    for structure, scores in structures.items():
        for name, one in scores.items():
            if name == "status":
                continue
            ends, quartiles = one["ci95"], (one["q1"], one["q3"])
            rows.append([
                _text(structure), _text(_title(name, options)), _cell(one["mean"]),
                _cell(" to ".join(map(_number, ends)) if ends else ""), _cell(one["sd"]),
                _cell(one["median"]),
                _cell("" if one["q1"] is None else " to ".join(map(_number, quartiles))),
                _cell(one["n"]), _cell(one["n_excluded"]), _cell(one["n_inf"]),
            ])  # fmt: skip
    return f"<details><summary>All statistics</summary>{_table(head, rows)}</details>"


def _cases(rows: Rows, columns: Sequence[str]) -> str:
    """A row of each case, the worst first: means over its structures, and the structure of least
    Dice.
    """
    lines: list[tuple[float, list[str]]] = []
    for case, some in groupby(rows, key=lambda row: row["case"]):
        mine = list(some)
        means = [_mean([row.get(name, math.nan) for row in mine]) for name in columns]
        finite = [row for row in mine if math.isfinite(row["dice"])]
        worst = min(
            finite, key=lambda row: row["dice"], default={"structure": "", "dice": math.nan}
        )
        alone = sum(row["status"] in ("reference_empty", "prediction_empty") for row in mine)
        cells = [*map(_cell, means), _cell(worst["dice"]), _text(worst["structure"]), _cell(alone)]
        mean_dice = _mean([row["dice"] for row in mine])
        lines.append((_or_last(mean_dice), [_text(case), *cells]))
    lines.sort(key=lambda line: line[0])
    means_head = [f"mean {title_of(name)}" for name in columns]
    head = ["case", *means_head, "least Dice", "of structure", "in one map only"]
    note = (
        '<p class="note">A mean is over the structures for which the score is a finite number. In'
        " one map only: structures that the reference has and the result lacks, or the other way."
        " Press a heading to sort.</p>"
    )
    return _table(head, [cells for _, cells in lines], sortable=True) + note


def _or_last(value: float) -> float:
    """A score to sort by; undefined ones come last."""
    return math.inf if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value != "" and math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _all_scores(rows: Rows, columns: Sequence[str]) -> str:
    """Every case and structure, the least Dice first, to be searched and sorted."""
    order = sorted(rows, key=lambda row: _or_last(row["dice"]))
    lines = []
    for row in order[:_MOST_ROWS]:
        texts = (row["case"], row["structure"], _STATUS.get(row["status"], row["status"]))
        scores = (row.get(name, "") for name in columns)
        lines.append([*map(_text, texts), *map(_cell, scores)])
    head = ["case", "structure", "is in", *(title_of(name) for name in columns)]
    more = f" The worst {_MOST_ROWS} are here." if len(order) > _MOST_ROWS else ""
    note = f'<p class="note">scores.csv has all {len(order)} rows, and more scores.{more}</p>'
    search = '<p><input type="search" placeholder="case or structure" aria-label="search"></p>'
    table = _table(head, lines, sortable=True)
    return (
        f"<details><summary>Scores of every case and structure</summary>{search}{table}{note}"
        "</details>"
    )


#: What a structure scores that one map or both lack.
_EMPTY = {
    "nan": "of both maps: not defined; of one: 0, and an infinite distance",
    "best_worst": "of both maps: perfect; of one: 0, and an infinite distance",
    "diagonal": "of both maps: perfect; of one: 0, and the diagonal of the scan as distance",
}
#: Which map has a structure, in words.
_STATUS = {
    "ok": "both",
    "both_empty": "neither",
    "reference_empty": "the result only",
    "prediction_empty": "the reference only",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, sortable: bool = False) -> str:
    """A table of cells that are HTML already, in a box of its own that scrolls."""
    if not rows:
        return '<p class="note">No label map holds a structure.</p>'
    kinds = [' class="t"' if cell.startswith('<td class="t"') else "" for cell in rows[0]]
    titles = "".join(
        f'<th scope="col"{kind}><button>{escape(title)}</button></th>'
        if sortable
        else f'<th scope="col"{kind}>{escape(title)}</th>'
        for title, kind in zip(head, kinds)
    )
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _text(text: object) -> str:
    return f'<td class="t">{escape(text)}</td>'


def _cell(value: Any) -> str:
    """A number, which sorts by what it is and not by how it is written."""
    if isinstance(value, int | float):
        return f'<td data-v="{value:.9g}">{escape(_number(value))}</td>'
    return f"<td>{escape(_number(value))}</td>"


def _interval(one: Mapping[str, Any] | None) -> str:
    if one is None or one["mean"] is None:
        return "<td>–</td>"
    ends = one["ci95"]
    interval = f" <small>{_number(ends[0])} to {_number(ends[1])}</small>" if ends else ""
    return f'<td data-v="{one["mean"]:.9g}">{_number(one["mean"])}{interval}</td>'


def _number(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _title(name: str, options: EvaluationOptions) -> str:
    """What people read of a score; of the surface Dice with its tolerance."""
    if name == "surface_dice" and not isinstance(options.tolerance_mm, Mapping):
        return f"{title_of(name)} at {options.tolerance_mm:g} mm"
    return title_of(name)


# Pictures -----------------------------------------------------------------------------------------


def _plots(rows: Rows, columns: Sequence[str], options: EvaluationOptions) -> str:
    plots = [_drawn(partial(_box_plot, rows, name, options)) for name in columns]
    shown = "".join(plot for plot in plots if plot)
    note = (
        '<p class="note">Boxes are quartiles with the median, whiskers reach the last value within'
        " 1.5 interquartile ranges, and dots are cases.</p>"
    )
    return f'<div class="plots">{shown}</div>{note}' if shown else ""


def _box_plot(rows: Rows, name: str, options: EvaluationOptions) -> str:
    """A column of scores of each structure; "" where nothing can be drawn."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.get(name, "") != "":  # not asked for, as lesions of most structures
            values.setdefault(row["structure"], []).append(row[name])
    metric = metric_of(name)
    title = _title(name, options)
    plot = box_plot(values, title=title, most=metric.most if metric else None)
    if not plot:
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption><div>{plot}</div></figure>"


def _worst(
    rows: Rows,
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    reader: LabelReader,
    *,
    scans: Mapping[str, Path],
    problems: list[str],
) -> str:
    """Pictures of the cases of least mean Dice, through the structure of least Dice of each."""
    pictures = list(
        error_pictures(rows, pairs, options, reader=reader, scans=scans, problems=problems)
    )
    if not pictures:
        return ""
    parts = ["<h2>Worst cases</h2>", _key(pictures)]
    for (case, structure), some in groupby(pictures, key=lambda one: (one.case, one.structure)):
        mine = list(some)
        figures = "".join(map(_figure, mine))
        title = f"{escape(case)}: {escape(structure)}, Dice {_number(mine[0].dice)}"
        parts.append(f'<h3>{title}</h3><div class="worst">{figures}</div>')
    return "".join(parts)


def _key(pictures: Sequence[ErrorPicture]) -> str:
    kinds = []
    if any(one.has_scan for one in pictures):
        names = {"reference": "outline of the reference", "prediction": "outline of the result"}
        kinds += [(LINES[kind], name) for kind, name in names.items()]
    if not all(one.has_scan for one in pictures):
        names = {
            "both": "both", "reference": "reference only", "prediction": "result only",
            "other": "other structure",
        }  # fmt: skip
        kinds += [(COLORS[kind], name) for kind, name in names.items()]
    fields = "".join(
        f'<span><i style="background:rgb{color}"></i>{name}</span>' for color, name in kinds
    )
    return f'<p class="key">{fields}</p>'


def _figure(one: ErrorPicture) -> str:
    alt = f"{one.case}: {one.structure}, Dice {_number(one.dice)}, {one.plane} slice at {one.at}"
    source = base64.b64encode(one.png).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{one.plane}, {one.at}</figcaption></figure>"
    )


# Provenance ---------------------------------------------------------------------------------------


def _provenance(
    result: Evaluation,
    pairs: Mapping[str, tuple[Path, Path]],
    options: EvaluationOptions,
    scans: Mapping[str, Path],
) -> str:
    """What made the scores, when, and of which files, by their hashes; no name of a file."""
    hashes = origins(pairs, scans)
    makers = Counter(maker_of(pair[1], hashes[case][1]) for case, pair in pairs.items())
    facts = [
        ("Scored", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {software()}"),
        *(("Results", f"{words} ({counted(count, 'case')})") for words, count in makers.items()),
        *_how(result.summary["options"], options),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    head = ["case", "reference", "result", *(["scan"] if scans else [])]
    lines = [
        [
            _text(case),
            *(f'<td class="t"><code title="{one}">{one[:16]}</code></td>' for one in some),
        ]
        for case, some in hashes.items()
    ]
    whole = hashlib.sha256("".join(one for some in hashes.values() for one in some).encode())
    return (
        f"<dl>{rows}<dt>Files</dt><dd>SHA-256 of the hashes below, one after the other:"
        f" <code>{whole.hexdigest()}</code></dd></dl>"
        f"<details><summary>SHA-256 of every file</summary>{_table(head, lines)}</details>"
    )


def _how(settings: Mapping[str, Any], options: EvaluationOptions) -> list[tuple[str, str]]:
    """How was scored, in words."""
    tolerance = options.tolerance_mm
    tolerances = (
        ", ".join(f"{name or 'others'} {one:g} mm" for name, one in tolerance.items())
        if isinstance(tolerance, Mapping)
        else f"{tolerance:g} mm"
    )
    facts = [
        ("Surfaces", f"made of {options.surface}s; tolerance of the surface Dice: {tolerances}"),
        ("Empty masks", _EMPTY[options.empty]),
        ("Intervals", f"{options.bootstrap} resamplings of the cases, from seed {options.seed}"),
    ]
    if options.ignore is not None:
        facts.append(("Not scored", f"where the reference is {options.ignore}"))
    if options.resample:
        facts.append(("Other grids", "results were resampled to the nearest voxel"))
    if options.lesions:
        facts.append(("Lesions", f"of {', '.join(options.lesions)}: {settings['lesion_options']}"))
    if settings.get("volume") is not None:
        facts.append(("Volume", f"number {settings['volume']} of each file"))
    return facts
