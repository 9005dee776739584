"""What a training step is made of: drawing and augmenting the batch, forward and loss, backward,
optimizer.

python tests/benchmarks/bench_train.py DATASET [--time 10m] [--steps 30] [--threads 2] [--augment
all]

The plan is the one `medseg train DATASET --time ...` makes. Medians over the steps after three that
do not count. `--augment all` does everything to every patch but bending it, instead of what the
plan says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--time", default="10m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--augment", choices=("plan", "all"), default="plan")
    options = parser.parse_args()
    from medseg.cli.options import parse_seconds
    from medseg.machine import keep_memory

    keep_memory()
    import torch

    from medseg.config import make_config, override
    from medseg.dataset.check.cases import check_dataset
    from medseg.dataset.reading import read_dataset
    from medseg.dataset.splits import split_cases
    from medseg.machine import free_bytes
    from medseg.networks.zoo import build_network
    from medseg.training.capacity import Machine
    from medseg.training.losses import segmentation_loss
    from medseg.training.plan import as_settings, fingerprint, make_plan
    from medseg.training.precision import choose_training_precision, is_channels_last
    from medseg.training.scans import ScanSource
    from medseg.training.step import make_optimizer

    torch.set_num_threads(options.threads)
    data = read_dataset(options.dataset)
    training, _ = split_cases(data)[0]
    found = fingerprint(check_dataset(data), training)
    fixed = {"train.time_s": parse_seconds(options.time)}
    if options.augment == "all":
        shares = (
            "rotation",
            "scaling",
            "noise",
            "blur",
            "brightness",
            "contrast",
            "low_resolution",
            "gamma",
        )
        fixed |= {f"augment.{name}_share": 1.0 for name in shares}
    chosen = (
        as_settings(
            make_plan(data, found, Machine(device="cpu", memory_bytes=free_bytes()), "unet", fixed)
        )
        | fixed
    )
    config = make_config(override({"name": "bench", "data": str(options.dataset)}, chosen), "plan")
    device = torch.device("cpu")
    network = build_network(
        config.model.name, len(data.channels), len(data.table.labels) + 1, **config.model.options
    )
    network.train()
    optimizer = make_optimizer(config.train, network)
    parts: dict[str, list[float]] = {
        "batch": [],
        "forward and loss": [],
        "backward": [],
        "optimizer": [],
    }
    with tempfile.TemporaryDirectory() as store:
        source = ScanSource(config, data, training, [], Path(store))
        precision = choose_training_precision(config, device)
        last = is_channels_last(network, precision, device)
        for step in range(options.steps + 3):
            first = step * config.train.batch
            samples = range(first, first + config.train.batch)
            marks = [time.perf_counter()]
            images, labels, _ = source.batch(step, list(samples), samples, device)
            images = images.to(memory_format=torch.channels_last_3d) if last else images
            marks.append(time.perf_counter())
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs = network(images)
            loss = segmentation_loss(outputs, labels)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            if step >= 3:
                for part, a, b in zip(parts.values(), marks, marks[1:]):
                    part.append(b - a)
    seconds = {name: statistics.median(values) for name, values in parts.items()}
    total = sum(seconds.values())
    shown = "x".join(map(str, config.model.patch))
    print(
        f"batch of {config.train.batch} x {shown}, {precision}, {options.threads} threads:"
        f" {total * 1000:.0f} ms a step"
    )
    for name, value in seconds.items():
        print(f"  {name:18s} {value * 1000:7.1f} ms  {value / total:6.1%}")


if __name__ == "__main__":
    main()
