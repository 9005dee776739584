"""The gradient of convolutions of each channel by itself, beside PyTorch's: one thread, least of
several runs, in turn.

python tests/benchmarks/bench_depthwise.py [--runs 12]
"""

from __future__ import annotations

import argparse
import time

import torch

from medseg.networks.layers import DepthwiseConv
from medseg.networks.ops import depthwise

#: Batch, channels, size, kernel, stride: `segformer`'s on a patch of 40x56x40, and `mednext`'s.
MAPS = (
    (2, 128, (20, 28, 20), 3, 1),
    (2, 256, (10, 14, 10), 3, 1),
    (2, 512, (5, 7, 5), 3, 1),
    (1, 16, (32, 48, 32), 3, 1),
    (1, 16, (32, 48, 32), 3, 2),
    (1, 32, (16, 24, 16), 3, 1),
    (1, 32, (32, 32, 32), 5, 1),
)


def main() -> None:
    """Measure and print a line a map."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"medseg": depthwise.can_learn, "PyTorch": lambda *asked: False}
    for batch, channels, size, kernel, stride in MAPS:
        conv = DepthwiseConv(channels, kernel, stride=stride)
        x = torch.randn(batch, channels, *size, requires_grad=True)
        seconds, gradients = dict.fromkeys(ways, float("inf")), {}
        for _ in range(options.runs):
            for way, depthwise.can_learn in ways.items():
                y = conv(x)
                began = time.perf_counter()
                gradients[way] = torch.autograd.grad(y.sum(), [x, conv.weight])
                seconds[way] = min(seconds[way], time.perf_counter() - began)
        differences = [
            float((ours - theirs).abs().max() / theirs.abs().max())
            for ours, theirs in zip(*gradients.values())
        ]
        ours, theirs = (1e3 * one for one in seconds.values())
        print(
            f"{batch} x {channels} x {size}, kernel {kernel}, stride {stride}: {ours:.1f} ms, "
            f"PyTorch {theirs:.1f} ms, {theirs / ours:.1f} times; apart by {max(differences):.1e}"
        )


if __name__ == "__main__":
    main()
