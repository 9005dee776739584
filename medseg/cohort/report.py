"""The report of a cohort: a page of numbers and a list to search, and pages of 50 cases with their
pictures.

The most suspicious come first. Pictures were made by the workers; no scan is opened here. Nothing
is fetched from anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort.places import Places
from medseg.cohort.suspicion import Suspicion
from medseg.cohort.table import Table
from medseg.files import atomic_write, output_errors
from medseg.text import harmless, reason_of
from medseg.view import PAGE_STYLE, histogram

#: Cases on a page.
PER_PAGE = 50
#: Structures whose volumes are drawn.
_PLOTS = 60
_STYLE = """
td,th{text-align:left}td{white-space:normal}#found td:last-child{min-width:16rem}
.mix{border-left:4px solid #e69f00;background:var(--raised);padding:.5rem 1rem;
overflow-wrap:anywhere}.bad{color:#d55e00}
section{border-top:1px solid var(--line);padding:.6rem 0;overflow-wrap:anywhere}
section img{margin:.4rem 0;display:inline-block}code{background:var(--raised);padding:.1rem .3rem}
a{color:var(--accent)}nav a{margin-right:.8rem}
.plots figcaption{font-weight:400;font-size:12px}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr))}
select{font:inherit;padding:.35rem .6rem;border:1px solid var(--line);border-radius:6px;
background:var(--ground);color:var(--ink)}
"""
#: Searches the list of all cases, which stands in the page: [name, status, score, why, page, row].
_SCRIPT = """
const by=id=>document.getElementById(id),rows=JSON.parse(by('rows').textContent);
function cell(line,child){const td=document.createElement('td');td.append(child);line.append(td)}
function show(){
  const word=by('word').value.toLowerCase(),kind=by('kind').value;
  const fits=rows.filter(r=>(!kind||r[1]===kind)&&(r[0]+' '+r[3]).toLowerCase().includes(word));
  by('found').textContent='';
  for(const r of fits.slice(0,200)){
    const line=document.createElement('tr'),a=document.createElement('a');
    a.textContent=r[0];a.href='pages/'+r[4]+'.html#c'+r[5];
    cell(line,a);for(const text of r.slice(1,4))cell(line,text);by('found').append(line)}
  by('count').textContent=fits.length+' of '+rows.length+' cases'+
    (fits.length>200?', the first 200 are shown':'')}
