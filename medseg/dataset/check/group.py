"""What only the other cases can tell: the same scan under two names, mirrored cases, cases unlike all others.

Every case is reduced to a `Portrait`: thumbnails along RAS, and numbers that do not depend on the scale of intensities.
Nothing here has a fixed idea of how a scan looks; a case is odd only by comparison, and where the group itself does not
agree (a symmetric organ has no handedness, scans of ten scanners have no common brightness) nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.errors import MedsegError
from medseg.io import read_as_stored
from medseg.volume import Volume, reorient

#: Cells of a thumbnail along each axis.
THUMBNAIL = 24
#: Groups smaller than this have no usual case to compare with.
MIN_GROUP = 8
#: Thumbnails that correlate more than this are looked at voxel by voxel, and are one scan above the second number.
SIMILAR, SAME = 0.98, 0.999
#: So much must what two thumbnails have of their own correlate, unless they correlate as much as the second number.
SAME_OWN, IDENTICAL = 0.9, 0.99999
#: A case is unlike all others if even its third nearest neighbour is further away than so many (robust) deviations.
ISOLATED_DEVIATIONS = 3.0
#: The group has a handedness if its median case fits the others better than its mirror image by so much correlation,
#: and by so many (robust) deviations of that margin between cases.
MIN_MARGIN, MARGIN_DEVIATIONS = 0.002, 3.0
#: With so many deviations any case that fits better when flipped is told, else only one that does so clearly.
SURE_DEVIATIONS = 5.0
#: What correlates with the others less than this part of what the median case does fits in no way.
MIN_FIT = 0.5

_AXES = ("left-right", "front-back", "upside down")
_FLIPS = tuple(flip for count in (1, 2, 3) for flip in combinations(range(3), count))
_THUMBNAIL_PARTS = 2  # duplicates are looked for in thumbnails as coarse as this part
#: Feature to (what it is called, least isolation that counts, how to show it); an axis or a label may follow.
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


@dataclass(frozen=True, eq=False)
class Portrait:
    """A case, small.

    thumbnail: (24, 24, 24) means of the first channel along RAS, clipped to its 1st and 99th percentile. labels: the
    same of the labels, coded, in a box around their centroid; None without labels. label_digests: names for the
    label map as it is stored and along RAS. shape_digest: a name for the labels wherever they lie, '' if they are too
    few to be one of a kind. features: what may be compared between cases.
    """

    case: str
    thumbnail: NDArray[np.float32]
    labels: NDArray[np.float32] | None
    label_digests: tuple[str, str] | None = None
    shape_digest: str = ""
    features: dict[str, float] = field(default_factory=dict)


def compare_cases(dataset: Dataset, portraits: Sequence[Portrait]) -> list[Finding]:
    """Duplicates, leaks through them, mirrored cases and outliers among the cases of a dataset."""
    findings = list(_duplicates(dataset, portraits))
    if len(portraits) < MIN_GROUP:
        return findings
    images = _standard(np.array([one.thumbnail for one in portraits]))
    labelled = _complete(portraits)
    labels = _standard(np.array([one.labels for one in labelled])) if len(labelled) >= MIN_GROUP else None
    likeness = {one.case: value for one, value in zip(portraits, _likeness(images))}
    label_likeness = {one.case: value for one, value in zip(labelled, _likeness(labels))} if labels is not None else {}
    mirrored = _mirrored(portraits, images, labelled, labels)
    findings += mirrored
    turned = {finding.case for finding in mirrored}
    features = {one.case: dict(one.features) for one in portraits}
    for name, found in (("likeness", likeness), ("likeness of labels", label_likeness)):
        for case, value in found.items():
            features[case][name] = float(np.arctanh(min(value, 0.9999)))
    findings += _outliers(features, turned)
    return findings


def _complete(portraits: Sequence[Portrait]) -> list[Portrait]:
    """Those with labels in which no large structure of the group is missing or a small part of its usual volume.

    Only between such can the shape of the labels be compared.
    """
    labelled = [one for one in portraits if one.labels is not None]
    names = {name for one in labelled for name in one.features if name.startswith("volume ")}
    usual = {}
    for name in names:
        having = [one.features[name] for one in labelled if name in one.features]
        if len(having) >= 0.9 * len(labelled):
            usual[name] = float(np.median(having))
    large = 0.05 * sum(np.exp(volume) for volume in usual.values())
    usual = {name: volume for name, volume in usual.items() if np.exp(volume) >= large}
    few = np.log(1 / 4)
    return [
        one for one in labelled if all(one.features.get(name, -np.inf) - volume > few for name, volume in usual.items())
    ]


def _standard(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thumbnails with mean 0 and length 1, so that products are correlations; (cases, 24, 24, 24)."""
    centred = thumbnails - thumbnails.mean(axis=(1, 2, 3), keepdims=True)
    length = np.sqrt((centred**2).sum(axis=(1, 2, 3), keepdims=True))
    return centred / np.maximum(length, np.finfo(np.float32).tiny)


