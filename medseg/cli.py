"""The command line: parse, call one function, show what came back, map errors to exit codes.

Results go to stdout (`--json` for machines), progress, announcements and warnings to stderr. Exit codes: 0 done,
1 other failure, 2 wrong usage, 3 bad input file, 4 output cannot be written, 5 bad settings, 6 bad model,
7 not enough memory, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg import cli_check, cli_evaluate, cli_export, cli_pacs, cli_train, cli_view
from medseg.cli_evaluate import Json, Quiet
from medseg.cli_train import parse_bytes
from medseg.errors import BadFile, BadOutput, DataWarning, Interrupted, MedsegError
from medseg.memory import keep_memory

if TYPE_CHECKING:
    from medseg.io.dicom.volumes import Listed

app = typer.Typer(
    name="medseg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Segment medical images: one command from a scan to labels you can trust.",
    epilog="Nothing is sent anywhere: only listen, and infer where you name a PACS, open a network connection.",
)

VolumeIndex = Annotated[
    int | None, typer.Option("--volume", min=0, help="Which volume of a file that holds several, from 0.")
]
AssumeGeometry = Annotated[
    str | None,
    typer.Option(metavar="sform|qform|pixdim", help="What to trust where a header contradicts itself or says nothing."),
]
Series = Annotated[
    str | None,
    typer.Option(metavar="N|N.M|UID", help="Which volume of DICOM that holds several, as `medseg info` numbers them."),
]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair", help="Resample DICOM with missing, doubled or uneven slices, or gantry tilt, to an even grid."
    ),
]
SegType = Annotated[
    str, typer.Option("--seg-type", metavar="binary|labelmap", help="DICOM SEG: bit planes, or smaller and newer.")
]
Deidentify = Annotated[
    bool, typer.Option("--deidentify", help="DICOM results without patient and study; their UIDs are replaced.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="DICOM results with the same UIDs and dates in every run.")
]
Suv = Annotated[bool, typer.Option("--suv", help="Read DICOM PET as standardised uptake values by body weight.")]


def main() -> None:
    """Run the command line and exit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, _interrupt)
    warnings.showwarning = _show_warning
    try:
        app()
    except MedsegError as error:
        print(f"medseg: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MemoryError:
        print("medseg: there is not enough memory for this; close other programs or crop the scan", file=sys.stderr)
        sys.exit(7)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        print(_unforeseen(error), file=sys.stderr)
        sys.exit(1)


def _unforeseen(error: Exception) -> str:
    """What to say of an error in medseg itself: where it is. What it says may quote a header, and so a patient."""
    from traceback import extract_tb

    frames = [f"  {'/'.join(Path(f.filename).parts[-2:])}, line {f.lineno}" for f in extract_tb(error.__traceback__)]
    lines = [f"medseg: stopped by an error of its own ({type(error).__name__}); please report it with these lines:"]
    return "\n".join(lines + frames)


@app.command()
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
        typer.Option("--model", "-m", help="A name from `medseg models`, or a model folder; several are averaged."),
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
    overlap: Annotated[float, typer.Option(min=0, max=0.9, help="Share by which windows overlap.")] = 0.5,
    batch: Annotated[int, typer.Option(min=0, help="Windows at a time; 0: what suits the device.")] = 0,
    tta: Annotated[
        bool, typer.Option("--tta/--no-tta", help="Also predict mirrored, along the axes the model allows; slower.")
    ] = False,
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
    push: cli_pacs.Push = False,
    credentials: cli_pacs.Credentials = None,
    authority: cli_pacs.Authority = None,
    plain_http: cli_pacs.PlainHttp = False,
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
    from medseg.inference import run as run_module
    from medseg.inference.jobs import Extras, jobs
    from medseg.inference.results import BRAIN_RESULTS, DICOM_RESULTS, check_also, check_output
    from medseg.inference.run import load_model
    from medseg.inference.settings import Settings, channel_names
    from medseg.io import DicomOptions

    _one_of("--device", device, ("auto", "cpu", "cuda"))
    _one_of("--precision", precision, ("auto", "fp32", "bf16", "fp16"))
    _one_of("--seg-type", seg_type, ("binary", "labelmap"))
    extra_kinds = tuple(kind.strip().lower() for kind in also.split(",") if kind.strip())
    for kind in extra_kinds:
        _one_of("--also", kind, (*DICOM_RESULTS, *BRAIN_RESULTS))
    _one_of("--progress", show_progress, ("auto", "json"))
    _one_of("--backend", backend, ("auto", "torch", "openvino"))
    checkpoint = load_model(*model)
    check_also(checkpoint, extra_kinds)
    from_pacs = cli_pacs.fetched(inputs, output, push, credentials, authority, plain_http, quiet)
    with from_pacs as remote:
        work = jobs(remote.inputs, remote.output, names=channel_names(checkpoint), channels=channel or ())
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
            _values(probabilities) if probabilities else (),
            uncertainty,
        )
        failures: list[MedsegError] = []
        for job in work:
            if skip_existing and job.labels.exists():
                _say(f"{remote.name(job.scan)}: {job.labels} is there, skipped", quiet)
                continue
            picture = preview / f"{job.labels.name.split('.')[0]}.png" if preview and len(work) > 1 else preview
            extras = Extras(
                picture, instances, volume, assume_geometry, series, repair, suv, extra_kinds,
                DicomOptions(seg_type, deidentify, deterministic),
            )  # fmt: skip
            try:
                name = remote.name(job.scan)
                shown = _json_progress(name) if show_progress == "json" else _progress(quiet, name)
                with shown as (announce, progress):
                    content = run_module.infer(job, checkpoint, settings, extras, announce=announce, progress=progress)
            except Interrupted:
                raise
            except MedsegError as error:
                if len(work) == 1:
                    raise
                print(f"medseg: {error}", file=sys.stderr)
                failures.append(error)
                continue
            remote.send(job, extra_kinds)
            for text in content["warnings"]:
                print(f"warning: {remote.name(job.scan)}: {text}", file=sys.stderr)
            for text in content["notes"]:
                _say(f"note: {remote.name(job.scan)}: {text}", quiet)
            _show_result(remote.name(job.labels), content, as_json)
        if failures:
            print(f"medseg: {len(failures)} of {len(work)} scans failed", file=sys.stderr)
            raise typer.Exit(failures[0].exit_code)


