"""The compiled loops of `synth`: looking intensities up in a deformed label map, and the filled
voxels of an image.
"""

from __future__ import annotations

import numpy as np

from medseg.kernels.compiled import njit


@njit(cache=True, nogil=True)
def look_up(  # type: ignore[no-untyped-def]
    low,
    high,
    spacing,
    head,
    matrix,
    centre,
    moved,
    inside,
    means,
    deviations,
    noise,
    classes,
    image,
    indices,
    found,
):
    """Draws the planes low..high of an image (X, Y, Z) from a label map `head` whose border lies
    beyond it.

    Voxel (x, y, z) lies at centre (3,) + matrix (3, 3) @ (its millimetres from the middle + moved
    (3, X, Y, Z)), in voxels of the head less its border. Its intensity is the mean over points
    `inside` (P, 3) of it, in voxels of the image, of the `means` of the labels nearest to them,
    plus noise (X, Y, Z) times the deviation of its own label. That goes to `indices`, and its class
    to `found`.
    """
    _, depth, height, width = moved.shape
    points = len(inside)
    shifts = np.empty((points + 1, 3), np.float32)
    for n in range(points + 1):
        for r in range(3):
            # + 1 for the border, + 0.5 because the cut to an integer rounds down.
            shifts[n, r] = centre[r] + np.float32(1.5)
            if n < points:
                for c in range(3):
                    shifts[n, r] += matrix[r, c] * spacing * inside[n, c]
    at = np.empty(3, np.float32)
    place = np.empty(3, np.int64)
    for x in range(low, high):
        for y in range(height):
            for z in range(width):
                mm_x = moved[0, x, y, z] + (x - (depth - 1) * 0.5) * spacing
                mm_y = moved[1, x, y, z] + (y - (height - 1) * 0.5) * spacing
                mm_z = moved[2, x, y, z] + (z - (width - 1) * 0.5) * spacing
                for r in range(3):
                    at[r] = matrix[r, 0] * mm_x + matrix[r, 1] * mm_y + matrix[r, 2] * mm_z
                total, index = np.float32(0), 0
                for n in range(points + 1):
                    for r in range(3):
                        place[r] = int(
                            min(max(at[r] + shifts[n, r], np.float32(0)), head.shape[r] - 1)
                        )
                    index = head[place[0], place[1], place[2]]
                    if n < points:
                        total += means[index]
                image[x, y, z] = total / points + deviations[index] * noise[x, y, z]
                indices[x, y, z] = index
                found[x, y, z] = classes[index]


@njit(cache=True, nogil=True)
def filled(image, step, out):  # type: ignore[no-untyped-def]
    """How many of the numbers are above 0; of those each `step`-th goes to `out`, if step > 0."""
    count, at = 0, 0
    for n in range(image.size):
        if image[n] > 0:
            if step > 0 and count % step == 0:
                out[at] = image[n]
                at += 1
            count += 1
    return count
