"""A network made several times faster on a CPU: in float32 by Winograd convolutions that normalise
what they read.

`accelerate` copies a network and replaces each 3x3x3 convolution with what follows it in an
`nn.Sequential` (instance norm, ReLU or leaky ReLU) by one module. The convolution runs as F(4x4x4,
3x3x3) of Lavin & Gray 2016 (arXiv:1509.09308) where its size makes that worth while, otherwise in
oneDNN. It leaves its output raw, as a `Deferred` tensor: the norm and the activation are applied
while the next convolution reads it, or in place once anything else needs it.

In bfloat16, under autocast, convolutions are oneDNN's, which are faster than that on processors
with matrix units, and the norm and the activation are one step after them, with sums in float32.

In float32 results differ from float64 by about as much as a plain float32 network's do times ten:
some 1e-5 of the logits' spread. They do not depend on the number of threads.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.inference.backends.deferred import (
    Deferred,
    Source,
    empty_map,
    kept_apart,
    settled,
    sources_of,
)
from medseg.kernels.threads import in_parallel
from medseg.networks import Block, as_group_norms
from medseg.networks.ops.norm import LANES, combined, moments, numbers

#: Mean and variance (B, C) of a map.
_Spread = tuple[np.ndarray, np.ndarray]
#: A convolution of at most this many channels has a direct kernel; its unit of work is this many
#: voxels or one row.
FEW, _DIRECT_VOXELS = 4, 2048
#: Voxels of the input that a transposed convolution takes as one unit of work.
_DOUBLE_VOXELS = 108
#: Maps shorter than this along any axis are convolved directly: reading Winograd's weights would
#: take longer.
_SHORTEST = 10


#: Planes that an output lies before an input whose place it takes: as many as two planes of tiles,
#: which are written together, and the one before them, which they read.
MARGIN = 9
#: Called with a number of planes.
Then = Callable[[int], None]
#: What a module is replaced by as a whole; None where it is not.
Form = Callable[[nn.Module], nn.Module | None]


def accelerate(network: nn.Module, form_of: Form = lambda module: None) -> nn.Module:
    """A copy of an inference network that is fast on a CPU: its convolutions, instance norms and
    activations. form_of: what else is replaced, as a whole.

    Takes and returns what the network does; logits come in channels-last memory. It computes in
    float32, or in bfloat16 under autocast; inputs on another device, and calls that record
    gradients, run the original modules. The network itself is not changed; what does not match is
    left as it is.
    """
    # Weights are never written here, so the copy shares them: they may be a gigabyte.
    weights = [*network.parameters(), *network.buffers()]
    network = copy.deepcopy(network, {id(weight): weight for weight in weights}).eval()
    as_group_norms(network)
    _replace(network, {}, form_of)
    return network


def _replace(module: nn.Module, done: dict[nn.Module, nn.Module], form_of: Form) -> None:
    """Puts fast modules into `module` and its children.

    A module that is used twice stays one module; but a convolution that two Sequentials share gets
    a replacement in each, as what follows it may differ.
    """
    if module in done:
        return
    done[module] = module
    if type(module) is nn.Sequential or isinstance(module, Block):
        for name, fast, followers in _chains(module):
            setattr(module, name, fast)
            for follower in followers:
                setattr(module, follower, nn.Identity())
    for name, child in list(module._modules.items()):  # named_children() names a shared one once
        if isinstance(child, nn.ConvTranspose3d) and _doubles(child):
            setattr(module, name, done.setdefault(child, FastUp(child)))
        elif child is not None and not isinstance(child, FastConv):
            if child not in done:
                _replace(child, done, form_of)
                if (form := form_of(child)) is not None:
                    done[child] = done[form] = form
            if done[child] is not child:
                setattr(module, name, done[child])


def _doubles(conv: nn.ConvTranspose3d) -> bool:
    """Whether a transposed convolution makes 2x2x2 voxels of each, none from two."""
    plain = (
        conv.groups == 1
        and conv.padding == conv.output_padding == (0, 0, 0)
        and conv.dilation == (1, 1, 1)
    )
    blocks = conv.in_channels % LANES == conv.out_channels % LANES == 0
    return (
        plain
        and blocks
        and conv.kernel_size == conv.stride == (2, 2, 2)
        and conv.weight.dtype == torch.float32
    )


def _chains(sequence: nn.Sequential) -> Iterator[tuple[str, FastConv, list[str]]]:
    """(name of a convolution, what replaces it, names of the norm and activation that it takes
    in).
    """
    children = list(sequence.named_children())
    for n, (name, conv) in enumerate(children):
        if not isinstance(conv, nn.Conv3d) or not is_plain(conv):
            continue
        following = children[n + 1 :]
        norm = slope = None
        if following and _is_instance_norm(following[0][1], conv.out_channels):
            norm = following[0][1]
        rest = following[1:] if norm else following
        if rest and (slope := _slope(rest[0][1])) is not None:
            rest = rest[1:]
        layer_names = [name for name, _ in following[: len(following) - len(rest)]]
        yield name, FastConv(conv, norm, 1.0 if slope is None else slope), layer_names


def is_plain(conv: nn.Conv3d) -> bool:
    """Whether a convolution is one that `FastConv` does: of all channels, padded by zeros, in
    float32.
    """
    plain = conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.out_channels % LANES == 0 and conv.weight.dtype == torch.float32


def _is_instance_norm(module: nn.Module, channels: int) -> bool:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == module.num_channels == channels
    return isinstance(module, nn.InstanceNorm3d) and not module.track_running_stats


def _slope(module: nn.Module) -> float | None:
    """The factor of negative values in an activation; None if it is no (leaky) ReLU."""
    if type(module) is nn.ReLU:
        return 0.0
    return (
        float(module.negative_slope)
        if type(module) is nn.LeakyReLU and 0 <= module.negative_slope <= 1
        else None
    )


def is_half(x: Tensor) -> bool:
    """Whether a convolution of x is to be in bfloat16, as autocast says."""
    return x.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _halves(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and bias in bfloat16, channels innermost."""
    half = weight.detach().to(torch.bfloat16, memory_format=torch.channels_last_3d)
    return half, None if bias is None else bias.detach().bfloat16()


