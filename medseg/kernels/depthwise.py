"""The compiled loop of `ops.depthwise`: what the kernel of a convolution of one channel learns."""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit

#: Voxels that are gone through for all places of the kernel: few enough to stay in the nearest
#: cache.
_NEAR = 2048


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def correlate(slopes, x, shifts, sums):  # type: ignore[no-untyped-def]
    """sums[k]: the sum over n of slopes[n] times x[n + shifts[k]].

    slopes (N), x (at least N + the largest shift) float32; shifts (K) int64; sums (K) float64.
    """
    sums[:] = 0.0
    for first in range(0, slopes.size, _NEAR):
        near = slopes[first : first + _NEAR]
        for k in range(shifts.size):
            shifted = x[first + shifts[k] : first + shifts[k] + near.size]
            total = np.float32(0)
            for n in range(near.size):
                total += near[n] * shifted[n]
            sums[k] += total
