"""From a scan to labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.inference.segmentation import Segmentation as Segmentation
    from medseg.inference.segmentation import segment as segment
    from medseg.inference.settings import Settings as Settings

_HOMES = {
    "Segmentation": "medseg.inference.segmentation",
    "Settings": "medseg.inference.settings",
    "segment": "medseg.inference.segmentation",
}
__all__ = [
    "Segmentation",
    "Settings",
    "segment",
]
__getattr__, __dir__ = door(__name__, _HOMES)