def _adds(conv: nn.Conv3d) -> bool:
    """Whether this PyTorch has the operation of `_add_convolution`, and this processor the
    instructions it wants.

    The operation is private, so it may go; on processors with AVX2 alone it refuses bfloat16.
    """
    there = (
        hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return there and not isinstance(conv.padding, str)


def _add_convolution(y: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv3d) -> None:
    """Adds the convolution of x to y, in float32 before it is rounded."""
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    add(y, x, weight, None, conv.padding, conv.stride, conv.dilation, 1, "add", 1.0, None, [], None)


class FastConv(nn.Module):
    """A convolution with the instance norm and activation after it; what it returns may be
    `Deferred`.
    """

    def __init__(self, conv: nn.Conv3d, norm: nn.Module | None = None, slope: float = 1.0) -> None:
        super().__init__()
        self.conv, self.slope = conv, slope
        self.norm: Any = norm
        self._packed: np.ndarray | None = None
        self._half: dict[tuple[int, ...], tuple[list[Tensor], Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D, H, W), less where the convolution has a
        stride.
        """
        half = is_half(x)
        known = half or x.dtype == torch.float32
        if not known or x.device.type != "cpu" or torch.is_grad_enabled():
            return self._plainly(x)
        source = self.source(x, half=half)
        return source.map if source.scale is None else Deferred([source])

    def source(
        self, x: Tensor, *, half: bool, y: Tensor | None = None, then: Then | None = None
    ) -> Source:
        """The raw convolution of x on a CPU, and what is still to be done to it.

        y: where to, which may lie `MARGIN` planes before a map of x in the same memory, where
        `pays` and `can_turn`. then: called with how many planes of x are read no more.
        """
        y, spread = self._convolved(x, half=half, y=y, then=then)
        if self.norm is None and self.slope == 1:
            return Source(y)
        scale, shift = self.normalisation(y, spread)
        return Source(y, scale, shift, slope=self.slope)

    def _convolved(
        self, x: Tensor, *, half: bool, y: Tensor | None = None, then: Then | None = None
    ) -> tuple[Tensor, _Spread | None]:
        """The convolution by what is fastest, and its spread where that is known already."""
        if self.conv.in_channels <= FEW and self.pays(x):
            return self._direct(settled(x), torch.bfloat16 if half else torch.float32, y)
        if half:
            return self._halved(x), None
        if self.pays(x):
            return self._winograd(x, y, then)
        y = self.conv(settled(x).contiguous(memory_format=torch.channels_last_3d))
        return y.contiguous(memory_format=torch.channels_last_3d), None

    def _halved(self, x: Tensor) -> Tensor:
        """The convolution in bfloat16, by oneDNN; a norm takes no notice of a bias.

        Joined maps are convolved one by one and added up: joining them would take as long as a
        third of it, and oneDNN is several times slower with 512 channels than with twice 256.
        """
        conv = self.conv
        maps = (
            [source.settle() for source in x.sources]
            if isinstance(x, Deferred) and _adds(conv)
            else [settled(x)]
        )
        widths = tuple(y.shape[1] for y in maps)
        if widths not in self._half:
            weight, bias = _halves(conv.weight, conv.bias if self.norm is None else None)
            parts = weight.split(widths, 1)
            self._half[widths] = (
                [w.contiguous(memory_format=torch.channels_last_3d) for w in parts],
                bias,
            )
        weights, bias = self._half[widths]
        maps = [y.to(torch.bfloat16, memory_format=torch.channels_last_3d) for y in maps]
        y = F.conv3d(maps[0], weights[0], bias, conv.stride, conv.padding, conv.dilation)
        y = y.contiguous(memory_format=torch.channels_last_3d)
        for other, weight in zip(maps[1:], weights[1:]):
            _add_convolution(y, other, weight, conv=conv)
        return y

    def _plainly(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        y = self.norm(y) if self.norm is not None else y
        return F.leaky_relu(y, self.slope) if self.slope != 1 else y

    def pays(self, x: Tensor) -> bool:
        """Whether one of the kernels here can do it faster than oneDNN."""
        conv = self.conv
        if not (
            conv.kernel_size == (3, 3, 3)
            and conv.stride == conv.dilation == conv.padding == (1, 1, 1)
        ):
            return False
        if conv.in_channels <= FEW:
            return True
        return conv.in_channels % LANES == 0 and min(x.shape[2:]) >= _SHORTEST

    def can_turn(self, size: tuple[int, ...]) -> bool:
        """Whether the convolution of a map of this size can take that map's place."""
        width, across, down, deep = self.conv.out_channels, *(-(-n // 4) for n in size[::-1])
        room = _room(across * down * deep, self.conv.in_channels // LANES, width // LANES)
        return room <= across * down

    def _winograd(
        self, x: Tensor, y: Tensor | None = None, then: Then | None = None
    ) -> tuple[Tensor, _Spread]:
        from medseg.kernels.winograd import POINTS, convolve_unit, pack_weights

        conv = self.conv
        if self._packed is None:
            self._packed = kept_apart(
                pack_weights(conv.weight.detach().numpy(), threads=torch.get_num_threads())
            )
        weights = self._packed
        sources = sources_of(x)
        if len(sources) > 2 or any(source.map.shape[1] % LANES for source in sources):
            sources = sources_of(settled(x))
        nothing = np.zeros(0, np.float32)
        one, two = [
            *(source.arguments() for source in sources),
            (nothing, 0, nothing, nothing, 1.0),
        ][:2]
        batch, size = x.shape[0], tuple(x.shape[2:])
        outputs, inputs = conv.out_channels // LANES, conv.in_channels // LANES
        turns = y is not None
        y = empty_map(batch, conv.out_channels, size) if y is None else y
        flat, bias = numbers(y), self._bias()
        extents = [np.minimum(4, np.arange(length, 0, -4)) for length in size]
        tiles = np.multiply.outer(np.multiply.outer(extents[0], extents[1]), extents[2]).ravel()
        room = _room(tiles.size, inputs, outputs)
        counts = np.add.reduceat(tiles, np.arange(0, tiles.size, room))
        sums = np.empty((batch * counts.size, outputs * 3 * LANES), np.float32)

        def work(unit: int) -> None:
            scratch = _scratch(POINTS * LANES * ((inputs + outputs) * room + 3))
            convolve_unit(unit, room, size, one, two, weights, bias, outputs, flat, sums, scratch)

        plane, units = extents[1].size * extents[2].size, batch * counts.size
        for turn in _turns(units, room, plane) if turns else [range(units)]:
            in_parallel(_from(turn.start, work), len(turn), torch.get_num_threads())
            if then is not None:
                then(size[0] if turn.stop == units else 4 * (turn.stop * room // plane) - 1)
        return y, combined(sums, np.tile(counts, batch), batch)

    def _direct(
        self, x: Tensor, dtype: torch.dtype, y: Tensor | None = None
    ) -> tuple[Tensor, _Spread]:
        """The convolution of a map of a few channels, channels-first or not."""
        from medseg.kernels.winograd import RUN, convolve_rows, pack_direct_weights

        conv = self.conv
        if self._packed is None:
            self._packed = pack_direct_weights(conv.weight.detach().numpy())
        weights = self._packed
        batch, channels, *lengths = x.shape
        size = tuple(lengths)
        row = -(-size[2] // RUN) * RUN + 2
        padded_map = torch.zeros(batch, channels, size[0] + 2, size[1] + 2, row)
        padded_map[:, :, 1:-1, 1:-1, 1 : size[2] + 1] = x
        around = padded_map.view(-1).numpy()
        outputs = conv.out_channels // LANES
        y = empty_map(batch, conv.out_channels, size, dtype=dtype) if y is None else y
        flat, bias = numbers(y), self._bias()
        rows, most = size[0] * size[1], max(1, _DIRECT_VOXELS // size[2])
        units = [
            (n, first, min(most, rows - first))
            for n in range(batch)
            for first in range(0, rows, most)
        ]
        sums = np.empty((len(units), outputs * 3 * LANES), np.float32)

        def work(n: int) -> None:
            sample, first, count = units[n]
            sums[n] = 0
            convolve_rows(
                around, channels, row, size, sample, first, count, weights, bias, outputs, flat,
                sums[n]
            )  # fmt: skip

        in_parallel(work, len(units), torch.get_num_threads())
        return y, combined(sums, np.array([count * size[2] for _, _, count in units]), batch)

    def _bias(self) -> np.ndarray:
        bias = self.conv.bias
        return (
            np.zeros(self.conv.out_channels, np.float32) if bias is None else bias.detach().numpy()
        )

    def normalisation(self, y: Tensor, spread: _Spread | None) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift (B · channels) of a raw output."""
        shape = y.shape[:2]
        if self.norm is None:
            return np.ones(shape, np.float32).ravel(), np.zeros(shape, np.float32).ravel()
        mean, variance = spread or moments(y)
        scale = 1 / np.sqrt(variance + self.norm.eps)
        if self.norm.weight is not None:
            scale = scale * self.norm.weight.detach().numpy()
        shift = -mean * scale
        if self.norm.bias is not None:
            shift = shift + self.norm.bias.detach().numpy()
        return scale.astype(np.float32).ravel(), shift.astype(np.float32).ravel()


class FastUp(nn.Module):
    """A transposed convolution 2x2x2 of stride 2; what it reads may be `Deferred`."""

    def __init__(self, conv: nn.ConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv
        self._packed: np.ndarray | None = None
        self._half: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, 2D, 2H, 2W)."""
        conv, half = self.conv, is_half(x)
        known = half or x.dtype == torch.float32
        if not known or x.device.type != "cpu" or torch.is_grad_enabled() or x.ndim != 5:
            y: Tensor = conv(x)
            return y
        return self._halved(x) if half else self.doubled(x)

    def _halved(self, x: Tensor) -> Tensor:
        """In bfloat16, by oneDNN."""
        conv = self.conv
        self._half = self._half or _halves(conv.weight, conv.bias)
        x = settled(x).to(torch.bfloat16, memory_format=torch.channels_last_3d)
        y = F.conv_transpose3d(x, *self._half, conv.stride)
        return y.contiguous(memory_format=torch.channels_last_3d)

    def doubled(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """In float32, by a kernel of medseg's; y: where to."""
        from medseg.kernels.winograd import ROWS, double_voxels, pack_double_weights

        conv = self.conv
        if self._packed is None:
            self._packed = kept_apart(pack_double_weights(conv.weight.detach().numpy()))
        weights = self._packed
        sources = sources_of(x)
        source = (sources[0] if len(sources) == 1 else Source(settled(x))).arguments()
        batch, size = x.shape[0], tuple(x.shape[2:])
        y = empty_map(batch, conv.out_channels, tuple(2 * n for n in size)) if y is None else y
        flat, outputs = numbers(y), conv.out_channels // LANES
        bias = (
            np.zeros(conv.out_channels, np.float32)
            if conv.bias is None
            else conv.bias.detach().numpy()
        )
        voxels = size[0] * size[1] * size[2]
        units = [(n, first) for n in range(batch) for first in range(0, voxels, _DOUBLE_VOXELS)]

        def work(n: int) -> None:
            sample, first = units[n]
            count = min(_DOUBLE_VOXELS, voxels - first)
            room = -(-count // ROWS[1]) * ROWS[1]
            scratch = _scratch(room * conv.in_channels + 2 * ROWS[1] * LANES)
            double_voxels(
                source, size, sample, first, count, room, weights, bias, outputs, flat, scratch
            )

        in_parallel(work, len(units), torch.get_num_threads())
        return y


def _turns(units: int, room: int, plane: int) -> Iterator[range]:
    """Units that run at the same time where outputs take the place of inputs: of `plane` tiles in a
    plane of them, those that reach into two planes at most.
    """
    start = 0
    while start < units:
        stop = start + 1
        while stop < units and ((stop + 1) * room - 1) // plane <= start * room // plane + 1:
            stop += 1
        yield range(start, stop)
        start = stop


def _from(first: int, work: Callable[[int], None]) -> Callable[[int], None]:
    """The work of units from `first` on."""
    return lambda unit: work(first + unit)


def _room(tiles: int, inputs: int, outputs: int) -> int:
    """Tiles in a unit of work: a few units for every thread, sums in full registers, weights read
    seldom enough.
    """
    from medseg.kernels.winograd import ROWS

    rows = ROWS[0] if outputs % 2 else ROWS[1]
    most = 24 if max(inputs, outputs) <= 2 else 48 if max(inputs, outputs) <= 4 else 96
    units = -(-tiles // most)
    units += units % 2
    return -(-tiles // units // rows) * rows


_local = threading.local()
#: Floats in a huge page of memory.
_HUGE_PAGE = 2**21 // 4


def _scratch(floats: int) -> np.ndarray:
    """This thread's own memory; it begins at a huge page, of which NumPy asks Linux for an array of
    4 MB or more.
    """
    if getattr(_local, "memory", np.zeros(0)).size < floats:
        floats = -(-floats // _HUGE_PAGE) * _HUGE_PAGE
        memory = np.zeros(floats + 2 * _HUGE_PAGE, np.float32)
        start = -memory.ctypes.data // 4 % _HUGE_PAGE
        _local.memory = memory[start : start + floats]
    memory = _local.memory
    return memory
