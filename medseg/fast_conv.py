"""Networks made ready for a CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn


def accelerate(network: nn.Module) -> nn.Module:
    """A copy of a float32 network with its channels last, which oneDNN computes faster."""
    return copy.deepcopy(network).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]
