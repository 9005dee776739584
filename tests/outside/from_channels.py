"""A list of channels, in any of these forms, for a model that takes several."""

import sys
from pathlib import Path

import nibabel
import numpy as np

import medseg


def main(folder: Path) -> None:
    model = medseg.load(folder / "two_channels")
    assert model.channels == ("T1", "FLAIR")
    t1, flair = folder / "scan.nii.gz", folder / "flair.nii.gz"

    from_files = model([t1, flair])
    image = nibabel.load(flair)
    assert isinstance(image, nibabel.Nifti1Image)
    mixed = model([medseg.read(t1), image])
    assert np.array_equal(from_files.labels.data, mixed.labels.data)
    swapped = model([flair, t1])
    assert not np.array_equal(from_files.labels.data, swapped.labels.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
