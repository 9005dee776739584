"""Scans from a PACS for `medseg infer`: options, fetching, pushing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from medseg.cli.options import in_panel
from medseg.errors import BadConfig, Interrupted, MedsegError

if TYPE_CHECKING:
    from medseg.inference import Job
    from medseg.pacs import Access, Pacs


_PACS = "Scans from a PACS"
Push = Annotated[
    bool, in_panel(_PACS, "--push", help="Send the result back to the PACS the scan came from.")
]
Credentials = Annotated[
    str | None,
    in_panel(
        _PACS,
        metavar="FILE|ask",
        help="A file with 'Bearer TOKEN' or 'Basic USER:PASSWORD', or ask.",
    ),
]
Authority = Annotated[
    Path | None,
    in_panel(_PACS, metavar="PEM", help="Certificate of the authority to trust."),
]
PlainHttp = Annotated[
    bool,
    in_panel(_PACS, "--plain-http", help="Allow dicomweb+http:// to other machines, unencrypted."),
]


@dataclass(kw_only=True)
class Remote:
    """What `infer` works on when its scans may come from a PACS: local folders, and what to call
    them.
    """

    inputs: list[Path]
    output: Path | None
    pacs: Pacs | None = None
    names: dict[Path, str] = field(default_factory=dict)

    def name(self, path: Path) -> Path | str:
        """What to call a file or folder before the user."""
        return self.names.get(path, path)

    def send(self, job: Job, also: Sequence[str]) -> None:
        """Push the DICOM results of a job, if that was asked for. Raises `BadOutput`."""
        from medseg.inference import dicom_results

        if self.pacs is not None:
            self.pacs.push(list(dicom_results(job, also).values()))


@contextmanager
def fetched(
    inputs: list[Path],
    output: Path | None,
    *,
    push: bool,
    credentials: str | None,
    authority: Path | None,
    plain_http: bool,
    quiet: bool,
) -> Iterator[Remote]:
    """The inputs, a series in a PACS replaced by a private folder that holds it and is gone when
    the block ends.
    """
    from medseg.pacs import Limits, Pacs, is_address, parse_address

    if not any(is_address(path) for path in inputs):
        if push or credentials or authority or plain_http:
            raise BadConfig(
                "--push, --credentials, --authority and --plain-http are for a scan from a PACS"
            )
        yield Remote(inputs=inputs, output=output)
        return
    from medseg.files import private_folder

    if len(inputs) > 1:
        raise BadConfig("a series from a PACS is segmented on its own; give one address")
    if push and output and not output.name.lower().endswith(".dcm"):
        raise BadConfig("--push sends DICOM: give -o a name that ends in .dcm, or leave -o out")
    if not push and output is None:
        raise BadConfig("say where the result goes: a file or folder with -o, or --push")
    address = parse_address(inputs[0], plain_http=plain_http)
    pacs = Pacs(address, _access(credentials), authority)
    with private_folder() as temporary:
        series = temporary / "series"
        series.mkdir()
        names = {series: "the series", temporary / "result.dcm": "the result in the PACS"}
        try:
            count = pacs.fetch(series, Limits())
            if not quiet:
                print(f"received {count} instances from the PACS", file=sys.stderr)
            destination = output or temporary / "result.dcm"
            yield Remote(
                inputs=[series], output=destination, pacs=pacs if push else None, names=names
            )
        except Interrupted:
            raise
        except MedsegError as error:  # the names of temporary files tell nobody anything
            text = str(error)
            for path, name in names.items():
                text = text.replace(str(path), name)
            raise type(error)(text) from None


def _access(credentials: str | None) -> Access | None:
    from medseg.pacs import Access, read_access

    if credentials is None:
        return None
    if credentials != "ask":
        return read_access(credentials)
    from getpass import getpass

    print("user (nothing for a token): ", end="", file=sys.stderr, flush=True)
    user = sys.stdin.readline().strip()
    secret = getpass("password: " if user else "token: ")
    return Access("Basic", f"{user}:{secret}") if user else Access("Bearer", secret)
