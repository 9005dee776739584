"""The brain mask of a model beside that of deepbet (Fisch et al. 2024), an independent trained
network, on given scans.

python tests/benchmarks/bench_deepbet.py SCAN [SCAN ...] [--model brain]

deepbet was trained on whole heads in T1 and carries its weights (pip install deepbet; MIT). Printed
is the Dice of its brain mask and intracranial mask (`--also brain-mask,intracranial-mask`): tools
differ in whether fluid belongs to it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from score_brain import dice

from medseg.inference.segmentation import segment
from medseg.inference.settings import Settings
from medseg.io import read, read_labels, write
from medseg.models.folder import load_checkpoint
from medseg.postprocess.anatomy import brain_mask


def main() -> None:
    """Print a line for each scan."""
    from deepbet import run_bet

    parser = argparse.ArgumentParser()
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--model", default="brain")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.model)
    print(
        "| scan | mL of deepbet | mL of brain | Dice of brain mask | Dice of intracranial mask"
        " |\n|---|---|---|---|---|"
    )
    for path in options.scans:
        scan = read(path)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "scan.nii.gz", Path(folder) / "mask.nii.gz"
            write(scan, source)
            run_bet([str(source)], mask_paths=[str(target)], no_gpu=True)
            theirs = read_labels(target).data > 0
        labels = segment(scan, checkpoint, Settings()).labels
        ours = brain_mask(labels, checkpoint.spec.brain).data > 0
        ml = float(np.prod(scan.spacing_mm)) / 1000
        wide = brain_mask(labels, checkpoint.spec.brain, with_fluid=True).data > 0
        print(
            f"| {path.name} | {theirs.sum() * ml:.0f} | {ours.sum() * ml:.0f} "
            f"| {dice(ours, theirs):.3f} | {dice(wide, theirs):.3f} |"
        )


if __name__ == "__main__":
    main()
