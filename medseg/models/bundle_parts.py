"""Components of a MONAI bundle's config, argument by argument: its network and its windows.

An allow-list: every argument of a listed class is known by name, or the bundle is refused by that
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medseg.errors import BadModel
from medseg.models.bundle_config import Component, Config
from medseg.models.recipe import is_number

#: What may stand before the name of a class: MONAI's packages, and the modules in them.
HOMES = {
    "network": tuple(
        f"monai.networks.nets.{module}"
        for module in (
            "", "attentionunet.", "basic_unet.", "dynunet.", "mednext.", "segresnet.",
            "segresnet_ds.", "swin_unetr.", "unet.", "unetr.", "vnet.",
        )
    ),
    "transform": tuple(
        f"monai.transforms.{module}"
        for module in (
            "", "compose.", "croppad.dictionary.", "intensity.dictionary.", "io.dictionary.",
            "post.dictionary.", "spatial.dictionary.", "utility.dictionary.",
        )
    ),
    "inferer": ("monai.inferers.", "monai.inferers.inferer."),
}  # fmt: skip
#: Networks -> the channels in and out that they have where the config does not say.
NETWORKS: dict[str, tuple[int | None, int | None]] = {
    "AttentionUnet": (None, None),
    "BasicUNet": (1, 2),
    "DynUNet": (None, None),
    "MedNeXt": (1, 2),
    "SegResNet": (1, 2),
    "SegResNetDS": (1, 2),
    "SwinUNETR": (None, None),
    "UNETR": (None, None),
    "UNet": (None, None),
    "VNet": (1, 1),
}
#: Networks whose dimensions are three unless they say otherwise.
_VOLUMES = ("SegResNet", "SegResNetDS", "BasicUNet", "SwinUNETR", "UNETR", "VNet", "MedNeXt")
_LARGEST = 4096
#: How deep lists of transforms may lie in others.
_MOST_COMPOSED = 8
#: Arguments that change nothing here, whatever they hold; they are not looked at.
_IGNORED = frozenset({"device", "sw_device", "track_meta", "transform"})
#: Arguments that say how MONAI keeps its books, and those of how fast it works.
_BOOKS = frozenset(
    {
        "allow_missing_keys", "image_only", "meta_keys", "orig_meta_keys", "meta_key_postfix",
        "overwriting", "lazy", "data_type", "wrap_sequence", "reader", "ensure_channel_first",
        "simple_keys", "prune_meta_pattern", "prune_meta_sep", "channel_dim", "strict_check",
        "orig_keys", "to_tensor", "output_dtype", "sw_batch_size", "progress", "cpu_thresh",
        "cache_roi_weight_map", "buffer_steps", "buffer_dim", "expanding", "as_tensor_output",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of MONAI by name, and its arguments without those of its channels."""

    name: str
    arguments: dict[str, Any]
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class Inferer:
    """How windows are laid; `whole`: axes along which a window is the whole image."""

    roi: tuple[int, int, int]
    whole: tuple[bool, bool, bool]
    overlap: float | tuple[float, float, float]
    weights: Literal["constant", "gaussian"]
    sigma_scale: tuple[float, float, float]
    padding: str
    padding_value: float


