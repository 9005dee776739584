"""The command check: is a dataset fit to train on? Registered by `app`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import Json, Quiet
from medseg.cli.show import (
    bar_of_cases,
    grouped,
    print_json,
    print_line,
    print_rows,
    print_table,
    tell,
)

if TYPE_CHECKING:
    from medseg.dataset import CaseFacts, Check, Dataset, Finding

#: More label values than this are counted, not listed, in the table.
_LISTED_LABELS = 4


def check(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET",
            help=(
                "A folder (nnU-Net, Decathlon, BIDS, images/ and labels/ ...) or a list of cases"
                " (CSV, JSON)."
            ),
        ),
    ],
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix", metavar="OUT", help="Write a copy in which everything certain is corrected."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a dataset before training: files, geometry, labels, duplicates, leaks, mirrored cases,
    outliers.

    Ends with 0 if nothing must be solved before training, else with 3. The dataset itself is never
    changed.

    Example:
    medseg check dataset/ --fix corrected/
    """
    from medseg.dataset import check_dataset, read_dataset

    with bar_of_cases(quiet) as progress:
        contents = read_dataset(dataset, progress)
        result = check_dataset(contents, progress)
    corrections: list[str] | None = None
    if fix is not None:
        from medseg.dataset import write_fixed

        corrections = write_fixed(contents, result, fix)
    if as_json:
        head: dict[str, Any] = {
            "dataset": contents.name,
            "layout": contents.layout,
            "channels": list(contents.channels),
        }
        labels = {str(value): name for value, name in contents.table.names.items()}
        fixes = {} if corrections is None else {"fixed": corrections}
        print_json(head | {"labels": labels} | result.as_dict() | fixes)
    else:
        _show(contents, result)
        for text in corrections or ():
            print_line(text)
    if corrections is not None and not quiet:
        tell(f"{fix} holds a copy with {len(corrections)} corrections")
    if result.errors:
        raise typer.Exit(3)


def _show(dataset: Dataset, result: Check) -> None:
    kinds: dict[str, list[str]] = {}
    for finding in result.findings:
        kinds.setdefault(finding.case, []).append(finding.kind)
    names = [label.name for label in dataset.table.labels]
    structures = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    title = (
        f"{dataset.name}: {len(dataset.cases)} cases, {' + '.join(dataset.channels)}, {structures}"
        f" ({dataset.layout} layout)"
    )
    print_rows(title, [_row(one, kinds.get(one.case, [])) for one in result.facts])
    _list_findings(result.findings)
    warnings, fixable = (
        len(result.findings) - len(result.errors),
        sum(one.fixable for one in result.findings),
    )
    summary = f"{len(result.errors)} errors, {warnings} warnings; --fix OUT corrects {fixable}"
    print(summary if result.findings else "nothing found")


def _list_findings(findings: Sequence[Finding]) -> None:
    rows = [(one.severity, cases, one.kind, one.message) for cases, one in grouped(findings)]
    print_table("", [""] * 4, rows, unbroken=range(3))


def _row(facts: CaseFacts, kinds: list[str]) -> dict[str, Any]:
    counts = [f"{value}: {voxels}" for value, voxels in facts.voxels.items()]
    labels = ", ".join(counts) if len(counts) <= _LISTED_LABELS else f"{len(counts)} labels"
    return {
        "case": facts.case,
        "voxels": " x ".join(map(str, facts.shape)),
        "mm": " x ".join(f"{size:.3g}" for size in facts.spacing_mm),
        "axes": facts.orientation,
        "intensity (1 to 99 %)": ", ".join(
            f"{one.low:.4g} to {one.high:.4g}" for one in facts.channels
        ),
        "label voxels": labels or "none",
        "found": ", ".join(dict.fromkeys(kinds)),
    }
