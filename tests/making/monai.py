"""Models of MONAI made anew, and what MONAI itself makes of a scan with them: bundles, and
checkpoints of Auto3DSeg.

The references are MONAI's own transforms, networks and inferers, put together in the order in which
a bundle's config names them, and in that of the Slicer extension MONAIAuto3DSeg.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

#: Windows, resolution and network of the checkpoints that are made.
AUTO3DSEG: dict[str, Any] = {
    "normalize_mode": "meanstd",
    "intensity_bounds": [-100.0, 300.0],
    "roi_size": [24, 24, 16],
    "resample_resolution": [1.5, 1.5, 2.0],
    "orientation_ras": False,
    "crop_foreground": True,
    "sigmoid": False,
    "extra_modalities": {},
}
NETWORK: dict[str, Any] = {
    "_target_": "SegResNetDS",
    "init_filters": 8,
    "blocks_down": [1, 1, 2],
    "norm": "INSTANCE",
    "in_channels": 1,
    "out_channels": 3,
    "dsdepth": 2,
}
#: Columns of the extension's tables of labels.
COLUMNS = ["LabelValue", "Name"] + [
    f"{sequence}.{part}"
    for sequence in (
        "SegmentedPropertyCategoryCodeSequence",
        "SegmentedPropertyTypeCodeSequence",
        "SegmentedPropertyTypeModifierCodeSequence",
        "AnatomicRegionSequence",
        "AnatomicRegionModifierSequence",
    )
    for part in ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")
]


def write_scan(
    path: Path,
    shape: tuple[int, int, int] = (31, 28, 20),
    spacing: Sequence[float] = (1.1, 0.9, 2.6),
    *,
    seed: int = 0,
    offset: float = 40.0,
    turn: NDArray[np.float64] | None = None,
) -> Path:
    """Smooth noise around `offset`, with a border of zeros, stored along L, P, S or as `turn` (3,
    3) says."""
    random = np.random.default_rng(seed)
    inner = random.normal(size=[n - 4 for n in shape])
    for _ in range(2):
        for axis in range(3):
            inner = (np.roll(inner, 1, axis) + inner + np.roll(inner, -1, axis)) / 1.7
    data = np.zeros(shape)
    data[2:-2, 1:-3, 2:-2] = offset + 60 * inner
    affine = np.eye(4)
    affine[:3, :3] = (np.diag([-1.0, -1.0, 1.0]) if turn is None else turn) @ np.diag(spacing)
    affine[:3, 3] = (30, 20, -10)
    nib.Nifti1Image(data.astype(np.int16), affine).to_filename(path)
    return path


def briefly_trained(network: nn.Module, channels: int, patch: Sequence[int], steps: int) -> None:
    """Fit a network for some steps to brighter and darker parts of noise."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        x = torch.randn(2, channels, *patch, generator=random)
        for _ in range(2):
            x = nn.functional.avg_pool3d(x, 3, 1, 1) * 1.7
        outputs = network(x)
        logits = outputs[0] if isinstance(outputs, list | tuple) else outputs
        levels = [-0.3 + 0.6 * k / max(1, logits.shape[1] - 2) for k in range(logits.shape[1] - 1)]
        target = sum((x[:, 0] > level).long() for level in levels)
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def write_auto3dseg(
    folder: Path, *, steps: int = 0, seed: int = 0, network: Mapping[str, Any] = {}, **config: Any
) -> Path:
    """A folder with `model.pt` and `labels.csv`; weights are random, or trained for some steps."""
    from monai.networks.nets import SegResNetDS

    folder.mkdir(parents=True, exist_ok=True)
    arguments = NETWORK | dict(network)
    torch.manual_seed(seed)
    made = SegResNetDS(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in arguments.items()
            if key != "_target_"
        }
    )
    settings = AUTO3DSEG | config | {"network": arguments}
    if steps:
        briefly_trained(made, arguments["in_channels"], settings["roi_size"], steps)
    content = {
        "epoch": 3,
        "best_metric": 0.5,
        "state_dict": made.state_dict(),
        "config": settings,
    }
    torch.save(content, folder / "model.pt")
    count = arguments["out_channels"] - (not settings["sigmoid"])
    write_table(folder / "labels.csv", [f"Part {n}" for n in range(1, count + 1)])
    return folder


