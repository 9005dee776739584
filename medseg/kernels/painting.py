"""The compiled loops of `painter`: largest classes, confidence, and labels on the scan's grid.

Arrays are C-contiguous float32 with the features of a voxel next to each other, (X, Y, Z, F). Every
kernel works on a range of its first axis, releases the interpreter lock, and gives each voxel the
same sums in the same order however many threads share the work. Imported where used: numba takes
longer to load than a small scan to segment.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from medseg.kernels.compiled import njit
from medseg.kernels.vectors import (
    INT,
    LANES,
    VECTOR,
    WORDS,
    Lanes,
    Memory,
    broadcast,
    emitted,
    loop,
)

#: Voxels that are looked at together, so that the loops over them become vector instructions.
_RUN = 64


def _start(builder: Any, n: Any, count: Any) -> Any:
    """Where the n-th vector of `count` numbers begins; the last one ends where they do, and may
    overlap another.
    """
    whole, last = (
        builder.mul(n, ir.Constant(INT, LANES)),
        builder.sub(count, ir.Constant(INT, LANES)),
    )
    return builder.select(builder.icmp_signed("<", whole, last), whole, last)


def _vectors(builder: Any, count: Any) -> Any:
    """A loop over the vectors of `count` numbers, at least 16."""
    return loop(
        builder,
        builder.sdiv(builder.add(count, ir.Constant(INT, LANES - 1)), ir.Constant(INT, LANES)),
    )


@emitted
def _first_largest(
    builder: Any, one: Memory, two: Memory, share: Any, count: Any, found: Memory
) -> None:
    """found: the first largest of `count` >= 16 numbers, each at `share` of the way from `one` to
    `two`.

    Every lane keeps its largest number and where it was; the lanes are compared at the end.
    """
    far = broadcast(builder, share)
    near = broadcast(builder, ir.Constant(ir.FloatType(), 1.0)) - far
    most, place = cgutils.alloca_once(builder, VECTOR), cgutils.alloca_once(builder, WORDS)
    builder.store(ir.Constant(VECTOR, [-np.inf] * LANES), most)
    builder.store(ir.Constant(WORDS, [0] * LANES), place)
    with _vectors(builder, count) as n:
        start = _start(builder, n.index, count)
        value = (one.load(start) * near + two.load(start) * far).value
        begin = builder.insert_element(
            ir.Constant(WORDS, ir.Undefined), builder.trunc(start, _WORD), _WORD(0)
        )
        begin = builder.shuffle_vector(begin, begin, ir.Constant(WORDS, [0] * LANES))
        at = builder.add(begin, ir.Constant(WORDS, list(range(LANES))))
        before = builder.load(most)
        larger = builder.fcmp_ordered(">", value, before)
        builder.store(builder.select(larger, value, before), most)
        builder.store(builder.select(larger, at, builder.load(place)), place)
    values, places = builder.load(most), builder.load(place)
    largest = values
    for step in (8, 4, 2, 1):
        other = _turned(builder, largest, step)
        largest = builder.select(builder.fcmp_ordered(">", other, largest), other, largest)
    places = builder.select(
        builder.fcmp_ordered("==", values, largest), places, ir.Constant(WORDS, [2**30] * LANES)
    )
    for step in (8, 4, 2, 1):
        other = _turned(builder, places, step)
        places = builder.select(builder.icmp_signed("<", other, places), other, places)
    first = builder.extract_element(places, _WORD(0))
    # Where nothing equals the largest, all were NaN.
    first = builder.select(builder.icmp_signed("<", first, _WORD(2**30)), first, _WORD(0))
    builder.store(first, found.pointer)


_WORD = ir.IntType(32)


def _turned(builder: Any, vector: Any, step: int) -> Any:
    """A vector whose lane n is lane n + step of another, around the end."""
    order = [(n + step) % LANES for n in range(LANES)]
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, order))


@emitted
def _mix_four(
    builder: Any, one: Memory, two: Memory, three: Memory, four: Memory, a: Any, b: Any, c: Any,
    d: Any, count: Any,
    out: Memory
) -> None:  # fmt: skip
    """out = a · one + b · two + c · three + d · four, of `count` >= 16 numbers each."""
    shares = [broadcast(builder, share) for share in (a, b, c, d)]
    with _vectors(builder, count) as n:
        start = _start(builder, n.index, count)
        parts = [
            memory.load(start) * share for memory, share in zip((one, two, three, four), shares)
        ]
        total: Lanes = parts[0]
        for part in parts[1:]:
            total = total + part
        out.store(total, start)


@emitted
def _turn(builder: Any, rows: Memory, width: Any, turned: Memory) -> None:
    """16 features of 16 voxels, `width` numbers apart, to 16 rows of turned (F, RUN)."""
    vectors = [rows.at(builder.mul(INT(n), width)).load().value for n in range(LANES)]
    for step in (1, 2, 4, 8):
        low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for n in (n for n in range(LANES) if not n & step):
            pair = vectors[n], vectors[n + step]
            vectors[n], vectors[n + step] = (
                builder.shuffle_vector(*pair, ir.Constant(WORDS, order)) for order in (low, high)
            )
    for n, vector in enumerate(vectors):
        turned.store(Lanes(builder, vector), n * _RUN)


@emitted
def _compare_two(
    builder: Any, turned: Memory, width: Any, weights: Memory, classes: Any, bias: Memory,
    first: Any, second: Any,
    most: Memory, found: Memory
) -> None:  # fmt: skip
    """Where a logit of class `first` or then `second` exceeds `most` (RUN,), that and `found`
    (RUN,) become its.

    Logits are bias (K,) + turned (F, RUN) times columns of weights (F, K), summed in registers.
    """
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(_RUN // LANES)] for _ in range(2)]
    pair = (builder.sext(first, INT), builder.sext(second, INT))
    for k, totals in zip(pair, sums):
        for total in totals:
            builder.store(bias.at(k).broadcast().value, total)
    with loop(builder, width) as f:
        row = turned.at(f.index, _RUN)
        values = [row.load(n * LANES) for n in range(_RUN // LANES)]
        for k, totals in zip(pair, sums):
            weight = weights.at(builder.add(builder.mul(f.index, classes), k)).broadcast()
            for value, total in zip(values, totals):
                before = Lanes(builder, builder.load(total))
                builder.store(before.plus(weight, value).value, total)
    place = builder.bitcast(found.pointer, WORDS.as_pointer())
    for n in range(_RUN // LANES):
        largest = most.load(n * LANES).value
        where = builder.gep(place, [INT(n)])
        numbers = builder.load(where, align=4)
        for k, totals in zip(pair, sums):
            value = builder.load(totals[n])
            larger = builder.fcmp_ordered(">", value, largest)
            number = builder.insert_element(
                ir.Constant(WORDS, ir.Undefined), builder.trunc(k, _WORD), _WORD(0)
            )
            number = builder.shuffle_vector(number, number, ir.Constant(WORDS, [0] * LANES))
            largest, numbers = (
                builder.select(larger, value, largest),
                builder.select(larger, number, numbers),
            )
        most.store(Lanes(builder, largest), n * LANES)
        builder.store(numbers, where, align=4)


@njit(cache=True, nogil=True)
def _classes(turned, weights, bias, headed, regions, logits, most, out):  # type: ignore[no-untyped-def]
    """out (RUN,): the classes of a run of voxels whose features are turned (F, RUN).

    The class of the first largest logit; of regions 1 + the last whose logit is above 0, or 0 where
    none is. logits, most: (RUN,) to work in. weights (F, K), bias (K,): the head, if there is one.
    """
    for n in range(_RUN):
        most[n] = 0 if regions else -np.inf
        out[n] = 0
    if headed and not regions:
        rows, columns = turned.reshape(-1), weights.reshape(-1)
        for k in range(0, len(bias), 2):
            second = min(k + 1, len(bias) - 1)
            _compare_two(
                rows, 0, len(turned), columns, 0, len(bias), bias, 0, k, second, most, 0, out, 0
            )
        return
    for k in range(len(bias)):
        if headed:
            for n in range(_RUN):
                logits[n] = bias[k]
            for f in range(len(turned)):
                weight = weights[f, k]
                for n in range(_RUN):
                    logits[n] += weight * turned[f, n]
        else:
            for n in range(_RUN):
                logits[n] = turned[k, n]
        if regions:
            for n in range(_RUN):
                out[n] = k + 1 if logits[n] > 0 else out[n]
        else:
            for n in range(_RUN):
                out[n] = k if logits[n] > most[n] else out[n]
                most[n] = max(logits[n], most[n])


@njit(cache=True, nogil=True)
def choose(low, high, block, weights, bias, headed, regions, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z) uint16: the class chosen at every voxel of block (X, Y, Z, F)."""
    width = block.shape[3]
    features = np.zeros((width, _RUN), np.float32)
    logits, most = np.empty(_RUN, np.float32), np.empty(_RUN, np.float32)
    classes = np.empty(_RUN, np.int32)
    direct = not headed and not regions and width >= LANES
    flat = block.reshape(-1)
    voxels, flat_out, rows = block.reshape(-1, width), out.reshape(-1), features.reshape(-1)
    plane = block.shape[1] * block.shape[2]
    if direct:
        for n in range(low * plane, high * plane):
            _first_largest(flat, n * width, flat, n * width, np.float32(0), width, classes, 0)
            flat_out[n] = classes[0]
        return
    for begin in range(low * plane, high * plane, _RUN):
        run = voxels[begin : min(begin + _RUN, high * plane)]
        if len(run) == _RUN and width % LANES == 0:
            for n in range(0, _RUN, LANES):
                for f in range(0, width, LANES):
                    _turn(flat, (begin + n) * width + f, width, rows, f * _RUN + n)
        else:
            for n in range(len(run)):
                for f in range(width):
                    features[f, n] = run[n, f]
        _classes(features, weights, bias, headed, regions, logits, most, classes)
        target = flat_out[begin : begin + len(run)]
        for n in range(len(run)):
            target[n] = classes[n]


