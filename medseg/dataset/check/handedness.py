"""Cases whose image or labels fit the others only when flipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Finding
from medseg.dataset.check.likeness import FLIPS, likeness, spread_of
from medseg.dataset.check.portraits import Portrait

#: The group has a handedness if its median case fits the others better than its mirror image by so
#: much correlation, and by so many (robust) deviations of that margin between cases.
MIN_MARGIN, MARGIN_DEVIATIONS = 0.002, 3.0
#: With so many deviations any case that fits better when flipped is told, else only one that does
#: so clearly.
SURE_DEVIATIONS = 5.0
#: What correlates with the others less than this part of what the median case does fits in no way.
MIN_FIT = 0.5
_AXES = ("left-right", "front-back", "upside down")
_APART = "the labels do not belong to the image as they are"


def mirrored(
    portraits: Sequence[Portrait],
    images: NDArray[np.float32],
    labelled: Sequence[Portrait],
    labels: NDArray[np.float32] | None,
) -> list[Finding]:
    """Cases whose image or labels fit the group only when flipped.

    The image is judged in its field of view, the labels by the handedness of their shape around
    their own centroid, which does not depend on where the field of view was put.
    """
    image_flips, image_known = _flips_of(portraits, images), _handed(images)
    label_flips: dict[str, tuple[int, ...]] = {}
    label_known: frozenset[int] = frozenset()
    if labels is not None:
        label_flips, label_known = _flips_of(labelled, labels), _handed(labels)
    findings = []
    for case in sorted(image_flips.keys() | label_flips.keys()):
        image, label = image_flips.get(case, ()), label_flips.get(case, ())
        if image:
            severity, message = "error", _about_image(image, label, label_known=label_known)
        elif set(label) <= image_known:
            what = f"the labels are mirrored ({_axes(label)}) and the image is not"
            severity, message = "error", f"{what}; {_APART}"
        else:
            what = f"the labels are mirrored ({_axes(label)}) compared with the other cases"
            severity, message = "warning", f"{what}; check the orientation in the headers"
        findings.append(Finding(case=case, kind="mirrored", severity=severity, message=message))
    return findings


def _flips_of(
    portraits: Sequence[Portrait], thumbnails: NDArray[np.float32]
) -> dict[str, tuple[int, ...]]:
    """Case -> the flip that makes it fit the others; only of cases that fit so."""
    return {one.case: flip for one, flip in zip(portraits, _flips(thumbnails)) if flip}


def _about_image(
    image: tuple[int, ...], label: tuple[int, ...], *, label_known: frozenset[int]
) -> str:
    """What a mirrored image and its labels mean; label_known: axes along which the labels tell."""
    others = "compared with the other cases"
    if image == label:
        what = f"image and labels are mirrored ({_axes(image)}) {others}"
        return f"{what}; check the orientation in their headers"
    if not set(image) <= label_known:
        what = f"the image is mirrored ({_axes(image)}) {others}"
        return f"{what}; check the orientation in its header"
    beside = f"its labels {_axes(label) or 'not'}, compared with the others"
    return f"the image is mirrored ({_axes(image)}), {beside}; {_APART}"


def _axes(flip: tuple[int, ...]) -> str:
    return " and ".join(_AXES[axis] for axis in flip)


def _margins(thumbnails: NDArray[np.float32]) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """For every flip, how much better each case fits the others as it is than flipped.

    Never below 0 where the flipped case would not fit either: that is no mirror image but something
    else, of which the outliers tell.
    """
    plain = likeness(thumbnails)
    least = MIN_FIT * float(np.median(plain))
    fits = {flip: likeness(thumbnails, flip) for flip in FLIPS}
    return {
        flip: np.where(fit >= least, plain - fit, np.maximum(plain - fit, 0))
        for flip, fit in fits.items()
    }


def _is_handed(margin: NDArray[np.float64]) -> bool:
    return float(np.median(margin)) > max(MIN_MARGIN, MARGIN_DEVIATIONS * spread_of(margin))


def _least_margin(margin: NDArray[np.float64]) -> float:
    """What a case's margin must fall below to be called mirrored."""
    middle = float(np.median(margin))
    return 0.0 if middle > SURE_DEVIATIONS * spread_of(margin) else -0.5 * middle


def _flips(thumbnails: NDArray[np.float32]) -> list[tuple[int, ...]]:
    """The flip that makes each case fit the others best, () for none; only flips in which the group
    is of one mind.
    """
    margins = {flip: margin for flip, margin in _margins(thumbnails).items() if _is_handed(margin)}
    best: list[tuple[int, ...]] = []
    for number in range(len(thumbnails)):
        against = {
            f: margin[number]
            for f, margin in margins.items()
            if margin[number] < _least_margin(margin)
        }
        strongest = min(against.values(), default=0.0)
        # Of flips that say nearly the same the simplest: an axis along which a case looks alike
        # both ways is no news.
        alike = [flip for flip in against if against[flip] <= 0.8 * strongest]
        best.append(min(alike, key=lambda flip: (len(flip), against[flip])) if alike else ())
    return best


def _handed(thumbnails: NDArray[np.float32]) -> frozenset[int]:
    """The axes along which the group tells right from mirrored."""
    margins = _margins(thumbnails)
    return frozenset(axis for axis in range(3) if _is_handed(margins[(axis,)]))
