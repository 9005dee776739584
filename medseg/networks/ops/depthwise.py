"""A convolution of each channel by itself, float32 on a CPU, with a gradient that takes a fifth of
the time of PyTorch's on large maps.

What goes down to the map is a convolution with the kernel turned over. What goes to the kernel is,
for each of its places, the product of two maps that are laid out in rows with room at their ends,
shifted against each other: one sum over both. Results do not depend on the number of threads.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medseg.kernels.threads import in_parallel


def fits(conv: nn.Conv3d) -> bool:
    """Whether a convolution is of each channel by itself, of an odd kernel, and keeps the size but
    for its stride.
    """
    return (
        conv.in_channels == conv.out_channels == conv.groups
        and all(size % 2 for size in conv.kernel_size)
        and conv.padding == tuple(size // 2 for size in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1, 1)
    )


def can_learn(x: Tensor, conv: nn.Conv3d) -> bool:
    """Whether `convolve` takes the map x before a convolution that `fits`: it is float32 and on a
    CPU, and a gradient is asked for.
    """
    return (
        torch.is_grad_enabled()
        and conv.weight.requires_grad
        and type(x) is Tensor
        and x.ndim == 5
        and x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def convolve(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """conv(x) of a map (B, C, X, Y, Z) for which `can_learn` holds; its gradient can be taken
    once.
    """
    y: Tensor = _Convolve.apply(x, conv.weight, conv.bias, conv.stride)
    return y


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return F.conv3d(x, weight, bias, stride=stride, padding=_half(weight), groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        to_bias = grad.sum((0, 2, 3, 4)) if ctx.has_bias else None
        if ctx.stride != (1, 1, 1):
            grad = _spread(grad, ctx.stride, like=x)
        to_x = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3, 4)
            to_x = F.conv3d(grad, turned, padding=_half(weight), groups=len(weight))
        return to_x, _to_kernel(grad, x, weight), to_bias, None


def _half(weight: Tensor) -> tuple[int, ...]:
    """The padding."""
    return tuple(size // 2 for size in weight.shape[2:])


def _spread(grad: Tensor, stride: tuple[int, int, int], like: Tensor) -> Tensor:
    """The gradient of a map with a stride as one without: zero at the voxels in between."""
    whole = torch.zeros_like(like)
    i, j, k = stride
    whole[:, :, ::i, ::j, ::k] = grad
    return whole


def _to_kernel(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the kernel from maps of one size (B, C, X, Y, Z)."""
    sizes, half = weight.shape[2:], _half(weight)
    rows = _with_room([(size, size) for size in half], x)
    slopes = _with_room([(0, 2 * size) for size in half], grad)
    _, height, width = rows.shape[2:]
    places = product(*(range(size) for size in sizes))
    shifts = np.array([(i * height + j) * width + k for i, j, k in places])
    source, down = rows.flatten(0, 1).flatten(1).numpy(), slopes.flatten(0, 1).flatten(1).numpy()
    sums = np.empty((len(source), len(shifts)))
    length = down.shape[1] - int(shifts[-1])  # what follows is room

    def work(n: int) -> None:
        from medseg.kernels.depthwise import correlate

        correlate(down[n, :length], source[n], shifts, sums[n])

    in_parallel(work, len(source), torch.get_num_threads())
    total = sums.reshape(*x.shape[:2], -1).sum(0)
    return torch.from_numpy(total.astype(np.float32)).view(weight.shape)


def _with_room(room: list[tuple[int, int]], x: Tensor) -> Tensor:
    """A map with so many zeros before and after along each axis, densest along the last."""
    amounts = [amount for pair in reversed(room) for amount in pair]
    return F.pad(x, amounts).contiguous()
