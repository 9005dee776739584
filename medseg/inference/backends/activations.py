"""How many bytes the maps of a network need that live at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medseg.errors import BadModel
from medseg.inference.backends.kept import known_of
from medseg.inference.backends.predictor import Body
from medseg.models import Checkpoint, ModelSpec, StepRecipe


def _convolved(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, extra: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    """An empty tensor of the shape that a convolution has; arguments as of `aten::convolution`."""
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, extra, strict=True)
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in axes]
        return x.new_empty((x.shape[0], weight.shape[1] * groups, *size))
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


def _normed(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, size: int, groups: int, eps: float
) -> Any:
    """Empty tensors of the shapes of `aten::native_group_norm`."""
    return x.new_empty(x.shape), x.new_empty((batch, groups)), x.new_empty((batch, groups))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """An empty tensor of the shape of `aten::cat`."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return tensors[0].new_empty(shape)


def _together(x: Tensor, y: Any) -> Tensor:
    """An empty tensor of the shape that x and a tensor or number y have together."""
    return x.new_empty(torch.broadcast_shapes(x.shape, getattr(y, "shape", ())))


#: Operations whose shapes PyTorch itself works out with half its compiler, a second of imports.
_SHAPED: dict[str, Callable[..., Any]] = {
    "aten.convolution.default": _convolved,
    "aten.native_group_norm.default": _normed,
    "aten.leaky_relu_.default": lambda x, *_: x,
    "aten.leaky_relu.default": lambda x, *_: x.new_empty(x.shape),
    "aten.cat.default": _joined,
    "aten.add.Tensor": _together,
    "aten.sub.Tensor": _together,
    "aten.mul.Tensor": _together,
}


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would import its compiler, a second of modules, to keep it away from here.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils._pytree import tree_leaves

        substitute = _SHAPED.get(str(func))
        out = substitute(*args) if substitute else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def activation_bytes(checkpoint: Checkpoint, batch: int = 1, deferred: bool = False) -> int:
    """The most bytes that tensors made by a forward pass in float32 hold at one time; nothing is
    computed.

    deferred: without the network's last layer.
    """
    key = ("activations", str(checkpoint.folder), checkpoint.spec.sha256, checkpoint.spec.patch)
    ask = partial(_measure, checkpoint, batch, deferred=deferred)
    return int(known_of((*key, batch, deferred), ask))


def _measure(checkpoint: Checkpoint, batch: int, deferred: bool) -> int:
    spec, network = checkpoint.spec, checkpoint.outline()
    # In inference mode operations would come whole, not in their parts.
    with (
        torch.device("meta"),
        torch.no_grad(),
    ):
        patches = torch.empty(batch, spec.inputs, *spec.patch)
        try:
            with _Living() as living:
                outputs = (Body(network) if deferred else network)(patches)
        except (RuntimeError, ValueError, ArithmeticError) as error:  # shapes that do not fit
            size = " x ".join(map(str, spec.patch))
            reason = " ".join(str(error).split())
            raise BadModel(
                f"the model {spec.name} cannot take its patch of {size}: {reason}"
            ) from None
    if isinstance(spec.recipe, StepRecipe) and not deferred:
        _check_size(spec, spec.recipe, outputs.shape[2:])
    return living.peak


def _check_size(spec: ModelSpec, recipe: StepRecipe, shape: Sequence[int]) -> None:
    """Raise `BadModel` for a network whose outputs are no map of its window, voxel by voxel.

    Where one window is the whole image, a voxel more, which a network adds to an odd number of
    them, is cut off, as MONAI does when it saves.
    """
    single = all(recipe.whole) and recipe.weights == "constant"
    for side, length in zip(spec.patch, shape):
        if length < side or (length > side and not single):
            window, size = (" x ".join(map(str, one)) for one in (spec.patch, shape))
            raise BadModel(
                f"the model {spec.name} makes outputs of {size} voxels of a window of {window}, and"
                " medseg runs those that make as many as they see"
            )
