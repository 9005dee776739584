"""Score the brain model on the labelled scan, and on the same scan stored in other ways.

python tests/benchmarks/score_brain.py ../shared/data/brain_scans [--model brain] [--orientations]
[--scans FOLDER]

The scan (voxelmorph's test_scan.npz, a skull-stripped T1 with FreeSurfer labels, 1 mm) is stored in
(L, I, A) order and has no affine; it gets one centred on the middle. Its choroid plexus (31, 63)
counts as lateral ventricle, as in the label maps the model was trained on. The mean is over every
other label of labels.npz that it evaluates, with label 24 (FreeSurfer's few central voxels of CSF;
this model's 24 is all fluid around the brain) given apart. Beside each Dice stands the confidence
that the record holds: how probable the model found the structure where it chose it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.stats import spearmanr

from medseg.inference.segmentation import segment
from medseg.inference.settings import Settings
from medseg.io import read, read_labels, write
from medseg.models.folder import load_checkpoint
from medseg.volume import ORIENTATIONS, Volume, reorient, resample

FLUID = 24


def test_scan(folder: Path) -> tuple[Volume, Volume, list[int]]:
    """The scan, its labels with choroid plexus merged, and the values evaluated."""
    with np.load(folder / "test_scan.npz") as content:
        image, labels = content["vol"].astype(np.float32), content["seg"].astype(np.uint8)
    with np.load(folder / "labels.npz") as content:
        values = [int(value) for value in content["labels"]]
    affine = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(image.shape) - 1) / 2)
    for plexus, ventricle in ((31, 4), (63, 43)):
        labels[labels == plexus] = ventricle
    return (
        Volume(image * 1000, affine),
        Volume(labels, affine),
        [v for v in values if v not in (31, 63)],
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Twice the overlap over the sum of sizes."""
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def brain(labels: np.ndarray) -> np.ndarray:
    """The brain with its ventricles, without the fluid around it."""
    return (labels > 0) & (labels != FLUID)


def close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Morphological closing of a boolean array by a ball of `radius` voxels."""
    wide = distance_transform_edt(~np.pad(mask, int(radius) + 2)) <= radius
    inner = (slice(int(radius) + 2, -int(radius) - 2),) * mask.ndim
    closed: np.ndarray = distance_transform_edt(wide)[inner] > radius
    return closed


def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="brain")
    parser.add_argument(
        "--orientations", action="store_true", help="also all 48 storage orders and an oblique grid"
    )
    options = parser.parse_args()
    scan, truth, values = test_scan(options.folder)

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "test_scan.nii.gz", Path(folder) / "found.nii.gz"
        write(scan, path)
        command = [
            sys.executable,
            "-m",
            "medseg",
            "infer",
            str(path),
            "-o",
            str(out),
            "-m",
            options.model,
            "--quiet",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found, loaded = read_labels(out), read(path)
        record = json.loads((Path(folder) / "found.json").read_text())
    sure = {row["value"]: row.get("confidence", float("nan")) for row in record["structures"]}
    scores = {value: dice(found.data == value, truth.data == value) for value in values}
    for value, score in scores.items():
        name = load_checkpoint(options.model).table.names[value]
        print(f"{value:>4} {name:<34} {score:.3f}   confidence {sure.get(value, float('nan')):.3f}")
    without = [score for value, score in scores.items() if value != FLUID]
    everything = np.mean(list(scores.values()))
    print(
        f"mean Dice of {len(without)} structures: {np.mean(without):.3f}; with label 24:"
        f" {everything:.3f}"
    )
    both = [
        (score, sure[value]) for value, score in scores.items() if value != FLUID and value in sure
    ]
    print(f"rank correlation of confidence and Dice: {spearmanr(*zip(*both)).statistic:.2f}")
    print(f"brain mask Dice: {dice(brain(found.data), truth.data > 0):.3f}")
    for radius in (2, 3, 5):
        closed = dice(close(brain(found.data), radius), close(truth.data > 0, radius))
        print(f"with folds closed by a ball of {radius} voxels in both: {closed:.3f}")
    print(
        "affine and shape equal the input's:"
        f" {found.shape == loaded.shape and (found.affine == loaded.affine).all()}"
    )
    if options.orientations:
        stored(scan, found, options.model)


def stored(scan: Volume, found: Volume, model: str) -> None:
    """The same scan in every storage order and on an oblique grid, each result mapped back and
    compared.
    """
    checkpoint, first = load_checkpoint(model), brain(found.data)
    worst = 1.0
    for orientation in ORIENTATIONS:
        result = segment(reorient(scan, orientation), checkpoint, Settings())
        back = reorient(result.labels, scan.orientation)
        worst = min(worst, dice(brain(back.data), first))
    print(f"48 storage orders: lowest Dice of the brain mask with the first: {worst:.4f}")
    for degrees in (10, 25, 45):
        grid = oblique(scan, degrees)
        result = segment(grid, checkpoint, Settings())
        back = resample(result.labels, scan.affine, scan.shape, order=0)
        print(f"oblique by {degrees} degrees about each axis: {dice(brain(back.data), first):.4f}")


def oblique(scan: Volume, degrees: float) -> Volume:
    """The scan interpolated on a 1 mm grid turned about all three axes, large enough to hold it."""
    turn = np.eye(3)
    for axis in range(3):
        a, b = [n for n in range(3) if n != axis]
        angle, one = np.deg2rad(degrees), np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    shape = (256, 256, 256)
    affine = np.eye(4)
    affine[:3, :3] = turn
    affine[:3, 3] = -turn @ ((np.array(shape) - 1) / 2)
    return resample(scan, affine, shape, order=1)


if __name__ == "__main__":
    main()
