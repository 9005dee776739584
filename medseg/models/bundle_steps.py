"""The transforms before a MONAI bundle's network as steps of a recipe: an allow-list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from medseg.models.bundle_config import Config
from medseg.models.bundle_parts import Given, composed, keys_of
from medseg.models.steps import Crop, Extent, Range, Space, Standard, Turn


def read_steps(config: Config) -> tuple[Any, ...]:
    """The steps before the network. Raises `BadModel` for a transform that is not on the list."""
    if config.part("preprocessing") is None:
        raise config.refuse("has no preprocessing, which says what the network sees of a scan")
    steps: list[Any] = []
    key: str | None = None
    for part in composed(config, "preprocessing", BEFORE):
        given = Given(config=config, part=part)
        keys = keys_of(given)
        if key is None:
            key = keys[0]
        if key not in keys:
            raise config.refuse(
                f"{part.where}: {part.name} is about {', '.join(keys)}, and the scan is {key}"
            )
        steps += BEFORE[part.name](given, keys, key)
        given.done()
    crops = [step for step in steps if isinstance(step, Crop)]
    if len(crops) > 1:  # what MONAI brings back then is not known
        raise config.refuse("crops to the foreground twice, and medseg does so once")
    return tuple(steps)


def _nothing(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    dtype = given.single("dtype", None, keys, key=key)
    if dtype not in (None, "float32", "float64"):  # others would round what was scaled
        raise given.no("dtype", dtype)
    return []


def _orientation(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    given.must_be("as_closest_canonical", False, True)
    letters = "RAS" if given("as_closest_canonical", False) else given("axcodes")
    places = ["RL", "AP", "SI"]
    ends = letters if isinstance(letters, str) else ""
    kinds = sorted(n for letter in ends for n, pair in enumerate(places) if letter in pair)
    if kinds != [0, 1, 2]:
        raise given.no("axcodes", letters)
    labels = given("labels")
    if labels not in (None, [["L", "R"], ["P", "A"], ["I", "S"]]):
        raise given.no("labels", labels)
    return [Turn(orientation=ends)]


def _spacing(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    pixdim = given("pixdim")
    entries = pixdim if isinstance(pixdim, list) else [pixdim]
    asked = [mm for mm in given.first_axes("pixdim") if mm is not None]
    millimetres = asked + asked[-1:] * (3 - len(asked))  # of fewer the last counts again
    wrong = any(mm > 0 and not 0.01 < mm < 1000 for mm in millimetres)
    if not asked or None in entries or wrong:
        raise given.no("pixdim", pixdim)
    limits = _limits(given, millimetres)
    mode = given.single("mode", "bilinear", keys, key=key)
    if mode not in ("bilinear", "nearest"):
        raise given.no("mode", mode)
    for name, default in (
        ("diagonal", False),
        ("padding_mode", "border"),
        ("align_corners", False),
        ("scale_extent", False),
        ("recompute_affine", False),
        ("ensure_same_shape", True),
    ):
        value = given.single(name, default, keys, key=key)
        if value != default:
            raise given.no(name, value)
    dtype = given.single("dtype", "float64", keys, key=key)
    if dtype not in ("float64", "float32", None):
        raise given.no("dtype", dtype)
    spacing = [None if mm <= 0 else mm for mm in millimetres]
    return [
        Space(
            spacing_mm=(spacing[0], spacing[1], spacing[2]),
            nearest=mode == "nearest",
            single=dtype != "float64",
            **limits,
        )
    ]


def _limits(given: Given, millimetres: Sequence[float]) -> dict[str, Any]:
    """Between which spacings an axis stays as it is; of an axis without a limit its new one."""
    least, most = given.first_axes("min_pixdim"), given.first_axes("max_pixdim")
    for low, high in zip(least, most):
        if low is not None and high is not None and not 0 <= low <= high:
            raise given.no("min_pixdim", given("min_pixdim"))
    limits = {}
    for name, ends in (("low_mm", least), ("high_mm", most)):
        if any(end is not None for end in ends):
            full = [mm if end is None else end for end, mm in zip(ends, millimetres)]
            limits[name] = tuple(min(max(mm, 0.011), 999.0) for mm in full)
    return limits


def _crop(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    if given("source_key", key) != key:
        raise given.no("source_key", given("source_key"))
    given.must_be("select_fn", None)
    given.must_be("channel_indices", None)
    given.must_be("k_divisible", 1)
    given.must_be("mode", "constant")
    given.must_be("start_coord_key", "foreground_start_coord", None)
    given.must_be("end_coord_key", "foreground_end_coord", None)
    margin = given.three("margin", 0)
    if any(n < 0 or n != int(n) or n > 1024 for n in margin):
        raise given.no("margin", list(margin))
    a, b, c = (int(n) for n in margin)
    return [Crop(margin=(a, b, c), beyond=not given.flag("allow_smaller", False))]


def _range(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    _check_float32(given)
    low, high = given.number("a_min"), given.number("a_max")
    if low == high:
        raise given.no("a_max", high)
    clip = given.flag("clip", False)
    open_ended = given("b_min") is None and given("b_max") is None and not clip
    ends = [0.0, 1.0] if open_ended else [given.number(name) for name in ("b_min", "b_max")]
    return [Range(low=low, high=high, to_low=ends[0], to_high=ends[1], clip=clip)]


def _standard(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    _check_float32(given)
    given.must_be("subtrahend", None)
    given.must_be("divisor", None)
    nonzero, each = given.flag("nonzero", False), given.flag("channel_wise", False)
    return [Standard(nonzero=nonzero, each=each)]


def _extent(given: Given, keys: Sequence[str], key: str) -> list[Any]:
    _check_float32(given)
    given.must_be("factor", None)
    each = given.flag("channel_wise", False)
    return [Extent(to_low=given.number("minv", 0), to_high=given.number("maxv", 1), each=each)]


def _check_float32(given: Given) -> None:
    given.must_be("dtype", "float32", None)


#: Transform -> the steps of a recipe that it stands for.
BEFORE: dict[str, Callable[[Given, Sequence[str], str], list[Any]]] = {
    "LoadImaged": _nothing,
    "EnsureChannelFirstd": _nothing,
    "EnsureTyped": _nothing,
    "CastToTyped": _nothing,
    "ToDeviced": _nothing,
    "Orientationd": _orientation,
    "Spacingd": _spacing,
    "CropForegroundd": _crop,
    "ScaleIntensityRanged": _range,
    "NormalizeIntensityd": _standard,
    "ScaleIntensityd": _extent,
}
