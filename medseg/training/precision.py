"""Which arithmetic trains: settled by a trial, and by how thin a network's maps get."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.config import Config
from medseg.errors import BadConfig
from medseg.inference import computes_bfloat16
from medseg.machine import convolves_bfloat16, has_matrix_units
from medseg.networks import FLOAT32_ON_CPU, conv, has_depthwise, likes_channels_last

PRECISIONS = ("fp32", "bf16", "fp16")
#: In oneDNN's bfloat16 without matrix units the gradients of weights are wrong, to infinity, where
#: a map is two voxels deep (PyTorch 2.13, AMD Zen 5): maps thinner than this are not trained in it.
THIN = 3


def choose_training_precision(config: Config, device: torch.device, thinnest: int = THIN) -> str:
    """The arithmetic of the loop: 'auto' is bf16 where the GPU knows it, else fp16; on a CPU what
    is faster.

    thinnest: the least size of a map that the network convolves; below `THIN` a CPU without matrix
    units takes fp32. A CPU with matrix units (AMX) trains faster in bfloat16, but for
    `FLOAT32_ON_CPU`; where there are none a trial tells: processors were measured at twice and at
    half their float32 speed, too far apart for chance to decide.
    """
    settings = config.train
    if settings.precision != "auto":
        if settings.precision == "fp16" and device.type == "cpu":
            raise BadConfig("fp16 is very slow on a CPU; set train.precision=bf16 or fp32")
        return settings.precision
    if device.type == "cuda":
        return half_on_card(device)
    if config.model.name in FLOAT32_ON_CPU or not convolves_bfloat16():
        return "fp32"
    if has_matrix_units():
        return "bf16"
    if thinnest < THIN:
        return "fp32"
    block = conv(32, 32)
    x = torch.rand(2, 32, 32, 32, 32)

    def seconds(half: bool) -> float:
        images = x.to(memory_format=torch.channels_last_3d) if half else x
        times = []
        for _ in range(4):
            start_s = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = block(images)
            out.float().sum().backward()
            times.append(time.perf_counter() - start_s)
        return min(times[1:])

    return "bf16" if seconds(True) < 0.9 * seconds(False) else "fp32"


def half_on_card(device: torch.device) -> str:
    """bf16 where this card computes in it; before Ampere it is emulated, and slower than
    float32.
    """
    return "bf16" if computes_bfloat16(device) else "fp16"


def thinnest_map(
    network: nn.Module, channels: int, patch: Sequence[int], device: torch.device
) -> int:
    """The least size along an axis that convolutions wider than 1x1x1 read; `THIN` if more, or on
    other processors.
    """
    if device.type != "cpu" or has_matrix_units():
        return THIN
    sizes = [THIN]

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(min(inputs[0].shape[2:]))

    wide = [m for m in network.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1]
    hooks = [module.register_forward_pre_hook(look) for module in wide]
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, *patch))
    for hook in hooks:
        hook.remove()
    return min(sizes)


def is_channels_last(network: nn.Module, precision: str, device: torch.device) -> bool:
    """Whether maps have their channels innermost: on a GPU, and on a CPU where that is faster."""
    if device.type != "cpu":
        return not has_depthwise(network)
    return precision == "bf16" and likes_channels_last(network)
