"""What medseg tells while it works: how far it is, to who called; and what it does, to Python's
`logging` under the name `medseg`, where nobody hears who does not listen.

A line never holds the name of a file or what a header says, so that logs may go where patients may
not. As long as nobody has imported `logging` nobody can listen, and nothing is imported for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg.errors import BadOutput
from medseg.text import harmless

if TYPE_CHECKING:
    import logging

#: Called with what is being done (a step, or the name of a case), how much of it is done, and how
#: much there is.
Progress: TypeAlias = Callable[[str, int, int], None]
#: Called by a training run with the share of it that is done, and with the facts of the newest
#: step.
Report: TypeAlias = Callable[[float, Mapping[str, Any]], None]
#: The logger above all of medseg's.
NAME = "medseg"
#: What `listening` takes for `verbose`, and from which level on it tells.
LEVELS = {1: "INFO", 2: "DEBUG"}
#: Endings of files that lines may be added to whatever they hold.
_LOGS = ("", ".log", ".txt", ".out", ".err")
_TERMINAL = "%(asctime)s %(name)s: %(message)s"
_FILE = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


def debug(module: str, message: str, *values: object) -> None:
    """What only who looks for a fault wants to know. module: `__name__`; message with values as for
    `logging.Logger.debug`.
    """
    _tell(10, module, message, values)


def info(module: str, message: str, *values: object) -> None:
    """What is done, a line for each step of a run; arguments as for `debug`."""
    _tell(20, module, message, values)


def warning(module: str, message: str, *values: object) -> None:
    """What the reader of a result should know; arguments as for `debug`."""
    _tell(30, module, message, values)


def _tell(level: int, module: str, message: str, values: tuple[object, ...]) -> None:
    logging = sys.modules.get("logging")
    if logging is not None:
        _logger()
        logging.getLogger(module).log(level, message, *values)


def _logger() -> logging.Logger:
    """The logger `medseg`; with a handler that does nothing, or Python would print its warnings."""
    import logging

    top = logging.getLogger(NAME)
    if not top.handlers:
        top.addHandler(logging.NullHandler())
    return top


@contextmanager
def listening(*, verbose: int = 0, file: str | Path | None = None) -> Iterator[None]:
    """While the block runs, tell what medseg does: on stderr and in a file.

    verbose: 0 nothing on stderr, 1 each step, 2 all. file: gets all, added to what it holds. Raises
    `BadOutput` if it cannot be written, or holds something else.
    """
    if not verbose and file is None:
        yield
        return
    import logging

    top, handlers = _logger(), list[logging.Handler]()
    before = top.level
    if verbose:
        level = LEVELS[min(verbose, max(LEVELS))]
        handlers.append(_handler(logging.StreamHandler(), level, _TERMINAL, "%H:%M:%S"))
    if file is not None:
        try:
            _check_log(Path(file))
            log = logging.FileHandler(file, encoding="utf-8")
        except OSError as error:
            raise BadOutput(
                f"{file}: cannot be written: {error.strerror}; choose another file for the log"
            ) from None
        handlers.append(_handler(log, "DEBUG", _FILE, "%Y-%m-%dT%H:%M:%S%z"))
    with ExitStack() as ending:
        ending.callback(top.setLevel, before)
        for handler in handlers:
            top.addHandler(handler)
            ending.callback(handler.close)
            ending.callback(top.removeHandler, handler)
        top.setLevel(min(handler.level for handler in handlers))
        yield


def _check_log(path: Path) -> None:
    """Raise `BadOutput` for a file that is there and no log: lines behind a scan damage it."""
    if not path.is_file() or path.suffix.lower() in _LOGS:
        return
    with path.open("rb") as file:
        start = file.read(20)
    if start and not re.match(rb"\d{4}-\d\d-\d\dT\d\d:", start):
        raise BadOutput(
            f"{path} is there and is no log of medseg; choose another file for the log, such as one"
            " that ends in .log"
        )


def _handler(handler: logging.Handler, level: str, line: str, date_format: str) -> logging.Handler:
    """The handler, which tells from a level on; a log that cannot be written stops nothing."""
    import logging

    class Formatter(logging.Formatter):
        """One line an event, made harmless; of errors not even the text, which may quote a
        header.
        """

        def format(self, record: logging.LogRecord) -> str:
            record.message = record.getMessage()
            record.asctime = self.formatTime(record, self.datefmt)
            return harmless(self.formatMessage(record))

    handler.setLevel(level)
    handler.setFormatter(Formatter(line, date_format))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    return handler
