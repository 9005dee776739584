"""What this machine can train: how fast, by trying, and how much fits into its memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from medseg.config import Config
from medseg.errors import NotEnoughMemory
from medseg.inference import free_bytes_on, in_sentences
from medseg.machine import convolves_bfloat16
from medseg.networks import build_network, patch_multiples
from medseg.training.precision import half_on_card
from medseg.training.processes import innermost_channels


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where training will run: the kind of device, its memory that may be used, processes that
    share a step, and which card it is where there are several.
    """

    device: str
    memory_bytes: int
    processes: int = 1
    card: str = ""


@cache
def seconds_a_voxel(machine: Machine, channels: int) -> float:
    """How long a voxel of a patch takes in training with the plain U-Net of this machine, by
    trying. Raises `NotEnoughMemory`.

    On a CPU one thread's own time is measured, in the faster arithmetic, and shared out over the
    threads, at 80 % of what they could do: whatever else the machine does at the moment then does
    not change the plan.
    """
    place = machine.card or machine.device
    return in_sentences(
        partial(_tried, machine, channels),
        full=f"there is no memory on {place} to try how fast it trains; end what else uses it, or"
        " give another --device",
    )


def _tried(machine: Machine, channels: int) -> float:
    device, threads = torch.device(machine.card or machine.device), torch.get_num_threads()
    on_gpu = machine.device == "cuda"
    halved = torch.bfloat16
    if on_gpu and half_on_card(device) == "fp16":
        halved = torch.float16
    base, edge = (32, 96) if on_gpu else (16, 32)
    network = build_network("unet", channels, 3, features=[base, 2 * base, 4 * base, 8 * base]).to(
        device
    )
    network = innermost_channels(network, device).train()
    # Two patches, as in training: one alone takes oneDNN twice as long a patch.
    x = torch.rand(2, channels, edge, edge, edge, device=device)
    clock = time.perf_counter if on_gpu else time.thread_time

    def seconds(half: bool) -> float:
        images = x.to(memory_format=torch.channels_last_3d) if half else x
        times = []
        for _ in range(4):
            start_s = clock()
            with torch.autocast(device.type, halved, enabled=half):
                out = network(images)
            out.float().square().mean().backward()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(clock() - start_s)
        return min(times[1:])

    if on_gpu:
        return seconds(True) / (2 * edge**3) / machine.processes
    torch.set_num_threads(1)
    try:
        arithmetics = (False, True) if convolves_bfloat16() else (False,)
        fastest = min(seconds(half) for half in arithmetics)
    finally:
        torch.set_num_threads(threads)
    shared = 1.0 if threads == 1 else 0.8 * min(threads, 16)
    return fastest / (2 * edge**3) / shared / machine.processes


def check_memory(config: Config, channels: int, outputs: int, machine: Machine) -> int:
    """The bytes training will need; `NotEnoughMemory` if that is more than there is, saying what
    would fit.
    """
    network = (config.model.name, config.model.options, channels, outputs)
    patch, batch = list(config.model.patch), config.train.batch
    forecast_bytes = training_bytes(*network, patch, batch // machine.processes, machine.device)
    if forecast_bytes <= machine.memory_bytes:
        return forecast_bytes
    with torch.device("meta"):
        multiple = patch_multiples(build_network(network[0], channels, outputs, **network[1]))
    fits = ""
    while not fits and (
        batch > machine.processes or max(n // m for n, m in zip(patch, multiple)) > 2
    ):
        if batch > machine.processes:
            batch = max(machine.processes, batch // 2 // machine.processes * machine.processes)
        else:
            axis = max(range(3), key=lambda axis: patch[axis] / multiple[axis])
            patch[axis] = max(
                multiple[axis], int(0.8 * patch[axis]) // multiple[axis] * multiple[axis]
            )
        if (
            training_bytes(*network, patch, batch // machine.processes, machine.device)
            <= machine.memory_bytes
        ):
            fits = (
                f"; --set train.batch={batch} --set model.patch=[{','.join(map(str, patch))}]"
                " would fit"
            )
    size = " x ".join(map(str, config.model.patch))
    raise NotEnoughMemory(
        f"training needs about {forecast_bytes / 1e9:.1f} GB for patches of {size} and a batch of"
        f" {config.train.batch}, but {machine.memory_bytes / 1e9:.1f} GB may be used"
        + (fits or "; choose a smaller network")
    )


def training_bytes(
    architecture: str,
    options: Mapping[str, Any],
    channels: int,
    outputs: int,
    patch: Sequence[int],
    batch: int,
    device: str = "cpu",
) -> int:
    """Forecast of the memory a step needs at its peak: tensors kept for backward, weights,
    gradients, AdamW, averages.

    Computed on tensors without content, so it takes neither memory nor long.
    """
    # Built first and then emptied: not every layer of MONAI's can be made without content.
    network = build_network(architecture, channels, outputs, **options).to("meta").train()
    x = torch.empty(batch, channels, *patch, device="meta")
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    activation_bytes = _saved_bytes(network, x)
    # On a card autocast takes group norms in float32 and gives them so: of a map the norm's input
    # and the activation are kept, and a copy in half precision, 10 bytes where float32 keeps 8.
    share = 1.25 if device == "cuda" else 1.0
    logits = 4 * batch * outputs * int(np.prod(patch)) * 4
    # What backward needs on top: gradients of the largest activations, and copies in another
    # layout.
    return int(_RESIDENT[device] + 6 * weights + share * 1.25 * activation_bytes + logits)


#: The process before it trains: Python, torch, compiled kernels; on a GPU its context and cuDNN's
#: room.
_RESIDENT = {"cpu": 600_000_000, "cuda": 1_500_000_000}


#: Of a card's free memory so much may be planned with while cases lie there: validation needs
#: some, and freed memory lies in pieces.
_SHARE_WITH_CASES = 0.7


def room_for_cases(
    config: Config, channels: int, outputs: int, *, processes: int, device: torch.device
) -> int:
    """Bytes of a card that training leaves free; 0 where it runs on a CPU."""
    if device.type != "cuda":
        return 0
    free_bytes = free_bytes_on(device)
    network = (config.model.name, config.model.options, channels, outputs)
    batch = config.train.batch // processes
    needed_bytes = training_bytes(*network, config.model.patch, batch, device.type)
    return max(0, int(_SHARE_WITH_CASES * free_bytes) - needed_bytes)


def _saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes of all tensors that autograd keeps of one forward pass."""
    sizes: dict[int, int] = {}
    storages = []  # so that no storage's number is given to another one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        storages.append(storage)
        return tensor

    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    return sum(size for key, size in sizes.items() if key not in weights)
