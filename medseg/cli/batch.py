"""`medseg batch`: parse, call, show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import (
    AssumeGeometry,
    CheckpointName,
    Deidentify,
    Deterministic,
    Exact,
    Folds,
    Json,
    Orientation,
    Postprocess,
    Quiet,
    Repair,
    Roi,
    SegType,
    Suv,
    VolumeIndex,
    check_one_of,
    check_words,
    parse_bytes,
    parse_folds,
    parse_kinds,
    parse_seconds,
    parse_values,
)
from medseg.cli.show import bar_of_cases, print_json, print_line, tell
from medseg.errors import BadConfig
from medseg.progress import Progress

if TYPE_CHECKING:
    from medseg.cohort import Choice, Cohort, Request, Result, Sorted, Wanted
    from medseg.inference import Model
    from medseg.labels import LabelTable

#: Cases that the last lines name.
_NAMED = 12
#: Lines about how far it is, where nobody looks at a bar.
_LINES = 10


def batch(
    cohort: Annotated[
        Path,
        typer.Argument(
            metavar="COHORT",
            help="A list (.csv, .tsv, .jsonl, .parquet), a BIDS data set, or a folder tree.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="As of `medseg infer`; several are averaged."),
    ] = ["brain"],  # noqa: B006
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N|auto", help="Only part I of N, from 0; auto: as a scheduler says."
        ),
    ] = "0/1",
    workers: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Processes; auto: by measurement of the first scans."),
    ] = "auto",
    retry: Annotated[
        str,
        typer.Option(metavar="KINDS", help="Do these again: failed,lost,timeout,memory or all."),
    ] = "",
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="Keep results of other models and settings.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Know scans by their content, not by size and time.")
    ] = False,
    max_failed: Annotated[
        str | None,
        typer.Option(metavar="N|P%", help="Stop early when more cases than this have failed."),
    ] = None,
    case_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Most time of a case, such as 10m. Default: by the others."
        ),
    ] = None,
    case_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory of a case, such as 8GB.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most memory of all workers. Default: what is free."),
    ] = None,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="After SIGTERM, finish what is in hand for so long.")
    ] = "30s",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(metavar="auto|cases|bids", help="Form of the output; auto: BIDS for BIDS."),
    ] = "auto",
    suffix: Annotated[
        str | None, typer.Option(metavar="NAMES", help="BIDS: which images. Default: T1w.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="ENTITY=VALUE", help="BIDS: only these, e.g. ses=2; again."
        ),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(
            metavar="all|N|UID", help="Which volume of DICOM folders; all: each is a case."
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="A small picture of each case.")
    ] = True,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where the network runs.")
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|bf16|fp16", help="Arithmetic, settled once for the cohort."
        ),
    ] = "auto",
    backend: Annotated[
        str, typer.Option(metavar="auto|torch|openvino", help="What runs the network.")
    ] = "auto",
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share by which windows overlap.")
    ] = None,
    windows: Annotated[
        int, typer.Option("--batch", min=0, help="Windows at a time; 0: what suits the device.")
    ] = 0,
    tta: Annotated[
        bool | None, typer.Option("--tta/--no-tta", help="Also predict mirrored; slower.")
    ] = None,
    exact: Exact = False,
    folds: Folds = None,
    checkpoint_name: CheckpointName = "final",
    orientation: Orientation = "auto",
    postprocess: Postprocess = False,
    roi: Roi = None,
    probabilities: Annotated[
        str | None, typer.Option(metavar="LABELS", help="Also write probabilities of these labels.")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write how unsure the model is, 0 to 1.")
    ] = False,
    cleanup: Annotated[
        bool, typer.Option("--cleanup/--no-cleanup", help="Clean up as the model says.")
    ] = True,
    instances: Annotated[
        bool, typer.Option("--instances", help="Also number separate objects.")
    ] = False,
    volume: VolumeIndex = None,
    assume_geometry: AssumeGeometry = None,
    repair: Repair = False,
    suv: Suv = False,
    also: Annotated[
        str, typer.Option("--also", metavar="KINDS", help="Also write these, as of `medseg infer`.")
    ] = "",
    seg_type: SegType = "binary",
    deidentify: Deidentify = False,
    deterministic: Deterministic = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment a cohort: thousands of scans, by several processes or jobs; killed or not, it goes on
    where it was.

    A case is done when its record is there, and what failed is known and not tried again. `medseg
    gather` makes the table and the report.
    """
    from medseg import cohort as cohorts, inference
    from medseg.io import DicomOptions

    words = {
        "--precision": precision, "--seg-type": seg_type, "--layout": layout,
        "--backend": backend, "--orientation": orientation, "--checkpoint": checkpoint_name,
    }  # fmt: skip
    check_words(words, device)
    extras = inference.Extras(
        instances=instances, volume_index=volume, assume_geometry=assume_geometry,
        series=None if series == "all" else series, repair=repair, suv=suv, also=parse_kinds(also),
        dicom=DicomOptions(seg_type=seg_type, deidentify=deidentify, deterministic=deterministic),
    )  # fmt: skip
    loaded = inference.load_model(*model, folds=parse_folds(folds), checkpoint=checkpoint_name)
    inference.check_also(loaded, extras.also)
    settings = inference.Settings(
        device=device, precision=precision, overlap=overlap, cleanup=cleanup, backend=backend,
        batch=windows, tta=tta, uncertainty=uncertainty, exact=exact, orientation=orientation,
        probabilities=parse_values(probabilities) if probabilities else (), postprocess=postprocess,
        roi=inference.labels_named(loaded, roi.split(",")) if roi else (),
    )  # fmt: skip
    known = cohorts.read_any(cohort, _wanted(loaded, suffix, only or (), every=series == "all"))
    request = cohorts.Request(
        models=_absolute(model), model=inference.identity_of(loaded), folds=parse_folds(folds),
        checkpoint=checkpoint_name, settings=settings, extras=extras, pictures=pictures,
        verify=verify, layout=_layout(layout, known), several="," in (suffix or ""),
    )  # fmt: skip
    limits = cohorts.Limits(
        workers=_workers(workers), memory_bytes=_size(max_memory, "--max-memory"),
        case_time_s=parse_seconds(case_time, "--case-time") if case_time else 0,
        case_memory_bytes=_size(case_memory, "--case-memory"),
        grace_s=parse_seconds(grace, "--grace"), **_most(max_failed),
    )  # fmt: skip
    part = cohorts.parse_shard(shard)
    run = _Run(
        cohort=known, output=output, request=request, table=inference.label_table(loaded),
        choice=cohorts.Choice(part=part, retry=_retries(retry), keep_others=keep_others),
        as_json=as_json, quiet=quiet,
    )  # fmt: skip
    run.do(dry_run, limits)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run over a part of a cohort, and what is shown of it."""

    cohort: Cohort
    output: Path
    request: Request
    table: LabelTable
    choice: Choice
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
        }
        if self.as_json:
            print_json(facts)
            return
        kept = ", ".join(f"{count} {status}" for status, count in sorted(found.kept.items()))
        print_line(
            f"{len(self.cohort.cases)} cases in the list; this is part {self.choice.part_name}"
        )
        print_line(f"to do: {len(found.items)}" + (f"; kept: {kept}" if kept else ""))
        if found.changed:
            print_line(f"done anew, since scan, model or settings changed: {found.changed}")
        if found.missing:
            print_line(f"files that are not there: {found.missing}")
        print_line(
            f"scans: {found.input_bytes / 1e9:.1f} GB; here: {facts['cores']} cores, "
            f"{facts['memory_bytes'] / 1e9:.1f} GB of memory; nothing was written"
        )

    def _show(self, result: Result) -> None:
        if self.as_json:
            failures = [{"case": a, "status": b, "error": c} for a, b, c in result.failures]
            counts = {status: count for status, count in result.counts.items() if count}
            print_json({"total": result.total, "counts": counts, "failures": failures})
            return
        if result.stopped:
            print_line(f"stopped early: {result.stopped}")
        shown = [f"{count} {status}" for status, count in sorted(result.counts.items()) if count]
        print_line(f"{self.output}: of {result.total} cases {', '.join(shown) or 'none'}")
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
    yield _lines(time.monotonic)


def _lines(clock: Callable[[], float]) -> Progress:
    """A line for every tenth that is done, with the time that is left as it went so far."""
    said = [0]
    first: list[tuple[float, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if done and not first:
            first.append((clock(), done))  # from here on, so that starting up is not counted
        step = done * _LINES // max(total, 1)
        if step > said[0] and done < total:
            said[0] = step
            since, already = first[0]
            left_s = (clock() - since) / max(1, done - already) * (total - done)
            tell(f"{done} of {total} cases, " + f"{what}, " * bool(what) + _time_left(left_s))

    return progress


def _time_left(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def _absolute(models: Sequence[str]) -> tuple[str, ...]:
    """Folders of models by their whole path, so that a worker elsewhere finds them."""
    return tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in models)


def _wanted(model: Model, suffix: str | None, filters: Sequence[str], every: bool) -> Wanted:
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


def _workers(text: str) -> int:
    if text == "auto":
        return 0
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 1024:
        raise typer.BadParameter(
            f"'{text}' is not a number from 1 on, or auto", param_hint="--workers"
        )
    return int(text)


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
