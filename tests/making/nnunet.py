"""Model folders of nnU-Net v2, made anew: plans old and new, dataset.json, and checkpoints with
numpy's numbers.

Names and shapes follow `dynamic_network_architectures` 0.4 and are written down here a second time,
on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The weights once more without anything else, which PyTorch reads without unpickling.
WEIGHTS_ALONE = "weights_alone.pt"
#: A small plain network: two stages, features 4 and 6.
PLAIN: dict[str, Any] = {
    "n_stages": 2,
    "features_per_stage": [4, 6],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_conv_per_stage": [2, 2],
    "n_conv_per_stage_decoder": [2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
#: A residual one whose last stage keeps the number of features: its shortcut is pooling alone.
RESIDUAL: dict[str, Any] = {
    key: value for key, value in PLAIN.items() if key != "n_conv_per_stage"
} | {
    "n_stages": 3,
    "features_per_stage": [4, 6, 6],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
#: A flat (2d) one.
FLAT: dict[str, Any] = PLAIN | {
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "kernel_sizes": [[3, 3], [3, 3]],
    "strides": [[1, 1], [2, 2]],
}


def plans(arguments: Mapping[str, Any] = PLAIN, **changes: Any) -> dict[str, Any]:
    """A new plan with one configuration, 3d_fullres or 2d; `changes` are of the configuration."""
    flat = len(arguments["strides"][0]) == 2
    kind = "ResidualEncoderUNet" if "n_blocks_per_stage" in arguments else "PlainConvUNet"
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 12] if flat else [16, 12, 20],
        "spacing": [1.0, 1.0] if flat else [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {
            "is_seg": False,
            "order": 3,
            "order_z": 0,
            "force_separate_z": None,
        },
        "resampling_fn_seg_kwargs": {
            "is_seg": True,
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        },
        "resampling_fn_probabilities_kwargs": {"order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": dict(arguments),
        },
    }
    return {
        "dataset_name": "Dataset900_Made",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d" if flat else "3d_fullres": configuration | changes},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 80.0, "std": 40.0, "percentile_00_5": -50.0, "percentile_99_5": 250.0}
        },
    }


def dataset(
    labels: Mapping[str, Any] | None = None, channels: Sequence[str] = ("T1",), **more: Any
) -> dict[str, Any]:
    """A dataset.json."""
    names = {str(number): name for number, name in enumerate(channels)}
    return {
        "channel_names": names,
        "labels": dict(labels or {"background": 0, "liver": 1, "spleen": 2}),
        "numTraining": 9,
        "file_ending": ".nii.gz",
    } | more


def weights(
    arguments: Mapping[str, Any], channels: int, outputs: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights under nnU-Net's names, with the copies that its checkpoints hold."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    strides, kernels = arguments["strides"], arguments["kernel_sizes"]
    features, stages = arguments["features_per_stage"], arguments["n_stages"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * (2 / max(1, int(np.prod(shape[1:])))) ** 0.5

    def unit(at: str, ins: int, outs: int, kernel: Sequence[int], bias: bool = True) -> None:
        entries = {"conv.weight": draw(outs, ins, *kernel)}
        if bias:
            entries["conv.bias"] = 0.1 * torch.randn(outs, generator=random)
        entries["norm.weight"] = 1 + 0.2 * torch.randn(outs, generator=random)
        entries["norm.bias"] = 0.2 * torch.randn(outs, generator=random)
        for key, value in entries.items():
            state[f"{at}.{key}"] = value
            part, name = key.split(".")
            state[f"{at}.all_modules.{int(part == 'norm')}.{name}"] = value

    residual = "n_blocks_per_stage" in arguments
    inputs = channels
    if residual:
        unit("encoder.stem.convs.0", channels, features[0], kernels[0])
        inputs = features[0]
    for i in range(stages):
        for j in range(arguments["n_blocks_per_stage" if residual else "n_conv_per_stage"][i]):
            if not residual:
                unit(f"encoder.stages.{i}.0.convs.{j}", inputs, features[i], kernels[i])
            else:
                at = f"encoder.stages.{i}.blocks.{j}"
                unit(f"{at}.conv1", inputs, features[i], kernels[i])
                unit(f"{at}.conv2", features[i], features[i], kernels[i])
                if inputs != features[i]:
                    strided = j == 0 and any(step != 1 for step in strides[i])
                    unit(
                        f"{at}.skip.{int(strided)}",
                        inputs,
                        features[i],
                        [1] * len(kernels[i]),
                        bias=False,
                    )
            inputs = features[i]
    for d in range(stages - 1):
        below, here = features[-(d + 1)], features[-(d + 2)]
        state[f"decoder.transpconvs.{d}.weight"] = draw(below, here, *strides[-(d + 1)])
        state[f"decoder.transpconvs.{d}.bias"] = 0.1 * torch.randn(here, generator=random)
        for j in range(arguments["n_conv_per_stage_decoder"][d]):
            unit(
                f"decoder.stages.{d}.convs.{j}",
                2 * here if j == 0 else here,
                here,
                kernels[-(d + 2)],
            )
        ones = [1] * len(kernels[0])
        state[f"decoder.seg_layers.{d}.weight"] = 2 * draw(outputs, here, *ones)
        state[f"decoder.seg_layers.{d}.bias"] = 0.1 * torch.randn(outputs, generator=random)
    state |= {f"decoder.{key}": value for key, value in state.items() if key.startswith("encoder.")}
    return state


def bright_weights(
    arguments: Mapping[str, Any], channels: int, outputs: int, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of a plain network that finds the first label where the first channel is 2 standard
    deviations brighter than the mean of a window, and nothing else.
    """
    state = weights(arguments, channels, outputs, seed)
    for key, value in state.items():
        if ".all_modules." in key or key.startswith("decoder.encoder."):
            continue  # the same tensors again
        value.zero_()
        if key.endswith("norm.weight"):
            value.fill_(1)
        if not key.endswith("conv.weight"):
            continue
        middle = tuple(size // 2 for size in value.shape[2:])
        # Behind the features from below lie those of the skip, of which there are as many.
        first = value.shape[1] // 2 if "decoder.stages" in key and ".convs.0." in key else 0
        value[(slice(None), first, *middle)] = 1
    last = f"decoder.seg_layers.{arguments['n_stages'] - 2}"
    state[f"{last}.weight"][1, 0] = 1
    state[f"{last}.bias"][1:] = -100
    state[f"{last}.bias"][1] = -2
    return state


def checkpoint(
    state: Mapping[str, Any], configuration: str = "3d_fullres", **changes: Any
) -> dict[str, Any]:
    """What nnU-Net saves, with numpy's numbers among what was logged."""
    return {
        "network_weights": dict(state),
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.01}],
        },
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": [np.int64(3)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": {"configuration": configuration, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
    } | changes


