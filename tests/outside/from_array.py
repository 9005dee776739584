"""An array with its affine."""

import sys
from pathlib import Path

import numpy as np

import medseg


def main(folder: Path) -> None:
    scan = medseg.read(folder / "scan.nii.gz")
    array = np.asarray(scan.data)
    result = medseg.segment((array, scan.affine), folder / "model")

    expected = medseg.read_labels(folder / "expected.nii.gz")
    assert np.array_equal(result.labels.data, expected.data)
    # Turned round in memory, it is the same anatomy.
    turned = medseg.segment((array[::-1], scan.affine @ turn(array.shape[0])), folder / "model")
    assert np.array_equal(turned.labels.data[::-1], expected.data)


def turn(length: int) -> np.ndarray:
    """The affine of an array whose first axis runs the other way."""
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = length - 1
    return affine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
