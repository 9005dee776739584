"""A thread pool over several scans with one model."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import medseg


def main(folder: Path) -> None:
    model = medseg.load(folder / "model", device="cpu")
    scan = medseg.read(folder / "scan.nii.gz")
    scans = [scan.with_data(np.roll(scan.data, shift, axis=1)) for shift in range(4)]

    alone = [model(one).labels.data for one in scans]
    with ThreadPoolExecutor(4) as pool:
        together = [result.labels.data for result in pool.map(model, scans)]
    assert all(np.array_equal(one, other) for one, other in zip(alone, together))
    assert not np.array_equal(alone[0], alone[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
