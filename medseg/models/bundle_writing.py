"""A MONAI bundle's configs, written from a model's recipe: step by step the reverse of how
`bundle_steps` and `bundle_ending` read them.

What a bundle cannot say is refused by name. Keys: MONAI's bundle specification, MONAI 1.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from medseg.errors import BadConfig, BadModel
from medseg.models.folder import Checkpoint
from medseg.models.monai_steps import monai_recipe
from medseg.models.spec import ModelSpec
from medseg.models.steps import Crop, Ending, Extent, Range, Space, Standard, StepRecipe, Turn

#: The schema that MONAI's own bundles name.
_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)


def bundle_recipe(spec: ModelSpec) -> tuple[StepRecipe, bool]:
    """A model's way in MONAI's steps, and whether it was trained for exactly that. Raises
    `BadModel` naming what a bundle cannot do."""
    for what, there in {
        "looks for its part of a scan with a coarse model": spec.locate,
        "takes fluid for tissue by intensity": spec.fluid,
        "leaves out windows of air": spec.skip_empty,
    }.items():
        if there:
            raise BadModel(f"the model {spec.name} {what}, which a bundle of MONAI cannot do")
    if isinstance(spec.recipe, StepRecipe):
        _check_steps(spec, spec.recipe)
        return spec.recipe, True
    if spec.recipe is not None:
        raise BadModel(
            f"the model {spec.name} is nnU-Net's, whose resampling and windows MONAI does not have"
        )
    if spec.grid != "scan":
        raise BadModel(
            f"the model {spec.name} sees scans along the world's axes (grid 'world'), which MONAI's"
            " transforms cannot do; train with model.grid=scan, best with model.recipe=monai"
        )
    try:
        return monai_recipe(spec.spacing, spec.intensities, regions=spec.regions), False
    except BadConfig as error:
        raise BadModel(f"the model {spec.name} cannot be a bundle: {error}") from None


def _check_steps(spec: ModelSpec, recipe: StepRecipe) -> None:
    for step in recipe.steps:
        if type(step) not in _STEPS or getattr(step, "channels", None) is not None:
            raise BadModel(
                f"the model {spec.name} changes intensities by '{step.step}' in a way that MONAI's"
                " transforms do not have (it comes from Auto3DSeg)"
            )
    if recipe.ending.parts != 1:
        raise BadModel(f"the model {spec.name} ends in a way that a bundle cannot say")


def bundle_notes(spec: ModelSpec, promised: bool) -> tuple[str, ...]:
    """What a bundle of the model leaves out, for people."""
    left = [step for step in spec.cleanup if _largest_of(step, spec) is None]
    notes = [f"the cleanup step {step['step']} is left out" for step in left]
    if not promised:
        notes.append(
            "medseg lays the model's grid and its windows otherwise, so borders differ; a model"
            " trained with model.recipe=monai gives the same labels in both"
        )
    return tuple(notes)


def _largest_of(step: Mapping[str, Any], spec: ModelSpec) -> list[int] | None:
    """The labels of a cleanup step that MONAI has, too: the largest part of each; else None."""
    plain = step["step"] == "keep_largest" and not step.get("together")
    if not plain or step.get("count", 1) != 1 or step.get("connectivity", 26) != 26:
        return None
    return [int(value) for value in step.get("labels") or spec.classes[1:]]


#: What runs the parts together: nothing of it depends on the model.
_WORKFLOW: dict[str, Any] = {
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {
        "_target_": "DataLoader",
        "dataset": "@dataset",
        "batch_size": 1,
        "shuffle": False,
        "num_workers": 0,
    },
    "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
        "amp": False,
    },
    "initialize": ["$monai.utils.set_determinism(seed=0)"],
    "run": ["$@evaluator.run()"],
}


def inference_config(
    spec: ModelSpec, recipe: StepRecipe, network_def: dict[str, Any], *, has_weights: bool
) -> dict[str, Any]:
    """`inference.json`. network_def: what makes the network; has_weights: they lie beside it, in
    `models/model.pt`."""
    config: dict[str, Any] = {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "/workspace/data",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": _datalist(spec.channels),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network_def,
        "network": "$@network_def.to(@device)",
        "preprocessing": _composed(
            [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                *(_STEPS[type(step)](step) for step in recipe.steps),
                {"_target_": "EnsureTyped", "keys": "image"},
            ]
        ),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [-1 if whole else size for whole, size in zip(recipe.whole, spec.patch)],
            "sw_batch_size": 1,
            "overlap": recipe.overlap
            if isinstance(recipe.overlap, float)
            else list(recipe.overlap),
            "mode": recipe.weights,
            "sigma_scale": list(recipe.sigma_scale),
            "padding_mode": recipe.padding,
            "cval": recipe.padding_value,
        },
        "postprocessing": _composed(_ending(spec, recipe.ending)),
    } | _WORKFLOW
    if has_weights:
        config["checkpointloader"] = {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        }
        config["initialize"] = [*_WORKFLOW["initialize"], "$@checkpointloader(@evaluator)"]
    return config


def _datalist(channels: int) -> str:
    """All scans of a folder; of several channels those that nnU-Net's names put together."""
    if channels == 1:
        return "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))"
    return (
        f"$[[p[:-11] + '%04d.nii.gz' % n for n in range({channels})]"
        " for p in sorted(glob.glob(@dataset_dir + '/*_0000.nii.gz'))]"
    )


