"""From thousands of scans to one table."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.cohort.cases import Case as Case, Cohort as Cohort
    from medseg.cohort.course import Limits as Limits
    from medseg.cohort.gather import Gathered as Gathered, gather_cohort as gather_cohort
    from medseg.cohort.part import (
        RETRIES as RETRIES,
        Choice as Choice,
        Result as Result,
        Sorted as Sorted,
        forecast_case as forecast_case,
        plan_part as plan_part,
        run_part as run_part,
    )
    from medseg.cohort.reading import Wanted as Wanted, read_any as read_any
    from medseg.cohort.request import Request as Request, read_cohort as read_cohort
    from medseg.cohort.resources import cores_here as cores_here, usable_bytes as usable_bytes
    from medseg.cohort.shards import parse_shard as parse_shard
    from medseg.cohort.stores import is_store as is_store
    from medseg.cohort.volumes import (
        list_label_maps as list_label_maps,
        long_rows as long_rows,
        measure_all as measure_all,
        wide_rows as wide_rows,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "gather": ("Gathered", "gather_cohort"),
        "part": ("RETRIES", "Choice", "Result", "Sorted", "forecast_case", "plan_part", "run_part"),
        "cases": ("Case", "Cohort"),
        "course": ("Limits",),
        "reading": ("Wanted", "read_any"),
        "request": ("Request", "read_cohort"),
        "resources": ("cores_here", "usable_bytes"),
        "shards": ("parse_shard",),
        "stores": ("is_store",),
        "volumes": ("list_label_maps", "long_rows", "measure_all", "wide_rows"),
    },
)
