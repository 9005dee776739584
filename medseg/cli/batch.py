"""`medseg batch`: parse, call, show."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import (
    CohortModel,
    Dicom,
    Json,
    Network,
    OfNnunet,
    Output,
    Quiet,
    Reading,
    Results,
    Roi,
    check_choices,
    check_one_of,
    extras_of,
    in_panel,
    parse_bytes,
    parse_folds,
    parse_place,
    parse_seconds,
    parse_workers,
    settings_of,
)
from medseg.cli.show import bar_of_cases, lines_of_cases, print_json, print_line, tell
from medseg.errors import BadConfig, MedsegError
from medseg.logs import Progress

if TYPE_CHECKING:
    from medseg.cohort import Choice, Cohort, Request, Result, Sorted, Wanted
    from medseg.inference import Model as Loaded
    from medseg.labels import LabelTable

_COHORT, _WORKERS = "What belongs to the cohort", "Workers and limits"
#: Cases that the last lines name.
_NAMED = 12


def batch(
    cohort: Annotated[
        Path,
        typer.Argument(
            metavar="COHORT",
            help="A list (.csv, .tsv, .jsonl, .parquet), a BIDS data set, or a folder tree.",
        ),
    ],
    output: Output,
    model: CohortModel = None,
    roi: Roi = None,
    retry: Annotated[
        str,
        typer.Option(metavar="KINDS", help="Do these again: failed,lost,timeout,memory or all."),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    *,
    keep_others: Annotated[
        bool, in_panel(_COHORT, "--keep-others", help="Keep results of other models and settings.")
    ] = False,
    verify: Annotated[
        bool,
        in_panel(_COHORT, "--verify", help="Know scans by their content, not by size and time."),
    ] = False,
    pictures: Annotated[
        bool, in_panel(_COHORT, "--pictures/--no-pictures", help="A small picture of each case.")
    ] = True,
    suffix: Annotated[
        str | None, in_panel(_COHORT, metavar="NAMES", help="BIDS: which images. Default: T1w.")
    ] = None,
    only: Annotated[
        list[str] | None,
        in_panel(
            _COHORT, "--filter", metavar="ENTITY=VALUE", help="BIDS: only these, e.g. ses=2; again."
        ),
    ] = None,
    series: Annotated[
        str | None,
        in_panel(
            _COHORT, metavar="all|N|UID", help="Which volume of DICOM folders; all: each is a case."
        ),
    ] = None,
    layout: Annotated[
        str,
        in_panel(
            _COHORT, metavar="auto|cases|bids", help="Form of the output; auto: BIDS for BIDS."
        ),
    ] = "auto",
    shard: Annotated[
        str,
        in_panel(
            _WORKERS,
            metavar="I/N|auto",
            help="Only part I of N, from 0; auto: as a scheduler says.",
        ),
    ] = "0/1",
    workers: Annotated[
        str,
        in_panel(
            _WORKERS, metavar="N|auto", help="Processes; auto: by measurement of the first scans."
        ),
    ] = "auto",
    on: Annotated[
        str | None,
        in_panel(
            _WORKERS,
            metavar="ray[:HOST:PORT]",
            help="Workers on a Ray cluster; without an address on this machine.",
        ),
    ] = None,
    case_time: Annotated[
        str | None,
        in_panel(
            _WORKERS,
            metavar="TIME",
            help="Most time of a case, such as 10m. Default: by the others.",
        ),
    ] = None,
    case_memory: Annotated[
        str | None, in_panel(_WORKERS, metavar="SIZE", help="Most memory of a case, such as 8GB.")
    ] = None,
    grace: Annotated[
        str,
        in_panel(
            _WORKERS, metavar="TIME", help="After SIGTERM, finish what is in hand for so long."
        ),
    ] = "30s",
    max_failed: Annotated[
        str | None,
        in_panel(
            _WORKERS, metavar="N|P%", help="Stop early when more cases than this have failed."
        ),
    ] = None,
    results: Results,
    network: Network,
    reading: Reading,
    nnunet: OfNnunet,
    dicom: Dicom,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment a cohort: thousands of scans, by several processes or jobs; killed or not, it goes on
    where it was.

    A case is done when its record is there, and what failed is known and not tried again. `medseg
    gather` makes the table and the report.

    Examples:
    medseg batch bids/ -o results/
    medseg batch list.csv -o results/ --model brain-fast --workers 4
    """
    from medseg import cohort as cohorts, inference

    check_choices(network, nnunet, dicom)
    check_one_of("--layout", layout, ("auto", "cases", "bids"))
    chosen = model or ["brain"]
    extras = extras_of(
        reading=reading, dicom=dicom, results=results, series=None if series == "all" else series
    )
    segmenter = inference.load_model(
        *chosen, folds=parse_folds(nnunet.folds), checkpoint=nnunet.checkpoint
    )
    inference.check_also(segmenter, extras.also)
    # The most memory is that of all workers, not of each.
    one = replace(network, max_memory=None)
    settings = settings_of(segmenter, network=one, nnunet=nnunet, results=results, roi=roi)
    case_list = cohorts.read_any(
        cohort, _wanted(segmenter, suffix, only or (), every=series == "all")
    )
    request = cohorts.Request(
        models=_absolute(chosen), model=inference.identity_of(segmenter),
        folds=parse_folds(nnunet.folds),
        checkpoint=nnunet.checkpoint, settings=settings, extras=extras, pictures=pictures,
        verify=verify, layout=_layout(layout, case_list), several="," in (suffix or ""),
    )  # fmt: skip
    limits = cohorts.Limits(
        workers=parse_workers(workers), memory_bytes=network.max_memory_bytes,
        case_time_s=parse_seconds(case_time, "--case-time") if case_time else 0,
        case_memory_bytes=_size(case_memory, "--case-memory"),
        grace_s=parse_seconds(grace, "--grace"), **_most(max_failed),
    )  # fmt: skip
    part = cohorts.parse_shard(shard)
    run = _Run(
        cohort=case_list, output=parse_place(output), request=request, model=segmenter,
        table=inference.label_table(segmenter),
        choice=cohorts.Choice(part=part, retry=_retries(retry), keep_others=keep_others),
        on=_cluster(on), as_json=as_json, quiet=quiet,
    )  # fmt: skip
    run.do(dry_run, limits)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run over a part of a cohort, and what is shown of it."""

    cohort: Cohort
    output: Path | str
    request: Request
    model: Loaded
    table: LabelTable
    choice: Choice
    on: str | None
    as_json: bool
    quiet: bool

    def do(self, dry_run: bool, limits: Any) -> None:
        """Do it, or say what would be done; the exit code is 3 where some cases are not done."""
        from medseg.cohort import plan_part, run_part

        if dry_run:
            self._show_plan(plan_part(self.cohort, self.output, self.request, choice=self.choice))
            return
        with _far(self.quiet) as progress:
            result = run_part(
                self.cohort,
                self.output,
                request=self.request,
                choice=self.choice,
                limits=limits,
                table=self.table,
                progress=progress,
                announce=self._announce,
                on=self.on,
            )
        self._show(result)
        if result.exit_code:
            raise typer.Exit(result.exit_code)

    def _announce(self, found: Sorted) -> None:
        total = sum(found.kept.values()) + len(found.items)
        words = [f"{total} cases, {len(found.items)} to do"]
        words += [f"{count} {status}" for status, count in sorted(found.kept.items())]
        if found.changed:
            words.append(f"{found.changed} done anew: their scan, model or settings changed")
        tell("; ".join(words), self.quiet)

    def _show_plan(self, found: Sorted) -> None:
        from medseg.cohort import cores_here, usable_bytes

        facts: dict[str, Any] = {
            "cohort": self.cohort.kind,
            "cases_in_list": len(self.cohort.cases),
            "part": self.choice.part_name,
            "to_do": len(found.items),
            "kept": dict(found.kept),
            "done_anew": found.changed,
            "files_missing": found.missing,
            "input_bytes": found.input_bytes,
            "cores": cores_here(),
            "memory_bytes": usable_bytes(),
            "model": dict(self.request.model),
            "largest": self._largest(found),
        }
        if self.as_json:
            print_json(facts)
            return
        tally = ", ".join(f"{count} {status}" for status, count in sorted(found.kept.items()))
        print_line(
            f"{len(self.cohort.cases)} cases in the list; this is part {self.choice.part_name}"
        )
        print_line(f"to do: {len(found.items)}" + (f"; kept: {tally}" if tally else ""))
        if found.changed:
            print_line(f"done anew, since scan, model or settings changed: {found.changed}")
        if found.missing:
            print_line(f"files that are not there: {found.missing}")
        print_line(
            f"scans: {found.input_bytes / 1e9:.1f} GB; here: {facts['cores']} cores, "
            f"{facts['memory_bytes'] / 1e9:.1f} GB of memory; nothing was written"
        )
        if largest := facts["largest"]:
            needs = f"about {(largest['memory_bytes'] or 0) / 1e9:.2f} GB in a worker"
            print_line(f"the largest file, {largest['case']}: {largest['error'] or needs}")

    def _largest(self, found: Sorted) -> dict[str, Any] | None:
        """What the case with the largest file would need; None where no file is here."""
        from medseg.cohort import forecast_case

        if found.largest is None:
            return None
        case = found.largest[1]
        facts: dict[str, Any] = {"case": case.name, "memory_bytes": None, "windows": None}
        try:
            forecast = forecast_case(case, self.request, self.model)
        except MedsegError as error:
            return facts | {"error": str(error)}
        needs = {"memory_bytes": forecast.memory_bytes, "windows": forecast.windows}
        return facts | needs | {"error": None}

    def _show(self, result: Result) -> None:
        if self.as_json:
            failures = [{"case": a, "status": b, "error": c} for a, b, c in result.failures]
            counts = {status: count for status, count in result.counts.items() if count}
            print_json({"total": result.total, "counts": counts, "failures": failures})
            return
        if result.stopped:
            print_line(f"stopped early: {result.stopped}")
        tallies = [f"{count} {status}" for status, count in sorted(result.counts.items()) if count]
        print_line(f"{self.output}: of {result.total} cases {', '.join(tallies) or 'none'}")
        for name, status, error in result.failures[:_NAMED]:
            print_line(f"  {name}: {status}: {error}")
        if len(result.failures) > _NAMED:
            print_line(f"  and {len(result.failures) - _NAMED} more; medseg gather lists them all")


@contextmanager
def _far(quiet: bool) -> Iterator[Progress]:
    """How far it is: a bar, or where nobody sees one a few lines on stderr."""
    if quiet or sys.stderr.isatty():
        with bar_of_cases(quiet) as progress:
            yield progress
        return
    yield lines_of_cases(time.monotonic)


def _absolute(models: Sequence[str]) -> tuple[str, ...]:
    """Folders of models by their whole path, so that a worker elsewhere finds them."""
    return tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in models)


def _wanted(model: Loaded, suffix: str | None, filters: Sequence[str], every: bool) -> Wanted:
    """Which files of a cohort are cases."""
    from medseg.cohort import Wanted
    from medseg.inference import channel_names

    suffixes = tuple(part.strip() for part in suffix.split(",")) if suffix else ()
    return Wanted(
        channels=tuple(channel_names(model)),
        suffixes=suffixes,
        filters=_filters(filters),
        every_series=every,
    )


def _layout(asked: str, cohort: Cohort) -> str:
    """The form of the output: 'auto' is BIDS for a BIDS data set."""
    if asked == "auto":
        return "bids" if cohort.kind == "bids" else "cases"
    if asked == "bids" and cohort.kind != "bids":
        raise BadConfig("--layout bids is for a BIDS data set, whose names say where results lie")
    return asked


def _filters(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(
                f"'{name}': write ENTITY=VALUE, e.g. ses=2", param_hint="--filter"
            )
    return {name.strip(): value.strip() for name, _, value in pairs}


def _retries(text: str) -> tuple[str, ...]:
    from medseg.cohort import RETRIES

    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        check_one_of("--retry", kind, RETRIES)
    return kinds


def _cluster(text: str | None) -> str | None:
    """The address of a Ray cluster, '' for one that is started here, None for none."""
    if text is None:
        return None
    engine, _, address = text.partition(":")
    host, _, port = address.rpartition(":")
    if engine != "ray" or (address not in ("", "auto") and not (host and port.isdigit())):
        raise typer.BadParameter(
            f"'{text}': write ray, ray:auto or ray:HOST:PORT", param_hint="--on"
        )
    return address


def _size(text: str | None, option: str) -> int | None:
    return parse_bytes(text, option) if text else None


def _most(text: str | None) -> dict[str, Any]:
    """How many cases may fail, or which share of them."""
    if text is None:
        return {}
    number = text.strip().removesuffix("%")
    if not (number.isascii() and number.isdigit()):
        raise BadConfig(
            f"--max-failed {text}: write a number of cases such as 20, or a share such as 5%"
        )
    if text.strip().endswith("%"):
        return {"max_failed_share": int(number) / 100}
    return {"max_failed": int(number)}
