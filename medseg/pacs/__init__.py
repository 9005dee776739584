"""PACS: studies and series over DICOMweb, and a node that receives, segments and replies."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.pacs.client import (
        Access as Access,
        Limits as Limits,
        Pacs as Pacs,
        is_address as is_address,
        parse_address as parse_address,
        read_access as read_access,
    )
    from medseg.pacs.inbox import NodeOptions as NodeOptions
    from medseg.pacs.node import (
        Listener as Listener,
        keep_in as keep_in,
        segment_in_child as segment_in_child,
        send_to as send_to,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "client": ("Access", "Limits", "Pacs", "is_address", "parse_address", "read_access"),
        "inbox": ("NodeOptions",),
        "node": ("Listener", "keep_in", "segment_in_child", "send_to"),
    },
)
