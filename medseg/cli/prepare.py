"""`medseg prepare`: parse, call, show."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.cli.options import Json, Quiet, check_one_of, in_panel, parse_changes, parse_workers
from medseg.cli.show import bar_of_stages, print_json, print_line
from medseg.errors import BadConfig
from medseg.machine import keep_memory

if TYPE_CHECKING:
    from medseg.training import Outlook, Prepared

_HOW, _PARTS = "How is prepared", "Parts and workers"
#: Cases that the last lines name.
_NAMED = 12


def prepare(
    data: Annotated[Path, typer.Argument(metavar="DATASET", help="Scans with labels.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="STORE", help="The folder for prepared scans."),
    ],
    arrays: Annotated[
        str,
        typer.Option(
            "--format", metavar="npy|zarr", help="Raw, or smaller and slower: compressed chunks."
        ),
    ] = "npy",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    shard: Annotated[
        str,
        in_panel(
            _PARTS,
            metavar="I/N|auto",
            help="Only part I of N, from 0; auto: as a scheduler says.",
        ),
    ] = "0/1",
    workers: Annotated[
        str, in_panel(_PARTS, metavar="N|auto", help="Cases at a time; auto: one a core, up to 8.")
    ] = "auto",
    retry: Annotated[
        bool, in_panel(_PARTS, "--retry", help="Try cases again that failed before.")
    ] = False,
    config: Annotated[
        Path | None,
        in_panel(_HOW, "--config", metavar="YAML", help="Take grid and intensities from it."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        in_panel(
            _HOW,
            "--set",
            metavar="KEY=VALUE",
            help="model.spacing_mm, model.grid, model.intensity or model.recipe.",
        ),
    ] = None,
    finetune: Annotated[
        str | None,
        in_panel(_HOW, metavar="MODEL", help="Prepare as this model, to go on from, sees scans."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare a data set for training by several jobs: medseg train DATASET --prepared STORE.

    Each part checks its own cases and, once all parts have, prepares them by a plan that follows
    from the data alone. No part waits for another: where one ends with 3, run the same command
    again when the others have ended. One that was killed goes on with the same command.

    Examples:
    medseg prepare dataset/ -o store/
    medseg prepare dataset/ -o store/ --shard 3/100
    """
    keep_memory()
    from medseg.cohort import parse_shard
    from medseg.training import Events, Request, plan_part, prepare_dataset

    check_one_of("--format", arrays, ("npy", "zarr"))
    part, count = parse_shard(shard), parse_workers(workers)
    if data.suffix.lower() in (".yaml", ".yml"):
        raise BadConfig(f"{data} is a config; give the data set, and the config with --config")
    request = Request(
        data=data, config=config, overrides=parse_changes(overrides or []), finetune=finetune
    )
    if dry_run:
        outlook = plan_part(request, output, part=part, retry=retry, arrays=arrays)
        _show_outlook(output, outlook, as_json)
        return
    with bar_of_stages(quiet) as progress:

        def reading(what: str, done: int, total: int) -> None:
            progress(what, done / max(1, total), f"{done} of {total} cases")

        result = prepare_dataset(
            request, output, part=part, workers=count, retry=retry, arrays=arrays,
            events=Events(reading=reading),
        )  # fmt: skip
    _show(result, as_json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _show_outlook(store: Path, outlook: Outlook, as_json: bool) -> None:
    """What would be done, in a line or as JSON."""
    if as_json:
        print_json({"store": str(store), **asdict(outlook)})
        return
    print_line(
        f"{store}: of {outlook.total} cases {outlook.to_check} are to be checked and"
        f" {outlook.to_prepare} to be prepared; nothing was written"
    )


def _show(result: Prepared, as_json: bool) -> None:
    """What came of the part, in lines or as JSON."""
    counts = {"done": result.done, "failed": len(result.failures), "waiting": result.waiting}
    if as_json:
        failures = [{"case": name, "error": text} for name, text in result.failures.items()]
        print_json({
            "store": str(result.store), "total": result.total, "counts": counts,
            "failures": failures, "unchecked": result.unchecked,
        })  # fmt: skip
        return
    tally = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    print_line(f"{result.store}: of {result.total} cases {tally or 'none'}")
    for name, text in list(result.failures.items())[:_NAMED]:
        print_line(f"  {name}: {text}")
    if len(result.failures) > _NAMED:
        print_line(f"  and {len(result.failures) - _NAMED} more; --json lists them all")
    if result.unchecked:
        print_line(
            f"{result.unchecked} cases of other parts are not checked yet; run the same command"
            " again when those parts have ended"
        )
