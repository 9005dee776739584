"""Pictures of a scan and its labels."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.view.contrast import contrast_of as contrast_of
    from medseg.view.figure import draw_figure as draw_figure
    from medseg.view.meshes.files import (
        export_surfaces as export_surfaces,
        write_surfaces as write_surfaces,
    )
    from medseg.view.meshes.surfaces import Surface as Surface, surfaces_of as surfaces_of
    from medseg.view.page import prepare as prepare, write_page as write_page
    from medseg.view.picture import (
        Word as Word,
        cut as cut,
        drawable as drawable,
        lettered as lettered,
        png_bytes as png_bytes,
    )
    from medseg.view.plots import (
        COLORS as COLORS,
        GREY as GREY,
        INK as INK,
        TEXT as TEXT,
        add_legend as add_legend,
        box_plot as box_plot,
        histogram as histogram,
        new_figure as new_figure,
        number_text as number_text,
        plain_axes as plain_axes,
        png_of as png_of,
    )
    from medseg.view.preview import (
        PLANES as PLANES,
        direction_words as direction_words,
        grey_picture as grey_picture,
        strip_png as strip_png,
        upright as upright,
        write_beside as write_beside,
        write_preview as write_preview,
        write_strip as write_strip,
    )
    from medseg.view.scene import write_scene as write_scene
    from medseg.view.server import PageServer as PageServer
    from medseg.view.structures import (
        chosen_values as chosen_values,
        full_table as full_table,
        labels_on_scan as labels_on_scan,
    )
    from medseg.view.style import PAGE_STYLE as PAGE_STYLE, TABLE_SCRIPT as TABLE_SCRIPT

__getattr__, __dir__ = door(
    __name__,
    {
        "contrast": ("contrast_of",),
        "figure": ("draw_figure",),
        "meshes.files": ("export_surfaces", "write_surfaces"),
        "meshes.surfaces": ("Surface", "surfaces_of"),
        "page": ("prepare", "write_page"),
        "picture": ("Word", "cut", "drawable", "lettered", "png_bytes"),
        "plots": (
            "COLORS",
            "GREY",
            "INK",
            "TEXT",
            "add_legend",
            "box_plot",
            "histogram",
            "new_figure",
            "number_text",
            "plain_axes",
            "png_of",
        ),
        "preview": (
            "PLANES",
            "direction_words",
            "grey_picture",
            "strip_png",
            "upright",
            "write_beside",
            "write_preview",
            "write_strip",
        ),
        "scene": ("write_scene",),
        "server": ("PageServer",),
        "style": ("PAGE_STYLE", "TABLE_SCRIPT"),
        "structures": ("chosen_values", "full_table", "labels_on_scan"),
    },
    called="view",
)
