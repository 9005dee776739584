"""`medseg serve`: parse, call, show."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.cli.options import in_panel
from medseg.cli.show import tell
from medseg.errors import BadConfig

if TYPE_CHECKING:
    from medseg.annotation import Rules

_CALLERS, _LIMITS = "Who may ask", "Limits"


def serve(
    studies: Annotated[
        Path,
        typer.Argument(
            metavar="STUDIES",
            help="A folder of scans, or a data set that medseg add made. Labels are kept in it.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=(
                "A model to offer, repeatable: a name from `medseg models`, a model folder, or one"
                " of nnU-Net or MONAI. Default: brain and ct-tissues."
            ),
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="To listen on; 0 takes a free one."),
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="Address to listen on. Other than loopback needs --login."
        ),
    ] = "127.0.0.1",
    login: Annotated[
        Path | None,
        in_panel(
            _CALLERS,
            metavar="FILE",
            help="Ask for a name and a password; a line NAME:PASSWORD of this file for each.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        in_panel(
            _CALLERS,
            metavar="NAME",
            help="A name of this machine by which it may be asked, repeatable. Default: its"
            " address alone.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        in_panel(
            _CALLERS,
            metavar="ORIGIN",
            help="Pages of this origin may ask, such as OHIF's http://10.0.0.7:3000, repeatable.",
        ),
    ] = None,
    max_gb: Annotated[
        float,
        in_panel(_LIMITS, min=0.001, metavar="GB", help="Most data of one upload."),
    ] = 2,
) -> None:
    """Serve scans and models to 3D Slicer: by MONAI Label's protocol, for its module MONAI Label as
    it is, and for OHIF. Labels that come back are kept.

    Listens on this machine alone unless told otherwise. Runs until stopped by Ctrl-C or SIGTERM.

    Examples:
    medseg serve scans/
    medseg serve scans/ -m runs/liver -m ct-tissues --port 8010
    """
    from medseg.annotation import (
        Server,
        ServerOptions,
        Service,
        check_libraries,
        open_studies,
        read_login,
        serve_models,
    )
    from medseg.errors import DataWarning
    from medseg.files import private_folder

    check_libraries()
    rules = _rules(name, allow_origin, max_gb)
    if not (host in ("localhost", "::1") or host.startswith("127.") or login):
        raise BadConfig("listening to other machines needs --login FILE, with names and passwords")
    passwords = read_login(login) if login else None
    models = serve_models(model or ())
    first = next(iter(models.values()))
    store = open_studies(studies, first.channels)
    options = ServerOptions(host=host, port=port, rules=rules, login=passwords)
    with warnings.catch_warnings(), private_folder() as folder:
        warnings.simplefilter("ignore", DataWarning)  # they name files
        service = Service(store, models, folder, max_bytes=rules.max_bytes, say=tell)
        server = Server(service, options)
        try:
            server.run()
        finally:
            server.close()


def _rules(names: list[str] | None, origins: list[str] | None, max_gb: float) -> Rules:
    from medseg.annotation import Rules

    for name in names or ():
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
            raise BadConfig(f"--name {name}: write the name of a machine, such as gpu.example.org")
    for origin in origins or ():
        if not re.fullmatch(
            r"https?://[A-Za-z0-9._-]+(:[0-9]{1,5})?|https?://\[[0-9a-fA-F:]+\](:[0-9]{1,5})?",
            origin,
        ):
            raise BadConfig(f"--allow-origin {origin}: write it as http://HOST:PORT, nothing more")
    return Rules(
        names=tuple(one.lower() for one in names or ()),
        origins=tuple(one.lower() for one in origins or ()),
        max_bytes=int(max_gb * 2**30),
    )
