"""Networks run by OpenVINO, where it is installed."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from medseg.errors import BadConfig, BadModel
from medseg.inference.backends.predictor import Body, Predictor, deferred_head, is_finite
from medseg.models import Checkpoint


def open_openvino(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    defer: bool = True,
) -> Predictor:
    """The network in OpenVINO, for CPUs; compiled for the model's patch.

    Raises `BadConfig` if it is not installed or cannot run this network.
    """
    try:
        import openvino
    except ImportError:
        raise BadConfig(
            'OpenVINO is not installed; install it with pip install "medseg[openvino]"'
        ) from None
    if device.type != "cpu":
        raise BadConfig("the openvino backend runs on a CPU; use --device cpu")
    network = checkpoint.network()
    width, cell, head = deferred_head(network) if defer else (0, 1, None)
    spec = checkpoint.spec
    hint = "f32" if dtype == torch.float32 else "bf16"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every size it takes for a constant
            # Of this size: some networks compute with it.
            example = torch.zeros(1, spec.inputs, *spec.patch)
            model = openvino.convert_model(
                Body(network) if head else network, example_input=example
            )
        model.reshape([1, spec.inputs, *spec.patch])
        request = compile_openvino(model, hint).create_infer_request()
    except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
        why = str(error).strip().split("\n")[0]
        raise BadConfig(
            f"OpenVINO cannot run the network of {spec.name} ({why}); use --backend torch"
        ) from None

    def run(patches: Tensor) -> Tensor:
        outputs = []
        for patch in patches:
            request.infer([patch[None].float().contiguous().numpy()])
            outputs.append(torch.from_numpy(request.get_output_tensor(0).data.copy()))
        features = torch.cat(outputs)
        if not is_finite(features):
            raise BadModel(f"the model {spec.name} gives values that are not finite on this scan")
        return features

    return Predictor(
        run,
        width or spec.outputs,
        head=head,
        backend="openvino",
        precision="float32" if hint == "f32" else "bfloat16",
        cell=cell,
    )


def compile_openvino(model: Any, hint: str) -> Any:
    """An OpenVINO model compiled for this CPU and thread count; hint: 'f32' or 'bf16'."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino_core()
    try:
        # Without its fused kernels ("snippets"): compiling them ended the process for residual
        # blocks (measured with 2026.4), and networks run as fast without.
        return core.compile_model(model, "CPU", options | {"SNIPPETS_MODE": "DISABLE"})
    except RuntimeError as error:
        if "SNIPPETS_MODE" not in str(error):
            raise
        return core.compile_model(model, "CPU", options)  # a version that does not have them


@cache
def openvino_core() -> Any:
    """OpenVINO's core, kept for ever: its CPU plugin lends this thread a stack for signal handlers
    and frees it in the end, after which Ctrl-C would crash the process (measured with 2026.4)."""
    import openvino

    return openvino.Core()
