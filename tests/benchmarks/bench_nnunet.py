"""Models of nnU-Net: medseg against nnU-Net's own predictor, on the same folder and scan.

python tests/benchmarks/bench_nnunet.py speed [--patch 128] [--runs 2] [--threads 2]
python tests/benchmarks/bench_nnunet.py classes [--classes 118]
python tests/benchmarks/bench_nnunet.py parts [--shape 512 512 600]

speed: the usual PlainConvUNet (32 to 320 features, six stages). classes: a small network with many
classes, one thread. Both need nnunetv2 (2.8.1) beside medseg; what is not installed is left out.
parts: five models of 25 classes each through the command line, forecast against measured.

Weights are random, mirroring is off. Every run is a process of its own, in turn: seconds and CPU
seconds from the scan in memory to labels in memory, and the peak of resident memory over what the
process held before (libraries loaded, nothing of the model). The load of the machine is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from making import nnunet as making

#: The usual network of nnU-Net at 128^3, before 2024 and after.
USUAL: dict[str, Any] = dict(making.PLAIN) | {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *([[2, 2, 2]] * 5)],
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}
#: A small one.
SMALL: dict[str, Any] = dict(making.PLAIN) | {
    "n_stages": 3,
    "features_per_stage": [8, 16, 32],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2] * 3,
    "n_conv_per_stage_decoder": [2] * 2,
}
HOW = ("nnunet", "medseg", "medseg exact")


def write_model(
    folder: Path, arguments: dict[str, Any], patch: list[int], classes: int, prefix: str = "part"
) -> Path:
    """A model folder that nnU-Net reads, too. classes: with the background."""
    plan = making.plans(arguments, patch_size=patch, normalization_schemes=["CTNormalization"])
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    architecture["_kw_requires_import"] = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    labels = {"background": 0} | {f"{prefix}_{n}": n for n in range(1, classes)}
    return making.write_model(folder, plan=plan, data=making.dataset(labels, channels=("CT",)))


def body(shape: tuple[int, ...]) -> np.ndarray:
    """(I, J, K) int16: a noisy ellipsoid with bands, like CT numbers."""
    random = np.random.default_rng(0)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    data = np.empty(shape, np.int16, order="F")
    for k, z in enumerate(axes[2]):
        inside = axes[0][:, None] ** 2 + axes[1] ** 2 + z**2 < 0.95
        bands = 60 + 60 * np.sin(9 * axes[0])[:, None] * np.cos(7 * axes[1]) * np.cos(11 * z)
        data[..., k] = np.where(inside, bands, -800) + random.normal(0, 15, shape[:2])
    return data


def with_nnunet(folder: Path, scan: Path) -> np.ndarray:
    """Labels (I, J, K) by nnU-Net's predictor on the CPU."""
    import nibabel as nib
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        verbose=False,
        verbose_preprocessing=False,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
    image = nib.load(scan)
    data = np.asarray(image.dataobj).astype(np.float32).transpose(2, 1, 0)[None]
    spacing = [float(mm) for mm in image.header.get_zooms()[::-1]]
    begin()
    labels = predictor.predict_single_npy_array(data, {"spacing": spacing})
    return np.asarray(labels).transpose(2, 1, 0)


def with_medseg(folder: Path, scan: Path, *, exact: bool) -> np.ndarray:
    """Labels (I, J, K) by medseg, in float32 or whatever it chooses."""
    from medseg.inference import Settings, segment
    from medseg.io import read
    from medseg.machine import keep_memory
    from medseg.models import load_models

    keep_memory()  # as the command line does
    model, volume = load_models([str(folder)]), read(scan)
    begin()
    return np.asarray(
        segment(volume, model, Settings(exact=exact, tta=False, device="cpu")).labels.data
    )


_BEGUN: dict[str, float] = {}


