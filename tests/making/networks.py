"""Tiny networks and scans for tests: models whose answer is known beforehand, and heads made of
nested ellipsoids.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from making.places import python_path
from medseg.labels import Label, LabelTable
from medseg.models.folder import save_checkpoint
from medseg.networks.zoo import NETWORKS, build_network
from medseg.volume import Volume

#: Label values of the tiny models: background and two structures that mirror each other by name.
CLASSES = (0, 2, 41)
TABLE = LabelTable((Label(2, "left body", (200, 30, 30)), Label(41, "right body", (30, 30, 200))))
UNET_OPTIONS = {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1], "stem": 2}


class Nearest(nn.Module):
    """Each voxel gets the class whose brightness is nearest: dark 0, middle 1, bright 2 and so on.
    Pointwise, so that what the pipeline around it must give is known."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.brightness = nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x: Tensor) -> Tensor:
        return -((x[:, :1] - self.brightness.view(1, -1, 1, 1, 1)) ** 2)


class PerChannel(nn.Module):
    """Class n + 1 where channel n is more than half as bright as the brightest voxels, later
    channels first.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((classes - 1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        above = x - self.threshold.view(1, -1, 1, 1, 1)
        order = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1, 1, 1)
        return torch.cat((torch.zeros_like(x[:, :1]), above.sign() * order), 1)


class NotANumber(nn.Module):
    """Finite weights, infinite answers."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.weight.view(1, -1, 1, 1, 1) * x[:, :1]) * 0


#: What `with mock.patch.dict(NETWORKS, KNOWN)` adds to the architectures.
KNOWN: dict[str, Any] = {"nearest": Nearest, "per_channel": PerChannel, "not_a_number": NotANumber}


def save_unet(folder: Path, **changes: Any) -> Path:
    """A model folder with a tiny random U-Net; `changes` replace fields of its JSON before it is
    written.
    """
    torch.manual_seed(0)
    network = build_network("unet", 1, len(CLASSES), **UNET_OPTIONS)
    with torch.no_grad():  # so that no class always wins
        network.head.weight.mul_(4)
    spec = {
        "name": "tiny",
        "architecture": "unet",
        "options": UNET_OPTIONS,
        "classes": CLASSES,
        "patch": (16, 16, 16),
        "spacing_mm": 2.0,
    }
    save_checkpoint(folder, spec | changes, network.state_dict(), TABLE)
    return folder


def save_known(folder: Path, architecture: str = "nearest", **changes: Any) -> Path:
    """A model folder with a network of `KNOWN`."""
    spec = {
        "name": "known",
        "architecture": architecture,
        "classes": CLASSES,
        "patch": (16, 16, 16),
        "spacing_mm": 2.0,
    }
    network = KNOWN[architecture](changes.get("channels", 1), len(CLASSES))
    save_checkpoint(folder, spec | changes, network.state_dict(), TABLE)
    return folder


def save_two_channels(folder: Path, **changes: Any) -> Path:
    """A model of two channels: 2 where the first (T1) is bright, 41 where the second (FLAIR) is."""
    return save_known(
        folder, "per_channel", **({"channels": 2, "channel_names": ("T1", "FLAIR")} | changes)
    )


def save_two_channel_network(
    folder: Path,
    architecture: str,
    options: dict[str, Any],
    patch: tuple[int, int, int],
    **changes: Any,
) -> Path:
    """A model folder with a random network of two channels of any architecture."""
    torch.manual_seed(3)
    fields = {
        "name": "tiny",
        "architecture": architecture,
        "options": options,
        "patch": patch,
        "channels": 2,
    }
    network = build_network(architecture, 2, len(CLASSES), **options)
    save_checkpoint(
        folder,
        fields | {"classes": CLASSES, "spacing_mm": 2.0} | changes,
        network.state_dict(),
        TABLE,
    )
    return folder


