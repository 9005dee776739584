"""Time of reading and writing volumes, against nibabel and SimpleITK in the same run.

python tests/benchmarks/bench_io.py [--shape 512 512 300] [--runs 3] [--folder FOLDER]

A scan of int16 (noise over anatomy) and a label map of uint8, both in the order in which files are
read and in that in which networks give them, as .nii.gz and .nii. Every reading is checked to give
the voxels that were written. Seconds are medians of wall time, the packages taking turns; nibabel
is asked for the stored voxels, which is its fast way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.io import read, write
from medseg.volume import Volume

#: Writes a volume to a path, and reads its voxels as an array (i, j, k).
Package = tuple[Callable[[Volume, Path], None], Callable[[Path], NDArray]]


def medseg_package() -> Package:
    """What this toolkit's users call."""
    return (lambda volume, path: write(volume, path)), (lambda path: read(path).data)


def nibabel_package() -> Package:
    """Voxels as stored; `get_fdata` would turn them into float64."""
    import nibabel as nib

    def save(volume: Volume, path: Path) -> None:
        nib.save(nib.Nifti1Image(volume.data, volume.affine), path)

    return save, lambda path: np.asanyarray(nib.load(path, mmap=False).dataobj)


def simpleitk_package() -> Package:
    """SimpleITK's arrays run (k, j, i)."""
    import SimpleITK

    def save(volume: Volume, path: Path) -> None:
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.data.T))
        SimpleITK.WriteImage(image, str(path), useCompression=path.suffix == ".gz")

    return save, lambda path: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T


PACKAGES = {"medseg": medseg_package, "nibabel": nibabel_package, "SimpleITK": simpleitk_package}


def scan(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Air without noise around a body with waves and noise, in Fortran order."""
    random = np.random.default_rng(0)
    i, j = (np.linspace(-1, 1, n) for n in shape[:2])
    body = (i[:, None] / 0.8) ** 2 + (j / 0.6) ** 2 < 1
    out = np.empty(shape, np.int16, order="F")
    for k in range(shape[2]):
        tissue = 200 * np.sin(5 * i + k / 30)[:, None] * np.cos(4 * j) + random.normal(
            0, 12, shape[:2]
        )
        out[..., k] = np.where(body, tissue, -1000)
    return out


def label_map(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """25 labels in rounded lumps inside a body, in Fortran order."""
    random = np.random.default_rng(1)
    i, j, k = (np.arange(n) for n in shape)
    out = np.zeros(shape, np.uint8, order="F")
    for value in range(1, 26):
        for _ in range(4):
            centre, radius = (
                random.uniform(0.25, 0.75, 3) * shape,
                random.uniform(0.04, 0.12) * np.array(shape),
            )
            low, high = np.maximum(centre - radius, 0).astype(int), (centre + radius).astype(int)
            box = tuple(slice(a, b) for a, b in zip(low, high))
            x, y, z = (((n[s] - c) / r) ** 2 for n, s, c, r in zip((i, j, k), box, centre, radius))
            out[box][x[:, None, None] + y[:, None] + z < 1] = value
    return out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write; a folder in memory measures without the disk"
    )
    options = parser.parse_args()
    packages = {}
    for name, make in PACKAGES.items():
        if find_spec(name) is None:
            print(f"{name} is not installed")
        else:
            packages[name] = make()
    shape = tuple(options.shape)
    cases = {"int16 scan": scan(shape), "uint8 labels": label_map(shape)}
    cases["uint8 labels, C order"] = np.ascontiguousarray(cases["uint8 labels"])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for suffix in (".nii.gz", ".nii"):
            for title, data in cases.items():
                volume = Volume(data, np.diag([0.8, 0.8, 1.0, 1.0]))
                writing: dict[str, list[float]] = {name: [] for name in packages}
                reading: dict[str, list[float]] = {name: [] for name in packages}
                for _ in range(options.runs):
                    for name, (save, load) in packages.items():
                        path = Path(folder) / f"{name}{suffix}"
                        path.unlink(missing_ok=True)
                        begun = time.perf_counter()
                        save(volume, path)
                        middle = time.perf_counter()
                        back = load(path)
                        ended = time.perf_counter()
                        assert np.array_equal(back, data), (
                            f"{name} does not give back what it wrote"
                        )
                        writing[name].append(middle - begun)
                        reading[name].append(ended - middle)
                print(f"\n{'x'.join(map(str, shape))} {title}, {suffix}")
                mine = [statistics.median(times["medseg"]) for times in (writing, reading)]
                for name in packages:
                    size = (Path(folder) / f"{name}{suffix}").stat().st_size / 1e6
                    there = [statistics.median(times[name]) for times in (writing, reading)]
                    factors = (
                        ""
                        if name == "medseg"
                        else f"   ({there[0] / mine[0]:.1f} x, {there[1] / mine[1]:.1f} x)"
                    )
                    print(
                        f"  {name:<10} write {there[0]:6.2f} s  read {there[1]:6.2f} s  {size:7.2f}"
                        f" MB{factors}"
                    )


if __name__ == "__main__":
    main()
