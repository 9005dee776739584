"""Whether a head scan still shows the face: a geometric rule on what lies in front of and below the
frontal lobes.

Eyes, nose and mouth lie below the underside of the frontal lobes and reach further forward than the
brain. Scans that are skull-stripped or defaced, or that end above the eyes, have nothing there.
"""

from __future__ import annotations

import numpy as np

from medseg.labels import LabelTable
from medseg.volume import Volume

NOTE = "the scan still shows the face; remove it before sharing the scan"
#: Labels whose names hold one of these words are brain.
_BRAIN_WORDS = ("cerebral", "cerebell", "brain")
#: Less brain than this in mL is not a head, or not enough of one to find its front.
MIN_BRAIN_ML = 300.0
#: The box in which faces are, in mm: how far behind the front of the brain it begins, how far to
#: each side of its middle and how far below the underside of the frontal lobes it reaches. The nose
#: is 25 to 40 mm before the brain.
BEHIND_MM, ASIDE_MM, BELOW_MM = 5.0, 45.0, 70.0
#: Tissue in that box, in mL, from which there is a face. Measured: 37 to 303 in 20 label maps of
#: whole heads, 44 in a scan that ends at the root of the nose, 0 in skull-stripped scans.
MIN_FACE_ML = 10.0
#: Tissue is brighter than air by this part of the brain's median above air.
TISSUE_LEVEL = 0.2
#: The grid is thinned out to about this spacing.
_STEP_MM = 2.0


def shows_face(volume: Volume, labels: Volume, table: LabelTable) -> bool:
    """Whether tissue lies where the face is. Always False without brain labels, which the rule
    starts from.

    volume and labels are on one grid, in any orientation.
    """
    return face_ml(volume, labels, table) >= MIN_FACE_ML


def face_ml(volume: Volume, labels: Volume, table: LabelTable) -> float:
    """Tissue in mL in the box in front of and below the frontal lobes; 0 if there is too little
    brain.
    """
    values = [
        label.value
        for label in table.labels
        if any(word in label.name.lower() for word in _BRAIN_WORDS)
    ]
    step = tuple(max(1, round(_STEP_MM / edge)) for edge in volume.spacing_mm)
    thin = tuple(slice(None, None, n) for n in step)
    image, brain = volume.data[thin], np.isin(labels.data[thin], values)
    voxel_ml = volume.voxel_mm3 * np.prod(step) / 1000
    if brain.sum() * voxel_ml < MIN_BRAIN_ML:
        return 0.0
    affine = volume.affine @ np.diag([*step, 1.0])
    right, front, up = (np.argwhere(brain) @ affine[:3, :3].T + affine[:3, 3]).T
    pole = np.percentile(front, 99.8)
    frontal = front > (np.median(front) + pole) / 2
    underside = np.percentile(up[frontal], 2)
    air = np.percentile(image, 1)
    tissue = np.argwhere((image > air + TISSUE_LEVEL * (np.median(image[brain]) - air)) & ~brain)
    x, y, z = (tissue @ affine[:3, :3].T + affine[:3, 3]).T
    inside = (np.abs(x - np.median(right)) < ASIDE_MM) & (y > pole - BEHIND_MM)
    inside &= (z < underside) & (z > underside - BELOW_MM)
    return float(inside.sum() * voxel_ml)
