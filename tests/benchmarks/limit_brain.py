"""How well the labelled scan's brain mask can be told from the scan: trained on one half of it,
scored on the other.

python tests/benchmarks/limit_brain.py ../shared/data/brain_scans [--steps 300] [--model brain]

The model's network is trained on with the labels of the scan's left half, mirrored every second
time, and its brain mask is scored on the right half. The weights are thrown away. Labels that the
model does not know do not count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from score_brain import FLUID, brain, dice, test_scan
from torch import Tensor

from medseg.inference.preprocess import prepare
from medseg.machine import keep_memory
from medseg.models.folder import load_checkpoint
from medseg.volume import reorient

PATCH, RATE, MULTIPLE = (64, 96, 96), 5e-4, 16


def main() -> None:
    """Print the Dice of both halves every 100 steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="brain")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    keep_memory()
    scan, truth, _ = (
        part if isinstance(part, list) else reorient(part, "RAS")
        for part in test_scan(options.folder)
    )
    checkpoint = load_checkpoint(options.model)
    spec, values = (
        checkpoint.spec,
        [0, *(label.value for label in checkpoint.table.labels if label.value)],
    )
    image, _ = prepare([scan], spec.spacing, spec.grid, spec.intensities)
    fluid = values.index(FLUID)
    # What is no brain in the labels may be background or fluid: one class.
    index = np.zeros(256, np.int64)
    index[values] = np.arange(len(values))
    index[FLUID] = 0
    swapped = torch.arange(len(values))
    for left, right in checkpoint.table.mirror_pairs().items():
        swapped[index[left]] = index[right]
    padding = [part for size in image.shape[:0:-1] for part in (0, -size % MULTIPLE)]
    image, labels = F.pad(image, padding), F.pad(torch.from_numpy(index[truth.data]), padding)
    wanted = brain(truth.data)
    counts = F.pad(torch.from_numpy(~wanted | (index[truth.data] > 0)).float(), padding)
    middle = int(np.median(np.nonzero(wanted)[0]))  # the left half has the lower numbers
    network = checkpoint.network().float().eval()

    def score(step: int) -> None:
        with torch.no_grad():
            found = (
                network(image[None])[0]
                .argmax(0)
                .numpy()[tuple(slice(size) for size in wanted.shape)]
            )
        mask = (found > 0) & (found != fluid)
        seen, other = (
            dice(mask[part], wanted[part]) for part in (slice(middle), slice(middle + 2, None))
        )
        print(
            f"{step} steps: brain mask {seen:.4f} in the half trained on, {other:.4f} in the other",
            flush=True,
        )

    score(0)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1.0, (step + 1) / 20) * (1 - step / options.steps) ** 0.9
        )
        start = [
            int(rng.integers(0, end))
            for end in (middle - 32, *(labels.shape[n] - PATCH[n] + 1 for n in (1, 2)))
        ]
        window = tuple(slice(low, low + size) for low, size in zip(start, PATCH))
        here, wanted_here = image[:, *window], labels[window]
        on_left = torch.arange(start[0], start[0] + PATCH[0]) < middle - 1
        known = counts[window] * on_left[:, None, None]
        here = (here * rng.uniform(0.9, 1.1) + rng.uniform(-0.05, 0.05)).clamp(
            min=0
        ) ** rng.uniform(0.86, 1.16)
        if rng.random() < 0.5:
            here, wanted_here, known = here.flip(1), swapped[wanted_here.flip(0)], known.flip(0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(here[None].to(memory_format=torch.channels_last_3d))
        optimizer.zero_grad()
        _loss(logits.float(), wanted_here[None], known, fluid).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            score(step + 1)


def _loss(logits: Tensor, labels: Tensor, known: Tensor, fluid: int) -> Tensor:
    """Cross-entropy of the classes and Dice of the brain, where labels are known; fluid counts as
    background.
    """
    nothing = torch.logsumexp(logits[:, [0, fluid]], 1, keepdim=True)
    others = [n for n in range(1, logits.shape[1]) if n != fluid]
    logits = torch.cat([nothing, logits[:, others]], 1)
    place = torch.zeros(max(others) + 1, dtype=torch.long)
    place[others] = torch.arange(1, len(others) + 1)
    entropy = F.cross_entropy(logits, place[labels], reduction="none")[0]
    brain_there, brain_found = (
        (labels[0] > 0).float() * known,
        (1 - logits.softmax(1)[0, 0]) * known,
    )
    overlap = 2 * (brain_found * brain_there).sum() / (brain_found.sum() + brain_there.sum() + 1)
    return (entropy * known).sum() / known.sum() + 1 - overlap


if __name__ == "__main__":
    main()
