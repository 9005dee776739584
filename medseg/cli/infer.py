"""`medseg infer`: parse, call, show."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import (
    Dicom,
    Json,
    Model,
    Network,
    OfNnunet,
    Quiet,
    Reading,
    Results,
    Roi,
    Series,
    Telling,
    check_choices,
    check_one_of,
    extras_of,
    in_panel,
    parse_folds,
    parse_heights,
    parse_kinds,
    settings_of,
)
from medseg.cli.remote import Authority, Credentials, PlainHttp, Push, Remote, fetched
from medseg.cli.show import (
    Course,
    bar_of_scan,
    explain,
    json_progress,
    print_json,
    print_table,
    tell,
    tell_event,
)
from medseg.errors import BadConfig, BadOutput, DeviceFailed, Interrupted, MedsegError
from medseg.machine import keep_memory

if TYPE_CHECKING:
    from medseg.inference import Extras, Job, Model as Loaded, Settings


def infer(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="SCAN...", help="Scans, folders, DICOM folders, or dicomweb://..."),
    ],
    output: Annotated[
        str | None,  # as it was typed, because a path loses the / at its end
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A file (its suffix is the format) or a folder. Default: SCAN_seg.nii.gz.",
        ),
    ] = None,
    model: Model = None,
    roi: Roi = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", help="Also draw slices with labels (a folder for several scans)."
        ),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip scans that have a result.")
    ] = False,
    *,
    results: Results,
    at: Annotated[
        str | None,
        in_panel(
            Results.PANEL,
            metavar="MM,MM",
            help=(
                "Areas of all structures in the axial slices at these heights (mm along S, as"
                " viewers show them), e.g. --at=-120.5,30."
            ),
        ),
    ] = None,
    table: Annotated[
        Path | None,
        in_panel(
            Results.PANEL,
            metavar="TABLE",
            help=(
                "Names and colours of the labels by this table, such as FreeSurferColorLUT.txt,"
                " where it has them."
            ),
        ),
    ] = None,
    network: Network,
    force: Annotated[
        bool,
        in_panel(
            Network.PANEL, "--force", help="Also where the model makes no sense for the scan."
        ),
    ] = False,
    strict: Annotated[
        bool,
        in_panel(Network.PANEL, "--strict", help="Exit with 8 if there are doubts about a result."),
    ] = False,
    reading: Reading,
    series: Series = None,
    channel: Annotated[
        list[Path] | None,
        in_panel(
            Reading.PANEL,
            metavar="SCAN",
            help=(
                "The next channel of a model that takes several, in its order; again for more. Not"
                " needed for files called CASE_0000, CASE_0001 ... or for one 4-D file."
            ),
        ),
    ] = None,
    nnunet: OfNnunet,
    dicom: Dicom,
    push: Push = False,
    credentials: Credentials = None,
    authority: Authority = None,
    plain_http: PlainHttp = False,
    progress: Annotated[
        str,
        in_panel(
            Telling.PANEL,
            metavar="auto|json",
            help="json: a line of JSON on stderr for every step.",
        ),
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment scans: a label map on each scan's own grid, and beside it the label table
    (.labels.csv) and the run record (.json). Of DICOM, OUTPUT.dcm is a DICOM segmentation and
    OUTPUT.rtstruct.dcm a structure set.

    Examples:
    medseg infer scan.nii.gz
    medseg infer scans/ -o labels/ --model brain-fast
    """
    from medseg import inference
    from medseg.labels import LabelTable

    check_choices(network, nnunet, dicom)
    check_one_of("--progress", progress, ("auto", "json"))
    if push and dicom.deidentify:
        raise BadConfig("--push puts results into the study, --deidentify out of it; choose one")
    _ = network.max_memory_bytes  # a size that is none is wrong usage before a model is read
    extras = extras_of(
        reading=reading, dicom=dicom, results=results, series=series, preview=preview,
        force=force, at_mm=parse_heights(at), table=LabelTable.read(table) if table else None,
    )  # fmt: skip
    names = _model_names(
        model, roi=roi, labels=results.probabilities, channels=channel, also=results.also
    )
    segmenter = inference.load_model(
        *names, folds=parse_folds(nnunet.folds), checkpoint=nnunet.checkpoint
    )
    settings = settings_of(segmenter, network=network, nnunet=nnunet, results=results, roi=roi)
    inference.check_also(segmenter, extras.also)
    from_pacs = fetched(
        inputs, Path(output) if output else None, push=push, credentials=credentials,
        authority=authority, plain_http=plain_http, quiet=quiet,
    )  # fmt: skip
    with from_pacs as remote:
        jobs = inference.list_jobs(
            remote.inputs, remote.output, names=inference.channel_names(segmenter),
            channels=channel or (), is_folder=(output or "").endswith(("/", os.sep)),
        )  # fmt: skip
        work = _Work(
            model=segmenter, settings=settings, extras=extras, remote=remote, several=len(jobs) > 1,
            skip_existing=skip_existing, json_progress=progress == "json", as_json=as_json,
            quiet=quiet, strict=strict,
        )  # fmt: skip
        work.do_all(jobs)


def _model_names(
    model: Sequence[str] | None,
    *,
    roi: str | None,
    labels: str | None,
    channels: Sequence[Path] | None,
    also: str,
) -> list[str]:
    """The models asked for; none where the scan decides. Who asks for labels of a brain, its masks
    or further channels means `brain`, and who names what `ct-tissues` finds means that.
    """
    from medseg.inference import CT_TISSUES, names_tissues

    if model:
        return list(model)
    structures = [one for text in (roi, labels) if text for one in text.split(",")]
    if structures and names_tissues(structures):
        return [CT_TISSUES]
    of_brain = [kind for kind in parse_kinds(also) if kind in _OF_A_BRAIN]
    return ["brain"] if roi or labels or channels or of_brain else []


