"""The command view: a page, a scene for 3D Slicer or a contact sheet of a scan and its labels.
Registered by `app`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.cli.options import AssumeGeometry, Quiet, Table, Volume as VolumeIndex, in_panel
from medseg.cli.show import print_line, tell
from medseg.errors import BadConfig, BadFile, BadOutput, Interrupted

if TYPE_CHECKING:
    from medseg.labels import LabelTable
    from medseg.volume import Volume

_PAGE, _SCENE, _SHEET = ".html", ".mrb", ".png"
_MODULE = Path(__file__).parents[1] / "view" / "slicer" / "MedSeg"


_SHOWN, _MORE = "The page in the browser", "What is shown"


def view(
    scan: Annotated[
        Path | None, typer.Argument(metavar="SCAN", help="A scan, or a DICOM folder.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Argument(metavar="LABELS", help="Its label map. Default: SCAN_seg beside the scan."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A page .html, a Slicer scene .mrb or a picture .png. Default: a page.",
        ),
    ] = None,
    table: Table = None,
    title: Annotated[
        str,
        in_panel(
            _MORE,
            metavar="TEXT",
            help="What the page or the scan in Slicer is called; it names nobody.",
        ),
    ] = "",
    open_: Annotated[
        bool, in_panel(_SHOWN, "--open", help="Open the page in the browser.")
    ] = False,
    serve: Annotated[
        bool,
        in_panel(
            _SHOWN,
            "--serve",
            help="Show the scan in full from this machine until Ctrl-C; write no page.",
        ),
    ] = False,
    port: Annotated[
        int,
        in_panel(_SHOWN, min=0, max=65535, metavar="N", help="Of --serve. Default: a free one."),
    ] = 0,
    slicer: Annotated[
        bool, typer.Option("--slicer", help="Write a scene for 3D Slicer (.mrb).")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the slices that matter as a picture.")
    ] = None,
    slicer_module: Annotated[
        bool,
        in_panel(
            _MORE,
            "--slicer-module",
            help=(
                "Print the folder of the module for 3D Slicer, and end. It goes into Edit >"
                " Application Settings > Modules > Additional module paths."
            ),
        ),
    ] = False,
    volume: VolumeIndex = None,
    assume_geometry: AssumeGeometry = None,
    quiet: Quiet = False,
) -> None:
    """Look at a scan with its labels over it: one page that needs no network, a scene for 3D
    Slicer, or a picture.

    The page holds the scan, so treat it like the scan itself.

    Examples:
    medseg view scan.nii.gz
    medseg view scan.nii.gz labels.nii.gz --png slices.png
    """
    if slicer_module:
        print(_MODULE)
        return
    if scan is None:
        raise typer.BadParameter("give a scan, e.g. medseg view scan.nii.gz", param_hint="SCAN")
    if not scan.exists():
        raise BadFile(f"{scan}: there is no such file or folder; check the name")
    labels = labels or find_labels(scan)
    target = _target(
        scan, labels, output, slicer=slicer, other=serve or (png is not None and not open_)
    )
    _check_names(target, png, open_)
    from medseg.evaluation import find_table
    from medseg.io import read, read_labels

    volumes = read(scan, volume_index=volume, assume_geometry=assume_geometry), read_labels(labels)
    label_table = find_table(table, labels, labels)
    for path in (target, png):
        if path is not None:
            _write(path, *volumes, label_table, title)
            print_line(path)
    if serve:
        _serve(*volumes, label_table, title, port, open_, quiet)
    elif open_ and target:
        _open(target.resolve().as_uri())


def _check_names(target: Path | None, png: Path | None, open_: bool) -> None:
    if open_ and target and target.suffix.lower() != _PAGE:
        raise BadConfig("--open shows a page in the browser; leave it out, or write a page")
    if png and png.suffix.lower() != _SHEET:
        raise BadOutput(f"{png}: a contact sheet is a picture; give a name that ends in .png")


def find_labels(scan: Path) -> Path:
    """The label map that `medseg infer` wrote beside a scan. Raises `BadFile` if there is none."""
    from medseg.inference import given_name
    from medseg.io import WRITERS

    folder = scan.parent if scan.name not in ("", "..") else scan.resolve().parent
    stem = given_name(scan)
    # A channel's number is left out of the name of a result.
    stems = [
        stem,
        stem.removesuffix("_0000"),
    ]
    names = [f"{one}_seg{suffix}" for one in dict.fromkeys(stems) for suffix in WRITERS]
    for name in [*names, f"{stem}.seg.nrrd"]:
        if (folder / name).is_file():
            return folder / name
    raise BadFile(
        f"{scan}: no {stem}_seg.nii.gz lies beside it; name the label map, or run medseg infer"
        " first"
    )


def _target(
    scan: Path, labels: Path, output: Path | None, *, slicer: bool, other: bool
) -> Path | None:
    """The page, scene or picture to write, if any; with `other` something else is wanted, so no
    page by default.
    """
    if output is None:
        if other and not slicer:
            return None
        from medseg.inference import given_name

        return labels.with_name(given_name(scan) + (_SCENE if slicer else f"_view{_PAGE}"))
    suffix = output.suffix.lower()
    if slicer and suffix != _SCENE:
        raise BadOutput(
            f"{output}: a scene for 3D Slicer is one file; give a name that ends in .mrb"
        )
    if suffix not in (_PAGE, _SCENE, _SHEET):
        raise BadOutput(
            f"{output}: give a name that ends in .html (a page), .mrb (3D Slicer) or .png (a"
            " picture)"
        )
    return output


def _write(path: Path, scan: Volume, labels: Volume, table: LabelTable | None, title: str) -> None:
    from medseg.view import full_table

    if path.suffix.lower() == _PAGE:
        from medseg.view import prepare, write_page

        write_page(path, prepare(scan, labels, table, title=title))
    elif path.suffix.lower() == _SCENE:
        from medseg.view import write_scene

        write_scene(path, scan, labels, table=full_table(labels, table), title=title)
    else:
        from medseg.view import labels_on_scan, write_preview

        on_grid = labels_on_scan(labels, scan)
        write_preview(path, scan, on_grid, table=full_table(labels, table))


def _serve(
    scan: Volume,
    labels: Volume,
    table: LabelTable | None,
    title: str,
    port: int,
    open_: bool,
    quiet: bool,
) -> None:
    from medseg.view import PageServer, prepare

    server = PageServer(prepare(scan, labels, table, title=title, max_voxels=None), port)
    try:
        print(server.address, flush=True)
        if not quiet:
            tell("Ctrl-C stops it; until then only this machine can see the page, at this address")
        if open_:
            _open(server.address)
        server.serve()
    except Interrupted as stop:
        if stop.exit_code != 130:  # Ctrl-C is how this is meant to end
            raise
    finally:
        server.close()


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        tell(f"no browser was found; open {address} yourself")