by('word').oninput=by('kind').onchange=show;show();
"""
_PLAIN_ADDRESS = re.compile(r"[A-Za-z0-9/._~-]*")
#: Columns that should be the same for all cases, and what they are called.
_ALIKE = {
    "model": "model",
    "model_sha256": "weights, by SHA-256",
    "settings_sha256": "settings, by SHA-256",
    "precision": "precision",
    "backend": "backend",
    "device": "device",
    "medseg": "version of medseg",
    "torch": "version of PyTorch",
}


def write_report(table: Table, suspicion: Suspicion, places: Places) -> int:
    """Write `report.html` and `pages/`; returns how many pages. Raises `BadOutput`."""
    order = _order(table, suspicion)
    pages = [order[at : at + PER_PAGE] for at in range(0, len(order), PER_PAGE)]
    with output_errors(places.out / "pages"):
        (places.out / "pages").mkdir(parents=True, exist_ok=True)
    maker = _Pages(table=table, suspicion=suspicion, places=places, viewers=places.viewers())
    for number, rows in enumerate(pages, 1):
        text = maker.page(rows, number, len(pages))
        _write(places.out / "pages" / f"{number}.html", text)
    number = len(pages) + 1
    while (old := places.out / "pages" / f"{number}.html").exists():  # of a longer list
        old.unlink()
        number += 1
    _write(places.out / "report.html", _index(table, suspicion, order))
    return len(pages)


def _order(table: Table, suspicion: Suspicion) -> list[int]:
    """The rows with the most suspicious first, then what is not done, then what waits."""
    statuses = table.texts["status"]
    rank = {"done": 0, "skipped": 0, "waiting": 2}
    rows = range(len(table))
    return sorted(rows, key=lambda n: (rank.get(statuses[n], 1), -suspicion.scores[n], n))


# The first page ----------------------------------------------------------------------------------


def _index(table: Table, suspicion: Suspicion, order: Sequence[int]) -> str:
    statuses = Counter(table.texts["status"])
    parts = [_mixes(table), "<h2>Cases</h2>", _counts(("status", "cases"), statuses)]
    kinds = Counter(
        (status, kind, error)
        for status, kind, error in zip(
            table.texts["status"], table.texts["error_kind"], table.texts["error"]
        )
        if error
    )
    if kinds:
        rows = [(*key, count) for key, count in kinds.most_common(40)]
        parts += ["<h2>What went wrong</h2>", _table(("status", "kind", "error", "cases"), rows)]
    parts += [
        _times(table),
        _search(table, suspicion, order, statuses=sorted(statuses)),
        _volumes(table),
    ]
    return _html(f"Cohort of {len(table)} cases", "".join(parts))


def _mixes(table: Table) -> str:
    """What differs between cases that were computed: precisions, devices, versions."""
    differences = []
    rows = [n for n, status in enumerate(table.texts["status"]) if status in ("done", "skipped")]
    for column, title in _ALIKE.items():
        kinds = Counter(table.texts[column][n] for n in rows)
        if len(kinds) > 1:
            names = ", ".join(f"{kind[:40]} ({count})" for kind, count in kinds.most_common(4))
            differences.append(f"{title}: {names}")
    if not differences:
        return ""
    items = "".join(f"<li>{_escape(one)}</li>" for one in differences)
    return f'<div class="mix"><b>Not all cases were computed alike:</b><ul>{items}</ul></div>'


def _times(table: Table) -> str:
    """Seconds of a case by what they went to, and memory."""
    rows = []
    for name in table.numbers:
        some = table.numbers[name][np.isfinite(table.numbers[name])]
        if name.endswith("_s") and some.size:
            low, middle, high = np.percentile(some, (5, 50, 95))
            rows.append((name.removesuffix("_s"), f"{middle:.3g}", f"{low:.3g} to {high:.3g}"))
    peak = table.numbers["peak_memory_bytes"]
    if np.isfinite(peak).any():
        rows.append(("largest memory, GB", f"{np.nanmax(peak) / 1e9:.2f}", ""))
    head = ("seconds of a case", "median", "5 to 95 % of cases")
    return "<h2>Time and memory</h2>" + _table(head, rows) if rows else ""


def _search(
    table: Table, suspicion: Suspicion, order: Sequence[int], statuses: Sequence[str]
) -> str:
    """Every case, most suspicious first, to be searched by name, reason and status."""
    rows = []
    for place, row in enumerate(order):
        why = suspicion.reasons[row] or table.texts["error"][row]
        score = float(suspicion.scores[row])
        name, status = table.cases[row].name, table.texts["status"][row]
        rows.append([name, status, score, why, place // PER_PAGE + 1, row])
    data = json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")
    options = "".join(f"<option>{_escape(one)}</option>" for one in statuses)
    pages = -(-len(order) // PER_PAGE)
    heads = "".join(f"<th>{name}</th>" for name in ("case", "status", "suspicion", "why"))
    return (
        "<h2>Most suspicious first</h2><p>Suspicion is for sorting, and no verdict."
        f' <a href="pages/1.html">{pages} pages with pictures</a></p>'
        '<p><input id="word" placeholder="name or reason"> <select id="kind">'
        f'<option value="">any status</option>{options}</select> <span id="count"></span></p>'
        f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        '<tbody id="found"></tbody></table></div>'
        f'<script type="application/json" id="rows">{data}</script><script>{_SCRIPT}</script>'
    )


def _volumes(table: Table) -> str:
    """How the volume of each structure is distributed."""
    plots = []
    for value in table.values[:_PLOTS]:
        ml = table.structures["ml", value]
        some = ml[np.isfinite(ml)]
        if some.size:
            caption = f"{table.names[value]}: median {np.median(some):.3g} mL"
            words = f"<figcaption>{_escape(caption)}</figcaption>"
            plots.append(f"<figure>{_drawn(some, caption)}{words}</figure>")
    return f'<h2>Volumes</h2><div class="plots">{"".join(plots)}</div>' if plots else ""


def _drawn(numbers: NDArray[np.float64], caption: str) -> str:
    """A plot, or "" where it cannot be drawn: a report must not be lost with it."""
    try:
        return histogram(numbers, caption)
    except Exception as error:  # whatever the plotting library says
        reason = reason_of(error)
        return f"<p>It could not be drawn: {_escape(reason)}</p>"


# Pages of cases ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Pages:
    """What the pages of cases are made of. viewers: names of cases that have a viewer page."""

    table: Table
    suspicion: Suspicion
    places: Places
    viewers: frozenset[str]

    def page(self, rows: Sequence[int], number: int, count: int) -> str:
        """The page of a number, of so many."""
        links = ['<a href="../report.html">all</a>']
        for text, other in (("before", number - 1), ("after", number + 1)):
            if 1 <= other <= count:
                links.append(f'<a href="{other}.html">{text}</a>')
        navigation = f"<nav>{' '.join(links)} page {number} of {count}</nav>"
        cases = "".join(self._case(row) for row in rows)
        return _html(f"Cases, page {number} of {count}", f"{navigation}{cases}{navigation}")

    def _case(self, row: int) -> str:
        case, texts = self.table.cases[row], self.table.texts
        name, reason, error = _escape(case.name), self.suspicion.reasons[row], texts["error"][row]
        score = f"suspicion {self.suspicion.scores[row]:.1f}"
        parts = [f'<section id="c{row}"><b>{name}</b> {_escape(texts["status"][row])}, {score}']
        parts.append(f"<br>{_escape(reason)}" if reason else "")
        parts.append(f'<br><span class="bad">{_escape(error)}</span>' if error else "")
        if labels := texts["labels"][row]:
            out, picture = self.places.out, self.places.picture_below(case.name)
            if self.places.has(f"{out}/{picture}"):
                address = _address(picture)
                image = f'<img loading="lazy" src="../{address}" alt="{name} with its labels">'
                parts.append(f"<br>{image}")
            if case.name in self.viewers:
                page = _address(f"{case.name}.html")
                parts.append(f'<br><a href="viewer/{page}">open in the viewer</a>')
            elif case.images and "://" not in case.images[0] and self.places.names is None:
                command = f"medseg view '{case.images[0]}' '{out}/{labels}'"
                parts.append(f"<br>to look at it: <code>{_escape(command)}</code>")
        return "".join(parts) + "</section>"


def _counts(head: Sequence[str], counts: Mapping[str, int]) -> str:
    return _table(head, sorted(counts.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    titles = "".join(f"<th>{_escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>{lines}</table></div>'


def _td(value: Any) -> str:
    return f'<td class="n">{value}</td>' if isinstance(value, int) else f"<td>{_escape(value)}</td>"


def _address(path: str) -> str:
    """A path below as an address: what is not plain in percent (RFC 3986)."""
    if _PLAIN_ADDRESS.fullmatch(path):
        return path
    plain = re.compile(rb"[A-Za-z0-9/._~-]")
    letters = (bytes([one]) for one in os.fsencode(path))
    return "".join(one.decode() if plain.match(one) else f"%{one[0]:02X}" for one in letters)


def _escape(text: object) -> str:
    return escape_html(harmless(text))


def _html(title: str, content: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{PAGE_STYLE}{_STYLE}</style>"
        f"<main><h1>{_escape(title)}</h1>{content}</main></html>\n"
    )


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
