"""What is shown: tables and JSON on stdout; bars, lines and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import DataWarning, MedsegError, NotEnoughMemory
from medseg.progress import Progress, silent
from medseg.text import harmless

if TYPE_CHECKING:
    from rich.text import Text

    from medseg.dataset import Finding


def print_table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str | Text, ...]],
    right: tuple[int, ...] = (),
) -> None:
    """A table on stdout under a title, `right` its columns that are aligned right; text is made
    harmless.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(harmless(cell)) for cell in row))
    console = Console(soft_wrap=False)
    console.print(Text(harmless(title), style="bold"), soft_wrap=True)
    console.print(table)


def tell(text: object, quiet: bool = False) -> None:
    """A line on stderr, made harmless, unless quiet."""
    if not quiet:
        # In one piece, for threads warn at the same time: `print` writes the end of its line by
        # itself.
        sys.stderr.write(f"{harmless(text)}\n")
        sys.stderr.flush()


def print_line(text: object) -> None:
    """A line on stdout, made harmless."""
    print(harmless(text))


#: What is called with a line about a scan, and what with how far it is.
ScanProgress = tuple[Callable[[str], None], Progress]


@contextmanager
def bar_of_scan(quiet: bool, scan: Path | str) -> Iterator[ScanProgress]:
    """Lines and a bar on stderr for one scan; nothing at all when quiet."""
    if quiet:
        yield (lambda text: None), silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress as RichProgress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
    )
    console = Console(stderr=True)
    shown = console.is_terminal
    with RichProgress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    ) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total if total > 1 else None)

        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        yield (lambda text: say(harmless(f"{scan}: {text}"))), progress


@contextmanager
def json_progress(scan: Path | str) -> Iterator[ScanProgress]:
    """What happens to one scan as lines of JSON on stderr, for programs; the same whole per cent is
    not said twice.
    """
    import json

    said: list[tuple[str, int]] = []

    def say(**event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)

    def progress(what: str, done: int, total: int) -> None:
        now = (what, 100 * done // max(total, 1))
        if said[-1:] != [now]:
            said.append(now)
            say(event="progress", what=what, done=done, total=total)

    yield (lambda text: say(event="announcement", scan=str(scan), text=text)), progress


def show_warning(
    message: Warning | str, category: type[Warning], *rest: object, **named: object
) -> None:
    """Our own warnings as one line; those of libraries are for developers and stay out of a user's
    way.
    """
    if issubclass(category, DataWarning):
        tell(f"warning: {message}")


def explain(error: Exception) -> tuple[str, int]:
    """What is printed of an error, and the exit code it ends in.

    Of an error in medseg itself that is where it is: what it says may quote a header, and so a
    patient.
    """
    if isinstance(error, MedsegError):
        return harmless(f"medseg: {error}"), error.exit_code
    if isinstance(error, MemoryError):
        text = "medseg: there is not enough memory for this; close other programs or crop the scan"
        return text, NotEnoughMemory.exit_code
    from traceback import extract_tb

    frames = [
        f"  {'/'.join(Path(f.filename).parts[-2:])}, line {f.lineno}"
        for f in extract_tb(error.__traceback__)
    ]
    head = (
        f"medseg: stopped by an error of its own ({type(error).__name__}); please report it with"
        " these lines:"
    )
    return "\n".join([head, *frames]), MedsegError.exit_code


#: Of cases with one finding so many are named.
_NAMED_CASES = 1


def grouped(findings: Sequence[Finding]) -> list[tuple[str, Finding]]:
    """(cases, finding) for each line: equal findings of several cases, but for their names and
    files, are one line.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        message = finding.message.replace(finding.case, "*") if finding.case else finding.message
        groups.setdefault((finding.severity, finding.kind, message), []).append(finding)
    lines = []
    for (_, _, message), alike in groups.items():
        names = list(dict.fromkeys(finding.case for finding in alike if finding.case))
        more = f" and {len(names) - _NAMED_CASES} more" if len(names) > _NAMED_CASES else ""
        cases = ", ".join(names[:_NAMED_CASES]) + more if names else "all"
        lines.append((cases, alike[0] if len(names) < 2 else replace(alike[0], message=message)))
    return lines


def print_json(value: Any) -> None:
    """On stdout, for machines."""
    import json

    print(json.dumps(value))


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table on stdout, its columns the keys of the rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(value: Any) -> Text:
        if isinstance(value, list):
            return Text(" to ".join(f"{one:.4g}" for one in value))
        return Text(
            "" if value is None else f"{value:.4g}" if isinstance(value, float) else harmless(value)
        )

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(
            Text(harmless(column)),
            overflow="fold",
            justify="left" if column == columns[0] else "right",
        )
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console = Console()
    if title:
        console.print(Text(harmless(title), style="bold"))
    console.print(table)


@contextmanager
def bar(quiet: bool) -> Iterator[Progress]:
    """A progress bar over cases on stderr."""
    if quiet:
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress as RichProgress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    with RichProgress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda case, done, total: bar.update(
            task, completed=done, total=total, description=harmless(case)
        )