@emitted
def _four_voxels(
    builder: Any,
    cell: Memory,
    features: Any,
    weights: Memory,
    step: Any,
    bias: Memory,
    classes: Any,
    out: Memory,
) -> None:
    """out (4, K) = bias (4, K) + cell (F,) times weights (F, ...), whose rows (4, K) are `step`
    apart; K >= 16.
    """
    with _vectors(builder, classes) as n:
        start = _start(builder, n.index, classes)
        rows = [builder.add(start, builder.mul(classes, INT(v))) for v in range(4)]
        sums = [cgutils.alloca_once(builder, VECTOR) for _ in rows]
        for row, total in zip(rows, sums):
            builder.store(bias.load(row).value, total)
        with loop(builder, features) as f:
            factor, line = cell.at(f.index).broadcast(), weights.at(builder.mul(f.index, step))
            for row, total in zip(rows, sums):
                before = Lanes(builder, builder.load(total))
                builder.store(before.plus(factor, line.load(row)).value, total)
        for row, total in zip(rows, sums):
            out.store(Lanes(builder, builder.load(total)), row)


@njit(cache=True, nogil=True)
def unfold(low, high, cells, weights, bias, slopes, slope_bias, own, cell, out):  # type: ignore[no-untyped-def]
    """Logits of the voxels of the cells low..high (X, Y, Z, F), as many as `out` (X · cell, Y ·
    cell, Z · cell, K) has.

    weights (F, V, K), bias (V, K): of each of the V = cell³ voxels of a cell, the last axis
    fastest. slopes (F, K), slope_bias (K,): of what a voxel's own number, one of the V features
    from `own` on, is multiplied by; none if empty.
    """
    features, voxels, classes = weights.shape
    slope = np.empty(classes, np.float32)
    logits = np.empty((voxels, classes), np.float32)
    flat, source, factors, offsets = (
        logits.reshape(-1),
        cells.reshape(-1),
        weights.reshape(-1),
        bias.reshape(-1),
    )
    for a in range(low, high):
        for b in range(cells.shape[1]):
            for c in range(cells.shape[2]):
                at = ((a * cells.shape[1] + b) * cells.shape[2] + c) * features
                if classes >= LANES and voxels % 4 == 0:
                    for v in range(0, voxels * classes, 4 * classes):
                        _four_voxels(
                            source, at, features, factors, v, voxels * classes, offsets, v, classes,
                            flat, v
                        )  # fmt: skip
                else:
                    for v in range(voxels):
                        for k in range(classes):
                            total = bias[v, k]
                            for f in range(features):
                                total += source[at + f] * weights[f, v, k]
                            logits[v, k] = total
                if len(slopes) > 0:
                    slope[:] = slope_bias
                    for f in range(features):
                        factor = source[at + f]
                        for k in range(classes):
                            slope[k] += factor * slopes[f, k]
                    for v in range(voxels):
                        x_of_voxel = source[at + own + v]
                        for k in range(classes):
                            logits[v, k] += slope[k] * x_of_voxel
                for v in range(voxels):
                    x, y, z = (
                        a * cell + v // (cell * cell),
                        b * cell + v // cell % cell,
                        c * cell + v % cell,
                    )
                    if x < out.shape[0] and y < out.shape[1] and z < out.shape[2]:
                        row, target = logits[v], out[x, y, z]
                        for k in range(classes):
                            target[k] = row[k]


