"""A data set that grows while a model is trained from it: scans, corrected labels, what to label
next.
"""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.annotation.choice import (
        STRATEGIES as STRATEGIES,
        Candidate as Candidate,
        Choice as Choice,
        Doubt as Doubt,
        candidates as candidates,
        choose as choose,
        look_at as look_at,
        name_of as name_of,
    )
    from medseg.annotation.guard import Login as Login, Rules as Rules, read_login as read_login
    from medseg.annotation.listing import (
        FINAL as FINAL,
        LIST as LIST,
        ORIGINAL as ORIGINAL,
        SPLITS as SPLITS,
        StoredCase as StoredCase,
        check_id as check_id,
        in_order as in_order,
    )
    from medseg.annotation.rounds import Round as Round, rounds_of as rounds_of
    from medseg.annotation.served import Served as Served, serve_models as serve_models
    from medseg.annotation.server import (
        Server as Server,
        ServerOptions as ServerOptions,
        check_libraries as check_libraries,
    )
    from medseg.annotation.service import Service as Service
    from medseg.annotation.store import (
        NO_NAMES as NO_NAMES,
        Store as Store,
        read_files as read_files,
        read_segmentation as read_segmentation,
    )
    from medseg.annotation.studies import open_studies as open_studies
    from medseg.annotation.teaching import (
        Progress as Progress,
        Teaching as Teaching,
        newest_models as newest_models,
        next_run as next_run,
        runs_of as runs_of,
        start as start,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "guard": ("Login", "Rules", "read_login"),
        "served": ("Served", "serve_models"),
        "server": ("Server", "ServerOptions", "check_libraries"),
        "service": ("Service",),
        "studies": ("open_studies",),
        "choice": (
            "STRATEGIES",
            "Candidate",
            "Choice",
            "Doubt",
            "candidates",
            "choose",
            "look_at",
            "name_of",
        ),
        "listing": ("FINAL", "LIST", "ORIGINAL", "SPLITS", "StoredCase", "check_id", "in_order"),
        "rounds": ("Round", "rounds_of"),
        "store": ("NO_NAMES", "Store", "read_files", "read_segmentation"),
        "teaching": ("Progress", "Teaching", "newest_models", "next_run", "runs_of", "start"),
    },
)
