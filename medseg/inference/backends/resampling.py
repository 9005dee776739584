"""Linear and cubic interpolation between parallel grids on a card: a product for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.inference.backends.cards import is_out_of_memory
from medseg.inference.backends.copies import Courier
from medseg.resampling import AxisOperator

#: Kinds of numbers that go to a card as they are; others become float32 before.
_SENT = (np.uint8, np.int16, np.float32)


class OnCard:
    """An `Elsewhere` of `resampling`."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier

    def __call__(
        self, data: NDArray, operators: Sequence[AxisOperator], *, order: int, outside: float
    ) -> NDArray[np.float32] | None:
        """`data` (A, B, C) on another grid; None where the card has no room, and of what is not
        finite, which a product would spread over whole lines.
        """
        if data.dtype.kind == "f" and not np.isfinite(data.sum(dtype=np.float64)):
            return None
        try:
            return self._there(data, operators, order=order, outside=outside)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _there(
        self, data: NDArray, operators: Sequence[AxisOperator], *, order: int, outside: float
    ) -> NDArray[np.float32]:
        kind = data.dtype if data.dtype in _SENT else np.float32
        array = np.ascontiguousarray(data, kind)
        x = self._courier.send(torch.from_numpy(array)).float()
        # What makes an axis shorter comes first: less is left for the others.
        sizes = [len(one.first) / size for one, size in zip(operators, data.shape)]
        for axis in sorted(range(3), key=lambda axis: sizes[axis]):
            if _changes_nothing(operators[axis], data.shape[axis], order):
                continue
            weights = matrix_of(operators[axis], data.shape[axis], order)
            x = _along(x, torch.from_numpy(weights).to(x.device), axis)
        if outside:
            a, b, c = (torch.from_numpy(one.inside).to(x.device) for one in operators)
            x += outside * (1 - a[:, None, None] * b[:, None] * c)
        values: NDArray[np.float32] = x.cpu().numpy()
        return values


def _changes_nothing(operator: AxisOperator, size: int, order: int) -> bool:
    """Whether each output is an input, of which no bit may change."""
    first, weights = operator.first, operator.weights
    is_same = weights.shape == (size, 1) and bool((first == np.arange(size)).all())
    return order == 1 and is_same and bool((weights == 1).all())


def _along(x: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    """(A, B, C) times weights (outputs, inputs) along an axis."""
    if axis == 0:
        return (weights @ x.reshape(len(x), -1)).view(len(weights), *x.shape[1:])
    return weights @ x if axis == 1 else x @ weights.T


def matrix_of(operator: AxisOperator, size: int, order: int) -> NDArray[np.float32]:
    """(outputs, size) of an operator; for order 3 with the spline's filter before it."""
    dense = np.zeros((len(operator.first), size))
    taps = operator.weights.shape[1]
    np.put_along_axis(dense, operator.first[:, None] + np.arange(taps), operator.weights, 1)
    if order == 3 and size > 1:
        dense = dense @ _filter(size)
    return dense.astype(np.float32)


@cache
def _filter(size: int) -> NDArray[np.float64]:
    """(size, size) samples to coefficients of the cubic B-spline through them, mirrored at the ends
    (Unser 1999).
    """
    samples = np.diag(np.full(size, 4.0)) + np.diag(np.ones(size - 1), 1)
    samples += np.diag(np.ones(size - 1), -1)
    samples[0, 1] = samples[-1, -2] = 2.0
    coefficients: NDArray[np.float64] = np.asarray(np.linalg.inv(samples / 6), np.float64)
    return coefficients