def write_table(path: Path, names: Sequence[str]) -> None:
    """A table as the extension's models have it; codes are those of organs."""
    organs = [("10200004", "Liver"), ("78961009", "Spleen"), ("64033007", "Kidney")]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for value, name in enumerate(names, 1):
            code = organs[value % len(organs)]
            parts = ["SCT", "123037004", "Anatomical Structure", "SCT", *code]
            parts += ["SCT", "7771000", "Left", "SCT", "818983003", "Abdomen", "", "", ""]
            rows.writerow([value, name, *parts])


def auto3dseg_labels(folder: Path, scans: Sequence[Path]) -> NDArray[np.uint8]:
    """What MONAI makes of the scans of a case with a checkpoint, in the extension's order of steps.

    Overlapping regions are laid over each other in the order of the outputs.
    """
    import monai.transforms as transforms
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import SegResNetDS

    content = torch.load(folder / "model.pt", weights_only=True)
    config = content["config"]
    arguments = {key: value for key, value in config["network"].items() if key != "_target_"}
    network = SegResNetDS(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    )
    network.load_state_dict(content["state_dict"])
    network.eval()
    keys = [f"image{n}" for n in range(len(scans))]
    modes = [config["normalize_mode"], *config["extra_modalities"].values()]
    steps: list[Any] = [transforms.LoadImaged(keys), transforms.EnsureChannelFirstd(keys)]
    for key, mode in zip(keys, modes):
        steps += _scaling(key, mode, config["intensity_bounds"])
    steps.append(transforms.ConcatItemsd(keys, name="image", dim=0))
    if config["orientation_ras"]:
        steps.append(transforms.Orientationd("image", axcodes="RAS"))
    if config["crop_foreground"]:
        steps.append(
            transforms.CropForegroundd("image", source_key="image", margin=10, allow_smaller=True)
        )
    resolution = np.array(config["resample_resolution"])
    steps.append(
        transforms.Spacingd(
            "image",
            pixdim=resolution.tolist(),
            mode="bilinear",
            min_pixdim=(resolution * 0.75).tolist(),
            max_pixdim=(resolution * 1.25).tolist(),
        )
    )
    before = transforms.Compose(steps)
    data = before({key: str(scan) for key, scan in zip(keys, scans)})
    inferer = SlidingWindowInferer(
        roi_size=config["roi_size"], sw_batch_size=1, overlap=0.625, mode="gaussian"
    )
    with torch.no_grad():
        logits = inferer(data["image"][None].as_tensor(), network)[0]
    if config["sigmoid"]:
        found = (logits.sigmoid() >= 0.5).float()
    else:
        found = logits.softmax(0).argmax(0, keepdim=True).float()
    data["pred"] = transforms.ToTensor(track_meta=True)(found)
    after = transforms.Invertd("pred", transform=before, orig_keys="image", nearest_interp=True)
    back = np.asarray(after(data)["pred"])
    if not config["sigmoid"]:
        return back[0].astype(np.uint8)
    labels = np.zeros(back.shape[1:], np.uint8)
    for value, mask in enumerate(back, 1):
        labels[mask > 0] = value
    return labels


def _scaling(key: str, mode: str, bounds: Sequence[float]) -> list[Any]:
    import monai.transforms as transforms

    if mode in ("range", "ct"):
        return [
            transforms.ScaleIntensityRanged(
                key, a_min=bounds[0], a_max=bounds[1], b_min=-1, b_max=1, clip=False
            ),
            transforms.Lambdad(key, func=torch.sigmoid),
        ]
    if mode in ("meanstd", "mri", "meanstdtanh"):
        found = [transforms.NormalizeIntensityd(key, nonzero=True, channel_wise=True)]
        if mode == "meanstdtanh":
            found.append(transforms.Lambdad(key, func=lambda x: 3 * torch.tanh(x / 3)))
        return found
    if mode == "pet":
        return [transforms.Lambdad(key, func=lambda x: torch.sigmoid((x - x.min()) / x.std()))]
    return []


# ---------------------------------------------------------------- bundles