def _composed(transforms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": transforms}


def _space(step: Space) -> dict[str, Any]:
    transform = {
        "_target_": "Spacingd",
        "keys": "image",
        "pixdim": [-1.0 if mm is None else mm for mm in step.spacing_mm],
        "mode": "nearest" if step.nearest else "bilinear",
    }
    if step.low_mm is not None:
        transform["min_pixdim"] = list(step.low_mm)
    if step.high_mm is not None:
        transform["max_pixdim"] = list(step.high_mm)
    if step.single:
        transform["dtype"] = "$numpy.float32"
    return transform


#: Step of a recipe -> the transform of MONAI that it is.
_STEPS: dict[type, Callable[[Any], dict[str, Any]]] = {
    Turn: lambda step: {
        "_target_": "Orientationd",
        "keys": "image",
        "axcodes": step.orientation,
        "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
    },
    Space: _space,
    Crop: lambda step: {
        "_target_": "CropForegroundd",
        "keys": "image",
        "source_key": "image",
        "margin": list(step.margin),
        "allow_smaller": not step.beyond,
    },
    Range: lambda step: {
        "_target_": "ScaleIntensityRanged",
        "keys": "image",
        "a_min": step.low,
        "a_max": step.high,
        "b_min": step.to_low,
        "b_max": step.to_high,
        "clip": step.clip,
    },
    Standard: lambda step: {
        "_target_": "NormalizeIntensityd",
        "keys": "image",
        "nonzero": step.nonzero,
        "channel_wise": step.each,
    },
    Extent: lambda step: {
        "_target_": "ScaleIntensityd",
        "keys": "image",
        "minv": step.to_low,
        "maxv": step.to_high,
        "channel_wise": step.each,
    },
}


def _ending(spec: ModelSpec, ending: Ending) -> list[dict[str, Any]]:
    invert = {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": not ending.interpolate,
        "to_tensor": True,
    }
    activation = ending.activation != "none"
    parts = [{"_target_": "Activationsd", "keys": "pred", ending.activation: True}]
    parts = parts if activation else []
    decide, labels = _decision(spec, ending)
    inner = _kept(ending.inner)
    steps = [*parts, invert, *decide] if ending.interpolate else [*parts, *decide, *inner, invert]
    steps += _kept(ending.outer)
    if labels != spec.classes:
        steps.append(
            {
                "_target_": "MapLabelValued",
                "keys": "pred",
                "orig_labels": list(labels),
                "target_labels": list(spec.classes),
            }
        )
    for step in spec.cleanup:
        steps += _kept(_largest_of(step, spec) or ())
    return [
        *steps,
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_ext": ".nii.gz",
            "output_postfix": "trans",
            "output_dtype": "$numpy.uint16" if max(spec.classes) > 255 else "$numpy.uint8",
            "separate_folder": False,
        },
    ]


def _kept(labels: Sequence[int]) -> list[dict[str, Any]]:
    if not labels:
        return []
    return [
        {
            "_target_": "KeepLargestConnectedComponentd",
            "keys": "pred",
            "applied_labels": list(labels),
        }
    ]


def _decision(spec: ModelSpec, ending: Ending) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """How outputs become labels, and the labels that come out of it, background first."""
    if not spec.regions:
        argmax = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
        return [argmax], tuple(range(spec.outputs))
    if ending.threshold != math.ulp(0.0):
        threshold = {"_target_": "AsDiscreted", "keys": "pred", "threshold": ending.threshold}
        decide = [threshold]
    else:
        decide = []
    order = ending.order or tuple(range(spec.outputs))
    text = "0"
    for output, value in zip(order, spec.classes[1:]):  # the last stands outermost, and wins
        text = f"torch.where(x[[{output}]] > 0, {value}, {text})"
    return [
        *decide,
        {"_target_": "Lambdad", "keys": "pred", "func": f"$lambda x: {text}"},
    ], spec.classes


def bundle_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """`metadata.json`, with the keys that MONAI's schema asks for."""
    spec = checkpoint.spec
    names = {label.value: label.name for label in checkpoint.table.labels}
    outputs = spec.classes[spec.regions :]
    channels = spec.channel_names or tuple(f"channel {n + 1}" for n in range(spec.channels))
    is_ct = all(name.strip().lower() in ("ct", "cbct", "hu") for name in channels)
    shared = {
        "type": "image",
        "modality": "CT" if is_ct else "n/a",
        "spatial_shape": list(spec.patch),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
    }
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "written by medseg"},
        "monai_version": _version("monai", "1.6.0"),
        "pytorch_version": _version("torch", "2.0.0").split("+")[0],
        "numpy_version": _version("numpy", "1.26.0"),
        "required_packages_version": {
            "nibabel": _version("nibabel", "5.0.0"),
            "pytorch-ignite": _version("pytorch-ignite", "0.5.0"),
        },
        "supported_apps": {},
        "name": spec.name,
        "task": "segmentation",
        "description": spec.description or "a segmentation model of medseg",
        "authors": str(spec.card.get("authors") or "unknown"),
        "copyright": str(spec.card.get("copyright") or date.today().year),
        "intended_use": str(spec.card.get("intended_use") or "research"),
        "network_data_format": {
            "inputs": {
                "image": shared
                | {
                    "format": "hounsfield" if is_ct else "magnitude",
                    "num_channels": spec.channels,
                    "channel_def": {str(n): name for n, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": shared
                | {
                    "format": "segmentation",
                    "num_channels": spec.outputs,
                    "channel_def": {
                        str(n): names.get(value, f"label {value}") if value else "background"
                        for n, value in enumerate(outputs)
                    },
                }
            },
        },
    }


def _version(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise
