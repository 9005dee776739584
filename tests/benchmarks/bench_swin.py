"""One window through a SwinUNETR of the size that bundles have (48 features, 96x96x96 voxels), by
MONAI and by medseg, each in a process of its own: seconds, memory over the start, and the share of
voxels with the same label.

python tests/benchmarks/bench_swin.py [--threads 2] [--size 96] [--features 48] [--repeat 3]

MONAI is its own network as `python -m monai.bundle run` calls it, in float32; medseg is what a
bundle's network is run as in the default precision, and with `--precision fp32`; it keeps freed
memory, as the command line does. Weights are random and the same. Both take turns, so that what
else the machine does hits them alike; the shortest time of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("monai", "medseg", "medseg fp32")
CLASSES = 14


def network_of(way: str, features: int) -> Any:
    """The network in evaluation mode."""
    import torch

    torch.manual_seed(0)
    if way == "monai":
        from monai.networks.nets import SwinUNETR

        return SwinUNETR(1, CLASSES, feature_size=features).eval()
    from medseg.inference.backends.accelerate import accelerate
    from medseg.inference.backends.blocks import form_of
    from medseg.networks.bundles import bundle_network

    arguments = {"feature_size": features}
    network = bundle_network(1, CLASSES, network="SwinUNETR", arguments=arguments)
    return network if way == "medseg fp32" else accelerate(network, form_of)


def child(options: argparse.Namespace) -> None:
    """One way: a window for each line that comes in; facts as a line of JSON."""
    if options.way != "monai":
        from medseg.machine import keep_memory

        keep_memory()  # before torch is loaded
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    network = network_of(options.way, options.features)
    patch = torch.randn(1, 1, *[options.size] * 3, generator=torch.Generator().manual_seed(1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            logits = network(patch)
            labels = logits.argmax(1)[0].numpy().astype(np.uint8)
        facts = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "gigabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6,
        }
        np.save(line.strip(), labels)
        print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--features", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        child(options)
        return
    import numpy as np

    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "NUMBA_NUM_THREADS": str(options.threads),
    }
    sizes = [f"--{name}={getattr(options, name)}" for name in ("threads", "size", "features")]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        children = {
            way: subprocess.Popen(
                [sys.executable, __file__, *sizes, "--way", way],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for way in WAYS
        }
        for _ in range(options.repeat + 1):  # the first of each does not count
            for way, process in children.items():
                assert process.stdin is not None and process.stdout is not None
                print(Path(folder) / f"{way}.npy", file=process.stdin, flush=True)
                found[way].append(json.loads(process.stdout.readline()))
        for process in children.values():
            process.communicate()
        labels = {way: np.load(Path(folder) / f"{way}.npy") for way in WAYS}
    first = min(row["seconds"] for row in found["monai"][1:])
    print(f"load of the machine: {os.getloadavg()[0]:.1f} over the last minute")
    print("| | seconds | times MONAI | CPU seconds | GB over the start | equal voxels |")
    print("|---|---|---|---|---|---|")
    for way, rows in found.items():
        seconds = min(row["seconds"] for row in rows[1:])
        cpu = min(row["cpu_seconds"] for row in rows[1:])
        equal = float((labels[way] == labels["monai"]).mean())
        print(
            f"| {way} | {seconds:.2f} | {first / seconds:.2f} | {cpu:.2f} |"
            f" {rows[-1]['gigabytes']:.2f} | {equal:.4%} |"
        )


if __name__ == "__main__":
    main()