@njit(cache=True, nogil=True)
def _logits(one, weights, bias, headed, out):  # type: ignore[no-untyped-def]
    """out (K,) = bias + one (F,) @ weights (F, K), or a copy of `one` where there is no head."""
    for k in range(len(out)):
        out[k] = bias[k] if headed else one[k]
    if headed:
        for f in range(len(one)):
            for k in range(len(out)):
                out[k] += one[f] * weights[f, k]


@njit(cache=True, nogil=True)
def confidence(low, high, block, weights, bias, headed, regions, wanted, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z, M + 1): probabilities of the classes `wanted` (M,), and the entropy
    from 0 to 1.

    Softmax and its Shannon entropy over log K; of regions the logistic function and the largest
    binary entropy.
    """
    logits = np.empty(len(bias), np.float32)
    for a in range(low, high):
        for b in range(block.shape[1]):
            for c in range(block.shape[2]):
                _logits(block[a, b, c], weights, bias, headed, logits)
                entropy = 0.0
                if regions:
                    for k in range(len(logits)):
                        p = 1 / (1 + np.exp(-logits[k]))
                        logits[k] = p
                        if 0 < p < 1:
                            entropy = max(
                                entropy, -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2.0)
                            )
                else:
                    most = logits[0]
                    for k in range(1, len(logits)):
                        most = max(most, logits[k])
                    total = 0.0
                    for k in range(len(logits)):
                        logits[k] = np.exp(logits[k] - most)
                        total += logits[k]
                    for k in range(len(logits)):
                        logits[k] /= total
                        if logits[k] > 0:
                            entropy -= logits[k] * np.log(logits[k])
                    entropy /= np.log(len(logits))
                for m in range(len(wanted)):
                    out[a, b, c, m] = logits[wanted[m]]
                out[a, b, c, len(wanted)] = entropy


@njit(cache=True, nogil=True)
def certainty(low, high, block, weights, bias, headed, regions, best, step):  # type: ignore[no-untyped-def]
    """(K + 1, 2): of each class chosen (best), background left out, the sum of its probabilities,
    and how often.

    Every `step`-th voxel along each axis of the rows low..high counts. Classes are numbered as in
    `choose`.
    """
    logits = np.empty(len(bias), np.float32)
    sums = np.zeros((len(bias) + 1, 2))
    for a in range(low + -low % step, high, step):
        for b in range(0, block.shape[1], step):
            for c in range(0, block.shape[2], step):
                number = best[a, b, c]
                if number == 0:
                    continue
                _logits(block[a, b, c], weights, bias, headed, logits)
                if regions:
                    p = 1 / (1 + np.exp(-logits[number - 1]))
                else:
                    total = 0.0
                    for k in range(len(logits)):
                        total += np.exp(logits[k] - logits[number])
                    p = 1 / total
                sums[number, 0] += p
                sums[number, 1] += 1
    return sums


@njit(cache=True, nogil=True)
def _between(base, slope, first, stop, size, begin, end):  # type: ignore[no-untyped-def]
    """The part of begin..end in which base + slope * k may lie in the cells first..stop of an axis
    of `size` voxels.

    It may be a little too long, never too short: the first and the last cell of an axis also get
    what lies beyond it.
    """
    low = -np.inf if first == 0 else float(first)
    high = np.inf if stop == size else stop - 1.0
    if abs(slope) < 1e-9:
        inside = low - 1e-3 <= base <= high + 1e-3
        return begin, (end if inside else begin)
    a, b = (low - base) / slope, (high - base) / slope
    if a > b:
        a, b = b, a
    if a > begin:
        begin = int(min(a - 1, end))
    if b < end:
        end = int(max(b + 2, begin))
    return begin, end


#: In a map of cells: their eight corners are not all of one class.
MIXED = 65535


@njit(cache=True, nogil=True)
def agree(low, high, best, out):  # type: ignore[no-untyped-def]
    """out[low:high] (X, Y, Z): of the cell between a voxel and its upper neighbours the class they
    share, or MIXED.

    Neighbours beyond the last voxel of an axis are that voxel itself.
    """
    for a in range(low, high):
        one = min(a + 1, best.shape[0] - 1)
        for b in range(best.shape[1]):
            two = min(b + 1, best.shape[1] - 1)
            row, right, front, both = best[a, b], best[one, b], best[a, two], best[one, two]
            for c in range(best.shape[2]):
                up = min(c + 1, best.shape[2] - 1)
                n = row[c]
                same = (row[up] == n) & (right[c] == n) & (right[up] == n) & (front[c] == n)
                same &= (front[up] == n) & (both[c] == n) & (both[up] == n)
                out[a, b, c] = n if same else MIXED


@njit(cache=True, nogil=True)
def _cell(at, size):  # type: ignore[no-untyped-def]
    """(cell, place in it from 0 to 1) of a model index on an axis of `size` voxels."""
    at = min(max(at, 0.0), size - 1.0)
    cell = min(int(at), max(size - 2, 0))
    return cell, np.float32(at - cell)


@njit(cache=True, nogil=True)
def _settle(mixed, turned, weights, bias, headed, regions, logits, most, found):  # type: ignore[no-untyped-def]
    """found (RUN,): the classes of a run of voxels whose features are mixed (RUN, F)."""
    width = len(turned)
    for f in range(width):
        for n in range(_RUN):
            turned[f, n] = mixed[n, f]
    _classes(turned, weights, bias, headed, regions, logits, most, found)


@njit(cache=True, nogil=True)
def _mix(flat, shape, a, b, a1, b1, z, fx, fy, out, row):  # type: ignore[no-untyped-def]
    """out (rows, F) at `row`: features between four neighbours of a plane, at shares fx and fy from
    (a, b) to (a1, b1).

    flat, out: the memory of a block (X, Y, Z, F) of this shape, and of the rows; slices would count
    references, which took longer than the sums.
    """
    one = np.float32(1)
    w00, w01, w10, w11 = (one - fx) * (one - fy), (one - fx) * fy, fx * (one - fy), fx * fy
    _, across, deep, width = shape
    at00, at01 = ((a * across + b) * deep + z) * width, ((a * across + b1) * deep + z) * width
    at10, at11 = ((a1 * across + b) * deep + z) * width, ((a1 * across + b1) * deep + z) * width
    to = row * width
    if width >= LANES:
        _mix_four(
            flat, at00, flat, at01, flat, at10, flat, at11, w00, w01, w10, w11, width, out, to
        )
    else:
        for f in range(width):
            out[to + f] = (
                w00 * flat[at00 + f]
                + w01 * flat[at01 + f]
                + w10 * flat[at10 + f]
                + w11 * flat[at11 + f]
            )


@njit(cache=True, nogil=True)
def paint(  # type: ignore[no-untyped-def]
    low, high, left, right, labels, maps, matrix, block, cells, best, field, origin, size, limits,
    weights, bias, headed, regions, values,
):  # fmt: skip
    """Labels, and maps, of scan voxels whose eight neighbours on the model's grid all lie in
    `block`.

    Only rows low..high of the scan's first axis and left..right of its second are looked at. labels
    (I, J, K), maps (M, I, J, K) or M = 0. block (X, Y, Z, F), the classes chosen in it, best (X, Y,
    Z), its cells as of `agree` and what is mapped, field (X, Y, Z, M), begin at `origin` (2,) of a
    grid of `size` (3,) voxels and span its last axis. matrix: (3, 4) scan index to model index.
    limits: (3, 2) model indices outside of which nothing is painted. values: the label of each
    class; of regions of none, and then of each.
    """
    width = block.shape[3]
    mixtures, features = np.zeros((_RUN, width), np.float32), np.zeros((width, _RUN), np.float32)
    logits, most = np.empty(_RUN, np.float32), np.empty(_RUN, np.float32)
    classes, places = np.empty(_RUN, np.int32), np.empty((_RUN, 3), np.int32)
    across, lower, flat = np.empty(2 * width, np.float32), 0, block.reshape(-1)
    direct = not headed and not regions and width >= LANES
    pending = 0  # voxels that are mixed and not yet painted
    straight = (
        matrix[0, 2] == 0 and matrix[1, 2] == 0
    )  # along a line of the scan only the model's last index changes
    one = np.float32(1)
    for i in range(low, high):
        for j in range(left, right):
            base_x = matrix[0, 0] * i + matrix[0, 1] * j + matrix[0, 3]
            base_y = matrix[1, 0] * i + matrix[1, 1] * j + matrix[1, 3]
            base_z = matrix[2, 0] * i + matrix[2, 1] * j + matrix[2, 3]
            begin, end = 0, labels.shape[2]
            begin, end = _between(
                base_x, matrix[0, 2], origin[0], origin[0] + block.shape[0], size[0], begin, end
            )
            begin, end = _between(
                base_y, matrix[1, 2], origin[1], origin[1] + block.shape[1], size[1], begin, end
            )
            x, y = base_x, base_y
            here, there = -1, -1
            (x0, fx), (y0, fy) = _cell(x, size[0]), _cell(y, size[1])
            for k in range(begin, end):
                if not straight:
                    x, y = base_x + matrix[0, 2] * k, base_y + matrix[1, 2] * k
                    (x0, fx), (y0, fy) = _cell(x, size[0]), _cell(y, size[1])
                z = base_z + matrix[2, 2] * k
                if x < limits[0, 0] or x > limits[0, 1] or y < limits[1, 0] or y > limits[1, 1]:
                    continue
                if z < limits[2, 0] or z > limits[2, 1]:
                    continue
                if x0 < origin[0] or y0 < origin[1]:
                    continue
                if min(x0 + 1, size[0] - 1) >= origin[0] + block.shape[0]:
                    continue
                if min(y0 + 1, size[1] - 1) >= origin[1] + block.shape[1]:
                    continue
                z0, fz = _cell(z, size[2])
                a, b = x0 - origin[0], y0 - origin[1]
                c = cells[a, b, z0]
                if c != MIXED and not maps.shape[0]:
                    labels[i, j, k] = values[c]
                    continue
                a1, b1 = min(a + 1, block.shape[0] - 1), min(b + 1, block.shape[1] - 1)
                z1 = min(z0 + 1, size[2] - 1)
                if maps.shape[0]:
                    w000, w001 = (one - fx) * (one - fy) * (one - fz), (one - fx) * (one - fy) * fz
                    w010, w011 = (one - fx) * fy * (one - fz), (one - fx) * fy * fz
                    w100, w101 = fx * (one - fy) * (one - fz), fx * (one - fy) * fz
                    w110, w111 = fx * fy * (one - fz), fx * fy * fz
                    for m in range(maps.shape[0]):
                        maps[m, i, j, k] = (
                            w000 * field[a, b, z0, m]
                            + w001 * field[a, b, z1, m]
                            + w010 * field[a, b1, z0, m]
                            + w011 * field[a, b1, z1, m]
                            + w100 * field[a1, b, z0, m]
                            + w101 * field[a1, b, z1, m]
                            + w110 * field[a1, b1, z0, m]
                            + w111 * field[a1, b1, z1, m]
                        )
                if c != MIXED:
                    labels[i, j, k] = values[c]
                    continue
                if fx == 0 and fy == 0 and fz == 0:
                    labels[i, j, k] = values[best[a, b, z0]]
                    continue
                # First across the line, at the two model voxels along it. On a straight line the
                # next scan voxels need the same two, or one of them: `here` and `there` say at
                # which the rows of `across` are.
                if here != z0:
                    if there == z0:
                        lower, here, there = 1 - lower, z0, -1
                    else:
                        _mix(flat, block.shape, a, b, a1, b1, z0, fx, fy, across, lower)
                        here = z0
                if there != z1:
                    _mix(flat, block.shape, a, b, a1, b1, z1, fx, fy, across, 1 - lower)
                    there = z1
                if not straight:
                    here, there = -1, -1
                upper = 1 - lower
                if direct:
                    _first_largest(
                        across, lower * width, across, upper * width, fz, width, classes, 0
                    )
                    labels[i, j, k] = values[classes[0]]
                    continue
                for f in range(width):
                    mixtures[pending, f] = (one - fz) * across[lower * width + f] + fz * across[
                        upper * width + f
                    ]
                places[pending, 0], places[pending, 1], places[pending, 2] = i, j, k
                pending += 1
                if pending == _RUN:
                    _settle(
                        mixtures, features, weights, bias, headed, regions, logits, most, classes
                    )
                    for n in range(pending):
                        labels[places[n, 0], places[n, 1], places[n, 2]] = values[classes[n]]
                    pending = 0
    _settle(mixtures, features, weights, bias, headed, regions, logits, most, classes)
    for n in range(pending):
        labels[places[n, 0], places[n, 1], places[n, 2]] = values[classes[n]]
