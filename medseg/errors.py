"""Everything medseg raises or warns about on purpose.

MedsegError
├── BadFile        an input file that cannot be read, or cannot be trusted
├── BadOutput      a place or a suffix that cannot be written
├── BadConfig      settings that contradict each other, the data, or the machine
├── BadModel       a model folder that is unknown, damaged, or does not fit the data
├── BadGeometry    an affine or two grids that make no physical sense together
├── NotEnoughMemory  more memory is needed than allowed or present
├── DeviceFailed   a GPU that stopped working: this process can use it no more
└── Interrupted    the user or the system asked to stop

Warnings: DataWarning: the answer stands, but the reader should know. Collected into the run record.

Every message is one sentence or two that name the file, say what is wrong and what to do.
"""


class MedsegError(Exception):
    """Base of all errors medseg raises on purpose; the command line prints the message and nothing
    else.
    """

    exit_code = 1


class BadFile(MedsegError):
    """An input file cannot be read or cannot be trusted."""

    exit_code = 3


class BadOutput(MedsegError):
    """The output cannot be written where or as what was asked."""

    exit_code = 4


class BadConfig(MedsegError):
    """Settings contradict each other, the data, or the machine."""

    exit_code = 5


class BadModel(MedsegError):
    """A model is unknown, damaged, or does not fit the data."""

    exit_code = 6


class BadGeometry(MedsegError):
    """An affine is not a scan geometry, or two grids do not belong together."""

    exit_code = 3


class NotEnoughMemory(MedsegError):
    """More memory is needed than is allowed or present."""

    exit_code = 7


class DeviceFailed(MedsegError):
    """A GPU stopped working, and stays so for this process: every further scan would fail."""

    exit_code = 7

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the GPU stopped working ({why}); start again, where it went on with the next scan, or"
            " use --device cpu"
        )


class Interrupted(MedsegError):
    """The user (Ctrl-C) or the system (SIGTERM) asked to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped; nothing was left half-written")
        self.exit_code = 128 + signal_number


class DataWarning(UserWarning):
    """Something in the data that the reader of the result should know."""