def edit_json(folder: Path, **changes: Any) -> None:
    """Change fields of a model's JSON behind medseg's back."""
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def affine_of(
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0), origin: Any = (0.0, 0.0, 0.0)
) -> np.ndarray:
    """A straight RAS affine."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def ellipsoid(shape: tuple[int, int, int], centre: Any, radii: Any) -> np.ndarray:
    """Truth inside an ellipsoid, in voxels."""
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return (((at - np.array(centre)) / np.array(radii)) ** 2).sum(-1) <= 1


def head(shape: tuple[int, int, int] = (24, 26, 22), seed: int = 0) -> np.ndarray:
    """Label map of a head that runs to RAS: skin 511, bone 515, fluid 24, cortex 3 / 42, white
    matter 2 / 41.
    """
    wobble = np.random.default_rng(seed).uniform(0.95, 1.05, 3)
    middle, half = (np.array(shape) - 1) / 2, np.array(shape) / 2 * wobble
    labels = np.zeros(shape, np.uint16)
    left = (np.arange(shape[0]) < middle[0])[:, None, None]
    for size, values in (
        (0.95, (511, 511)),
        (0.85, (515, 515)),
        (0.75, (24, 24)),
        (0.66, (3, 42)),
        (0.45, (2, 41)),
    ):
        labels[ellipsoid(shape, middle, half * size)] = 0
        labels += (ellipsoid(shape, middle, half * size) * np.where(left, *values)).astype(
            np.uint16
        )
    return labels


def phantom(
    shape: tuple[int, int, int] = (20, 22, 18), noise: float = 4.0, seed: int = 1
) -> np.ndarray:
    """A float32 scan that runs to RAS: air 0, a body of 500 and in its left, front, upper part a
    bright 1000.
    """
    middle, half = (np.array(shape) - 1) / 2, np.array(shape) / 2
    image = 500.0 * ellipsoid(shape, middle, half * 0.9)
    image[ellipsoid(shape, middle + half * (-0.25, 0.3, 0.2), half * 0.4)] = 1000
    return (image + np.random.default_rng(seed).normal(0, noise, shape)).astype(np.float32)


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    """Write a NIfTI file with nibabel, not with what is tested."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def save_scan(path: Path, affine: np.ndarray | None = None, **arguments: Any) -> Path:
    """A phantom as a NIfTI file."""
    return save_nifti(path, phantom(**arguments), affine_of() if affine is None else affine)


def volume_of(path: Path) -> Volume:
    """What nibabel reads."""
    image = nib.load(path)
    return Volume(np.asanyarray(image.dataobj), image.affine)


def bumps(shape: tuple[int, int, int], spots: int = 4, seed: int = 0) -> np.ndarray:
    """A float32 scan of a few smooth bright blobs on noise; never a label map."""
    random = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"), -1)
    image = random.normal(0, 0.01, shape)
    for _ in range(spots):
        image += np.exp(-((at - random.uniform(0.2, 0.8, 3)) ** 2).sum(-1) / 0.02)
    return (image * 1000).astype(np.float32)


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def medseg(*arguments: object) -> Ran:
    """Run the command line in this process, with the networks of `KNOWN`, and leave the process as
    it was.
    """
    from medseg.cli.app import main

    out, err = StringIO(), StringIO()
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    code = 0
    with (
        warnings.catch_warnings(),
        mock.patch.dict(NETWORKS, KNOWN),
        mock.patch.object(sys, "argv", ["medseg", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """The environment of child processes: this checkout, one thread, a wide terminal."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": python_path(), "COLUMNS": "200"}


def start(*command: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python with `command` as a child process."""
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment(),
    } | options
    return subprocess.Popen([sys.executable, *map(str, command)], **options)


def run_child(*command: object, timeout: float = 120, **options: Any) -> Ran:
    """Run Python with `command` as a child process to its end."""
    with start(*command, **options) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
    return Ran(child.returncode, out, err)
