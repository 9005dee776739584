"""The compiled loops of `resampling` and `augment`: lines, points and patches of arrays on other
grids.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit


@njit(cache=True, nogil=True)
def multiply_rows(first, last, a, b, out):  # type: ignore[no-untyped-def]
    """Rows first..last of out = a @ b; a (N, K), b (K, M), out (N, M), float32, each sum in the
    order of K.
    """
    for n in range(first, last):
        row = out[n]
        row[:] = 0
        for k in range(b.shape[0]):
            factor = a[n, k]
            if factor != 0:  # most are 0, in narrow blurs
                for m in range(b.shape[1]):
                    row[m] += factor * b[k, m]


#: A point this far outside in voxels is rounding: the outermost planes would otherwise come and go
#: with it.
ROUNDING = 1e-7


#: Pole of the cubic B-spline's inverse filter; its powers beyond this many are nothing.
_POLE = np.sqrt(3.0) - 2.0


_POWERS = 32


@njit(cache=True, nogil=True, fastmath={"contract"})
def apply_operators(block, first_a, weights_a, first_b, weights_b, first_c, weights_c, out):  # type: ignore[no-untyped-def]
    """One operator for each axis: block (A, B, C) float32 to out, all C-contiguous."""
    height, width = block.shape[1], block.shape[2]
    plane = np.empty((height, width), np.float32)
    line = np.empty(width, np.float32)
    for a in range(out.shape[0]):
        for b in range(height):
            row = plane[b]
            _mix(block[:, b], first_a[a], weights_a[a], row)
        for b in range(out.shape[1]):
            _mix(plane, first_b[b], weights_b[b], line)
            result = out[a, b]
            if weights_c.shape[1] == 2:
                for c in range(result.size):
                    x = first_c[c]
                    result[c] = weights_c[c, 0] * line[x] + weights_c[c, 1] * line[x + 1]
            elif weights_c.shape[1] == 4:
                for c in range(result.size):
                    x = first_c[c]
                    result[c] = (weights_c[c, 0] * line[x] + weights_c[c, 1] * line[x + 1]) + (
                        weights_c[c, 2] * line[x + 2] + weights_c[c, 3] * line[x + 3]
                    )
            else:
                for c in range(result.size):
                    total = np.float32(0)
                    for t in range(weights_c.shape[1]):
                        total += weights_c[c, t] * line[first_c[c] + t]
                    result[c] = total


@njit(cache=True, nogil=True, fastmath={"contract"})
def _mix(rows, first, weights, out):  # type: ignore[no-untyped-def]
    """out = the weighted sum of rows first, first + 1, ...: four at a time, so that `out` is rarely
    read again.
    """
    count = weights.size
    t = 0
    while t < count:
        left = count - t
        w0 = weights[t]
        r0 = rows[first + t]
        if left == 1:
            if t:
                for c in range(out.size):
                    out[c] += w0 * r0[c]
            else:
                for c in range(out.size):
                    out[c] = w0 * r0[c]
            return
        w1 = weights[t + 1]
        r1 = rows[first + t + 1]
        if left < 4:
            if t:
                for c in range(out.size):
                    out[c] += w0 * r0[c] + w1 * r1[c]
            else:
                for c in range(out.size):
                    out[c] = w0 * r0[c] + w1 * r1[c]
            t += 2
            continue
        w2, w3 = weights[t + 2], weights[t + 3]
        r2, r3 = rows[first + t + 2], rows[first + t + 3]
        if t:
            for c in range(out.size):
                out[c] += (w0 * r0[c] + w1 * r1[c]) + (w2 * r2[c] + w3 * r3[c])
        else:
            for c in range(out.size):
                out[c] = (w0 * r0[c] + w1 * r1[c]) + (w2 * r2[c] + w3 * r3[c])
        t += 4


@njit(cache=True, nogil=True, fastmath={"contract"})
def filter_columns(values, start, stop):  # type: ignore[no-untyped-def]
    """Samples to cubic spline coefficients down the columns start..stop of `values` (n, m) float32,
    in place, n > 1.
    """
    n = values.shape[0]
    pole = np.float32(_POLE)
    begin = np.zeros(stop - start, np.float64)
    power = 1.0
    far = _POLE ** (n - 1) if n <= _POWERS else 0.0
    for k in range(min(n, _POWERS)):
        share = power
        if 0 < k < n - 1:
            share += far * _POLE ** (n - 1 - k)
        for c in range(begin.size):
            begin[c] += share * values[k, start + c]
        power *= _POLE
    for c in range(begin.size):
        values[0, start + c] = np.float32(6 * begin[c] / (1 - far * far))
    for k in range(1, n):
        for c in range(start, stop):
            values[k, c] = np.float32(6) * values[k, c] + pole * values[k - 1, c]
    end = np.float32(_POLE / (_POLE * _POLE - 1))
    for c in range(start, stop):
        values[n - 1, c] = end * (pole * values[n - 2, c] + values[n - 1, c])
    for k in range(n - 2, -1, -1):
        for c in range(start, stop):
            values[k, c] = pole * (values[k + 1, c] - values[k, c])


@njit(cache=True, nogil=True, fastmath={"contract"})
def filter_rows(values):  # type: ignore[no-untyped-def]
    """Samples to cubic spline coefficients along the rows of `values` (m, n) float32, in place, n >
    1.

    Sixteen rows are turned into columns, filtered as such and turned back.
    """
    rows, n = values.shape
    columns = np.empty((n, 16), np.float32)
    for start in range(0, rows, 16):
        count = min(16, rows - start)
        for r in range(count):
            row = values[start + r]
            for k in range(n):
                columns[k, r] = row[k]
        filter_columns(columns, 0, count)
        for r in range(count):
            row = values[start + r]
            for k in range(n):
                row[k] = columns[k, r]


@njit(cache=True, nogil=True, fastmath={"contract"})
def linear_points(data, rows, points, outside, start, stop, out):  # type: ignore[no-untyped-def]
    """Trilinear values for planes start..stop of out (A, B, C); rows (3, 4): indices of out to
    those of data.
    """
    sizes = data.shape
    total_points = points[0] * points[1] * points[2]
    spread = np.empty((total_points, 3))
    n = 0
    for i in range(points[0]):
        for j in range(points[1]):
            for k in range(points[2]):
                for axis in range(3):
                    spread[n, axis] = (
                        rows[axis, 0] * ((i + 0.5) / points[0] - 0.5)
                        + rows[axis, 1] * ((j + 0.5) / points[1] - 0.5)
                        + rows[axis, 2] * ((k + 0.5) / points[2] - 0.5)
                    )
                n += 1
    ends = (sizes[0] - 1 + ROUNDING, sizes[1] - 1 + ROUNDING, sizes[2] - 1 + ROUNDING)
    for a in range(start, stop):
        for b in range(out.shape[1]):
            base0 = rows[0, 0] * a + rows[0, 1] * b + rows[0, 3]
            base1 = rows[1, 0] * a + rows[1, 1] * b + rows[1, 3]
            base2 = rows[2, 0] * a + rows[2, 1] * b + rows[2, 3]
            for c in range(out.shape[2]):
                total = np.float32(0)
                for p in range(total_points):
                    x = base0 + rows[0, 2] * c + spread[p, 0]
                    y = base1 + rows[1, 2] * c + spread[p, 1]
                    z = base2 + rows[2, 2] * c + spread[p, 2]
                    if not (
                        -ROUNDING <= x <= ends[0]
                        and -ROUNDING <= y <= ends[1]
                        and -ROUNDING <= z <= ends[2]
                    ):
                        total += outside
                        continue
                    x0, y0, z0 = max(int(x), 0), max(int(y), 0), max(int(z), 0)
                    x0, y0, z0 = min(x0, sizes[0] - 1), min(y0, sizes[1] - 1), min(z0, sizes[2] - 1)
                    x1, y1, z1 = (
                        min(x0 + 1, sizes[0] - 1),
                        min(y0 + 1, sizes[1] - 1),
                        min(z0 + 1, sizes[2] - 1),
                    )
                    fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
                    v000, v001 = np.float32(data[x0, y0, z0]), np.float32(data[x0, y0, z1])
                    v010, v011 = np.float32(data[x0, y1, z0]), np.float32(data[x0, y1, z1])
                    v100, v101 = np.float32(data[x1, y0, z0]), np.float32(data[x1, y0, z1])
                    v110, v111 = np.float32(data[x1, y1, z0]), np.float32(data[x1, y1, z1])
                    v00, v01 = v000 + fz * (v001 - v000), v010 + fz * (v011 - v010)
                    v10, v11 = v100 + fz * (v101 - v100), v110 + fz * (v111 - v110)
                    v0, v1 = v00 + fy * (v01 - v00), v10 + fy * (v11 - v10)
                    total += v0 + fx * (v1 - v0)
                out[a, b, c] = total / np.float32(total_points)


@njit(cache=True, nogil=True)
def _spline_taps(at, size, places, weights):  # type: ignore[no-untyped-def]
    """Fill places (4,) and weights (4,) of the cubic B-spline at a point of an axis, mirrored at
    its ends.
    """
    at = min(max(at, 0.0), size - 1.0)
    base = int(at)
    t = at - base
    weights[0] = (1 - t) ** 3 / 6
    weights[1] = 2 / 3 - t**2 + t**3 / 2
    weights[2] = 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2
    weights[3] = t**3 / 6
    period = max(1, 2 * size - 2)
    for n in range(4):
        place = abs(base - 1 + n) % period
        places[n] = period - place if place >= size else place


@njit(cache=True, nogil=True, fastmath={"contract"})
def cubic_points(coefficients, rows, points, outside, start, stop, out):  # type: ignore[no-untyped-def]
    """Cubic values for planes start..stop of out (A, B, C); rows (3, 4): indices of out to those of
    `coefficients`.
    """
    sizes = coefficients.shape
    places, weights = np.empty((3, 4), np.int64), np.empty((3, 4), np.float32)
    at = np.empty(3)
    total_points = points[0] * points[1] * points[2]
    for a in range(start, stop):
        for b in range(out.shape[1]):
            for c in range(out.shape[2]):
                total = np.float32(0)
                for p in range(total_points):
                    i = a + (p // (points[1] * points[2]) + 0.5) / points[0] - 0.5
                    j = b + (p // points[2] % points[1] + 0.5) / points[1] - 0.5
                    k = c + (p % points[2] + 0.5) / points[2] - 0.5
                    inside = True
                    for axis in range(3):
                        at[axis] = (
                            rows[axis, 0] * i
                            + rows[axis, 1] * j
                            + rows[axis, 2] * k
                            + rows[axis, 3]
                        )
                        inside &= -ROUNDING <= at[axis] <= sizes[axis] - 1 + ROUNDING
                    if not inside:
                        total += outside
                        continue
                    for axis in range(3):
                        _spline_taps(at[axis], sizes[axis], places[axis], weights[axis])
                    for x in range(4):
                        for y in range(4):
                            row = coefficients[places[0, x], places[1, y]]
                            part = np.float32(0)
                            for z in range(4):
                                part += weights[2, z] * row[places[2, z]]
                            total += weights[0, x] * weights[1, y] * part
                out[a, b, c] = total / np.float32(total_points)


@njit(cache=True, nogil=True, fastmath={"contract"})
def linear_patch(image, labels, rows, shift, outside, start, stop, out, classes):  # type: ignore[no-untyped-def]
    """Planes start..stop of out (C, A, B, D) and classes (A, B, D): trilinear values, and the class
    of most weight.

    image (C, X, Y, Z) float32 and labels (X, Y, Z) integer are looked up at rows (3, 4) @ (a, b, d,
    1) + shift (3, A, B, D), which may be empty. More than half a voxel outside are outside (C,) and
    0.
    """
    sizes = labels.shape
    bent = shift.size > 0
    weights, there = np.empty(8, np.float32), np.empty(8, np.int64)
    ends = (sizes[0] - 1.0, sizes[1] - 1.0, sizes[2] - 1.0)
    for a in range(start, stop):
        for b in range(classes.shape[1]):
            base0 = rows[0, 0] * a + rows[0, 1] * b + rows[0, 3]
            base1 = rows[1, 0] * a + rows[1, 1] * b + rows[1, 3]
            base2 = rows[2, 0] * a + rows[2, 1] * b + rows[2, 3]
            for d in range(classes.shape[2]):
                x, y, z = base0 + rows[0, 2] * d, base1 + rows[1, 2] * d, base2 + rows[2, 2] * d
                if bent:
                    x, y, z = x + shift[0, a, b, d], y + shift[1, a, b, d], z + shift[2, a, b, d]
                if not (
                    -0.5 <= x <= ends[0] + 0.5
                    and -0.5 <= y <= ends[1] + 0.5
                    and -0.5 <= z <= ends[2] + 0.5
                ):
                    for channel in range(out.shape[0]):
                        out[channel, a, b, d] = outside[channel]
                    classes[a, b, d] = 0
                    continue
                x, y, z = (
                    min(max(x, 0.0), ends[0]),
                    min(max(y, 0.0), ends[1]),
                    min(max(z, 0.0), ends[2]),
                )
                x0, y0, z0 = int(x), int(y), int(z)
                x1, y1, z1 = (
                    min(x0 + 1, sizes[0] - 1),
                    min(y0 + 1, sizes[1] - 1),
                    min(z0 + 1, sizes[2] - 1),
                )
                fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
                for channel in range(out.shape[0]):
                    grey = image[channel]
                    v00 = grey[x0, y0, z0] + fz * (grey[x0, y0, z1] - grey[x0, y0, z0])
                    v01 = grey[x0, y1, z0] + fz * (grey[x0, y1, z1] - grey[x0, y1, z0])
                    v10 = grey[x1, y0, z0] + fz * (grey[x1, y0, z1] - grey[x1, y0, z0])
                    v11 = grey[x1, y1, z0] + fz * (grey[x1, y1, z1] - grey[x1, y1, z0])
                    v0, v1 = v00 + fy * (v01 - v00), v10 + fy * (v11 - v10)
                    out[channel, a, b, d] = v0 + fx * (v1 - v0)
                there[0], there[1] = labels[x0, y0, z0], labels[x0, y0, z1]
                there[2], there[3] = labels[x0, y1, z0], labels[x0, y1, z1]
                there[4], there[5] = labels[x1, y0, z0], labels[x1, y0, z1]
                there[6], there[7] = labels[x1, y1, z0], labels[x1, y1, z1]
                best = there[0]
                alike = True
                for n in range(1, 8):
                    alike &= there[n] == best
                if not alike:
                    one = np.float32(1)
                    for n in range(8):
                        w = (
                            (fx if n & 4 else one - fx)
                            * (fy if n & 2 else one - fy)
                            * (fz if n & 1 else one - fz)
                        )
                        weights[n] = w
                    most = np.float32(0)
                    for n in range(8):
                        total = np.float32(0)
                        for m in range(8):
                            if there[m] == there[n]:
                                total += weights[m]
                        if total > most:
                            best, most = there[n], total
                classes[a, b, d] = best
