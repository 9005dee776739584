"""What `infer` without -m chooses, and what `-m brain` refuses, for scans of many kinds: one table.

    python tests/benchmarks/what_is_it.py ../shared/data

Heads are those of `robust_brain.py` and three of other contrasts, each also with its axes exchanged
and turned while the header stays as it was; others are CT, PET and MR of limbs, pieces of heads,
phantoms and noise. `right` says what may be chosen; 'unknown' may be said of everything but CT that
lies in Hounsfield units with air around it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import robust_brain
from score_brain import test_scan

from making.ct import grid, legs, trunk
from medseg.errors import BadConfig, BadFile
from medseg.inference.backends.kept import models_kept_open
from medseg.inference.jobs import Extras, Job
from medseg.inference.look import choose, look, refusal
from medseg.inference.settings import Settings
from medseg.inference.untrained import AUTO
from medseg.io import read
from medseg.models import load_models
from medseg.volume import Volume, reorient

#: How axes are exchanged, and which are turned round.
_TURNS = (((1, 0, 2), ()), ((2, 1, 0), (0,)), ((0, 1, 2), (2,)), ((0, 2, 1), (1,)))


def turned(scan: Volume) -> Iterator[Volume]:
    """The scan with another order of voxels than its header says."""
    ras = reorient(scan)
    for order, flipped in _TURNS:
        data = np.flip(ras.data.transpose(order), flipped)
        yield Volume(np.ascontiguousarray(data), np.diag([*ras.spacing_mm, 1.0]))


def heads(data: Path) -> Iterator[tuple[str, Volume]]:
    """Heads that `brain` segments today, and such with headers that are wrong."""
    scan, truth, _ = test_scan(data / "brain_scans")
    for name, version, _ in robust_brain.versions(scan, truth, data / "brain_label_maps"):
        yield name, version
    for name in ("MR_Gd", "chris_PD", "FLAIR"):
        yield name, read(data / "brain_scans" / f"{name}.nii.gz")
    for number, one in enumerate(turned(scan)):
        yield f"turned wrongly {number + 1}", one


def phantoms() -> Iterator[tuple[str, Volume, str]]:
    """Bodies, simple shapes and noise."""
    random = np.random.default_rng(0)
    affine, shape = grid(low_mm=(-190, -150, -100), high_mm=(190, 150, 100), spacing_mm=(3, 3, 3))
    for name, body in (
        ("trunk", trunk(affine, shape, noise=10)),
        ("legs", legs(affine, shape, noise=10)),
    ):
        yield f"CT of {name}", body.scan, "CT"
        mr = np.array([0, 40, 40, 10, 30, 900, 900, 800, 400, 450, 10], np.float32)[body.truth]
        mr += np.abs(random.normal(0, 20, shape)).astype(np.float32)
        yield f"MR of {name}", body.scan.with_data(mr), "unknown"
        yield f"CT of {name} + 1024", body.scan.with_data(body.scan.data + 1024), "unknown"
    at = np.indices((100, 100, 100)) - 50
    plain = np.diag([2.0, 2.0, 2.0, 1.0])
    for name, inside in (
        ("ball", (at**2).sum(0) < 1600),
        ("cylinder", (at[:2] ** 2).sum(0) < 1600),
    ):
        data = 100 * inside + random.normal(0, 3, inside.shape)
        yield name, Volume(data.astype(np.float32), plain), "unknown"
    noise = random.normal(100, 20, (100, 100, 100)).astype(np.float32)
    yield "noise", Volume(noise, plain), "unknown"
    yield "noise around 0", Volume(noise * 5 - 500, plain), "unknown"


def others(data: Path) -> Iterator[tuple[str, Path, str]]:
    """Scans at hand that are no whole heads."""
    for patient in ("STS_002", "STS_012"):
        for kind, right in (("CT", "CT"), ("MR_T1", "unknown"), ("PET", "unknown")):
            folder = data / "rtstruct" / patient
            yield f"{patient} {kind}, DICOM", folder / "dicom" / kind / "image", right
            yield f"{patient} {kind}, NIfTI", folder / "nifti" / f"{kind}_image.nii.gz", right
    yield "CT, three slices", data / "dicom_seg" / "ct-3slice", "CT"
    for path in sorted((data / "interop_monai" / "scans_ct").glob("*")):
        yield path.name, path, "CT"
    for path in sorted((data / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:3]:
        yield path.name, path, "unknown"
    for maker in ("hitachi", "hyperfine", "siemens_multiframe", "generic"):
        yield f"{maker}, a few slices", data / "dicom" / maker / "anatomical" / "001", "head"


def main() -> None:
    """Print the table, and how many are right, unknown and wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    brain = load_models(["brain"])
    counts = {"right": 0, "unknown": 0, "WRONG": 0}

    def row(name: str, scan: Volume, path: Path, right: str) -> None:
        begun, job = time.process_time(), Job(scan=path, labels=Path("labels.nii.gz"))
        seen = look(job, [scan], AUTO, Settings(), Extras())
        try:
            chosen = choose(seen)
        except BadConfig:
            chosen = "unknown"
        refused = refusal(look(job, [scan], brain, Settings(), Extras()), brain)
        wanted = {"head": "brain", "CT": "ct-tissues", "unknown": "unknown"}[right]
        verdict = "right" if chosen == wanted else "unknown" if chosen == "unknown" else "WRONG"
        if refused and right == "head":
            verdict = "WRONG"
        counts[verdict] += 1
        seconds = time.process_time() - begun
        print(f"| {name} | {chosen} | {refused or '-'} | {verdict} | {seconds:.1f} |", flush=True)

    print("| scan | chosen | -m brain is refused | verdict | s of CPU |\n|---|---|---|---|---|")
    with models_kept_open(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, scan in heads(data):
            row(name, scan, Path("scan.nii.gz"), "head")
        for name, scan, right in phantoms():
            row(name, scan, Path("scan.nii.gz"), right)
        for name, path, right in others(data):
            try:
                row(name, read(path), path, right)
            except BadFile as error:
                print(f"| {name} | cannot be read: {str(error)[-60:]} | | | |")
    print(counts)


if __name__ == "__main__":
    main()
