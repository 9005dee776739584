"""An image of SimpleITK in, an image of SimpleITK out."""

import sys
from pathlib import Path

import numpy as np
import SimpleITK

import medseg


def main(folder: Path) -> None:
    image = SimpleITK.ReadImage(str(folder / "scan.nii.gz"))
    labels = medseg.segment(image, folder / "model").to_sitk()

    expected = SimpleITK.ReadImage(str(folder / "expected.nii.gz"))
    assert np.array_equal(
        SimpleITK.GetArrayFromImage(labels), SimpleITK.GetArrayFromImage(expected)
    )
    assert np.allclose(labels.GetOrigin(), image.GetOrigin())
    assert np.allclose(labels.GetDirection(), image.GetDirection())
    assert np.allclose(labels.GetSpacing(), image.GetSpacing())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
