"""The command line: one command a file."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.cli.app import main as main, process as process

__getattr__, __dir__ = door(
    __name__,
    {
        "app": ("main", "process"),
    },
)
