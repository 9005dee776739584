"""nnU-Net v2's `plans.json` and `dataset.json` as checked data, old and new forms (Isensee et al.
2021).

Everything that decides the labels is read, and whatever this file does not know is refused by its
name: a plan that is half understood would give labels that only look right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medseg.errors import BadFile, BadModel
from medseg.models.nnunet_resampling import read_resampling
from medseg.models.recipe import ChannelScale, Resampling, is_number
from medseg.stream import read_text

#: One whole number an axis.
Three: TypeAlias = tuple[int, int, int]

#: nnU-Net's normalisation -> a recipe's word.
NORMALISATIONS: dict[str, Literal["fixed", "zscore", "range", "bytes", "none"]] = {
    "CTNormalization": "fixed",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "range",
    "RGBTo01Normalization": "bytes",
    "NoNormalization": "none",
}
#: nnU-Net's readers of volumes; those that turn a scan to the nearest RAS first.
READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
#: Settings of the two networks that say how they are trained, or that this file reads elsewhere.
_HARMLESS = frozenset(
    {
        "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage",
        "n_blocks_per_stage", "n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs",
        "dropout_op",
        "dropout_op_kwargs", "nonlin", "nonlin_kwargs", "deep_supervision", "stochastic_depth_p",
    }
)  # fmt: skip
#: Settings that other kinds of networks have, and the values that mean "as the plain one".
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "nonlin_first": (None, False),
    "bottleneck_channels": (None,),
    "squeeze_excitation": (None, False),
    "pool_type": (None, "conv"),
    "pool": (None, "conv"),
}


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A U-Net as `medseg`'s `nnunet` builds it; kernels and strides of 2d networks begin with a
    1."""

    residual: bool
    features: tuple[int, ...]
    kernels: tuple[Three, ...]
    strides: tuple[Three, ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    bias: bool
    norm: Literal["instance", "batch"]
    eps: float
    slope: float


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One configuration of a plan; spatial numbers run along the transposed axes (of k, j, i)."""

    name: str
    dimension: Literal[2, 3]
    patch: Three
    spacing_mm: tuple[float | None, float, float]  # None: the scan's own
    channels: tuple[ChannelScale, ...]
    image: Resampling
    labels: Resampling
    logits: Resampling
    previous_stage: str | None
    network: NetworkPlan


@dataclass(frozen=True, kw_only=True)
class Plans:
    """What holds for all configurations of a plan."""

    path: Path
    name: str
    reader: str
    transpose: Three
    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What `dataset.json` says: channels, and the label value and name of each output.

    values: of labels, background first; of regions in the order in which they are laid over each
    other. foreground: the labels that a cascade hands on.
    """

    channel_names: tuple[str, ...]
    regions: bool
    values: tuple[int, ...]
    names: dict[int, str]
    foreground: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `BadModel` naming the file."""
    try:
        text = read_text(path)
    except BadFile as error:
        raise BadModel(str(error)) from None
    if text.startswith("version https://git-lfs"):
        raise BadModel(
            f"{path}: is a pointer that Git LFS left in place of the file; fetch the file itself"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise BadModel(f"{path}: is not JSON; it is damaged, fetch the model again") from None
    if not isinstance(content, dict):
        raise BadModel(f"{path}: is JSON but not what nnU-Net writes there; fetch the model again")
    return content


def read_plans(path: Path) -> Plans:
    """The plans of a model folder. Raises `BadModel` for what medseg does not know."""
    content = read_json(path)
    manager = content.get("label_manager")
    if manager not in (None, "LabelManager"):
        raise BadModel(
            f"{path}: asks for the label manager {manager!r:.80}, which medseg does not have"
        )
    reader = content.get("image_reader_writer")
    if reader not in READERS:
        raise BadModel(
            f"{path}: its scans are read by {reader!r:.80}, which reads no volumes that medseg"
            " knows"
        )
    forward, backward = (content.get(f"transpose_{way}") for way in ("forward", "backward"))
    if not isinstance(forward, list) or sorted(forward, key=str) != [0, 1, 2]:
        raise BadModel(
            f"{path}: transpose_forward {forward!r:.80} is not an order of the three axes"
        )
    if backward != [forward.index(axis) for axis in range(3)]:
        raise BadModel(
            f"{path}: transpose_backward {backward!r:.80} does not undo transpose_forward"
        )
    if not isinstance(content.get("configurations"), dict):
        raise BadModel(f"{path}: has no configurations; it is not a plan of nnU-Net v2")
    name = str(content.get("plans_name", ""))
    return Plans(
        path=path,
        name=name,
        reader=reader,
        transpose=(forward[0], forward[1], forward[2]),
        content=content,
    )


def configuration(plans: Plans, name: str, channels: int) -> Configuration:
    """One configuration of a plan for so many channels, what it inherits filled in. Raises
    `BadModel`."""
    raw, path = _resolved(plans, name), plans.path
    if raw.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        raise BadModel(
            f"{path}: {name} is prepared by {raw['preprocessor_name']!r:.80}, which medseg does not"
            " have"
        )
    where = f"{path}: {name}"
    patch = _numbers(raw.get("patch_size"), f"{where}: patch_size", whole=True)
    spacing = _numbers(raw.get("spacing"), f"{where}: spacing")
    dimension = len(patch)
    if dimension not in (2, 3) or len(spacing) != dimension:
        raise BadModel(f"{where}: patch_size and spacing need two or three numbers each")
    if max(patch) > 1024 or not all(0.01 < one < 1000 for one in spacing):
        raise BadModel(f"{where}: a patch of {patch} voxels of {spacing} mm is not one of a scan")
    flat = dimension == 2
    return Configuration(
        name=name,
        dimension=2 if flat else 3,
        patch=(
            (1, int(patch[0]), int(patch[1]))
            if flat
            else (int(patch[0]), int(patch[1]), int(patch[2]))
        ),
        spacing_mm=(None, spacing[0], spacing[1]) if flat else (spacing[0], spacing[1], spacing[2]),
        channels=_channels(plans, raw, where, channels),
        image=read_resampling(raw, "data", 3, where=where),
        labels=read_resampling(raw, "seg", 1, where=where),
        logits=read_resampling(raw, "probabilities", 1, where=where),
        previous_stage=_previous(raw, where),
        network=_network(raw, where, dimension),
    )


def _resolved(plans: Plans, name: str) -> dict[str, Any]:
    """A configuration with what it inherits; its own keys win."""
    chain: list[dict[str, Any]] = []
    names: list[str] = []
    current: Any = name
    while current is not None:
        if current in names:
            raise BadModel(
                f"{plans.path}: the configuration {name} inherits from itself; the plan is damaged"
            )
        raw = plans.content["configurations"].get(current) if isinstance(current, str) else None
        if not isinstance(raw, dict):
            available = ", ".join(sorted(plans.content["configurations"]))
            raise BadModel(
                f"{plans.path}: has no configuration {current!r:.80}; it has {available}"
            )
        names.append(current)
        chain.append(raw)
        current = raw.get("inherits_from")
    settings: dict[str, Any] = {}
    for raw in reversed(chain):
        settings |= raw
    return settings


def _previous(raw: Mapping[str, Any], where: str) -> str | None:
    previous = raw.get("previous_stage")
    if previous is not None and not isinstance(previous, str):
        raise BadModel(f"{where}: previous_stage {previous!r:.80} is not a configuration's name")
    return previous


def _channels(
    plans: Plans, raw: Mapping[str, Any], where: str, channels: int
) -> tuple[ChannelScale, ...]:
    schemes, masks = raw.get("normalization_schemes"), raw.get("use_mask_for_norm")
    if not isinstance(schemes, list) or not isinstance(masks, list):
        raise BadModel(f"{where}: does not say how intensities are normalised")
    if len(schemes) != channels or len(masks) != channels:
        raise BadModel(
            f"{where}: normalises {len(schemes)} channels, and dataset.json names {channels}"
        )
    if not all(one is None or type(one) is bool for one in masks):
        raise BadModel(
            f"{where}: use_mask_for_norm {masks!r:.80} is not one truth for each channel"
        )
    properties = plans.content.get("foreground_intensity_properties_per_channel")
    properties = (
        properties or plans.content.get("foreground_intensity_properties_by_modality") or {}
    )
    scales = []
    for number, (scheme, masked) in enumerate(zip(schemes, masks)):
        if not isinstance(scheme, str) or scheme not in NORMALISATIONS:
            raise BadModel(f"{where}: normalises by {scheme!r:.80}, which medseg does not have")
        if scheme == "CTNormalization":
            scales.append(_fixed_scale(properties, number, plans.path))
            continue
        masked = masked is True and scheme == "ZScoreNormalization"
        scales.append(ChannelScale(scheme=NORMALISATIONS[scheme], masked=masked))
    return tuple(scales)


def _fixed_scale(properties: Any, number: int, path: Path) -> ChannelScale:
    """The scale of a channel's intensities in training; properties: of all channels, as stored."""
    what = f"{path}: the intensities of channel {number}"
    facts = properties.get(str(number)) if isinstance(properties, dict) else None
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    values = [facts.get(key) if isinstance(facts, dict) else None for key in keys]
    low, high, mean, sd = _numbers(values, what)
    if not low < high or sd < 0:
        raise BadModel(f"{what} make no range")
    return ChannelScale(scheme="fixed", low=low, high=high, mean=mean, sd=sd)


def _network(raw: Mapping[str, Any], where: str, dimension: int) -> NetworkPlan:
    """The network of old plans (`UNet_class_name`) and of new ones (`architecture`)."""
    new = raw.get("architecture")
    if new is None:
        return _old_network(raw, where, dimension)
    if not isinstance(new, dict) or not isinstance(new.get("arch_kwargs"), dict):
        raise BadModel(f"{where}: its architecture is not what nnU-Net writes there")
    kind = _kind(new.get("network_class_name"), where)
    options = new["arch_kwargs"]
    _check_options(options, where, dimension)
    stages = options.get("n_stages")
    if type(stages) is not int or not 2 <= stages <= 10:
        raise BadModel(f"{where}: a network of {stages!r:.80} stages is not one of nnU-Net's")
    residual = kind == "ResidualEncoderUNet"
    blocks = options.get("n_blocks_per_stage" if residual else "n_conv_per_stage")
    norm = options.get("norm_op_kwargs") or {}
    activation = options.get("nonlin_kwargs") or {}
    bias = options.get("conv_bias", False)
    if not isinstance(activation, dict) or type(bias) is not bool:
        raise BadModel(
            f"{where}: nonlin_kwargs {activation!r:.60} and conv_bias {bias!r:.20} are not what"
            " nnU-Net writes there"
        )
    relu = str(options.get("nonlin", "")).endswith(".ReLU")
    slope = _numbers([activation.get("negative_slope", 0.01)], f"{where}: negative_slope")[0]
    return _checked(
        NetworkPlan(
            residual=residual,
            features=_per_stage(
                options.get("features_per_stage"), stages, f"{where}: features_per_stage"
            ),
            kernels=_axes(options.get("kernel_sizes"), stages, dimension, f"{where}: kernel_sizes"),
            strides=_axes(options.get("strides"), stages, dimension, f"{where}: strides"),
            encoder_blocks=_per_stage(blocks, stages, f"{where}: blocks per stage"),
            decoder_blocks=_per_stage(
                options.get("n_conv_per_stage_decoder"),
                stages - 1,
                f"{where}: n_conv_per_stage_decoder",
            ),
            bias=bias,
            norm="batch" if "BatchNorm" in str(options.get("norm_op")) else "instance",
            eps=_numbers([norm.get("eps", 1e-5)], f"{where}: eps")[0],
            slope=0.0 if relu else slope,
        ),
        where,
    )


def _old_network(raw: Mapping[str, Any], where: str, dimension: int) -> NetworkPlan:
    kind = _kind(raw.get("UNet_class_name"), where)
    blocks = raw.get("n_conv_per_stage_encoder")
    if not isinstance(blocks, list) or not 2 <= len(blocks) <= 10:
        raise BadModel(f"{where}: does not describe a network; n_conv_per_stage_encoder is missing")
    stages = len(blocks)
    base, most = raw.get("UNet_base_num_features"), raw.get("unet_max_num_features")
    if type(base) is not int or type(most) is not int or base < 1:
        raise BadModel(
            f"{where}: UNet_base_num_features and unet_max_num_features are not whole numbers"
        )
    return _checked(
        NetworkPlan(
            residual=kind == "ResidualEncoderUNet",
            features=tuple(min(base * 2**stage, most) for stage in range(stages)),
            kernels=_axes(
                raw.get("conv_kernel_sizes"), stages, dimension, f"{where}: conv_kernel_sizes"
            ),
            strides=_axes(
                raw.get("pool_op_kernel_sizes"), stages, dimension, f"{where}: pool_op_kernel_sizes"
            ),
            encoder_blocks=_per_stage(blocks, stages, f"{where}: n_conv_per_stage_encoder"),
            decoder_blocks=_per_stage(
                raw.get("n_conv_per_stage_decoder"),
                stages - 1,
                f"{where}: n_conv_per_stage_decoder",
            ),
            bias=True,
            norm="instance",
            eps=1e-5,
            slope=0.01,
        ),
        where,
    )


def _kind(name: Any, where: str) -> str:
    """The network's class by the last part of its name, as it moved between modules."""
    kind = str(name).split(".")[-1]
    if kind not in NETWORKS:
        raise BadModel(
            f"{where}: its network is {name!r:.120}; medseg runs {' and '.join(NETWORKS)}"
        )
    return kind


def _check_options(options: Mapping[str, Any], where: str, dimension: int) -> None:
    """Raise `BadModel` for options that make another network of it."""
    stem = options.get("stem_channels")
    features = options.get("features_per_stage")
    first = features[0] if isinstance(features, list) and features else features
    block = str(options.get("block") or "BasicBlockD").split(".")[-1].rstrip("'>")
    if block != "BasicBlockD" or stem not in (None, first):
        raise BadModel(
            f"{where}: a network of {block} with a stem of {stem!r:.80} features is not one medseg"
            " runs"
        )
    for key, value in options.items():
        if key in _HARMLESS or key in ("block", "stem_channels"):
            continue
        if value not in _DEFAULTS.get(key, (None, False)):
            raise BadModel(
                f"{where}: its network has {key} = {value!r:.80}, which medseg does not have"
            )
    _check_layers(options, where, dimension)


def _check_layers(options: Mapping[str, Any], where: str, dimension: int) -> None:
    """Raise `BadModel` for convolutions, norms and activations that medseg does not run."""
    keys = ("conv_op", "norm_op", "nonlin")
    conv, norm, activation = (str(options.get(key, "")).split(".")[-1] for key in keys)
    norms = (f"InstanceNorm{dimension}d", f"BatchNorm{dimension}d")
    if conv != f"Conv{dimension}d" or norm not in norms or activation not in ("LeakyReLU", "ReLU"):
        raise BadModel(
            f"{where}: a network of {conv}, {norm} and {activation} is not one medseg runs"
        )
    rest = options.get("norm_op_kwargs") or {}
    if not isinstance(rest, dict) or not rest.get("affine", norm.startswith("Batch")):
        raise BadModel(f"{where}: its norms have no weights, which medseg does not have")
    if norm.startswith("Instance") and rest.get("track_running_stats"):
        raise BadModel(
            f"{where}: its instance norms keep running statistics, which medseg does not have"
        )


def _checked(network: NetworkPlan, where: str) -> NetworkPlan:
    if network.strides[0] != (1, 1, 1):
        raise BadModel(
            f"{where}: its first stage has strides, so its labels are coarser than its scans"
        )
    if any(kernel % 2 == 0 or kernel > 15 for three in network.kernels for kernel in three):
        raise BadModel(f"{where}: kernels of even or huge size are none of nnU-Net's")
    return network


def _per_stage(numbers: Any, stages: int, what: str) -> tuple[int, ...]:
    """A whole number a stage; one number stands for all."""
    entries = [numbers] * stages if type(numbers) is int else numbers
    if not isinstance(entries, list) or len(entries) != stages:
        raise BadModel(f"{what} {numbers!r:.80} is not {stages} whole numbers")
    if not all(type(one) is int and 1 <= one <= 4096 for one in entries):
        raise BadModel(f"{what} {numbers!r:.80} is not {stages} whole numbers")
    return tuple(entries)


def _axes(numbers: Any, stages: int, dimension: int, what: str) -> tuple[Three, ...]:
    """Whole numbers for each axis of each stage; 2d ones get a 1 along the first axis."""
    entries = [numbers] * stages if type(numbers) is int else numbers
    if not isinstance(entries, list) or len(entries) != stages:
        raise BadModel(f"{what} {numbers!r:.80} is not one entry for each of {stages} stages")
    axes = []
    for entry in entries:
        each = [entry] * dimension if type(entry) is int else entry
        if not isinstance(each, list) or len(each) != dimension:
            raise BadModel(f"{what} {entry!r:.80} is not {dimension} whole numbers")
        if not all(type(one) is int and 1 <= one <= 64 for one in each):
            raise BadModel(f"{what} {entry!r:.80} is not {dimension} whole numbers")
        three = [1, *each] if dimension == 2 else each
        axes.append((three[0], three[1], three[2]))
    return tuple(axes)


def _numbers(values: Any, what: str, *, whole: bool = False) -> list[float]:
    if not isinstance(values, list) or not values:
        raise BadModel(f"{what} {values!r:.80} is not numbers")
    for value in values:
        good = is_number(value)
        if not good or (whole and (type(value) is not int or value < 1)):
            raise BadModel(f"{what} {values!r:.80} is not numbers that make sense there")
    return [value if whole else float(value) for value in values]


def read_outputs(path: Path) -> Outputs:
    """What a model's `dataset.json` says of channels and labels. Raises `BadModel`."""
    content = read_json(path)
    labels = _labels(content.get("labels"), path)
    channel_names = _channel_names(content, path)
    if any(len(group) > 1 for group in labels.values()):
        order = content.get("regions_class_order")
        return _region_outputs(labels, order, channel_names, path=path)
    return _label_outputs(labels, channel_names, path)


def _label_outputs(
    labels: Mapping[str, tuple[int, ...]], channel_names: tuple[str, ...], path: Path
) -> Outputs:
    """The outputs of a model whose labels exclude each other."""
    values = sorted({group[0] for group in labels.values()})
    if values != list(range(len(values))) or len(values) < 2:
        listing = ", ".join(str(value) for value in values[:20])
        raise BadModel(
            f"{path}: its labels are {listing}; nnU-Net numbers its outputs 0, 1, 2 ... without "
            "gaps, so what they mean is uncertain; correct dataset.json"
        )
    by_value: dict[int, list[str]] = {}
    for name, (value,) in labels.items():
        by_value.setdefault(value, []).append(name)
    return Outputs(
        channel_names=channel_names,
        regions=False,
        values=tuple(values),
        names={value: " / ".join(by_value[value]) for value in values[1:]},
        foreground=tuple(values[1:]),
    )


def _region_outputs(
    labels: Mapping[str, tuple[int, ...]],
    order: Any,
    channel_names: tuple[str, ...],
    *,
    path: Path,
) -> Outputs:
    """The outputs of a model of regions that overlap; order: the label of each, as stored."""
    values = sorted({value for group in labels.values() for value in group})
    regions = {name: group for name, group in labels.items() if group != (0,)}
    if not isinstance(order, list) or len(order) != len(regions):
        raise BadModel(
            f"{path}: regions_class_order does not have one label for each of {len(regions)}"
            " regions"
        )
    paint_order = [_whole(value, path) for value in order]
    if len(set(paint_order)) < len(paint_order) or min(paint_order) < 1:
        raise BadModel(
            f"{path}: regions_class_order {order!r:.80} names a label twice, or the background"
        )
    return Outputs(
        channel_names=channel_names,
        regions=True,
        values=(0, *paint_order),
        names=dict(zip(paint_order, regions)),
        foreground=tuple(value for value in values if value),
    )


def _channel_names(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or not names:
        raise BadModel(f"{path}: does not name its channels")
    if sorted(names) != sorted(str(number) for number in range(len(names))) or len(names) > 64:
        raise BadModel(f"{path}: its channels are not numbered 0, 1, 2 ...")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _labels(labels: Any, path: Path) -> dict[str, tuple[int, ...]]:
    """Name to numbers, 'ignore' left out; names and numbers may have changed places, and numbers
    may be text."""
    if not isinstance(labels, dict) or not labels:
        raise BadModel(f"{path}: does not name its labels")
    groups: dict[str, tuple[int, ...]] = {}
    for name, value in _pairs(labels):
        if name == "ignore":
            continue
        group = value if isinstance(value, list) else [value]
        if name in groups or not name.strip() or not group:
            raise BadModel(f"{path}: the label {name!r:.80} is named twice or holds nothing")
        groups[name] = tuple(_whole(one, path) for one in group)
    return groups


def _pairs(labels: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """(name, what it stands for) of each label, also where numbers are the keys."""
    pairs = list(labels.items())
    if all(map(_is_whole, labels)) and all(map(_is_name, labels.values())):
        return [(name, number) for number, name in pairs]
    return pairs


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and not _is_whole(value)


def _is_whole(value: Any) -> bool:
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10
    return type(value) is int or digits


def _whole(value: Any, path: Path) -> int:
    if not _is_whole(value) or not 0 <= int(value) <= 65535:
        raise BadModel(f"{path}: {value!r:.80} is not a label's number")
    return int(value)


def channel_facts(names: Sequence[str]) -> str:
    """The channels of a model in words."""
    return ", ".join(f"{number}: {name}" for number, name in enumerate(names))
