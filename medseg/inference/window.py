"""The sliding window: patches in, blended features or logits out, in memory that the scan's length
does not change.

Windows run along the first axis in rows, in a row along the second axis in columns. A column is
added up with Gaussian weights (Isensee et al. 2021) in a buffer as wide as one patch. What no later
window touches is handed on at once; what later ones add to waits in the column, or, between rows,
in a carry as deep as the overlap. Nothing of the size of a whole scan exists here, whatever the
number of classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import DataWarning
from medseg.inference.backends.cards import unless_full
from medseg.inference.backends.copies import Courier, Fetched

#: Weights along each of three axes.
Lines = Sequence[NDArray[np.float32]]
#: Patches (B, C, X, Y, Z) to features or logits (B, F, X, Y, Z).
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """Where the windows of one run lie: their first voxels along each axis of the padded image."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def padded(self) -> tuple[int, int, int]:
        """The image's shape, at least a patch along each axis."""
        x, y, z = (max(size, p) for size, p in zip(self.shape, self.patch))
        return x, y, z

    @property
    def count(self) -> int:
        """How many windows there are."""
        return math.prod(len(starts) for starts in self.starts)

    def columns(self, low: int, high: int) -> tuple[int, ...]:
        """The starts along the second axis of the windows that touch its planes low..high."""
        return tuple(y for y in self.starts[1] if y < high and y + self.patch[1] > low)

    def stripes(self, count: int) -> list[tuple[int, int]]:
        """The second axis in `count` parts (first, past the last) that can be computed one after
        the other.

        A part begins one plane before the other ends, so that everything between two planes lies in
        one of them.
        """
        edges = [round(n * self.shape[1] / count) for n in range(count + 1)]
        return [(max(0, low - 1), high) for low, high in pairwise(edges) if high > low]


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: evenly spread, first at 0, last ending at `size`,
    overlapping by at least the share `overlap`."""
    if size <= patch:
        return [0]
    step = max(1.0, patch * (1 - overlap))
    count = math.ceil((size - patch) / step - 1e-9) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def stepped_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Where MONAI's windows begin along one axis: whole steps from 0 on; the last one is moved back
    to end where the axis does."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    return [*range(0, size - patch, step), size - patch]


def nnunet_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Where nnU-Net's windows begin along one axis; a patch of one plane (2d) steps from plane to
    plane.
    """
    if patch == 1:
        return list(range(size))
    count = math.ceil((size - patch) / (patch * (1 - overlap))) + 1
    if count < 2:
        return [0]
    return [int(np.round((size - patch) / (count - 1) * n)) for n in range(count)]


#: Name in a model's recipe -> where windows begin along an axis, from its size, the patch, and the
#: overlap.
LAYOUTS: dict[str, Callable[[int, int, float], list[int]]] = {
    "even": window_starts,
    "nnunet": nnunet_starts,
    "stepped": stepped_starts,
}


