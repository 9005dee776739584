"""A model as ONNX, for programs without PyTorch, and beside it as JSON all that happens before and
after the network.

The ONNX file holds the network of one checkpoint in float32: patches in, logits out, of the model's
own patch size and any number of patches at a time. It names no file, place or person of the machine
it was made on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadModel, BadOutput
from medseg.files import atomic_write
from medseg.inference.preprocess import SAME_SPACING
from medseg.inference.settings import Settings, mirror_axes
from medseg.inference.ways import CONTENT_ABOVE, CONTENT_MARGIN
from medseg.models import Checkpoint

if TYPE_CHECKING:
    from torch import nn

#: Logits of the exported network may differ from PyTorch's by this share of their spread.
TOLERANCE = 1e-3
#: One ONNX file cannot hold more (its format, protobuf, counts bytes in 31 bits).
MAX_BYTES = 2_000_000_000
#: What runs ONNX, tried in this order: name of the package and of a function below.
RUNTIMES = ("onnxruntime", "openvino")


#: What the schemes of `ModelSpec.intensity` do to a channel on the model's grid, for those who do
#: it elsewhere.
_HOW = {
    "percentiles": (
        "minus the value below which the darkest 1/2000 of the voxels lie, and those are 0; then,"
        " of the voxels above 0, the percentiles 0.5 and 99.5 become 0 and 1, and everything is"
        " clamped there"
    ),
    "zscore": (
        "minus the mean over the standard deviation of all voxels; with nonzero, of those that are"
        " not 0, and those that are stay 0"
    ),
    "ct": "clipped to low and high, minus mean, over sd",
}


#: How a scan comes to the model's grid and its labels back, for those who do it elsewhere.
_GRIDS = {
    "world": {
        "axes": (
            "along RAS, centred on the scan's corners in space; as many voxels as cover them,"
            " rounded up"
        ),
        "outside": "0; where air is not 0, the darkest voxel of the scan",
    },
    "scan": {
        "axes": (
            "the scan's own, permuted and flipped to the nearest RAS, centred on the scan; as many"
            " voxels as cover it, rounded up; spacings that differ by less than equal_within are"
            " equal, and nothing is resampled"
        ),
        "outside": "the nearest voxel",
    },
}
_RESAMPLING = {
    "interpolation": (
        "trilinear; where the scan is finer, the mean of round(ratio of spacings) points an axis"
    ),
    "back": (
        "logits interpolated trilinearly at the scan's voxels, then the largest; of regions the"
        " last above 0"
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how the network was checked.

    runtime: what ran it ('' if nothing that could is installed); difference: the largest from
    PyTorch's logits, as a share of their spread. any_batch: whether it takes any number of patches
    at a time, or only one.
    """

    network: Path
    description: Path
    runtime: str
    difference: float
    any_batch: bool


