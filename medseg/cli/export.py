"""`medseg export`: parse, call, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Json, Quiet
from medseg.cli.show import print_line, tell
from medseg.errors import BadConfig


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A name from `medseg models`, a model or run folder."),
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model's network as ONNX, for other programs: and beside it as JSON what happens
    before and after it.

    The result is run and compared with PyTorch where onnxruntime or OpenVINO is installed. A bundle
    runs in MONAI without medseg; models trained with --set model.recipe=monai give the same labels
    there.

    Example:
    medseg export brain -o brain.onnx
    """
    import json

    if monai_bundle is None and scan:
        raise BadConfig("--scan goes with --monai-bundle")
    if monai_bundle is not None and (torchscript or output):
        raise BadConfig("--monai-bundle names the folder, and goes without -o and --torchscript")
    if monai_bundle is not None:
        _export_bundle(model, monai_bundle, scan or [], as_json=as_json, quiet=quiet)
        return
    if torchscript:
        _export_torchscript(model, output, as_json=as_json, quiet=quiet)
        return
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
