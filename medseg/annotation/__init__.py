"""A data set that grows while a model is trained from it: scans, corrected labels, what to label
next.
"""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.annotation.listing import (
        FINAL as FINAL,
        LIST as LIST,
        ORIGINAL as ORIGINAL,
        StoredCase as StoredCase,
        check_id as check_id,
    )
    from medseg.annotation.store import (
        Store as Store,
        read_segmentation as read_segmentation,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "listing": ("FINAL", "LIST", "ORIGINAL", "StoredCase", "check_id"),
        "store": ("Store", "read_segmentation"),
    },
)
