"""Time and memory of `medseg infer` on a whole head of 256x256x256 voxels at 1 mm, start-up
included.

python tests/benchmarks/bench_infer.py [--model brain] [--runs 3] [--scan FILE]

Without --scan the bundled synthetic head is interpolated to that grid. Wall-clock seconds and the
peak memory of the whole process tree (sum of resident sizes, sampled every 50 ms) are printed for
each run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medseg.io import read, write
from medseg.volume import resample

SAMPLE = Path(__file__).parents[2] / "sample_volumes" / "head_t1.nii.gz"


def tree_memory_bytes(pid: int) -> int:
    """Resident bytes of a process and its children, 0 once it is gone (Linux)."""
    try:
        status = Path(f"/proc/{pid}/statm").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split()[1]) * 4096 + sum(tree_memory_bytes(int(child)) for child in children)


def main() -> None:
    """Print a line for each run and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="brain")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scan", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.scan or Path(folder) / "head.nii.gz"
        if not options.scan:
            sample = read(SAMPLE)
            affine = np.eye(4)
            middle = (sample.affine @ (*((np.array(sample.shape) - 1) / 2), 1))[:3]
            affine[:3, 3] = middle - 127.5
            head = resample(sample, affine, (256, 256, 256), order=1)
            write(head.with_data(np.round(head.data).astype(np.int16)), path)
        walls, peaks = [], []
        for run in range(options.runs):
            command = [
                sys.executable,
                "-m",
                "medseg",
                "infer",
                str(path),
                "-o",
                str(Path(folder) / "out.nii.gz"),
            ]
            begun, peak = time.perf_counter(), 0
            process = subprocess.Popen(
                [*command, "-m", options.model, "--quiet"], stdout=subprocess.DEVNULL
            )
            while process.poll() is None:
                peak = max(peak, tree_memory_bytes(process.pid))
                time.sleep(0.05)
            walls.append(time.perf_counter() - begun)
            peaks.append(peak / 1e9)
            print(
                f"run {run + 1}: {walls[-1]:.1f} s, {peaks[-1]:.2f} GB, exit code"
                f" {process.returncode}"
            )
        print(f"median: {statistics.median(walls):.1f} s, {statistics.median(peaks):.2f} GB")


if __name__ == "__main__":
    main()
