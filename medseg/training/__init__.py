"""From annotated scans, or label maps alone, to a scored model folder."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.training.loop import train as train
    from medseg.training.plan import Choice as Choice
    from medseg.training.prepared.job import (
        Outlook as Outlook,
        Prepared as Prepared,
        plan_part as plan_part,
        prepare_dataset as prepare_dataset,
    )
    from medseg.training.request import (
        Events as Events,
        Outcome as Outcome,
        Request as Request,
    )
    from medseg.training.run import train_dataset as train_dataset, train_folds as train_folds

__getattr__, __dir__ = door(
    __name__,
    {
        "loop": ("train",),
        "plan": ("Choice",),
        "prepared.job": ("Outlook", "Prepared", "plan_part", "prepare_dataset"),
        "request": ("Events", "Outcome", "Request"),
        "run": ("train_dataset", "train_folds"),
    },
)
