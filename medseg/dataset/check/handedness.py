"""Cases whose image or labels fit the others only when flipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.cases import Finding
from medseg.dataset.check.likeness import FLIPS, likeness, spread_of
from medseg.dataset.check.portraits import Portrait

#: The group has a handedness if its median case fits the others better than its mirror image by so much correlation,
#: and by so many (robust) deviations of that margin between cases.
MIN_MARGIN, MARGIN_DEVIATIONS = 0.002, 3.0
#: With so many deviations any case that fits better when flipped is told, else only one that does so clearly.
SURE_DEVIATIONS = 5.0
#: What correlates with the others less than this part of what the median case does fits in no way.
MIN_FIT = 0.5
_AXES = ("left-right", "front-back", "upside down")


def mirrored(
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
        findings.append(Finding(case=case, kind="mirrored", severity=severity, message=f"{what}; {remedy}"))
    return findings


def _axes(flip: tuple[int, ...]) -> str:
    return " and ".join(_AXES[axis] for axis in flip)


def _margins(thumbnails: NDArray[np.float32]) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """For every flip, how much better each case fits the others as it is than flipped.

    Never below 0 where the flipped case would not fit either: that is no mirror image but something else, of which the
    outliers tell.
    """
    plain = likeness(thumbnails)
    least = MIN_FIT * float(np.median(plain))
    flipped = {flip: likeness(thumbnails, flip) for flip in FLIPS}
    return {flip: np.where(fit >= least, plain - fit, np.maximum(plain - fit, 0)) for flip, fit in flipped.items()}


def _is_handed(margin: NDArray[np.float64]) -> bool:
    return float(np.median(margin)) > max(MIN_MARGIN, MARGIN_DEVIATIONS * spread_of(margin))


def _least_margin(margin: NDArray[np.float64]) -> float:
    """What a case's margin must fall below to be called mirrored."""
    middle = float(np.median(margin))
    return 0.0 if middle > SURE_DEVIATIONS * spread_of(margin) else -0.5 * middle


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
