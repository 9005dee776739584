"""A training config beside label maps of nested ellipsoids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from making import networks as tiny

#: A network and a run so small that a step takes milliseconds.
SMALL: dict[str, Any] = {
    "train.steps": 40,
    "train.warmup": 4,
    "train.learning_rate": 0.01,
    "train.log_every": 4,
    "train.validate_every": 20,
    "train.validate_samples": 1,
    "train.checkpoint_every": 5,
    "train.precision": "fp32",
    "model.patch": [16, 16, 16],
    "model.options": {
        "features": [8, 16],
        "encoder_blocks": [1, 1],
        "decoder_blocks": [1],
        "deep_supervision": True,
    },
}
STEPS = 24
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "data": "maps",
    "hold_out": ["c.nii.gz"],
    "labels": "labels.csv",
    "model": {
        "name": "unet",
        "options": tiny.UNET_OPTIONS | {"deep_supervision": True},
        "patch": [16, 16, 16],
        "spacing_mm": 3.0,
    },
    "train": {
        "steps": STEPS,
        "learning_rate": 0.01,
        "warmup": 2,
        "decay": 6,
        "ema": 0.5,
        "seed": 5,
        "precision": "fp32",
        "checkpoint_every": 3,
        "log_every": 2,
        "validate_every": 8,
        "validate_samples": 2,
    },
    "synth": {
        "outside": [511, 515],
        "mirror": {3: 42},
        "rotation_degrees": 5,
        "offset_mm": 2.0,
        "anywhere": 0.0,
    },
}


def make_config(folder: Path, **changes: Any) -> Path:
    """A training config beside three label maps of nested ellipsoids."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "maps").mkdir(exist_ok=True)
    for seed, name in enumerate(("a", "b", "c")):
        tiny.save_nifti(folder / "maps" / f"{name}.nii.gz", tiny.head(seed=seed), tiny.affine_of())
    tiny.TABLE.write(folder / "labels.csv")
    content = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        group, _, key = dotted.partition("__")
        if key:
            content[group][key] = value
        else:
            content[group] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def settings(**changes: Any) -> list[str]:
    """--set options: `SMALL` with changes, dots written as __."""
    content = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        part for key, value in content.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