@dataclass(kw_only=True)
class Given:
    """The arguments of one component, each taken by name; what is left over is refused."""

    config: Config
    part: Component
    _taken: set[str] = field(default_factory=set)

    def __call__(self, name: str, default: Any = None) -> Any:
        """The plain value of an argument."""
        self._taken.add(name)
        if name not in self.part.arguments:
            return default
        return self.config.value(self.part.arguments[name], f"{self.part.where}#{name}")

    def leave(self, name: str) -> None:
        """An argument that is read elsewhere."""
        self._taken.add(name)

    def single(self, name: str, default: Any, keys: Sequence[str], key: str) -> Any:
        """The value for one of the component's keys, of which each may have its own."""
        value = self(name, default)
        if isinstance(value, list) and len(value) == len(keys) and keys:
            return value[list(keys).index(key)]
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A truth; "True" and "False" as texts count, as they do in MONAI where they are not
        empty."""
        value = self(name, default)
        if value in ("True", "true"):
            return True
        if type(value) is not bool:
            raise self.no(name, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self(name, default)
        if not is_number(value):
            raise self.no(name, value)
        return float(value)

    def three(self, name: str, default: Any = None) -> tuple[float, float, float]:
        """A finite number for each axis; one stands for all."""
        value = self(name, default)
        several = list(value) if isinstance(value, list | tuple) else [value] * 3
        if len(several) != 3 or not all(map(is_number, several)):
            raise self.no(name, value)
        return float(several[0]), float(several[1]), float(several[2])

    def first_axes(self, name: str) -> list[float | None]:
        """A finite number, or None, for each of three axes; None for those that are not given."""
        value = self(name)
        several = list(value) if isinstance(value, list | tuple) else [value]
        if not all(one is None or is_number(one) for one in several):
            raise self.no(name, value)
        numbers = [None if one is None else float(one) for one in several[:3]]
        return numbers + [None] * (3 - len(numbers))

    def must_be(self, name: str, *wanted: Any) -> None:
        """Raise `BadModel` unless an argument is one of these; the first is what it is if not
        given."""
        value = self(name, wanted[0])
        if not any(value == one and type(value) is type(one) for one in wanted):
            raise self.no(name, value)

    def no(self, name: str, value: Any) -> BadModel:
        """The error for an argument whose value medseg does not know."""
        return self.config.refuse(
            f"{self.part.where}: {self.part.name} has {name} {value!r:.80}, which medseg does not"
            " run"
        )

    def done(self) -> None:
        """Raise `BadModel` for arguments that nobody took; those of MONAI's books must be plain."""
        for name in self.part.arguments:
            if name in self._taken or name in _IGNORED:
                continue
            if name not in _BOOKS:
                raise self.no(name, self.part.arguments[name])
            self(name)


def composed(config: Config, name: str, known: Mapping[str, Any]) -> list[Component]:
    """The transforms of a `Compose` at the top of the config, in their order."""
    raw = config.part(name)
    return [] if raw is None else _components(config, raw, name, known)


def _components(
    config: Config, raw: Any, name: str, known: Mapping[str, Any], depth: int = 0
) -> list[Component]:
    """The transforms that one, or a `Compose` of some, stands for."""
    known_here = {"Compose": None, **known}
    part = config.component(raw, name, known_here, homes=HOMES["transform"])
    if part is None:
        return []
    if part.name != "Compose":
        return [part]
    if depth > _MOST_COMPOSED:
        raise config.refuse(f"{name} is composed of what is composed too often; medseg gives up")
    options = {key: raw for key, raw in part.arguments.items() if key != "transforms"}
    for key in options:
        if key not in ("map_items", "unpack_items", "log_stats", "lazy", "overrides"):
            raise config.refuse(f"{name}: Compose has {key}, which medseg does not know")
        if config.value(options[key], f"{name}#{key}") not in (True, False, None, [], {}):
            raise config.refuse(f"{name}: Compose has {key}, which medseg does not run")
    listed = _listed(config, part.arguments.get("transforms"), f"{name}#transforms")
    return [
        part
        for n, one in enumerate(listed)
        for part in _components(config, one, f"{name}#transforms#{n}", known, depth + 1)
    ]


def _listed(config: Config, raw: Any, where: str, depth: int = 0) -> list[Any]:
    """A list of components: written down, referred to, or several of those added up."""
    raw = config.followed(raw, where)
    if isinstance(raw, list):
        return raw
    if isinstance(raw, str) and raw.startswith("$") and depth < 8:
        parts = raw[1:].split("+")
        if len(parts) > 1 and all(part.strip().startswith("@") for part in parts):
            return [one for p in parts for one in _listed(config, p.strip(), where, depth + 1)]
    raise config.refuse(f"{where} is {raw!r:.80} where a list of transforms is needed")


def keys_of(given: Given) -> list[str]:
    """What of a case a transform is about, as a list. Raises `BadModel` if it does not say."""
    keys = given("keys")
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise given.no("keys", keys)
    return keys


# ---------------------------------------------------------------- the network


