"""What runs a network: checkpoints opened as one `Predictor`.

A predictor takes patches (B, C, X, Y, Z) float32 and returns features (B, F, X, Y, Z) of any floating type. Where the
network ends in a 1x1x1 convolution and that is no wider than what it reads, features are what that layer reads, and
`head` is the layer, to be applied once everything else is summed up; otherwise features are logits.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from medseg.errors import BadConfig, BadModel, DataWarning, NotEnoughMemory
from medseg.fast_conv import accelerate
from medseg.models.folder import Checkpoint
from medseg.painter import Head, Slopes
from medseg.processor import has_matrix_units
from medseg.window import Predict

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
#: Networks up to this wide hand over their features even where they have fewer classes: adding up 16 channels instead
#: of 2 costs a few per cent of a run, and memory is then the same for 2 classes and for 200.
ALWAYS_DEFER = 16
#: Seconds of predicting from which on the three or four that a trial of OpenVINO takes do not matter.
OPENVINO_PAYS_S = 120.0
#: How much faster than PyTorch it must then be for one window.
OPENVINO_GAIN = 1.1


@dataclass
class Predictor:
    """Features of patches, and the head that makes logits of them (None: they are logits)."""

    run: Predict
    features: int
    head: Head | None
    backend: str
    precision: str
    cell: int = 1  # the head makes logits of so many voxels along each axis from one feature vector

    def __call__(self, patches: Tensor) -> Tensor:
        """Features (B, F, X/cell, Y/cell, Z/cell) of patches (B, C, X, Y, Z)."""
        return self.run(patches)


def choose_device(device: Device) -> torch.device:
    """The device asked for; 'auto' is a GPU where there is one. Raises `BadConfig` if there is none to be had."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadConfig("there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the network: 'auto' is fp16 on a GPU; on a CPU bf16 where that is faster, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if _bf16_is_faster() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise BadConfig("fp16 is very slow on a CPU; use --precision bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@cache
def _bf16_is_faster() -> bool:
    """Whether this processor convolves bfloat16 faster than medseg's own kernels do float32, by trying.

    Its flags do not tell: processors with AVX512-BF16 were measured at twice, and at half, their float32 speed. Only
    matrix units (AMX) leave no doubt: seven times.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if has_matrix_units():
        return True
    with torch.inference_mode():
        block = nn.Sequential(
            nn.Conv3d(32, 32, 3, padding=1, bias=False), nn.GroupNorm(32, 32), nn.LeakyReLU(0.01, inplace=True)
        ).eval()
        x = torch.rand(1, 32, 32, 32, 32).contiguous(memory_format=torch.channels_last_3d)
        fast = accelerate(block)

        def halved() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return fast(x)

        return _seconds(lambda: _used(halved())) < _seconds(lambda: _used(fast(x)))


def _used(y: Tensor) -> float:
    """A result that something needs: what `accelerate` leaves undone is done."""
    return float(y.flatten()[0])


def _seconds(work: Callable[[], Any], tries: int = 3) -> float:
    """The shortest of several tries after one that does not count."""
    times = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def open_torch(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, exact: bool = False, defer: bool = True
) -> Predictor:
    """The network in PyTorch. Logits that are not finite are computed again in fp32; if they stay so, `BadModel`.

    On a CPU in fp32 it runs on medseg's own convolutions (`fast_conv`) unless `exact`. When a GPU runs out of memory,
    batches are halved, and then the CPU goes on; each step is told as a `DataWarning`.
    """
    network = checkpoint.network()
    width, cell, head = deferred_head(network) if defer else (0, 1, None)
    run = _Torch(_Body(network) if head else network, checkpoint.spec.name, device, dtype, exact)
    return Predictor(run, width or checkpoint.spec.outputs, head, "torch", _name(dtype), cell)


def deferred_width(network: nn.Module) -> tuple[int, int]:
    """How many features the network's last layer reads, and the voxels along each axis that it makes logits of.

    (0, 1) if it may not be applied after blending, or that does not pay.
    """
    head = getattr(network, "head", None)
    if not hasattr(network, "features") or not isinstance(head, nn.Conv3d) or set(head.kernel_size) != {1}:
        return 0, 1
    cell = int(getattr(network, "stem", 1))
    width = head.in_channels + (cell**3 if getattr(network, "slope", None) is not None else 0)
    return (width, cell) if _worth_deferring(width / cell**3, head.out_channels // cell**3) else (0, 1)


def _worth_deferring(features: float, outputs: int) -> bool:
    return features <= max(outputs, ALWAYS_DEFER)


def deferred_head(network: nn.Module) -> tuple[int, int, Head | None]:
    """(features, cell, head) if the network's last layer is to be applied after blending, else (0, 1, None)."""
    width, cell = deferred_width(network)
    if not width:
        return 0, 1, None
    weights, bias = _linear(network.head, width)
    slopes: Any = getattr(network, "slope", None)
    own = int(cast(nn.Conv3d, network.head).in_channels)
    return width, cell, Head(weights, bias, None if slopes is None else Slopes(*_linear(slopes, width), own))


def _linear(layer: Any, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (K, width), with zeros for features beyond those that a 1x1x1 convolution reads, and biases (K,)."""
    weights = layer.weight.detach().float().flatten(1).numpy()
    bias = np.zeros(len(weights), np.float32) if layer.bias is None else layer.bias.detach().float().numpy()
    return np.pad(weights, ((0, 0), (0, width - weights.shape[1]))), bias.copy()


class _Body(nn.Module):
    """A network without its head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.features(x)  # type: ignore[operator]
        return features


class _Torch:
    """A network on a device that steps down when memory runs out and retries in fp32 what is not finite."""

    def __init__(self, network: nn.Module, name: str, device: torch.device, dtype: torch.dtype, exact: bool) -> None:
        self.name, self.exact, self.most = name, exact, 2**31
        self.plain = network  # on the CPU, float32, as loaded
        self.place(device, dtype)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the network ready for a device and an arithmetic."""
        self.device, self.dtype = device, dtype
        if device.type == "cpu":
            self.network = self.plain if self.exact and dtype == torch.float32 else accelerate(self.plain)
        else:
            self.network = _channels_last(self.plain.to(device))

    def __call__(self, patches: Tensor) -> Tensor:
        """Features of patches, whatever memory and arithmetic allow."""
        if len(patches) > self.most:
            return torch.cat([self(part) for part in patches.split(self.most)])
        try:
            return self.finite(patches.to(self.device))
        except torch.OutOfMemoryError:
            pass  # outside of the handler, so that nothing of the failed run is kept alive by the traceback
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise NotEnoughMemory(f"the network of {self.name} does not fit into memory; use --max-memory") from None
        if self.device.type == "cpu":
            raise NotEnoughMemory(f"the network of {self.name} does not fit into the memory of this machine")
        torch.cuda.empty_cache()
        if len(patches) > 1:
            self.most = len(patches) // 2
            warnings.warn(f"the GPU ran out of memory; windows go {self.most} at a time", DataWarning, stacklevel=2)
        else:
            self.place(torch.device("cpu"), choose_precision("auto", torch.device("cpu")))
            warnings.warn("the GPU ran out of memory; the CPU goes on", DataWarning, stacklevel=2)
        return self(patches)

    def finite(self, x: Tensor) -> Tensor:
        """The network's answer if it is finite, else the answer in fp32; `BadModel` if that is not either."""
        features = self.forward(x, self.dtype)
        if _is_finite(features):
            return features
        if self.dtype != torch.float32:
            features = self.forward(x, torch.float32)
        if not _is_finite(features):
            raise BadModel(f"the model {self.name} gives values that are not finite on this scan")
        return features

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The network in an arithmetic; weights stay float32 and are cast as they are used."""
        if not self.exact:  # norms over channels that lie last sum less accurately
            x = x.contiguous(memory_format=torch.channels_last_3d)
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features: Tensor = self.network(x)
        return features


def _channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def _is_finite(features: Tensor) -> bool:
    return bool(torch.isfinite(features.sum(dtype=torch.float32)))  # a sum needs no copy, and NaN and Inf survive it


def open_openvino(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, exact: bool = False, defer: bool = True
) -> Predictor:
    """The network in OpenVINO, for CPUs; compiled for the model's patch.

    Raises `BadConfig` if it is not installed or cannot run this network.
    """
    try:
        import openvino
    except ImportError:
        raise BadConfig('OpenVINO is not installed; install it with pip install "medseg[openvino]"') from None
    if device.type != "cpu":
        raise BadConfig("the openvino backend runs on a CPU; use --device cpu")
    network = checkpoint.network()
    width, cell, head = deferred_head(network) if defer else (0, 1, None)
    spec = checkpoint.spec
    hint = "f32" if dtype == torch.float32 else "bf16"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every size it takes for a constant
            example = torch.zeros(1, spec.channels, *spec.patch)  # of this size: some networks compute with it
            model = openvino.convert_model(_Body(network) if head else network, example_input=example)
        model.reshape([1, spec.channels, *spec.patch])
        request = compile_openvino(model, hint).create_infer_request()
    except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
        why = str(error).strip().split("\n")[0]
        raise BadConfig(f"OpenVINO cannot run the network of {spec.name} ({why}); use --backend torch") from None

    def run(patches: Tensor) -> Tensor:
        outputs = []
        for patch in patches:
            request.infer([patch[None].float().contiguous().numpy()])
            outputs.append(torch.from_numpy(request.get_output_tensor(0).data.copy()))
        features = torch.cat(outputs)
        if not _is_finite(features):
            raise BadModel(f"the model {spec.name} gives values that are not finite on this scan")
        return features

    return Predictor(run, width or spec.outputs, head, "openvino", "float32" if hint == "f32" else "bfloat16", cell)


def compile_openvino(model: Any, hint: str) -> Any:
    """An OpenVINO model compiled for this CPU and thread count; hint: 'f32' or 'bf16'."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino_core()
    try:
        # Without its fused kernels ("snippets"): compiling them ended the process for residual blocks (measured with
        # 2026.4), and networks run as fast without.
        return core.compile_model(model, "CPU", options | {"SNIPPETS_MODE": "DISABLE"})
    except RuntimeError as error:
        if "SNIPPETS_MODE" not in str(error):
            raise
        return core.compile_model(model, "CPU", options)  # a version that does not have them


@cache
def openvino_core() -> Any:
    """OpenVINO's core, kept for ever: its CPU plugin lends this thread a stack for signal handlers and frees it in the
    end, after which Ctrl-C would crash the process (measured with 2026.4)."""
    import openvino

    return openvino.Core()


#: Name -> open(checkpoint, device, dtype, exact=, defer=).
BACKENDS: dict[str, Callable[..., Predictor]] = {"torch": open_torch, "openvino": open_openvino}


def open_models(
    checkpoints: Sequence[Checkpoint],
    *,
    backend: str = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    mirror: Sequence[int] = (),
    windows: int = 0,
) -> Predictor:
    """One predictor for one or several checkpoints of the same task, whose logits are averaged.

    mirror: axes (0, 1, 2) along which patches are also predicted mirrored, in all combinations. windows: how many there
    will be; 'auto' tries OpenVINO, where it is installed, if so many take long enough for it to pay. 'fp32' is exact:
    plain convolutions; 'auto' may use faster ones that round a little more.
    """
    place = choose_device(device)
    dtype = choose_precision(precision, place)
    exact = precision == "fp32"
    classes = checkpoints[0].spec.outputs
    first = BACKENDS["torch" if backend == "auto" else backend](checkpoints[0], place, dtype, exact=exact)
    if backend == "auto" and place.type == "cpu" and not exact and _openvino_pays(checkpoints[0], first, windows):
        with suppress(BadConfig):  # of networks that it cannot run
            candidate = open_openvino(checkpoints[0], place, dtype)
            patch = _example(checkpoints[0])
            if _seconds(lambda: candidate(patch), 1) * OPENVINO_GAIN < _seconds(lambda: first(patch), 1):
                first = candidate
    predictors = [first, *(BACKENDS[first.backend](one, place, dtype, exact=exact) for one in checkpoints[1:])]
    together = sum(one.features for one in predictors) / first.cell**3
    alike = all(one.head and one.cell == first.cell for one in predictors)
    apart = len(predictors) > 1 and not (alike and _worth_deferring(together, classes))
    if apart or (mirror and first.cell > 1):  # the voxels of a mirrored cell would have to change places
        predictors = [BACKENDS[first.backend](one, place, dtype, exact=exact, defer=False) for one in checkpoints]
    joined = _ensemble(predictors) if len(predictors) > 1 else predictors[0]
    return _mirrored(joined, mirror) if mirror else joined


def blended_features(checkpoints: Sequence[Checkpoint], mirrored: bool = False) -> tuple[int, int]:
    """How many numbers `open_models` of these checkpoints gives, and for how many voxels along each axis.

    Found without loading any weights. mirrored: whether patches are also predicted mirrored.
    """
    from medseg.networks.zoo import build_model

    outputs = checkpoints[0].spec.outputs
    found = []
    for one in checkpoints:
        with torch.device("meta"):
            network = build_model(one.spec.architecture, one.spec.channels, outputs, **one.spec.options)
        found.append(deferred_width(network))
    together, cell = sum(width for width, _ in found), found[0][1]
    if not all(width and one == cell for width, one in found) or not _worth_deferring(together / cell**3, outputs):
        return outputs, 1
    return (outputs, 1) if mirrored and cell > 1 else (together, cell)


def _openvino_pays(checkpoint: Checkpoint, predictor: Predictor, windows: int) -> bool:
    from importlib.util import find_spec

    if windows < 2 or find_spec("openvino") is None:
        return False
    patch = _example(checkpoint)
    return _seconds(lambda: predictor(patch), 1) * windows > OPENVINO_PAYS_S


def _example(checkpoint: Checkpoint) -> Tensor:
    return torch.rand(1, checkpoint.spec.channels, *checkpoint.spec.patch)


def _ensemble(predictors: list[Predictor]) -> Predictor:
    """The mean of several predictors' logits; with heads their features side by side and one head for all."""
    heads = [one.head for one in predictors if one.head is not None]
    count = len(predictors)
    first = predictors[0]
    if len(heads) == count:
        weights = np.concatenate([head.weights for head in heads], 1) / count
        bias = np.mean([head.bias for head in heads], 0).astype(np.float32)
        head = Head(weights.astype(np.float32), bias, _side_by_side([head.slopes for head in heads], predictors))
        width = sum(one.features for one in predictors)
        run: Predict = lambda x: torch.cat([one(x) for one in predictors], 1)  # noqa: E731
        return Predictor(run, width, head, first.backend, first.precision, first.cell)

    def mean(x: Tensor) -> Tensor:
        total = predictors[0](x).float()
        for one in predictors[1:]:
            total = total + one(x).float()
        return total / count

    return Predictor(mean, first.features, None, first.backend, first.precision)


def _side_by_side(slopes: Sequence[Slopes | None], predictors: Sequence[Predictor]) -> Slopes | None:
    """The mean of several, their features side by side; voxels' own numbers are the same in each that has them."""
    if all(one is None for one in slopes):
        return None
    outputs = next(len(one.bias) for one in slopes if one is not None)
    begins = np.cumsum([0, *(one.features for one in predictors)])
    weights, bias, own = np.zeros((outputs, begins[-1]), np.float32), np.zeros(outputs, np.float32), 0
    for one, begin, end in zip(slopes, begins[:-1], begins[1:]):
        if one is not None:
            weights[:, begin:end] = one.weights / len(slopes)
            bias += one.bias / len(slopes)
            own = int(begin) + one.own
    return Slopes(weights, bias, own)


def _mirrored(predictor: Predictor, axes: Sequence[int]) -> Predictor:
    """The mean over all mirrorings of patches along `axes`, each mirrored back (test-time augmentation)."""
    flips = list(chain.from_iterable(combinations([2 + axis for axis in axes], n) for n in range(len(axes) + 1)))

    def run(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for dims in flips:
            part = predictor(x.flip(dims) if dims else x).float()
            total = total.to(part.device) + (part.flip(dims) if dims else part)
        return total / len(flips)

    return Predictor(run, predictor.features, predictor.head, predictor.backend, predictor.precision, predictor.cell)


def _convolved(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    """An empty tensor of the shape that a convolution has; arguments as of `aten::convolution`."""
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, extra, strict=True)
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in axes]
        return x.new_empty((x.shape[0], weight.shape[1] * groups, *size))
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


def _normed(x: Tensor, weight: Any, bias: Any, batch: int, channels: int, size: int, groups: int, eps: float) -> Any:
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

        shaped = _SHAPED.get(str(func))
        out = shaped(*args) if shaped else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def activation_bytes(checkpoint: Checkpoint, batch: int = 1, deferred: bool = False) -> int:
    """The most bytes that tensors made by a forward pass in float32 hold at one time; nothing is computed.

    deferred: without the network's last layer.
    """
    from medseg.networks.zoo import build_model

    spec = checkpoint.spec
    with torch.device("meta"), torch.no_grad():  # in inference mode operations would come whole, not in their parts
        network = build_model(spec.architecture, spec.channels, spec.outputs, **spec.options).eval()
        network.to("meta")  # constants too
        patches = torch.empty(batch, spec.channels, *spec.patch)
        with _Living() as living:
            (_Body(network) if deferred else network)(patches)
    return living.peak


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
