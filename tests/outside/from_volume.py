"""A volume that is in memory, a model in a folder, and settings by name."""

import sys
from pathlib import Path

import medseg


def main(folder: Path) -> None:
    scan: medseg.Volume = medseg.read(folder / "scan.nii.gz")
    result: medseg.Segmentation = medseg.segment(
        scan, folder / "model", device="cpu", roi=["left body"], uncertainty=True
    )
    assert result.labels.shape == scan.shape
    assert set(result.labels.data.ravel().tolist()) == {0, 2}
    assert 0 <= result.maps["uncertainty"].data.min() <= result.maps["uncertainty"].data.max() <= 1
    scores = medseg.evaluate(folder / "expected.nii.gz", result, labels={"left": [2]})
    assert scores.rows[0]["dice"] == 1.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
