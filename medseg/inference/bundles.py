"""A model as a bundle of MONAI: a folder that `python -m monai.bundle run` runs without medseg.

Its configs are written by `medseg.models.bundle_writing`. A network that MONAI has is named in
them, with its weights beside them; any other is TorchScript, traced in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import BadConfig, BadModel, BadOutput
from medseg.files import atomic_write, private_folder
from medseg.io import read, write
from medseg.models import (
    Checkpoint,
    ModelSpec,
    bundle_metadata,
    bundle_notes,
    bundle_recipe,
    inference_config,
    load_plain,
)
from medseg.packages import __version__

if TYPE_CHECKING:
    from torch import nn

    from medseg.models import StepRecipe
    from medseg.volume import Volume

#: The network in the bundle may differ from medseg's by this share of its outputs' spread.
TOLERANCE = 1e-3
#: medseg's architectures that are MONAI's: the class, and where it keeps the last layer. `{}` is
#: the number of the finest level.
_OF_MONAI = {
    "segresnet": ("SegResNetDS", "up_layers.{}.head."),
    "swin_unetr": ("SwinUNETR", "out.conv.conv."),
    "unetr": ("UNETR", "out.conv.conv."),
    "mednext": ("MedNeXt", "out_0.conv_out."),
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written. scans: how many were compared with MONAI's labels; equal: the share of
    their voxels that is the same, None where MONAI is not installed or no scan was given.

    promised: whether the model was trained for MONAI's way and nothing is left out, so that all
    should be. notes: what the bundle leaves out.
    """

    folder: Path
    scans: int
    equal: float | None
    promised: bool
    notes: tuple[str, ...]


