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
        read_label_file as read_label_file,
    )
    from medseg.dataset.check.cases import (
        Check as Check,
        Digests as Digests,
        Measurement as Measurement,
        check_dataset as check_dataset,
        conclude as conclude,
        digest_case as digest_case,
        measure_case as measure_case,
    )
    from medseg.dataset.check.fix import write_fixed as write_fixed
    from medseg.dataset.check.kept import (
        measurement_as_json as measurement_as_json,
        measurement_from_json as measurement_from_json,
        portrait_as_json as portrait_as_json,
        portrait_from_json as portrait_from_json,
    )
    from medseg.dataset.check.measures import CaseFacts as CaseFacts
    from medseg.dataset.layouts.finding import SPLIT_WORDS as SPLIT_WORDS
    from medseg.dataset.reading import complete as complete, read_dataset as read_dataset
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
            "read_label_file",
        ),
        "check.cases": (
            "Check",
            "Digests",
            "Measurement",
            "check_dataset",
            "conclude",
            "digest_case",
            "measure_case",
        ),
        "check.fix": ("write_fixed",),
        "check.kept": (
            "measurement_as_json",
            "measurement_from_json",
            "portrait_as_json",
            "portrait_from_json",
        ),
        "check.measures": ("CaseFacts",),
        "layouts.finding": ("SPLIT_WORDS",),
        "reading": ("complete", "read_dataset"),
        "splits": ("Holdings", "Split", "covering", "lacking", "split_cases", "usual_folds"),
    },
)
