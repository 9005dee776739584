"""`medseg listen`: parse, call, show."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import (
    Dicom,
    Network,
    OfNnunet,
    OneModel,
    Results,
    check_choices,
    in_panel,
    parse_folds,
    settings_of,
    words_of,
)
from medseg.cli.show import tell
from medseg.errors import BadConfig
from medseg.machine import user_number

_CALLERS, _LIMITS = "Who may call", "Limits"


def listen(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where results are written."),
    ] = None,
    reply_to: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT:TITLE", help="The DICOM node that results are sent to."),
    ] = None,
    model: OneModel = "brain",
    also: Annotated[
        str, typer.Option("--also", metavar="rtstruct,sr", help="Also make these beside the SEG.")
    ] = "",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="To listen on; 0 takes a free one."),
    ] = 11112,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="Address to listen on. Other than loopback needs --peer."
        ),
    ] = "127.0.0.1",
    title: Annotated[
        str,
        in_panel(
            _CALLERS,
            metavar="TITLE",
            help="Our application entity title; calls for another are refused.",
        ),
    ] = "MEDSEG",
    caller: Annotated[
        list[str] | None,
        in_panel(
            _CALLERS, metavar="TITLE", help="Only this title may call, repeatable. Default: any."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        in_panel(_CALLERS, metavar="IP", help="Only this address may connect, repeatable."),
    ] = None,
    *,
    quiet_s: Annotated[
        float,
        in_panel(
            _LIMITS,
            min=0.1,
            metavar="SECONDS",
            help="A series is complete when nothing came for so long.",
        ),
    ] = 10,
    timeout_s: Annotated[
        float, in_panel(_LIMITS, min=1, metavar="SECONDS", help="Give a series up after so long.")
    ] = 3600,
    associations: Annotated[
        int, in_panel(_LIMITS, min=1, max=100, metavar="N", help="Most senders at a time.")
    ] = 4,
    max_series: Annotated[
        int,
        in_panel(_LIMITS, min=1, metavar="N", help="Most series received or waiting at a time."),
    ] = 20,
    max_instances: Annotated[
        int, in_panel(_LIMITS, min=1, metavar="N", help="Most instances of a series.")
    ] = 5000,
    max_gb: Annotated[
        float,
        in_panel(
            _LIMITS,
            min=0.001,
            metavar="GB",
            help="Most data received, waiting or kept at a time.",
        ),
    ] = 8,
    spool: Annotated[
        Path | None,
        in_panel(
            _LIMITS,
            metavar="FOLDER",
            help=(
                "Where series lie until their results are delivered, private; a new start goes on"
                " with them. Default: .medseg-spool in the folder of -o, else below the temporary"
                " folder."
            ),
        ),
    ] = None,
    network: Network,
    nnunet: OfNnunet,
    dicom: Dicom,
) -> None:
    """Be a DICOM node: receive series (C-STORE), segment each, send the result on or write it to a
    folder.

    Listens on this machine alone unless told otherwise. Runs until stopped by Ctrl-C or SIGTERM.
    What was received and not delivered by then stays in the spool, and a new start goes on with it.

    Examples:
    medseg listen -o results/ --peer 10.0.0.7 --host 10.0.0.9
    medseg listen --reply-to 127.0.0.1:4242:ORTHANC
    """
    from medseg.inference import load_model
    from medseg.pacs import Limits, Listener, NodeOptions, segment_in_child

    deliver = _deliveries(output, reply_to, title)
    if not (host in ("localhost", "::1") or host.startswith("127.") or peer):
        raise BadConfig("listening to other machines needs --peer IP for each that may connect")
    _check_kinds(also)
    # What is wrong is better known now than when the first series is there.
    check_choices(network, nnunet, dicom)
    loaded = load_model(model, folds=parse_folds(nnunet.folds), checkpoint=nnunet.checkpoint)
    settings_of(loaded, network=network, nnunet=nnunet, results=Results(), roi=None)
    model_name = str(Path(model).resolve()) if Path(model).is_dir() else model
    most = int(max_gb * 2**30)
    limits = Limits(instances=max_instances, instance_bytes=min(2**29, most), total_bytes=most)
    options = NodeOptions(
        port=port, host=host, title=title, callers=tuple(caller or ()), peers=tuple(peer or ()),
        quiet_s=quiet_s, associations=associations, series=max_series, limits=limits,
    )  # fmt: skip
    words = [*words_of(network), *words_of(nnunet), *words_of(dicom)]
    segment = segment_in_child(["--model", model_name, "--also", also, *words], timeout_s)
    Listener(options, segment, deliver, say=tell, spool=spool or _usual_spool(output, port)).run()


def _deliveries(
    output: Path | None, reply_to: str | None, title: str
) -> Callable[[str, Sequence[Path]], None]:
    """What hands results on to every place that was named, of which there must be one."""
    from medseg.pacs import keep_in, send_to

    if output is None and reply_to is None:
        raise BadConfig("say where results go: a folder with -o, or --reply-to HOST:PORT:TITLE")
    places: list[Callable[[str, Sequence[Path]], None]] = []
    if output:
        output.mkdir(parents=True, exist_ok=True)
        places.append(keep_in(output))
    if reply_to:
        places.append(send_to(*_node(reply_to), title))

    def deliver(name: str, files: Sequence[Path]) -> None:
        for place in places:
            place(name, files)

    return deliver


def _check_kinds(also: str) -> None:
    from medseg.inference import DICOM_RESULTS

    for kind in also.split(",") if also else ():
        if kind.strip().lower() not in DICOM_RESULTS:
            raise BadConfig(f"--also {kind}: write one or more of {', '.join(DICOM_RESULTS)}")


def _usual_spool(output: Path | None, port: int) -> Path:
    """A folder that the next start finds again."""
    if output:
        return output.absolute() / ".medseg-spool"
    return Path(tempfile.gettempdir()) / f"medseg-listen-{user_number()}-{port}"


def _node(text: str) -> tuple[str, int, str]:
    host, _, rest = text.partition(":")
    number, _, title = rest.partition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", number) and 0 < int(number) < 65536 and title):
        raise BadConfig("--reply-to: write HOST:PORT:TITLE, e.g. 127.0.0.1:4242:PACS")
    return host, int(number), title
