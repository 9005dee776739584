"""How large a network is and how much it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def parameters_and_flops(network: nn.Module, patch: Sequence[int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one patch (X, Y, Z) in evaluation mode), those of matrix
    products and convolutions.

    Nothing is computed: shapes alone go through the network (`torch.utils.flop_counter`), so it
    takes no memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shapes: dict[str, Any] = {name: x.detach().to("meta") for name, x in network.named_parameters()}
    parameters = sum(x.numel() for x in shapes.values())
    shapes |= {name: x.to("meta") for name, x in network.named_buffers()}
    channels: Any = getattr(network, "channels", 1)
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(
                network, shapes, (torch.empty(1, channels, *patch, device="meta"),)
            )
    finally:
        network.train(training)
    return parameters, counter.get_total_flops() // 2
