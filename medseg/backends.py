"""What runs a network: a checkpoint opened as `predict`.

`predict` takes patches (B, C, X, Y, Z) float32 and returns logits (B, K, X, Y, Z) of any floating type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from medseg.checkpoint import Checkpoint
from medseg.errors import BadConfig, BadModel
from medseg.window import Predict

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(device: Device) -> torch.device:
    """The device asked for; 'auto' is a GPU where there is one. Raises `BadConfig` if there is none to be had."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadConfig("there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the network: 'auto' is fp16 on a GPU, bf16 on CPUs that compute it natively, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise BadConfig("fp16 is very slow on a CPU; use --precision bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def open_torch(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Predict:
    """The network in PyTorch. Logits that are not finite are computed again in fp32; if they stay so, `BadModel`."""
    network = checkpoint.network().to(device)

    def forward(x: Tensor, kind: torch.dtype) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, kind, enabled=kind != torch.float32):
            logits: Tensor = network(x)
        return logits

    def finite(logits: Tensor) -> bool:
        return bool(torch.isfinite(logits.sum(dtype=torch.float32)))  # a sum needs no copy, and NaN and Inf survive it

    def predict(x: Tensor) -> Tensor:
        x = x.to(device)
        logits = forward(x, dtype)
        if dtype != torch.float32 and not finite(logits):
            logits = forward(x, torch.float32)
        if not finite(logits):
            raise BadModel(f"the model {checkpoint.spec.name} gives values that are not finite on this scan")
        return logits

    return predict


#: Name -> open(checkpoint, device, dtype).
BACKENDS: dict[str, Callable[[Checkpoint, torch.device, torch.dtype], Predict]] = {"torch": open_torch}
