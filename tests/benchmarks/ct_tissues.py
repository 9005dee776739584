"""Time and memory of `ct-tissues` on a whole trunk of 512 x 512 x 600 voxels made by code.

    python tests/benchmarks/ct_tissues.py [--slices 600]

Prints seconds (wall and CPU) of a second run, when compiled code is there, and the most memory
that the process held, beside the scan's own size.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from making.ct import grid, trunk
from medseg.inference.tissues.model import ct_tissues
from medseg.machine import peak_memory_bytes
from medseg.volume import Volume


def main() -> None:
    """Make the scan slab by slab, label a small one to compile, then the large one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slices", type=int, default=600)
    slices = parser.parse_args().slices
    spacing = (0.9, 0.8, 1.0)
    affine, _ = grid(low_mm=(-230, -200, 0), high_mm=(230, 200, 8), spacing_mm=spacing)
    affine[2, 3] = 190 - slices
    data = np.empty((512, 512, slices), np.int16, order="F")
    for k in range(0, slices, 8):
        part = affine.copy()
        part[2, 3] += k
        data[..., k : k + 8] = trunk(part, (512, 512, min(8, slices - k)), noise=20).scan.data
    scan = Volume(data, affine)
    ct_tissues(Volume(data[::8, ::8, ::8], affine @ np.diag([8, 8, 8, 1])))
    before = peak_memory_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    labels = ct_tissues(scan)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    counts = sum(np.bincount(plane.ravel(), minlength=12) for plane in labels.data.T)
    print(f"{scan.shape}: {wall:.1f} s, {cpu:.1f} s of CPU, load {os.getloadavg()[0]:.1f}")
    print(f"peak {peak_memory_bytes() / 1e9:.2f} GB ({before / 1e9:.2f} before)")
    print("voxels of each label:", [int(count) for count in counts])


if __name__ == "__main__":
    main()