def config(
    network: Mapping[str, Any] | None = None,
    before: Sequence[Mapping[str, Any]] | None = None,
    inferer: Mapping[str, Any] | None = None,
    after: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The config of a bundle as the zoo writes them, its parts by default of the plainest kind."""
    return {
        "imports": ["$import os"],
        "bundle_root": "/workspace/bundle",
        "image_key": "image",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network or UNET,
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "@image_key"},
                {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
                *(BEFORE if before is None else before),
            ],
        },
        "inferer": inferer or INFERER,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": list(AFTER if after is None else after),
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$import_nothing()"],
    } | more


UNET: dict[str, Any] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [8, 12],
    "strides": [2],
    "num_res_units": 1,
    "norm": "batch",
}
BEFORE: list[dict[str, Any]] = [
    {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
    {
        "_target_": "Spacingd",
        "keys": "@image_key",
        "pixdim": [1.5, 1.5, 2.0],
        "mode": "bilinear",
    },
    {"_target_": "NormalizeIntensityd", "keys": "@image_key", "nonzero": True},
]
INFERER: dict[str, Any] = {
    "_target_": "SlidingWindowInferer",
    "roi_size": [16, 16, 16],
    "sw_batch_size": 2,
    "overlap": 0.5,
}
INVERT: dict[str, Any] = {
    "_target_": "Invertd",
    "keys": "pred",
    "transform": "@preprocessing",
    "orig_keys": "@image_key",
    "nearest_interp": False,
    "to_tensor": True,
}
SOFTMAX: dict[str, Any] = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
SIGMOID: dict[str, Any] = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ARGMAX: dict[str, Any] = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
THRESHOLD: dict[str, Any] = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
AFTER: list[dict[str, Any]] = [
    SOFTMAX,
    INVERT,
    ARGMAX,
    {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
]


def write_bundle(
    folder: Path,
    content: Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    steps: int = 0,
    seed: int = 0,
    half: bool = False,
) -> Path:
    """A bundle with random weights, or with those of some steps of training."""
    content = config() if content is None else content
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(content))
    network = built(content["network_def"], seed)
    channels = content["network_def"].get("in_channels", 1)
    if steps:
        briefly_trained(network, channels, (16, 16, 16), steps)
    outputs = content["network_def"].get("out_channels", 2)
    named = {str(n): f"part {n}" if n else "background" for n in range(outputs)}
    pred = {"channel_def": dict(names or named), "num_channels": outputs}
    image = {"channel_def": {str(n): f"image {n}" for n in range(channels)}}
    metadata = {
        "name": "A made bundle",
        "version": "0.1.0",
        "description": "weights that mean nothing",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    (folder / "docs" / "data_license.txt").write_text("CC BY 4.0\n")
    state = network.state_dict()
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": state}, folder / "models" / "model.pt")
    return folder


def built(network_def: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A network of MONAI from a bundle's network_def, with random weights and norms that do
    something."""
    import monai.networks.nets as networks

    arguments = {key: value for key, value in network_def.items() if key != "_target_"}
    torch.manual_seed(seed)
    made: nn.Module = getattr(networks, network_def["_target_"].split(".")[-1])(**arguments)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
    return made.eval()


def bundle_labels(folder: Path, scans: Sequence[Path]) -> NDArray[np.uint8]:
    """What MONAI makes of the scans of a case with a bundle, by its own `ConfigParser`, step by
    step."""
    from monai.bundle import ConfigParser

    content = json.loads((folder / "configs" / "inference.json").read_text())
    content["bundle_root"] = str(folder)
    content["device"] = "$torch.device('cpu')"
    content["postprocessing"]["transforms"] = [
        one for one in content["postprocessing"]["transforms"] if one["_target_"] != "SaveImaged"
    ]
    parser = ConfigParser(content)
    parser.parse()
    network = parser.get_parsed_content("network_def").eval()
    state = torch.load(folder / "models" / "model.pt", weights_only=True)["model"]
    network.load_state_dict(state)
    before = parser.get_parsed_content("preprocessing")
    data = before({"image": [str(s) for s in scans] if len(scans) > 1 else str(scans[0])})
    with torch.no_grad():
        outputs = parser.get_parsed_content("inferer")(data["image"][None].as_tensor(), network)
    from monai.data import MetaTensor
    from monai.transforms import utils

    data["pred"] = MetaTensor(outputs[0])
    after = parser.get_parsed_content("postprocessing")
    measure = SimpleNamespace(label=_parts)  # skimage's, of which MONAI uses nothing else
    with mock.patch.multiple(utils, measure=measure, has_measure=True):
        found = np.asarray(after(data)["pred"])
    if len(found) == 1:
        return found[0].astype(np.uint8)
    labels = np.zeros(found.shape[1:], np.uint8)
    for value, mask in enumerate(found, 1):
        labels[mask > 0] = value
    return labels


def _parts(mask: NDArray[Any], connectivity: None, return_num: bool) -> tuple[NDArray[Any], int]:
    """Connected parts over corners, numbered, as `skimage.measure.label` finds them."""
    from scipy import ndimage

    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts, int(count)