@app.command()
def convert(
    path: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A scan, a label map, a DICOM folder, DICOM SEG or RTSTRUCT.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Where to; the suffix decides the format.")],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="Names and colours for .seg.nrrd and .dcm: .csv, .ctbl or dseg .tsv."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(metavar="DICOM", help="The DICOM images that DICOM labels are about.")
    ] = None,
    segment: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|NUMBER", help="Only this of a DICOM SEG or RTSTRUCT; again for more, laid on top."),
    ] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Put labels of another grid on the source's by nearest neighbour.")
    ] = False,
    volume: VolumeIndex = None,
    assume_geometry: AssumeGeometry = None,
    series: Series = None,
    repair: Repair = False,
    suv: Suv = False,
    seg_type: SegType = "binary",
    deidentify: Deidentify = False,
    deterministic: Deterministic = False,
) -> None:
    """Convert a volume to another format; voxels and geometry stay as they are.

    OUTPUT.dcm is a DICOM segmentation and OUTPUT.rtstruct.dcm a structure set, of the series given with --source.
    """
    from medseg.io import DicomOptions, Overlap, embedded_table, label_kind, read, read_masks, write
    from medseg.io.slicer import write_segments
    from medseg.labels import LabelTable

    _one_of("--seg-type", seg_type, ("binary", "labelmap"))
    table = LabelTable.read(labels) if labels else embedded_table(path)
    chosen = series if source is None or label_kind(path) else None
    try:
        scan = read(
            path,
            volume_index=volume,
            assume_geometry=assume_geometry,
            series=chosen,
            repair=repair,
            suv=suv,
            source=source,
            segments=segment,
        )
    except Overlap:
        if not target.name.lower().endswith(".seg.nrrd"):
            raise
        write_segments(read_masks(path, source=source, series=series), target)
        return
    options = DicomOptions(seg_type, deidentify, deterministic, nearest, series=series)
    write(scan, target, table=table, source=source, options=options)


@app.command()
def info(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Scans, label maps, DICOM folders, zips and DICOMDIRs.")
    ],
    volume: VolumeIndex = None,
    assume_geometry: AssumeGeometry = None,
    series: Series = None,
    repair: Repair = False,
    suv: Suv = False,
    as_json: Json = False,
) -> None:
    """Say what is in a file: grid, orientation, intensities. DICOM with several volumes is listed."""
    import json

    from medseg.inference.record import describe
    from medseg.io import embedded_table, label_kind, read

    for path in paths:
        if kind := label_kind(path):
            table = embedded_table(path)
            assert table is not None
            if as_json:
                print(json.dumps({"file": str(path), "kind": kind, "segments": table.names}))
            else:
                rows = [(str(value), name) for value, name in table.names.items()]
                _print_table(f"{path}: DICOM {kind}", ("number", "structure"), rows, right=(0,))
            continue
        if series is None and volume is None and (found := _several_volumes(path)):
            _print_volumes(path, found, as_json)
            continue
        scan = read(path, volume_index=volume, assume_geometry=assume_geometry, series=series, repair=repair, suv=suv)
        facts = describe(scan) | {
            "affine": scan.affine.tolist(),
            "minimum": float(scan.data.min()),
            "maximum": float(scan.data.max()),
            "ml": round(scan.voxel_mm3 * scan.data.size / 1000, 3),
        }
        if as_json:
            print(json.dumps({"file": str(path)} | facts))
        else:
            _print_table(str(path), ("", ""), [(key, _plain(value)) for key, value in facts.items()])


