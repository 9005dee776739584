"""From a scan to labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.inference.exports import export as export
    from medseg.inference.intensity import INTENSITY_MODELS as INTENSITY_MODELS
    from medseg.inference.jobs import Extras as Extras, Job as Job, list_jobs as list_jobs
    from medseg.inference.preprocess import (
        labels_on_grid as labels_on_grid,
        prepare as prepare,
        scale_to_percentiles as scale_to_percentiles,
    )
    from medseg.inference.record import describe as describe
    from medseg.inference.results import (
        BRAIN_RESULTS as BRAIN_RESULTS,
        DICOM_RESULTS as DICOM_RESULTS,
        check_also as check_also,
        check_output as check_output,
        dicom_results as dicom_results,
    )
    from medseg.inference.run import infer as infer, load_model as load_model
    from medseg.inference.segmentation import Segmentation as Segmentation, segment as segment
    from medseg.inference.settings import (
        Settings as Settings,
        channel_names as channel_names,
        labels_named as labels_named,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "exports": ("export",),
        "intensity": ("INTENSITY_MODELS",),
        "jobs": ("Extras", "Job", "list_jobs"),
        "preprocess": ("labels_on_grid", "prepare", "scale_to_percentiles"),
        "record": ("describe",),
        "results": ("BRAIN_RESULTS", "DICOM_RESULTS", "check_also", "check_output", "dicom_results"),
        "run": ("infer", "load_model"),
        "segmentation": ("Segmentation", "segment"),
        "settings": ("Settings", "channel_names", "labels_named"),
    },
)
