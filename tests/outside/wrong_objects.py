"""What is no scan, no model or no setting is named by what it is."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import medseg


def refused(scan: Any, model: Any = "otsu", **settings: Any) -> str:
    """What medseg says of a call that makes no sense."""
    try:
        medseg.segment(scan, model, **settings)
    except (medseg.MedsegError, TypeError) as error:
        return str(error)
    raise AssertionError(f"{scan!r} was accepted")


def main(folder: Path) -> None:
    scan = medseg.read(folder / "scan.nii.gz")
    assert "'otsu' is a text that names no file" in refused("otsu")
    assert "takes 1 scan, and a list of 38 paths is given" in refused([folder / "a.nii"] * 38)
    assert "this is an array of shape (3, 4, 5), which does not say where" in refused(
        np.zeros((3, 4, 5))
    )
    assert "this is nothing (None)" in refused(None)
    assert "7 is a number" in refused(7)
    assert "this is a volume" in refused("brain", scan)
    assert "there is no device 'gpu'" in refused(scan, device="gpu")
    assert "did you mean device?" in refused(scan, devise="cpu")
    assert "this is a text" in refused(scan, settings="fast")
    assert "overlap is a share" in refused(scan, overlap=2.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