@app.command()
def models(as_json: Json = False) -> None:
    """List the models that come with medseg."""
    import json

    from medseg.inference.intensity import INTENSITY_MODELS
    from medseg.models.folder import bundled_models, load_checkpoint

    rows = []
    for name in bundled_models():
        spec = load_checkpoint(name).spec
        rows.append({"name": name, "structures": len(spec.classes) - 1, "about": spec.description})
    for name, (function, classes) in INTENSITY_MODELS.items():
        about = (function.__doc__ or "").split("\n")[0]
        rows.append({"name": name, "structures": classes - 1, "about": about})
    if as_json:
        print(json.dumps(rows))
    else:
        _print_table("Models", ("name", "structures", "about"), [tuple(map(str, row.values())) for row in rows])


@app.command()
def version() -> None:
    """Print medseg's version."""
    from importlib.metadata import version as installed

    print(installed("medseg"))


for _command in (
    cli_train.train, cli_check.check, cli_export.export, cli_evaluate.evaluate, cli_evaluate.compare,
    cli_evaluate.clean, cli_view.view, cli_pacs.listen,
):  # fmt: skip
    app.command()(_command)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"'{value}' is not one of {', '.join(allowed)}", param_hint=option)


def _values(text: str) -> tuple[int, ...]:
    """Label values such as 17,53."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise typer.BadParameter(f"'{text}' is not a list of label values such as 17,53", param_hint="--probabilities")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _show_result(labels: Path | str, content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"labels": str(labels)} | content))
        return
    rows = [(str(s["value"]), s["name"], f"{s['ml']:.2f}") for s in content["structures"]]
    seconds = sum(content["seconds"].values())
    peak = content["peak_memory_bytes"] / 1e9
    _print_table(f"{labels}  ({seconds:.1f} s, {peak:.1f} GB)", ("label", "structure", "mL"), rows, right=(0, 2))


def _several_volumes(path: Path) -> list[Listed]:
    """The volumes of DICOM that holds several, or none."""
    from medseg.io import is_dicom_source, list_volumes

    if not is_dicom_source(path):
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            found = list_volumes(path)
        except BadFile:  # `read` says why
            return []
    if len(found) < 2:  # what there is to say is said when it is read
        return []
    for warning in caught:
        _show_warning(warning.message, warning.category)
    return found


def _print_volumes(path: Path, found: Sequence[Listed], as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps({"file": str(path), "volumes": [asdict(volume) for volume in found]}))
        return
    rows = []
    for volume in found:
        spacing = " x ".join(f"{s:.3g}" for s in volume.spacing_mm) if volume.spacing_mm else ""
        state = volume.problem.removeprefix(f"{path}: ").split(";")[0] + (" (--repair)" if volume.repairable else "")
        rows.append(
            (volume.number, volume.modality, " x ".join(map(str, volume.shape)), spacing, volume.orientation, state)
        )
    title = f"{path}: {len(found)} volumes; choose one with --series"
    _print_table(title, ("series", "kind", "voxels", "mm", "axes", "cannot be read because"), rows)


def _print_table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(soft_wrap=False)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "\n".join(" ".join(f"{x:.6g}" for x in row) for row in value)
    return " x ".join(f"{x:.6g}" for x in value) if isinstance(value, list) else str(value)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


@contextmanager
def _progress(quiet: bool, scan: Path | str) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """Lines and a bar on stderr for one scan; nothing at all when quiet."""
    if quiet:
        yield (lambda text: None), (lambda what, done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    console = Console(stderr=True)
    shown = console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total if total > 1 else None)

        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        yield (lambda text: say(f"{scan}: {text}")), progress


@contextmanager
def _json_progress(scan: Path | str) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """What happens to one scan as lines of JSON on stderr, for programs; the same whole per cent is not said twice."""
    import json

    said: list[tuple[str, int]] = []

    def say(**event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)

    def progress(what: str, done: int, total: int) -> None:
        now = (what, 100 * done // max(total, 1))
        if said[-1:] != [now]:
            said.append(now)
            say(event="progress", what=what, done=done, total=total)

    yield (lambda text: say(event="announcement", scan=str(scan), text=text)), progress


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **named: object) -> None:
    """Our own warnings as one line; those of libraries are for developers and stay out of a user's way."""
    if issubclass(category, DataWarning):
        print(f"warning: {message}", file=sys.stderr)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


if __name__ == "__main__":
    main()
