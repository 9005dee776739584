"""From annotated scans, or label maps alone, to a scored model folder."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.training.run import Request as Request
    from medseg.training.run import train_dataset as train_dataset

_HOMES = {
    "Request": "medseg.training.run",
    "train_dataset": "medseg.training.run",
}
__all__ = [
    "Request",
    "train_dataset",
]
__getattr__, __dir__ = door(__name__, _HOMES)
