"""Time of cleaning up all labels, with the usual loops over labels beside it.

`python tests/benchmarks/bench_cleanup.py` (104 labels, 512 x 512 x 300 voxels) prints a table and
writes nothing. The loops are measured on a sample of the labels and scaled to all; their voxels are
compared with ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))
from making.blobs import blob_pair
from medseg.postprocess import cleanup as cleanup_module

NEAR = ndimage.generate_binary_structure(3, 3)
MIN_VOXELS = 200


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of some runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def keep_largest(labels: NDArray, label: int) -> NDArray[np.bool_]:
    """The largest part of one label, as a loop does it with scipy."""
    numbers, _ = ndimage.label(labels == label, NEAR)
    return numbers == 1 + np.argmax(np.bincount(numbers.ravel())[1:])


def drop_small(labels: NDArray, label: int) -> NDArray[np.bool_]:
    """One label without its small parts."""
    numbers, _ = ndimage.label(labels == label, NEAR)
    large = np.bincount(numbers.ravel()) >= MIN_VOXELS
    large[0] = False
    return large[numbers]


def fill_holes(labels: NDArray, label: int) -> NDArray[np.bool_]:
    """One label with the background in it."""
    mask = labels == label
    return mask | (ndimage.binary_fill_holes(mask) & (labels == 0))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--labels", type=int, default=104)
    parser.add_argument("--sample", type=int, default=2, help="labels for the loops")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    _, labels = blob_pair(tuple(options.shape), options.labels)
    ours = {
        keep_largest: lambda data: cleanup_module.keep_largest(data),
        drop_small: lambda data: cleanup_module.drop_small(data, MIN_VOXELS, 1),
        fill_holes: lambda data: cleanup_module.fill_holes(data),
    }
    sample = np.linspace(1, options.labels, min(options.sample, options.labels)).astype(int)
    print(
        f"{options.labels} labels, {' x '.join(map(str, options.shape))} voxels; loops on"
        f" {len(sample)} labels, scaled"
    )
    for loop, work in ours.items():
        work(np.ascontiguousarray(labels[:64, :64, :64]))
        seconds, result = timed(lambda work=work: work(labels), options.repeats)
        loop_seconds, masks = timed(lambda loop=loop: [loop(labels, label) for label in sample], 1)
        all_labels = loop_seconds / len(sample) * options.labels
        equal = all(((result == label) == mask).all() for label, mask in zip(sample, masks))
        changed = int((result != labels).sum())
        print(
            f"{loop.__name__:<14}{seconds:7.3f} s   loop {all_labels:6.1f} s  "
            f" {all_labels / seconds:5.0f} x   {changed} voxels changed,"
            f" {'equal' if equal else 'NOT EQUAL'} on the sample"
        )


if __name__ == "__main__":
    main()
