"""Pictures of a scan and its labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.view.figure import draw_figure as draw_figure
    from medseg.view.lettering import letters as letters, write_text as write_text
    from medseg.view.page import (
        full_table as full_table,
        prepare as prepare,
        write_page as write_page,
    )
    from medseg.view.png import png_bytes as png_bytes
    from medseg.view.preview import (
        strip_png as strip_png,
        write_preview as write_preview,
        write_strip as write_strip,
    )
    from medseg.view.scene import write_scene as write_scene
    from medseg.view.server import PageServer as PageServer

__getattr__, __dir__ = door(
    __name__,
    {
        "figure": ("draw_figure",),
        "lettering": ("letters", "write_text"),
        "page": ("full_table", "prepare", "write_page"),
        "png": ("png_bytes",),
        "preview": ("strip_png", "write_preview", "write_strip"),
        "scene": ("write_scene",),
        "server": ("PageServer",),
    },
    called="view",
)
