"""DICOM: series become volumes; label maps become segmentations, structure sets and reports."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.io.dicom.headers import guarded as guarded, header_values as header_values
    from medseg.io.dicom.report import report_dataset as report_dataset
    from medseg.io.dicom.result import (
        Origin as Origin,
        check_grid as check_grid,
        open_origin as open_origin,
        save as save,
        without_warnings as without_warnings,
    )
    from medseg.io.dicom.rtstruct import rtstruct_dataset as rtstruct_dataset
    from medseg.io.dicom.seg import seg_dataset as seg_dataset
    from medseg.io.dicom.source import Source as Source
    from medseg.io.dicom.volumes import Listed as Listed

__getattr__, __dir__ = door(
    __name__,
    {
        "headers": ("guarded", "header_values"),
        "report": ("report_dataset",),
        "result": ("Origin", "check_grid", "open_origin", "save", "without_warnings"),
        "rtstruct": ("rtstruct_dataset",),
        "seg": ("seg_dataset",),
        "source": ("Source",),
        "volumes": ("Listed",),
    },
)
