"""Models without weights, by the names they have on the command line: by intensity, or by rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from medseg.errors import BadConfig
from medseg.inference.intensity import INTENSITY_MODELS, intensity_table
from medseg.inference.tissues.windows import TISSUES
from medseg.labels import LabelTable
from medseg.volume import Volume

#: CT by rules.
CT_TISSUES = "ct-tissues"
#: Stands for the model that suits the scan; `medseg.inference.look` chooses it.
AUTO = "auto"
#: What may be chosen.
CHOSEN = ("brain", CT_TISSUES)


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """What labels a scan without training.

    run: scan to labels on its grid. bytes_per_voxel: what it takes beside the scan. family: the
    code of DICOM's CID 7162, of algorithms. structures: whether its labels are anatomy.
    """

    run: Callable[[Volume], Volume]
    table: LabelTable
    about: str
    bytes_per_voxel: int
    family: str
    structures: bool


def names_tissues(names: Iterable[object]) -> bool:
    """Whether all of these are names of what `ct-tissues` finds; numbers may be of any model."""
    texts = [str(one).strip() for one in names]
    try:
        return bool([TISSUES.value_of(one) for one in texts]) and not any(map(str.isdigit, texts))
    except BadConfig:
        return False


def _tissues(volume: Volume) -> Volume:
    from medseg.inference.tissues.model import ct_tissues  # here, because it loads numba

    return ct_tissues(volume)


def _by_intensity(name: str, family: str) -> Untrained:
    function, classes = INTENSITY_MODELS[name]
    return Untrained(
        run=lambda volume: function(volume, classes),
        table=intensity_table(name),
        about=(function.__doc__ or "").split("\n")[0],
        bytes_per_voxel=3,
        family=family,
        structures=False,
    )


UNTRAINED: dict[str, Untrained] = {
    CT_TISSUES: Untrained(
        run=_tissues,
        table=TISSUES,
        about="Body, lungs, airways, bone, fat, muscle and gas in CT of any part, by rules.",
        bytes_per_voxel=6,
        family="123104",
        structures=True,
    ),
    "otsu": _by_intensity("otsu", "123105"),
    "kmeans": _by_intensity("kmeans", "123107"),
    "gmm": _by_intensity("gmm", "123107"),
}
