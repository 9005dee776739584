"""What a run costs beside its network, and the first run of an installation against the second.

python tests/benchmarks/bench_start.py [--model brain-fast] [--runs 3] [--scan FILE]

The package is copied to an empty folder, without compiled code and then with what an installation
compiles ahead (`python -m medseg.kernels.build`); the home is an empty folder,
too. Printed are CPU seconds (user and system) of `medseg infer` as a process: first run, second
run, their ratio; then of parts of a start, each in a process of its own; and what the record says
of the network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_volumes" / "head_t1.nii.gz"
#: Parts of a start: what each of these loads.
PARTS = {
    "python": "pass",
    "numpy": "import numpy",
    "torch": "import torch",
    "medseg's inference": "import medseg.inference.segmentation",
    "kernels of painting": "import medseg.kernels.painting",
}


def cpu_seconds(command: list[str], environment: dict[str, str], place: Path) -> float:
    """User and system seconds of a process and those that it started. place: the folder it runs in,
    where no other medseg lies that Python would import.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each installation, then the parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="brain-fast")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scan", type=Path, default=SAMPLE)
    options = parser.parse_args()
    print("load before:", Path("/proc/loadavg").read_text().strip(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for ahead in (False, True):
            root = place / ("ahead" if ahead else "plain")
            home = place / f"home of {root.name}"
            home.mkdir()
            shutil.copytree(
                ROOT / "medseg",
                root / "medseg",
                ignore=shutil.ignore_patterns("__pycache__", "ahead"),
            )
            environment = os.environ | {"PYTHONPATH": str(root), "HOME": str(home)}
            # An installation has Python's own compiled code, whatever this machine is told.
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            build = [sys.executable, "-m", "medseg.kernels.build"]
            if ahead:
                print(f"compiling ahead: {cpu_seconds(build, environment, place):.1f} s of CPU")
            out = place / f"{root.name}.nii.gz"
            infer = [
                sys.executable,
                "-m",
                "medseg",
                "infer",
                str(options.scan.resolve()),
                "--quiet",
            ]
            infer += ["-m", options.model, "-o", str(out)]
            first = cpu_seconds(infer, environment, place)
            later = [cpu_seconds(infer, environment, place) for _ in range(options.runs)]
            second = statistics.median(later)
            print(f"{root.name:6} first {first:.1f} s, then {second:.1f}: {first / second:.2f}")
        seconds = json.loads((place / "ahead.json").read_text())["seconds"]
        print("the record:", {key: round(value, 2) for key, value in seconds.items()})
        for part, code in PARTS.items():
            command = [sys.executable, "-c", code]
            used = statistics.median(
                cpu_seconds(command, environment, place) for _ in range(options.runs)
            )
            print(f"{part:20} {used:.2f} s")
    print("load after:", Path("/proc/loadavg").read_text().strip())


if __name__ == "__main__":
    main()