def _likeness(thumbnails: NDArray[np.float32], flip: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """Correlation of every case, flipped along some axes, with the mean of all others."""
    turned = np.flip(thumbnails, tuple(axis + 1 for axis in flip)) if flip else thumbnails
    total = thumbnails.sum(axis=0)
    own = np.einsum("nijk,nijk->n", turned, thumbnails)
    with_all = np.einsum("nijk,ijk->n", thumbnails, total)
    rest = np.sqrt(np.maximum((total**2).sum() - 2 * with_all + 1.0, 1e-12))  # |total - case|; cases have length 1
    return (np.einsum("nijk,ijk->n", turned, total) - own) / rest


# The same scan twice -------------------------------------------------------------------------------------------------


def _duplicates(dataset: Dataset, portraits: Sequence[Portrait]) -> Iterator[Finding]:
    """Cases with the same image, whatever their scale, type of value and header; and those with the same label map."""
    sides = [(set(training), set(validation)) for training, validation in dataset.splits]
    seen: dict[str, str] = {}
    for first, second in _similar(portraits):
        one, other = dataset[first.case], dataset[second.case]
        if second.case in seen and seen[second.case] != first.case:  # told already, with another of its copies
            continue
        sameness = _same_image(one, other)
        if not sameness:
            continue
        seen[second.case] = first.case
        yield _duplicate(one, other, sameness, first, second)
        for number, (training, validation) in enumerate(sides):
            if (one.name in training and other.name in validation) or (
                other.name in training and one.name in validation
            ):
                message = f"the image of {one.name} is in training and in validation of split {number} as {other.name}"
                yield Finding(other.name, "leak", "error", message)
        if (one.split == "test") != (other.split == "test"):
            message = f"the image of {one.name} is in training and among the cases set aside for testing"
            yield Finding(other.name, "leak", "error", message)
    yield from _same_labels([portrait for portrait in portraits if portrait.case not in seen])


def _same_labels(portraits: Sequence[Portrait]) -> Iterator[Finding]:
    """Label maps that are another case's, also moved; drawn shapes such as spheres may be equal in many cases."""
    whole: dict[str, Portrait] = {}
    shapes: dict[str, list[Portrait]] = {}
    for portrait in portraits:
        if portrait.label_digests:
            before = whole.setdefault(portrait.label_digests[1], portrait)
            if before is not portrait:
                message = f"has the same label map as {before.case}, voxel by voxel, but another image"
                yield Finding(portrait.case, "duplicate labels", "error", message)
            elif portrait.shape_digest:
                shapes.setdefault(portrait.shape_digest, []).append(portrait)
    for first, *others in shapes.values():
        if len(others) <= 2:
            for portrait in others:
                message = f"has labels of exactly the same shape as {first.case}; do they belong to its image?"
                yield Finding(portrait.case, "duplicate labels", "warning", message)


def _duplicate(one: Case, other: Case, sameness: str, first: Portrait, second: Portrait) -> Finding:
    known = first.label_digests, second.label_digests
    same_labels = known[0] == known[1] or any(a == b for a, b in zip(known[0] or (), known[1] or ()))
    how = {
        "equal": "the same voxels",
        "rescaled": "the same voxels, rescaled",
        "alike": "nearly the same voxels",
        "mirrored": "the same voxels, mirrored",
    }[sameness]
    labels = "and the same labels" if same_labels else "but other labels"
    certain = sameness in ("equal", "rescaled") and same_labels
    remedy = "; --fix leaves it out" if certain else "; keep one of them"
    return Finding(other.name, "duplicate", "error", f"holds {how} as {one.name}, {labels}{remedy}", certain)


def _similar(portraits: Sequence[Portrait]) -> Iterator[tuple[Portrait, Portrait]]:
    """Pairs whose thumbnails are alike, the earlier case first, also if one header mirrors what the other does not.

    Heads on one grid are all alike; so in a group also what a case has of its own, beyond the mean, must be alike.
    """
    if len(portraits) < 2:
        return
    cells = THUMBNAIL // _THUMBNAIL_PARTS
    parts = (cells, _THUMBNAIL_PARTS) * 3
    coarse = _standard(np.array([one.thumbnail.reshape(parts).mean(axis=(1, 3, 5)) for one in portraits]))
    flat = coarse.reshape(len(coarse), -1)
    mean = coarse.mean(axis=0, keepdims=True) if len(portraits) >= MIN_GROUP else np.zeros_like(coarse[:1])
    own = _standard(coarse - mean).reshape(len(coarse), -1)
    found: set[tuple[int, int]] = set()
    for flip in ((), *_FLIPS):
        turned = np.flip(coarse, tuple(axis + 1 for axis in flip)) if flip else coarse
        own_turned = _standard(turned - mean).reshape(len(coarse), -1)
        turned = turned.reshape(len(coarse), -1)
        for start in range(0, len(flat), 512):
            block = slice(start, start + 512)
            alike = turned[block] @ flat.T
            rows, columns = np.nonzero(
                (alike > IDENTICAL) | ((alike > SIMILAR) & (own_turned[block] @ own.T > SAME_OWN))
            )
            found |= {(int(row) + start, int(column)) for row, column in zip(rows, columns) if row + start < column}
    for row, column in sorted(found):
        yield portraits[row], portraits[column]


def _same_image(one: Case, other: Case) -> str:
    """'equal', 'rescaled', 'alike' or 'mirrored' if two cases hold the same voxels in some order, else ''."""
    try:
        first, second = _first_image(one), _first_image(other)
    except MedsegError:
        return ""
    turned = reorient(second, first.orientation)
    orders = [(second.data, ""), (turned.data, "")]
    orders += [(np.flip(turned.data, flip), "mirrored") for flip in _FLIPS]
    for data, mirrored in orders:
        if data.shape == first.data.shape and (sameness := _same_values(first.data, data)):
            return mirrored or sameness
    return ""


def _first_image(case: Case) -> Volume:
    try:
        return read_as_stored(case.images[0])
    except MedsegError:
        return read_as_stored(case.images[0], volume_index=0)


def _same_values(one: NDArray, other: NDArray) -> str:
    """'equal', 'rescaled' (one is a line through the other but for rounding), 'alike', or ''."""
    thin = tuple(slice(None, None, max(1, size // 32)) for size in one.shape)  # most pairs differ at first sight
    first, second = (np.nan_to_num(data[thin].astype(np.float64), posinf=0, neginf=0).ravel() for data in (one, other))
    if first.std() > 0 and second.std() > 0 and _clipped_correlation(first, second) < SAME - 0.05:
        return ""
    if np.array_equal(one, other, equal_nan=one.dtype.kind == "f" and other.dtype.kind == "f"):
        return "equal"
    x, y = (np.nan_to_num(data.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).ravel() for data in (one, other))
    if not (x.std() > 0 and y.std() > 0) or _clipped_correlation(x, y) < SAME:
        return ""
    slope = y.std() / x.std()
    apart = np.abs((x - x.mean()) * slope - (y - y.mean())).max()
    # Half a step of whole numbers is rounding, and the fitted line is as uncertain again.
    steps = [step for data, step in ((other, 1.0), (one, slope)) if data.dtype.kind in "iub"]
    return "rescaled" if apart <= max([1e-4 * np.ptp(y), *steps]) else "alike"


def _clipped_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of values clipped to their 1st and 99th percentile, -1 where one is constant then."""
    x, y = (np.clip(values, *np.percentile(values[:: 1 + values.size // 100_000], (1, 99))) for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / length if length else -1.0


# Handedness ----------------------------------------------------------------------------------------------------------


def _mirrored(
    portraits: Sequence[Portrait],
    images: NDArray[np.float32],
    labelled: Sequence[Portrait],
    labels: NDArray[np.float32] | None,
) -> list[Finding]:
    """Cases whose image or labels fit the group only when flipped.

    The image is judged in its field of view, the labels by the handedness of their shape around their own centroid,
    which does not depend on where the field of view was put.
    """
    image_flips = {one.case: flip for one, flip in zip(portraits, _flips(images)) if flip}
    label_flips = {one.case: flip for one, flip in zip(labelled, _flips(labels)) if flip} if labels is not None else {}
    image_known, label_known = _handed(images), _handed(labels) if labels is not None else frozenset()
    findings = []
    for case in sorted(image_flips.keys() | label_flips.keys()):
        image, label = image_flips.get(case, ()), label_flips.get(case, ())
        if image == label:
            what, severity = f"image and labels are mirrored ({_axes(image)}) compared with the other cases", "error"
            remedy = "check the orientation in their headers"
        elif image and not set(image) <= label_known:
            what, severity = f"the image is mirrored ({_axes(image)}) compared with the other cases", "error"
            remedy = "check the orientation in its header"
        elif label and not image and set(label) <= image_known:
            what, severity = f"the labels are mirrored ({_axes(label)}) and the image is not", "error"
            remedy = "the labels do not belong to the image as they are"
        elif label and not image:
            what, severity = f"the labels are mirrored ({_axes(label)}) compared with the other cases", "warning"
            remedy = "check the orientation in the headers"
        else:
            axes = _axes(image), _axes(label) or "not"
            what, severity = (
                f"the image is mirrored ({axes[0]}), its labels {axes[1]}, compared with the others",
                "error",
            )
            remedy = "the labels do not belong to the image as they are"
        findings.append(Finding(case, "mirrored", severity, f"{what}; {remedy}"))
    return findings


def _axes(flip: tuple[int, ...]) -> str:
    return " and ".join(_AXES[axis] for axis in flip)


def _margins(thumbnails: NDArray[np.float32]) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """For every flip, how much better each case fits the others as it is than flipped.

    Never below 0 where the flipped case would not fit either: that is no mirror image but something else, of which the
    outliers tell.
    """
    plain = _likeness(thumbnails)
    least = MIN_FIT * float(np.median(plain))
    flipped = {flip: _likeness(thumbnails, flip) for flip in _FLIPS}
    return {flip: np.where(fit >= least, plain - fit, np.maximum(plain - fit, 0)) for flip, fit in flipped.items()}


def _is_handed(margin: NDArray[np.float64]) -> bool:
    return float(np.median(margin)) > max(MIN_MARGIN, MARGIN_DEVIATIONS * _spread(margin))


def _least_margin(margin: NDArray[np.float64]) -> float:
    """What a case's margin must fall below to be called mirrored."""
    middle = float(np.median(margin))
    return 0.0 if middle > SURE_DEVIATIONS * _spread(margin) else -0.5 * middle


def _flips(thumbnails: NDArray[np.float32]) -> list[tuple[int, ...]]:
    """The flip that makes each case fit the others best, () for none; only flips in which the group is of one mind."""
    margins = {flip: margin for flip, margin in _margins(thumbnails).items() if _is_handed(margin)}
    best: list[tuple[int, ...]] = []
    for number in range(len(thumbnails)):
        against = {f: margin[number] for f, margin in margins.items() if margin[number] < _least_margin(margin)}
        strongest = min(against.values(), default=0.0)
        # Of flips that say nearly the same the simplest: an axis along which a case looks alike both ways is no news.
        alike = [flip for flip in against if against[flip] <= 0.8 * strongest]
        best.append(min(alike, key=lambda flip: (len(flip), against[flip])) if alike else ())
    return best


def _handed(thumbnails: NDArray[np.float32]) -> frozenset[int]:
    """The axes along which the group tells right from mirrored."""
    margins = _margins(thumbnails)
    return frozenset(axis for axis in range(3) if _is_handed(margins[(axis,)]))


# Outliers ------------------------------------------------------------------------------------------------------------


def _outliers(features: dict[str, dict[str, float]], turned: set[str]) -> list[Finding]:
    """Cases that stand alone in some feature. Those known to be mirrored are not also called unlike the others."""
    told: dict[str, list[str]] = {}
    names = dict.fromkeys(name for one in features.values() for name in one)
    for name in names:
        key = name if name in _FEATURES else name.partition(" ")[0]
        what, least, shown = _FEATURES[key]
        cases = [case for case, one in features.items() if name in one]
        values = np.array([features[case][name] for case in cases])
        if len(cases) < MIN_GROUP:
            continue
        middle = float(np.median(values))
        for number in np.flatnonzero(_isolation(values) > _threshold(values, least, key)):
            alike = key.startswith("likeness")
            if alike and (values[number] > middle or cases[number] in turned):
                continue
            if key == "place" and cases[number] in turned:
                continue
            label = f"{what} {name.removeprefix(key).strip()}".strip()
            told.setdefault(cases[number], []).append(
                f"{label} {shown(values[number]):.4g} (usually {shown(middle):.4g})"
            )
    return [
        Finding(case, "outlier", "warning", f"is unlike the other cases: {'; '.join(parts)}")
        for case, parts in told.items()
    ]


def _isolation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of every value to its third nearest neighbour, so that even three odd cases cannot vouch for each other.

    In small groups the second or the first nearest.
    """
    rank = 3 if len(values) >= 20 else 2 if len(values) >= 12 else 1
    ordered = np.sort(values)
    padded = np.concatenate([np.full(rank, -np.inf), ordered, np.full(rank, np.inf)])
    # The `rank` nearest lie within a run of `rank` + 1 sorted values that holds the value itself.
    n = len(values)
    distance = np.full(n, np.inf)
    for below in range(rank + 1):
        low, high = padded[rank - below : rank - below + n], padded[2 * rank - below : 2 * rank - below + n]
        distance = np.minimum(distance, np.maximum(ordered - low, high - ordered))
    out = np.empty(n)
    out[np.argsort(values, kind="stable")] = distance
    return out


def _threshold(values: NDArray[np.float64], least: float, key: str) -> float:
    """How isolated a value must be to count: by the spread of the group, and by how isolated others are.

    The scale of MR images has no common spread (three scanners make three clusters), so there only the latter counts.
    """
    usual = 3 * float(np.quantile(_isolation(values), 0.9))
    if key == "scale":
        return max(least, usual)
    deviations = ISOLATED_DEVIATIONS if len(values) >= 20 else 2 * ISOLATED_DEVIATIONS
    return max(least, deviations * _spread(values), usual)


def _spread(values: NDArray[np.float64]) -> float:
    """The standard deviation of a group, estimated from the median distance to its median."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
