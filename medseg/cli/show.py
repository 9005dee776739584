"""What is shown: tables and JSON on stdout; bars, lines and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import DataWarning, MedsegError, NotEnoughMemory
from medseg.progress import Progress, silent
from medseg.text import harmless

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress, TaskID
    from rich.text import Text

    from medseg.dataset import Finding


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    right: Collection[int] = (),
    *,
    unbroken: Collection[int] = (),
    on_stderr: bool = False,
) -> None:
    """A table on stdout, or stderr, under a title; text is made harmless.

    right: which columns are aligned right; unbroken: which of them are never wrapped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(
            Text(harmless(name)),
            justify="right" if number in right else "left",
            overflow="fold",
            no_wrap=number in unbroken,
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(harmless(cell)) for cell in row))
    console = Console(stderr=on_stderr)
    if title:
        console.print(Text(harmless(title), style="bold"), soft_wrap=True)
    console.print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on stdout, its columns the keys of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    print_table(title, columns, cells, right=range(1, len(columns)))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{one:.4g}" for one in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


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


class _Bar:
    """A bar on stderr, where that is a terminal, and lines above it."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, what: str, done: float, total: float | None, text: str = "") -> None:
        """What is done, how much of how much, and a text after the bar."""
        self._bar.update(
            self._task, completed=done, total=total, what=harmless(what), text=harmless(text)
        )

    def say(self, text: str) -> None:
        """A line, also where there is no terminal."""
        self._bar.console.print(harmless(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bar_of(*parts: str) -> Iterator[_Bar]:
    """A bar with these parts around it, from left to right."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress as RichProgress,
        TextColumn,
        TimeRemainingColumn,
    )

    known = {
        "what": TextColumn("{task.fields[what]:<12}", markup=False),
        "bar": BarColumn(),
        "share": TextColumn("{task.percentage:3.0f}%"),
        "count": MofNCompleteColumn(),
        "left": TimeRemainingColumn(),
        "text": TextColumn("{task.fields[text]}", markup=False),
    }
    console = Console(stderr=True)
    columns = [known[part] for part in parts]
    is_hidden = not console.is_terminal
    with RichProgress(*columns, console=console, transient=True, disable=is_hidden) as bar:
        yield _Bar(bar, bar.add_task("", total=None, what="", text=""))


@contextmanager
def bar_of_scan(quiet: bool, scan: Path | str) -> Iterator[ScanProgress]:
    """Lines and a bar on stderr for one scan; nothing at all when quiet."""
    if quiet:
        yield (lambda text: None), silent
        return
    with _bar_of("what", "bar", "share", "left") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.update(what, done, total if total > 1 else None)

        progress("starting", 0, 0)
        yield (lambda text: bar.say(f"{scan}: {text}")), progress


@contextmanager
def bar_of_cases(quiet: bool) -> Iterator[Progress]:
    """A bar over cases on stderr, with the name of the one that was done last."""
    if quiet:
        yield silent
        return
    with _bar_of("bar", "count", "left", "text") as bar:
        yield lambda case, done, total: bar.update("", done, total, text=case)


@contextmanager
def bar_of_stages(quiet: bool) -> Iterator[Callable[[str, float, str], None]]:
    """A bar on stderr; called with what is done, the share that is done, and a text."""
    if quiet:
        yield lambda what, share, text: None
        return
    with _bar_of("what", "bar", "share", "text") as bar:
        yield lambda what, share, text: bar.update(what, share, 1.0, text=text)


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