def begin() -> None:
    """Count from here: what the process holds and has computed until now is its start."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _BEGUN.update(
        wall=time.perf_counter(), cpu=used.ru_utime + used.ru_stime, held=_resident_bytes()
    )
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory begins anew


def _resident_bytes(key: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def child(how: str, folder: Path, scan: Path, out: Path, threads: int) -> None:
    """One run in this process; its numbers go to `out`.json, its labels to `out`."""
    import torch

    torch.set_num_threads(threads)
    exact = how.endswith("exact")
    labels = (
        with_nnunet(folder, scan) if how == "nnunet" else with_medseg(folder, scan, exact=exact)
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    numbers = {
        "wall": time.perf_counter() - _BEGUN["wall"],
        "cpu": used.ru_utime + used.ru_stime - _BEGUN["cpu"],
        "over_start_bytes": _resident_bytes("VmHWM") - _BEGUN["held"],
    }
    np.save(out, labels)
    out.with_suffix(".json").write_text(json.dumps(numbers))


def compare(folder: Path, scan: Path, *, runs: int, threads: int) -> None:
    """A line for each way, medians of the runs, with the share of voxels that are nnU-Net's."""
    found: dict[str, list[dict[str, float]]] = {how: [] for how in HOW}
    labels: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(runs):
            for how in HOW:
                if how == "nnunet" and find_spec("nnunetv2") is None:
                    continue
                out = Path(place) / "labels.npy"
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "child",
                    how,
                    str(folder),
                    str(scan),
                    str(out),
                ]
                environment = os.environ | {
                    "OMP_NUM_THREADS": str(threads),
                    "NUMBA_NUM_THREADS": str(threads),
                    "nnUNet_compile": "f",
                    "nnUNet_def_n_proc": str(threads),
                }
                made = subprocess.run(
                    [*command, str(threads)], env=environment, capture_output=True, text=True
                )
                if made.returncode:
                    raise SystemExit(made.stderr)
                found[how].append(json.loads(out.with_suffix(".json").read_text()))
                labels[how] = np.load(out)
    for how, rows in found.items():
        if not rows:
            print(f"{how:13} is not installed")
            continue
        wall, cpu, over = (statistics.median(row[key] for row in rows) for key in rows[0])
        peer = labels.get("nnunet")
        equal = (
            ""
            if peer is None
            else f", {int((labels[how] != peer).sum())} of {peer.size} voxels differ"
        )
        line = f"{how:13} {wall:7.1f} s, {cpu:7.1f} s of CPU, {over / 1e9:5.2f} GB over the start"
        print(line + equal, flush=True)


def write_scan(path: Path, shape: tuple[int, ...], spacing: float = 1.0) -> Path:
    """A scan of a body."""
    import nibabel as nib

    image = nib.Nifti1Image(body(shape), np.diag([-spacing, -spacing, spacing, 1.0]))
    image.to_filename(path)
    return path


def parts(folder: Path, shape: tuple[int, ...], spacing: float) -> None:
    """Five parts of 25 classes on a large scan through the command line."""
    from bench_memory import measured

    for n in range(1, 6):
        place = (
            folder
            / "results"
            / f"Dataset29{n}_T_part{n}_x"
            / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        )
        write_model(place, SMALL, [64, 64, 64], 26, prefix=f"part{n}")
    scan = write_scan(folder / "scan.nii.gz", shape, spacing)
    print(measured(scan, str(folder / "results"), folder, []), flush=True)


def main() -> None:
    """Parse, run, print."""
    if sys.argv[1:2] == ["child"]:
        how, folder, scan, out, threads = sys.argv[2:]
        child(how, Path(folder), Path(scan), Path(out), int(threads))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("speed", "classes", "parts"))
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3)
    parser.add_argument("--spacing", type=float, default=1.0)
    options = parser.parse_args()
    print("load before:", Path("/proc/loadavg").read_text().strip(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "parts":
            parts(folder, tuple(options.shape or (512, 512, 600)), options.spacing)
        elif options.what == "speed":
            model = write_model(folder / "model", USUAL, [options.patch] * 3, 3)
            shape = tuple(options.shape or (options.patch * 5 // 4, options.patch, options.patch))
            scan = write_scan(folder / "scan.nii.gz", shape, options.spacing)
            compare(model, scan, runs=options.runs, threads=options.threads)
        else:
            model = write_model(folder / "model", SMALL, [64, 64, 64], options.classes)
            scan = write_scan(
                folder / "scan.nii.gz", tuple(options.shape or (128, 128, 96)), options.spacing
            )
            compare(model, scan, runs=options.runs, threads=1)
    print("load after:", Path("/proc/loadavg").read_text().strip())


if __name__ == "__main__":
    main()