def read_network(config: Config) -> Network:
    """The bundle's network. Raises `BadModel` for one that is not on the list."""
    if not config.has("network_def"):
        raise config.refuse("has no network_def, which says what the weights belong to")
    part = config.component(
        config.tree["network_def"], "network_def", NETWORKS, homes=HOMES["network"]
    )
    if part is None:
        raise config.refuse("network_def is disabled; there is no network to run")
    arguments = {
        key: config.value(raw, f"network_def#{key}") for key, raw in part.arguments.items()
    }
    return network_of(part.name, arguments, config.refuse)


def network_of(
    name: str, arguments: Mapping[str, Any], refuse: Callable[[str], BadModel]
) -> Network:
    """A network on the list with plain arguments. Raises what `refuse` makes for others."""
    left = dict(arguments)
    three = left.pop("spatial_dims", 3 if name in _VOLUMES else None)
    if three != 3:
        raise refuse(f"network_def is for {three!r} dimensions; medseg runs models of volumes (3)")
    channels = []
    for key, default in zip(("in_channels", "out_channels"), NETWORKS[name]):
        count = left.pop(key, default)
        if type(count) is not int or not 1 <= count <= _LARGEST:
            raise refuse(f"network_def: {name} has {key} {count!r:.40}, which is no number of them")
        channels.append(count)
    if name == "SwinUNETR":
        left.pop("img_size", None)  # MONAI from 1.5 on has it no more
    for key, value in left.items():
        if not _is_plain(value):
            raise refuse(f"network_def: {name} has {key} {value!r:.80}, which medseg does not know")
    return Network(name=name, arguments=left, inputs=channels[0], outputs=channels[1])


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < 4 and len(value) <= 64 and all(_is_plain(one, depth + 1) for one in value)
    if isinstance(value, dict):
        inner = all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
        return depth < 4 and len(value) <= 16 and inner
    if type(value) is int:
        return abs(value) <= _LARGEST * 4
    return (
        value is None
        or type(value) in (bool, str)
        or (type(value) is float and math.isfinite(value))
    )


# ---------------------------------------------------------------- windows


def read_inferer(config: Config) -> Inferer:
    """How windows are laid. Raises `BadModel` for an inferer that is not on the list."""
    raw = config.part("inferer")
    if raw is None:
        raise config.refuse("has no inferer, which says in which windows the network is run")
    names = ("SlidingWindowInferer", "SlidingWindowInfererAdapt", "SimpleInferer")
    part = config.component(raw, "inferer", names, homes=HOMES["inferer"])
    if part is None:
        raise config.refuse("inferer is disabled; there is no way to run the network")
    given = Given(config=config, part=part)
    if part.name == "SimpleInferer":
        given.done()
        return _inferer((0, 0, 0))
    roi = given.three("roi_size")
    if any(n != int(n) or n > 1024 for n in roi):
        raise given.no("roi_size", list(roi))
    overlap = given.three("overlap", 0.25)
    if not all(0 <= share < 1 for share in overlap):
        raise given.no("overlap", list(overlap))
    given.must_be("mode", "constant", "gaussian")
    given.must_be("padding_mode", "constant", "replicate", "reflect", "circular")
    given.must_be("roi_weight_map", None)
    given.must_be("with_coord", False)
    sigma = given.three("sigma_scale", 0.125)
    if not all(0 < share < 100 for share in sigma):
        raise given.no("sigma_scale", list(sigma))
    inferer = _inferer(
        (int(roi[0]), int(roi[1]), int(roi[2])),
        overlap=overlap[0] if len(set(overlap)) == 1 else overlap,
        weights=given("mode", "constant"),
        sigma_scale=sigma,
        padding=given("padding_mode", "constant"),
        padding_value=given.number("cval", 0.0),
    )
    given.done()
    return inferer


#: What a window counts as before it is known how large an image is.
_NOMINAL = 96


def _inferer(roi: tuple[int, int, int], **more: Any) -> Inferer:
    sizes = [n if n > 0 else _NOMINAL for n in roi]
    plain: dict[str, Any] = {
        "overlap": 0.25,
        "weights": "constant",
        "sigma_scale": (0.125, 0.125, 0.125),
        "padding": "constant",
        "padding_value": 0.0,
    }
    whole = (roi[0] <= 0, roi[1] <= 0, roi[2] <= 0)
    return Inferer(roi=(sizes[0], sizes[1], sizes[2]), whole=whole, **(plain | more))
