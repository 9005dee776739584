"""Raw and compressed stores of prepared scans: bytes, time of preparing, and of a batch from each.

python tests/benchmarks/bench_prepared.py DATASET [--patch 64 64 64] [--steps 40] [--threads 2]
                                          [--set KEY=VALUE]
python tests/benchmarks/bench_prepared.py --head 256 256 200    # three made-up scans of this size

Batches of both are compared to the bit. CPU seconds are of the process, medians over the steps
after three that do not count, the two stores in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--head", type=int, nargs=3)
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", dest="changes", action="append", default=[])
    options = parser.parse_args()
    import torch

    from medseg.cli.options import parse_changes

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = options.dataset or made_up(Path(folder) / "data", tuple(options.head))
        sources = {}
        for arrays in ("npy", "zarr"):
            store = Path(folder) / arrays
            sources[arrays] = prepared(data, store, arrays, parse_changes(options.changes), options)
        compare(sources, options.steps)


def made_up(folder: Path, shape: tuple[int, int, int]) -> Path:
    """A data set of three scans: blobs of several sizes in noise, in whole numbers as scanners
    give them.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from making import phantoms

    def rounded(number: int, image: Any, labels: Any) -> tuple[Any, Any]:
        return image.round().astype("int16"), labels

    return phantoms.dataset(folder, 3, shape=shape, change=rounded)


def prepared(
    data: Path, store: Path, arrays: str, changes: dict[str, Any], options: argparse.Namespace
) -> Any:
    """The source of a store that is made now."""
    from medseg.config import make_config
    from medseg.dataset.reading import read_dataset
    from medseg.training.prepared.job import prepare_dataset
    from medseg.training.prepared.reading import open_prepared
    from medseg.training.request import Request
    from medseg.training.scans import ScanSource

    start = time.process_time()
    prepare_dataset(Request(data=data, overrides=changes), store, arrays=arrays)
    seconds = time.process_time() - start
    files = [path for path in store.rglob("*") if path.is_file()]
    notes = ("check.json", "portrait.json", "record.json", "plan.json", "store.json")
    size = sum(path.stat().st_size for path in files if path.name not in notes)
    print(f"{arrays}: {size / 1e6:.1f} MB of arrays, {len(files)} files, {seconds:.1f} s of CPU")
    scans, dataset = open_prepared(store), read_dataset(data)
    model = {key.removeprefix("model."): one for key, one in scans.settings.items()}
    model |= {"name": "unet", "options": {"features": [4, 8]}, "patch": list(options.patch)}
    content = {"name": "x", "data": str(data), "model": model, "train": {"steps": 1}}
    content["augment"] = {"rotation_share": 0.5, "scaling_share": 0.5}
    names = [case.name for case in dataset.cases]
    return ScanSource(make_config(content, "it"), dataset, names, [], store, prepared=scans)


def compare(sources: dict[str, Any], steps: int) -> None:
    """Print how long a batch of two takes from each."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in sources}
    for step in range(steps + 3):
        batches = []
        for name, source in sources.items():
            start = time.process_time()
            seeds, samples = [2 * step, 2 * step + 1], range(2 * step, 2 * step + 2)
            batches.append(source.batch(step, seeds, samples, torch.device("cpu")))
            taken[name].append(time.process_time() - start)
        assert torch.equal(batches[0].images, batches[1].images)
        assert torch.equal(batches[0].labels, batches[1].labels)
    for name, seconds in taken.items():
        print(f"{name}: a batch of 2 takes {1000 * statistics.median(seconds[3:]):.0f} ms of CPU")


if __name__ == "__main__":
    main()
