"""`medseg infer`: parse, call, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    Series,
    Suv,
    VolumeIndex,
    check_one_of,
    parse_bytes,
    parse_folds,
    parse_values,
)
from medseg.cli.remote import Authority, Credentials, PlainHttp, Push, fetched
from medseg.cli.show import bar_of_scan, json_progress, print_table, tell
from medseg.errors import BadOutput, Interrupted, MedsegError
from medseg.memory import keep_memory


def infer(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="SCAN...", help="Scans, folders of scans, DICOM folders, or dicomweb://...")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file (its suffix is the format) or a folder. Default: SCAN_seg.nii.gz."),
    ] = None,
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="A name from `medseg models`, a model folder, or a folder or zip of nnU-Net; several are averaged.",
        ),
    ] = ["brain"],  # noqa: B006
    channel: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SCAN",
            help="The next channel of a model that takes several, in its order; again for more. Not needed for files "
            "called CASE_0000, CASE_0001 ... or for one 4-D file.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the network runs.")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16", help="Arithmetic of the network.")] = "auto",
    backend: Annotated[str, typer.Option(metavar="auto|torch|openvino", help="What runs the network.")] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Use no more than this, e.g. 4GB; may take longer.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share by which windows overlap. Default: 0.5, or the model's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=0, help="Windows at a time; 0: what suits the device.")] = 0,
    tta: Annotated[
        bool | None,
        typer.Option(
            "--tta/--no-tta",
            help="Also predict mirrored, along the axes the model allows; slower. Default: no; models of nnU-Net as "
            "they were trained with --exact and on a GPU.",
        ),
    ] = None,
    exact: Exact = False,
    folds: Folds = None,
    checkpoint_name: CheckpointName = "final",
    orientation: Orientation = "auto",
    postprocess: Postprocess = False,
    roi: Roi = None,
    probabilities: Annotated[
        str | None, typer.Option(metavar="LABELS", help="Also write probabilities of these labels, e.g. 17,53.")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write how unsure the model is, 0 to 1.")
    ] = False,
    cleanup: Annotated[bool, typer.Option("--cleanup/--no-cleanup", help="Clean up as the model says.")] = True,
    instances: Annotated[
        bool, typer.Option("--instances", help="Also number separate objects; the record gets their boxes.")
    ] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Skip scans that have a result.")] = False,
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also draw slices with labels (a folder for several scans).")
    ] = None,
    volume: VolumeIndex = None,
    assume_geometry: AssumeGeometry = None,
    series: Series = None,
    repair: Repair = False,
    suv: Suv = False,
    also: Annotated[
        str,
        typer.Option(
            "--also",
            metavar="KINDS",
            help="Also write these: of DICOM seg,rtstruct,sr; "
            "of a brain brain-mask,intracranial-mask,stripped,tissue,volumes.",
        ),
    ] = "",
    seg_type: SegType = "binary",
    deidentify: Deidentify = False,
    deterministic: Deterministic = False,
    push: Push = False,
    credentials: Credentials = None,
    authority: Authority = None,
    plain_http: PlainHttp = False,
    show_progress: Annotated[
        str, typer.Option("--progress", metavar="auto|json", help="json: a line of JSON on stderr for every step.")
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment scans.

    Writes a label map on each scan's own grid, and beside it the label table (.labels.csv) and the run record (.json).
    Of DICOM, OUTPUT.dcm is a DICOM segmentation and OUTPUT.rtstruct.dcm a structure set.
    """
    from medseg.inference import (
        BRAIN_RESULTS,
        DICOM_RESULTS,
        Extras,
        Settings,
        channel_names,
        check_also,
        check_output,
        infer as infer_scan,
        labels_named,
        list_jobs,
        load_model,
    )
    from medseg.io import DicomOptions

    check_one_of("--device", device, ("auto", "cpu", "cuda"))
    check_one_of("--precision", precision, ("auto", "fp32", "bf16", "fp16"))
    check_one_of("--seg-type", seg_type, ("binary", "labelmap"))
    extra_kinds = tuple(kind.strip().lower() for kind in also.split(",") if kind.strip())
    for kind in extra_kinds:
        check_one_of("--also", kind, (*DICOM_RESULTS, *BRAIN_RESULTS))
    check_one_of("--progress", show_progress, ("auto", "json"))
    check_one_of("--backend", backend, ("auto", "torch", "openvino"))
    check_one_of("--orientation", orientation, ("auto", "stored", "RAS", "LPS", "LAS"))
    check_one_of("--checkpoint", checkpoint_name, ("final", "best", "latest"))
    checkpoint = load_model(*model, folds=parse_folds(folds), checkpoint=checkpoint_name)
    check_also(checkpoint, extra_kinds)
    from_pacs = fetched(inputs, output, push, credentials, authority, plain_http, quiet)
    with from_pacs as remote:
        work = list_jobs(remote.inputs, remote.output, names=channel_names(checkpoint), channels=channel or ())
        if preview and len(work) == 1 and preview.suffix.lower() != ".png":
            raise BadOutput(f"{preview}: a preview is a picture; give a name that ends in .png")
        for job in work:
            check_output(job, extra_kinds)
        keep_memory()
        settings = Settings(
            device,
            precision,
            overlap,
            cleanup,
            backend,
            batch,
            tta,
            parse_bytes(max_memory, "--max-memory") if max_memory else None,
            parse_values(probabilities) if probabilities else (),
            uncertainty,
            exact=exact,
            orientation=orientation,
            postprocess=postprocess,
            roi=labels_named(checkpoint, roi.split(",")) if roi else (),
        )
        failures: list[MedsegError] = []
        for job in work:
            if skip_existing and job.labels.exists():
                tell(f"{remote.name(job.scan)}: {job.labels} is there, skipped", quiet)
                continue
            picture = preview / f"{job.labels.name.split('.')[0]}.png" if preview and len(work) > 1 else preview
            extras = Extras(
                picture, instances, volume, assume_geometry, series, repair, suv, extra_kinds,
                DicomOptions(seg_type=seg_type, deidentify=deidentify, deterministic=deterministic),
            )  # fmt: skip
            try:
                name = remote.name(job.scan)
                shown = json_progress(name) if show_progress == "json" else bar_of_scan(quiet, name)
                with shown as (announce, progress):
                    content = infer_scan(job, checkpoint, settings, extras, announce=announce, progress=progress)
            except Interrupted:
                raise
            except MedsegError as error:
                if len(work) == 1:
                    raise
                tell(f"medseg: {error}")
                failures.append(error)
                continue
            remote.send(job, extra_kinds)
            for text in content["warnings"]:
                tell(f"warning: {remote.name(job.scan)}: {text}")
            for text in content["notes"]:
                tell(f"note: {remote.name(job.scan)}: {text}", quiet)
            _show_result(remote.name(job.labels), content, as_json)
        if failures:
            tell(f"medseg: {len(failures)} of {len(work)} scans failed")
            raise typer.Exit(failures[0].exit_code)


def _show_result(labels: Path | str, content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"labels": str(labels)} | content))
        return
    rows = [(str(s["value"]), s["name"], f"{s['ml']:.2f}") for s in content["structures"]]
    seconds = sum(content["seconds"].values())
    peak = content["peak_memory_bytes"] / 1e9
    print_table(f"{labels}  ({seconds:.1f} s, {peak:.1f} GB)", ("label", "structure", "mL"), rows, right=(0, 2))
