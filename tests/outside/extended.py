"""A package of its own adds a format, a network and a model (see `extension/`)."""

import sys
from pathlib import Path

import numpy as np

import medseg


def main(folder: Path) -> None:
    scan = medseg.read(folder / "scan.nii.gz")
    medseg.write(scan, folder / "scan.plain")
    again = medseg.read(folder / "scan.plain")
    assert np.array_equal(again.data, scan.data)
    assert np.allclose(again.affine, scan.affine)

    (folder / "short.plain").write_bytes(b"{")
    try:
        medseg.read(folder / "short.plain")
    except medseg.MedsegError as error:
        assert "short.plain: the reader of medseg-plain stopped with" in str(error)
    else:
        raise AssertionError("a damaged file was read")

    result = medseg.segment(folder / "scan.plain", "plain-model")
    assert result.plan.model == "brightness"
    assert set(np.unique(result.labels.data)) == {0, 2, 41}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
