"""`medseg export`: parse, call, show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Json, Quiet, in_panel
from medseg.cli.show import print_json, print_line, tell
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.text import counted

_SURFACES = "Surfaces of a label map"
_ENDINGS = {"--obj": (".obj",), "--gltf": (".glb", ".gltf")}


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL/LABELS", help="A model by name, a model folder, or a label map."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A name that ends in .onnx or, of TorchScript, .ts. Default: NAME.onnx.",
        ),
    ] = None,
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Write TorchScript instead, NAME.ts.")
    ] = False,
    monai_bundle: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a bundle of MONAI instead, to a new folder."),
    ] = None,
    scan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[,FILE]",
            help="With --monai-bundle: run both on this scan, and say how equal they are.",
        ),
    ] = None,
    stl: Annotated[
        Path | None,
        in_panel(_SURFACES, metavar="DIR", help="STL files, one a structure, into a folder."),
    ] = None,
    obj: Annotated[
        Path | None,
        in_panel(_SURFACES, metavar="FILE", help="One OBJ file, its colours beside it."),
    ] = None,
    gltf: Annotated[
        Path | None, in_panel(_SURFACES, metavar="FILE", help="One glTF file, .glb or .gltf.")
    ] = None,
    structures: Annotated[
        str | None,
        in_panel(
            _SURFACES, metavar="STRUCTURES", help="Only these, by name or number: liver,spleen."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        in_panel(
            _SURFACES,
            metavar="TABLE",
            help="Names and colours of the labels. Default: what lies beside them.",
        ),
    ] = None,
    triangles: Annotated[
        int | None,
        in_panel(
            _SURFACES,
            min=4,
            metavar="N",
            help="About so many in all. Default: as few as keep within a quarter of a voxel.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model's network as ONNX, or a label map as surfaces: for other programs.

    What happens before and after the network is written beside it as JSON, and it is compared with
    PyTorch where onnxruntime or OpenVINO is installed. A bundle runs in MONAI without medseg;
    models trained with --set model.recipe=monai give the same labels there.

    Examples:
    medseg export brain -o brain.onnx
    medseg export scan_seg.nii.gz --gltf brain.glb
    """
    named = {"--stl": stl, "--obj": obj, "--gltf": gltf}
    targets = {option: path for option, path in named.items() if path is not None}
    _check_kind(
        model,
        targets,
        of_model=[
            *(["-o"] if output else []),
            *(["--torchscript"] if torchscript else []),
            *(["--monai-bundle"] if monai_bundle else []),
            *(["--scan"] if scan else []),
        ],
        of_labels=[
            *(["--structures"] if structures is not None else []),
            *(["--table"] if table else []),
            *(["--triangles"] if triangles else []),
        ],
    )
    if targets:
        names = None if structures is None else structures.split(",")
        _export_surfaces(
            Path(model),
            list(targets.values()),
            names,
            table=table,
            triangles=triangles,
            shown=(as_json, quiet),
        )
    elif monai_bundle is None and scan:
        raise BadConfig("--scan goes with --monai-bundle")
    elif monai_bundle is not None and (torchscript or output):
        raise BadConfig("--monai-bundle names the folder, and goes without -o and --torchscript")
    elif monai_bundle is not None:
        _export_bundle(model, monai_bundle, scan or [], as_json=as_json, quiet=quiet)
    elif torchscript:
        _export_torchscript(model, output, as_json=as_json, quiet=quiet)
    else:
        _export_onnx(model, output, as_json=as_json, quiet=quiet)


def _check_kind(
    name: str, targets: Mapping[str, Path], *, of_model: Sequence[str], of_labels: Sequence[str]
) -> None:
    """Raise `BadConfig` where options of models and of label maps are mixed, or do not suit what is
    named.
    """
    if targets and of_model:
        first = next(iter(targets))
        raise BadConfig(
            f"{first} is for a label map and {of_model[0]} is for a model; give one of them"
        )
    for option, path in targets.items():
        endings = _ENDINGS.get(option)
        if endings and path.suffix.lower() not in endings:
            raise BadOutput(f"{path}: {option} writes a file that ends in {' or '.join(endings)}")
    if of_labels and not targets:
        raise BadConfig(
            f"{of_labels[0]} goes with --stl, --obj or --gltf, which say what is written"
        )
    if targets or of_model or not Path(name).is_file():
        return
    from medseg.io import is_readable_name

    if is_readable_name(Path(name)):
        raise BadConfig(
            f"{name}: is no model; the surfaces of a label map are written with --gltf FILE, --obj"
            " FILE or --stl FOLDER"
        )


