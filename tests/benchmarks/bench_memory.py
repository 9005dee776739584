"""Memory of `medseg infer` on a large scan: forecast against measured, few classes against many,
parts.

python tests/benchmarks/bench_memory.py [--shape 512 512 600] [--classes 2 118]
    [--features 16 32 64] [--patch 96 96 96] [--max-memory SIZE ...] [--scan FILE --model NAME]

A network with random weights segments a synthetic body at its own spacing through the command line,
gzip in and out. Peak memory is the sum of resident sizes of the process tree, sampled every 20 ms;
the forecast is what the run record says was promised. With --scan an existing scan and model are
used instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_infer import tree_memory_bytes

from medseg.io import write
from medseg.labels import LabelTable
from medseg.volume import Volume


def body(shape: tuple[int, int, int]) -> Volume:
    """A noisy ellipsoid with brighter and darker bands, int16, 1 mm."""
    random = np.random.default_rng(0)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    data = np.empty(shape, np.int16, order="F")
    for k, z in enumerate(axes[2]):
        inside = axes[0][:, None] ** 2 + axes[1] ** 2 + z**2 < 0.95
        bands = 400 + 200 * np.sin(9 * axes[0])[:, None] * np.cos(7 * axes[1]) * np.cos(11 * z)
        data[..., k] = np.where(inside, bands, 0) + random.normal(0, 15, shape[:2])
    return Volume(data, np.diag([1.0, 1.0, 1.0, 1.0]))


def save_model(folder: Path, classes: int, features: list[int], patch: list[int]) -> None:
    """A model folder of a U-Net with random weights."""
    import torch

    from medseg.models.folder import save_checkpoint
    from medseg.networks.zoo import build_network

    torch.manual_seed(0)
    options = {"features": features}
    network = build_network("unet", 1, classes, **options)
    spec = {
        "name": "bench",
        "architecture": "unet",
        "options": options,
        "classes": tuple(range(classes)),
    }
    spec |= {"patch": tuple(patch), "spacing_mm": 1.0}
    save_checkpoint(folder, spec, network.state_dict(), LabelTable.from_values(range(1, classes)))


def measured(scan: Path, model: str, folder: Path, options: list[str]) -> str:
    """One run in a process of its own: a line of what was promised and what was measured."""
    out = folder / "out.nii.gz"
    command = [
        sys.executable,
        "-m",
        "medseg",
        "infer",
        str(scan),
        "-o",
        str(out),
        "-m",
        model,
        "--quiet",
        *options,
    ]
    begun, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_memory_bytes(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - begun
    if process.returncode:
        return f"exit code {process.returncode} after {wall:.1f} s, {peak / 1e9:.2f} GB"
    record = json.loads((folder / "out.json").read_text())
    promised, held = record["forecast_memory_bytes"], record["peak_memory_bytes"]
    return (
        f"forecast {promised / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB"
        f" ({promised / peak - 1:+.0%}; by the program itself {held / 1e9:.2f}), {wall:.1f} s"
        f" {json.dumps(record['seconds'])}"
    )


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 600])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 118])
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--patch", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--max-memory", nargs="*", default=[])
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--model", default="brain")
    options = parser.parse_args()
    limits: list[list[str]] = [[], *(["--max-memory", size] for size in options.max_memory)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan, models = options.scan, {options.model: options.model}
        if scan is None:
            scan, models = folder / "scan.nii.gz", {}
            write(body(tuple(options.shape)), scan)
            for classes in options.classes:
                save_model(folder / str(classes), classes, options.features, options.patch)
                models[f"{classes} classes"] = str(folder / str(classes))
        for what, model in models.items():
            for limit in limits:
                print(
                    f"{what} {' '.join(limit)}: {measured(scan, model, folder, limit)}", flush=True
                )


if __name__ == "__main__":
    main()
