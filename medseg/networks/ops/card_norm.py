"""Instance norm and (leaky) ReLU as one step on channels-last maps on a card, with its gradient.

Autocast takes PyTorch's group norm in float32, and gives it so, channels first: each is cast and
turned over before and after, which costs as much as the convolutions. Here maps are read in their
own arithmetic, twice, and written once; sums are in float32, and the same every time.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import DataWarning

#: Voxels that a program looks at together, and how many channels at most.
_TOGETHER, _CHANNELS = 2048, 64
#: Voxels of a run, of which each is summed up by one program, and how many runs at most.
_RUN, _RUNS = 8192, 512


def can_fuse(x: Tensor, norm: nn.Module) -> bool:
    """Whether `norm_activate` takes the map x and the norm after it."""
    return (
        isinstance(norm, nn.GroupNorm)
        and norm.num_groups == norm.num_channels
        and norm.weight is not None
        and type(x) is Tensor
        and x.ndim == 5
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and is_card(x.device)
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and (x.shape[1] == 1 or not x.is_contiguous())
        and x[0, 0].numel() > 1
        and works_on(x.device)
    )


def is_card(device: torch.device) -> bool:
    """Whether Triton may have kernels for a device."""
    return device.type == "cuda"


@cache
def works_on(device: torch.device) -> bool:
    """Whether Triton is there, makes kernels for this card, and they are right, found by trying."""
    try:
        import triton
    except ImportError:
        return False
    try:
        difference = _difference_on(device)
    except Exception as error:  # compilers, drivers and cards fail in many ways
        first = str(error).strip().partition("\n")[0]
        why = f"{type(error).__name__}: {first}"
    else:
        if difference < 1e-3:
            return True
        why = "its kernels compute wrongly"
    warnings.warn(
        f"Triton {triton.__version__} cannot be used on this GPU ({why}); PyTorch's norms are"
        " slower",
        DataWarning,
        stacklevel=2,
    )
    return False


@torch.enable_grad()
def _difference_on(device: torch.device) -> float:
    """The largest difference of value or gradients to PyTorch's in float64, of a small map."""
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        x = torch.randn(2, 6, 5, 4, 7, generator=random)
        weight, bias = (torch.randn(6, generator=random) for _ in range(2))
        down = torch.randn(x.shape, generator=random)
        exact = [one.double().requires_grad_() for one in (x, weight, bias)]
        y = F.leaky_relu(F.group_norm(exact[0], 6, exact[1], exact[2]), 0.01)
        y.backward(down.double())
        ours = [one.to(device).requires_grad_() for one in (x, weight, bias)]
        last = ours[0].contiguous(memory_format=torch.channels_last_3d)
        found = _NormActivate.apply(last, *ours[1:], 1e-5, 0.01)
        found.backward(down.to(device))
        each = [found.detach().cpu() - y.detach()]
        for a, b in zip(ours, exact):
            assert a.grad is not None and b.grad is not None
            each.append(a.grad.cpu() - b.grad)
        return max(float(one.abs().max()) for one in each)


def norm_activate(x: Tensor, norm: nn.GroupNorm, slope: float = 1.0) -> Tensor:
    """leaky_relu(norm(x), slope) of a map (B, C, X, Y, Z) for which `can_fuse` holds."""
    y: Tensor = _NormActivate.apply(x, norm.weight, norm.bias, norm.eps, slope)
    return y


class _NormActivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        from medseg.networks.ops import card_kernels

        about, runs, run = _layout(x)
        means, spreads = (
            x.new_empty((len(x), runs, x.shape[1]), dtype=torch.float32) for _ in "ab"
        )
        with _launching_on(x.device):
            card_kernels.measure(x, means, spreads, run=run, **about)
        voxels = about["voxels"]
        counts = torch.full((runs, 1), float(run), device=x.device)
        counts[-1] = voxels - run * (runs - 1)
        mean = (means * counts).sum(1) / voxels
        spread = spreads + counts * (means - mean[:, None]).square()
        rate = torch.rsqrt(spread.sum(1) / voxels + eps)
        scale = rate * weight.float()
        shift = bias.float() - mean * scale
        y = torch.empty_like(x)
        with _launching_on(x.device):
            card_kernels.settle(x, y, scale, shift, slope, **about)
        ctx.save_for_backward(x, mean, rate, scale, shift)
        ctx.slope, ctx.kinds = slope, (weight.dtype, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from medseg.networks.ops import card_kernels

        x, mean, rate, scale, shift = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
        about, runs, run = _layout(x)
        totals, moments = (torch.empty((len(x), runs, x.shape[1]), device=x.device) for _ in "ab")
        with _launching_on(x.device):
            card_kernels.measure_slopes(
                x, grad, mean, scale, shift, totals, moments, ctx.slope, run=run, **about
            )
        total, moment = totals.sum(1), moments.sum(1) * rate
        per_voxel = -scale * rate * moment / about["voxels"]
        constant = -scale * total / about["voxels"] - per_voxel * mean
        out = torch.empty_like(x)
        with _launching_on(x.device):
            card_kernels.settle_slopes(
                x, grad, out, scale, shift, per_voxel, constant, ctx.slope, **about
            )
        return out, moment.sum(0).to(ctx.kinds[0]), total.sum(0).to(ctx.kinds[1]), None, None


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Within this block kernels run on the card on which their maps lie: Triton launches on the
    current one, which is the first unless somebody says so, and where a map of another card is no
    memory.
    """
    return torch.cuda.device(device) if is_card(device) else nullcontext()


def _layout(x: Tensor) -> tuple[dict[str, Any], int, int]:
    """What kernels are told of a map, in how many runs its voxels come, and how long each is."""
    voxels, channels = x[0, 0].numel(), x.shape[1]
    wide = min(_CHANNELS, 1 << (channels - 1).bit_length())
    run = max(_RUN, -(-voxels // _RUNS))
    sizes = (max(1, _TOGETHER // wide), wide)
    return {"voxels": voxels, "channels": channels, "sizes": sizes}, -(-voxels // run), run
