"""The command line: parse, call one function, show what came back, map errors to exit codes.

Results go to stdout (`--json` for machines), progress, announcements and warnings to stderr. Exit
codes: 0 done, 1 other failure, 2 wrong usage, 3 bad input file, 4 output cannot be written, 5 bad
settings, 6 bad model, 7 not enough memory, 8 doubts about a result (`infer --strict`), 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated

import typer

from medseg.cli.command import Command, Program, with_groups
from medseg.errors import Interrupted
from medseg.machine import STOP_SIGNALS

#: What each command does in a word or two, by the panels of `medseg --help` and in their order. A
#: command's module is loaded when it is called.
PANELS: dict[str, dict[str, str]] = {
    "Segment": {
        "infer": "Segment scans",
        "batch": "Segment a cohort",
        "gather": "Make the table and the report of a cohort, from its records alone",
        "volumes": "Measure label maps that exist",
    },
    "Look and convert": {
        "view": "Look at a scan with its labels over it",
        "info": "Say what is in a file",
        "convert": "Convert a volume to another format",
    },
    "Annotate": {
        "add": "Add scans to a data set that grows, and what was segmented in one",
        "next": "Choose the scan to label next",
        "rounds": "List the models that were trained in a data set",
    },
    "Evaluate": {
        "evaluate": "Score label maps against references",
        "compare": "Compare methods on the same cases",
        "clean": "Clean up a label map",
    },
    "Models": {
        "models": "List the models that come with medseg, or those in a folder",
        "train": "Train a model",
        "check": "Check a dataset before training",
        "prepare": "Prepare a data set for training by several jobs",
        "export": "Write a model's network as ONNX, or a label map as surfaces",
    },
    "Connect": {
        "listen": "Be a DICOM node",
        "serve": "Serve scans and models to 3D Slicer",
    },
    "The program": {
        "version": "Print medseg's version",
        "schema": "Print the JSON Schema of what medseg writes",
        "completion": "Print a script for a shell",
    },
    "": {"complete": "Print what fits as the last of these words; for the shell"},
}
#: Modules that hold a command of another name.
_HOMES = {
    "complete": "completion",
    "volumes": "gather",
    "add": "annotate",
    "next": "annotate",
    "rounds": "annotate",
    "info": "convert",
    "compare": "evaluate",
    "clean": "evaluate",
    "version": "models",
}
#: Commands that say nothing of what they do.
_BARE = ("version", "schema", "completion", "complete")


def command_named(name: str) -> Callable[..., None]:
    """A command's function."""
    command: Callable[..., None] = getattr(
        import_module(f"medseg.cli.{_HOMES.get(name, name)}"), name
    )
    return command


def make_app(only: str | None = None) -> typer.Typer:
    """The command line. only: of all commands but this one nothing is known but what they do, for
    reading the options of all takes longer than the help of one.
    """
    app = typer.Typer(
        name="medseg",
        cls=Program,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=(
            "Nothing is sent anywhere: only listen, serve, and infer where you name a PACS, open a"
            " network connection."
        ),
    )
    app.callback()(_program)
    for panel, titles in PANELS.items():
        for name, title in titles.items():
            add = app.command(name, cls=Command, rich_help_panel=panel, hidden=not panel)
            if only is not None and name != only:
                add(_titled(name, title))
            else:
                command = command_named(name)
                add(command if name in _BARE else with_groups(command))
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        command_named("version")()
        raise typer.Exit


def _program(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            is_eager=True,
            callback=_print_version,
            help="Print medseg's version.",
        ),
    ] = False,
) -> None:
    """Segment medical images: one command from a scan to labels you can trust."""
    return


def _titled(name: str, text: str) -> Callable[[], None]:
    """A command's name and what it does, without its options."""

    def title() -> None:
        pass

    title.__name__, title.__doc__ = name, text
    return title


def process() -> None:
    """`main` as the whole of a process, which ends with it."""
    try:
        main()
    except SystemExit as end:
        if "torch" in sys.modules and isinstance(end.code, int | None):
            _leave(end.code or 0)
        raise


def _leave(code: int) -> None:
    """End the process without taking everything down that it holds, which with torch takes half a
    second of CPU. Does nothing where threads are still at work.

    What Python does at an end comes first: exit handlers, then what was printed.
    """
    from medseg.kernels.threads import end_threads

    # A signal to stop comes too late: all is done, and it must not end in an error.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    end_threads()
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    if others != [threading.main_thread()]:
        for number, handler in before.items():
            signal.signal(number, handler)
        return
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:  # nobody reads any more: Python says so in its own way
        return
    os._exit(code)


def main() -> None:
    """Run the command line and exit."""
    # Looking for circles among a million objects that imports make takes a tenth of a short run.
    gc.set_threshold(100_000, 50, 100)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, _interrupt)
    # Where results go to a file in an encoding of Windows, that has not every letter.
    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="backslashreplace")
    from medseg.cli.show import explain, show_warning

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