def export(checkpoint: Checkpoint, path: Path) -> Exported:
    """Write a checkpoint's network to `path` (.onnx) and what belongs to it to the same name with
    .json.

    Raises `BadConfig` if the packages for it are not installed, `BadModel` if the network cannot be
    written or gives other values than PyTorch's, `BadOutput` for another suffix or a network too
    large for one file.
    """
    if path.suffix.lower() != ".onnx":
        raise BadOutput(f"{path}: the network is written as ONNX; give a name that ends in .onnx")
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise BadConfig(
            'writing ONNX needs packages that are not installed: pip install "medseg[export]"'
        )
    # What is written beside the network describes medseg's own grids.
    if checkpoint.spec.recipe is not None:
        raise BadModel(
            f"the model {checkpoint.spec.name} is nnU-Net's; medseg exports models of its own"
        )
    network = checkpoint.network()
    if 4 * sum(value.numel() for value in network.state_dict().values()) > MAX_BYTES:
        raise BadOutput(
            f"{path}: the network of {checkpoint.spec.name} is too large for one ONNX file"
        )
    content, any_batch = _onnx(network, checkpoint)
    runtime, difference = _compare(content, network, checkpoint)
    if difference > TOLERANCE:
        raise BadModel(
            f"the network of {checkpoint.spec.name} gives other values in {runtime} than in PyTorch"
            f" (they differ by {difference:.1%} of their spread), so it was not written"
        )
    facts = describe(checkpoint) | {
        "onnx_sha256": hashlib.sha256(content).hexdigest(),
        "checked": {"runtime": runtime, "largest_difference": difference} if runtime else None,
    }
    facts["input"]["any_batch"] = any_batch
    beside = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        handle.write(content)
    with atomic_write(beside) as handle:
        handle.write((json.dumps(facts, indent=1) + "\n").encode())
    return Exported(path, beside, runtime, difference=difference, any_batch=any_batch)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything around the network as JSON: how its input is made, how windows are laid, what its
    output means.
    """
    from medseg.inference.window import gaussian_weights

    spec = checkpoint.spec
    dark = spec.dark_air
    names = list(spec.channel_names) or [f"channel {n + 1}" for n in range(spec.channels)]
    labels = {label.value: label for label in checkpoint.table.labels}
    outputs = spec.classes[spec.regions :]
    return {
        "format": "medseg-export-1",
        "name": spec.name,
        "description": spec.description,
        "architecture": spec.architecture,
        "weights_sha256": spec.sha256,
        "input": {
            "name": "image",
            "axes": ["batch", "channel", "R", "A", "S"],
            "shape": [None, spec.channels, *spec.patch],
            "type": "float32",
            "channels": names,
        },
        "output": {
            "name": "logits",
            "axes": ["batch", "output", "R", "A", "S"],
            "shape": [None, spec.outputs, *spec.patch],
            "activation": "sigmoid" if spec.regions else "softmax",
            "labels": list(outputs),
        },
        "grid": (
            {"kind": spec.grid, "spacing_mm": list(spec.spacing), "equal_within": SAME_SPACING}
            | _GRIDS[spec.grid]
            | _RESAMPLING
        ),
        "intensity": [
            {"channel": name, "how": _HOW[one.scheme]} | one.model_dump()
            for name, one in zip(names, spec.intensities)
        ],
        "content": {"above": CONTENT_ABOVE, "margin_voxels": CONTENT_MARGIN} if dark else None,
        "windows": {
            "patch": list(spec.patch),
            "overlap": Settings().share(spec),
            "weights": [gaussian_weights(size).tolist() for size in spec.patch],
            "weights_are": "of each axis; a window's are their outer product",
            "padding": 0.0,
            "skip_empty": spec.skip_empty,
            "mirror_axes": list(mirror_axes([checkpoint])),
        },
        "regions": spec.regions,
        "labels": [
            {"value": value, "name": labels[value].name, "color": list(labels[value].color)}
            for value in spec.classes[1:]
        ],
        "cleanup": [dict(step) for step in spec.cleanup],
        "fluid": spec.fluid.model_dump() if spec.fluid else None,
        "locate": spec.locate.model_dump() if spec.locate else None,
        "card": spec.card,
    }


def _onnx(network: nn.Module, checkpoint: Checkpoint) -> tuple[bytes, bool]:
    """The network as the bytes of an ONNX file, checked, and whether it takes any number of patches
    at a time.
    """
    import onnx
    import torch

    spec = checkpoint.spec
    problem = ""
    for any_batch in (True, False):  # some networks can only be written for one patch at a time
        patches = torch.zeros(2 if any_batch else 1, spec.channels, *spec.patch)
        batch = {0: torch.export.Dim("batch")} if any_batch else None
        try:
            with _quietly():
                program = torch.onnx.export(
                    network,
                    (patches,),
                    dynamo=True,
                    external_data=False,
                    input_names=["image"],
                    output_names=["logits"],
                    dynamic_shapes=(batch,),
                    verbose=False,
                )
                assert program is not None
                model = program.model_proto
            _without_traces(model)
            model.producer_name = "medseg"
            onnx.checker.check_model(model, full_check=True)
            return model.SerializeToString(), any_batch
        except (
            torch.onnx.errors.OnnxExporterError,
            onnx.checker.ValidationError,
            RuntimeError,
        ) as error:
            problem = str(error).strip().split("\n")[0]
    raise BadModel(
        f"the architecture '{spec.architecture}' of {spec.name} cannot be written as ONNX:"
        f" {problem}"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings, which are for those who write exporters."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _without_traces(model: Any) -> None:
    """Remove what the exporter notes of source files: it names folders of this machine."""
    for part in (model, model.graph, *model.functions):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    values = [
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ]
    for function in model.functions:
        values += [*function.node, *function.value_info]
    for part in (*model.graph.node, *values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _compare(content: bytes, network: nn.Module, checkpoint: Checkpoint) -> tuple[str, float]:
    """What ran the exported network, and the largest difference from PyTorch as a share of the
    logits' spread.
    """
    import torch

    name = next((name for name in RUNTIMES if find_spec(name)), "")
    if not name:
        return "", 0.0
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(1, checkpoint.spec.channels, *checkpoint.spec.patch, generator=generator)
    with torch.inference_mode():
        expected = network(patches).numpy()
    run = _run_onnxruntime if name == "onnxruntime" else _run_openvino
    found = run(content, patches.numpy())
    spread = float(np.ptp(expected))
    difference = (
        float(np.abs(found - expected).max()) / spread if spread > 0 else float(np.abs(found).max())
    )
    return name, difference if np.isfinite(difference) else float("inf")


def _run_onnxruntime(content: bytes, patches: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"image": patches})[0]
    return logits


def _run_openvino(content: bytes, patches: NDArray[np.float32]) -> NDArray[np.float32]:
    from medseg.inference.backends.openvino import compile_openvino, openvino_core

    request = compile_openvino(openvino_core().read_model(content), "f32").create_infer_request()
    request.infer([patches])
    logits: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
    return logits
