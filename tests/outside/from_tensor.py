"""A tensor of torch with its affine."""

import sys
from pathlib import Path

import numpy as np
import torch

import medseg


def main(folder: Path) -> None:
    scan = medseg.read(folder / "scan.nii.gz")
    tensor = torch.from_numpy(np.array(scan.data, dtype=np.float32))
    affine = torch.from_numpy(np.array(scan.affine))
    result = medseg.segment((tensor, affine), folder / "model")

    expected = medseg.read_labels(folder / "expected.nii.gz")
    assert np.array_equal(result.labels.data, expected.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
