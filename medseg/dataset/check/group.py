"""What only the other cases can tell: the same scan under two names, mirrored cases, cases unlike
all others.

Every case is reduced to a `Portrait`: thumbnails along RAS, and numbers that do not depend on the
scale of intensities. Nothing here has a fixed idea of how a scan looks; a case is odd only by
comparison, and where the group itself does not agree (a symmetric organ has no handedness, scans of
ten scanners have no common brightness) nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Dataset, Finding
from medseg.dataset.check.duplicates import duplicates
from medseg.dataset.check.handedness import mirrored
from medseg.dataset.check.likeness import MIN_GROUP, likeness, spread_of, standardised
from medseg.dataset.check.portraits import Portrait

#: A case is unlike all others if even its third nearest neighbour is further away than so many
#: (robust) deviations.
ISOLATED_DEVIATIONS = 3.0
#: Feature to (what it is called, least isolation that counts, how to show it); an axis or a label
#: may follow.
_FEATURES: dict[str, tuple[str, float, Callable[[float], float]]] = {
    "scale": ("range of intensities", np.log10(1.6), lambda value: 10**value),
    "offset": ("offset of intensities by their range", 0.1, np.sinh),
    "median": ("median by the range of intensities", 0.1, float),
    "quartiles": ("quartile distance by the range of intensities", 0.1, float),
    "highest": ("brightest voxel above the 99th percentile by the range", 0.5, np.expm1),
    "lowest": ("darkest voxel below the 1st percentile by the range", 0.5, np.expm1),
    "roughness": ("noise (differences of neighbours by variance)", 0.3, np.exp),
    "size": ("extent in mm", 0.15, np.exp),
    "spacing": ("voxel size in mm", 0.15, np.exp),
    "position": ("centre in mm", 5.0, float),
    "place": ("place of the labels within the image (0 to 1)", 0.05, float),
    "arrangement": ("place among the labels, in deviations, of label", 0.3, float),
    "volume": ("volume of label in mm³", 0.4, np.exp),
    "brightness of labels": ("brightness within the labels by the range", 0.1, float),
    "contrast in labels": ("spread of intensities within the labels by the range", 0.3, np.exp),
    "likeness": ("likeness of the image to the others (correlation)", 0.15, np.tanh),
    "likeness of labels": ("likeness of the labels to the others (correlation)", 0.15, np.tanh),
}


def compare_cases(dataset: Dataset, portraits: Sequence[Portrait]) -> list[Finding]:
    """Duplicates, leaks through them, mirrored cases and outliers among the cases of a dataset."""
    findings = list(duplicates(dataset, portraits))
    if len(portraits) < MIN_GROUP:
        return findings
    usual = _usual_structures(portraits)
    portraits = [one.reduced_to(usual) for one in portraits]
    images = standardised(np.array([one.thumbnail for one in portraits]))
    complete = _complete(portraits, usual)
    labels = (
        standardised(np.array([one.labels for one in complete]))
        if len(complete) >= MIN_GROUP
        else None
    )
    features = {one.case: dict(one.features) for one in portraits}
    _add_likeness(features, "likeness", portraits=portraits, thumbnails=images)
    if labels is not None:
        _add_likeness(features, "likeness of labels", portraits=complete, thumbnails=labels)
    mirrors = mirrored(portraits, images, labelled=complete, labels=labels)
    return findings + mirrors + _outliers(features, {finding.case for finding in mirrors})


def _add_likeness(
    features: dict[str, dict[str, float]],
    name: str,
    portraits: Sequence[Portrait],
    thumbnails: NDArray[np.float32],
) -> None:
    for portrait, value in zip(portraits, likeness(thumbnails)):
        features[portrait.case][name] = float(np.arctanh(min(value, 0.9999)))


def _usual_structures(portraits: Sequence[Portrait]) -> frozenset[int]:
    """The values that nine of ten labelled cases hold; where none is so usual, the one that most
    hold.

    What the labels' shape says of left and right can only be compared between cases that hold the
    same structures: a map with a structure that others lack is as unlike them as a mirrored one.
    """
    value_sets = [one.held for one in portraits if one.labels is not None]
    counts = Counter(value for values in value_sets for value in values)
    usual = frozenset(value for value, count in counts.items() if count >= 0.9 * len(value_sets))
    return usual or frozenset(sorted(counts, key=lambda value: (-counts[value], value))[:1])


def _complete(portraits: Sequence[Portrait], usual: Collection[int]) -> list[Portrait]:
    """Those with labels in which no large usual structure is missing or a small part of its usual
    volume.
    """
    candidates = [one for one in portraits if one.labels is not None]
    volumes = {
        name: float(np.median([one.features[name] for one in candidates if name in one.features]))
        for name in (f"volume {value}" for value in usual)
    }
    large = 0.05 * sum(np.exp(volume) for volume in volumes.values())
    few = np.log(1 / 4)

    def is_complete(portrait: Portrait) -> bool:
        return all(
            portrait.features.get(name, -np.inf) - volume > few
            for name, volume in volumes.items()
            if np.exp(volume) >= large
        )

    return [one for one in candidates if is_complete(one)]


def _outliers(features: dict[str, dict[str, float]], turned: set[str]) -> list[Finding]:
    """Cases that stand alone in some feature. Those known to be mirrored are not also called unlike
    the others.
    """
    oddities: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for one in features.values() for name in one):
        values = {case: one[name] for case, one in features.items() if name in one}
        if len(values) >= MIN_GROUP:
            for case, oddity in _oddities(name, values, turned):
                oddities.setdefault(case, []).append(oddity)
    return [
        Finding(
            case=case,
            kind="outlier",
            severity="warning",
            message=f"is unlike the other cases: {'; '.join(parts)}",
        )
        for case, parts in oddities.items()
    ]


def _oddities(
    name: str, values: Mapping[str, float], turned: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(case, what is odd) of the cases that stand alone in one feature."""
    key = name if name in _FEATURES else name.partition(" ")[0]
    what, least, display = _FEATURES[key]
    label = f"{what} {name.removeprefix(key).strip()}".strip()
    cases, array = list(values), np.array(list(values.values()))
    middle = float(np.median(array))
    is_likeness = key.startswith("likeness")
    for number in np.flatnonzero(_isolation(array) > _threshold(array, least, key)):
        case, value = cases[number], array[number]
        is_explained = case in turned and (is_likeness or key == "place")
        if is_explained or (is_likeness and value > middle):
            continue
        yield case, f"{label} {display(value):.4g} (usually {display(middle):.4g})"


