"""What medseg does on a GPU, in twelve parts, correctness first.

python tests/benchmarks/check_gpu.py [--device cuda] [--tiny] [--parts 0 1 2] [--out FILE]

Every part is a process of its own with its own limit of time. It prints one line of JSON at once,
which is also appended to --out: a part that hangs or dies costs only itself. Parts 1 to 6 say
whether they pass; the others are measurements. `--device cpu --tiny` runs all of it in small on a
machine without a card, where the CPU is compared with itself. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_volumes" / "head_t1.nii.gz"
#: Seconds that a part may take on a card; in small, on shared processors, all have ten minutes.
LIMITS = {0: 60, 1: 90, 2: 90, 3: 90, 4: 60, 5: 120, 6: 90, 7: 60, 8: 90, 9: 120, 10: 60, 11: 90}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the check runs: the device, whether in small, and a folder for files."""

    device: str
    tiny: bool
    folder: Path

    @property
    def on_card(self) -> bool:
        """Whether there is something to compare."""
        return self.device.startswith("cuda")

    def halves(self) -> tuple[str, ...]:
        """Precisions beside fp32 that the device has."""
        return ("fp16", "bf16") if self.on_card else ("bf16",)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        import torch

        if self.on_card:
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """The most memory that tensors held on the card since `forget_peak`."""
        import torch

        return round(torch.cuda.max_memory_allocated() / 1e9, 3) if self.on_card else 0.0

    def forget_peak(self) -> None:
        """Count the peak from here."""
        import torch

        if self.on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """The median of ten after three that do not count."""
        times = []
        for _ in range(4 if self.tiny else 13):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            times.append(1000 * (time.perf_counter() - begun))
        return round(sorted(times[3:])[len(times[3:]) // 2], 3)


# Material -----------------------------------------------------------------------------------------


def save_model(
    folder: Path, *, classes: int, features: Sequence[int], patch: int, spacing_mm: float
) -> Path:
    """A model folder of a U-Net with random weights, large enough that no class always wins."""
    import torch

    from medseg.labels import LabelTable
    from medseg.models.folder import save_checkpoint
    from medseg.networks.zoo import build_network

    torch.manual_seed(0)
    options = {"features": list(features)}
    network: Any = build_network("unet", 1, classes, **options)
    with torch.no_grad():
        network.head.weight.mul_(4)
    spec = {
        "name": "check", "architecture": "unet", "options": options, "patch": (patch,) * 3,
        "classes": tuple(range(classes)), "spacing_mm": spacing_mm,
    }  # fmt: skip
    save_checkpoint(folder, spec, network.state_dict(), LabelTable.from_values(range(1, classes)))
    return folder


def body(shape: Sequence[int], spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> Any:
    """A noisy ellipsoid with bands, int16."""
    import numpy as np

    from medseg.volume import Volume

    random = np.random.default_rng(0)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    data = np.empty(tuple(shape), np.int16, order="F")
    for k, height in enumerate(z):
        inside = x[:, None] ** 2 + y**2 + height**2 < 0.95
        bands = 400 + 200 * np.sin(9 * x)[:, None] * np.cos(7 * y) * np.cos(11 * height)
        data[..., k] = np.where(inside, bands, 0) + random.normal(0, 15, shape[:2])
    return Volume(data, np.diag([*spacing_mm, 1.0]))


def save_dataset(folder: Path, *, cases: int, edge: int) -> Path:
    """Scans with labels of two balls."""
    import numpy as np

    from medseg.io import write
    from medseg.labels import LabelTable
    from medseg.volume import Volume

    random = np.random.default_rng(1)
    at = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1)
    for case in range(cases):
        labels = np.zeros((edge,) * 3, np.uint8)
        for value, share in ((1, 0.35), (2, 0.65)):
            center = edge * (share + random.uniform(-0.05, 0.05, 3))
            labels[((at - center) ** 2).sum(-1) < (0.15 * edge) ** 2] = value
        image = (100 + 60 * labels + random.normal(0, 10, labels.shape)).astype(np.int16)
        for kind, data in (("images", image), ("labels", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write(Volume(data, np.eye(4)), folder / kind / f"case{case:02d}.nii.gz")
    LabelTable.from_values((1, 2)).write(folder / "labels.csv")
    return folder


def segmented(volume: Any, model: str, **settings: Any) -> tuple[Any, list[str]]:
    """Labels, and the warnings on the way."""
    from medseg.inference import Settings, segment
    from medseg.models import load_checkpoint

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = segment(volume, load_checkpoint(model), Settings(**settings))
    return result.labels.data, [str(one.message) for one in told]


def likeness(one: Any, other: Any) -> dict[str, float]:
    """The share of equal voxels, and the least Dice of any label."""
    import numpy as np

    dice = []
    for value in np.union1d(np.unique(one), np.unique(other)):
        if value:
            a, b = one == value, other == value
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return {
        "equal": round(float((one == other).mean()), 7),
        "least Dice": round(min(dice, default=1.0), 5),
    }


# Parts --------------------------------------------------------------------------------------------


def facts(way: Way) -> dict[str, Any]:
    """0: names and versions, and how fast the card copies and multiplies."""
    import torch

    from medseg.inference.backends import cards

    device = torch.device(way.device)
    kind = torch.float16 if way.on_card else torch.float32
    count, edge = (10**6, 256) if way.tiny else (2 * 10**9, 8192)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.rand(edge, edge, device=device, dtype=kind)
    copy_ms = way.milliseconds(lambda: target.copy_(source))
    product_ms = way.milliseconds(lambda: square @ square)
    return {
        "versions": cards.versions_of(way.device) | {"torch": torch.__version__},
        "problem": cards.problem_of(device) if way.on_card else "",
        "copy GB/s": round(2 * count / copy_ms / 1e6, 1),
        "product TFLOP/s": round(2 * edge**3 / product_ms / 1e9, 2),
    }


def labels(way: Way) -> dict[str, Any]:
    """1: labels of the device against those of the CPU, in every precision, twice."""
    from medseg.io import read

    rows: dict[str, Any] = {}
    if way.tiny:
        model = save_model(way.folder / "m", classes=4, features=(4, 8), patch=16, spacing_mm=2.0)
        scans = {str(model): body((20, 18, 16), (2.0, 2.0, 2.0))}
    else:
        head = read(SAMPLE)
        scans = {"brain-fast": head, "brain": head}
    passes = True
    for model, scan in scans.items():
        expected, _ = segmented(scan, model, device="cpu", precision="fp32")
        for precision in ("fp32", "auto", *way.halves()):
            one, _ = segmented(scan, model, device=way.device, precision=precision)
            two, _ = segmented(scan, model, device=way.device, precision=precision)
            row = likeness(expected, one) | {"differ twice": int((one != two).sum())}
            least = {"fp32": 0.9999, "bf16": 0.995}.get(precision, 0.999)
            # A network of random weights is near its own border everywhere.
            passes &= row["equal"] >= (0.9 if way.tiny else least)
            passes &= way.tiny or row["least Dice"] >= 0.98
            rows[f"{Path(model).name} {precision}"] = row
    return {"passes": passes, "labels": rows}


def networks(way: Way) -> dict[str, Any]:
    """2: each architecture in half precision on the device against float64 on the CPU."""
    from copy import deepcopy

    import torch

    from medseg.networks.zoo import NETWORKS, build_network, small

    edge, rows, passes = 16 if way.tiny else 32, {}, True
    names = list(NETWORKS)[:1] if way.tiny else list(NETWORKS)
    for name in names:
        torch.manual_seed(0)
        options = small(name, (edge,) * 3)
        network = build_network(name, 1, 3, **options).eval()
        x = torch.rand(1, 1, edge, edge, edge)
        exact = _logits_and_gradient(deepcopy(network).double(), x.double(), torch.float64, "cpu")
        for half in way.halves():
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
            there = deepcopy(network).to(way.device)
            ours = _logits_and_gradient(there, x.to(way.device), dtype, way.device)
            errors = [
                round(float((a.cpu().double() - b).norm() / b.norm()), 5)
                for a, b in zip(ours, exact)
            ]
            # bfloat16 keeps 8 bits and float16 11: its rounding is eight times as large.
            limits = (1e-2, 3e-2) if half == "fp16" else (8e-2, 24e-2)
            passes &= all(error < limit for error, limit in zip(errors, limits))
            rows[f"{name} {half}"] = errors
    return {"passes": passes, "relative error of logits, gradient": rows}


def _logits_and_gradient(network: Any, x: Any, dtype: Any, device: str) -> tuple[Any, Any]:
    import torch

    is_half = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(torch.device(device).type, dtype if is_half else None, enabled=is_half):
        output = network(x)
    logits = output[0] if isinstance(output, list | tuple) else output
    if not isinstance(logits, torch.Tensor):  # Mask2Former says masks
        logits = logits.pixels
    logits.float().square().mean().backward()
    gradients = [one.grad.flatten() for one in network.parameters() if one.grad is not None]
    return logits.detach(), torch.cat(gradients)


def memory(way: Way) -> dict[str, Any]:
    """3: cards with less and less memory: the same labels with a warning, or one sentence."""
    import torch

    from medseg.errors import NotEnoughMemory

    shape, features, patch = (
        ((40, 36, 32), (4, 8), 16) if way.tiny else ((256, 256, 200), (32, 64, 128), 128)
    )
    model = str(
        save_model(way.folder / "m", classes=4, features=features, patch=patch, spacing_mm=1.0)
    )
    scan, rows, passes = body(shape), {}, True
    expected, _ = segmented(scan, model, device=way.device, precision="fp32")
    whole = torch.cuda.get_device_properties(0).total_memory if way.on_card else 0
    for size_gb in (12, 8, 6, 4, 2, 0.5) if way.on_card else (1,):
        if way.on_card:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, size_gb * 1e9 / whole))
        try:
            result, told = segmented(scan, model, device=way.device, precision="fp32")
            row: dict[str, Any] = likeness(expected, result) | {"warnings": told}
            passes &= row["equal"] >= 0.999
        except NotEnoughMemory as error:
            row = {"refused": str(error)}
        rows[f"{size_gb} GB"] = row
    return {"passes": passes, "memory": rows}


def sums(way: Way) -> dict[str, Any]:
    """4: sums of windows, sampling, losses and Dice on the device against the CPU."""
    import numpy as np
    import torch

    from medseg.inference.window import plan_windows, sliding_window
    from medseg.networks.ops import card_norm
    from medseg.training import augment
    from medseg.training.losses import dice_cross_entropy, hard_dice

    device, rows = torch.device(way.device), {}
    random = torch.Generator().manual_seed(0)
    image = torch.rand(1, 40, 24, 28, generator=random)
    for features in (3, 16, 40):
        mix = torch.rand(features, 1, generator=random)
        predict = lambda x, mix=mix: torch.einsum("fc,bcxyz->bfxyz", mix.to(x.device), x)  # noqa: E731
        windows = plan_windows(image.shape[1:], (16, 16, 16), 0.5)
        here, there = (
            [block.data for block in sliding_window(predict, image, windows, device=place)]
            for place in ("cpu", device)
        )
        rows[f"sums of {features}"] = max(float(np.abs(a - b).max()) for a, b in zip(here, there))
    scan = torch.rand(1, 24, 22, 20, generator=random)
    classes = torch.randint(0, 3, (24, 22, 20), generator=random)
    where = torch.tensor([[0.9, 0.1, 0.0, 1.0], [-0.1, 0.9, 0.1, 2.0], [0.0, -0.1, 0.95, 1.5]])
    none = torch.empty((3, 0, 0, 0))
    outcomes = []
    for place in (torch.device("cpu"), device):
        out = torch.zeros(1, 16, 16, 16, device=place)
        found = torch.zeros(16, 16, 16, dtype=torch.int64, device=place)
        augment._sample(
            scan.to(place), classes.to(place), where, none.to(place),
            torch.zeros(1, device=place), out, found,
        )  # fmt: skip
        outcomes.append((out.cpu(), found.cpu()))
    rows["sampled image"] = float((outcomes[0][0] - outcomes[1][0]).abs().max())
    rows["sampled labels that differ"] = int((outcomes[0][1] != outcomes[1][1]).sum())
    logits, truth = (
        torch.randn(2, 4, 24, 24, 24, generator=random),
        torch.randint(0, 4, (2, 24, 24, 24), generator=random),
    )
    each = []
    for place in (torch.device("cpu"), device):
        x = logits.clone().to(place).requires_grad_()
        loss = dice_cross_entropy(x, truth.to(place))
        loss.backward()
        each.append((float(loss.detach()), x.grad.cpu(), hard_dice(x.detach(), truth.to(place))))
    rows["loss"] = abs(each[0][0] - each[1][0]) / each[0][0]
    rows["gradient"] = float((each[0][1] - each[1][1]).norm() / each[0][1].norm())
    rows["hard Dice"] = abs(each[0][2] - each[1][2])
    if way.on_card and card_norm.works_on(device):
        rows["norm in one step"] = card_norm._difference_on(device)
    limits = {"sampled image": 1e-4, "sampled labels that differ": 2, "gradient": 1e-4}
    limits |= {"norm in one step": 1e-3}
    passes = all(value <= limits.get(name, 1e-5) for name, value in rows.items())
    return {"passes": passes, "differences": rows}


def _train(
    way: Way, data: Path, run: Path, *options: str, steps: int, front: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run of `medseg train`."""
    patch = 16 if way.tiny else 32
    front = list(front) or [sys.executable, "-m", "medseg"]
    command = [
        *front, "train", str(data), "-o", str(run), "--quiet", "--device", way.device,
        "--set", f"train.steps={steps}", "--set", "train.batch=2", "--set", "train.log_every=1",
        "--set", f"model.patch=[{patch},{patch},{patch}]", "--set", "model.options.features=[8,16]",
        "--set", "train.checkpoint_every=5", "--set", "train.warmup=2", *options,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"medseg train ended with {ran.returncode}: {ran.stderr[-2000:]}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def training(way: Way) -> dict[str, Any]:
    """5: the loss falls in every precision, and an interrupted run ends as a whole one."""
    import torch

    from medseg.models import load_checkpoint

    steps = 6 if way.tiny else 40
    data = save_dataset(way.folder / "data", cases=6, edge=24 if way.tiny else 64)
    rows: dict[str, Any] = {}
    passes = True
    for precision in ("fp32", *way.halves()):
        run = way.folder / precision
        lines = _train(way, data, run, "--set", f"train.precision={precision}", steps=steps)
        losses = [line["loss"] for line in lines if "loss" in line]
        rows[precision] = [round(losses[0], 4), round(losses[-1], 4)]
        passes &= losses[-1] < (losses[0] if way.tiny else 0.7 * losses[0])
    whole, halved = way.folder / "whole", way.folder / "halved"
    options = ("--deterministic", "--set", "train.precision=fp32", "--set", "train.schedule=linear")
    _train(way, data, whole, *options, steps=steps)
    _interrupted(way, data, halved, *options, steps=steps)
    a, b = (load_checkpoint(str(run)).network().state_dict() for run in (whole, halved))
    differ = max(float((a[key] - b[key]).abs().max()) for key in a)
    rows["whole against interrupted"] = differ
    return {
        "passes": bool(passes and differ == 0),
        "first and last loss": rows,
        "torch": torch.__version__,
    }


def _interrupted(way: Way, data: Path, run: Path, *options: str, steps: int) -> None:
    """A run that is killed once it has kept a state, and goes on."""
    command = [sys.executable, __file__, "--device", way.device, "--folder", str(way.folder)]
    command += ["--one-run", json.dumps([str(data), str(run), steps, *options])]
    child = subprocess.Popen([*command, *(["--tiny"] if way.tiny else [])], start_new_session=True)
    until = time.monotonic() + 300
    while (
        not (run / "state.safetensors").exists()
        and child.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.02)
    if child.poll() is None:
        os.killpg(child.pid, 9)
        child.wait()
    _train(way, data, run, *options, steps=steps)


def processes(way: Way) -> dict[str, Any]:
    """6: one process of torchrun's, copied and shared out, against none."""
    from medseg.models import load_checkpoint

    steps = 4 if way.tiny else 10
    data = save_dataset(way.folder / "data", cases=6, edge=24 if way.tiny else 64)
    front = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "--no-python", sys.executable, "-m", "medseg",
    ]  # fmt: skip
    exact = ("--set", "train.precision=fp32")
    _train(way, data, way.folder / "plain", *exact, steps=steps)
    plain = load_checkpoint(str(way.folder / "plain")).network().state_dict()
    rows = {}
    for parallel in ("ddp", "fsdp"):
        run = way.folder / parallel
        _train(
            way, data, run, *exact, "--set", f"train.parallel={parallel}", steps=steps, front=front
        )
        other = load_checkpoint(str(run)).network().state_dict()
        rows[parallel] = max(float((plain[key] - other[key]).abs().max()) for key in plain)
    return {"passes": max(rows.values()) <= 1e-3, "largest difference of a weight": rows}


@contextmanager
def _nnunet(way: Way, batch: int) -> Iterator[tuple[Any, Any]]:
    """A U-Net of nnU-Net's size, or in small, and a batch of patches."""
    import torch

    from medseg.networks.zoo import build_network

    features, edge = ([4, 8], 16) if way.tiny else ([32, 64, 128, 256, 320, 320], 128)
    network = build_network("unet", 1, 25, features=features).eval().to(way.device)
    yield network, torch.rand(batch, 1, edge, edge, edge, device=way.device)


def layouts(way: Way) -> dict[str, Any]:
    """7: in what arithmetic and layout norms come, and memory against forecasts."""
    import torch

    from medseg.networks.ops import card_norm
    from medseg.networks.zoo import build_network
    from medseg.training.capacity import training_bytes

    kinds: dict[str, int] = {}

    def note(module: Any, inputs: Any, output: Any) -> None:
        last = output.is_contiguous(memory_format=torch.channels_last_3d)
        name = f"{type(module).__name__} {output.dtype} {'channels last' if last else 'first'}"
        kinds[name] = kinds.get(name, 0) + 1

    half = torch.float16 if way.on_card else torch.bfloat16
    kind = torch.device(way.device).type
    peaks = {}
    for batch in (1, 2, 4):
        with _nnunet(way, batch) as (network, x):
            hooks = [
                m.register_forward_hook(note)
                for m in network.modules()
                if "Norm" in type(m).__name__
            ]
            way.forget_peak()
            with torch.inference_mode(), torch.autocast(kind, half):
                network(x.contiguous(memory_format=torch.channels_last_3d))
            peaks[f"batch {batch}"] = way.peak_gb()
            for hook in hooks:
                hook.remove()
    options: dict[str, Any] = {"features": [4, 8] if way.tiny else [32, 64, 128, 256]}
    patch = (16, 16, 16) if way.tiny else (96, 96, 96)
    network = build_network("unet", 1, 3, **options).to(way.device).train()
    optimizer = torch.optim.AdamW(network.parameters())
    way.forget_peak()
    for _ in range(2):
        with torch.autocast(kind, half):
            out = network(torch.rand(2, 1, *patch, device=way.device))
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    forecast = training_bytes("unet", options, 1, 3, patch, 2, kind) / 1e9
    return {
        "norms in one step": way.on_card and card_norm.works_on(torch.device(way.device)),
        "norms": kinds,
        "forward GB": peaks,
        "step GB": way.peak_gb(),
        "forecast GB": round(forecast, 3),
    }


def windows(way: Way) -> dict[str, Any]:
    """8: milliseconds a window, as it is and in other forms."""
    from unittest import mock

    import torch
    from torch import nn

    from medseg.networks.ops import card_norm

    half = torch.float16 if way.on_card else torch.bfloat16
    kind, rows = torch.device(way.device).type, {}
    for batch in (1, 2, 4):
        with _nnunet(way, batch) as (network, x), torch.inference_mode():
            last = x.contiguous(memory_format=torch.channels_last_3d)

            def run(x: Any, network: Any = network) -> Any:
                with torch.autocast(kind, half):
                    return network(x)

            way.forget_peak()
            network.to(memory_format=torch.channels_last_3d)
            rows[f"batch {batch} as it is"] = way.milliseconds(partial(run, last)) / batch
            rows[f"batch {batch} GB"] = way.peak_gb()
            with mock.patch.object(card_norm, "can_fuse", lambda x, norm: False):
                rows[f"batch {batch} norms of PyTorch"] = (
                    way.milliseconds(partial(run, last)) / batch
                )
            network.to(memory_format=torch.contiguous_format)
            rows[f"batch {batch} contiguous"] = way.milliseconds(partial(run, x)) / batch
            halves = partial(network.to(half), last.to(half))
            rows[f"batch {batch} weights in half"] = way.milliseconds(halves) / batch
            for module in list(network.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.GroupNorm):
                        norm = nn.InstanceNorm3d(child.num_channels, affine=True)
                        setattr(module, name, norm.to(way.device, half))
            rows[f"batch {batch} InstanceNorm in half"] = way.milliseconds(halves) / batch
    return {"milliseconds a window": {name: round(value, 3) for name, value in rows.items()}}


def end_to_end(way: Way) -> dict[str, Any]:
    """9: a large scan through the command line, and seconds of each part."""
    from medseg.io import write

    shape, features = (
        ((40, 36, 32), (4, 8)) if way.tiny else ((512, 512, 600), (32, 64, 128, 256, 320, 320))
    )
    scan, rows = way.folder / "scan.nii.gz", {}
    write(body(shape, (0.8, 0.8, 1.0)), scan)
    model = save_model(
        way.folder / "m",
        classes=25,
        features=features,
        patch=16 if way.tiny else 128,
        spacing_mm=1.5,
    )
    for repeat in range(1 if way.tiny else 2):
        out = way.folder / f"out{repeat}.nii.gz"
        command = [
            sys.executable,
            "-m",
            "medseg",
            "infer",
            str(scan),
            "-m",
            str(model),
            "-o",
            str(out),
            "--device",
            way.device,
            "--quiet",
        ]
        begun = time.perf_counter()
        subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
        )
        record = json.loads(out.with_suffix("").with_suffix(".json").read_text(encoding="utf-8"))
        rows[f"run {repeat}"] = record["seconds"] | {
            "wall": round(time.perf_counter() - begun, 2),
            "forecast GB": record["forecast_memory_bytes"] / 1e9,
            "peak GB": record["peak_memory_bytes"] / 1e9,
            "warnings": record["warnings"],
        }
    return {"seconds": rows}


def painting(way: Way) -> dict[str, Any]:
    """10: labels painted on the device against the CPU's, and what copies cost."""
    import numpy as np
    import torch

    from medseg.inference.backends.copies import Courier
    from medseg.inference.backends.painting import CardPainter
    from medseg.inference.painter import Head, Painter

    size, features, classes = ((24, 20, 16), 8, 5) if way.tiny else ((128, 256, 256), 32, 25)
    random, device = np.random.default_rng(0), torch.device(way.device)
    block = random.normal(size=(*size, features)).astype(np.float32)
    weights = random.normal(size=(classes, features)).astype(np.float32)
    head = Head(weights, np.zeros(classes, np.float32))
    # A scan of its own spacing, as slanted as scans are.
    matrix = np.diag([0.53, 0.61, 0.72, 1.0])
    matrix[0, 1] = matrix[2, 0] = 0.03
    shape = tuple(round(n / 0.75) for n in size)
    about = (shape, matrix, size, range(classes))
    begun = time.perf_counter()
    here = Painter(*about, head=head, certain=True)
    here.add(0, 0, block)
    painted_s = time.perf_counter() - begun
    there = torch.from_numpy(block).to(device)
    kept = []

    def paint() -> None:
        painter = CardPainter(*about, head=head, certain=True, device=device)
        painter.add(0, 0, there)
        painter.finish()
        kept[:] = [painter]

    way.forget_peak()
    paint_ms, peak_gb = way.milliseconds(paint), way.peak_gb()
    courier, host = Courier(device), torch.from_numpy(block)

    def fetch() -> None:
        with courier.fetch(there).read():
            pass

    equal = float((kept[0].labels == here.labels).mean())
    sure = [abs(kept[0].confidence()[key] - one) for key, one in here.confidence().items()]
    return {
        "passes": equal >= 0.99999 or way.tiny,
        "equal to the painter": equal,
        "largest difference of confidence": max(sure),
        "GB": peak_gb,
        "ms": {
            "painter on the CPU": round(1000 * painted_s, 1),
            "painter on the device": paint_ms,
            "features there, pageable": way.milliseconds(lambda: host.to(device, copy=True)),
            "features there, pinned": way.milliseconds(lambda: courier.send(host)),
            "features here, pageable": way.milliseconds(there.cpu),
            "features here, pinned": way.milliseconds(fetch),
        },
    }


def throughput(way: Way) -> dict[str, Any]:
    """11: what share of a training step is waited for data."""
    from unittest import mock

    import torch

    from medseg.models import load_checkpoint
    from medseg.training import Request, step as step_module, train_dataset
    from medseg.training.ahead import batches_ahead
    from medseg.training.step import Run

    data = save_dataset(way.folder / "data", cases=6, edge=24 if way.tiny else 160)
    steps, patch = (4, 16) if way.tiny else (30, 128)
    real, marks, rows = Run.draw, [], {}

    def draw(run: Run) -> Any:
        way.wait()
        marks.append(time.perf_counter())
        batch = real(run)
        way.wait()
        marks.append(time.perf_counter())
        return batch

    changes = {
        "train.steps": steps, "train.batch": 2, "model.patch": [patch] * 3,
        "train.device": way.device, "train.validate_samples": 0,
    }  # fmt: skip
    ahead = batches_ahead(torch.device(way.device))
    for name, count in {"as it is": ahead, "each when it is asked for": 0}.items():
        marks.clear()
        with (
            mock.patch.object(Run, "draw", draw),
            mock.patch.object(step_module, "batches_ahead", lambda device, count=count: count),
        ):
            run = way.folder / f"run{count}"
            train_dataset(Request(data=data, run=run, overrides=changes))
        seconds = {"data": 0.0, "rest of the step": 0.0}
        for step in range(2, 2 * steps - 2, 2):  # the first step is not like the others
            seconds["data"] += marks[step + 1] - marks[step]
            seconds["rest of the step"] += marks[step + 2] - marks[step + 1]
        rows[name] = {key: round(value, 3) for key, value in seconds.items()}
        rows[name]["not data"] = round(seconds["rest of the step"] / sum(seconds.values()), 3)
    weights = [
        load_checkpoint(str(way.folder / f"run{count}")).network().state_dict()
        for count in (ahead, 0)
    ]
    differ = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])
    return {"seconds": rows, "largest difference of a weight": differ}


