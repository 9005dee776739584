"""Intensities that do not mean what their channel's name says: CT not in Hounsfield units, padding
in MR.

CT is scaled by windows that are the same for all scans, so an offset moves every structure out of
them; MR is scaled by each scan's own mean and spread, which one constant value outside the scan
moves. Features that ignore scale, by which outliers are found, are blind to both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Dataset, Finding

#: Names of channels whose values are Hounsfield units. Cone beams are seldom calibrated, so CBCT is
#: none.
_HOUNSFIELD = ("ct", "hu")
#: Names of channels that are clipped to a window, where padding does no harm.
_WINDOWED = (*_HOUNSFIELD, "cbct")
#: What lies below is padding outside the circle of reconstruction (-2000, -3024), not air, in
#: Hounsfield units.
_PADDING_HU = -1500.0
#: Air, and lungs, in Hounsfield units with their noise; so much of a scan must be of it to say that
#: there is air.
_AIR_HU, _AIR_SHARE = (-1200.0, -700.0), 0.001
#: Soft tissue and bone lie so far above air in any CT, whatever the offset.
_TISSUE_ABOVE_AIR = (850.0, 1250.0)
#: (lowest level, share of tissue above it) of a scan that is 1024 higher: its air, with its noise,
#: lies above the first number. A scan cut to the body has fat (about -100) as its lowest level, and
#: little is so much denser than that.
_HIGHER = ((-60.0, 0.02), (-250.0, 0.1))
_SAMPLE = 1 << 17
#: A value at one end is padding if so much of a scan has it and it lies so far from the rest, by
#: the rest's range.
_END_SHARE, _END_GAP = 0.001, 0.5
#: A value among others is padding if so much of a scan has it, and so many times as much as each
#: value near it.
_MODE_SHARE, _MODE_TIMES, _NEAR = 0.1, 5.0, 0.005
#: With fewer values than this an image is drawn, not measured.
_FEW_VALUES = 20


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What a channel of a case says of its units.

    odd: 'higher' or 'lower' than Hounsfield units, 'scaled', or '' where nothing speaks against
    them. low: the lowest level that is no padding. has_air: whether there is air near -1000.
    padding: a value that fills a part of the scan and is none of its intensities, or None.
    """

    case: str
    channel: str
    odd: str = ""
    low: float = 0.0
    has_air: bool = False
    padding: float | None = None


def levels_of(case: str, channel: str, data: NDArray) -> Levels:
    """Of one channel (X, Y, Z) of a case, by its name in the data set."""
    values = data.ravel(order="K")[:: 1 + data.size // _SAMPLE].astype(np.float64)
    values = values[np.isfinite(values)]
    name = channel.strip().lower()
    if len(values) < _FEW_VALUES or values.min() == values.max():
        return Levels(case=case, channel=channel)
    if name in _HOUNSFIELD:
        return _of_ct(case, channel, values, is_byte=data.dtype == np.uint8)
    if name in _WINDOWED:
        return Levels(case=case, channel=channel)
    is_whole = data.dtype.kind in "iub"
    return Levels(case=case, channel=channel, padding=_padding(values, is_whole))


def _of_ct(case: str, channel: str, values: NDArray[np.float64], *, is_byte: bool) -> Levels:
    inside = values[values > _PADDING_HU]
    has_air = float(((values > _AIR_HU[0]) & (values < _AIR_HU[1])).mean()) >= _AIR_SHARE
    low = float(np.percentile(inside, 0.5)) if len(inside) else float(values.min())
    odd = ""
    if _is_scaled(values, is_byte=is_byte):
        odd = "scaled"
    elif _is_lower(values):
        odd = "lower"
    elif not has_air and _is_higher(values, low):
        odd = "higher"
    return Levels(case=case, channel=channel, odd=odd, low=low, has_air=has_air and not odd)


def _is_scaled(values: NDArray[np.float64], *, is_byte: bool) -> bool:
    """Whether values were brought to 0..1 or to bytes."""
    highest = float(values.max())
    return bool(values.min() >= 0) and (highest <= 1.5 or highest == 255 or is_byte)


def _is_lower(values: NDArray[np.float64]) -> bool:
    """Whether air lies near -2000, or nothing is as dense as water."""
    below = values[values <= _PADDING_HU]  # air that is 1024 lower has noise, which padding has not
    if len(below) >= _AIR_SHARE * len(values) and len(np.unique(below)) > _FEW_VALUES:
        return True
    return float(np.percentile(values, 99.5)) < _AIR_HU[1] / 2


def _is_higher(values: NDArray[np.float64], low: float) -> bool:
    """Whether a scan without air near -1000 has it near 0; low: its lowest level."""
    start, stop = (low + above for above in _TISSUE_ABOVE_AIR)
    tissue = float(((values > start) & (values < stop)).mean())
    return any(low > level and tissue >= share for level, share in _HIGHER)


def _padding(values: NDArray[np.float64], is_whole: bool) -> float | None:
    """A constant that is no intensity of the scan; 0 is what scans are usually filled with, and is
    looked after.
    """
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) <= _FEW_VALUES:
        return None
    for end, neighbour, rest in ((0, 1, kinds[1:]), (-1, -2, kinds[:-1])):
        gap = abs(kinds[neighbour] - kinds[end])
        often = counts[end] >= max(2, _END_SHARE * len(values))
        if kinds[end] != 0 and often and gap > _END_GAP * (rest[-1] - rest[0]):
            return float(kinds[end])
    most = int(counts.argmax())
    others = np.delete(kinds, most)
    low, high = np.percentile(values[values != kinds[most]], (1, 99))
    near = np.abs(others - kinds[most]) <= max(_NEAR * (high - low), 3.0 if is_whole else 0.0)
    beside = float(np.delete(counts, most)[near].mean()) if near.any() else 0.0
    if kinds[most] != 0 and counts[most] >= max(_MODE_SHARE * len(values), _MODE_TIMES * beside):
        return float(kinds[most])
    return None


