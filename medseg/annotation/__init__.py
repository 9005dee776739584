"""A data set that grows while a model is trained from it: scans, corrected labels, what to label
next.
"""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.annotation.guard import Login as Login, Rules as Rules, read_login as read_login
    from medseg.annotation.listing import (
        FINAL as FINAL,
        LIST as LIST,
        ORIGINAL as ORIGINAL,
        StoredCase as StoredCase,
        check_id as check_id,
    )
    from medseg.annotation.served import Served as Served, serve_models as serve_models
    from medseg.annotation.server import (
        Server as Server,
        ServerOptions as ServerOptions,
        check_libraries as check_libraries,
    )
    from medseg.annotation.service import Service as Service
    from medseg.annotation.store import (
        Store as Store,
        read_segmentation as read_segmentation,
    )
    from medseg.annotation.studies import open_studies as open_studies

__getattr__, __dir__ = door(
    __name__,
    {
        "listing": ("FINAL", "LIST", "ORIGINAL", "StoredCase", "check_id"),
        "guard": ("Login", "Rules", "read_login"),
        "served": ("Served", "serve_models"),
        "server": ("Server", "ServerOptions", "check_libraries"),
        "service": ("Service",),
        "studies": ("open_studies",),
        "store": ("Store", "read_segmentation"),
    },
)
