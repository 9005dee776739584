"""An image of nibabel in, an image of nibabel out."""

import sys
from pathlib import Path

import nibabel
import numpy as np

import medseg


def main(folder: Path) -> None:
    image = nibabel.load(folder / "scan.nii.gz")
    assert isinstance(image, nibabel.Nifti1Image)
    labels = medseg.segment(image, folder / "model").to_nibabel()

    expected = nibabel.load(folder / "expected.nii.gz")
    assert isinstance(expected, nibabel.Nifti1Image)
    assert np.array_equal(np.asarray(labels.dataobj), np.asarray(expected.dataobj))
    assert labels.affine is not None and image.affine is not None
    assert np.allclose(labels.affine, image.affine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