def plan_windows(
    shape: Sequence[int],
    patch: Sequence[int],
    overlap: float | Sequence[float],
    cell: int = 1,
    layout: str = "even",
) -> Windows:
    """Windows of `patch` voxels over an image of `shape`, counted in cells of `cell` voxels along
    each axis.

    layout: a name in `LAYOUTS`.
    """
    shape, patch = [-(-size // cell) for size in shape], [size // cell for size in patch]
    shares = [overlap] * 3 if isinstance(overlap, int | float) else list(overlap)
    places = zip(shape, patch, shares)
    starts = [tuple(LAYOUTS[layout](size, p, share)) for size, p, share in places]
    return Windows(tuple(shape), tuple(patch), tuple(starts))  # type: ignore[arg-type]


def gaussian_weights(patch: int) -> Tensor:
    """(patch,) weights of one axis: a Gaussian with sd of an eighth of the patch, never below
    1/1000 of its peak.
    """
    at = (torch.arange(patch) - (patch - 1) / 2) / (patch / 8)
    return torch.exp(-0.5 * at**2).clamp_(min=1e-3)


def impulse_weights(patch: int) -> Tensor:
    """(patch,) nnU-Net's weights of one axis before it rounds them: a Gaussian around voxel patch
    // 2, up to 1.

    Of a window's voxels nothing reaches 4 standard deviations from there but the first of an even
    patch.
    """
    at = (torch.arange(patch) - patch // 2) / (patch / 8)
    return torch.exp(-0.5 * at**2) if patch > 1 else torch.ones(1)


#: Name in a model's recipe -> the weights of one axis of a window.
WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "floored": gaussian_weights,
    "nnunet": impulse_weights,
    "constant": torch.ones,
}


@dataclass(frozen=True)
class Block:
    """Finished features (X, Y, Z, F) float32 whose first voxel is (x, y, 0), perhaps on a card. It
    is not written to again.
    """

    x: int
    y: int
    data: NDArray[np.float32] | Tensor


class Sums(Protocol):
    """What windows are added to: see `_Sums`, which adds in float32."""

    def add(self, features: Tensor, weights: Sequence[NDArray[np.float32]], z: int) -> None:
        """Add one window of the current column."""

    def finish(
        self, y: int, finished: int, first: int, scales: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32] | Tensor:
        """The means of the next planes, which no later window of this row touches."""

    def end_row(self, deep: int) -> None:
        """Begin a new row of windows, which also adds to the last `deep` planes of this one."""


#: Sums for windows, the columns that are computed, and a number of features.
MakeSums = Callable[[Windows, Sequence[int], int], Sums]


def sliding_window(
    predict: Predict,
    image: Tensor,
    windows: Windows,
    *,
    batch: int = 1,
    stripe: tuple[int, int] | None = None,
    empty: tuple[float, Sequence[float]] | None = None,
    device: torch.device | str = "cpu",
    cell: int = 1,
    weighting: str = "floored",
    make_sums: MakeSums | None = None,
    courier: Courier | None = None,
    stays: bool = False,
    progress: Callable[[int], None] = lambda windows: None,
) -> Iterator[Block]:
    """Weighted means of what `predict` says of the windows of `image` (C, X, Y, Z), as blocks that
    cover it once.

    Blocks come row by row, in a row along the second axis. Images smaller than the patch are padded
    with zeros. Only the part `stripe` of the second axis is computed if one is given. `empty`
    (threshold, features): windows in which nothing is brighter than the threshold are not
    predicted; the features are taken for them. The sums are kept on `device`, and on the CPU once
    it runs out of memory. `cell`: how many voxels of the image along each axis are one of what is
    predicted, which is what windows, stripes and blocks are counted in. `weighting` is a name in
    `WEIGHTS`. `make_sums` (windows, columns, features) gives other sums than float32 ones.
    `courier` brings what is predicted on a card to sums on the CPU, while the card predicts the
    next. Blocks of sums on a card come to the CPU unless one `stays` there. `progress` is called
    with the number of windows just done.
    """
    low, high = stripe or (0, windows.shape[1])
    rows, columns = windows.starts[0], windows.columns(low, high)
    image = _padded(image, windows, cell)
    weights, shares = _weights(windows, weighting)
    device = torch.device(device)
    make: MakeSums = make_sums or partial(_Sums, device=device, stays=stays)
    carrier = courier if _uses_kernels(device) else None
    sums: Sums | None = None
    chunk = max(1, windows.patch[1] // 4)  # planes, so that what is finished stays small
    # Where the planes of each row and column end that no later one adds to.
    ends_x = (*rows[1:], windows.shape[0])
    ends_y = (*columns[1:], min(columns[-1] + windows.patch[1], windows.shape[1]))
    for x, end_x in zip(rows, ends_x):
        for y, end_y in zip(columns, ends_y):
            column = _column(image, windows, (x, y), cell=cell)
            for places, features in _predicted(predict, column, batch, empty, carrier):
                if sums is None:
                    count = len(features[0]) if empty is None else len(empty[1])
                    sums = make(windows, columns, count)
                for z, one in zip(places, features):
                    sums.add(one, weights, z)
                progress(len(places))
            assert sums is not None
            scales = (shares[0][x:end_x], shares[1], shares[2][: windows.shape[2]])
            for first, data in _finished(sums, (y, end_y), (low, high), scales=scales, most=chunk):
                yield Block(x, first, data)
        assert sums is not None
        sums.end_row(windows.patch[0] - (end_x - x))


def _weights(windows: Windows, weighting: str) -> tuple[Lines, Lines]:
    """Of every axis the weights of one window, and one over what each plane collects from all."""
    weights = [WEIGHTS[weighting](p).numpy() for p in windows.patch]
    return weights, list(map(_one_over_sums, weights, windows.starts, windows.padded))


def _padded(image: Tensor, windows: Windows, cell: int) -> Tensor:
    """(C, X, Y, Z) with zeros behind it up to the windows' end; itself if none is missing, as
    padding copies.
    """
    missing = [size * cell - there for size, there in zip(windows.padded, image.shape[1:])]
    if not any(missing):
        return image
    sides = [n for one in missing[::-1] for n in (0, one)]
    padded = unless_full(lambda: F.pad(image, sides))
    return F.pad(image.cpu(), sides) if padded is None else padded


def _column(
    image: Tensor, windows: Windows, at: tuple[int, int], cell: int
) -> list[tuple[int, Tensor]]:
    """(depth, window (C, X, Y, Z)) of the windows at (x, y), in cells of `cell` voxels."""

    def cut(start: int, size: int) -> slice:
        return slice(start * cell, (start + size) * cell)

    places = [(*at, z) for z in windows.starts[2]]
    return [(place[2], image[(slice(None), *map(cut, place, windows.patch))]) for place in places]


def _finished(
    sums: Sums,
    planes: tuple[int, int],
    stripe: tuple[int, int],
    *,
    scales: Sequence[NDArray[np.float32]],
    most: int,
) -> Iterator[tuple[int, NDArray[np.float32] | Tensor]]:
    """(first plane, means) of the column's planes that no later window adds to, `most` at a time.

    Those outside of the stripe are finished, too, and not wanted. scales: of the second axis all
    planes.
    """
    along, across, up = scales
    for at in range(*planes, most):
        count = min(most, planes[1] - at)
        start = max(at, stripe[0])
        stop = max(min(at + count, stripe[1]), start)
        data = sums.finish(at, count, start - at, (along, across[start:stop], up))
        if stop > start:
            yield start, data


def _predicted(
    predict: Predict,
    column: Sequence[tuple[int, Tensor]],
    batch: int,
    empty: tuple[float, Sequence[float]] | None,
    courier: Courier | None,
) -> Iterator[tuple[Sequence[int], Sequence[Tensor] | Tensor]]:
    """(depths, features of each) of the windows of a column, the empty ones first; others in
    batches.

    empty, courier: as in `sliding_window`; the features of an empty window are one vector (F, 1, 1,
    1), those that a courier brings are used up before the next are asked for.
    """
    if empty is not None:
        threshold, air = empty
        nothing = [z for z, window in column if float(window.max()) <= threshold]
        yield nothing, [torch.tensor(air).view(-1, 1, 1, 1)] * len(nothing)
        column = [(z, window) for z, window in column if z not in nothing]
    waiting: tuple[list[int], Fetched] | None = None
    for begin in range(0, len(column), batch):
        part = column[begin : begin + batch]
        places, features = [z for z, _ in part], predict(_stacked([w for _, w in part]))
        if courier is None or courier.link is None or features.device.type != courier.device.type:
            yield places, features
            continue
        # As they lie, in the network's own arithmetic; what is the same number lies side by side.
        fetch = partial(lambda here: courier.fetch(here.movedim(1, -1).contiguous()), features)
        coming = unless_full(fetch)
        if waiting is not None:
            yield from _arrived(*waiting)
        waiting = None if coming is None else (places, coming)
        if coming is None:
            yield places, features.cpu()
    if waiting is not None:
        yield from _arrived(*waiting)


def _stacked(windows: Sequence[Tensor]) -> Tensor:
    """Windows (C, X, Y, Z) as a batch, of this process where a card has no room for it: the network
    steps down when it takes them.
    """
    batch = unless_full(lambda: torch.stack(list(windows)))
    return torch.stack([one.cpu() for one in windows]) if batch is None else batch


def _arrived(places: list[int], coming: Fetched) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Features (B, F, X, Y, Z) that were on their way from a card."""
    with coming.read() as here:
        yield places, here.movedim(-1, 1)


class _Sums:
    """Weighted sums of the current column (X, Y, Z, F), and of the planes that the next row adds
    to.

    The second axis of the column is a ring: what is finished makes place for what comes.
    """

    def __init__(
        self,
        windows: Windows,
        columns: Sequence[int],
        features: int,
        device: torch.device,
        stays: bool = False,
    ) -> None:
        """stays: what is finished on a card stays there."""
        self._stays = stays
        # By where an array lies; it is kept, so that no other one will lie there.
        self._there: dict[tuple[int, int], tuple[NDArray[np.float32], Tensor]] = {}
        rows = windows.starts[0]
        patch_x, patch_y, depth = windows.patch[0], windows.patch[1], windows.padded[2]
        overlap = max((patch_x - (b - a) for a, b in pairwise(rows)), default=0)
        self._first = columns[0]
        width = columns[-1] + patch_y - columns[0]
        shapes = ((patch_x, patch_y, depth, features), (max(0, overlap), width, depth, features))
        self._compiled = _uses_kernels(device)
        there = unless_full(lambda: [torch.zeros(shape, device=device) for shape in shapes])
        self._column, self._carry = there or [torch.zeros(shape) for shape in shapes]
        if there is None:
            self._step_down()
        self._padded = windows.padded[1] != windows.shape[1]
        self._turn = 0  # where in the ring the column begins
        self._carried = 0  # planes of the carry that hold something

    def add(self, features: Tensor, weights: Sequence[NDArray[np.float32]], z: int) -> None:
        """Add one window (F, X, Y, Z), or one feature vector (F, 1, 1, 1) for all of it, at depth
        z.
        """
        if self._compiled:
            sums, width = self._column.numpy(), self._column.shape[3]
            last = features.detach().permute(1, 2, 3, 0)
            if _is_read_as_it_is(last, width):
                halves = _flat(last.view(torch.uint16).numpy())
                flat = (
                    _flat(sums),
                    self._turn,
                    halves,
                    *weights[:2],
                    np.repeat(weights[2], width),
                    z * width,
                )
                _in_threads("add_halves", len(weights[0]), *flat)
                return
            one = last.to("cpu", torch.float32).contiguous().numpy()
            if one.shape[3] < width or one.size == width:
                _in_threads("add_some", len(weights[0]), sums, self._turn, one, *weights, z)
            else:
                up = np.repeat(weights[2], width)
                flat = (_flat(sums), self._turn, _flat(one), *weights[:2], up, z * width)
                _in_threads("add_window", len(weights[0]), *flat)
            return
        if unless_full(partial(self._add_there, features, weights, z)) is None:
            self._step_down()
            self.add(features.cpu(), weights, z)

    def _add_there(self, features: Tensor, weights: Lines, z: int) -> Literal[True]:
        """`add` on a card; where it has no room nothing is added."""
        window = self._map(weights)
        source = features.permute(1, 2, 3, 0).to(self._column.device, torch.float32)
        target = self._column[:, :, z : z + window.shape[2], : len(features)]
        _add_in_ring(target, source.expand(*window.shape[:3], -1), window, self._turn)
        return True

    def _map(self, lines: Lines) -> Tensor:
        """(X, Y, Z, 1) the product of three lines, which are put on the card once."""
        keys = [(line.__array_interface__["data"][0], len(line)) for line in lines]
        for key, line in zip(keys, lines):
            if key not in self._there:
                self._there[key] = line, torch.from_numpy(line).to(self._column.device)
        a, b, c = (self._there[key][1] for key in keys)
        return (a[:, None, None] * b[:, None] * c)[..., None]

    def _step_down(self) -> None:
        """Go on with compiled loops on the CPU, and say so: every later window is copied there."""
        self._column, self._carry = self._column.cpu(), self._carry.cpu()
        self._compiled = True
        warnings.warn(
            "the GPU has no room for the sums of windows; they are made on the CPU, which is"
            " slower",
            DataWarning,
            stacklevel=3,
        )

    def finish(
        self, y: int, finished: int, first: int, scales: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32] | Tensor:
        """The means of the next `finished` planes of the column, which lie at y, those from `first`
        on.

        What the next row adds to is kept, and the column moves on.
        """
        along, across, up = scales
        at = y - self._first
        shape = (len(along), len(across), len(up), self._column.shape[3])
        means: NDArray[np.float32] | Tensor | None = None
        if not self._compiled:
            means = unless_full(partial(self._finish_there, at, finished, first, scales))
        if means is None and not self._compiled:
            self._step_down()
        if means is None:
            means = out = np.empty(shape, np.float32)
            column, carry = (_flat(one.numpy()) for one in (self._column, self._carry))
            state = (column, self._turn, carry, self._carried, at)
            rest = (along, across, np.repeat(up, shape[3]), first, _flat(out))
            _in_threads("finish", finished, *state, *rest)
        self._turn = (self._turn + finished) % self._column.shape[1]
        return means

    def _finish_there(
        self, at: int, finished: int, first: int, scales: Lines
    ) -> NDArray[np.float32] | Tensor:
        """`finish` on a card; where it has no room nothing has changed."""
        along, across, up = scales
        ring, deep = self._column.shape[1], self._column.shape[0] - len(along)
        parts = [slice(self._turn, min(ring, self._turn + finished))]
        parts += [slice(0, self._turn + finished - ring)] * (self._turn + finished > ring)
        sums = torch.cat([self._column[:, part] for part in parts], 1)
        sums[: self._carried] += self._carry[: self._carried, at : at + finished]
        mine = sums[: len(along), first : first + len(across), : len(up)] * self._map(scales)
        means = mine if self._stays else mine.cpu().numpy()
        # From here on nothing needs memory that is not there.
        for part in parts:
            self._column[:, part] = 0
        if deep > 0 and len(self._carry):
            self._carry[:deep, at : at + finished] = sums[len(along) :]
        return means

    def end_row(self, deep: int) -> None:
        """Begin a new row; the one before reached `deep` planes into what it adds to."""
        self._turn, self._carried = 0, max(0, min(deep, len(self._carry)))
        # Planes beyond the image were never finished; finishing empties the others.
        if self._padded:
            self._column.zero_()


def _add_in_ring(target: Tensor, source: Tensor, weights: Tensor, turn: int) -> None:
    """Add weighted features to a ring along the second axis that begins at `turn`, in place: all
    that needs memory is there before.
    """
    width = target.shape[1]
    for begin, end, at in ((0, width - turn, turn), (width - turn, width, 0)):
        if begin < end:
            place = target[:, at : at + end - begin]
            place.addcmul_(source[:, begin:end], weights[:, begin:end])


def gaussian_map(patch: Sequence[int], sigma_scale: Sequence[float]) -> Tensor:
    """(X, Y, Z) MONAI's weights of a window: the product of three Gaussians, never below 1/1000.

    sigma_scale: standard deviations as shares of the window's sides. The limit is one of the
    product, which therefore is none of its three lines.
    """
    weights = torch.ones(())
    for length, scale in zip(patch, sigma_scale):
        at = torch.arange(-(length - 1) / 2.0, (length - 1) / 2.0 + 1, dtype=torch.float32)
        weights = weights.unsqueeze(-1) * torch.exp(at**2 / (-2 * (length * scale) ** 2))
    return weights.clamp_(min=max(float(weights.min()), 1e-3))


class MappedSums:
    """Sums for weights that are no product of three lines: they are added up as one more
    feature."""

    def __init__(
        self,
        windows: Windows,
        columns: Sequence[int],
        features: int,
        *,
        weights: Tensor,
        device: torch.device,
    ) -> None:
        self._sums = _Sums(windows, columns, features + 1, device=device)
        self._weights = weights
        self._ones = [np.ones(length, np.float32) for length in weights.shape]

    def add(self, features: Tensor, weights: Sequence[NDArray[np.float32]], z: int) -> None:
        """Add one window (F, X, Y, Z) at depth z; the weights are this class's own."""
        shares = self._weights.to(features.device)
        products = torch.cat((features.float() * shares, shares[None]))
        self._sums.add(products, self._ones, z)

    def finish(
        self, y: int, finished: int, first: int, scales: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The means of the next planes, which no later window of this row touches."""
        plain = [np.ones(len(scale), np.float32) for scale in scales]
        sums = self._sums.finish(y, finished, first, plain)
        assert isinstance(sums, np.ndarray)
        means: NDArray[np.float32] = sums[..., :-1] / sums[..., -1:]
        return means

    def end_row(self, deep: int) -> None:
        """Begin a new row of windows."""
        self._sums.end_row(deep)


def _is_read_as_it_is(window: Tensor, features: int) -> bool:
    """Whether a window (X, Y, Z, F) of all features in bfloat16 can be added without a copy in
    float32.
    """
    of_all = window.shape[3] == features and window.numel() > features
    lies = window.device.type == "cpu" and window.is_contiguous()
    is_read = of_all and lies and window.shape[2] * features % 16 == 0
    return is_read and window.dtype == torch.bfloat16


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    """(X, Y, Z, F) as (X, Y, Z * F), the same numbers."""
    return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])


def _uses_kernels(device: torch.device) -> bool:
    """Whether sums on a device are made by compiled loops; elsewhere torch makes them."""
    return device.type == "cpu"


class _Kernel(Protocol):
    def __call__(self, low: int, high: int, *arguments: Any) -> None: ...


def _in_threads(name: str, length: int, *arguments: Any) -> None:
    """Run a kernel of `kernels.windows` over range(length) on as many threads as torch uses."""
    from medseg.kernels import windows as window_kernels
    from medseg.kernels.threads import in_slabs

    kernel: _Kernel = getattr(window_kernels, name)
    in_slabs(
        lambda low, high: kernel(low, high, *arguments), length, workers=torch.get_num_threads()
    )


def _one_over_sums(
    weights: NDArray[np.float32], starts: Sequence[int], length: int
) -> NDArray[np.float32]:
    """(length,) one over the weight that each plane of an axis collects from all windows."""
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weights)] += weights
    return np.reciprocal(total)