def about_levels(dataset: Dataset, levels: Sequence[Levels]) -> list[Finding]:
    """Warnings of channels that are not what they are called: for each case, or one where all are
    so.
    """
    findings: list[Finding] = []
    for channel in dict.fromkeys(one.channel for one in levels):
        of_channel = [one for one in levels if one.channel == channel]
        findings += _about_units(channel, of_channel)
        findings += _about_padding(channel, of_channel)
    return findings


def _about_units(channel: str, levels: Sequence[Levels]) -> Iterator[Finding]:
    odd = [one for one in levels if one.odd]
    usual = [one.low for one in levels if one.has_air]
    if odd and not usual and len(odd) >= 0.8 * len(levels):
        low = float(np.median([one.low for one in odd]))
        message = (
            f"no scan of the channel {channel} has air near -1000 (the lowest values are about"
            f" {low:.4g}), so the values are not Hounsfield units; training works as long as every"
            " later scan is stored so"
        )
        yield Finding(case="", kind="units", severity="warning", message=message)
        return
    remedy = "convert the scan from its source with slope and intercept, or leave it out"
    for one in odd:
        message = f"{channel}: {_what_is_odd(one, usual)}; {remedy}"
        yield Finding(case=one.case, kind="units", severity="warning", message=message)


def _what_is_odd(levels: Levels, usual: Sequence[float]) -> str:
    """In words; usual: the lowest levels of the scans with air near -1000."""
    if levels.odd == "lower":
        return (
            "air is near -2000 or nothing as dense as water: the values are lower than Hounsfield"
            " units"
        )
    if levels.odd == "scaled":
        return "the values were scaled and are no Hounsfield units"
    above = "higher"
    if usual:
        above = f"about {levels.low - float(np.median(usual)):.0f} higher than in the others"
    return f"air is near {levels.low:.0f} and not near -1000: the values are {above}"


def _about_padding(channel: str, levels: Sequence[Levels]) -> Iterator[Finding]:
    scans = [one for one in levels if one.padding is not None]
    remedy = "it counts into the mean and the spread by which scans are scaled; set it to 0"
    values = sorted({one.padding for one in scans if one.padding is not None})
    if len(scans) > 1 and len(scans) >= 0.8 * len(levels):
        examples = ", ".join(f"{value:.4g}" for value in values[:3]) + (
            " ..." if len(values) > 3 else ""
        )
        message = (
            f"{channel}: {len(scans)} of {len(levels)} scans are filled with one value that is not"
            f" 0 ({examples})"
        )
        yield Finding(case="", kind="padding", severity="warning", message=f"{message}; {remedy}")
        return
    for one in scans:
        message = f"{channel}: a part of the scan is filled with the value {one.padding:.6g}"
        yield Finding(
            case=one.case, kind="padding", severity="warning", message=f"{message}; {remedy}"
        )
