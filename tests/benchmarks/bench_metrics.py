"""Time and memory of all scores of all labels, with the other packages beside it where they are
installed.

`python tests/benchmarks/bench_metrics.py` (104 labels, 512 x 512 x 300 voxels, about 4 minutes and
4 GB with the peers) prints a table and writes nothing. Peers are measured on a sample of the labels
and scaled to all, marked as such; the sample's values are compared with ours.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from making.blobs import blob_pair
from medseg.evaluation import metrics
from medseg.evaluation.surfaces import overlaps

SPACING = (1.0, 1.0, 1.5)
TOLERANCE = 2.0


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of some runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def memory_mb(field: str) -> float:
    """Memory of this process as Linux counts it: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Let the largest memory begin anew (see proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def monai(first: NDArray, second: NDArray, label: int) -> list[float]:
    """HD95 and surface Dice by MONAI, which takes one-hot tensors."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    one_hot = [torch.from_numpy((labels == label)[None, None]) for labels in (second, first)]
    place = {"spacing": list(SPACING), "include_background": True}
    distance = compute_hausdorff_distance(*one_hot, percentile=95, **place)
    return [float(distance), float(compute_surface_dice(*one_hot, [TOLERANCE], **place))]


def surface_distance(first: NDArray, second: NDArray, label: int) -> list[float]:
    """HD95 and surface Dice by google-deepmind/surface-distance."""
    import surface_distance as package

    found = package.compute_surface_distances(first == label, second == label, SPACING)
    distance = package.compute_robust_hausdorff(found, 95)
    return [distance, package.compute_surface_dice_at_tolerance(found, TOLERANCE)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--labels", type=int, default=104)
    parser.add_argument("--sample", type=int, default=3, help="labels for the peers")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    np.Inf, np.NaN = np.inf, np.nan  # surface-distance 0.1 was written for NumPy 1
    first, second = blob_pair(tuple(options.shape), options.labels)
    structures = {str(label): [label] for label in range(1, options.labels + 1)}
    small = np.ascontiguousarray(first[:64, :64, :64])

    compile_seconds = {}
    for surface in ("surfel", "voxel"):
        start = time.perf_counter()
        metrics.score(small, np.roll(small, 20, 0), SPACING, structures, surface=surface)
        compile_seconds[surface] = time.perf_counter() - start
    print(f"{options.labels} labels, {' x '.join(map(str, options.shape))} voxels, uint8 in memory")
    print(
        "first call, compiled or from the cache:",
        {k: f"{s:.1f} s" for k, s in compile_seconds.items()},
    )

    seconds, _ = timed(lambda: overlaps(first, second, list(structures.values())), options.repeats)
    print(f"{'medseg overlap of all labels':<52}{seconds:8.3f} s")
    ours = {}
    for surface in ("surfel", "voxel"):
        forget_peak()
        before = memory_mb("VmRSS")
        seconds, result = timed(
            lambda surface=surface: metrics.score(
                first, second, SPACING, structures, surface=surface, tolerance_mm=TOLERANCE
            ),
            options.repeats,
        )
        extra = memory_mb("VmHWM") - before
        ours[surface] = (seconds, result)
        print(
            f"{f'medseg overlap, HD, HD95, ASSD, NSD ({surface})':<52}{seconds:8.3f} s "
            f" +{extra:.0f} MB"
        )

    sample = np.linspace(1, options.labels, min(options.sample, options.labels)).astype(int)
    for peer, surface in ((monai, "voxel"), (surface_distance, "surfel")):
        if find_spec(peer.__name__) is None:
            print(f"{peer.__name__} is not installed")
            continue
        peer(small, small, int(small.max()))
        seconds, values = timed(
            lambda peer=peer: [peer(first, second, int(label)) for label in sample], 1
        )
        all_labels = seconds / len(sample) * options.labels
        mine, rows = ours[surface]
        own = [
            [rows[str(label)]["hausdorff95_mm"], rows[str(label)]["surface_dice"]]
            for label in sample
        ]
        difference = np.abs(np.array(own) - np.array(values)).max()
        name = f"{peer.__name__} HD95, NSD ({len(sample)}/{options.labels} labels, scaled)"
        print(
            f"{name:<52}{all_labels:8.1f} s  {all_labels / mine:.0f} x medseg; differs by"
            f" {difference:.1e}"
        )


if __name__ == "__main__":
    main()
