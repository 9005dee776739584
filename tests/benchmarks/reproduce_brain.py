"""Repeat the first steps of a stage of the brain model's training, beside what its log says.

python tests/benchmarks/reproduce_brain.py 5 FOLDER_OF_LABEL_MAPS --start MODEL [--steps 60]

MODEL is what the stage began from. Stage 5 began from the model of commit 66a7a01, files of which
`git show 66a7a01:medseg/bundled/brain/model.json` and the like bring back.
Losses agree up to the rounding of bfloat16, which depends on threads and processor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TRAINING = Path(__file__).parents[2] / "medseg" / "bundled" / "brain" / "training"


def losses(path: Path, steps: int) -> dict[int, float]:
    """Mean loss up to each step that a log names."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] <= steps}


def main() -> None:
    """Print a line for every 20 steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", type=int)
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    changes = {
        "data": options.data.absolute(),
        "labels": TRAINING.parent / "labels.csv",
        "start_from": options.start.absolute(),
        "train.time_s": "null",
        "train.steps": options.steps,
        "train.decay": 1,  # the rate fell later
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "medseg",
            "train",
            str(TRAINING / f"stage{options.stage}.yaml"),
            "-o",
            folder,
        ]
        for key, value in changes.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run([*command, "--quiet"], check=True)
        found = losses(Path(folder) / "metrics.jsonl", options.steps)
    logged = losses(TRAINING / f"stage{options.stage}.jsonl", options.steps)
    for step, loss in found.items():
        print(f"step {step}: loss {loss:.4f}, in the log {logged[step]:.4f}")


if __name__ == "__main__":
    main()
