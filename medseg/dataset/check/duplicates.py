"""The same scan under two names, and what leaks through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.check.likeness import FLIPS, MIN_GROUP, standardised
from medseg.dataset.check.portraits import THUMBNAIL, Portrait
from medseg.errors import MedsegError
from medseg.io import read_as_stored
from medseg.volume import Volume, reorient

#: Thumbnails that correlate more than this are looked at voxel by voxel, and are one scan above the
#: second number.
SIMILAR, SAME = 0.98, 0.999
#: So much must what two thumbnails have of their own correlate, unless they correlate as much as
#: the second number.
SAME_OWN, IDENTICAL = 0.9, 0.99999
_THUMBNAIL_PARTS = 2  # duplicates are looked for in thumbnails as coarse as this part


def duplicates(dataset: Dataset, portraits: Sequence[Portrait]) -> Iterator[Finding]:
    """Cases with the same image, whatever their scale, type of value and header; and those with the
    same label map.
    """
    splits = [(set(training), set(validation)) for training, validation in dataset.splits]
    copies: dict[str, str] = {}
    for first, second in _similar(portraits):
        one, other = dataset[first.case], dataset[second.case]
        # Told already, with another of its copies.
        if copies.get(second.case, first.case) != first.case:
            continue
        if sameness := _same_image(one, other):
            copies[second.case] = first.case
            yield _duplicate(one, other, sameness=sameness, first=first, second=second)
            yield from _leaks(splits, one, other)
    yield from _same_labels([portrait for portrait in portraits if portrait.case not in copies])


def _leaks(
    splits: Sequence[tuple[set[str], set[str]]], one: Case, other: Case
) -> Iterator[Finding]:
    """The splits of which two cases with one image lie on both sides."""
    image = f"the image of {one.name} is in training and"
    names = one.name, other.name
    for number, sides in enumerate(splits):
        if _are_apart(names, *sides):
            message = f"{image} in validation of split {number} as {other.name}"
            yield Finding(case=other.name, kind="leak", severity="error", message=message)
    if (one.split == "test") != (other.split == "test"):
        message = f"{image} among the cases set aside for testing"
        yield Finding(case=other.name, kind="leak", severity="error", message=message)


def _are_apart(names: tuple[str, str], training: set[str], validation: set[str]) -> bool:
    """Whether one of two cases trains and the other validates."""
    return any(one in training and other in validation for one, other in (names, names[::-1]))


def _same_labels(portraits: Sequence[Portrait]) -> Iterator[Finding]:
    """Label maps that are another case's, also moved; drawn shapes such as spheres may be equal in
    many cases.
    """
    whole: dict[str, Portrait] = {}
    shapes: dict[str, list[Portrait]] = {}
    for portrait in portraits:
        if portrait.label_digests:
            before = whole.setdefault(portrait.label_digests[1], portrait)
            if before is not portrait:
                message = (
                    f"has the same label map as {before.case}, voxel by voxel, but another image"
                )
                yield Finding(
                    case=portrait.case, kind="duplicate labels", severity="error", message=message
                )
            elif portrait.shape_digest:
                shapes.setdefault(portrait.shape_digest, []).append(portrait)
    for first, *others in shapes.values():
        if len(others) <= 2:
            for portrait in others:
                message = (
                    f"has labels of exactly the same shape as {first.case}; do they belong to its"
                    " image?"
                )
                yield Finding(
                    case=portrait.case, kind="duplicate labels", severity="warning", message=message
                )


def _duplicate(one: Case, other: Case, sameness: str, first: Portrait, second: Portrait) -> Finding:
    digests = first.label_digests, second.label_digests
    same_labels = digests[0] == digests[1] or any(
        a == b for a, b in zip(digests[0] or (), digests[1] or ())
    )
    how = {
        "equal": "the same voxels",
        "rescaled": "the same voxels, rescaled",
        "alike": "nearly the same voxels",
        "mirrored": "the same voxels, mirrored",
    }[sameness]
    labels = "and the same labels" if same_labels else "but other labels"
    certain = sameness in ("equal", "rescaled") and same_labels
    remedy = "; --fix leaves it out" if certain else "; keep one of them"
    return Finding(
        case=other.name,
        kind="duplicate",
        severity="error",
        message=f"holds {how} as {one.name}, {labels}{remedy}",
        fixable=certain,
    )


def _similar(portraits: Sequence[Portrait]) -> Iterator[tuple[Portrait, Portrait]]:
    """Pairs whose thumbnails are alike, the earlier case first, also if one header mirrors what the
    other does not.

    Heads on one grid are all alike; so in a group also what a case has of its own, beyond the mean,
    must be alike.
    """
    if len(portraits) < 2:
        return
    cells = THUMBNAIL // _THUMBNAIL_PARTS
    parts = (cells, _THUMBNAIL_PARTS) * 3
    coarse = standardised(
        np.array([one.thumbnail.reshape(parts).mean(axis=(1, 3, 5)) for one in portraits])
    )
    flat = coarse.reshape(len(coarse), -1)
    mean = (
        coarse.mean(axis=0, keepdims=True)
        if len(portraits) >= MIN_GROUP
        else np.zeros_like(coarse[:1])
    )
    own = standardised(coarse - mean).reshape(len(coarse), -1)
    pairs: set[tuple[int, int]] = set()
    for flip in ((), *FLIPS):
        images = np.flip(coarse, tuple(axis + 1 for axis in flip)) if flip else coarse
        own_images = standardised(images - mean).reshape(len(coarse), -1)
        images = images.reshape(len(coarse), -1)
        for start in range(0, len(flat), 512):
            block = slice(start, start + 512)
            alike = images[block] @ flat.T
            rows, columns = np.nonzero(
                (alike > IDENTICAL) | ((alike > SIMILAR) & (own_images[block] @ own.T > SAME_OWN))
            )
            pairs |= {
                (int(row) + start, int(column))
                for row, column in zip(rows, columns)
                if row + start < column
            }
    for row, column in sorted(pairs):
        yield portraits[row], portraits[column]


def _same_image(one: Case, other: Case) -> str:
    """'equal', 'rescaled', 'alike' or 'mirrored' if two cases hold the same voxels in some order,
    else ''.
    """
    try:
        first, second = _first_image(one), _first_image(other)
    except MedsegError:
        return ""
    along_first = reorient(second, first.orientation)
    orders = [(second.data, ""), (along_first.data, "")]
    orders += [(np.flip(along_first.data, flip), "mirrored") for flip in FLIPS]
    for data, kind in orders:
        if data.shape == first.data.shape and (sameness := _same_values(first.data, data)):
            return kind or sameness
    return ""


def _first_image(case: Case) -> Volume:
    try:
        return read_as_stored(case.images[0])
    except MedsegError:
        return read_as_stored(case.images[0], volume_index=0)


def _same_values(one: NDArray, other: NDArray) -> str:
    """'equal', 'rescaled' (one is a line through the other but for rounding), 'alike', or ''."""
    # Most pairs differ at first sight.
    thin = tuple(slice(None, None, max(1, size // 32)) for size in one.shape)
    x, y = _finite(one[thin]), _finite(other[thin])
    if _both_vary(x, y) and _clipped_correlation(x, y) < SAME - 0.05:
        return ""
    if np.array_equal(one, other, equal_nan=one.dtype.kind == "f" and other.dtype.kind == "f"):
        return "equal"
    x, y = _finite(one), _finite(other)
    if not _both_vary(x, y) or _clipped_correlation(x, y) < SAME:
        return ""
    slope = y.std() / x.std()
    apart = np.abs((x - x.mean()) * slope - (y - y.mean())).max()
    # Half a step of whole numbers is rounding, and the fitted line is as uncertain again.
    steps = [step for data, step in ((other, 1.0), (one, slope)) if data.dtype.kind in "iub"]
    return "rescaled" if apart <= max([1e-4 * np.ptp(y), *steps]) else "alike"


def _finite(data: NDArray) -> NDArray[np.float64]:
    """Values (N,), 0 where they are no finite numbers."""
    return np.nan_to_num(data.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).ravel()


def _both_vary(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    return bool(x.std() > 0 and y.std() > 0)


def _clipped_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of values clipped to their 1st and 99th percentile, -1 where one is constant
    then.
    """
    x, y = (
        np.clip(values, *np.percentile(values[:: 1 + values.size // 100_000], (1, 99)))
        for values in (x, y)
    )
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / length if length else -1.0