PARTS: tuple[Callable[[Way], dict[str, Any]], ...] = (
    facts, labels, networks, memory, sums, training, processes, layouts, windows, end_to_end,
    painting, throughput,
)  # fmt: skip


def run_part(number: int, way: Way) -> dict[str, Any]:
    """What a part says, or how it failed."""
    begun = time.perf_counter()
    try:
        row = PARTS[number](way)
    except Exception as error:
        row = {"passes": False, "error": f"{type(error).__name__}: {error}"}
    return {
        "part": number,
        "what": PARTS[number].__name__,
        "s": round(time.perf_counter() - begun, 2),
    } | row


def in_a_process(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """A part in a process of its own, within its limit."""
    limit_s = 600 if options.tiny else LIMITS[number]
    command = [sys.executable, __file__, "--device", options.device, "--part", str(number)]
    command += ["--tiny"] if options.tiny else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    failed = {"part": number, "what": PARTS[number].__name__, "passes": False}
    try:
        ran = subprocess.run(
            command,
            env=environment,
            timeout=limit_s,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return failed | {"error": f"took more than {limit_s} s"}
    except (IndexError, ValueError):
        return failed | {"error": f"died with {ran.returncode}"}
    return row


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", type=int, nargs="+", default=list(range(len(PARTS))))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        data, run, steps, *rest = json.loads(options.one_run)
        way = Way(device=options.device, tiny=options.tiny, folder=options.folder)
        _train(way, Path(data), Path(run), *rest, steps=steps)
        return
    if options.part is not None:
        with tempfile.TemporaryDirectory() as name:
            way = Way(device=options.device, tiny=options.tiny, folder=Path(name))
            print(json.dumps(run_part(options.part, way)))
        return
    passes = True
    for number in options.parts:
        row = in_a_process(number, options)
        passes &= row.get("passes", "error" not in row)
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    sys.exit(0 if passes else 1)


if __name__ == "__main__":
    main()