def write_model(
    folder: Path,
    *,
    plan: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    folds: Sequence[str] = ("0",),
    saved: Mapping[str, Any] | None = None,
    previous: int = 0,
    name: str = "checkpoint_final.pth",
    make_weights: Any = weights,
) -> Path:
    """A model folder; `saved` are changes of the checkpoints. previous: channels that a first stage
    adds."""
    plan, data = plan or plans(), data or dataset()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(data))
    configuration = (saved or {}).get("init_args", {}).get("configuration") or next(
        iter(plan["configurations"])
    )
    raw = plan["configurations"][configuration]
    while "architecture" not in raw and "inherits_from" in raw:
        raw = plan["configurations"][raw["inherits_from"]]
    arguments = raw["architecture"]["arch_kwargs"] if "architecture" in raw else raw["_arguments"]
    several = any(isinstance(value, list) and len(value) > 1 for value in data["labels"].values())
    outputs = len([key for key in data["labels"] if key != "ignore"]) - several
    for fold in folds:
        seed = 100 if fold == "all" else int(fold)
        state = make_weights(arguments, len(data["channel_names"]) + previous, outputs, seed)
        target = folder / f"fold_{fold}"
        target.mkdir()
        torch.save(state, target / WEIGHTS_ALONE)
        torch.save(checkpoint(state, configuration) | dict(saved or {}), target / name)
    return folder
