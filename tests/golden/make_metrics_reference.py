"""Store what MONAI and google-deepmind/surface-distance say about small random label maps, in
metrics_reference.json.

Run where both are installed: `python tests/golden/make_metrics_reference.py`. tests/test_metrics.py
compares with the stored values everywhere, and calls `peer_values` where the packages are there.
"""

import base64
import json
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import ndimage

SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 5.0), (0.7, 0.9, 2.5))
TOLERANCES = (1.0, 2.6)
LABELS = (1, 2, 3, 4)


def random_pair(seed, shape):
    """Two multi-label maps (uint8) that agree in part, touch all sides, and have stray voxels."""
    random = np.random.default_rng(seed)
    fields = [
        [ndimage.gaussian_filter(random.standard_normal(shape), 2) for _ in range(5)]
        for _ in range(2)
    ]
    first = np.argmax(fields[0], axis=0).astype(np.uint8)
    second = np.argmax(np.array(fields[0]) + 0.5 * np.array(fields[1]), axis=0).astype(np.uint8)
    second.flat[random.integers(0, second.size, 3)] = 1
    return first, second


def peer_values(first, second, spacing, label):
    """HD, HD95, ASSD and surface Dice at both tolerances, of surfels and of voxels, as the packages
    compute them.
    """
    np.Inf, np.NaN = np.inf, np.nan  # surface-distance 0.1 was written for NumPy 1
    import surface_distance
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    a, b = first == label, second == label
    found = surface_distance.compute_surface_distances(a, b, spacing)
    means = surface_distance.compute_average_surface_distance(found)
    areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
    surfel = [
        surface_distance.compute_robust_hausdorff(found, 100),
        surface_distance.compute_robust_hausdorff(found, 95),
        float(np.dot(means, areas) / sum(areas)),
        *(
            surface_distance.compute_surface_dice_at_tolerance(found, tolerance)
            for tolerance in TOLERANCES
        ),
    ]
    one_hot = [torch.from_numpy(np.stack((~mask, mask)))[None].float() for mask in (b, a)]
    place = {"spacing": list(spacing)}
    voxel = [
        compute_hausdorff_distance(*one_hot, **place),
        compute_hausdorff_distance(*one_hot, percentile=95, **place),
        compute_average_surface_distance(*one_hot, symmetric=True, **place),
        *(compute_surface_dice(*one_hot, [tolerance], **place) for tolerance in TOLERANCES),
    ]
    return {
        "surfel": [float(value) for value in surfel],
        "voxel": [float(value) for value in voxel],
    }


def pack(labels):
    """A small uint8 array as text."""
    return {
        "shape": labels.shape,
        "data": base64.b64encode(zlib.compress(labels.tobytes(), 9)).decode(),
    }


def unpack(stored):
    """The array of `pack`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(stored["data"])), np.uint8).reshape(
        stored["shape"]
    )


def main():
    """Write metrics_reference.json beside this file."""
    cases = []
    for number, spacing in enumerate(SPACINGS):
        first, second = random_pair(number, (16 + number, 14, 12))
        values = {str(label): peer_values(first, second, spacing, label) for label in LABELS}
        cases.append(
            {"spacing": spacing, "first": pack(first), "second": pack(second), "values": values}
        )
    packages = ("monai", "Surface-Distance-Based-Measures", "torch", "scipy", "numpy")
    content = {"versions": {name: version(name) for name in packages}, "cases": cases}
    Path(__file__).with_name("metrics_reference.json").write_text(
        json.dumps(content, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
