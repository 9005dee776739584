"""The compiled loops of `backends.accelerate`: Winograd convolution F(4x4x4, 3x3x3) of
channels-last float32 maps.

Lavin & Gray 2016 (arXiv:1509.09308): 4x4x4 outputs come from 6x6x6 inputs by 216 multiplications a
pair of channels instead of 1728. The interpolation points 0, ±√½, ±√2 and ∞ keep the rounding near
1e-6 of the outputs' spread, five times less than the usual 0, ±1, ±2 (measured; the choice follows
Barabasz et al. 2020, arXiv:1803.10986).

LLVM's vectoriser does not find the best code for these loops, so the inner ones are emitted as
vectors of 16 channels: one register with AVX-512, several elsewhere. Maps are flat arrays (batch,
depth, height, width, channels); channels come in blocks of 16. A unit of work is a run of tiles of
one sample: `spread` them (transform), multiply, `gather`.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from medseg.kernels.compiled import njit
from medseg.kernels.threads import in_parallel
from medseg.kernels.vectors import (
    INT,
    LANES,
    VECTOR,
    ZERO,
    Lanes,
    Memory,
    Moments,
    broadcast,
    centre,
    emitted,
    loop,
    settle,
)

#: A side of the tile that goes in, of the one that comes out, and the values in them.
INPUT, OUTPUT = 6, 4
POINTS, VOXELS = INPUT**3, OUTPUT**3


def _to_points(d: list[Lanes]) -> list[Lanes]:
    """6 values along a line to their 6 points: B^T d for the points 0, √½, -√½, √2, -√2, ∞."""
    near, far = 0.5**0.5, 2.0**0.5
    even, odd = d[4].plus(-2.0, d[2]), d[3].plus(-2.0, d[1])
    wide_even, wide_odd = d[4].plus(-0.5, d[2]), d[3].plus(-0.5, d[1])
    return [
        (d[0] + d[4]).plus(-2.5, d[2]),
        even.plus(near, odd),
        even.plus(-near, odd),
        wide_even.plus(far, wide_odd),
        wide_even.plus(-far, wide_odd),
        (d[1] + d[5]).plus(-2.5, d[3]),
    ]


def _from_points(m: list[Lanes]) -> list[Lanes]:
    """The products at 6 points to 4 values along a line: A^T m."""
    near, far = 0.5**0.5, 2.0**0.5
    s, t, wide_s, wide_t = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    zero = Lanes(s.builder, ZERO)
    return [
        m[0] + s + wide_s,
        zero.plus(near, t).plus(far, wide_t),
        zero.plus(0.5, s).plus(2.0, wide_s),
        m[5].plus(near**3, t).plus(far**3, wide_t),
    ]


@emitted
def _fetch(
    builder: Any, x: Memory, plane: Any, row: Any, column: Any, depth: Any, height: Any, left: Any,
    right: Any,
    scale: Memory, shift: Memory, slope: Any, tile: Memory
) -> None:  # fmt: skip
    """depth x height rows of 16 channels, normalised and activated, to their points along the row:
    tile (6, 6, 6, 16).

    `x` is where column 0 of the first row would be; columns from `left` to before `right` exist,
    the others are zero.
    """
    factor, offset, leak = scale.load(), shift.load(), broadcast(builder, slope)
    inside, columns = [], []
    for k in range(INPUT):
        here = ir.Constant(INT, k)
        exists = builder.and_(
            builder.icmp_signed("<=", left, here), builder.icmp_signed("<", here, right)
        )
        inside.append(exists)
        columns.append(builder.mul(column, builder.select(exists, here, left)))
    ahead = builder.mul(column, ir.Constant(INT, INPUT))
    with loop(builder, depth) as i, loop(builder, height) as j:
        source = x.at(builder.add(builder.mul(i.index, plane), builder.mul(j.index, row)))
        target = tile.at(i.index, INPUT * INPUT * LANES).at(j.index, INPUT * LANES)
        line = []
        for k in range(INPUT):
            y = offset.plus(factor, source.load(columns[k])).activated(leak)
            line.append(Lanes(builder, builder.select(inside[k], y.value, ZERO)))
            if k < OUTPUT:  # the columns that the next tile adds
                source.at(builder.add(ahead, builder.mul(column, ir.Constant(INT, k)))).prefetch()
        for k, value in enumerate(_to_points(line)):
            target.store(value, k * LANES)


@emitted
def _to_product(builder: Any, tile: Memory, points: Memory, step: Any) -> None:
    """A tile (6, 6, 6, 16) that `_fetch` made to its 216 points, `step` floats apart; the tile is
    overwritten.
    """
    with loop(builder, INPUT) as i, loop(builder, INPUT) as k:
        x = tile.at(i.index, INPUT * INPUT * LANES).at(k.index, LANES)
        for j, value in enumerate(_to_points([x.load(j * INPUT * LANES) for j in range(INPUT)])):
            x.store(value, j * INPUT * LANES)
    with loop(builder, INPUT * INPUT) as n:
        x = tile.at(n.index, LANES)
        target = points.at(builder.mul(n.index, step))
        for value in _to_points([x.load(i * INPUT * INPUT * LANES) for i in range(INPUT)]):
            target.store(value)
            target = target.at(step, INPUT * INPUT)


@emitted
def _from_product(builder: Any, points: Memory, step: Any, tile: Memory) -> None:
    """The products at 216 points, `step` floats apart, to a tile (4, 4 of 6, 6, 16): outputs, but
    points in a row.
    """
    with loop(builder, INPUT * INPUT) as n:
        source = points.at(builder.mul(n.index, step))
        line = _from_points([source.at(step, i * INPUT * INPUT).load() for i in range(INPUT)])
        for i, value in enumerate(line):
            tile.at(n.index, LANES).store(value, i * INPUT * INPUT * LANES)
    with loop(builder, OUTPUT) as i, loop(builder, INPUT) as k:
        x = tile.at(i.index, INPUT * INPUT * LANES).at(k.index, LANES)
        for j, value in enumerate(_from_points([x.load(j * INPUT * LANES) for j in range(INPUT)])):
            x.store(value, j * INPUT * LANES)


@emitted
def _deliver(
    builder: Any, tile: Memory, bias: Memory, y: Memory, plane: Any, row: Any, column: Any,
    depth: Any, height: Any,
    width: Any, moments: Memory
) -> None:  # fmt: skip
    """depth x height x width voxels of a tile that `_from_product` made to the map and to their
    channels' moments.
    """
    sums, offset = Moments(builder, moments), bias.load()
    with loop(builder, depth) as i, loop(builder, height) as j:
        source = tile.at(i.index, INPUT * INPUT * LANES).at(j.index, INPUT * LANES)
        target = y.at(builder.add(builder.mul(i.index, plane), builder.mul(j.index, row)))
        line = _from_points([source.load(k * LANES) for k in range(INPUT)])
        for k, value in enumerate(line):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(INT, k), width), likely=True):
                voxel = value + offset
                target.stream(voxel, builder.mul(column, ir.Constant(INT, k)))
                sums.add(voxel)
    sums.store()


def _direct(voxels: int) -> Any:
    """A 3x3x3 convolution of a few channels: `voxels` outputs of 16 channels along a row, every sum
    in a register.
    """

    def direct(
        builder: Any, x: Memory, channels: Any, channel: Any, plane: Any, row: Any, weights: Memory,
        bias: Memory,
        y: Memory, column: Any, width: Any, moments: Memory
    ) -> None:  # fmt: skip
        """`x` is the first input voxel of the first output; `width` of the outputs exist; weights
        (27 · channels, 16).

        A row of inputs must reach as far as `voxels` outputs do.
        """
        sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(voxels)]
        for total in sums:
            builder.store(bias.load().value, total)
        with loop(builder, channels) as c, loop(builder, 3) as i, loop(builder, 3) as j:
            source = x.at(builder.mul(c.index, channel)).at(builder.mul(i.index, plane))
            source = source.at(builder.mul(j.index, row))
            factors = weights.at(c.index, 27 * LANES).at(i.index, 9 * LANES).at(j.index, 3 * LANES)
            for k in range(3):
                factor = factors.load(k * LANES)
                for n, total in enumerate(sums):
                    voxel = Lanes(builder, builder.load(total)).plus(
                        source.broadcast(n + k), factor
                    )
                    builder.store(voxel.value, total)
        tally = Moments(builder, moments)
        for n, total in enumerate(sums):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(INT, n), width), likely=True):
                voxel = Lanes(builder, builder.load(total))
                y.stream(voxel, builder.mul(column, ir.Constant(INT, n)))
                tally.add(voxel)
        tally.store()

    return emitted(direct)


@emitted
def _place(
    builder: Any, products: Memory, other: Any, bias: Memory, y: Memory, column: Any
) -> None:
    """Two vectors of products, `other` floats apart, plus the bias, to neighbours in a row of the
    map.
    """
    offset = bias.load()
    y.stream(products.load() + offset)
    y.at(column).stream(products.at(other).load() + offset)


def _multiply(rows: int, vectors: int) -> Any:
    """The product of inputs (rows, 16 · blocks) and weights (16 · blocks, 16 · vectors), every sum
    in a register.
    """

    def multiply(
        builder: Any,
        x: Memory,
        x_step: Any,
        weights: Memory,
        blocks: Any,
        products: Memory,
        products_step: Any,
    ) -> None:
        sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
        for total in (total for row in sums for total in row):
            builder.store(ZERO, total)
        with loop(builder, blocks) as block:
            inputs = x.at(builder.mul(block.index, x_step))
            factors = weights.at(block.index, LANES * LANES * vectors)
            with loop(builder, LANES) as k:
                lines = [
                    factors.at(k.index, LANES * vectors).load(v * LANES) for v in range(vectors)
                ]
                for r in range(rows):
                    one = inputs.at(k.index).broadcast(LANES * r)
                    for v in range(vectors):
                        total = Lanes(builder, builder.load(sums[r][v])).plus(one, lines[v])
                        builder.store(total.value, sums[r][v])
        for v in range(vectors):
            for r in range(rows):
                products.at(products_step, v).store(
                    Lanes(builder, builder.load(sums[r][v])), LANES * r
                )

    return emitted(multiply)


#: How many rows of a product fit into the registers, with one and with two vectors of outputs.
ROWS = (24, 12) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (6, 3)
_multiply_one, _multiply_two = _multiply(ROWS[0], 1), _multiply(ROWS[1], 2)
#: Outputs that a direct convolution makes at once.
RUN = 12 if ROWS[0] == 24 else 4
_direct_run = _direct(RUN)


@njit(nogil=True, cache=True)
def _step(blocks, room):  # type: ignore[no-untyped-def]
    """Floats from one point to the next: an odd number of cache lines, so that the points do not
    share one set.
    """
    return (blocks * room // 2 * 2 + 1) * LANES


@njit(nogil=True, cache=True)
def _bounds(tile, size):  # type: ignore[no-untyped-def]
    """The lowest voxel of a tile of outputs along each axis."""
    across, down = (size[2] + OUTPUT - 1) // OUTPUT, (size[1] + OUTPUT - 1) // OUTPUT
    return (
        OUTPUT * (tile // (across * down)),
        OUTPUT * (tile // across % down),
        OUTPUT * (tile % across),
    )


@njit(nogil=True, cache=True)
def _spread(source, size, sample, first, count, points, block, blocks, room, tile):  # type: ignore[no-untyped-def]
    """Tiles first..first+count of one source to points (216, blocks, room, 16), from `block` on."""
    x, channels, scale, shift, slope = source
    depth, height, width = size
    for n in range(count):
        d, h, w = _bounds(first + n, size)
        # A tile of inputs begins one voxel before its outputs.
        low_d, low_h, low_w = (
            min(d, 1),
            min(h, 1),
            min(w, 1),
        )
        deep = min(OUTPUT + 1, depth - d) + low_d
        high = min(OUTPUT + 1, height - h) + low_h
        right = min(INPUT, width - w + 1)
        corner = (((sample * depth + d - low_d) * height + h - low_h) * width + w - 1) * channels
        inside = ((1 - low_d) * INPUT + 1 - low_h) * INPUT * LANES
        for c in range(0, channels, LANES):
            if deep * high < INPUT * INPUT:
                tile[: POINTS * LANES] = 0
            _fetch(
                x, corner + c, height * width * channels, width * channels, channels, deep, high,
                1 - low_w, right,
                scale, sample * channels + c, shift, sample * channels + c, slope, tile, inside,
            )  # fmt: skip
            _to_product(
                tile, 0, points, ((block + c // LANES) * room + n) * LANES, _step(blocks, room)
            )


@njit(nogil=True, cache=True)
def _multiply_all(points, inputs, weights, products, outputs, room):  # type: ignore[no-untyped-def]
    """Products (216, outputs, room, 16) of points (216, inputs, room, 16) and weights, in blocks of
    16 channels.
    """
    for point in range(POINTS):
        x, y = point * _step(inputs, room), point * _step(outputs, room)
        for block in range(0, outputs - 1, 2):
            for row in range(0, room, ROWS[1]):
                _multiply_two(
                    points, x + row * LANES, room * LANES,
                    weights, (point * outputs + block) * inputs * LANES * LANES, inputs,
                    products, y + (block * room + row) * LANES, room * LANES,
                )  # fmt: skip
        if outputs % 2:
            block = outputs - 1
            for row in range(0, room, ROWS[0]):
                _multiply_one(
                    points, x + row * LANES, room * LANES,
                    weights, (point * outputs + block) * inputs * LANES * LANES, inputs,
                    products, y + (block * room + row) * LANES, room * LANES,
                )  # fmt: skip


@njit(nogil=True, cache=True)
def _collect(products, outputs, room, bias, size, sample, first, count, y, moments, tile):  # type: ignore[no-untyped-def]
    """Products (216, outputs, room, 16) to the map and to moments (outputs, 3, 16)."""
    depth, height, width = size
    channels = outputs * LANES
    for n in range(count):
        d, h, w = _bounds(first + n, size)
        deep, high, wide = min(OUTPUT, depth - d), min(OUTPUT, height - h), min(OUTPUT, width - w)
        corner = (((sample * depth + d) * height + h) * width + w) * channels
        for block in range(outputs):
            _from_product(products, (block * room + n) * LANES, _step(outputs, room), tile, 0)
            if n == 0:
                for lane in range(LANES):
                    centre = bias[block * LANES + lane]
                    for k in range(INPUT - 1):  # the first output
                        centre += tile[k * LANES + lane]
                    moments[block * 3 * LANES + lane] = centre
                    moments[block * 3 * LANES + LANES + lane] = 0
                    moments[block * 3 * LANES + 2 * LANES + lane] = 0
            _deliver(
                tile, 0, bias, block * LANES,
                y, corner + block * LANES, height * width * channels, width * channels, channels,
                deep, high, wide, moments, block * 3 * LANES,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def convolve_unit(unit, room, size, one, two, weights, bias, outputs, y, moments, scratch):  # type: ignore[no-untyped-def]
    """One unit of a convolution: at most `room` tiles of a sample, through all channels, to `y` and
    to `moments`.

    `one` and `two` are sources (map, channels, scale, shift, slope), the second with 0 channels if
    there is none; `weights` are packed by `pack_weights`; `moments` has (outputs, 3, 16) floats for
    this unit; `scratch` holds 216 x 16 x ((blocks of inputs + blocks of outputs) x room + 3)
    floats.
    """
    depth, height, width = size
    tiles = (
        ((depth + OUTPUT - 1) // OUTPUT)
        * ((height + OUTPUT - 1) // OUTPUT)
        * ((width + OUTPUT - 1) // OUTPUT)
    )
    units = (tiles + room - 1) // room
    sample, first = unit // units, unit % units * room
    count = min(room, tiles - first)
    inputs = (one[1] + two[1]) // LANES
    points = scratch[POINTS * LANES :]
    products = points[POINTS * _step(inputs, room) :]
    _spread(one, size, sample, first, count, points, 0, inputs, room, scratch)
    _spread(two, size, sample, first, count, points, one[1] // LANES, inputs, room, scratch)
    _multiply_all(points, inputs, weights, products, outputs, room)
    _collect(products, outputs, room, bias, size, sample, first, count, y, moments[unit], scratch)


@njit(nogil=True, cache=True)
def _direct_row(  # type: ignore[no-untyped-def]
    x, corner, channels, channel, plane, row, weights, bias, block, y, at, column, width, moments
):
    """The first `width` outputs of a row in one block of channels."""
    for w in range(0, width, RUN):
        _direct_run(
            x, corner + w, channels, channel, plane, row, weights, block * channels * 27 * LANES,
            bias, block * LANES,
            y, at + w * column + block * LANES, column, width - w, moments, block * 3 * LANES,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def convolve_rows(x, channels, row, size, sample, first, count, weights, bias, outputs, y, moments):  # type: ignore[no-untyped-def]
    """Rows first..first+count of a sample of a 3x3x3 convolution of a few channels, to `y` and to
    `moments`.

    `x` is (batch, channels, depth + 2, height + 2, row), with zeros around the map of `size` and a
    row that reaches 2 beyond a multiple of RUN outputs; weights (outputs, channels, 27, 16);
    moments (outputs, 3, 16).
    """
    depth, height, width = size
    plane = (height + 2) * row
    channel = (depth + 2) * plane
    column = outputs * LANES
    for n in range(first, first + count):
        d, h = n // height, n % height
        corner = sample * channels * channel + d * plane + h * row
        at = ((sample * depth + d) * height + h) * width * column
        for block in range(outputs):
            if n == first:  # its first output is the centre of the moments
                _direct_row(
                    x, corner, channels, channel, plane, row, weights, bias, block, y, at, column,
                    1, moments
                )  # fmt: skip
                centre(y, at + block * LANES, moments, block * 3 * LANES)
                for lane in range(LANES):
                    moments[block * 3 * LANES + LANES + lane] = 0
                    moments[block * 3 * LANES + 2 * LANES + lane] = 0
            _direct_row(
                x, corner, channels, channel, plane, row, weights, bias, block, y, at, column,
                width, moments
            )  # fmt: skip


@njit(nogil=True, cache=True)
def double_voxels(source, size, sample, first, count, room, weights, bias, outputs, y, scratch):  # type: ignore[no-untyped-def]
    """Voxels first..first+count of a sample of a transposed 2x2x2 convolution of stride 2: eight
    voxels of `y` each.

    `source` is (map, channels, scale, shift, slope); weights (2, 2, outputs, channels, 2, 16) for
    the position along depth and height and, last but one, along a row; `room` is a multiple of
    ROWS[1] from `count` on; `scratch` has room x channels + 32 x ROWS[1] floats.
    """
    x, channels, scale, shift, slope = source
    depth, height, width = size
    inputs, column, rows = channels // LANES, outputs * LANES, ROWS[1]
    products = scratch[room * channels :]
    corners = np.empty(count, np.int64)
    for n in range(count):
        d, h, w = (
            (first + n) // (height * width),
            (first + n) // width % height,
            (first + n) % width,
        )
        corners[n] = (((sample * depth + d) * 2 * height + h) * 2 * width + w) * 2 * column
    start = (sample * depth * height * width + first) * channels
    for block in range(inputs):
        of = sample * channels + block * LANES
        settle(
            x, start + block * LANES, channels, count, scale, of, shift, of, slope,
            scratch, block * room * LANES, LANES,
        )  # fmt: skip
        scratch[(block * room + count) * LANES : (block + 1) * room * LANES] = 0
    for part in range(4 * outputs):
        block = part % outputs
        to = (
            (part // outputs // 2 * 2 * height + part // outputs % 2) * 2 * width
        ) * column + block * LANES
        for row in range(0, count, rows):
            _multiply_two(
                scratch, row * LANES, room * LANES, weights, part * channels * 2 * LANES, inputs,
                products, 0, rows * LANES,
            )  # fmt: skip
            for n in range(min(rows, count - row)):
                at = corners[row + n] + to
                _place(products, n * LANES, rows * LANES, bias, block * LANES, y, at, column)


def pack_direct_weights(weight: np.ndarray) -> np.ndarray:
    """Weights (outputs, inputs, 3, 3, 3) as `convolve_rows` reads them: (blocks of outputs, inputs,
    27, 16).
    """
    return np.ascontiguousarray(
        weight.reshape(-1, LANES, weight.shape[1], 27).transpose(0, 2, 3, 1)
    ).ravel()


def pack_double_weights(weight: np.ndarray) -> np.ndarray:
    """Weights (inputs, outputs, 2, 2, 2) as `double_voxels` reads them: (2, 2, blocks of outputs,
    inputs, 2, 16).
    """
    blocks = weight.reshape(weight.shape[0], -1, LANES, 2, 2, 2)
    return np.ascontiguousarray(blocks.transpose(3, 4, 1, 0, 5, 2)).ravel()


def pack_weights(weight: np.ndarray, threads: int = 1) -> np.ndarray:
    """Weights (outputs, inputs, 3, 3, 3) as `convolve_unit` reads them: at 216 points, two blocks
    of outputs a row.

    Along each axis G w for the points of `_to_points`, in float64 until the end.
    """
    points = np.array([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
    g = np.zeros((INPUT, 3))
    for n, p in enumerate(points):
        g[n, :] = np.array([1, p, p * p]) / np.prod(p - np.delete(points, n))
    g[-1, 2] = 1
    outputs, inputs = weight.shape[:2]
    out = np.empty((INPUT, INPUT, INPUT, inputs * outputs), np.float32)

    def pack(row: int) -> None:  # a row's outputs at a time stay in the cache
        first = row * 2 * LANES
        block = weight[first : first + 2 * LANES].transpose(2, 3, 4, 1, 0)
        spread = np.matmul(g, block.reshape(3, 3, 3, -1).astype(np.float64))
        spread = np.matmul(g, spread.transpose(0, 2, 1, 3))
        spread = np.matmul(g, spread.transpose(1, 2, 0, 3))
        begin = first * inputs
        out[..., begin : begin + spread.shape[-1]] = spread.transpose(2, 1, 0, 3)

    in_parallel(pack, -(-outputs // (2 * LANES)), threads)
    return out.ravel()
