"""Looking at scans from Python: a page, a scene for 3D Slicer, or a picture."""

from __future__ import annotations

import os
from pathlib import Path

from medseg.api.scoring import label_map, table_of
from medseg.errors import BadConfig, BadOutput
from medseg.evaluation import find_table
from medseg.inference import Segmentation
from medseg.io import ScanLike, as_path, as_volume, is_path
from medseg.labels import LabelTable
from medseg.volume import Volume

_SUFFIXES = (".html", ".mrb", ".png")


def view(
    scan: ScanLike | Segmentation,
    labels: ScanLike | Segmentation | None = None,
    output: str | os.PathLike[str] = "medseg_view.html",
    *,
    table: LabelTable | str | os.PathLike[str] | None = None,
    title: str = "",
    open_page: bool = False,
) -> Path:
    """Write a scan with its labels over it, as `medseg view` does, and return the file: a page
    `.html` that needs no network, a scene of 3D Slicer `.mrb`, or a picture `.png`.

    scan: any form of a scan; or a result of `segment`, which has both. labels: any form of a label
    map. table: what its values mean; else what lies beside it. title: what the page is called; it
    names nobody. open_page: show the page in the browser. The page holds the scan, so treat it like
    the scan itself. Raises `BadConfig`, `BadFile`, `BadOutput`.
    """
    place = as_path(output, "output")
    suffix = place.suffix.lower()
    if suffix not in _SUFFIXES:
        raise BadOutput(f"{place}: give a name that ends in .html, .mrb (3D Slicer) or .png")
    if open_page and suffix != ".html":
        raise BadConfig("open_page shows a page in the browser; give a name that ends in .html")
    shown = scan if labels is None and isinstance(scan, Segmentation) else labels
    if shown is None:
        raise BadConfig("give the labels too: medseg.view(scan, labels), or what segment returned")
    names = _table(table, shown)
    picture = scan.scan if isinstance(scan, Segmentation) else as_volume(scan)
    if picture is None:
        raise BadConfig("this result does not hold its scan; give both: medseg.view(scan, result)")
    _write(place, picture, label_map(shown), table=names, title=title)
    if open_page:
        import webbrowser

        webbrowser.open(place.resolve().as_uri())
    return place


def _table(table: LabelTable | str | os.PathLike[str] | None, labels: object) -> LabelTable | None:
    if table is not None:
        return table_of(table)
    if isinstance(labels, Segmentation):
        return labels.table
    return find_table(None, Path(labels), Path(labels)) if is_path(labels) else None


def _write(
    path: Path, scan: Volume, labels: Volume, *, table: LabelTable | None, title: str
) -> None:
    from medseg.view import full_table, labels_on_scan, write_preview, write_scene

    suffix = path.suffix.lower()
    if suffix == ".html":
        from medseg.view import prepare, write_page

        write_page(path, prepare(scan, labels, table, title=title))
    elif suffix == ".mrb":
        write_scene(path, scan, labels, table=full_table(labels, table), title=title)
    else:
        on_grid = labels_on_scan(labels, scan)
        write_preview(path, scan, on_grid, table=full_table(labels, table))
