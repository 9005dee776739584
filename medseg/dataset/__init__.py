"""Annotated scans as people have them."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.dataset.cases import (
        Case as Case,
        Dataset as Dataset,
        Finding as Finding,
        load_case as load_case,
        onto as onto,
        read_case_labels as read_case_labels,
        read_channels as read_channels,
    )
    from medseg.dataset.check.cases import (
        Check as Check,
        Digests as Digests,
        check_dataset as check_dataset,
        digest_case as digest_case,
    )
    from medseg.dataset.check.fix import write_fixed as write_fixed
    from medseg.dataset.check.measures import CaseFacts as CaseFacts
    from medseg.dataset.reading import read_dataset as read_dataset
    from medseg.dataset.splits import (
        Holdings as Holdings,
        Split as Split,
        covering as covering,
        lacking as lacking,
        split_cases as split_cases,
        usual_folds as usual_folds,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "cases": (
            "Case",
            "Dataset",
            "Finding",
            "load_case",
            "onto",
            "read_case_labels",
            "read_channels",
        ),
        "check.cases": ("Check", "Digests", "check_dataset", "digest_case"),
        "check.fix": ("write_fixed",),
        "check.measures": ("CaseFacts",),
        "reading": ("read_dataset",),
        "splits": ("Holdings", "Split", "covering", "lacking", "split_cases", "usual_folds"),
    },
)
