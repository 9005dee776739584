"""The table and the report of a cohort, made from its records alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from medseg.cohort.output import Output, open_output
from medseg.cohort.report import write_report
from medseg.cohort.request import read_cohort
from medseg.cohort.stores import is_store
from medseg.cohort.suspicion import suspicion_of
from medseg.cohort.table import Table, read_table, write_long, write_parquet, write_wide


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What was gathered: the table, cases by status, and the files that were written."""

    table: Table
    counts: Counter[str]
    files: tuple[str, ...]


def gather_cohort(out: Path | str, *, by: str = "") -> Gathered:
    """Write `table.csv`, `table_long.csv`, with pyarrow `table.parquet`, and `report.html` with
    `pages/`.

    out: a folder, or the address of a place in a store. by: a column of the list, such as the site,
    whose values are compared apart. The same records give the same bytes. Raises `BadFile` for a
    folder that is no cohort's output, `BadConfig`, `BadOutput`.
    """
    with open_output(out) as output:
        return _gather(output, by)


def _gather(output: Output, by: str) -> Gathered:
    out = output.folder
    cohort, request = read_cohort(out, output.address if is_store(output.address) else "")
    output.bring_records(case.name for case in cohort.cases)
    records = output.names("records")
    output.bring_attempts(case.name for case in cohort.cases if f"{case.name}.json" not in records)
    places = output.places(request)
    table = read_table(cohort, request, places)
    suspicion = suspicion_of(table, by)
    more = {"suspicion": suspicion.scores.tolist(), "why": suspicion.reasons}
    write_wide(table, out / "table.csv", more)
    write_long(table, out / "table_long.csv")
    files = ["table.csv", "table_long.csv"]
    if write_parquet(table, out / "table.parquet", more):
        files.append("table.parquet")
    output.keep_report(write_report(table, suspicion, places))
    counts = Counter(table.texts["status"])
    return Gathered(table=table, counts=counts, files=(*files, "report.html"))
