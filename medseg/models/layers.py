"""Layers that several architectures share: trilinear resizing, tokens and their attention; and checks of options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def check_numbers(name: str, numbers: Sequence[int], most: int, count: int | None = None, least: int = 1) -> None:
    """Raise `ValueError` unless `numbers` are `count` (by default at most 10) whole numbers from `least` to `most`."""
    right = 1 <= len(numbers) <= 10 if count is None else len(numbers) == count
    if not right or not all(type(number) is int and least <= number <= most for number in numbers):
        many = "1 to 10" if count is None else str(count)
        raise ValueError(f"{name} {list(numbers)!r:.80} is not {many} whole numbers from {least} to {most}")


def check_number(name: str, number: int, most: int, least: int = 1) -> None:
    """Raise `ValueError` unless `number` is a whole number from `least` to `most`."""
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{name} {number!r:.80} is not a whole number from {least} to {most}")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) interpolated trilinearly to (B, C, *size); cells stay where they are (`align_corners=False`).

    Equal to `F.interpolate`, as one small matrix an axis: on a GPU its gradient is the same every time, which that of
    PyTorch's kernel is not.
    """
    for axis, length in enumerate(size, 2):
        if length != x.shape[axis]:
            weights = _linear(x.shape[axis], length, x.device).to(x.dtype)
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            last = axis == x.ndim - 1
            x = x @ weights.T if last else weights @ x.reshape(-1, x.shape[axis], after.numel())
            x = x.reshape(*before, length, *after)
    return x


def _linear(length: int, wanted: int, device: torch.device) -> Tensor:
    """(wanted, length): weights that interpolate `length` cells of an axis at the middles of `wanted` ones."""
    at = ((torch.arange(wanted, device=device) + 0.5) * (length / wanted) - 0.5).clamp(0, length - 1)
    return (1 - (at[:, None] - torch.arange(length, device=device)).abs()).clamp(min=0)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The map normalised at each voxel."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of tokens (B, N, width) to other tokens (B, M, width).

    Keys have no bias, as softmax would cancel it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, to: Tensor, allowed: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """(B, N, width). `allowed` (B, N, M) bool says where to look; `position` (.., M, width) is added to keys."""
        b, n, width = x.shape
        split = lambda y: y.view(b, -1, self.heads, width // self.heads).transpose(1, 2)  # noqa: E731
        keys = to if position is None else to + position
        seen = None if allowed is None else allowed[:, None]
        y = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(keys)), split(self.value(to)), attn_mask=seen
        )
        return self.out(y.transpose(1, 2).reshape(b, n, width))