def _export_surfaces(
    labels: Path,
    targets: Sequence[Path],
    names: Sequence[str] | None,
    *,
    table: Path | None,
    triangles: int | None,
    shown: tuple[bool, bool],
) -> None:
    from medseg.evaluation import find_table
    from medseg.io import read_labels
    from medseg.view import export_surfaces

    if not labels.exists():
        raise BadFile(f"{labels}: there is no such file; give a label map")
    volume, label_table = read_labels(labels), find_table(table, labels, labels)
    try:
        files, surfaces = export_surfaces(
            volume, targets, table=label_table, structures=names, max_triangles=triangles
        )
    except BadConfig as error:
        raise BadConfig(f"{labels}: {error}") from None
    as_json, quiet = shown
    if as_json:
        print_json(
            {
                "files": [str(file) for file in files],
                "structures": [surface.facts for surface in surfaces],
            }
        )
        return
    for file in files:
        print_line(file)
    if not quiet:
        count = sum(len(surface.triangles) for surface in surfaces)
        tell(f"{counted(len(surfaces), 'structure')}, {counted(count, 'triangle')}")


def _export_onnx(model: str, output: Path | None, *, as_json: bool, quiet: bool) -> None:
    import json

    from medseg.inference import export as run
    from medseg.models import load_checkpoint

    checkpoint = load_checkpoint(model)
    outcome = run(checkpoint, output or Path(f"{checkpoint.spec.name}.onnx"))
    if as_json:
        facts = {
            "network": str(outcome.network),
            "description": str(outcome.description),
            "any_batch": outcome.any_batch,
        }
        print(json.dumps(facts | {"runtime": outcome.runtime, "difference": outcome.difference}))
        return
    for path in (outcome.network, outcome.description):
        print_line(path)
    if quiet:
        return
    if outcome.runtime:
        text = (
            f"checked with {outcome.runtime}: its logits differ from PyTorch's by"
            f" {outcome.difference:.0e} of their spread"
        )
    else:
        text = "not run, because neither onnxruntime nor openvino is installed"
    tell(text)


def _export_bundle(
    model: str, folder: Path, scans: list[str], *, as_json: bool, quiet: bool
) -> None:
    import json

    from medseg.inference import write_bundle
    from medseg.models import load_single

    cases = [[Path(path) for path in text.split(",")] for text in scans]
    written = write_bundle(load_single(model), folder, cases)
    if as_json:
        facts = {"bundle": str(folder), "scans": written.scans, "equal": written.equal}
        print(json.dumps(facts | {"notes": list(written.notes)}))
        return
    print_line(folder)
    if quiet:
        return
    for note in written.notes:
        tell(note)
    if written.equal is not None:
        tell(f"of the scans' voxels {written.equal:.4%} have the same label in MONAI")
    elif not scans:
        tell("not run in MONAI; --scan FILE says how equal its labels are")
    else:
        tell('not run in MONAI, which is not installed: pip install "medseg[monai]"')


def _export_torchscript(model: str, output: Path | None, *, as_json: bool, quiet: bool) -> None:
    import json

    from medseg.inference import write_torchscript
    from medseg.models import load_single

    checkpoint = load_single(model)
    path = output or Path(f"{checkpoint.spec.name}.ts")
    difference = write_torchscript(checkpoint, path)
    if as_json:
        print(json.dumps({"network": str(path), "difference": difference}))
        return
    print_line(path)
    if not quiet:
        tell(f"checked: its logits differ from PyTorch's by {difference:.0e} of their spread")
