"""nnU-Net's prediction in a few dozen plain lines, straight from its files: what medseg's labels
are compared with.

Whole arrays, one window after the other, no streaming; for plain convolutional U-Nets with instance
norm, without a separate axis, and for scans that need no padding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from making import nnunet as making


def _network(
    state: dict[str, torch.Tensor], arguments: dict[str, Any], x: torch.Tensor
) -> torch.Tensor:
    def unit(x: torch.Tensor, at: str, kernel: Sequence[int], stride: Any) -> torch.Tensor:
        weight, bias = state[f"{at}.conv.weight"], state[f"{at}.conv.bias"]
        x = F.conv3d(x, weight, bias, stride, [k // 2 for k in kernel])
        x = F.instance_norm(
            x, weight=state[f"{at}.norm.weight"], bias=state[f"{at}.norm.bias"], eps=1e-5
        )
        return F.leaky_relu(x, 0.01)

    kernels, strides, stages = (
        arguments["kernel_sizes"],
        arguments["strides"],
        arguments["n_stages"],
    )
    skips = []
    for i in range(stages):
        for j in range(arguments["n_conv_per_stage"][i]):
            x = unit(x, f"encoder.stages.{i}.0.convs.{j}", kernels[i], strides[i] if j == 0 else 1)
        skips.append(x)
    for d in range(stages - 1):
        at = f"decoder.transpconvs.{d}"
        x = F.conv_transpose3d(x, state[f"{at}.weight"], state[f"{at}.bias"], strides[-(d + 1)])
        x = torch.cat((x, skips[-(d + 2)]), 1)
        for j in range(arguments["n_conv_per_stage_decoder"][d]):
            x = unit(x, f"decoder.stages.{d}.convs.{j}", kernels[-(d + 2)], 1)
    at = f"decoder.seg_layers.{stages - 2}"
    return F.conv3d(x, state[f"{at}.weight"], state[f"{at}.bias"])


def _zoom(x: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    factors = [new / old for old, new in zip(x.shape, shape)]
    out = ndimage.zoom(x.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(out, x.min(), x.max())


def slow_labels(folder: Path, scan: Path, *, mirror: Sequence[int] = ()) -> np.ndarray:
    """Labels (I, J, K) of a scan by the model of a folder, all its numbered folds."""
    plan, data = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("plans", "dataset")
    )
    wide, box, whole = _wide_logits(folder, plan, scan, mirror)
    labels = np.zeros(whole, np.uint8)
    if "regions_class_order" in data:
        inside = torch.sigmoid(torch.from_numpy(wide).float()).numpy() > 0.5
        labels[box] = _painted(inside, data["regions_class_order"])
    else:
        labels[box] = wide.argmax(0)
    return labels.transpose(np.argsort(plan["transpose_forward"])).transpose(2, 1, 0)


def slow_mean(folders: Sequence[Path], scan: Path) -> np.ndarray:
    """Labels (I, J, K) of the mean of several models' probabilities, for plans that transpose
    nothing.
    """
    total: Any = 0
    for folder in folders:
        plan, data = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("plans", "dataset")
        )
        wide, box, whole = _wide_logits(folder, plan, scan, ())
        logits = torch.from_numpy(wide).float()
        regions = "regions_class_order" in data
        total = total + (torch.sigmoid(logits) if regions else torch.softmax(logits, 0)).numpy()
    mean = total / np.float32(len(folders))
    labels = np.zeros(whole, np.uint8)
    labels[box] = _painted(mean > 0.5, data["regions_class_order"]) if regions else mean.argmax(0)
    return labels.transpose(2, 1, 0)


def _painted(inside: np.ndarray, values: Sequence[int]) -> np.ndarray:
    labels = np.zeros(inside.shape[1:], np.uint8)
    for one, value in zip(inside, values):
        labels[one] = value
    return labels


@torch.inference_mode()
def _wide_logits(
    folder: Path, plan: Any, scan: Path, mirror: Sequence[int]
) -> tuple[Any, Any, Any]:
    """Logits (K, ...) on the scan's transposed and cropped grid, float16; the box, and the shape
    before it was cropped.
    """
    raw = plan["configurations"]["3d_fullres"]
    image = nib.load(scan)
    order = plan["transpose_forward"]
    x = np.asarray(image.dataobj).astype(np.float32).transpose(2, 1, 0).transpose(order)
    spacing = [[float(s) for s in image.header.get_zooms()[::-1]][axis] for axis in order]
    box = tuple(slice(int(a.min()), int(a.max()) + 1) for a in np.nonzero(x))
    whole, x = x.shape, np.ascontiguousarray(x[box])
    facts = plan["foreground_intensity_properties_per_channel"]["0"]
    if raw["normalization_schemes"][0] == "CTNormalization":
        x = (
            np.clip(x, facts["percentile_00_5"], facts["percentile_99_5"]) - facts["mean"]
        ) / facts["std"]
    else:
        x = (x - x.mean()) / x.std()
    shape = [round(s / t * n) for s, t, n in zip(spacing, raw["spacing"], x.shape)]
    grid = x if list(x.shape) == shape else _zoom(x, shape, 3)
    grid = torch.from_numpy(grid.astype(np.float32))[None]
    patch = raw["patch_size"]
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    smooth = ndimage.gaussian_filter(impulse, [n / 8 for n in patch], mode="constant")
    weights = torch.from_numpy(smooth / (smooth.max() / 10)).half()
    weights[weights == 0] = weights[weights > 0].min()
    starts = []
    for size, length in zip(shape, patch):
        count = int(np.ceil((size - length) / (length * 0.5))) + 1
        starts.append(
            [int(np.round((size - length) / max(1, count - 1) * n)) for n in range(count)]
        )
    total: Any = None
    folds = sorted(folder.glob("fold_[0-9]"))
    for fold in folds:
        saved = torch.load(fold / making.WEIGHTS_ALONE, weights_only=True)
        arguments = raw["architecture"]["arch_kwargs"]
        heads = saved[f"decoder.seg_layers.{arguments['n_stages'] - 2}.bias"].shape[0]
        sums, count = (
            torch.zeros((heads, *shape), dtype=torch.half),
            torch.zeros(shape, dtype=torch.half),
        )
        for at in itertools.product(*starts):
            place = tuple(slice(a, a + n) for a, n in zip(at, patch))
            window = grid[(slice(None), *place)][None].contiguous()
            logits = _network(saved, arguments, window)
            flips = [
                c
                for n in range(1, len(mirror) + 1)
                for c in itertools.combinations([m + 2 for m in mirror], n)
            ]
            for axes in flips:
                logits = logits + _network(saved, arguments, window.flip(axes)).flip(axes)
            logits = logits / (len(flips) + 1)
            sums[(slice(None), *place)] += logits[0] * weights
            count[place] += weights
        mean = sums / count
        total = mean if total is None else total + mean
    logits = (total / len(folds) if len(folds) > 1 else total).numpy()
    wide = np.stack(
        [
            one if one.shape == x.shape else _zoom(one, x.shape, 1).astype(np.float16)
            for one in logits
        ]
    )
    return wide, box, whole