def write_bundle(
    checkpoint: Checkpoint, folder: Path, scans: Sequence[Sequence[Path]] = ()
) -> Written:
    """Write a model to a new folder as a bundle, whole or not at all, and run both on `scans`.

    scans: the files of each case, one for each channel. Raises `BadModel` for what MONAI's
    transforms cannot do, `BadOutput` where the folder holds something, `BadConfig` without MONAI
    where the network needs it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadOutput(f"{folder}: is there already; choose another name for the bundle")
    recipe, promised = bundle_recipe(checkpoint.spec)
    notes = bundle_notes(checkpoint.spec, promised)
    cases = [[read(path) for path in case] for case in scans]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(folder.parent.resolve()) as private:
            place = private / "bundle"
            place.mkdir()
            _write_files(checkpoint, recipe, place)
            shares = [_equal_share(checkpoint, case, place) for case in cases]
            known = [share for share in shares if share is not None]
            equal = float(np.mean(known)) if known else None
            bundle = Written(
                folder=folder,
                scans=len(known),
                equal=equal,
                promised=promised and not notes,
                notes=notes,
            )
            (place / "docs" / "README.md").write_text(
                _readme(checkpoint.spec, bundle), encoding="utf-8", newline="\n"
            )
            if folder.exists():
                folder.rmdir()
            place.replace(folder)
    except OSError as error:
        raise BadOutput(
            f"{folder}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return bundle


def write_torchscript(checkpoint: Checkpoint, path: Path) -> float:
    """Write a network as TorchScript, traced in float32, for patches of the model's size and any
    number of them; the largest difference from PyTorch's logits, as a share of their spread.

    Raises `BadModel` if it cannot be traced or gives other values, `BadOutput` for another suffix.
    """
    if path.suffix.lower() not in (".ts", ".pt"):
        raise BadOutput(f"{path}: TorchScript goes to a name that ends in .ts or .pt")
    network = checkpoint.network()
    script, difference = _traced(network, checkpoint.spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        handle.write(script)
    return difference


# ---------------------------------------------------------------- files


def _write_files(checkpoint: Checkpoint, recipe: StepRecipe, place: Path) -> None:
    spec = checkpoint.spec
    for name in ("configs", "models", "docs"):
        (place / name).mkdir()
    network_def, has_weights = _write_network(checkpoint, place / "models")
    config = inference_config(spec, recipe, network_def, has_weights=has_weights)
    _write_json(place / "configs" / "inference.json", config)
    _write_json(place / "configs" / "metadata.json", bundle_metadata(checkpoint))
    licence = spec.card.get("license")
    (place / "LICENSE").write_text(
        f"{licence}\n" if licence else "The licence of these weights was not told to medseg.\n",
        encoding="utf-8",
        newline="\n",
    )
    if spec.card.get("data_license"):
        (place / "docs" / "data_license.txt").write_text(
            f"{spec.card['data_license']}\n", encoding="utf-8", newline="\n"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8", newline="\n")


def _write_network(checkpoint: Checkpoint, folder: Path) -> tuple[dict[str, Any], bool]:
    """Write the weights; the config's `network_def`, and whether a checkpoint is to be loaded into
    it."""
    import torch

    spec, network = checkpoint.spec, checkpoint.network()
    named = _named(spec, network)
    if named is None:
        (folder / "model.ts").write_bytes(_traced(network, spec)[0])
        return {
            "_target_": "torch.jit.load",
            "f": "$@bundle_root + '/models/model.ts'",
            "map_location": "@device",
        }, False
    name, arguments, state = named
    torch.save(state, folder / "model.pt")
    return {"_target_": name} | arguments, True


def _named(
    spec: ModelSpec, network: nn.Module
) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """A network that MONAI has: its class, its arguments and its weights under MONAI's names; None
    for any other."""
    channels = {"spatial_dims": 3, "in_channels": spec.channels, "out_channels": spec.outputs}
    own = network.state_dict()
    if spec.architecture == "bundle":
        name, arguments = spec.options["network"], dict(spec.options["arguments"])
        head = ""
    elif spec.architecture in _OF_MONAI:
        name, head = _OF_MONAI[spec.architecture]
        arguments = dict(network.network.arguments)  # type: ignore[union-attr, arg-type]
        head = head.format(len(arguments.get("blocks_down", ())) - 2)
    else:
        return None
    import monai.networks.nets as networks

    arguments = {key: _plain(value) for key, value in arguments.items() if key not in channels}
    built: nn.Module = getattr(networks, name)(**arguments, **channels)
    state = built.state_dict()
    for key, value in state.items():
        source = key.replace(head, "head.") if head and key.startswith(head) else f"network.{key}"
        if source in own:  # others are constants, or parts that never run
            weight = own[source]
            state[key] = weight if weight.shape == value.shape else weight.transpose(0, 1)
    built.load_state_dict(state)
    _check_equal(built, network, spec)
    return name, channels | arguments, {key: value.clone() for key, value in state.items()}


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _traced(network: nn.Module, spec: ModelSpec) -> tuple[bytes, float]:
    """A network as the bytes of a TorchScript file, and how far it is from the network."""
    import io
    import warnings

    import torch

    patches = _patches(spec, count=2)
    try:
        with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns of every size that it keeps
            script = torch.jit.trace(network, patches, check_trace=False)
            file = io.BytesIO()
            torch.jit.save(script, file)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise BadModel(
            f"the architecture '{spec.architecture}' of {spec.name} cannot be traced: {first}"
        ) from None
    return file.getvalue(), _check_equal(script, network, spec)


def _patches(spec: ModelSpec, count: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, spec.channels, *spec.patch, generator=generator)


def _check_equal(other: Any, network: nn.Module, spec: ModelSpec) -> float:
    """The largest difference of two networks' logits as a share of their spread. Raises `BadModel`
    where it is more than rounding."""
    import torch

    patches = _patches(spec, count=1)
    with torch.inference_mode():
        expected, answer = network.eval()(patches), other.eval()(patches)
    answer = answer if isinstance(answer, torch.Tensor) else answer[0]
    spread = float(expected.max() - expected.min()) or 1.0
    difference = float((expected - answer).abs().max()) / spread
    if not difference <= TOLERANCE:
        raise BadModel(
            f"the network of {spec.name} gives other values outside of medseg (they differ by"
            f" {difference:.1%} of their spread), so it was not written"
        )
    return difference


# ---------------------------------------------------------------- both beside each other


def _equal_share(checkpoint: Checkpoint, case: Sequence[Volume], place: Path) -> float | None:
    """The share of voxels to which MONAI, by the written config, gives the label that medseg gives
    in float32; None where MONAI is not installed."""
    if find_spec("monai") is None:
        return None
    from medseg.inference.segmentation import segment
    from medseg.inference.settings import Settings

    if len(case) != checkpoint.spec.channels:
        raise BadConfig(
            f"a scan to compare has {len(case)} channels and the model takes"
            f" {checkpoint.spec.channels}; give a file for each, joined by commas"
        )
    settings = Settings(precision="fp32", tta=False, device="cpu")
    own = segment(list(case), [checkpoint], settings).labels.data
    other = _by_monai(case, place)
    return float((np.asarray(own).astype(np.int64) == other).mean())


def _by_monai(case: Sequence[Volume], bundle: Path) -> np.ndarray:
    """Labels (I, J, K) that MONAI's own transforms and inferer make by the bundle's config."""
    import torch
    from monai.bundle import ConfigParser

    with private_folder() as scratch:
        paths = [str(scratch / f"scan_{n:04d}.nii.gz") for n in range(len(case))]
        for volume, path in zip(case, paths):
            write(volume, Path(path))
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / "inference.json"))
        parser["bundle_root"], parser["device"] = str(bundle), torch.device("cpu")
        steps = parser["postprocessing"]["transforms"]
        parser["postprocessing"]["transforms"] = [
            step for step in steps if step["_target_"] != "SaveImaged"
        ]
        image = paths if len(paths) > 1 else paths[0]
        item = parser.get_parsed_content("preprocessing")({"image": image})
        network = parser.get_parsed_content("network").eval()
        if "checkpointloader" in parser.config:
            weights = load_plain(bundle / "models" / "model.pt")
            network.load_state_dict(weights)
        with torch.inference_mode():
            pred = parser.get_parsed_content("inferer")(item["image"][None], network)
        result = parser.get_parsed_content("postprocessing")(
            {"image": item["image"], "pred": pred[0]}
        )
        return np.asarray(result["pred"])[0].astype(np.int64)


def _readme(spec: ModelSpec, written: Written) -> str:
    if written.equal is None:
        compared = "The bundle was not run beside medseg when it was written."
    else:
        scans = "one scan" if written.scans == 1 else f"{written.scans} scans"
        compared = (
            f"On {scans} {written.equal:.4%} of the voxels had the same label as with"
            " `medseg infer --precision fp32`."
        )
    notes = "".join(f"- {note}\n" for note in written.notes)
    return (
        f"# {spec.name}\n\n{spec.description}\n\nWritten by medseg {__version__}.\n\n{compared}\n\n"
        f"{notes}\n## Run it\n\n```sh\npython -m monai.bundle run run --bundle_root . \\\n"
        "    --config_file configs/inference.json --meta_file configs/metadata.json \\\n"
        "    --dataset_dir SCANS --output_dir LABELS\n```\n"
    )
