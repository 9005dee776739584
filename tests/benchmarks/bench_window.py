"""Sliding windows of medseg, MONAI and nnU-Net on the same weights, volume, patch and overlap, in
turn in one run.

python tests/benchmarks/bench_window.py [--shape 256 256 200] [--patch 96 96 96]
    [--classes 25] [--runs 3] [--features 16 32 64 128 256] [--overlap 0.5]
    [--only medseg monai ...] [--trained]

From the image tensor to labels; networks have random weights, and peers get the plain module their
users have: fp32, eager, nn.InstanceNorm3d. Every run is a process of its own: wall and CPU seconds
of the work itself, and the peak memory of its process tree, sampled. Medians of the runs. Agreement
is with a plain full-stack float32 computation on medseg's own windows; the peers place their
windows elsewhere, so theirs says nothing about their quality. What is not installed is skipped and
named. --trained compares medseg's fast arithmetic with fp32 on the embedded model instead.
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
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported in the children, after the allocator is set
    import numpy as np
    from torch import Tensor, nn

SAMPLE = Path(__file__).parents[2] / "sample_volumes" / "head_t1.nii.gz"


# All that is known of medseg's engine: change it here, and nowhere else, when it changes ----------


def keep_memory() -> None:
    """The allocator's settings of the command line; before torch is imported."""
    from medseg.machine import keep_memory

    keep_memory()


