"""What is shown: tables and JSON on stdout; bars, lines and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from medseg.cli.help import is_colored
from medseg.errors import DataWarning, MedsegError, NotEnoughMemory
from medseg.logs import Progress, silent
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
    stream = sys.stderr if on_stderr else sys.stdout
    console = Console(stderr=on_stderr, color_system="auto" if is_colored(stream) else None)
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

    column_of = {
        "what": TextColumn("{task.fields[what]:<12}", markup=False),
        "bar": BarColumn(),
        "share": TextColumn("{task.percentage:3.0f}%"),
        "count": MofNCompleteColumn(),
        "left": TimeRemainingColumn(),
        "text": TextColumn("{task.fields[text]}", markup=False),
    }
    console = Console(stderr=True)
    columns = [column_of[part] for part in parts]
    is_hidden = not console.is_terminal
    with RichProgress(*columns, console=console, transient=True, disable=is_hidden) as bar:
        yield _Bar(bar, bar.add_task("", total=None, what="", text=""))


@contextmanager
def bar_of_scan(quiet: bool, scan: Path | str, course: str = "") -> Iterator[ScanProgress]:
    """Lines and a bar on stderr for one scan; nothing at all when quiet. course: where it stands
    among several, after the bar.
    """
    if quiet:
        yield (lambda text: None), silent
        return
    with _bar_of("what", "bar", "share", "left", "text") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.update(what, done, total if total > 1 else None, text=course)

        progress("starting", 0, 0)
        yield (lambda text: bar.say(f"{scan}: {text}")), progress


class Course:
    """How far a list of things to do is: n of N, and the time left as it went so far.

    What is done before the first is not counted, so that starting up is not.
    """

    def __init__(self, total: int, clock: Callable[[], float] = monotonic) -> None:
        self.total, self.done = total, 0
        self._clock, self._since = clock, clock()
        self._first = 0

    def at(self, done: int) -> None:
        """So many are done now."""
        if done and not self._first:
            self._first, self._since = done, self._clock()
        self.done = done

    @property
    def left(self) -> str:
        """The time left, in words; '' where nothing is known of it."""
        measured = self.done - self._first
        if not self.total - self.done or not measured:
            return ""
        return time_left((self._clock() - self._since) / measured * (self.total - self.done))

    def words(self, noun: str) -> str:
        """Such as '3 of 12 scans, about 4 min left'."""
        return f"{self.done} of {self.total} {noun}" + (f", {self.left}" if self.left else "")


def time_left(seconds: float) -> str:
    """A time to wait in words."""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


#: Lines about how far it is, where nobody looks at a bar.
_LINES = 10
#: Where a command is short, nobody waits for lines.
_BETWEEN_LINES_S = 10.0


def lines_of_cases(clock: Callable[[], float], between_s: float = 0) -> Progress:
    """A line on stderr for every tenth that is done, `between_s` after the one before."""
    state = {"said": 0.0, "at": clock()}
    course: list[Course] = []

    def progress(what: str, done: int, total: int) -> None:
        if not course or course[0].total != total:
            course[:] = [Course(total, clock)]
        course[0].at(done)
        step = done * _LINES // max(total, 1)
        if step > state["said"] and done < total and clock() - state["at"] >= between_s:
            state["said"], state["at"] = step, clock()
            words = [f"{done} of {total} cases", what, course[0].left]
            tell(", ".join(word for word in words if word))

    return progress


@contextmanager
def bar_of_cases(quiet: bool) -> Iterator[Progress]:
    """A bar over cases on stderr, with the name of the one that was done last; lines, where it is
    no terminal.
    """
    if quiet:
        yield silent
        return
    if not sys.stderr.isatty():
        yield lines_of_cases(monotonic, _BETWEEN_LINES_S)
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
    steps: list[tuple[str, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        now = (what, 100 * done // max(total, 1))
        if steps[-1:] != [now]:
            steps.append(now)
            tell_event(event="progress", what=what, done=done, total=total)

    yield (lambda text: tell_event(event="announcement", scan=str(scan), text=text)), progress


def tell_event(**event: Any) -> None:
    """What happens as a line of JSON on stderr, for programs."""
    import json

    print(json.dumps(event), file=sys.stderr, flush=True)


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
