"""The command line: parse, call one function, show what came back, map errors to exit codes.

Results go to stdout (`--json` for machines), progress, announcements and warnings to stderr. Exit
codes: 0 done, 1 other failure, 2 wrong usage, 3 bad input file, 4 output cannot be written, 5 bad
settings, 6 bad model, 7 not enough memory, 8 doubts about a result (`infer --strict`), 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable

import typer

from medseg.cli.batch import batch
from medseg.cli.check import check
from medseg.cli.convert import convert, info
from medseg.cli.evaluate import clean, compare, evaluate
from medseg.cli.export import export
from medseg.cli.gather import gather, volumes
from medseg.cli.infer import infer
from medseg.cli.listen import listen
from medseg.cli.models import models, version
from medseg.cli.options import Command
from medseg.cli.show import explain, show_warning
from medseg.cli.train import train
from medseg.cli.view import view
from medseg.errors import Interrupted

#: In the order of `medseg --help`.
COMMANDS: tuple[Callable[..., None], ...] = (
    infer, batch, gather, volumes, convert, info, models, version, train, check, export, evaluate,
    compare, clean, view, listen,
)  # fmt: skip


def make_app(only: str | None = None) -> typer.Typer:
    """The command line. only: of all commands but this one nothing is known but what they do, for
    reading the options of all takes longer than the help of one.
    """
    app = typer.Typer(
        name="medseg",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Segment medical images: one command from a scan to labels you can trust.",
        epilog=(
            "Nothing is sent anywhere: only listen, and infer where you name a PACS, open a network"
            " connection."
        ),
    )
    for command in COMMANDS:
        is_whole = only is None or command.__name__ == only
        app.command(cls=Command)(command if is_whole else _titled(command))
    return app


def _titled(command: Callable[..., None]) -> Callable[[], None]:
    """A command's name and help without its options."""

    def title() -> None:
        pass

    title.__name__, title.__doc__ = command.__name__, command.__doc__
    return title


def main() -> None:
    """Run the command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, _interrupt)
    warnings.showwarning = show_warning
    try:
        make_app(next((word for word in sys.argv[1:] if not word.startswith("-")), ""))()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        text, code = explain(error)
        print(text, file=sys.stderr)
        sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)