def medseg_labels(
    folder: Path, image: Tensor, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels (X, Y, Z) of image (1, X, Y, Z) by the model in `folder`; seconds of the network and
    of accumulating.
    """
    import numpy as np

    from medseg.inference.backends.opening import open_models
    from medseg.inference.painter import Painter
    from medseg.inference.window import plan_windows, sliding_window
    from medseg.models.folder import load_checkpoint

    windows = plan_windows(image.shape[1:], options.patch, options.overlap)
    predictor = open_models(
        [load_checkpoint(str(folder))],
        backend=options.backend,
        device="cpu",
        precision=options.precision,
        windows=windows.count,
    )
    spent = {"network": 0.0, "paint": 0.0}

    def timed_predict(patches: Tensor) -> Tensor:
        begun = time.perf_counter()
        features = predictor(patches)
        spent["network"] += time.perf_counter() - begun
        return features

    begun = time.perf_counter()
    shape = image.shape[1:]
    painter = Painter(shape, np.eye(4), shape, range(options.classes), head=predictor.head)
    for block in sliding_window(timed_predict, image, windows):
        painting = time.perf_counter()
        painter.add(block.x, block.y, block.data)
        spent["paint"] += time.perf_counter() - painting
    accumulate = time.perf_counter() - begun - spent["network"] - spent["paint"]
    arithmetic = {"arithmetic": predictor.precision, "backend": predictor.backend}
    return painter.labels, {"accumulate": accumulate} | arithmetic | spent


def medseg_windows(
    shape: list[int], options: argparse.Namespace
) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
    """Where medseg's windows start along each axis, and the weight (X, Y, Z) of a window's
    voxels.
    """
    from medseg.inference.window import gaussian_weights, plan_windows

    starts = plan_windows(shape, options.patch, options.overlap).starts
    x, y, z = (gaussian_weights(patch) for patch in options.patch)
    return starts, x[:, None, None] * y[:, None] * z


def medseg_trained(precision: str) -> tuple[np.ndarray, dict[str, float]]:
    """Labels of the bundled sample by the embedded model, without cleaning up, and seconds of each
    part.
    """
    from medseg.inference.segmentation import segment
    from medseg.inference.settings import Settings
    from medseg.io import read

    result = segment(
        read(SAMPLE), "brain", Settings(device="cpu", precision=precision, cleanup=False)
    )
    return result.labels.data, result.seconds


# --- The networks and the image. ---


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """A medseg model folder with random weights."""
    import torch

    from medseg.labels import Label, LabelTable
    from medseg.models.folder import save_checkpoint
    from medseg.networks.zoo import build_network

    torch.manual_seed(0)
    network = build_network("unet", 1, options.classes, features=options.features)
    spec = {
        "name": "bench",
        "architecture": "unet",
        "options": {"features": options.features},
        "classes": tuple(range(options.classes)),
        "patch": tuple(options.patch),
        "spacing_mm": 1.0,
    }
    table = LabelTable(
        tuple(Label(n, f"label {n}", (n % 256, 0, 0)) for n in range(1, options.classes))
    )
    save_checkpoint(folder, spec, network.state_dict(), table)


def plain_module(folder: Path) -> nn.Module:
    """The same values in the module that users of the peers have: contiguous fp32,
    nn.InstanceNorm3d.
    """
    from torch import nn

    from medseg.models.folder import load_checkpoint

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm) and child.num_groups == child.num_channels:
                norm = nn.InstanceNorm3d(child.num_channels, eps=child.eps, affine=True)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
            else:
                replace(child)

    network = load_checkpoint(str(folder)).network()
    replace(network)
    return network.eval()


def make_image(shape: list[int]) -> Tensor:
    """(1, X, Y, Z): smooth waves and noise, in 0..1 as networks of medseg get it."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x, y, z = (torch.sin(torch.linspace(0, 9 + n, size)) for n, size in enumerate(shape))
    image = (
        0.5
        + 0.3 * x[:, None, None] * y[:, None] * z
        + 0.05 * torch.randn(*shape, generator=generator)
    )
    return image.clamp_(0, 1)[None]


# The contestants: folder, image, options -> labels and facts; times are taken around the call -----


def monai_labels(
    folder: Path, image: Tensor, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """MONAI as its users call it."""
    import torch
    from monai.inferers import sliding_window_inference

    network, network_seconds = timed_network(plain_module(folder))
    with torch.no_grad():
        logits = sliding_window_inference(
            image[None], options.patch, 1, network, overlap=options.overlap, mode="gaussian"
        )
        labels = logits[0].argmax(0)
    return labels.to(torch.uint8).numpy(), {"network": network_seconds[0]}


def nnunet_labels(
    folder: Path, image: Tensor, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """nnU-Net's predictor, mirroring off, given the network and the two facts it takes from its
    plans.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=1 - options.overlap,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.network, network_seconds = timed_network(plain_module(folder))
    predictor.configuration_manager = SimpleNamespace(patch_size=list(options.patch))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=options.classes)
    labels = predictor.predict_sliding_window_return_logits(image).argmax(0)
    return labels.to(torch.uint8).numpy(), {"network": network_seconds[0]}


def timed_network(network: nn.Module) -> tuple[nn.Module, list[float]]:
    """The network, and a list of one number: the seconds spent in it so far."""
    begun, seconds = [0.0], [0.0]

    def before(*_: object) -> None:
        begun[0] = time.perf_counter()

    def after(*_: object) -> None:
        seconds[0] += time.perf_counter() - begun[0]

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)
    return network, seconds


def reference_labels(
    folder: Path, image: Tensor, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """Every window in fp32 by the plain module, summed in one stack of the whole volume, on
    medseg's windows.
    """
    import torch
    from torch.nn import functional as F

    shape = list(image.shape[1:])
    starts, weight = medseg_windows(shape, options)
    padded = [max(size, patch) for size, patch in zip(shape, options.patch)]
    image = F.pad(
        image, [n for size, new in zip(shape[::-1], padded[::-1]) for n in (0, new - size)]
    )
    network = plain_module(folder)
    stack = torch.zeros(options.classes, *padded)
    with torch.inference_mode():
        for corner in product(*starts):
            place = tuple(slice(start, start + size) for start, size in zip(corner, options.patch))
            stack[:, *place] += network(image[None, :, *place])[0] * weight
        labels = stack[:, : shape[0], : shape[1], : shape[2]].argmax(0)
    return labels.to(torch.uint8).numpy(), {"windows": len(list(product(*starts)))}


#: Name -> (labels, whether the allocator keeps memory, package needed, how it is printed).
CONTESTANTS: dict[str, tuple[Callable[..., Any], bool, str, str]] = {
    "reference": (reference_labels, True, "torch", "plain full stack, fp32"),
    "medseg": (medseg_labels, True, "torch", "medseg"),
    "monai": (monai_labels, False, "monai", "MONAI"),
    "nnunet": (nnunet_labels, False, "nnunetv2", "nnU-Net"),
    "nnunet_keep": (nnunet_labels, True, "nnunetv2", "nnU-Net, keeps memory"),
}


def child(options: argparse.Namespace) -> None:
    """One run in this process: labels to a file, facts as JSON to stdout."""
    work, keeps, _, _ = CONTESTANTS[options.child]
    if keeps:
        keep_memory()
    import numpy as np
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    image = make_image(options.shape)
    cpu, begun = cpu_seconds(), time.perf_counter()
    labels, facts = work(options.folder / "model", image, options)
    facts |= {
        "wall": time.perf_counter() - begun,
        "cpu": cpu_seconds() - cpu,
        "threads": torch.get_num_threads(),
    }
    np.save(options.folder / f"{options.child}.npy", labels)
    print(json.dumps(facts))


def cpu_seconds() -> float:
    """Of this process and its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- What the machine can do. ---


def matrix_peaks() -> dict[str, float]:
    """Best GFLOP/s of 2048^3 matrix products with bf16 and fp32 weights, plain and packed
    beforehand by oneDNN.
    """
    import torch

    n, peaks = 2048, {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, weight = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        linear = torch.nn.Linear(n, n, bias=False).to(dtype)
        ways: list[Callable[[], Tensor]] = [lambda linear=linear, x=x: linear(x)]
        with torch.inference_mode():
            try:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
                multiply = torch.ops.mkldnn._linear_pointwise
                ways.append(lambda m=multiply, x=x, p=packed: m(x, p, None, "none", [], ""))
            except (RuntimeError, AttributeError):
                print("oneDNN cannot pack weights here: the peak may be too low")
            best = float("inf")
            for way in ways:
                for _ in range(12):
                    begun = time.perf_counter()
                    way()
                    best = min(best, time.perf_counter() - begun)
        peaks[name] = 2 * n**3 / best / 1e9
    return peaks


def network_gflop(folder: Path, patch: list[int]) -> float:
    """GFLOP of one window (a multiplication and an addition are two), counted without computing
    anything.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = plain_module(folder).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 1, *patch, device="meta"))
    return counter.get_total_flops() / 1e9


# --- The parent. ---


def run_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The facts of one run, with the peak memory of its process tree in GB and its seconds with
    start-up.
    """
    from bench_infer import tree_memory_bytes

    command = [sys.executable, __file__, "--child", name, "--folder", str(options.folder)]
    for key in ("shape", "patch", "features"):
        command += [f"--{key}", *map(str, getattr(options, key))]
    for key in ("classes", "overlap", "precision", "backend", "threads"):
        command += [f"--{key}", str(getattr(options, key))]
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, tree_memory_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return json.loads(lines[-1]) | {"peak_gb": peak / 1e9, "total": time.perf_counter() - begun}


def compare(options: argparse.Namespace) -> None:
    """Print the table of all contestants."""
    import numpy as np

    names = options.only or list(CONTESTANTS)
    for name in list(names):
        if find_spec(CONTESTANTS[name][2]) is None:
            print(f"{CONTESTANTS[name][3]}: {CONTESTANTS[name][2]} is not installed, skipped")
            names.remove(name)
    make_model(options.folder / "model", options)
    gflop = network_gflop(options.folder / "model", options.patch)
    if "medseg" in names:  # one window, so that what medseg compiles once on a machine is compiled
        run_child("medseg", argparse.Namespace(**vars(options) | {"shape": options.patch}))
    facts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for run in range(options.runs):
        for name in names:
            if name != "reference" or run == 0:
                facts[name].append(run_child(name, options))
                print(
                    f"run {run + 1}: {CONTESTANTS[name][3]} {facts[name][-1]['wall']:.1f} s",
                    file=sys.stderr,
                )
    peaks = matrix_peaks()
    starts, _ = medseg_windows(options.shape, options)
    windows = len(list(product(*starts)))
    shape, patch = ("x".join(map(str, sizes)) for sizes in (options.shape, options.patch))
    print(
        f"\n{shape}, {options.classes} classes, patch {patch}, overlap {options.overlap},"
        f" {os.cpu_count()} cores;"
    )
    print(
        f"U-Net {'-'.join(map(str, options.features))}: {gflop:.0f} GFLOP a window, {windows}"
        " windows of medseg"
    )
    print(
        f"matrix peak: {peaks['bfloat16']:.0f} GFLOP/s bf16, {peaks['float32']:.0f} fp32; medians"
        f" of {options.runs}\n"
    )
    print(
        f"{'':<24}{'wall s':>8}{'CPU s':>8}{'network s':>11}{'peak GB':>9}{'x':>7}"
        f"{'agrees with fp32':>18}"
    )
    middle = {
        name: {
            key: statistics.median(f[key] for f in rows)
            for key in ("wall", "cpu", "peak_gb", "total")
        }
        for name, rows in facts.items()
    }
    reference = np.load(options.folder / "reference.npy") if "reference" in names else None
    for name in names:
        row = middle[name]
        inner = statistics.median(f.get("network", float("nan")) for f in facts[name])
        factor = row["wall"] / middle["medseg"]["wall"] if "medseg" in names else float("nan")
        agrees = ""
        if reference is not None:
            share = float((np.load(options.folder / f"{name}.npy") == reference).mean())
            agrees = f"{100 * share:.3f} %" + ("" if name in ("medseg", "reference") else " *")
        print(
            f"{CONTESTANTS[name][3]:<24}{row['wall']:8.1f}{row['cpu']:8.1f}{inner:11.1f}{row['peak_gb']:9.2f}"
            f"{factor:7.2f}{agrees:>18}"
        )
    print("* other windows than medseg's")
    if "medseg" in names:
        medseg_split(facts["medseg"], gflop * windows, peaks)


def medseg_split(rows: list[dict[str, Any]], gflop: float, peaks: dict[str, float]) -> None:
    """Print where medseg's time goes, and which share of the matrix peak the network reaches."""
    row = sorted(rows, key=lambda facts: facts["wall"])[len(rows) // 2]
    rest = row["wall"] - row["network"] - row["accumulate"] - row["paint"]
    parts = {key: row[key] for key in ("network", "accumulate", "paint")} | {
        "opening the model": rest
    }
    print(
        "\nmedseg: "
        + ", ".join(f"{key} {100 * s / row['wall']:.1f} % ({s:.2f} s)" for key, s in parts.items())
    )
    speed = gflop / row["network"]
    share = 100 * speed / peaks.get(row["arithmetic"], peaks["float32"])
    print(
        f"network in {row['backend']} {row['arithmetic']}: {speed:.0f} GFLOP/s, {share:.0f} % of"
        " the matrix peak"
    )


def trained(options: argparse.Namespace) -> None:
    """Print how well the fast arithmetic agrees with fp32 for the embedded model on the bundled
    sample.
    """
    keep_memory()
    labels, seconds = {}, {}
    for precision in ("fp32", options.precision):
        labels[precision], seconds[precision] = medseg_trained(precision)
    exact, fast = labels["fp32"], labels[options.precision]
    same, structure = exact == fast, (exact > 0) | (fast > 0)
    print(f"brain on {SAMPLE.name}, {options.precision} against fp32:")
    print(
        f"labels agree {100 * same.mean():.4f} %, within structures"
        f" {100 * same[structure].mean():.3f} %"
    )
    for precision, parts in seconds.items():
        print(f"  {precision}: " + ", ".join(f"{name} {s:.2f} s" for name, s in parts.items()))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=[256, 256, 200])
    parser.add_argument("--patch", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--precision", default="auto", help="medseg's arithmetic")
    parser.add_argument("--backend", default="auto", help="medseg's backend")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it as it is")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
    elif options.trained:
        trained(options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.folder = Path(folder)
            compare(options)


if __name__ == "__main__":
    main()
