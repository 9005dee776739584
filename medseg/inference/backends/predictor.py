"""What a backend gives: a network that turns windows into features or logits, with its head
apart.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.errors import BadConfig, DataWarning
from medseg.inference.backends.cards import problem_of
from medseg.inference.painter import Head, Slopes
from medseg.inference.settings import check_device
from medseg.inference.window import Predict
from medseg.models import Checkpoint

Precision = Literal["auto", "fp32", "bf16", "fp16"]
#: Networks up to this wide hand over their features even where they have fewer classes: adding up
#: 16 channels instead of 2 costs a few per cent of a run, and memory is then the same for 2 classes
#: and for 200.
ALWAYS_DEFER = 16


@dataclass
class Predictor:
    """Features of patches, and the head that makes logits of them (None: they are logits)."""

    run: Predict
    features: int
    head: Head | None
    backend: str
    precision: str
    cell: int = 1  # the head makes logits of so many voxels along each axis from one feature vector

    def __call__(self, patches: Tensor) -> Tensor:
        """Features (B, F, X/cell, Y/cell, Z/cell) of patches (B, C, X, Y, Z)."""
        return self.run(patches)


def choose_device(device: str) -> torch.device:
    """The device asked for: 'cpu', 'cuda', 'cuda:N', 'mps', or 'auto' for a GPU of CUDA where there
    is one that works. Raises `BadConfig` for another word, and for a device that is not here or
    does not work.
    """
    is_there = torch.cuda.is_available()
    check_device(device)
    if device == "cpu" or (device == "auto" and not is_there):
        return torch.device("cpu")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise BadConfig(
                "there is no mps here, which is the GPU of a Mac with an Apple chip; use --device"
                " cpu"
            )
        mac = torch.device("mps")
        problem = problem_of(mac)
        if problem:
            raise BadConfig(f"this PyTorch cannot use mps: {problem}; use --device cpu")
        return mac
    if not is_there:
        raise BadConfig("there is no CUDA device here; use --device cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise BadConfig(f"there is no {device} here; its CUDA devices are cuda:0 to {count - 1}")
    card = torch.device("cuda" if device == "auto" else device)
    problem = problem_of(card)
    if problem and device != "auto":
        raise BadConfig(f"this PyTorch cannot use {device}: {problem}; use --device cpu")
    if problem:
        warnings.warn(
            f"this PyTorch cannot use the GPU that is here: {problem}; the CPU computes",
            DataWarning,
            stacklevel=2,
        )
    return torch.device("cpu") if problem else card


def seconds_of(work: Callable[[], Any], tries: int = 3) -> float:
    """The shortest of several tries after one that does not count."""
    times = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def deferred_width(network: nn.Module) -> tuple[int, int]:
    """How many features the network's last layer reads, and the voxels along each axis that it
    makes logits of.

    (0, 1) if it may not be applied after blending, or that does not pay.
    """
    head = getattr(network, "head", None)
    if (
        not hasattr(network, "features")
        or not isinstance(head, nn.Conv3d)
        or set(head.kernel_size) != {1}
    ):
        return 0, 1
    cell = int(getattr(network, "stem", 1))
    width = head.in_channels + (cell**3 if getattr(network, "slope", None) is not None else 0)
    return (
        (width, cell) if worth_deferring(width / cell**3, head.out_channels // cell**3) else (0, 1)
    )


def worth_deferring(features: float, outputs: int) -> bool:
    """Whether a head that reads so many features is better applied after blending."""
    return features <= max(outputs, ALWAYS_DEFER)


def deferred_head(network: nn.Module) -> tuple[int, int, Head | None]:
    """(features, cell, head) if the network's last layer is to be applied after blending, else (0,
    1, None).
    """
    width, cell = deferred_width(network)
    if not width:
        return 0, 1, None
    weights, bias = _linear(network.head, width)
    slopes: Any = getattr(network, "slope", None)
    own = int(cast(nn.Conv3d, network.head).in_channels)
    return (
        width,
        cell,
        Head(weights, bias, None if slopes is None else Slopes(*_linear(slopes, width), own)),
    )


def _linear(layer: Any, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (K, width), with zeros for features beyond those that a 1x1x1 convolution reads, and
    biases (K,).
    """
    weights = layer.weight.detach().float().flatten(1).numpy()
    bias = (
        np.zeros(len(weights), np.float32)
        if layer.bias is None
        else layer.bias.detach().float().numpy()
    )
    return np.pad(weights, ((0, 0), (0, width - weights.shape[1]))), bias.copy()


class Body(nn.Module):
    """A network without its head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) to features (B, F, X, Y, Z)."""
        features: Tensor = self.network.features(x)  # type: ignore[operator]
        return features


def is_finite(features: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # A sum needs no copy, and NaN and Inf survive it.
    return bool(torch.isfinite(features.sum(dtype=torch.float32)))


def example_patch(checkpoint: Checkpoint) -> Tensor:
    """Noise in the size of one window, (1, C, X, Y, Z)."""
    return torch.rand(1, checkpoint.spec.inputs, *checkpoint.spec.patch)


def name_of(dtype: torch.dtype) -> str:
    """A type without 'torch.' before it."""
    return str(dtype).removeprefix("torch.")