#: What `--also` may ask for that only a brain has.
_OF_A_BRAIN = ("brain-mask", "intracranial-mask", "stripped", "tissue")
#: The exit code of `--strict` where a record holds doubts.
_DOUBTS = 8


@dataclass(frozen=True, kw_only=True)
class _Work:
    """How scans are segmented, and what is shown of it."""

    model: Loaded
    settings: Settings
    extras: Extras
    remote: Remote
    several: bool
    skip_existing: bool
    json_progress: bool
    as_json: bool
    quiet: bool
    strict: bool

    def do_all(self, jobs: Sequence[Job]) -> None:
        """Do every job; what fails in one of several is told, and the others are done. The last
        lines name them.
        """
        from medseg.inference import models_kept_open

        jobs = [self._checked(job) for job in jobs]
        keep_memory()
        failures: list[str] = []
        exit_code = 0
        doubtful = False
        course = Course(len(jobs))
        with models_kept_open():
            for number, job in enumerate(jobs):
                try:
                    doubtful |= self.do(job, course)
                except (DeviceFailed, Interrupted, BrokenPipeError):
                    raise
                except Exception as error:  # whatever it is, it is the failure of this scan
                    if not self.several:
                        raise
                    text, code = explain(error)
                    print(text, file=sys.stderr)
                    failures.append(str(self.remote.name(job.scan)))
                    exit_code = exit_code or code
                self._tell_course(course, number + 1)
        if failures:
            tell(f"medseg: {len(failures)} of {len(jobs)} scans failed:")
            for name in failures:
                tell(f"  {name}")
            raise typer.Exit(exit_code)
        if self.strict and doubtful:
            raise typer.Exit(_DOUBTS)

    def _checked(self, job: Job) -> Job:
        """The job, with what would keep its results from being written as its problem; of a single
        one it is raised.
        """
        from medseg.inference import check_job

        if (
            self.extras.preview
            and not self.several
            and self.extras.preview.suffix.lower() != ".png"
        ):
            raise BadOutput(
                f"{self.extras.preview}: a preview is a picture; give a name that ends in .png"
            )
        if job.problem is not None:
            return job
        try:
            check_job(job, self.settings, self._extras_of(job))
        except BadConfig:
            raise  # what was asked for contradicts itself, whatever the scan
        except MedsegError as error:
            if not self.several:
                raise
            return replace(job, problem=error)
        return job

    def _tell_course(self, course: Course, done: int) -> None:
        """Of several scans, how many are done and how long the others will take."""
        course.at(done)
        if not self.several or done == course.total:
            return
        if self.json_progress:
            tell_event(event="scans", done=done, total=course.total)
        else:
            tell(course.words("scans"), self.quiet)

    def do(self, job: Job, course: Course) -> bool:
        """Segment one scan, send its results on if that was asked for, and show them; whether its
        record holds doubts.
        """
        from medseg.inference import infer as infer_scan, why_again

        name, extras = self.remote.name(job.scan), self._extras_of(job)
        if self.skip_existing and job.problem is None:
            reason = why_again(job, self.model, self.settings, extras=extras)
            if not reason:
                tell(f"{name}: {job.labels} is there, skipped", self.quiet)
                return False
            if job.labels.exists():
                tell(f"{name}: {job.labels} is there and is made again: {reason}", self.quiet)
        where = f"scan {course.done + 1} of {course.total}" if self.several else ""
        display = (
            json_progress(name) if self.json_progress else bar_of_scan(self.quiet, name, where)
        )
        with display as (announce, progress):
            content = infer_scan(
                job, self.model, self.settings, extras, announce=announce, progress=progress
            )
        self.remote.send(job, extras.also)
        for text in content["warnings"]:
            tell(f"warning: {name}: {text}")
        for text in content["notes"]:
            tell(f"note: {name}: {text}", self.quiet)
        _show_result(self.remote.name(job.labels), content, self.as_json)
        return bool(content.get("doubts"))

    def _extras_of(self, job: Job) -> Extras:
        """Those of one scan: of several, each gets a picture of its own."""
        from medseg.io import strip_suffix

        if self.extras.preview is None or not self.several:
            return self.extras
        return replace(self.extras, preview=self.extras.preview / f"{strip_suffix(job.labels)}.png")


#: What may be measured of structures, and the head of its column.
_MEASURED = {"mean_hu": "mean HU", "laa_950_percent": "LAA-950 %"}


def _show_result(labels: Path | str, content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"labels": str(labels)} | content)
        return
    measures = [
        name
        for name in _MEASURED
        if any(name in row for row in (*content["structures"], *content.get("totals", ())))
    ]
    structures = content["structures"] + (content.get("totals", []) if measures else [])
    rows = [
        (
            str(row.get("value", "")),
            row["name"],
            f"{row['ml']:.2f}",
            *(f"{row[name]:g}" if name in row else "" for name in measures),
        )
        for row in structures
    ]
    seconds = sum(content["seconds"].values())
    peak = content["peak_memory_bytes"] / 1e9
    print_table(
        f"{labels}  ({seconds:.1f} s, {peak:.1f} GB)",
        ("label", "structure", "mL", *(_MEASURED[name] for name in measures)),
        rows,
        right=(0, 2, 3, 4),
    )
    for level in content.get("levels", []):
        rows = [(one["name"], f"{one['cm2']:.2f}") for one in level["structures"] if one["cm2"]]
        title = f"slice {level['slice']} at {level['mm']:g} mm"
        print_table(title, ("structure", "cm2"), rows, right=(1,))
