"""`medseg export`: parse, call, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Json, Quiet
from medseg.cli.show import print_line, tell


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A name from `medseg models`, a model or run folder."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A name that ends in .onnx. Default: NAME.onnx."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model's network as ONNX, for other programs: and beside it as JSON what happens
    before and after it.

    The result is run and compared with PyTorch where onnxruntime or OpenVINO is installed.

    Example:
    medseg export brain -o brain.onnx
    """
    import json

    from medseg.inference import export as run
    from medseg.models import load_checkpoint

    checkpoint = load_checkpoint(model)
    done = run(checkpoint, output or Path(f"{checkpoint.spec.name}.onnx"))
    if as_json:
        facts = {
            "network": str(done.network),
            "description": str(done.description),
            "any_batch": done.any_batch,
        }
        print(json.dumps(facts | {"runtime": done.runtime, "difference": done.difference}))
        return
    for path in (done.network, done.description):
        print_line(path)
    if quiet:
        return
    if done.runtime:
        text = (
            f"checked with {done.runtime}: its logits differ from PyTorch's by"
            f" {done.difference:.0e} of their spread"
        )
    else:
        text = "not run, because neither onnxruntime nor openvino is installed"
    tell(text)
