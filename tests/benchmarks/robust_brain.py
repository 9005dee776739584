"""The brain model on one labelled scan as other scanners, protocols and accidents would have made
it: one table.

python tests/benchmarks/robust_brain.py ../shared/data [--model brain]

DATA/brain_scans holds the labelled scan of `score_brain.py`, DATA/brain_label_maps the head that
lends its skull. Every row is a version of the scan; its labels are brought back to the scan's grid
and scored there: mean Dice over the structures evaluated, without FreeSurfer's few voxels of label
24, and Dice of the brain mask. Random versions have fixed seeds. Where cut off, a structure is
scored in what is left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from score_brain import FLUID, brain, dice, oblique, test_scan

from medseg.inference.segmentation import segment
from medseg.inference.settings import Settings
from medseg.io import read_labels
from medseg.models.folder import load_checkpoint
from medseg.volume import Volume, reorient, resample

#: T1-like intensities of what lies outside the brain in the label maps, as shares of the scan's
#: 99th percentile.
_OUTSIDE = {
    24: 0.2,
    502: 0.3,
    506: 0.5,
    507: 0.4,
    508: 0.3,
    509: 0.5,
    511: 0.85,
    512: 0.8,
    514: 0.2,
    515: 0.1,
    516: 0.65,
}


def versions(
    scan: Volume, truth: Volume, heads: Path
) -> Iterator[tuple[str, Volume, np.ndarray | None]]:
    """(name, the scan's version, where it can be scored or None for everywhere)."""
    data, inside = scan.data, scan.data > 0
    top = float(np.percentile(data[inside], 99.5))
    share = np.clip(data / top, 0, 1)
    yield "as it is", scan, None
    yield "inverted", scan.with_data(np.where(inside, 1.05 - share, 0).astype(np.float32)), None
    for seed in range(3):
        random = np.random.default_rng(seed)
        curve = np.interp(share, np.linspace(0, 1, 6), random.uniform(0.05, 1, 6))
        yield (
            f"random contrast {seed + 1}",
            scan.with_data(np.where(inside, curve, 0).astype(np.float32)),
            None,
        )
    for axis, name in enumerate("RAS"):
        yield f"slices of 5 mm along {name}", thick(scan, axis), None
    yield "with a skull", with_skull(scan, truth, heads), None
    ras = reorient(scan, "RAS")
    filled = np.nonzero((ras.data > 0).any(axis=(0, 1)))[0]
    kept = int(filled[0] + 0.8 * (filled[-1] + 1 - filled[0]))
    where = np.zeros(ras.shape, bool)
    where[:, :, :kept] = True
    yield (
        "without its upper fifth",
        Volume(ras.data[:, :, :kept].copy(), ras.affine),
        reorient(Volume(where.astype(np.uint8), ras.affine), scan.orientation).data > 0,
    )
    yield "turned by 20 degrees", oblique(scan, 20), None
    yield "strong bias", scan.with_data((data * bias(scan)).astype(np.float32)), None


def thick(scan: Volume, axis: int) -> Volume:
    """Slices of 5 mm along an axis of RAS, each the mean of five."""
    ras = reorient(scan, "RAS")
    count = ras.shape[axis] // 5
    cut = np.moveaxis(ras.data, axis, 0)[: 5 * count]
    mean = np.moveaxis(cut.reshape(count, 5, *cut.shape[1:]).mean(1), 0, axis)
    affine = ras.affine.copy()
    affine[:3, axis] *= 5
    affine[:3, 3] += 2 * ras.affine[:3, axis]
    return Volume(np.ascontiguousarray(mean, np.float32), affine)


def with_skull(scan: Volume, truth: Volume, heads: Path) -> Volume:
    """The scan inside the skull, skin and fluid of a label map that is stretched to its brain, with
    noise.
    """
    head = reorient(read_labels(sorted(heads.glob("training_seg_*.nii.gz"))[-1]), "RAS")
    mine = reorient(truth, "RAS")
    boxes = []
    for volume, mask in (
        (mine, mine.data > 0),
        (head, (head.data > 0) & (head.data < 500) & (head.data != FLUID)),
    ):
        ends = [np.nonzero(mask.any(axis=tuple({0, 1, 2} - {a})))[0][[0, -1]] for a in range(3)]
        corners = np.array(ends).T @ np.diag(np.diag(volume.affine)[:3]) + volume.affine[:3, 3]
        boxes.append(corners)
    scale = (boxes[0][1] - boxes[0][0]) / (boxes[1][1] - boxes[1][0])
    affine = np.diag([*(np.diag(head.affine)[:3] * scale), 1.0])
    affine[:3, 3] = boxes[0][0] - scale * (boxes[1][0] - head.affine[:3, 3])
    image = reorient(scan, "RAS")
    margin = 24
    grid = image.affine.copy()
    grid[:3, 3] -= margin * image.affine[:3, :3].sum(1)
    shape = tuple(n + 2 * margin for n in image.shape)
    around = resample(Volume(head.data, affine), grid, shape, order=0).data
    top, random = float(np.percentile(scan.data[scan.data > 0], 99)), np.random.default_rng(0)
    out = np.zeros(shape, np.float32)
    for value, mean in _OUTSIDE.items():
        out[around == value] = mean
    out[(around > 0) & (around < 500) & (around != FLUID)] = _OUTSIDE[FLUID]  # the other brain
    out = top * np.clip(out + random.normal(0, 0.03, shape) * (out > 0), 0, None)
    middle = tuple(slice(margin, margin + n) for n in image.shape)
    out[middle] = np.where(image.data > 0, image.data, out[middle])
    return Volume(out.astype(np.float32), grid)


def bias(scan: Volume) -> np.ndarray:
    """A smooth field from about 0.4 to 2.5."""
    from scipy import ndimage

    coarse = np.random.default_rng(1).uniform(-0.9, 0.9, (4, 4, 4))
    field = ndimage.zoom(
        coarse, [n / 4 for n in scan.shape], order=3, mode="nearest", grid_mode=True
    )
    return np.exp(np.clip(field, -0.9, 0.9))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="brain")
    options = parser.parse_args()
    scan, truth, values = test_scan(options.data / "brain_scans")
    checkpoint = load_checkpoint(options.model)
    print("| version | mean Dice | brain mask | s |\n|---|---|---|---|")
    for name, version, where in versions(scan, truth, options.data / "brain_label_maps"):
        begun = time.perf_counter()
        found = segment(version, checkpoint, Settings()).labels
        seconds = time.perf_counter() - begun
        back = resample(found, scan.affine, scan.shape, order=0).data
        there = truth.data
        if where is not None:
            back, there = np.where(where, back, 0), np.where(where, there, 0)
        scores = [dice(back == v, there == v) for v in values if v != FLUID and (there == v).any()]
        print(
            f"| {name} | {np.mean(scores):.3f} | {dice(brain(back), there > 0):.3f} |"
            f" {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