def _isolation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of every value to its third nearest neighbour, so that even three odd cases cannot
    vouch for each other.

    In small groups the second or the first nearest.
    """
    rank = 3 if len(values) >= 20 else 2 if len(values) >= 12 else 1
    sorted_values = np.sort(values)
    padded_values = np.concatenate([np.full(rank, -np.inf), sorted_values, np.full(rank, np.inf)])
    # The `rank` nearest lie within a run of `rank` + 1 sorted values that holds the value itself.
    n = len(values)
    distance = np.full(n, np.inf)
    for below in range(rank + 1):
        low, high = (
            padded_values[rank - below : rank - below + n],
            padded_values[2 * rank - below : 2 * rank - below + n],
        )
        distance = np.minimum(distance, np.maximum(sorted_values - low, high - sorted_values))
    out = np.empty(n)
    out[np.argsort(values, kind="stable")] = distance
    return out


def _threshold(values: NDArray[np.float64], least: float, key: str) -> float:
    """How isolated a value must be to count: by the spread of the group, and by how isolated others
    are.

    The scale of MR images has no common spread (three scanners make three clusters), so there only
    the latter counts.
    """
    usual = 3 * float(np.quantile(_isolation(values), 0.9))
    if key == "scale":
        return max(least, usual)
    deviations = ISOLATED_DEVIATIONS if len(values) >= 20 else 2 * ISOLATED_DEVIATIONS
    return max(least, deviations * spread_of(values), usual)
