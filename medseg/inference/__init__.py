"""From a scan to labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.inference.arithmetic import (
        limit_threads as limit_threads,
        settle_auto as settle_auto,
        use_settled as use_settled,
    )
    from medseg.inference.backends.kept import models_kept_open as models_kept_open
    from medseg.inference.existing import why_again as why_again
    from medseg.inference.exports import export as export
    from medseg.inference.inputs import (
        network_input as network_input,
        network_labels as network_labels,
    )
    from medseg.inference.jobs import (
        Extras as Extras,
        Job as Job,
        given_name as given_name,
        is_result_name as is_result_name,
        list_jobs as list_jobs,
    )
    from medseg.inference.preprocess import (
        labels_on_grid as labels_on_grid,
        prepare as prepare,
        scale_to_percentiles as scale_to_percentiles,
    )
    from medseg.inference.record import (
        FORMAT as FORMAT,
        describe as describe,
        file_hash as file_hash,
        finished_now as finished_now,
        voxel_hash as voxel_hash,
    )
    from medseg.inference.results import (
        BRAIN_RESULTS as BRAIN_RESULTS,
        DICOM_RESULTS as DICOM_RESULTS,
        brain_of as brain_of,
        check_also as check_also,
        check_job as check_job,
        dicom_results as dicom_results,
        identity_of as identity_of,
    )
    from medseg.inference.run import (
        Addition as Addition,
        infer as infer,
        load_model as load_model,
    )
    from medseg.inference.segmentation import Segmentation as Segmentation, segment as segment
    from medseg.inference.settings import (
        SETTING_WORDS as SETTING_WORDS,
        Model as Model,
        Settings as Settings,
        channel_names as channel_names,
        check_device as check_device,
        label_table as label_table,
        labels_named as labels_named,
    )
    from medseg.inference.untrained import UNTRAINED as UNTRAINED

__getattr__, __dir__ = door(
    __name__,
    {
        "arithmetic": ("limit_threads", "settle_auto", "use_settled"),
        "backends.kept": ("models_kept_open",),
        "existing": ("why_again",),
        "exports": ("export",),
        "inputs": ("network_input", "network_labels"),
        "jobs": ("Extras", "Job", "given_name", "is_result_name", "list_jobs"),
        "preprocess": ("labels_on_grid", "prepare", "scale_to_percentiles"),
        "record": ("FORMAT", "describe", "file_hash", "finished_now", "voxel_hash"),
        "results": (
            "BRAIN_RESULTS",
            "DICOM_RESULTS",
            "brain_of",
            "check_also",
            "check_job",
            "dicom_results",
            "identity_of",
        ),
        "run": ("Addition", "infer", "load_model"),
        "segmentation": ("Segmentation", "segment"),
        "settings": (
            "Model",
            "SETTING_WORDS",
            "Settings",
            "channel_names",
            "check_device",
            "label_table",
            "labels_named",
        ),
        "untrained": ("UNTRAINED",),
    },
)
