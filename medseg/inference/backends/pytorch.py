"""Networks run by PyTorch, in the arithmetic that is faster here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import BadConfig, BadModel, DataWarning, NotEnoughMemory
from medseg.inference.backends.accelerate import accelerate
from medseg.inference.backends.blocks import form_of
from medseg.inference.backends.cards import computes_bfloat16, is_out_of_memory
from medseg.inference.backends.checks import checks_of
from medseg.inference.backends.predictor import (
    Body,
    Precision,
    Predictor,
    deferred_head,
    is_finite,
    name_of,
    seconds_of,
)
from medseg.machine import convolves_bfloat16, has_matrix_units
from medseg.models import Checkpoint
from medseg.networks import has_depthwise

#: What 'auto' means in this process, where somebody else has tried it for all.
_SETTLED: list[torch.dtype] = []


def settle_precision(dtype: torch.dtype) -> None:
    """Let 'auto' mean this arithmetic in this process, whatever would be faster here."""
    _SETTLED[:] = [dtype]


def choose_precision(
    precision: Precision, device: torch.device, trained: str | None = None
) -> torch.dtype:
    """The arithmetic of the network: 'auto' is fp16 on a GPU of CUDA, or bf16 where the network was
    `trained` in that and the GPU has it; on a CPU bf16 where that is faster, else fp32, as it
    always is on mps.

    What was trained in bf16 may hold numbers beyond fp16's 65504. fp16 keeps three bits more, so
    that it stays for what was trained in fp32.
    """
    if device.type == "mps":
        if precision not in ("auto", "fp32"):
            raise BadConfig(
                f"on mps medseg computes in fp32 alone; leave out --precision {precision}"
            )
        return torch.float32
    if precision == "auto":
        if _SETTLED:
            return _SETTLED[0]
        if device.type == "cuda":
            follows = trained == "bf16" and computes_bfloat16(device)
            return torch.bfloat16 if follows else torch.float16
        return torch.bfloat16 if _bf16_is_faster() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise BadConfig("fp16 is very slow on a CPU; use --precision bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@cache
def _bf16_is_faster() -> bool:
    """Whether this processor convolves bfloat16 faster than medseg's own kernels do float32, by
    trying.

    Its flags do not tell: processors with AVX512-BF16 were measured at twice, and at half, their
    float32 speed. Only matrix units (AMX) leave no doubt: seven times.
    """
    if not convolves_bfloat16():
        return False
    if has_matrix_units():
        return True
    with torch.inference_mode():
        block = nn.Sequential(
            nn.Conv3d(32, 32, 3, padding=1, bias=False),
            nn.GroupNorm(32, 32),
            nn.LeakyReLU(0.01, inplace=True),
        ).eval()
        x = torch.rand(1, 32, 32, 32, 32).contiguous(memory_format=torch.channels_last_3d)
        fast = accelerate(block)

        def halved() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return fast(x)

        return seconds_of(lambda: _used(halved())) < seconds_of(lambda: _used(fast(x)))


def _used(y: Tensor) -> float:
    """A result that something needs: what `accelerate` leaves undone is done."""
    return float(y.flatten()[0])


def open_torch(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    defer: bool = True,
) -> Predictor:
    """The network in PyTorch. Logits that are not finite are computed again in fp32; if they stay
    so, `BadModel`.

    On a CPU in fp32 it runs on medseg's own convolutions (`accelerate`) unless `exact`. When a GPU
    runs out of memory, batches are halved, and then the CPU goes on; each step is told as a
    `DataWarning`.
    """
    network = checkpoint.network()
    width, cell, head = deferred_head(network) if defer else (0, 1, None)
    run = _Torch(Body(network) if head else network, checkpoint.spec.name, device, dtype, exact)
    return Predictor(
        run,
        width or checkpoint.spec.outputs,
        head=head,
        backend="torch",
        precision=name_of(dtype),
        cell=cell,
    )


#: How often a network of this process had to step down.
_STEPS_DOWN = [0]


def steps_down() -> int:
    """How often a network had to step down so far, because memory ran out or numbers were too large
    for its arithmetic; it stays where it then is.
    """
    return _STEPS_DOWN[0]


class _Torch:
    """A network on a device that steps down when memory runs out and retries in fp32 what is not
    finite.
    """

    def __init__(
        self, network: nn.Module, name: str, device: torch.device, dtype: torch.dtype, exact: bool
    ) -> None:
        self.name, self.exact, self.most = name, exact, 2**31
        self.plain = network  # on the CPU, float32, as loaded
        self.is_depthwise = has_depthwise(network)
        try:
            self.place(device, dtype)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error) or device.type == "cpu":
                raise
        self._to_the_cpu()

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the network ready for a device and an arithmetic."""
        self.device, self.dtype = device, dtype
        if device.type == "cpu":
            self.network = (
                self.plain
                if self.exact and dtype == torch.float32
                else accelerate(self.plain, form_of)
            )
        else:
            # A copy, for `to` moves a module where it is, and the CPU may have to go on with it.
            there = deepcopy(self.plain).to(device)
            self.network = _channels_last(there) if self.is_last else there

    @property
    def is_last(self) -> bool:
        """Whether channels lie last in memory: norms over such sum less accurately, and a card
        convolves channels one by one where they lie first.
        """
        return not self.exact and (self.device.type == "cpu" or not self.is_depthwise)

    def __call__(self, patches: Tensor) -> Tensor:
        """Features of patches, whatever memory and arithmetic allow."""
        if len(patches) > self.most:
            parts = [self(part) for part in patches.split(self.most)]
            # The CPU may have taken over between two of them.
            is_split = len({part.device for part in parts}) > 1
            return torch.cat([part.cpu() for part in parts] if is_split else parts)
        try:
            if self.device.type == "mps":
                return self._on_a_mac(patches)
            return self.finite(patches.to(self.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # What follows stands outside of the handler, so that nothing of the failed run is kept
            # alive by the traceback.
        if self.device.type == "cpu":
            raise NotEnoughMemory(
                f"the network of {self.name} does not fit into memory; use --max-memory"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(patches) > 1:
            self.most = len(patches) // 2
            _STEPS_DOWN[0] += 1
            warnings.warn(
                f"the GPU ran out of memory; windows go {self.most} at a time",
                DataWarning,
                stacklevel=2,
            )
        else:
            self._to_the_cpu()
        return self(patches)

    def _on_a_mac(self, patches: Tensor) -> Tensor:
        """Features on the CPU, where windows are added up then."""
        try:
            return self.finite(patches.to(self.device)).cpu()
        except NotImplementedError:
            raise BadConfig(
                f"the network of {self.name} needs something that PyTorch cannot do on mps yet; use"
                " --device cpu"
            ) from None

    def _to_the_cpu(self) -> None:
        _STEPS_DOWN[0] += 1
        cpu = torch.device("cpu")
        self.place(cpu, choose_precision("auto", cpu))
        warnings.warn("the GPU ran out of memory; the CPU goes on", DataWarning, stacklevel=3)

    def finite(self, x: Tensor) -> Tensor:
        """The network's answer if it is finite, else the answer in fp32; `BadModel` if that is not
        either.
        """
        features = self.forward(x, self.dtype)
        checks = checks_of(features)
        if checks is not None:
            checks.add(features, self._in_float32)
            return features
        if is_finite(features):
            return features
        if self.dtype != torch.float32:
            features = self.forward(x, torch.float32)
        if not is_finite(features):
            raise self._never_finite()
        self._in_float32()
        return features

    def _never_finite(self) -> BadModel:
        return BadModel(f"the model {self.name} gives values that are not finite on this scan")

    def _in_float32(self) -> None:
        """Go on in float32: a batch too large for half precision is seldom alone, and each would be
        computed twice. Raises `BadModel` where it is that already.
        """
        halved = self.dtype
        if halved == torch.float32:
            raise self._never_finite()
        self.dtype = torch.float32
        _STEPS_DOWN[0] += 1
        warnings.warn(
            f"values of {self.name} are too large for {name_of(halved)}; float32 goes on",
            DataWarning,
            stacklevel=3,
        )

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The network in an arithmetic; weights stay float32 and are cast as they are used."""
        if self.is_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32),
            _whole_float32() if self.exact and self.device.type == "cuda" else nullcontext(),
        ):
            features: Tensor = self.network(x)
        return features


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, which keeps 10 bits of float32's 23 (PyTorch's notes on
    CUDA semantics).

    PyTorch has two ways to say so and refuses to read one where the other says something else, so
    that both are told the same. The older one alone leaves TF32 on where a program has set
    `torch.backends.fp32_precision`.
    """
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    kinds, allowed = (cudnn.conv, cudnn.rnn), None
    with suppress(RuntimeError):  # a program has said different things of the two kinds
        allowed = cudnn.allow_tf32
    before = [one.fp32_precision for one in kinds]
    try:
        cudnn.allow_tf32 = False
        for one in kinds:
            one.fp32_precision = "ieee"
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        for one, word in zip(kinds, before):
            one.fp32_precision = word


def _channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
