"""`medseg gather` and `medseg volumes`: parse, call, show."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import Json, Quiet, Table, parse_place
from medseg.cli.show import bar_of_cases, explain, print_json, print_line, print_rows, tell
from medseg.errors import BadConfig, MedsegError
from medseg.text import to_cell

if TYPE_CHECKING:
    from medseg.config import BrainSpec


def gather(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="What `medseg batch` wrote to.")],
    by: Annotated[
        str,
        typer.Option(metavar="COLUMN", help="Compare cases within each value, such as of site."),
    ] = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the table and the report of a cohort, from its records alone.

    table.csv has a row for every case of the list, table_long.csv one for each structure, and with
    pyarrow table.parquet is the same as table.csv. report.html shows the most suspicious cases
    first.

    Example:
    medseg gather results/ --by site
    """
    from medseg.cohort import gather_cohort

    summary = gather_cohort(parse_place(folder), by=by)
    counts = dict(sorted(summary.counts.items()))
    if as_json:
        print_json({"cases": len(summary.table), "counts": counts, "files": list(summary.files)})
        return
    tally = ", ".join(f"{count} {status}" for status, count in counts.items())
    print_line(f"{len(summary.table)} cases: {tally}")
    tell(f"{', '.join(summary.files)} are in {folder}", quiet)


def volumes(
    labels: Annotated[
        list[Path], typer.Argument(metavar="LABELS...", help="Label maps, and folders of them.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CSV", help="Write a table here.")
    ] = None,
    scan: Annotated[
        list[Path] | None,
        typer.Option(metavar="SCAN", help="Its scan, for intensities; once for each label map."),
    ] = None,
    table: Table = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Whose labels they are: names, and totals of a brain.",
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="A row for each structure, not for each label map.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure label maps that exist: volume of each structure, intensity in a scan, totals of a
    brain.

    Example:
    medseg volumes labels/ -o volumes.csv
    """
    from medseg.cohort import list_label_maps, long_rows, measure_all, wide_rows
    from medseg.labels import LabelTable

    label_table = LabelTable.read(table) if table else None
    brain = None
    if model:
        own, brain = _of_model(model)
        label_table = label_table or own
    paths = list_label_maps(labels)
    records: list[dict[str, Any]] = []
    code = 0
    with bar_of_cases(quiet) as progress:
        for path, outcome in measure_all(paths, scan or (), label_table, brain=brain):
            progress(path.name, len(records), len(paths))
            if isinstance(outcome, MedsegError):
                text, exit_code = explain(outcome)
                tell(text)
                code = code or exit_code
            else:
                records.append(outcome)
    rows = long_rows(records) if long else wide_rows(records)
    if output:
        _write_csv(output, rows)
        tell(f"{output}: {len(records)} label maps", quiet)
    elif as_json:
        print_json(records)
    else:
        print_rows("", long_rows(records))
    if code:
        raise typer.Exit(code)


def _of_model(name: str) -> tuple[Any, BrainSpec | None]:
    """The label table of a model, and which labels are brain, if it says so."""
    from medseg.inference import brain_of, label_table, load_model

    model = load_model(name)
    return label_table(model), brain_of(model)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from medseg.files import atomic_write

    if path.suffix.lower() not in (".csv", ".tsv"):
        raise BadConfig(f"{path}: the table is written as .csv or .tsv; end its name so")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(to_cell(column) for column in columns)
    writer.writerows([to_cell(row.get(column, "")) for column in columns] for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
