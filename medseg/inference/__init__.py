"""From a scan to labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.inference.arithmetic import (
        limit_threads as limit_threads,
        settle_auto as settle_auto,
        use_settled as use_settled,
    )
    from medseg.inference.backends.cards import (
        computes_bfloat16 as computes_bfloat16,
        free_bytes_on as free_bytes_on,
        in_sentences as in_sentences,
        is_out_of_memory as is_out_of_memory,
        unless_full as unless_full,
    )
    from medseg.inference.backends.copies import (
        Courier as Courier,
        Event as Event,
        Fetched as Fetched,
        Link as Link,
        link_to as link_to,
    )
    from medseg.inference.backends.kept import models_kept_open as models_kept_open
    from medseg.inference.backends.predictor import choose_device as choose_device
    from medseg.inference.bundles import (
        write_bundle as write_bundle,
        write_torchscript as write_torchscript,
    )
    from medseg.inference.call import in_python as in_python, segment_scan as segment_scan
    from medseg.inference.existing import why_again as why_again
    from medseg.inference.exports import export as export
    from medseg.inference.forecast import Plan as Plan
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
        finished_now as finished_now,
        voxel_hash as voxel_hash,
    )
    from medseg.inference.result import Segmentation as Segmentation
    from medseg.inference.results import (
        BRAIN_RESULTS as BRAIN_RESULTS,
        DICOM_RESULTS as DICOM_RESULTS,
        TABLE_RESULTS as TABLE_RESULTS,
        brain_of as brain_of,
        check_also as check_also,
        check_job as check_job,
        dicom_results as dicom_results,
        identity_of as identity_of,
    )
    from medseg.inference.run import (
        Addition as Addition,
        forecast_job as forecast_job,
        infer as infer,
        load_model as load_model,
        read_scans as read_scans,
        without_names as without_names,
    )
    from medseg.inference.segmentation import segment as segment
    from medseg.inference.settings import (
        SETTING_WORDS as SETTING_WORDS,
        Model as Model,
        Settings as Settings,
        as_list as as_list,
        channel_names as channel_names,
        check_device as check_device,
        is_set as is_set,
        label_table as label_table,
        labels_named as labels_named,
    )
    from medseg.inference.tables import Table as Table, as_html as as_html, make_table as make_table
    from medseg.inference.untrained import (
        AUTO as AUTO,
        CT_TISSUES as CT_TISSUES,
        UNTRAINED as UNTRAINED,
        names_tissues as names_tissues,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "arithmetic": ("limit_threads", "settle_auto", "use_settled"),
        "backends.cards": (
            "computes_bfloat16",
            "free_bytes_on",
            "in_sentences",
            "is_out_of_memory",
            "unless_full",
        ),
        "backends.copies": ("Courier", "Event", "Fetched", "Link", "link_to"),
        "backends.kept": ("models_kept_open",),
        "backends.predictor": ("choose_device",),
        "bundles": ("write_bundle", "write_torchscript"),
        "existing": ("why_again",),
        "call": ("in_python", "segment_scan"),
        "exports": ("export",),
        "forecast": ("Plan",),
        "inputs": ("network_input", "network_labels"),
        "jobs": ("Extras", "Job", "given_name", "is_result_name", "list_jobs"),
        "preprocess": ("labels_on_grid", "prepare", "scale_to_percentiles"),
        "record": ("FORMAT", "describe", "finished_now", "voxel_hash"),
        "results": (
            "BRAIN_RESULTS",
            "TABLE_RESULTS",
            "DICOM_RESULTS",
            "brain_of",
            "check_also",
            "check_job",
            "dicom_results",
            "identity_of",
        ),
        "run": (
            "Addition",
            "forecast_job",
            "infer",
            "load_model",
            "read_scans",
            "without_names",
        ),
        "result": ("Segmentation",),
        "segmentation": ("segment",),
        "settings": (
            "Model",
            "SETTING_WORDS",
            "Settings",
            "as_list",
            "channel_names",
            "check_device",
            "is_set",
            "label_table",
            "labels_named",
        ),
        "tables": ("Table", "as_html", "make_table"),
        "untrained": ("AUTO", "CT_TISSUES", "UNTRAINED", "names_tissues"),
    },
)
